"""What a backend is: its stages."""

from __future__ import annotations

import torch
from torch import Tensor

from ..options import CoherenceOptions, RankOptions
from ..rows import RowMaker, Rows, dissimilarities


class Backend(RowMaker):
    """A way to compute the stages."""

    name: str
    working_bytes = 16
    """Working memory for each pair of a chunk, beside its two rows of dissimilarities."""
    chunk_rows = 1 << 30
    """Anchors beyond which a chunk gains nothing."""

    def obstacle(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why tensors of this device and dtype cannot be computed on, or None."""
        raise NotImplementedError

    def serves(self, device: torch.device) -> bool:
        """Whether `auto` may choose it for this device, if there is no obstacle."""
        return True

    def dissimilarity(self, rows: Rows) -> Tensor:
        """δ(i, j) [C, M] of a chunk, less offsets (see `Rows`); may reuse the memory of its values."""
        return dissimilarities(rows)

    def hard_rank(self, x: Tensor) -> Tensor:
        """Mid-ranks of the rows of x [N, m]."""
        raise NotImplementedError

    def soft_rank(self, x: Tensor, options: RankOptions, with_grad: bool) -> tuple[Tensor, Tensor]:
        """Soft ranks of the rows of x [N, m]; with_grad, what their backward needs, else empty.

        That is the density S1(j) = Σ_k φ((x_j − x_k)/τ) [N, m], or 0 in rows that go without.
        """
        raise NotImplementedError

    def soft_rank_backward(
        self, grad_rank: Tensor, x: Tensor, density: Tensor, options: RankOptions
    ) -> Tensor:
        """The gradient in x [N, m] of ranks with gradient grad_rank [N, m]."""
        raise NotImplementedError

    def hard_rank_rows(self, teacher: Rows, self_start: int | None, keep: Tensor | None) -> Rows:
        """A teacher's rows as its ranks, metric "ranked", for several students to share.

        They may reuse the memory of its values.
        """
        raise NotImplementedError

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
        """Losses [C] of a chunk of C anchors.

        Args:
            student: the student's rows; with_grad, their values are overwritten with V, the gradient
                of Σ_i weights_i L_i (see dissimilarity.py), or with ∂L/∂δ where the metric is "given".
            teacher: the teacher's rows, whose values may be overwritten unless they are ranks already.
            weights: one for each anchor, [C].
            options: relaxation, temperature, scale and penalty.
            self_start: anchor i is reference self_start + i, and left out; None: it is none of them.
            keep: bool [C, M], contiguous: where it is False the reference is absent; None: all are there.
            with_grad: whether V is wanted.
        """
        raise NotImplementedError
