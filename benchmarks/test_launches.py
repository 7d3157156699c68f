"""How many kernels a step launches on a GPU, counted without one."""

from __future__ import annotations

import pytest
from launches import GPU_STEPS, of_a_gpu_step

MOST = {
    "float32": 19,
    "bfloat16": 22,  # and both sides' features in float32, the gradient back
    'reduction="none"': 29,
    "masked": 61,
    "cosine": 80,
}


@pytest.mark.parametrize("step", GPU_STEPS)
def test_launches_of_a_step(step: str) -> None:
    """Forward and backward in one chunk, at B = 256."""
    assert of_a_gpu_step(**GPU_STEPS[step]) <= MOST[step]
