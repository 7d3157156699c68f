"""Low frequencies of feature maps, token sequences and vectors: the same few numbers of any of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..checks import check_floating, compute_dtype, one_of

SQUARE = "square"


class Axis(NamedTuple):
    """An axis that is filtered: n positions become s numbers."""

    i: Tensor
    """[s, 1], int64: the rows of A."""
    j: Tensor
    """[n], int64: the positions."""
    s: int
    n: int
    sigma: float
    dtype: torch.dtype
    """Of A."""


def _average(axis: Axis) -> Tensor:
    i, j, s, n, _, dtype = axis
    inside = ((j >= i * n // s) & (j < -(-(i + 1) * n // s))).to(dtype)
    return inside / inside.sum(1, keepdim=True)


def _gaussian(axis: Axis) -> Tensor:
    i, j, s, n, sigma, dtype = axis
    twice = ((2 * j + 1) * s - (2 * i + 1) * n).to(dtype)  # 2s (j − c), exact
    return torch.softmax(-((twice / (2 * sigma * n)) ** 2) / 2, 1)


def _dct(axis: Axis) -> Tensor:
    i, j, _, n, _, dtype = axis
    angle = ((2 * j + 1) * i % (4 * n)).to(dtype) * (math.pi / (2 * n))  # below 2π: no digits lost
    square = ((1 + i.clamp(max=1)) * (i < n)).to(dtype) / n  # 1/n, then 2/n, and 0 from n on
    return square.sqrt() * torch.cos(angle)


FILTERS: dict[str, Callable[[Axis], Tensor]] = {
    "average": _average,
    "gaussian": _gaussian,
    "dct": _dct,
}
"""A of each kind, see `LowPass`."""


class LowPass(nn.Module):
    """The low frequencies of features at several scales, s×s numbers a channel at each.

    A CNN's maps, a transformer's or a mixer's tokens and vectors come out alike: s×s numbers are left of
    their positions, however many they had. So they can be compared, or projected by one layer for any
    size of image. After the "low-frequency components" of LFCC (arXiv 2405.18524), whose own filters are
    not known here.

    A filter is separable: with a matrix A [s, n] for an axis of n positions, channel X [H, W] becomes
    A_H X A_Wᵀ. Row i of A, n positions j:

    - "average": the mean over ⌊i n/s⌋ ≤ j < ⌈(i+1) n/s⌉, as `torch.nn.AdaptiveAvgPool2d`;
    - "gaussian": weights exp(−(j − c)²/2σ²), which sum to 1, around the middle c of cell i of s,
      σ = sigma · n/s;
    - "dct": the orthonormal DCT-II's frequency i, a_i cos(π i (2j + 1)/2n), and 0 for i ≥ n; the whole is
      `scipy.fft.dctn(norm="ortho")[:s, :s]`.

    Positions fewer than s are no error: "average" and "gaussian" repeat them, "dct" has no frequencies
    beyond their number.

    Example:
        >>> of_cnn = pc_kernels.LowPass("dct", (1, 4))
        >>> of_vit = pc_kernels.LowPass("dct", (1, 4), grid=(14, 14), class_tokens=1)
        >>> of_cnn(torch.randn(8, 64, 7, 7))[4].shape, of_vit(torch.randn(8, 197, 192))[4].shape
        (torch.Size([8, 1024]), torch.Size([8, 3072]))
    """

    def __init__(
        self,
        kind: str = "average",
        scales: Sequence[int] = (1, 2, 4),
        *,
        sigma: float = 0.5,
        grid: tuple[int, int] | str | None = None,
        class_tokens: int = 0,
    ) -> None:
        """Takes which filter, and how tokens lie.

        Args:
            kind: "average", "gaussian" or "dct".
            scales: s of each; different, all ≥ 1.
            sigma: of "gaussian", in cells, n/s positions each; 0.001 to 1000. So two networks whose maps
                have different sizes are filtered alike.
            grid: of tokens [B, T, D], in rows: (rows, columns), or "square", whose side follows from T.
                Maps and vectors do not need it; without it tokens are an error.
            class_tokens: how many tokens precede those of the grid and belong to no position (class,
                distillation and register tokens). They are left out.

        Raises:
            TypeError, ValueError: an argument is not what is said here.
        """
        super().__init__()
        one_of("kind", kind, tuple(FILTERS))
        if isinstance(scales, str) or not isinstance(scales, Sequence) or not scales:
            raise TypeError(f"scales must be a sequence of one int or more; got {scales!r}")
        if len(set(scales)) < len(scales):
            raise ValueError(f"scales must differ; got {tuple(scales)}")
        _check_sigma(sigma)
        if grid is not None and grid != SQUARE:
            if isinstance(grid, str) or not isinstance(grid, Sequence) or len(grid) != 2:
                raise TypeError(f"grid must be (rows, columns), {SQUARE!r} or None; got {grid!r}")
            grid = (_count("grid", grid[0], 1), _count("grid", grid[1], 1))
        self.kind = kind
        self.scales = tuple(_count("scales", scale, 1) for scale in scales)
        self.sigma = float(sigma)
        self.grid = grid
        self.class_tokens = _count("class_tokens", class_tokens, 0)

    def forward(self, x: Tensor, name: str = "x") -> dict[int, Tensor]:
        """The low frequencies.

        Args:
            x: maps [B, C, H, W], tokens [B, T, C], or vectors [B, C], which are maps of one position;
                float32, float64, bfloat16 or float16.
            name: what to call x in an error message.

        Returns:
            By scale s: [B, C·s·s], ordered by channel, row and column. Computed in float32, or in float64
            if x is, and left so. A NaN or an infinity makes all of its channel NaN.

        Raises:
            TypeError, ValueError: x is not what is said here, or does not fit the grid.
        """
        maps = self._as_maps(check_floating(name, x), name)
        rows, columns = maps.shape[2:]
        # All stays in full precision under autocast: the result is small, and what it loses is lost.
        with torch.autocast(x.device.type, enabled=False):
            maps = maps.to(compute_dtype(x))
            along = torch.cat([self._matrix(s, columns, maps) for s in self.scales])
            of_rows = (maps @ along.mT).split(self.scales, 3)  # maps are read once for all scales
            return {
                s: (part.mT @ self._matrix(s, rows, maps).mT).mT.flatten(1)
                for s, part in zip(self.scales, of_rows, strict=True)
            }

    def _as_maps(self, x: Tensor, name: str) -> Tensor:
        """Features as [B, C, H, W]."""
        shape = tuple(x.shape)
        if x.dim() == 4:
            if 0 in shape[2:]:
                raise ValueError(f"{name} has no positions: its shape is {shape}")
            return x
        if x.dim() == 2:
            return x[:, :, None, None]
        if x.dim() != 3:
            raise ValueError(f"{name} must be [B, C, H, W], [B, T, C] or [B, C]; got shape {shape}")
        positions = shape[1] - self.class_tokens
        if self.grid is None:
            raise ValueError(
                f"{name} has shape {shape}: say how its tokens lie, by grid=(rows, columns) or "
                f"{SQUARE!r}, and by class_tokens= how many come before"
            )
        rows, columns = (
            (_side(positions), _side(positions)) if isinstance(self.grid, str) else self.grid
        )
        if positions < 1 or rows * columns != positions:
            wanted = "a square" if self.grid == SQUARE else f"{rows}·{columns} tokens"
            raise ValueError(
                f"{name} has {shape[1]} tokens, which is not class_tokens={self.class_tokens} and "
                f"{wanted} (grid={self.grid!r})"
            )
        return x[:, self.class_tokens :].mT.unflatten(2, (rows, columns))

    def _matrix(self, scale: int, length: int, like: Tensor) -> Tensor:
        """A [scale, length]."""
        cells = torch.arange(scale, device=like.device)[:, None]
        positions = torch.arange(length, device=like.device)
        return FILTERS[self.kind](Axis(cells, positions, scale, length, self.sigma, like.dtype))

    def extra_repr(self) -> str:
        """The options, for printing."""
        sigma = f", sigma={self.sigma}" if self.kind == "gaussian" else ""
        tokens = f", grid={self.grid!r}, class_tokens={self.class_tokens}"
        return f"{self.kind!r}, {self.scales}{sigma}{tokens if self.grid else ''}"


def _side(square: int) -> int:
    """The least side whose square is no less; torch.compile traces no `math.isqrt`."""
    side = 0
    while side * side < square:
        side += 1
    return side


def _check_sigma(sigma: object) -> None:
    if isinstance(sigma, bool) or not isinstance(sigma, Real):
        raise TypeError(f"sigma must be a number; got {type(sigma).__name__}")
    if not 1e-3 <= float(sigma) <= 1e3:
        raise ValueError(f"sigma must be between 0.001 and 1000; got {sigma}")


def _count(argument: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{argument} must be an int; got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{argument} must be at least {least}; got {value}")
    return value
