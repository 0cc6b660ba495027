"""The command ``sagec kernels``: build CUDA kernels ahead, check their code, list what is here.

And explain which of them an attention gets, and what they cost: see kernels_explain.py and
kernels_cost.py.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

from sage_compiler.commands import kernels_compiling, kernels_cost, kernels_explain, options
from sage_compiler.errors import SageError, UsageError
from sage_compiler.kernels.cuda.arch import ARCHS, PORTABLE
from sage_compiler.kernels.cuda.cache import Cache, default_folder
from sage_compiler.kernels.cuda.check import check, table
from sage_compiler.kernels.cuda.manifest import Entry
from sage_compiler.kernels.cuda.pack import MOST_COMPRESSED, build, bytes_on_disk, find_packs
from sage_compiler.kernels.cuda.sass import Disassembler
from sage_compiler.kernels.cuda.spec import KernelSpec
from sage_compiler.kernels.cuda.variants import all_specs, checked_specs, standalone_specs
from sage_compiler.text import columns

_CHECK: Final = """\
Compile every variant of every kernel and look at its machine code: registers, spills, and the
instructions it must and must not have; of PTX, at its text. Fails where one is not as it must be.

    sagec kernels check --arch sm_89

With --further, not those of a pack but one of each kind that is compiled on first use: windows,
softcap, float32, head_dims, rotations, packed batches, few queries, caches; by wgmma every kind of
attention kernel."""
_BUILD: Final = """\
Compile every variant for some architectures into a kernel pack, which is found through the
environment variable SAGE_KERNEL_PACK; then nothing is compiled where the model runs.

    sagec kernels build --arch sm_89 --arch sm_90a --out pack

With --standalone, the pack also serves a host that cannot compile: see docs/onnx-cuda.md. With
--release, it is the one of a wheel, as `make wheel-cuda` makes it: all architectures, PTX for GPUs
that have none of their own, compressed."""
_LIST: Final = """\
List the kernels that are shipped in packs and those that are kept in the cache.

    sagec kernels list"""
_BUILT: Final = (*ARCHS, PORTABLE.name)
_HEADING: Final = ("symbol", "arch", "bytes", "registers", "spills", "where", "age")
_UNITS: Final = (("d", 24 * 60 * 60), ("h", 60 * 60), ("min", 60), ("s", 1))  # in seconds


def add_command(commands: options.Commands) -> None:
    """Give ``sagec`` the command."""
    actions = options.add_group(
        commands,
        "kernels",
        summary="CUDA kernels: which an attention gets; check their code, build packs, list them",
        example="sagec kernels build --arch sm_89 --out pack",
    )
    kernels_explain.add_command(actions)
    kernels_cost.add_command(actions)
    checking = options.add_command(
        actions,
        "check",
        _check,
        summary="compile every variant, look at its machine code",
        description=_CHECK,
    )
    kernels_compiling.add_compiling(checking, "all by default", _BUILT)
    which = checking.add_mutually_exclusive_group()
    _add_standalone(which)
    which.add_argument(
        "--further",
        action="store_true",
        help="those that no pack has, one of each kind; by wgmma every kind",
    )
    options.add_json(checking)

    building = options.add_command(
        actions,
        "build",
        _build,
        summary="compile every variant into a kernel pack",
        description=_BUILD,
    )
    kernels_compiling.add_compiling(building, "at least one, with --release all by default", _BUILT)
    _add_standalone(building)
    building.add_argument(
        "--release",
        action="store_true",
        help=f"the pack of a wheel, compressed, at most {MOST_COMPRESSED >> 20} MiB",
    )
    building.add_argument("--out", type=Path, required=True, metavar="DIR", help="the pack")
    options.add_json(building)

    listing = options.add_command(
        actions,
        "list",
        _list,
        summary="what is shipped in packs and kept in the cache",
        description=_LIST,
    )
    options.add_json(listing)


def _add_standalone(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--standalone",
        action="store_true",
        help="the kernels for a host that cannot compile, as ONNX Runtime: masks, windows, "
        "softcap, head_dim 32 to 128",
    )


def _check(arguments: argparse.Namespace) -> int:
    specs_of: Callable[[str], tuple[KernelSpec, ...]] = checked_specs
    if arguments.standalone:
        specs_of = standalone_specs
    elif arguments.further:
        specs_of = partial(all_specs, further=True)
    archs = kernels_compiling.archs(arguments, _BUILT)
    specs = [spec for arch in archs for spec in specs_of(arch)]
    disassembler = Disassembler.find()
    compiler, jobs = kernels_compiling.compiler(arguments), kernels_compiling.jobs(arguments)
    found = check(specs, compiler, disassembler, jobs)
    rows = list(kernels_compiling.progress(found, len(specs)))
    if arguments.json:
        options.print_json([row.to_dict() for row in rows])
    else:
        print(table(rows))
    failed = sum(bool(row.problems) for row in rows)
    if failed:
        raise SageError(f"{failed} of {len(rows)} kernels are not as they must be")
    return options.OK


def _build(arguments: argparse.Namespace) -> int:
    release: bool = arguments.release
    if not (arguments.arch or release):
        raise UsageError(f"--arch is missing; known: {', '.join(_BUILT)}")
    if release and arguments.standalone:
        raise UsageError("--release and --standalone; a pack is one of them")
    specs_of = standalone_specs if arguments.standalone else all_specs
    archs = kernels_compiling.archs(arguments, _BUILT)
    specs = [spec for arch in archs for spec in specs_of(arch)]
    entries = build(
        specs,
        arguments.out,
        kernels_compiling.compiler(arguments),
        kernels_compiling.jobs(arguments),
        lambda binaries: kernels_compiling.progress(binaries, len(specs)),
        most_compressed=MOST_COMPRESSED if release else None,
    )
    size = bytes_on_disk(arguments.out)
    if arguments.json:
        made = {"folder": str(arguments.out), "kernels": len(entries), "bytes": size}
        options.print_json(made)
    else:
        print(f"{len(entries)} kernels, {size} bytes, in {arguments.out}")
    return options.OK


def _list(arguments: argparse.Namespace) -> int:
    # Each with its place and the time it was written, in seconds since the epoch.
    found = [
        (entry, f"pack {pack.folder}", pack.written)
        for pack in find_packs()
        for entry in pack.entries.values()
    ]
    found += [
        (kept.entry, f"cache {kept.folder}", kept.written)
        for kept in Cache(default_folder()).kept()
    ]
    if arguments.json:
        options.print_json(
            [
                {**entry.to_dict(), "where": where, "written": written}
                for entry, where, written in found
            ]
        )
    elif found:
        now = time.time()
        lines = [(*_cells(entry), where, _age(now - written)) for entry, where, written in found]
        print("\n".join(columns([_HEADING, *lines])))
    else:
        print("no kernels: none is shipped in a pack, and none is in the cache")
    return options.OK


def _cells(entry: Entry) -> tuple[str, str, str, str, str]:
    resources = entry.resources
    spills = f"{resources.spill_stores}/{resources.spill_loads}"
    return entry.symbol, entry.arch, str(entry.size), str(resources.registers), spills


def _age(seconds: float) -> str:
    for unit, length in _UNITS:
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return "now"
