"""Products are in full float32 inside a loss, and as the process wants them outside, threads or not."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import pc_kernels
from pc_kernels.precision import FullPrecision

WAIT = 20.0


@pytest.fixture(autouse=True)
def lowered() -> Iterator[None]:
    """What the process has asked for."""
    switch = torch.backends.mkldnn.matmul
    before = switch.fp32_precision
    switch.fp32_precision = "bf16"
    yield
    switch.fp32_precision = before


def setting() -> str:
    return torch.backends.mkldnn.matmul.fp32_precision


def test_a_thread_that_leaves_does_not_take_the_others_precision() -> None:
    """Two losses overlap: the first to come leaves while the second computes."""
    first_is_in, second_is_in, first_is_out = (threading.Event() for _ in range(3))
    seen = []

    def first(a: Tensor, b: Tensor) -> Tensor:
        first_is_in.set()
        assert second_is_in.wait(WAIT)
        return torch.cdist(a, b)

    def second(a: Tensor, b: Tensor) -> Tensor:
        second_is_in.set()
        assert first_is_out.wait(WAIT)
        seen.append(setting())
        return torch.cdist(a, b)

    def loss(dissimilarity: object) -> None:
        x, t = torch.randn(5, 3), torch.randn(5, 2)
        pc_kernels.perception_coherence_loss(
            x, t, dissimilarity=dissimilarity, teacher_dissimilarity="cosine"
        )

    threads = [threading.Thread(target=loss, args=(f,)) for f in (first, second)]
    threads[0].start()
    assert first_is_in.wait(WAIT)
    threads[1].start()
    threads[0].join(WAIT)
    first_is_out.set()
    threads[1].join(WAIT)
    assert seen == ["ieee"] and setting() == "bf16"


def test_many_threads_and_nesting() -> None:
    context, wrong = FullPrecision(), []

    def enter_and_leave() -> None:
        for _ in range(300):
            with context, context:
                if setting() != "ieee":
                    wrong.append(setting())

    threads = [threading.Thread(target=enter_and_leave) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert not wrong and setting() == "bf16"


def test_who_turns_the_switch_meanwhile() -> None:
    """Their choice stays, and the next loss is exact again."""
    context = FullPrecision()
    with context:
        torch.backends.mkldnn.matmul.fp32_precision = "tf32"
        with context:
            assert setting() == "ieee"
    assert setting() == "tf32"
    with context:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    assert setting() == "bf16"


@pytest.mark.parametrize("asked", ["high", "medium", "highest"])
def test_the_older_switch_agrees(asked: str) -> None:
    """PyTorch, and code that it compiles, may read it inside; outside it is as it was."""
    torch.set_float32_matmul_precision(asked)
    try:
        before = torch.backends.cuda.matmul.fp32_precision, setting()
        seen = []

        def dissimilarity(a: Tensor, b: Tensor) -> Tensor:
            seen.append(
                (torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision())
            )
            return torch.cdist(a, b)

        x = torch.randn(5, 3)
        pc_kernels.perception_coherence_loss(x, x, dissimilarity=dissimilarity)
        assert set(seen) == {(False, "highest")}
        assert torch.get_float32_matmul_precision() == asked
        assert torch.backends.cuda.matmul.allow_tf32 == (asked != "highest")
        assert (torch.backends.cuda.matmul.fp32_precision, setting()) == before
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_contradiction_outside_stays_there() -> None:
    """Whoever turned the older switch and one of the newer ones gets back what they had."""
    torch.set_float32_matmul_precision("high")
    try:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        with FullPrecision():
            assert not torch.backends.cuda.matmul.allow_tf32
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert setting() == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_fork_while_a_thread_is_inside() -> None:
    """The child has neither the thread nor its lock: it computes, and has the caller's setting."""
    x = torch.randn(3, 2)
    x_in, go = threading.Event(), threading.Event()

    def inside(a: Tensor, b: Tensor) -> Tensor:
        x_in.set()
        assert go.wait(WAIT)
        return a @ b.T

    thread = threading.Thread(
        target=pc_kernels.perception_coherence_loss, args=(x, x), kwargs={"dissimilarity": inside}
    )
    thread.start()
    assert x_in.wait(WAIT)
    child = os.fork()
    if child == 0:
        os._exit(0 if setting() == "bf16" else 1)
    go.set()
    thread.join(WAIT)
    assert os.waitpid(child, 0)[1] == 0 and setting() == "bf16"
