"""What training loops use, on inputs that hypothesis draws, against formulas in float64."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import contrast_truth
import test_lfcc
import test_low_pass
import tolerances
import torch
from compare import check_features, own_leaf
from contrast_cases import KINDS, NEAR, Case
from hypothesis import given
from hypothesis import strategies as st
from inputs import quantised
from test_fuzz import backends, fuzzed, relaxations, seeds, temperatures
from torch import Generator, Tensor, nn

import pc_kernels

sizes = st.integers(1, 12)


def near_in_double(got: Tensor, wanted: Tensor) -> bool:
    """To a million roundings; what is nearly 0 to as many of what 1 has."""
    return bool((got - wanted).norm() <= 1e-10 * (wanted.norm() + 1))


@fuzzed
@given(
    st.sampled_from(list(KINDS)),
    st.tuples(st.integers(1, 30), st.integers(0, 9), st.integers(2, 12)),
    seeds,
    backends,
    temperatures,
    st.sampled_from([None, 1, 1 << 10]),
    st.floats(-20, 20),
    st.booleans(),
    st.booleans(),
)
def test_options_of_the_contrastive_loss(
    kind: str,
    shape: tuple[int, int, int],
    seed: int,
    backend: str,
    temperature: float,
    chunk_bytes: int | None,
    bias: float,
    masked: bool,
    weighted: bool,
) -> None:
    rng = Generator().manual_seed(seed)
    case = Case(rng, kind, shape)
    options: dict[str, Any] = {"chunk_bytes": chunk_bytes}
    if kind == "SigLIP":
        options["bias"] = bias
    if kind == "distillation":
        options["targets"] = case.options["targets"]._replace(temperature=temperature)
    weights = torch.rand(shape[0], generator=rng) + 0.1 if weighted else None
    if masked:
        options["pair_mask"] = case.mask(rng)
    case.check(backend, weights, temperature=temperature, **options)
    case.check(backend, weights, temperature=max(temperature, 1.0), normalize=False, **options)


@fuzzed
@given(st.sampled_from(list(KINDS)), sizes, st.integers(0, 9), seeds, st.booleans(), backends)
def test_reductions_of_the_contrastive_loss(
    kind: str, anchors: int, more: int, seed: int, masked: bool, backend: str
) -> None:
    """Each with gradients that come from elsewhere."""
    rng = Generator().manual_seed(seed)
    case = Case(rng, kind, (anchors, more, 8))
    mask, upstream = case.mask(rng) if masked else None, torch.randn(anchors, generator=rng)
    options = {"temperature": 0.2, "pair_mask": mask, **case.options}
    of_loss = {name: x for name, x in options.items() if name not in ("targets", "pair_mask")}
    of_call = {name: x for name, x in options.items() if name in ("targets", "pair_mask")}
    for reduction in ("none", "sum", "mean"):
        leaves, truths = ([own_leaf(x.to(t)) for x in case.features] for t in (None, torch.float64))
        each = contrast_truth.losses(*truths, **options)
        wanted = {"none": each, "sum": each.sum(), "mean": each.mean()}[reduction]
        loss_fn = pc_kernels.ContrastiveLoss(reduction=reduction, backend=backend, **of_loss)
        got = loss_fn(*leaves, **of_call)
        assert ((got - wanted).abs() <= NEAR * wanted.abs() + 1e-7).all()
        g = upstream if reduction == "none" else upstream[0]
        for a, b in zip(
            torch.autograd.grad(got, leaves, g),
            torch.autograd.grad(wanted, truths, g.double()),
            strict=True,
        ):
            assert (a - b).norm() <= NEAR * b.norm() + 1e-7 * g.norm()


@fuzzed
@given(
    st.sampled_from(test_low_pass.KINDS),
    sizes,
    sizes,
    st.lists(st.integers(1, 9), min_size=1, max_size=3, unique=True),
    st.floats(-1, 1).map(lambda power: 10**power),
    seeds,
    st.booleans(),
)
def test_filters(
    kind: str, rows: int, columns: int, scales: list[int], sigma: float, seed: int, turned: bool
) -> None:
    """Of maps, and of the same maps as tokens, with others before them, and not contiguous."""
    rng = Generator().manual_seed(seed)
    x = torch.randn(2, 3, rows, columns, generator=rng)
    x = x.transpose(2, 3).contiguous().transpose(2, 3) if turned else x
    tokens = torch.cat([torch.randn(2, 1, 3, generator=rng), x.flatten(2).mT], 1)
    of_maps = pc_kernels.LowPass(kind, scales, sigma=sigma)
    of_tokens = pc_kernels.LowPass(kind, scales, sigma=sigma, grid=(rows, columns), class_tokens=1)
    for s, got in of_maps(x).items():
        wanted, terms = test_low_pass.directly(x, kind, s, sigma)
        allowed = (rows + columns + 32) * tolerances.U * terms
        assert ((got - wanted).abs() <= allowed).all()
        assert ((of_tokens(tokens)[s] - wanted).abs() <= allowed).all()
        in_double = of_maps(x.double())[s]
        assert torch.allclose(in_double, wanted, rtol=1e-11, atol=1e-12)


@fuzzed
@given(
    st.sampled_from(list(test_lfcc.KINDS)),
    st.sampled_from(list(test_lfcc.KINDS)),
    st.sampled_from(test_low_pass.KINDS),
    st.lists(st.integers(1, 4), min_size=1, max_size=2, unique=True),
    st.sampled_from(["linear", "conv"]),
    st.integers(1, 9),
    st.floats(0.1, 10),
    seeds,
)
def test_losses_of_low_frequencies(
    student: str,
    teacher: str,
    kind: str,
    scales: list[int],
    projection: str,
    width: int,
    temperature: float,
    seed: int,
) -> None:
    rng = Generator().manual_seed(seed)
    torch.manual_seed(seed)
    lam, w = {"stage.1": 0.5, "out": 2.0}, {s: 1.0 / (1 + s) for s in scales}
    filters = {"kind": kind, "scales": tuple(scales)}
    loss_fn = pc_kernels.LFCCLoss(
        lam,
        student_filter=test_lfcc.low_pass(student, **filters),
        teacher_filter=test_lfcc.low_pass(teacher, **filters),
        scale_weights=w,
        width=width,
        projection=projection,
        temperature=temperature,
    ).double()
    mine, theirs = (
        {name: own_leaf(torch.randn(test_lfcc.KINDS[net], generator=rng).double()) for name in lam}
        for net in (student, teacher)
    )
    loss = loss_fn(mine, theirs)
    wanted = sum(
        lam[name] * w[s] * test_lfcc.formula(loss_fn, name, s, (mine[name], theirs[name].detach()))
        for name in lam
        for s in scales
    )
    assert near_in_double(loss, wanted)
    learning = [*mine.values(), *loss_fn.parameters()]
    got, truth = (torch.autograd.grad(x, learning) for x in (loss, wanted))
    assert all(map(near_in_double, got, truth))


@fuzzed
@given(st.lists(sizes, min_size=2, max_size=6), st.data(), seeds)
def test_outputs_of_layers(widths: list[int], data: Any, seed: int) -> None:
    """They are what the layers say, one after the other, and gradients go through them."""
    torch.manual_seed(seed)
    layers = [nn.Linear(a, b) for a, b in pairwise(widths)]
    net, x = nn.Sequential(*layers).double(), torch.randn(3, widths[0]).double()
    places = st.integers(0, len(layers) - 1)
    chosen = data.draw(st.lists(places, min_size=1, max_size=len(layers), unique=True))
    outputs = pc_kernels.LayerOutputs(net, {f"layer {i}": str(i) for i in chosen})
    output, found = outputs(x)
    assert list(found) == [f"layer {i}" for i in chosen]
    wanted, y = {}, x
    for i, layer in enumerate(layers):
        y = wanted[f"layer {i}"] = y @ layer.weight.mT + layer.bias
    assert torch.allclose(output, y, rtol=1e-12)
    got, truth = (sum(z[name].square().sum() for name in found) for z in (found, wanted))
    learning = list(layers[min(chosen)].parameters())
    for a, b in zip(*(torch.autograd.grad(z, learning) for z in (got, truth)), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


@fuzzed
@given(st.integers(1, 20), st.lists(st.integers(1, 30), max_size=8), seeds)
def test_rows_of_a_queue(size: int, batches: list[int], seed: int) -> None:
    """It holds the last rows that came, each with its own; a copy goes on where the first has been."""
    rng = Generator().manual_seed(seed)
    queue, came = pc_kernels.FeatureQueue(size, 3, 2), torch.empty(0, 5)
    for count in batches:
        rows = torch.randn(count, 5, generator=rng)
        copy = pc_kernels.FeatureQueue(size, 3, 2)
        copy.load_state_dict(queue.state_dict())
        queue = copy
        queue.enqueue(rows[:, :3], rows[:, 3:])
        came = torch.cat([came, rows])[-size:]
        held = torch.cat(list(queue), 1)
        assert len(queue) == len(held) == len(came)
        assert torch.equal(held[held[:, 0].argsort()], came[came[:, 0].argsort()])


@fuzzed
@given(
    st.integers(2, 20),
    st.integers(2, 30),
    st.integers(1, 10),
    seeds,
    relaxations,
    backends,
    st.booleans(),
)
def test_loss_with_a_queue(
    anchors: int, held: int, width: int, seed: int, relaxation: str, backend: str, masked: bool
) -> None:
    rng = Generator().manual_seed(seed)
    queue = pc_kernels.FeatureQueue(held, width, 6)
    queue.enqueue(torch.randn(held, width, generator=rng), quantised(rng, held, 6))
    student, teacher = torch.randn(anchors, width, generator=rng), quantised(rng, anchors, 6)
    mask = torch.rand(anchors, held, generator=rng) < 0.7 if masked else None
    options = {"relaxation": relaxation, "temperature": 1.0, "pair_mask": mask}
    refs = tuple(queue)
    check_features(backend, student, teacher, rng, refs=refs, strict_batch=False, **options)


@fuzzed
@given(st.lists(sizes, min_size=1, max_size=5), seeds, st.sampled_from(["coherence", "InfoNCE"]))
def test_cached_backward(micro_batches: list[int], seed: int, kind: str) -> None:
    """The gradients of the whole batch at once, in float64, whatever its parts."""
    torch.manual_seed(seed)
    count = sum(micro_batches)
    encoder = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4)).double()
    x, teacher = torch.randn(count, 5).double(), torch.randn(count, 4).double()
    loss_of = {
        "coherence": lambda y: pc_kernels.perception_coherence_loss(y, teacher, temperature=0.5),
        "InfoNCE": lambda y: pc_kernels.contrastive_loss(y, teacher),
    }[kind]
    whole = loss_of(encoder(x))
    wanted = torch.autograd.grad(whole, encoder.parameters())
    loss = pc_kernels.cached_backward(encoder, x.split(micro_batches), loss_of)
    assert torch.allclose(loss, whole, rtol=1e-12)
    for p, grad in zip(encoder.parameters(), wanted, strict=True):
        assert near_in_double(p.grad, grad)
