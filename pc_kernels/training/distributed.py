"""Several processes, one joint batch.

With `process_group=` every rank takes its own rows as anchors and the rows of all ranks as references.
The loss is that of the joint batch, the same number on every rank, and its gradients are such that
DistributedDataParallel, which *averages* gradients over ranks, ends up with exactly the gradient that
one process would compute on the joint batch: each rank's share is multiplied by the number of ranks.
A training loop that sums gradients over ranks instead has to divide by that number.

Ranks may hold different numbers of rows. All of them must call the loss, and its backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..checks import FLOATS, first_order_only

Group = dist.ProcessGroup


class JointBatch(NamedTuple):
    """The rows of all ranks, in the order of ranks."""

    student: Tensor
    """[M, Ds]; gradients reach the ranks that hold the rows."""
    teacher: Tensor
    """[M, Dt]."""
    start: int
    """The place of this rank's first row."""


def gather_batch(
    student: Tensor,
    teacher: Tensor,
    pair_mask: Tensor | None,
    check: Callable[[], None],
    group: Group,
) -> JointBatch:
    """The joint batch, after all ranks have agreed that nothing is wrong with any part of it.

    Args:
        student: this rank's features [A, Ds].
        teacher: this rank's features [A, Dt].
        pair_mask: this rank's, bool [A, M] or None.
        check: raises TypeError or ValueError if this rank's arguments are not in order.
        group: the ranks that share the batch.

    Raises:
        TypeError, ValueError: from `check`; or the ranks' widths or dtypes differ, a mask's width is not
            that of the joint batch, or another rank's check failed. Every rank raises, so that none waits
            for the others.
    """
    own_error = None
    try:
        check()
        columns = 0 if pair_mask is None else pair_mask.shape[1]
        kinds = (FLOATS.index(student.dtype), FLOATS.index(teacher.dtype))
        described = [1, *student.shape, teacher.shape[1], *kinds, columns]
    except (TypeError, ValueError) as error:
        own_error = error
        described = [0] * 7
    table = _describe_all(described, _device_of(student, group), group)
    if own_error is not None:
        raise own_error
    refused = [rank for rank, row in enumerate(table) if not row[0]]
    if refused:
        raise ValueError(
            f"process_group: ranks {refused} refused their arguments; see their errors"
        )
    names = ("student width", "teacher width", "student dtype", "teacher dtype")
    for argument, values in zip(names, zip(*(row[2:6] for row in table), strict=True), strict=True):
        if len(set(values)) > 1:
            shown = [str(FLOATS[v]) for v in values] if "dtype" in argument else list(values)
            raise ValueError(f"process_group: all ranks must have one {argument}; by rank: {shown}")
    sizes = [row[1] for row in table]
    masks = [row[6] for row in table]
    if any(columns not in (0, 1, sum(sizes)) for columns in masks):
        raise ValueError(
            f"process_group: pair_mask must have a column for each of the {sum(sizes)} rows of the joint "
            f"batch, or one; by rank (0: no mask): {masks}"
        )
    return JointBatch(
        _AllGather.apply(student, sizes, group),
        _all_gather(teacher.detach(), sizes, group),
        sum(sizes[: dist.get_rank(group)]),
    )


def _device_of(student: object, group: Group) -> torch.device:
    """Where the group's collectives run: with the features, if they are any."""
    if isinstance(student, Tensor):
        return student.device
    on_gpu = dist.get_backend(group) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def _describe_all(row: list[int], device: torch.device, group: Group) -> list[list[int]]:
    """Every rank's row of integers."""
    mine = torch.tensor(row, device=device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    rows: list[list[int]] = torch.stack(everyone).tolist()
    return rows


def sum_over_ranks(x: Tensor, group: Group) -> Tensor:
    """Σ x over the ranks, without a gradient."""
    total = x.detach().clone()
    dist.all_reduce(total, group=group)
    return total


def joint_loss(losses: Tensor, reduction: str, group: Group) -> Tensor:
    """The joint batch's loss of this rank's weighted sum, or for "none" its anchors' losses [A].

    Those stay as they are, but for the factor of their gradients.
    """
    if reduction == "none":
        return _ScaleGradient.apply(losses, dist.get_world_size(group))
    return _AllReduce.apply(losses, group)


def _all_gather(x: Tensor, sizes: list[int], group: Group) -> Tensor:
    """Rows of all ranks, in the order of ranks; unequal counts travel padded."""
    longest = max(sizes)
    padded = x.new_zeros(longest, x.shape[1])
    padded[: x.shape[0]] = x
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])


class _AllGather(torch.autograd.Function):
    """Gathers the rows of all ranks; the backward adds up all ranks' gradients in each row."""

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
