"""A B×B matrix is never stored: the peak of a process stays under the chunk's budget and O(B·D)."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compare import BACKEND_NAMES
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pc_kernels.backends.base import FusedBackend
from pc_kernels.dissimilarities import Points, Side
from pc_kernels.dissimilarities.others import CityblockSide, MaskedSide
from pc_kernels.dissimilarities.row_maker import PLAIN
from pc_kernels.recipe import Recipe
from pc_kernels.sweep import Batch, chunk_anchors, default_chunk_bytes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")

MIB = 1 << 20
SLACK = 24 * MIB
"""Allocator, threads' stacks and PyTorch's own caches, none of which grows with B."""

SCRIPT = """
import json, sys, torch, pc_kernels
arguments = json.loads(sys.argv[1])
rows, width, options = arguments["rows"], arguments["width"], arguments["options"]
def peak():
    fields = dict(line.split(":") for line in open("/proc/self/status"))
    return int(fields["VmHWM"].split()[0]) * 1024
def now():
    fields = dict(line.split(":") for line in open("/proc/self/status"))
    return int(fields["VmRSS"].split()[0]) * 1024
def features(rows):
    g = torch.Generator().manual_seed(rows)
    s, t = torch.randn(rows, width, generator=g), torch.randn(rows, width, generator=g)
    if arguments["clusters"]:  # every pair of a cluster is summed again from its differences
        s = torch.randn(4, width, generator=g)[torch.arange(rows) % 4] + 1e-4 * s
    return s.requires_grad_(), t
s, t = features(256)
pc_kernels.perception_coherence_loss(s, t, **options).sum().backward()
s, t = features(rows)
if arguments["what"] == "coherence":
    pc_kernels.agreement.default_chunk_bytes = lambda device: arguments["budget"]
    pc_kernels.coherence(s[:300], t[:300])
with open("/proc/self/clear_refs", "w") as f:
    f.write("5")
before = now()
if arguments["what"] == "loss":
    loss = pc_kernels.perception_coherence_loss(s, t, **options)
    loss.sum().backward()
elif arguments["what"] == "coherence":
    pc_kernels.coherence(s, t)
print(peak() - before)
"""


def extra(python: Callable[..., Any], **arguments: Any) -> int:
    defaults = {"width": 32, "clusters": False, "what": "loss", "options": {}}
    done = python("-c", SCRIPT, json.dumps({**defaults, **arguments}), timeout=300)
    if "clear_refs" in done.stderr:
        pytest.skip("this kernel does not let a process reset its peak")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def allowed(rows: int, width: int, budget: int) -> int:
    """Budget, and a dozen copies of the features: centred, squared, gradients, their sums."""
    return budget + 12 * rows * width * 4 + SLACK


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "cityblock"])
def test_fused(metric: str, python: Callable[..., Any]) -> None:
    """8192²: 256 MiB a matrix, where all of the working memory is 32."""
    if not any(p.values == ("cpu",) and not p.marks for p in BACKEND_NAMES):
        pytest.skip("no C++ extension")
    rows = 8192 if metric == "euclidean" else 4096
    budget = 32 * MIB if metric == "euclidean" else 8 * MIB
    options = {"dissimilarity": metric, "chunk_bytes": budget, "backend": "cpu"}
    got = extra(python, rows=rows, options=options)
    assert got <= allowed(rows, 32, budget) < rows * rows * 4, f"{got / MIB:.0f} MiB"


@pytest.mark.parametrize(("reduction", "temperature"), [("mean", 1e-3), ("none", 0.1)])
def test_torch(reduction: str, temperature: float, python: Callable[..., Any]) -> None:
    """At a low temperature the grid is as large as it may be. Unchunked it is 700 MiB and more."""
    options = {
        "reduction": reduction,
        "temperature": temperature,
        "chunk_bytes": 16 * MIB,
        "backend": "torch",
    }
    got = extra(python, rows=2048, options=options)
    assert got <= allowed(2048, 32, 16 * MIB), f"{got / MIB:.0f} MiB"


@pytest.mark.parametrize("backend", BACKEND_NAMES[:2])
def test_near_duplicates_of_wide_features(backend: str, python: Callable[..., Any]) -> None:
    """A quarter of all pairs are near ones, and their differences [pairs, width] are large."""
    options = {"chunk_bytes": 32 * MIB, "backend": backend}
    got = extra(python, rows=1024, width=512, clusters=True, options=options)
    assert got <= allowed(1024, 512, 32 * MIB), f"{got / MIB:.0f} MiB"


def test_coherence(python: Callable[..., Any]) -> None:
    """In chunks as well."""
    got = extra(python, rows=1536, what="coherence", budget=32 * MIB)
    assert got <= allowed(1536, 32, 32 * MIB), f"{got / MIB:.0f} MiB"


def test_what_is_free_on_a_gpu_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of another size would sum in another order; nor does it matter that a graph is captured."""
    device, cuda = torch.device("cuda"), torch.cuda
    for name in ("mem_get_info", "memory_reserved", "is_current_stream_capturing"):
        monkeypatch.delattr(cuda, name)
    for total, wanted in ((144 << 30, 2 << 30), (8 << 30, 1 << 30)):
        about = SimpleNamespace(total_memory=total)
        monkeypatch.setattr(cuda, "get_device_properties", lambda device, about=about: about)
        assert default_chunk_bytes(device) == wanted


def test_cityblock_on_a_gpu_counts_what_its_backward_takes() -> None:
    """PyTorch's CUDA kernel keeps every pair's gradients of all features, and counts pairs in an int."""
    with FakeTensorMode():
        x, y = (torch.empty(rows, 512, device="cuda") for rows in (8192, 1 << 20))
        wide, many = CityblockSide(Points(x, None)), CityblockSide(Points(x, y))
        narrow = CityblockSide(Points(torch.empty(8192, 20, device="cuda"), None))
    assert wide.pair_bytes(True) == 4 * 512 + 4 and wide.pair_bytes(False) == 12
    assert narrow.pair_bytes(False) == 0
    gram = Side()
    students, weights = [torch.empty(8192, 512)], torch.empty(1, 8192)

    def anchors(side: Side, references: Tensor | None, budget: int, with_grad: bool = True) -> int:
        batch = Batch(students, students[0], None, references, weights, None, None, given=False)
        recipe = Recipe(chunk_bytes=budget)
        return chunk_anchors(batch, recipe, FusedBackend(), [side, gram], with_grad)

    assert anchors(gram, None, 2 << 30) == anchors(narrow, None, 64 << 30) == 8192
    chunk = anchors(wide, None, 2 << 30)
    assert chunk * 8192 * (4 * 512 + 12) <= 2 << 30 < (chunk + 16) * 8192 * (4 * 512 + 12)
    assert anchors(wide, None, 2 << 30, with_grad=False) == 8192
    chunk = anchors(many, torch.empty(1 << 20, 1), 1 << 50)
    assert chunk == 2047 - 2047 % 16


def test_a_mask_passes_on_what_its_side_takes() -> None:
    side = MaskedSide(CityblockSide, Points(torch.randn(3, 40), None), PLAIN)
    assert side.pair_bytes(True) == side.pair_bytes(False) == 12
