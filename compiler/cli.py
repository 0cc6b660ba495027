"""The command ``sagec``."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Final

import torch

from sage_compiler.commands import (
    bench,
    calibrate,
    completion,
    explain,
    export,
    kernels,
    onnx,
    policy,
)
from sage_compiler.commands.options import INTERRUPTED, Run, said
from sage_compiler.errors import SageError

_DESCRIPTION: Final = """\
Quantized attention for PyTorch: look before you compile.

    sagec explain model.py:build"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``sagec``; returns the exit code, which ``--help`` of each command explains.

    What a user's model raises is printed with its traceback.

    Raises:
        SystemExit: wrong usage (2), ``--help`` or ``--version`` (0).
    """
    arguments = parser().parse_args(argv)
    run: Run = arguments.run
    error_code: int = arguments.error_code
    try:
        code = run(arguments)
        sys.stdout.flush()
    except SageError as error:
        print(f"sagec: {said(error)}", file=sys.stderr)
        return error_code
    except KeyboardInterrupt:
        print("sagec: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough; nor has Python to say so when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return error_code
    except Exception:
        # The user's code raised it, and may raise anything. Python would print the same traceback
        # and exit with 1, by which a command that compares says that it found differences.
        traceback.print_exc()
        return error_code
    return code


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    whole = argparse.ArgumentParser(
        prog="sagec",
        description=_DESCRIPTION,
        epilog="sagec COMMAND --help shows examples and exit codes.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = importlib.metadata.version("sage-compiler")
    whole.add_argument(
        "--version", action="version", version=f"sagec {version}, torch {torch.__version__}"
    )
    commands = whole.add_subparsers(required=True, metavar="COMMAND")
    explain.add_command(commands)
    calibrate.add_command(commands)
    policy.add_command(commands)
    export.add_command(commands)
    onnx.add_command(commands)
    bench.add_command(commands)
    kernels.add_command(commands)
    completion.add_command(commands, parser)
    return whole


if __name__ == "__main__":
    sys.exit(main())
