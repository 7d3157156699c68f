"""What a student is trained for. Each method is one class here, registered by its name.

A method is a module `method(student, teacher) -> scalar` on features [B, Ds] and [B, Dt], built from
a `Task` and its own options, all with defaults. Its parameters (projections, say) are trained with
the student's and dropped with it; its queues are buffers, so checkpoints hold them. Only one with
`uses_labels` is also given the labels [B]; only one with `layers`, pairs of a student's and a teacher's
by name, what these layers said in this step: two mappings from names to features.

The teacher's features are centred (`Dataset.with_teacher`). Losses are means over the batch; where
the source multiplies by a constant, it is left out: Adam's steps do not depend on it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from pc_kernels import (
    FeatureQueue,
    LFCCLoss,
    LowPass,
    PerceptionCoherenceLoss,
    SpearmanLoss,
    pairwise_dissimilarity,
)

Layers = Mapping[str, tuple[str, str]]
KEYWORD = inspect.Parameter.KEYWORD_ONLY


class Task(NamedTuple):
    """What a method may know before training: widths, classes, and what can be asked of the teacher.

    `teacher_head` fits, with labels, a linear layer [Dt] -> [classes] on the teacher's training
    features; only a method that uses labels may call it. `channels_of` takes pairs of a student's and a
    teacher's layer by name to pairs of their channels.
    """

    student_width: int
    teacher_width: int
    classes: int
    teacher_head: Callable[[], nn.Module]
    channels_of: Callable[[Layers], dict[str, tuple[int, int]]]


class Method(NamedTuple):
    """A registered method: its printed name, where it comes from, and the class."""

    title: str
    source: str
    make: Callable[..., nn.Module]
    uses_labels: bool

    @property
    def defaults(self) -> dict[str, Any]:
        """Its options where none are given."""
        known = inspect.signature(self.make).parameters.values()
        return {option.name: option.default for option in known if option.kind == KEYWORD}

    def build(self, task: Task, options: Mapping[str, Any]) -> nn.Module:
        """The objective.

        Raises:
            ValueError: an option is unknown or out of range.
        """
        try:
            return self.make(task, **options)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.title} with options {dict(options)}: {error}") from error


METHODS: dict[str, Method] = {}
M = TypeVar("M", bound=type[nn.Module])


def method(name: str, title: str, source: str, *, uses_labels: bool = False) -> Callable[[M], M]:
    """Registers a class, called with a `Task` and options, as a method."""

    def register(make: M) -> M:
        METHODS[name] = Method(title, source, make, uses_labels)
        return make

    return register


@method("pc", "PC", "perception coherence, after arXiv 2505.06595")
class PC(nn.Module):
    """Perception coherence within the batch, or against a queue of past features.

    The defaults are what teaches (docs/distill.md, "What to choose"), not those of the loss itself, which
    are the paper's form: `dissimilarity = "euclidean"`, `temperature = 0.1`.
    """

    def __init__(
        self,
        task: Task,
        *,
        dissimilarity: str = "cosine",
        temperature: float = 1.0,
        centre: bool = True,
        projection: int = 0,
        queue: int = 0,
        **options: Any,
    ) -> None:
        """Builds the loss.

        Args:
            task: the widths.
            dissimilarity: of student and teacher; see `PerceptionCoherenceLoss`.
            temperature: see there.
            centre: take the batch's mean off the student's features, as the teacher's is: cosines
                of features that end in a ReLU are all positive without it.
            projection: width of a linear layer between the student and the loss, dropped with it;
                0: none. The loss does not need one, whatever the widths.
            queue: rows of past features that anchors are compared with; 0: the batch itself.
            **options: the others of `PerceptionCoherenceLoss`.
        """
        super().__init__()
        width = projection or task.student_width
        self.head = nn.Linear(task.student_width, width) if projection else nn.Identity()
        self.centre = centre
        self.loss = PerceptionCoherenceLoss(
            dissimilarity=dissimilarity, temperature=temperature, **options
        )
        self.queue = FeatureQueue(queue, width, task.teacher_width) if queue else None

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """[B, Ds], [B, Dt] -> scalar."""
        student = self.head(student)
        if self.centre:
            student = student - student.mean(0)
        if self.queue is None:
            within: Tensor = self.loss(student, teacher)
            return within
        references = [rows.clone() for rows in self.queue]  # enqueuing overwrites, the graph stays
        against: Tensor = self.loss(student, teacher, *references)
        self.queue.enqueue(student.detach(), teacher)
        return against


@method("pc_shared", "PC, shared references", "perception coherence in the teacher's space")
class PCSharedReferences(nn.Module):
    """Perception coherence of the student, in the teacher's space, among the teacher's own features.

    A linear layer takes the student there, so that both networks look at the same references, the
    teacher's features of the batch and of past ones, as in SEED: half of what is compared stands still.
    """

    def __init__(
        self,
        task: Task,
        *,
        dissimilarity: str = "cosine",
        temperature: float = 0.3,
        queue: int = 1024,
        **options: Any,
    ) -> None:
        """`queue`: past rows; 0: the batch alone; the others: those of `PerceptionCoherenceLoss`."""
        super().__init__()
        self.projection = nn.Linear(task.student_width, task.teacher_width)
        self.loss = PerceptionCoherenceLoss(
            dissimilarity=dissimilarity, temperature=temperature, **options
        )
        self.queue = FeatureQueue(queue, 1, task.teacher_width) if queue else None

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """[B, Ds], [B, Dt] -> scalar; an input's own teacher's features are its nearest reference."""
        references = teacher
        if self.queue is not None:
            _, past = (rows.clone() for rows in self.queue)
            references = torch.cat([teacher, past])
            self.queue.enqueue(teacher[:, :1], teacher)
        loss: Tensor = self.loss(self.projection(student), teacher, references, references)
        return loss


@method("pc_correlation", "PC by correlation", "Spearman's correlation of the same ranks")
class PCCorrelation(nn.Module):
    """One minus the correlation of PC's soft ranks with the teacher's hard ones, row by row.

    What narrow ranks gain by the squared difference they do not gain here, so a student that is far from
    its teacher need not give up the order at a low temperature (docs/distill.md).
    """

    def __init__(
        self,
        task: Task,
        *,
        dissimilarity: str = "cosine",
        teacher_dissimilarity: str = "cosine",
        temperature: float = 0.3,
    ) -> None:
        """`temperature`: in units of the standard deviation of an anchor's dissimilarities."""
        super().__init__()
        self.metrics = dissimilarity, teacher_dissimilarity
        self.loss = SpearmanLoss(temperature=temperature)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """[B, Ds], [B, Dt] -> scalar."""
        others = ~torch.eye(len(student), dtype=torch.bool, device=student.device)
        mine, theirs = (
            pairwise_dissimilarity(x - x.mean(0), metric=metric)[others].view(len(x), -1)
            for x, metric in zip((student, teacher), self.metrics, strict=True)
        )
        loss: Tensor = self.loss(mine / mine.std(1, unbiased=False, keepdim=True), theirs)
        return loss


@method("fitnet", "FitNet", "Romero et al., ICLR 2015, arXiv 1412.6550, Eq. 3, on feature vectors")
class FitNet(nn.Module):
    """Mean squared error between a linear map of the student's features and the teacher's."""

    def __init__(self, task: Task) -> None:
        """Builds the regressor [Ds] -> [Dt]."""
        super().__init__()
        self.regressor = nn.Linear(task.student_width, task.teacher_width)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """[B, Ds], [B, Dt] -> scalar."""
        return functional.mse_loss(self.regressor(student), teacher)


@method("embed", "Embedding regression", "EmbedDistill, arXiv 2301.12005; sentence-transformers")
class EmbeddingRegression(nn.Module):
    """1 − cosine of a linear map of the student's features with the teacher's."""

    def __init__(self, task: Task) -> None:
        """Builds the projection [Ds] -> [Dt]."""
        super().__init__()
        self.projection = nn.Linear(task.student_width, task.teacher_width)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """[B, Ds], [B, Dt] -> scalar."""
        return (1 - functional.cosine_similarity(self.projection(student), teacher)).mean()


@method("rkd", "RKD", "Park et al., CVPR 2019, arXiv 1904.05068, Eqs. 5-8")
class RKD(nn.Module):
    """Huber losses of pairwise distances, relative to their mean, and of angles of triplets.

    O(B³) operations and memory for the angles.
    """

    def __init__(self, task: Task, *, distance: float = 1.0, angle: float = 2.0) -> None:
        """`distance`, `angle`: the two losses' weights; 1 : 2 is the paper's ratio."""
        super().__init__()
        self.distance, self.angle = distance, angle

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """[B, Ds], [B, Dt] -> scalar."""
        distances, angles = (
            functional.smooth_l1_loss(of(student), of(teacher))
            for of in (self._distances, self._angles)
        )
        return self.distance * distances + self.angle * angles

    @staticmethod
    def _distances(features: Tensor) -> Tensor:
        distances = functional.pdist(features)
        return distances / distances.mean()

    @staticmethod
    def _angles(features: Tensor) -> Tensor:
        """Cosines [B, B, B] at the corner i, between the directions to j and to k."""
        directions = functional.normalize(features[None] - features[:, None], dim=2)
        return directions @ directions.transpose(1, 2)


@method("sp", "SP", "Tung and Mori, ICCV 2019, arXiv 1907.09682, Eqs. 2-4")
class SP(nn.Module):
    """Squared differences of the two batches' inner products, each row scaled to norm 1."""

    def __init__(self, task: Task) -> None:
        """Has neither parameters nor options."""
        super().__init__()

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """[B, Ds], [B, Dt] -> scalar."""
        student, teacher = (functional.normalize(x @ x.T) for x in (student, teacher))
        return (student - teacher).square().mean()


@method("pkt", "PKT", "Passalis and Tefas, ECCV 2018, arXiv 1803.10837, Eqs. 4-7")
class PKT(nn.Module):
    """KL divergence of the student's neighbour probabilities, (1 + cosine)/2 made to sum to 1."""

    def __init__(self, task: Task) -> None:
        """Has neither parameters nor options."""
        super().__init__()

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """[B, Ds], [B, Dt] -> scalar."""
        p, q = self._probabilities(teacher), self._probabilities(student)
        return (p * ((p + EPSILON) / (q + EPSILON)).log()).sum(1).mean()

    @staticmethod
    def _probabilities(features: Tensor) -> Tensor:
        features = functional.normalize(features)
        similar = (1 + features @ features.T) / 2
        return similar / similar.sum(1, keepdim=True)


EPSILON = 1e-7  # of PKT's logarithm, as in the authors' code


class _Relations(nn.Module):
    """Cross-entropy of two softmaxes of cosines, with rows of a queue and perhaps one's own.

    CompRess, SEED and RRD are this, each with its own spaces: `spaces` takes features to unit
    vectors, the student's and the teacher's. The teacher's entropy, a constant, is left out.
    """

    def __init__(self, task: Task, queue: int, student_tau: float, teacher_tau: float) -> None:
        super().__init__()
        self.student_tau, self.teacher_tau = student_tau, teacher_tau
        self.queue = FeatureQueue(queue, *self.widths(task))

    def widths(self, task: Task) -> tuple[int, int]:
        """Of what the queue keeps for the student and for the teacher."""
        raise NotImplementedError

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """[B, Ds], [B, Dt] -> scalar."""
        raise NotImplementedError

    def cross_entropy(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Of cosines [B, K] of the student's with its references, given the teacher's: scalar."""
        p = (teacher / self.teacher_tau).softmax(1)
        return -(p * (student / self.student_tau).log_softmax(1)).sum(1).mean()


@method(
    "compress", "CompRess", "Abbasi Koohpayegani et al., NeurIPS 2020, arXiv 2010.14713, two queues"
)
class CompRess(_Relations):
    """The student's cosines with its own past features follow the teacher's with its own."""

    def __init__(self, task: Task, *, queue: int = 2048, temperature: float = 0.04) -> None:
        """`queue`: rows of each queue (128,000 in the paper); `temperature`: of both softmaxes."""
        super().__init__(task, queue, temperature, temperature)

    def widths(self, task: Task) -> tuple[int, int]:
        """Each network's own."""
        return task.student_width, task.teacher_width

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """[B, Ds], [B, Dt] -> scalar; 0 at the first batch, when the queues are empty."""
        student, teacher = functional.normalize(student), functional.normalize(teacher)
        mine, theirs = (rows.clone() for rows in self.queue)
        loss = self.cross_entropy(student @ mine.T, teacher @ theirs.T)
        self.queue.enqueue(student.detach(), teacher)
        return loss


@method("seed", "SEED", "Fang et al., ICLR 2021, arXiv 2101.04731, Eqs. 1-5")
class SEED(_Relations):
    """The student's cosines with the teacher's present and past features follow the teacher's own."""

    def __init__(
        self, task: Task, *, queue: int = 2048, student_tau: float = 0.2, teacher_tau: float = 0.01
    ) -> None:
        """`queue`: rows (65,536 in the paper). The projection [Ds] -> [Dt] has a hidden layer."""
        super().__init__(task, queue, student_tau, teacher_tau)
        width = task.student_width
        self.projection = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, task.teacher_width)
        )

    def widths(self, task: Task) -> tuple[int, int]:
        """One queue, of the teacher's features; the student's side is empty."""
        return 1, task.teacher_width

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """[B, Ds], [B, Dt] -> scalar."""
        student = functional.normalize(self.projection(student))
        teacher = functional.normalize(teacher)
        _, past = (rows.clone() for rows in self.queue)
        own = [(x * teacher).sum(1, keepdim=True) for x in (student, teacher)]
        cosines = [
            torch.cat([o, x @ past.T], 1) for o, x in zip(own, (student, teacher), strict=True)
        ]
        self.queue.enqueue(teacher[:, :1], teacher)
        return self.cross_entropy(*cosines)


@method("rrd", "RRD", "Giakoumoglou and Stathaki, arXiv 2407.12073; giakoumoglou/distillers")
class RRD(_Relations):
    """As SEED, but in a narrow space, to which the teacher comes by a fixed random projection.

    The teacher's projection stays as it was made: in the authors' code no gradient reaches it.
    """

    def __init__(
        self,
        task: Task,
        *,
        queue: int = 2048,
        student_tau: float = 0.1,
        teacher_tau: float = 0.02,
        width: int = 128,
    ) -> None:
        """`queue`: rows (16,384 in the paper); `width`: of the common space."""
        self.width = width
        super().__init__(task, queue, student_tau, teacher_tau)
        self.student = nn.Linear(task.student_width, width)
        self.teacher = nn.Linear(task.teacher_width, width).requires_grad_(False)

    def widths(self, task: Task) -> tuple[int, int]:
        """One queue, of the teacher's projections; the student's side is empty."""
        return 1, self.width

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """[B, Ds], [B, Dt] -> scalar; the batch itself is in the queue, as in the authors' code."""
        student = functional.normalize(self.student(student))
        teacher = functional.normalize(self.teacher(teacher))
        self.queue.enqueue(teacher[:, :1], teacher)
        _, references = (rows.clone() for rows in self.queue)
        return self.cross_entropy(student @ references.T, teacher @ references.T)


@method("crd", "InfoNCE", "CRD, Tian et al., ICLR 2020, arXiv 1910.10699; softmax over the batch")
class InfoNCE(nn.Module):
    """Which of the teacher's projections is of the same input, and the same the other way round.

    CRD's contrast with CRD's linear embeddings, by a softmax over the batch (van den Oord et al.,
    arXiv 1807.03748, Eq. 4) in place of noise-contrastive estimation over a memory of all inputs.
    """

    def __init__(self, task: Task, *, width: int = 128, temperature: float = 0.07) -> None:
        """`width`: of the common space, which both networks are projected to."""
        super().__init__()
        self.student = nn.Linear(task.student_width, width)
        self.teacher = nn.Linear(task.teacher_width, width)
        self.temperature = temperature

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """[B, Ds], [B, Dt] -> scalar."""
        student = functional.normalize(self.student(student))
        teacher = functional.normalize(self.teacher(teacher))
        logits = student @ teacher.T / self.temperature
        same = torch.arange(len(logits), device=logits.device)
        both = functional.cross_entropy(logits, same) + functional.cross_entropy(logits.T, same)
        return both / 2


Said = tuple[Mapping[str, Tensor], Mapping[str, Tensor]]


@method("lfcc", "LFCC", "after arXiv 2405.18524")
class LFCC(nn.Module):
    """The contrastive loss of low frequencies of several layers; or, without layers, of the features.

    Layers are those of this step, so the teacher has to be a network that runs in it. Features may be
    cached: they are vectors, without frequencies to filter, and a projection a side is what is left.
    """

    def __init__(
        self,
        task: Task,
        *,
        layers: Mapping[str, Sequence[str]] | None = None,
        layer_weights: Mapping[str, float] | None = None,
        student_filter: Mapping[str, Any] | None = None,
        teacher_filter: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        """Builds the loss.

        Args:
            task: the widths, and the layers' channels.
            layers: names, each with the student's layer and the teacher's, as in `named_modules()`.
            layer_weights: of each name; 1 by default.
            student_filter: options of the student's `LowPass`, which say how tokens lie.
            teacher_filter: the teacher's.
            **options: those of `LFCCLoss`.
        """
        super().__init__()
        if any(isinstance(pair, str) or len(pair) != 2 for pair in (layers or {}).values()):
            raise ValueError(f"layers: got {layers}; allowed: NAME = [student's, teacher's]")
        self.layers = {name: (pair[0], pair[1]) for name, pair in (layers or {}).items()}
        self.variant = f"layers {', '.join(self.layers)}" if self.layers else "feature vectors"
        widths = {"features": (task.student_width, task.teacher_width)}
        channels = task.channels_of(self.layers) if self.layers else widths
        filters = [LowPass(**_lists_as_tuples(of or {})) for of in (student_filter, teacher_filter)]
        self.loss = LFCCLoss(
            dict.fromkeys(channels, 1.0) if layer_weights is None else layer_weights,
            student_filter=filters[0], teacher_filter=filters[1], channels=channels, **options,
        )  # fmt: skip

    def forward(self, student: Tensor, teacher: Tensor, said: Said | None = None) -> Tensor:
        """[B, Ds], [B, Dt] and, with layers, what they said -> scalar."""
        loss: Tensor = self.loss(*(said or ({"features": student}, {"features": teacher})))
        return loss


@method("pc+lfcc", "PC + LFCC", "both, LFCC with a share: PC's values are much smaller")
class PCAndLFCC(nn.Module):
    """Perception coherence of the features, and a share of the contrastive loss."""

    def __init__(
        self,
        task: Task,
        *,
        share: float = 0.01,
        pc: Mapping[str, Any] | None = None,
        lfcc: Mapping[str, Any] | None = None,
    ) -> None:
        """`share`: what LFCC weighs beside PC; `pc`, `lfcc`: the options of each."""
        super().__init__()
        self.pc, self.lfcc = PC(task, **(pc or {})), LFCC(task, **(lfcc or {}))
        self.layers, self.variant = self.lfcc.layers, self.lfcc.variant
        self.share = share

    def forward(self, student: Tensor, teacher: Tensor, said: Said | None = None) -> Tensor:
        """[B, Ds], [B, Dt] and, with layers, what they said -> scalar."""
        loss: Tensor = self.pc(student, teacher) + self.share * self.lfcc(student, teacher, said)
        return loss


def _lists_as_tuples(options: Mapping[str, Any]) -> dict[str, Any]:
    """TOML has lists alone."""
    return {
        key: tuple(value) if isinstance(value, list) else value for key, value in options.items()
    }


OURS = (PC, PCSharedReferences, PCCorrelation)


@method("kd", "KD (uses labels)", "Hinton et al. 2015, arXiv 1503.02531", uses_labels=True)
class KD(nn.Module):
    """Cross-entropy with the labels, and with the softened classes of a probe on the teacher."""

    def __init__(self, task: Task, *, temperature: float = 4.0, soft: float = 0.9) -> None:
        """`temperature`: of both softmaxes; `soft`: weight of the teacher's, 1 − soft the labels'."""
        super().__init__()
        self.head = nn.Linear(task.student_width, task.classes)
        self.teacher_head = task.teacher_head().requires_grad_(False)
        self.temperature, self.soft = temperature, soft

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """[B, Ds], [B, Dt], [B] -> scalar."""
        logits = self.head(student)
        p = (self.teacher_head(teacher) / self.temperature).softmax(1)
        q = (logits / self.temperature).log_softmax(1)
        soft = functional.kl_div(q, p, reduction="batchmean") * self.temperature**2
        return self.soft * soft + (1 - self.soft) * functional.cross_entropy(logits, labels)
