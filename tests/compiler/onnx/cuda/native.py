"""The CUDA core of the operator library, without ONNX Runtime, in this process: by ctypes."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from sage_compiler.kernels.cuda.render import templates_digest
from sage_compiler.semantics import UNBOUNDED, DeadRows, Semantics
from tests.compiler.kernels.dense import Call
from tests.cutlass_templates import host

HERE: Final = Path(__file__).parent
CORE: Final = host.ROOT / "compiler" / "onnx" / "runtime" / "cuda"
OF_ONNX_RUNTIME: Final = ("cuda", "takeover")  # what is no part of the core
DTYPES: Final = (torch.float16, torch.bfloat16, torch.float32)
RECIPES: Final = ("int4_fp8", "int4_fp16", "int8_fp8", "int8_fp16")
AUTO: Final = "auto"
STREAM: Final = 0x5A6E
KINDS: Final = {torch.bool: 0, torch.float16: 1, torch.bfloat16: 2, torch.float32: 3}

_PARAMS: Final = host.TEMPLATES / "include" / "sage" / "params.cuh"
_FLAGS: Final = (
    *("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"),
    *("-shared", "-I", str(CORE), "-I", str(host.TEMPLATES / "include")),
)


class Mask(ctypes.Structure):
    """sage::Mask."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("strides", ctypes.c_int64 * 4),
        ("kind", ctypes.c_int64),
    )


class Attention(ctypes.Structure):
    """sage_cuda::Attention."""

    _fields_ = (
        ("dtype", ctypes.c_int),
        ("automatic", ctypes.c_bool),
        ("recipe", ctypes.c_int),
        *(
            (name, ctypes.c_int64)
            for name in ("batch", "heads", "kv_heads", "query_length", "key_length")
        ),
        ("head_dim", ctypes.c_int64),
        ("value_head_dim", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("dead_rows_are_nan", ctypes.c_bool),
        ("left", ctypes.c_int64),
        ("right", ctypes.c_int64),
        ("diagonal", ctypes.c_int64),
        ("query", ctypes.c_void_p),
        ("key", ctypes.c_void_p),
        ("value", ctypes.c_void_p),
        ("mask", Mask),
        ("sinks", ctypes.c_void_p),
        ("sinks_kind", ctypes.c_int64),
        ("output", ctypes.c_void_p),
        ("lse", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class Launch:
    """One launch that the driver was asked for."""

    symbol: str
    blocks: int
    threads: int
    shared_bytes: int
    stream: int
    dependent: bool
    params: bytes


class NativeError(Exception):
    """What the library refused, in its words."""


@functools.cache
def driver_path() -> Path:
    """The driver of ``driver.cpp``."""
    source = HERE / "driver.cpp"
    content = [source.read_bytes(), _PARAMS.read_bytes()]
    return host._build("libcuda_test.so", [*_FLAGS, str(source), "-ldl"], content)


@functools.cache
def _harness() -> ctypes.CDLL:
    core = [path for path in sorted(CORE.glob("*.cpp")) if path.stem not in OF_ONNX_RUNTIME]
    sources = [HERE / "harness.cpp", *core]
    content = [p.read_bytes() for p in [*sources, *sorted(CORE.glob("*.hpp")), _PARAMS]]
    flags = [*_FLAGS, f'-DSAGE_TEMPLATES_DIGEST="{templates_digest()}"']
    libraries = ("-pthread", "-ldl")
    content.append(templates_digest().encode())
    built = host._build("libharness.so", [*flags, *map(str, sources), *libraries], content)
    library = ctypes.CDLL(str(built))
    for name in ("open", "shared", "device"):
        getattr(library, f"harness_{name}").restype = ctypes.c_void_p
    for name in ("attention_bytes", "error_bytes"):
        getattr(library, f"harness_{name}").restype = ctypes.c_size_t
    for name in ("plan", "launch", "check_recipe", "check_safe"):
        getattr(library, f"harness_{name}").restype = ctypes.c_bool
    assert library.harness_attention_bytes() == ctypes.sizeof(Attention)
    return library


def call(name: str, *arguments: Any) -> Any:
    """A function of the harness, whose last argument is an error.

    Raises:
        NativeError: it fails.
    """
    error = ctypes.create_string_buffer(_harness().harness_error_bytes())
    result = getattr(_harness(), f"harness_{name}")(*arguments, error)
    if not result:
        assert error.value, "it failed without a word"
        raise NativeError(error.value.decode())
    return result


def sha256(data: bytes) -> str:
    """The digest that the library computes."""
    text = ctypes.create_string_buffer(65)
    _harness().harness_sha256(data, ctypes.c_size_t(len(data)), ctypes.byref(text))
    return text.value.decode()


class TestDriver:
    """The driver of ``driver.cpp`` in this process."""

    __test__ = False

    def __init__(self) -> None:
        self.path = driver_path()
        self._library = ctypes.CDLL(str(self.path))
        self._library.sage_test_launches.restype = ctypes.c_size_t
        self._library.sage_test_copies.restype = ctypes.c_size_t
        self._library.sage_test_launch.restype = ctypes.c_char_p
        self.reset()

    def reset(self, *, executes: bool = False) -> None:
        """As at the start; ``executes`` hands launches to the look-alike, else it pretends."""
        target = str(host.driver()).encode() if executes else None
        self._library.sage_test_reset(target)

    def set_capability(self, major: int, minor: int) -> None:
        """Of all devices, while it pretends."""
        self._library.sage_test_capability(major, minor)

    def set_version(self, version: int) -> None:
        """Of CUDA, that the driver is for."""
        self._library.sage_test_version(version)

    def fail(self, function: str, code: int = 999, after: int = 0) -> None:
        """Let a function fail, after some calls that succeed."""
        self._library.sage_test_fail(function.encode(), code, after)

    def held(self) -> tuple[int, int, int]:
        """Contexts that are retained, modules that are loaded, this thread's current contexts."""
        held = (ctypes.c_long * 3)()
        self._library.sage_test_held(ctypes.byref(held))
        contexts, modules, current = held
        return contexts, modules, current

    def copies(self) -> int:
        """How many copies were begun that nobody has waited for."""
        return int(self._library.sage_test_copies())

    def calls(self, function: str) -> int:
        """How often a function was called since ``reset`` or ``fail``."""
        return int(self._library.sage_test_calls(function.encode()))

    def launches(self) -> list[Launch]:
        """What was launched since this was last asked."""
        found = []
        for index in range(self._library.sage_test_launches()):
            numbers = (ctypes.c_uint64 * 5)()
            params, size = ctypes.c_void_p(), ctypes.c_size_t()
            symbol = self._library.sage_test_launch(
                ctypes.c_size_t(index),
                ctypes.byref(numbers),
                ctypes.byref(params),
                ctypes.byref(size),
            )
            packed = ctypes.string_at(params, size.value)
            blocks, threads, shared_bytes, stream, dependent = numbers
            geometry = (blocks, threads, shared_bytes)
            found.append(Launch(symbol.decode(), *geometry, stream, bool(dependent), packed))
        self._library.sage_test_forget()
        return found


class Device:
    """A device that the core has opened."""

    def __init__(self, handle: int) -> None:
        self._handle = ctypes.c_void_p(handle)

    def scratch_bytes(self, attention: Attention) -> int:
        """Raises NativeError where there are no kernels for it."""
        size = ctypes.c_int64()
        call("plan", self._handle, ctypes.byref(attention), ctypes.byref(size))
        return size.value

    def launch(self, attention: Attention, scratch: int, stream: int) -> None:
        """Raises NativeError."""
        call(
            "launch",
            self._handle,
            ctypes.byref(attention),
            ctypes.c_void_p(scratch),
            ctypes.c_void_p(stream),
        )

    def check_recipe(self, dtype: torch.dtype, recipe: str) -> None:
        """Raises NativeError where the pack has nothing for it."""
        number = RECIPES.index(recipe) if recipe != AUTO else 0
        call("check_recipe", self._handle, DTYPES.index(dtype), recipe == AUTO, number)


@contextmanager
def opened(driver: Path | str, pack: Path | str, ordinal: int = 0) -> Iterator[Device]:
    """A device, closed at the end.

    Raises:
        NativeError: it cannot be opened.
    """
    runtime = call("open", str(driver).encode(), str(pack).encode())
    try:
        yield Device(call("device", ctypes.c_void_p(runtime), ordinal))
    finally:
        _harness().harness_close(ctypes.c_void_p(runtime))


def describe(
    sizes: tuple[int, int, int, int, int, int, int],
    dtype: torch.dtype,
    semantics: Semantics,
    recipe: str,
) -> Attention:
    """An attention without its tensors; sizes are B, H, Hkv, Lq, Lk, D, Dv."""
    a = Attention()
    a.dtype = DTYPES.index(dtype)
    a.automatic = recipe == AUTO
    a.recipe = RECIPES.index(recipe) if recipe != AUTO else 0
    a.batch, a.heads, a.kv_heads, a.query_length, a.key_length = sizes[:5]
    a.head_dim, a.value_head_dim = sizes[5:]
    a.scale = semantics.scale_for(a.head_dim)
    a.softcap = semantics.softcap or 0.0
    a.dead_rows_are_nan = semantics.dead_rows is DeadRows.NAN
    band = semantics.band(a.query_length, a.key_length)
    a.left = UNBOUNDED if band is None or band.left is None else band.left
    a.right = UNBOUNDED if band is None or band.right is None else band.right
    a.diagonal = 0 if band is None else band.offset
    return a


class Prepared:
    """One attention of dense tensors, with memory for its results.

    Attributes:
        output, lse, scratch: NaN, and garbage, until it is launched.
    """

    def __init__(self, device: Device, call: Call, recipe: str, *, want_lse: bool = True) -> None:
        """Raises NativeError where there are no kernels for it."""
        self._device = device
        query, key, value = (x.contiguous() for x in (call.query, call.key, call.value))
        mask = None if call.attn_mask is None else call.attn_mask.contiguous()
        sinks = None if call.sinks is None else call.sinks.contiguous()
        self._read = [x for x in (query, key, value, mask, sinks) if x is not None]
        sizes = (*query.shape[:2], key.shape[1], query.shape[2], key.shape[2])
        dims = (query.shape[3], value.shape[3])
        self.attention = a = describe((*sizes, *dims), query.dtype, call.semantics, recipe)
        self.output = query.new_full((*query.shape[:3], dims[1]), torch.nan)
        lse = query.new_full(query.shape[:3], torch.nan, dtype=torch.float32)
        self.lse = lse if want_lse else None
        a.query, a.key, a.value = query.data_ptr(), key.data_ptr(), value.data_ptr()
        a.output, a.lse = self.output.data_ptr(), None if self.lse is None else self.lse.data_ptr()
        if mask is not None:
            whole = mask[(None,) * (4 - mask.dim())]
            strides = [
                0 if n == 1 else stride
                for n, stride in zip(whole.shape, whole.stride(), strict=True)
            ]
            a.mask = Mask(mask.data_ptr(), (ctypes.c_int64 * 4)(*strides), KINDS[mask.dtype])
        if sinks is not None:
            a.sinks, a.sinks_kind = sinks.data_ptr(), KINDS[sinks.dtype]
        self.scratch = query.new_full((device.scratch_bytes(a),), 0xC5, dtype=torch.uint8)

    def launch(
        self, allow: Callable[..., None] = lambda *_, **__: None, stream: int = STREAM
    ) -> None:
        """Run it; ``allow`` is told of all memory that kernels may touch.

        Raises:
            NativeError: it fails.
        """
        for tensor in self._read:
            allow(tensor, writable=False)
        for written in (self.output, self.lse, self.scratch):
            if written is not None:
                allow(written, writable=True)
        self._device.launch(self.attention, self.scratch.data_ptr(), stream)
