"""The reference trainer's methods against formulas written out anew, and its networks' sizes."""

from __future__ import annotations

import math
from itertools import permutations, product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pc_kernels import reference
from pc_kernels.distill.methods import METHODS, Task
from pc_kernels.distill.networks import NETWORKS, OF_TEXTS, make_network

B, DS, DT, CLASSES = 7, 3, 5, 4
TASK = Task(DS, DT, CLASSES, lambda: nn.Linear(DT, CLASSES), lambda layers: {})


def features(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, DS, generator=generator), torch.randn(B, DT, generator=generator)


def build(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(1)
    return METHODS[name].build(TASK, options)


def linear(layer: nn.Module, x: np.ndarray) -> np.ndarray:
    assert isinstance(layer, nn.Linear)
    return x @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy()


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


def huber(x: float) -> float:
    return x * x / 2 if abs(x) < 1 else abs(x) - 0.5


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x) / np.exp(x).sum()


def cross_entropy(p: np.ndarray, q: np.ndarray) -> float:
    return -sum(a * math.log(b) for a, b in zip(p, q, strict=True))


def fitnet(loss: Any, s: np.ndarray, t: np.ndarray) -> float:
    return float(np.mean([(a - b) ** 2 for a, b in zip(linear(loss.regressor, s), t, strict=True)]))


def embed(loss: Any, s: np.ndarray, t: np.ndarray) -> float:
    return float(
        np.mean([1 - cosine(a, b) for a, b in zip(linear(loss.projection, s), t, strict=True)])
    )


def rkd(loss: Any, s: np.ndarray, t: np.ndarray) -> float:
    pairs = list(permutations(range(B), 2))

    def distance(x: np.ndarray) -> list[float]:
        found = [math.dist(x[i], x[j]) for i, j in pairs]
        return [d / np.mean(found) for d in found]

    def angle(x: np.ndarray, i: int, j: int, k: int) -> float:
        return 0.0 if i in (j, k) else cosine(x[j] - x[i], x[k] - x[i])

    distances = [huber(a - b) for a, b in zip(distance(s), distance(t), strict=True)]
    triplets = product(range(B), repeat=3)
    angles = [huber(angle(s, *three) - angle(t, *three)) for three in triplets]
    return float(np.mean(distances) + 2 * np.mean(angles))


def sp(loss: Any, s: np.ndarray, t: np.ndarray) -> float:
    def rows(x: np.ndarray) -> list[list[float]]:
        gram = [[float(a @ b) for b in x] for a in x]
        return [[v / math.hypot(*row) for v in row] for row in gram]

    pairs = product(range(B), repeat=2)
    one, two = rows(s), rows(t)
    return sum((one[i][j] - two[i][j]) ** 2 for i, j in pairs) / B**2


def pkt(loss: Any, s: np.ndarray, t: np.ndarray) -> float:
    def probabilities(x: np.ndarray) -> np.ndarray:
        similar = np.array([[(1 + cosine(a, b)) / 2 for b in x] for a in x])
        return np.array([row / row.sum() for row in similar])

    p, q = probabilities(t), probabilities(s)
    return float(
        np.mean([cross_entropy(a, b) - cross_entropy(a, a) for a, b in zip(p, q, strict=True)])
    )


def info_nce(loss: Any, s: np.ndarray, t: np.ndarray) -> float:
    s, t = linear(loss.student, s), linear(loss.teacher, t)
    logits = np.array([[cosine(a, b) / 0.07 for b in t] for a in s])
    ways = [
        [-math.log(softmax(row)[i]) for i, row in enumerate(rows)] for rows in (logits, logits.T)
    ]
    return float(np.mean(ways))


def by_correlation(loss: Any, s: np.ndarray, t: np.ndarray) -> float:
    def others(x: np.ndarray, i: int) -> np.ndarray:
        x = x - x.mean(0)
        return np.array([1 - cosine(x[i], x[j]) for j in range(B) if j != i])

    def correlation(row: np.ndarray, target: np.ndarray) -> float:
        row = row / np.std(row) / 0.3
        soft = [sum(1 / (1 + math.exp(b - a)) for b in row) for a in row]
        return float(np.corrcoef(soft, [(target < value).sum() for value in target])[0, 1])

    return 1 - float(np.mean([correlation(others(s, i), others(t, i)) for i in range(B)]))


IN_BATCH = {
    "pc_correlation": by_correlation,
    "fitnet": fitnet,
    "embed": embed,
    "rkd": rkd,
    "sp": sp,
    "pkt": pkt,
    "crd": info_nce,
}


@pytest.mark.parametrize("name", IN_BATCH)
def test_formula(name: str) -> None:
    student, teacher = features(0)
    loss = build(name)
    expected = IN_BATCH[name](loss, student.double().numpy(), teacher.double().numpy())
    assert loss(student, teacher).item() == pytest.approx(expected, rel=1e-5)


def relations(
    student: list[list[float]], teacher: list[list[float]], taus: tuple[float, float]
) -> float:
    """Mean cross-entropy of the softmax of cosines, the student's against the teacher's."""
    rows = zip(student, teacher, strict=True)
    return float(
        np.mean(
            [
                cross_entropy(softmax(np.array(t) / taus[1]), softmax(np.array(s) / taus[0]))
                for s, t in rows
            ]
        )
    )


def cosines(x: np.ndarray, references: np.ndarray) -> list[list[float]]:
    return [[cosine(a, b) for b in references] for a in x]


def test_relations_with_a_queue() -> None:
    """Three batches into queues that hold two: the third's loss."""
    batches = [features(seed) for seed in range(3)]
    (s0, t0), (s1, t1), (s, t) = ((a.double().numpy(), b.double().numpy()) for a, b in batches)
    options = {"queue": 2 * B}
    losses = {name: build(name, **options) for name in ("compress", "seed", "rrd")}
    got = {name: [loss(*batch).item() for batch in batches] for name, loss in losses.items()}
    past_s, past_t = np.concatenate([s0, s1]), np.concatenate([t0, t1])

    assert got["compress"][0] == 0
    expected = relations(cosines(s, past_s), cosines(t, past_t), (0.04, 0.04))
    assert got["compress"][2] == pytest.approx(expected, rel=1e-4)

    first, _, last = losses["seed"].projection
    projected = linear(last, np.maximum(linear(first, s), 0))
    own = [[[cosine(a, b)] for a, b in zip(x, t, strict=True)] for x in (projected, t)]
    rows = [cosines(x, past_t) for x in (projected, t)]
    joined = [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(own, rows, strict=True)]
    assert got["seed"][2] == pytest.approx(relations(*joined, (0.2, 0.01)), rel=1e-4)

    loss = losses["rrd"]
    references = linear(loss.teacher, np.concatenate([t1, t]))
    rows = [
        cosines(linear(loss.student, s), references),
        cosines(linear(loss.teacher, t), references),
    ]
    assert got["rrd"][2] == pytest.approx(relations(*rows, (0.1, 0.02)), rel=1e-4)
    assert not loss.teacher.weight.requires_grad


def test_pc() -> None:
    batches = [features(seed) for seed in range(2)]
    plain = {"dissimilarity": "euclidean", "centre": False}
    within = build("pc", temperature=0.3, **plain)
    against = build("pc", temperature=0.1, queue=B, **plain)
    expected = reference.perception_coherence_loss(*batches[1], temperature=0.3)
    assert within(*batches[1]).item() == pytest.approx(expected.item(), rel=1e-5)
    assert against(*batches[0]).item() == 0
    expected = reference.perception_coherence_loss(*batches[1], *batches[0])
    assert against(*batches[1]).item() == pytest.approx(expected.item(), rel=1e-5)
    shared = build("pc_shared", queue=B, dissimilarity="euclidean")
    for (student, teacher), past in zip(batches, (None, batches[0][1]), strict=True):
        rows = shared.projection(student).detach()
        refs = teacher if past is None else torch.cat([teacher, past])
        expected = reference.perception_coherence_loss(rows, teacher, refs, refs, temperature=0.3)
        assert shared(student, teacher).item() == pytest.approx(expected.item(), rel=1e-5)
    changed = build("pc", projection=4)
    student, teacher = batches[0]
    rows = torch.from_numpy(linear(changed.head, student.double().numpy()))
    expected = reference.perception_coherence_loss(
        rows - rows.mean(0), teacher.double(), dissimilarity="cosine", temperature=1.0
    )
    assert changed(student, teacher).item() == pytest.approx(expected.item(), rel=1e-5)


def test_lfcc_of_layers() -> None:
    """What both networks' layers say in a step, weighed, with tokens that lie as the filter is told."""
    layers = {"early": ["0", "1"], "late": ["2", "3"]}
    task = TASK._replace(channels_of=lambda given: {"early": (4, 6), "late": (3, 5)})
    options = {"layers": layers, "width": 8, "teacher_filter": {"grid": [2, 2], "class_tokens": 1}}
    torch.manual_seed(1)
    loss = METHODS["lfcc"].build(task, options | {"layer_weights": {"early": 0.5, "late": 2.0}})
    assert loss.layers == {"early": ("0", "1"), "late": ("2", "3")}
    assert loss.variant == "layers early, late"
    mine = {"early": torch.randn(B, 4, 6, 6), "late": torch.randn(B, 3, 3, 3)}
    theirs = {"early": torch.randn(B, 5, 6), "late": torch.randn(B, 5, 5)}
    value = loss(*features(0), (mine, theirs))
    terms = loss.loss.terms(mine, theirs)
    expected = sum({"early": 0.5, "late": 2.0}[layer] / 3 * x for (layer, _), x in terms.items())
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    both = METHODS["pc+lfcc"].build(task, {"share": 0.1, "lfcc": options})
    student, teacher = features(0)
    expected = both.pc(student, teacher) + 0.1 * both.lfcc(student, teacher, (mine, theirs))
    assert both(student, teacher, (mine, theirs)).item() == pytest.approx(expected.item())
    assert build("lfcc").variant == "feature vectors"


def test_kd_uses_labels() -> None:
    student, teacher = features(0)
    labels = torch.arange(B) % CLASSES
    loss = build("kd")
    value = loss(student, teacher, labels).item()
    s = linear(loss.head, student.double().numpy())
    t = linear(loss.teacher_head, teacher.double().numpy())
    soft, hard = [], []
    for row, target, label in zip(s, t, labels.tolist(), strict=True):
        p, q = softmax(target / 4), softmax(row / 4)
        soft.append(16 * (cross_entropy(p, q) - cross_entropy(p, p)))
        hard.append(-math.log(softmax(row)[label]))
    assert value == pytest.approx(0.9 * np.mean(soft) + 0.1 * np.mean(hard), rel=1e-5)
    assert [name for name, method in METHODS.items() if method.uses_labels] == ["kd"]


@pytest.mark.parametrize("name", METHODS)
def test_trains_student_and_its_own_parameters(name: str) -> None:
    loss = build(name)
    targets = (torch.arange(B) % CLASSES,) if METHODS[name].uses_labels else ()
    for seed in range(2):  # the first batch fills the queues
        student, teacher = features(seed)
        value = loss(student.requires_grad_(), teacher, *targets)
    value.backward()
    assert value.shape == ()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert student.grad.abs().max() > 0
    trained = [p for p in loss.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)


@pytest.mark.parametrize(
    ("name", "options"),
    [("fitnet", {"queue": 3}), ("pc", {"temprature": 1}), ("pc", {"queue": -1})],
)
def test_bad_options(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        build(name, **options)


# Parameters with a classifier of 100 classes, as RepDistiller's networks have them
# (github.com/HobbitLong/RepDistiller, models/, built and counted).
COUNTS = {"resnet8x4": 1_233_540, "resnet32x4": 7_433_860, "wrn_16_2": 703_284}
COUNTS |= {"wrn_40_2": 2_255_156, "mobilenet_v2": 812_836, "shufflenet_v2": 1_355_528}


@pytest.mark.parametrize("name", sorted(NETWORKS.keys() - OF_TEXTS.keys()))
def test_networks(name: str) -> None:
    network = make_network(name, (3, 32, 32)).eval()
    count = sum(parameter.numel() for parameter in network.parameters())
    with_classifier = count + 100 * network.width + 100
    assert with_classifier == COUNTS.get(name, with_classifier)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        assert network(images).shape == (2, network.width)
        narrow = make_network(name, (1, 8, 8), width=5).eval()
        assert narrow(images[:, :1, :8, :8]).shape == (2, 5)


def test_network_errors() -> None:
    with pytest.raises(ValueError, match="network: got 'vgg'; allowed: resnet8_small"):
        make_network("vgg", (3, 32, 32))
    with pytest.raises(ValueError, match=r"resnet8 takes images .* of shape \(5,\)"):
        make_network("resnet8", (5,))
