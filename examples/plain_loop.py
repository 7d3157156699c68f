"""A loop of one's own, with autocast and torch.compile.

`python examples/plain_loop.py` runs it.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

import pc_kernels


def main() -> None:
    """Distils a small network from a larger one on random inputs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)

    teacher = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 128)).to(device).eval()
    student = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 16)).to(device)
    loss_fn = pc_kernels.PerceptionCoherenceLoss(dissimilarity="cosine", temperature=1.0)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)

    @torch.compile(fullgraph=True, backend=arguments.backend)
    def loss_of(inputs: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            target = teacher(inputs)
        return loss_fn(student(inputs), target)

    for step in range(arguments.steps):
        inputs = torch.randn(256, 64, device=device)
        with torch.autocast(device.type, torch.bfloat16):  # the loss computes in float32 itself
            loss = loss_of(inputs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 10 == 0:
            print(f"step {step + 1}: loss {loss.item():.5f}")


if __name__ == "__main__":
    main()
