"""`cached_backward`: the gradient of one large batch, whatever the micro-batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from inputs import quantised
from tolerances import U
from torch import Generator, Tensor, nn

import pc_kernels

loss_fn = pc_kernels.PerceptionCoherenceLoss()


def encoder_of(seed: int, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 5))


def grads_of(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def assert_same(got: Tensor, wanted: Tensor, rows: int) -> None:
    """Both are float32 sums over the batch, grouped otherwise: roundings grow like a random walk."""
    assert (got - wanted).norm() <= U * (16 + rows**0.5) * wanted.norm()


@pytest.mark.parametrize("size", [1, 7, 32, 100])
def test_gradients_are_those_of_the_whole_batch(size: int, rng: Generator) -> None:
    x, teacher = torch.randn(100, 6, generator=rng), quantised(rng, 100, 4)
    whole, parts = encoder_of(1), encoder_of(1)
    loss = loss_fn(whole(x), teacher)
    loss.backward()
    cached = pc_kernels.cached_backward(parts, x.split(size), lambda s: loss_fn(s, teacher))
    assert not cached.requires_grad and cached.item() == pytest.approx(loss.item(), rel=1e-6)
    assert_same(grads_of(parts), grads_of(whole), 100)


def test_a_batch_of_16384(rng: Generator) -> None:
    """The size that the recipe is for."""
    x, teacher = torch.randn(16384, 6, generator=rng), quantised(rng, 16384, 8)
    whole, parts = encoder_of(2), encoder_of(2)
    loss_fn(whole(x), teacher).backward()
    pc_kernels.cached_backward(parts, x.split(2048), lambda s: loss_fn(s, teacher))
    assert_same(grads_of(parts), grads_of(whole), 16384)


def test_dropout_is_the_same_in_both_passes(rng: Generator) -> None:
    x, teacher = torch.randn(40, 6, generator=rng), quantised(rng, 40, 4)
    whole, parts = encoder_of(3, 0.5), encoder_of(3, 0.5)
    torch.manual_seed(4)
    loss_fn(torch.cat([whole(part) for part in x.split(8)]), teacher).backward()
    after = torch.rand(3)
    torch.manual_seed(4)
    pc_kernels.cached_backward(parts, x.split(8), lambda s: loss_fn(s, teacher))
    assert torch.equal(torch.rand(3), after)  # and the generator is where it would be
    assert_same(grads_of(parts), grads_of(whole), 40)


def test_arguments_of_the_encoder(rng: Generator) -> None:
    class TwoInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 5)

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return self.layer(x) * scale

    x, teacher = torch.randn(30, 6, generator=rng), quantised(rng, 30, 4)
    scale = torch.rand(30, 1, generator=rng)
    torch.manual_seed(0)
    model = TwoInputs()
    results = []
    for form in (tuple, lambda pair: dict(zip(("x", "scale"), pair, strict=True))):
        model.zero_grad()
        parts = [form(pair) for pair in zip(x.split(10), scale.split(10), strict=True)]
        pc_kernels.cached_backward(model, parts, lambda s: loss_fn(s, teacher))
        results.append(grads_of(model).clone())
    assert torch.equal(*results)


def test_gradients_accumulate_and_reach_the_rest(rng: Generator) -> None:
    """Added to what is there; parameters that only the loss has get theirs too."""
    x, teacher = torch.randn(24, 6, generator=rng), quantised(rng, 24, 4)
    encoder, head = encoder_of(5), nn.Linear(5, 5)

    def loss_of(s: Tensor) -> Tensor:
        return loss_fn(head(s), teacher)

    pc_kernels.cached_backward(encoder, x.split(8), loss_of)
    once = grads_of(encoder).clone()
    assert head.weight.grad is not None and head.weight.grad.any()
    pc_kernels.cached_backward(encoder, x.split(8), loss_of)
    assert_same(grads_of(encoder), 2 * once, 24)


def test_autocast_and_scaler(rng: Generator) -> None:
    x, teacher = torch.randn(24, 6, generator=rng), quantised(rng, 24, 4)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    plain, scaled = encoder_of(6), encoder_of(6)
    for encoder, options in ((plain, {}), (scaled, {"scaler": scaler})):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            pc_kernels.cached_backward(
                encoder, x.split(8), lambda s: loss_fn(s, teacher), **options
            )
    assert torch.allclose(grads_of(scaled), 2**10 * grads_of(plain), rtol=1e-3)


@pytest.mark.parametrize(
    ("encoder", "batches", "loss_of", "words"),
    [
        (encoder_of(0), [], loss_fn, "micro_batches is empty"),
        (nn.Flatten(0), [torch.zeros(3, 6)], loss_fn, r"encoder must return.*\(18,\)"),
        (encoder_of(0), [torch.zeros(3, 6)], lambda s: s, r"scalar tensor; got shape \(3, 5\)"),
        (encoder_of(0), [torch.zeros(3, 6)], lambda s: 0.0, "scalar tensor; got float"),
        (
            encoder_of(0),
            [torch.zeros(3, 6)],
            lambda s: torch.zeros((), requires_grad=True) * 1,
            "does not depend",
        ),
    ],
)
def test_errors(encoder: Any, batches: Any, loss_of: Any, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        pc_kernels.cached_backward(encoder, batches, loss_of)
