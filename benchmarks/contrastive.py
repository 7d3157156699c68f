r"""The contrastive losses against their products alone, and against logits that are stored.

    python benchmarks/run.py contrastive            # some minutes on 2 cores
    python benchmarks/run.py contrastive --quick    # seconds: small sizes

A time is reported only if both give the same value and the same gradients, to `NEAR`. The floor is what
no implementation avoids: the products of logits and of both gradients, by `torch.mm` in chunks of rows
that stay in the cache, with which they are fastest. A second table has other libraries: rivals.py.
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
from torch.nn.functional import cross_entropy, kl_div, log_softmax, logsigmoid, normalize

import pc_kernels

NEAR = 1e-4
"""Relative, of the value and in norm of the gradients: float32 logits up to 14, rounded by 1e-6."""
TAU = 0.07
WIDTH = 128
CHUNK = 256
MOST_STORED = 16384
"""A batch whose logits, their softmax and their gradient are 3 GiB."""


def info_nce(q: Tensor, k: Tensor) -> Tensor:
    """Van den Oord et al. 2018, arXiv 1807.03748, Eq. 4."""
    logits = normalize(q) @ normalize(k).T / TAU
    return cross_entropy(logits, torch.arange(len(q)))


def clip(q: Tensor, k: Tensor) -> Tensor:
    """Radford et al. 2021, arXiv 2103.00020, Fig. 3."""
    logits, own = normalize(q) @ normalize(k).T / TAU, torch.arange(len(q))
    return (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2


def siglip(q: Tensor, k: Tensor) -> Tensor:
    """Zhai et al. 2023, arXiv 2303.15343, Algorithm 1."""
    logits = normalize(q) @ normalize(k).T * 10 - 10
    return -logsigmoid(logits * (2 * torch.eye(len(q)) - 1)).sum() / len(q)


def soft_targets(q: Tensor, k: Tensor) -> Tensor:
    """KL of the teacher's similarities among themselves, as in SEED, arXiv 2101.04731."""
    unit = normalize(k.detach())
    target = (unit @ unit.T / TAU).softmax(1)
    return kl_div(
        log_softmax(normalize(q) @ normalize(k).T / TAU, 1), target, reduction="batchmean"
    )


def ours_with_targets(q: Tensor, k: Tensor) -> Tensor:
    """`soft_targets`, streamed."""
    targets = pc_kernels.SoftTargets(k.detach())
    return pc_kernels.contrastive_loss(q, k, targets=targets, temperature=TAU)


Loss = Callable[[Tensor, Tensor], Tensor]


def streamed(**options: Any) -> Loss:
    """Ours."""
    return partial(pc_kernels.contrastive_loss, **options)


@dataclass(frozen=True)
class Case:
    """A loss at a size, its formula, and how many products it cannot do without."""

    name: str
    ours: Loss
    formula: Loss
    products: int = 3
    size: int = 4096

    def features(self) -> list[Tensor]:
        """Queries and keys that have something in common."""
        rng = torch.Generator().manual_seed(self.size)
        q = torch.randn(self.size, WIDTH, generator=rng)
        return [q, q + torch.randn(self.size, WIDTH, generator=rng)]


def step(loss: Loss, features: list[Tensor]) -> list[Tensor]:
    """Forward and backward: the value and the gradients."""
    leaves = [x.clone().requires_grad_() for x in features]
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def floor(products: int, features: list[Tensor]) -> None:
    """Logits, both gradients, and a fourth product of the first kind where a loss has one."""
    q, k = features
    to_keys = torch.zeros_like(k)
    for rows in q.split(CHUNK):
        logits = rows @ k.T
        for _ in range(products - 3):
            logits = rows @ k.T
        logits @ k
        to_keys.addmm_(logits.T, rows)


def prepare(case: Case, which: int) -> Callable[[], object]:
    """For a process that measures memory: our step, or the formula's."""
    return partial(step, (case.ours, case.formula)[which], case.features())


INFO_NCE = Case("InfoNCE", streamed(temperature=TAU), info_nce)
CLIP = Case("CLIP", streamed(temperature=TAU, symmetric=True), clip)
CASES = (
    INFO_NCE,
    Case("SigLIP", streamed(form="sigmoid", logit_scale=10.0, bias=-10.0), siglip),
    CLIP,
    Case(
        "CLIP, logits made twice",
        streamed(temperature=TAU, symmetric=True, chunk_bytes=8 << 20),
        clip,
        products=4,
    ),
    Case("soft targets", ours_with_targets, soft_targets, products=4),
    *(Case(c.name, c.ours, c.formula, size=16384) for c in (INFO_NCE, CLIP)),
    Case(INFO_NCE.name, INFO_NCE.ours, info_nce, size=65536),
)


def compare(case: Case, seconds: float) -> list[str]:
    """Times in turns; a formula that would store too much is not run."""
    features = case.features()
    stored = case.size <= MOST_STORED
    calls = {
        "ours": partial(step, case.ours, features),
        "floor": partial(floor, case.products, features),
    }
    if stored:
        calls["stored"] = partial(step, case.formula, features)
    first = {name: timed(call, CPU) for name, call in calls.items()}
    if stored:
        pairs = zip(first["ours"][1], first["stored"][1], strict=True)
        off = max(((a - b).norm() / b.norm()).item() for a, b in pairs)
        if not off <= NEAR:
            return [case.name, f"{case.size:,}", f"wrong: off by {off:.1e}", "", "", "", ""]
    middle = medians(calls, {name: taken for name, (taken, _) in first.items()}, seconds)
    shown = [mebibytes(prepare, case, i) for i in range(1 + stored)]
    against = f"{middle['stored'] / middle['ours']:.2f}" if "stored" in middle else ""
    times = [f"{middle['ours']:.3g}", f"{middle['ours'] / middle['floor']:.2f}", against]
    return [case.name, f"{case.size:,}", *times, shown[0], shown[1] if stored else ""]


def main(arguments: list[str]) -> None:
    """Prints the table."""
    columns = ["loss", "B", "seconds", "/ floor", "stored logits / ours", "MiB", "stored logits'"]
    print_table(arguments, "run.py contrastive", __doc__, columns, CASES, compare)


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
