"""One of several processes that share a contrastive batch: what tests/test_contrastive_ranks.py starts.

python contrast_ranks.py RANK STORE FOLDER     scenarios from FOLDER/scenarios, results to FOLDER
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import pc_kernels


def run(
    scenario: dict[str, Any], mine: slice = slice(None), **options: Any
) -> tuple[Tensor, list[Tensor]]:
    """The loss of the rows `mine`, and the gradients in these queries and keys, and the temperature."""
    given = dict(scenario)
    queries, keys = (given.pop(name)[mine].clone().requires_grad_() for name in ("q", "k"))
    temperature = given.pop("temperature").clone().requires_grad_()
    upstream = given.pop("upstream", None)
    for name in ("weights", "pair_mask"):
        if name in given and len(given[name]) > 1:
            given[name] = given[name][mine]
    if "targets" in given:
        rows, of_keys, *rest = given["targets"]
        of_keys = None if of_keys is None else of_keys[mine]
        given["targets"] = pc_kernels.SoftTargets(rows[mine], of_keys, *rest)
    del given["sizes"]
    loss = pc_kernels.contrastive_loss(queries, keys, temperature=temperature, **given, **options)
    (loss if upstream is None else (loss * upstream[mine]).sum()).backward()
    return loss.detach(), [queries.grad, keys.grad, temperature.grad]


def joint(scenario: dict[str, Any], rank: int, world: int) -> tuple[Tensor, list[Tensor]]:
    """This rank's part, its gradients as DDP would average them."""
    start = sum(scenario["sizes"][:rank])
    mine = slice(start, start + scenario["sizes"][rank])
    loss, grads = run(scenario, mine, process_group=dist.group.WORLD)
    dist.all_reduce(grads[-1])
    return loss, [grad / world for grad in grads]


def wrong(rank: int) -> list[str]:
    """What each rank says where rank 1 alone is wrong."""
    x, messages = torch.randn(3, 4), []
    for bad in ({"temperature": -1.0}, {"symmetric": True}, {"form": "sigmax"}):
        options = bad if rank == 1 else {}
        try:
            pc_kernels.contrastive_loss(x, x, process_group=dist.group.WORLD, **options)
            messages.append("nothing")
        except ValueError as error:
            messages.append(str(error))
    return messages


def main() -> None:
    rank, store, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    planned = torch.load(folder / "scenarios", weights_only=False)
    world = len(next(iter(planned.values()))["sizes"])
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    results = {name: joint(scenario, rank, world) for name, scenario in planned.items()}
    torch.save((results, wrong(rank)), folder / f"results{rank}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    os._exit(0)  # not through Python's finalisation: see RUN_AND_LEAVE in test_distributed.py
