"""Same input, same bits: again, in another process, with other threads, in other company."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import pytest
import torch
from compare import BACKEND_NAMES, DISSIMILARITIES, FAST_BACKENDS, own_leaf
from inputs import make_rows, quantised
from torch import Generator, Tensor

import pc_kernels

FUSED_BACKENDS = [b for b in FAST_BACKENDS if "torch" not in b.values]
"""Those whose every sum over rows is their own: PyTorch's may split a sum by threads."""


def results(backend: str, metric: str, s: Tensor, t: Tensor) -> list[Tensor]:
    leaf = own_leaf(s)
    losses = pc_kernels.perception_coherence_loss(
        leaf, t, dissimilarity=metric, reduction="none", backend=backend
    )
    losses.sum().backward()
    mean = pc_kernels.perception_coherence_loss(s, t, dissimilarity=metric, backend=backend)
    assert leaf.grad is not None
    return [losses.detach(), leaf.grad, mean]


def rank_results(backend: str, x: Tensor) -> list[Tensor]:
    leaf = own_leaf(x)
    rank = pc_kernels.soft_rank(leaf, scale="std", backend=backend)
    rank.backward(x.flip(1))
    assert leaf.grad is not None
    return [rank.detach(), leaf.grad, pc_kernels.hard_rank(x, backend=backend)]


def assert_same_bits(one: list[Tensor], other: list[Tensor]) -> None:
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("metric", DISSIMILARITIES)
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_again(backend: str, metric: str, rng: Generator) -> None:
    s, t = torch.randn(65, 20, generator=rng), quantised(rng, 65, 5)
    first = results(backend, metric, s, t)
    for _ in range(5):
        assert_same_bits(first, results(backend, metric, s.clone(), t.clone()))


@pytest.mark.parametrize("metric", DISSIMILARITIES)
@pytest.mark.parametrize("backend", FUSED_BACKENDS)
def test_one_thread_or_two(
    backend: str, metric: str, threads: Callable[[int], None], rng: Generator
) -> None:
    """Past two, the matrix library may split its sums otherwise; the row kernels never do."""
    s, t = torch.randn(700, 40, generator=rng), quantised(rng, 700, 5)
    outcomes = []
    for count in (1, 2):
        threads(count)
        outcomes.append(results(backend, metric, s, t))
    assert_same_bits(*outcomes)


@pytest.mark.parametrize("backend", FUSED_BACKENDS)
def test_any_number_of_threads(
    backend: str, threads: Callable[[int], None], rng: Generator
) -> None:
    x = torch.cat([make_rows(name, rng, 200, 300) for name in ("normal", "two far clumps")])
    outcomes = []
    for count in (1, 2, 3, 5):
        threads(count)
        leaf = own_leaf(x)
        loss = pc_kernels.coherence_loss_from_dissimilarities(leaf, x.flip(0), backend=backend)
        loss.backward()
        assert leaf.grad is not None
        outcomes.append([*rank_results(backend, x), loss.detach(), leaf.grad])
    for outcome in outcomes[1:]:
        assert_same_bits(outcomes[0], outcome)


@pytest.mark.parametrize("backend", FUSED_BACKENDS)
def test_a_row_does_not_depend_on_the_rows_beside_it(backend: str, rng: Generator) -> None:
    """Nor on what a row before it left in working memory."""
    names = ("normal", "integers", "outlier of -1e9", "powers of two", "all equal", "three values")
    x = torch.cat([make_rows(name, rng, 3, 130) for name in names])
    x = x[torch.randperm(len(x), generator=rng)]
    together = rank_results(backend, x)
    for i in range(len(x)):
        alone = rank_results(backend, x[i : i + 1])
        assert_same_bits([part[i : i + 1] for part in together], alone)


SCRIPT = """
import hashlib, torch, pc_kernels
rng = torch.Generator().manual_seed(11)
s, t = torch.randn(300, 24, generator=rng), torch.randn(300, 8, generator=rng)
s.requires_grad_()
loss = pc_kernels.perception_coherence_loss(s, t, backend="{backend}")
loss.backward()
rank = pc_kernels.soft_rank(t.T.contiguous(), backend="{backend}")
data = b"".join(x.detach().numpy().tobytes() for x in (loss, s.grad, rank))
print(hashlib.sha256(data).hexdigest())
"""


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_another_process(backend: str, python: Callable[..., object]) -> None:
    digests = set()
    for _ in range(2):
        done = python("-c", SCRIPT.format(backend=backend))
        assert done.returncode == 0, done.stderr
        digests.add(done.stdout.strip())
    assert len(digests) == 1 and len(digests.pop()) == hashlib.sha256().digest_size * 2


def test_memory_is_poisoned() -> None:
    """The fixture that all of these tests rely on."""
    assert torch.empty(5).isnan().all()
    assert torch.empty(3, dtype=torch.int64).unique().tolist() == [torch.iinfo(torch.int64).max]
