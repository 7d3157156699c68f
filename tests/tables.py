"""The tables of csrc/formulas.h, compiled as a module of their own (formula_tables.cpp)."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import subprocess
import sysconfig
from functools import cache
from types import ModuleType

import pytest
from shim import ROOT, compiler, digest

SOURCE = ROOT / "tests" / "formula_tables.cpp"
FLAGS = ["-std=c++20", "-Wall", "-O1", "-fPIC", "-shared", "-fvisibility=hidden"]


@cache
def formula_tables() -> ModuleType:
    """The module, built once and kept in build/; a skip without pybind11 or a compiler."""
    pybind11 = pytest.importorskip("pybind11")
    include = (pybind11.get_include(), sysconfig.get_path("include"), str(ROOT / "csrc"))
    arguments = [*FLAGS, *(f"-I{folder}" for folder in include)]
    kept = ROOT / "build" / "formula_tables"
    target = kept / digest(compiler(), SOURCE.read_text("utf-8"), *arguments)
    if not target.exists():
        kept.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}")
        command = [compiler(), *arguments, str(SOURCE), "-o", str(partial)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        partial.replace(target)
    loader = importlib.machinery.ExtensionFileLoader("formula_tables", str(target))
    spec = importlib.util.spec_from_loader("formula_tables", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module
