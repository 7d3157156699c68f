"""How many kernels a step launches on a GPU, counted without one."""

from __future__ import annotations

import pytest
from launches import GPU_STEPS, STUBS, of_a_gpu_step

MOST = {
    "float32": {"triton": 15, "cuda": 14},
    "bfloat16": {"triton": 18, "cuda": 17},  # and features in float32, the gradient back
    'reduction="none"': {"triton": 22, "cuda": 20},
    "masked": {"triton": 24, "cuda": 23},
    "cosine": {"triton": 18, "cuda": 17},
}


@pytest.mark.parametrize("backend", STUBS)
@pytest.mark.parametrize("step", GPU_STEPS)
def test_launches_of_a_step(step: str, backend: str) -> None:
    """Forward and backward in one chunk, at B = 256."""
    assert of_a_gpu_step(backend, **GPU_STEPS[step]) <= MOST[step][backend]
