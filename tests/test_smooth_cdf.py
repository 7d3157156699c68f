"""The weighted smooth CDF of every backend against float64 autograd of its definition."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import test_nearly_hard
import tolerances
import torch
from cdf import CASES
from compare import (
    BACKEND_NAMES,
    DOUBLE_BACKENDS,
    FAST_BACKENDS,
    RELAXATIONS,
    assert_near,
    check_smooth_cdf,
    own_leaf,
)
from conftest import ROOT
from inputs import BEYOND_PLAIN_FLOAT32, ROWS, make_rows
from torch import Generator, Tensor

import pc_kernels
from pc_kernels import reference
from pc_kernels.backends import BACKENDS
from pc_kernels.cdf_rows import CdfRows
from pc_kernels.formulas import RELAXATIONS as TABLE
from pc_kernels.recipe import Recipe


def value_of(parameter: Any) -> str | None:
    """The backend, unless it is skipped."""
    return None if parameter.marks else parameter.values[0]


def sources_and_queries(name: str, rng: Generator, rows: int, m: int, n: int) -> list[Tensor]:
    """Of one kind of row, with the sources' own values among the queries, for ties."""
    make = make_rows if name in ROWS else test_nearly_hard.make
    x = make(name, rng, rows, m + n)
    own = x[:, torch.randint(m, (n // 2,), generator=rng)] if m else x[:, :0]
    return [x[:, :m].clone(), torch.cat([own, x[:, m + n // 2 :]], 1)[:, :n]]


@pytest.mark.parametrize("relaxation", RELAXATIONS)
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_rows_that_make_trouble(backend: str, name: str, relaxation: str, rng: Generator) -> None:
    x, y = sources_and_queries(name, rng, 2, 67, 41)
    w = torch.randn(2, 2, 67, generator=rng)
    for temperature in (1e-4, 1e-2, 0.3, 100.0):
        for case in CASES:
            if case["integral"] and name in BEYOND_PLAIN_FLOAT32:
                continue
            check_smooth_cdf(
                backend, (x, y, w), rng, temperature=temperature, relaxation=relaxation, **case
            )


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_few_queries_of_rows_that_make_trouble(backend: str, name: str, rng: Generator) -> None:
    """Whose pairs cost less than a grid; their gradients have few sources."""
    x, y = sources_and_queries(name, rng, 2, 131, 6)
    w = torch.randn(2, 2, 131, generator=rng)
    for temperature in (1e-4, 0.3, 100.0):
        for tail in ("lower", "upper"):
            check_smooth_cdf(backend, (x, y, w), rng, temperature=temperature, tail=tail)


@pytest.mark.parametrize("tail", ["lower", "upper"])
@pytest.mark.parametrize("centre", [0.0, 1e6])
def test_pairs_at_any_distance(centre: float, tail: str) -> None:
    """Few queries, or sources, near each other and far, among many: of every sum the digits."""
    if "cpu" not in map(value_of, BACKEND_NAMES):
        pytest.skip("no extension")
    many = (centre + 0.25 * torch.arange(-2001.0, 2002.0))[None]
    few = (centre + torch.tensor([-150.0, -131, -111.5, 0, 38, 39.75, 79, 79, 500]))[None]
    for sources, queries in ((many, few), (few, many)):
        for tau in (1e-4, 0.5, 1.0, 3.0, 300.0):
            rows = CdfRows(sources, queries, None, upper=tail == "upper")
            recipe = Recipe(temperature=tau, scale=None)
            got = BACKENDS["cpu"].kernel_sums(rows, recipe, ("cdf", "pdf"))
            z = (queries.double()[:, :, None] - sources.double()[:, None, :]) / tau
            step = torch.sigmoid(z if tail == "lower" else -z)
            for name, sums, terms in zip(
                ("cdf", "pdf"), got, (step, step * (1 - step)), strict=True
            ):
                wanted = terms.sum(2)
                assert_near(name, sums[0], wanted, tolerances.RANK * wanted + 1e-14)


@pytest.mark.parametrize("relaxation", RELAXATIONS)
@pytest.mark.parametrize("name", test_nearly_hard.ROWS)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_nearly_hard_rows(backend: str, name: str, relaxation: str, rng: Generator) -> None:
    x, y = sources_and_queries(name, rng, 2, 300, 150)
    for temperature in (1.0, 0.05, 30.0):
        for case in CASES:
            check_smooth_cdf(
                backend, (x, y, None), rng, temperature=temperature, relaxation=relaxation, **case
            )


@pytest.mark.parametrize("m", [0, 1, 2, 33, 129])
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_lengths(backend: str, m: int, rng: Generator) -> None:
    for n in (0, 1, 2, 16, 700):
        x, y = torch.randn(3, m, generator=rng), torch.randn(3, n, generator=rng)
        w = torch.randn(3, m, generator=rng)
        for case in CASES:
            check_smooth_cdf(backend, (x, y, w), rng, temperature=0.2, **case)


INSTRUCTION_SET = """
import sys, torch, test_smooth_cdf
from pc_kernels import _C
rng = torch.Generator().manual_seed(int(sys.argv[1]))
test_smooth_cdf.test_lengths("cpu", 33, rng)
test_smooth_cdf.test_nearly_hard_rows("cpu", "clumps of several densities", "logistic", rng)
test_smooth_cdf.test_masks("cpu", rng)
test_smooth_cdf.test_pairs_at_any_distance(0.0, "upper")
print(_C.cpu_isa())
"""


@pytest.mark.skipif("cpu" not in map(value_of, BACKEND_NAMES), reason="no extension")
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_narrower_instruction_sets(isa: str, python: Callable[..., Any], seed: int) -> None:
    """In new memory that is full of large numbers."""
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    done = python(
        "-c",
        INSTRUCTION_SET,
        str(seed),
        PYTHONPATH=paths,
        PC_KERNELS_CPU_ISA=isa,
        MALLOC_PERTURB_=str(0x80),
    )
    if f"PC_KERNELS_CPU_ISA={isa} is not one that" in done.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert done.returncode == 0 and done.stdout.strip() == isa, done.stderr


@pytest.mark.parametrize("tail", ["lower", "upper"])
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_small_counts_beside_a_crowd(backend: str, tail: str, rng: Generator) -> None:
    """Counted from its own end, the first of 100,000 has a relative error, crowds at any distance."""
    sign = 1.0 if tail == "lower" else -1.0
    for distance in (5.0, 18.0, 30.0, 60.0, 1e4):
        crowd = distance + 3 * torch.rand(100_000, generator=rng)
        x = sign * torch.cat([torch.tensor([0.0, 0.5]), crowd])
        y = sign * torch.tensor([-1.0, 0.0, 0.5, distance - 1])
        got = pc_kernels.smooth_cdf(x, y, temperature=1.0, tail=tail, backend=backend)
        wanted = reference.smooth_cdf(x.double(), y.double(), temperature=1.0, tail=tail)
        error = (got.double() - wanted).abs()
        assert (error <= tolerances.RANK * wanted + 1e5 * 2e-15).all(), distance


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_against_soft_rank(backend: str, rng: Generator) -> None:
    x = torch.randn(3, 50, generator=rng)
    counts = pc_kernels.smooth_cdf(x, x, temperature=0.2, backend=backend) - 0.5
    rank = pc_kernels.soft_rank(x, 0.2, backend=backend)
    assert torch.allclose(counts / 49, rank, atol=tolerances.RANK, rtol=0)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_the_integral_rises_by_the_cdf(backend: str, rng: Generator) -> None:
    x, y = torch.randn(3, 50, generator=rng), own_leaf(torch.randn(3, 20, generator=rng))
    for tail, sign in (("lower", 1), ("upper", -1)):
        options: Any = {"temperature": 0.2, "tail": tail, "backend": backend}
        integral = pc_kernels.smooth_cdf(x, y, integral=True, **options)
        (rise,) = torch.autograd.grad(integral.sum(), y)
        wanted = sign * pc_kernels.smooth_cdf(x, y, **options) / 0.2
        assert torch.allclose(rise, wanted, rtol=1e-6, atol=0)


def lists(rng: Generator, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Values and offsets."""
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return torch.randn(int(offsets[-1]), generator=rng), offsets


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_lists(backend: str, masked: bool, rng: Generator) -> None:
    """Of very different lengths; one has far values, one is nearly hard."""
    x, x_offsets = lists(rng, [0, 1, 5, 300, 0, 2, 40, 17, 0])
    y, y_offsets = lists(rng, [3, 0, 7, 90, 0, 33, 2, 800, 1])
    x[10] = 1e4
    x[-17:] *= 1e6
    options: dict[str, Any] = {"source_offsets": x_offsets, "query_offsets": y_offsets}
    if masked:
        options["source_mask"] = torch.rand(len(x), generator=rng) < 0.7
        options["query_mask"] = torch.rand(len(y), generator=rng) < 0.7
    for w in (None, torch.rand(len(x), generator=rng), torch.randn(3, len(x), generator=rng)):
        for case in CASES:
            check_smooth_cdf(backend, (x, y, w), rng, temperature=0.2, **options, **case)
    nothing = torch.zeros(1, dtype=torch.int64)
    none = pc_kernels.smooth_cdf(
        x[:0], y[:0], source_offsets=nothing, query_offsets=nothing, backend=backend
    )
    assert none.shape == (0,)


@pytest.mark.clean_memory
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_one_long_list_among_many_short(backend: str, rng: Generator) -> None:
    """Takes milliseconds, in `torch` tenths of a second; padded, it would take 10^9 places."""
    x, offsets = lists(rng, [1] * 20_000 + [50_000] + [2] * 20_000)
    start = time.perf_counter()
    leaf = own_leaf(x)
    counts = pc_kernels.smooth_cdf(
        leaf, leaf, source_offsets=offsets, query_offsets=offsets, backend=backend
    )
    counts.sum().backward()
    assert time.perf_counter() - start < 5
    assert torch.allclose(counts[:20_000], torch.tensor(0.5))


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_masks(backend: str, rng: Generator) -> None:
    """What is absent changes nothing, whatever it is."""
    x, y = torch.randn(5, 40, generator=rng), torch.randn(5, 30, generator=rng)
    w = torch.randn(5, 2, 40, generator=rng)
    there, asked = torch.rand(5, 40, generator=rng) < 0.6, torch.rand(5, 30, generator=rng) < 0.6
    there[0], asked[1], there[2], asked[2] = False, False, True, True
    bad = torch.tensor([math.nan, math.inf, -math.inf, 1e30])
    x = torch.where(there, x, bad[torch.randint(4, x.shape, generator=rng)])
    y = torch.where(asked, y, bad[torch.randint(4, y.shape, generator=rng)])
    w = torch.where(there[:, None], w, torch.nan)
    for case in CASES:
        for temperature in (0.2, 1e-3):
            check_smooth_cdf(
                backend,
                (x, y, w),
                rng,
                source_mask=there,
                query_mask=asked,
                temperature=temperature,
                **case,
            )


@pytest.mark.parametrize("where", ["sources", "queries", "weights"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_only_rows_with_a_nan_or_infinity_are_nan(
    backend: str, bad: float, where: str, rng: Generator
) -> None:
    inputs = {
        "sources": torch.randn(4, 20, generator=rng),
        "queries": torch.randn(4, 30, generator=rng),
        "weights": torch.randn(4, 20, generator=rng),
    }
    inputs[where][2, 3] = bad
    leaves = [own_leaf(x) for x in inputs.values()]
    counts = pc_kernels.smooth_cdf(*leaves, backend=backend)
    touched = torch.arange(4) == 2
    assert counts[touched].isnan().all() and counts[~touched].isfinite().all()
    counts.sum().backward()
    for leaf in leaves:
        assert leaf.grad[~touched].isfinite().all()
    assert leaves[1].grad[touched].isnan().all()
    without = pc_kernels.smooth_cdf(inputs["sources"][:, :0], inputs["queries"], backend=backend)
    assert (without.nan_to_num() == 0).all()
    assert without[2].isnan().all() == (where == "queries")


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_extreme_temperatures(backend: str, rng: Generator) -> None:
    """Hard counts below every gap, half of all above; gradients 0, not NaN."""
    x, y = (make_rows("integers", rng, 3, 40) for _ in range(2))
    hard = (y[:, :, None] > x[:, None]).double() + (y[:, :, None] == x[:, None]).double() / 2
    for temperature, wanted in ((1e-300, hard.sum(2)), (1e-60, hard.sum(2)), (1e300, y * 0 + 20.0)):
        leaves = own_leaf(x), own_leaf(y + 0.5)
        counts = pc_kernels.smooth_cdf(x, y, temperature=temperature, backend=backend)
        error = (counts.double() - wanted).abs()
        assert (error <= tolerances.RANK * wanted).all(), temperature
        pc_kernels.smooth_cdf(*leaves, temperature=temperature, backend=backend).sum().backward()
        assert all((leaf.grad == 0).all() for leaf in leaves)


@pytest.mark.parametrize("exponent", [-128, -140])
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_temperatures_whose_inverse_leaves_float32(
    backend: str, exponent: int, rng: Generator
) -> None:
    """Values and temperature times a power of two: gradients over it, where float32 holds them."""
    unit = 2.0**exponent
    x, y = torch.randint(-32, 33, (2, 3, 50), generator=rng) / 8
    upstream = torch.randn(3, 50, generator=rng) * 2.0**-20
    grads = []
    for size in (1.0, unit):
        leaves = own_leaf(size * x), own_leaf(size * y)
        counts = pc_kernels.smooth_cdf(*leaves, temperature=0.5 * size, backend=backend)
        counts.backward(upstream)
        grads.append(torch.cat([leaf.grad.double() for leaf in leaves]))
    wanted = grads[0] / unit
    assert ((grads[1] - wanted).abs() <= tolerances.GRAD * wanted.norm()).all()


@pytest.mark.parametrize("backend", DOUBLE_BACKENDS)
def test_double(backend: str, rng: Generator) -> None:
    x, y = (torch.randn(2, 3, 65, generator=rng) * (1 + 1e-9)).double()
    w = torch.randn(3, 2, 65, generator=rng).double()
    for relaxation in RELAXATIONS:
        for temperature in (1e-3, 0.3, 100.0):
            for case in CASES:
                check_smooth_cdf(
                    backend, (x, y, w), rng, temperature=temperature, relaxation=relaxation, **case
                )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", DOUBLE_BACKENDS)
def test_gradcheck(backend: str, case: dict[str, Any], rng: Generator) -> None:
    shapes = ((2, 9), (2, 7), (2, 3, 9))
    leaves = [
        torch.randn(shape, generator=rng, dtype=torch.float64, requires_grad=True)
        for shape in shapes
    ]
    assert torch.autograd.gradcheck(
        lambda *inputs: pc_kernels.smooth_cdf(*inputs, temperature=0.4, backend=backend, **case),
        leaves,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_low_precision(backend: str, dtype: torch.dtype, rng: Generator) -> None:
    x, y, w = (torch.randn(3, 40, generator=rng).to(dtype) for _ in range(3))
    check_smooth_cdf(backend, (x, y, w), rng, temperature=0.5)
    mixed = pc_kernels.smooth_cdf(x, y, w.float(), temperature=0.5, backend=backend)
    assert mixed.dtype == torch.float32
    check_smooth_cdf(backend, (x, y, w.float()), rng, temperature=0.5)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_shapes_and_views(backend: str, rng: Generator) -> None:
    x, y = torch.randn(2, 9, 4, generator=rng), torch.randn(7, 2, 4, generator=rng)
    w = torch.randn(4, 2, 9, 5, generator=rng)
    x, y, w = x.transpose(1, 2), y.permute(1, 2, 0), w.permute(1, 0, 3, 2)
    check_smooth_cdf(backend, (x, y, w), rng, temperature=0.3)
    check_smooth_cdf(backend, (x, y, w[:, :, 2]), rng, temperature=0.3)
    check_smooth_cdf(backend, (x[0, 0], y[1, 1], None), rng, temperature=0.3)
    counts = pc_kernels.smooth_cdf(x, y, w, backend=backend)
    assert counts.shape == (2, 4, 5, 7)
    for shape, other in (((0, 5), (0, 3)), ((2, 0, 5), (2, 0, 0)), ((0,), (0,))):
        nothing = pc_kernels.smooth_cdf(torch.zeros(shape), torch.zeros(other), backend=backend)
        assert nothing.shape == other


@pytest.mark.clean_memory
@pytest.mark.parametrize("name", test_nearly_hard.ROWS)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_nearly_hard_rows_are_not_quadratic(
    backend: str, name: str, rng: Generator, threads: Callable[[int], None]
) -> None:
    threads(1)
    x, y = (own_leaf(part) for part in sources_and_queries(name, rng, 1, 20_000, 10_000))
    start = time.perf_counter()
    pc_kernels.smooth_cdf(x, y, temperature=1.0, integral=True, backend=backend).sum().backward()
    assert time.perf_counter() - start < (1.0 if backend == "cpu" else 6.0)


def smooth(x: Tensor, y: Tensor, w: Tensor, **options: Any) -> Tensor:
    return pc_kernels.smooth_cdf(x, y, w, temperature=0.3, **options)


def problem(rng: Generator) -> tuple[Tensor, Tensor, Tensor]:
    x, y = torch.randn(3, 6, generator=rng), torch.randn(3, 5, generator=rng)
    return x, y, torch.rand(3, 2, 6, generator=rng)


@pytest.mark.clean_memory
def test_opcheck(rng: Generator) -> None:
    x, y, w = (own_leaf(v) for v in problem(rng))
    w = own_leaf(w.movedim(-2, 0).contiguous())
    operator = torch.ops.pc_kernels.smooth_cdf.default
    ends = torch.tensor([0, 2, 6, 18]), torch.tensor([0, 9, 9, 15])
    flat = [own_leaf(v) for v in (x.flatten(), y.flatten(), w.flatten(1))]
    masks = torch.rand(3, 6, generator=rng) < 0.8, torch.rand(3, 5, generator=rng) < 0.8
    options = ("auto", True, True)
    matrices = x.double(), y.double(), w.double(), None, None, *masks
    torch.library.opcheck(operator, (*matrices, 0.3, "normal", "lower", "integral", *options))
    torch.library.opcheck(
        operator, (*flat, *ends, None, None, 0.3, "logistic", "lower", "cdf", *options)
    )


@pytest.mark.clean_memory
def test_compile_and_export(rng: Generator) -> None:
    torch._dynamo.reset()
    results = []
    inputs = problem(rng)
    for run in (smooth, torch.compile(smooth, fullgraph=True, backend="aot_eager")):
        leaves = [own_leaf(v) for v in inputs]
        counts = run(*leaves)
        counts.square().sum().backward()
        results.append([counts, *(leaf.grad for leaf in leaves)])
    for eager, compiled in zip(*results, strict=True):
        assert torch.allclose(eager, compiled, rtol=1e-6)

    class Counts(torch.nn.Module):
        def forward(self, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
            return smooth(x, y, w)

    program = torch.export.export(Counts(), inputs)
    assert torch.equal(program.module()(*inputs), smooth(*inputs))


def test_who_gets_a_gradient(rng: Generator) -> None:
    """Each alone as all together."""
    inputs = problem(rng)
    together = [own_leaf(v) for v in inputs]
    smooth(*together).sum().backward()
    for place in range(3):
        alone = [own_leaf(v) if i == place else v for i, v in enumerate(inputs)]
        smooth(*alone).sum().backward()
        assert torch.equal(alone[place].grad, together[place].grad)


def test_no_second_derivatives(rng: Generator) -> None:
    x, y, w = (own_leaf(v) for v in problem(rng))
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(smooth(x, y, w).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"torch.func transform.*pc_kernels.reference"):
        torch.func.vmap(smooth)(x[None], y[None], w[None])


X, Y = torch.zeros(5, 4), torch.zeros(5, 3)
FLAT, ENDS = torch.zeros(4), torch.tensor([0, 1, 4])
BAD: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], tuple[str, ...]]] = {
    "a list": (([1.0], Y), {}, TypeError, ("sources", "list")),
    "integers": ((X, Y.long()), {}, TypeError, ("queries", "int64")),
    "another batch": ((X, Y[:2]), {}, ValueError, ("(5, 4)", "(2, 3)")),
    "weights": ((X, Y, Y), {}, ValueError, ("weights", "(5, 4)", "(5, 3)")),
    "weights' device": ((X, Y, X.to("meta")), {}, ValueError, ("weights on meta",)),
    "mask of floats": ((X, Y), {"source_mask": X}, TypeError, ("source_mask", "float32")),
    "mask": ((X, Y), {"query_mask": X > 0}, ValueError, ("query_mask", "(5, 3)", "(5, 4)")),
    "tail": ((X, Y), {"tail": "top"}, ValueError, ("tail", "'lower'", "'top'")),
    "integral": ((X, Y), {"integral": 1}, ValueError, ("integral", "True", "1")),
    "temperature": ((X, Y), {"temperature": 0.0}, ValueError, ("temperature", "0.0")),
    "an option": ((X, Y), {"scale": "std"}, TypeError, ("'scale'", "temperature")),
    "one offset": (
        (FLAT, FLAT),
        {"source_offsets": ENDS},
        ValueError,
        ("query_offsets", "missing"),
    ),
    "matrices": ((X, Y), {"source_offsets": ENDS, "query_offsets": ENDS}, ValueError, ("(5, 4)",)),
    "offsets of int32": (
        (FLAT, FLAT),
        {"source_offsets": ENDS.int(), "query_offsets": ENDS},
        ValueError,
        ("source_offsets", "int64", "int32"),
    ),
    "offsets that fall": (
        (FLAT, FLAT),
        {"source_offsets": torch.tensor([0, 3, 1, 4]), "query_offsets": ENDS},
        ValueError,
        ("source_offsets", "[0, 3, 1, 4]"),
    ),
    "offsets too far": (
        (FLAT, FLAT),
        {"source_offsets": ENDS, "query_offsets": torch.tensor([0, 1, 5])},
        ValueError,
        ("query_offsets", "4", "[0, 1, 5]"),
    ),
    "other numbers of lists": (
        (FLAT, FLAT),
        {"source_offsets": ENDS, "query_offsets": torch.tensor([0, 4])},
        ValueError,
        ("lists", "2", "1"),
    ),
    "backend": ((X, Y), {"backend": "gpu"}, ValueError, ("'gpu'", "'torch'")),
}


@pytest.mark.parametrize("name", BAD)
def test_errors(name: str) -> None:
    arguments, options, error, words = BAD[name]
    with pytest.raises(error) as caught:
        pc_kernels.smooth_cdf(*arguments, **options)
    assert type(caught.value) is error
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in {caught.value!s}"


def test_a_relaxation_without_an_integral(monkeypatch: pytest.MonkeyPatch) -> None:
    from test_extending import HYPERBOLIC

    monkeypatch.setitem(TABLE, "hyperbolic", HYPERBOLIC)
    counts = pc_kernels.smooth_cdf(X, Y, relaxation="hyperbolic", backend="torch")
    assert torch.allclose(counts, torch.tensor(2.0))
    with pytest.raises(ValueError, match=r"integral.*'logistic' or 'normal'.*'hyperbolic'"):
        pc_kernels.smooth_cdf(X, Y, relaxation="hyperbolic", integral=True)
