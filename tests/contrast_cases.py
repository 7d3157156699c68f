"""Contrastive batches, and a backend's losses and gradients of them against contrast_truth.py.

Tolerances: a loss is within 1e-5 of itself, and what roundings of its logits by 4u make of it, a gradient
within 1e-5 in norm, against the formulas on the same float32 features. A logit of unit vectors at 1/τ = s
carries some s·u of rounding, u = 2^-24, and a probability as much of itself. Where a single pair decides
on a whole gradient, that is its error: from s = 32 on, a gradient is allowed 4su. Above s = 128 all is in
float64. The gradient of a temperature is Σ q·∂L/∂q, which may cancel, within an anchor too: it is also
allowed 16u of its terms, one a feature; that of a bias 16u of its own, one a pair.
So may what is left across x of the gradient of a vector x/|x|: it is allowed 16u of the whole, over |x|.
A divergence L of nearly equal distributions t and p is small beside its terms, Σ t |log t/p| < L + √(2L),
and beside what roundings of the logits by 4su make of it, Σ |t − p| 4su < √(2L) 4su (Pinsker): it is
allowed these.
Gradients that come in half precision are allowed its own rounding more.
"""

from __future__ import annotations

import math
from typing import Any

import contrast_truth
import torch
from compare import own_leaf
from torch import Generator, Tensor

from pc_kernels import SoftTargets, contrastive_loss

NEAR = 1e-5
U = 2.0**-24

KINDS: dict[str, dict[str, Any]] = {
    "InfoNCE": {},
    "CLIP": {"symmetric": True},
    "SigLIP": {"form": "sigmoid", "bias": -2.0},
    "distillation": {},
}


class Case:
    """A batch of A anchors of width D, and M more keys."""

    device = torch.device("cpu")
    """Where losses are computed; the truth is on the CPU."""
    dtype = torch.float32
    """Of the features as the loss sees them, which hold them exactly; in it come their gradients."""

    def __init__(
        self, rng: Generator, kind: str, sizes: tuple[int, int, int], **options: Any
    ) -> None:
        anchors, more, width = sizes
        self.options = {**KINDS[kind], **options}
        queries = torch.randn(anchors, width, generator=rng)
        keys = queries + 2 * torch.randn(anchors, width, generator=rng)
        self.features = [queries, keys]
        if more:
            self.features.append(torch.randn(more, width, generator=rng))
        if kind == "distillation":
            teacher = torch.randn(anchors, width + 3, generator=rng)
            refs = torch.randn(more, width + 3, generator=rng) if more else None
            self.options["targets"] = SoftTargets(teacher, teacher.flip(0), refs, 0.5)

    def mask(self, rng: Generator) -> Tensor:
        """Every anchor keeps its positive; the first has nothing else."""
        anchors, keys = len(self.features[0]), sum(map(len, self.features[1:]))
        mask = torch.rand(anchors, keys, generator=rng) < 0.6
        mask[0] = False
        mask.diagonal()[:anchors] = True
        return mask

    def check(
        self, backend: str, weights: Tensor | None = None, scale: float = 1.0, **options: Any
    ) -> None:
        """Loss and gradients against the formulas; `scale` multiplies the features."""
        options = {"temperature": 0.1, **self.options, **options}
        temperature = torch.tensor(options.pop("temperature"), requires_grad=True)
        options["temperature"] = temperature
        bias = options.get("bias")
        if bias is not None:
            options["bias"] = bias = torch.tensor(float(bias), requires_grad=True)
        leaves = [own_leaf(x * scale) for x in self.features]
        seen = [*leaves, temperature, *([] if bias is None else [bias])]
        loss = contrastive_loss(
            *(x.to(self.device, self.dtype) for x in leaves),
            weights=None if weights is None else weights.to(self.device),
            backend=backend,
            **{name: self._there(x) for name, x in options.items()},
        ).cpu()
        gradients = torch.autograd.grad(loss, seen)
        for name in ("chunk_bytes", "reduction", "products"):
            options.pop(name, None)
        temperature64 = temperature.detach().double().requires_grad_()
        options["temperature"] = temperature64
        if bias is not None:
            options["bias"] = bias64 = bias.detach().double().requires_grad_()
        leaves64 = [own_leaf(x.detach().double()) for x in leaves]
        points: list[Tensor] = []
        rows = contrast_truth.losses(*leaves64, seen=points, **options)
        w = torch.ones_like(rows) if weights is None else weights.double()
        wanted = (rows * w).sum() / w.sum()
        seen64 = [*leaves64, temperature64, *([] if bias is None else [bias64])]
        *wanted_gradients, of_queries, of_keys, of_logits = torch.autograd.grad(
            wanted, [*seen64, *points]
        )
        sharp = 1 / temperature64.item()
        floor = 1e-37 + 4 * U * (of_logits * points[2]).abs().sum()
        if (targets := options.get("targets")) is not None:
            of_both = max(sharp, 1 / (targets.temperature or 1 / sharp))
            floor += (8 + 4 * of_both) * U * ((2 * rows).sqrt() * w).sum() / w.sum()
        assert (loss - wanted).abs() <= NEAR * wanted.abs() + floor, (loss, wanted)
        near = max(NEAR, 4 * sharp * U) if sharp <= 128 else NEAR
        unit = torch.finfo(self.dtype)
        near += 0.0 if self.dtype == torch.float32 else unit.eps
        terms = (leaves64[0] * wanted_gradients[0]).abs().sum() / temperature64
        lost = [0.0] * len(leaves64)
        if options.get("normalize", True):
            rest = of_keys.split([len(x) for x in leaves64[1:]])
            lost = list(map(_across, leaves64, (of_queries, *rest)))
        names = [*"qkr"[: len(leaves64)], "T", "b"]
        for name, got, want, terms_lost in zip(
            names, gradients, wanted_gradients, [*lost, terms, of_logits.abs().sum()], strict=False
        ):
            floor = 16 * U * terms_lost
            floor += got.numel() ** 0.5 * unit.eps * unit.smallest_normal  # roundings to subnormals
            error = (got - want).norm()
            assert error <= near * want.norm() + floor + 1e-37, (name, error, want.norm())

    def _there(self, x: object) -> object:
        """An option, with its tensors on the device."""
        if isinstance(x, SoftTargets):
            return SoftTargets(*map(self._there, x))
        if isinstance(x, Tensor) and x.numel() > 1:
            return x.to(self.device, self.dtype if x.is_floating_point() else x.dtype)
        return x


def _across(x: Tensor, to_vectors: Tensor) -> Tensor:
    """The norm of what is projected across x, of the gradient in x/|x|."""
    return (to_vectors.norm(dim=1) / x.detach().norm(dim=1).clamp(min=1e-300)).norm()


def rounded(case: Case, dtype: torch.dtype) -> Case:
    """The case with features that half precision holds."""
    case.features = [x.to(dtype).float() for x in case.features]
    if (targets := case.options.get("targets")) is not None:
        features = (x if x is None else x.to(dtype).float() for x in targets[:3])
        case.options["targets"] = SoftTargets(*features, targets.temperature)
    return case


def check_formulas(
    backend: str, kind: str, rng: Generator, most: tuple[int, int, int], chunk_bytes: int
) -> None:
    """Of one anchor, a few, and as many as `most` says (anchors, references, width), in chunks."""
    for sizes in ((1, 0, 3), (7, 0, 4), most):
        case = Case(rng, kind, sizes)
        weights, mask = torch.rand(sizes[0], generator=rng), case.mask(rng)
        case.check(backend, chunk_bytes=chunk_bytes)
        case.check(backend, weights, pair_mask=mask)


def check_temperatures(
    backend: str, kind: str, rng: Generator, sizes: tuple[int, int, int]
) -> None:
    """From nearly a maximum to nearly a mean."""
    case = Case(rng, kind, sizes)
    for temperature in (1e-3, 0.01, 1.0, 100.0):
        case.check(backend, temperature=temperature)


def check_not_finite(backend: str, kind: str, rng: Generator) -> None:
    """An anchor that sees it is NaN, gradient and all; what a mask hides from it spreads nowhere."""
    case = Case(rng, kind, (12, 3, 4))
    q, k, refs = case.features
    options = {**case.options, "backend": backend, "reduction": "none"}
    mask = torch.ones(12, 15, dtype=torch.bool)
    mask[4], mask[:, 6] = False, False
    for bad in (math.nan, math.inf, -math.inf):
        k[6, 0] = 0.5
        q[4, 1] = bad
        losses = contrastive_loss(own_leaf(q), k, refs, **options)
        assert losses[4].isnan() and (kind == "CLIP" or losses.isnan().sum() == 1)
        k[6, 0] = bad
        leaf, keys = own_leaf(q), own_leaf(k)
        losses = contrastive_loss(leaf, keys, refs, pair_mask=mask, **options)
        assert losses.isfinite().all() and losses[4] == 0
        losses.sum().backward()
        assert leaf.grad[[0, 3, 7]].isfinite().all() and keys.grad[[0, 4, 11]].isfinite().all()
        seen = mask.clone()
        seen[2, 6] = True
        assert contrastive_loss(q, k, refs, pair_mask=seen, **options)[2].isnan()


def check_tiny(backend: str, kind: str) -> None:
    """log(1 + x) of x far below u: the positives are right, and the loss still has 7 digits."""
    case = Case(Generator(), kind, (24, 0, 24))
    case.features = [torch.eye(24), torch.eye(24) * 3]
    for temperature in (0.05, 0.045, 0.04):  # the truth itself has 7 digits left
        case.check(backend, temperature=temperature)
