"""A dry run: what the backend would do with a model, with nothing compiled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list, reset_code
from torch._dynamo import config as dynamo_config
from torch._dynamo.convert_frame import input_codes
from torch._dynamo.exc import BackendCompilerFailed

from sage_compiler.backend import transform
from sage_compiler.config import parse_options
from sage_compiler.errors import SageError
from sage_compiler.passes.identity import layer_of_module, name_code
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
    model; where it has graph breaks, they may have to compile once more (see ``_forget``).

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

    # Dynamo caches by code object, and this one is the same in every call of explain.
    call.__code__ = call.__code__.replace(co_name=f"explain_{id(report)}")
    name_code(call.__code__, layer_of_module(model))  # as if it were the model's own
    try:
        torch.compile(call, backend=look)()
    except BackendCompilerFailed as error:
        if isinstance(error.inner_exception, SageError):
            raise error.inner_exception from None
        raise
    finally:
        _forget(look)
    return report


def _forget(backend: Callable[..., Any]) -> None:
    """Drop what Dynamo has cached for a backend.

    After a graph break the model's own functions are compiled too. Left in place, the entries
    would count toward the limit of recompilations, and the model would silently run in eager.
    Entries can only be dropped all together: where others have compiled the same code, ours stay
    until they take half of the limit, and then the others compile once more.
    """
    for reference in list(input_codes.seen):
        code = reference()
        if code is None:
            continue
        entries = _debug_get_cache_entry_list(code)
        ours = [
            entry
            for entry in entries
            if getattr(entry.backend, "compiler_fn", entry.backend) is backend
        ]
        alone = len(ours) == len(entries)
        if ours and (alone or 2 * len(entries) >= dynamo_config.recompile_limit):
            reset_code(code)
