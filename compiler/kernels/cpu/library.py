"""The native library: finding it, loading it on first use, calling it.

It keeps no state, and its threads are torch's: ``torch_parallel_for`` of libtorch_cpu
(torch/csrc/stable/c/shim.h) hands out ranges to the pool that every other CPU operator uses. With
a torch that has no such function, calls run on the caller's thread alone. Memory is lent, see
``borrow_workspace``.

Environment, read when the library is loaded:
    SAGE_CPU_LIBRARY: the library's file, instead of the one beside this module.
    SAGE_CPU_ISA: the instruction set to use, instead of the best that the machine has.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import struct
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from sage_compiler.errors import InvalidAttentionError, InvalidOptionError

ABI_VERSION: Final = 1
SUFFIX: Final = ".dylib" if sys.platform == "darwin" else ".so"
FILE_NAME: Final = f"libsage_cpu{SUFFIX}"

# sage_cpu_problem: struct_size, isa, recipe, dtype; batch, heads, kv_heads, query_length,
# key_length, head_dim, value_head_dim, kv_capacity, window_left, window_right, diagonal; scale,
# softcap; dead_rows, mask_dtype; data and strides of query, key, value, output, mask; sinks, lse.
PROBLEM: Final = struct.Struct("@4i 11q 2f 2i P4q P4q P4q P4q P4q 2P")
# sage_cpu_host: context, parallel_for, workers.
HOST: Final = struct.Struct("@2P q")

# A thread keeps a workspace up to this size from call to call, so that its pages are mapped once.
KEPT_BYTES: int = 64 << 20


@dataclass(frozen=True, slots=True)
class Unavailable:
    """There is no library; ``reason`` says why in one sentence."""

    reason: str


class Library:
    """The loaded library, with the instruction set chosen for this process.

    Attributes:
        path: its file.
        isa: the number of the instruction set, and ``isa_name`` its name.
        has_threads: whether calls run on torch's threads; else on the caller's alone.
    """

    def __init__(self, path: Path, handle: ctypes.CDLL) -> None:
        """Raises InvalidOptionError when SAGE_CPU_ISA names no instruction set that is here."""
        self.path = path
        self._describe = _function(handle, "sage_cpu_describe", [ctypes.c_int32], ctypes.c_char_p)
        self._isa_name = _function(handle, "sage_cpu_isa_name", [ctypes.c_int32], ctypes.c_char_p)
        self._has_isa = _function(handle, "sage_cpu_isa_available", [ctypes.c_int32])

        problem = host = ctypes.c_char_p
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        bytes_out = ctypes.POINTER(ctypes.c_int64)
        self._workspace_size = _function(
            handle, "sage_cpu_workspace_size", [problem, size, bytes_out]
        )
        self._attention = _function(handle, "sage_cpu_attention", [problem, host, pointer, size])
        self._packed_size = _function(handle, "sage_cpu_packed_size", [problem, bytes_out])
        self._pack_kv = _function(handle, "sage_cpu_pack_kv", [problem, host, size, pointer, size])
        self._attend_workspace_size = _function(
            handle, "sage_cpu_attend_workspace_size", [problem, size, bytes_out]
        )
        self._attend = _function(
            handle, "sage_cpu_attend", [problem, host, pointer, size, pointer, size]
        )
        ranges = ctypes.cast(handle.sage_cpu_parallel_for_ranges, ctypes.c_void_p).value
        pool = _torch_pool()
        self._host_functions = None if pool is None or ranges is None else (pool, ranges)
        self.has_threads = self._host_functions is not None

        self.isa: int = _function(handle, "sage_cpu_isa", [])()
        if self.isa < 0:
            raise InvalidOptionError(
                f"SAGE_CPU_ISA={os.environ.get('SAGE_CPU_ISA')!r}; this machine and this build "
                f"have {', '.join(self.isas())}; set it to one of them, or unset it"
            )
        self.isa_name = self.name_of(self.isa)

    def name_of(self, isa: int) -> str:
        """The name of an instruction set; its number in words where it is unknown."""
        name: bytes | None = self._isa_name(isa)
        return f"number {isa}" if name is None else name.decode()

    def isas(self) -> dict[str, int]:
        """The instruction sets that this machine and this build have: their numbers by name."""
        found = {}
        isa = 1  # 0 is "the best"
        while self._isa_name(isa) is not None:
            if self._has_isa(isa):
                found[self.name_of(isa)] = isa
            isa += 1
        return found

    def workspace_size(self, problem: bytes, workers: int) -> int:
        """The bytes that ``attention`` needs; InvalidAttentionError for what it refuses."""
        wanted = ctypes.c_int64()
        self._check(self._workspace_size(problem, workers, wanted))
        return wanted.value

    def attention(self, problem: bytes) -> None:
        """sage_cpu_attention with torch's threads; InvalidAttentionError for what it refuses."""
        workers = torch.get_num_threads()
        size = self.workspace_size(problem, workers)
        memory = borrow_workspace(size)
        error = self._attention(problem, self._host(workers), memory.data_ptr(), size)
        return_workspace(memory)
        self._check(error)

    def packed_size(self, problem: bytes) -> int:
        """The bytes of packed keys and values; InvalidAttentionError for what cannot be packed."""
        wanted = ctypes.c_int64()
        self._check(self._packed_size(problem, wanted))
        return wanted.value

    def pack_kv(self, problem: bytes, first: int, packed: int, packed_bytes: int) -> None:
        """sage_cpu_pack_kv into memory at the address ``packed``, with torch's threads."""
        host = self._host(torch.get_num_threads())
        self._check(self._pack_kv(problem, host, first, packed, packed_bytes))

    def attend(self, problem: bytes, packed: int, packed_bytes: int) -> None:
        """sage_cpu_attend on memory at the address ``packed``, with torch's threads."""
        workers = torch.get_num_threads()
        wanted = ctypes.c_int64()
        self._check(self._attend_workspace_size(problem, workers, wanted))
        memory = borrow_workspace(wanted.value)
        error = self._attend(
            problem, self._host(workers), packed, packed_bytes, memory.data_ptr(), wanted.value
        )
        return_workspace(memory)
        self._check(error)

    def _host(self, workers: int) -> bytes | None:
        if self._host_functions is None:
            return None
        return HOST.pack(*self._host_functions, workers)

    def _check(self, error: int) -> None:
        if error:
            words: bytes = self._describe(error)
            raise InvalidAttentionError(f"the CPU kernel refuses the call: {words.decode()}")


def load() -> Library | Unavailable:
    """The library, loaded once, or why there is none.

    Raises:
        InvalidOptionError: SAGE_CPU_ISA names no instruction set that is here.
    """
    return _loaded if _loaded is not None else _load()


_loaded: Library | Unavailable | None = None


def _load() -> Library | Unavailable:
    global _loaded
    path = _path()
    _loaded = path if isinstance(path, Unavailable) else _open(path)
    return _loaded


def _path() -> Path | Unavailable:
    chosen = os.environ.get("SAGE_CPU_LIBRARY")
    if chosen:
        path = Path(chosen)
        if path.is_file():
            return path.resolve()
        return Unavailable(f"SAGE_CPU_LIBRARY={chosen!r} is not a file")
    here = Path(__file__)
    # In an editable install this file may be a link, and the library lies beside either.
    for folder in (here.parent, here.resolve().parent):
        if (folder / FILE_NAME).is_file():
            return folder / FILE_NAME
    return Unavailable(f"{FILE_NAME} was not built; reinstall the package with a C++ compiler")


def _open(path: Path) -> Library | Unavailable:
    try:
        handle = ctypes.CDLL(str(path))
        version = _function(handle, "sage_cpu_abi_version", [])()
    except (OSError, AttributeError) as error:
        return Unavailable(f"{path} cannot be loaded: {error}")
    if version != ABI_VERSION:
        return Unavailable(
            f"{path} has ABI version {version} and this package needs {ABI_VERSION}; build it anew"
        )
    return Library(path, handle)


def _function(
    handle: ctypes.CDLL,
    name: str,
    arguments: list[type],
    result: type = ctypes.c_int32,
) -> ctypes._NamedFuncPointer:
    function = handle[name]  # a new object: the types are set on nobody else's
    function.argtypes, function.restype = arguments, result
    return function


@functools.cache
def _torch_pool() -> int | None:
    """The address of ``torch_parallel_for``; None in a torch that does not export it."""
    name = f"libtorch_cpu{SUFFIX}"
    # By its path, or as a library that is already loaded, wherever it came from.
    for file in (str(Path(torch.__file__).parent / "lib" / name), name):
        with contextlib.suppress(OSError, AttributeError):
            function = ctypes.CDLL(file).torch_parallel_for
            return ctypes.cast(function, ctypes.c_void_p).value
    return None


class _Kept(threading.local):
    """The workspace that a thread keeps; None while a call has it."""

    memory: Tensor | None = None


_kept = _Kept()


def borrow_workspace(size: int) -> Tensor:
    """Memory of at least ``size`` bytes, aligned to 64, for this thread alone until it is returned.

    It leaves its place while it is lent: what Python runs meanwhile on this thread (a signal's
    handler) gets other memory.
    """
    memory, _kept.memory = _kept.memory, None
    if memory is None or memory.shape[0] < size:
        memory = None  # before the next: not both at once
        memory = torch.empty(size, dtype=torch.uint8, device="cpu")  # torch aligns to 64
    return memory


def return_workspace(memory: Tensor) -> None:
    """Keep it for the thread's next call, unless it is large."""
    if memory.shape[0] <= KEPT_BYTES:
        _kept.memory = memory
