r"""Benchmarks of pc_kernels against its peers, each checked before it is timed.

    python benchmarks/run.py                  # about 12 minutes on 2 cores; needs a quiet machine
    python benchmarks/run.py --large          # and a batch of 65536 (131072 on a GPU)
    python benchmarks/run.py --device cuda
    python benchmarks/run.py --quick          # seconds: does everything work?
    python benchmarks/run.py peers            # the other ranking losses against their formulas
    python benchmarks/run.py contrastive      # the contrastive losses, their products, other libraries'

A contender that a size is too large for is shown as such, with what was predicted from its last
smaller size. Results go to benchmarks/results/: a Markdown report (printed too), CSV, JSON with the raw
times, and a PNG if matplotlib is installed. They are written after every size; --resume takes sizes that
are there already as they are.

torchsort is timed if it is installed. Its build fails where nvcc is on PATH and CUDA_HOME is not set,
so without a GPU hide nvcc from it; the compiler must be on the PATH that is left:

    env -u CUDA_HOME PATH=/usr/bin:/bin "$(command -v python)" -m pip install \
        --no-build-isolation --no-deps torchsort

With a GPU set CUDA_HOME instead, and leave PATH as it is. `torch.compile` needs a C++ compiler, and
Triton on a GPU.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no idle workers beside the timings

import contrastive
import large
import launches
import machine
import peers
import report
import rivals
import targets
import torch
from contenders import Contender, contenders, prepare
from files import write
from measure import (
    FEWEST_ROUNDS,
    Failure,
    capped_memory,
    failure,
    free_memory,
    plan_rounds,
    take_turns,
    usage,
    warm_up_processes,
)
from problem import Problem, Spec
from rows import Results, Row

SIZES = [8, 32, 128, 256, 512, 1024, 2048, 4096, 8192, 16384]
STARTED = time.monotonic()


@dataclass(frozen=True)
class Limits:
    """What a contender may take at a size."""

    seconds: float
    """Of all its timed runs."""
    bytes: float
    least_seconds: float = 1.0
    """For which it is timed at least, short of 200 runs."""

    def too_slow(self, seconds: float) -> bool:
        """Whether a run of so many seconds leaves no time for the fewest rounds."""
        return seconds * FEWEST_ROUNDS > self.seconds


class Admission:
    """Who may be timed at a size: predictions first, then a measuring process, then the gate."""

    def __init__(self, limits: Limits) -> None:
        """Remembers of every contender its last size, and what that took."""
        self._limits = limits
        self._seen: dict[tuple[str, str], tuple[int, float, int]] = {}

    def _predict(self, contender: Contender, size: int) -> Failure | None:
        if contender.obstacle is not None:
            return Failure(contender.obstacle)
        needed = contender.full_tensors * 4.0 * size**3
        seen = self._seen.get((contender.table, contender.key))
        if seen is not None:
            growth = (size / seen[0]) ** contender.order
            needed = max(needed, seen[2] * growth)
            if self._limits.too_slow(seen[1] * growth):
                return Failure("too slow", f"~{report.duration(seen[1] * growth)} predicted")
        if needed > self._limits.bytes:
            return Failure("out of memory", f"needs ~{report.amount(int(needed))}")
        return None

    def __call__(self, contender: Contender, problem: Problem) -> tuple[Row, float]:
        """A row that is "ok" or says why not, and the seconds of a run."""
        row = Row(contender.table, problem.size, contender.key, contender.label)
        refused = self._predict(contender, problem.size) or self._try(contender, problem, row)
        if isinstance(refused, Failure):
            row.status, row.detail = refused.status, refused.detail
            return row, 0.0
        return row, refused

    def _try(self, contender: Contender, problem: Problem, row: Row) -> float | Failure:
        job = (contender.key, contender.table, problem.spec)
        used = usage(prepare, job, problem.device, 60 + 2 * self._limits.seconds)
        if isinstance(used, Failure):
            return used
        row.extra_bytes = used.bytes
        try:
            check = contender.gate(contender.run, problem)
        except Exception as error:
            return failure(error)
        row.errors = {name: error for name, (error, _) in check.errors.items()}
        self._seen[contender.table, contender.key] = (problem.size, check.seconds, used.bytes)
        if not check.right:
            return Failure("wrong", str(check))
        if self._limits.too_slow(check.seconds):
            return Failure("too slow", f"{report.duration(check.seconds)} measured once")
        return check.seconds


def note(progress: str) -> None:
    """Tells whoever waits."""
    print(f"{time.monotonic() - STARTED:6.0f} s  {progress}", file=sys.stderr, flush=True)


def bench(found: list[Contender], spec: Spec, admit: Admission, limits: Limits) -> list[Row]:
    """All contenders at one size."""
    problem = Problem(spec)
    calls, rounds, rows = {}, {}, []
    for index, contender in enumerate(found):
        row, seconds = admit(contender, problem)
        rows.append(row)
        note(f"B={spec.size}, {row.table}, {row.label}: {row.status} {row.detail}")
        if row.status == "ok":
            calls[index] = partial(contender.run, problem, None)
            rounds[index] = plan_rounds(seconds, limits.least_seconds, limits.seconds)
    note(f"B={spec.size}, timing {len(calls)} contenders")
    for index, times in take_turns(calls, rounds, problem.device).items():
        row = rows[index]
        if isinstance(times, Failure):
            row.status, row.detail = times.status, times.detail
        else:
            row.seconds = times
            if problem.device.type == "cuda" or not found[index].compiles:  # no operators are left
                asked = launches.asked_by(calls[index], problem.device)
                row.launches, row.host_seconds = asked
    return rows


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("run.py", description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--sizes", type=int, nargs="+", default=SIZES, metavar="B")
    add(
        "--contenders",
        nargs="+",
        metavar="NAME",
        help="of floor, half, cdist, eager, compile, torchsort, and the backends; default: all",
    )
    add("--student-dim", type=int, default=128, metavar="Ds")
    add("--teacher-dim", type=int, default=512, metavar="Dt")
    add("--out", type=Path, default=machine.ROOT / "benchmarks" / "results")
    add("--max-seconds", type=float, default=45.0, help="for a contender's timed runs at a size")
    add("--memory-limit", type=float, metavar="GiB", help="default: 70%% of what is available")
    add("--threads", type=int, help="default: what torch picks")
    add("--quick", action="store_true", help="two small sizes, a few runs, nothing compiled")
    add("--large", action="store_true", help="one run at a batch of 65536 (GPU: 131072), D=128")
    add("--resume", action="store_true", help="go on with the results in --out")
    parsed = parser.parse_args(arguments)
    if min(parsed.sizes) < 4:
        parser.error("--sizes: a batch has at least 4 rows")
    if parsed.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    if parsed.quick and parsed.sizes is SIZES:
        parsed.sizes = [32, 64]
    return parsed


def choose(options: argparse.Namespace) -> list[Contender]:
    """The contenders that were asked for."""
    found = contenders(torch.device(options.device))
    keys = {c.key for c in found}
    if options.contenders is None:
        return [c for c in found if not (options.quick and c.compiles)]
    unknown = set(options.contenders) - keys
    if unknown:
        sys.exit(f"--contenders: no {', '.join(sorted(unknown))} among {', '.join(sorted(keys))}")
    return [c for c in found if c.key in options.contenders]


def measure_all(
    options: argparse.Namespace,
    found: list[Contender],
    rows: list[Row],
    keep: Callable[[Results], None],
) -> None:
    """Every contender at every size, and the large batch, after the rows that are there; keeps each."""
    device = torch.device(options.device)
    room = 0.7 * free_memory(device)
    if options.memory_limit is not None:
        room = options.memory_limit * 2**30
    limits = Limits(options.max_seconds, room, 0.02 if options.quick else 1.0)
    admit = Admission(limits)
    spec = Spec(0, options.student_dim, options.teacher_dim, options.device)
    for size in sorted(set(options.sizes) - set(Results(rows).sizes)):
        rows += bench(found, replace(spec, size=size), admit, limits)
        keep(Results(rows))
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if options.large and not any(row.table == "large" for row in rows):
        ours = next(c for c in contenders(device) if c.table == "loss" and c.obstacle is None)
        size, wide = large.SIZES[device.type], large.DIMENSION
        rows.append(large.run(ours, Spec(size, wide, wide, options.device)))
        keep(Results(rows))


def stem(options: argparse.Namespace) -> Path:
    """The results' path without its ending."""
    return options.out / machine.file_stem(torch.device(options.device), torch.get_num_threads())


def write_all(options: argparse.Namespace, about: dict, results: Results) -> None:
    """The report in all its forms."""
    device = torch.device(options.device)
    found = contenders(device)
    ours = next(c.key for c in found if c.table == "loss" and c.obstacle is None)
    goals = targets.gpu_targets if device.type == "cuda" else targets.cpu_targets
    reached = goals(results, ours)
    options.out.mkdir(parents=True, exist_ok=True)
    path = stem(options)
    write(path.with_suffix(".json"), report.as_json(results, reached, about))
    write(path.with_suffix(".csv"), report.as_csv(results))
    write(path.with_suffix(".md"), report.markdown(results, reached, about))


def command_line(options: argparse.Namespace, arguments: list[str]) -> str:
    """The command, without the folder that the results went to."""
    shown, out = [], str(options.out)
    for argument in arguments:
        if argument not in ("--out", out, f"--out={out}"):
            shown.append(argument)
    return " ".join(["python benchmarks/run.py", *shown])


def main(arguments: list[str] | None = None) -> None:
    """Runs the benchmarks."""
    arguments = sys.argv[1:] if arguments is None else arguments
    families = {"peers": [peers.main], "contrastive": [contrastive.main, rivals.main]}
    if arguments[:1] and arguments[0] in families:
        for print_table in families[arguments[0]]:
            print_table(arguments[1:])
        return
    options = parse(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    warm_up_processes()
    device = torch.device(options.device)
    about = machine.describe(device, torch.get_num_threads())
    about |= {"command": command_line(options, arguments)}
    about |= {"student_dim": options.student_dim, "teacher_dim": options.teacher_dim}
    path = stem(options)
    before = path.with_suffix(".json")
    rows = report.read_json(before) if options.resume and before.exists() else []
    with capped_memory(device):
        measure_all(options, choose(options), rows, partial(write_all, options, about))
    print(path.with_suffix(".md").read_text("utf-8"))
    try:
        from plot import draw
    except ImportError as error:
        note(f"no picture: {error}")
    else:
        draw(path.with_suffix(".png"), Results(rows), about)


if __name__ == "__main__":
    main()
