"""The command ``sagec kernels``: build CUDA kernels ahead, check their code, list what is here."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, TypeVar

from sage_compiler.errors import SageError, UsageError
from sage_compiler.kernels.cuda.cache import Cache, default_folder
from sage_compiler.kernels.cuda.check import check, table
from sage_compiler.kernels.cuda.manifest import Entry
from sage_compiler.kernels.cuda.pack import build, find_packs
from sage_compiler.kernels.cuda.sass import Disassembler
from sage_compiler.kernels.cuda.spec import ARCHS, KernelSpec
from sage_compiler.kernels.cuda.toolchain import NAMES, Compiler, find
from sage_compiler.kernels.cuda.variants import all_specs
from sage_compiler.text import columns

Item = TypeVar("Item")

# Ahead of time, the smaller images of nvcc are worth a toolkit.
_AHEAD: Final = ("nvcc", "nvrtc")
_UNITS: Final = (("d", 24 * 60 * 60), ("h", 60 * 60), ("min", 60), ("s", 1))  # in seconds


def add_commands(kernels: argparse.ArgumentParser) -> None:
    """Give the parser of ``sagec kernels`` its commands."""
    commands = kernels.add_subparsers(required=True, metavar="COMMAND")

    checking = commands.add_parser("check", help="compile every variant, look at its machine code")
    _add_compiling(checking, "all by default")
    checking.add_argument("--json", type=Path, metavar="FILE", help="write the rows to it as well")
    checking.set_defaults(run=_check)

    building = commands.add_parser("build", help="compile every variant into a kernel pack")
    _add_compiling(building, "at least one")
    building.add_argument("--out", type=Path, required=True, metavar="DIR", help="the pack")
    building.set_defaults(run=_build)

    listing = commands.add_parser("list", help="what is shipped in packs and kept in the cache")
    listing.set_defaults(run=_list)


def _add_compiling(parser: argparse.ArgumentParser, archs: str) -> None:
    known = ", ".join(ARCHS)
    parser.add_argument(
        "--arch", action="append", default=[], metavar="NAME", help=f"{archs}: {known}"
    )
    parser.add_argument("--compiler", choices=NAMES, help="nvcc if it is here, by default")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes that compile"
    )


def _check(arguments: argparse.Namespace) -> None:
    specs = _specs(arguments.arch or list(ARCHS))
    disassembler = Disassembler.find()
    found = check(specs, _compiler(arguments), disassembler, _jobs(arguments))
    rows = list(_progress(found, len(specs)))
    print(table(rows))
    if arguments.json is not None:
        text = json.dumps([row.to_dict() for row in rows], indent=1)
        arguments.json.write_text(f"{text}\n", encoding="utf-8")
    failed = sum(bool(row.problems) for row in rows)
    if failed:
        raise SageError(f"{failed} of {len(rows)} kernels are not as they must be")


def _build(arguments: argparse.Namespace) -> None:
    if not arguments.arch:
        raise UsageError(f"--arch is missing; known: {', '.join(ARCHS)}")
    specs = _specs(arguments.arch)
    entries = build(
        specs,
        arguments.out,
        _compiler(arguments),
        _jobs(arguments),
        lambda binaries: _progress(binaries, len(specs)),
    )
    size = sum(entry.size for entry in entries)
    print(f"{len(entries)} kernels, {size} bytes, in {arguments.out}")


def _list(arguments: argparse.Namespace) -> None:
    now = time.time()
    lines = [("symbol", "arch", "bytes", "registers", "spills", "where", "age")]
    for pack in find_packs():
        age = now - pack.written
        lines += [
            (*_cells(entry), f"pack {pack.folder}", _age(age)) for entry in pack.entries.values()
        ]
    for kept in Cache(default_folder()).kept():
        lines.append((*_cells(kept.entry), f"cache {kept.folder}", _age(now - kept.written)))
    if len(lines) == 1:
        print("no kernels: none is shipped in a pack, and none is in the cache")
    else:
        print("\n".join(columns(lines)))


def _specs(archs: Sequence[str]) -> list[KernelSpec]:
    for arch in archs:
        if arch not in ARCHS:
            raise UsageError(f"unknown architecture {arch!r}; known: {', '.join(ARCHS)}")
    return [spec for arch in dict.fromkeys(archs) for spec in all_specs(arch)]


def _compiler(arguments: argparse.Namespace) -> Compiler:
    return find(arguments.compiler) if arguments.compiler else find(*_AHEAD)


def _jobs(arguments: argparse.Namespace) -> int:
    jobs: int = arguments.jobs
    if jobs < 1:
        raise UsageError(f"--jobs {jobs}; it must be at least 1")
    return jobs


def _cells(entry: Entry) -> tuple[str, str, str, str, str]:
    resources = entry.resources
    spills = f"{resources.spill_stores}/{resources.spill_loads}"
    return entry.symbol, entry.arch, str(entry.size), str(resources.registers), spills


def _age(seconds: float) -> str:
    for unit, length in _UNITS:
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return "now"


def _progress(items: Iterable[Item], total: int) -> Iterable[Item]:
    """The items, with a progress bar on a terminal if tqdm is installed."""
    if importlib.util.find_spec("tqdm") is None:
        return items
    shown: Iterable[Item] = importlib.import_module("tqdm").tqdm(
        items, total=total, unit="kernel", disable=None
    )
    return shown
