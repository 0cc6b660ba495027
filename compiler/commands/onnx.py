"""The command ``sagec onnx``: look into ONNX files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from sage_compiler.commands import options
from sage_compiler.onnx import extra

_INSPECT: Final = """\
Show the nodes of ai.sage::Attention in an ONNX file: their layers, recipes, shapes and masks, and
what each runtime would run. Weights beside the file are not read.

    sagec onnx inspect model.onnx"""


def add_command(commands: options.Commands) -> None:
    """Give ``sagec`` the command."""
    actions = options.add_group(
        commands, "onnx", summary="look into ONNX files", example="sagec onnx inspect model.onnx"
    )
    parser = options.add_command(
        actions, "inspect", _inspect, summary="its attention, by node", description=_INSPECT
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the ONNX file")
    options.add_json(parser)


def _inspect(arguments: argparse.Namespace) -> int:
    extra.require("sagec onnx", "onnx", "onnx_ir")
    from sage_compiler.onnx.inspect import inspect

    found = inspect(arguments.file)
    if arguments.json:
        options.print_json(found.to_dict())
    else:
        print(found)
    return options.OK
