r"""The contrastive losses by other libraries: Inf-CL, and linear cross entropies with keys as weight.

The second table of `run.py contrastive`, on a GPU where there is one, which some rivals need; with

    pip install --no-build-isolation ".[rivals]"

all are there. What a rival's value and gradients are off by, relative to the formula on stored logits, is
shown beside its time. `rivals_interpreted.py` checks kernels of those that need a GPU without one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec

import contrastive
import torch
from family import mebibytes, medians, print_table
from measure import failure, timed
from torch import Tensor
from torch.nn.functional import normalize

Entropy = Callable[[Tensor, Tensor, Tensor], Tensor]
"""The mean cross entropy of logits x wᵀ, of x [A, D], w [K, D] and targets [A]."""
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WRONG = 0.01
"""A value that is off by more is no time's. Products in TF32 round logits up to 14 by 2⁻¹¹ of them."""


def by_torch(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    """PyTorch's own, in chunks of rows; from torch 2.13 on."""
    options = torch.nn.LinearCrossEntropyOptions()
    return torch.nn.functional.linear_cross_entropy(x, w, target, options=options)


def by_compiled(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    """Wijmans et al. 2024, arXiv 2411.09009: the form for torch.compile, which stores logits."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(x, w, target, impl="torch_compile")


def by_cut(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    """The same authors' Triton kernels, without leaving out small gradients."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(x, w, target, impl="cce", filter_eps=None)


def by_liger(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    """Hsu et al. 2024, arXiv 2410.10989: chunks of rows, a Triton kernel for the softmax."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(x, w, target)


def by_inf_cl(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    """Cheng et al. 2024, arXiv 2410.17243: tiles of logits in Triton kernels."""
    from inf_cl import cal_flash_loss

    return cal_flash_loss(x, w, target, head_dim=min(x.shape[1], 256)).mean()


@dataclass(frozen=True)
class Rival:
    """A library's linear cross entropy."""

    label: str
    entropy: Entropy
    module: str
    gpu: bool = False
    """Whether it has no other kernels."""

    def obstacle(self) -> str | None:
        """Why it cannot run here."""
        if find_spec(self.module) is None:
            return "not installed"
        if self.entropy is by_torch and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            return "needs torch 2.13"
        return "needs a GPU" if self.gpu and DEVICE.type != "cuda" else None

    def loss(self, q: Tensor, k: Tensor, both: bool) -> Tensor:
        """InfoNCE, or in both directions CLIP's."""
        x, w, own = (
            normalize(q) / contrastive.TAU,
            normalize(k),
            torch.arange(len(q), device=q.device),
        )
        rows = self.entropy(x, w, own)
        return (rows + self.entropy(w, x, own)) / 2 if both else rows


RIVALS = (
    Rival("torch, chunked linear_cross_entropy", by_torch, "torch"),
    Rival("cut-cross-entropy, torch_compile", by_compiled, "cut_cross_entropy"),
    Rival("cut-cross-entropy, Triton", by_cut, "cut_cross_entropy", gpu=True),
    Rival("Liger, fused linear cross entropy", by_liger, "liger_kernel", gpu=True),
    Rival("Inf-CL", by_inf_cl, "inf_cl", gpu=True),
)


@dataclass(frozen=True)
class Contest:
    """A rival at a loss and a size."""

    rival: Rival
    case: contrastive.Case
    size: int

    def features(self, size: int) -> list[Tensor]:
        """Queries and keys, where the rivals run."""
        return [x.to(DEVICE) for x in replace(self.case, size=size).features()]

    def steps(self, size: int) -> dict[str, Callable[[], list[Tensor]]]:
        """The calls that are compared."""
        theirs = partial(self.rival.loss, both=self.case.formula is contrastive.clip)
        losses = {"ours": self.case.ours, "theirs": theirs, "stored": self.case.formula}
        features = self.features(size)
        return {name: partial(contrastive.step, loss, features) for name, loss in losses.items()}


def prepare(contest: Contest) -> Callable[[], object]:
    """For a process that measures memory: a rival's step, after one at a small size."""
    contest.steps(64)["theirs"]()
    return contest.steps(contest.size)["theirs"]


def compare(contest: Contest, seconds: float) -> list[str]:
    """Times ours and a rival's in turns."""
    named = [contest.case.name, f"{contest.size:,}", contest.rival.label]
    obstacle = contest.rival.obstacle()
    if obstacle is not None:
        return [*named, obstacle, "", "", "", ""]
    steps = contest.steps(contest.size)
    try:
        results = {name: steps[name]() for name in steps}
    except Exception as error:
        return [*named, failure(error).detail, "", "", "", ""]
    pairs = list(zip(results["theirs"], results["stored"], strict=True))
    value, *gradients = (((a - b).norm() / b.norm()).item() for a, b in pairs)
    off = [f"{value:.0e}", f"{max(gradients):.0e}"]
    del results, pairs, steps["stored"]
    if not value <= WRONG:
        return [*named, "wrong", "", "", *off]
    first = {name: timed(call, DEVICE)[0] for name, call in steps.items()}
    middle = medians(steps, first, seconds, DEVICE)
    ratio = f"{middle['theirs'] / middle['ours']:.2f}"
    memory = mebibytes(prepare, contest, device=DEVICE)
    return [*named, f"{middle['theirs']:.3g}", ratio, memory, *off]


def contests() -> list[Contest]:
    """Every rival at every loss that it can compute."""
    cases = [contrastive.INFO_NCE, contrastive.CLIP]
    sizes = [(case, 4096) for case in cases] + [(contrastive.INFO_NCE, 16384)]
    return [Contest(rival, case, size) for case, size in sizes for rival in RIVALS]


def main(arguments: list[str]) -> None:
    """Prints the table."""
    columns = ["loss", "B", "by", "seconds", "/ ours", "MiB", "off: value", "gradients"]
    print_table(arguments, "run.py contrastive", __doc__, columns, contests(), compare)
