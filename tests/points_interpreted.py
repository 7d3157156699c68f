"""Features brought near the origin by Triton's kernels, in the interpreter.

`test_points_triton.py` runs this file. By hand:
TRITON_INTERPRET=1 python -m pytest tests/points_interpreted.py
"""

from __future__ import annotations

import points
import pytest
import torch
from compare import check_near_origin
from inputs import POINTS
from torch import Generator

from pc_kernels.backends import BACKENDS

TRITON = BACKENDS["triton"]


@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("name", [name for name in POINTS if name not in points.RESCALED])
def test_as_pytorch_does(name: str, rows: int, rng: Generator) -> None:
    given = [POINTS[name](rng, rows)]
    check_near_origin(TRITON, given if rows > 2 else [POINTS[name](rng, 7), *given])


@pytest.mark.parametrize("shapes", [(0, 0), (0, 4), (4, 0)])
def test_nothing_to_look_at(shapes: tuple[int, int]) -> None:
    points.check_nothing_to_look_at(TRITON, shapes)


@pytest.mark.parametrize("count", [1, 2, 1025])
def test_who_is_far(count: int, rng: Generator) -> None:
    points.check_who_is_far(TRITON, count, rng)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shifted_features_stay_whole_in_their_parts(dtype: torch.dtype, rng: Generator) -> None:
    points.check_parts_stay_whole(TRITON, dtype, rng)
