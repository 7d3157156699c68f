"""Comparisons of a backend with the truth, on any device, and the lists that tests run over.

What is not near raises AssertionError. Only the lists of backends need pytest: tests/gpu/matrix.py makes
these comparisons where there is none.
"""

from __future__ import annotations

from typing import Any

import tolerances
import torch
import truth
from torch import Generator, Tensor

import pc_kernels
from pc_kernels import dissimilarities, formulas
from pc_kernels.backends import BACKENDS
from pc_kernels.dissimilarities.row_maker import PLAIN, RowMaker
from pc_kernels.recipe import REDUCTIONS, SCALES

__all__ = ["DISSIMILARITIES", "PENALTIES", "REDUCTIONS", "RELAXATIONS", "SCALES"]

DISSIMILARITIES = tuple(dissimilarities.DISSIMILARITIES)
PENALTIES = tuple(formulas.PENALTIES)
RELAXATIONS = tuple(name for name, row in formulas.RELAXATIONS.items() if row.single is not None)
"""Those on grids; test_laplace.py has the other."""


def usable(dtype: torch.dtype = torch.float32) -> list[Any]:
    """The backends as pytest parameters, skipped with the reason where they do not run here."""
    import pytest

    parameters = []
    for name, backend in BACKENDS.items():
        if not backend.serves(torch.device("cpu")):
            continue
        reason = backend.obstacle(torch.device("cpu"), dtype)
        marks = [] if reason is None else [pytest.mark.skip(reason=reason)]
        parameters.append(pytest.param(name, marks=marks))
    return parameters


def __getattr__(name: str) -> list[Any]:
    """BACKEND_NAMES and FAST_BACKENDS, for tests alone: made of pytest's parameters when imported.

    FAST_BACKENDS go without the reference, which computes its formulas as they stand: in float32 some
    inputs leave float32's range.
    """
    if name == "BACKEND_NAMES":
        return usable()
    if name == "FAST_BACKENDS":
        return [b for b in usable() if b.values != ("reference",)]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


DOUBLE_BACKENDS = [name for name in ("torch", "reference") if name in BACKENDS]


def own_leaf(x: Tensor) -> Tensor:
    """A copy of x with gradients."""
    return x.detach().clone().requires_grad_()


def assert_near(name: str, got: Tensor, wanted: Tensor, allowed: Tensor | float) -> None:
    """|got − wanted| ≤ allowed, everywhere; a NaN is never near."""
    error = (got.detach().double() - wanted).abs()
    excess = error - allowed
    if not bool((excess <= 0).all()):
        worst = int(excess.nan_to_num(torch.inf).argmax())
        bound = torch.as_tensor(allowed, dtype=torch.float64).expand_as(error).reshape(-1)[worst]
        raise AssertionError(
            f"{name}: off by {error.reshape(-1)[worst]:.3e} at {worst} of {tuple(got.shape)}, "
            f"allowed {bound:.3e} (is {got.reshape(-1)[worst]:.9g}, "
            f"should be {wanted.reshape(-1)[worst]:.9g})"
        )


def assert_norm_near(name: str, got: Tensor, wanted: Tensor, allowed: Tensor | float) -> None:
    """The L2 norms of the rows of got − wanted (or of all of it) are ≤ allowed."""
    by_row = isinstance(allowed, Tensor) and allowed.dim() == 1
    difference = got.detach().double() - wanted
    error = difference.norm(dim=1) if by_row else difference.norm()[None]
    size = wanted.norm(dim=1) if by_row else wanted.norm()[None]
    bound = torch.as_tensor(allowed, dtype=torch.float64).expand_as(error)
    if not bool((error <= bound).all()):
        row = int((error / bound).nan_to_num(torch.inf).argmax())
        raise AssertionError(
            f"{name}: off by {error[row]:.3e} ({error[row] / size[row]:.3e} of it), "
            f"allowed {bound[row]:.3e}, row {row}"
        )


def check_soft_rank(
    backend: str,
    x: Tensor,
    rng: Generator,
    *,
    temperature: float,
    relaxation: str = "logistic",
    scale: str | None = "std",
    with_grad: bool = True,
) -> None:
    """Soft ranks of rows x [N, m] and their gradient, each row on its own."""
    upstream = torch.randn(x.shape, generator=rng).to(x)
    leaf = own_leaf(x)
    rank = pc_kernels.soft_rank(leaf, temperature, relaxation, scale, backend=backend)
    assert rank.shape == x.shape and rank.dtype == x.dtype
    wanted = truth.soft_rank(x, upstream, temperature, relaxation, scale)
    assert_near("rank", rank, wanted.rank, tolerances.rank_tolerance(x.dtype))
    if not with_grad:
        return
    rank.backward(upstream)
    assert leaf.grad is not None and leaf.grad.dtype == x.dtype
    allowed = tolerances.grad_tolerance(x.dtype) * wanted.grad.norm(dim=1)
    allowed += tolerances.rounding(x.dtype) * wanted.magnitude.norm(dim=1)
    allowed += tolerances.subnormal_floor(x.dtype, x.shape[1])
    assert_norm_near("gradient", leaf.grad, wanted.grad, allowed)


def check_smooth_cdf(
    backend: str,
    inputs: tuple[Tensor, Tensor, Tensor | None],
    rng: Generator,
    **options: Any,
) -> None:
    """Sums of sources, queries and weights, and the gradients in all three; see tolerances.py."""
    leaves = [None if x is None else own_leaf(x) for x in inputs]
    sums = pc_kernels.smooth_cdf(*leaves, backend=backend, **options)
    upstream = torch.randn(sums.shape, generator=rng).to(sums)
    sums.backward(upstream)
    wanted = truth.smooth_cdf(inputs, upstream, **options)
    assert sums.shape == wanted.sums.shape
    dtype = sums.dtype
    relative = tolerances.grad_tolerance(dtype) - tolerances.GRAD + tolerances.RANK
    if dtype == torch.float64:
        relative = tolerances.DOUBLE_RANK
    beyond = tolerances.BEYOND_REACH * wanted.largest_weight
    floor = beyond * inputs[0].shape[-1] + 1e-37
    assert_near("sums", sums, wanted.sums, relative * wanted.reach + floor)
    # Each of the terms beyond the reach: of a density less, over τ.
    pairs = inputs[0].shape[-1] * inputs[1].shape[-1]
    beyond *= pairs * upstream.double().abs().max().item() if upstream.numel() else 0.0
    beyond *= max(1.0, 1 / options["temperature"])
    for name, leaf, grad, size in zip(
        ("sources", "queries", "weights"), leaves, wanted.grads, wanted.grad_sizes, strict=True
    ):
        if leaf is None:
            continue
        assert leaf.grad is not None and leaf.grad.dtype == leaf.dtype
        allowed = tolerances.grad_tolerance(leaf.dtype) * grad.norm()
        allowed += tolerances.rounding(dtype) * size.norm()
        allowed += tolerances.subnormal_floor(leaf.dtype, leaf.numel()) + beyond
        assert_norm_near(f"gradient in {name}", leaf.grad, grad, allowed)


def check_matrices(
    backend: str,
    d_s: Tensor,
    d_t: Tensor,
    rng: Generator,
    *,
    reduction: str = "mean",
    exclude_self: bool = False,
    chunk_bytes: int | None = None,
    weights: Tensor | None = None,
    pair_mask: Tensor | None = None,
    **options: Any,
) -> None:
    """`coherence_loss_from_dissimilarities` and its gradient."""
    leaf = own_leaf(d_s)
    loss = pc_kernels.coherence_loss_from_dissimilarities(
        leaf,
        d_t,
        weights=weights,
        pair_mask=pair_mask,
        exclude_self=exclude_self,
        reduction=reduction,
        chunk_bytes=chunk_bytes,
        backend=backend,
        **options,
    )
    upstream = torch.randn(loss.shape, generator=rng).to(loss)
    loss.backward(upstream)
    dtype = torch.promote_types(d_s.dtype, d_t.dtype)
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    anchors = d_s.shape[0]
    own = torch.arange(anchors, device=d_s.device) if exclude_self else None
    keep = None if pair_mask is None else pair_mask.expand(d_s.shape)
    weighting = anchor_weights(weights, keep, own, reduction, anchors).to(d_s.device)
    rounding = tolerances.rounding(dtype)
    wanted = truth.coherence_rows(
        d_s,
        d_t,
        weighting * upstream,
        own=own,
        keep=keep,
        rounding=rounding,
        **options,
    )
    floor = rounding * wanted.loss_floor + rounding**2
    assert_losses(loss, wanted.losses, floor, weighting, reduction, dtype)
    assert leaf.grad is not None
    assert leaf.grad.dtype == d_s.dtype
    allowed = tolerances.grad_tolerance(d_s.dtype) * wanted.grad.norm(dim=1)
    allowed += wanted.grad_floor.norm(dim=1)
    allowed += tolerances.subnormal_floor(d_s.dtype, d_s.shape[1])
    assert_norm_near("gradient", leaf.grad, wanted.grad, allowed)


def check_features(
    backend: str,
    student: Tensor,
    teacher: Tensor,
    rng: Generator,
    *,
    refs: tuple[Tensor, Tensor] | None = None,
    reduction: str = "mean",
    dissimilarity: Any = "euclidean",
    teacher_dissimilarity: Any = None,
    chunk_bytes: int | None = None,
    only: Tensor | None = None,
    weights: Tensor | None = None,
    pair_mask: Tensor | None = None,
    strict_batch: bool = True,
    **options: Any,
) -> None:
    """`perception_coherence_loss` and its gradients in student and student_refs.

    `only`: with reduction "none", the anchors to compare; the rest gets weight 0. Not `strict_batch`: the
    roundings of distances may decide on a gradient, see tolerances.py.
    """
    leaves = [own_leaf(student)] if refs is None else [own_leaf(student), own_leaf(refs[0])]
    loss = pc_kernels.perception_coherence_loss(
        leaves[0],
        teacher,
        *(() if refs is None else (leaves[1], refs[1])),
        weights=weights,
        pair_mask=pair_mask,
        dissimilarity=dissimilarity,
        teacher_dissimilarity=teacher_dissimilarity,
        reduction=reduction,
        chunk_bytes=chunk_bytes,
        backend=backend,
        **options,
    )
    upstream = torch.randn(loss.shape, generator=rng).to(loss)
    if only is not None:
        upstream = torch.zeros_like(upstream).index_copy_(0, only, upstream[only])
    loss.backward(upstream)
    references = len(student if refs is None else refs[0])
    own = torch.arange(len(student), device=student.device) if refs is None else None
    keep = None if pair_mask is None else pair_mask.expand(len(student), references)
    weighting = anchor_weights(weights, keep, own, reduction, len(student)).to(student.device)
    if only is not None:
        loss, upstream, weighting = loss[only], upstream[only], weighting[only]
    double = torch.float64 in (student.dtype, teacher.dtype)
    dtype = torch.float64 if double else torch.float32
    strict = options.get("temperature", 0.1) >= tolerances.STRICT_TEMPERATURE
    strict &= student.shape[1] <= tolerances.STRICT_WIDTH
    strict &= strict_batch
    wanted = truth.features(
        student,
        teacher,
        refs,
        weighting * upstream,
        dissimilarity,
        teacher_dissimilarity,
        rounding=tolerances.rounding(dtype),
        distance_rounding=4 * torch.finfo(dtype).eps / 2,
        strict=strict,
        only=only,
        keep=keep,
        **options,
    )
    assert_losses(loss, wanted.losses, wanted.loss_tolerance, weighting, reduction, dtype)
    for name, leaf, grad, moves in zip(
        ("student", "student_refs"), leaves, wanted.grads, wanted.conditioning, strict=False
    ):
        assert leaf.grad is not None and leaf.grad.dtype == leaf.dtype
        relative = tolerances.grad_tolerance(leaf.dtype)
        if not strict:
            relative += 4 * wanted.kappa * torch.finfo(dtype).eps / 2
        allowed = relative * grad.norm().item() + wanted.grad_floor + moves
        allowed += tolerances.subnormal_floor(leaf.dtype, leaf.numel())
        assert_norm_near(f"gradient in {name}", leaf.grad, grad, allowed)


def anchor_weights(
    weights: Tensor | None,
    keep: Tensor | None,
    own: Tensor | None,
    reduction: str,
    anchors: int,
) -> Tensor:
    """What each anchor's loss is multiplied by, [A]."""
    w = torch.ones(anchors, dtype=torch.float64) if weights is None else weights.double()
    if keep is not None:
        w = w.to(keep.device)
        counted = keep.clone()
        if own is not None:
            counted[torch.arange(anchors, device=keep.device), own] = False
        w = w * (counted.sum(1) >= 2)
    total = w.sum().item() if reduction == "mean" else 1.0
    return w / (total or 1.0)


def assert_losses(
    loss: Tensor,
    losses: Tensor,
    floor: Tensor,
    weighting: Tensor,
    reduction: str,
    dtype: torch.dtype,
) -> None:
    """A loss against the truth's rows, weighted and reduced alike."""
    assert loss.dtype == dtype
    wanted, floor = losses * weighting, floor * weighting.abs()
    if reduction != "none":
        wanted, floor = wanted.sum(), floor.sum()
    assert loss.shape == wanted.shape
    assert_near("loss", loss, wanted, tolerances.loss_tolerance(dtype) * wanted.abs() + floor)


def check_near_origin(maker: RowMaker, points: list[Tensor]) -> None:
    """Shifted and scaled as by PyTorch; norms to rounding; the same anchors are far, the same equal."""
    wanted, got = PLAIN.near_origin(points), maker.near_origin(points)
    for x, y in zip(got.points, wanted.points, strict=True):
        # A mean that rounds otherwise may move a shift by a step: that costs no digit either.
        assert torch.equal(x.isnan(), y.isnan()) and bool((x.isfinite() == y.isfinite()).all())
        spread = y.nan_to_num(0, 0, 0).abs().amax() + 1
        assert bool(((x - y).nan_to_num(0).abs() <= 4 * spread).all())
    for x, squares in zip(got.points, got.squares, strict=True):
        exact = x.double().square().sum(1)
        near = torch.isclose(squares.double(), exact, rtol=8 * tolerances.U, atol=1e-37)
        assert bool((near | ~exact.isfinite() | ~squares.isfinite()).all())
    assert got.unit == wanted.unit
    if not points[-1].isnan().any():
        assert torch.equal(*(firsts(x.twins, len(points[-1])) for x in (got, wanted)))
    assert torch.equal(got.offsets > 0, wanted.offsets > 0)
    assert torch.allclose(got.offsets, wanted.offsets, rtol=1e-5)


def firsts(twins: Tensor, count: int) -> Tensor:
    """The first reference that equals each, of `NearOrigin.twins`."""
    if len(twins) == 0:
        return torch.arange(count, dtype=torch.int32)
    own = twins[:-1] == torch.arange(count)
    assert bool(twins[-1] > 0) or bool(own.all())
    return twins[:-1]
