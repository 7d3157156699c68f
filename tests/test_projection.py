"""Ranks by projection, soft sorting and top-k: against the definitions, and torchsort where it is."""

from __future__ import annotations

import importlib.util
import math
import time
from typing import Any

import pytest
import test_nearly_hard
import tolerances
import torch
from compare import DOUBLE_BACKENDS, SCALES, assert_near, assert_norm_near, own_leaf, usable
from inputs import ROWS, make_rows
from torch import Generator, Tensor

import pc_kernels
from pc_kernels import reference
from pc_kernels.backends import BACKENDS as TABLE
from pc_kernels.compat import torchsort as ours
from pc_kernels.formulas import PROJECTIONS

BACKENDS = usable()
FAST_BACKENDS = [b for b in BACKENDS if b.values != ("reference",)]
for_each_projection = pytest.mark.parametrize("relaxation", PROJECTIONS)


def check(backend: str, x: Tensor, rng: Generator, *options: Any) -> None:
    """Ranks and gradient of rows x [N, m] with temperature, relaxation and scale.

    The gradient g_j − mean g of a block has the floor of its terms, over τ; that of `projection_kl` times
    the ranks, m of them over m − 1 at most. In float64 closed gaps add up to m², rounded m times.
    """
    upstream = torch.randn(x.shape, generator=rng).to(x)
    leaf, truth = own_leaf(x), own_leaf(x.double())
    rank = pc_kernels.soft_rank(leaf, *options, backend=backend)
    wanted = reference.soft_rank(truth, *options)
    rank.backward(upstream)
    wanted.backward(upstream.double())
    m, double = x.shape[1], x.dtype == torch.float64
    allowed = tolerances.rank_tolerance(x.dtype) + double * m * m * 2.0**-53
    assert_near("rank", rank, wanted.detach(), allowed)
    assert leaf.grad is not None and truth.grad is not None and leaf.grad.dtype == x.dtype
    temperature, _, scale = options
    spread = x.double().std(1, correction=0) if scale == "std" else torch.ones(len(x))
    tau = temperature * torch.where(spread > 0, spread, 1)
    floor = 2 * (m + 1) / max(m - 1, 1) * tolerances.rounding(x.dtype) * upstream.norm(dim=1) / tau
    relative = tolerances.grad_tolerance(x.dtype) + double * m * m * 2.0**-53
    allowed = relative * truth.grad.norm(dim=1) + floor.nan_to_num(torch.inf)
    allowed += tolerances.subnormal_floor(x.dtype, m)
    assert_norm_near("gradient", leaf.grad, truth.grad, allowed)


@for_each_projection
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_rows_that_make_trouble(backend: str, name: str, relaxation: str, rng: Generator) -> None:
    x = make_rows(name, rng, 2, 97)
    for temperature, scale in ((1e-4, "std"), (0.1, None), (100.0, "std"), (100.0, None)):
        check(backend, x, rng, temperature, relaxation, scale)


@for_each_projection
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_clumps_and_long_rows(backend: str, relaxation: str, rng: Generator) -> None:
    for name in test_nearly_hard.ROWS:
        check(backend, test_nearly_hard.make(name, rng, 2, 120), rng, 1.0, relaxation, None)
    check(backend, make_rows("normal", rng, 1, 700), rng, 0.5, relaxation, "std")


@for_each_projection
@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths(backend: str, relaxation: str, rng: Generator) -> None:
    for m in (1, 2, 3, 5, 8, 17):
        for name in ("normal", "integers"):
            check(backend, make_rows(name, rng, 3, m), rng, 0.3, relaxation, "std")
    empty = pc_kernels.soft_rank(torch.empty(2, 0), 0.3, relaxation, backend=backend)
    assert empty.shape == (2, 0)


@for_each_projection
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_absent_does_not_count(backend: str, relaxation: str, rng: Generator) -> None:
    """In a loss, which is the other rows' with the references taken out."""
    d_s, d_t = torch.rand(2, 3, 20, generator=rng)
    keep = (torch.arange(20) % 3 > 0).expand(3, 20)
    results = []
    for student, teacher, mask in ((d_s, d_t, keep), (d_s[keep], d_t[keep], None)):
        leaf = own_leaf(student.view(3, -1))
        loss = pc_kernels.coherence_loss_from_dissimilarities(
            leaf, teacher.view(3, -1), pair_mask=mask, relaxation=relaxation, backend=backend
        )
        loss.backward()
        results.append((loss, leaf.grad if mask is None else leaf.grad[keep].view(3, -1)))
    (loss, grad), (wanted, wanted_grad) = results
    assert_near("loss", loss, wanted.double(), tolerances.LOSS * wanted)
    assert_norm_near("gradient", grad, wanted_grad.double(), tolerances.GRAD * wanted_grad.norm())


@for_each_projection
@pytest.mark.parametrize("backend", DOUBLE_BACKENDS)
def test_double(backend: str, relaxation: str, rng: Generator) -> None:
    for name in ("normal", "outlier of 1e3"):
        check(backend, make_rows(name, rng, 3, 65).double(), rng, 0.2, relaxation, "std")
    leaf = own_leaf(torch.randn(2, 7, generator=rng).double())
    for scale in SCALES:
        assert torch.autograd.gradcheck(
            lambda x, scale=scale: pc_kernels.soft_rank(x, 0.7, relaxation, scale, backend=backend),
            leaf,
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_neighbours_at_a_kink_are_pooled(backend: str) -> None:
    """Values τ/(m − 1) apart have the hard ranks either way; the gradient is that of smaller gaps."""
    x = torch.tensor([[0.0, 1.0]], requires_grad=True)
    rank = pc_kernels.soft_rank(x, 1.0, "projection", backend=backend)
    rank.backward(torch.tensor([[3.0, 1.0]]))
    assert x.grad is not None
    assert rank.tolist() == [[0.0, 1.0]] and x.grad.tolist() == [[1.0, -1.0]]


def hostile_sequences(rng: Generator, m: int) -> Tensor:
    """Of s − w: what pools one by one from the end, all at once, nothing, and in clumps of clumps."""
    k = torch.arange(m).double()
    end = torch.cat([-(k[:-1] ** 1.5), torch.tensor([10.0 * m**1.5])])
    return torch.stack(
        [
            end,
            k,
            -k,
            torch.zeros(m).double(),
            (k % 7) - k / 5,
            torch.randn(m, generator=rng).double(),
        ]
    )


@pytest.mark.parametrize("kl", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks(backend: str, kl: bool, rng: Generator) -> None:
    """Of any two descending sequences: what is projected does not ascend further, and adds up."""
    for m in (0, 1, 2, 7, 64, 99):
        y = hostile_sequences(rng, m) if m > 1 else torch.zeros(1, m).double()
        w = -y.diff(dim=1, prepend=y[:, :1]).clamp(min=0).cumsum(1) - torch.arange(m) * 0.01
        s = y + w  # descends: w falls wherever y rises
        blocks = TABLE[backend].isotonic_blocks(s, w.contiguous(), kl)
        assert blocks.dtype == torch.int64 and blocks.shape == s.shape
        wanted = reference.isotonic(s, w, kl) if m else s
        got = s - pc_kernels.backends.projected.project(s, w, blocks, kl)
        assert_near("regression", got, wanted, 1e-12 * (1 + y.abs().sum(1, keepdim=True)))


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_no_row_is_quadratic(backend: str, rng: Generator) -> None:
    """Twice the length may take three times as long."""
    blocks = TABLE[backend].isotonic_blocks
    for y in hostile_sequences(rng, 1 << 15).unbind(0):
        spent = []
        for count in (1 << 12, 1 << 15):
            s, w = y[None, -count:].contiguous(), torch.zeros(1, count).double()
            start = time.process_time()
            blocks(s, w, False)
            spent.append(time.process_time() - start)
        assert spent[1] < 0.05 + 3**3 * spent[0]


@pytest.mark.parametrize("regularization", ["l2", "kl"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_soft_sort(backend: str, regularization: str, rng: Generator) -> None:
    """Against autograd through the definition, ascending and descending, in any dtype and dimension."""
    x = torch.randn(4, 31, 2, generator=rng)
    for temperature, descending in ((0.01, True), (0.3, False), (30.0, True)):
        options = (temperature, regularization, descending)
        leaf, truth = own_leaf(x), own_leaf(x.double())
        got = pc_kernels.soft_sort(leaf, *options, dim=1, backend=backend)
        sign = 1 if descending else -1
        w = (sign * truth).movedim(1, -1).sort(-1, descending=True).values
        s = torch.arange(31, 0, -1).double().expand_as(w) / temperature
        wanted = sign * (s - reference.isotonic(s, w, regularization == "kl")).movedim(-1, 1)
        upstream = torch.randn(x.shape, generator=rng)
        got.backward(upstream)
        wanted.backward(upstream.double())
        assert_near("sorted", got, wanted.detach(), 4 * tolerances.U * x.abs().max())
        assert_norm_near("gradient", leaf.grad, truth.grad, 1e-5 * truth.grad.norm())
        half = pc_kernels.soft_sort(x.bfloat16(), *options, dim=1, backend=backend)
        assert half.dtype == torch.bfloat16 and half.shape == x.shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_soft_topk(backend: str, rng: Generator) -> None:
    x = torch.randn(5, 40, generator=rng)
    hard = x.topk(6)
    sharp = pc_kernels.soft_topk(x, 6, 1e-4, backend=backend)
    assert torch.equal(sharp.mask, torch.zeros_like(x).scatter(1, hard.indices, 1.0))
    assert_near("values", sharp.values, hard.values.double(), 4 * tolerances.U * x.abs().max())
    leaf, truth = own_leaf(x), own_leaf(x.double())
    mask = pc_kernels.soft_topk(leaf, 6, 0.5, backend=backend).mask
    s, order = (truth / 0.5).sort(1, descending=True)
    w = (torch.arange(40) < 6).double().expand_as(s)
    wanted = torch.zeros_like(s).scatter(1, order, s - reference.isotonic(s, w))
    upstream = torch.randn(x.shape, generator=rng)
    mask.backward(upstream)
    wanted.backward(upstream.double())
    assert_near("mask", mask, wanted.detach(), tolerances.RANK)
    assert_norm_near("gradient", leaf.grad, truth.grad, 1e-5 * truth.grad.norm())
    assert mask.min() >= -tolerances.RANK and mask.max() <= 1 + tolerances.RANK
    assert_near("sum", mask.sum(1), torch.full((5,), 6.0).double(), 40 * tolerances.RANK)
    for k in (0, 40):
        found = pc_kernels.soft_topk(x.t(), k, 0.5, dim=0, backend=backend)
        assert found.values.shape == (k, 5) and (found.mask - min(k, 1)).abs().max() <= 1e-6


def test_gradcheck_of_sorting(rng: Generator) -> None:
    leaf = own_leaf(torch.randn(2, 8, generator=rng).double())
    for regularization in ("l2", "kl"):
        function = lambda x, r=regularization: pc_kernels.soft_sort(x, 0.8, r)  # noqa: E731
        assert torch.autograd.gradcheck(function, leaf)
    assert torch.autograd.gradcheck(lambda x: tuple(pc_kernels.soft_topk(x, 3, 0.8)), leaf)


def test_undefined_rows_are_nan_alone() -> None:
    x = torch.tensor([[1.0, torch.nan, 2.0], [1.0, 3.0, 2.0], [-torch.inf, 0.0, 1.0]])
    for result in (
        pc_kernels.soft_sort(x),
        pc_kernels.soft_topk(x, 2).mask,
        pc_kernels.soft_rank(x, 0.1, "projection"),
    ):
        assert result.isnan().all(1).tolist() == [True, False, True]


@for_each_projection
def test_blocks_that_are_none(relaxation: str) -> None:
    """Of a direct caller of the operator: nothing beyond the row is read or written."""
    if (reason := TABLE["cpu"].obstacle(torch.device("cpu"), torch.float32)) is not None:
        pytest.skip(reason)
    backward = torch.ops.pc_kernels.cpu_soft_rank_backward
    x = torch.arange(6.0)[None]
    blocks = torch.tensor([[torch.nan, torch.inf, -torch.inf, 1e30, -7.0, 6.0]])
    assert backward(x, x, blocks, None, 0.1, relaxation, False).isfinite().all()


@pytest.mark.clean_memory
def test_compiles(rng: Generator) -> None:
    x = torch.randn(3, 12, generator=rng)

    def all_of_them(v: Tensor) -> Tensor:
        return pc_kernels.soft_rank(v, 0.1, "projection") + pc_kernels.soft_topk(v, 3).mask

    compiled = torch.compile(all_of_them, fullgraph=True, backend="aot_eager")
    results = []
    for function in (all_of_them, compiled):
        leaf = own_leaf(x)
        value = function(leaf)
        value.square().sum().backward()
        results.append((value.detach(), leaf.grad))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda x: pc_kernels.soft_sort(x, 0.0), ValueError, "temperature must be finite and > 0"),
        (lambda x: pc_kernels.soft_sort(x, 1.0, "l1"), ValueError, "regularization .* 'l2', 'kl'"),
        (lambda x: pc_kernels.soft_sort(x, 1.0, descending=3), ValueError, "descending must be"),
        (lambda x: pc_kernels.soft_topk(x, 5), ValueError, r"k must be in \[0, 4\].*got 5"),
        (lambda x: pc_kernels.soft_topk(x, 2.0), TypeError, "k must be an int; got float"),
        (
            lambda x: pc_kernels.smooth_cdf(x, x, relaxation="projection"),
            ValueError,
            "relaxation must be one with a CDF here, 'logistic', 'normal', 'laplace'",
        ),
        (lambda x: ours.soft_rank(x[0]), ValueError, "values must have 2 dimensions"),
        (lambda x: ours.soft_sort(x, "l3"), ValueError, "regularization must be one of"),
        (lambda x: ours.soft_rank(x, "l2", -1.0), ValueError, "regularization_strength must be"),
    ],
)
def test_errors(call: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        call(torch.rand(3, 4))


def test_the_operator() -> None:
    s, w = torch.tensor([[3.0, 2.0, 0.0]]).double(), torch.tensor([[2.0, 0.0, 0.0]]).double()
    torch.library.opcheck(torch.ops.pc_kernels.isotonic_blocks, (s, w, False, "auto"))
    with pytest.raises(ValueError, match=r"matrices of one shape; got \(1, 3\) and \(1, 2\)"):
        torch.ops.pc_kernels.isotonic_blocks(s, w[:, :2], False, "auto")


def authors_formula(name: str, x: Tensor, regularization: str, epsilon: float) -> Tensor:
    """`soft_rank` and `soft_sort` of google-research/fast-soft-sort, by the definition."""
    kl, m = regularization == "kl", x.shape[1]
    places = torch.arange(m, 0, -1).double().expand_as(x)
    if name == "soft_sort":
        s, w = places / epsilon, (-x).sort(1, descending=True).values
        return reference.isotonic(s, w, kl) - s
    s, order = (x / epsilon).sort(1, descending=True)
    rank = s - reference.isotonic(s, places.log() if kl else places, kl)
    return torch.zeros_like(rank).scatter(1, order, rank.exp() if kl else rank)


@pytest.mark.parametrize("regularization", ["l2", "kl"])
@pytest.mark.parametrize("name", ["soft_rank", "soft_sort"])
def test_torchsort(name: str, regularization: str, rng: Generator) -> None:
    """Its signatures and results, in float64; it gives no gradient for a sort that is all its own."""
    theirs = None
    if importlib.util.find_spec("torchsort") is not None:
        import torchsort

        theirs = getattr(torchsort, name)
    upstream = torch.randn(4, 30, generator=rng).double()
    x = torch.randn(4, 30, generator=rng).double()
    for epsilon in (0.05, 1.0, 20.0):
        functions = [
            lambda v, e=epsilon: getattr(ours, name)(v, regularization, e),
            lambda v, e=epsilon: authors_formula(name, v, regularization, e),
        ]
        if theirs is not None:
            functions.append(lambda v, e=epsilon: theirs(v, regularization, e))
        results = []
        for function in functions:
            leaf = own_leaf(x)
            value = function(leaf)
            value.backward(upstream)
            results.append((value.detach(), leaf.grad))
        for value, grad in results[1:]:
            assert_near(name, results[0][0], value, 1e-9)
            assert_norm_near("gradient", results[0][1], grad, 1e-9 * (1 + grad.norm()))
    single = getattr(ours, name)(torch.tensor([[3.0]]))
    assert math.isclose(single.item(), 1.0 if name == "soft_rank" else 3.0, rel_tol=1e-6)
