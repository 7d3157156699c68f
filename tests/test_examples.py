"""Every example runs to its end on the CPU, where its library is there: pip install ".[examples]"."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

import pytest
from conftest import ROOT, Run

LIBRARIES = {
    "accelerate_loop": ["accelerate"],
    "ddp": ["torch.distributed"],
    "heterogeneous": ["sklearn"],
    "huggingface_trainer": ["transformers", "accelerate"],
    "lightning_module": ["lightning"],
    "metric_learning": ["pytorch_metric_learning"],
    "plain_loop": [],
    "sentence_transformers_loss": ["sentence_transformers", "datasets", "accelerate"],
    "timm_features": ["timm"],
    "torchdistill_yaml": ["torchdistill"],
    "torchmetrics_metric": ["torchmetrics"],
}
"""What each example needs beside pc_kernels."""
ELSEWHERE = {"ddp", "heterogeneous"}
"""Examples that test_distributed.py starts on two processes, and that test_lfcc.py cuts short."""
ARGUMENTS = {"plain_loop": ["--steps", "20", "--backend", "aot_eager"]}  # inductor: 15 s


def test_every_example_is_tested_and_documented() -> None:
    examples = {path.stem for path in ROOT.glob("examples/*.py")}
    assert examples == LIBRARIES.keys()
    page = (ROOT / "docs" / "integrations.md").read_text("utf-8")
    assert {Path(name).stem for name in re.findall(r"examples/(\w+\.py)", page)} == examples


def test_the_notebook() -> None:
    """Every cell runs, and the student learns; what is committed has its outputs, and is small."""
    path = ROOT / "examples" / "quick_start.ipynb"
    assert path.stat().st_size < 100_000 and "image/png" in path.read_text("utf-8")
    for library in ("ipykernel", "matplotlib", "sklearn"):
        pytest.importorskip(library)
    client = pytest.importorskip("nbclient")
    notebook = pytest.importorskip("nbformat").read(path, as_version=4)
    client.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    said = "".join(out.get("text", "") for c in notebook.cells for out in c.get("outputs", []))
    first, last = map(float, re.search(r"loss (\S+) -> (\S+)", said).groups())  # type: ignore[union-attr]
    assert last < 0.1 * first


@pytest.mark.parametrize("name", sorted(LIBRARIES.keys() - ELSEWHERE))
def test_example(name: str, python: Run) -> None:
    """It ends well, and its loss falls."""
    for library in LIBRARIES[name]:
        if importlib.util.find_spec(library) is None:
            pytest.skip(f'{library} is not there: pip install ".[examples]"')
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    arguments = ARGUMENTS.get(name, [])
    done = python(f"examples/{name}.py", *arguments, PYTHONPATH=path, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    losses = [float(x) for x in re.findall(r"\bloss'?:? '?(\d\.\d+)", done.stdout)]
    assert len(losses) < 2 or losses[-1] < 0.9 * losses[0], done.stdout
