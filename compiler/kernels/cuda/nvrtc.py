"""NVRTC, NVIDIA's compiler as a library: finding it, and one call, from source to cubin."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from sage_compiler.errors import KernelUnavailableError
from sage_compiler.kernels.cuda.headers import INSTALL, nvidia_folders, toolkits

# NVRTC has no standard headers; CUTLASS knows that, the templates include this one.
_HEADERS: Final = {b"cstdint": b"#pragma once\n#include <cuda/std/cstdint>\n"}
_SUCCESS: Final = 0
_TOLD_IN_THE_LOG: Final = (5, 6)  # an option that is unknown here, an error in the source
_PATTERN: Final = "libnvrtc.so.[0-9]*"

_Handle = ctypes.c_void_p
_Strings = ctypes.POINTER(ctypes.c_char_p)
_Size = ctypes.POINTER(ctypes.c_size_t)
_Int = ctypes.POINTER(ctypes.c_int)
_SIGNATURES: Final[Mapping[str, list[Any]]] = {
    "nvrtcVersion": [_Int, _Int],
    "nvrtcGetNumSupportedArchs": [_Int],
    "nvrtcGetSupportedArchs": [_Int],
    "nvrtcCreateProgram": [
        ctypes.POINTER(_Handle),
        ctypes.c_char_p,
        ctypes.c_char_p,
        ctypes.c_int,
        _Strings,
        _Strings,
    ],
    "nvrtcDestroyProgram": [ctypes.POINTER(_Handle)],
    "nvrtcCompileProgram": [_Handle, ctypes.c_int, _Strings],
    "nvrtcGetProgramLogSize": [_Handle, _Size],
    "nvrtcGetProgramLog": [_Handle, ctypes.c_char_p],
    "nvrtcGetCUBINSize": [_Handle, _Size],
    "nvrtcGetCUBIN": [_Handle, ctypes.c_char_p],
    "nvrtcGetPTXSize": [_Handle, _Size],
    "nvrtcGetPTX": [_Handle, ctypes.c_char_p],
}


class Nvrtc:
    """The loaded library.

    Attributes:
        version: with what tells builds of one version apart.
        capabilities: that it compiles for, as 10 * major + minor.
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError or AttributeError when the file is not NVRTC."""
        self._path = path
        # NVRTC opens this one by its name alone, which finds it where it is loaded already.
        for builtins in path.parent.glob("libnvrtc-builtins.so.[0-9]*"):
            ctypes.CDLL(str(builtins))
        self._library = ctypes.CDLL(str(path))
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
        self._functions = {}
        for name, arguments in _SIGNATURES.items():
            function = self._library[name]  # a new object: the types are set on nobody else's
            function.argtypes = arguments
            self._functions[name] = function
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", major, minor)
        # It does not tell its patch level, which the size of the file stands for.
        self.version = f"{major.value}.{minor.value}+{path.stat().st_size}"
        count = ctypes.c_int()
        self._call("nvrtcGetNumSupportedArchs", count)
        supported = (ctypes.c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", supported)
        self.capabilities = frozenset(supported)

    def __reduce__(self) -> tuple[type[Nvrtc], tuple[Path]]:
        return Nvrtc, (self._path,)  # another process loads it itself

    @classmethod
    def find(cls) -> Nvrtc:
        """The library of NVIDIA's package, which CUDA builds of torch bring too, or of a toolkit.

        Raises:
            KernelUnavailableError: there is none, with what installs it.
        """
        problem = "there is no NVRTC"
        for path in _candidates():
            try:
                return cls(path)
            except (OSError, AttributeError) as error:
                problem = f"{path} cannot be loaded: {error}"
        raise KernelUnavailableError(f"{problem}; {INSTALL}")

    def compile(
        self, source: str, options: Sequence[str], kind: str = "CUBIN"
    ) -> tuple[bytes | None, str]:
        """The cubin or the PTX, or None for what does not compile, and the log.

        Args:
            kind: "CUBIN" or "PTX", which comes without the zero that ends it.
        """
        program = _Handle()
        self._call(
            "nvrtcCreateProgram",
            program,
            source.encode(),
            b"kernel.cu",
            len(_HEADERS),
            _strings(list(_HEADERS.values())),
            _strings(list(_HEADERS)),
        )
        try:
            encoded = _strings([option.encode() for option in options])
            status = self._functions["nvrtcCompileProgram"](program, len(options), encoded)
            log = self._read(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
            if status in _TOLD_IN_THE_LOG:
                return None, log
            self._check("nvrtcCompileProgram", status, log)
            image = self._read(program, kind)
            return image.rstrip(b"\0") if kind == "PTX" else image, log
        finally:
            self._call("nvrtcDestroyProgram", program)

    def _read(self, program: _Handle, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"nvrtcGet{what}Size", program, size)
        content = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{what}", program, content)
        return content.raw

    def _call(self, name: str, *arguments: object) -> None:
        self._check(name, self._functions[name](*arguments))

    def _check(self, name: str, status: int, log: str = "") -> None:
        if status != _SUCCESS:
            words: bytes = self._library.nvrtcGetErrorString(status)
            raise KernelUnavailableError(f"{name}: {words.decode()}. {log}".rstrip(". "))


def _candidates() -> Iterator[Path]:
    for folder in nvidia_folders():
        yield from sorted((folder / "lib").glob(_PATTERN))
    for folder in toolkits():
        yield from sorted((folder / "lib64").glob(_PATTERN))


def _strings(values: list[bytes]) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * len(values))(*values)
