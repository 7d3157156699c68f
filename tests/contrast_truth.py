"""The contrastive loss written down as its sources do, on stored logits, in whatever dtype comes.

InfoNCE: torch.nn.functional.cross_entropy. CLIP: the pseudocode of arXiv 2103.00020, figure 3, as in
openai/CLIP (clip/model.py has the logits) and mlfoundations/open_clip (src/open_clip/loss.py, ClipLoss).
SigLIP: google-research/big_vision (big_vision/trainers/proj/image_text/siglip.py). Distillation:
UMBCvision/CompRess and the SEED paper, arXiv 2101.04731, equation 3, less the teacher's entropy.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import pc_kernels


def unit(x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return torch.where(norm > 0, x / norm.clamp(min=1e-300), 0)


def info_nce(logits: Tensor) -> Tensor:
    """The cross-entropy, log(1 + Σ_{k≠i} exp(z_k − z_i)), with all digits where it is tiny."""
    own = torch.eye(*logits.shape, dtype=torch.bool)
    others = logits.masked_fill(own, -torch.inf)
    alone = (others == -torch.inf).all(1)
    margin = others.masked_fill(alone[:, None], 0).logsumexp(1) - logits[own]
    return torch.where(alone, 0, F.softplus(margin, threshold=40))


def clip(logits: Tensor) -> Tensor:
    square = logits[:, : len(logits)]
    return (info_nce(logits) + info_nce(square.T)) / 2


def siglip(logits: Tensor) -> Tensor:
    sign = 2 * torch.eye(*logits.shape, dtype=logits.dtype) - 1
    return -F.logsigmoid(sign * logits).nan_to_num(0).sum(1)


def distillation(logits: Tensor, target: Tensor) -> Tensor:
    log_p, log_t = logits.log_softmax(1), target.log_softmax(1)
    return (log_t.exp() * (log_t - log_p)).nan_to_num(0).sum(1)


def losses(
    queries: Tensor,
    keys: Tensor,
    key_refs: Tensor | None = None,
    *,
    targets: pc_kernels.SoftTargets | None = None,
    pair_mask: Tensor | None = None,
    seen: list[Tensor] | None = None,
    **options: object,
) -> Tensor:
    """L_i [A] of a batch in float64; the options are those of `pc_kernels.contrastive_loss`.

    To `seen` it adds the vectors of the queries and of all keys, and the logits, their products.
    """
    scale = options.get("logit_scale")
    if scale is None:
        scale = 1 / options.get("temperature", 0.07)
    of = unit if options.get("normalize", True) else (lambda x: x)

    def vectors(a: Tensor, *b: Tensor | None) -> list[Tensor]:
        return [of(a.double()), of(torch.cat([x.double() for x in b if x is not None]))]

    def masked(z: Tensor) -> Tensor:
        return z if pair_mask is None else z.masked_fill(~pair_mask, -torch.inf)

    points = vectors(queries, keys, key_refs)
    bias = options.get("bias")
    logits = points[0] @ points[1].T * scale + (0.0 if bias is None else bias)
    if seen is not None:
        seen += [*points, logits]
    logits = masked(logits)
    if targets is not None:
        own = (keys, key_refs) if targets.keys is None else (targets.keys, targets.key_refs)
        of_teacher = scale if targets.temperature is None else 1 / targets.temperature
        of_queries, of_keys = vectors(targets.queries, *own)
        target = of_queries @ of_keys.T * of_teacher
        return distillation(logits, masked(target.detach()))
    if options.get("form") == "sigmoid":
        return siglip(logits)
    return clip(logits) if options.get("symmetric") else info_nce(logits)
