"""Processes of one group, each running the same script on its share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from conftest import ROOT


def run_ranks(script: str, world: int, folder: Path, timeout: float) -> list[Any]:
    """What each rank leaves in `folder`; tests/`script` is told its rank, a store and the folder."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    file = str(ROOT / "tests" / script)
    processes = [
        subprocess.Popen(
            [sys.executable, file, str(rank), str(folder / "store"), str(folder)],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        )
        for rank in range(world)
    ]
    try:
        messages = [process.communicate(timeout=timeout)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(messages)
    return [torch.load(folder / f"results{rank}") for rank in range(world)]
