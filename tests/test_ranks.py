"""Stage `rank`, standing alone: soft_rank and hard_rank of every backend against the truth."""

from __future__ import annotations

import math

import pytest
import tolerances
import torch
from compare import (
    BACKEND_NAMES,
    DOUBLE_BACKENDS,
    FAST_BACKENDS,
    RELAXATIONS,
    SCALES,
    assert_near,
    check_soft_rank,
    own_leaf,
)
from inputs import BEYOND_PLAIN_FLOAT32, ROWS, make_rows
from torch import Generator, Tensor

import pc_kernels
from pc_kernels import reference

TEMPERATURES = [1e-4, 1e-2, 0.1, 100.0]
LENGTHS = [1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129, 513]

EVERYDAY = [name for name in ROWS if name not in BEYOND_PLAIN_FLOAT32]


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("relaxation", RELAXATIONS)
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_rows_that_make_trouble(
    backend: str, name: str, relaxation: str, scale: str | None, temperature: float, rng: Generator
) -> None:
    check_soft_rank(
        backend,
        make_rows(name, rng, 3, 97),
        rng,
        temperature=temperature,
        relaxation=relaxation,
        scale=scale,
    )


@pytest.mark.parametrize("temperature", [1e-4, 0.1])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("relaxation", RELAXATIONS)
@pytest.mark.parametrize("name", EVERYDAY)
def test_rows_that_make_trouble_for_the_reference(
    name: str, relaxation: str, scale: str | None, temperature: float, rng: Generator
) -> None:
    x = make_rows(name, rng, 3, 97)
    options = {"temperature": temperature, "relaxation": relaxation, "scale": scale}
    check_soft_rank("reference", x, rng, **options)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("relaxation", RELAXATIONS)
@pytest.mark.parametrize("m", LENGTHS)
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_lengths(backend: str, m: int, relaxation: str, scale: str | None, rng: Generator) -> None:
    rows = 17 if m < 100 else 3
    for name in ("normal", "integers"):
        x = make_rows(name, rng, rows, m)
        for temperature in (0.01, 0.1):
            check_soft_rank(
                backend, x, rng, temperature=temperature, relaxation=relaxation, scale=scale
            )


LONG = [
    "normal",
    "far from zero, a few steps apart",
    "three values",
    "nearly all equal",
    "outlier of 1e3",
    "outlier of -1e9",
    "two far tight clumps",
    "clumps and sparse values",
]


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_long_rows(backend: str, name: str, rng: Generator) -> None:
    """Long enough for sums of ones to round, and for a fixed share of the points to fill a cell."""
    x = make_rows(name, rng, 1, 6000)
    check_soft_rank(backend, x, rng, temperature=0.1)
    check_soft_rank(backend, x, rng, temperature=1.0, scale=None)


@pytest.mark.parametrize(
    ("name", "temperature"), [("far from zero, a few steps apart", 0.1), ("nearly all equal", 1.0)]
)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_one_row_of_20000(backend: str, name: str, temperature: float, rng: Generator) -> None:
    check_soft_rank(backend, make_rows(name, rng, 1, 20_000), rng, temperature=temperature)


@pytest.mark.parametrize("temperature", [1e-4, 0.1, 100.0])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("relaxation", RELAXATIONS)
@pytest.mark.parametrize("name", EVERYDAY)
@pytest.mark.parametrize("backend", DOUBLE_BACKENDS)
def test_double(
    backend: str, name: str, relaxation: str, scale: str | None, temperature: float, rng: Generator
) -> None:
    x = make_rows(name, rng, 2, 65).double() * (1 + 1e-9)
    check_soft_rank(backend, x, rng, temperature=temperature, relaxation=relaxation, scale=scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_low_precision(backend: str, dtype: torch.dtype, rng: Generator) -> None:
    x = torch.randn(4, 65, generator=rng).to(dtype)
    check_soft_rank(backend, x, rng, temperature=0.5)
    rank = pc_kernels.hard_rank(x, backend=backend)
    assert rank.dtype == dtype
    wanted = reference.hard_rank(x.double())
    assert_near("rank", rank, wanted, torch.finfo(dtype).eps / 2)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("temperature", [1e-10, 1e-37, 1e-45, 1e-60, 1e-300])
def test_temperatures_below_every_gap(backend: str, temperature: float, rng: Generator) -> None:
    """Ranks are hard ranks, however far the temperature is below what float32 can hold."""
    x = make_rows("integers", rng, 3, 40)
    rank = pc_kernels.soft_rank(x, temperature, backend=backend)
    assert_near("rank", rank, reference.hard_rank(x.double()), tolerances.RANK)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("temperature", [1e10, 1e37, 1e45, 1e300])
def test_temperatures_above_every_gap(backend: str, temperature: float, rng: Generator) -> None:
    """All ranks are ½, and nothing pushes."""
    x = own_leaf(make_rows("integers", rng, 3, 40))
    rank = pc_kernels.soft_rank(x, temperature, backend=backend)
    rank.square().sum().backward()
    assert_near("rank", rank, torch.full_like(x, 0.5).double(), tolerances.RANK)
    assert x.grad is not None and x.grad.abs().max() <= 1 / temperature


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_subnormal_values(backend: str, scale: str | None, rng: Generator) -> None:
    """Their ranks are as good as any; gradients under "std" are beyond float32."""
    x = torch.randint(-50, 50, (3, 33), generator=rng) * torch.tensor(2.0**-149)
    temperature = 0.1 if scale == "std" else 1e-43
    check_soft_rank(backend, x, rng, temperature=temperature, scale=scale, with_grad=False)


def all_rows(rng: Generator, m: int) -> Tensor:
    return torch.cat([make_rows(name, rng, 2, m) for name in ROWS])


@pytest.mark.parametrize("m", LENGTHS)
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_hard_rank(backend: str, m: int, rng: Generator) -> None:
    """Exact but for the last division, ties and all."""
    x = all_rows(rng, m)
    rank = pc_kernels.hard_rank(x, backend=backend)
    assert_near("rank", rank, reference.hard_rank(x.double()), 2 * tolerances.U)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_hard_rank_of_infinities(backend: str) -> None:
    x = torch.tensor([1, math.inf, 2, -math.inf, math.inf])
    assert pc_kernels.hard_rank(x, backend=backend).tolist() == [0.25, 0.875, 0.5, 0, 0.875]


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_hard_rank_of_nine_million(backend: str) -> None:
    """Past 2^24 buckets, where float32 no longer counts them one by one."""
    m = 9_000_000
    rank = pc_kernels.hard_rank(torch.arange(m).float().flip(0), backend=backend)
    wanted = torch.linspace(1, 0, m, dtype=torch.float64)
    assert_near("rank", rank, wanted, 2 * tolerances.U)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_hard_ranks_end_at_0_and_1(backend: str, rng: Generator) -> None:
    """Exactly: whoever takes a logarithm of 1 − r relies on it."""
    for m in range(2, 200):
        rank = pc_kernels.hard_rank(torch.randperm(m, generator=rng).float(), backend=backend)
        assert rank.min() == 0 and rank.max() == 1, m


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_any_shape_and_dim(backend: str, dim: int, rng: Generator) -> None:
    x = torch.randn(4, 5, 6, generator=rng)
    rank = pc_kernels.soft_rank(x, 0.3, dim=dim, backend=backend)
    assert rank.shape == x.shape
    assert_near("rank", rank, reference.soft_rank(x.double(), 0.3, dim=dim), tolerances.RANK)
    rank = pc_kernels.hard_rank(x, dim=dim, backend=backend)
    assert_near("rank", rank, reference.hard_rank(x.double(), dim=dim), 2 * tolerances.U)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_gradient_along_another_dim(backend: str, rng: Generator) -> None:
    x = torch.randn(2, 7, 3, generator=rng)
    upstream = torch.randn(2, 7, 3, generator=rng)
    leaf, wide = own_leaf(x), x.double().requires_grad_()
    pc_kernels.soft_rank(leaf, 0.3, scale="std", dim=1, backend=backend).backward(upstream)
    reference.soft_rank(wide, 0.3, scale="std", dim=1).backward(upstream.double())
    assert leaf.grad is not None and wide.grad is not None
    assert (leaf.grad - wide.grad).norm() <= tolerances.GRAD * wide.grad.norm()


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (2, 0, 3), (1,), (3, 1), (1, 1, 1)])
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_nothing_to_rank(backend: str, shape: tuple[int, ...]) -> None:
    for dim in range(len(shape)):
        x = torch.zeros(shape, requires_grad=True)
        soft = pc_kernels.soft_rank(x, dim=dim, backend=backend)
        hard = pc_kernels.hard_rank(x, dim=dim, backend=backend)
        assert soft.shape == hard.shape == shape
        if shape[dim] == 1:
            assert (soft == 0.5).all() and (hard == 0.5).all()
        soft.sum().backward()
        assert x.grad is not None and (x.grad == 0).all()


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_views(backend: str, rng: Generator) -> None:
    """Transposed, strided, expanded and flipped inputs give what their copies give."""
    base = torch.randn(12, 10, generator=rng)
    views = {
        "transposed": base.T,
        "strided": base[::2, ::3],
        "expanded": base[:1].expand(4, 10),
        "flipped": base.flip(1),
        "offset": base[3:, 1:],
    }
    upstream = torch.randn(12, 12, generator=rng)
    for name, view in views.items():
        results = []
        for x in (view.detach(), view.detach().contiguous().clone()):
            leaf = x.requires_grad_()
            rank = pc_kernels.soft_rank(leaf, 0.2, scale="std", backend=backend)
            (grad,) = torch.autograd.grad(rank, leaf, upstream[: x.shape[0], : x.shape[1]])
            results.append((rank, grad, pc_kernels.hard_rank(leaf, backend=backend)))
        for view_result, copy_result in zip(*results, strict=True):
            assert torch.equal(view_result, copy_result), name


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_only_rows_with_a_nan_or_infinity_are_nan(backend: str, bad: float, rng: Generator) -> None:
    for m in (2, 3, 16, 40):
        x = torch.randn(5, m, generator=rng)
        wanted = reference.soft_rank(x.double())
        x[2, m // 2] = bad
        leaf = own_leaf(x)
        rank = pc_kernels.soft_rank(leaf, scale="std", backend=backend)
        rank.backward(torch.ones_like(x))
        touched = torch.arange(5) == 2
        assert leaf.grad is not None
        for result in (rank, leaf.grad):
            assert result[touched].isnan().all() and result[~touched].isfinite().all()
        soft = pc_kernels.soft_rank(x, backend=backend)
        assert_near("rank", soft[~touched], wanted[~touched], tolerances.RANK)
        hard = pc_kernels.hard_rank(x, backend=backend)
        assert hard[~touched].isfinite().all()
        assert hard[touched].isnan().all() == math.isnan(bad)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("relaxation", RELAXATIONS)
@pytest.mark.parametrize("backend", DOUBLE_BACKENDS)
def test_gradcheck(backend: str, relaxation: str, scale: str | None, rng: Generator) -> None:
    x = torch.randn(2, 9, generator=rng, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda v: pc_kernels.soft_rank(v, 0.4, relaxation, scale, backend=backend), (x,)
    )


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("exponent", [-120, -128, -131, -140])
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_temperatures_whose_inverse_leaves_float32(
    backend: str, exponent: int, scale: str | None, rng: Generator
) -> None:
    """Values and temperature times a power of two: gradients over it, where float32 holds them."""
    size = 2.0**exponent
    x = torch.randint(-32, 33, (3, 50), generator=rng) / 8
    upstream = torch.randn(3, 50, generator=rng) * 2.0 ** torch.tensor([[0], [-8], [-24]])
    grads = []
    for unit in (1.0, size):
        leaf = own_leaf(unit * x)
        temperature = 0.5 if scale == "std" else 0.5 * unit
        rank = pc_kernels.soft_rank(leaf, temperature, scale=scale, backend=backend)
        rank.backward(upstream)
        assert leaf.grad is not None
        grads.append(leaf.grad.double())
    wanted = grads[0] / size
    overflows, fits = wanted.abs() > 3.5e38, wanted.abs() < 3.3e38
    assert torch.equal(grads[1][overflows], torch.inf * wanted.sign()[overflows])
    floor = tolerances.GRAD * wanted.norm(dim=1, keepdim=True)
    assert ((grads[1] - wanted).abs() <= floor)[fits].all()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_temperatures_below_any_difference(backend: str, scale: str | None, rng: Generator) -> None:
    """Soft ranks are hard ranks; nothing is divided by a temperature that rounds to 0."""
    x = torch.stack([torch.randn(40, generator=rng), 1e-40 * torch.randn(40, generator=rng)])
    leaf = own_leaf(x)
    for temperature in (1e-300, 1e-80):
        rank = pc_kernels.soft_rank(leaf, temperature, scale=scale, backend=backend)
        assert_near("rank", rank, pc_kernels.hard_rank(x).double(), tolerances.RANK)
        (grad,) = torch.autograd.grad(rank.sum(), leaf)
        assert (grad == 0).all()


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_ties_below_any_temperature(backend: str, rng: Generator) -> None:
    """A tie does not pull at anything; nor do others that closed gaps bring nearer."""
    x = torch.arange(400).repeat_interleave(2)[None, torch.randperm(800, generator=rng)].float()
    leaf = own_leaf(x)
    pc_kernels.soft_rank(leaf, 1e-60, backend=backend).backward(x % 3)
    assert leaf.grad is not None and (leaf.grad == 0).all()


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_hard_ranks_of_infinities(backend: str) -> None:
    """They have an order, and alone the rank ½ as any other value."""
    inf, nan = torch.inf, torch.nan
    for x, wanted in (
        ([inf], [0.5]),
        ([-inf], [0.5]),
        ([nan], [nan]),
        ([inf, inf], [0.5, 0.5]),
        ([inf, 1.0, inf, -inf], [5 / 6, 1 / 3, 5 / 6, 0]),
    ):
        rank = pc_kernels.hard_rank(torch.tensor([x]), backend=backend)
        assert torch.allclose(rank, torch.tensor([wanted]), equal_nan=True)
