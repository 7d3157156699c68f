"""What a network's layers said: a model of any kind, and layers by their names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

SHOWN = 8  # names in an error


class Outputs(NamedTuple):
    """What a model returned, and what its layers did on the way."""

    output: Any
    """The model's own."""
    layers: dict[str, Tensor]
    """By the names that were given, in their order."""


class LayerOutputs(nn.Module):
    """A model that returns, beside its output, those of some of its layers.

    It hooks the layers and is otherwise the model: same parameters, and `.train()` or `.to()` reach the
    model. The hooks do nothing while somebody else calls the model, nor while activation checkpointing
    calls layers again. `remove()` takes them away, and so does the end of a `with`.

    Example:
        >>> student = pc_kernels.LayerOutputs(cnn, {"early": "layer1", "late": "layer3"})
        >>> teacher = pc_kernels.LayerOutputs(vit, {"early": "blocks.3", "late": "blocks.11"})
        >>> with torch.no_grad():
        ...     target = teacher(images)
        >>> logits, layers = student(images)
        >>> loss = loss_fn(layers, target.layers)

    Where others wrap the model as well:

    - DistributedDataParallel: around this, `DDP(LayerOutputs(model, ...))`, so that it sees the layers'
      outputs among the model's; parameters that no loss reaches need its `find_unused_parameters=True`.
    - torch.compile: around this too. In a model that was compiled before, hooks may never run: an error.
    - DataParallel: its replicas share their hooks, in several threads: an error. Use DDP.
    - Checkpointing with `use_reentrant=True`: a layer inside of a checkpoint has an output without a
      graph: a loss of it teaches nothing. Name the block around it, or use `use_reentrant=False`.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str] | Mapping[str, str],
        *,
        pick: Callable[[Any], Tensor] | None = None,
    ) -> None:
        """Hooks the layers.

        Args:
            model: any module.
            layers: names as in `model.named_modules()`, "" for the model itself; or a mapping from the
                names to return to those. Layers have the same names on both sides of a loss.
            pick: makes the tensor of what a layer returned; by default that itself, or the first item of
                a tuple or list.

        Raises:
            TypeError, ValueError: an argument is not what is said here.
        """
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
        if isinstance(layers, str) or not isinstance(layers, Sequence | Mapping):
            raise TypeError(f"layers must be a sequence or a mapping of names; got {layers!r}")
        self.names = dict(layers) if isinstance(layers, Mapping) else {n: n for n in layers}
        if len(self.names) < len(layers):
            raise ValueError(f"layers must differ; got {list(layers)}")
        modules = dict(model.named_modules())
        for name in self.names.values():
            if name not in modules:
                raise ValueError(_unknown(name, modules))
        self.model = model
        self.pick = pick
        self._found: dict[str, tuple[Tensor, int | None]] | None = None  # while a call is on
        self._handles: list[RemovableHandle] = [
            modules[name].register_forward_hook(partial(self._keep, alias))
            for alias, name in self.names.items()
        ]

    def forward(self, *args: Any, **kwargs: Any) -> Outputs:
        """Calls the model.

        Raises:
            TypeError: a layer returned something of which `pick` is to make a tensor.
            RuntimeError: a layer did not run, ran more than once, or was changed in place afterwards (by
                an in-place ReLU, say).
        """
        found: dict[str, tuple[Tensor, int | None]] = {}
        self._found = found
        try:
            output = self.model(*args, **kwargs)
        finally:
            self._found = None
        missing = [alias for alias in self.names if alias not in found]
        if missing:
            why = "remove() was called" if not self._handles else "in this call of the model"
            raise RuntimeError(f"layers {missing} did not run: {why}")
        for alias, (x, version) in found.items():
            if version is not None and x._version != version:
                raise RuntimeError(
                    f"{self._called(alias)} returned a tensor that was changed in place afterwards: name "
                    "the layer that changed it"
                )
        return Outputs(output, {alias: found[alias][0] for alias in self.names})

    def _keep(self, alias: str, module: nn.Module, args: Any, output: Any) -> None:
        """The hook: keeps a layer's output, and its version, by which changes in place are noticed."""
        if self._found is None:
            return
        if alias in self._found:
            raise RuntimeError(
                f"{self._called(alias)} ran more than once in a call: name one that does not (under "
                "DataParallel all do: use DistributedDataParallel)"
            )
        x = _first(output) if self.pick is None else self.pick(output)
        if not isinstance(x, Tensor):
            raise TypeError(
                f"{self._called(alias)} returned {type(output).__name__}: say by pick= which of it "
                "is the tensor"
            )
        untracked = torch.compiler.is_compiling() or x.is_inference()
        self._found[alias] = (x, None if untracked else x._version)

    def _called(self, alias: str) -> str:
        return f"layer {alias!r}, the model's module {self.names[alias]!r},"

    def remove(self) -> None:
        """Takes the hooks away; the model is as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> LayerOutputs:
        """Itself; the hooks are there already."""
        return self

    def __exit__(self, *error: object) -> None:
        """Takes the hooks away."""
        self.remove()

    def extra_repr(self) -> str:
        """The layers, for printing."""
        return f"layers={self.names}"


def _first(output: Any) -> Any:
    """An output, or the first item of several."""
    return output[0] if isinstance(output, tuple | list) and output else output


def _unknown(name: object, modules: Iterable[str]) -> str:
    """An error that shows the names nearest to one that does not exist."""
    names = [known for known in modules if known]
    same_end = [known for known in names if known.endswith(f".{name}")]
    near = [*same_end, *get_close_matches(str(name), names, SHOWN, 0.5)]
    shown = ", ".join(map(repr, list(dict.fromkeys(near or names))[:SHOWN]))
    return f"layers: the model has no module {name!r}; {'near it' if near else 'it has'}: {shown}"
