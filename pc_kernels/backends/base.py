"""What a backend is: its stages."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..cdf_rows import CdfRows, sums_by_matrices
from ..dissimilarities.gram_rows import dissimilarities
from ..dissimilarities.row_maker import RowMaker
from ..dissimilarities.rows import Chunk, Pairs, Rows
from ..formulas import Projection, Relaxation
from ..pair_counts import PairCounts, pair_counts_by_sorting
from . import chain, contrast_rows, grid_method, projected
from .contrast_rows import ColumnSums, LogitRows

if TYPE_CHECKING:
    from ..recipe import Recipe
    from ..sweep import Batch


class Backend(RowMaker):
    """A way to compute the stages.

    The rank stages take `keep`, bool [N, m], contiguous, or None: where it is False the value is absent.
    It does not count in the ranks of the others, and its own rank and gradient are 0.
    """

    name: str
    working_bytes = chain.WORKING_BYTES
    """Working memory of `coherence_rows` for each pair of a chunk, beside the rows of dissimilarities."""
    chunk_rows = 1 << 30
    """Anchors beyond which a chunk gains nothing."""
    tile_bytes = 1 << 62
    """Rows of a chunk that had better go from one product to the next together."""
    whole_bytes: int | None = None
    """Up to which the rows of a batch that is its own reference stay together, where no `chunk_bytes`
    is given; None: its default."""

    def obstacle(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why tensors of this device and dtype cannot be computed on, or None."""
        raise NotImplementedError

    def serves(self, device: torch.device) -> bool:
        """Whether `auto` may choose it for this device, if there is no obstacle."""
        return True

    def working_bytes_of(self, recipe: Recipe) -> int:
        """Working memory that this recipe takes for each pair of a chunk."""
        return self.working_bytes

    def dissimilarity(self, rows: Rows) -> Tensor:
        """δ(i, j) [C, M] of a chunk, less offsets (see `Rows`); may reuse the memory of its values."""
        return dissimilarities(rows)

    def true_dissimilarity(self, rows: Rows) -> Tensor:
        """δ(i, j) with the rows' offsets, as `dissimilarity`.

        References beside a far anchor lose digits to its offset: enough to rank, not for a gradient.
        """
        if rows.gram is None:
            return rows.values
        gram = rows.gram._replace(offsets=torch.zeros_like(rows.gram.offsets))
        true = Rows(rows.values, rows.dissimilarity, gram)
        true.ready = rows.ready and self.straight(true)
        return self.dissimilarity(true)

    def hard_rank(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Mid-ranks of the rows of x [N, m]; a row with a NaN is NaN where it is kept."""
        raise NotImplementedError

    def pair_counts(self, x: Tensor, y: Tensor, offsets: Tensor) -> PairCounts:
        """How x and y [N] order the pairs of lists with these offsets [L + 1]; no NaN among them."""
        return pair_counts_by_sorting(x, y, offsets)

    def soft_rank(
        self, x: Tensor, recipe: Recipe, with_grad: bool, keep: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Soft ranks of the rows of x [N, m]; with_grad, what their backward needs, else empty.

        That is the density S1(j) = Σ_k φ((x_j − x_k)/τ) [N, m], or 0 in rows that go without. A row with
        a NaN or an infinity is NaN where it is kept. Here in plain PyTorch, for every relaxation.
        """
        return grid_method.soft_rank(x, recipe, with_grad, keep)

    def soft_rank_backward(
        self,
        grad_rank: Tensor,
        x: Tensor,
        density: Tensor,
        recipe: Recipe,
        keep: Tensor | None = None,
    ) -> Tensor:
        """The gradient in x [N, m] of ranks with gradient grad_rank [N, m]; plain PyTorch as well."""
        return grid_method.soft_rank_backward(grad_rank, x, density, recipe, keep)

    def soft_rank_pass(
        self, x: Tensor, recipe: Recipe, with_grad: bool, keep: Tensor | None = None
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Soft ranks, and what takes a gradient in them, with_grad, back to x."""
        rank, density = self.soft_rank(x, recipe, with_grad, keep)
        return rank, lambda grad: self.soft_rank_backward(grad, x, density, recipe, keep)

    def kernel_sums(self, rows: CdfRows, recipe: Recipe, kernels: tuple[str, ...]) -> list[Tensor]:
        """Σ_k w_k K((y_j − x_k)/τ) at the queries y, for each of these `formulas.KERNELS`.

        [W, N, n], or [W, Q] of lists; 0 where a query is absent, NaN in rows with a NaN or an infinity,
        in weights as well. Here in plain PyTorch, for every relaxation.
        """

        def sums(part: CdfRows) -> list[Tensor]:
            return grid_method.kernel_sums(part, recipe, kernels)

        return sums_by_matrices(rows, kernels, sums)

    def isotonic_blocks(self, s: Tensor, w: Tensor, kl: bool) -> Tensor:
        """The blocks of the isotonic regression of rows s and w [N, m], descending, in float64.

        Int64 [N, m], for each place the first of its block; see `reference.isotonic`.
        """
        return projected.isotonic_blocks(s, w, kl)

    def hard_rank_rows(self, teacher: Rows, pairs: Pairs) -> Rows:
        """A teacher's rows as its ranks, "ranked": 0 where absent, NaN in rows with a NaN or an infinity.

        They may reuse the memory of its values.
        """
        return chain.hard_rank_rows(self, teacher, pairs)

    def coherence_rows(self, chunk: Chunk, recipe: Recipe, with_grad: bool) -> Tensor:
        """Losses [C] of a chunk: all stages, one after the other or fused.

        With_grad, the student's rows are overwritten with V, the gradient of Σ_i weights_i L_i (see
        dissimilarities/gram_rows.py), or with ∂L/∂δ where they are given.
        """
        return chain.coherence_rows(self, chunk, recipe, with_grad)

    def sweep_at_once(
        self, batch: Batch, recipe: Recipe, with_grad: bool
    ) -> tuple[Tensor, list[Tensor]] | None:
        """The whole of `sweep`, if this backend has an operator for such a batch; else None."""
        return None

    def contrast_bytes(self, dtype: torch.dtype) -> int:
        """Working memory of the contrast stages for each pair of a chunk, beside the logits."""
        return contrast_rows.WORKING_ROWS * dtype.itemsize

    def contrast_columns(self, rows: LogitRows, sums: ColumnSums) -> None:
        """Adds a chunk's logits to the sums of their columns; what is absent may become −inf."""
        contrast_rows.contrast_columns(rows, sums)

    def contrast_rows(self, rows: LogitRows, weights: Tensor, with_grad: bool) -> Tensor:
        """Losses [C] of a chunk of C anchors; with_grad, the logits are overwritten with slopes.

        These are of Σ_i weights_i L_i, and what `rows.columns` adds. A row with a NaN or an infinity
        where it is kept is NaN.
        """
        return contrast_rows.contrast_rows(rows, weights, with_grad)


class FusedBackend(Backend):
    """A backend that fuses the chain for the row rules and the relaxations that its kernels know."""

    working_bytes = 0

    def knows(self, relaxation: Relaxation | Projection) -> bool:
        """Whether its kernels have this relaxation; by others it ranks in plain PyTorch."""
        on_grid = isinstance(relaxation, Relaxation) and relaxation.single is not None
        return on_grid and relaxation.code is not None

    def fuses(self, recipe: Recipe) -> bool:
        """Whether its kernels have the whole chain."""
        return recipe.rule.code is not None and self.knows(recipe.formula)

    def working_bytes_of(self, recipe: Recipe) -> int:
        """See `Backend`."""
        if self.fuses(recipe):
            return self.working_bytes
        return chain.WORKING_BYTES if self.knows(recipe.formula) else grid_method.WORKING_BYTES

    def fused_rows(self, chunk: Chunk, recipe: Recipe, with_grad: bool) -> Tensor:
        """`coherence_rows` in as few kernels as can be, where `fuses`."""
        raise NotImplementedError

    def coherence_rows(self, chunk: Chunk, recipe: Recipe, with_grad: bool) -> Tensor:
        """See `Backend`."""
        rows = self.fused_rows if self.fuses(recipe) else super().coherence_rows
        return rows(chunk, recipe, with_grad)
