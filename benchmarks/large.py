"""One run at a batch that only a loss without B×B matrices can do."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from contenders import Contender, run_loss
from gate import LIMIT, difference
from measure import Failure, usage
from problem import TEMPERATURE, Problem, Result, Spec, exact_loss
from rows import Row
from torch import Tensor

import pc_kernels
from pc_kernels import reference

DIMENSION = 128
SIZES = {"cpu": 65536, "cuda": 131072}
TIMEOUT = 1800.0


def _features(spec: Spec, anchors: int) -> tuple[Tensor, ...]:
    """Anchors and references of student and teacher; no anchor is among the references."""
    problem = Problem(Spec(spec.size + anchors, spec.student_dim, spec.teacher_dim, spec.device))
    s, t = problem.student, problem.teacher
    return s[:anchors], t[:anchors], s[anchors:], t[anchors:]


def check(spec: Spec, backend: str, anchors: int = 1) -> dict[str, float]:
    """Errors of a few anchors against all references: loss, and gradients of both."""
    s, t, s_refs, t_refs = _features(spec, anchors)
    given = (s.clone().requires_grad_(), s_refs.clone().requires_grad_())
    loss = pc_kernels.perception_coherence_loss(
        given[0], t, given[1], t_refs, temperature=TEMPERATURE, backend=backend
    )
    grads = torch.autograd.grad(loss, given)
    exact = (s.double().requires_grad_(), s_refs.double().requires_grad_())
    d_t = reference.pairwise_dissimilarity(t.double(), t_refs.double())
    truth = exact_loss(reference.pairwise_dissimilarity(*exact), d_t)
    true_grads = torch.autograd.grad(truth, exact)
    names = ("gradient", "references' gradient")
    errors = {"loss": difference(loss, truth)}
    return errors | {n: difference(a, b) for n, a, b in zip(names, grads, true_grads, strict=True)}


def prepare(backend: str, spec: Spec) -> Callable[[], Result]:
    """The whole loss, forward and backward, on inputs that are ready: see `measure.usage`."""
    tiny = Problem(Spec(16, spec.student_dim, spec.teacher_dim, spec.device))
    run_loss(tiny, None, backend=backend)
    problem = Problem(spec)
    assert len(problem.student) == spec.size
    return partial(run_loss, problem, None, backend=backend)


def run(contender: Contender, spec: Spec) -> Row:
    """Checks, then times once and measures memory."""
    label = f"{contender.label}, D={spec.student_dim}"
    row = Row("large", spec.size, contender.key, label)
    row.errors = check(spec, contender.key)
    if not all(error <= LIMIT for error in row.errors.values()):
        row.status, row.detail = "wrong", f"error {max(row.errors.values()):.1e}"
        return row
    used = usage(prepare, (contender.key, spec), torch.device(spec.device), TIMEOUT)
    if isinstance(used, Failure):
        row.status, row.detail = used.status, used.detail
        return row
    row.seconds, row.extra_bytes = [used.seconds], used.bytes
    return row
