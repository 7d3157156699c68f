"""The Triton bodies of the formulas are pc_kernels/formulas.py's, by value, and all there.

The values are compared in formulas_interpreted.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compare import RELAXATIONS as ON_GRIDS
from interpreter import Child, names_in, needs_compiler, needs_triton

from pc_kernels import formulas
from pc_kernels.dissimilarities.rows import Chunk, Pairs, Rows
from pc_kernels.formulas import PENALTIES, RELAXATIONS
from pc_kernels.recipe import Recipe

FILE = "formulas_interpreted.py"


@needs_triton
@pytest.mark.parametrize("name", names_in(FILE))
def test_in_the_interpreter(name: str, child: Child) -> None:
    child.check(name)


@needs_triton
def test_a_row_without_a_body_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """By name, before anything is launched."""
    from pc_kernels.triton_kernels import launch

    x, weights = torch.randn(2, 5), torch.ones(2)
    new = replace(RELAXATIONS["normal"], name="steep", code=99)
    monkeypatch.setitem(formulas.RELAXATIONS, "steep", new)
    monkeypatch.setitem(
        formulas.PENALTIES, "cubic", replace(PENALTIES["huber"], name="cubic", code=99)
    )
    chunk = Chunk(Rows(x), Rows(x, "ranked"), weights, Pairs())
    cubic, steep = Recipe(penalty="cubic"), Recipe(relaxation="steep")
    with pytest.raises(ValueError, match="penalty 'cubic' has no Triton body"):
        launch.coherence_rows(chunk, cubic, True)
    for call in (
        lambda: launch.soft_rank(x, steep, True),
        lambda: launch.soft_rank_backward(x, x, x, steep),
        lambda: launch.coherence_rows(chunk, steep, True),
    ):
        with pytest.raises(ValueError, match="relaxation 'steep' has no Triton body"):
            call()


@needs_triton
@needs_compiler
@pytest.mark.parametrize("constant", ["RELAXATION", "PENALTY", "DISSIMILARITY"])
def test_a_code_without_a_branch_does_not_compile(constant: str) -> None:
    from test_triton import COHERENCE, compiled
    from triton.backends.compiler import GPUTarget
    from triton.compiler.errors import CompilationError

    from pc_kernels.triton_kernels import settings

    constants = {**COHERENCE, "GRID": False, constant: 99}
    with pytest.raises(CompilationError):
        compiled("coherence_rows", constants, settings.SHORT_ROWS[0], GPUTarget("cuda", 90, 32))


@needs_triton
@pytest.mark.parametrize("name", ON_GRIDS)
def test_taps(name: str) -> None:
    """The density's taps are symmetric and sum to 1: Φ at the node beyond the last, less its mirror's.

    The trapezoidal rule on a density this smooth is exact to rounding; a float32 tap is rounded once.
    """
    from pc_kernels.triton_kernels import tables

    row = RELAXATIONS[name]
    values = tables.tables(name, torch.device("cpu")).double()
    count = 2 * row.single.band + 1
    taps, padding = values[tables.TAPS[row.code] :].split([count, -count % tables.TAP_BLOCK])
    assert torch.equal(taps, taps.flip(0)) and not padding.any()
    beyond = 2 * row.cdf(torch.tensor(-float(row.single.support), dtype=torch.float64))
    assert abs(taps.sum() / row.single.inverse_step - 1) <= beyond + 2.0**-24
    edge = values[tables.EDGE : tables.TAPS[row.code]]
    used = row.single.band + tables.NODES
    assert (edge.diff() <= 0).all() and (edge[:used] > 0).all() and (edge[used:] == 0).all()
    assert edge[tables.LEFT_NODE] == 0.5
