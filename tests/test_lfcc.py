"""`LFCCLoss` against its formula in float64, between all kinds of networks."""

from __future__ import annotations

import copy
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from torch import Generator, Tensor, nn
from torch.nn import functional

import pc_kernels

MAPS, TOKENS, VECTORS = (6, 5, 7, 4), (6, 13, 9), (6, 8)
KINDS = {"cnn": MAPS, "vit": TOKENS, "mlp": VECTORS}


def low_pass(network: str, **options: Any) -> pc_kernels.LowPass:
    tokens = {"grid": (3, 4), "class_tokens": 1} if network == "vit" else {}
    return pc_kernels.LowPass(**tokens, **options)


def formula(loss_fn: pc_kernels.LFCCLoss, layer: str, scale: int, pair: Any) -> Tensor:
    """L_ls with the projections of the loss, which are called "layer scale×scale", in float64."""
    vectors = []
    sides = (loss_fn.student_projections, loss_fn.teacher_projections)
    for x, low, projections in zip(pair, loss_fn.filters[layer], sides, strict=True):
        linear = projections[f"{layer.replace('.', '/')} {scale}x{scale}"].linear
        weight, bias = linear.weight.double(), linear.bias.double()
        compact = low(x.double())[scale]
        channels = compact.shape[1] // scale**2
        if weight.shape[1] == channels and scale > 1:  # a 1×1 convolution
            maps = compact.reshape(-1, channels, scale, scale)
            y = functional.conv2d(maps, weight[:, :, None, None], bias).flatten(2).mT.flatten(1)
        else:
            y = compact @ weight.mT + bias
        vectors.append(y / y.norm(dim=1, keepdim=True))
    logits = vectors[0] @ vectors[1].mT / loss_fn.contrastive_loss.temperature
    return (logits.logsumexp(1) - logits.diagonal()).mean()


@pytest.mark.parametrize("projection", ["linear", "conv"])
@pytest.mark.parametrize("teacher", KINDS)
@pytest.mark.parametrize("student", KINDS)
def test_it_is_its_formula(student: str, teacher: str, projection: str, rng: Generator) -> None:
    """Any kind of network to any other, and the gradients of all that learns."""
    lam, w = {"stage.1": 0.5, "out": 2.0}, {1: 1.0, 3: 0.25}
    options = {"kind": "dct", "scales": (1, 3)}
    torch.manual_seed(0)
    loss_fn = pc_kernels.LFCCLoss(
        lam,
        student_filter=low_pass(student, **options),
        teacher_filter=low_pass(teacher, **options),
        scale_weights=w,
        width=11,
        projection=projection,
        temperature=0.2,
    )
    mine = {name: torch.randn(KINDS[student], generator=rng, requires_grad=True) for name in lam}
    theirs = {name: torch.randn(KINDS[teacher], generator=rng, requires_grad=True) for name in lam}
    loss = loss_fn(mine, theirs)
    terms = {
        (name, s): formula(loss_fn, name, s, (mine[name], theirs[name].detach()))
        for name in lam
        for s in w
    }
    for key, term in loss_fn.terms(mine, theirs).items():
        assert abs(term - terms[key]) <= 1e-5 * terms[key]
    wanted = sum(lam[name] * w[s] * term for (name, s), term in terms.items())
    assert abs(loss - wanted) <= 1e-5 * wanted
    learning = [*mine.values(), *loss_fn.parameters()]
    got = torch.autograd.grad(loss, learning, retain_graph=True)
    for a, b in zip(got, torch.autograd.grad(wanted, learning), strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-7  # a bias that all samples share: nearly 0
    loss.backward()
    assert all(x.grad is None for x in theirs.values())


def test_defaults_and_sequences(rng: Generator) -> None:
    torch.manual_seed(0)
    loss_fn = pc_kernels.LFCCLoss([1.0, 3.0], channels=[(5, 7), (8, 7)], temperature=0.2)
    before = [p.clone() for p in loss_fn.parameters()]
    mine = [torch.randn(MAPS, generator=rng), torch.randn(VECTORS, generator=rng)]
    theirs = [torch.randn(6, 7, 2, 2, generator=rng) for _ in mine]
    terms = loss_fn.terms(mine, theirs)
    assert list(terms) == [(layer, s) for layer in ("0", "1") for s in (1, 2, 4)]
    wanted = sum((1, 3)[int(layer)] / 3 * term for (layer, _), term in terms.items())
    assert torch.allclose(loss_fn(mine, theirs), wanted)
    assert all(map(torch.equal, before, loss_fn.parameters()))
    for per_layer in ({"0": (2,), "1": (1, 3)},):
        filters = {layer: pc_kernels.LowPass("gaussian", s) for layer, s in per_layer.items()}
        both = {"student_filter": filters, "teacher_filter": filters}
        terms = pc_kernels.LFCCLoss([1.0, 1.0], **both).terms(mine, theirs)
        assert list(terms) == [("0", 2), ("1", 1), ("1", 3)]


def test_lazy_projections(tmp_path: Path, rng: Generator) -> None:
    """An optimiser that was made before the first batch trains them; what they become can be saved."""
    x, y = torch.randn(MAPS, generator=rng), torch.randn(VECTORS, generator=rng)
    loss_fn = pc_kernels.LFCCLoss({"a.b": 1.0}, temperature=0.2)
    fresh = copy.deepcopy(loss_fn)
    optimizer = torch.optim.AdamW(loss_fn.parameters(), lr=0.01)
    first = loss_fn({"a.b": x}, {"a.b": y})
    before = {name: p.clone() for name, p in loss_fn.named_parameters()}
    for _ in range(20):
        optimizer.zero_grad()
        loss = loss_fn({"a.b": x}, {"a.b": y})
        loss.backward()
        optimizer.step()
    assert loss < first / 2
    assert all(not torch.equal(p, before[name]) for name, p in loss_fn.named_parameters())
    torch.save(loss_fn.state_dict(), tmp_path / "loss.pt")
    fresh.load_state_dict(torch.load(tmp_path / "loss.pt"))
    assert torch.equal(fresh({"a.b": x}, {"a.b": y}), loss_fn({"a.b": x}, {"a.b": y}))
    bigger = {"a.b": torch.randn(6, 5, 9, 9, generator=rng)}
    fresh(bigger, {"a.b": y})  # another size of image, the same projections
    with pytest.raises(ValueError, match=r"student\['a\.b'\] has 6 low frequencies.*made for 5"):
        fresh({"a.b": torch.randn(6, 6, 4, 4)}, {"a.b": y})


def test_a_teacher_of_inference_mode_and_half_precision(rng: Generator) -> None:
    with torch.inference_mode():
        y = torch.randn(TOKENS, generator=rng).bfloat16()
    x = torch.randn(MAPS, generator=rng, requires_grad=True)
    torch.manual_seed(0)
    loss_fn = pc_kernels.LFCCLoss(
        [1.0], teacher_filter=low_pass("vit"), channels=[(5, 9)], temperature=0.2
    )
    wanted = loss_fn([x], [y.float()])
    assert torch.allclose(loss_fn([x], [y]), wanted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_fn([x.bfloat16()], [y])
    assert abs(loss - wanted) < 0.02 * wanted
    loss.backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_compile(rng: Generator) -> None:
    torch.compiler.reset()
    x, y = torch.randn(MAPS, generator=rng, requires_grad=True), torch.randn(VECTORS, generator=rng)
    one = {side: pc_kernels.LowPass("dct", (2,)) for side in ("student_filter", "teacher_filter")}
    loss_fn = pc_kernels.LFCCLoss([1.0], channels=[(5, 8)], projection="conv", **one)
    wanted = loss_fn([x], [y])
    loss = torch.compile(loss_fn, fullgraph=True, backend="aot_eager")([x], [y])
    assert torch.allclose(loss, wanted)
    for got, right in zip(
        torch.autograd.grad(loss, [x, *loss_fn.parameters()]),
        torch.autograd.grad(wanted, [x, *loss_fn.parameters()]),
        strict=True,
    ):
        assert torch.allclose(got, right, atol=1e-6)


def test_errors(rng: Generator) -> None:
    make, low = pc_kernels.LFCCLoss, pc_kernels.LowPass
    x, y = torch.randn(MAPS, generator=rng), torch.randn(TOKENS, generator=rng)
    for call, error, words in (
        (lambda: make({}), ValueError, "layer_weights has no layers"),
        (lambda: make(1.0), TypeError, "layer_weights must be a mapping or a sequence"),
        (lambda: make([1.0], width=0), ValueError, "width must be an int ≥ 1; got 0"),
        (
            lambda: make([1.0], projection="mlp"),
            ValueError,
            "projection must be one of 'linear', 'c",
        ),
        (lambda: make([1.0], temprature=1.0), TypeError, "temprature"),
        (lambda: make([1.0], student_filter="dct"), TypeError, "student_filter must be a LowPass"),
        (
            lambda: make([1.0], teacher_filter={"x": low()}),
            ValueError,
            "teacher_filter must have th",
        ),
        (
            lambda: make([1.0], teacher_filter=low("dct")),
            ValueError,
            r"one kind.*'dct', \(1, 2, 4\)",
        ),
        (lambda: make([1.0], scale_weights={1: 1.0}), ValueError, r"scale_weights lacks.*\[2, 4\]"),
        (
            lambda: make([1.0], channels=[(1, 1), (2, 2)]),
            ValueError,
            "channels must have the layers",
        ),
        (
            lambda: make([1.0], channels=[(3,)]),
            ValueError,
            r"channels must be.*two ints ≥ 1.*\(3,\)",
        ),
        (lambda: make([1.0], channels=[(3, 0)]), ValueError, r"channels must be.*got \(3, 0\) for"),
        (lambda: make(["early"]), TypeError, "layer_weights must be numbers; got 'early'"),
        (
            lambda: make([1.0])([None], [x]),
            TypeError,
            r"student\['0'\] must be a torch.Tensor; got N",
        ),
        (
            lambda: make([1.0])([x], [None]),
            TypeError,
            r"teacher\['0'\] must be a torch.Tensor; got N",
        ),
        (lambda: make([1.0])([x, x], [x, x]), ValueError, "student must have the layers"),
        (lambda: make({"a": 1.0})({"a": x}, {"b": x}), ValueError, "teacher must have the layers"),
        (lambda: make([1.0])([x], [y]), ValueError, r"teacher\['0'\] has shape.*grid="),
        (lambda: make([1.0])([x], [x[:3]]), ValueError, "same inputs.*6 and 3"),
    ):
        with pytest.raises(error, match=words):
            call()


def test_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    """It runs, in short, and says three accuracies a pair."""
    path = ROOT / "docs" / "examples" / "heterogeneous.py"
    spec = importlib.util.spec_from_file_location("heterogeneous", path)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main(["--epochs", "1", "--images", "300"])
    rows = capsys.readouterr().out.splitlines()[1:]
    assert [row.split("  ")[0] for row in rows] == ["ViT -> CNN", "CNN -> MLP-Mixer"]
    assert all(0 <= float(x) <= 100 for row in rows for x in re.findall(r"\d+\.\d", row))


def test_hooks_and_loss_together(rng: Generator) -> None:
    """A CNN learns from a ViT's layers; all of it that the layers depend on gets gradients."""
    cnn = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU())
    vit = nn.Sequential(nn.Linear(5, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    student = pc_kernels.LayerOutputs(cnn, {"early": "1", "late": "3"})
    teacher = pc_kernels.LayerOutputs(vit.eval(), {"early": "0", "late": "1"})
    loss_fn = pc_kernels.LFCCLoss(
        {"early": 0.5, "late": 1.0}, teacher_filter=pc_kernels.LowPass(grid="square")
    )
    with torch.no_grad():
        target = teacher(torch.randn(6, 9, 5, generator=rng)).layers
    loss_fn(student(torch.randn(6, 1, 8, 8, generator=rng)).layers, target).backward()
    assert all(p.grad is not None for p in (*cnn.parameters(), *loss_fn.parameters()))
    assert all(p.grad is None for p in vit.parameters())
