"""The networks: one plain CNN, wide as the teacher, narrow as the student."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional

from .data import Dataset

SMALL_SIDE = 16  # images with a side below this, in pixels, are small

# Channels of each stage and feature width. On the digits the student has a tenth of the teacher's
# parameters and a twelfth of its width.
SMALL_TEACHER, SMALL_STUDENT = ((48, 96), 96), ((16, 32), 8)
TEACHER, STUDENT = ((48, 96, 192), 192), ((16, 32, 64), 32)


class Encoder(nn.Module):
    """Conv-BatchNorm-ReLU stages, halved in between, then a global average and a linear layer.

    Args:
        in_channels: channels of the images: 1 grey, 3 colour.
        channels: channels of each stage.
        width: length of the feature vector.
    """

    def __init__(self, in_channels: int, channels: tuple[int, ...], width: int) -> None:
        """Builds the stages with PyTorch's default initialisation."""
        super().__init__()
        self.width = width
        self.stages = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()
                )
                for a, b in pairwise((in_channels, *channels))
            )
        )
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], width)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] (uint8, 0 to 255) to features [B, width]."""
        x = images.float() / 255
        for number, stage in enumerate(self.stages):
            x = stage(functional.max_pool2d(x, 2) if number else x)
        features: Tensor = self.head(x)
        return features

    @property
    def layers(self) -> dict[str, str]:
        """The stages and the features, by names that teacher and student share, for `LayerOutputs`."""
        return {f"stage {i}": f"stages.{i}" for i in range(len(self.stages))} | {"features": "head"}


def small(data: Dataset) -> bool:
    """Are the images small, and with them the networks?"""
    return min(data.train.images.shape[2:]) < SMALL_SIDE


def make_teacher(data: Dataset) -> Encoder:
    """The teacher for images of this size."""
    return Encoder(_channels(data), *(SMALL_TEACHER if small(data) else TEACHER))


def make_student(data: Dataset) -> Encoder:
    """The student, far smaller than the teacher and with narrower features."""
    return Encoder(_channels(data), *(SMALL_STUDENT if small(data) else STUDENT))


def _channels(data: Dataset) -> int:
    return data.train.images.shape[1]
