"""What the commands have in common: their parsers, shared options, exit codes, JSON."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Any, Final, TypeAlias

from sage_compiler.config import Fallback, parse_options
from sage_compiler.errors import PolicyError, SageError, UsageError
from sage_compiler.precision import AUTO, PRECISIONS

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Run: TypeAlias = Callable[[argparse.Namespace], int]

OK: Final = 0
ERROR: Final = 1  # said on stderr
DIFFERENT: Final = 1  # the answer of a command that compares, as diff(1) gives it
COMPARE_ERROR: Final = 2  # where 1 is an answer; argparse exits with 2 as well
INTERRUPTED: Final = 130  # 128 + SIGINT, as a shell has it

_EXIT_CODES: Final = (
    "exit codes: 0 done; 1 an error, said on stderr; 2 wrong usage; 130 interrupted"
)
_COMPARE_EXIT_CODES: Final = (
    "exit codes: 0 no differences; 1 differences; 2 an error or wrong usage; 130 interrupted"
)
_MOST_LISTED: Final = 5  # differences between a policy and a model
_DIFFERENCE: Final = "  - "  # how the message of a PolicyError begins the line of one
# Options in Python, as messages have them, that are flags here.
_STRICT_POLICY: Final = re.compile(r"(the option )?\bstrict_policy=False")
_WITH_VALUE: Final = re.compile(
    r"\b(precision|min_seq_len|fallback|target|timestep_ranges|margin|heads|queries|opset)="
    r"('?)(?P<value>[\w.+-]+)\2"
)
MODEL_HELP: Final = """\
FUNCTION takes no argument and returns (model, args) or (model, args, kwargs), args a tuple:

    def build():
        return MyModel().eval(), (torch.randn(1, 128, 64),)

It is in a file, model.py:build, or in a module that can be imported from the current directory,
package.model:build."""


def add_command(
    commands: Commands,
    name: str,
    run: Run,
    *,
    summary: str,
    description: str,
    compares: bool = False,
) -> argparse.ArgumentParser:
    """The parser of a command.

    Args:
        run: what the command does; returns the exit code.
        compares: whether its answer is in the exit code, as that of diff(1).
    """
    parser = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=_COMPARE_EXIT_CODES if compares else _EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run, error_code=COMPARE_ERROR if compares else ERROR)
    return parser


def add_group(commands: Commands, name: str, *, summary: str, example: str) -> Commands:
    """A command that has commands of its own; returns where these are added."""
    group = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.\n\n    {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return group.add_subparsers(required=True, metavar="COMMAND")


def add_model(parser: argparse.ArgumentParser) -> None:
    """The argument that names a model."""
    parser.add_argument("model", metavar="MODEL:FUNCTION", help="the function that builds it")


def add_json(parser: argparse.ArgumentParser) -> None:
    """The option that programs read by."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def add_decision(parser: argparse.ArgumentParser) -> None:
    """The options of the backend that decide what becomes of an attention."""
    group = parser.add_argument_group("options of the backend")
    group.add_argument(
        "--precision",
        default=AUTO,
        choices=PRECISIONS,
        metavar="NAME",
        help=f"{', '.join(PRECISIONS)}; default: {AUTO}",
    )
    group.add_argument("--policy", type=Path, metavar="FILE", help="a recipe for every layer")
    group.add_argument(
        "--no-strict-policy",
        dest="strict_policy",
        action="store_false",
        help="keep the layers that the policy does not fit; otherwise they are an error",
    )
    group.add_argument(
        "--min-seq-len",
        type=int,
        metavar="N",
        help=f"with '{AUTO}': keep shorter attention; default: by a measured table; 0: none",
    )
    group.add_argument(
        "--fallback",
        default=str(Fallback.EMULATE),
        choices=[str(each) for each in Fallback],
        metavar="WHAT",
        help=f"for a recipe without a kernel here: {', '.join(Fallback)}; "
        f"default: {Fallback.EMULATE}",
    )


def decision(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options for ``torch.compile``, checked before any model is built.

    Raises:
        InvalidOptionError, PolicyError: as ``parse_options``.
    """
    options = {
        name: getattr(arguments, name)
        for name in ("precision", "policy", "strict_policy", "min_seq_len", "fallback")
    }
    return options | {"policy": parse_options(options).policy}


def said(error: SageError) -> str:
    """The message of an error for the command line: flags by their names, a few differences."""
    text = _STRICT_POLICY.sub("--no-strict-policy", str(error))
    text = _WITH_VALUE.sub(lambda found: f"--{_dashed(found[1])} {found['value']}", text)
    return _shortened(text) if isinstance(error, PolicyError) else text


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _shortened(text: str) -> str:
    lines = text.splitlines()
    listed = [at for at, line in enumerate(lines) if line.startswith(_DIFFERENCE)]
    if more := listed[_MOST_LISTED:]:
        last = f"  ... and {len(more)} more; sagec policy check lists all"
        lines[more[0] : more[-1] + 1] = [last]
    return "\n".join(lines)


def check_can_write(path: Path) -> None:
    """Say before the work, not after it, that its result has no place to go.

    Raises:
        UsageError: a folder of this name, or none to put the file in.
    """
    if path.is_dir():
        raise UsageError(f"{str(path)!r} is a folder; it must be the name of a file")
    if not path.parent.is_dir():
        raise UsageError(f"there is no folder {str(path.parent)!r} to write {path.name!r} to")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say in one sentence which file could not be written, and why.

    Raises:
        UsageError: for an OSError inside.
    """
    try:
        yield
    except OSError as error:
        raise UsageError(f"cannot write {str(path)!r}: {error.strerror or error}") from None


def print_json(data: object) -> None:
    """Indented JSON on stdout; infinities and NaN, which JSON does not have, become null."""
    print(json.dumps(_finite(data), indent=2, allow_nan=False))


def _finite(data: object) -> object:
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not isfinite(data) else data
