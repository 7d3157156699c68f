"""The smooth CDF by Triton's kernels, in the interpreter."""

from __future__ import annotations

import pytest
from interpreter import Child, names_in, needs_triton

FILE = "cdf_interpreted.py"


@needs_triton
@pytest.mark.parametrize("name", names_in(FILE))
def test_in_the_interpreter(name: str, child: Child) -> None:
    child.check(name)
