"""A measured row, and the numbers read off a set of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np


@dataclass
class Row:
    """A contender at a size: its times, or why there are none."""

    table: str
    size: int
    key: str
    label: str
    status: str = "ok"
    detail: str = ""
    seconds: list[float] = field(default_factory=list)
    extra_bytes: int | None = None
    launches: int | None = None
    """Kernels on a GPU; on a CPU operators that PyTorch's dispatcher sees."""
    host_seconds: float | None = None
    """Until a call on a GPU returns."""
    errors: dict[str, float] = field(default_factory=dict)

    def percentile(self, p: float) -> float | None:
        """Of the times, in seconds."""
        return float(np.percentile(self.seconds, p)) if self.seconds else None

    @property
    def median(self) -> float | None:
        """Seconds, or None where nothing was timed."""
        return self.percentile(50)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: everything, and the percentiles."""
        shown = {f"p{p}": self.percentile(p) for p in (20, 50, 80)}
        return asdict(self) | shown


class Results:
    """All rows of a run."""

    def __init__(self, rows: list[Row]) -> None:
        """Takes them in the order in which they are shown."""
        self.rows = rows

    @property
    def sizes(self) -> list[int]:
        """Ascending; without those of the table "large"."""
        return sorted({row.size for row in self.rows if row.table != "large"})

    def find(self, table: str, key: str, size: int) -> Row | None:
        """A row, if it is there."""
        wanted = (table, key, size)
        return next((r for r in self.rows if (r.table, r.key, r.size) == wanted), None)

    def median(self, table: str, key: str, size: int) -> float | None:
        """Its seconds, if it was timed."""
        row = self.find(table, key, size)
        return None if row is None else row.median

    def ratio(self, over: tuple[str, str], under: tuple[str, str], size: int) -> float | None:
        """The time of one (table, key) in times of another."""
        a, b = self.median(*over, size), self.median(*under, size)
        return None if a is None or b is None else a / b

    def to_floor(self, row: Row) -> float | None:
        """The time of a row in times of the GEMM floor of its size."""
        return self.ratio((row.table, row.key), ("yardstick", "floor"), row.size)

    def contenders(self, table: str) -> dict[str, str]:
        """Labels by key, yardsticks first."""
        return {r.key: r.label for r in self.rows if r.table in ("yardstick", table)}

    def cell(self, table: str, key: str, size: int) -> Row | None:
        """A row of a table, in which the yardsticks are too."""
        return self.find(table, key, size) or self.find("yardstick", key, size)
