r"""Values of the rivals that need a GPU, and Liger's gradients, by Triton's interpreter.

    TRITON_INTERPRET=1 python benchmarks/rivals_interpreted.py

Inf-CL refuses tensors that are not on a GPU, and its backward is partly assembly: its forward kernel, the
log-sum-exps of rows, is launched here directly. The kernels of cut-cross-entropy do not run interpreted.
"""

from __future__ import annotations

import sys

import contrastive
import triton
from rivals import RIVALS
from torch import Tensor
from torch.nn.functional import normalize

NEAR = 1e-5


def log_sum_exps(x: Tensor, w: Tensor) -> Tensor:
    """Of the rows of x wᵀ, by Inf-CL's kernel, with the blocks that it is launched with."""
    from inf_cl.flash import _prob_fwd_kernel

    rows, width, block = len(x), x.shape[1], 64
    grid, found = (triton.cdiv(rows, block), 1), x.new_empty(triton.cdiv(rows, 128) * 128)
    _prob_fwd_kernel[grid](
        x, w, found, 1, rows, len(w), width, BLOCK_M=block, BLOCK_N=block, num_warps=8, num_stages=1
    )
    return found[:rows]


def inf_cl(q: Tensor, k: Tensor) -> list[Tensor]:
    """InfoNCE of Inf-CL's log-sum-exps."""
    x, w = normalize(q) / contrastive.TAU, normalize(k)
    return [(log_sum_exps(x, w) - (x * w).sum(1)).mean()]


def main() -> None:
    """Prints what each is off by, and fails if it is wrong."""
    (liger,) = (rival for rival in RIVALS if rival.module == "liger_kernel")
    features = contrastive.Case("", contrastive.info_nce, contrastive.info_nce, size=150).features()
    found = {
        "Inf-CL": inf_cl(*features),
        "Liger": contrastive.step(lambda q, k: liger.loss(q, k, both=False), features),
    }
    wanted = contrastive.step(contrastive.info_nce, [x.double() for x in features])
    for name, results in found.items():
        off = [((a - b).norm() / b.norm()).item() for a, b in zip(results, wanted, strict=False)]
        print(name, *(f"{x:.1e}" for x in off))
        if not max(off) <= NEAR:
            sys.exit(f"{name} is off")


if __name__ == "__main__":
    main()
