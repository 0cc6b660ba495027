"""A dry run: what the backend would do with a model, with nothing compiled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from sage_compiler.backend import transform
from sage_compiler.capture import captured
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
    seen. ``last_report()`` is not affected, nor are the results of other compilations of the
    model; where it has graph breaks, they may have to compile once more.

    Args:
        model: an nn.Module or a function.
        *args, **kwargs: what it is called with.
        options: as for torch.compile.

    Raises:
        InvalidOptionError: an unknown option, or a value it cannot have.
        PolicyError: a policy that cannot be read, or that does not fit the model.
        KernelUnavailableError: an explicit recipe without a kernel here and fallback="error".
    """
    parsed = parse_options(options)
    report = Report()

    def look(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        found = transform(gm, parsed)
        report.extend(found)
        return found.graphs[0].before.forward

    with captured(model, look) as run:
        run(*args, **kwargs)
    return report
