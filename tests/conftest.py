"""What every test has: fresh numbers that can be had again, and memory full of NaN."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

hypothesis.settings.register_profile(
    "tests", deadline=None, database=None, print_blob=True, max_examples=25
)
hypothesis.settings.load_profile("tests")


DEFAULT_SEED = 315619721


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, help="of the random inputs; -1: fresh ones")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "clean_memory: leave uninitialised memory as it comes")
    if config.getoption("--seed") is None:
        config.option.seed = DEFAULT_SEED
    elif config.getoption("--seed") < 0:
        config.option.seed = random.SystemRandom().randrange(2**31)


def pytest_report_header(config: pytest.Config) -> str:
    return f"random inputs: repeat them with --seed {config.getoption('--seed')}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that run one in the interpreter go first: of files side by side the longest should."""
    items.sort(key=lambda item: not hasattr(getattr(item, "module", None), "FILE"))


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """This test's own seed; pytest shows what is printed when the test fails."""
    base = request.config.getoption("--seed")
    print(f"random inputs: --seed {base}")
    return zlib.crc32(f"{base} {request.node.nodeid}".encode())


@pytest.fixture
def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """torch.empty gives NaN, so that whatever a kernel leaves unwritten shows."""
    if request.node.get_closest_marker("clean_memory"):
        yield
        return
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def child(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What became of the tests of the module's FILE, in a process of their own; see interpreter.py."""
    from interpreter import Child

    return Child(request.module.FILE, request, tmp_path_factory.mktemp("interpreter"))


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets PyTorch's number of threads, for the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def python() -> Run:
    """Runs Python code in a process of its own, with these environment variables beside ours."""

    def run(
        *arguments: str, timeout: float = 120, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )

    return run
