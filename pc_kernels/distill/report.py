"""What a run leaves behind: `results.json`, `table.md` and three plots."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import sklearn
import torch
from scipy.stats import t as student_t

import pc_kernels

from .data import Dataset
from .experiment import FLOOR, TEACHER, Config, Run, SeedResult
from .objectives import METHODS
from .plots import plot_curves, plot_neighbours, plot_ranks

TITLES = {TEACHER: "Teacher (trained with labels)", FLOOR: "Untrained student (floor)"}
TITLES |= {name: method.title for name, method in METHODS.items()}
COLUMNS = {"probe": "linear probe, %", "knn": "kNN, %"}
COLUMNS |= {"agreement": "coherence, %", "spearman": "rank correlation"}


def write(config: Config, data: Dataset, results: Sequence[SeedResult], seconds: float) -> str:
    """Writes all files to `<out>/<name>/` and returns the Markdown table with its verdict."""
    folder = Path(config.out) / config.name
    folder.mkdir(parents=True, exist_ok=True)
    markdown = table(results) + "\n\n" + verdict(results) + "\n"
    (folder / "table.md").write_text(markdown)
    summary = _plain(summarise(config, data, results, seconds))
    (folder / "results.json").write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n")
    plot_curves(folder / "curves.png", results, TITLES)
    plot_ranks(folder / "ranks.png", results[0], TITLES)
    plot_neighbours(folder / "neighbours.png", results[0], data.test, TITLES)
    return markdown


def table(results: Sequence[SeedResult]) -> str:
    """The test metrics as a Markdown table: mean ± sample standard deviation over seeds."""
    header = ["", "features", "parameters", *COLUMNS.values()]
    rows = [header, ["---", *["---:"] * (len(header) - 1)]]
    for name, first in results[0].runs.items():
        cells = [_cell(metric, _values(results, name, metric)) for metric in COLUMNS]
        rows.append([TITLES[name], str(first.width), f"{first.parameters:,}", *cells])
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    )


def verdict(results: Sequence[SeedResult]) -> str:
    """Says from the numbers, and nothing else, where PC stands against the other students."""
    others = [name for name in results[0].runs if name not in (TEACHER, "pc")]
    if "pc" not in results[0].runs:
        return "PC was not among the methods, so there is nothing to say about it."
    against = [f"against {TITLES[name]}, {_compare(results, name)}" for name in others]
    if len(results) == 1:
        how = "One seed has no spread: run several to judge differences."
    else:
        how = (
            f"Means ± standard deviations over {len(results)} seeds; differences are paired by "
            "seed, and on par if their 95% confidence interval (Student's t) holds 0."
        )
    return f"On the test images PC is, {'; '.join(against)}. {how}"


def summarise(
    config: Config, data: Dataset, results: Sequence[SeedResult], seconds: float
) -> dict[str, Any]:
    """Everything that is worth keeping of a run, for `results.json`."""
    splits = {"train": data.train, "val": data.val, "test": data.test}
    return {
        "config": asdict(config),
        "versions": {
            "pc_kernels": pc_kernels.__version__,
            "python": platform.python_version(),
            "scikit-learn": sklearn.__version__,
            "torch": torch.__version__,
        },
        "threads": torch.get_num_threads(),
        "data": {
            "classes": len(data.classes),
            "image_shape": list(data.train.images.shape[1:]),
            "images": {name: len(split.labels) for name, split in splits.items()},
        },
        "test": {
            name: {metric: _spread(_values(results, name, metric)) for metric in COLUMNS}
            for name in results[0].runs
        },
        "verdict": verdict(results),
        "seconds": seconds,
        "seeds": {
            str(result.seed): {name: _run(run) for name, run in result.runs.items()}
            for result in results
        },
    }


def _compare(results: Sequence[SeedResult], other: str) -> str:
    """`above in kNN (+1.2 ± 0.3 points), on par in ...`: PC less the other, paired by seed."""
    parts = []
    for metric in ("probe", "knn", "agreement"):
        pairs = zip(_values(results, "pc", metric), _values(results, other, metric), strict=True)
        spread = _spread([100 * (ours - theirs) for ours, theirs in pairs])
        difference, text, margin = spread["mean"], f"{spread['mean']:+.1f}", 0.0
        if spread["std"] is not None:
            text += f" ± {spread['std']:.1f}"
            count = len(results)
            margin = float(student_t.ppf(0.975, count - 1)) * spread["std"] / math.sqrt(count)
        word = "on par" if abs(difference) <= margin else "above" if difference > 0 else "below"
        parts.append(f"{word} in {COLUMNS[metric].removesuffix(', %')} ({text} points)")
    return ", ".join(parts)


def _values(results: Sequence[SeedResult], name: str, metric: str) -> list[float]:
    return [getattr(result.runs[name].test, metric) for result in results]


def _spread(values: list[float]) -> dict[str, Any]:
    """Mean and sample standard deviation, the latter None for one value."""
    return {"mean": mean(values), "std": stdev(values) if len(values) > 1 else None}


def _cell(metric: str, values: list[float]) -> str:
    scale, digits = (1, 3) if metric == "spearman" else (100, 1)
    spread = _spread([scale * value for value in values])
    text = f"{spread['mean']:.{digits}f}"
    return text if spread["std"] is None else f"{text} ± {spread['std']:.{digits}f}"


def _run(run: Run) -> dict[str, Any]:
    return asdict(run) | {"val": run.val._asdict(), "test": run.test._asdict()}


def _plain(value: Any) -> Any:
    """The same with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
