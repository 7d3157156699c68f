"""The hot operations under pytest-benchmark, and the benchmark's own truth and machinery."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import contrastive
import pytest
import rivals
import run
import torch
from contenders import run_loss, run_rank
from gate import Check, check_loss, difference
from measure import Failure, plan_rounds, take_turns
from problem import Problem, Result, Spec, exact_soft_rank
from rows import Row
from targets import Target

import pc_kernels
from pc_kernels import reference
from pc_kernels.backends import BACKENDS

CPU = torch.device("cpu")
SIZE = 256
pytestmark = pytest.mark.benchmark(max_time=0.2)
USABLE = [
    name
    for name, backend in BACKENDS.items()
    if name != "reference" and backend.obstacle(CPU, torch.float32) is None
]


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem(Spec(SIZE))


every_backend = pytest.mark.parametrize("backend", USABLE)


@every_backend
def test_hard_rank(benchmark, problem, backend):
    benchmark(pc_kernels.hard_rank, problem.values, backend=backend)


@every_backend
def test_soft_rank(benchmark, problem, backend):
    benchmark(pc_kernels.soft_rank, problem.values, backend=backend)


@every_backend
def test_soft_rank_backward(benchmark, problem, backend):
    values = problem.values.clone().requires_grad_()
    ranks = pc_kernels.soft_rank(values, backend=backend)
    benchmark(torch.autograd.grad, ranks, values, problem.values_grad, retain_graph=True)


@every_backend
def test_rank_stage(benchmark, problem, backend):
    benchmark(run_rank, problem, None, backend=backend)


@every_backend
def test_whole_loss(benchmark, problem, backend):
    benchmark(run_loss, problem, None, backend=backend)


def test_truth_is_the_reference():
    problem = Problem(Spec(24, 5, 7))
    student = problem.student.double().requires_grad_()
    losses = reference.perception_coherence_loss(
        student, problem.teacher.double(), reduction="none"
    )
    loss = losses[problem.anchors].mean()
    (grad,) = torch.autograd.grad(loss, student)
    assert difference(problem.loss_truth.value, loss) < 1e-12
    assert difference(problem.loss_truth.grad, grad) < 1e-12
    ranks = exact_soft_rank(student, student.new_tensor(0.1))
    assert (ranks - reference.soft_rank(student, 0.1)).abs().max() < 1e-12


@pytest.mark.parametrize("wrong", ["loss", "gradient", "timed run"])
def test_gate_refuses(wrong):
    def spoilt(problem, weights):
        value, grad = run_loss(problem, weights, backend="torch")
        if wrong == "loss":
            value = value * (1 + 1e-4)
        if wrong == "gradient" or (wrong == "timed run" and weights is None):
            grad = grad.clone()
            grad[0] *= 1.01
        return Result(value, grad)

    check = check_loss(spoilt, Problem(Spec(48)))
    assert not check.right
    assert check.errors[wrong][0] > check.errors[wrong][1]


def test_gate_refuses_nan():
    assert not Check({"loss": (float("nan"), 1e-5)}, 1.0).right


def test_turns_are_spread_and_failures_shown():
    order = []

    def fail():
        raise RuntimeError("no such kernel in /some/folder/x.so")

    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b"), "c": fail}
    times = take_turns(calls, {"a": 4, "b": 2, "c": 4}, CPU)
    assert order == ["a", "a", "b", "a", "a", "b"]
    assert isinstance(times["c"], Failure)
    assert times["c"].status == "failed"
    assert "/" not in times["c"].detail


def test_target_reached_at_its_limit():
    assert Target("time", 1.0, 1.0).verdict == "yes"
    assert Target("speed", 1.0, 1.0, at_most=False).verdict == "yes"
    assert Target("speed", 0.9, 1.0, at_most=False).verdict == "**no**"
    assert Target("speed", None, 1.0).verdict == "not measured"


def test_plan_rounds():
    assert plan_rounds(1e-6, 1.0, 45.0) == 200
    assert plan_rounds(1.0, 1.0, 45.0) == 7
    assert plan_rounds(14.0, 1.0, 45.0) == 3


def test_quick_run(tmp_path: Path):
    run.main(["--quick", "--out", str(tmp_path), "--memory-limit", "0.0001"])
    assert {path.suffix for path in tmp_path.iterdir()} == {".md", ".csv", ".json", ".png"}
    text = next(tmp_path.glob("*.json")).read_text()
    assert str(tmp_path) not in text
    rows = json.loads(text)["rows"]
    timed = [row for row in rows if row["status"] == "ok"]
    assert {row["key"] for row in timed} >= {"floor", "cdist", *USABLE}
    assert all(row["seconds"] and row["errors"] for row in timed)
    eager = [row for row in rows if row["key"] == "eager"]
    assert {row["status"] for row in eager} == {"out of memory"}


def test_results_outlive_what_ends_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are written after each size, and --resume goes on with the next."""
    arguments = ["--quick", "--sizes", "8", "16", "--out", str(tmp_path), "--contenders", "floor"]
    measured: list[int] = []

    def bench(found, spec, admit, limits):
        measured.append(spec.size)
        if measured == [8, 16]:
            raise KeyboardInterrupt
        return [Row("yardstick", spec.size, "floor", "GEMM floor", seconds=[1.0])]

    monkeypatch.setattr(run, "bench", bench)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "plot", raising=False)
    with pytest.raises(KeyboardInterrupt):
        run.main(arguments)
    read = json.loads(next(tmp_path.glob("*.json")).read_text())["rows"]
    assert [row["size"] for row in read] == [8]
    run.main([*arguments, "--resume"])
    assert measured == [8, 16, 16]
    read = json.loads(next(tmp_path.glob("*.json")).read_text())["rows"]
    assert [(row["size"], row["p50"]) for row in read] == [(8, 1.0), (16, 1.0)]
    assert {path.suffix for path in tmp_path.iterdir()} == {".md", ".csv", ".json"}


@pytest.mark.parametrize(
    "case", [contrastive.INFO_NCE, contrastive.CLIP], ids=lambda case: case.name
)
def test_rivals(case: contrastive.Case) -> None:
    """Those that run here compute the same loss; the others say why not."""
    for rival in rivals.RIVALS:
        contest = rivals.Contest(rival, case, 40)
        if rival.gpu and not torch.cuda.is_available():
            assert rivals.compare(contest, 0.0)[3] in ("not installed", "needs a GPU")
        elif rival.obstacle() is None:
            results = [contest.steps(40)[name]() for name in ("ours", "theirs", "stored")]
            for ours, theirs, stored in zip(*results, strict=True):
                assert max((ours - stored).norm(), (theirs - stored).norm()) <= 1e-4 * stored.norm()


@pytest.mark.skipif(
    any(find_spec(name) is None for name in ("inf_cl", "liger_kernel", "triton")),
    reason="the rivals that need a GPU are not installed",
)
def test_rivals_interpreted() -> None:
    """The kernels of rivals that need a GPU, without one."""
    script = Path(rivals.__file__).with_name("rivals_interpreted.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
