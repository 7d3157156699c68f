"""`make gpu`: builds, tests, sanitizes and benchmarks on a machine with a GPU, and loses no result.

    python tests/gpu/run.py [--results DIR] [--only STEP ...] [--seconds 540] [-- for benchmarks/run.py]

Needs torch built for CUDA, nvcc for the cuda backend, and no network. Every step has its own processes,
its own limit and its own log; a step that fails does not stop the others. What is measured is written at
once, into a folder of DIR named after the sources, and DIR/results.tar holds all of it. A step that
was stopped, or not reached, goes on where it was when the same command is given again; what has a result
is not measured again, unless --again asks for it.

A short table comes last. The exit status is 1 if a step failed or has no result yet, 2 if there is no
GPU. --device cpu is a rehearsal: small cases of the PyTorch backend, in seconds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = [ROOT, ROOT / "tests", ROOT / "benchmarks"]
sys.path.insert(0, str(ROOT / "benchmarks"))

from files import write  # noqa: E402

MATRIX = [sys.executable, "tests/gpu/matrix.py"]
LOST = 3
"""Exit status of the matrix where its process has lost the device, and a new one goes on."""
BENCHMARKED = ["--sizes", "128", "512", "2048", "8192", "--max-seconds", "4"]
BENCHMARKED += ["--student-dim", "512", "--teacher-dim", "512"]
REHEARSED = ["--quick", "--sizes", "16", "--contenders", "floor", "torch"]
REFUSED = r"not permitted|permission|not supported|nsufficient|Unable to|terminated before first"
"""What compute-sanitizer itself says where a container or a driver does not let it watch a process."""
LEAST_SECONDS = 10.0
"""What is left for a step that is still begun."""


@dataclass
class Step:
    """A command, the seconds it may take, and what makes it impossible."""

    name: str
    command: list[str]
    seconds: float
    obstacle: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    refusal: str | None = None
    """What it says where it is not allowed to run, which is no failure."""
    always: bool = False
    """Whether it leaves more than its result behind: what the other steps need."""


@dataclass
class Outcome:
    """A line of the table."""

    verdict: str
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        return self.verdict == "ok" or self.verdict.startswith("skipped")

    @property
    def final(self) -> bool:
        """Whether there is a result, good or bad."""
        return self.good or self.verdict.startswith("failed")


def matrix(device: str, backend: str, results: Path) -> Step:
    """All checks of a backend."""
    found = results / f"{backend}.json"
    command = [*MATRIX, "--device", device, "--backends", backend, "--json", str(found)]
    missing = backend == "triton" and find_spec("triton") is None
    quick = ["--quick"] if device == "cpu" else []
    return Step(backend, [*command, *quick], 240, "triton is not installed" if missing else None)


def sanitizer(tool: str) -> Step:
    """compute-sanitizer over a few small cases; it reports by its exit status.

    PyTorch's caching allocator would hide overruns inside its segments.
    """
    found = shutil.which("compute-sanitizer")
    command = [str(found), "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
    command += [*MATRIX, "--quick", "--backends", "cuda"]
    obstacle = None if found else "compute-sanitizer is not on PATH"
    bare = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Step(tool, command, 150, obstacle, bare, REFUSED)


def benchmarks(device: str, results: Path, arguments: list[str]) -> Step:
    """Our backends and their peers, size after size."""
    command = [sys.executable, "benchmarks/run.py", "--device", device, "--resume"]
    return Step("benchmarks", [*command, "--out", str(results / "benchmarks"), *arguments], 400)


def steps(device: str, results: Path, arguments: list[str]) -> list[Step]:
    """In the order in which they run."""
    python = sys.executable
    info = Step("info", [python, "-m", "pc_kernels.info"], 60, always=True)
    if device == "cpu":
        rehearsal = benchmarks(device, results, arguments or REHEARSED)
        return [info, matrix(device, "torch", results), rehearsal]
    import torch

    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    build = {"TORCH_CUDA_ARCH_LIST": capability, "PC_KERNELS_CUDA": "1"}
    command = [python, "setup.py", "build_ext", "--inplace"]
    return [
        Step("build", command, 300, environment=build, always=True),
        info,
        matrix(device, "cuda", results),
        benchmarks(device, results, arguments or BENCHMARKED),
        matrix(device, "triton", results),
        sanitizer("memcheck"),
        sanitizer("racecheck"),
    ]


def end_group(leader: int) -> None:
    """Ends a process and all that it has started."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return


def run_once(step: Step, log: Path, limit: float) -> int | None:
    """The exit status of a step's command, None if it took too long; leaves no process behind."""
    path = os.pathsep.join([*map(str, FOLDERS), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **step.environment}
    with log.open("a") as output:
        process = subprocess.Popen(
            step.command,
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            end_group(process.pid)
            process.wait()


def run(step: Step, results: Path, limit: float) -> Outcome:
    """Runs a step, for the matrix in as many processes as it takes; its output goes to a log."""
    if step.obstacle is not None:
        return Outcome(f"skipped: {step.obstacle}")
    log = results / f"{step.name}.log"
    limit = min(limit, step.seconds)
    started = time.monotonic()
    while (status := run_once(step, log, limit - (time.monotonic() - started))) == LOST:
        continue
    seconds = round(time.monotonic() - started, 1)
    said = log.read_text(errors="replace")
    if status == 0:
        return Outcome("ok", seconds)
    refusal = step.refusal and re.search(rf"^=+ (.*({step.refusal}).*)", said, re.MULTILINE)
    if status is not None and refusal and not re.search(r"ERROR SUMMARY: [1-9]", said):
        return Outcome(f"skipped: {refusal[1].strip()[:100]}", seconds)
    print("\n".join([f"--- the end of {log.name}:", *said.splitlines()[-15:]]))
    return Outcome(
        f"stopped after {limit:.0f} s" if status is None else f"failed ({status})", seconds
    )


def sources() -> Iterator[Path]:
    """What results depend on."""
    yield ROOT / "setup.py"
    for folder in ("csrc", "pc_kernels", "tests", "benchmarks"):
        for suffix in ("py", "h", "cpp", "cu", "cuh"):
            yield from sorted((ROOT / folder).rglob(f"*.{suffix}"))


def digest() -> str:
    """Of the sources: results of others are no results of these."""
    found = hashlib.sha256()
    for path in sources():
        found.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return found.hexdigest()[:12]


def archive(results: Path) -> None:
    """All results in one file."""
    partial = results / f"results.tar.{os.getpid()}"
    with tarfile.open(partial, "w") as tar:
        for path in sorted(results.iterdir()):
            if path.is_dir():
                tar.add(path, path.name)
    partial.replace(results / "results.tar")


class Table:
    """The outcomes, on disk after every step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "steps.json"
        self.outcomes: dict[str, Outcome] = {}
        if self.path.exists():
            read = json.loads(self.path.read_text())
            self.outcomes = {name: Outcome(**fields) for name, fields in read.items()}

    def put(self, name: str, outcome: Outcome) -> None:
        self.outcomes[name] = outcome
        shown = {name: asdict(outcome) for name, outcome in self.outcomes.items()}
        write(self.path, json.dumps(shown, indent=1))
        archive(self.folder.parent)

    def lines(self) -> list[str]:
        return [f"{n:<12} {o.seconds:6.0f} s  {o.verdict}" for n, o in self.outcomes.items()]


def take(wanted: list[Step], table: Table, end: float) -> None:
    """Runs the steps that have no result yet, as long as there is time."""
    for step in wanted:
        before = table.outcomes.get(step.name, Outcome("not reached"))
        left = end - time.monotonic()
        if before.final and not step.always:
            continue
        if left < LEAST_SECONDS:
            table.put(step.name, before)
            continue
        print(f"{step.name} …", flush=True)
        table.put(step.name, Outcome("stopped"))  # whatever ends this process
        outcome = run(step, table.folder, left)
        table.put(step.name, Outcome(outcome.verdict, round(before.seconds + outcome.seconds, 1)))


def forget(step: Step, results: Path) -> None:
    """Removes what a step has left."""
    for path in (results / f"{step.name}.log", results / f"{step.name}.json"):
        path.unlink(missing_ok=True)
    shutil.rmtree(results / step.name, ignore_errors=True)


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


def parse() -> argparse.Namespace:
    """The command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("run.py", description=__doc__, formatter_class=formatter)
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "gpu", metavar="DIR")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=float, default=540.0, help="for everything together")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="and what these need")
    parser.add_argument("--again", action="store_true", help="forget the results of these steps")
    parser.add_argument("benchmarks", nargs="*", help="arguments of benchmarks/run.py")
    return parser.parse_args()


def main() -> None:
    options = parse()
    end = time.monotonic() + options.seconds
    reason = no_gpu() if options.device == "cuda" else None
    if reason is not None:
        print(f"make gpu: no GPU to run on: {reason}", file=sys.stderr)
        sys.exit(2)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # through what ends the step's processes
    results = options.results.resolve() / digest()
    results.mkdir(parents=True, exist_ok=True)
    known = steps(options.device, results, options.benchmarks)
    names = [s.name for s in known]
    if not set(options.only or names) <= set(names):
        sys.exit(f"--only must name some of {', '.join(names)}; got {' '.join(options.only)}")
    wanted = [s for s in known if s.always or s.name in (options.only or names)]
    table = Table(results)
    for step in wanted if options.again else []:
        forget(step, results)
        table.outcomes.pop(step.name, None)
    try:
        take(wanted, table, end)
    finally:
        archive(results.parent)
    print("\n".join([f"\n{results}", *table.lines()]))
    sys.exit(not all(table.outcomes[s.name].good for s in wanted))


if __name__ == "__main__":
    main()
