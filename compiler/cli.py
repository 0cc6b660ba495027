"""The command ``sagec``."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from sage_compiler.cli_kernels import add_commands
from sage_compiler.errors import SageError, UsageError
from sage_compiler.precision import PRECISIONS

_EXPLAIN_HELP: Final = """\
Show what torch.compile(model, backend="sage") would do with every attention of a model: what
it is, what its mask is proved to be, whether it is rewritten, and why. Nothing is compiled; the
model runs once, eagerly.

FUNCTION takes no argument and returns (model, args) or (model, args, kwargs), where args is a
tuple, for example:

    def build():
        return MyModel().eval(), (torch.randn(1, 128, 64),)

    sagec explain model.py:build
    sagec explain model.py:build --precision int8_fp8 --json
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``sagec``; returns the exit code: 0, or 1 after an error said in one sentence."""
    arguments = parser().parse_args(argv)
    run: Callable[[argparse.Namespace], None] = arguments.run
    try:
        run(arguments)
    except SageError as error:
        print(f"sagec: {error}", file=sys.stderr)
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    whole = argparse.ArgumentParser(
        prog="sagec", description="Quantized attention for PyTorch: look before you compile."
    )
    commands = whole.add_subparsers(required=True, metavar="COMMAND")
    explain = commands.add_parser(
        "explain",
        help="what would be rewritten in a model, and why",
        description=_EXPLAIN_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    explain.add_argument("model", metavar="MODEL.py:FUNCTION", help="where the model is built")
    explain.add_argument("--json", action="store_true", help="print JSON instead of text")
    explain.add_argument(
        "--precision", default="auto", metavar="NAME", help=f"one of {', '.join(PRECISIONS)}"
    )
    explain.add_argument(
        "--min-seq-len", type=int, metavar="N", help="with 'auto': keep shorter attention"
    )
    explain.add_argument(
        "--fallback", default="emulate", metavar="WHAT", help="emulate, sdpa or error"
    )
    explain.set_defaults(run=_explain)
    add_commands(commands.add_parser("kernels", help="the CUDA kernels: check, build, list"))
    return whole


def _explain(arguments: argparse.Namespace) -> None:
    from sage_compiler.config import parse_options
    from sage_compiler.explain import explain

    options = {
        "precision": arguments.precision,
        "min_seq_len": arguments.min_seq_len,
        "fallback": arguments.fallback,
    }
    parse_options(options)
    model, args, kwargs = build(arguments.model)
    report = explain(model, *args, options=options, **kwargs)
    print(json.dumps(report.to_dict(), indent=2) if arguments.json else report)


def build(name: str) -> tuple[Callable[..., Any], tuple[Any, ...], Mapping[str, Any]]:
    """Load ``MODEL.py:FUNCTION`` and call it; returns (model, args, kwargs).

    Raises:
        UsageError: no such file or function, or a result of another form. What the user's code
            raises propagates.
    """
    path, separator, attribute = name.rpartition(":")
    if not separator or not path or not attribute:
        raise UsageError(f"{name!r} is not of the form MODEL.py:FUNCTION")
    file = Path(path)
    if not file.is_file():
        raise UsageError(f"there is no file {path!r}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path!r} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.resolve().parent))
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UsageError(f"{path!r} has no function {attribute!r}")
    made = function()
    if (
        not isinstance(made, tuple)
        or len(made) not in (2, 3)
        or not callable(made[0])
        or not isinstance(made[1], tuple)
        or not (len(made) == 2 or isinstance(made[2], Mapping))
    ):
        raise UsageError(
            f"{attribute}() returned {type(made).__name__}; it must return (model, args) or "
            "(model, args, kwargs), args a tuple and kwargs a dict"
        )
    return made[0], made[1], made[2] if len(made) == 3 else {}


if __name__ == "__main__":
    sys.exit(main())
