"""Several processes with parts of a contrastive batch are one process with all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import contrast_ranks
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Generator

import pc_kernels

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="PyTorch was built without gloo"
)

NEAR = 1e-6
"""Of the loss, and in norm of gradients: sums over anchors differ in their order."""
LAYOUTS = {1: (19,), 2: (24, 9), 3: (11, 0, 17)}


def scenarios(sizes: tuple[int, ...], rng: Generator) -> dict[str, dict[str, Any]]:
    rows = sum(sizes)

    def scenario(**options: Any) -> dict[str, Any]:
        q, k = torch.randn(2, rows, 6, generator=rng)
        made = {"sizes": sizes, "q": q, "k": k, "temperature": torch.tensor(0.3), **options}
        if options.get("reduction") == "none":
            made["upstream"] = torch.rand(rows, generator=rng)
        return made

    made = {
        f"{kind} {reduction}": scenario(**options, reduction=reduction)
        for kind, options in {
            "rows": {},
            "both": {"symmetric": True, "chunk_bytes": 1},
            "sigmoid": {"form": "sigmoid", "bias": -1.0},
        }.items()
        for reduction in ("mean", "sum", "none")
    }
    refs, teacher = torch.randn(7, 6, generator=rng), torch.randn(rows, 5, generator=rng)
    mask = torch.rand(rows, rows + 7, generator=rng) < 0.7
    weights = torch.rand(rows, generator=rng)
    common = {"key_refs": refs, "weights": weights, "pair_mask": mask}
    made["everything"] = scenario(**common, symmetric=True)
    made["everything, none"] = scenario(**common, symmetric=True, reduction="none")
    of_refs = torch.randn(7, 5, generator=rng)
    targets = pc_kernels.SoftTargets(teacher, teacher.flip(0), of_refs, 0.2)
    made["targets"] = scenario(**common, targets=targets)
    own = pc_kernels.SoftTargets(torch.randn(rows, 6, generator=rng))
    made["targets of the keys"] = scenario(targets=own)
    return made


@pytest.mark.parametrize("world", LAYOUTS)
def test_ranks_are_one_process(world: int, rng: Generator, tmp_path: Path) -> None:
    sizes = LAYOUTS[world]
    planned = scenarios(sizes, rng)
    torch.save(planned, tmp_path / "scenarios")
    found = run_ranks("contrast_ranks.py", world, tmp_path, timeout=120)
    for name, scenario in planned.items():
        loss, grads = contrast_ranks.run(scenario)
        of_ranks = [results[name] for results, _ in found]
        joint = [torch.cat([g[i] for _, g in of_ranks]) for i in range(2)] + [of_ranks[0][1][2]]
        if scenario.get("reduction") == "none":
            losses = torch.cat([x for x, _ in of_ranks])
        else:
            losses = of_ranks[0][0]
            assert all(torch.equal(x, losses) for x, _ in of_ranks), name
        assert torch.allclose(losses, loss, rtol=NEAR, atol=0), name
        for got, wanted in zip(joint, grads, strict=True):
            assert (got - wanted).norm() <= NEAR * wanted.norm() + 1e-8, name
    if world > 1:
        check_messages([messages for _, messages in found])


def check_messages(said: list[list[str]]) -> None:
    """Wrong on rank 1, an error on all."""
    for rank, messages in enumerate(said):
        own = rank == 1
        assert ("got -1.0" if own else "ranks [1] refused") in messages[0]
        assert "symmetric (False, True" in messages[1]
        assert ("form must be one of" if own else "ranks [1] refused") in messages[2]
