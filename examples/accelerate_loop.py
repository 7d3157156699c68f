"""Accelerate: the same loop on one device or many.

`accelerate launch examples/accelerate_loop.py` runs it.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pc_kernels


def main() -> None:
    """Trains on random inputs."""
    accelerator = Accelerator()
    set_seed(0)
    teacher = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 128)).eval()
    student = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 16))
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    loader = DataLoader(TensorDataset(torch.randn(5120, 64)), batch_size=256, drop_last=True)
    student, optimizer, loader = accelerator.prepare(student, optimizer, loader)
    teacher.to(accelerator.device)

    # The loss has no parameters: it is not prepared. With several processes it joins their batches.
    joint = accelerator.num_processes > 1
    loss_fn = pc_kernels.PerceptionCoherenceLoss(
        dissimilarity="cosine",
        temperature=1.0,
        process_group=torch.distributed.group.WORLD if joint else None,
    )
    for epoch in range(2):
        for (inputs,) in loader:
            with torch.no_grad():
                target = teacher(inputs)
            loss = loss_fn(student(inputs), target)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
        accelerator.print(f"epoch {epoch + 1}: loss {loss.item():.5f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
