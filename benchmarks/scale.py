"""The cost model of docs/scale.md against measured points, on this machine.

    python benchmarks/scale.py                    # about four minutes on 2 cores
    python benchmarks/scale.py --sizes 4096 8192 --processes 1 2

Two rates are measured at a batch of 2048: of matrix products, and of the rank stages a pair. From
these the model predicts larger batches, on one process and on several that share the cores.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

import pc_kernels

BASE = 2048
STUDENT, TEACHER = 128, 512


def features(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The student's [B, 128] and the teacher's [B, 512]."""
    generator = torch.Generator().manual_seed(batch)
    student = torch.randn(batch, STUDENT, generator=generator).requires_grad_()
    return student, torch.randn(batch, TEACHER, generator=generator)


def seconds(call: Callable[[], object], repeats: int) -> float:
    """The median over calls, after one that warms up."""
    times = []
    for turn in range(repeats + 1):
        start = time.perf_counter()
        call()
        times += [time.perf_counter() - start] if turn else []
    return statistics.median(times)


def operations(batch: int) -> int:
    """Floating-point operations of the four products."""
    return 2 * batch**2 * (TEACHER + 3 * STUDENT)


def calibrate() -> tuple[float, float]:
    """Operations a second of the products, and seconds a pair of everything else."""
    student, teacher = features(BASE)
    s = student.detach()
    gram, other = torch.empty(BASE, BASE), torch.empty(BASE, BASE)

    def products() -> None:
        torch.mm(teacher, teacher.T, out=gram)
        torch.mm(s, s.T, out=other)
        torch.mm(other, s)
        torch.mm(other.T, s)

    floor = seconds(products, 15)
    whole = seconds(lambda: pc_kernels.perception_coherence_loss(student, teacher).backward(), 15)
    return operations(BASE) / floor, (whole - floor) / BASE**2


def share(rank: int, world: int, batch: int, threads: int, store: str, repeats: int) -> None:
    """One process's part of a joint batch; rank 0 writes the time."""
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    student, teacher = features(batch)
    mine = slice(rank * batch // world, (rank + 1) * batch // world)
    own = student.detach()[mine].requires_grad_()

    def step() -> None:
        loss = pc_kernels.perception_coherence_loss(
            own, teacher[mine], process_group=dist.group.WORLD
        )
        loss.backward()
        dist.barrier()

    taken = seconds(step, repeats)
    if rank == 0:
        Path(store + ".seconds").write_text(str(taken))
    dist.destroy_process_group()


def measure(world: int, batch: int, threads: int, repeats: int) -> float:
    """Seconds of a step of the loss, forward and backward, on `world` processes."""
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        arguments = (world, batch, threads, store, repeats)
        multiprocessing.spawn(share, arguments, nprocs=world)
        return float(Path(store + ".seconds").read_text())


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    arguments = parser.parse_args()
    cores = torch.get_num_threads()
    rate, pair = calibrate()
    print(f"{rate / 1e9:.0f} GFLOP/s, {pair * 1e9:.2f} ns a pair, {cores} threads\n")
    print("| B | processes × threads | predicted | measured | measured / predicted |")
    print("|---:|---:|---:|---:|---:|")
    for batch in arguments.sizes:
        predicted = operations(batch) / rate + pair * batch**2
        for world in arguments.processes:
            threads = max(1, cores // world)
            taken = measure(world, batch, threads, 5 if batch <= 8192 else 3)
            ratio = taken / predicted
            print(
                f"| {batch} | {world} × {threads} | {predicted:.2f} s | {taken:.2f} s | {ratio:.2f} |"
            )
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
