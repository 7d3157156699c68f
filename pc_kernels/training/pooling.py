"""What makes vectors of feature maps and of token sequences."""

from __future__ import annotations

from torch import Tensor

from ..checks import check_floating, one_of

POOLS = ("mean", "max", "first", "flatten")


def pool_features(x: Tensor, pool: str | None, name: str = "x") -> Tensor:
    """Features [B, width] of vectors, token sequences or feature maps.

    Args:
        x: [B, D], which stays as it is; tokens [B, T, D]; or maps [B, C, H, W] (or of any other number
            of positions after C).
        pool: "mean" or "max" over tokens or positions; "first": the first token, as a class token;
            "flatten": all of them side by side, so that distances compare position with position.
            None: x must be [B, D] already.
        name: what to call x in an error message.

    Raises:
        TypeError, ValueError: an argument is not what is said here; nothing is flattened unasked.
    """
    check_floating(name, x)
    if pool is not None:
        one_of("pool", pool, POOLS)
    shape = tuple(x.shape)
    if x.dim() == 2:
        return x
    if x.dim() < 2:
        raise ValueError(f"{name} must be [B, D], [B, T, D] or [B, C, H, W]; got shape {shape}")
    if pool is None:
        raise ValueError(f"{name} has shape {shape}: say how to pool it, by pool= one of {POOLS}")
    if pool == "flatten":
        return x.flatten(1)
    if pool == "first":
        if x.dim() != 3:
            raise ValueError(f"pool='first' takes tokens [B, T, D]; got {name} of shape {shape}")
        return x[:, 0]
    positions = (1,) if x.dim() == 3 else tuple(range(2, x.dim()))
    if any(shape[d] == 0 for d in positions):
        raise ValueError(f"{name} has nothing to pool: its shape is {shape}")
    return x.mean(positions) if pool == "mean" else x.amax(positions)
