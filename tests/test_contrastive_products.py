"""The contrastive losses with products in parts of bfloat16, as tests/test_products.py has the others."""

from __future__ import annotations

import contrast_truth
import pytest
import torch
from compare import own_leaf
from contrast_cases import KINDS, Case, check_not_finite, rounded
from torch import Generator, Tensor

from pc_kernels import contrastive_loss, products
from pc_kernels.losses.scaling import factored, scaled
from pc_kernels.products import PARTS, Products

HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_features_lose_nothing(
    dtype: torch.dtype, kind: str, rng: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tolerances of float32: their products are exact, and factors come after them."""
    in_float32 = Products.of

    def in_parts(choice: str, features: list[Tensor], wide: torch.dtype) -> Products:
        whole = wide == torch.float32
        return Products("ieee", PARTS[dtype]) if whole else in_float32(choice, features, wide)

    monkeypatch.setattr(Products, "of", in_parts)
    for sizes in ((1, 0, 3), (33, 9, 40)):
        case = rounded(Case(rng, kind, sizes), dtype)
        weights, mask = torch.rand(sizes[0], generator=rng), case.mask(rng)
        case.check("auto")
        case.check("auto", weights, pair_mask=mask, chunk_bytes=1 << 12)
        case.check("auto", scale=2.0**-60)
        case.check("auto", weights, normalize=False, temperature=1.5)
    check_not_finite("auto", kind, rng)
    case.features[0][2] = 0  # has no direction
    loss = contrastive_loss(*(leaves := [own_leaf(x) for x in case.features]), **case.options)
    wanted = contrast_truth.losses(*(x.detach().double() for x in leaves), **case.options)
    assert torch.allclose(loss.double(), wanted.mean(), rtol=1e-5)
    loss.backward()
    assert (leaves[0].grad[2] == 0).all() and leaves[1].grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_float32(kind: str, rng: Generator) -> None:
    """Six products as exact as one in float32; three off by 2⁻¹⁵/τ a logit, 2⁻¹⁴/τ a probability."""
    case = Case(rng, kind, (40, 13, 50))
    for temperature in (0.05, 1.0):
        case.check("auto", temperature=temperature, products="bf16x6", chunk_bytes=1 << 12)
        near = 2.0**-14 / temperature + 2.0**-14
        options = {**case.options, "temperature": temperature}
        leaves = [own_leaf(x) for x in case.features]
        wide = [own_leaf(x.double()) for x in case.features]
        loss = contrastive_loss(*leaves, products="bf16x3", **options)
        wanted = contrast_truth.losses(*wide, **options).mean()
        pairs = sum(map(len, leaves[1:])) if kind == "SigLIP" else 2  # logits that a loss adds up
        assert (loss - wanted).abs() <= pairs * 2.0**-15 / temperature
        got, want = torch.autograd.grad(loss, leaves), torch.autograd.grad(wanted, wide)
        for a, b in zip(got, want, strict=True):
            assert (a - b).norm() <= near * b.norm()


def test_who_goes_in_parts(rng: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half precision where there are tensor cores, played here; gradients in the features' dtype."""
    taken: list[int] = []
    wide = Products._wide
    monkeypatch.setattr(
        Products, "_wide", lambda self, *given: taken.append(self.parts) or wide(self, *given)
    )
    x = torch.randn(6, 5, generator=rng)

    def parts_of(q: Tensor, k: Tensor, **options: object) -> set[int]:
        taken.clear()
        contrastive_loss(leaf := own_leaf(q), k, **options).backward()
        assert leaf.grad is not None and leaf.grad.dtype == q.dtype
        return set(taken)

    half = x.bfloat16()
    assert parts_of(half, half) == set()
    monkeypatch.setattr(products, "_has_cores", lambda x: True)
    assert parts_of(half, half) == {1} and parts_of(half, x.half()) == {2}
    assert parts_of(half, x) == parts_of(half, half, temperature=1e-3) == set()
    assert parts_of(half, half, products="bf16x6") == {3}
    assert parts_of(x, x, products="bf16x3") == {2}


@pytest.mark.clean_memory
def test_compile(rng: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of half precision in its parts, in one graph."""
    monkeypatch.setattr(products, "_has_cores", lambda x: True)
    torch._dynamo.reset()
    q, k = torch.randn(2, 12, 5, generator=rng).bfloat16()

    def step(x: Tensor) -> Tensor:
        return contrastive_loss(x, k, form="sigmoid", bias=-1.0, products="ieee")

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        loss = run(leaf := own_leaf(q))
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    for eager, compiled in zip(*results, strict=True):
        assert torch.allclose(eager.float(), compiled.float(), rtol=2.0**-7, atol=1e-6)


def test_factors(rng: Generator) -> None:
    """Rows as they were but for powers of two, times factors: `scaled`, whatever the magnitude."""
    x = (
        torch.randn(7, 9, generator=rng).bfloat16().float()
        * torch.linspace(-30, 30, 7)[:, None].exp2()
    )
    for magnitude in (1.0, 2.0**-80, 2.0**80):
        y = factored(x * magnitude, 14.0)
        rows, factor = y[:, :-1], y[:, -1:]
        assert (rows.bfloat16().float() == rows).all() and rows.abs().max() <= 1
        assert torch.allclose(rows * factor, scaled(x * magnitude, 14.0), rtol=4e-7, atol=0)


def test_an_unknown_choice_is_an_error() -> None:
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="products must be one of 'ieee', 'bf16x6', 'bf16x3'"):
        contrastive_loss(x, x, products="tf32")
    operator = torch.ops.pc_kernels.contrastive_loss
    rest = (None, None, torch.ones(2), None, 0, 0, "softmax", None, "auto", "bf16x6", 1, False)
    with pytest.raises(ValueError, match="parts are of float32 tensors"):
        operator(x, x, *rest)
