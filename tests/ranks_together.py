"""One of several processes that share a batch: what tests/test_distributed.py starts.

python ranks_together.py RANK STORE FOLDER     scenarios from FOLDER/scenarios, results to FOLDER
"""

from __future__ import annotations

import copy
import os
import pickle
import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import pc_kernels
from pc_kernels import metrics


@torch.no_grad()
def model_of(scenario: dict[str, Any]) -> nn.Module:
    """The same weights on every rank, multiples of 1/8: features of such inputs are exact."""
    torch.manual_seed(3)
    width = scenario["x"].shape[1]
    model = nn.Sequential(nn.Linear(width, 7), nn.ReLU(), nn.Linear(7, 5))
    for parameter in model.parameters():
        parameter.copy_((parameter * 32).round() / 8)
    return model.to(scenario["x"].dtype)


def step(
    model: nn.Module, x: Tensor, teacher: Tensor, upstream: Tensor | None, **options: Any
) -> Tensor:
    """A forward and backward; `upstream` [A] weights the losses of reduction "none"."""
    student = model(x).to(options.pop("student_dtype", x.dtype))
    loss = pc_kernels.perception_coherence_loss(student, teacher, **options)
    (loss if upstream is None else (loss * upstream).sum()).backward()
    return loss.detach()


def grads_of(model: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


def run(scenario: dict[str, Any], rank: int) -> tuple[Tensor, list[Tensor]]:
    """This rank's loss, and the parameters' gradients averaged over ranks as DDP averages them."""
    start = sum(scenario["sizes"][:rank])
    mine = slice(start, start + scenario["sizes"][rank])
    upstream = scenario.get("upstream")
    model = model_of(scenario)
    wrapped = model
    if scenario.get("ddp"):
        wrapped = nn.parallel.DistributedDataParallel(model)
    weights, pair_mask = scenario.get("weights"), scenario.get("pair_mask")
    if pair_mask is not None and len(pair_mask) > 1:
        pair_mask = pair_mask[mine]
    loss = step(
        wrapped,
        scenario["x"][mine],
        scenario["teacher"][mine],
        None if upstream is None else upstream[mine],
        weights=None if weights is None else weights[mine],
        pair_mask=pair_mask,
        process_group=dist.group.WORLD,
        **scenario["options"],
    )
    grads = grads_of(model)
    if not scenario.get("ddp"):
        for grad in grads:
            dist.all_reduce(grad)
            grad /= dist.get_world_size()
    return loss, grads


def queue_of(scenario: dict[str, Any], rank: int) -> tuple[Tensor, ...]:
    """A queue that all ranks have filled."""
    start = sum(scenario["sizes"][:rank])
    mine = slice(start, start + scenario["sizes"][rank])
    x, teacher = scenario["x"], scenario["teacher"]
    queue = pc_kernels.FeatureQueue(
        QUEUE_SIZE, x.shape[1], teacher.shape[1], process_group=dist.group.WORLD
    )
    queue.enqueue(x[mine], teacher[mine])
    return tuple(queue)


def flattened(found: Any) -> list[float]:
    """The numbers of a result."""
    if isinstance(found, Tensor):
        return [float(found)]
    parts = found.values() if isinstance(found, dict) else found
    return [number for part in parts for number in flattened(part)]


def metrics_of(x: Tensor, teacher: Tensor, mine: slice, group: Any = None) -> Tensor:
    """Metrics of these rows, batch by batch: of lists, of a pool, of retrieval, of coherence."""
    kinds = (metrics.NDCG, metrics.AUC, metrics.RetrievalMetric, metrics.CoherenceMetric)
    made = [kind(process_group=group) for kind in kinds]
    if x[mine].numel():
        for features, targets in zip(x[mine].split(10), teacher[mine].split(10), strict=True):
            lists, classes = (features, features > 1), targets[:, 0].long()
            given = (lists, lists, (features, classes), (features, targets))
            for metric, data in zip(made, given, strict=True):
                metric.update(*data)
    return torch.tensor(flattened([metric.compute() for metric in made]))


def share_of(rank: int, rows: int) -> slice:
    """Two thirds for the first rank, the rest for the second, and nothing for the others."""
    ends = (0, 2 * rows // 3, rows)
    return slice(*(ends[rank : rank + 2] if rank < 2 else (rows, rows)))


def retrieval_of(x: Tensor, teacher: Tensor, mine: slice, group: Any = None) -> list[Any]:
    """Losses of retrieval, and the gradients in all embeddings that this rank's come to."""
    found = []
    for kind, reduction in ((pc_kernels.SmoothAPLoss, "mean"), (pc_kernels.RecallAtKLoss, "none")):
        leaf = x.clone().requires_grad_()
        loss_fn = kind(temperature=0.1, reduction=reduction, process_group=group)
        loss = loss_fn(leaf[mine], teacher[mine, 0].long())
        loss.sum().backward()
        found.append((loss.detach(), leaf.grad))
    return found


def lfcc_of(scenario: dict[str, Any], mine: slice) -> tuple[Tensor, Tensor]:
    """LFCC of a vector and a map: the loss, and the gradient in the student's projection."""
    torch.manual_seed(4)
    world = dist.group.WORLD if dist.is_initialized() else None
    x, teacher = scenario["x"][mine], scenario["teacher"][mine]
    channels = [(x.shape[1], teacher.shape[1] // 2)]
    loss_fn = pc_kernels.LFCCLoss([1.0], channels=channels, temperature=0.5, process_group=world)
    loss = loss_fn([x], [teacher.unflatten(1, (-1, 1, 2))])
    loss.backward()
    weight = loss_fn.student_projections["0 4x4"].linear.weight
    assert weight.grad is not None
    return loss.detach(), weight.grad


QUEUE_SIZE = 8

WRONG_ON_RANK_1 = {
    "three dimensions": "student must be",
    "no tensor": "student must be a torch.Tensor",
    "rows": "same inputs",
    "weights": "weights must hold one for each anchor",
    "mask dtype": "pair_mask must be a bool tensor",
    "queue": "the queue holds width 3",
    "layers": "teacher['0'] has shape (4, 1, 2): say how its tokens lie",
}
"""What one rank alone can notice, and its own error for it."""


WRONG_OPTIONS: dict[str, dict[str, Any]] = {
    "temperature must be finite and > 0; got -1": {"temperature": -1},
    "reduction must be one of": {"reduction": "average"},
    "has no option 'temprature'": {"temprature": 0.1},
}
"""What rank 1 alone says, by its own error."""

OTHER_OPTIONS: dict[str, tuple[Any, Any]] = {
    "dissimilarity": ("euclidean", "cosine"),
    "teacher_dissimilarity": ("euclidean", torch.cdist),
    "relaxation": ("logistic", "normal"),
    "temperature": (0.1, 0.2),
    "scale": ("std", None),
    "penalty": ("squared", "huber"),
    "reduction": ("mean", "none"),
}
"""What the other ranks say, and rank 1."""


def fails_on_rank_1(anchors: Tensor, references: Tensor) -> Tensor:
    if dist.get_rank() == 1:
        raise ArithmeticError("a user's function")
    return torch.cdist(anchors, references)


def error_with(group: Any, options: dict[str, Any]) -> str:
    student, teacher = torch.randn(4, 3, requires_grad=True), torch.randn(4, 2)
    try:
        pc_kernels.perception_coherence_loss(student, teacher, process_group=group, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def option_errors(rank: int) -> dict[str, str]:
    """The errors that this rank gets where rank 1 says something else, or is not in the group."""
    world = dist.group.WORLD
    cases = {kind: options if rank == 1 else {} for kind, options in WRONG_OPTIONS.items()}
    cases |= {name: {name: values[rank == 1]} for name, values in OTHER_OPTIONS.items()}
    cases["function"] = {"dissimilarity": fails_on_rank_1}
    errors = {kind: error_with(world, options) for kind, options in cases.items()}
    errors["outside"] = error_with(dist.new_group([0]), {})
    errors["no group"] = error_with("all", {})
    return errors


def layers_under_ddp(rank: int) -> tuple[Tensor, Tensor]:
    """The gradient of a layer that the loss reaches, and the head's, which it does not."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    student = nn.parallel.DistributedDataParallel(
        pc_kernels.LayerOutputs(model, ["1"]), find_unused_parameters=True
    )
    student(torch.full((2, 3), rank + 1.0)).layers["1"].sum().backward()
    assert model[0].weight.grad is not None
    return model[0].weight.grad, grads_of(model[2])[0]


def copies(rank: int) -> dict[str, str]:
    """What becomes of modules with a group when they are copied and pickled: losses, or errors."""
    torch.manual_seed(rank)
    student, teacher = torch.randn(5, 3), torch.randn(5, 3)
    world, everyone = dist.group.WORLD, dist.new_group(range(dist.get_world_size()))
    said = {}
    for kind in (pc_kernels.PerceptionCoherenceLoss, pc_kernels.ContrastiveLoss):
        for name, group in (("world", world), ("by name", "world"), ("other", everyone)):
            loss_fn = nn.Sequential(kind(process_group=group))[0]
            same = copy.deepcopy(loss_fn)
            said[f"{kind.__name__} {name}"] = str(loss_fn(student, teacher).item())
            said[f"{kind.__name__} {name}, copied"] = str(same(student, teacher).item())
            assert same.process_group is group
            try:
                again = pickle.loads(pickle.dumps(loss_fn))
                said[f"{kind.__name__} {name}, pickled"] = str(again(student, teacher).item())
            except TypeError as error:
                said[f"{kind.__name__} {name}, pickled"] = str(error)
    queue = copy.deepcopy(pc_kernels.FeatureQueue(20, 3, 3, process_group="world"))
    queue.enqueue(student, teacher)
    said["queue"] = str(len(queue))
    return said


def mismatch(kind: str, rank: int) -> str:
    """The error that this rank gets if rank 1 brings something else than the others."""
    student, teacher = torch.zeros(4, 3), torch.zeros(4, 2)
    options: dict[str, Any] = {}
    if rank == 1:
        if kind == "student width":
            student = torch.zeros(4, 5)
        if kind == "teacher width":
            teacher = torch.zeros(4, 5)
        if kind == "student dtype":
            student = student.double()
        if kind == "teacher dtype":
            teacher = teacher.bfloat16()
        if kind == "three dimensions":
            student = student[None]
        if kind == "rows":
            student = student[:3]
        if kind == "weights":
            options["weights"] = torch.ones(7)
        if kind == "mask dtype":
            options["pair_mask"] = torch.ones(4, 1)
        if kind == "pair mask":
            options["pair_mask"] = torch.ones(4, 5, dtype=torch.bool)
        if kind == "no tensor":
            student = None
        if kind == "queue":
            student = torch.zeros(4, 2)
    references = (student, teacher) if kind == "references" else ()
    try:
        if kind == "layers":
            loss_fn = pc_kernels.LFCCLoss([1.0], process_group=dist.group.WORLD)
            loss_fn([student], [teacher] if rank != 1 else [teacher[:, None]])
        if kind == "queue":
            queue = pc_kernels.FeatureQueue(8, 3, 2, process_group=dist.group.WORLD)
            queue.enqueue(student, teacher)
        pc_kernels.perception_coherence_loss(
            student, teacher, *references, process_group=dist.group.WORLD, **options
        )
    except (TypeError, ValueError, RuntimeError) as error:
        return str(error)
    return "no error"


def main() -> None:
    rank, store, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    scenarios = torch.load(f"{folder}/scenarios")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=len(next(iter(scenarios.values()))["sizes"]),
        timeout=timedelta(seconds=60),
    )
    results = {name: run(scenario, rank) for name, scenario in scenarios.items()}
    first = next(iter(scenarios.values()))
    results["queue"] = queue_of(first, rank)
    data = first["x"], first["teacher"]
    mine = share_of(rank, len(first["x"]))
    results["metrics"] = metrics_of(*data, mine, dist.group.WORLD)
    results["retrieval"] = retrieval_of(*data, mine, dist.group.WORLD)
    start = sum(first["sizes"][:rank])
    results["lfcc"] = lfcc_of(first, slice(start, start + first["sizes"][rank]))
    alike = ("student width", "teacher width", "student dtype", "teacher dtype", "pair mask")
    kinds = (*alike, "references", *WRONG_ON_RANK_1)
    errors: dict[str, Any] = {kind: mismatch(kind, rank) for kind in kinds}
    errors["options"] = option_errors(rank)
    results["copies"] = copies(rank)
    results["layers under DDP"] = layers_under_ddp(rank)
    torch.save((results, errors), f"{folder}/results{rank}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    os._exit(0)  # not through Python's finalisation: see RUN_AND_LEAVE in test_distributed.py
