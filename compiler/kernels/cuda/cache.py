"""Compiled kernels on disk, shared by all processes of a user.

Every kernel is a folder, named by a key over everything that its binary depends on. It is made
beside its place and moved there in one step, under a lock of its own, so that a kernel is built
once and a process that is killed leaves nothing that looks like a kernel. Files that do not agree
with their manifest are moved to ``quarantine`` and built again.

What is loaded from here runs on the GPU with the user's rights, so a folder that somebody else can
write to is refused.

Environment:
    SAGE_CACHE_DIR: the folder, instead of one in the user's cache folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import stat
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from filelock import FileLock, Timeout

from sage_compiler.errors import KernelUnavailableError
from sage_compiler.kernels.cuda.binary import Binary
from sage_compiler.kernels.cuda.manifest import Entry, digest
from sage_compiler.kernels.cuda.render import render, templates_digest
from sage_compiler.kernels.cuda.spec import KernelSpec

FORMAT: Final = 1
IMAGE: Final = "kernel.cubin"
SOURCE: Final = "kernel.cu"
MANIFEST: Final = "manifest.json"
QUARANTINE: Final = "quarantine"
_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH
_ADMINISTRATOR: Final = 0
# A kernel takes seconds to compile; on a loaded machine, minutes.
LOCK_SECONDS: Final = 600.0


def key(spec: KernelSpec, compiler: str) -> str:
    """The name of a kernel's folder: SHA-256 over everything that its binary depends on.

    Args:
        compiler: the identity of the compiler, with its version, its flags and its headers.
    """
    parts = (str(FORMAT), spec.arch, render(spec), templates_digest(), compiler)
    return digest(json.dumps(parts).encode())


def default_folder() -> Path | None:
    """Where kernels are kept; None for a user who has no home."""
    chosen = os.environ.get("SAGE_CACHE_DIR")
    if chosen:
        return Path(chosen).absolute()
    base = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME")
    if base and Path(base).is_absolute():
        return Path(base) / "sage-compiler"
    try:
        home = Path.home()
    except RuntimeError:
        return None
    relative = {"win32": "AppData/Local", "darwin": "Library/Caches"}.get(sys.platform, ".cache")
    return home / relative / "sage-compiler"


@dataclass(frozen=True, slots=True)
class Kept:
    """A kernel in the cache, as lists show it.

    Attributes:
        written: when, in seconds since the epoch.
    """

    entry: Entry
    folder: Path
    written: float


class Cache:
    """The cache in one folder; threads may share it."""

    def __init__(self, folder: Path | None) -> None:
        """``folder`` need not exist yet; with None, kernels are kept in memory."""
        self._folder = folder
        self._memory: dict[str, bytes] = {}
        self._warned = False

    def image(self, spec: KernelSpec, compiler: str, build: Callable[[str], Binary]) -> bytes:
        """The image of a kernel: the one that is kept, or the one that ``build`` makes of a source.

        Raises:
            KernelUnavailableError: the folder is not safe to use, or another process has kept the
                lock for ten minutes. What ``build`` raises propagates, and nothing is kept.
        """
        name = key(spec, compiler)
        with contextlib.suppress(_Corrupt):
            found = self._memory.get(name) or self._read(name, spec)
            if found is not None:
                return found
        try:
            lock = self._lock(name)
        except OSError as error:
            self._warn_of_memory(error)
            self._memory[name] = image = build(render(spec)).image
            return image
        with lock:
            return self._read_or_build(name, spec, compiler, build)

    def kept(self) -> Iterator[Kept]:
        """The kernels that are kept, by their keys; what is not sound is left for ``image``.

        Raises:
            KernelUnavailableError: the folder is not safe to use.
        """
        if self._folder is None or not self._folder.is_dir():
            return
        check_safe(self._folder)
        for folder in sorted(filter(_is_kernel, self._folder.iterdir())):
            with contextlib.suppress(_Corrupt, FileNotFoundError):
                entry, _ = _load(folder)
                yield Kept(entry, folder, (folder / MANIFEST).stat().st_mtime)

    def _read(self, name: str, spec: KernelSpec) -> bytes | None:
        """The image that is kept, if there is one.

        Raises:
            _Corrupt: there is something else.
        """
        if self._folder is None or not os.path.lexists(self._folder / name):
            return None
        try:
            check_safe(self._folder, self._folder / name)
        except FileNotFoundError as error:  # moved away in this moment, or a dangling link
            raise _Corrupt(str(error)) from None
        entry, image = _load(self._folder / name)
        if entry.symbol != spec.symbol:
            raise _Corrupt(f"it is {entry.symbol}")
        return image

    def _read_or_build(
        self, name: str, spec: KernelSpec, compiler: str, build: Callable[[str], Binary]
    ) -> bytes:
        """``image``, under the kernel's lock."""
        try:
            found = self._read(name, spec)
            if found is not None:
                return found
        except _Corrupt as error:
            self._quarantine(name, error)
        source = render(spec)
        binary = build(source)
        try:
            self._publish(name, source, Entry.of(spec, source, compiler, binary), binary.image)
        except OSError as error:
            self._warn_of_memory(error)
            self._memory[name] = binary.image
        return binary.image

    def _lock(self, name: str) -> contextlib.AbstractContextManager[object]:
        """The kernel's lock, held until its context is left.

        Raises:
            OSError: the folder cannot be written to.
        """
        if self._folder is None:
            raise FileNotFoundError("this user has no home")
        _make_private(self._folder)
        check_safe(self._folder)
        path = self._folder / f"{name}.lock"
        try:
            return FileLock(path).acquire(timeout=LOCK_SECONDS)
        except Timeout:
            raise KernelUnavailableError(
                f"another process has kept {path} for {LOCK_SECONDS:.0f} seconds; end it, or set "
                "SAGE_CACHE_DIR to another folder"
            ) from None

    def _publish(self, name: str, source: str, entry: Entry, image: bytes) -> None:
        """Make the kernel's folder; a process that is killed leaves at most one of another name."""
        assert self._folder is not None
        prefix = f".build-{name}-"
        for abandoned in self._folder.glob(f"{prefix}*"):  # by a process that had this lock
            shutil.rmtree(abandoned, ignore_errors=True)
        built = Path(tempfile.mkdtemp(prefix=prefix, dir=self._folder))
        try:
            (built / IMAGE).write_bytes(image)
            (built / SOURCE).write_text(source, encoding="utf-8")
            manifest = {"format": FORMAT, "kernel": entry.to_dict()}
            (built / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
            os.replace(built, self._folder / name)
        except BaseException:
            shutil.rmtree(built, ignore_errors=True)
            raise

    def _quarantine(self, name: str, problem: _Corrupt) -> None:
        """Move away what is not a sound kernel; where that fails, it is built in memory."""
        assert self._folder is not None
        quarantine = self._folder / QUARANTINE
        place = quarantine / f"{name}-{time.time_ns()}"
        try:
            _make_private(quarantine)
            os.replace(self._folder / name, place)
        except OSError as error:
            self._warn_of_memory(error)
            return
        warnings.warn(
            f"a kernel in {self._folder} was not sound ({problem}) and is built again; what was "
            f"there is in {place}",
            RuntimeWarning,
            stacklevel=2,
        )

    def _warn_of_memory(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"compiled kernels cannot be kept ({error}), so that every process compiles them "
                "again; set SAGE_CACHE_DIR to a folder of yours that can be written to",
                RuntimeWarning,
                stacklevel=2,
            )


def check_safe(
    folder: Path, kernel: Path | None = None, *, variable: str = "SAGE_CACHE_DIR"
) -> None:
    """Refuse a folder, or a kernel in it, whose contents somebody else could have put there.

    Both must be the user's or the administrator's, and so must all folders above them; no other
    user may write to any of them, except that one like /tmp may be above them, where nobody can
    replace what is another's. On Windows, the user's profile is safe by itself.

    Args:
        variable: the environment variable that names such a folder.

    Raises:
        KernelUnavailableError: it is not safe, with what to do.
        FileNotFoundError: it is not there.
    """
    if sys.platform == "win32":
        return
    trusted = (os.geteuid(), _ADMINISTRATOR)
    real = folder.resolve()
    inside = (folder, real) if kernel is None else (folder, real, kernel)
    for path in dict.fromkeys((*inside, *folder.parents, *real.parents)):
        status = path.stat()
        is_above = path not in inside
        if status.st_uid not in trusted:
            problem = f"{path} belongs to another user (uid {status.st_uid})"
        elif status.st_mode & _OTHERS_WRITE and not (is_above and status.st_mode & stat.S_ISVTX):
            problem = f"other users can write to {path}; chmod go-w {path}"
        else:
            continue
        raise KernelUnavailableError(
            f"kernels in {folder} are not safe to load: {problem}, or set {variable} to a folder "
            "of yours that nobody else can write to"
        )


def _make_private(folder: Path) -> None:
    """Make a folder and those above it that are missing, for the user alone whatever the umask."""
    for path in (*reversed(folder.parents), folder):
        if not path.is_dir():
            path.mkdir(mode=0o700, exist_ok=True)


class _Corrupt(Exception):
    """A folder in the cache is not what was published there; says why."""


def _is_kernel(path: Path) -> bool:
    """Whether this is the place of a kernel, not of a lock, an unfinished or a damaged one."""
    return re.fullmatch("[0-9a-f]{64}", path.name) is not None


def _load(folder: Path) -> tuple[Entry, bytes]:
    """A kernel's folder, checked.

    Raises:
        _Corrupt: something is missing or differs.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise ValueError(f"its manifest is not of format {FORMAT}")
        entry = Entry.parse(manifest.get("kernel"))
        image = (folder / IMAGE).read_bytes()
        entry.check(image)
    except (OSError, ValueError) as error:
        raise _Corrupt(str(error)) from None
    return entry, image
