"""Inputs of different dtypes: as if all had the compute dtype, with gradients in each one's own."""

from __future__ import annotations

import pytest
import torch
from compare import BACKEND_NAMES, DISSIMILARITIES, own_leaf
from inputs import quantised
from torch import Generator, Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import pc_kernels

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
MIXES = {
    "autocast and a float32 bank": (BF16, F32, F32, F32),
    "autocast on both sides and a float32 bank": (F16, F16, F32, F32),
    "a bank of half": (F32, F32, BF16, F16),
    "two kinds of half": (F16, BF16, BF16, F16),
    "a NumPy teacher and a float32 bank": (F32, F64, F32, F32),
    "a NumPy bank": (BF16, BF16, F32, F64),
    "a float64 student bank": (F16, F32, F64, F32),
}
"""Of student, teacher, student_refs and teacher_refs."""


def loss_and_grads(tensors: list[Tensor], **options: str) -> tuple[Tensor, Tensor, Tensor]:
    student, teacher, student_refs, teacher_refs = tensors
    leaf, refs = own_leaf(student), own_leaf(student_refs)
    loss = pc_kernels.perception_coherence_loss(leaf, teacher, refs, teacher_refs, **options)
    loss.sum().backward()
    assert leaf.grad is not None and refs.grad is not None
    return loss.detach(), leaf.grad, refs.grad


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("metric", DISSIMILARITIES)
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_any_mix(backend: str, metric: str, mix: str, rng: Generator) -> None:
    dtypes = MIXES[mix]
    compute = F64 if F64 in dtypes else F32
    if compute == F64 and backend not in ("torch", "reference"):
        backend = "auto"
    sizes = ((9, 6), (9, 4), (13, 6), (13, 4))
    tensors = [quantised(rng, *s).to(dtype) for s, dtype in zip(sizes, dtypes, strict=True)]
    for reduction in ("mean", "none"):
        options = {"dissimilarity": metric, "reduction": reduction, "backend": backend}
        loss, grad, refs_grad = loss_and_grads(tensors, **options)
        wanted = loss_and_grads([x.to(compute) for x in tensors], **options)
        assert loss.dtype == compute and torch.equal(loss, wanted[0]) and loss.sum() > 0
        assert torch.equal(grad, wanted[1].to(dtypes[0])) and grad.dtype == dtypes[0]
        assert torch.equal(refs_grad, wanted[2].to(dtypes[2])) and refs_grad.dtype == dtypes[2]


@pytest.mark.parametrize("mix", MIXES)
def test_what_else_takes_references(mix: str, rng: Generator) -> None:
    """`coherence`, `pairwise_dissimilarity`, `reference`, and the operator's fake kernel."""
    dtypes = MIXES[mix]
    compute = F64 if F64 in dtypes else F32
    sizes = ((9, 6), (9, 4), (13, 6), (13, 4))
    tensors = [quantised(rng, *s).to(dtype) for s, dtype in zip(sizes, dtypes, strict=True)]
    wide = [x.to(compute) for x in tensors]
    for got, wanted in zip(
        pc_kernels.coherence(*tensors), pc_kernels.coherence(*wide), strict=True
    ):
        assert got.dtype == compute and torch.equal(got, wanted)
    for metric in DISSIMILARITIES:
        distances = pc_kernels.pairwise_dissimilarity(tensors[0], tensors[2], metric)
        alike = [x.to(F64 if F64 in dtypes[::2] else F32) for x in tensors[::2]]
        wanted = pc_kernels.pairwise_dissimilarity(*alike, metric)
        assert torch.equal(distances, wanted.to(dtypes[0]))
        mixed = pc_kernels.reference.pairwise_dissimilarity(tensors[0], tensors[2], metric)
        assert mixed.dtype == torch.promote_types(dtypes[0], dtypes[2])
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert loss_and_grads(tensors)[0].dtype == compute


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_a_bank_under_autocast(dtype: torch.dtype, rng: Generator) -> None:
    """The everyday combination: a float32 queue, filled by and compared with features of autocast."""
    encoder = torch.nn.Linear(5, 6)
    queue = pc_kernels.FeatureQueue(16, student_width=6, teacher_width=4)
    loss_fn = pc_kernels.PerceptionCoherenceLoss()
    for _ in range(3):
        with torch.autocast("cpu", dtype=dtype):
            student = encoder(quantised(rng, 8, 5))
            teacher = quantised(rng, 8, 4).to(dtype)
            loss = loss_fn(student, teacher, *queue)
        assert student.dtype == dtype and loss.dtype == F32
        loss.backward()
        queue.enqueue(student, teacher)
    assert loss > 0 and len(queue) == 16
