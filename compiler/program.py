"""Models as programs of torch.export, their attention rewritten."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from sage_compiler.errors import InvalidOptionError
from sage_compiler.policy import Policy
from sage_compiler.report import Report


def export_rewritten(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    dynamic_shapes: Any,
    rewrite: Callable[[fx.GraphModule], Report],
) -> tuple[ExportedProgram, Report]:
    """Export a model, rewrite it, and export what came of it.

    Args:
        args, kwargs: example inputs.
        dynamic_shapes: as torch.export.export takes them.
        rewrite: edits the graph in place, and reports.

    Raises:
        torch._dynamo.exc.UserError: what torch.export says of a model or of its shapes.
    """

    def export(module: nn.Module) -> ExportedProgram:
        return torch.export.export(
            module, args, dict(kwargs), dynamic_shapes=dynamic_shapes, strict=False
        )

    rewritten = export(model).module()
    report = rewrite(rewritten)
    return export(rewritten), report


def refuse_timesteps(policy: Policy | None) -> None:
    """An exported program has no ``set_step``: it would follow the first timesteps for ever.

    Raises:
        InvalidOptionError: a layer of the policy has recipes by timestep that differ.
    """
    for name, layer in ({} if policy is None else policy.layers).items():
        if len(set(layer.recipes)) > 1:
            raise InvalidOptionError(
                f"layer {name!r} of the policy has recipes by timestep ({layer.recipe}), which an "
                "exported program cannot follow; calibrate with one timestep range"
            )
