"""`make gpu`: builds, tests, sanitizes and benchmarks on a machine with a GPU, in under ten minutes.

    python tests/gpu/run.py [--results DIR] [--seconds 540] [-- arguments of benchmarks/run.py]

Needs torch built for CUDA, nvcc for the cuda backend, and no network. Every step has its own process,
its own limit and its own log in the results' folder; a step that fails does not stop the others. A short
table comes last, and the exit status is 1 if a step failed, 2 if there is no GPU.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MATRIX = [sys.executable, "tests/gpu/matrix.py"]
SIZES = ["--sizes", "128", "512", "2048", "8192"]
BENCHMARKS = [*SIZES, "--student-dim", "512", "--teacher-dim", "512", "--max-seconds", "4"]


@dataclass
class Step:
    """A process, the share of the time left that it may take, and what makes it impossible."""

    name: str
    command: list[str]
    share: float
    obstacle: str | None = None
    environment: dict[str, str] | None = None


@dataclass
class Outcome:
    """A line of the table."""

    name: str
    verdict: str
    seconds: float


def sanitizer(tool: str) -> Step:
    """compute-sanitizer over a few small cases; it stops at nothing and reports by its exit status."""
    found = shutil.which("compute-sanitizer")
    command = [str(found), "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
    obstacle = None if found else "compute-sanitizer is not on PATH"
    return Step(tool, [*command, *MATRIX, "--quick"], 0.3, obstacle)


def steps(results: Path, benchmarks: list[str]) -> list[Step]:
    """In the order in which they run."""
    import torch

    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    build = {"TORCH_CUDA_ARCH_LIST": capability, "PC_KERNELS_CUDA": "1"}
    python = sys.executable
    report = results / "benchmarks"
    return [
        Step("build", [python, "setup.py", "build_ext", "--inplace"], 0.4, None, build),
        Step("info", [python, "-m", "pc_kernels.info"], 0.2),
        Step("tests", [*MATRIX, "--json", str(results / "tests.json")], 0.5),
        sanitizer("memcheck"),
        sanitizer("racecheck"),
        Step(
            "benchmarks",
            [python, "benchmarks/run.py", "--device", "cuda", "--out", str(report), *benchmarks],
            1.0,
        ),
    ]


def run(step: Step, results: Path, limit: float) -> Outcome:
    """Runs a step; its output goes to a log, and on failure its end to the terminal."""
    if step.obstacle is not None:
        return Outcome(step.name, f"skipped: {step.obstacle}", 0.0)
    log = results / f"{step.name}.log"
    started = time.monotonic()
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, **(step.environment or {})}
    with log.open("w") as output:
        try:
            status: int | None = subprocess.run(
                step.command,
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=limit,
            ).returncode
        except subprocess.TimeoutExpired:
            status = None
    seconds = time.monotonic() - started
    verdict = {0: "ok", None: f"stopped after {limit:.0f} s"}.get(status, f"failed ({status})")
    if verdict != "ok":
        print(f"--- the end of {log.name}:")
        print("\n".join(log.read_text(errors="replace").splitlines()[-15:]))
    return Outcome(step.name, verdict, seconds)


def no_gpu() -> str | None:
    """Why nothing can be run here, or None."""
    try:
        import torch
    except ImportError:
        return f"{sys.executable} has no torch"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not built for CUDA"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


def main() -> None:
    parser = argparse.ArgumentParser("run.py", description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "gpu")
    parser.add_argument("--seconds", type=float, default=540.0, help="for everything together")
    parser.add_argument("benchmarks", nargs="*", default=BENCHMARKS)
    options = parser.parse_args()
    reason = no_gpu()
    if reason is not None:
        print(f"make gpu: no GPU to run on: {reason}", file=sys.stderr)
        sys.exit(2)
    results = options.results.resolve()
    results.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + options.seconds
    outcomes = []
    for step in steps(results, options.benchmarks):
        print(f"{step.name} …", flush=True)
        left = end - time.monotonic()
        outcomes.append(run(step, results, max(1.0, step.share * left)))
    for name in ("info", "tests", "benchmarks"):
        log = results / f"{name}.log"
        if log.exists():
            print(f"\n--- {name}\n{log.read_text(errors='replace')[-3500:]}")
    print()
    lines = [f"{o.name:<12} {o.seconds:6.0f} s  {o.verdict}" for o in outcomes]
    (results / "summary.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    sys.exit(any(o.verdict != "ok" and not o.verdict.startswith("skipped") for o in outcomes))


if __name__ == "__main__":
    main()
