"""Distillation by perception coherence on several processes, each with its part of every batch.

`torchrun --nproc-per-node 2 examples/ddp.py` runs it.

Every rank ranks its own images against those of all ranks: the loss and, after DDP's averaging, the
gradients are those of one process with the whole batch.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from torch import nn

import pc_kernels


def main() -> None:
    """Trains a small student on random images, and prints the loss on rank 0."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=128, help="images a rank")
    arguments = parser.parse_args()

    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank = dist.get_rank()
    device = (
        torch.device("cuda", rank % torch.cuda.device_count()) if on_gpu else torch.device("cpu")
    )

    torch.manual_seed(0)  # one teacher, one student to start from
    teacher = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 128)).to(device)
    student = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 16)).to(device)
    student = nn.parallel.DistributedDataParallel(student)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    loss_fn = pc_kernels.PerceptionCoherenceLoss(
        dissimilarity="cosine", temperature=1.0, process_group=dist.group.WORLD
    )

    torch.manual_seed(1 + rank)  # other images on every rank
    for step in range(arguments.steps):
        images = torch.randn(arguments.batch, 64, device=device)
        with torch.no_grad():
            target = teacher(images)
        loss = loss_fn(student(images), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if rank == 0 and (step + 1) % 10 == 0:
            print(f"step {step + 1}: loss {loss.item():.5f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
