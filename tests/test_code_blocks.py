"""Every code block of README, of the documentation and of the docstrings is run.

Blocks of a page run in order and share their names. A comment before a block, which readers do not see,
may say what it needs, or that it cannot run here:

    <!-- run first: student = torch.randn(32, 128) -->
    <!-- not run: needs a GPU -->        (or a network)

Shell commands are not run, but what they name has to be there.
"""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import ROOT

import pc_kernels
from pc_kernels import rules
from pc_kernels.losses import RankingLoss

PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
MODULES = [path for path in ROOT.glob("pc_kernels/**/*.py") if ">>>" in path.read_text("utf-8")]
NOT_CODE = ("text", "yaml", "toml", "cpp", "bibtex")
UNRUN = ("needs a GPU", "needs a network")
PIECE = re.compile(
    r"<!-- (?P<order>run first|not run):\s+(?P<said>.*?)\s*-->"
    r"|^(?P<indent> *)```(?P<language>\S*)[^\n]*\n(?P<code>.*?)^(?P=indent)```$",
    re.M | re.S,
)


class Block(NamedTuple):
    """A code block of a page."""

    place: str
    line: int
    language: str
    code: str
    before: str
    """Python to run before it."""
    unrun: str | None
    """Why it is not run."""


def blocks(page: Path) -> Iterator[Block]:
    """The code blocks of a page, in order."""
    text, orders = page.read_text("utf-8"), {"run first": "", "not run": ""}
    for piece in PIECE.finditer(text):
        if piece["order"]:
            orders[piece["order"]] = piece["said"]
            continue
        indent = len(piece["indent"])
        code = "".join(line[indent:] for line in piece["code"].splitlines(keepends=True))
        line = text.count("\n", 0, piece.start()) + 1
        place = f"{page.relative_to(ROOT)}:{line}"
        yield Block(
            place, line, piece["language"], code, orders["run first"], orders["not run"] or None
        )
        orders = {"run first": "", "not run": ""}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


WITH_PYTHON = [page for page in PAGES if any(b.language == "python" for b in blocks(page))]


@pytest.fixture
def no_group_left() -> Iterator[None]:
    """Ends the process group that a page began."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
@pytest.mark.usefixtures("no_group_left")
def test_python(page: Path) -> None:
    names: dict[str, Any] = {"__name__": "__main__", "torch": torch, "pc_kernels": pc_kernels}
    for block in blocks(page):
        if block.language != "python" or block.unrun is not None:
            continue
        included = re.fullmatch(r'--8<-- "(.+)"\n', block.code)
        if included:  # tests/test_examples.py runs it
            assert (ROOT / included[1]).is_file(), f"{block.place} includes {included[1]}"
            continue
        exec(compile(block.before, f"{block.place}, before", "exec"), names)
        exec(compile("\n" * block.line + block.code, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_languages_and_commands(page: Path) -> None:
    """Each block says what it is; commands name targets, modules and files that there are."""
    for block in blocks(page):
        known = ("python", "sh", *NOT_CODE)
        assert block.language in known, f"{block.place}: ```{block.language}, not one of {known}"
        assert block.unrun in (None, *UNRUN), f"{block.place}: {block.unrun!r}, not one of {UNRUN}"
        if block.language == "sh":
            for line in block.code.replace("\\\n", " ").splitlines():
                check_command(block.place, shlex.split(line, comments=True))


def check_command(place: str, words: list[str]) -> None:
    """Fails unless what a command names is there."""
    match words:
        case [] | ["pip" | "git" | "cd" | "export" | "auditwheel" | "cibuildwheel", *_]:
            return
        case ["make", *targets]:
            makefile = (ROOT / "Makefile").read_text("utf-8")
            for target in (t for t in targets if "=" not in t):
                assert re.search(rf"^{target}:", makefile, re.M), f"{place}: make {target}"
        case ["python", "-m", module, *_]:
            assert importlib.util.find_spec(module) or module in ("build", "venv"), (
                f"{place}: python -m {module}"
            )
        case ["python" | "torchrun" | "accelerate", *arguments]:
            scripts = [a for a in arguments if a.endswith(".py")]
            assert scripts, f"{place}: no script in {shlex.join(words)}"
            for script in scripts:
                assert (ROOT / script).is_file(), f"{place}: {script}"
        case _:
            pytest.fail(f"{place}: {words[0]} is not a command that this test knows")


VOCABULARY = """
encoder, images = torch.nn.Linear(16, 128), torch.randn(32, 16)
optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
loss_fn = pc_kernels.PerceptionCoherenceLoss()
student, teacher = torch.randn(32, 128, requires_grad=True), torch.randn(32, 512)
maps, teacher_maps = torch.randn(32, 8, 4, 4), torch.randn(32, 16, 4, 4)
embeddings, labels = torch.randn(32, 16), torch.arange(32) % 8
bank, bank_labels = torch.randn(64, 16), torch.arange(64) % 8
scores = predictions = torch.randn(4, 10)
relevance, clicks, grades, targets = torch.randint(0, 3, (4, 4, 10)).float()
is_positive = mask = torch.rand(4, 10) > 0.3
flat_scores, flat_relevance, offsets = scores[0], relevance[0], torch.tensor([0, 4, 10])
"""
"""What examples in docstrings may take for granted."""

NETWORKS = """
from collections import OrderedDict
nn, images = torch.nn, torch.randn(2, 3, 8, 8)
layers = [(f"layer{i}", nn.Conv2d(4 if i > 1 else 3, 4, 3, padding=1)) for i in range(1, 5)]
cnn = nn.Sequential(OrderedDict(layers))
tokens = nn.Sequential(nn.Flatten(), nn.Linear(192, 197 * 4), nn.Unflatten(1, (197, 4)))
blocks = nn.Sequential(*(nn.Linear(4, 4) for _ in range(12)))
vit = nn.Sequential(OrderedDict(tokens=tokens, blocks=blocks))
"""
"""A CNN and what has a transformer's names and shapes."""

BEFORE = {
    "pc_kernels.losses.contrastive": "teacher = torch.randn(32, 128)",
    "pc_kernels.losses.lfcc": NETWORKS
    + 'teacher_layers = {"early": torch.randn(2, 197, 4), "late": torch.randn(2, 197, 4)}',
    "pc_kernels.training.layer_outputs": NETWORKS
    + "loss_fn = lambda student, teacher: student['early'].mean()",
    "pc_kernels.distill.meter": "work = list",
}
"""What the examples of a module need beside that, or otherwise."""


class Unasked(doctest.OutputChecker):
    """An example that shows no output may have some."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return not want or super().check_output(want, got, optionflags)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_docstrings(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "RULES", {})  # examples may add to them
    dotted = name_of(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    module = importlib.import_module(dotted)
    names = {**vars(module), "torch": torch, "pc_kernels": pc_kernels, "RankingLoss": RankingLoss}
    exec(VOCABULARY + BEFORE.get(dotted, ""), names)
    found = doctest.DocTestFinder(exclude_empty=True).find(module, extraglobs=names)
    examples = sum(len(test.examples) for test in found)
    assert examples == path.read_text("utf-8").count(">>>"), "doctest does not see every example"
    failures: list[str] = []
    for test in found:
        doctest.DocTestRunner(Unasked(), verbose=False).run(test, out=failures.append)
    assert not failures, "".join(failures)


def test_scripts_of_the_documentation_compile() -> None:
    for path in (ROOT / "docs").rglob("*.py"):
        ast.parse(path.read_text("utf-8"), name_of(path))
