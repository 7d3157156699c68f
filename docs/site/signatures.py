"""A griffe extension: the API pages show signatures as help() does, and examples as code."""

from __future__ import annotations

import inspect
from typing import Any

import griffe


class AsHelpShows(griffe.Extension):
    """Options taken as `**options` appear by name, with their defaults; examples as examples."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """`Example:` is a section to the Google style, but only `Examples:` to griffe."""
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Goes through the public names, when all of the package has been read."""
        package = griffe.dynamic_import(pkg.path)
        for name in package.__all__:
            signature = getattr(getattr(package, name), "__signature__", None)
            if signature is None:
                continue
            found = pkg[name]
            shown = found.final_target if found.is_alias else found
            together = shown.docstring is not None and "\n    options: " in shown.docstring.value
            if shown.is_class:
                shown["__init__"] = griffe.Function("__init__", parent=shown)
                shown = shown["__init__"]
            shown.parameters = parameters(signature)
            if together:  # the docstring describes them as one argument
                kind = griffe.ParameterKind.var_keyword
                shown.parameters.add(griffe.Parameter("options", annotation="Any", kind=kind))


def parameters(signature: inspect.Signature) -> griffe.Parameters:
    """The same signature in griffe's terms."""
    return griffe.Parameters(
        *(
            griffe.Parameter(
                p.name,
                annotation=None if p.annotation is p.empty else str(p.annotation),
                kind=griffe.ParameterKind(p.kind.description),
                default=None if p.default is p.empty else repr(p.default),
            )
            for p in signature.parameters.values()
        )
    )
