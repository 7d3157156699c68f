"""The backends in plain PyTorch, `torch` and `reference`, and the chain of stages that they share."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import grid, reference
from ..options import CoherenceOptions, RankOptions
from ..rows import Rows, dissimilarities_backward, true_dissimilarities
from .base import Backend


class StagewiseBackend(Backend):
    """A backend in plain PyTorch: `coherence_rows` calls one stage after the other.

    Its rank stages take `keep`, bool [N, m] or None: where it is False the value is absent. It has
    no say in the ranks of the others, gradient 0, and a rank that means nothing.
    """

    def hard_rank(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """See `Backend`."""
        raise NotImplementedError

    def soft_rank(
        self, x: Tensor, options: RankOptions, with_grad: bool, keep: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `Backend`."""
        raise NotImplementedError

    def soft_rank_backward(
        self,
        grad_rank: Tensor,
        x: Tensor,
        density: Tensor,
        options: RankOptions,
        keep: Tensor | None = None,
    ) -> Tensor:
        """See `Backend`."""
        raise NotImplementedError

    def hard_rank_rows(self, teacher: Rows, self_start: int | None, keep: Tensor | None) -> Rows:
        """See `Backend`."""
        d_t = self.dissimilarity(teacher)
        keep = torch.ones_like(d_t, dtype=torch.bool) if keep is None else keep.clone()
        if self_start is not None:
            keep.diagonal(self_start)[: len(keep)].fill_(False)
        d_t = torch.where(keep, d_t, 0)
        rank = torch.where(keep, self.hard_rank(d_t, keep), 0)
        finite = d_t.isfinite().all(1, keepdim=True)
        return Rows(torch.where(finite, rank, torch.nan), "ranked")

    def coherence_rows(
        self,
        student: Rows,
        teacher: Rows,
        weights: Tensor,
        options: CoherenceOptions,
        self_start: int | None,
        keep: Tensor | None,
        with_grad: bool,
    ) -> Tensor:
        """See `Backend`."""
        d_s, d_t = self.dissimilarity(student), self.dissimilarity(teacher)
        others = None
        if self_start is not None:
            others = _others(d_s.shape, self_start, d_s.device)
            d_s, d_t = d_s.gather(1, others), d_t.gather(1, others)
            keep = None if keep is None else keep.gather(1, others)
        if keep is not None:
            d_s, d_t = (torch.where(keep, d, 0) for d in (d_s, d_t))
        m = torch.full_like(weights, d_s.shape[1]) if keep is None else keep.sum(1).to(d_s.dtype)
        target = d_t if teacher.metric == "ranked" else self.hard_rank(d_t, keep)
        rank, density = self.soft_rank(d_s, options, with_grad, keep)
        residual = rank - target
        if keep is not None:
            residual = torch.where(keep, residual, 0)
        loss = reference.rank_penalty(residual, options.penalty).sum(1) / m.clamp(min=1)
        loss = torch.where(m < 2, 0, loss)  # nothing to rank
        loss = torch.where((d_s.isfinite() & d_t.isfinite()).all(1), loss, torch.nan)
        if with_grad:
            scale = torch.where(m < 2, 0, weights / m.clamp(min=1))
            slope = penalty_slope(residual, options.penalty) * scale[:, None]
            grad = self.soft_rank_backward(slope, d_s, density, options, keep)
            grad = torch.where(loss.isnan()[:, None], torch.nan, grad)
            grad = dissimilarities_backward(student, true_dissimilarities(student, d_s), grad)
            if keep is not None:
                grad = torch.where(keep, grad, 0)
            if others is None:
                student.values.copy_(grad)
            else:
                student.values.zero_().scatter_(1, others, grad)
        return loss


def _others(shape: torch.Size, self_start: int, device: torch.device) -> Tensor:
    """Columns [C, M−1] of every anchor's references but itself."""
    own = torch.arange(self_start, self_start + shape[0], device=device)[:, None]
    column = torch.arange(shape[1] - 1, device=device)[None, :]
    return column + (column >= own)


def penalty_slope(residual: Tensor, kind: str) -> Tensor:
    """ℓ′(residual)."""
    if kind == "squared":
        return 2 * residual
    if kind == "absolute":
        return residual.sign()
    return residual.clamp(-reference.HUBER_DELTA, reference.HUBER_DELTA)


class ReferenceBackend(StagewiseBackend):
    """The direct formulas of reference.py: O(m²) a row, for tests and for reading."""

    name = "reference"

    def obstacle(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Runs anywhere."""
        return None

    def hard_rank(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """See `StagewiseBackend`."""
        return reference.hard_rank(x, keep=keep)

    def soft_rank(
        self, x: Tensor, options: RankOptions, with_grad: bool, keep: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `StagewiseBackend`; its backward starts from x."""
        rank = reference.soft_rank(
            x, options.temperature, options.relaxation, options.scale, keep=keep
        )
        return rank, torch.zeros_like(x) if with_grad else x.new_empty(0)

    def soft_rank_backward(
        self,
        grad_rank: Tensor,
        x: Tensor,
        density: Tensor,
        options: RankOptions,
        keep: Tensor | None = None,
    ) -> Tensor:
        """See `StagewiseBackend`; by explicit formula, since operators run below autograd."""
        if x.shape[1] == 0:
            return x.clone()
        keep = torch.ones_like(x, dtype=torch.bool) if keep is None else keep
        count = keep.sum(1, keepdim=True)
        x = torch.where(keep, x, 0)
        sigma, standard = torch.ones_like(count, dtype=x.dtype), torch.zeros_like(x)
        constant = count < 2
        if options.scale == "std":
            centred = torch.where(keep, x - x.sum(1, keepdim=True) / count.clamp(min=1), 0)
            low = torch.where(keep, x, torch.inf).amin(1, keepdim=True)
            constant = constant | ((x == low) | ~keep).all(1, keepdim=True)
            sigma = (centred.square().sum(1, keepdim=True) / count.clamp(min=1)).sqrt()
            standard = torch.where(constant, 0, centred / sigma)
        tau = options.temperature * sigma
        difference = x[:, :, None] - x[:, None, :]
        density = grid.relaxation_pdf(difference / tau[:, :, None], options.relaxation)
        slope = (grad_rank[:, :, None] - grad_rank[:, None, :]) * keep[:, None, :]
        grad = torch.where(keep, (slope * density).sum(2) / tau / (count - 1).clamp(min=1), 0)
        grad = grad - standard * (grad * standard).sum(1, keepdim=True) / count.clamp(min=1)
        grad = torch.where(constant, 0, grad)
        return torch.where(x.isfinite().all(1, keepdim=True), grad, torch.nan)


class TorchBackend(StagewiseBackend):
    """The grid method in PyTorch operators: fast on any device, no compiler needed."""

    name = "torch"
    working_bytes = 160

    def obstacle(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Runs anywhere."""
        return None

    def hard_rank(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """See `StagewiseBackend`."""
        return grid.hard_rank(x, keep)

    def soft_rank(
        self, x: Tensor, options: RankOptions, with_grad: bool, keep: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `StagewiseBackend`."""
        return grid.soft_rank(x, options, with_grad, keep)

    def soft_rank_backward(
        self,
        grad_rank: Tensor,
        x: Tensor,
        density: Tensor,
        options: RankOptions,
        keep: Tensor | None = None,
    ) -> Tensor:
        """See `StagewiseBackend`."""
        return grid.soft_rank_backward(grad_rank, x, density, options, keep)
