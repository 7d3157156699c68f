r"""The contrastive losses against their products alone, and against logits that are stored.

    python benchmarks/run.py contrastive            # some minutes on 2 cores
    python benchmarks/run.py contrastive --quick    # seconds: small sizes

A time is reported only if both give the same value and the same gradients, to `NEAR`. The floor is what
no implementation avoids: the products of logits and of both gradients, by `torch.mm` in chunks of rows
that stay in the cache, with which they are fastest.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
from measure import Failure, plan_rounds, take_turns, timed, usage, warm_up_processes
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax, logsigmoid, normalize

import pc_kernels

NEAR = 1e-4
"""Relative, of the value and in norm of the gradients: float32 logits up to 14, rounded by 1e-6."""
TAU = 0.07
WIDTH = 128
CHUNK = 256
CPU = torch.device("cpu")
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
QUICK = 16
"""By what --quick divides sizes."""


@dataclass
class Row:
    """A line of the table."""

    case: Case
    cells: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """In Markdown."""
        return "| " + " | ".join([self.case.name, f"{self.case.size:,}", *self.cells]) + " |"


def compare(case: Case, seconds: float) -> Row:
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
            return Row(case, [f"wrong: off by {off:.1e}", "", "", "", ""])
    rounds = {name: plan_rounds(taken, seconds / 10, seconds) for name, (taken, _) in first.items()}
    times = take_turns(calls, rounds, CPU)
    middle = {name: median(t) for name, t in times.items() if not isinstance(t, Failure)}
    memory = [usage(prepare, (case, i), CPU, 600) for i in range(1 + stored)]
    shown = [u.status if isinstance(u, Failure) else f"{u.bytes / 2**20:.0f}" for u in memory]
    against = [f"{middle['stored'] / middle['ours']:.2f}"] if "stored" in middle else [""]
    ratio = f"{middle['ours'] / middle['floor']:.2f}"
    return Row(case, [f"{middle['ours']:.3g}", ratio, *against, shown[0], *(shown[1:] or [""])])


def main(arguments: list[str]) -> None:
    """Prints the table."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "run.py contrastive", description=__doc__, formatter_class=formatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="sizes 16 times smaller, a run of each"
    )
    parser.add_argument("--threads", type=int, help="default: what torch picks")
    parser.add_argument("--max-seconds", type=float, default=10.0, help="for a loss's timed runs")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    warm_up_processes()
    print(
        "| loss | B | seconds | / floor | stored logits / ours | MiB | stored logits' |\n|---|"
        + "---:|" * 6
    )
    for case in CASES:
        if options.quick:
            case = Case(**{**vars(case), "size": case.size // QUICK})
        print(compare(case, 0.1 if options.quick else options.max_seconds), flush=True)


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
