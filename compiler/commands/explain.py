"""The command ``sagec explain``: what would be rewritten in a model, and why."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from sage_compiler import files
from sage_compiler.commands import options
from sage_compiler.commands.model import build
from sage_compiler.errors import UsageError
from sage_compiler.explain import explain
from sage_compiler.report import GraphPair

_DESCRIPTION: Final = f"""\
Show what torch.compile(model, backend="sage") would do with every attention of a model: what
it is, what its mask is proved to be, whether it is rewritten, and why. Nothing is compiled; the
model runs once, eagerly.

    sagec explain model.py:build
    sagec explain model.py:build --precision int8_fp8 --json
    sagec explain model.py:build --policy policy.json --html report.html --graphs graphs/

{options.MODEL_HELP}"""


def add_command(commands: options.Commands) -> None:
    """Give ``sagec`` the command."""
    parser = options.add_command(
        commands,
        "explain",
        _explain,
        summary="what would be rewritten in a model, and why",
        description=_DESCRIPTION,
    )
    options.add_model(parser)
    options.add_json(parser)
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the report as a page")
    parser.add_argument(
        "--graphs",
        type=Path,
        metavar="DIR",
        help="draw every graph before and after (SVG), with its code after (Python)",
    )
    options.add_decision(parser)


def _explain(arguments: argparse.Namespace) -> int:
    decision = options.decision(arguments)
    html: Path | None = arguments.html
    graphs: Path | None = arguments.graphs
    if html is not None:
        options.check_can_write(html)
    if graphs is not None:
        _make_folder(graphs)
    built = build(arguments.model)
    report = explain(built.model, *built.args, options=decision, **built.kwargs)
    if html is not None:
        with options.writing(html):
            report.to_html(html)
    if graphs is not None:
        for number, pair in enumerate(report.graphs):
            _draw(pair, graphs, f"graph{number}")
    if arguments.json:
        options.print_json(report.to_dict())
    else:
        print(report)
    return options.OK


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"cannot make the folder {str(folder)!r}: {error.strerror or error}"
        ) from None


def _draw(pair: GraphPair, folder: Path, name: str) -> None:
    """Write NAME.before.svg, NAME.after.svg and NAME.after.py."""
    for which in ("before", "after"):
        drawing = folder / f"{name}.{which}.svg"
        with options.writing(drawing):
            pair.to_svg(drawing, which=which)
    code: str = pair.after.print_readable(print_output=False)
    file = folder / f"{name}.after.py"
    with options.writing(file):
        files.write(file, f"{code}\n".encode())
