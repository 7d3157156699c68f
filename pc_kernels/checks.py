"""Checks of the tensors that users pass: each failure names the argument, what came, what may."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_FLOAT_NAMES = "float32, float64, bfloat16 or float16"


def one_of(argument: str, given: object, allowed: Sequence[object]) -> None:
    """Raises ValueError unless `given` is among `allowed`."""
    for choice in allowed:
        if given is choice or (given == choice and type(given) is type(choice)):
            return
    choices = ", ".join(repr(choice) for choice in allowed)
    raise ValueError(f"{argument} must be one of {choices}; got {given!r}")


def check_positive(argument: str, given: object) -> float:
    """`given` as a float if it is a finite number > 0; raises otherwise."""
    if isinstance(given, bool) or not isinstance(given, Real):
        raise TypeError(f"{argument} must be a number; got {type(given).__name__}")
    number = float(given)
    if not (number > 0 and math.isfinite(number)):
        raise ValueError(f"{argument} must be finite and > 0; got {given}")
    return number


def check_floating(argument: str, x: object) -> Tensor:
    """`x` if it is a dense floating-point tensor; raises TypeError otherwise.

    RuntimeError inside transforms that would give wrong results silently, or an obscure error.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{argument} must be a torch.Tensor; got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{argument} must be {_FLOAT_NAMES}; got {x.dtype}")
    if x.layout != torch.strided:
        raise TypeError(f"{argument} must be a dense tensor; got layout {x.layout}")
    if not torch.compiler.is_compiling() and _is_transformed(x):
        raise RuntimeError(
            f"{argument} comes from a torch.func transform (vmap, grad, jvp, ...) or forward-mode "
            "differentiation, which pc_kernels does not support: call it on plain tensors, with "
            "backward(), or use pc_kernels.reference"
        )
    return x


def _is_transformed(x: Tensor) -> bool:
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        return True
    dual = forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None
    return bool(dual)


def check_matrix(argument: str, x: object, meaning: str) -> Tensor:
    """`x` if it is a floating-point matrix; `meaning` says what its two dimensions are."""
    matrix = check_floating(argument, x)
    if matrix.dim() != 2:
        hint = "; see pc_kernels.pool_features" if matrix.dim() > 2 and "width" in meaning else ""
        raise ValueError(f"{argument} must be {meaning}; got shape {tuple(matrix.shape)}{hint}")
    return matrix


def check_same_device(**tensors: Tensor | None) -> None:
    """Raises unless all the tensors given are on one device."""
    present = {name: x.device for name, x in tensors.items() if x is not None}
    if len(set(present.values())) > 1:
        places = ", ".join(f"{name} on {device}" for name, device in present.items())
        raise ValueError(f"all tensors must be on one device; got {places}")


def check_features(
    student: object, teacher: object, student_refs: object, teacher_refs: object
) -> None:
    """Checks the features of a loss or a coherence: [A, Ds], [A, Dt], and [M, Ds], [M, Dt] or None."""
    s = check_matrix("student", student, "[anchors, width]")
    t = check_matrix("teacher", teacher, "[anchors, width]")
    if s.shape[0] != t.shape[0]:
        raise ValueError(
            f"student and teacher must hold the same inputs: got {s.shape[0]} and {t.shape[0]} rows"
        )
    if (student_refs is None) != (teacher_refs is None):
        missing = "student_refs" if student_refs is None else "teacher_refs"
        hint = "" if student_refs is None else " (student_refs, the third, are features: no labels)"
        raise ValueError(f"student_refs and teacher_refs go together; {missing} is missing{hint}")
    for name, x in (("student", s), ("teacher", t)):
        if x.shape[1] == 0:
            raise ValueError(f"{name} has no features: its shape is {tuple(x.shape)}")
    if student_refs is None:
        check_same_device(student=s, teacher=t)
        return
    s_refs = check_matrix("student_refs", student_refs, "[references, width]")
    t_refs = check_matrix("teacher_refs", teacher_refs, "[references, width]")
    if s_refs.shape[0] != t_refs.shape[0]:
        raise ValueError(
            "student_refs and teacher_refs must hold the same inputs: got "
            f"{s_refs.shape[0]} and {t_refs.shape[0]} rows"
        )
    for side, x, refs in (("student", s, s_refs), ("teacher", t, t_refs)):
        if x.shape[1] != refs.shape[1]:
            raise ValueError(
                f"{side} and {side}_refs must have the same width; got {x.shape[1]} and {refs.shape[1]}"
            )
    check_same_device(student=s, teacher=t, student_refs=s_refs, teacher_refs=t_refs)


def check_weighting(
    weights: object, pair_mask: object, anchors: int, references: int, device: torch.device
) -> None:
    """Checks anchors' weights [A] and a pair mask that broadcasts to [A, M]; each may be None."""
    if weights is not None:
        w = check_floating("weights", weights)
        if w.shape != (anchors,):
            raise ValueError(
                f"weights must hold one for each anchor, shape ({anchors},); got {tuple(w.shape)}"
            )
    if pair_mask is not None:
        if not isinstance(pair_mask, Tensor) or pair_mask.dtype != torch.bool:
            came = pair_mask.dtype if isinstance(pair_mask, Tensor) else type(pair_mask).__name__
            raise TypeError(
                f"pair_mask must be a bool tensor, True where a pair counts; got {came}"
            )
        shape = tuple(pair_mask.shape)
        if len(shape) != 2 or shape[0] not in (1, anchors) or shape[1] not in (1, references):
            raise ValueError(
                f"pair_mask must be [anchors, references], ({anchors}, {references}) or 1 in place "
                f"of either; got {shape}"
            )
    for name, x in (("weights", weights), ("pair_mask", pair_mask)):
        if isinstance(x, Tensor) and x.device != device:
            raise ValueError(f"all tensors must be on one device; got {name} on {x.device}")


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """What the kernels compute in: float64 if any input is, float32 otherwise."""
    for x in tensors:
        if x is not None and x.dtype == torch.float64:
            return torch.float64
    return torch.float32


def wide_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on devices that have no wider one."""
    return torch.float32 if device.type == "mps" else torch.float64


def first_order_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a backward that has no derivative: refuses `create_graph=True` instead of dropping it.

    (`once_differentiable` notices only where the incoming gradient requires one itself.)
    """

    @functools.wraps(backward)
    def refusing(*args: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "pc_kernels has no second derivatives: call backward or autograd.grad without "
                "create_graph=True, or use pc_kernels.reference, which has them"
            )
        return backward(*args)

    return refusing


def check_cutoffs(k: object) -> tuple[int, ...]:
    """`k` as a tuple of positive integers; raises otherwise."""
    values = tuple(k) if isinstance(k, Sequence) else (k,)
    if not values or any(isinstance(v, bool) or not isinstance(v, int) for v in values):
        raise TypeError(f"k must be an int or a sequence of ints; got {k!r}")
    if min(values) < 1:
        raise ValueError(f"k must be > 0; got {k!r}")
    return values


def check_retrieval(
    embeddings: object, labels: object, indices_tuple: object, ref_emb: object, ref_labels: object
) -> None:
    """Checks the arguments of a retrieval loss or metric."""
    if indices_tuple is not None:
        raise ValueError(
            "indices_tuple must be None: a miner's tuples mean nothing to a loss of whole rankings "
            f"(references go to ref_emb= and ref_labels=); got {type(indices_tuple).__name__}"
        )
    if (ref_emb is None) != (ref_labels is None):
        missing = "ref_emb" if ref_emb is None else "ref_labels"
        raise ValueError(f"ref_emb and ref_labels go together; {missing} is missing")
    x = check_matrix("embeddings", embeddings, "[batch, width]")
    _check_labels("labels", labels, "embeddings", x)
    if ref_emb is None:
        return
    refs = check_matrix("ref_emb", ref_emb, "[references, width]")
    _check_labels("ref_labels", ref_labels, "ref_emb", refs)
    check_same_device(embeddings=x, ref_emb=refs)
    if refs.shape[1] != x.shape[1]:
        raise ValueError(
            f"embeddings and ref_emb must have the same width; got {x.shape[1]} and {refs.shape[1]}"
        )


def _check_labels(argument: str, labels: object, of: str, x: Tensor) -> None:
    if not isinstance(labels, Tensor):
        raise TypeError(f"{argument} must be a torch.Tensor; got {type(labels).__name__}")
    if labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"{argument} must be integers; got {labels.dtype}")
    if labels.shape != x.shape[:1]:
        raise ValueError(
            f"{argument} must hold one for each of {of}, shape ({x.shape[0]},); got "
            f"{tuple(labels.shape)}"
        )
    check_same_device(**{argument: labels, of: x})
