"""`python -m pc_kernels.info` says what is usable, what is not and why, and what auto takes."""

from __future__ import annotations

import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT

import pc_kernels
from pc_kernels import info, installation
from pc_kernels.backends import BACKENDS, extension_obstacle, fastest, select
from pc_kernels.installation import FallbackWarning

Run = Callable[..., Any]


def line_of(report: str, name: str) -> str:
    lines = [line for line in report.splitlines() if line.strip().startswith(name)]
    assert lines, f"no line on {name!r} in:\n{report}"
    return lines[0]


def test_report(python: Run) -> None:
    done = python("-m", "pc_kernels.info")
    assert done.returncode == 0, done.stderr
    report = done.stdout
    assert pc_kernels.__version__ in line_of(report, "pc_kernels")
    assert line_of(report, "imported").endswith(str(ROOT / "pc_kernels"))
    assert torch.__version__ in line_of(report, "torch")
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in line_of(report, "python")
    cpu = torch.device("cpu")
    default = select("auto", cpu, torch.float32).name
    for name, backend in BACKENDS.items():
        reason = backend.obstacle(cpu, torch.float32)
        # The backends' lines are indented; "torch" has one in the head as well.
        line = line_of(report.split("backends for float32 tensors on cpu")[1], name)
        assert ("not usable" in line) == (reason is not None)
        assert reason is None or reason in line
        assert ("(auto)" in line) == (name == default)
    assert "Traceback" not in done.stderr


@pytest.fixture
def without_extension(tmp_path: Path) -> Path:
    """A copy of the package as `pip install` leaves it where there is no compiler."""
    shutil.copytree(
        ROOT / "pc_kernels",
        tmp_path / "pc_kernels",
        ignore=shutil.ignore_patterns(
            "_C*", "_build.json", "*.so", "*.pyd", "__pycache__", "distill"
        ),
    )
    return tmp_path


# An editable install answers for submodules that the copy has not; not here.
NO_EDITABLE = (
    "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'Editable' not in str(f)]\n"
    "del sys.path[0]  # the checkout"
)


def run_copy(python: Run, copy: Path, code: str) -> Any:
    """Code with the copy first on Python's path, and not in the checkout's folder."""
    path = os.pathsep.join([str(copy), os.environ.get("PYTHONPATH", "")])
    return python("-c", f"{NO_EDITABLE}\n{code}", PYTHONPATH=path)


WITHOUT = """
import torch, pc_kernels
from pc_kernels import backends
assert pc_kernels.__file__.startswith({copy!r}), pc_kernels.__file__
reason = backends.extension_obstacle()
assert "not built" in reason and "compiler" in reason, reason
x = torch.randn(20, 4, requires_grad=True)
loss = pc_kernels.perception_coherence_loss(x, torch.randn(20, 3))
loss.backward()
assert loss.isfinite() and x.grad.norm() > 0
assert backends.select("auto", torch.device("cpu"), torch.float32).name == "torch"
assert pc_kernels.pairwise_dissimilarity(x).isfinite().all()
assert pc_kernels.coherence(x, x).agreement == 1
try:
    pc_kernels.perception_coherence_loss(x, x, backend="cpu")
except ValueError as error:
    assert reason in str(error), error
else:
    raise AssertionError("no error")
print("fine")
"""


def test_without_the_extension(python: Run, without_extension: Path) -> None:
    done = run_copy(python, without_extension, WITHOUT.format(copy=str(without_extension)))
    assert done.stdout.strip() == "fine", done.stderr
    as_module = "import runpy; runpy.run_module('pc_kernels.info', run_name='__main__')"
    done = run_copy(python, without_extension, as_module)
    assert done.returncode == 0, done.stderr
    assert "not built" in line_of(done.stdout, "cpu")
    assert "(auto)" in line_of(done.stdout.split("backends for")[1], "torch")


def test_an_extension_that_does_not_load(python: Run, without_extension: Path) -> None:
    """Built for another torch, say: the package works without it and tells the loader's reason."""
    broken = without_extension / "pc_kernels" / "_C.py"
    broken.write_text("raise ImportError('undefined symbol: _ZN3c10')\n")
    code = (
        "import torch, pc_kernels\n"
        "from pc_kernels import backends\n"
        "print(backends.extension_obstacle())\n"
        "print(pc_kernels.soft_rank(torch.tensor([1.0, 2.0])).tolist())\n"
    )
    done = run_copy(python, without_extension, code)
    assert done.returncode == 0, done.stderr
    reason, rank = done.stdout.strip().splitlines()
    assert "undefined symbol: _ZN3c10" in reason and "does not load" in reason
    assert rank.startswith("[")


IMPORT = """
import sys, time
import torch
started = time.perf_counter()
import pc_kernels
print(time.perf_counter() - started)
loaded = {"torch._dynamo", "torch._inductor", "triton", "pc_kernels._C"} & set(sys.modules)
assert not loaded, loaded
assert not torch.cuda.is_initialized()
"""


def test_import_is_light(python: Run) -> None:
    """At most 0.2 s over `import torch`; no compiler stack, no GPU, not even the extension."""
    times = []
    for _ in range(5):
        done = python("-c", IMPORT)
        assert done.returncode == 0, done.stderr
        times.append(float(done.stdout))
        if times[-1] <= 0.2:  # what takes longer shares the processor
            break
    assert min(times) <= 0.2, times


def test_public_names() -> None:
    assert set(pc_kernels.__all__) >= {
        "PerceptionCoherenceFunction",
        "PerceptionCoherenceLoss",
        "coherence",
        "coherence_loss_from_dissimilarities",
        "hard_rank",
        "pairwise_dissimilarity",
        "perception_coherence_loss",
        "reference",
        "soft_rank",
    }
    for name in pc_kernels.__all__:
        assert getattr(pc_kernels, name).__doc__, name


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets this copy have been built with the record that is given."""

    def write(**record: Any) -> None:
        monkeypatch.setattr(installation, "RECORD", record)
        monkeypatch.setattr(installation, "hidden_installation", lambda: None)

    return write


ABSENT = ImportError("cannot import name '_C' from 'pc_kernels' (somewhere)")


@pytest.mark.parametrize(
    ("built", "said"),
    [
        ({}, "was not built: install with a C++ compiler"),
        ({"missing": {"cpu": "no C++ compiler: 'c++'"}}, "was not built: no C++ compiler: 'c++'"),
        ({"torch": "2.10", "missing": {}}, "was built, but is not there any more"),
    ],
    ids=["a plain copy", "a reason", "removed"],
)
def test_why_an_extension_is_absent(
    record: Callable[..., None], built: dict[str, Any], said: str
) -> None:
    record(**built)
    reason = installation.why_not_loaded("cpu", ABSENT)
    assert reason.startswith("the C++ extension was") and said in reason


def test_why_an_extension_does_not_load(record: Callable[..., None]) -> None:
    record(torch="2.10", missing={})
    reason = installation.why_not_loaded("cuda", ImportError("libcudart.so.13: cannot open"))
    assert reason == (
        f"the CUDA extension does not load with torch {torch.__version__}: "
        "libcudart.so.13: cannot open"
    )


def test_an_older_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Than the kernels' stable ABI: 2.9 comes before 2.10. All later ones do."""
    record = {"torch": "2.10", "missing": {"cuda": "no nvcc"}}
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    assert installation.torch_is_too_old(record) == {
        "cpu": "the C++ extension needs torch 2.10 or later, this is torch 2.9.1+cpu"
    }
    for version in ("2.10.0a0+git1", "2.13.0+cu130", "3.0.0"):
        monkeypatch.setattr(torch, "__version__", version)
        assert installation.torch_is_too_old(record) == {}
    monkeypatch.setattr(torch, "__version__", "1.4.0")
    assert installation.torch_is_too_old({}) == {}
    assert installation.torch_is_too_old({"torch": None, "missing": {}}) == {}


def test_the_record_is_read(python: Run, without_extension: Path) -> None:
    """An extension for a newer torch is not even loaded; what else is said is the record's."""
    package = without_extension / "pc_kernels"
    (package / "_C.py").write_text("print('loaded')\n")
    built = {"torch": "99.0", "missing": {"cuda": "nobody asked"}}
    (package / "_build.json").write_text(json.dumps(built))
    code = (
        "import torch, pc_kernels, pc_kernels.info\n"
        "assert 'nobody asked' in pc_kernels.info.describe_cuda_extension()\n"
        "try:\n"
        "    pc_kernels.soft_rank(torch.ones(3), backend='cpu')\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    done = run_copy(python, without_extension, code)
    assert done.returncode == 0, done.stderr
    assert "needs torch 99.0 or later" in done.stdout and "loaded" not in done.stdout


@pytest.mark.parametrize("text", ["", "[]", "{"], ids=["empty", "a list", "cut off"])
def test_a_broken_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    (tmp_path / "_build.json").write_text(text)
    monkeypatch.setattr(installation, "PACKAGE", tmp_path)
    assert installation.read_record() == {}


def install(site: Path, source: Path | None = None) -> Path:
    """A package as pip leaves it in `site`; or, of `source`, installed in place."""
    (site / "pc_kernels-0.1.0.dist-info").mkdir(parents=True)
    dist_info = site / "pc_kernels-0.1.0.dist-info"
    (dist_info / "METADATA").write_text("Metadata-Version: 2.1\nName: pc_kernels\nVersion: 0.1.0\n")
    if source is not None:
        origin = {"url": source.as_uri(), "dir_info": {"editable": True}}
        (dist_info / "direct_url.json").write_text(json.dumps(origin))
        return source / "pc_kernels"
    return clone(site, setup=False)


def clone(folder: Path, setup: bool = True) -> Path:
    """A source folder with a package in it."""
    (folder / "pc_kernels").mkdir(parents=True)
    (folder / "pc_kernels" / "__init__.py").write_text("")
    if setup:
        (folder / "setup.py").write_text("")
    return folder / "pc_kernels"


def test_a_source_folder_that_hides_an_installed_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are named; a package installed in place, or without a clone around it, hides none."""
    source = clone(tmp_path / "a clone")
    installed = install(tmp_path / "site")

    def hidden(imported: Path, *sites: str) -> Path | None:
        monkeypatch.setattr(installation, "PACKAGE", imported)
        monkeypatch.setattr(sys, "path", [str(tmp_path / site) for site in sites])
        return installation.hidden_installation()

    assert hidden(source, "a clone", "site") == installed
    assert str(installed) in "".join(info.describe_copies())
    reason = installation.why_not_loaded("cpu", ABSENT)
    assert f"the source folder {source}, which hides the installed {installed}" in reason
    assert hidden(source, "a clone") is None
    assert hidden(installed, "site") is None
    install(tmp_path / "in place", source.parent)
    assert hidden(source, "a clone", "in place") is None
    elsewhere = clone(tmp_path / "b")
    assert hidden(elsewhere, "b", "in place") == source


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As where nothing was built, in a process that has not warned yet."""
    for name in ("cpu", "cuda", "triton"):
        monkeypatch.setattr(BACKENDS[name], "obstacle", lambda device, dtype: "no kernels, said so")
    monkeypatch.setattr(installation, "_warned", set())
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        yield


def warned(call: Callable[[], Any]) -> list[warnings.WarningMessage]:
    """The warnings of a call about the slow way."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [w for w in caught if issubclass(w.category, FallbackWarning)]


def test_the_fallback_warns_once(no_kernels: None) -> None:
    """Of what is missing, why, what it costs, what to do; on the line that called the package."""
    x = torch.randn(6, 3)
    loss_fn = pc_kernels.PerceptionCoherenceLoss()
    (first,) = warned(lambda: loss_fn(x, x))
    said = str(first.message)
    for part in ("no kernels, said so", "about 10 times slower", "--no-build-isolation", "silence"):
        assert part in said
    assert first.filename == __file__
    assert not warned(lambda: loss_fn(x, x)) and not warned(lambda: pc_kernels.soft_rank(x))
    (on_a_gpu,) = warned(lambda: select("auto", torch.device("cuda"), torch.float32))
    assert "cuda tensors" in str(on_a_gpu.message) and "triton" in str(on_a_gpu.message)


def test_the_fallback_is_silent_where_it_is_meant(no_kernels: None) -> None:
    """A backend by name, float64, other devices, the report, and torch.compile, in one piece."""
    x = torch.randn(6, 3)
    assert not warned(lambda: pc_kernels.soft_rank(x, backend="torch"))
    assert not warned(lambda: pc_kernels.soft_rank(x.double()))
    assert not warned(lambda: select("auto", torch.device("meta"), torch.float32))
    assert not warned(info.report)
    loss_fn = pc_kernels.PerceptionCoherenceLoss(backend="torch")
    step = torch.compile(lambda s: loss_fn(s, x), fullgraph=True, backend="eager")
    assert not warned(lambda: step(x))

    @torch.compile(fullgraph=True, backend="eager")
    def choose(s: torch.Tensor) -> torch.Tensor:
        return s if select("auto", s.device, s.dtype).name == "torch" else -s

    assert not warned(lambda: choose(x))
    loss_fn = pc_kernels.PerceptionCoherenceLoss()
    traced = torch.compile(lambda s: loss_fn(s, x), fullgraph=True, backend="eager")
    assert len(warned(lambda: traced(x))) == 1  # when the operator runs


def test_the_fallback_can_be_filtered(no_kernels: None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="pc_kernels")
        pc_kernels.hard_rank(torch.randn(6))


def test_auto_takes_the_first_that_is_usable() -> None:
    cpu = torch.device("cpu")
    assert select("auto", cpu, torch.float64).name == "torch"
    assert fastest(cpu, torch.float64).name == "torch"
    expected = "cpu" if extension_obstacle() is None else "torch"
    assert select("auto", cpu, torch.float32).name == expected
    assert select("auto", torch.device("meta"), torch.float32).name == "torch"
