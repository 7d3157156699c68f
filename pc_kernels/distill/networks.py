"""Networks for 32x32 images in the forms of the distillation literature, smaller ones, and for texts.

The CIFAR forms are those by which RepDistiller (github.com/HobbitLong/RepDistiller, Tian et al., ICLR
2020) and its successors compare; their parameter counts are checked in the tests. Each network ends
in its pooled features: what a classifier would be put on, and what is distilled here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .texts import PADDING


class Encoder(nn.Module):
    """Inputs [B, ...] to features [B, width].

    Args:
        body: maps the input, images scaled to about [-2, 2], to [B, n].
        n: the body's width.
        width: of the features: a linear layer [n] -> [width] is put on the body; None: n, no layer.
    """

    def __init__(self, body: nn.Module, n: int, width: int | None = None) -> None:
        """Puts the parts together."""
        super().__init__()
        self.width = width or n
        self.body = body
        self.head = nn.Identity() if width is None else nn.Linear(n, width)

    def forward(self, inputs: Tensor) -> Tensor:
        """Uint8 images count as 0 to 255; everything else goes in as it is."""
        if inputs.dtype == torch.uint8:
            inputs = (inputs.float() - 127.5) / 64
        if inputs.dim() == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        features: Tensor = self.head(self.body(inputs))
        return features


def make_network(
    name: str, shape: Sequence[int], width: int | None = None, vocabulary: int = 0
) -> Encoder:
    """Builds a network with PyTorch's global generator.

    Args:
        name: one of `NETWORKS`.
        shape: of an input, [C, H, W] or, for `mlp`, any; [L] of a text.
        width: of the features; None: the network's own.
        vocabulary: of texts, how many words there are; 0: the inputs are no texts.

    Raises:
        ValueError: no such network, or it does not take such inputs.
    """
    if name not in NETWORKS:
        raise ValueError(f"network: got {name!r}; allowed: {', '.join(NETWORKS)}")
    if bool(vocabulary) != (name in OF_TEXTS):
        texts = "texts" if vocabulary else f"inputs of shape {tuple(shape)} that are no texts"
        allowed = OF_TEXTS if vocabulary else NETWORKS.keys() - OF_TEXTS.keys()
        raise ValueError(f"network: {name} takes no {texts}; allowed: {', '.join(sorted(allowed))}")
    if name not in ("mlp", *OF_TEXTS) and len(shape) != 3:
        raise ValueError(
            f"network: {name} takes images [C, H, W]; got inputs of shape {tuple(shape)}; allowed "
            "for these: mlp"
        )
    body, n = OF_TEXTS[name](shape, vocabulary) if vocabulary else NETWORKS[name](shape)
    network = Encoder(body, n, width)
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


Body = tuple[nn.Module, int]


def _convolution(
    before: int, after: int, size: int = 3, stride: int = 1, groups: int = 1
) -> nn.Conv2d:
    layer = nn.Conv2d(before, after, size, stride, size // 2, groups=groups, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layer


def _normalised(*of_convolution: int) -> list[nn.Module]:
    return [_convolution(*of_convolution), nn.BatchNorm2d(of_convolution[1])]


def _pooled(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class _Residual(nn.Module):
    """x + branch(x), the shortcut projected where shapes differ; ReLU after it, or nothing."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.branch, self.shortcut, self.last = branch, shortcut, last

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.branch(x) + self.shortcut(x))
        return y


def _resnet(depth: int, channels: Sequence[int], stem_stride: int = 1) -> Callable[..., Body]:
    """He et al. 2016 (arXiv 1512.03385), section 4.2: 6n + 2 layers in three stages.

    Args:
        depth: 6n + 2.
        channels: of the stem and of the three stages.
        stem_stride: 2 quarters the work of everything behind the stem.
    """

    def block(before: int, after: int, stride: int) -> nn.Module:
        branch = nn.Sequential(
            *_normalised(before, after, 3, stride), nn.ReLU(), *_normalised(after, after)
        )
        same = before == after and stride == 1
        shortcut = nn.Identity() if same else nn.Sequential(*_normalised(before, after, 1, stride))
        return _Residual(branch, shortcut, nn.ReLU())

    def build(shape: Sequence[int]) -> Body:
        layers = [*_normalised(shape[0], channels[0], 3, stem_stride), nn.ReLU()]
        before = channels[0]
        for stage, after in enumerate(channels[1:]):
            for place in range((depth - 2) // 6):
                layers.append(block(before, after, 2 if stage and not place else 1))
                before = after
        return _pooled(*layers), before

    return build


class _PreActivated(nn.Module):
    """A block of a wide residual network: BatchNorm and ReLU first; a shortcut projects after them."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.BatchNorm2d(before), nn.ReLU())
        self.branch = nn.Sequential(
            *_normalised(before, after, 3, stride), nn.ReLU(), _convolution(after, after)
        )
        self.shortcut = None if before == after else _convolution(before, after, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        ready = self.first(x)
        y: Tensor = self.branch(ready) + (x if self.shortcut is None else self.shortcut(ready))
        return y


def _wide_resnet(depth: int, widening: int) -> Callable[..., Body]:
    """Zagoruyko and Komodakis 2016 (arXiv 1605.07146): 6n + 4 layers in three stages, without dropout."""

    def build(shape: Sequence[int]) -> Body:
        layers: list[nn.Module] = [_convolution(shape[0], 16)]
        before = 16
        for stage in range(3):
            after = 16 * widening * 2**stage
            for place in range((depth - 4) // 6):
                layers.append(_PreActivated(before, after, 2 if stage and not place else 1))
                before = after
        return _pooled(*layers, nn.BatchNorm2d(before), nn.ReLU()), before

    return build


def _mobilenet_v2(expansion: int, widening: float) -> Callable[..., Body]:
    """Sandler et al. 2018 (arXiv 1801.04381), table 2, at RepDistiller's strides for 32x32 images."""
    stages: tuple[tuple[int, int, int, int], ...]
    stages = ((1, 16, 1, 1), (expansion, 24, 2, 1), (expansion, 32, 3, 2), (expansion, 64, 4, 2))
    stages += ((expansion, 96, 3, 1), (expansion, 160, 3, 2), (expansion, 320, 1, 1))

    def block(before: int, after: int, stride: int, expand: int) -> nn.Module:
        inner = before * expand
        branch = nn.Sequential(
            *_normalised(before, inner, 1), nn.ReLU(),
            *_normalised(inner, inner, 3, stride, inner), nn.ReLU(),
            *_normalised(inner, after, 1),
        )  # fmt: skip
        if before == after and stride == 1:
            return _Residual(branch, nn.Identity(), nn.Identity())
        return branch

    def build(shape: Sequence[int]) -> Body:
        before, last = int(32 * widening), 1280
        layers = [*_normalised(shape[0], before, 3, 2), nn.ReLU()]
        for expand, channels, count, stride in stages:
            after = int(channels * widening)
            for place in range(count):
                layers.append(block(before, after, 1 if place else stride, expand))
                before = after
        return _pooled(*layers, *_normalised(before, last, 1), nn.ReLU()), last

    return build


class _Shuffle(nn.Module):
    """A unit of ShuffleNetV2: two branches side by side, their channels interleaved.

    At stride 1 the first branch is half of the input, untouched.
    """

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        half = after // 2
        self.left = None
        if stride == 2:
            self.left = nn.Sequential(
                *_normalised(before, before, 3, 2, before), *_normalised(before, half, 1), nn.ReLU()
            )
        self.right = nn.Sequential(
            *_normalised(before if stride == 2 else half, half, 1), nn.ReLU(),
            *_normalised(half, half, 3, stride, half),
            *_normalised(half, half, 1), nn.ReLU(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1) if self.left is None else (self.left(x), x)
        return torch.stack([left, self.right(right)], 2).flatten(1, 2)


def _shufflenet_v2(channels: Sequence[int], last: int) -> Callable[..., Body]:
    """Ma et al. 2018 (arXiv 1807.11164), table 5, with a 1x1 stem at full resolution for 32x32 images."""

    def build(shape: Sequence[int]) -> Body:
        before = 24
        layers = [*_normalised(shape[0], before, 1), nn.ReLU()]
        for after, repeats in zip(channels, (3, 7, 3), strict=True):
            for place in range(1 + repeats):
                layers.append(_Shuffle(before, after, 1 if place else 2))
                before = after
        return _pooled(*layers, *_normalised(before, last, 1), nn.ReLU()), last

    return build


def _mlp(hidden: int) -> Callable[..., Body]:
    """Two hidden layers with batch normalisation, for inputs of any shape."""

    def build(shape: Sequence[int]) -> Body:
        n = torch.Size(shape).numel()
        layers: list[nn.Module] = [nn.Flatten()]
        for before in (n, hidden):
            layers += [nn.Linear(before, hidden), nn.BatchNorm1d(hidden), nn.ReLU()]
        return nn.Sequential(*layers), hidden

    return build


class _EmbeddingTable(nn.Module):
    """The mean over a text's words of a vector a word: nothing else is learnt, and nothing is faster."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(vocabulary, width, mode="mean", padding_idx=PADDING)
        with torch.no_grad():
            self.words.weight.mul_(0.1)  # small, so that rare words too get away from their start

    def forward(self, words: Tensor) -> Tensor:
        features: Tensor = self.words(words)
        return features


class _Transformer(nn.Module):
    """Vaswani et al. 2017 (arXiv 1706.03762), normalised first, learnt places; the mean over words."""

    def __init__(self, length: int, vocabulary: int, width: int, layers: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width, padding_idx=PADDING)
        self.places = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential()
        for _ in range(layers):
            self.blocks.append(
                nn.TransformerEncoderLayer(
                    width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True
                )
            )
        self.norm = nn.LayerNorm(width)

    def forward(self, words: Tensor) -> Tensor:
        padding = words == PADDING
        x = self.words(words) + self.places
        for block in self.blocks:
            x = block(x, src_key_padding_mask=padding)
        present = (~padding).unsqueeze(2).to(x.dtype)
        features: Tensor = (self.norm(x) * present).sum(1) / present.sum(1)
        return features


def _embedding_table(width: int) -> Callable[..., Body]:
    return lambda shape, vocabulary: (_EmbeddingTable(vocabulary, width), width)


def _transformer(width: int, layers: int) -> Callable[..., Body]:
    return lambda shape, vocabulary: (_Transformer(shape[0], vocabulary, width, layers), width)


OF_TEXTS: dict[str, Callable[[Sequence[int], int], Body]] = {
    "embedding_table": _embedding_table(128),
    "transformer_tiny": _transformer(128, 2),
}
NETWORKS: dict[str, Callable[..., Body]] = {
    "resnet8_small": _resnet(8, (16, 16, 32, 64), stem_stride=2),
    "resnet8": _resnet(8, (16, 16, 32, 64)),
    "resnet20": _resnet(20, (16, 16, 32, 64)),
    "resnet8x4": _resnet(8, (32, 64, 128, 256)),
    "resnet32x4": _resnet(32, (32, 64, 128, 256)),
    "wrn_16_2": _wide_resnet(16, 2),
    "wrn_40_2": _wide_resnet(40, 2),
    "mobilenet_v2": _mobilenet_v2(6, 0.5),
    "shufflenet_v2": _shufflenet_v2((116, 232, 464), 1024),
    "mlp": _mlp(64),
    **OF_TEXTS,
}
