r"""The ranking losses against their direct formulas as one would write them, forward and backward.

    python benchmarks/run.py peers            # some minutes on 2 cores
    python benchmarks/run.py peers --quick    # seconds: small sizes
    LAPSUM=folder python benchmarks/run.py peers    # with LapSum, a clone of github.com/gmum/LapSum

A time is reported only if both give the same value and the same gradient, to `NEAR`. The formulas are in
float32, as ours; Smooth-AP's asks for ranks at the positives alone, which its authors' code does not.
Soft ranks are those of torchsort, where it is installed, and of LapSum's own C++, where it is found (its
package leaves them out); ours are compared with theirs in float64.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
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
RANK_TAU = 0.1
"""For ranks of normal values."""
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


@cache
def lapsum() -> Any:
    """LapSum's soft ranks, compiled from its sources."""
    from torch.utils.cpp_extension import load

    source = Path(os.environ["LAPSUM"], "lapsum", "lapsum", "rank", "cpu", "soft_rank.cpp")
    return load("lapsum_rank", [str(source)], extra_cflags=["-O3"])


class LapSum(torch.autograd.Function):
    """Its forward, O(m log m), and its backward, O(m²); the ranks as ours, in [0, 1]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, temperature: float) -> Tensor:
        """Soft ranks of rows."""
        ctx.save_for_backward(x)
        ctx.temperature = temperature
        return lapsum().forward(x, temperature) / (x.shape[1] - 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """In x."""
        (x,) = ctx.saved_tensors
        return lapsum().vjp(x, grad / (x.shape[1] - 1), ctx.temperature)[0], None


def torchsort_rank(x: Tensor, temperature: float) -> Tensor:
    """The ranks as ours, in [0, 1]."""
    from torchsort import soft_rank

    others = x.shape[1] - 1
    return (soft_rank(x, "l2", temperature / others) - 1) / others


@dataclass(frozen=True)
class RankPeer:
    """Soft ranks of `rows` rows of normal values, and those of another library."""

    name: str
    relaxation: str
    size: int
    rows: int
    formula: Callable[[Tensor, float], Tensor] | None

    def problem(self) -> tuple[Tensor, Loss, Loss | None]:
        """See `Peer`."""
        rng = torch.Generator().manual_seed(self.size)
        data = torch.randn(self.rows, self.size, generator=rng)
        formula = None if self.formula is None else lambda x: self.formula(x, RANK_TAU)
        return data, lambda x: pc_kernels.soft_rank(x, RANK_TAU, self.relaxation), formula


def step(loss: Loss, data: Tensor) -> tuple[Tensor, Tensor]:
    """Forward and backward: the value and the gradient; of ranks, with the data as slopes."""
    leaf = data.clone().requires_grad_()
    value = loss(leaf)
    value.backward(None if value.dim() == 0 else data.flip(1))
    return value.detach(), leaf.grad


def prepare(peer: Peer | RankPeer, which: int) -> Callable[[], object]:
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
    RankPeer(
        "Projection, 4096 rows; torchsort",
        "projection",
        4096,
        4096,
        torchsort_rank if find_spec("torchsort") else None,
    ),
    RankPeer(
        "Laplace, 64 rows; LapSum",
        "laplace",
        4096,
        64,
        LapSum.apply if "LAPSUM" in os.environ else None,
    ),
    RankPeer("Laplace, 4096 rows", "laplace", 4096, 4096, None),
)


def compare(peer: Peer | RankPeer, seconds: float) -> list[str]:
    """A row of the table."""
    data, *losses = peer.problem()
    steps = [partial(step, loss, data) for loss in losses if loss is not None]
    results = [timed(call, CPU) for call in steps]
    if len(results) > 1:
        value, grad = results[0][1]
        # Which values a projection pools is decided by differences that float32 may not have.
        exact = isinstance(peer, RankPeer)
        wanted, wanted_grad = step(losses[1], data.double()) if exact else results[1][1]
        off = max(
            ((value - wanted).norm() / wanted.norm()).item(),
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
