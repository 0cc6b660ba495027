"""Builds, for the CPU, the driver look-alike and kernels, and calls them: cutlass_templates/host/.

What is built is kept under ``build/host/``, named by a hash of all that it is built from.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
TEMPLATES = ROOT / "cutlass_templates"
BUILD = ROOT / "build" / "host"

COMPILER = os.environ.get("CXX", "g++")
# No contraction: results are then the same with and without FMA instructions.
FLAGS = ("-std=c++17", "-O2", "-march=native", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden")

CUDA_SUCCESS = 0
CUDA_ERROR_INVALID_VALUE = 1
CUDA_ERROR_NOT_INITIALIZED = 3
CUDA_ERROR_INVALID_DEVICE = 101
CUDA_ERROR_INVALID_CONTEXT = 201
CUDA_ERROR_NO_BINARY_FOR_GPU = 209
CUDA_ERROR_INVALID_HANDLE = 400
CUDA_ERROR_NOT_FOUND = 500
CUDA_ERROR_LAUNCH_FAILED = 719
CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900

_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_SHARED_WITHOUT_OPT_IN = 48 << 10
_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CUlaunchAttributeID


def missing() -> str | None:
    """Why kernels cannot be built here, for ``pytest.mark.skipif``; None if they can."""
    if shutil.which(COMPILER) is None:
        return f"no C++ compiler: {COMPILER}"
    try:
        include_folders()
    except ModuleNotFoundError as error:
        return str(error)
    return None


@functools.cache
def include_folders() -> tuple[Path, ...]:
    """The headers of CUTLASS and CUDA: of installed packages, or where the environment says.

    Raises:
        ModuleNotFoundError: there are none.
    """
    cutlass = os.environ.get("SAGE_CUTLASS_INCLUDE")
    cuda = os.environ.get("SAGE_CUDA_INCLUDE")
    first = Path(cutlass) if cutlass else _package("cutlass_library") / "source" / "include"
    second = Path(cuda) if cuda else _package("nvidia") / "cu13" / "include"
    for header in (first / "cute" / "tensor.hpp", second / "cuda_runtime_api.h"):
        if not header.is_file():
            raise ModuleNotFoundError(f"no {header}: pip install 'sage-compiler[cuda]'")
    return first, second, second / "cccl"


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"no package {name}: pip install 'sage-compiler[cuda]'")
    return Path(spec.submodule_search_locations[0])


@functools.cache
def driver() -> Path:
    """The driver look-alike, a shared library. Built if need be."""
    folder = TEMPLATES / "host"
    sources = sorted(map(str, folder.glob("*.cpp")))
    command = [*FLAGS, "-Wall", "-Wextra", "-Werror", "-shared", "-I", str(folder / "include")]
    return _build("libcuda_host.so", [*command, *sources], _contents(folder))


def compile_kernel(source: str, name: str) -> bytes:
    """The host image of a kernel's source, such as ``SAGE_KERNEL(...)`` after its includes.

    Raises:
        RuntimeError: it does not compile; with the compiler's messages.
    """
    header = str(_precompiled_header())
    command = [*_kernel_flags(), "-shared", "-include", header, "-x", "c++", "-"]
    content = [source.encode(), *_contents(TEMPLATES / "include", TEMPLATES / "host" / "include")]
    return _build(f"{name}.so", command, content, source).read_bytes()


@functools.cache
def _kernel_flags() -> tuple[str, ...]:
    command = [*FLAGS, "-DSAGE_HOST"]
    for folder in (TEMPLATES / "include", TEMPLATES / "host" / "include"):
        command += ["-I", str(folder)]
    for folder in include_folders():
        command += ["-isystem", str(folder)]
    return tuple(command)


@functools.cache
def _precompiled_header() -> Path:
    """sage/arch.cuh, to be included first: a kernel then compiles in 0.3 s rather than 1.6 s.

    The compiler takes the .gch beside the header, or else the header itself.
    """
    include = "#include <sage/arch.cuh>\n"
    BUILD.mkdir(parents=True, exist_ok=True)
    source = BUILD / "arch.hpp"
    if not source.exists():
        source.write_text(include, encoding="utf-8")
    arch = TEMPLATES / "include" / "sage" / "arch.cuh"
    content = [arch.read_bytes(), *_contents(TEMPLATES / "host" / "include")]
    command = [*_kernel_flags(), "-x", "c++-header", str(source)]
    binary = _build("arch.hpp.gch", command, content)
    header = binary.with_suffix("")
    if not header.exists():
        header.write_text(include, encoding="utf-8")
    for other in BUILD.glob("*/arch.hpp.gch"):  # each has 150 MB
        if other != binary:
            other.unlink(missing_ok=True)
    return header


def _contents(*folders: Path) -> list[bytes]:
    return [p.read_bytes() for folder in folders for p in sorted(folder.rglob("*")) if p.is_file()]


@functools.cache
def _compiler_identity() -> bytes:
    """The compiler's version and, since code is for this very machine, what it says of it."""
    command = [COMPILER, *FLAGS, "-dM", "-E", "-x", "c++", os.devnull]
    return subprocess.run(command, check=True, capture_output=True).stdout


def _build(name: str, arguments: Sequence[str], content: Sequence[bytes], source: str = "") -> Path:
    digest = hashlib.sha256(_compiler_identity())
    for part in (*(argument.encode() for argument in arguments), *content):
        digest.update(len(part).to_bytes(8, "little") + part)
    target = BUILD / digest.hexdigest()[:24] / name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = BUILD / "unfinished"
    unfinished.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=unfinished) as folder:
        output = Path(folder) / name
        command = [COMPILER, *arguments, "-o", str(output)]
        done = subprocess.run(command, input=source, text=True, capture_output=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{name} does not compile:\n{done.stderr[:8000]}")
        os.replace(output, target)  # several processes may have built it
    return target


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("geometry", ctypes.c_uint * 7),  # grid, block, shared memory
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("attribute_count", ctypes.c_uint),
    )


class Host:
    """The driver look-alike in this process, with one device, a context and calls for tests."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(str(driver()))
        for name in ("sage_host_message", "sage_host_launches"):
            getattr(self.library, name).restype = ctypes.c_char_p
        self._modules: dict[bytes, ctypes.c_void_p] = {}
        self.reset()

    def reset(self) -> None:
        """As at the start, with the first device's context current in this thread."""
        self.library.sage_host_reset()
        self.check("cuInit", 0)
        self.make_current()

    def make_current(self) -> None:
        """Makes the first device's context current in this thread."""
        context = ctypes.c_void_p()
        self.check("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
        self.check("cuCtxSetCurrent", context)

    def call(self, name: str, *arguments: Any) -> int:
        """Calls a function of the C API; returns its CUresult."""
        return int(getattr(self.library, name)(*arguments))

    def check(self, name: str, *arguments: Any) -> None:
        """As ``call``.

        Raises:
            RuntimeError: it is not CUDA_SUCCESS.
        """
        code = self.call(name, *arguments)
        if code != CUDA_SUCCESS:
            raise RuntimeError(f"{name}: {code}: {self.message()}")

    def message(self) -> str:
        """Why the last call that failed did."""
        text: bytes = self.library.sage_host_message()
        return text.decode()

    def launches(self) -> list[dict[str, Any]]:
        """The log of launches; driver.cpp has its fields."""
        log: list[dict[str, Any]] = json.loads(self.library.sage_host_launches())
        return log

    def set_capability(self, major: int, minor: int) -> None:
        """The compute capability of all devices, with the shared memory that it has."""
        self.library.sage_host_set_capability(major, minor)

    def seed(self, seed: int) -> None:
        """Chooses the order in which blocks and threads run from now on."""
        self.library.sage_host_seed(ctypes.c_uint64(seed))

    def allow(self, tensor: torch.Tensor, *, writable: bool) -> None:
        """Registers a tensor's storage: from now on, kernels may touch only what is registered."""
        storage = tensor.untyped_storage()
        pointer = ctypes.c_void_p(storage.data_ptr())
        self.library.sage_host_allow(pointer, ctypes.c_size_t(storage.nbytes()), writable)

    @contextmanager
    def without_race_detector(self) -> Iterator[None]:
        self.library.sage_host_detect_races(False)
        try:
            yield
        finally:
            self.library.sage_host_detect_races(True)

    def function(self, image: bytes, symbol: str) -> ctypes.c_void_p:
        """The kernel of an image, which is loaded once for the life of this object."""
        if image not in self._modules:
            module = ctypes.c_void_p()
            self.check("cuModuleLoadData", ctypes.byref(module), image)
            self._modules[image] = module
        found = ctypes.c_void_p()
        name = symbol.encode()
        self.check("cuModuleGetFunction", ctypes.byref(found), self._modules[image], name)
        return found

    def launch(
        self,
        image: bytes,
        symbol: str,
        grid: int,
        threads: int,
        shared_bytes: int,
        params: bytes,
        *,
        dependent: bool = False,
        stream: int = 0,
    ) -> None:
        """Runs a kernel, perhaps dependent on the one before it in the stream.

        Raises:
            RuntimeError: the launch is refused, or a check fails while it runs.
        """
        function = self.function(image, symbol)
        if shared_bytes > _SHARED_WITHOUT_OPT_IN:
            self.check("cuFuncSetAttribute", function, _MAX_DYNAMIC_SHARED, shared_bytes)
        buffer = ctypes.create_string_buffer(params, len(params))
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(buffer))
        geometry = (grid, 1, 1, threads, 1, 1, shared_bytes)
        if not dependent:
            on = ctypes.c_void_p(stream)
            return self.check("cuLaunchKernel", function, *geometry, on, pointers, None)
        attribute = _Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, 0, (ctypes.c_int * 16)(1))
        config = _Config(geometry, stream, ctypes.pointer(attribute), 1)
        self.check("cuLaunchKernelEx", ctypes.byref(config), function, pointers, None)
