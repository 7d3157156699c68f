"""Memory of the CPU kernels' results is kept: never in two hands, never too much, never to be seen."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

import pc_kernels
from pc_kernels.backends import BACKENDS

pytestmark = pytest.mark.skipif(
    BACKENDS["cpu"].obstacle(torch.device("cpu"), torch.float32) is not None,
    reason="no C++ extension",
)

SIZE = 300
"""Matrices of so many rows and columns are large enough to be kept."""


def empty(rows: int, columns: int) -> Tensor:
    return BACKENDS["cpu"].empty_rows(rows, columns, torch.empty(0))


def spoil_what_is_kept() -> None:
    """Fills it with NaN: as many matrices as any call below has alive."""
    for matrix in [empty(SIZE, SIZE) for _ in range(8)]:
        matrix.fill_(math.nan)


def loss_and_gradient(student: Tensor, teacher: Tensor) -> list[Tensor]:
    leaf = student.detach().clone().requires_grad_()
    loss = pc_kernels.perception_coherence_loss(leaf, teacher, backend="cpu")
    return [loss.detach(), *torch.autograd.grad(loss, leaf)]


def ranks_and_gradient(x: Tensor) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    ranks = pc_kernels.soft_rank(leaf, backend="cpu")
    hard = pc_kernels.hard_rank(x, backend="cpu")
    return [ranks.detach(), hard, *torch.autograd.grad(ranks, leaf, x.flip(0))]


@pytest.mark.skipif(torch.__version__ < "2.11", reason="torch 2.10 takes no memory of others'")
def test_memory_is_used_again() -> None:
    """Larger than what other tests leave behind."""
    matrix = empty(1000, 9000)
    address = matrix.data_ptr()
    other = empty(10, 9000)
    assert other.data_ptr() != address and address % 64 == 0
    del matrix
    smaller = empty(990, 9000)
    assert smaller.data_ptr() == address
    view = smaller[5:]
    del smaller
    assert empty(1000, 9000).data_ptr() != address  # somebody still looks at it
    del view
    assert empty(1000, 9000).data_ptr() == address


@pytest.mark.skipif(torch.__version__ < "2.11", reason="torch 2.10 takes no memory of others'")
def test_large_memory_is_used_again() -> None:
    """Of more than 64 MiB, apart from the rest; more than 4 GiB go back."""
    large, larger = empty(1 << 9, 1 << 16), empty(9 << 10, 1 << 17)
    address = large.data_ptr()
    del large
    assert empty(1 << 9, 1 << 16).data_ptr() == address
    del larger
    assert empty(1 << 9, 1 << 16).data_ptr() == address


def test_what_memory_held_does_not_show(rng: Generator) -> None:
    student, teacher = torch.randn(2, SIZE, 6, generator=rng)
    x = torch.randn(SIZE, SIZE, generator=rng)
    for call in (lambda: loss_and_gradient(student, teacher), lambda: ranks_and_gradient(x)):
        results = []
        for _ in range(2):
            spoil_what_is_kept()
            results.append(call())
        for one, again in zip(*results, strict=True):
            assert one.isfinite().all() and torch.equal(one, again)


def test_results_are_the_callers(rng: Generator) -> None:
    """Nothing writes to them later; and they are tensors like any other that is not to be resized."""
    x = torch.randn(SIZE, SIZE, generator=rng)
    first = ranks_and_gradient(x)
    copies = [result.clone() for result in first]
    for _ in range(3):
        ranks_and_gradient(x.flip(1))
    assert all(torch.equal(a, b) for a, b in zip(first, copies, strict=True))
    hard = pc_kernels.hard_rank(x, backend="cpu")
    hard.resize_(2, SIZE).zero_()
    assert hard.share_memory_().sum() == 0


def test_threads_do_not_share(rng: Generator) -> None:
    batches = [torch.randn(2, n, 6, generator=rng) for n in (SIZE, 200, 280, 31) * 6]
    wanted = [loss_and_gradient(*batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda batch: loss_and_gradient(*batch), batches))
    for one, other in zip(got, wanted, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_inference_mode_and_after(rng: Generator) -> None:
    """Tensors of inference mode may not be written to outside it; their memory may."""
    x = torch.randn(SIZE, SIZE, generator=rng)
    with torch.inference_mode():
        inside = pc_kernels.soft_rank(x, backend="cpu").clone()
    assert torch.equal(ranks_and_gradient(x)[0], inside)


RESIDENT = """
import torch, pc_kernels
from pc_kernels.backends import BACKENDS
engine = BACKENDS["cpu"]
assert engine.obstacle(torch.device("cpu"), torch.float32) is None
def resident():  # less what is offered to the kernel, in MiB
    fields = dict(line.split(":") for line in list(open("/proc/self/smaps_rollup"))[1:])
    return int(fields["Rss"].split()[0]) - int(fields["LazyFree"].split()[0]) >> 10
like = torch.empty(0)
engine.empty_rows(1000, 1000, like).fill_(1)  # loads the code that what follows runs
before = resident()
for mebibytes in (120, 60, 60, 40, 30):
    matrices = [engine.empty_rows(mebibytes, 1 << 18, like).fill_(1) for _ in range(3)]
    del matrices
print(resident() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="needs Linux's /proc")
def test_only_so_much_is_kept(python: Callable[..., Any]) -> None:
    """256 MiB, the rest goes back to the system; blocks that are large alone are its for the asking."""
    # glibc raises this threshold as it goes, and then keeps memory of its own.
    done = python("-c", RESIDENT, OMP_NUM_THREADS="1", MALLOC_MMAP_THRESHOLD_="131072")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 256 + 16


class MallocInfo(ctypes.Structure):
    """What glibc's mallinfo2() returns."""

    _fields_ = [(name, ctypes.c_size_t) for name in "abcdefghij"]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33")
def test_operators_leak_nothing() -> None:
    """Neither what they are given, tensors, lists and texts, nor what they return or refuse."""
    info = ctypes.CDLL(None).mallinfo2
    info.restype = MallocInfo
    operators, x = torch.ops.pc_kernels, torch.rand(4, 4)
    options = "euclidean", "sqeuclidean", 0.1, "logistic", True

    def in_use_after(calls: int) -> int:
        for _ in range(calls):
            operators.cpu_soft_rank(x, x > 0.5, 0.1, "logistic", True, True)
            operators.cpu_near_origin([x, x], 64.0)
            operators.cpu_sweep([x, x], [x, x], x[0], -1, *options, "squared", 64.0, 0, 0.1, True)
            with pytest.raises(ValueError, match=r"must be one of .* got 'no such'"):
                operators.cpu_dissimilarity_(x, "no such", [x])
        return int(info().h)  # uordblks: bytes that are handed out

    before = in_use_after(100)
    assert in_use_after(1000) - before < 1000 * 16


def test_fork(rng: Generator) -> None:
    """A process forked in the middle of anything computes on."""
    x = torch.randn(4, 4, generator=rng)
    wanted = pc_kernels.hard_rank(x, backend="cpu")
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        good = torch.equal(pc_kernels.hard_rank(x, backend="cpu"), wanted)
        matrices = [empty(SIZE, SIZE) for _ in range(3)]
        del matrices
        os.write(write, b"y" if good else b"n")
        os._exit(0)
    os.close(write)
    assert os.read(read, 1) == b"y"
    os.close(read)
    os.waitpid(child, 0)


def test_wrong_arguments() -> None:
    op = torch.ops.pc_kernels.cpu_empty_rows
    with pytest.raises(ValueError, match="float32, got Double"):
        op(torch.empty(0, dtype=torch.float64), 3, 3)
    with pytest.raises(ValueError, match="-1 and 3"):
        op(torch.empty(0), -1, 3)
    assert op(torch.empty(0), 0, 3).shape == (0, 3)
