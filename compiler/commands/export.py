"""The command ``sagec export``: a rewritten model in a file that torch.export reads."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sage_compiler.backend import transform
from sage_compiler.commands import options
from sage_compiler.commands.model import Built, build
from sage_compiler.config import Options, parse_options
from sage_compiler.errors import SageError, UsageError
from sage_compiler.report import Report

_SUFFIX: Final = ".pt2"
_DESCRIPTION: Final = f"""\
Export a model with torch.export, its attention rewritten as torch.compile(model, backend="sage")
would, to a file that torch.export.load reads once sage_compiler is imported. It is read again, and
its output compared with that of the rewritten model, before it takes its name.

    sagec export model.py:build --out model.pt2
    sagec export model.py:build --out model.pt2 --policy policy.json --dynamic 0:1

{options.MODEL_HELP}"""

DynamicShapes = dict[str, Any]  # argument -> {dim: torch.export.Dim}, None where all is static


def add_command(commands: options.Commands) -> None:
    """Give ``sagec`` the command."""
    parser = options.add_command(
        commands,
        "export",
        _export,
        summary="a rewritten model, for torch.export.load",
        description=_DESCRIPTION,
    )
    options.add_model(parser)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help=f"its name ends in {_SUFFIX}"
    )
    parser.add_argument(
        "--dynamic",
        type=_dim,
        action="append",
        default=[],
        metavar="INPUT:DIM",
        help="a size that varies: 0:1 is dim 1 of the first input, mask:3 that of an input by "
        "name; can be repeated",
    )
    options.add_json(parser)
    options.add_decision(parser)


def _export(arguments: argparse.Namespace) -> int:
    out: Path = arguments.out
    if out.suffix != _SUFFIX:
        raise UsageError(f"--out {str(out)!r}; the known formats: {_SUFFIX} (torch.export)")
    options.check_can_write(out)
    parsed = parse_options(options.decision(arguments))
    _refuse_timesteps(parsed)
    built = build(arguments.model)
    program, report = export(built, parsed, arguments.dynamic)
    size = _save_checked(program, built, out)
    if arguments.json:
        options.print_json({"file": str(out), "bytes": size, "report": report.to_dict()})
    else:
        print(f"{report}\nwritten and checked: {out}, {size} bytes")
    return options.OK


def export(
    built: Built, parsed: Options, dynamic: Iterable[tuple[str, int]] = ()
) -> tuple[torch.export.ExportedProgram, Report]:
    """Export a model, rewrite it, and export what came of it.

    Args:
        dynamic: (input, dim) of sizes that vary; an input by its name or its position.

    Raises:
        UsageError: not a module; an input or a dim that is not there, or cannot vary.
        PolicyError, KernelUnavailableError: as ``transform``.
    """
    if not isinstance(built.model, nn.Module):
        raise UsageError(
            f"the model is a {type(built.model).__name__}; torch.export takes a torch.nn.Module"
        )
    shapes = _dynamic_shapes(built, dynamic)
    original = _captured(built.model, built, shapes)
    rewritten = original.module()
    report = transform(rewritten, parsed)
    return _captured(rewritten, built, shapes), report


def _captured(
    model: nn.Module, built: Built, shapes: DynamicShapes | None
) -> torch.export.ExportedProgram:
    from torch._dynamo.exc import UserError

    try:
        return torch.export.export(
            model, built.args, dict(built.kwargs), dynamic_shapes=shapes, strict=False
        )
    except UserError as error:
        if shapes is None:
            raise
        # What follows the constraints is about calls of torch.export.
        said = str(error).partition("! For more")[0].splitlines()[0]
        raise UsageError(f"--dynamic: the model fixes a size that should vary: {said}") from None


def _dynamic_shapes(built: Built, dynamic: Iterable[tuple[str, int]]) -> DynamicShapes | None:
    wanted = list(dynamic)
    if not wanted:
        return None
    named = built.named_arguments()
    names = list(named)
    dims: dict[str, dict[int, Any]] = {name: {} for name in names}
    for given, dim in wanted:
        name = names[int(given)] if given.isdigit() and int(given) < len(names) else given
        if name not in dims:
            raise UsageError(f"--dynamic {given}:{dim}; the inputs are {', '.join(names)}")
        value = named[name]
        if not isinstance(value, Tensor):
            raise UsageError(
                f"--dynamic {given}:{dim}; the input {name!r} is a {type(value).__name__}, not a "
                "tensor"
            )
        if dim >= value.dim():
            raise UsageError(
                f"--dynamic {given}:{dim}; the input {name!r} has shape {tuple(value.shape)}"
            )
        dims[name][dim] = torch.export.Dim.DYNAMIC
    return {name: found or None for name, found in dims.items()}


def _refuse_timesteps(parsed: Options) -> None:
    """An exported program has no ``set_step``: it would follow the first timesteps for ever."""
    layers = {} if parsed.policy is None else parsed.policy.layers
    for name, layer in layers.items():
        if len(set(layer.recipes)) > 1:
            raise UsageError(
                f"layer {name!r} of the policy has recipes by timestep ({layer.recipe}), which an "
                "exported program cannot follow; calibrate with one timestep range"
            )


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
        expected = _output(program.module(), built.args, built.kwargs)
        actual = _output(torch.export.load(file).module(), built.args, built.kwargs)
        _require_same(actual, expected)
        size = file.stat().st_size
        with options.writing(path):
            os.replace(file, path)
    return size


def _output(
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


def _dim(text: str) -> tuple[str, int]:
    name, separator, dim = text.rpartition(":")
    if not separator or not name or not dim.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form INPUT:DIM, such as 0:1")
    return name, int(dim)
