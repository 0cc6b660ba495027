"""The command ``sagec policy``: show a policy, compare two, ask whether one fits a model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from sage_compiler.commands import options
from sage_compiler.commands.model import build
from sage_compiler.errors import UsageError
from sage_compiler.explain import explain
from sage_compiler.policy import Policy
from sage_compiler.text import count

_SHOW: Final = """\
Show the recipe of every layer of a policy, its errors in calibration and its predicted time.

    sagec policy show policy.json
    sagec policy show policy.json --layer "blocks.1*" """
_DIFF: Final = """\
Show what policy B does otherwise than policy A.

    sagec policy diff before.json after.json"""
_CHECK: Final = f"""\
Ask whether a policy fits a model: whether it has every attention of the model, with the same heads,
head dims and mask, and no other. The model runs once, eagerly.

    sagec policy check policy.json model.py:build

{options.MODEL_HELP}"""


def add_command(commands: options.Commands) -> None:
    """Give ``sagec`` the command."""
    actions = options.add_group(
        commands,
        "policy",
        summary="show a policy, compare two, check one against a model",
        example="sagec policy show policy.json",
    )
    show = options.add_command(
        actions, "show", _show, summary="the recipe of every layer", description=_SHOW
    )
    show.add_argument("file", type=Path, metavar="FILE", help="the policy")
    show.add_argument("--layer", metavar="PATTERN", help="only those layers, such as 'blocks.1*'")
    options.add_json(show)

    diff = options.add_command(
        actions,
        "diff",
        _diff,
        summary="what another policy does otherwise",
        description=_DIFF,
        compares=True,
    )
    diff.add_argument("a", type=Path, metavar="A", help="a policy")
    diff.add_argument("b", type=Path, metavar="B", help="another")
    options.add_json(diff)

    check = options.add_command(
        actions,
        "check",
        _check,
        summary="whether a policy fits a model",
        description=_CHECK,
        compares=True,
    )
    check.add_argument("file", type=Path, metavar="FILE", help="the policy")
    options.add_model(check)
    options.add_json(check)


def _show(arguments: argparse.Namespace) -> int:
    policy = Policy.load(arguments.file)
    pattern: str | None = arguments.layer
    if pattern is not None:
        layers = {
            name: layer for name, layer in policy.layers.items() if fnmatchcase(name, pattern)
        }
        if not layers:
            raise UsageError(
                f"no layer of {str(arguments.file)!r} matches {pattern!r}; it has "
                f"{count(len(policy.layers), 'layer')}"
            )
        policy.layers = layers
    if arguments.json:
        options.print_json(policy.to_dict())
    else:
        print(policy)
    return options.OK


def _diff(arguments: argparse.Namespace) -> int:
    lines = Policy.load(arguments.a).diff(Policy.load(arguments.b))
    return _answer(lines, "no differences", arguments)


def _check(arguments: argparse.Namespace) -> int:
    policy = Policy.load(arguments.file)
    built = build(arguments.model)
    applied = {"policy": policy, "strict_policy": False}
    report = explain(built.model, *built.args, options=applied, **built.kwargs)
    proved = [(site.layer, site.fingerprint) for site in report.sites if site.fingerprint]
    fits = f"the policy fits: {count(len(policy.layers), 'layer')}"
    return _answer(policy.differences(proved), fits, arguments)


def _answer(differences: Sequence[str], otherwise: str, arguments: argparse.Namespace) -> int:
    if arguments.json:
        options.print_json({"differences": list(differences)})
    else:
        print("\n".join(differences) or otherwise)
    return options.DIFFERENT if differences else options.OK
