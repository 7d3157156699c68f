"""Checks of a backend's smooth CDF, by every way of its kernels. They need no pytest: a GPU runs them."""

from __future__ import annotations

import math

import tolerances
import torch
from compare import RELAXATIONS, assert_near, assert_norm_near, check_smooth_cdf, own_leaf
from torch import Generator, Tensor

import pc_kernels
from pc_kernels import reference

CPU = torch.device("cpu")
CASES = [
    {"tail": tail, "integral": integral}
    for tail in ("lower", "upper")
    for integral in (False, True)
]
SIZES = [(0, 3), (3, 0), (1, 1), (2, 33), (129, 5), (5, 129), (64, 65)]
TEMPERATURES = (1e-4, 1e-2, 0.1, 100.0)


def check_sizes(backend: str, rng: Generator) -> None:
    """Few sources, few queries, and none."""
    for i, (m, n) in enumerate(SIZES):
        x, y = torch.randn(3, m, generator=rng), torch.randn(3, n, generator=rng)
        w = None if i % 2 else torch.randn(3, 2, m, generator=rng)
        check_smooth_cdf(backend, (x, y, w), rng, temperature=0.2, **CASES[i % 4])


def check_rows(
    backend: str,
    x: Tensor,
    y: Tensor,
    rng: Generator,
    temperatures: tuple[float, ...] = TEMPERATURES,
    integrals: bool = True,
) -> None:
    """Rows of sources x and queries y in two channels, by every kernel of both relaxations."""
    w = torch.randn(len(x), 2, x.shape[1], generator=rng).to(x)
    for i, temperature in enumerate(temperatures):
        for j, relaxation in enumerate(RELAXATIONS):
            case = CASES[(i + 2 * j) % 4]
            if integrals or not case["integral"]:
                options = {"temperature": temperature, "relaxation": relaxation, **case}
                check_smooth_cdf(backend, (x, y, w), rng, **options)


def check_light_beside_heavy(
    backend: str, sizes: tuple[int, int], rng: Generator, device: torch.device = CPU
) -> None:
    """Sources a millionth as heavy as those just beyond the reach are counted as well as they.

    At the lower temperature the row is nearly hard, its crowds on grids of their own.
    """
    m, n = sizes
    x, y = torch.rand(1, m, generator=rng), 6 * torch.rand(1, n, generator=rng)
    heavy = torch.arange(m) % 2 == 1
    x = torch.where(heavy, 4.8 + x, x)
    w = torch.where(heavy, 1.0, 1e-6) * (1 + torch.rand(1, m, generator=rng))
    for temperature in (0.1, 1e-3):
        given = (part.to(device) for part in (x, y, w))
        got = pc_kernels.smooth_cdf(*given, temperature=temperature, backend=backend).cpu()
        wanted = reference.smooth_cdf(x.double(), y.double(), w.double(), temperature=temperature)
        beyond = tolerances.BEYOND_REACH * w.double().sum()
        assert_near("sums", got, wanted, tolerances.RANK * wanted + beyond)


def check_losses(
    backend: str, rng: Generator, device: torch.device = CPU, few: bool = False
) -> None:
    """Losses on smooth CDFs and their gradients, against the reference in float64."""
    embeddings, labels = torch.randn(24, 6, generator=rng), torch.arange(24) % 5
    scores, grades = torch.randn(3, 40, generator=rng), torch.randint(3, (3, 40), generator=rng)
    mask = torch.rand(3, 40, generator=rng) < 0.8
    cases = [
        (pc_kernels.SmoothAPLoss, embeddings, (labels,), {"temperature": 0.05}),
        (pc_kernels.RecallAtKLoss, embeddings, (labels,), {"temperature": 0.05}),
        (pc_kernels.RankNetLoss, scores, (grades, mask), {}),
        (pc_kernels.ApproxNDCGLoss, scores, (grades, mask), {}),
        (pc_kernels.AUCLoss, scores[0], (grades[0] > 1,), {}),
        (pc_kernels.KendallLoss, scores, (grades.float(),), {}),
    ]
    for kind, values, others, options in cases[:3:2] if few else cases:
        found = []
        for leaf, chosen in (
            (own_leaf(values.to(device)), backend),
            (own_leaf(values.double()), "reference"),
        ):
            loss = kind(backend=chosen, **options)(leaf, *(x.to(leaf.device) for x in others))
            loss.backward()
            found.append((loss.detach().double().cpu(), leaf.grad.double().cpu()))
        (loss, grad), (wanted, wanted_grad) = found
        assert math.isclose(loss, wanted, rel_tol=tolerances.LOSS), kind.__name__
        allowed = tolerances.grad_tolerance(torch.float32) * wanted_grad.norm()
        assert_norm_near(kind.__name__, grad, wanted_grad, allowed)
