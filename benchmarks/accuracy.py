"""How exact is the grid method? Rank and gradient errors against float64, by backend and kind of row.

    python benchmarks/accuracy.py

Prints the Markdown table of docs/method.md. Errors are of normalised ranks (largest) and of gradients
(relative L2), against `pc_kernels.reference` in float64 on the same float32 inputs.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor

import pc_kernels
from pc_kernels.backends import BACKENDS


def kinds(generator: torch.Generator) -> Iterator[tuple[str, Tensor, float]]:
    """Rows worth looking at: what they are, the rows [N, m], and the temperature in units of σ."""

    def normal(rows: int, m: int) -> Tensor:
        return torch.randn(rows, m, generator=generator) + 10

    yield "everyday", normal(4, 1024), 0.1
    yield "short", normal(16, 64), 0.1
    yield "hot", normal(4, 1024), 10.0
    yield "cold", normal(4, 1024), 0.01
    yield "nearly hard", normal(4, 1024), 1e-4
    yield "ties, values of one decimal", (normal(4, 1024) * 10).round() / 10, 0.1
    outlier = normal(4, 4096)
    outlier[:, 0] = 1e4
    yield "one far outlier", outlier, 0.1
    clumps = normal(4, 1024) * 1e-3
    clumps[:, ::2] += 100
    yield "two far clumps", clumps, 1e-3


def errors(rows: Tensor, temperature: float, relaxation: str, backend: str) -> tuple[float, float]:
    """The largest error of a rank, and the relative L2 error of the gradient."""
    slope = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1))
    exact = rows.double().requires_grad_()
    truth = pc_kernels.reference.soft_rank(exact, temperature, relaxation, "std")
    (true_grad,) = torch.autograd.grad(truth, exact, slope.double())
    x = rows.clone().requires_grad_()
    rank = pc_kernels.soft_rank(x, temperature, relaxation, "std", backend=backend)
    (grad,) = torch.autograd.grad(rank, x, slope)
    worst = (rank.detach() - truth.detach()).abs().max()
    return float(worst), float((grad - true_grad).norm() / true_grad.norm())


def main() -> None:
    """Prints the table."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    cpu = torch.device("cpu")
    names = [
        name
        for name, backend in BACKENDS.items()
        if name != "reference" and backend.obstacle(cpu, torch.float32) is None
    ]
    print("| rows | m | temperature | relaxation |", end="")
    print("".join(f" `{name}` rank | `{name}` gradient |" for name in names))
    print("|---|---|---|---|" + "---|---|" * len(names))
    for kind, rows, temperature in kinds(torch.Generator().manual_seed(0)):
        for relaxation in ("logistic", "normal"):
            cells = [kind, str(rows.shape[1]), f"{temperature:g}", relaxation]
            for name in names:
                cells += [f"{error:.1e}" for error in errors(rows, temperature, relaxation, name)]
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
