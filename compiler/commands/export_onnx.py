"""``sagec export`` to an ONNX file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from torch import Tensor, nn

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
) -> tuple[Report, int, dict[str, float | str]]:
    """Export a model, rewritten, to a file; returns report, bytes written, and a comparison:
    as ``rel_l1`` how far the file's output in ONNX Runtime is from that of the model, or as
    ``not_run`` why this machine cannot run it.

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
    comparison: dict[str, float | str] = {}

    def compare(file: Path) -> None:
        comparison.update(_compare(file, exported.inputs, built))

    with options.writing(path):
        size = export.save(exported.model, path.resolve(), compare)
    return exported.report, size, comparison


def _compare(file: Path, inputs: Mapping[str, Tensor], built: Built) -> dict[str, float | str]:
    """Relative L1 between the output of the file and that of the model as it was written, or why
    this machine cannot run the file.

    Raises:
        SageError: ONNX Runtime refuses the file, or its outputs are others.
    """
    from sage_compiler.onnx import verify

    expected = list(tensors(output(built.model, built.args, built.kwargs)))
    try:
        opened = _open(file)
        actual = list(tensors(verify.run(opened, inputs)))
    except verify.NO_KERNEL as error:
        # Of operators in a dtype that only GPUs have; the file may be fine.
        return {"not_run": _first_line(error)}
    except verify.ERRORS as error:
        said = _first_line(error)
        raise SageError(f"ONNX Runtime does not run the exported file: {said}") from None
    try:
        found = output_rel_l1(actual, expected)
    except ValueError as error:
        raise SageError(f"the file does not give the output of the model: {error}") from None
    if not found < _UNRELATED:
        raise SageError(
            f"the file does not give the output of the model: they differ by {found:.3g} (rel_l1)"
        )
    return {"rel_l1": found}


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _open(file: Path) -> Any:
    from sage_compiler.onnx import verify

    try:
        return session.onnx_session(file, ["CPUExecutionProvider"])
    except KernelUnavailableError:
        return verify.open_plain(file)
