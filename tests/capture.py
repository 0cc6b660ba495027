"""Run a function through Dynamo and the passes, without Inductor: seconds instead of minutes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from sage_compiler.backend import transform
from sage_compiler.config import parse_options
from sage_compiler.report import Report


def rewritten(
    function: Callable[..., Any], *args: Any, dynamic: bool | None = None, **options: Any
) -> tuple[Any, Report]:
    """What the rewritten graphs of ``function`` return for these arguments, and the report."""
    report = Report()

    def backend(gm: fx.GraphModule, example_inputs: list[torch.Tensor]) -> Callable[..., Any]:
        report.extend(transform(gm, parse_options(options)))
        return gm.forward

    torch._dynamo.reset()
    result = torch.compile(function, backend=backend, dynamic=dynamic)(*args)
    return result, report


def operator_calls(report: Report) -> int:
    """How many nodes of the rewritten graphs call the operator."""
    return sum(
        node.target is torch.ops.sage.attention.default
        for pair in report.graphs
        for node in pair.after.graph.nodes
    )
