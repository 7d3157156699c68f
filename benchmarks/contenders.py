"""Who is timed, on what: name, how to run it forward and backward, and how it is checked.

The direct formula is written as a user who wants it fast would: a plain fp32 broadcast that the
compiler can fuse with its sum, hard ranks by sorting, distances from one matrix product.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from typing import Literal

import gate
import torch
from gate import Check, Run
from measure import failure
from problem import TEMPERATURE, Problem, Result, Spec
from torch import Tensor

import pc_kernels
from pc_kernels.backends import BACKENDS

STRIPS = 8
"""Of a triangle: 1/16 more than its own products."""

Table = Literal["yardstick", "loss", "rank"]


@dataclass(frozen=True)
class Contender:
    """One row of a table."""

    key: str
    label: str
    table: Table
    run: Run
    gate: Callable[[Run, Problem], Check]
    order: int = 2
    """Time and memory grow as B^order."""
    full_tensors: int = 0
    """[B, B, B] float32 tensors alive at its peak, as far as that is known beforehand."""
    obstacle: str | None = None
    """Why it cannot run here."""
    compiles: bool = False

    @property
    def ours(self) -> bool:
        """Whether it is a backend of this package."""
        return self.key in BACKENDS


def _differentiate(rows: Tensor, weights: Tensor | None, leaf: Tensor) -> Result:
    loss = rows.mean() if weights is None else (rows * weights).sum()
    return Result(loss.detach(), torch.autograd.grad(loss, leaf)[0])


def run_floor(problem: Problem, _: Tensor | None) -> Result:
    """T Tᵀ, S Sᵀ, W S, Wᵀ S: what no implementation can avoid."""
    s, t = problem.student, problem.teacher
    gram_t, gram_s = problem.products
    torch.mm(t, t.T, out=gram_t)
    torch.mm(s, s.T, out=gram_s)
    return Result(torch.mm(gram_s, s), torch.mm(gram_s.T, s))


def run_half_floor(problem: Problem, _: Tensor | None) -> Result:
    """Half of the multiplications: Gram matrices are symmetric, and V S + Vᵀ S = (V + Vᵀ) S.

    The Gram matrices' lower triangles go in strips, which also take the triangles above on the diagonal.
    """
    s, t = problem.student, problem.teacher
    count = max(1, min(STRIPS, problem.size // 128))
    for x, gram in zip((t, s), problem.products, strict=True):
        for rows in torch.arange(problem.size, device="cpu").chunk(count):
            first, past = int(rows[0]), int(rows[-1]) + 1
            torch.mm(x[first:past], x[:past].T, out=gram[first:past, :past])
    return Result(problem.products[1], torch.mm(problem.values, s))


def run_cdist(problem: Problem, weights: Tensor | None) -> Result:
    """Distances of the student's features alone, and their gradient."""
    student = problem.student.detach().requires_grad_()
    return _differentiate(torch.cdist(student, student).sum(1), weights, student)


def run_loss(problem: Problem, weights: Tensor | None, *, backend: str) -> Result:
    """The whole loss by a backend of this package."""
    student = problem.student.detach().requires_grad_()
    reduction = "mean" if weights is None else "none"
    loss = pc_kernels.perception_coherence_loss(
        student, problem.teacher, temperature=TEMPERATURE, reduction=reduction, backend=backend
    )
    if weights is not None:
        loss = (loss * weights).sum()
    return Result(loss.detach(), torch.autograd.grad(loss, student)[0])


def _differentiate_ranks(function: Callable[[Tensor], Tensor], problem: Problem) -> Result:
    values = problem.values.detach().requires_grad_()
    ranks = function(values)
    return Result(ranks.detach(), torch.autograd.grad(ranks, values, problem.values_grad)[0])


def run_rank(problem: Problem, _: Tensor | None, *, backend: str) -> Result:
    """Soft ranks by a backend of this package."""
    rank = partial(pc_kernels.soft_rank, temperature=TEMPERATURE, backend=backend)
    return _differentiate_ranks(rank, problem)


def direct_soft_rank(x: Tensor, tau: Tensor | float) -> Tensor:
    """Soft ranks of rows [N, m]; tau is a number or [N, 1, 1]."""
    steps = torch.sigmoid((x[:, :, None] - x[:, None, :]) / tau)
    return (steps.sum(-1) - 0.5) / (x.shape[1] - 1)


def _square_distances(x: Tensor) -> Tensor:
    """[B, B−1], without the diagonal."""
    b = x.shape[0]
    square = x.square().sum(1)
    d = square[:, None] + square - 2 * (x @ x.T)
    return d.flatten()[1:].view(b - 1, b + 1)[:, :-1].reshape(b, b - 1).clamp_min(0)


def direct_losses(student: Tensor, teacher: Tensor) -> Tensor:
    """The losses [B] under the default options."""
    d_s = _square_distances(student).sqrt()
    d_t = _square_distances(teacher)
    ordered = d_t.sort(dim=1).values
    twice = torch.searchsorted(ordered, d_t) + torch.searchsorted(ordered, d_t, right=True) - 1
    tau = TEMPERATURE * d_s.std(1, correction=0)[:, None, None]
    return (direct_soft_rank(d_s, tau) - twice / 2 / (d_t.shape[1] - 1)).square().mean(1)


@cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    # One compilation a size; past the default limit it would fall back to eager and not say so.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(function, dynamic=False, fullgraph=True)


def run_direct_loss(problem: Problem, weights: Tensor | None, *, compiled: bool) -> Result:
    """The whole loss by the direct formula."""
    student = problem.student.detach().requires_grad_()
    function = _compiled(direct_losses) if compiled else direct_losses
    return _differentiate(function(student, problem.teacher), weights, student)


def run_direct_rank(problem: Problem, _: Tensor | None, *, compiled: bool) -> Result:
    """Soft ranks by the direct formula."""
    function = _compiled(direct_soft_rank) if compiled else direct_soft_rank
    return _differentiate_ranks(lambda x: function(x, TEMPERATURE), problem)


def run_torchsort(problem: Problem, _: Tensor | None) -> Result:
    """Ranks by projection; what it takes does not depend on the strength of its regularisation."""
    from torchsort import soft_rank

    return _differentiate_ranks(partial(soft_rank, regularization_strength=TEMPERATURE), problem)


def _torchsort_obstacle(device: torch.device) -> str | None:
    if find_spec("torchsort") is None:
        return "not installed"
    try:
        module = "isotonic_cuda" if device.type == "cuda" else "isotonic_cpu"
        importlib.import_module(f"torchsort.{module}")
    except ImportError as error:
        return f"does not load: {failure(error).detail}"
    return None


def contenders(device: torch.device) -> list[Contender]:
    """All, in the order in which they are shown."""
    found = [
        Contender("floor", "GEMM floor", "yardstick", run_floor, gate.check_products),
        Contender("half", "half products", "yardstick", run_half_floor, gate.check_half_products),
        Contender("cdist", "torch.cdist", "yardstick", run_cdist, gate.check_cdist),
    ]
    kinds: list[
        tuple[Table, Callable[..., Result], Callable[..., Result], Callable[..., Check]]
    ] = [
        ("loss", run_loss, run_direct_loss, gate.check_loss),
        ("rank", run_rank, run_direct_rank, gate.check_rank),
    ]
    for table, run_ours, run_direct, check in kinds:
        for name, backend in BACKENDS.items():
            if name == "reference":  # the direct formula, which is below in a faster form
                continue
            if not backend.serves(device):
                continue
            run = partial(run_ours, backend=name)
            reason = backend.obstacle(device, torch.float32)
            label = f"pc_kernels, {name}"
            found.append(Contender(name, label, table, run, check, obstacle=reason))
        eager, compiled = (partial(run_direct, compiled=c) for c in (False, True))
        found.append(
            Contender("eager", "direct, eager", table, eager, check, order=3, full_tensors=5)
        )
        found.append(
            Contender(
                "compile", "direct, torch.compile", table, compiled, check, order=3, compiles=True
            )
        )
    reason = _torchsort_obstacle(device)
    found.append(
        Contender(
            "torchsort", "torchsort ¹", "rank", run_torchsort, gate.check_torchsort, obstacle=reason
        )
    )
    return found


def prepare(key: str, table: Table, spec: Spec) -> Callable[[], Result]:
    """The call of a contender on inputs that are ready, after a warm-up: see `measure.usage`."""
    found = contenders(torch.device(spec.device))
    contender = next(c for c in found if (c.key, c.table) == (key, table))
    problem = Problem(spec)
    ready = (problem.values, problem.values_grad) if table == "rank" else (problem.student,)
    assert all(len(x) == spec.size for x in ready)
    tiny = Problem(Spec(16, spec.student_dim, spec.teacher_dim, spec.device))
    contender.run(problem if contender.compiles else tiny, None)
    return lambda: contender.run(problem, None)
