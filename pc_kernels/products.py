"""Products of matrices: in float32, or in parts of bfloat16, which tensor cores multiply far faster.

A float32 number is the sum of three parts of bfloat16, X = X₁ + X₂ + X₃, each 2⁻⁸ of the one before.
A product of two parts is exact in float32, so X Y = Σ X_a Y_b up to how sums round, and those with
a + b > 4 are below the last digit. All that count are one product of wider matrices,
[X₁ X₂ X₃ X₁ X₂ X₁] [Y₃; Y₂; Y₁; Y₂; Y₁; Y₁]. Features that came in half precision are fewer parts:
bfloat16 one, float16 two. docs/method.md, "Products", has the errors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DEPTHS = {"ieee": 3, "bf16x6": 3, "bf16x3": 2}
"""Choices of products, with how many parts of a float32 matrix they count."""

PARTS = {torch.bfloat16: 1, torch.float16: 2}
"""Of how many parts of bfloat16 a number in half precision is the sum."""


@dataclass(frozen=True)
class Products:
    """How products of points, and of weights with points, are taken."""

    choice: str = "ieee"
    """One of `DEPTHS`."""
    parts: int = 0
    """Of points; 0: products are PyTorch's, in the dtype of the points."""

    @classmethod
    def of(cls, choice: str, features: list[Tensor], dtype: torch.dtype) -> Products:
        """For features that are computed with in `dtype`.

        The choice "ieee" takes parts where they lose nothing and there are tensor cores for them: of
        features in half precision.
        """
        if dtype != torch.float32:
            return cls(choice)
        if choice != "ieee":
            return cls(choice, DEPTHS[choice])
        half = all(x.dtype in PARTS for x in features) and _has_cores(features[0])
        return cls(choice, max(PARTS[x.dtype] for x in features) if half else 0)

    def of_float32(self) -> Products:
        """For points that were half precision and no longer are."""
        return Products() if self.choice == "ieee" else self

    @property
    def pair_bytes(self) -> int:
        """Working memory for each pair of a chunk: the weights' parts, and what is left of them."""
        return 4 + 2 * len(self._terms(DEPTHS[self.choice])) if self.parts else 0

    @property
    def whole_parts(self) -> int:
        """Of how many parts points have to be the whole sum; 0: of any number."""
        return self.parts if self.choice == "ieee" else 0

    def hold(self, x: Tensor) -> Tensor:
        """Where the parts of x are all of it, or need not be."""
        if not self.whole_parts:
            return torch.ones_like(x, dtype=torch.bool)
        return sum(_split(x, self.whole_parts), torch.zeros_like(x)) == x

    def of_pairs(self, x: Tensor, y: Tensor, out: Tensor) -> None:
        """Writes X Yᵀ [n, m] of points X [n, D] and Y [m, D]."""
        if not self.parts:
            torch.mm(x, y.T, out=out)
            return
        out.copy_(self._wide(x, self.parts, y.T))

    def weighed(self, v: Tensor, x: Tensor) -> Tensor:
        """V X [n, D] of weights V [n, m] and points X [m, D]."""
        return self._wide(v, DEPTHS[self.choice], x) if self.parts else v @ x

    def add(self, target: Tensor, v: Tensor, x: Tensor, times: float = 1.0) -> Tensor:
        """The target [n, D], and V X of weights V [n, m] and points X [m, D] so many times, in place."""
        if not self.parts:
            return target.addmm_(v, x, alpha=times)
        return target.add_(self.weighed(v, x), alpha=times)

    def _terms(self, of_left: int) -> list[tuple[int, int]]:
        """The pairs of parts whose products count; the smallest first, whose sums then round least."""
        depth = DEPTHS[self.choice]
        pairs = [(a, b) for a in range(of_left) for b in range(self.parts) if a + b < depth]
        return sorted(pairs, key=sum, reverse=True)

    def _wide(self, left: Tensor, of_left: int, right: Tensor) -> Tensor:
        terms = self._terms(of_left)
        lefts, rights = _split(left, of_left), _split(right, self.parts)
        wide = (
            torch.cat([lefts[a] for a, _ in terms], 1),
            torch.cat([rights[b] for _, b in terms], 0),
        )
        if left.is_cuda:
            return torch.mm(*wide, out_dtype=torch.float32)
        return wide[0].float() @ wide[1].float()  # the same numbers


IN_FLOAT32 = Products()


def _has_cores(x: Tensor) -> bool:
    """Whether PyTorch multiplies bfloat16 into float32 there."""
    return x.device.type == "cuda" and torch.version.hip is None


def _split(x: Tensor, count: int) -> list[Tensor]:
    """Parts of bfloat16 whose sum is x, as far as so many can be."""
    parts = []
    for _ in range(count):
        parts.append(x.to(torch.bfloat16))
        x = x - parts[-1]
    return parts
