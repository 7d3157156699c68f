"""The documentation builds strictly, and has every public name. Its code: tests/test_code_blocks.py."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import pc_kernels

API = ROOT / "docs" / "api"


def test_every_public_name_has_its_line() -> None:
    """And no page describes what is not there; `make docs` would notice that as well, later."""
    pages = "\n".join(page.read_text("utf-8") for page in API.glob("*.md"))
    described = re.findall(r"^::: pc_kernels\.(\S+)$", pages, re.M)
    assert len(described) == len(set(described)), "described twice"
    missing = set(pc_kernels.__all__) - set(described)
    assert not missing, f"docs/api lacks a line `::: pc_kernels.NAME` for {missing}"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    for package in ("material", "mkdocstrings", "matplotlib"):
        pytest.importorskip(package, reason='the documentation needs pip install ".[docs]"')
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site(site: Path) -> None:
    """Strict: a page that is in no menu, a broken link or anchor, an unknown parameter are errors."""
    html = "\n".join(page.read_text("utf-8") for page in site.glob("api/*/index.html"))
    for name in pc_kernels.__all__:
        assert f'id="pc_kernels.{name}"' in html, f"{name} is not described"
    for name in pc_kernels.metrics.__all__:
        assert re.search(rf'id="pc_kernels\.metrics\.(\w+\.)?{name}"', html), f"metrics.{name}"
    signature = re.search(r'id="pc_kernels.PerceptionCoherenceLoss".*?<pre>(.*?)</pre>', html, re.S)
    assert signature and "temperature" in signature[1], "options are not shown by name"
    index = json.loads((site / "search/search_index.json").read_text("utf-8"))
    found = {entry["location"] for entry in index["docs"] if "temperature" in entry["text"]}
    assert any(place.startswith("options/") for place in found), "search does not find"
    for page in site.rglob("*.html"):
        fetched = re.findall(
            r'(?:src|href)="(https?://[^"]+\.(?:js|css|woff2?))"', page.read_text()
        )
        assert not fetched, f"{page.relative_to(site)} fetches {fetched}"
