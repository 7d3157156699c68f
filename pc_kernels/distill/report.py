"""What a comparison leaves behind: `results.json`, `report.md`, one `report.html`, and the plots."""

from __future__ import annotations

import base64
import html
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import sklearn
import torch
from scipy.stats import t as student_t

import pc_kernels

from .config import Sweep
from .data import Dataset
from .experiment import FLOOR, TEACHER, Results, Run
from .methods import OURS
from .plots import plot_curves, plot_neighbours, plot_ranks, plot_scores, plot_sweeps
from .storage import write_json, write_whole

METRICS = {"probe": "linear probe, %", "knn": "kNN, %", "map_r": "mAP@R, %"}
METRICS |= {"recall_1": "Recall@1, %", "agreement": "coherence, %", "spearman": "rank correlation"}
METRICS |= {"similarity": "similarity, %"}
COMPARED = ("probe", "knn", "map_r", "agreement", "similarity")
PLOTS = {
    "scores.png": "Test accuracy of each method: a dot a seed, the bar at their mean.",
    "curves.png": "Validation accuracy and coherence along training: means over seeds, with their "
    "last values; a band from the least to the greatest seed for PC.",
    "ranks.png": "The teacher's rank against the student's, of each test input seen from each "
    "other; first seed. A perfect student is the diagonal.",
}
SWEEPS = {
    "sweeps.png": "Validation accuracy against one option, all else as above, each value at its own "
    "best learning rate: a dot a seed, the line through their means. Grey is the untrained student.",
}
NEIGHBOURS = {
    "neighbours.png": "The test images nearest to three of them (black), by euclidean distance of the "
    "features, as each network sees it; green of the same class, orange of another; first seed.",
}


class Grid(NamedTuple):
    """A table: a heading and rows of equally many cells, the first of each a name."""

    head: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """Aligned, for reading as text too."""
        rows = [self.head, ["---", *["---:"] * (len(self.head) - 1)], *self.rows]
        widths = [max(len(row[i]) for row in rows) for i in range(len(self.head))]
        lines = (zip(row, widths, strict=True) for row in rows)
        return "\n".join(
            "| " + " | ".join(cell.ljust(width) for cell, width in line) + " |" for line in lines
        )

    def html(self) -> str:
        """As a table element."""
        lines = [_cells("th", self.head), *(_cells("td", row) for row in self.rows)]
        return "<table>\n" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "\n</table>"


def write(results: Results, data: Dataset, seconds: float) -> str:
    """Writes all files to `OUT/NAME/` and returns the Markdown report."""
    folder = Path(results.config.out) / results.config.name
    titles = titles_of(results)
    plot_scores(folder / "scores.png", results, titles)
    plot_curves(folder / "curves.png", results, titles)
    plot_ranks(folder / "ranks.png", results, titles)
    if results.sweeps:
        plot_sweeps(folder / "sweeps.png", results, titles)
    if data.test.inputs.dim() == 4:
        plot_neighbours(folder / "neighbours.png", results, data.test, titles)
    markdown, page = _markdown(results, data), _page(results, data, folder)
    write_whole(folder / "report.md", lambda file: file.write(markdown.encode()))
    write_whole(folder / "report.html", lambda file: file.write(page.encode()))
    write_json(folder / "results.json", summarise(results, data, seconds))
    return markdown


def plots_of(results: Results, data: Dataset) -> dict[str, str]:
    """Files of plots and their captions; neighbours are shown where the inputs are images."""
    images = data.test.inputs.dim() == 4
    return PLOTS | (SWEEPS if results.sweeps else {}) | (NEIGHBOURS if images else {})


def titles_of(results: Results) -> dict[str, str]:
    """Printed names of all rows."""
    titles = {TEACHER: "Teacher", FLOOR: "Untrained student"}
    return titles | {row.name: row.title for row in results.config.methods}


def table(results: Results) -> Grid:
    """Test metrics, mean ± sample standard deviation over seeds, and what training cost."""
    head = ["", "features", "learning rate", *METRICS.values(), "ms a step", "peak MiB"]
    rows = []
    for name, runs in results.runs.items():
        trained = bool(runs[0].curve)
        cells = [_cell(key, _values(runs, key)) for key in METRICS]
        peaks = [run.peak_mib for run in runs if run.peak_mib is not None]
        cells += [
            f"{1000 * mean(run.step_seconds for run in runs):.1f}" if trained else "",
            f"{max(peaks):.0f}" if peaks else "",
        ]
        rate = f"{runs[0].learning_rate:g}" if trained else ""
        rows.append([titles_of(results)[name], str(runs[0].width), rate, *cells])
    return Grid(head, rows)


def against_rivals(results: Results, ours: str) -> Grid:
    """A row's test metrics less each other student's, in points, paired by seed, with a word."""
    titles = titles_of(results)
    head = [f"{titles[ours]} against", *(METRICS[key].removesuffix(", %") for key in COMPARED)]
    others = [name for name in results.runs if name not in (TEACHER, ours)]
    return Grid(
        head,
        [
            [titles[name], *(_compared(results, ours, name, key) for key in COMPARED)]
            for name in others
        ],
    )


def sweep_table(results: Results, sweep: Sweep) -> Grid:
    """A line for each row and value: what the value was judged by, and how that is on test inputs."""
    splits, keys = ("val", "test"), ("probe", "knn")
    names = [f"{split}: {METRICS[key]}" for split in ("validation", "test") for key in keys]
    lines = []
    for name, of_values in results.sweeps[sweep.name].items():
        for value, runs in zip(sweep.values, of_values, strict=True):
            cells = [_cell(key, _values(runs, key, split)) for split in splits for key in keys]
            rate = f"{runs[0].learning_rate:g}"
            lines.append([titles_of(results)[name], f"{value}", rate, *cells])
    return Grid(["", sweep.option.replace("_", " "), "learning rate", *names], lines)


def summarise(results: Results, data: Dataset, seconds: float) -> dict[str, Any]:
    """Everything that is worth keeping of a comparison, for `results.json`."""
    config = asdict(results.config) | {
        "methods": {
            row.name: {"title": row.title, "source": row.method.source, **row.options}
            for row in results.config.methods
        }
    }
    return {
        "config": config,
        "versions": _versions(),
        "threads": torch.get_num_threads(),
        "data": {
            "classes": len(data.classes),
            "input_shape": list(data.train.inputs.shape[1:]),
            "inputs": {name: len(split.labels) for name, split in data.splits.items()},
        },
        "seconds": seconds,
        "tuning": {
            name: {f"{rate:g}": score for rate, score in scores.items()}
            for name, scores in results.tuning.items()
        },
        "test": {
            name: {key: _spread(_values(runs, key)) for key in METRICS}
            for name, runs in results.runs.items()
        },
        "runs": {name: [_as_dict(run) for run in runs] for name, runs in results.runs.items()},
        "sweeps": {
            name: {row: [list(map(_as_dict, runs)) for runs in of] for row, of in rows.items()}
            for name, rows in results.sweeps.items()
        },
    }


def _markdown(results: Results, data: Dataset) -> str:
    parts = [f"# {results.config.name}", results.config.caption.strip(), _setting(results, data)]
    parts.append(table(results).markdown())
    parts += [grid.markdown() for grid in _others(results)]
    parts.append(_reading(results))
    parts += [
        f"![{caption}]({name})\n\n{caption}" for name, caption in plots_of(results, data).items()
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _page(results: Results, data: Dataset, folder: Path) -> str:
    """One page with everything in it: it asks for no other file."""
    name = html.escape(results.config.name)
    figures = "\n".join(
        f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,'
        f'{base64.b64encode((folder / file).read_bytes()).decode()}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        for file, caption in plots_of(results, data).items()
    )
    text = [results.config.caption.strip(), _setting(results, data)]
    paragraphs = "\n".join(f"<p>{html.escape(part)}</p>" for part in text if part)
    tables = "\n".join(grid.html() for grid in (table(results), *_others(results)))
    sources = Grid(
        ["method", "source"], [[row.title, row.method.source] for row in results.config.methods]
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{name}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 72em; padding: 0 1em; }}
table {{ border-collapse: collapse; display: block; font-size: 14px; margin: 1.5em 0; overflow-x: auto; }}
th, td {{ border-bottom: 1px solid #ddd; padding: .3em .7em; text-align: right; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; }}
figure {{ margin: 2em 0; }}
img {{ max-width: 100%; }}
figcaption {{ color: #555; }}
</style>
</head>
<body>
<h1>{name}</h1>
{paragraphs}
{tables}
<p>{html.escape(_reading(results))}</p>
{figures}
{sources.html()}
</body>
</html>
"""


def _others(results: Results) -> list[Grid]:
    """The tables after the first: each row of perception coherence against the rest, and the sweeps."""
    rows = results.config.methods
    ours = [row.name for row in rows if row.method.make in OURS]
    rivals = len(ours) < len(rows)
    compared = [against_rivals(results, name) for name in ours if rivals]
    return compared + [sweep_table(results, sweep) for sweep in results.config.sweeps]


def _setting(results: Results, data: Dataset) -> str:
    config = results.config
    counts = ", ".join(f"{len(split.labels)} {name}" for name, split in data.splits.items())
    rates = ", ".join(f"{rate:g}" for rate in config.learning_rates)
    return (
        f"Teacher {config.teacher.partition(':')[0] or 'features'}, {results.runs[TEACHER][0].width} "
        f"features; student {config.student}, {results.runs[FLOOR][0].width} features, "
        f"{results.runs[FLOOR][0].parameters:,} parameters. {len(data.classes)} classes; inputs: "
        f"{counts}. {config.epochs} epochs in batches of {config.batch_size}; seeds "
        f"{', '.join(map(str, config.seeds))}; each method at the best of the learning rates {rates} "
        "on the validation inputs."
    )


def _reading(results: Results) -> str:
    if len(results.config.seeds) == 1:
        return "One seed has no spread: run several to judge differences."
    return (
        f"Means ± standard deviations over {len(results.config.seeds)} seeds; differences are paired "
        "by seed, and on par if their 95% confidence interval (Student's t) holds 0. Teacher's rows "
        "are its own features. Times and memory are of the machine at hand, whatever else it did."
    )


def _compared(results: Results, ours: str, other: str, metric: str) -> str:
    """`above (+1.2 ± 0.3)`: points of ours less the other's."""
    pairs = zip(
        _values(results.runs[ours], metric), _values(results.runs[other], metric), strict=True
    )
    spread = _spread([100 * (mine - theirs) for mine, theirs in pairs])
    difference, text, margin = spread["mean"], f"{spread['mean']:+.1f}", 0.0
    if spread["std"] is not None:
        text += f" ± {spread['std']:.1f}"
        count = len(results.config.seeds)
        margin = float(student_t.ppf(0.975, count - 1)) * spread["std"] / math.sqrt(count)
    word = "on par" if abs(difference) <= margin else "above" if difference > 0 else "below"
    return f"{word} ({text})"


def _values(runs: Sequence[Run], metric: str, split: str = "test") -> list[float]:
    return [getattr(getattr(run, split), metric) for run in runs]


def _spread(values: list[float]) -> dict[str, Any]:
    """Mean and sample standard deviation, the latter None for one value."""
    return {"mean": mean(values), "std": stdev(values) if len(values) > 1 else None}


def _cell(metric: str, values: list[float]) -> str:
    scale, digits = (1, 3) if metric == "spearman" else (100, 1)
    spread = _spread([scale * value for value in values])
    text = f"{spread['mean']:.{digits}f}"
    return text if spread["std"] is None else f"{text} ± {spread['std']:.{digits}f}"


def _cells(tag: str, row: list[str]) -> str:
    return "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)


def _as_dict(run: Run) -> dict[str, Any]:
    both = {split: metrics._asdict() for split, metrics in (("val", run.val), ("test", run.test))}
    return asdict(run) | both


def _versions() -> dict[str, str]:
    return {
        "pc_kernels": pc_kernels.__version__,
        "python": platform.python_version(),
        "scikit-learn": sklearn.__version__,
        "torch": torch.__version__,
    }
