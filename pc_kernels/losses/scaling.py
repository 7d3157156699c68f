"""Features times a scale, over their norms: what makes logits of plain inner products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import extension_obstacle
from ..checks import first_order_only, wide_dtype
from ..ops import is_watched


def scaled(x: Tensor, scale: float | Tensor = 1.0, normalize: bool = True) -> Tensor:
    """Rows of x [n, D] times the scale, over their norms if so wished; zeros stay, without a gradient.

    Factors are float64, and so, in effect, is the multiplication: an error that all of a vector's
    components share would be one of its logits as well.

    Args:
        x: features of any magnitude, float32 or float64.
        scale: a number, or a tensor without dimensions, which gets a gradient.
        normalize: whether rows are divided by their norms.
    """
    if not normalize and isinstance(scale, float) and scale == 1.0:
        return x
    s = torch.as_tensor(scale, dtype=wide_dtype(x.device), device=x.device)
    return _Scaled.apply(x, s, normalize)


def factored(x: Tensor, scale: float | Tensor = 1.0, normalize: bool = True) -> Tensor:
    """`scaled` as two factors [n, D + 1]: the rows of x, and what each is to be multiplied by.

    The rows keep their digits, and so are as few parts of bfloat16 as they came in. They are brought near
    1 by powers of two, lest products over- or underflow.
    """
    with torch.no_grad():
        exponent = torch.frexp(x.abs().amax(1, keepdim=True)).exponent
        unit = torch.exp2(exponent.clamp(-120, 120).to(x.dtype))
    x, s = x / unit, torch.as_tensor(scale, dtype=wide_dtype(x.device), device=x.device)
    if normalize:
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=s.dtype)
        factor = torch.where(norm == 0, 0, s / torch.where(norm == 0, 1, norm))
    else:
        factor = s * unit
    return torch.cat([x, factor.to(x.dtype)], 1)


def _has_operator(x: Tensor) -> bool:
    """Whether the C++ extension may take these rows, in one pass: csrc/cpu/scaled.cpp."""
    fit = x.device.type == "cpu" and x.dtype == torch.float32 and x.dim() == 2
    return fit and not is_watched(x) and extension_obstacle() is None


class _Scaled(torch.autograd.Function):
    """y = s x/|x|, or y = s x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, s: Tensor, normalize: bool) -> Tensor:
        inverse = None
        if normalize and _has_operator(x):
            y, inverse = torch.ops.pc_kernels.cpu_scaled(x.contiguous(), float(s.detach()))
            ctx.save_for_backward(y, s, inverse)
            return y
        if normalize:
            norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=s.dtype)
            inverse = torch.where(norm == 0, 0, 1 / norm)
            nearly = inverse.clamp(max=torch.finfo(x.dtype).max).to(x.dtype)
            x = x * nearly  # in range, however large or small the features
            factor = torch.where(norm == 0, 0, s / (norm * nearly))
        else:
            factor = s
        high = factor.to(x.dtype)
        y = (x * high).addcmul_(x, (factor - high).to(x.dtype))
        ctx.save_for_backward(y, s, inverse)
        return y

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        y, s, inverse = ctx.saved_tensors
        if inverse is not None and _has_operator(grad):
            to_x, along = torch.ops.pc_kernels.cpu_scaled_backward(
                grad.contiguous(), y, inverse, float(s.detach())
            )
            return to_x, along.sum() / s if ctx.needs_input_grad[1] else None, None
        along = (grad * y).sum(1, keepdim=True, dtype=s.dtype)
        to_s = along.sum() / s if ctx.needs_input_grad[1] else None
        if inverse is None:
            return grad * s.to(y.dtype), to_s, None
        factor = (inverse * s).clamp(max=torch.finfo(y.dtype).max)
        to_x = (grad * factor.to(y.dtype)).addcmul_(y, (along * inverse / s).to(y.dtype), value=-1)
        return to_x, to_s, None
