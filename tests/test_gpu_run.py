"""`make gpu` as far as a machine without a GPU can tell: a rehearsal, and that nothing gets lost."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT


def load(path: str) -> ModuleType:
    """A module of which there are namesakes."""
    spec = importlib.util.spec_from_file_location(f"gpu_{Path(path).stem}", ROOT / path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def gpu() -> Iterator[SimpleNamespace]:
    """tests/gpu/run.py and matrix.py."""
    before = list(sys.path)
    yield SimpleNamespace(run=load("tests/gpu/run.py"), matrix=load("tests/gpu/matrix.py"))
    sys.path[:] = before


def rehearse(results: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`make gpu` on the CPU, where there is neither pytest nor matplotlib."""
    hidden = results.parent / "hidden"
    hidden.mkdir(exist_ok=True)
    for package in ("pytest", "matplotlib"):
        (hidden / f"{package}.py").write_text("raise ImportError('hidden')\n")
    command = [sys.executable, "tests/gpu/run.py", "--device", "cpu", "--results", str(results)]
    return subprocess.run(
        [*command, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(hidden), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_rehearsal(tmp_path: Path) -> None:
    """Every step has a result, the archive has all, and the next run takes them as they are."""
    results = tmp_path / "results"
    done = rehearse(results)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (path for path in results.iterdir() if path.is_dir())
    outcomes = json.loads((folder / "steps.json").read_text())
    assert {name: o["verdict"] for name, o in outcomes.items()} == dict.fromkeys(
        ("info", "torch", "benchmarks"), "ok"
    )
    checks = json.loads((folder / "torch.json").read_text())
    assert "torch: masks" in checks and not any(c["error"] for c in checks.values())
    assert "no picture: hidden" in (folder / "benchmarks.log").read_text()
    with tarfile.open(results / "results.tar") as tar:
        held = {Path(name).name for name in tar.getnames()}
    assert held >= {"steps.json", "torch.json", "torch.log", "benchmarks.log"}
    assert {Path(name).suffix for name in held} >= {".md", ".csv"}
    before = (folder / "torch.log").read_text()
    done = rehearse(results, "--only", "torch")
    assert done.returncode == 0 and "torch …" not in done.stdout
    assert (folder / "torch.log").read_text() == before
    done = rehearse(results, "--only", "torch", "--again", "--seconds", "1")
    assert done.returncode == 1 and "not reached" in done.stdout
    assert "--only must name some of" in rehearse(results, "--only", "no-such").stderr


def step(gpu: SimpleNamespace, script: str, **options: Any) -> Any:
    return gpu.run.Step("step", ["sh", "-c", script], 60, **options)


def alive(process: int) -> bool:
    """Whether it runs; one that has ended may wait for its parent."""
    try:
        return ") Z" not in Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc")
@pytest.mark.parametrize("script", ["sleep 300 & echo $!; wait", "sleep 300 & echo $!"])
def test_a_step_leaves_no_process_behind(gpu: SimpleNamespace, script: str, tmp_path: Path) -> None:
    """Neither where it is stopped, nor where it ends before what it has started."""
    outcome = gpu.run.run(step(gpu, script), tmp_path, 1.0)
    assert outcome.verdict == ("stopped after 1 s" if "wait" in script else "ok")
    process = int((tmp_path / "step.log").read_text())
    deadline = time.monotonic() + 5
    while alive(process) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(process)


def test_a_tool_that_is_refused_is_skipped(gpu: SimpleNamespace, tmp_path: Path) -> None:
    """What it finds where it runs is a failure all the same."""
    refused = step(
        gpu, "echo ========= Error: this is not permitted; exit 1", refusal=gpu.run.REFUSED
    )
    outcome = gpu.run.run(refused, tmp_path, 10)
    assert outcome.good and outcome.verdict == "skipped: Error: this is not permitted"
    found = step(gpu, "echo ERROR SUMMARY: 2 errors; exit 9", refusal=gpu.run.REFUSED)
    assert gpu.run.run(found, tmp_path, 10).verdict == "failed (9)"
    own = step(gpu, "echo RuntimeError: not permitted; exit 1", refusal=gpu.run.REFUSED)
    (tmp_path / "step.log").unlink()
    assert gpu.run.run(own, tmp_path, 10).verdict == "failed (1)"


def test_steps_have_results_whatever_ends_the_run(gpu: SimpleNamespace, tmp_path: Path) -> None:
    """Steps that were not reached or stopped come again, and results stay."""
    table = gpu.run.Table(tmp_path)
    good, slow = step(gpu, "exit 0"), gpu.run.Step("slow", ["sleep", "60"], 0.2)
    gpu.run.take([good, slow], table, time.monotonic() + 60)
    read = gpu.run.Table(tmp_path).outcomes
    assert read["step"].verdict == "ok" and read["slow"].verdict == "stopped after 0 s"
    assert read["step"].final and not read["slow"].final
    later = gpu.run.Step("slow", ["true"], 60)
    gpu.run.take([step(gpu, "exit 7"), later], gpu.run.Table(tmp_path), time.monotonic() + 60)
    assert [o.verdict for o in gpu.run.Table(tmp_path).outcomes.values()] == ["ok", "ok"]


def test_the_matrix_goes_on(
    gpu: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an error, a lost device, a run that was ended; and says that a backend is not usable."""
    ran: list[str] = []

    def failing(bench: Any) -> Iterator[None]:
        ran.append("failing")
        yield
        raise AssertionError("wrong")

    def ending(bench: Any) -> Iterator[None]:
        ran.append("ending")
        yield
        raise KeyboardInterrupt

    def passing(bench: Any) -> Iterator[None]:
        ran.append("passing")
        yield

    monkeypatch.setattr(gpu.matrix, "checks_for", lambda bench: [failing, ending, passing])
    bench, path = gpu.matrix.Bench("torch", "cpu"), tmp_path / "torch.json"
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            gpu.matrix.run_all(bench, gpu.matrix.Record(path))
    gpu.matrix.run_all(bench, gpu.matrix.Record(path))
    gpu.matrix.run_all(bench, gpu.matrix.Record(path))
    assert ran == ["failing", "ending", "ending", "passing"]
    record = gpu.matrix.Record(path)
    assert record.failed
    errors = [result["error"] for result in record.results.values()]
    assert errors == ["AssertionError: wrong", gpu.matrix.UNFINISHED, ""]

    def lost() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    bench.device = SimpleNamespace(type="cuda")
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    monkeypatch.setattr(
        gpu.matrix, "BACKENDS", {"torch": SimpleNamespace(obstacle=lambda *_: None)}
    )
    with pytest.raises(SystemExit) as status:
        gpu.matrix.run_all(bench, gpu.matrix.Record(tmp_path / "lost.json"))
    assert status.value.code == gpu.run.LOST == gpu.matrix.LOST
    unusable = SimpleNamespace(obstacle=lambda *_: "no such GPU")
    monkeypatch.setattr(gpu.matrix, "BACKENDS", {"torch": unusable})
    record = gpu.matrix.Record(None)
    gpu.matrix.run_all(bench, record)
    assert record.failed


def test_few_variants_where_they_compile(gpu: SimpleNamespace) -> None:
    """Each formula is among them; all combinations where they cost nothing."""
    few = gpu.matrix.Bench("triton", "cpu").combinations()
    every = gpu.matrix.Bench("cuda", "cpu").combinations()
    assert len(few) == 4 and len(every) == 48
    for chosen, whole in zip(zip(*few, strict=True), zip(*every, strict=True), strict=True):
        assert set(chosen) == set(whole)


def test_sanitizers_go_without_the_caching_allocator(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It hides overruns; without it nothing can be captured in a CUDA graph."""
    bench = gpu.matrix.Bench("cuda", "cuda", quick=True)
    assert gpu.matrix.graphs in gpu.matrix.checks_for(bench)
    for name, value in gpu.run.sanitizer("memcheck").environment.items():
        monkeypatch.setenv(name, value)
    assert gpu.matrix.graphs not in gpu.matrix.checks_for(bench)


def test_a_failed_comparison_fails_its_check(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu.matrix.tolerances, "LOSS", -1.0)
    result = gpu.matrix.run(gpu.matrix.masks, gpu.matrix.Bench("torch", "cpu", quick=True))
    assert "torch, m=5: loss: off by" in result["error"]
