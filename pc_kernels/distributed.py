"""Several processes, one joint batch.

With `process_group=` every rank takes its own rows as anchors and the rows of all ranks as references.
The loss is that of the joint batch, the same number on every rank, and its gradients are such that
DistributedDataParallel, which *averages* gradients over ranks, ends up with exactly the gradient that
one process would compute on the joint batch: each rank's share is multiplied by the number of ranks.
Whoever sums gradients over ranks instead must divide by it.

Ranks may hold different numbers of rows. All of them must call the loss, and its backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .checks import first_order_only

Group = dist.ProcessGroup

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def gather_features(
    student: Tensor, teacher: Tensor, group: Group
) -> tuple[Tensor, Tensor, int, list[int]]:
    """The joint batch as references.

    Args:
        student: this rank's features [A, Ds].
        teacher: this rank's features [A, Dt].
        group: the ranks that share the batch.

    Returns:
        student_refs [M, Ds], through which gradients reach the ranks that hold the rows;
        teacher_refs [M, Dt]; the place of this rank's first row among them; the rows of every rank.

    Raises:
        ValueError: the ranks' widths or dtypes differ (on every rank).
    """
    mine = torch.tensor(
        [
            *student.shape,
            teacher.shape[1],
            _DTYPES.index(student.dtype),
            _DTYPES.index(teacher.dtype),
        ],
        device=student.device,
    )
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    described = [tuple(int(v) for v in rank) for rank in everyone]
    for index, argument in enumerate(
        ("student width", "teacher width", "student dtype", "teacher dtype")
    ):
        values = [rank[index + 1] for rank in described]
        if len(set(values)) > 1:
            shown = [str(_DTYPES[v]) for v in values] if "dtype" in argument else values
            raise ValueError(f"process_group: all ranks must have one {argument}; by rank: {shown}")
    sizes = [rank[0] for rank in described]
    student_refs = _AllGather.apply(student, sizes, group)
    teacher_refs = _all_gather(teacher.detach(), sizes, group)
    return student_refs, teacher_refs, sum(sizes[: dist.get_rank(group)]), sizes


def joint_loss(losses: Tensor, reduction: str, sizes: list[int], group: Group) -> Tensor:
    """The joint batch's loss of this rank's anchors' losses [A], reduced as `reduction` says.

    For "none" they stay as they are, but for the factor of their gradients.
    """
    if reduction == "none":
        return _ScaleGradient.apply(losses, len(sizes))
    total = _AllReduce.apply(losses.sum(), group)
    return total / max(sum(sizes), 1) if reduction == "mean" else total


def _all_gather(x: Tensor, sizes: list[int], group: Group) -> Tensor:
    """Rows of all ranks, in the order of ranks; unequal counts travel padded."""
    longest = max(sizes)
    padded = x.new_zeros(longest, x.shape[1])
    padded[: x.shape[0]] = x
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])


class _AllGather(torch.autograd.Function):
    """Gathers rows; backward brings every rank the sum of what all ranks feel about its rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], group: Group) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        return _all_gather(x, sizes, group)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        # float32 on the way: a sum over many ranks must not be rounded to bfloat16 at every step.
        total = grad.contiguous().to(torch.promote_types(grad.dtype, torch.float32), copy=True)
        dist.all_reduce(total, group=ctx.group)
        rank = dist.get_rank(ctx.group)
        start = sum(ctx.sizes[:rank])
        return total[start : start + ctx.sizes[rank]].to(grad.dtype), None, None


class _AllReduce(torch.autograd.Function):
    """The sum over ranks; backward multiplies by the number of ranks, for DDP's averaging."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.ranks = dist.get_world_size(group)
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.ranks, None


class _ScaleGradient(torch.autograd.Function):
    """Itself; backward multiplies by a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: int) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None
