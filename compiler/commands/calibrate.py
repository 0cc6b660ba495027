"""The command ``sagec calibrate``: measure recipes on real inputs, and write a policy."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from sage_compiler.calibrate import DEFAULT_RANGES, MARGIN, calibrate
from sage_compiler.commands import options
from sage_compiler.commands.model import Built, Source
from sage_compiler.errors import UsageError
from sage_compiler.metrics import LAYER_METRICS
from sage_compiler.policy import Policy

_DESCRIPTION: Final = f"""\
Measure, layer by layer and on real inputs, what every recipe costs in accuracy, and choose for each
layer the fastest one within a budget. The policy is printed and written as JSON.

    sagec calibrate model.py:build --budget cosine=0.998 --out policy.json
    sagec calibrate model.py:build --inputs batches --budget output_rel_l1=0.01 --out policy.json

{options.MODEL_HELP}

--inputs names another function there, without arguments, that yields inputs: the positional
arguments of one call as a tuple, the keyword arguments as a dict, or (args, kwargs). Without it,
the only input is what FUNCTION returns."""

# Options that are handed on as they are, where they were given.
_HANDED_ON: Final = ("candidates", "target", "timestep_ranges", "margin", "heads", "queries")


def add_command(commands: options.Commands) -> None:
    """Give ``sagec`` the command."""
    parser = options.add_command(
        commands,
        "calibrate",
        _calibrate,
        summary="measure recipes on real inputs, write a policy",
        description=_DESCRIPTION,
    )
    add = parser.add_argument
    options.add_model(parser)
    add(
        "--budget",
        type=_limit,
        action="append",
        required=True,
        metavar="METRIC=LIMIT",
        help=f"a limit of every layer ({', '.join(LAYER_METRICS)}), or of the model's output "
        "(output_rel_l1); can be repeated",
    )
    add("--out", type=Path, required=True, metavar="FILE", help="where the policy goes")
    add("--inputs", metavar="FUNCTION", help="yields the inputs; default: the one of the model")
    add(
        "--candidates",
        type=_names,
        metavar="A,B",
        help="the recipes to try; default: those that make sense on the target",
    )
    add(
        "--target",
        metavar="NAME",
        help="the device it is for: cpu, or such as sm_89; default: the one that the model is on",
    )
    add(
        "--timestep-ranges",
        type=int,
        metavar="N",
        help="recipes for N parts of a schedule; "
        f"default: {DEFAULT_RANGES} where a step is set, else 1",
    )
    add(
        "--margin",
        type=float,
        metavar="X",
        help=f"the part of output_rel_l1's limit to stay in; default: {MARGIN}",
    )
    add("--heads", type=int, metavar="N", help="measure on N heads; default: all")
    add("--queries", type=int, metavar="N", help="measure on N queries; default: all")
    add("--quiet", action="store_true", help="show no progress, and no table")
    options.add_json(parser)


def _calibrate(arguments: argparse.Namespace) -> int:
    out: Path = arguments.out
    options.check_can_write(out)
    source = Source.find(arguments.model)
    read = None if arguments.inputs is None else source.function(arguments.inputs)
    built = source.build()
    inputs = [(built.args, dict(built.kwargs))] if read is None else read()
    policy = _run(built, inputs, arguments)
    with options.writing(out):
        policy.save(out)
    if arguments.json:
        options.print_json(policy.to_dict())
    elif not arguments.quiet:
        print(f"{policy}\nwritten: {out}")
    return options.OK


def _run(built: Built, inputs: Iterable[Any], arguments: argparse.Namespace) -> Policy:
    given = {name: getattr(arguments, name) for name in _HANDED_ON}
    return calibrate(
        built.model,
        inputs,
        budget=_budget(arguments.budget),
        progress=not arguments.quiet,
        **{name: value for name, value in given.items() if value is not None},
    )


def _limit(text: str) -> tuple[str, float]:
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form METRIC=LIMIT")
    try:
        return name, float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"the limit {value!r} is not a number") from None


def _budget(limits: Iterable[tuple[str, float]]) -> dict[str, float]:
    budget: dict[str, float] = {}
    for name, limit in limits:
        if name in budget:
            raise UsageError(f"--budget has {name!r} twice")
        budget[name] = limit
    return budget


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))
