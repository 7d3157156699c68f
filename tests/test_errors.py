"""Every wrong argument is a clear error: it names the argument, what came and what may come."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compare import BACKEND_NAMES
from torch import Tensor

import pc_kernels
from pc_kernels.backends import BACKENDS

S, T = torch.zeros(5, 3), torch.zeros(5, 2)
S_REFS, T_REFS = torch.zeros(4, 3), torch.zeros(4, 2)
D = torch.zeros(5, 4)

loss = pc_kernels.perception_coherence_loss
matrices = pc_kernels.coherence_loss_from_dissimilarities


def raises(error: type[Exception], *words: str, call: Callable[[], Any]) -> None:
    """`call` raises exactly this kind of error, and its message has all the words."""
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error, repr(caught.value)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in {caught.value!s}"


BAD_FEATURES: dict[str, tuple[tuple[Any, ...], type[Exception], tuple[str, ...]]] = {
    "a list": (([[1.0]], T), TypeError, ("student", "list", "Tensor")),
    "integers": ((S.long(), T), TypeError, ("student", "int64", "float32")),
    "integers for a teacher": ((S, T.int()), TypeError, ("teacher", "int32")),
    "booleans": ((S.bool(), T), TypeError, ("student", "bool")),
    "complex numbers": ((S.cfloat(), T), TypeError, ("student", "complex64")),
    "float8": ((S.to(torch.float8_e4m3fn), T), TypeError, ("student", "float8")),
    "sparse": ((S.to_sparse(), T), TypeError, ("student", "dense", "sparse")),
    "a vector": ((S[0], T), ValueError, ("student", "(3,)")),
    "three dimensions": ((S, T[None]), ValueError, ("teacher", "(1, 5, 2)")),
    "other numbers of rows": ((S, T[:4]), ValueError, ("student", "teacher", "5", "4")),
    "no width": ((S[:, :0], T), ValueError, ("student", "(5, 0)")),
    "no teacher width": ((S, T[:, :0]), ValueError, ("teacher", "(5, 0)")),
    "references of one side": ((S, T, S_REFS), ValueError, ("teacher_refs", "missing")),
    "labels": ((S, T, torch.arange(5)), ValueError, ("teacher_refs", "no labels")),
    "references of the other": ((S, T, None, T_REFS), ValueError, ("student_refs", "missing")),
    "other numbers of references": ((S, T, S_REFS, T_REFS[:2]), ValueError, ("_refs", "4", "2")),
    "another width": ((S, T, T_REFS, T_REFS), ValueError, ("student_refs", "3", "2")),
    "another teacher width": ((S, T, S_REFS, S_REFS), ValueError, ("teacher_refs", "2", "3")),
    "another device": ((S, T.to("meta")), ValueError, ("teacher", "meta", "cpu")),
    "references elsewhere": ((S, T, S_REFS.to("meta"), T_REFS), ValueError, ("student_refs",)),
}


@pytest.mark.parametrize("name", BAD_FEATURES)
def test_features(name: str) -> None:
    arguments, error, words = BAD_FEATURES[name]
    raises(error, *words, call=lambda: loss(*arguments))
    raises(error, *words, call=lambda: pc_kernels.coherence(*arguments))
    raises(error, *words, call=lambda: pc_kernels.PerceptionCoherenceLoss()(*arguments))


BAD_OPTIONS: dict[str, tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = {
    "temperature 0": ({"temperature": 0.0}, ValueError, ("temperature", "> 0", "0.0")),
    "temperature below 0": ({"temperature": -0.1}, ValueError, ("temperature", "-0.1")),
    "temperature NaN": ({"temperature": math.nan}, ValueError, ("temperature", "nan")),
    "temperature infinite": ({"temperature": math.inf}, ValueError, ("temperature", "inf")),
    "temperature a string": ({"temperature": "1"}, TypeError, ("temperature", "str")),
    "temperature a boolean": ({"temperature": True}, TypeError, ("temperature", "bool")),
    "relaxation": ({"relaxation": "tanh"}, ValueError, ("'tanh'", "'logistic'", "'normal'")),
    "relaxation None": ({"relaxation": None}, ValueError, ("relaxation", "None")),
    "scale": ({"scale": "mean"}, ValueError, ("scale", "'std'", "None", "'mean'")),
    "penalty": ({"penalty": "l2"}, ValueError, ("penalty", "'squared'", "'huber'", "'l2'")),
    "reduction": ({"reduction": "avg"}, ValueError, ("reduction", "'mean'", "'none'", "'avg'")),
    "chunk_bytes 0": ({"chunk_bytes": 0}, ValueError, ("chunk_bytes", "> 0")),
    "chunk_bytes a float": ({"chunk_bytes": 1e6}, TypeError, ("chunk_bytes", "float")),
    "backend": ({"backend": "gpu"}, ValueError, ("'gpu'", "'auto'", *map(repr, BACKENDS))),
    "backend None": ({"backend": None}, ValueError, ("backend", "None")),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_options(name: str) -> None:
    options, error, words = BAD_OPTIONS[name]
    raises(error, *words, call=lambda: loss(S, T, **options))
    raises(error, *words, call=lambda: matrices(D, D, **options))
    raises(error, *words, call=lambda: pc_kernels.PerceptionCoherenceLoss(**options))
    if not {"penalty", "reduction", "chunk_bytes"}.intersection(options):
        raises(error, *words, call=lambda: pc_kernels.soft_rank(D, **options))


@pytest.mark.parametrize("argument", ["dissimilarity", "teacher_dissimilarity"])
def test_metrics(argument: str) -> None:
    words = (argument, "'euclidean'", "'cityblock'", "'l1'")
    for call in (
        lambda: loss(S, T, **{argument: "l1"}),
        lambda: pc_kernels.coherence(S, T, **{argument: "l1"}),
        lambda: pc_kernels.PerceptionCoherenceLoss(**{argument: "l1"}),
    ):
        raises(ValueError, *words, call=call)
    raises(TypeError, argument, "int", call=lambda: loss(S, T, **{argument: 2}))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit.script itself
def test_scripting() -> None:
    """Of a loss, and of a module that holds one."""
    module = pc_kernels.PerceptionCoherenceLoss()
    for scripted in (module, torch.nn.Sequential(module)):
        raises(
            RuntimeError,
            "PerceptionCoherenceLoss",
            "torch.compile",
            call=lambda scripted=scripted: torch.jit.script(scripted),
        )


def test_matrices() -> None:
    raises(ValueError, "d_s", "d_t", "(5, 4)", "(4, 5)", call=lambda: matrices(D, D.T))
    raises(ValueError, "d_s", "(4,)", call=lambda: matrices(D[0], D[0]))
    raises(TypeError, "d_t", "int64", call=lambda: matrices(D, D.long()))
    raises(TypeError, "d_s", "ndarray", call=lambda: matrices(D.numpy(), D))
    raises(ValueError, "exclude_self", "(5, 4)", call=lambda: matrices(D, D, exclude_self=True))
    raises(ValueError, "d_t", "meta", call=lambda: matrices(D, D.to("meta")))


def test_ranks() -> None:
    for rank in (pc_kernels.soft_rank, pc_kernels.hard_rank):
        raises(TypeError, "x", "int64", "float32", call=lambda: rank(D.long()))  # noqa: B023
        raises(TypeError, "x", "list", call=lambda: rank([1.0]))  # noqa: B023
        raises(ValueError, "x", "scalar", call=lambda: rank(torch.tensor(1.0)))  # noqa: B023
        for dim in (2, -3):
            raises(ValueError, "dim", "(5, 4)", str(dim), call=lambda: rank(D, dim=dim))  # noqa: B023
        raises(TypeError, "dim", "float", call=lambda: rank(D, dim=0.0))  # noqa: B023
        raises(ValueError, "'auto'", "'gpu'", call=lambda: rank(D, backend="gpu"))  # noqa: B023


def test_pairwise_dissimilarity() -> None:
    call = pc_kernels.pairwise_dissimilarity
    raises(ValueError, "metric", "'l1'", "'cosine'", call=lambda: call(S, metric="l1"))
    raises(TypeError, "metric", call=lambda: call(S, metric=None))
    raises(ValueError, "width", "3", "2", call=lambda: call(S, T))
    raises(ValueError, "x", "(3,)", call=lambda: call(S[0]))
    raises(TypeError, "y", "int64", call=lambda: call(S, S.long()))
    raises(ValueError, "device", call=lambda: call(S, S.to("meta")))


def test_callables_that_return_something_else() -> None:
    def check(error: type[Exception], word: str, function: Any) -> None:
        student = S.clone().requires_grad_()
        raises(error, word, call=lambda: loss(student, T, dissimilarity=function))

    check(ValueError, "(5, 5)", lambda a, b: a)
    check(ValueError, "shape", lambda a, b: 1.0)
    check(ValueError, "differentiable", lambda a, b: torch.zeros(len(a), len(b)))


def test_a_backend_that_cannot_do_it_says_why() -> None:
    obstacle = BACKENDS["cpu"].obstacle(torch.device("cpu"), torch.float64)
    assert obstacle is not None
    for call in (
        lambda: loss(S.double(), T, backend="cpu"),
        lambda: matrices(D.double(), D, backend="cpu"),
        lambda: pc_kernels.soft_rank(D.double(), backend="cpu"),
        lambda: pc_kernels.hard_rank(D.double(), backend="cpu"),
    ):
        raises(ValueError, "'cpu'", "not usable", obstacle, call=call)


def test_errors_come_before_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel has started when an argument is refused."""

    def never(*arguments: Any, **options: Any) -> Tensor:
        raise AssertionError("a kernel ran")

    for backend in BACKENDS.values():
        for stage in ("dissimilarity", "soft_rank", "hard_rank", "coherence_rows"):
            monkeypatch.setattr(backend, stage, never)
    for options, error, _ in BAD_OPTIONS.values():
        raises(error, call=lambda: loss(S, T, **options))  # noqa: B023


@pytest.mark.parametrize("side", ["student", "teacher", "student_refs", "teacher_refs"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean", "cosine", "cityblock"])
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_nan_and_infinity_in_features(
    backend: str, metric: str, bad: float, side: str, rng: torch.Generator
) -> None:
    """The loss is NaN: in every anchor's row if a reference is bad, in its own if an anchor is."""
    sizes = {"student": 9, "teacher": 9, "student_refs": 7, "teacher_refs": 7}
    tensors = {name: torch.randn(rows, 4, generator=rng) for name, rows in sizes.items()}
    tensors[side][3, 1] = bad
    tensors["student"].requires_grad_()

    def losses(*arguments: Tensor, reduction: str) -> Tensor:
        result = loss(*arguments, dissimilarity=metric, reduction=reduction, backend=backend)
        result.sum().backward()
        return result

    rows = losses(*tensors.values(), reduction="none")
    touched = torch.arange(9) == 3 if "refs" not in side else torch.ones(9, dtype=torch.bool)
    assert torch.equal(rows.isnan(), touched)
    assert losses(*tensors.values(), reduction="mean").isnan()
    if "refs" not in side:
        batch = losses(tensors["student"], tensors["teacher"], reduction="none")
        assert batch.isnan().all()
