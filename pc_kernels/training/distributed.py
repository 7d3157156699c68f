"""Several processes, one joint batch.

With `process_group=` every rank takes its own rows as anchors and the rows of all ranks as references.
The loss is that of the joint batch, the same number on every rank, and its gradients are such that
DistributedDataParallel, which *averages* gradients over ranks, ends up with exactly the gradient that
one process would compute on the joint batch: each rank's share is multiplied by the number of ranks.
A training loop that sums gradients over ranks instead has to divide by that number.

Ranks may hold different numbers of rows. All of them must call the loss, and its backward, with the same
options: what is wrong on one of them is an error on each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..checks import FLOATS, first_order_only

Group = dist.ProcessGroup
KINDS = (*FLOATS, torch.int64)
"""Dtypes of what ranks gather."""
GroupOrWorld = Group | Literal["world"]
"""A live group; or all processes, whose group need not be there before the loss is called."""
T = TypeVar("T")


def live_group(group: GroupOrWorld | None) -> Group | None:
    """The group that is meant.

    Raises:
        ValueError: "world", and there is none yet.
    """
    if not isinstance(group, str) or group != "world":
        return group
    if dist.group.WORLD is None:
        raise ValueError(
            "process_group='world': torch.distributed is not initialised; call init_process_group first"
        )
    return dist.group.WORLD


class SharesGroup(nn.Module):
    """A module with a `process_group`: its copies share the group, its pickles may name the world's."""

    process_group: GroupOrWorld | None

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which both go this way."""
        group = self.process_group
        shared = _Shared(group) if isinstance(group, Group) else group
        return {**self.__dict__, "process_group": shared}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy or a pickle."""
        group = state["process_group"]
        super().__setstate__({**state, "process_group": getattr(group, "group", group)})


class _Shared:
    """A group on its way into a copy or a pickle."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def __deepcopy__(self, memo: Any) -> _Shared:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if self.group is dist.group.WORLD:
            return str, ("world",)
        raise TypeError(
            "process_group: only 'world' can be pickled; set it to None before, and again afterwards"
        )


class JointBatch(NamedTuple):
    """The rows of all ranks, in the order of ranks."""

    student: Tensor
    """[M, Ds]; gradients reach the ranks that hold the rows."""
    teacher: Tensor | None
    """[M, Dt], if there is a teacher."""
    start: int
    """The place of this rank's first row."""


def gather_batch(
    student: Tensor,
    teacher: Tensor | None,
    pair_mask: Tensor | None,
    check: Callable[[], Mapping[str, Any]],
    group: Group,
    names: tuple[str, str] = ("student", "teacher"),
) -> JointBatch:
    """The joint batch, after all ranks have agreed that nothing is wrong with any part of it.

    Args:
        student: this rank's features [A, Ds].
        teacher: this rank's features [A, Dt], or int64; or None on every rank.
        pair_mask: this rank's, bool [A, M] or None.
        check: raises an error if this rank's arguments are not in order; returns the options that all
            ranks must have alike, by name.
        group: the ranks that share the batch.
        names: of student and teacher, for errors.

    Raises:
        TypeError, ValueError: this process is not in the group; or options, widths or dtypes differ, a
            mask's width is not that of the joint batch, or another rank's check failed (it is raised on
            every rank, so that none waits for the others).
        Exception: from `check`.
    """
    check_member(group)
    own_error, options = None, {}
    try:
        options = {name: described(value) for name, value in check().items()}
        columns = 0 if pair_mask is None else pair_mask.shape[1]
        width, kind = (0, 0) if teacher is None else (teacher.shape[1], KINDS.index(teacher.dtype))
        kinds = (KINDS.index(student.dtype), kind)
        row = [1, *student.shape, width, *kinds, columns, _digest(options)]
    except Exception as error:
        own_error = error
        row = [0] * 8
    table = _describe_all(row, _device_of(student, group), group)
    if own_error is not None:
        raise own_error
    refused = [rank for rank, row in enumerate(table) if not row[0]]
    if refused:
        raise ValueError(
            f"process_group: ranks {refused} refused their arguments; see their errors"
        )
    if len({row[7] for row in table}) > 1:
        _refuse_options(options, group)
    sizes = [row[1] for row in table]
    _check_table(table, sum(sizes), names)
    return JointBatch(
        _AllGather.apply(student, sizes, group),
        None if teacher is None else _all_gather(teacher.detach(), sizes, group),
        sum(sizes[: dist.get_rank(group)]),
    )


def together(compute: Callable[[], T], what: str, device: torch.device, group: Group) -> T:
    """What `compute` returns; where it raises on one rank, every rank raises.

    Args:
        compute: what runs code of the user.
        what: what that code is, for the error.
        device: where the group's collectives run.
        group: the ranks.

    Raises:
        Exception: this rank's own error.
        TypeError, ValueError: this process is not in the group.
        RuntimeError: another rank's computation failed.
    """
    check_member(group)
    result: list[T] = []
    own_error = None
    try:
        result.append(compute())
    except Exception as error:
        own_error = error
    table = _describe_all([int(own_error is not None)], device, group)
    if own_error is not None:
        raise own_error
    failed = [rank for rank, row in enumerate(table) if row[0]]
    if failed:
        raise RuntimeError(f"process_group: {what} failed on ranks {failed}; see their errors")
    return result[0]


def described(value: object) -> str:
    """An option as ranks compare it: a function by its name, since it is another object on each."""
    if not callable(value):
        return repr(value)
    named = getattr(value, "__qualname__", type(value).__qualname__)
    return f"function {getattr(value, '__module__', None)}.{named}"


def check_member(group: object) -> None:
    """Raises unless this process belongs to the group."""
    if group is not dist.GroupMember.NON_GROUP_MEMBER:
        if not isinstance(group, Group):
            came = type(group).__name__
            raise TypeError(
                f"process_group must be a torch.distributed group, 'world' or None; got {came}"
            )
        if dist.get_rank(group) >= 0:
            return
    raise ValueError(
        f"process_group: rank {dist.get_rank()} of all processes is not in the group; "
        "only its members may call"
    )


def _digest(options: Mapping[str, str]) -> int:
    """Options as a number that fits int64, the same on every rank."""
    text = repr(sorted(options.items())).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "big")


def _refuse_options(own: Mapping[str, str], group: Group) -> None:
    """Raises ValueError with the options that differ; every rank calls it if any does."""
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, own, group=group)
    names = sorted({name for options in everyone for name in options})
    by_name = {name: [options.get(name, "missing") for options in everyone] for name in names}
    differing = [
        f"{name} ({', '.join(values)})" for name, values in by_name.items() if len(set(values)) > 1
    ]
    raise ValueError(
        f"process_group: all ranks must have the same options; by rank: {'; '.join(differing)}"
    )


def _check_table(table: list[list[int]], rows: int, given: tuple[str, str]) -> None:
    """Raises ValueError unless the ranks' tensors make one batch of this many rows."""
    names = [f"{argument} {what}" for what in ("width", "dtype") for argument in given]
    for argument, values in zip(names, zip(*(row[2:6] for row in table), strict=True), strict=True):
        if len(set(values)) > 1:
            shown = [str(KINDS[v]) for v in values] if "dtype" in argument else list(values)
            raise ValueError(f"process_group: all ranks must have one {argument}; by rank: {shown}")
    masks = [row[6] for row in table]
    if any(columns not in (0, 1, rows) for columns in masks):
        raise ValueError(
            f"process_group: pair_mask must have a column for each of the {rows} rows of the joint "
            f"batch, or one; by rank (0: no mask): {masks}"
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


def logsumexp_over_ranks(x: Tensor, group: Group) -> Tensor:
    """The logarithm of Σ exp(x) over the ranks, without a gradient."""
    everyone = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, x.detach().contiguous(), group=group)
    return torch.stack(everyone).logsumexp(0)


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
