"""`LayerOutputs`: what layers say, and everything that could make it silently something else."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.utils.checkpoint import checkpoint

import pc_kernels


class Net(nn.Module):
    """Two blocks and a head; `again` blocks run twice, `skipped` ones not at all."""

    def __init__(self, again: str = "", skipped: str = "") -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.relu = nn.ReLU(inplace=True)
        self.tuple = Several(tuple)
        self.dict = Several(dict)
        self.head = nn.Linear(4, 3)
        self.again, self.skipped = again, skipped

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        x = self.blocks[0](x)
        if self.again:
            x = self.blocks[0](x)
        x = self.relu(self.blocks[1](x))
        x = self.dict(self.tuple(x)[0])["x"]
        return x if self.skipped else scale * self.head(x)


class Several(nn.Module):
    """Returns its input among other things."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        return (x, None) if self.kind is tuple else {"x": x}


def test_names_and_what_they_mean(rng: Generator) -> None:
    torch.manual_seed(0)
    net, x = Net(), torch.randn(5, 4, generator=rng)
    layers = pc_kernels.LayerOutputs(net, {"late": "relu", "early": "blocks.0", "all": ""})
    output, found = layers(x, scale=2.0)
    assert list(found) == ["late", "early", "all"]
    assert torch.equal(output, net(x, 2.0)) and found["all"] is output
    assert torch.equal(found["early"], net.blocks[0](x))
    assert torch.equal(found["late"], net.blocks[1](net.blocks[0](x)).relu())
    found["early"].sum().backward()
    assert net.blocks[0].weight.grad is not None
    assert list(layers.parameters()) == list(net.parameters())
    assert list(pc_kernels.LayerOutputs(net, ["blocks.0", "tuple"])(x).layers) == [
        "blocks.0",
        "tuple",
    ]
    assert pc_kernels.LayerOutputs(net, [])(x).layers == {}


def test_several_outputs(rng: Generator) -> None:
    net, x = Net(), torch.randn(5, 4, generator=rng)
    assert torch.equal(
        pc_kernels.LayerOutputs(net, ["tuple"])(x).layers["tuple"], net_until(net, x)
    )
    with pytest.raises(TypeError, match=r"layer 'dict'.*returned dict: say by pick="):
        pc_kernels.LayerOutputs(net, ["dict"])(x)
    picked = pc_kernels.LayerOutputs(net, ["dict"], pick=lambda found: found["x"])(x)
    assert torch.equal(picked.layers["dict"], net_until(net, x))


def net_until(net: Net, x: Tensor) -> Tensor:
    return net.blocks[1](net.blocks[0](x)).relu()


def test_hooks_go_away(rng: Generator) -> None:
    net, x = Net(), torch.randn(5, 4, generator=rng)

    def hooks() -> int:
        return sum(len(module._forward_hooks) for module in net.modules())

    with pc_kernels.LayerOutputs(net, ["relu", ""]) as layers:
        assert hooks() == 2
        net(x)  # somebody else's call
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            layers(x[:, :2])
        assert list(layers(x).layers) == ["relu", ""]
    assert hooks() == 0
    with pytest.raises(RuntimeError, match=r"layers \['relu', ''\] did not run: remove"):
        layers(x)
    layers.remove()


def test_copies(rng: Generator) -> None:
    """A copy of the model, as for an average of weights, is on its own."""
    net, x = Net(), torch.randn(5, 4, generator=rng)
    layers = pc_kernels.LayerOutputs(net, ["blocks.0"])
    average = copy.deepcopy(net)
    with torch.no_grad():
        average.blocks[0].weight.zero_()
    average(x)
    for other in (copy.deepcopy(layers), pickle.loads(pickle.dumps(layers))):
        assert torch.equal(other(x).layers["blocks.0"], layers(x).layers["blocks.0"])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool, rng: Generator) -> None:
    """Layers run again in the backward, which is no second output."""

    class Checkpointed(Net):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return checkpoint(super().forward, x, scale, use_reentrant=reentrant)

    net, x = Checkpointed(), torch.randn(5, 4, generator=rng, requires_grad=True)
    output, found = pc_kernels.LayerOutputs(net, ["blocks.0"])(x)
    output.sum().backward()
    assert net.blocks[0].weight.grad is not None
    assert found["blocks.0"].requires_grad is not reentrant


def test_compile_and_inference(rng: Generator) -> None:
    net, x = Net(), torch.randn(5, 4, generator=rng)
    layers = pc_kernels.LayerOutputs(net, ["relu", "tuple"])
    compiled = torch.compile(layers, fullgraph=True, backend="aot_eager")
    wanted = layers(x)
    for name, found in compiled(x).layers.items():
        assert torch.allclose(found, wanted.layers[name])
    with torch.inference_mode():
        assert layers(x).layers["relu"].is_inference()


def test_data_parallel_is_refused(rng: Generator) -> None:
    """Replicas share hooks: as if a layer ran several times, which is what its replicas do."""
    net, x = Net(), torch.randn(5, 4, generator=rng)
    with pytest.raises(RuntimeError, match=r"ran more than once.*DistributedDataParallel"):
        pc_kernels.LayerOutputs(Net(again="yes"), ["blocks.0"])(x)
    wrapped = nn.DataParallel(net)  # without a GPU it calls the model itself
    assert list(pc_kernels.LayerOutputs(wrapped, ["module.relu"])(x).layers) == ["module.relu"]
    with pytest.raises(ValueError, match=r"no module 'blocks\.0'; near it: 'module\.blocks\.0'"):
        pc_kernels.LayerOutputs(wrapped, ["blocks.0"])


def test_errors(rng: Generator) -> None:
    net, x = Net(), torch.randn(5, 4, generator=rng)
    layers = pc_kernels.LayerOutputs
    for call, error, words in (
        (
            lambda: layers(net, ["block.0"]),
            ValueError,
            r"no module 'block\.0'; near it: 'blocks\.0'",
        ),
        (lambda: layers(net, ["xyz"]), ValueError, "no module 'xyz'; it has: 'blocks', "),
        (lambda: layers(net, ["relu", "relu"]), ValueError, "layers must differ"),
        (lambda: layers(net, "relu"), TypeError, "layers must be a sequence or a mapping.*'relu'"),
        (lambda: layers(torch.relu, ["relu"]), TypeError, r"model must be a torch\.nn\.Module"),
        (lambda: layers(Net(skipped="yes"), ["head"])(x), RuntimeError, r"\['head'\] did not run"),
        (
            lambda: layers(net, ["blocks.1"])(x),
            RuntimeError,
            "blocks.1.*changed in place afterwards",
        ),
    ):
        with pytest.raises(error, match=words):
            call()
