"""What a comparison runs: a TOML file, checked, in one frozen object."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .engine import PRECISIONS
from .methods import METHODS, Method, Task
from .networks import NETWORKS
from .table import SPLITS
from .teachers import TEACHERS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CONFIGS = Path(__file__).parent / "configs"
AUGMENTATIONS = ("shift", "flip")
SWEPT = ("batch_size", "epochs")  # what else than methods' options
PRETRAINED = tuple(name.partition(":")[0] for name in TEACHERS)
UNKNOWN = Task(1, 1, 2, lambda: nn.Linear(1, 2), lambda layers: dict.fromkeys(layers, (1, 1)))


@dataclass(frozen=True)
class Row:
    """A row of the comparison: a method with all its options, under a name of its own.

    `layered`: it compares layers of networks that run in the step.
    """

    name: str
    method: Method
    title: str
    options: Mapping[str, Any]
    layered: bool = False


@dataclass(frozen=True)
class Sweep:
    """Some rows of the comparison with one option at several values.

    Attributes:
        name: of the sweep.
        option: of the rows' methods, or one of `SWEPT`.
        values: of the option.
        methods: the rows' names.
        seeds: one run of a value each; none: those of the comparison.
    """

    name: str
    option: str
    values: tuple[Any, ...] = ()
    methods: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()


@dataclass(frozen=True)
class Config:
    """What to run; each field is a key of the file.

    Attributes:
        name: of the run; results go to `out`/`name`.
        data: see `data.load`.
        teacher: `trained:NETWORK`, trained here with labels; one of `teachers.TEACHERS`, pretrained;
            or `features:PATH[,PATH...]`, computed before; not needed where the data are `features:`
            themselves. `teacher_size`: in pixels, of what a pretrained one sees, None its own.
        student: one of `networks.NETWORKS`; `student_width`: of its features, None its own.
        tokenizer, vocabulary, text_length: of the student's texts, see `data.to_dataset`.
        methods: tables [methods.NAME]; `method` says which, where NAME is not one itself; `title`
            is printed; the rest are the method's options.
        sweeps: tables [sweeps.NAME], of `values` for `option`, which NAME is by default, and the names of
            the `methods` that have it; each value is tuned and trained as a row, over `seeds`, by default
            those of the comparison, and reported beside the rows.
        seeds: of the students' starts and batches, one run each.
        learning_rates: each method takes the one that is best on the validation split with the first
            seed, by the mean of linear probe and kNN.
        epochs, batch_size, augment: of the students; augment holds `shift` and `flip`, or neither.
        teacher_epochs, teacher_learning_rate: of a teacher that is trained here.
        limit: rows of `train`, `val` and `test` at most; classes: the first so many alone;
            image_size: to resize images to.
        cache: folder of decoded image trees and of pretrained teachers' features.
        device, threads: what PyTorch uses, None its own. `mixed_precision`: see `make_engine`.
        caption: a sentence for the report, on what is compared and why.
    """

    name: str
    methods: tuple[Row, ...]
    sweeps: tuple[Sweep, ...] = ()
    data: str = "digits"
    teacher: str = ""
    teacher_size: int | None = None
    student: str = "resnet8_small"
    student_width: int | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    epochs: int = 40
    batch_size: int = 64
    augment: tuple[str, ...] = ("shift",)
    tokenizer: str = "words"
    vocabulary: int = 8192
    text_length: int = 32
    teacher_epochs: int = 24
    teacher_learning_rate: float = 3e-3
    limit: Mapping[str, int] = field(default_factory=dict)
    classes: int | None = None
    image_size: int | None = None
    cache: str = "runs/cache"
    out: str = "runs"
    device: str = "cpu"
    mixed_precision: str = "no"
    threads: int | None = None
    caption: str = ""

    @property
    def pretrained(self) -> bool:
        """Is the teacher one of `TEACHERS`?"""
        return self.teacher.partition(":")[0] in PRETRAINED

    def __post_init__(self) -> None:
        """Checks what the types do not say.

        Raises:
            ValueError: a key is out of range; the message names it and what is allowed.
        """
        for key in ("epochs", "teacher_epochs", "student_width", "image_size", "teacher_size"):
            _at_least(key, getattr(self, key), 1)
        for key in ("threads", "text_length"):
            _at_least(key, getattr(self, key), 1)
        _at_least("vocabulary", self.vocabulary, 3)
        _at_least("classes", self.classes, 2)
        _at_least("batch_size", self.batch_size, 4)
        for split, count in self.limit.items():
            if split not in SPLITS:
                raise ValueError(f"limit: got {split!r}; allowed: {', '.join(SPLITS)}")
            _at_least(f"limit.{split}", count, 1)
        for rate in (*self.learning_rates, self.teacher_learning_rate):
            if isinstance(rate, bool) or not 0 < rate < float("inf"):
                raise ValueError(f"learning rate: got {rate!r}; allowed: a finite number above 0")
        for key in ("seeds", "learning_rates", "methods"):
            _each_once(key, getattr(self, key))
        kind, _, teacher = self.teacher.partition(":")
        for key, value, allowed in (
            ("student", self.student, tuple(NETWORKS)),
            ("teacher", kind, ("", "features", "trained", *PRETRAINED)),
            ("mixed_precision", self.mixed_precision, PRECISIONS),
            *(("teacher: trained", teacher, tuple(NETWORKS)) for _ in range(kind == "trained")),
            *(("augment", way, AUGMENTATIONS) for way in self.augment),
        ):
            if value not in allowed:
                raise ValueError(f"{key}: got {value!r}; allowed: {', '.join(allowed)}")
        if self.data.startswith("features:") == bool(self.teacher):
            raise ValueError(
                f"teacher: got {self.teacher!r} with data {self.data!r}; allowed: trained:NETWORK, "
                f"features:PATH, {', '.join(TEACHERS)}, or none where the data are features:PATH "
                "themselves"
            )
        layered = [row.name for row in self.methods if row.layered]
        if layered and kind in ("", "features"):
            raise ValueError(
                f"methods.{layered[0]}: layers are of a teacher that runs in the step; got the teacher "
                f"{self.teacher!r}, whose features are cached"
            )
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"device: got {self.device!r}: {reason}") from error
        for sweep in self.sweeps:
            _each_once(f"sweeps.{sweep.name}.values", sweep.values)
            _each_once(f"sweeps.{sweep.name}.methods", sweep.methods)
            for row, value in product(sweep.methods, sweep.values):
                varied(self, row, sweep.option, value)  # a mistake shows here


def varied(config: Config, name: str, option: str, value: Any) -> tuple[Config, Row]:
    """The comparison and its row of a name, with another value of an option, if it is another.

    Raises:
        ValueError: there is no such row or option, or the value is not allowed.
    """
    rows = {row.name: row for row in config.methods}
    if name not in rows:
        raise ValueError(f"sweeps: got the method {name!r}; allowed: {', '.join(rows)}")
    row, own = rows[name], option in SWEPT
    if value == (getattr(config, option) if own else row.options.get(option)):
        return config, row
    row = replace(row, name=f"{name}-{option}-{value}")
    if own:
        value = _typed(option, value, "int")
        return replace(config, sweeps=(), **{option: value}), row
    options = {**row.options, option: value}
    row.method.build(UNKNOWN, options)
    return config, replace(row, options=options)


def load_config(source: str, changes: Sequence[str] = ()) -> Config:
    """Reads a configuration.

    Args:
        source: a TOML file, or the name of one in `pc_kernels/distill/configs`.
        changes: `KEY=VALUE`, applied last; KEY may be dotted (`limit.train=500`), VALUE is TOML or,
            where it is none, a string.

    Raises:
        ValueError: it is not TOML, or a key is unknown, of another type, or out of range.
        FileNotFoundError: there is no such file.
    """
    path = Path(source)
    if not path.suffix:
        path = CONFIGS / f"{source}.toml"
    if not path.exists():
        known = ", ".join(sorted(file.stem for file in CONFIGS.glob("*.toml")))
        raise FileNotFoundError(f"--config: {source} does not exist; allowed: a file, or {known}")
    try:
        values = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--config: {path} is not TOML: {error}") from error
    for change in changes:
        _apply(values, change)
    return make_config({"name": path.stem} | values)


def make_config(values: Mapping[str, Any]) -> Config:
    """A configuration of the values that a file holds.

    Raises:
        ValueError: a key is unknown, of another type, or out of range.
    """
    made: dict[str, Any] = {}
    for key, make in (("methods", _row), ("sweeps", _sweep)):
        tables = _table(key, values.get(key, {}))
        made[key] = tuple(make(name, table) for name, table in tables.items())
    return Config(**_checked("config", {**values, **made}, Config))


def _checked(key: str, values: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """The values, each of the type of the dataclass's field of its name."""
    known = {item.name: str(item.type) for item in fields(kind)}
    for name in values:
        if name not in known:
            raise ValueError(f"{key}: unknown key {name!r}; allowed: {', '.join(known)}")
    return {name: _typed(name, value, known[name]) for name, value in values.items()}


def _typed(key: str, value: Any, kind: str) -> Any:
    """The value, lists as tuples, if it is of the annotated type."""
    if kind == "Any":
        return value
    value = tuple(value) if isinstance(value, list) else value
    single, of = kind.partition("[")[::2]
    if single == "tuple":
        if isinstance(value, tuple):
            return tuple(_typed(key, item, of.partition(",")[0]) for item in value)
    elif single == "Mapping":
        return {
            name: _typed(f"{key}.{name}", item, "int") for name, item in _table(key, value).items()
        }
    else:
        kinds: dict[str, Any] = {"int": int, "float": (int, float), "str": str}
        kinds |= {"Row": Row, "Sweep": Sweep}
        allowed = [kinds[part] for part in kind.split(" | ") if part in kinds]
        if any(isinstance(value, one) for one in allowed) and not isinstance(value, bool):
            return value
    raise ValueError(f"{key}: got {value!r}; allowed: {kind}")


def _table(key: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{key}: got {value!r}; allowed: a table")
    return value


def _row(name: str, options: Any) -> Row:
    options = dict(_table(f"methods.{name}", options))
    which = options.pop("method", name)
    if which not in METHODS:
        raise ValueError(f"methods.{name}: got {which!r}; allowed: {', '.join(METHODS)}")
    method, title = METHODS[which], options.pop("title", None)
    options = method.defaults | options
    objective = method.build(UNKNOWN, options)  # a mistake shows here
    variant = getattr(objective, "variant", None)
    title = title or (method.title if variant is None else f"{method.title} ({variant})")
    return Row(name, method, title, options, bool(getattr(objective, "layers", ())))


def _sweep(name: str, values: Any) -> Sweep:
    key = f"sweeps.{name}"
    return Sweep(**_checked(key, {"name": name, "option": name, **_table(key, values)}, Sweep))


def _apply(values: dict[str, Any], change: str) -> None:
    key, equals, text = change.partition("=")
    if not equals:
        raise ValueError(f"--set: got {change!r}; allowed: KEY=VALUE")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *tables, last = key.strip().split(".")
    for table in tables:
        values = values.setdefault(table, {})
        _table(f"--set {key}", values)
    values[last] = value


def _each_once(key: str, values: Sequence[Any]) -> None:
    if not values or len(set(map(str, values))) < len(values):
        raise ValueError(f"{key}: got {values}; allowed: one or more, each once")


def _at_least(key: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise ValueError(f"{key}: got {value}; allowed: {least} or more")
