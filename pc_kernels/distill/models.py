"""The networks: one plain CNN, wide as the teacher, narrow as the student."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

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
        layers: list[nn.Module] = []
        for before, after in pairwise((in_channels, *channels)):
            layers += [nn.Conv2d(before, after, 3, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
        layers[-1] = nn.AdaptiveAvgPool2d(1)
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels[-1], width))

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] (uint8, 0 to 255) to features [B, width]."""
        features: Tensor = self.layers(images.float() / 255)
        return features


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
