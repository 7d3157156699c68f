"""Stage `dissimilarity`, standing alone: distances with all their digits, and their gradients."""

from __future__ import annotations

import math

import pytest
import tolerances
import torch
from compare import BACKEND_NAMES, DISSIMILARITIES, assert_near, check_near_origin, own_leaf
from inputs import HOSTILE_FEATURES, POINTS
from torch import Generator, Tensor

import pc_kernels
from pc_kernels import reference
from pc_kernels.backends import BACKENDS, extension_obstacle
from pc_kernels.dissimilarities import Points, make_side

WIDTHS = [1, 2, 7, 8, 31, 128, 513, 2048]


def distances(backend: str, x: Tensor, y: Tensor | None, metric: str) -> Tensor:
    """The stage as a backend runs it."""
    rows = make_side(metric, Points(x, y), with_grad=False).rows(0, x.shape[0])
    if rows.gram is not None:  # distances themselves, not less what a far anchor's have in common
        rows.gram = rows.gram._replace(offsets=torch.zeros_like(rows.gram.offsets))
    return BACKENDS[backend].dissimilarity(rows).clone()


def relative_error(metric: str, x: Tensor, y: Tensor, d: Tensor) -> Tensor | float:
    """Of distances d, at worst.

    |a|² + |b|² − 2ab has the error of three inner products. The roundings of one add up to √width u of
    its terms (the square-root law for roundings of either sign; blocked sums do better): together
    (3 + 2√width) u of |a|² + |b|², of which a short distance is a small part; but no less than 1/64,
    or it is summed again.
    """
    own = (4 + 2 * math.sqrt(x.shape[1])) * tolerances.U
    if metric in ("cosine", "cityblock"):
        return own
    scale = x.double().square().sum(1)[:, None] + y.double().square().sum(1)
    squared = d.square() if metric == "euclidean" else d
    return own * (scale / squared).nan_to_num(1).clamp(1, 64)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("metric", DISSIMILARITIES)
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_everyday_features(backend: str, metric: str, width: int, rng: Generator) -> None:
    x, y = torch.randn(20, width, generator=rng), torch.randn(33, width, generator=rng)
    for other in (None, y):
        d = distances(backend, x, other, metric).double()
        wide = None if other is None else other.double()
        wanted = reference.pairwise_dissimilarity(x.double(), wide, metric)
        # A cosine is a difference of numbers up to 1; where they cancel, u of that is left.
        size = wanted.clamp(min=1) if metric == "cosine" else wanted
        allowed = relative_error(metric, x, x if other is None else other, wanted)
        assert_near("δ", d, wanted, allowed * size)


@pytest.mark.parametrize("width", [128, 2048])
@pytest.mark.parametrize("metric", DISSIMILARITIES)
def test_wide_features_keep_their_digits(metric: str, width: int, rng: Generator) -> None:
    """In the mean of squares a distance is off by no more than 4u, however many terms it sums."""
    x = torch.randn(64, width, generator=rng)
    d = pc_kernels.pairwise_dissimilarity(x, metric=metric).double()
    wanted = reference.pairwise_dissimilarity(x.double(), metric=metric)
    off = ~torch.eye(64, dtype=torch.bool)
    error = ((d - wanted) / wanted)[off].square().mean().sqrt()
    assert error <= 4 * tolerances.U


@pytest.mark.parametrize("name", HOSTILE_FEATURES)
@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean", "cityblock"])
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_hostile_features(backend: str, metric: str, name: str, rng: Generator) -> None:
    """Short distances beside long vectors: still a relative error, of 64 roundings or so."""
    x = HOSTILE_FEATURES[name](rng, 64, 16)
    d = distances(backend, x, None, metric).double()
    wanted = reference.pairwise_dissimilarity(x.double(), metric=metric)
    assert_near("δ", d, wanted, 2 * 64 * tolerances.U * wanted)


@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean", "cityblock"])
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_exact_features_have_exact_distances(backend: str, metric: str, rng: Generator) -> None:
    """Multiples of 1/8: what is tied is tied, what is not is not, and equal rows are 0 apart."""
    x = torch.randint(-32, 33, (40, 12), generator=rng).float() / 8
    x[20:] = x[:20]
    d = distances(backend, x, None, metric)
    wanted = reference.pairwise_dissimilarity(x.double(), metric=metric)
    assert torch.equal(reference.hard_rank(d.double()), reference.hard_rank(wanted))
    assert_near("δ", d, wanted, 2 * tolerances.U * wanted)


@pytest.mark.parametrize("metric", DISSIMILARITIES)
def test_gradient(metric: str, rng: Generator) -> None:
    for width in (1, 5, 128):
        x, y = torch.randn(9, width, generator=rng), torch.randn(14, width, generator=rng)
        for other in (None, y):
            inputs = [own_leaf(v) for v in (x, other) if v is not None]
            wide = [v.double().requires_grad_() for v in (x, other) if v is not None]
            d = pc_kernels.pairwise_dissimilarity(*inputs, metric=metric)
            upstream = torch.randn(d.shape, generator=rng)
            d.backward(upstream)
            reference.pairwise_dissimilarity(*wide, metric=metric).backward(upstream.double())
            for got, wanted in zip(inputs, wide, strict=True):
                assert got.grad is not None and wanted.grad is not None
                # Terms of size |upstream| cancel: width 1 has little but signs.
                size = wanted.grad.norm() + upstream.norm()
                assert (got.grad - wanted.grad).norm() <= tolerances.GRAD * size


@pytest.mark.parametrize("metric", DISSIMILARITIES)
def test_gradcheck(metric: str, rng: Generator) -> None:
    x = torch.randn(4, 3, generator=rng, dtype=torch.float64, requires_grad=True)
    y = torch.randn(5, 3, generator=rng, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda a, b: pc_kernels.pairwise_dissimilarity(a, b, metric=metric), (x, y)
    )
    assert torch.autograd.gradcheck(
        lambda a: pc_kernels.pairwise_dissimilarity(a, metric=metric).square(), (x,)
    )


@pytest.mark.parametrize("metric", DISSIMILARITIES)
def test_distance_zero_has_gradient_zero(metric: str) -> None:
    x = own_leaf(torch.tensor([[1.0, 2.0], [1.0, 2.0], [3.0, -1.0]]))
    d = pc_kernels.pairwise_dissimilarity(x, metric=metric)
    (grad,) = torch.autograd.grad(d[0, 1], x)
    assert d[0, 1] == 0 and (grad == 0).all()


def test_cosine_of_zeros(rng: Generator) -> None:
    """1 to everything, another vector of zeros too; no gradient to either end."""
    x = torch.randn(6, 4, generator=rng)
    x[[1, 4]] = 0
    leaf = own_leaf(x)
    d = pc_kernels.pairwise_dissimilarity(leaf, metric="cosine")
    zero = torch.zeros(6, 6, dtype=torch.bool)
    zero[[1, 4]] = zero[:, [1, 4]] = True
    assert (d[zero] == 1).all() and (d[~zero] != 1).all()
    d[zero].sum().backward()
    # Unit vectors of 8 terms in all, each rounded, and divided by the length at last.
    allowed = 16 * tolerances.U / leaf.detach().norm(dim=1, keepdim=True)
    assert leaf.grad is not None and (leaf.grad.abs() <= allowed.nan_to_num(posinf=0.0)).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("metric", DISSIMILARITIES)
def test_dtypes(metric: str, dtype: torch.dtype, rng: Generator) -> None:
    x = own_leaf(torch.randn(8, 16, generator=rng).to(dtype))
    d = pc_kernels.pairwise_dissimilarity(x, metric=metric)
    wanted = reference.pairwise_dissimilarity(x.detach().double(), metric=metric)
    assert d.dtype == dtype
    error = (d.detach().double() - wanted).abs()
    rounding = 1e-13 if dtype == torch.float64 else torch.finfo(dtype).eps
    assert (error <= rounding * wanted.clamp(min=1)).all()
    d.sum().backward()
    assert x.grad is not None and x.grad.dtype == dtype and x.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 3, 0), (0, 3, 4), (4, 3, 0), (1, 1, 1)])
@pytest.mark.parametrize("metric", DISSIMILARITIES)
def test_empty(metric: str, shape: tuple[int, int, int]) -> None:
    anchors, width, references = shape
    x, y = own_leaf(torch.ones(anchors, width)), own_leaf(torch.ones(references, width))
    d = pc_kernels.pairwise_dissimilarity(x, y, metric=metric)
    assert d.shape == (anchors, references)
    d.sum().backward()
    assert x.grad is not None and (x.grad == 0).all()


def test_a_callable_is_called(rng: Generator) -> None:
    x, y = torch.randn(3, 4, generator=rng), torch.randn(5, 4, generator=rng)
    product = pc_kernels.pairwise_dissimilarity(x, y, metric=lambda a, b: a @ b.T)
    assert torch.equal(product, x @ y.T)


def test_views(rng: Generator) -> None:
    base = torch.randn(12, 20, generator=rng)
    for view in (base.T, base[::2, ::3], base[:1].expand(5, 20), base[3:, 1:]):
        for metric in DISSIMILARITIES:
            d = pc_kernels.pairwise_dissimilarity(view, metric=metric)
            assert torch.equal(d, pc_kernels.pairwise_dissimilarity(view.clone(), metric=metric))


@pytest.mark.skipif(extension_obstacle() is not None, reason=str(extension_obstacle()))
@pytest.mark.parametrize("rows", [1, 2, 150])
@pytest.mark.parametrize("name", POINTS)
def test_the_cpu_brings_points_near_as_pytorch_does(name: str, rows: int, rng: Generator) -> None:
    for points in ([POINTS[name](rng, rows)], [POINTS[name](rng, 7), POINTS[name](rng, rows)]):
        check_near_origin(BACKENDS["cpu"], points)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("rows", [0, 1, 2, 31, 33, 100])
def test_the_gradient_of_a_batch_that_is_its_own_reference(
    backend: str, rows: int, rng: Generator
) -> None:
    """Σ_j (V_ij + V_ji)(x_i − x_j), whether summed from differences or by a product."""
    if BACKENDS[backend].obstacle(torch.device("cpu"), torch.float32) is not None:
        pytest.skip("no extension")
    v, x = torch.randn(rows, rows, generator=rng), torch.randn(rows, 5, generator=rng)
    both = (v + v.T).double()
    wanted = both.sum(1, keepdim=True) * x.double() - both @ x.double()
    terms = both.abs().sum(1, keepdim=True) * x.double().abs() + both.abs() @ x.double().abs()
    engine = BACKENDS[backend]
    got = engine.pull(engine.with_mirror(v.clone()), x, x)
    assert_near("gradient", got, wanted, (4 + rows**0.5) * tolerances.U * terms)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("rows", [0, 1, 2, 7, 126, 131, 300])
def test_half_a_product_and_its_mirror_image(backend: str, rows: int, rng: Generator) -> None:
    """A square inside a chunk's rows becomes symmetric, and what is beside it stays."""
    if BACKENDS[backend].obstacle(torch.device("cpu"), torch.float32) is not None:
        pytest.skip("no extension")
    start = 3
    values = torch.randn(rows, rows + 10, generator=rng)
    wanted = values.clone()
    square = values[:, start : start + rows]
    wanted[:, start : start + rows] = square.triu() + square.triu(1).T
    BACKENDS[backend].mirror(values, start)
    assert torch.equal(values, wanted)
    if backend == "cpu":
        with pytest.raises(ValueError, match="must hold a square from column 11 on"):
            torch.ops.pc_kernels.cpu_mirror_(values, 11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_features_up_to_the_largest_number(
    backend: str, dtype: torch.dtype, rng: Generator
) -> None:
    """The unit that they are divided by is a number as well: the loss is that of smaller ones."""
    student = (2 * torch.rand(20, 3, generator=rng, dtype=dtype) - 1) * torch.finfo(dtype).max
    teacher = torch.randn(20, 3, generator=rng, dtype=dtype)
    large, small = (
        pc_kernels.perception_coherence_loss(x, teacher, backend=backend)
        for x in (student, student / 2.0**100)
    )
    assert float(large) == pytest.approx(float(small), rel=1e-5)


@pytest.mark.parametrize("size", [1e-40, 1e-24, 1e-19, 1e18, 1e19, 3e37])
@pytest.mark.parametrize("metric", DISSIMILARITIES)
def test_features_of_any_size(metric: str, size: float, rng: Generator) -> None:
    """Dissimilarities and gradients that float32 can hold, and infinity or 0 where it cannot."""
    x, y = (size * torch.randn(n, 5, generator=rng) for n in (40, 30))
    y[0] = x[0]
    upstream = torch.randn(40, 30, generator=rng) / 100
    upstream[0, 0] = 0  # the slope of a distance of 0 depends on the last digit
    leaf, wide = x.clone().requires_grad_(), x.double().requires_grad_()
    got = pc_kernels.pairwise_dissimilarity(leaf, y, metric)
    wanted = reference.pairwise_dissimilarity(wide, y.double(), metric)
    got.backward(upstream)
    wanted.backward(upstream.double())
    assert leaf.grad is not None and wide.grad is not None
    subnormal = 4 * 2.0**-149
    for a, b, floor in ((got, wanted, 0.0), (leaf.grad, wide.grad, leaf.grad.abs().max())):
        b = b.detach().float()
        finite = b.isfinite()
        assert torch.equal(a[~finite], b[~finite])
        # A square that is no less than 1/64 of its terms has 64 of their (3 + 2√5)/2 roundings, see
        # `relative_error`; cosines and gradients are sums that may cancel.
        floor = 1.0 if metric == "cosine" and a is got else floor
        near = 256 * 2.0**-24 * torch.maximum(b.abs(), torch.as_tensor(floor)) + subnormal
        assert ((a - b)[finite].abs() <= near[finite]).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("metric", DISSIMILARITIES)
def test_features_that_are_not_finite(metric: str, dtype: torch.dtype, rng: Generator) -> None:
    """Their pairs are what the definition says, infinity or NaN, and the other pairs as without them."""
    x = torch.randn(9, 3, generator=rng).to(dtype)
    x[1, 0], x[2, 0], x[3, 1], x[4, 1], x[5] = torch.inf, -torch.inf, torch.inf, torch.nan, 0
    for y in (None, x[2:].flip(0)):
        got = pc_kernels.pairwise_dissimilarity(x, y, metric)
        wanted = reference.pairwise_dissimilarity(
            x.double(), None if y is None else y.double(), metric
        )
        special = ~wanted.isfinite()
        assert torch.equal(got.isfinite(), ~special) and special.any()
        assert torch.equal(got.isnan(), wanted.isnan()) and (got[got.isinf()] > 0).all()
        near = 2 * torch.finfo(dtype).eps
        assert torch.allclose(got[~special].double(), wanted[~special], rtol=near, atol=near)
