"""The gate: a contender is timed only at a size where it was just found right.

Each check runs the very call that will be timed, and compares with float64. The whole loss couples
all student features through all anchors, and a batch holds too many anchors for float64. So two
comparisons stand for one: (1) a run whose loss is the mean over a few anchors, against the truth, with
the gradient in *all* student features: those of these anchors, and the references'; (2) the
run that is timed, against one whose weights are all 1/B: it must be the same loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from measure import timed
from problem import Problem, Result
from torch import Tensor

Run = Callable[[Problem, Tensor | None], Result]
"""Forward and backward: of the mean, or of Σ_i w_i L_i over the anchors if weights w [B] are given."""

LIMIT = 1e-5
RANK_LIMIT = 2e-6
PEER_LIMIT = 1e-3
"""For others' work. torch.cdist takes |a|² + |b|² − 2ab, torchsort adds up long float32 sums."""


@dataclass(frozen=True)
class Check:
    """Errors by what they are of, each with its limit, and the seconds of the run that is timed."""

    errors: dict[str, tuple[float, float]]
    seconds: float

    @property
    def right(self) -> bool:
        """Whether no error is over its limit; NaN is."""
        return all(error <= limit for error, limit in self.errors.values())

    def __str__(self) -> str:
        """The errors over their limits, in a line."""
        over = {name: error for name, (error, limit) in self.errors.items() if not error <= limit}
        return ", ".join(f"{name} {error:.1e}" for name, error in over.items())


def difference(x: Tensor, truth: Tensor) -> float:
    """Relative L2."""
    x, truth = x.detach().double(), truth.detach().double()
    return float((x - truth).norm() / truth.norm())


def check_loss(run: Run, problem: Problem) -> Check:
    """The whole loss and the gradient in the student's features."""
    truth = problem.loss_truth
    some = run(problem, problem.weights)
    errors = {
        "loss": (difference(some.value, truth.value), LIMIT),
        "gradient": (difference(some.grad, truth.grad), LIMIT),
    }
    even = run(problem, torch.full_like(problem.weights, 1 / problem.size))
    seconds, mean = timed(lambda: run(problem, None), problem.device)
    same = max(difference(mean.value, even.value), difference(mean.grad, even.grad))
    return Check({**errors, "timed run": (same, LIMIT)}, seconds)


def check_rank(run: Run, problem: Problem) -> Check:
    """Soft ranks and their gradient, on the rows whose truth is known; rows are independent."""
    truth, rows = problem.rank_truth, problem.anchors
    run(problem, None)  # warm-up: what compiles on the first call
    seconds, (ranks, grad) = timed(lambda: run(problem, None), problem.device)
    errors = {
        "rank": (float((ranks[rows] - truth.value).abs().max()), RANK_LIMIT),
        "gradient": (difference(grad[rows], truth.grad), LIMIT),
    }
    return Check(errors, seconds)


def check_products(run: Run, problem: Problem) -> Check:
    """The four products of the GEMM floor."""
    seconds, (forth, back) = timed(lambda: run(problem, None), problem.device)
    rows, s, t = problem.anchors, problem.student.double(), problem.teacher.double()
    gram_t, gram_s = problem.products
    through = s[rows] @ (s.T @ s)  # W = S Sᵀ is symmetric: W S = Wᵀ S
    errors = {
        "T Tᵀ": (difference(gram_t[rows], t[rows] @ t.T), LIMIT),
        "S Sᵀ": (difference(gram_s[rows], s[rows] @ s.T), LIMIT),
        "W S": (difference(forth[rows], through), LIMIT),
        "Wᵀ S": (difference(back[rows], through), LIMIT),
    }
    return Check(errors, seconds)


def check_half_products(run: Run, problem: Problem) -> Check:
    """The lower triangles of both Gram matrices, and the product with another matrix."""
    seconds, (_, through) = timed(lambda: run(problem, None), problem.device)
    rows, s, t = problem.anchors, problem.student.double(), problem.teacher.double()
    gram_t, gram_s = (gram[rows].clone() for gram in problem.products)
    below = torch.arange(problem.size, device=problem.device) <= rows[:, None]
    lower_t, lower_s = (torch.where(below, x[rows] @ x.T, 0) for x in (t, s))
    errors = {
        "T Tᵀ": (difference(torch.where(below, gram_t, 0), lower_t), LIMIT),
        "S Sᵀ": (difference(torch.where(below, gram_s, 0), lower_s), LIMIT),
        "V S": (difference(through[rows], problem.values[rows].double() @ s), LIMIT),
    }
    return Check(errors, seconds)


def check_cdist(run: Run, problem: Problem) -> Check:
    """Distances and their gradient, summed over the anchors whose truth is known."""
    student = problem.student.double().requires_grad_()
    square = (student[problem.anchors, None] - student).square().sum(-1)
    truth = torch.where(square > 0, square, 1).sqrt().where(square > 0, 0).sum(1).mean()
    (truth_grad,) = torch.autograd.grad(truth, student)
    some = run(problem, problem.weights)
    seconds, _ = timed(lambda: run(problem, None), problem.device)
    errors = {
        "distance": (difference(some.value, truth), PEER_LIMIT),
        "gradient": (difference(some.grad, truth_grad), PEER_LIMIT),
    }
    return Check(errors, seconds)


def check_torchsort(run: Run, problem: Problem) -> Check:
    """The projection of Blondel et al. is another relaxation: it is held to what is known about it.

    Where gaps are wider than the regularisation it is the hard rank, with no gradient. Where the
    regularisation is wider than the row it is x/ε − mean(x/ε) + (m + 1)/2. Always the ranks of
    a row sum to m (m + 1)/2, and their gradient to 0: this is checked on the run that is timed.
    """
    from torchsort import soft_rank

    m, rows = problem.size, problem.anchors
    x, slope = problem.values[rows], problem.values_grad[rows]
    hard = x.argsort(1).argsort(1).to(x)
    wide = x.detach().requires_grad_()
    epsilon = 4.0 * float(x.max() - x.min())
    ranks = soft_rank(wide, regularization_strength=epsilon)
    (grad,) = torch.autograd.grad(ranks, wide, slope)
    x, slope = x.double(), slope.double()
    line = (x - x.mean(1, keepdim=True)) / epsilon + (m + 1) / 2
    line_grad = (slope - slope.mean(1, keepdim=True)) / epsilon
    seconds, timed_run = timed(lambda: run(problem, None), problem.device)
    total = timed_run.value[rows].double().sum(1) / (m * (m + 1) / 2)
    drift = timed_run.grad[rows].double().sum(1).abs() / timed_run.grad[rows].abs().sum(1)
    errors = {
        "hard limit": (
            difference(soft_rank(hard, regularization_strength=0.5), hard + 1),
            PEER_LIMIT,
        ),
        "soft limit": (difference(ranks, line), PEER_LIMIT),
        "its gradient": (difference(grad, line_grad), PEER_LIMIT),
        "row sums": (float((total - 1).abs().max()), PEER_LIMIT),
        "gradient sums": (float(drift.max()), PEER_LIMIT),
    }
    return Check(errors, seconds)
