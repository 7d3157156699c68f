"""Several processes with parts of a batch are one process with all of it: losses and gradients."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from inputs import quantised
from ranks import run_ranks
from ranks_together import (
    OTHER_OPTIONS,
    QUEUE_SIZE,
    WRONG_ON_RANK_1,
    WRONG_OPTIONS,
    grads_of,
    lfcc_of,
    metrics_of,
    model_of,
    retrieval_of,
    step,
)

import pc_kernels
from pc_kernels.training.distributed import described

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="PyTorch was built without gloo"
)

NEAR = 1e-6
"""Of the loss, and in norm of the parameters' gradients. The features are exact (`model_of`), so that a
rank sees the very numbers that one process sees: only sums over anchors differ in their order."""
LAYOUTS = {
    2: [(24, 24), (40, 9)],
    3: [(25, 1, 18), (27, 0, 13), (1, 0, 1), (0, 0, 0)],
    4: [(12, 12, 12, 12), (29, 1, 0, 15)],
}


def scenarios(world: int, rng: torch.Generator) -> dict[str, dict[str, Any]]:
    """What the ranks do, by name."""

    def scenario(sizes: tuple[int, ...], **options: Any) -> dict[str, Any]:
        rows = sum(sizes)
        made = {
            "sizes": sizes,
            "x": quantised(rng, rows, 6),
            "teacher": quantised(rng, rows, 4),
            "options": options,
        }
        if options.get("reduction") == "none":
            made["upstream"] = torch.rand(rows, generator=rng)
        return made

    made = {}
    for sizes in LAYOUTS[world]:
        for reduction in ("mean", "sum", "none"):
            made[f"{sizes} {reduction}"] = scenario(sizes, reduction=reduction)
    sizes = LAYOUTS[world][0]
    for metric in ("cosine", "cityblock"):
        made[f"{metric}"] = scenario(sizes, dissimilarity=metric)
    made["torch backend, in chunks"] = scenario(sizes, backend="torch", chunk_bytes=1)
    made["bfloat16"] = scenario(sizes, student_dtype=torch.bfloat16)
    made["float64"] = scenario(sizes)
    made["float64"]["x"] = made["float64"]["x"].double()
    made["DDP"] = {**scenario(sizes), "ddp": True}
    rows = sum(sizes)
    for reduction in ("mean", "none"):
        weighted = scenario(sizes, reduction=reduction)
        weighted["weights"] = torch.rand(rows, generator=rng)
        weighted["pair_mask"] = torch.rand(rows, rows, generator=rng) < 0.6
        made[f"weights and masks {reduction}"] = weighted
    made["padding"] = {**scenario(sizes), "pair_mask": torch.rand(1, rows, generator=rng) < 0.8}
    return made


@pytest.fixture(scope="module", params=sorted(LAYOUTS))
def outcome(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[dict[str, Any], list[Any]]]:
    """The scenarios, and every rank's results and errors; all ranks live once for all tests."""
    world = request.param
    seed = request.config.getoption("--seed")
    print(f"random inputs: --seed {seed}")
    folder: Path = tmp_path_factory.mktemp(f"ranks{world}")
    planned = scenarios(world, torch.Generator().manual_seed(seed))
    torch.save(planned, folder / "scenarios")
    yield planned, run_ranks("ranks_together.py", world, folder, timeout=150)


def test_losses_and_gradients_are_those_of_one_process(outcome: Any) -> None:
    planned, ranks = outcome
    for name, scenario in planned.items():
        model = model_of(scenario)
        wanted = step(
            model,
            scenario["x"],
            scenario["teacher"],
            scenario.get("upstream"),
            weights=scenario.get("weights"),
            pair_mask=scenario.get("pair_mask"),
            **scenario["options"],
        )
        results = [results[name] for results, _ in ranks]
        if scenario["options"].get("reduction") == "none":
            got = torch.cat([loss for loss, _ in results])
            assert [len(loss) for loss, _ in results] == list(scenario["sizes"]), name
        else:
            got = results[0][0]
            assert all(torch.equal(loss, got) for loss, _ in results), name  # on every rank
        assert got.dtype == wanted.dtype and got.shape == wanted.shape, name
        assert torch.allclose(got, wanted, rtol=NEAR, atol=1e-9), name
        size = torch.stack([g.double().norm() for g in grads_of(model)]).norm()
        # A row's own gradient and what other ranks send for it are each rounded to its dtype.
        low = scenario["options"].get("student_dtype") == torch.bfloat16
        near = 2 * torch.finfo(torch.bfloat16).eps if low else NEAR
        for _, grads in results:
            for one, many in zip(grads_of(model), grads, strict=True):
                assert (one - many).double().norm() <= near * size + 1e-9, name


def test_lfcc_is_that_of_one_process(outcome: Any) -> None:
    """Its projections are float32: each rank rounds them alike, but for the order of sums."""
    planned, ranks = outcome
    loss, gradient = lfcc_of(next(iter(planned.values())), slice(None))
    of_ranks = [results["lfcc"] for results, _ in ranks]
    assert all(torch.allclose(one, loss, rtol=1e-5) for one, _ in of_ranks)
    mean = torch.stack([grad for _, grad in of_ranks]).mean(0)
    assert (mean - gradient).norm() <= 1e-5 * gradient.norm()


def test_mismatches_are_errors_on_every_rank(outcome: Any) -> None:
    _, ranks = outcome
    for rank, (_, errors) in enumerate(ranks):
        for kind, message in errors.items():
            if kind == "options":
                continue
            if kind == "references":
                assert "student_refs" in message, message
                continue
            if kind in WRONG_ON_RANK_1:
                others = "failed on ranks [1]" if kind == "layers" else "ranks [1] refused"
                expected = WRONG_ON_RANK_1[kind] if rank == 1 else others
                assert expected in message, (kind, rank, message)
                continue
            assert kind.replace(" ", "_") in message.replace(" ", "_"), (kind, message)
            assert "process_group" in message, (kind, message)
            assert ("float64" in message or "bfloat16" in message) == ("dtype" in kind), message


def test_options_are_checked_together(outcome: Any) -> None:
    """What one rank refuses, or says otherwise, is an error on every rank."""
    _, ranks = outcome
    for rank, (_, errors) in enumerate(ranks):
        messages = errors["options"]
        for own in WRONG_OPTIONS:
            assert (own if rank == 1 else "ranks [1] refused") in messages[own], messages[own]
        for name, (value, other) in OTHER_OPTIONS.items():
            by_rank = [described(value), described(other), *[described(value)] * (len(ranks) - 2)]
            expected = f"same options; by rank: {name} ({', '.join(by_rank)})"
            if name == "dissimilarity":  # and so the teacher's
                expected += f"; teacher_dissimilarity ({', '.join(by_rank)})"
            assert messages[name].endswith(expected), messages[name]
        own = "ArithmeticError: a user's function"
        others = "RuntimeError: process_group: a function failed on ranks [1]; see their errors"
        assert messages["function"] == (own if rank == 1 else others)
        outside = f"process_group: rank {rank} of all processes is not in the group"
        assert (outside in messages["outside"]) == (rank > 0), messages["outside"]
        assert "must be a torch.distributed group, 'world' or None; got str" in messages["no group"]


def test_modules_with_a_group_are_copied_and_pickled(outcome: Any) -> None:
    _, ranks = outcome
    for results, _ in ranks:
        said = results["copies"]
        assert said.pop("queue") == str(min(20, 5 * len(ranks)))
        for kind in ("PerceptionCoherenceLoss", "ContrastiveLoss"):
            assert "only 'world' can be pickled" in said.pop(f"{kind} other, pickled")
            of_kind = {value for name, value in said.items() if name.startswith(kind)}
            assert len(of_kind) == 1 and float(of_kind.pop()) > 0


def test_layers_under_ddp(outcome: Any) -> None:
    _, ranks = outcome
    first = ranks[0][0]["layers under DDP"]
    for results, _ in ranks:
        of_layer, of_head = results["layers under DDP"]
        assert of_layer.any() and torch.equal(of_layer, first[0]) and not of_head.any()


def test_world_before_there_is_one() -> None:
    x = torch.randn(5, 3)
    for loss_fn in (
        pc_kernels.PerceptionCoherenceLoss(process_group="world"),
        pc_kernels.ContrastiveLoss(process_group="world"),
        pc_kernels.LFCCLoss([1.0], process_group="world"),
    ):
        given = ([x], [x]) if isinstance(loss_fn, pc_kernels.LFCCLoss) else (x, x)
        with pytest.raises(ValueError, match=r"'world': torch\.distributed is not initialised"):
            loss_fn(*given)
    with pytest.raises(TypeError, match="group, 'world' or None; got str"):
        pc_kernels.LFCCLoss([1.0], process_group="all")([x], [x])


RUN_AND_LEAVE = """
import os, runpy, sys
runpy.run_path(sys.argv.pop(1), run_name="__main__")
os._exit(0)
"""
"""Without Python's finalisation, which a thread of gloo that still waits for the GIL does not survive:
it aborts the process, now and then (PyTorch 2.13, https://github.com/pytorch/pytorch/pull/179291)."""


def test_the_example_in_the_documentation(python: Callable[..., Any]) -> None:
    script = str(ROOT / "examples" / "ddp.py")
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python")
    command = (sys.executable, "-c", RUN_AND_LEAVE, script, "--steps", "20", "--batch", "32")
    done = python(*launch, *command, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    first, last = (float(line.rpartition(" ")[2]) for line in done.stdout.splitlines())
    assert last < first


def test_queues_are_the_same_on_every_rank(outcome: Any) -> None:
    """And hold the rows of all ranks, in their order."""
    planned, ranks = outcome
    queues = [results["queue"] for results, _ in ranks]
    scenario = next(iter(planned.values()))
    wanted = torch.cat([scenario["x"], scenario["teacher"]], 1)[-QUEUE_SIZE:]
    for student, teacher in queues:
        got = torch.cat([student, teacher], 1)
        assert sorted(got.tolist()) == sorted(wanted.tolist())
        assert torch.equal(student, queues[0][0]) and torch.equal(teacher, queues[0][1])


def test_metrics_are_those_of_all_data(outcome: Any) -> None:
    """On every rank, ranks without data too."""
    planned, ranks = outcome
    first = next(iter(planned.values()))
    wanted = metrics_of(first["x"], first["teacher"], slice(None))
    for results, _ in ranks:
        assert torch.allclose(results["metrics"], wanted, rtol=NEAR)


def test_losses_of_retrieval_are_those_of_all_data(outcome: Any) -> None:
    planned, ranks = outcome
    first = next(iter(planned.values()))
    wanted = retrieval_of(first["x"], first["teacher"], slice(None))
    for i, (loss, grad) in enumerate(wanted):
        losses, grads = zip(*(results["retrieval"][i] for results, _ in ranks), strict=True)
        for got in losses if loss.dim() == 0 else [torch.cat(losses)]:
            assert torch.allclose(got, loss, rtol=NEAR, atol=NEAR)
        assert (torch.stack(grads).mean(0) - grad).norm() <= NEAR * grad.norm()
