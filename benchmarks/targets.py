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


def growth(results: Results, table: str, key: str) -> float | None:
    """The largest time at 2B in times of that at B, from B = 128 up to 16384."""
    steps = []
    for size in results.sizes:
        a, b = results.median(table, key, size), results.median(table, key, 2 * size)
        if a is not None and b is not None and 128 <= size <= 8192:
            steps.append(b / a)
    return max(steps, default=None)


def _gib(results: Results, table: str, key: str, size: int) -> float | None:
    row = results.find(table, key, size)
    return None if row is None or row.extra_bytes is None else row.extra_bytes / 2**30


def cpu_targets(results: Results, ours: str) -> list[Target]:
    """On a CPU."""
    loss, rank = ("loss", ours), ("rank", ours)
    direct, compiled, plain = (("loss", key) for key in ("eager", "compile", "torch"))
    to_floor = [(128, 3.5), (1024, 1.1), (4096, 1.0), (8192, 1.0)]
    large = results.find("large", ours, 65536)
    runs = None if large is None else float(large.status == "ok")
    compiled_rank = results.ratio(("rank", "compile"), rank, 1024)
    torchsort = results.ratio(("rank", "torchsort"), rank, 1024)
    return [
        *(
            Target(f"direct formula to whole loss, B={b}", results.ratio(direct, loss, b), 1, False)
            for b in (8, 32)
        ),
        Target("torch.compile to whole loss, B=128", results.ratio(compiled, loss, 128), 5, False),
        *(
            Target(f"whole loss to GEMM floor, B={b}", results.ratio(loss, FLOOR, b), goal)
            for b, goal in to_floor
        ),
        *(
            Target(f"`torch` backend to GEMM floor, B={b}", results.ratio(plain, FLOOR, b), 8)
            for b in (1024, 4096)
        ),
        Target("torch.compile to rank stage, B=1024", compiled_rank, 200, at_most=False),
        Target("torchsort to rank stage, B=1024", torchsort, 10, at_most=False),
        Target("largest growth of the whole loss from B to 2B", growth(results, "loss", ours), 4.4),
        Target("largest growth of the rank stage from B to 2B", growth(results, "rank", ours), 4.4),
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
