"""LFCC between architectures: a ViT teaches a CNN, and a CNN teaches an MLP-Mixer.

    python docs/examples/heterogeneous.py

On the 1,797 digits that come with scikit-learn. The teacher is trained with labels; the student sees
none, only the low frequencies of two of the teacher's layers. Half a minute on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn
from torch.nn import functional

import pc_kernels

GRID, CLASS_TOKENS = (
    (4, 4),
    1,
)  # patches of 2×2 of the 8×8 pixels; the ViT's class token comes before


def cnn(width: int) -> nn.Sequential:
    """Images [B, 1, 8, 8] -> maps [B, width, 8, 8] -> [B, 2 width, 4, 4] -> features [B, 2 width]."""

    def stage(before: int, after: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()
        )

    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    layers = {"early": stage(1, width), "halve": nn.MaxPool2d(2)}
    return named(**layers, late=stage(width, 2 * width), pool=pool)


def mixer(width: int) -> nn.Sequential:
    """Images -> tokens [B, 16, width] of two blocks that mix tokens, then channels -> features."""
    layers = {"early": MixerBlock(16, width), "late": MixerBlock(16, width)}
    return named(patches=Patches(width), **layers, pool=Average())


def vit(width: int) -> nn.Sequential:
    """Images -> tokens [B, 1 + 16, width], class token first, of two transformer blocks -> features."""

    def block() -> nn.Module:
        return nn.TransformerEncoderLayer(
            width, 4, 2 * width, 0.0, batch_first=True, norm_first=True
        )

    layers = {"early": block(), "late": block()}
    return named(patches=Patches(width, class_token=True), **layers, pool=Average())


class Patches(nn.Module):
    """Embeds patches of 2×2 pixels and their places."""

    def __init__(self, width: int, class_token: bool = False) -> None:
        """Makes the embedding, and the class token if it is wanted."""
        super().__init__()
        self.embed = nn.Conv2d(1, width, 2, stride=2)
        self.places = nn.Parameter(0.02 * torch.randn(16, width))
        self.token = nn.Parameter(torch.zeros(1, 1, width)) if class_token else None

    def forward(self, images: Tensor) -> Tensor:
        """[B, 1, 8, 8] -> [B, T, width]."""
        tokens = self.embed(images).flatten(2).mT + self.places
        if self.token is None:
            return tokens
        return torch.cat([self.token.expand(len(tokens), -1, -1), tokens], 1)


class MixerBlock(nn.Module):
    """An MLP across tokens, then one across channels (Tolstikhin et al. 2021)."""

    def __init__(self, tokens: int, width: int) -> None:
        """Makes both MLPs."""
        super().__init__()

        def mlp(size: int) -> nn.Sequential:
            return nn.Sequential(nn.Linear(size, 2 * size), nn.GELU(), nn.Linear(2 * size, size))

        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.across_tokens, self.across_channels = mlp(tokens), mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, width] -> the same."""
        x = x + self.across_tokens(self.norms[0](x).mT).mT
        return x + self.across_channels(self.norms[1](x))


class Average(nn.Module):
    """The mean over tokens."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, width] -> [B, width]."""
        return x.mean(1)


def named(**layers: nn.Module) -> nn.Sequential:
    """A sequence whose layers have names."""
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    return model


def batches(images: Tensor, labels: Tensor, epochs: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches of 64."""
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(64):
            if len(chosen) == 64:
                yield images[chosen], labels[chosen]


def train(parameters: list[nn.Parameter], losses: Iterator[Tensor]) -> None:
    """Takes a step of Adam for every loss."""
    optimizer = torch.optim.Adam(parameters, lr=2e-3)
    for loss in losses:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def distil(
    student: nn.Module,
    teacher: nn.Module,
    loss_fn: nn.Module,
    data: Iterator[tuple[Tensor, Tensor]],
) -> None:
    """Trains the student, without labels, by a loss of two layers."""
    layers = ["early", "late"]
    with (
        pc_kernels.LayerOutputs(student, layers) as of_student,
        pc_kernels.LayerOutputs(teacher.eval(), layers) as of_teacher,
    ):

        def losses() -> Iterator[Tensor]:
            for images, _ in data:
                with torch.no_grad():
                    target = of_teacher(images).layers
                yield loss_fn(of_student(images).layers, target)

        # The loss has parameters of its own, made with the first batch: the optimiser has to have them.
        train([*student.parameters(), *loss_fn.parameters()], losses())


@torch.no_grad()
def knn_accuracy(
    model: nn.Module, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]
) -> float:
    """Accuracy in per cent of the 5 nearest neighbours in the model's features."""
    model.eval()
    knn = KNeighborsClassifier(5).fit(model(train[0]).numpy(), train[1].numpy())
    accuracy = 100 * knn.score(model(test[0]).numpy(), test[1].numpy())
    model.train()
    return float(accuracy)


def main(arguments: list[str] | None = None) -> None:
    """Trains both pairs, and prints the students' accuracy before and after."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=20, help="of each teacher and each student")
    parser.add_argument("--images", type=int, default=1797, help="use this many")
    given = parser.parse_args(arguments)

    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images[: given.images], dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target[: given.images])
    held_out = len(images) * 3 // 10
    test, data = (images[:held_out], labels[:held_out]), (images[held_out:], labels[held_out:])

    of_vit = pc_kernels.LowPass(grid=GRID, class_tokens=CLASS_TOKENS)
    of_mixer = pc_kernels.LowPass(grid=GRID)
    pairs: list[tuple[str, Callable[[], nn.Module], Callable[[], nn.Module], dict[str, object]]] = [
        ("ViT -> CNN", lambda: vit(64), lambda: cnn(8), {"teacher_filter": of_vit}),
        ("CNN -> MLP-Mixer", lambda: cnn(32), lambda: mixer(16), {"student_filter": of_mixer}),
    ]
    print("kNN accuracy on held-out digits, %:    teacher  student before  after")
    for title, make_teacher, make_student, filters in pairs:
        teacher, student = make_teacher(), make_student()
        head = nn.LazyLinear(10)
        train(
            [*teacher.parameters(), *head.parameters()],
            (
                functional.cross_entropy(head(teacher(images)), labels)
                for images, labels in batches(*data, given.epochs)
            ),
        )
        before = knn_accuracy(student, data, test)
        loss_fn = pc_kernels.LFCCLoss({"early": 0.5, "late": 1.0}, **filters)
        distil(student, teacher, loss_fn, batches(*data, given.epochs))
        of_teacher, after = (knn_accuracy(model, data, test) for model in (teacher, student))
        print(f"{title:<38} {of_teacher:8.1f} {before:15.1f} {after:6.1f}", flush=True)


if __name__ == "__main__":
    main()
