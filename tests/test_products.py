"""Products in parts of bfloat16: as near as float32 where they promise it, used where they should be."""

from __future__ import annotations

import pytest
import tolerances
import torch
from compare import own_leaf
from inputs import quantised
from torch import Generator, Tensor

import pc_kernels
from pc_kernels import products, reference
from pc_kernels.dissimilarities import Points, make_side
from pc_kernels.dissimilarities.row_maker import PLAIN
from pc_kernels.products import Products

BITS16 = 2.0**-16
"""What two parts of 8 bits leave of a number, relative to it."""

SETS = {
    "centred": lambda x: x,
    "far from zero": lambda x: x + 1000,
    "off centre": lambda x: x + 3,
    "scales that differ": lambda x: x * torch.logspace(-3, 3, x.shape[1]),
}


def gradient_error(
    student: Tensor, teacher: Tensor, refs: tuple[Tensor, ...], choice: str
) -> Tensor:
    """Relative to the definition in float64."""
    leaf, wide = own_leaf(student), student.double().requires_grad_()
    pc_kernels.perception_coherence_loss(leaf, teacher, *refs, products=choice).backward()
    reference.perception_coherence_loss(
        wide, teacher.double(), *(x.double() for x in refs)
    ).backward()
    assert leaf.grad is not None and wide.grad is not None
    return (leaf.grad.double() - wide.grad).norm() / wide.grad.norm()


@pytest.mark.parametrize("with_refs", [False, True])
@pytest.mark.parametrize("name", SETS)
def test_parts_of_float32(name: str, with_refs: bool, rng: Generator) -> None:
    """Six products within the row; three within 16 bits of terms that a shift leaves 8 times as large."""
    student = SETS[name](torch.randn(96, 48, generator=rng))
    teacher = quantised(rng, 96, 8)
    refs = (SETS[name](torch.randn(80, 48, generator=rng)), quantised(rng, 80, 8))
    refs = refs if with_refs else ()
    assert gradient_error(student, teacher, refs, "bf16x6") <= tolerances.GRAD
    assert gradient_error(student, teacher, refs, "bf16x3") <= 8 * BITS16


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_lose_nothing(
    name: str, dtype: torch.dtype, rng: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there are tensor cores, which are played here: gradients before they are rounded."""
    monkeypatch.setattr(products, "_has_cores", lambda x: True)
    features = SETS[name](torch.randn(96, 48, generator=rng)).to(dtype)
    points = Points.of(features, None, torch.float32, "ieee")
    assert points.products.parts == {torch.bfloat16: 1, torch.float16: 2}[dtype]
    side = make_side("euclidean", points, with_grad=True, maker=PLAIN)
    moved = side._anchors  # type: ignore[attr-defined]
    assert points.products.hold(moved).all()
    rows, exact = side.rows(0, 96), moved.double()
    terms = exact.abs() @ exact.abs().T
    assert ((rows.values - exact @ exact.T).abs() <= 48 * tolerances.U * terms).all()
    v = torch.randn(96, 96, generator=rng)
    both = (v + v.T).double()
    side.accumulate(0, 96, v)
    wanted = both.sum(1, keepdim=True) * exact - both @ exact
    terms = both.abs().sum(1, keepdim=True) * exact.abs() + both.abs() @ exact.abs()
    assert ((side.gradients()[0] - wanted).abs() <= 20 * tolerances.U * terms).all()


def test_who_goes_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half precision where there are tensor cores, what was asked for, and nothing else."""
    x, half = torch.randn(4, 3), torch.randn(4, 3).half()
    assert Products.of("ieee", [half], torch.float32).parts == 0  # no tensor cores
    monkeypatch.setattr(products, "_has_cores", lambda x: True)
    assert Products.of("ieee", [half], torch.float32).parts == 2
    assert Products.of("ieee", [half, half.bfloat16()], torch.float32).parts == 2
    assert Products.of("ieee", [half, x], torch.float32).parts == 0
    assert Products.of("bf16x6", [half], torch.float32).parts == 3
    assert Products.of("bf16x6", [x.double()], torch.float64).parts == 0
    of_units = Products.of("ieee", [half], torch.float32).of_float32()
    assert of_units.parts == 0 and Products("bf16x3", 2).of_float32().parts == 2


def test_memory_of_parts_is_counted() -> None:
    x = torch.randn(4, 3)
    for choice, bytes_ in (("ieee", 0), ("bf16x6", 16), ("bf16x3", 10)):
        side = make_side("euclidean", Points.of(x, None, torch.float32, choice), with_grad=True)
        assert side.pair_bytes(True) == bytes_ and side.pair_bytes(False) == 0


def test_an_unknown_choice_is_an_error() -> None:
    with pytest.raises(ValueError, match="products must be one of 'ieee', 'bf16x6', 'bf16x3'"):
        pc_kernels.PerceptionCoherenceLoss(products="tf32")
