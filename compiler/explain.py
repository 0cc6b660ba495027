"""A dry run: what the backend would do with a model, with nothing compiled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from sage_compiler.backend import transform
from sage_compiler.config import parse_options
from sage_compiler.report import Report


def explain(
    model: Callable[..., Any],
    *args: Any,
    options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Report:
    """Find, decide and rewrite as ``torch.compile(model, backend="sage")`` would; compile nothing.

    The model runs once, eagerly, on these arguments, so that every graph it consists of is
    seen. ``last_report()`` and other compilations of the model are not affected.

    Args:
        model: an nn.Module or a function.
        *args, **kwargs: what it is called with.
        options: as for torch.compile.

    Raises:
        InvalidOptionError: an unknown option, or a value it cannot have.
        KernelUnavailableError: an explicit recipe without a kernel here and fallback="error".
    """
    parsed = parse_options(options)
    report = Report()

    def look(gm: fx.GraphModule, example_inputs: list[torch.Tensor]) -> Callable[..., Any]:
        found = transform(gm, parsed)
        report.extend(found)
        return found.graphs[0].before.forward

    def call() -> Any:
        return model(*args, **kwargs)

    # Dynamo caches by code object: one of our own keeps the model's cache out of this.
    call.__code__ = call.__code__.replace(co_name=f"explain_{id(report)}")
    torch.compile(call, backend=look)()
    return report
