"""The command ``sagec completion``: what a shell needs to complete ``sagec``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

from sage_compiler.commands import options
from sage_compiler.errors import UsageError

_DESCRIPTION: Final = """\
Print a script that makes a shell complete the commands and options of sagec, and file names.

    sagec completion bash > ~/.sagec.bash       # in ~/.bashrc: source ~/.sagec.bash
    sagec completion zsh > "${fpath[1]}/_sagec"
    sagec completion tcsh > ~/.sagec.tcsh       # in ~/.tcshrc: source ~/.sagec.tcsh

Needs the package shtab: pip install "sage-compiler[cli]"."""


def add_command(
    commands: options.Commands, make_parser: Callable[[], argparse.ArgumentParser]
) -> None:
    """Give ``sagec``, which ``make_parser`` makes, the command."""
    parser = options.add_command(
        commands,
        "completion",
        partial(_complete, make_parser=make_parser),
        summary="completion for a shell",
        description=_DESCRIPTION,
    )
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"))


def _complete(
    arguments: argparse.Namespace, make_parser: Callable[[], argparse.ArgumentParser]
) -> int:
    try:
        import shtab
    except ModuleNotFoundError:
        raise UsageError(
            'completion needs the package shtab: pip install "sage-compiler[cli]"'
        ) from None

    def complete_files(parser: argparse.ArgumentParser) -> None:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for command in action.choices.values():
                    complete_files(command)
            elif action.type is Path or action.dest == "model":
                action.complete = shtab.FILE  # type: ignore[attr-defined]  # how shtab is told

    parser = make_parser()
    complete_files(parser)
    print(shtab.complete(parser, arguments.shell))
    return options.OK
