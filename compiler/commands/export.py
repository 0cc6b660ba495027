"""The command ``sagec export``: a rewritten model in a file."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from sage_compiler.commands import export_onnx, export_program, options
from sage_compiler.commands.model import Built, build
from sage_compiler.config import Options, parse_options
from sage_compiler.errors import UsageError
from sage_compiler.onnx.axes import LEAST_EXAMPLE
from sage_compiler.onnx.standalone import Standalone

_PROGRAM: Final = ".pt2"
_ONNX: Final = ".onnx"
_DESCRIPTION: Final = f"""\
Export a model, its attention rewritten, to a file whose format its name tells.

model.pt2: a program of torch.export with what torch.compile(model, backend="sage") would run here,
which torch.export.load reads once sage_compiler is imported. It is read again, and its output
compared with that of the rewritten model, before it takes its name.

model.onnx: a model for ONNX Runtime and others, with recipes for wherever it will run. ONNX's
checker passes it and ONNX Runtime runs it before it takes its name.

    sagec export model.py:build --out model.pt2
    sagec export model.py:build --out model.pt2 --policy policy.json --dynamic 0:1
    sagec export model.py:build --out model.onnx --dynamic 0:0=batch --dynamic 0:1=length

{options.MODEL_HELP}"""


# Argument -> {dim: torch.export.Dim, or a name}, None where all is static.
DynamicShapes = dict[str, Any]


class Dynamic(NamedTuple):
    """A size that varies.

    Attributes:
        given: the input, by its name or its position.
        dim: of the input.
        name: of the size; "" for none.
    """

    given: str
    dim: int
    name: str = ""

    def __str__(self) -> str:
        return f"--dynamic {self.given}:{self.dim}{self.name and f'={self.name}'}"


def add_command(commands: options.Commands) -> None:
    """Give ``sagec`` the command."""
    parser = options.add_command(
        commands,
        "export",
        _export,
        summary="a rewritten model, for torch.export.load or as ONNX",
        description=_DESCRIPTION,
    )
    options.add_model(parser)
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help=f"its name ends in {_PROGRAM} or {_ONNX}",
    )
    parser.add_argument(
        "--dynamic",
        type=_dynamic,
        action="append",
        default=[],
        metavar="INPUT:DIM[=NAME]",
        help="a size that varies: 0:1 is dim 1 of the first input, mask:3 that of an input by "
        "name; ONNX can name it; can be repeated",
    )
    options.add_json(parser)
    options.add_decision(parser)
    onnx = parser.add_argument_group("ONNX")
    onnx.add_argument("--opset", type=int, metavar="N", help="20 or higher; default: 21")
    onnx.add_argument(
        "--standalone",
        choices=[str(form) for form in Standalone],
        help="function: nodes of ai.sage::Attention with bodies in standard operators, the "
        "default; standard: these operators alone; custom: the nodes alone",
    )
    onnx.add_argument(
        "--source-paths",
        action="store_true",
        help="tell in the file where in the source code a node comes from",
    )


def _export(arguments: argparse.Namespace) -> int:
    out: Path = arguments.out
    if out.suffix not in (_PROGRAM, _ONNX):
        raise UsageError(
            f"--out {str(out)!r}; the known formats: {_PROGRAM} (torch.export), {_ONNX}"
        )
    options.check_can_write(out)
    parsed = parse_options(options.decision(arguments))
    to_onnx = out.suffix == _ONNX
    _refuse_others(arguments, parsed, to_onnx)
    built = build(arguments.model)
    model = built.model
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"the model is a {type(model).__name__}; torch.export takes a torch.nn.Module"
        )
    shapes = dynamic_shapes(built, arguments.dynamic, named=to_onnx)
    told: dict[str, Any] = {"file": str(out)}
    with _saying_what_is_fixed(shapes):
        if to_onnx:
            report, told["bytes"], comparison = export_onnx.write(
                model,
                built,
                parsed,
                shapes,
                out,
                opset=arguments.opset,
                standalone=arguments.standalone,
                source_paths=arguments.source_paths,
            )
            told |= comparison
        else:
            report, told["bytes"] = export_program.write(model, built, parsed, shapes, out)
    if arguments.json:
        options.print_json(told | {"report": report.to_dict()})
        return options.OK
    print(f"{report}\nwritten and checked: {out}, {told['bytes']} bytes")
    if "not_run" in told:
        print(f"not run here: {told['not_run']}")
    elif to_onnx:
        print(
            f"its output in ONNX Runtime is that of the model but for {told['rel_l1']:.2g} (rel_l1)"
        )
    return options.OK


def _refuse_others(arguments: argparse.Namespace, parsed: Options, to_onnx: bool) -> None:
    """Options of the other format, which would do nothing."""
    if to_onnx:
        plain = Options()
        for name in ("min_seq_len", "fallback"):
            if getattr(parsed, name) != getattr(plain, name):
                raise UsageError(
                    f"--{name.replace('_', '-')} is about kernels on this machine, and an ONNX "
                    "file runs anywhere: leave it out"
                )
        return
    for name in ("opset", "standalone", "source_paths"):
        if getattr(arguments, name):
            raise UsageError(f"--{name.replace('_', '-')} is for {_ONNX}, not {_PROGRAM}")
    for each in arguments.dynamic:
        if each.name:
            raise UsageError(f"{each}; only {_ONNX} has names of sizes: leave ={each.name} out")


@contextmanager
def _saying_what_is_fixed(shapes: DynamicShapes | None) -> Iterator[None]:
    """Say in our words that a size is not as free as --dynamic has it."""
    from torch._dynamo.exc import UserError

    try:
        yield
    except UserError as error:
        if shapes is None:
            raise
        # What follows the constraints is about calls of torch.export.
        said = str(error).partition("! For more")[0].splitlines()[0]
        raise UsageError(f"--dynamic: the model fixes a size that should vary: {said}") from None


def dynamic_shapes(built: Built, wanted: Iterable[Dynamic], *, named: bool) -> DynamicShapes | None:
    """What torch.export takes, or, with ``named``, torch.onnx.export: None where nothing varies.

    Raises:
        UsageError: an input or a dim that is not there, or that is no tensor.
    """
    wanted = list(wanted)
    if not wanted:
        return None
    arguments = built.named_arguments()
    names = list(arguments)
    dims: dict[str, dict[int, Any]] = {name: {} for name in names}
    for each in wanted:
        given, dim = each.given, each.dim
        name = names[int(given)] if given.isdigit() and int(given) < len(names) else given
        if name not in dims:
            raise UsageError(f"{each}; the inputs are {', '.join(names)}")
        value = arguments[name]
        if not isinstance(value, Tensor):
            raise UsageError(
                f"{each}; the input {name!r} is a {type(value).__name__}, not a tensor"
            )
        if dim >= value.dim():
            raise UsageError(f"{each}; the input {name!r} has shape {tuple(value.shape)}")
        if value.shape[dim] < LEAST_EXAMPLE:
            raise UsageError(
                f"{each}; that size of the input {name!r} is {value.shape[dim]}, which "
                "torch.export takes for a constant: build the model's input with "
                f"{LEAST_EXAMPLE} or more"
            )
        label = each.name or f"{name}_{dim}"
        dims[name][dim] = label if named else torch.export.Dim.DYNAMIC
    return {name: found or None for name, found in dims.items()}


def _dynamic(text: str) -> Dynamic:
    given, separator, rest = text.rpartition(":")
    dim, equals, name = rest.partition("=")
    if not separator or not given or not dim.isdigit() or (equals and not name.isidentifier()):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not of the form INPUT:DIM or INPUT:DIM=NAME, such as 0:1 or 0:1=length"
        )
    return Dynamic(given, int(dim), name)
