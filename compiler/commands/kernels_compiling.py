"""What those of the commands ``sagec kernels`` have in common that compile."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
from collections.abc import Iterable, Sequence
from typing import Final, TypeVar

from sage_compiler.errors import UsageError
from sage_compiler.kernels.cuda.arch import ARCHS
from sage_compiler.kernels.cuda.toolchain import NAMES, Compiler, find

Item = TypeVar("Item")

# Ahead of time, the smaller images of nvcc are worth a toolkit.
_AHEAD: Final = ("nvcc", "nvrtc")


def add_compiling(
    parser: argparse.ArgumentParser, absent: str, known: Sequence[str] = tuple(ARCHS)
) -> None:
    """The options; ``absent`` says what holds without ``--arch``."""
    names = ", ".join(known)
    parser.add_argument(
        "--arch", action="append", default=[], metavar="NAME", help=f"{absent}: {names}"
    )
    parser.add_argument("--compiler", choices=NAMES, help="default: nvcc where it is, else nvrtc")
    parser.add_argument(
        "--jobs",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes that compile; default: one for each CPU",
    )


def archs(arguments: argparse.Namespace, known: Sequence[str] = tuple(ARCHS)) -> list[str]:
    """The architectures that are named, each once, all of them without a name.

    Raises:
        UsageError: there is none of a name.
    """
    for arch in arguments.arch:
        if arch not in known:
            raise UsageError(f"unknown architecture {arch!r}; known: {', '.join(known)}")
    return list(dict.fromkeys(arguments.arch or known))


def compiler(arguments: argparse.Namespace) -> Compiler:
    """The compiler that is named, or the one for compiling ahead of time.

    Raises:
        KernelUnavailableError: it is not here.
    """
    return find(arguments.compiler) if arguments.compiler else find(*_AHEAD)


def jobs(arguments: argparse.Namespace) -> int:
    """How many processes compile.

    Raises:
        UsageError: fewer than one.
    """
    number: int = arguments.jobs
    if number < 1:
        raise UsageError(f"--jobs {number}; it must be at least 1")
    return number


def progress(items: Iterable[Item], total: int) -> Iterable[Item]:
    """The items, with a progress bar on a terminal if tqdm is installed."""
    if importlib.util.find_spec("tqdm") is None:
        return items
    shown: Iterable[Item] = importlib.import_module("tqdm").tqdm(
        items, total=total, unit="kernel", disable=None
    )
    return shown
