"""Every instruction set that the C++ kernels are compiled for, each in a process of its own.

Working memory is filled with a pattern there, so that kernels which read what they have not written
go wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tolerances
import torch
import truth
from compare import SCALES, assert_near, assert_norm_near
from inputs import ROWS, make_rows, quantised
from torch import Generator, Tensor

from pc_kernels import reference
from pc_kernels.backends import extension_obstacle
from pc_kernels.formulas import RELAXATIONS

pytestmark = pytest.mark.skipif(extension_obstacle() is not None, reason=str(extension_obstacle()))

ISAS = ["baseline", "avx2", "avx512"]
GLIBC_FILL = {"MALLOC_PERTURB_": str(0x80)}  # new memory is 0x7f7f...: 3.4e38, or a far index
LENGTHS = [2, 3, 5, 15, 16, 17, 31, 33, 65, 97, 130]
TEMPERATURES = [1e-4, 1e-2, 0.1, 100.0]

SCRIPT = """
import sys, torch, pc_kernels
from pc_kernels import _C
cases, losses = torch.load(sys.argv[1])
results = []
for x, upstream, temperature, relaxation, scale in cases:
    leaf = x.clone().requires_grad_()
    rank = pc_kernels.soft_rank(leaf, temperature, relaxation, scale, backend="cpu")
    rank.backward(upstream)
    hard = pc_kernels.hard_rank(x, backend="cpu")
    results.append((rank.detach(), leaf.grad, hard))
values = []
for student, teacher, metric in losses:
    leaf = student.clone().requires_grad_()
    loss = pc_kernels.perception_coherence_loss(
        leaf, teacher, dissimilarity=metric, teacher_dissimilarity="euclidean", backend="cpu")
    loss.backward()
    values.append((loss.detach(), leaf.grad))
torch.save((_C.cpu_isa(), results, values), sys.argv[2])
"""


def rank_cases(rng: Generator) -> list[tuple[Any, ...]]:
    cases = []
    for i, (name, m) in enumerate((name, m) for name in ROWS for m in LENGTHS):
        x = make_rows(name, rng, 2, m)
        options = (TEMPERATURES[i % 4], tuple(RELAXATIONS)[i % 3], SCALES[i // 2 % 2])
        cases.append((x, torch.randn(2, m, generator=rng), *options))
    return cases


def run(isa: str, python: Callable[..., Any], folder: Path, rng: Generator) -> tuple[Any, ...]:
    """The cases and what the kernels of `isa` make of them, or a skip."""
    losses = [
        (torch.randn(rows, 11, generator=rng), quantised(rng, rows, 6), metric)
        for rows in (9, 16, 33, 66)
        for metric in ("euclidean", "sqeuclidean", "cosine", "cityblock")
    ]
    cases = rank_cases(rng)
    torch.save((cases, losses), folder / "cases")
    done = python(
        "-c",
        SCRIPT,
        str(folder / "cases"),
        str(folder / "results"),
        PC_KERNELS_CPU_ISA=isa,
        **GLIBC_FILL,
    )
    if f"PC_KERNELS_CPU_ISA={isa} is not one that" in done.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert done.returncode == 0, done.stderr
    used, results, values = torch.load(folder / "results")
    assert used == isa
    return cases, losses, results, values


@pytest.mark.parametrize("isa", ISAS)
def test_right_results(
    isa: str, python: Callable[..., Any], tmp_path: Path, rng: Generator
) -> None:
    cases, losses, results, values = run(isa, python, tmp_path, rng)
    for (x, upstream, *options), (rank, grad, hard) in zip(cases, results, strict=True):
        wanted = truth.soft_rank(x, upstream, *options)
        where = f"{options} m={x.shape[1]}"
        assert_near(f"rank {where}", rank, wanted.rank, tolerances.RANK)
        allowed = tolerances.GRAD * wanted.grad.norm(dim=1)
        allowed += tolerances.rounding(torch.float32) * wanted.magnitude.norm(dim=1)
        allowed += tolerances.subnormal_floor(torch.float32, x.shape[1])
        assert_norm_near(f"gradient {where}", grad, wanted.grad, allowed)
        assert_near(f"hard rank {where}", hard, reference.hard_rank(x.double()), 2 * tolerances.U)
    for (student, teacher, metric), (loss, grad) in zip(losses, values, strict=True):
        each = torch.full((len(student),), 1 / len(student))
        whole = truth.features(student, teacher, None, each, metric, "euclidean")
        mean = whole.losses.mean()
        allowed = tolerances.LOSS * mean + whole.loss_tolerance.mean()
        assert_near(f"loss, {metric}", loss, mean, allowed)
        size: Tensor = whole.grads[0].norm()
        allowed = tolerances.GRAD * size + whole.grad_floor
        assert_norm_near(f"gradient, {metric}", grad, whole.grads[0], allowed)


def test_the_widest_is_the_default(python: Callable[..., Any]) -> None:
    code = "from pc_kernels import _C; print(_C.cpu_isa())"
    plain = python("-c", code, PC_KERNELS_CPU_ISA="")
    assert plain.stdout.strip() in ISAS, plain.stderr
    forced = python("-c", code, PC_KERNELS_CPU_ISA=plain.stdout.strip())
    assert forced.stdout == plain.stdout


def test_an_unknown_one_is_an_error(python: Callable[..., Any]) -> None:
    code = "import torch, pc_kernels; pc_kernels.soft_rank(torch.rand(3), backend='cpu')"
    done = python("-c", code, PC_KERNELS_CPU_ISA="sse9")
    assert done.returncode == 1
    assert "PC_KERNELS_CPU_ISA=sse9" in done.stderr and "baseline" in done.stderr
