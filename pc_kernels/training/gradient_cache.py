"""Gradient caching: the gradient of a large batch's loss with the memory of a small one.

The loss needs all features of a batch at once, the encoder need not see all inputs at once. Gao et al.
(2021, arXiv 2101.06983) showed how for contrastive losses: encode in micro-batches without a graph,
take the loss's gradient in the features, then encode each micro-batch again, with a graph, and go
back from its part of that gradient. The result is the gradient of the large batch, for one more
forward pass of the encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


def cached_backward(
    encoder: nn.Module,
    micro_batches: Sequence[Any],
    loss_of: Callable[[Tensor], Tensor],
    *,
    scaler: torch.amp.GradScaler | None = None,
) -> Tensor:
    """`loss_of(encoder(whole batch)).backward()`, one micro-batch of the encoder at a time.

    Random numbers, as in dropout, are the same in both passes of a micro-batch. Batch normalisation
    normalises within micro-batches, and moves its running statistics in both passes. Under
    DistributedDataParallel, gradients are exchanged once, with the last micro-batch. Autocast around the
    call covers both passes.

    Example:
        >>> loss = pc_kernels.cached_backward(encoder, images.split(256), lambda s: loss_fn(s, teacher))
        >>> optimizer.step()

    Args:
        encoder: called on each micro-batch; returns features [b, Ds].
        micro_batches: its inputs, a tensor each, or a tuple of arguments or a dict of named ones.
        loss_of: from the features [B, Ds] of all of them, in order, to a scalar.
        scaler: scales the loss before the backward, as for float16.

    Returns:
        The loss, a scalar without a graph. Gradients are added to those of the encoder's parameters,
        and to those of whatever else `loss_of` depends on.

    Raises:
        TypeError, ValueError: an argument is not what is said here.
    """
    batches = list(micro_batches)
    if not batches:
        raise ValueError("micro_batches is empty")
    states, parts = [], []
    for batch in batches:
        states.append(_random_states())
        with torch.no_grad():
            parts.append(_encode(encoder, batch))
    features = torch.cat(parts).requires_grad_()
    loss = loss_of(features)
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        came = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_of must return a scalar tensor; got {came}")
    (loss if scaler is None else scaler.scale(loss)).backward()
    if features.grad is None:
        raise ValueError("loss_of does not depend on the features that it is given")
    sizes = [part.shape[0] for part in parts]
    for last, batch, state, grad in zip(
        _is_last(len(batches)), batches, states, features.grad.split(sizes), strict=True
    ):
        no_exchange = getattr(encoder, "no_sync", nullcontext)
        exchange: AbstractContextManager[Any] = nullcontext() if last else no_exchange()
        with exchange, _replayed(state):
            _encode(encoder, batch).backward(grad)
    return loss.detach()


def _encode(encoder: nn.Module, batch: Any) -> Tensor:
    if isinstance(batch, dict):
        features = encoder(**batch)
    elif isinstance(batch, tuple | list):
        features = encoder(*batch)
    else:
        features = encoder(batch)
    if not isinstance(features, Tensor) or features.dim() != 2:
        came = (
            f"shape {tuple(features.shape)}"
            if isinstance(features, Tensor)
            else type(features).__name__
        )
        raise TypeError(f"encoder must return features [b, width]; got {came}")
    return features


def _is_last(count: int) -> Iterator[bool]:
    return (index == count - 1 for index in range(count))


def _random_states() -> tuple[Tensor, list[Tensor]]:
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if on_gpu else []


@contextmanager
def _replayed(states: tuple[Tensor, list[Tensor]]) -> Iterator[None]:
    """Random numbers as they were then, and afterwards as they are now."""
    now = _random_states()
    _set_random_states(states)
    try:
        yield
    finally:
        _set_random_states(now)


def _set_random_states(states: tuple[Tensor, list[Tensor]]) -> None:
    cpu, gpus = states
    torch.set_rng_state(cpu)
    if gpus:
        torch.cuda.set_rng_state_all(gpus)
