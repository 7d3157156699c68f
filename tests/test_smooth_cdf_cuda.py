"""The CUDA kernels of the smooth CDF, on the CPU (tests/cuda_shim)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import cdf
import pytest
import test_nearly_hard
import test_smooth_cdf
import torch
from inputs import BEYOND_PLAIN_FLOAT32
from shim import ShimBackend
from test_cuda_shim import DEVICES
from torch import Generator
from torch.utils._python_dispatch import TorchDispatchMode

import pc_kernels
from pc_kernels.backends import BACKENDS
from pc_kernels.cdf_rows import CdfRows
from pc_kernels.ops import rank_recipe

ON_GRIDS = 300, 200
"""Sources and queries beyond what all pairs serve."""

TROUBLE = [
    "normal",
    "integers",
    "outlier of -1e9",
    "two far tight clumps",
    "heavy tails",
    "up to the largest number",
]
"""Of `inputs.ROWS`."""


@pytest.fixture(params=["narrow warps"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a backend that runs the kernels on a device of DEVICES."""
    BACKENDS["cuda_shim"] = ShimBackend(**DEVICES[request.param])
    yield "cuda_shim"
    del BACKENDS["cuda_shim"]


def check_rows(backend: str, name: str, sizes: tuple[int, int], rng: Generator) -> None:
    """Rows of a kind, at every temperature."""
    x, y = test_smooth_cdf.sources_and_queries(name, rng, 1, *sizes)
    cdf.check_rows(backend, x, y, rng, integrals=name not in BEYOND_PLAIN_FLOAT32)


on_every_device = pytest.mark.parametrize("backend", DEVICES, indirect=True)


@on_every_device
def test_sizes(backend: str, rng: Generator) -> None:
    cdf.check_sizes(backend, rng)


@pytest.mark.parametrize("name", [*TROUBLE, *test_nearly_hard.ROWS])
def test_rows_that_make_trouble(backend: str, name: str, rng: Generator) -> None:
    check_rows(backend, name, ON_GRIDS, rng)


@pytest.mark.parametrize("name", TROUBLE)
def test_pairs_of_rows_that_make_trouble(backend: str, name: str, rng: Generator) -> None:
    check_rows(backend, name, (67, 41), rng)


@pytest.mark.parametrize("backend", ["global memory", "whole warps"], indirect=True)
@pytest.mark.parametrize("name", ["normal", "clumps of several densities"])
def test_rows_on_other_devices(backend: str, name: str, rng: Generator) -> None:
    check_rows(backend, name, ON_GRIDS, rng)


@pytest.mark.parametrize("sizes", [ON_GRIDS, (300, 4)])
def test_light_beside_heavy(backend: str, sizes: tuple[int, int], rng: Generator) -> None:
    cdf.check_light_beside_heavy(backend, sizes, rng)


def test_losses(backend: str, rng: Generator) -> None:
    cdf.check_losses(backend, rng)


@pytest.mark.parametrize("check", ["small_counts_beside_a_crowd", "lists", "masks"])
def test_as_every_backend(backend: str, check: str, rng: Generator) -> None:
    arguments = {"small_counts_beside_a_crowd": ["upper"], "lists": [True]}.get(check, [])
    getattr(test_smooth_cdf, f"test_{check}")(backend, *arguments, rng)


@pytest.mark.parametrize("where", ["sources", "queries", "weights"])
def test_nan(backend: str, where: str, rng: Generator) -> None:
    test_smooth_cdf.test_only_rows_with_a_nan_or_infinity_are_nan(backend, torch.nan, where, rng)


def test_extreme_temperatures(backend: str, rng: Generator) -> None:
    test_smooth_cdf.test_extreme_temperatures(backend, rng)
    for exponent in (-128, -140):
        test_smooth_cdf.test_temperatures_whose_inverse_leaves_float32(backend, exponent, rng)


def test_the_same_bits_every_time(backend: str, rng: Generator) -> None:
    x, y = (torch.randn(2, n, generator=rng) for n in ON_GRIDS)
    for temperature in (0.1, 1e-3):
        first, again = (
            pc_kernels.smooth_cdf(x, y, temperature=temperature, integral=True, backend=backend)
            for _ in range(2)
        )
        assert torch.equal(first, again)


class Waits(TorchDispatchMode):
    """Operators whose results or shapes depend on values, for which a GPU would be waited."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        if any(tag.name.startswith(("data_dep", "dynamic_out")) for tag in function.tags):
            self.seen.append(str(function))
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("relaxation", ["laplace", "projection", "projection_kl"])
def test_nothing_waits_for_scans_and_projections(relaxation: str, rng: Generator) -> None:
    x, keep = torch.randn(3, 40, generator=rng), torch.rand(3, 40, generator=rng) < 0.8
    recipe = rank_recipe(0.1, relaxation, "std", "torch")
    with Waits() as waits:
        _, density = BACKENDS["torch"].soft_rank(x, recipe, True, keep)
        BACKENDS["torch"].soft_rank_backward(x, x, density, recipe, keep)
        if relaxation == "laplace":
            rows = CdfRows(x, x, None, source_mask=keep)
            BACKENDS["torch"].kernel_sums(rows, recipe, ("cdf", "pdf"))
        x.nonzero()
    assert waits.seen == ["aten.nonzero.default"]


@pytest.mark.parametrize("relaxation", ["laplace", "projection"])
def test_what_has_no_kernel_goes_in_pytorch(backend: str, relaxation: str, rng: Generator) -> None:
    x = torch.randn(2, 30, generator=rng)
    options = {"temperature": 0.2, "relaxation": relaxation}
    rank = pc_kernels.soft_rank(x, backend=backend, **options)
    assert torch.equal(rank, pc_kernels.soft_rank(x, backend="torch", **options))
    if relaxation == "laplace":
        counts = pc_kernels.smooth_cdf(x, x, backend=backend, **options)
        assert torch.equal(counts, pc_kernels.smooth_cdf(x, x, backend="torch", **options))
