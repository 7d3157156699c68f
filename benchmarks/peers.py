r"""The ranking losses against what their users run today, forward and backward.

    python benchmarks/run.py peers            # some 10 minutes on 2 cores
    python benchmarks/run.py peers --quick    # small sizes: does everything work?
    LAPSUM=folder python benchmarks/run.py peers    # with LapSum, a clone of github.com/gmum/LapSum

A time is reported only if both give the same value and the same gradient, to `NEAR`, but where another
library has another function. Formulas are in float32, as ours; what no formula's author does is said in
its label. Libraries take part where they are installed, LapSum's own C++ where it is found (its package
leaves it out). Results go to benchmarks/results/peers-*, and from there into docs/benchmarks.md.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import MagicMock

import machine
import peers_page
import torch
from family import CPU, parser_of, started
from measure import Failure, failure, plan_rounds, take_turns, timed, usage
from rows import Results, Row
from torch import Tensor

import pc_kernels

NEAR = 1e-3
"""Relative, of the value and in norm of the gradient: at τ = 0.01 the rounding of a similarity, 1e-7, is
1e-5 of a rank's argument, in either; and the formulas sum thousands of terms in float32."""
TAU = 0.01
RANK_TAU = 0.1
"""For ranks of normal values."""
Loss = Callable[[Tensor], Tensor]
K = (1, 2, 4, 8, 16)


class Problem(NamedTuple):
    """What is compared at one size."""

    data: Tensor
    labels: Tensor
    positives: Tensor
    """[B, P] of a batch of classes, the places of a query's; else empty."""


def batch(size: int, positives: int) -> Problem:
    """Embeddings [size, 128] of classes of `positives`, around their centres."""
    rng = torch.Generator().manual_seed(size)
    labels = torch.arange(size) // positives
    own = (labels * positives)[:, None] + torch.arange(positives)
    centres = torch.randn(size // positives + 1, 128, generator=rng)
    return Problem(centres[labels] + 2 * torch.randn(size, 128, generator=rng), labels, own)


def scores(size: int, grades: int) -> Problem:
    """A list of normal scores, and grades."""
    rng = torch.Generator().manual_seed(size)
    data = torch.randn(size, generator=rng)
    return Problem(data, torch.randint(0, grades, (size,), generator=rng), torch.empty(0))


def rows(size: int, count: int) -> Problem:
    """Rows of normal values."""
    rng = torch.Generator().manual_seed(size)
    return Problem(torch.randn(count, size, generator=rng), torch.empty(0), torch.empty(0))


def smooth_ap(x: Tensor, p: Problem) -> Tensor:
    """At the positives [B, P] alone: B²P sigmoids."""
    similarity = torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(x).T
    found = similarity.gather(1, p.positives)

    def place(among: Tensor) -> Tensor:
        return 0.5 + torch.sigmoid((among[:, None, :] - found[:, :, None]) / TAU).sum(2)

    return 1 - (place(found) / place(similarity)).mean()


def published_smooth_ap(x: Tensor, p: Problem) -> Tensor:
    """All B³ differences, and then the positives', as the authors' code goes."""
    unit = torch.nn.functional.normalize(x)
    similarity = unit @ unit.T
    places = 0.5 + torch.sigmoid((similarity[:, None, :] - similarity[:, :, None]) / TAU).sum(2)
    found = similarity.gather(1, p.positives)
    among = 0.5 + torch.sigmoid((found[:, None, :] - found[:, :, None]) / TAU).sum(2)
    return 1 - (among / places.gather(1, p.positives)).mean()


def metric_learning(x: Tensor, p: Problem) -> Tensor:
    """pytorch-metric-learning's, which is the paper's only where B is P²."""
    from pytorch_metric_learning.losses import SmoothAPLoss

    return SmoothAPLoss(temperature=TAU)(x, p.labels)


def recall_at_k(x: Tensor, p: Problem) -> Tensor:
    """A query at a time, as the authors' code goes: B loops of BP sigmoids."""
    unit = torch.nn.functional.normalize(x)
    total = x.new_zeros(())
    for query, own in enumerate(p.positives):
        similarity = unit @ unit[query]
        found = similarity[own[own != query]]
        place = 0.5 + torch.sigmoid((similarity[:, None] - found) / TAU).sum(0)
        recalls = [
            torch.sigmoid((c - place) / c).sum().clamp(max=c) / min(c, len(found)) for c in K
        ]
        total = total + 1 - torch.stack(recalls).mean()
    return total / len(x)


def ranknet(x: Tensor, p: Problem) -> Tensor:
    """All n² pairs."""
    above = p.labels[:, None] > p.labels[None, :]
    costs = torch.nn.functional.softplus(x[None, :] - x[:, None])
    return (costs * above).sum() / above.sum()


def approx_ndcg(x: Tensor, p: Problem) -> Tensor:
    """All n² pairs."""
    place = 0.5 + torch.sigmoid((x[None, :] - x[:, None]) / RANK_TAU).sum(1)
    gain = torch.exp2(p.labels.float()) - 1
    best = gain.sort(descending=True).values / torch.log2(2 + torch.arange(len(gain)))
    return 1 - (gain / torch.log2(1 + place)).sum() / best.sum()


def kendall(x: Tensor, p: Problem) -> Tensor:
    """All n² pairs."""
    above = p.labels[:, None] > p.labels[None, :]
    wrong = torch.sigmoid((x[None, :] - x[:, None]) / RANK_TAU)
    return 2 * (wrong * above).sum() / above.sum()


def auc(x: Tensor, p: Problem) -> Tensor:
    """All pairs of a positive and a negative."""
    return torch.sigmoid((x[p.labels == 0][None, :] - x[p.labels == 1][:, None]) / RANK_TAU).mean()


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


def allrank(loss: str) -> Callable[..., Tensor]:
    """One of its losses; what reads its data imports torchvision, which no loss needs."""
    for name in ("torchvision", "torchvision.transforms"):
        if name not in sys.modules and find_spec("torchvision") is None:
            sys.modules[name] = MagicMock()
    return getattr(import_module("allrank.models.losses"), loss)


def allrank_ndcg(x: Tensor, p: Problem) -> Tensor:
    """ApproxNDCG by allRank, which is ours less 1."""
    return 1 + allrank("approxNDCGLoss")(x[None], p.labels[None].float(), alpha=1 / RANK_TAU)


def allrank_ranknet(x: Tensor, p: Problem) -> Tensor:
    """RankNet by allRank, of pairs that are listed in Python."""
    return allrank("rankNet")(x[None], p.labels[None].float())


def keops_ndcg(x: Tensor, p: Problem) -> Tensor:
    """All n² pairs without storing them, by KeOps."""
    from pykeops.torch import LazyTensor

    column = x[:, None].contiguous() / RANK_TAU
    apart = LazyTensor(column[:, None, :]) - LazyTensor(column[None, :, :])
    place = 0.5 + (1 / (1 + apart.exp())).sum(1)[:, 0]
    gain = torch.exp2(p.labels.float()) - 1
    best = gain.sort(descending=True).values / torch.log2(2 + torch.arange(len(gain)))
    return 1 - (gain / torch.log2(1 + place)).sum() / best.sum()


Formula = Callable[[Tensor, Problem], Tensor]


@cache
def compiled(formula: Formula) -> Formula:
    """By torch.compile, for one shape."""
    return torch.compile(formula, dynamic=False)


def ours(loss: str, **options: Any) -> Formula:
    """A loss of ours."""
    module = getattr(pc_kernels, loss)(**options)
    return lambda x, p: module(x, p.labels == 1 if loss == "AUCLoss" else p.labels)


def our_ranks(relaxation: str) -> Formula:
    """Soft ranks of ours."""
    return lambda x, p: pc_kernels.soft_rank(x, RANK_TAU, relaxation)


@dataclass(frozen=True)
class Contender:
    """One way to compute a loss."""

    key: str
    label: str
    formula: Formula
    most: int = 1 << 30
    """The largest size it is tried at: beyond, it takes minutes, or more memory than most have."""
    needs: str | None = None
    """A module, or LAPSUM."""
    same: bool = True
    """Whether it computes the same function."""
    compiles: bool = False

    def call(self) -> Formula:
        """What is called."""
        return compiled(self.formula) if self.compiles else self.formula

    def obstacle(self, size: int) -> str | None:
        """Why it is not tried at this size."""
        if self.needs is not None and self.needs not in os.environ and not find_spec(self.needs):
            return "not installed"
        return "not tried" if size > self.most else None


@dataclass(frozen=True)
class Table:
    """A loss over sizes, and who computes it; the first contender is ours."""

    name: str
    axis: str
    sizes: tuple[int, ...]
    problem: Callable[[int], Problem]
    contenders: tuple[Contender, ...]
    double: bool = False
    """Ours is compared with theirs in float64: in float32 theirs may have lost the digits."""


def retrieval(positives: int, least: int, *contenders: Contender) -> Table:
    """Smooth-AP with so many positives."""
    sizes = tuple(size for size in (256, 1024, 2048, 4096, 16_384) if size >= least)
    mine = Contender("ours", "pc_kernels", ours("SmoothAPLoss"))
    name = f"Smooth-AP, {positives} positives"
    return Table(name, "B", sizes, partial(batch, positives=positives), (mine, *contenders))


AT_POSITIVES = Contender("eager", "B²P, at the positives alone", smooth_ap, 4096)
TABLES = (
    retrieval(
        4,
        256,
        AT_POSITIVES,
        replace(AT_POSITIVES, key="compile", label="torch.compile of it", most=2048, compiles=True),
        Contender("published", "B³, as published", published_smooth_ap, 256),
        Contender(
            "library",
            "pytorch-metric-learning 2.9 (another function)",
            metric_learning,
            256,
            "pytorch_metric_learning",
            same=False,
        ),
    ),
    retrieval(32, 2048, replace(AT_POSITIVES, most=2048)),
    Table(
        "Recall@k, 4 positives",
        "B",
        (1024, 4096, 16_384),
        partial(batch, positives=4),
        (
            Contender("ours", "pc_kernels", ours("RecallAtKLoss", k=K)),
            Contender("published", "a loop over queries, as published", recall_at_k, 4096),
        ),
    ),
    Table(
        "ApproxNDCG, 5 grades",
        "n",
        (1000, 10_000, 100_000),
        partial(scores, grades=5),
        (
            Contender("ours", "pc_kernels", ours("ApproxNDCGLoss", temperature=RANK_TAU)),
            Contender("eager", "n² formula", approx_ndcg, 10_000),
            Contender("compile", "torch.compile of it", approx_ndcg, 10_000, compiles=True),
            Contender("library", "allRank 1.4", allrank_ndcg, 10_000, "allrank"),
            Contender("keops", "KeOps 2.3", keops_ndcg, 100_000, "pykeops"),
        ),
    ),
    Table(
        "RankNet, 5 grades",
        "n",
        (1000, 10_000, 100_000),
        partial(scores, grades=5),
        (
            Contender("ours", "pc_kernels", ours("RankNetLoss")),
            Contender("eager", "n² formula", ranknet, 10_000),
            Contender("compile", "torch.compile of it", ranknet, 10_000, compiles=True),
            Contender("library", "allRank 1.4", allrank_ranknet, 1000, "allrank"),
        ),
    ),
    Table(
        "Kendall, n values",
        "n",
        (1000, 10_000, 100_000),
        partial(scores, grades=10_000),
        (
            Contender("ours", "pc_kernels", ours("KendallLoss", temperature=RANK_TAU)),
            Contender("eager", "n² formula", kendall, 10_000),
        ),
    ),
    Table(
        "AUC",
        "n",
        (10_000, 1_000_000, 10_000_000),
        partial(scores, grades=2),
        (
            Contender("ours", "pc_kernels", ours("AUCLoss", temperature=RANK_TAU)),
            Contender("eager", "n² formula", auc, 10_000),
        ),
    ),
    Table(
        "Ranks by projection, 512 rows",
        "m",
        (256, 1024, 4096),
        partial(rows, count=512),
        (
            Contender("ours", "pc_kernels", our_ranks("projection")),
            Contender(
                "torchsort",
                "torchsort 0.1.10",
                lambda x, p: torchsort_rank(x, RANK_TAU),
                needs="torchsort",
            ),
        ),
        double=True,
    ),
    Table(
        "Ranks by Laplace, 16 rows",
        "m",
        (256, 1024, 4096),
        partial(rows, count=16),
        (
            Contender("ours", "pc_kernels", our_ranks("laplace")),
            Contender("library", "LapSum", lambda x, p: LapSum.apply(x, RANK_TAU), needs="LAPSUM"),
        ),
        double=True,
    ),
)


def step(formula: Formula, problem: Problem, data: Tensor) -> tuple[Tensor, Tensor]:
    """Forward and backward: the value and the gradient; of ranks, with the data as slopes."""
    leaf = data.clone().requires_grad_()
    value = formula(leaf, problem)
    value.backward(None if value.dim() == 0 else data.flip(1))
    return value.detach(), leaf.grad


def prepare(table: int, contender: int, size: int) -> Callable[[], object]:
    """For a process that measures memory: a step, after one of a compiler's at the same size."""
    chosen, problem = TABLES[table].contenders[contender], TABLES[table].problem(size)
    call = partial(step, chosen.call(), problem, problem.data)
    if chosen.compiles or chosen.key == "keops":
        call()
    return call


def first_run(
    table: Table, contender: Contender, problem: Problem, mine: tuple[Tensor, Tensor] | None
) -> tuple[float, tuple[Tensor, Tensor], dict[str, float]]:
    """Seconds and results of a contender, and by how much they are off ours, relatively."""
    call = partial(step, contender.call(), problem, problem.data)
    if contender.compiles or contender.key == "keops":
        call()
    seconds, found = timed(call, CPU)
    if mine is None or not contender.same:
        return seconds, found, {}
    wanted = step(contender.formula, problem, problem.data.double()) if table.double else found
    pairs = zip(("value", "gradient"), mine, wanted, strict=True)
    return seconds, found, {k: ((a - b).norm() / b.norm()).item() for k, a, b in pairs}


def measure(which: int, size: int, seconds: float) -> list[Row]:
    """The rows of a table at a size."""
    table = TABLES[which]
    problem, mine = table.problem(size), None
    rows, calls, rounds = [], {}, {}
    for place, contender in enumerate(table.contenders):
        row = Row(table.name, size, contender.key, contender.label)
        rows.append(row)
        row.status = contender.obstacle(size) or "ok"
        if row.status != "ok":
            continue
        try:
            first, found, row.errors = first_run(table, contender, problem, mine)
        except Exception as error:
            row.status, row.detail = vars(failure(error)).values()
            continue
        mine = found if mine is None else mine
        if not max(row.errors.values(), default=0.0) <= NEAR:
            row.status, row.detail = "wrong", f"off by {max(row.errors.values()):.1e}"
            continue
        used = usage(prepare, (which, place, size), CPU, 120)
        row.extra_bytes = None if isinstance(used, Failure) else used.bytes
        calls[contender.key] = partial(step, contender.call(), problem, problem.data)
        rounds[contender.key] = plan_rounds(first, seconds / 10, seconds)
    times = take_turns(calls, rounds, CPU)
    for row in rows:
        taken = times.get(row.key, [])
        row.seconds = [] if isinstance(taken, Failure) else taken
    return rows


def main(arguments: list[str]) -> None:
    """Measures, prints the tables, and writes the results and the page."""
    parser = parser_of("run.py peers", __doc__, "the smallest sizes, nothing written", 4.0)
    parser.add_argument("--sizes", type=int, help="only so many of each loss, the smallest")
    options = started(parser, arguments)
    about = machine.describe(CPU, torch.get_num_threads())
    found, axes = Results([]), {}
    for which, table in enumerate(TABLES):
        for size in table.sizes[: 1 if options.quick else options.sizes]:
            found.rows += measure(which, size, 0.1 if options.quick else options.max_seconds)
        axes[table.name] = table.axis
        print("\n".join(peers_page.table_of(found, table.name, table.axis)), flush=True)
        if not options.quick:
            peers_page.write_all(found, axes, about)


if __name__ == "__main__":
    main(sys.argv[1:])
