"""The look-alike of the CUDA driver: what a launching side sees of it."""

from __future__ import annotations

import ctypes
import functools
import re
import struct
import subprocess
import threading
from pathlib import Path

import pytest
import torch

from tests.cutlass_templates import host as cuda
from tests.cutlass_templates.host import Host, compile_kernel, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

SOURCE = """
#include <sage/arch.cuh>
struct Add {
    struct Params { float* values; float number; int32_t count; };
    static constexpr int kThreads = 64, kSharedBytes = %d, kMinBlocks = 1;
    SAGE_DEVICE static void run(Params const& p) {
        int64_t const i = sage::arch::block_index() * kThreads + sage::arch::thread_index();
        if (i >= p.count) return;
        float const value = sage::arch::load_global(p.values + i);
        sage::arch::store_global(p.values + i, value + p.number);
    }
};
SAGE_KERNEL(add, 64, %d, 16, Add)
"""


@functools.cache
def image(shared_bytes: int = 0) -> bytes:
    return compile_kernel(SOURCE % (shared_bytes, shared_bytes), "add")


def params_of(values: torch.Tensor, number: float) -> bytes:
    return struct.pack("Pfi", values.data_ptr(), number, len(values))


def launch(host: Host, function: ctypes.c_void_p, params: bytes, **changes: int | None) -> int:
    """cuLaunchKernel of `add`, with arguments of it changed; its CUresult."""
    buffer = ctypes.create_string_buffer(params, len(params))
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(buffer))
    geometry = dict(grid_x=2, grid_y=1, grid_z=1, block_x=64, block_y=1, block_z=1, shared=0)
    values = geometry | {"stream": None} | changes
    stream = ctypes.c_void_p(values.pop("stream"))
    return host.call("cuLaunchKernel", function, *values.values(), stream, pointers, None)


def test_a_launch_runs_the_kernel_and_is_logged(host: Host) -> None:
    values = torch.arange(100.0)
    function = host.function(image(), "add")
    assert launch(host, function, params_of(values, 2.5), stream=0x77) == cuda.CUDA_SUCCESS
    assert torch.equal(values, torch.arange(100.0) + 2.5)
    context = ctypes.c_void_p()
    host.check("cuCtxGetCurrent", ctypes.byref(context))
    assert host.launches() == [
        {
            "symbol": "add",
            "grid": 2,
            "block": 64,
            "shared_bytes": 0,
            "stream": 0x77,
            "context": context.value,
            "dependent": False,
            "captured": False,
            "loaded": 0,
            "loaded_once": 0,
            "stored": 0,
            "streamed": 0,
            "missed": 0,
        }
    ]
    host.reset()
    assert host.launches() == []


def test_the_parameters_are_taken_when_the_kernel_is_launched(host: Host) -> None:
    """The caller may reuse its buffer at once; and a dry run only logs."""
    values = torch.zeros(100)
    function = host.function(image(), "add")
    host.library.sage_host_dry_run(True)
    assert launch(host, function, params_of(values, 1.0)) == cuda.CUDA_SUCCESS
    assert not values.any()
    host.library.sage_host_dry_run(False)
    assert launch(host, function, params_of(values, 1.0)) == cuda.CUDA_SUCCESS
    assert (values == 1).all()
    assert len(host.launches()) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid_x": 0}, r"the grid must be \(1 .. 2\^31 - 1, 1, 1\), not \(0, 1, 1\)"),
        ({"grid_y": 2}, r"the grid must be .* not \(2, 2, 1\)"),
        ({"grid_z": 0}, r"the grid must be .* not \(2, 1, 0\)"),
        ({"block_x": 32}, r"the block must be \(64, 1, 1\), not \(32, 1, 1\)"),
        ({"block_z": 2}, r"the block must be \(64, 1, 1\), not \(64, 1, 2\)"),
        ({"shared": 16}, "it takes 0 bytes of dynamic shared memory, not 16"),
    ],
)
def test_a_wrong_geometry_is_refused(host: Host, changes: dict[str, int], message: str) -> None:
    values = torch.zeros(100)
    function = host.function(image(), "add")
    code = launch(host, function, params_of(values, 1.0), **changes)
    assert code == cuda.CUDA_ERROR_INVALID_VALUE
    assert re.search("^add: " + message, host.message())
    assert not values.any() and not host.launches()


def test_parameters_must_be_passed_by_pointers(host: Host) -> None:
    function = host.function(image(), "add")
    geometry = (2, 1, 1, 64, 1, 1, 0)
    code = host.call("cuLaunchKernel", function, *geometry, None, None, None)
    assert code == cuda.CUDA_ERROR_INVALID_VALUE
    assert "kernelParams" in host.message()


def test_much_shared_memory_takes_the_functions_attribute(host: Host) -> None:
    most, beyond = 99 << 10, (99 << 10) + 1
    values = torch.zeros(100)
    function = host.function(image(most), "add")
    params = params_of(values, 1.0)
    attribute = ctypes.c_int()
    host.check("cuFuncGetAttribute", ctypes.byref(attribute), 8, function)
    assert attribute.value == 48 << 10
    assert launch(host, function, params, shared=most) == cuda.CUDA_ERROR_INVALID_VALUE
    assert "more than the function's attribute allows, 49152" in host.message()
    assert host.call("cuFuncSetAttribute", function, 8, beyond) == cuda.CUDA_ERROR_INVALID_VALUE
    assert "at most 101376 bytes of shared memory, not 101377" in host.message()
    host.check("cuFuncSetAttribute", function, 8, most)
    assert launch(host, function, params, shared=most) == cuda.CUDA_SUCCESS
    assert (values == 1).all()
    host.check("cuFuncGetAttribute", ctypes.byref(attribute), 0, function)
    assert attribute.value == 64
    assert host.call("cuFuncSetAttribute", function, 1, 0) == cuda.CUDA_ERROR_INVALID_VALUE


@pytest.mark.parametrize(
    ("capability", "shared_bytes"),
    [((8, 0), 163), ((8, 6), 99), ((8, 9), 99), ((9, 0), 227), ((10, 0), 227), ((12, 0), 99)],
)
def test_the_device_is_what_the_test_says(
    host: Host, capability: tuple[int, int], shared_bytes: int
) -> None:
    host.library.sage_host_set_capability(*capability)

    def attribute(number: int) -> int:
        value = ctypes.c_int()
        host.check("cuDeviceGetAttribute", ctypes.byref(value), number, 0)
        return value.value

    assert (attribute(75), attribute(76)) == capability
    assert attribute(97) == shared_bytes << 10
    assert (attribute(8), attribute(1), attribute(10), attribute(16)) == (48 << 10, 1024, 32, 1)
    value = ctypes.c_int()
    code = host.call("cuDeviceGetAttribute", ctypes.byref(value), 9999, 0)
    assert code == cuda.CUDA_ERROR_INVALID_VALUE
    assert "attribute 9999 is not imitated" in host.message()


def test_devices_and_version(host: Host) -> None:
    value = ctypes.c_int()
    host.check("cuDriverGetVersion", ctypes.byref(value))
    assert value.value == 13000
    host.check("cuDeviceGetCount", ctypes.byref(value))
    assert value.value == 1
    assert host.call("cuDeviceGet", ctypes.byref(value), 1) == cuda.CUDA_ERROR_INVALID_DEVICE
    host.library.sage_host_set_devices(2)
    host.check("cuDeviceGet", ctypes.byref(value), 1)
    assert value.value == 1
    name = ctypes.create_string_buffer(100)
    host.check("cuDeviceGetName", name, 100, 1)
    assert name.value == b"CPU executing CUDA kernels"


def test_nothing_works_before_cu_init(host: Host) -> None:
    host.library.sage_host_reset()
    value, handle = ctypes.c_int(), ctypes.c_void_p()
    for name, *arguments in (
        ("cuDeviceGetCount", ctypes.byref(value)),
        ("cuDeviceGet", ctypes.byref(value), 0),
        ("cuDevicePrimaryCtxRetain", ctypes.byref(handle), 0),
        ("cuModuleLoadData", ctypes.byref(handle), image()),
    ):
        assert host.call(name, *arguments) == cuda.CUDA_ERROR_NOT_INITIALIZED
    assert host.call("cuInit", 1) == cuda.CUDA_ERROR_INVALID_VALUE


@pytest.mark.parametrize("suffix", ["", "_v2"])
def test_each_thread_has_a_stack_of_contexts(host: Host, suffix: str) -> None:
    host.library.sage_host_set_devices(2)
    contexts = [ctypes.c_void_p(), ctypes.c_void_p()]
    for device, context in enumerate(contexts):
        host.check("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    current = ctypes.c_void_p()
    host.check("cuCtxPushCurrent" + suffix, contexts[1])
    host.check("cuCtxGetCurrent", ctypes.byref(current))
    assert current.value == contexts[1].value != contexts[0].value
    seen: list[int | None] = []

    def elsewhere() -> None:
        other = ctypes.c_void_p()
        seen.append(host.call("cuCtxGetCurrent", ctypes.byref(other)))
        seen.append(other.value)
        seen.append(host.call("cuCtxPopCurrent" + suffix, ctypes.byref(other)))
        seen.append(host.call("cuModuleLoadData", ctypes.byref(other), image()))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [
        cuda.CUDA_SUCCESS,
        None,
        cuda.CUDA_ERROR_INVALID_CONTEXT,
        cuda.CUDA_ERROR_INVALID_CONTEXT,
    ]
    host.check("cuCtxPopCurrent" + suffix, ctypes.byref(current))
    assert current.value == contexts[1].value
    host.check("cuCtxGetCurrent", ctypes.byref(current))
    assert current.value == contexts[0].value


def test_a_function_runs_only_in_the_context_of_its_module(host: Host) -> None:
    host.library.sage_host_set_devices(2)
    function = host.function(image(), "add")
    values = torch.zeros(100)
    other = ctypes.c_void_p()
    host.check("cuDevicePrimaryCtxRetain", ctypes.byref(other), 1)
    host.check("cuCtxPushCurrent_v2", other)
    code = launch(host, function, params_of(values, 1.0))
    assert code == cuda.CUDA_ERROR_INVALID_HANDLE
    assert host.message() == "add: its module was loaded in another context"
    host.check("cuCtxPopCurrent_v2", None)
    host.check("cuCtxSetCurrent", None)
    code = launch(host, function, params_of(values, 1.0))
    assert code == cuda.CUDA_ERROR_INVALID_CONTEXT
    assert not values.any()


def test_a_module_is_loaded_each_time_and_unloaded_once(host: Host) -> None:
    first, second, function = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
    host.check("cuModuleLoadData", ctypes.byref(first), image())
    host.check("cuModuleLoadData", ctypes.byref(second), image())
    assert first.value != second.value
    host.check("cuModuleUnload", first)
    assert host.call("cuModuleUnload", first) == cuda.CUDA_ERROR_INVALID_HANDLE
    found = (ctypes.byref(function), first, b"add")
    assert host.call("cuModuleGetFunction", *found) == cuda.CUDA_ERROR_INVALID_HANDLE
    host.check("cuModuleGetFunction", ctypes.byref(function), second, b"add")
    values = torch.zeros(100)
    assert launch(host, function, params_of(values, 1.0)) == cuda.CUDA_SUCCESS
    assert (values == 1).all()
    host.check("cuModuleUnload", second)


def test_images_with_the_same_symbols_stay_apart(host: Host) -> None:
    """dlopen must not take one image for another, also not after one was unloaded."""
    images = [image(), compile_kernel(SOURCE.replace("value + ", "value - ") % (0, 0), "add")]
    for _ in range(3):
        modules = [ctypes.c_void_p(), ctypes.c_void_p()]
        results = []
        for module, content in zip(modules, images, strict=True):
            host.check("cuModuleLoadData", ctypes.byref(module), content)
        for module in modules:
            function, values = ctypes.c_void_p(), torch.zeros(100)
            host.check("cuModuleGetFunction", ctypes.byref(function), module, b"add")
            assert launch(host, function, params_of(values, 1.0)) == cuda.CUDA_SUCCESS
            results.append(set(values.tolist()))
        assert results == [{1.0}, {-1.0}]
        for module in modules:
            host.check("cuModuleUnload", module)


@pytest.mark.parametrize("name", [b"subtract", b"sage_host_image", b"printf", b""])
def test_an_unknown_function_is_not_found(host: Host, name: bytes) -> None:
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    host.check("cuModuleLoadData", ctypes.byref(module), image())
    code = host.call("cuModuleGetFunction", ctypes.byref(function), module, name)
    assert code == cuda.CUDA_ERROR_NOT_FOUND
    assert f"has no kernel {name.decode()}" in host.message()
    host.check("cuModuleUnload", module)


def foreign_library(folder: Path, source: str) -> bytes:
    """A shared library of this machine that is not an image of this driver."""
    target = folder / "foreign.so"
    command = [cuda.COMPILER, "-shared", "-fPIC", "-x", "c", "-", "-o", str(target)]
    subprocess.run(command, input=source, text=True, check=True)
    return target.read_bytes()


def test_what_is_not_a_host_image_is_refused(host: Host, tmp_path: Path) -> None:
    elf = bytearray(image()[:64])
    elf[18:20] = (190).to_bytes(2, "little")  # the machine code of NVIDIA GPUs
    older = "unsigned long long sage_host_image[2] = {1, 0};"
    for wrong, why in (
        (bytes(elf), "not a shared library of this machine"),
        (b"//\n.version 8.0\n.target sm_89\n" + bytes(64), "not a shared library of this machine"),
        (bytes(64), "not a shared library of this machine"),
        (foreign_library(tmp_path, "int number;"), "not made for this driver library"),
        (foreign_library(tmp_path, older), "not made for this driver library"),
        (foreign_library(tmp_path, "int f(); int g() { return f(); }"), "undefined symbol: f"),
    ):
        module = ctypes.c_void_p()
        code = host.call("cuModuleLoadData", ctypes.byref(module), wrong)
        assert code == cuda.CUDA_ERROR_NO_BINARY_FOR_GPU
        assert why in host.message()
        assert module.value is None


def test_while_a_stream_captures_nothing_is_loaded_or_run(host: Host) -> None:
    stream, status = ctypes.c_void_p(0x55), ctypes.c_int(-1)
    values = torch.zeros(100)
    function = host.function(image(), "add")
    host.check("cuStreamIsCapturing", stream, ctypes.byref(status))
    assert status.value == 0
    host.library.sage_host_set_capturing(stream, True)
    host.check("cuStreamIsCapturing", stream, ctypes.byref(status))
    assert status.value == 1
    module = ctypes.c_void_p()
    code = host.call("cuModuleLoadData", ctypes.byref(module), image())
    assert code == cuda.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
    assert "a stream is capturing" in host.message()
    code = host.call("cuStreamSynchronize", stream)
    assert code == cuda.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
    assert launch(host, function, params_of(values, 1.0), stream=0x55) == cuda.CUDA_SUCCESS
    assert not values.any()
    assert launch(host, function, params_of(values, 1.0), stream=0x66) == cuda.CUDA_SUCCESS
    assert (values == 1).all()
    assert [entry["captured"] for entry in host.launches()] == [True, False]
    host.library.sage_host_set_capturing(stream, False)
    host.check("cuStreamSynchronize", stream)
    host.check("cuModuleLoadData", ctypes.byref(module), image())
    host.check("cuModuleUnload", module)


def test_errors_have_cudas_names(host: Host) -> None:
    text = ctypes.c_char_p()
    for name, code in vars(cuda).items():
        if name.startswith("CUDA_") and isinstance(code, int):
            host.check("cuGetErrorName", code, ctypes.byref(text))
            assert text.value == name.encode()
            host.check("cuGetErrorString", code, ctypes.byref(text))
            assert text.value
    assert host.call("cuGetErrorName", 12345, ctypes.byref(text)) == cuda.CUDA_ERROR_INVALID_VALUE
    assert text.value is None


def test_the_log_keeps_the_newest_launches(host: Host) -> None:
    values = torch.zeros(1)
    function = host.function(image(), "add")
    host.library.sage_host_dry_run(True)
    for grid in range(1, 10_011):
        launch(host, function, params_of(values, 1.0), grid_x=grid)
    grids = [entry["grid"] for entry in host.launches()]
    assert grids == list(range(11, 10_011))


def test_a_kernel_that_does_not_compile_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)^wrong.so does not compile:.*threads of a block"):
        compile_kernel(SOURCE % (0, 0) + "SAGE_KERNEL(other, 32, 0, 16, Add)", "wrong")
