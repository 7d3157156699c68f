"""Memory kept from call to call is never in two hands, and what it held before does not show."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Generator, Tensor

import pc_kernels
from pc_kernels import row_memory


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_memory, "_kept", [])


def loss_and_gradient(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    leaf = student.detach().clone().requires_grad_()
    loss = pc_kernels.perception_coherence_loss(leaf, teacher)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def test_what_memory_held_does_not_show(rng: Generator) -> None:
    student, teacher = torch.randn(2, 40, 6, generator=rng)
    first = loss_and_gradient(student, teacher)
    addresses = {memory.data_ptr() for memory in row_memory._kept}
    assert len(addresses) == 2  # the student's rows and the teacher's
    for memory in row_memory._kept:
        memory.fill_(math.nan)
    for again, wanted in zip(loss_and_gradient(student, teacher), first, strict=True):
        assert torch.equal(again, wanted)
    assert {memory.data_ptr() for memory in row_memory._kept} == addresses


def test_threads_do_not_share(rng: Generator) -> None:
    batches = [tuple(torch.randn(2, n, 6, generator=rng)) for n in (30, 80, 200, 31) * 8]
    wanted = [loss_and_gradient(*batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda batch: loss_and_gradient(*batch), batches))
    for one, other in zip(got, wanted, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_only_so_much_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_memory, "KEPT_BYTES", 4000)
    like = torch.empty(0)
    for rows in (10, 20, 1, 5):
        row_memory.give_back(row_memory.take(rows, 50, like))
    assert sum(memory.nbytes for memory in row_memory._kept) <= 4000
    assert row_memory.take(1, 10**4, like).shape == (1, 10**4)  # none is as large
    matrices = [row_memory.take(3, 5, like) for _ in range(4)]
    assert len({matrix.data_ptr() for matrix in matrices}) == 4


def test_memory_fits_whoever_takes_it(rng: Generator) -> None:
    """Another dtype, and inference mode, whose tensors nobody else may write to."""
    student, teacher = torch.randn(2, 9, 4, generator=rng)
    with torch.inference_mode():
        pc_kernels.perception_coherence_loss(student, teacher)
    assert not row_memory._kept
    single = loss_and_gradient(student, teacher)
    double = loss_and_gradient(student.double(), teacher.double())
    assert double[0].dtype == torch.float64
    for one, other in zip(single, double, strict=True):
        assert torch.allclose(one.double(), other, rtol=1e-4, atol=1e-6)
    with torch.inference_mode():
        assert torch.equal(pc_kernels.perception_coherence_loss(student, teacher), single[0])
