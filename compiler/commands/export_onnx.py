"""``sagec export`` to an ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from sage_compiler.commands import options
from sage_compiler.commands.export_program import output
from sage_compiler.commands.model import Built
from sage_compiler.config import Options
from sage_compiler.errors import KernelUnavailableError, SageError
from sage_compiler.metrics import output_rel_l1, tensors
from sage_compiler.onnx import extra, session
from sage_compiler.report import Report

# Relative L1 of outputs that have nothing in common; recipes are far below.
_UNRELATED: Final = 1.0


def write(
    model: nn.Module,
    built: Built,
    parsed: Options,
    dynamic_shapes: Any,
    path: Path,
    *,
    opset: int | None,
    standalone: str | None,
    source_paths: bool,
) -> tuple[Report, int, float]:
    """Export a model, rewritten, to a file; returns the report, the bytes written, and how far the
    file's output in ONNX Runtime is from that of the model, in relative L1.

    Args:
        model: that of ``built``, as the module that it is.

    Raises:
        SageError: the packages of ONNX are not installed, or the file cannot be run.
        InvalidOptionError, InvalidAttentionError, PolicyError: as ``export_onnx``.
        UsageError: it cannot be written.
    """
    extra.require("sagec export", "onnx", "onnxscript", "onnxruntime")
    from sage_compiler.onnx import export

    exported = export.build(
        model,
        built.args,
        built.kwargs,
        dynamic_shapes=dynamic_shapes,
        options=parsed,
        opset=opset,
        standalone=standalone,
        source_paths=source_paths,
    )
    error = 0.0

    def compare(file: Path) -> None:
        nonlocal error
        error = _error(file, exported.program, built)

    with options.writing(path):
        size = export.save(exported.model, path, compare)
    return exported.report, size, error


def _error(file: Path, program: torch.export.ExportedProgram, built: Built) -> float:
    """Relative L1 between the output of the file and that of the model as it was written.

    Raises:
        SageError: ONNX Runtime does not run the file, or its outputs are others.
    """
    from sage_compiler.onnx import verify
    from sage_compiler.onnx.export import example_inputs

    expected = list(tensors(output(built.model, built.args, built.kwargs)))
    try:
        opened = _open(file)
        actual = list(tensors(verify.run(opened, example_inputs(program))))
    except verify.ERRORS as error:
        first = str(error).strip().splitlines()[0]
        raise SageError(f"ONNX Runtime does not run the exported file: {first}") from None
    try:
        found = output_rel_l1(actual, expected)
    except ValueError as error:
        raise SageError(f"the file does not give the output of the model: {error}") from None
    if not found < _UNRELATED:
        raise SageError(
            f"the file does not give the output of the model: they differ by {found:.3g} (rel_l1)"
        )
    return found


def _open(file: Path) -> Any:
    from sage_compiler.onnx import verify

    try:
        return session.onnx_session(file, ["CPUExecutionProvider"])
    except KernelUnavailableError:
        return verify.open_plain(file)
