"""What is computed in a benchmark: the inputs of a size, and their float64 truth.

The truth is the direct formula in float64 on a few random anchors, in blocks of a bounded number of
sigmoids: at a batch of 16384 all anchors would take 4·10¹² of them. `test_benchmarks.py` compares it
with `pc_kernels.reference`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pc_kernels import reference

TEMPERATURE = 0.1
EVALUATIONS = 10**8
"""Comparisons that the truth of one size may take, in each of its three sums."""
BLOCK = 1 << 20
"""Elements of a block of comparisons."""


class Result(NamedTuple):
    """Of one forward and backward pass."""

    value: Tensor
    """The loss, or the ranks."""
    grad: Tensor
    """Of the student's features, or of the ranked values."""


@dataclass(frozen=True)
class Spec:
    """What an input is made from; two processes make the same input of it."""

    size: int
    student_dim: int = 128
    teacher_dim: int = 512
    device: str = "cpu"


class Problem:
    """The inputs of one size, each made when first asked for, and the truth about some anchors."""

    def __init__(self, spec: Spec) -> None:
        """Makes nothing yet."""
        self.spec = spec
        self.size = spec.size
        self.device = torch.device(spec.device)

    def _normal(self, rows: int, columns: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(rows, columns, generator=generator).to(self.device)

    @cached_property
    def teacher(self) -> Tensor:
        """Features [B, Dt], multiples of 1/8.

        Their inner products and squared distances are exact in float32, so no rounding swaps the hard
        ranks of a near tie: that would change gradients by 1e-4, and be nobody's error.
        """
        return (self._normal(self.size, self.spec.teacher_dim, 1) * 8).round() / 8

    @cached_property
    def student(self) -> Tensor:
        """Features [B, Ds]: what a random linear map leaves of the teacher's, and noise."""
        mixing = self._normal(self.spec.teacher_dim, self.spec.student_dim, 2)
        noise = self._normal(self.size, self.spec.student_dim, 3)
        return self.teacher @ mixing / self.spec.teacher_dim**0.5 + noise / 2

    @cached_property
    def values(self) -> Tensor:
        """A matrix [B, B] to rank."""
        return self._normal(self.size, self.size, 4)

    @cached_property
    def values_grad(self) -> Tensor:
        """The gradient [B, B] that comes back to its ranks."""
        return self.values.flip(0).contiguous()

    @cached_property
    def products(self) -> tuple[Tensor, Tensor]:
        """Two buffers [B, B] for the GEMM floor."""
        return self.student.new_empty(self.size, self.size), self.student.new_empty(
            self.size, self.size
        )

    @cached_property
    def anchors(self) -> Tensor:
        """Indices of the anchors whose truth is computed: random, 2 to 64 of them."""
        count = min(max(EVALUATIONS // self.size**2, 2), 64, self.size)
        order = torch.randperm(self.size, generator=torch.Generator().manual_seed(5))
        return order[:count].sort().values.to(self.device)

    @cached_property
    def weights(self) -> Tensor:
        """Weights [B] of the anchors' losses that leave the mean over `anchors`."""
        weights = self.student.new_zeros(self.size)
        weights[self.anchors] = 1 / len(self.anchors)
        return weights

    @cached_property
    def loss_truth(self) -> Result:
        """The mean loss of `anchors`, and its gradient in all student features [B, Ds]."""
        student = self.student.double().requires_grad_()
        teacher = self.teacher.double()
        d_s = reference.pairwise_dissimilarity(student[self.anchors], student)
        d_t = reference.pairwise_dissimilarity(teacher[self.anchors], teacher)
        others = torch.arange(self.size - 1, device=self.device).repeat(len(self.anchors), 1)
        others += others >= self.anchors[:, None]
        loss = exact_loss(d_s.gather(1, others), d_t.gather(1, others))
        return Result(loss.detach(), torch.autograd.grad(loss, student)[0])

    @cached_property
    def rank_truth(self) -> Result:
        """The soft ranks of the rows `anchors` of `values`, and their gradient."""
        values = self.values[self.anchors].double().requires_grad_()
        ranks = exact_soft_rank(values, values.new_tensor(TEMPERATURE))
        slope = self.values_grad[self.anchors].double()
        return Result(ranks.detach(), torch.autograd.grad(ranks, values, slope)[0])


def _sigmoid(difference: Tensor, tau: Tensor) -> Tensor:
    return torch.sigmoid(difference / tau)


def _step(difference: Tensor, _: Tensor) -> Tensor:
    return (difference > 0).to(difference) + (difference == 0).to(difference) / 2


class _PairSums(torch.autograd.Function):
    """Σ_k Φ(x_j − x_k, τ) [N, m] of rows x [N, m], in blocks that the backward computes again."""

    @staticmethod
    def _blocks(x: Tensor) -> list[slice]:
        width = max(1, BLOCK // x.numel())
        return [slice(start, start + width) for start in range(0, x.shape[1], width)]

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, tau: Tensor, cdf: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        ctx.save_for_backward(x, tau)
        ctx.cdf = cdf
        sums = torch.empty_like(x)
        for block in _PairSums._blocks(x):
            sums[:, block] = cdf(x[:, block, None] - x[:, None, :], tau).sum(-1)
        return sums

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, tau = (saved.detach().requires_grad_() for saved in ctx.saved_tensors)
        with torch.enable_grad():
            for block in _PairSums._blocks(x):
                sums = ctx.cdf(x[:, block, None] - x[:, None, :], tau).sum(-1)
                sums.backward(grad[:, block])
        return x.grad, tau.grad, None


def exact_soft_rank(x: Tensor, tau: Tensor) -> Tensor:
    """Soft ranks of rows x [N, m]; tau is a number or [N, 1, 1]. A value's Φ(0) of itself is ½."""
    return (_PairSums.apply(x, tau, _sigmoid) - 0.5) / (x.shape[1] - 1)


def exact_loss(d_s: Tensor, d_t: Tensor) -> Tensor:
    """The mean loss of anchors with dissimilarities [N, m], under the default options."""
    tau = TEMPERATURE * d_s.std(1, correction=0)[:, None, None]
    hard = (_PairSums.apply(d_t, tau.detach(), _step) - 0.5) / (d_t.shape[1] - 1)
    return (exact_soft_rank(d_s, tau) - hard).square().mean()
