"""What the numbers have to reach, and whether they do."""

from __future__ import annotations

from dataclasses import dataclass

from rows import Results

FLOOR = ("yardstick", "floor")


@dataclass(frozen=True)
class Target:
    """A line of the table of targets."""

    what: str
    value: float | None
    limit: float
    at_most: bool = True
    unit: str = "×"

    @property
    def verdict(self) -> str:
        """yes, no, or not measured."""
        if self.value is None:
            return "not measured"
        reached = self.value <= self.limit if self.at_most else self.value >= self.limit
        return "yes" if reached else "**no**"

    @property
    def goal(self) -> str:
        """The limit in words."""
        return f"{'≤' if self.at_most else '≥'} {self.limit:g}{self.unit}"

    @property
    def measured(self) -> str:
        """The value in words."""
        return "–" if self.value is None else f"{self.value:.3g}{self.unit}"


def growth(results: Results, key: str) -> float | None:
    """The largest time at 2B in times of that at B, of the whole loss, up to B = 16384."""
    steps = []
    for size in results.sizes:
        a, b = results.median("loss", key, size), results.median("loss", key, 2 * size)
        if a is not None and b is not None and 2 * size <= 16384:
            steps.append(b / a)
    return max(steps, default=None)


def _gib(results: Results, table: str, key: str, size: int) -> float | None:
    row = results.find(table, key, size)
    return None if row is None or row.extra_bytes is None else row.extra_bytes / 2**30


def cpu_targets(results: Results, ours: str) -> list[Target]:
    """On a CPU."""
    loss, rank = ("loss", ours), ("rank", ours)
    found = [
        Target(f"whole loss to GEMM floor, B={b}", results.ratio(loss, FLOOR, b), 1.75)
        for b in (1024, 4096)
    ]
    large = results.find("large", ours, 65536)
    runs = None if large is None else float(large.status == "ok")
    compiled = results.ratio(("rank", "compile"), rank, 1024)
    torchsort = results.ratio(("rank", "torchsort"), rank, 1024)
    return [
        *found,
        Target("torch.compile to rank stage, B=1024", compiled, 200, at_most=False),
        Target("torchsort to rank stage, B=1024", torchsort, 8, at_most=False),
        Target("largest growth of the whole loss from B to 2B", growth(results, ours), 4.4),
        Target("extra memory, B=16384", _gib(results, "loss", ours, 16384), 1, unit=" GiB"),
        Target("B=65536 runs", runs, 1, at_most=False, unit=""),
    ]


def gpu_targets(results: Results, ours: str) -> list[Target]:
    """On a GPU. The first is meant at widths of 512."""
    loss, rank = ("loss", ours), ("rank", ours)

    def over(peer: str, size: int) -> float | None:
        return results.ratio(("loss", peer), loss, size)

    torchsort = results.ratio(("rank", "torchsort"), rank, 2048)
    memory = _gib(results, "large", ours, 131072)
    return [
        Target("whole loss to GEMM floor, B=8192", results.ratio(loss, FLOOR, 8192), 2),
        *(Target(f"eager to whole loss, B={b}", over("eager", b), 3, False) for b in (128, 512)),
        *(
            Target(f"torch.compile to whole loss, B={b}", over("compile", b), goal, False)
            for b, goal in ((128, 1.5), (512, 1.5), (2048, 10), (8192, 40))
        ),
        Target("torchsort to rank stage, B=2048", torchsort, 10, at_most=False),
        Target("extra memory, B=131072", memory, 16, unit=" GiB"),
    ]
