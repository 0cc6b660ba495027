"""Kernel packs: kernels compiled ahead, in a folder that a wheel can carry.

    PACK/manifest.json
    PACK/launches.txt, for hosts without Python: see launch_table.py
    PACK/<arch>/<symbol>.cubin, and its source beside it

A pack serves the templates that it was compiled from, and no others.

Environment:
    SAGE_KERNEL_PACK: the folder of a pack, looked at before the one that the package may carry.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from sage_compiler.errors import UsageError
from sage_compiler.kernels.cuda import launch_table
from sage_compiler.kernels.cuda.binary import Binary
from sage_compiler.kernels.cuda.cache import check_safe
from sage_compiler.kernels.cuda.manifest import Entry, digest
from sage_compiler.kernels.cuda.parallel import each
from sage_compiler.kernels.cuda.render import render, templates_digest
from sage_compiler.kernels.cuda.spec import KernelSpec
from sage_compiler.kernels.cuda.toolchain import Compiler

FORMAT: Final = 1
MANIFEST: Final = "manifest.json"
# As the templates, see render.py.
SHIPPED: Final = Path(__file__).resolve().parent / "pack"

Progress = Callable[[Iterable[Binary]], Iterable[Binary]]


def build(
    specs: Sequence[KernelSpec],
    out: Path,
    compiler: Compiler,
    jobs: int,
    progress: Progress = iter,
) -> list[Entry]:
    """Compile kernels into a pack, in place of the one that may be there.

    Args:
        jobs: processes that compile.
        progress: shown for each kernel.

    Raises:
        UsageError: ``out`` holds something that is not a pack.
        KernelUnavailableError: a kernel does not compile; what is there then is not a pack.
    """
    _clear(out)
    entries = []
    binaries = progress(each(partial(_compile, compiler), specs, jobs))
    for spec, binary in zip(specs, binaries, strict=True):
        source = render(spec)
        folder = out / spec.arch
        folder.mkdir(exist_ok=True)
        (folder / f"{spec.symbol}.cubin").write_bytes(binary.image)
        (folder / f"{spec.symbol}.cu").write_text(source, encoding="utf-8")
        entries.append(Entry.of(spec, source, compiler.identity, binary))
    launches = launch_table.launch_table(specs, entries)
    (out / launch_table.NAME).write_text(launches, encoding="utf-8")
    manifest = {
        "format": FORMAT,
        "templates": templates_digest(),
        "kernels": [entry.to_dict() for entry in entries],
    }
    unfinished = out / f"{MANIFEST}.new"
    unfinished.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, out / MANIFEST)
    return entries


class Pack:
    """A pack, as its manifest describes it.

    Attributes:
        entries: by symbol.
        written: when, in seconds since the epoch.
    """

    def __init__(self, folder: Path) -> None:
        """Raises ValueError or OSError when the folder is not a pack of these templates."""
        self.folder = folder
        manifest = json.loads((folder / MANIFEST).read_bytes())
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise ValueError(f"its manifest is not of format {FORMAT}")
        if manifest.get("templates") != templates_digest():
            raise ValueError("it was built from other templates")
        self.written = (folder / MANIFEST).stat().st_mtime
        entries = map(Entry.parse, _list(manifest.get("kernels")))
        self.entries = {entry.symbol: entry for entry in entries}

    def find(self, spec: KernelSpec) -> bytes | None:
        """The image of a kernel, None when the pack does not have it.

        A kernel whose file does not agree with the manifest is left out, with a warning.
        """
        entry = self.entries.get(spec.symbol)
        if entry is None or entry.source_sha256 != digest(render(spec).encode()):
            return None
        try:
            image = (self.folder / entry.arch / f"{entry.symbol}.cubin").read_bytes()
            entry.check(image)
        except (OSError, ValueError) as error:
            _warn(self.folder, f"{spec.symbol}: {error}")
            return None
        return image


def find_packs() -> list[Pack]:
    """The packs that are there, in the order of search; one that does not serve is warned of."""
    chosen = os.environ.get("SAGE_KERNEL_PACK")
    folders = [Path(chosen)] if chosen else []
    if SHIPPED.is_dir():
        folders.append(SHIPPED)
    return list(_open(folders))


def _open(folders: Iterable[Path]) -> Iterator[Pack]:
    for folder in folders:
        try:
            check_safe(folder, variable="SAGE_KERNEL_PACK")
            yield Pack(folder)
        except (OSError, ValueError) as error:
            _warn(folder, str(error))


def _warn(folder: Path, problem: str) -> None:
    warnings.warn(
        f"the kernel pack {folder} is not used: {problem}; "
        "build it again with 'sagec kernels build'",
        RuntimeWarning,
        stacklevel=3,
    )


def _compile(compiler: Compiler, spec: KernelSpec) -> Binary:
    return compiler.compile(render(spec), spec.arch)


def _clear(out: Path) -> None:
    """Make ``out`` an empty folder when it is one, a pack, or not there."""
    if out.is_dir() and any(out.iterdir()):
        if not (out / MANIFEST).is_file():
            raise UsageError(f"{out} is neither empty nor a kernel pack; name another folder")
        # First, so that what remains of an interrupted build is not a pack.
        (out / MANIFEST).unlink()
        (out / launch_table.NAME).unlink(missing_ok=True)
        for kernel in (*out.glob("sm_*/sage_*.cubin"), *out.glob("sm_*/sage_*.cu")):
            kernel.unlink()
    out.mkdir(parents=True, exist_ok=True)


def _list(data: object) -> list[Any]:
    if not isinstance(data, list):
        raise ValueError("its manifest lists no kernels")
    return data
