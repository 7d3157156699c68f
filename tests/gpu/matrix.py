"""Every backend on the GPU against the truth in float64; needs neither pytest nor the network.

    PYTHONPATH=.:tests python tests/gpu/matrix.py [--device cuda|cpu] [--quick] [--json FILE]

Exits 1 if a check fails. --quick runs a few small cases, for tools that slow kernels down a lot; on the
CPU what only a GPU has is left out.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tolerances
import torch
from compare import (
    DISSIMILARITIES,
    PENALTIES,
    RELAXATIONS,
    SCALES,
    assert_near,
    check_features,
    check_matrices,
    check_soft_rank,
    own_leaf,
)
from inputs import HOSTILE_FEATURES, ROWS, make_rows, quantised
from torch import Tensor

import pc_kernels
from pc_kernels import reference
from pc_kernels.backends import BACKENDS

LENGTHS = [1, 2, 3, 7, 31, 33, 64, 127, 513, 1024, 4097, 20_000]
BATCHES = [2, 3, 17, 64, 129, 513, 2048, 8192, 16_384]
COMPARED = 3
"""Anchors of a large batch that are compared: the truth takes B² float64 numbers for each."""


class Bench:
    """Where and on what the checks run."""

    def __init__(self, device: str, quick: bool) -> None:
        self.device = torch.device(device)
        self.quick = quick
        self.rng = torch.Generator().manual_seed(20)
        self.backends = [
            name
            for name, backend in BACKENDS.items()
            if backend.obstacle(self.device, torch.float32) is None
            and name not in (("reference", "torch") if quick else ("reference",))
        ]

    def up_to(self, sizes: list[int], most: int) -> list[int]:
        """The sizes, fewer of them when in a hurry."""
        return [s for s in sizes if s <= most] if self.quick else sizes

    def largest_truth(self) -> int:
        """The batch of which a row's truth fits: some 25 float64 numbers for each of its pairs."""
        if self.device.type == "cpu":
            return 2048
        return int((torch.cuda.mem_get_info(self.device)[0] / 200) ** 0.5)

    def batch(self, rows: int, width: int = 24) -> tuple[Tensor, Tensor]:
        """Student features, and teacher features of the same width whose distances are exact."""
        student = torch.randn(rows, width, generator=self.rng)
        return student.to(self.device), quantised(self.rng, rows, width).to(self.device)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.rng).to(self.device)


@contextmanager
def case(*what: object) -> Iterator[None]:
    """Says which case it was that went wrong."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{', '.join(map(str, what))}: {error}") from error


def check_ranks(bench: Bench, backend: str, x: Tensor, **options: Any) -> None:
    """Soft ranks of rows and their gradient."""
    with case(backend, tuple(x.shape), options):
        check_soft_rank(backend, x.to(bench.device), bench.rng, **options)


def check_loss(
    bench: Bench, backend: str, student: Tensor, teacher: Tensor, metric: str, **options: Any
) -> None:
    """Loss and gradient of a few anchors of a batch, or of all of a small one."""
    rows = len(student)
    only = torch.randperm(rows, generator=bench.rng)[: COMPARED if rows > 600 else rows]
    with case(backend, f"B={rows}", metric, options):
        check_features(
            backend,
            student,
            teacher,
            bench.rng,
            dissimilarity=metric,
            teacher_dissimilarity="euclidean",
            reduction="none",
            only=only.sort().values.to(bench.device),
            **options,
        )


def ranks(bench: Bench) -> Iterator[None]:
    """Rows of every length, and rows that make trouble at any temperature."""
    for backend in bench.backends:
        for m in bench.up_to(LENGTHS, 64):
            for relaxation in RELAXATIONS:
                x = make_rows("integers" if m % 2 else "normal", bench.rng, 2, m)
                options = {"relaxation": relaxation, "scale": SCALES[m % len(SCALES)]}
                check_ranks(bench, backend, x, temperature=0.1, **options)
                yield
        for name in list(ROWS)[:: 5 if bench.quick else 1]:
            for temperature in (1e-4, 0.01, 0.1, 100.0):
                for relaxation in RELAXATIONS:
                    x = make_rows(name, bench.rng, 3, 97)
                    options = {"temperature": temperature, "relaxation": relaxation}
                    check_ranks(bench, backend, x, scale="std", **options)
                    yield


def hard_ranks(bench: Bench) -> Iterator[None]:
    """Exact but for the last division, ties and all."""
    for backend in bench.backends:
        for m in bench.up_to([*LENGTHS[:-1], 9000], 64):
            x = torch.cat([make_rows(name, bench.rng, 1, m) for name in ROWS]).to(bench.device)
            if m > 1000:
                x = x[::5]
            rank = pc_kernels.hard_rank(x, backend=backend)
            assert_near(
                f"{backend}, m={m}", rank, reference.hard_rank(x.double()), 2 * tolerances.U
            )
            yield


def whole_loss(bench: Bench) -> Iterator[None]:
    """All metrics, relaxations, scales, penalties; batches of any size."""
    for backend in bench.backends:
        for metric in DISSIMILARITIES[:: 3 if bench.quick else 1]:
            for relaxation in RELAXATIONS:
                for penalty in PENALTIES:
                    for scale in SCALES:
                        options = {"relaxation": relaxation, "penalty": penalty, "scale": scale}
                        check_loss(bench, backend, *bench.batch(17), metric, **options)
                        yield
        for rows in bench.up_to([b for b in BATCHES if b <= bench.largest_truth()], 64):
            for width in (24, 100):  # narrow enough for Triton to go without a product, and not
                check_loss(bench, backend, *bench.batch(rows, width), "euclidean")
                yield
        for name, make in HOSTILE_FEATURES.items():
            student = make(bench.rng, 24, 16).to(bench.device)
            check_loss(bench, backend, student, bench.batch(24)[1], "euclidean")
            yield name


def masks(bench: Bench) -> Iterator[None]:
    """Masked pairs are as if absent, NaN or not."""
    for backend in bench.backends:
        for m in (5, 70):
            d_s, d_t = bench.uniform(6, m), bench.uniform(6, m)
            keep = bench.uniform(6, m) < 0.5
            keep[0], keep[1] = True, False
            d_s[2, ~keep[2]] = torch.nan
            options: dict[str, Any] = {"pair_mask": keep, "reduction": "none"}
            with case(backend, f"m={m}"):
                check_matrices(backend, d_s, d_t, bench.rng, **options)
            leaf = own_leaf(d_s)
            losses = pc_kernels.coherence_loss_from_dissimilarities(
                leaf, d_t, backend=backend, **options
            )
            (grad,) = torch.autograd.grad(losses.sum(), leaf)
            assert bool((grad[~keep] == 0).all())
            yield


def loss_and_gradient(
    bench: Bench, student: Tensor, teacher: Tensor, **options: Any
) -> list[Tensor]:
    leaf = own_leaf(student)
    loss = pc_kernels.perception_coherence_loss(leaf, teacher, **options)
    (grad,) = torch.autograd.grad(loss, leaf)
    return [loss.detach(), grad]


def same_bits(what: str, a: list[Tensor], b: list[Tensor]) -> None:
    if not all(torch.equal(x, y) for x, y in zip(a, b, strict=True)):
        raise AssertionError(f"{what}: not the same bits")


def determinism(bench: Bench) -> Iterator[None]:
    """The same bits again."""
    for backend in [name for name in bench.backends if name != "torch"]:
        for rows in bench.up_to([33, 700, 3000], 64):
            student, teacher = bench.batch(rows)
            first = loss_and_gradient(bench, student, teacher, backend=backend)
            for _ in range(3):
                again = loss_and_gradient(bench, student, teacher, backend=backend)
                same_bits(f"{backend}, B={rows}", first, again)
            yield


def autocast(bench: Bench) -> Iterator[None]:
    """Changes nothing; half-precision features are computed on as float32."""
    student, teacher = bench.batch(65)
    for backend in bench.backends:
        plain = loss_and_gradient(bench, student, teacher, backend=backend)
        for dtype in (torch.float16, torch.bfloat16):
            with torch.autocast(bench.device.type, dtype=dtype):
                inside = loss_and_gradient(bench, student, teacher, backend=backend)
            same_bits(f"{backend}, autocast to {dtype}", plain, inside)
            half, wide = (
                loss_and_gradient(bench, s, teacher, backend=backend)
                for s in (student.to(dtype), student.to(dtype).float())
            )
            same_bits(f"{backend}, {dtype}", half, [wide[0], wide[1].to(dtype)])
            yield


def compiled(bench: Bench) -> Iterator[None]:
    """torch.compile sees one operator."""
    for backend in bench.backends:
        student, teacher = bench.batch(129)
        loss_fn = pc_kernels.PerceptionCoherenceLoss(backend=backend)

        @torch.compile(fullgraph=True)
        def step(s: Tensor, t: Tensor, fn: Any = loss_fn) -> Tensor:
            return fn(s * 2, t)

        leaf = own_leaf(student)
        loss = step(leaf, teacher)
        (grad,) = torch.autograd.grad(loss, leaf)
        plain = loss_and_gradient(bench, student * 2, teacher, backend=backend)
        assert_near(f"{backend}, loss", loss, plain[0].double(), 1e-6)
        assert_near(f"{backend}, gradient", grad, 2 * plain[1].double(), 1e-6)
        yield


def graphs(bench: Bench) -> Iterator[None]:
    """Captured once in a CUDA graph, replayed on other data."""
    for backend in [name for name in bench.backends if name != "torch"]:
        for rows in (17, 300):
            student, teacher = bench.batch(rows)
            for _ in range(2):
                loss_and_gradient(bench, student, teacher, backend=backend)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                outcome = loss_and_gradient(bench, student, teacher, backend=backend)
            other = bench.batch(rows)
            student.copy_(other[0])
            teacher.copy_(other[1])
            graph.replay()
            torch.cuda.synchronize()
            plain = loss_and_gradient(bench, *other, backend=backend)
            same_bits(f"{backend}, B={rows}", plain, outcome)
            yield


def streams(bench: Bench) -> Iterator[None]:
    """Two streams at once, each with its own data."""
    for backend in bench.backends:
        batches = [bench.batch(700) for _ in range(2)]
        wanted = [loss_and_gradient(bench, *b, backend=backend) for b in batches]
        torch.cuda.synchronize()
        side = [torch.cuda.Stream() for _ in batches]
        got: list[list[Tensor]] = [[], []]
        for _ in range(5):
            for i, stream in enumerate(side):
                with torch.cuda.stream(stream):
                    got[i] = loss_and_gradient(bench, *batches[i], backend=backend)
        torch.cuda.synchronize()
        for i in range(2):
            assert_near(f"{backend}, loss", got[i][0], wanted[i][0].double(), 1e-6)
            assert_near(f"{backend}, gradient", got[i][1], wanted[i][1].double(), 1e-6)
        yield


def second_device(bench: Bench) -> Iterator[None]:
    """Tensors of a device that is not the current one."""
    if torch.cuda.device_count() < 2:
        return
    for backend in bench.backends:
        student, teacher = bench.batch(65)
        here = loss_and_gradient(bench, student, teacher, backend=backend)
        there = loss_and_gradient(
            bench, student.to("cuda:1"), teacher.to("cuda:1"), backend=backend
        )
        assert torch.cuda.current_device() == 0
        for a, b in zip(here, there, strict=True):
            assert_near(backend, b.to(a.device), a.double(), 1e-6)
        yield


EVERYWHERE = [ranks, hard_ranks, whole_loss, masks, determinism, autocast, compiled]
ON_A_GPU = [graphs, streams, second_device]


def run(check: Callable[[Bench], Iterator[None]], bench: Bench) -> dict[str, Any]:
    """One check: how many cases, how long, and what went wrong."""
    started, cases, error = time.monotonic(), 0, ""
    try:
        for _ in check(bench):
            cases += 1
        if bench.device.type == "cuda":
            torch.cuda.synchronize()
    except Exception as reason:  # a table with one line in red beats no table
        traceback.print_exc()
        error = f"{type(reason).__name__}: {reason}".splitlines()[0][:300]
    seconds = round(time.monotonic() - started, 1)
    return {"check": check.__name__, "cases": cases, "seconds": seconds, "error": error}


def main() -> None:
    parser = argparse.ArgumentParser("matrix.py", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("matrix.py: torch sees no CUDA device")
    bench = Bench(options.device, options.quick)
    print(f"backends: {', '.join(bench.backends)}", flush=True)
    checks = EVERYWHERE + (ON_A_GPU if options.device == "cuda" else [])
    if options.quick:
        checks = [c for c in checks if c is not compiled]
    results = []
    for check in checks:
        results.append(result := run(check, bench))
        verdict = result["error"] or "ok"
        print(
            f"{result['check']:<14} {result['cases']:4} cases {result['seconds']:7.1f} s  {verdict}"
        )
        sys.stdout.flush()
    if options.json is not None:
        options.json.write_text(
            json.dumps({"backends": bench.backends, "checks": results}, indent=1)
        )
    sys.exit(any(r["error"] for r in results))


if __name__ == "__main__":
    main()
