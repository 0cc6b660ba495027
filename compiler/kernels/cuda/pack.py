"""Kernel packs: kernels compiled ahead, in a folder that a wheel can carry.

    PACK/manifest.json
    PACK/launches.txt, for hosts without Python: see launch_table.py
    PACK/<arch>/<symbol>.cubin, or .ptx of ``arch.PORTABLE``, and its source beside it

A pack serves the templates that it was compiled from, and no others.

That of a release wheel is compressed: images are ``<symbol>.cubin.xz``, each by itself, so that one
is read in 2 ms. It has no launch table, and a host without Python finds no pack there.

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

from sage_compiler.errors import SageError, UsageError
from sage_compiler.kernels.cuda import launch_table, xz
from sage_compiler.kernels.cuda.arch import PORTABLE
from sage_compiler.kernels.cuda.binary import Binary
from sage_compiler.kernels.cuda.cache import check_safe
from sage_compiler.kernels.cuda.manifest import Entry, digest
from sage_compiler.kernels.cuda.parallel import each
from sage_compiler.kernels.cuda.render import render, templates_digest
from sage_compiler.kernels.cuda.spec import KernelSpec
from sage_compiler.kernels.cuda.toolchain import Compiler

FORMAT: Final = 2
MANIFEST: Final = "manifest.json"
# As the templates, see render.py.
SHIPPED: Final = Path(__file__).resolve().parent / "pack"

MOST_COMPRESSED: Final = 8 << 20  # bytes of a release wheel's pack, all files together

Progress = Callable[[Iterable[Binary]], Iterable[Binary]]


def build(
    specs: Sequence[KernelSpec],
    out: Path,
    compiler: Compiler,
    jobs: int,
    progress: Progress = iter,
    *,
    most_compressed: int | None = None,
) -> list[Entry]:
    """Compile kernels into a pack, in place of the one that may be there.

    Args:
        jobs: processes that compile.
        progress: shown for each kernel.
        most_compressed: bytes that a compressed pack may take, all files together; None for one
            that is not compressed.

    Raises:
        UsageError: ``out`` holds something that is not a pack.
        KernelUnavailableError: a kernel does not compile; what is there then is not a pack.
        PackTooLargeError: it takes more than ``most_compressed``; nor is it then.
    """
    compressed = most_compressed is not None
    _clear(out)
    entries = []
    binaries = progress(each(partial(_compile, compiler), specs, jobs))
    for spec, binary in zip(specs, binaries, strict=True):
        source = render(spec)
        folder = out / spec.arch
        folder.mkdir(exist_ok=True)
        image = xz.compress(binary.image) if compressed else binary.image
        (folder / _image_name(spec.arch, spec.symbol, compressed)).write_bytes(image)
        (folder / f"{spec.symbol}.cu").write_text(source, encoding="utf-8")
        entries.append(Entry.of(spec, source, compiler.identity, binary))
    if not compressed:
        launches = launch_table.launch_table(specs, entries)
        (out / launch_table.NAME).write_text(launches, encoding="utf-8")
    manifest = {
        "format": FORMAT,
        "compressed": compressed,
        "templates": templates_digest(),
        "kernels": [entry.to_dict() for entry in entries],
    }
    unfinished = out / f"{MANIFEST}.new"
    unfinished.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    size = bytes_on_disk(out)
    if most_compressed is not None and size > most_compressed:
        raise PackTooLargeError(
            f"the pack takes {size} bytes, and may take {most_compressed}; take a group out of "
            "variants.PACK, or compile with nvcc, whose images are smaller"
        )
    os.replace(unfinished, out / MANIFEST)
    return entries


class PackTooLargeError(SageError):
    """A pack takes more bytes than it may."""


class Pack:
    """A pack, as its manifest describes it.

    Attributes:
        entries: by symbol.
        compressed: whether its images are.
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
        compressed = manifest.get("compressed")
        if not isinstance(compressed, bool):
            raise ValueError("its manifest does not say whether it is compressed")
        self.compressed = compressed
        if self.compressed and not xz.is_available():
            raise ValueError("it is compressed, and this Python was built without lzma")
        self.written = (folder / MANIFEST).stat().st_mtime
        entries = map(Entry.parse, _list(manifest.get("kernels")))
        self.entries = {entry.symbol: entry for entry in entries}

    def find(self, spec: KernelSpec) -> bytes | None:
        """The image of a kernel, None when the pack does not have it.

        A kernel whose file does not agree with the manifest is left out, with a warning.
        """
        entry = self._entry(spec)
        if entry is None:
            return None
        try:
            image = self._read(entry)
            entry.check(image)
        except (OSError, ValueError) as error:
            _warn(self.folder, f"{spec.symbol}: {error}")
            return None
        return image

    def has(self, spec: KernelSpec) -> bool:
        """Whether the manifest lists a kernel; its file is not looked at."""
        return self._entry(spec) is not None

    def _entry(self, spec: KernelSpec) -> Entry | None:
        entry = self.entries.get(spec.symbol)
        if entry is None or entry.source_sha256 != digest(render(spec).encode()):
            return None
        return entry

    def _read(self, entry: Entry) -> bytes:
        name = _image_name(entry.arch, entry.symbol, self.compressed)
        content = (self.folder / entry.arch / name).read_bytes()
        return xz.decompress(content, entry.size) if self.compressed else content


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
        for kind in ("cubin", "ptx", f"cubin{xz.SUFFIX}", f"ptx{xz.SUFFIX}", "cu"):
            for kernel in out.glob(f"*/sage_*.{kind}"):
                kernel.unlink()
    out.mkdir(parents=True, exist_ok=True)


def bytes_on_disk(folder: Path) -> int:
    """The size of all files of a pack."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _image_name(arch: str, symbol: str, compressed: bool) -> str:
    kind = "ptx" if arch == PORTABLE.name else "cubin"
    return f"{symbol}.{kind}{xz.SUFFIX if compressed else ''}"


def _list(data: object) -> list[Any]:
    if not isinstance(data, list):
        raise ValueError("its manifest lists no kernels")
    return data
