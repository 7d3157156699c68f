r"""The ranking losses against their direct formulas as one would write them, forward and backward.

    python benchmarks/run.py peers            # some minutes on 2 cores
    python benchmarks/run.py peers --quick    # seconds: small sizes

A time is reported only if both give the same value and the same gradient, to `NEAR`. The formulas are in
float32, as ours; Smooth-AP's asks for ranks at the positives alone, which its authors' code does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from family import CPU, mebibytes, medians, print_table
from measure import timed
from torch import Tensor

import pc_kernels

NEAR = 1e-3
"""Relative, of the value and in norm of the gradient: at τ = 0.01 the rounding of a similarity, 1e-7, is
1e-5 of a rank's argument, in either; and the formulas sum thousands of terms in float32."""
TAU = 0.01
Loss = Callable[[Tensor], Tensor]


def smooth_ap(x: Tensor, positives: Tensor) -> Tensor:
    """At the positives [B, P] alone: B²P sigmoids."""
    similarity = torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(x).T
    found = similarity.gather(1, positives)

    def place(among: Tensor) -> Tensor:
        return 0.5 + torch.sigmoid((among[:, None, :] - found[:, :, None]) / TAU).sum(2)

    return 1 - (place(found) / place(similarity)).mean()


def recall_at_k(x: Tensor, positives: Tensor, k: tuple[int, ...]) -> Tensor:
    """A query at a time, as the authors' code goes: B loops of BP sigmoids."""
    unit = torch.nn.functional.normalize(x)
    total = x.new_zeros(())
    for query, own in enumerate(positives):
        similarity = unit @ unit[query]
        found = similarity[own[own != query]]
        place = 0.5 + torch.sigmoid((similarity[:, None] - found) / TAU).sum(0)
        recalls = [
            torch.sigmoid((c - place) / c).sum().clamp(max=c) / min(c, len(found)) for c in k
        ]
        total = total + 1 - torch.stack(recalls).mean()
    return total / len(x)


def ranknet(scores: Tensor, labels: Tensor) -> Tensor:
    """All n² pairs."""
    above = labels[:, None] > labels[None, :]
    costs = torch.nn.functional.softplus(scores[None, :] - scores[:, None])
    return (costs * above).sum() / above.sum()


def approx_ndcg(scores: Tensor, labels: Tensor, tau: float = 0.1) -> Tensor:
    """All n² pairs."""
    place = 0.5 + torch.sigmoid((scores[None, :] - scores[:, None]) / tau).sum(1)
    gain = torch.exp2(labels.float()) - 1
    best = gain.sort(descending=True).values / torch.log2(2 + torch.arange(len(gain)))
    return 1 - (gain / torch.log2(1 + place)).sum() / best.sum()


def kendall(scores: Tensor, labels: Tensor, tau: float = 0.1) -> Tensor:
    """All n² pairs."""
    above = labels[:, None] > labels[None, :]
    wrong = torch.sigmoid((scores[None, :] - scores[:, None]) / tau)
    return 2 * (wrong * above).sum() / above.sum()


def auc(scores: Tensor, labels: Tensor, tau: float = 0.1) -> Tensor:
    """All pairs of a positive and a negative."""
    return torch.sigmoid((scores[~labels][None, :] - scores[labels][:, None]) / tau).mean()


@dataclass(frozen=True)
class Peer:
    """A loss of ours and its formula, at one size."""

    name: str
    loss: str
    size: int
    options: tuple[tuple[str, Any], ...] = ()
    positives: int = 0
    grades: int = 2
    formula: Callable[..., Tensor] | None = None
    """None: it does not fit any machine."""

    def problem(self) -> tuple[Tensor, Loss, Loss | None]:
        """The input, our loss, and the formula's."""
        rng = torch.Generator().manual_seed(self.size)
        ours = getattr(pc_kernels, self.loss)(**dict(self.options))
        if self.positives:
            labels = torch.arange(self.size) // self.positives
            own = (labels * self.positives)[:, None] + torch.arange(self.positives)
            centres = torch.randn(self.size // self.positives + 1, 128, generator=rng)
            data = centres[labels] + 2 * torch.randn(self.size, 128, generator=rng)
            extra = (self.options[0][1],) if self.loss == "RecallAtKLoss" else ()
            given: tuple[Any, ...] = (own, *extra)
        else:
            data = torch.randn(self.size, generator=rng)
            labels = torch.randint(0, self.grades, (self.size,), generator=rng)
            labels = labels == 1 if self.loss == "AUCLoss" else labels
            given = (labels,)
        formula = None if self.formula is None else lambda x: self.formula(x, *given)
        return data, lambda x: ours(x, labels), formula


def step(loss: Loss, data: Tensor) -> tuple[Tensor, Tensor]:
    """Forward and backward: the value and the gradient."""
    leaf = data.clone().requires_grad_()
    value = loss(leaf)
    value.backward()
    return value.detach(), leaf.grad


def prepare(peer: Peer, which: int) -> Callable[[], object]:
    """For a process that measures memory: our step, or the formula's."""
    data, *losses = peer.problem()
    return partial(step, losses[which], data)


PEERS = (
    Peer("Smooth-AP, 4 positives", "SmoothAPLoss", 2048, positives=4, formula=smooth_ap),
    Peer("Smooth-AP, 32 positives", "SmoothAPLoss", 2048, positives=32, formula=smooth_ap),
    Peer(
        "Recall@k, 4 positives",
        "RecallAtKLoss",
        4096,
        (("k", (1, 2, 4, 8, 16)),),
        positives=4,
        formula=recall_at_k,
    ),
    Peer("RankNet, 5 grades", "RankNetLoss", 10_000, grades=5, formula=ranknet),
    Peer("ApproxNDCG, 5 grades", "ApproxNDCGLoss", 10_000, grades=5, formula=approx_ndcg),
    Peer("Kendall, 10,000 values", "KendallLoss", 10_000, grades=10_000, formula=kendall),
    Peer("AUC", "AUCLoss", 10_000, formula=auc),
    Peer("AUC", "AUCLoss", 10_000_000),
    Peer("Smooth-AP, 4 positives", "SmoothAPLoss", 16_384, positives=4),
)


def compare(peer: Peer, seconds: float) -> list[str]:
    """A row of the table."""
    data, *losses = peer.problem()
    steps = [partial(step, loss, data) for loss in losses if loss is not None]
    results = [timed(call, CPU) for call in steps]
    if len(results) > 1:
        (_, (value, grad)), (_, (wanted, wanted_grad)) = results
        off = max(
            abs(value / wanted - 1).item(),
            ((grad - wanted_grad).norm() / wanted_grad.norm()).item(),
        )
        if not off <= NEAR:
            return [peer.name, str(peer.size), f"wrong: off by {off:.1e}", "", "", "", ""]
    first = {i: taken for i, (taken, _) in enumerate(results)}
    middle = list(medians(dict(enumerate(steps)), first, seconds).values())
    shown = [mebibytes(prepare, peer, i) for i in range(len(steps))]
    ratio = f"{middle[1] / middle[0]:.0f}" if len(middle) > 1 else ""
    theirs = (f"{middle[1]:.3g}", shown[1]) if len(middle) > 1 else ("", "")
    return [peer.name, f"{peer.size:,}", f"{middle[0]:.3g}", theirs[0], ratio, shown[0], theirs[1]]


def main(arguments: list[str]) -> None:
    """Prints the table."""
    columns = ["loss", "size", "seconds", "formula's", "ratio", "MiB", "formula's"]
    print_table(arguments, "run.py peers", __doc__, columns, PEERS, compare)


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
