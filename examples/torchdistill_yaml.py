"""torchdistill: registered in a line, then chosen and configured in YAML.

`python examples/torchdistill_yaml.py` runs it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset
from torchdistill.common.yaml_util import load_yaml_file
from torchdistill.core.distillation import DistillationBox
from torchdistill.losses.registry import register_low_level_loss

import pc_kernels

register_low_level_loss(pc_kernels.PerceptionCoherenceLoss)

CONFIGURATION = Path(__file__).with_name("torchdistill_config.yaml")


def main() -> None:
    """Trains on random inputs."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 128))
    student = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 16))
    data = {"random": TensorDataset(torch.randn(2560, 64), torch.zeros(2560))}
    box = DistillationBox(
        teacher,
        student,
        data,
        load_yaml_file(str(CONFIGURATION)),
        device=torch.device("cpu"),
        device_ids=None,
        distributed=False,
        lr_factor=1,
    )
    for epoch in range(box.num_epochs):
        box.pre_epoch_process(epoch=epoch)
        for inputs, targets, extra in box.train_data_loader:
            loss = box.forward_process(inputs, targets, extra)
            box.post_forward_process(loss=loss)
        print(f"epoch {epoch + 1}: loss {loss.item():.5f}")
        box.post_epoch_process()


if __name__ == "__main__":
    main()
