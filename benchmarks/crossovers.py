"""Where the ways of the Triton kernels cross: the thresholds of triton_kernels/launch.py, measured.

    python benchmarks/crossovers.py           # on a GPU: a minute or two
    TRITON_INTERPRET=1 python benchmarks/crossovers.py --device cpu --quick     # does it work?

At each size both ways are held to the `torch` backend's result, then take turns being timed, forward and
backward. A threshold is right if the ratio passes 1 there.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from measure import Failure, take_turns
from torch import Tensor

import pc_kernels
from pc_kernels.backends import BACKENDS

NEAR = 2e-5
"""Relative L2 difference allowed between results of two float32 ways."""
NEVER, ALWAYS = 0, 1 << 30
ROUNDS = 30

Call = Callable[..., Tensor]


def gradient_of(loss: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(loss, leaf)[0]


def loss_of_matrices(x: Tensor, y: Tensor, *, backend: str) -> Tensor:
    leaf = x.detach().requires_grad_()
    loss = pc_kernels.coherence_loss_from_dissimilarities(leaf, y, backend=backend)
    return gradient_of(loss, leaf)


def loss_of_features(student: Tensor, teacher: Tensor, *, backend: str) -> Tensor:
    leaf = student.detach().requires_grad_()
    return gradient_of(pc_kernels.perception_coherence_loss(leaf, teacher, backend=backend), leaf)


@dataclass(frozen=True)
class Crossover:
    """A threshold: the way below it, the way above it, and what is timed at a size."""

    constant: str
    below: str
    above: str
    sizes: list[int]
    make: Callable[[int, torch.Generator], Call]


def square(function: Call, size: int, rng: torch.Generator, *, matrices: int) -> Call:
    """A call on matrices [size, size]."""
    return partial(function, *torch.randn(matrices, size, size, generator=rng))


def narrow(batch: int, width: int, rng: torch.Generator) -> Call:
    """A call on features [batch, width], the teacher's multiples of 1/8: no rounding moves its ranks."""
    student, teacher = torch.randn(2, batch, width, generator=rng)
    return partial(loss_of_features, student, (teacher * 8).round() / 8)


def crossovers(quick: bool) -> list[Crossover]:
    """All of them; of one tiny size if in a hurry."""
    batch = 6 if quick else 4096
    matrices = partial(square, loss_of_matrices, matrices=2)
    ranks = partial(square, pc_kernels.hard_rank, matrices=1)
    sizes = [6] if quick else [32, 64, 128, 256, 384, 512, 768]
    widths = [6] if quick else [8, 16, 32, 48, 64, 96, 128]
    compared = [size for size in sizes if size <= 512]  # a row is one block there
    return [
        Crossover("ALL_PAIRS", "all pairs", "grid", sizes, matrices),
        Crossover("ALL_COMPARED", "all pairs", "buckets", compared, ranks),
        Crossover("NARROW", "straight", "product", widths, partial(narrow, batch)),
    ]


def on(call: Call, device: torch.device) -> Call:
    """The same call on tensors that are there."""
    assert isinstance(call, partial)
    return partial(call.func, *(x.to(device) for x in call.args))


def one_way(crossover: Crossover, threshold: int, chosen: dict, call: Call) -> Tensor:
    """The call with the threshold there, and launch settings tuned for that way alone."""
    from pc_kernels.triton_kernels import launch, settings

    before = getattr(launch, crossover.constant), settings._chosen
    try:
        setattr(launch, crossover.constant, threshold)
        settings._chosen = chosen
        return call(backend="triton")
    finally:
        setattr(launch, crossover.constant, before[0])
        settings._chosen = before[1]


def check(what: str, got: Tensor, wanted: Tensor) -> None:
    """The gate: no time without a right result."""
    error = ((got - wanted).norm() / wanted.norm()).item()
    if not error <= NEAR:
        sys.exit(f"{what}: off by {error:.1e} of the torch backend's result, allowed {NEAR}")


def line(crossover: Crossover, size: int, device: torch.device, rounds: int) -> str:
    """A row of the table."""
    call = on(crossover.make(size, torch.Generator().manual_seed(size)), device)
    wanted = call(backend="torch")
    chosen: dict[int, dict] = {ALWAYS: {}, NEVER: {}}
    ways = {t: partial(one_way, crossover, t, chosen[t], call) for t in (ALWAYS, NEVER)}
    for threshold, way in ways.items():
        check(f"{crossover.constant} = {threshold}, size {size}", way(), wanted)
    medians = []
    for taken in take_turns(ways, dict.fromkeys(ways, rounds), device).values():
        if isinstance(taken, Failure):
            return f"| {size} | {taken.status}: {taken.detail} | | |"
        medians.append(statistics.median(taken) * 1e3)
    return f"| {size} | {medians[0]:.3f} | {medians[1]:.3f} | {medians[0] / medians[1]:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser("crossovers.py", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("crossovers.py: torch sees no CUDA device")
    reason = BACKENDS["triton"].obstacle(device, torch.float32)
    if reason is not None:
        sys.exit(f"crossovers.py: {reason}")
    from pc_kernels.triton_kernels import launch

    for crossover in crossovers(options.quick):
        threshold = getattr(launch, crossover.constant)
        print(
            f"\n{crossover.constant} = {threshold}: {crossover.below} up to it, then {crossover.above}\n"
        )
        print(f"| size | {crossover.below}, ms | {crossover.above}, ms | ratio |")
        print("|---:|---:|---:|---:|")
        for size in crossover.sizes:
            print(line(crossover, size, device, 1 if options.quick else ROUNDS), flush=True)


if __name__ == "__main__":
    main()
