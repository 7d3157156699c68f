"""`FeatureQueue`: first in, first out, and references for a loss."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

import pc_kernels
from pc_kernels import installation


def batch(rng: Generator, rows: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 3, generator=rng), torch.randn(rows, 2, generator=rng)


def by_value(rows: Tensor) -> list[list[float]]:
    return sorted(rows.tolist())


@pytest.mark.parametrize("sizes", [(4, 4), (10,), (3, 8, 1, 10, 2), (25,), (0, 7, 0, 13, 30, 4)])
def test_it_holds_the_last_rows(sizes: tuple[int, ...], rng: Generator) -> None:
    queue = pc_kernels.FeatureQueue(10, student_width=3, teacher_width=2)
    seen = [torch.empty(0, 3), torch.empty(0, 2)]
    for rows in sizes:
        new = batch(rng, rows)
        queue.enqueue(*new)
        seen = [torch.cat(pair)[-10:] for pair in zip(seen, new, strict=True)]
        student, teacher = queue
        assert len(queue) == len(student) == len(teacher) == len(seen[0])
        both = torch.cat([student, teacher], 1)
        assert by_value(both) == by_value(torch.cat(seen, 1))  # rows stay together


def test_as_references(rng: Generator) -> None:
    queue = pc_kernels.FeatureQueue(16, 3, 2)
    loss_fn = pc_kernels.PerceptionCoherenceLoss()
    student, teacher = batch(rng, 6)
    student.requires_grad_()
    loss = loss_fn(student, teacher, *queue)
    loss.backward()
    assert loss == 0 and student.grad is not None and not student.grad.any()
    refs = batch(rng, 12)
    queue.enqueue(*refs)
    got, wanted = loss_fn(student, teacher, *queue), loss_fn(student, teacher, *refs)
    assert torch.equal(got, wanted) and got > 0
    got.backward()
    assert queue.student.grad is None and not queue.student.requires_grad


@pytest.mark.parametrize("sizes", [(3,), (8,), (5, 6)])
def test_its_own_rows(sizes: tuple[int, ...], rng: Generator) -> None:
    """They are read before they are overwritten, also where they lie around the end."""
    queue, wanted = (pc_kernels.FeatureQueue(8, 3, 2) for _ in range(2))
    for rows in sizes:
        new = batch(rng, rows)
        queue.enqueue(*new)
        wanted.enqueue(*new)
    wanted.enqueue(*(x.clone() for x in wanted))
    queue.enqueue(*queue)
    for a, b in zip(queue, wanted, strict=True):
        assert torch.equal(a, b)


def test_state(rng: Generator) -> None:
    """A saved queue goes on where it was."""
    queue, other = (pc_kernels.FeatureQueue(5, 3, 2) for _ in range(2))
    queue.enqueue(*batch(rng, 3))
    other.load_state_dict(copy.deepcopy(queue.state_dict()))
    new = batch(rng, 4)
    for q in (queue, other):
        q.enqueue(*new)
    assert len(other) == 5
    for a, b in zip(queue, other, strict=True):
        assert torch.equal(a, b)
    assert "filled=5" in repr(other)
    with pytest.raises(RuntimeError, match="size mismatch"):
        pc_kernels.FeatureQueue(6, 3, 2).load_state_dict(queue.state_dict())


def test_dtype_and_saving(tmp_path: Any, rng: Generator) -> None:
    queue = pc_kernels.FeatureQueue(5, 3, 2, dtype=torch.bfloat16)
    queue.enqueue(*batch(rng, 2))
    assert all(rows.dtype == torch.bfloat16 for rows in queue)
    torch.save(queue.state_dict(), tmp_path / "queue.pt")
    again = pc_kernels.FeatureQueue(5, 3, 2, dtype=torch.bfloat16)
    again.load_state_dict(torch.load(tmp_path / "queue.pt"))
    assert len(again) == 2 and torch.equal(next(iter(again)), next(iter(queue)))


def test_enqueue_before_the_backward_is_noticed(rng: Generator) -> None:
    queue = pc_kernels.FeatureQueue(8, 3, 2)
    queue.enqueue(*batch(rng, 8))
    student, teacher = batch(rng, 4)
    student.requires_grad_()
    losses = pc_kernels.perception_coherence_loss(student, teacher, *queue, reduction="none")
    queue.enqueue(student, teacher)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.sum().backward()


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((0, 3, 2), ValueError, "size"),
        ((4, -1, 2), ValueError, "student_width"),
        ((4, 3, 2.0), TypeError, "teacher_width"),
        ((True, 3, 2), TypeError, "size"),
    ],
)
def test_errors_at_construction(arguments: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        pc_kernels.FeatureQueue(*arguments)
    with pytest.raises(TypeError, match="dtype"):
        pc_kernels.FeatureQueue(3, 3, 3, dtype=torch.int64)


def test_errors_of_enqueue(rng: Generator) -> None:
    queue = pc_kernels.FeatureQueue(4, 3, 2)
    student, teacher = batch(rng, 3)
    for arguments, words in (
        ((student[:, :2], teacher), "student has width 2.*holds width 3"),
        ((student, student), "teacher has width 3.*holds width 2"),
        ((student[:2], teacher), "same inputs"),
        ((student.to("meta"), teacher.to("meta")), "meta.*queue is on cpu"),
    ):
        with pytest.raises(ValueError, match=words):
            queue.enqueue(*arguments)
    assert len(queue) == 0


def test_a_queue_that_is_never_filled_is_noticed(
    monkeypatch: pytest.MonkeyPatch, rng: Generator
) -> None:
    """The first step of a loop finds it empty, and that is in order; the second is not."""
    monkeypatch.setattr(installation, "_warned", set())
    queue, loss_fn = pc_kernels.FeatureQueue(4, 3, 2), pc_kernels.PerceptionCoherenceLoss()
    student, teacher = batch(rng, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_fn(student, teacher, *queue)
    with pytest.warns(UserWarning, match="still empty.*enqueue") as caught:
        for _ in range(3):
            loss_fn(student, teacher, *queue)
    assert len(caught) == 1 and caught[0].filename == __file__
