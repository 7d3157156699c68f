"""`LowPass` against SciPy's DCT and against its formulas, summed directly in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.fft import dctn
from torch import Generator, Tensor
from torch.nn import functional

import pc_kernels

KINDS = ("average", "gaussian", "dct")
SCALES = (1, 2, 3, 4, 7)
SIZES = ((1, 1), (2, 3), (4, 4), (7, 5), (13, 16), (1, 9))
U = 2.0**-24


def axis_formula(kind: str, n: int, s: int, sigma: float) -> np.ndarray:
    """A [s, n] of `LowPass`'s documentation, number by number."""
    a = np.zeros((s, n))
    for i in range(s):
        centre = (i + 0.5) * n / s - 0.5
        for j in range(n):
            if kind == "average":
                a[i, j] = np.floor(i * n / s) <= j < np.ceil((i + 1) * n / s)
            elif kind == "gaussian":
                a[i, j] = np.exp(-((j - centre) ** 2) / (2 * (sigma * n / s) ** 2))
            elif i < n:
                a[i, j] = np.sqrt((1 if i == 0 else 2) / n) * np.cos(
                    np.pi * i * (2 * j + 1) / (2 * n)
                )
    return a if kind == "dct" else a / a.sum(1, keepdims=True)


def directly(x: Tensor, kind: str, s: int, sigma: float = 0.5) -> tuple[Tensor, Tensor]:
    """Channels [B, C, H, W] filtered in float64; and how large their terms are.

    float32 rounds each number of A by some u of its row's largest, and each of the H + W sums once more.
    """
    rows, columns = (torch.tensor(axis_formula(kind, n, s, sigma)) for n in x.shape[2:])
    wide = x.double()
    largest = [a.abs().amax(1, keepdim=True).expand_as(a) for a in (rows, columns)]
    terms = largest[0] @ wide.abs() @ largest[1].mT
    return (rows @ wide @ columns.mT).flatten(1), terms.flatten(1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_it_is_its_formula(kind: str, size: tuple[int, int], rng: Generator) -> None:
    x = torch.randn(3, 4, *size, generator=rng) * 10 ** torch.randn(4, 1, 1, generator=rng)
    for sigma in (0.5, 2.0):
        low = pc_kernels.LowPass(kind, SCALES, sigma=sigma)
        for s, got in low(x).items():
            wanted, terms = directly(x, kind, s, sigma)
            assert got.shape == (3, 4 * s * s) and got.dtype == torch.float32
            assert ((got - wanted).abs() <= (sum(size) + 32) * U * terms).all()
        for s, got in low(x.double()).items():
            assert got.dtype == torch.float64
            assert torch.allclose(got, directly(x, kind, s, sigma)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_scipy_and_pytorch_say_the_same(size: tuple[int, int], rng: Generator) -> None:
    x = torch.randn(2, 3, *size, generator=rng, dtype=torch.float64)
    spectrum = torch.zeros(2, 3, max(SCALES), max(SCALES), dtype=torch.float64)
    here = torch.from_numpy(dctn(x.numpy(), axes=(2, 3), norm="ortho"))
    rows, columns = (min(n, max(SCALES)) for n in size)
    spectrum[:, :, :rows, :columns] = here[:, :, :rows, :columns]
    for s, low in pc_kernels.LowPass("dct", SCALES)(x).items():
        assert torch.allclose(low, spectrum[:, :, :s, :s].flatten(1), atol=1e-12)
    for s, low in pc_kernels.LowPass("average", SCALES)(x).items():
        assert torch.allclose(low, functional.adaptive_avg_pool2d(x, s).flatten(1), atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_maps_tokens_and_vectors_are_alike(kind: str, rng: Generator) -> None:
    maps = torch.randn(2, 5, 3, 4, generator=rng)
    tokens = torch.cat([torch.full((2, 2, 5), 1e9), maps.flatten(2).mT], 1)
    of_maps = pc_kernels.LowPass(kind)(maps)
    of_tokens = pc_kernels.LowPass(kind, grid=(3, 4), class_tokens=2)(tokens)
    of_square = pc_kernels.LowPass(kind, grid="square")(maps[..., :3].flatten(2).mT)
    for s in (1, 2, 4):
        square = pc_kernels.LowPass(kind)(maps[..., :3])[s]
        assert torch.allclose(of_maps[s], of_tokens[s], atol=1e-6)
        assert torch.allclose(of_square[s], square, atol=1e-6)
    for s, low in pc_kernels.LowPass(kind)(maps[:, :, 0, 0]).items():
        assert torch.equal(low, pc_kernels.LowPass(kind, (s,))(maps[:, :, :1, :1])[s])


@pytest.mark.parametrize("kind", KINDS)
def test_constants_and_sharp_filters(kind: str) -> None:
    """A constant has no frequency but 0; the sharpest filter samples, the widest averages."""
    x = torch.full((1, 1, 6, 10), 3.0)
    for s, low in pc_kernels.LowPass(kind, SCALES)(x).items():
        wanted = torch.full((1, s * s), 3.0)
        if kind == "dct":
            wanted = torch.zeros(1, s * s)
            wanted[0, 0] = 3 * 60**0.5
        assert torch.allclose(low, wanted, atol=1e-5)
    line = torch.arange(9.0).reshape(1, 1, 1, 9)
    sharp = pc_kernels.LowPass("gaussian", (3,), sigma=1e-3)(line)[3]
    assert torch.equal(sharp.reshape(3, 3)[0], torch.tensor([1.0, 4.0, 7.0]))
    wide = pc_kernels.LowPass("gaussian", (3,), sigma=1e3)(line)[3]
    assert torch.allclose(wide, torch.tensor(4.0), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind: str, rng: Generator) -> None:
    low = pc_kernels.LowPass(kind, (1, 3), grid=(2, 5), class_tokens=1)
    tokens = torch.randn(2, 11, 2, generator=rng, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: torch.cat(list(low(x).values()), 1), tokens)
    assert torch.autograd.gradgradcheck(lambda x: low(x)[3] ** 2, tokens)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_and_strides(kind: str, dtype: torch.dtype, rng: Generator) -> None:
    """In float32 from the first product on, also under autocast; the gradient has the input's dtype."""
    x = torch.randn(2, 6, 5, 3, generator=rng).to(dtype).requires_grad_()
    low = pc_kernels.LowPass(kind)
    wanted = low(x.detach().float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = low(x)
    odd = low(x.detach().contiguous(memory_format=torch.channels_last))
    flipped = low(x.detach().float().mT.contiguous().mT)
    for s in wanted:
        for other in (got[s], odd[s], flipped[s]):
            assert torch.allclose(other, wanted[s], rtol=1e-5, atol=1e-6)
    got[4].sum().backward()
    assert x.grad is not None and x.grad.dtype == dtype and x.grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_compile(kind: str, rng: Generator) -> None:
    torch.compiler.reset()
    low = pc_kernels.LowPass(kind, (1, 3), grid="square")
    compiled = torch.compile(low, fullgraph=True, backend="aot_eager")
    for shape in ((2, 3, 5, 6), (4, 16, 3)):
        x = torch.randn(shape, generator=rng, requires_grad=True)
        for got, wanted in zip(compiled(x).values(), low(x).values(), strict=True):
            assert torch.allclose(got, wanted, atol=1e-6)
    assert low(torch.empty(0, 3, 4, 4))[3].shape == (0, 27)


def test_what_is_not_finite(rng: Generator) -> None:
    x = torch.randn(2, 3, 8, 8, generator=rng)
    x[0, 1, 2, 3] = float("nan")
    low = pc_kernels.LowPass("dct")(x)[2].reshape(2, 3, 4).isnan()
    assert low[0, 1].all() and low.sum() == 4


Call = Callable[[], Any]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda low: low("wavelet"),
            ValueError,
            "kind must be one of 'average', 'gaussian', 'dct'",
        ),
        (lambda low: low("dct", 4), TypeError, "scales must be a sequence.*got 4"),
        (lambda low: low("dct", ()), TypeError, "one int or more"),
        (lambda low: low("dct", (2, 2)), ValueError, r"scales must differ; got \(2, 2\)"),
        (lambda low: low("dct", (0,)), ValueError, "scales must be at least 1; got 0"),
        (lambda low: low("dct", (1.5,)), TypeError, "scales must be an int; got float"),
        (lambda low: low(sigma=0.0), ValueError, "sigma must be between 0.001 and 1000; got 0.0"),
        (lambda low: low(sigma=float("nan")), ValueError, "sigma.*got nan"),
        (lambda low: low(sigma="1"), TypeError, "sigma must be a number; got str"),
        (lambda low: low(grid=7), TypeError, r"grid must be \(rows, columns\), 'square' or None"),
        (lambda low: low(grid="cube"), TypeError, "grid must be"),
        (lambda low: low(grid=(7, 0)), ValueError, "grid must be at least 1; got 0"),
        (lambda low: low(class_tokens=-1), ValueError, "class_tokens must be at least 0"),
    ],
)
def test_errors_at_construction(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call(pc_kernels.LowPass)


@pytest.mark.parametrize(
    ("options", "x", "error", "words"),
    [
        (
            {},
            torch.zeros(2, 5, 3),
            ValueError,
            r"mid has shape \(2, 5, 3\): say how its tokens lie",
        ),
        ({"grid": (2, 2)}, torch.zeros(2, 5, 3), ValueError, r"5 tokens.*class_tokens=0 and 2·2"),
        ({"grid": "square"}, torch.zeros(2, 5, 3), ValueError, "5 tokens.*and a square"),
        ({"grid": "square", "class_tokens": 5}, torch.zeros(2, 5, 3), ValueError, "5 tokens"),
        ({}, torch.zeros(2, 3, 0, 4), ValueError, "mid has no positions"),
        ({}, torch.zeros(3), ValueError, r"mid must be \[B, C, H, W\]"),
        ({}, torch.zeros(2, 3, dtype=torch.int64), TypeError, "mid must be float32"),
        ({}, [1.0], TypeError, "mid must be a torch.Tensor; got list"),
    ],
)
def test_errors(options: dict[str, Any], x: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        pc_kernels.LowPass(**options)(x, "mid")
