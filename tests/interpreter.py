"""Tests in Triton's interpreter, for which Triton must be loaded with TRITON_INTERPRET=1.

A file of such tests runs once, in a child process; each of its test functions is an item of its own in
the parent, and fails there alone, with its own output.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

import pytest

from pc_kernels.backends import triton_obstacle

HERE = Path(__file__).resolve().parent

needs_triton = pytest.mark.skipif(
    triton_obstacle() is not None, reason=f"Triton: {triton_obstacle()}"
)
needs_compiler = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="Triton is loaded as an interpreter"
)


def major_minor(package: str) -> tuple[int, int]:
    major, minor, *_ = version(package).split(".")
    return int(major), int(minor)


def skip_without_interpreter() -> None:
    if major_minor("triton") < (3, 7) and major_minor("numpy") >= (2, 4):
        pytest.skip("the interpreter of Triton before 3.7 does not know numpy 2.4")


def names_in(file: str) -> list[str]:
    """The test functions of a file beside this one, which is not imported."""
    body = ast.parse((HERE / file).read_text(encoding="utf-8")).body
    names = [node.name for node in body if isinstance(node, ast.FunctionDef)]
    return [name for name in names if name.startswith("test_")]


class Child:
    """The results of those tests of a file that the requesting module's items name in `name`."""

    def __init__(self, file: str, request: pytest.FixtureRequest, folder: Path) -> None:
        skip_without_interpreter()
        parameters = [
            getattr(item, "callspec").params  # noqa: B009 - no attribute of pytest.Item
            for item in request.session.items
            if item.path == request.path and hasattr(item, "callspec")
        ]
        wanted = [p["name"] for p in parameters if p.get("name") in names_in(file)]
        results = folder / "results.xml"
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-o"]
        command += ["junit_logging=all", f"--junitxml={results}"]
        command += [f"--seed={request.config.getoption('--seed')}"]
        done = subprocess.run(
            [*command, *(f"tests/{file}::{name}" for name in wanted)],
            capture_output=True,
            text=True,
            timeout=900,
            cwd=HERE.parent,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"},
        )
        self.output = f"the child ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
        self.cases: defaultdict[str, list[ElementTree.Element]] = defaultdict(list)
        if results.exists():
            for case in ElementTree.parse(results).iter("testcase"):
                self.cases[case.get("name", "").partition("[")[0]].append(case)

    def check(self, name: str) -> None:
        """Passes, fails or skips as the test did."""
        cases = self.cases[name]
        if not cases:
            pytest.fail(f"{name} has no result: {self.output}", pytrace=False)
        bad = [
            case
            for case in cases
            if case.find("failure") is not None or case.find("error") is not None
        ]
        if bad:
            pytest.fail("\n".join(map(_report, bad)), pytrace=False)
        skipped = [case.find("skipped") for case in cases]
        if skipped[0] is not None and all(mark is not None for mark in skipped):
            pytest.skip(skipped[0].get("message", ""))


def _report(case: ElementTree.Element) -> str:
    """What failed, how, and what it printed."""
    parts = [f"{case.get('name')} failed in the child:"]
    return "\n".join([*parts, *(part.text or "" for part in case)])
