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
