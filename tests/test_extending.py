"""docs/architecture.md says how to add things: these are added through the places it names, and work."""

from __future__ import annotations

import ast
import inspect
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from compare import BACKEND_NAMES, own_leaf
from conftest import ROOT
from torch import Generator, Tensor

import pc_kernels
from pc_kernels import formulas, reference, rules
from pc_kernels.losses import RankingLoss
from pc_kernels.recipe import FEATURE_OPTIONS, MatrixOptions, Options, Recipe

HYPERBOLIC = formulas.Relaxation(
    "hyperbolic",
    None,
    cdf=lambda x: 2 / math.pi * torch.atan(torch.exp(math.pi / 2 * x)),
    pdf=lambda x: 1 / (torch.exp(math.pi / 2 * x) + torch.exp(-math.pi / 2 * x)),
    single=formulas.GridSpec(6, 8, 12),
    double=formulas.GridSpec(12, 16, 24),
)
LOG_COSH = formulas.Penalty(
    "log_cosh", None, value=lambda e: torch.log(torch.cosh(e)), slope=torch.tanh
)


class Spearman(rules.RowRule):
    """1 − the correlation of the two rows of ranks."""

    def value_and_slope(self, rank: Tensor, target: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        def standard(x: Tensor) -> tuple[Tensor, Tensor]:
            mean = x.sum(1, keepdim=True) / keep.sum(1, keepdim=True).clamp(min=1)
            centred = torch.where(keep, x - mean, 0)
            size = centred.square().sum(1, keepdim=True).sqrt().clamp(min=1e-30)
            return centred / size, size

        (s, size), (t, _) = standard(rank), standard(target)
        correlation = (s * t).sum(1, keepdim=True)
        return 1 - correlation[:, 0], (correlation * s - t) / size


class SpearmanLoss(RankingLoss):
    """1 − Spearman's correlation, softly."""

    fixed = {"penalty": "spearman"}  # noqa: RUF012 - read only


@pytest.fixture(autouse=True)
def added(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A relaxation and a penalty in the table, and a loss."""
    monkeypatch.setitem(formulas.RELAXATIONS, "hyperbolic", HYPERBOLIC)
    monkeypatch.setitem(formulas.PENALTIES, "log_cosh", LOG_COSH)
    monkeypatch.setattr(rules, "RULES", {})
    rules.row_rule("spearman")(Spearman)
    yield


def check(options: dict[str, object], backend: str, rng: Generator, masked: bool) -> None:
    """Value and gradient against autograd through the definitions, in float64."""
    s, t = torch.randn(40, 5, generator=rng), torch.randn(40, 4, generator=rng)
    keep = torch.rand(40, 40, generator=rng) < 0.7 if masked else None
    results = []
    for function, dtype, where in (
        (pc_kernels.perception_coherence_loss, torch.float32, {"backend": backend}),
        (reference.perception_coherence_loss, torch.float64, {}),
    ):
        leaf = own_leaf(s.to(dtype))
        loss = function(leaf, t.to(dtype), pair_mask=keep, **options, **where)
        loss.backward()
        results.append((loss.detach().double(), leaf.grad.double()))
    (loss, grad), (wanted, wanted_grad) = results
    assert (loss - wanted).abs() <= 1e-5 * wanted.abs()
    assert (grad - wanted_grad).norm() <= 1e-5 * wanted_grad.norm()


@pytest.mark.parametrize("masked", [False, True])
def test_a_relaxation(masked: bool, rng: Generator) -> None:
    check({"relaxation": "hyperbolic", "temperature": 0.3}, "torch", rng, masked)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rule", ["log_cosh", "spearman"])
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_a_penalty_and_a_loss(backend: str, rule: str, masked: bool, rng: Generator) -> None:
    """On every backend: those with fused kernels for other rules take the chain of stages."""
    check({"penalty": rule, "temperature": 0.3}, backend, rng, masked)


@pytest.mark.clean_memory
def test_a_loss_is_a_module_that_compiles(rng: Generator) -> None:
    s, t = torch.randn(30, 5, generator=rng), torch.randn(30, 4, generator=rng)
    loss_fn = SpearmanLoss(temperature=0.05)
    assert "penalty" not in inspect.signature(SpearmanLoss).parameters
    with pytest.raises(TypeError, match=r"SpearmanLoss\(\) has no option 'penalty'"):
        SpearmanLoss(penalty="squared")
    student = own_leaf(s)
    loss = loss_fn(student, t)
    loss.backward()
    assert 0 < loss < 2 and student.grad.norm() > 0
    hard = 1 - pc_kernels.coherence(s, t).spearman
    assert abs(loss - hard) < 0.05
    compiled = torch.compile(loss_fn, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(s, t), loss.detach())


def test_slopes_are_derivatives(rng: Generator) -> None:
    """Of every row rule, the built-in ones too, away from the places where they step."""
    for name in rules.rule_names():
        rule = rules.rule_called(name)
        rank = own_leaf(torch.rand(6, 9, generator=rng, dtype=torch.float64))
        target = torch.rand(6, 9, generator=rng, dtype=torch.float64)
        keep = torch.rand(6, 9, generator=rng) < 0.8
        inputs = (torch.where(keep, x, 0) for x in (rank, target))
        value, slope = rule.value_and_slope(*inputs, keep)
        (wanted,) = torch.autograd.grad(value.sum(), rank)
        assert torch.allclose(slope.detach(), wanted, rtol=1e-10, atol=1e-12), name


def test_names_are_taken_once() -> None:
    with pytest.raises(ValueError, match="there is a row rule 'huber' already"):
        rules.row_rule("huber")(Spearman)


def test_options_are_the_recipe() -> None:
    """What type checkers are told is what there is."""
    assert set(Options.__annotations__) | set(MatrixOptions.__annotations__) == set(FEATURE_OPTIONS)
    shown = inspect.signature(pc_kernels.PerceptionCoherenceLoss).parameters
    assert {name: shown[name].default for name in FEATURE_OPTIONS} == vars(Recipe())


def test_options_are_attributes() -> None:
    loss_fn = pc_kernels.PerceptionCoherenceLoss("cosine", None, "normal", temperature=0.2)
    assert loss_fn.recipe == Recipe(dissimilarity="cosine", relaxation="normal", temperature=0.2)
    loss_fn.temperature = 0.5
    assert loss_fn.temperature == loss_fn.recipe.temperature == 0.5
    with pytest.raises(ValueError, match="temperature must be finite and > 0; got -1"):
        loss_fn.temperature = -1
    with pytest.raises(TypeError, match="by position and by keyword"):
        pc_kernels.PerceptionCoherenceLoss("cosine", dissimilarity="cosine")
    with pytest.raises(TypeError, match="has no option 'metric'"):
        pc_kernels.perception_coherence_loss(torch.ones(3, 2), torch.ones(3, 2), metric="cosine")


def test_the_places_named_in_the_docs_are_there() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    paths = set(re.findall(r"`([\w/]+\.(?:py|h|cpp|cu|cuh|md))`", text))
    assert len(paths) > 20
    for path in paths:
        assert any((folder / path).exists() for folder in (ROOT, ROOT / "pc_kernels")), path


def test_functions_take_few_arguments() -> None:
    """Eight at most beside self, but for the operators' schemas and the kernels' entry points."""
    for path in (ROOT / "pc_kernels").rglob("*.py"):
        if path.name == "ops.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and not _is_kernel(path, node):
                a = node.args
                names = [*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg]
                passed = [x for x in names if x is not None and x.arg not in ("self", "cls")]
                assert len(passed) <= 8, f"{path.name}: {node.name}"


def _is_kernel(path: Path, node: ast.FunctionDef) -> bool:
    return path.parent.name == "triton_kernels" and node.name.endswith("_kernel")
