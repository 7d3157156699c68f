"""The backends in plain PyTorch: `torch` and `reference`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import reference
from ..cdf_rows import CdfRows, sums_by_matrices
from ..formulas import Projection
from . import grid_method
from .base import Backend

if TYPE_CHECKING:
    from ..recipe import Recipe


class ReferenceBackend(Backend):
    """The direct formulas of reference.py: O(m²) a row, for tests and for reading."""

    name = "reference"

    def obstacle(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Runs anywhere."""
        return None

    def hard_rank(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """See `Backend`."""
        return reference.hard_rank(x, keep=keep)

    def soft_rank(
        self, x: Tensor, recipe: Recipe, with_grad: bool, keep: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `Backend`; its backward starts from x."""
        rank = reference.soft_rank(
            x, recipe.temperature, recipe.relaxation, recipe.scale, keep=keep
        )
        return rank, torch.zeros_like(x) if with_grad else x.new_empty(0)

    def soft_rank_backward(
        self,
        grad_rank: Tensor,
        x: Tensor,
        density: Tensor,
        recipe: Recipe,
        keep: Tensor | None = None,
    ) -> Tensor:
        """See `Backend`; by explicit formula, since operators run below autograd."""
        if x.shape[1] == 0:
            return x.clone()
        if isinstance(recipe.formula, Projection):  # by the blocks of its ranks
            _, blocks = grid_method.soft_rank(x, recipe, True, keep)
            return grid_method.soft_rank_backward(grad_rank, x, blocks, recipe, keep)
        keep = torch.ones_like(x, dtype=torch.bool) if keep is None else keep
        count = keep.sum(1, keepdim=True)
        x = torch.where(keep, x, 0)
        sigma, standard = torch.ones_like(count, dtype=x.dtype), torch.zeros_like(x)
        constant = count < 2
        if recipe.scale == "std":
            centred = torch.where(keep, x - x.sum(1, keepdim=True) / count.clamp(min=1), 0)
            low = torch.where(keep, x, torch.inf).amin(1, keepdim=True)
            constant = constant | ((x == low) | ~keep).all(1, keepdim=True)
            sigma = (centred.square().sum(1, keepdim=True) / count.clamp(min=1)).sqrt()
            standard = torch.where(constant, 0, centred / sigma)
        tau = recipe.temperature * sigma
        difference = x[:, :, None] - x[:, None, :]
        density = recipe.smooth_step.pdf(difference / tau[:, :, None])
        slope = (grad_rank[:, :, None] - grad_rank[:, None, :]) * keep[:, None, :]
        grad = torch.where(keep, (slope * density).sum(2) / tau / (count - 1).clamp(min=1), 0)
        grad = grad - standard * (grad * standard).sum(1, keepdim=True) / count.clamp(min=1)
        grad = torch.where(constant, 0, grad)
        grad = torch.where(x.isfinite().all(1, keepdim=True), grad, torch.nan)
        return torch.where(keep, grad, 0)

    def isotonic_blocks(self, s: Tensor, w: Tensor, kl: bool) -> Tensor:
        """See `Backend`; where the regression has one value."""
        value = reference.isotonic(s, w, kl)
        place = torch.arange(s.shape[1], device=s.device)
        starts = pad(~torch.isclose(value[:, 1:], value[:, :-1], 1e-12, 1e-12), (1, 0), value=True)
        return torch.where(starts, place, 0).cummax(1).values

    def kernel_sums(self, rows: CdfRows, recipe: Recipe, kernels: tuple[str, ...]) -> list[Tensor]:
        """See `Backend`."""
        formulas = [recipe.smooth_step.kernel(kernel) for kernel in kernels]

        def direct(part: CdfRows) -> list[Tensor]:
            return [reference.kernel_sums(part, f, recipe.temperature) for f in formulas]

        return sums_by_matrices(rows, kernels, direct)


class TorchBackend(Backend):
    """The grid method in PyTorch operators: fast on any device, no compiler needed."""

    name = "torch"
    working_bytes = grid_method.WORKING_BYTES

    def obstacle(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Runs anywhere."""
        return None

    def hard_rank(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """See `Backend`."""
        return grid_method.hard_rank(x, keep)

    def soft_rank_pass(
        self, x: Tensor, recipe: Recipe, with_grad: bool, keep: Tensor | None = None
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """See `Backend`; points that are placed once."""
        if x.numel() == 0:
            return super().soft_rank_pass(x, recipe, with_grad, keep)
        rows = grid_method.SoftRows(x, recipe, keep)
        rank, density = rows.ranks(with_grad)
        return rank, lambda grad: rows.backward(grad, density)
