"""A backend on the GPU against the truth in float64; needs neither pytest nor the network.

    PYTHONPATH=.:tests:benchmarks python tests/gpu/matrix.py [--backends cuda triton torch] [--json FILE]

Results are written to FILE after each check; what FILE holds already is not run again. A backend that is
not usable is a failure, and so is a check that fails: the exit status is then 1. It is 3 where a kernel
left the device unusable for this process: the same command goes on with the checks after it.
--quick runs a few small cases, for tools that slow kernels down a lot; on the CPU what only a GPU has is
left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cdf
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
    check_smooth_cdf,
    check_soft_rank,
    own_leaf,
)
from contrast_cases import KINDS, Case, rounded
from files import write
from inputs import HOSTILE_FEATURES, ROWS, make_rows, quantised
from torch import Tensor

import pc_kernels
from pc_kernels import reference
from pc_kernels.backends import BACKENDS, select
from pc_kernels.dissimilarities import Points, make_side

LENGTHS = [1, 2, 3, 7, 31, 33, 64, 127, 513, 1024, 4097, 20_000]
BATCHES = [2, 3, 17, 64, 129, 513, 2048, 8192, 16_384]
FEW_LENGTHS = [1, 33, 200, 1025, 20_000]
FEW_BATCHES = [17, 129, 2048, 8192]
"""For a backend that compiles: every way that rows go, and as few variants of its kernels."""
COMPARED = 3
"""Anchors of a large batch that are compared: the truth takes B² float64 numbers for each."""


class Bench:
    """Which backend the checks run, where and on what."""

    def __init__(self, backend: str, device: str, quick: bool = False) -> None:
        self.backend = backend
        self.device = torch.device(device)
        self.quick = quick
        self.rng = torch.Generator().manual_seed(20)
        self.compiles = backend == "triton"
        """Whether each variant of a kernel takes seconds to compile when it is first run."""

    def up_to(self, most: int, sizes: list[int], few: list[int] | None = None) -> list[int]:
        """The sizes, fewer of them when in a hurry."""
        sizes = few if few is not None and self.compiles else sizes
        return [s for s in sizes if s <= most] if self.quick else sizes

    def combinations(self) -> list[tuple[Any, ...]]:
        """Dissimilarities, relaxations, penalties and scales, where they compile each of them once.

        That suffices there: the formulas of all combinations are compared on the CPU.
        """
        metrics = DISSIMILARITIES[:: 3 if self.quick else 1]
        if not self.compiles:
            return list(itertools.product(metrics, RELAXATIONS, PENALTIES, SCALES))
        return [
            (metric, RELAXATIONS[i % 2], PENALTIES[i % 3], SCALES[i // 2 % 2])
            for i, metric in enumerate(metrics)
        ]

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


def check_ranks(bench: Bench, x: Tensor, **options: Any) -> None:
    """Soft ranks of rows and their gradient."""
    with case(bench.backend, tuple(x.shape), options):
        check_soft_rank(bench.backend, x.to(bench.device), bench.rng, **options)


def check_loss(
    bench: Bench, student: Tensor, teacher: Tensor, metric: str = "euclidean", **options: Any
) -> None:
    """Loss and gradient of a few anchors of a batch, or of all of a small one."""
    rows = len(student)
    only = torch.randperm(rows, generator=bench.rng)[: COMPARED if rows > 600 else rows]
    with case(bench.backend, f"B={rows}", metric, options):
        check_features(
            bench.backend,
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
    relaxations = RELAXATIONS[:1] if bench.compiles else RELAXATIONS
    for m in bench.up_to(64, LENGTHS, FEW_LENGTHS):
        for relaxation in relaxations:
            x = make_rows("integers" if m % 2 else "normal", bench.rng, 2, m)
            options = {"relaxation": relaxation, "scale": SCALES[m % len(SCALES)]}
            check_ranks(bench, x, temperature=0.1, **options)
            yield
    for name in list(ROWS)[:: 5 if bench.quick else 1]:
        for temperature in (1e-4, 0.01, 0.1, 100.0):
            for relaxation in RELAXATIONS:
                x = make_rows(name, bench.rng, 3, 97)
                check_ranks(bench, x, temperature=temperature, relaxation=relaxation)
                yield


def smooth_cdfs(bench: Bench) -> Iterator[None]:
    """Weighted sums at other points, masked, in lists, by every way; and losses built on them."""
    sizes = [(67, 41), (3000, 4), (4, 3000), (2000, 1500)]
    for i, (m, n) in enumerate(sizes[:1] if bench.quick else sizes):
        for temperature, tail in ((1e-3, "lower"), (0.1, "upper")):
            x, y = bench.uniform(2, m), 1.2 * bench.uniform(2, n)
            w = bench.uniform(2, 2, m) - 0.3
            options: dict[str, Any] = {"temperature": temperature, "tail": tail}
            options |= {"integral": i % 3 == 0, "relaxation": RELAXATIONS[i % 2]}
            there, asked = bench.uniform(2, m) < 0.8, bench.uniform(2, n) < 0.8
            with case(bench.backend, m, n, options):
                masks = {"source_mask": there, "query_mask": asked}
                check_smooth_cdf(bench.backend, (x, y, w), bench.rng, **options, **masks)
            yield
    x, offsets = bench.uniform(90), torch.tensor([0, 1, 1, 40, 90], device=bench.device)
    lists = {"source_offsets": offsets, "query_offsets": offsets}
    check_smooth_cdf(bench.backend, (x, x.flip(0), None), bench.rng, temperature=0.1, **lists)
    yield
    cdf.check_light_beside_heavy(bench.backend, (300, 200), bench.rng, bench.device)
    yield
    cdf.check_losses(bench.backend, bench.rng, bench.device)
    yield


def without_kernels(bench: Bench) -> Iterator[None]:
    """Relaxations that go in plain PyTorch, as on the CPU."""
    for relaxation in ("laplace", "projection", "projection_kl"):
        x, upstream = torch.randn(2, 3, 200, generator=bench.rng)
        ranks = []
        for device, backend in (("cpu", "torch"), (bench.device, bench.backend)):
            leaf = own_leaf(x.to(device))
            rank = pc_kernels.soft_rank(leaf, 0.1, relaxation=relaxation, backend=backend)
            rank.backward(upstream.to(device))
            ranks.append((rank.cpu().double(), leaf.grad.cpu().double()))
        (wanted, wanted_grad), (got, grad) = ranks
        with case(bench.backend, relaxation):
            assert_near("rank", got, wanted, tolerances.RANK)
            assert (grad - wanted_grad).norm() <= tolerances.GRAD * wanted_grad.norm()
        yield


def nearly_hard_rows(bench: Bench) -> Iterator[None]:
    """Too wide for a grid, with and without a crowd in the middle."""
    for m in bench.up_to(64, [40, 1025, 4097], [40, 1025]):
        x = torch.randn(2, m, generator=bench.rng)
        x[1, ::2] *= 1e-4
        for scale in SCALES:
            check_ranks(bench, x, temperature=3e-4, scale=scale)
            yield


def hard_ranks(bench: Bench) -> Iterator[None]:
    """Exact but for the last division, ties and all."""
    for m in bench.up_to(64, [*LENGTHS[:-1], 9000], [*FEW_LENGTHS[:-1], 9000]):
        x = torch.cat([make_rows(name, bench.rng, 1, m) for name in ROWS]).to(bench.device)
        if m > 1000:
            x = x[::5]
        rank = pc_kernels.hard_rank(x, backend=bench.backend)
        wanted = reference.hard_rank(x.double())
        assert_near(f"{bench.backend}, m={m}", rank, wanted, 2 * tolerances.U)
        yield


def combinations(bench: Bench) -> Iterator[None]:
    """All metrics, relaxations, penalties, scales."""
    for metric, relaxation, penalty, scale in bench.combinations():
        options = {"relaxation": relaxation, "penalty": penalty, "scale": scale}
        check_loss(bench, *bench.batch(17), metric, **options)
        yield


def batches(bench: Bench) -> Iterator[None]:
    """Of any size."""
    for rows in bench.up_to(64, BATCHES, FEW_BATCHES):
        if rows > bench.largest_truth():
            continue
        for width in (24, 100):  # narrow enough for Triton to go without a product, and not
            check_loss(bench, *bench.batch(rows, width))
            yield


def hostile_features(bench: Bench) -> Iterator[None]:
    """Near duplicates, far anchors, and others that lose digits."""
    for make in HOSTILE_FEATURES.values():
        student = make(bench.rng, 24, 16).to(bench.device)
        check_loss(bench, student, bench.batch(24)[1])
        yield


def ties(bench: Bench) -> Iterator[None]:
    """Equal references are tied, whatever products of few rows do; nor do extreme features overflow."""
    engine = select(bench.backend, bench.device, torch.float32)
    for anchors, count in itertools.product((1, 7), bench.up_to(70, [70, 1023, 2047])):
        kind = (bench.uniform(count) * (count // 3)).long()
        student, kinds = bench.batch(anchors, 128)[0], bench.batch(count, 128)[0]
        first = kind.new_full((count,), count)
        first = first.scatter_reduce(0, kind, torch.arange(count).to(kind), "amin")[kind]
        for size in (1.0, 2.0**100):
            points = Points(student * size, kinds[kind] * size)
            side = make_side("euclidean", points, with_grad=False, maker=engine)
            d = engine.dissimilarity(side.rows(0, anchors))
            assert torch.equal(d, d[:, first]) and bool(d.isfinite().all())
            yield


def masks(bench: Bench) -> Iterator[None]:
    """Masked pairs are as if absent, NaN or not."""
    for m in (5, 70):
        d_s, d_t = bench.uniform(6, m), bench.uniform(6, m)
        keep = bench.uniform(6, m) < 0.5
        keep[0], keep[1] = True, False
        d_s[2, ~keep[2]] = torch.nan
        options: dict[str, Any] = {"pair_mask": keep, "reduction": "none"}
        with case(bench.backend, f"m={m}"):
            check_matrices(bench.backend, d_s, d_t, bench.rng, **options)
        leaf = own_leaf(d_s)
        losses = pc_kernels.coherence_loss_from_dissimilarities(
            leaf, d_t, backend=bench.backend, **options
        )
        (grad,) = torch.autograd.grad(losses.sum(), leaf)
        assert bool((grad[~keep] == 0).all())
        yield


def loss_and_gradient(
    bench: Bench, student: Tensor, teacher: Tensor, **options: Any
) -> list[Tensor]:
    leaf = own_leaf(student)
    loss = pc_kernels.perception_coherence_loss(leaf, teacher, backend=bench.backend, **options)
    (grad,) = torch.autograd.grad(loss, leaf)
    return [loss.detach(), grad]


def same_bits(what: str, a: list[Tensor], b: list[Tensor]) -> None:
    if not all(torch.equal(x, y) for x, y in zip(a, b, strict=True)):
        raise AssertionError(f"{what}: not the same bits")


def nearly_same(what: str, a: list[Tensor], b: list[Tensor]) -> None:
    for name, x, y in zip(("loss", "gradient"), a, b, strict=True):
        assert_near(f"{what}, {name}", x, y.to(x.device).double(), 1e-6)


def determinism(bench: Bench) -> Iterator[None]:
    """The same bits again."""
    if bench.backend == "torch":
        return
    for rows in bench.up_to(64, [33, 700, 3000]):
        student, teacher = bench.batch(rows)
        first = loss_and_gradient(bench, student, teacher)
        for _ in range(3):
            same_bits(f"B={rows}", first, loss_and_gradient(bench, student, teacher))
        yield


def autocast(bench: Bench) -> Iterator[None]:
    """Changes nothing; features in half precision are computed on as if they were float32."""
    student, teacher = bench.batch(65)
    plain = loss_and_gradient(bench, student, teacher)
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast(bench.device.type, dtype=dtype):
            inside = loss_and_gradient(bench, student, teacher)
        same_bits(f"autocast to {dtype}", plain, inside)
        half, wide = (
            loss_and_gradient(bench, s, teacher)
            for s in (student.to(dtype), student.to(dtype).float())
        )
        assert_near(f"{dtype}, loss", half[0], wide[0].double(), 1e-6)
        grad = wide[1].double()
        assert_near(f"{dtype}, gradient", half[1], grad, torch.finfo(dtype).eps * grad.abs() + 1e-6)
        yield


def contrastive(bench: Bench) -> Iterator[None]:
    """The contrastive losses, of features in half precision as well, whose products go in parts."""
    for kind in KINDS:
        for sizes in [(40, 13, 24)] if bench.quick else [(2, 0, 3), (33, 9, 40), (700, 100, 64)]:
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                with case(bench.backend, kind, sizes, dtype):
                    batch = rounded(Case(bench.rng, kind, sizes), dtype)
                    batch.device, batch.dtype = bench.device, dtype
                    batch.check(bench.backend)
                    mask, weights = batch.mask(bench.rng), torch.rand(sizes[0], generator=bench.rng)
                    batch.check(bench.backend, weights, pair_mask=mask, chunk_bytes=1 << 16)
                yield


def compiled(bench: Bench) -> Iterator[None]:
    """torch.compile sees one operator."""
    student, teacher = bench.batch(129)
    loss_fn = pc_kernels.PerceptionCoherenceLoss(backend=bench.backend)

    @torch.compile(fullgraph=True)
    def step(s: Tensor, t: Tensor) -> Tensor:
        return loss_fn(s * 2, t)

    leaf = own_leaf(student)
    loss = step(leaf, teacher)
    (grad,) = torch.autograd.grad(loss, leaf)
    plain = loss_and_gradient(bench, student * 2, teacher)
    nearly_same("compiled", [loss, grad], [plain[0], 2 * plain[1]])
    yield


def tuning(bench: Bench) -> Iterator[None]:
    """A backend that times variants of its kernels leaves the caller's tensors alone."""
    if not bench.compiles:
        return
    with deterministic(False):
        for rows in (600, 40):
            student, teacher = bench.batch(rows)
            versions = student._version, teacher._version
            check_loss(bench, student, teacher)
            x = bench.uniform(3, rows)
            rank = pc_kernels.hard_rank(x, backend=bench.backend)
            assert_near("rank", rank, reference.hard_rank(x.double()), 2 * tolerances.U)
            assert (student._version, teacher._version, x._version) == (*versions, 0)
            yield


def graphs(bench: Bench) -> Iterator[None]:
    """Captured once in a CUDA graph, replayed on other data."""
    if bench.backend == "torch":
        return
    for rows in (17, 300, 4096):  # the last takes more shared memory than a kernel has unasked
        student, teacher = bench.batch(rows)
        for _ in range(2):
            loss_and_gradient(bench, student, teacher)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outcome = loss_and_gradient(bench, student, teacher)
        other = bench.batch(rows)
        student.copy_(other[0])
        teacher.copy_(other[1])
        graph.replay()
        torch.cuda.synchronize()
        same_bits(f"B={rows}", loss_and_gradient(bench, *other), outcome)
        yield


def streams(bench: Bench) -> Iterator[None]:
    """Two streams at once, each with its own data."""
    data = [bench.batch(700) for _ in range(2)]
    wanted = [loss_and_gradient(bench, *b) for b in data]
    torch.cuda.synchronize()
    side = [torch.cuda.Stream() for _ in data]
    got: list[list[Tensor]] = [[], []]
    for _ in range(5):
        for i, stream in enumerate(side):
            with torch.cuda.stream(stream):
                got[i] = loss_and_gradient(bench, *data[i])
    torch.cuda.synchronize()
    for i in range(2):
        nearly_same(f"stream {i}", got[i], wanted[i])
    yield


def host_threads(bench: Bench) -> Iterator[None]:
    """Two threads of the host at once, whose launches differ in shared memory."""
    data = [bench.batch(rows) for rows in (300, 4096)]
    wanted = [loss_and_gradient(bench, *b) for b in data]
    got: list[Any] = [None, None]

    def work(i: int) -> None:
        try:
            for _ in range(20):
                got[i] = loss_and_gradient(bench, *data[i])
        except Exception as error:
            got[i] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, outcome in enumerate(got):
        if isinstance(outcome, Exception):
            raise outcome
        nearly_same(f"B={len(data[i][0])}", outcome, wanted[i])
    yield


def second_device(bench: Bench) -> Iterator[None]:
    """Tensors of a device that is not the current one."""
    if torch.cuda.device_count() < 2:
        return
    student, teacher = bench.batch(65)
    here = loss_and_gradient(bench, student, teacher)
    there = loss_and_gradient(bench, student.to("cuda:1"), teacher.to("cuda:1"))
    assert torch.cuda.current_device() == 0
    nearly_same("cuda:1", there, here)
    yield


Check = Callable[[Bench], Iterator[None]]
EVERYWHERE: list[Check] = [
    combinations,
    batches,
    ranks,
    nearly_hard_rows,
    smooth_cdfs,
    without_kernels,
    hard_ranks,
    hostile_features,
    ties,
    masks,
    determinism,
    autocast,
    contrastive,
    tuning,
]
ON_A_GPU: list[Check] = [graphs, streams, host_threads, second_device]
LOST = 3
"""Exit status where the device answers this process no more."""


def checks_for(bench: Bench) -> list[Check]:
    """Those that make sense there, the longest last."""
    found = EVERYWHERE + (ON_A_GPU if bench.device.type == "cuda" else [])
    if os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING") == "1":  # without which nothing is captured
        found = [c for c in found if c is not graphs]
    if bench.quick:
        return [c for c in found if c is not tuning]
    return [*found, compiled]


@contextmanager
def deterministic(wanted: bool = True) -> Iterator[None]:
    """Deterministic algorithms: fresh memory is then full of NaN, and Triton compiles no alternatives."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(wanted, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=True)


def run(check: Check, bench: Bench) -> dict[str, Any]:
    """One check: how many cases, how long, and what went wrong."""
    started, cases, error = time.monotonic(), 0, ""
    try:
        with deterministic():
            for _ in check(bench):
                cases += 1
        if bench.device.type == "cuda":
            torch.cuda.synchronize()
    except Exception as reason:  # a table with one line in red beats no table
        traceback.print_exc()
        error = f"{type(reason).__name__}: {reason}".splitlines()[0][:300]
    seconds = round(time.monotonic() - started, 1)
    return {"cases": cases, "seconds": seconds, "error": error}


class Record:
    """Results by backend and check, in a file from one run to the next."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.results: dict[str, dict[str, Any]] = {}
        if path is not None and path.exists():
            self.results = json.loads(path.read_text())

    def settled(self, name: str) -> bool:
        """Whether there is a result; what a run did not live to see gets a second chance."""
        found = self.results.get(name, {"attempts": 0, "error": UNFINISHED})
        return found["error"] != UNFINISHED or found["attempts"] > 1

    def begin(self, name: str) -> None:
        attempts = self.results.get(name, {}).get("attempts", 0) + 1
        self.put(name, {"attempts": attempts, "error": UNFINISHED})

    def put(self, name: str, result: dict[str, Any]) -> None:
        self.results[name] = self.results.get(name, {}) | result
        if self.path is not None:
            write(self.path, json.dumps(self.results, indent=1))

    @property
    def failed(self) -> bool:
        return any(result["error"] for result in self.results.values())


UNFINISHED = "it did not end"


def run_all(bench: Bench, record: Record) -> None:
    """The checks of a backend that have no result yet.

    Raises:
        SystemExit: the device is lost to this process.
    """
    reason = BACKENDS[bench.backend].obstacle(bench.device, torch.float32)
    if reason is not None:
        record.put(f"{bench.backend}: usable", {"attempts": 1, "error": reason})
        print(f"{bench.backend}: not usable: {reason}", flush=True)
        return
    record.results.pop(f"{bench.backend}: usable", None)
    for check in checks_for(bench):
        name = f"{bench.backend}: {check.__name__}"
        if record.settled(name):
            continue
        record.begin(name)
        result = run(check, bench)
        record.put(name, result)
        shown = f"{name:<26} {result['cases']:4} cases {result['seconds']:7.1f} s"
        print(f"{shown}  {result['error'] or 'ok'}", flush=True)
        if result["error"] and bench.device.type == "cuda":
            try:
                torch.cuda.synchronize()
            except RuntimeError:
                sys.exit(LOST)


def main() -> None:
    parser = argparse.ArgumentParser("matrix.py", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=["cuda", "triton"])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("matrix.py: torch sees no CUDA device")
    record = Record(options.json)
    for backend in options.backends:
        run_all(Bench(backend, options.device, options.quick), record)
    sys.exit(record.failed)


if __name__ == "__main__":
    main()
