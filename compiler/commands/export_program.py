"""``sagec export`` to a file of torch.export."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sage_compiler.backend import transform
from sage_compiler.commands import options
from sage_compiler.commands.model import Built
from sage_compiler.config import Options
from sage_compiler.errors import SageError
from sage_compiler.program import export_rewritten, refuse_timesteps
from sage_compiler.report import Report


def write(
    model: nn.Module, built: Built, parsed: Options, dynamic_shapes: Any, path: Path
) -> tuple[Report, int]:
    """Export a model, rewritten, to a file; returns the report and the bytes written.

    Args:
        model: that of ``built``, as the module that it is.

    Raises:
        InvalidOptionError: a policy with recipes by timestep.
        PolicyError, KernelUnavailableError: as ``transform``.
        SageError: the file does not give the output of the model.
        UsageError: it cannot be written.
    """
    refuse_timesteps(parsed.policy)
    program, report = export_rewritten(
        model,
        built.args,
        built.kwargs,
        dynamic_shapes,
        functools.partial(transform, options=parsed),
    )
    return report, _save_checked(program, built, path)


def _save_checked(program: torch.export.ExportedProgram, built: Built, path: Path) -> int:
    """Save under the name of ``path`` what gives the program's output again; returns its bytes.

    Raises:
        SageError: it does not; there is no such file then.
        UsageError: the file cannot be written.
    """
    with options.writing(path):
        # Beside it, for a rename within one file system.
        beside = tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.")
    with beside as folder:
        file = Path(folder) / path.name
        with options.writing(path):
            torch.export.save(program, file)
        expected = output(program.module(), built.args, built.kwargs)
        actual = output(torch.export.load(file).module(), built.args, built.kwargs)
        _require_same(actual, expected)
        size = file.stat().st_size
        with options.writing(path):
            os.replace(file, path)
    return size


def output(
    module: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> list[Any]:
    """The leaves of the output, with the same random numbers each time."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        # Of the inputs as well, which a model may write to.
        given, named = pytree.tree_map_only(Tensor, Tensor.clone, (args, dict(kwargs)))
        return pytree.tree_leaves(module(*given, **named))


def _require_same(actual: list[Any], expected: list[Any]) -> None:
    try:
        torch.testing.assert_close(actual, expected, equal_nan=True)
    except AssertionError as error:
        first = str(error).splitlines()[0]
        raise SageError(f"the file does not give the output of the model: {first}") from None
