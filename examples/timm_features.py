"""timm: feature maps of several stages, and the pooled features, of two image networks.

`python examples/timm_features.py` runs it.
"""

from __future__ import annotations

import timm
import torch

import pc_kernels


def main() -> None:
    """A ResNet-10 learns from a ResNet-18; trained weights would be `pretrained=True`."""
    torch.manual_seed(0)
    stages = {"features_only": True, "out_indices": (2, 4)}
    teacher = timm.create_model("resnet18", pretrained=False, **stages).eval()
    student = timm.create_model("resnet10t", pretrained=False, **stages)
    # Maps [B, C, H, W] become vectors by an explicit pool; the last stage counts four times as much.
    loss_fn = pc_kernels.MultiLayerPerceptionCoherenceLoss(
        [0.2, 0.8], pool="mean", dissimilarity="cosine", temperature=1.0
    )
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    images = torch.randn(64, 3, 64, 64)
    with torch.no_grad():
        targets = teacher(images)
    for step in range(6):
        loss = loss_fn(student(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step + 1}: loss {loss.item():.5f}")


if __name__ == "__main__":
    main()
