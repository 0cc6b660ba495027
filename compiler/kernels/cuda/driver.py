"""The CUDA driver, by ctypes: loading an image on a device, and launching what is in it.

Nothing here knows of torch: the caller says on which device and stream. A device's context is its
primary one, which torch and the CUDA runtime use too.

Environment, read when the driver is loaded:
    SAGE_CUDA_DRIVER: the driver's library, instead of the system's.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, Final

from sage_compiler.errors import KernelUnavailableError, SageError
from sage_compiler.kernels.cuda.tensor_map import TensorMap

_SYSTEM_DRIVER: Final = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"

# CUresult
SUCCESS: Final = 0
_INVALID_IMAGE: Final = 200
_INVALID_CONTEXT: Final = 201
_NO_BINARY_FOR_GPU: Final = 209
_INVALID_PTX: Final = 218
_JIT_COMPILER_NOT_FOUND: Final = 221
_UNSUPPORTED_PTX_VERSION: Final = 222
_JIT_COMPILATION_DISABLED: Final = 223
_NOT_FOUND: Final = 500
_NOT_SUPPORTED: Final = 801
_NOT_FOR_HERE: Final = (
    _INVALID_IMAGE,
    _NO_BINARY_FOR_GPU,
    _INVALID_PTX,
    _JIT_COMPILER_NOT_FOUND,
    _UNSUPPORTED_PTX_VERSION,
    _JIT_COMPILATION_DISABLED,
    _NOT_FOUND,
)
_CAPTURE_MODE_RELAXED: Final = 2  # CUstreamCaptureMode
_CAPTURE_IMPLICIT: Final = 906  # asked of the default stream while another one is capturing

# CUdevice_attribute, CUfunction_attribute
_COMPUTE_CAPABILITY: Final = (75, 76)  # major, minor
_MULTIPROCESSOR_COUNT: Final = 16
_MAX_DYNAMIC_SHARED_BYTES: Final = 8

_SHARED_BYTES_UNASKED: Final = 48 << 10

_KEEPS_DEPENDENCE: Final = 12030
"""The first CUDA whose graphs have edges for launches that depend on one another and overlap."""

_Handle = ctypes.c_void_p
_Out = ctypes.POINTER(_Handle)
_IntOut = ctypes.POINTER(ctypes.c_int)
_Text = ctypes.POINTER(ctypes.c_char_p)
_Uint = ctypes.c_uint
_SIGNATURES: Final[Mapping[str, list[Any]]] = {
    "cuInit": [_Uint],
    "cuDriverGetVersion": [_IntOut],
    "cuGetErrorName": [ctypes.c_int, _Text],
    "cuGetErrorString": [ctypes.c_int, _Text],
    "cuDeviceGet": [_IntOut, ctypes.c_int],
    "cuDeviceGetAttribute": [_IntOut, ctypes.c_int, ctypes.c_int],
    "cuDevicePrimaryCtxRetain": [_Out, ctypes.c_int],
    "cuCtxPushCurrent_v2": [_Handle],
    "cuCtxPopCurrent_v2": [_Out],
    "cuModuleLoadData": [_Out, ctypes.c_char_p],
    "cuModuleUnload": [_Handle],
    "cuModuleGetFunction": [_Out, _Handle, ctypes.c_char_p],
    "cuFuncSetAttribute": [_Handle, ctypes.c_int, ctypes.c_int],
    "cuStreamIsCapturing": [_Handle, _IntOut],
    "cuThreadExchangeStreamCaptureMode": [_IntOut],
    # address, value, bytes, stream
    "cuMemsetD8Async": [ctypes.c_uint64, ctypes.c_ubyte, ctypes.c_size_t, _Handle],
    # function, grid, block, dynamic shared bytes, stream, parameters, extra
    "cuLaunchKernel": [_Handle, *[_Uint] * 6, _Uint, _Handle, ctypes.c_void_p, ctypes.c_void_p],
}

# Of CUDA 12 and later. Map, data type, rank, address, sizes, strides, box, element strides,
# interleave, swizzle, promotion in L2, what is out of bounds.
_ENCODE: Final = "cuTensorMapEncodeTiled"
_ENCODE_SIGNATURE: Final[list[Any]] = [
    _Handle,
    ctypes.c_int,
    _Uint,
    _Handle,
    *[ctypes.POINTER(ctypes.c_uint64)] * 2,
    *[ctypes.POINTER(_Uint)] * 2,
    *[ctypes.c_int] * 4,
]

_Parameters = ctypes.c_char_p * 1


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute, whose value is a union of 64 bytes."""

    _fields_ = (
        ("id", ctypes.c_int),
        ("pad", ctypes.c_char * 4),
        ("value", ctypes.c_int),
        ("rest", ctypes.c_char * 60),
    )


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", _Uint * 3),
        ("block", _Uint * 3),
        ("shared_bytes", _Uint),
        ("stream", _Handle),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("attribute_count", _Uint),
    )


_LAUNCH_EX: Final = "cuLaunchKernelEx"
# configuration, function, parameters, extra
_LAUNCH_EX_SIGNATURE: Final = [ctypes.POINTER(_Config), _Handle, ctypes.c_void_p, ctypes.c_void_p]
_PROGRAMMATIC_STREAM_SERIALIZATION: Final = 6  # CUlaunchAttributeID
_DEPENDENT: Final = ctypes.pointer(_Attribute(id=_PROGRAMMATIC_STREAM_SERIALIZATION, value=1))


class DriverError(SageError, RuntimeError):
    """A call of the CUDA driver failed.

    Attributes:
        code: the CUresult.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Launch:
    """A kernel that is loaded on a device, ready to be launched, from any thread."""

    __slots__ = (
        "_device",
        "_driver",
        "_function",
        "_launch",
        "_launch_ex",
        "_shared_bytes",
        "_threads",
    )

    def __init__(
        self, driver: Driver, device: int, function: int, *, threads: int, shared_bytes: int
    ) -> None:
        self._driver = driver
        self._device = device
        self._function = function
        self._launch = driver.functions["cuLaunchKernel"]
        self._launch_ex = driver.launch_ex
        self._threads = threads
        self._shared_bytes = shared_bytes

    def __call__(self, blocks: int, stream: int, params: bytes, *, dependent: bool = False) -> None:
        """Start the kernel; the call returns before it ends.

        Args:
            blocks: of a one-dimensional grid.
            stream: a CUstream of the kernel's device. The context of that device is the thread's
                current one, as it is inside ``torch.cuda.device``, or it has none yet.
            params: the kernel's struct, which the driver copies. It is immutable, so that nothing
                is shared between threads.
            dependent: the kernel waits itself for the launch before it in the stream, so that its
                blocks may begin before that has ended. Where the driver cannot do that, they begin
                afterwards.

        Raises:
            DriverError: the driver refuses, or an earlier kernel failed.
        """
        call = self._call_dependent if dependent else self._call
        status = call(blocks, stream, params)
        if status == _INVALID_CONTEXT:  # a thread that has not used the device
            with self._driver.context(self._device):
                status = call(blocks, stream, params)
        if status != SUCCESS:
            raise self._driver.error("cuLaunchKernel", status)

    def _call_dependent(self, blocks: int, stream: int, params: bytes) -> int:
        if self._launch_ex is None:
            return self._call(blocks, stream, params)
        config = _Config(
            grid=(blocks, 1, 1),
            block=(self._threads, 1, 1),
            shared_bytes=self._shared_bytes,
            stream=stream,
            attributes=_DEPENDENT,
            attribute_count=1,
        )
        status: int = self._launch_ex(config, self._function, _Parameters(params), None)
        return self._call(blocks, stream, params) if status == _NOT_SUPPORTED else status

    def _call(self, blocks: int, stream: int, params: bytes) -> int:
        status: int = self._launch(
            self._function,
            blocks,
            1,
            1,
            self._threads,
            1,
            1,
            self._shared_bytes,
            stream,
            _Parameters(params),
            None,
        )
        return status


class Driver:
    """A loaded and initialized driver; threads may share it."""

    def __init__(self, path: str) -> None:
        """Raises KernelUnavailableError when there is no such driver, or no device for it."""
        try:
            library = ctypes.CDLL(path)
            self.functions = {
                name: _function(library, name, types) for name, types in _SIGNATURES.items()
            }
        except (OSError, AttributeError) as error:
            raise KernelUnavailableError(
                f"there is no CUDA driver: {error}; install NVIDIA's driver, or use a recipe that "
                "this machine has kernels for"
            ) from None
        newer = hasattr(library, _ENCODE)
        self._encode = _function(library, _ENCODE, _ENCODE_SIGNATURE) if newer else None
        self._contexts: dict[int, int] = {}
        self._lock = threading.Lock()
        status = self.functions["cuInit"](0)
        if status != SUCCESS:
            raise KernelUnavailableError(f"the CUDA driver {path}: {self._describe(status)}")
        self.launch_ex = None  # where launches cannot depend on one another, or not in a graph
        if self._version() >= _KEEPS_DEPENDENCE:
            self.launch_ex = _function(library, _LAUNCH_EX, _LAUNCH_EX_SIGNATURE)

    def capability(self, device: int) -> tuple[int, int]:
        """The compute capability of a device, major and minor."""
        handle = self._device(device)
        major, minor = ctypes.c_int(), ctypes.c_int()
        for value, attribute in zip((major, minor), _COMPUTE_CAPABILITY, strict=True):
            self._call("cuDeviceGetAttribute", value, attribute, handle)
        return major.value, minor.value

    def multiprocessors(self, device: int) -> int:
        """How many multiprocessors a device has."""
        found = ctypes.c_int()
        handle = self._device(device)
        self._call("cuDeviceGetAttribute", found, _MULTIPROCESSOR_COUNT, handle)
        return found.value

    def clear(self, address: int, size: int, device: int, stream: int) -> None:
        """Set bytes of a device's memory to zero, in the order of a stream of it.

        Raises:
            DriverError: the driver refuses, or an earlier kernel failed.
        """
        arguments = (address, 0, size, stream)
        status = self.functions["cuMemsetD8Async"](*arguments)
        if status == _INVALID_CONTEXT:  # a thread that has not used the device
            with self.context(device):
                status = self.functions["cuMemsetD8Async"](*arguments)
        self._check("cuMemsetD8Async", status)

    def encode(self, tensor: TensorMap) -> bytes | None:
        """What a kernel takes of a tensor whose boxes it copies; None where the driver has none."""
        return None if self._encode is None else tensor.encoded(self._encode)

    def is_capturing(self, stream: int) -> bool:
        """Whether a CUDA graph is being captured on a stream of the thread's current context."""
        status = ctypes.c_int()
        code = self.functions["cuStreamIsCapturing"](stream, status)
        if code == _CAPTURE_IMPLICIT:
            return True
        self._check("cuStreamIsCapturing", code)
        return status.value != 0

    def load(
        self, image: bytes, symbol: str, device: int, *, threads: int, shared_bytes: int
    ) -> Launch:
        """Load an image with one kernel on a device, for as long as the process lives.

        Args:
            threads: of a block.
            shared_bytes: dynamic shared memory of a block.

        Raises:
            KernelUnavailableError: the image is not for this device, or has no such kernel.
            DriverError: something else is wrong.
        """
        module, function = _Handle(), _Handle()
        with self.context(device), self._without_disturbing_captures():
            try:
                self._call("cuModuleLoadData", module, image)
                self._call("cuModuleGetFunction", function, module, symbol.encode())
                if shared_bytes > _SHARED_BYTES_UNASKED:
                    attribute = _MAX_DYNAMIC_SHARED_BYTES
                    self._call("cuFuncSetAttribute", function, attribute, shared_bytes)
            except DriverError as error:
                if module:
                    self._call("cuModuleUnload", module)
                if error.code not in _NOT_FOR_HERE:
                    raise
                version = self._version()
                raise KernelUnavailableError(
                    f"{symbol} on device {device}: {error}; the driver is for CUDA "
                    f"{version // 1000}.{version % 1000 // 10}: if a newer one made the kernel, "
                    "update the driver, or compile with an older one"
                ) from None
        assert function.value is not None
        return Launch(self, device, function.value, threads=threads, shared_bytes=shared_bytes)

    @contextlib.contextmanager
    def context(self, device: int) -> Iterator[None]:
        """Make a device's primary context the thread's current one."""
        self._call("cuCtxPushCurrent_v2", self._context(device))
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent_v2", _Handle())

    def _version(self) -> int:
        """The newest CUDA that the driver is for, 13000 for 13.0."""
        version = ctypes.c_int()
        self._call("cuDriverGetVersion", version)
        return version.value

    @contextlib.contextmanager
    def _without_disturbing_captures(self) -> Iterator[None]:
        """Let this thread load while other threads capture graphs of their own."""
        mode = ctypes.c_int(_CAPTURE_MODE_RELAXED)
        self._call("cuThreadExchangeStreamCaptureMode", mode)
        try:
            yield
        finally:
            self._call("cuThreadExchangeStreamCaptureMode", mode)

    def error(self, call: str, status: int) -> DriverError:
        """The exception for a call that returned this status."""
        return DriverError(f"{call}: {self._describe(status)}", status)

    def _context(self, device: int) -> int:
        with self._lock:
            found = self._contexts.get(device)
            if found is None:
                context = _Handle()
                # Never released: what is loaded stays, and the runtime keeps it as well.
                self._call("cuDevicePrimaryCtxRetain", context, self._device(device))
                assert context.value is not None
                found = self._contexts[device] = context.value
        return found

    def _device(self, device: int) -> int:
        handle = ctypes.c_int()
        self._call("cuDeviceGet", handle, device)
        return handle.value

    def _call(self, name: str, *arguments: object) -> None:
        self._check(name, self.functions[name](*arguments))

    def _check(self, name: str, status: int) -> None:
        if status != SUCCESS:
            raise self.error(name, status)

    def _describe(self, status: int) -> str:
        """The name and the words of a CUresult."""
        name, words = ctypes.c_char_p(), ctypes.c_char_p()
        self.functions["cuGetErrorName"](status, name)
        self.functions["cuGetErrorString"](status, words)
        if name.value is None or words.value is None:
            return f"CUresult {status}"
        return f"{name.value.decode()} ({status}), {words.value.decode()}"


@cache
def system_driver() -> Driver:
    """The machine's driver, or the one that SAGE_CUDA_DRIVER names, loaded once.

    Raises:
        KernelUnavailableError: there is none.
    """
    return Driver(os.environ.get("SAGE_CUDA_DRIVER") or _SYSTEM_DRIVER)


def _function(library: ctypes.CDLL, name: str, types: list[Any]) -> Any:
    function = library[name]  # a new object: the types are set on nobody else's
    function.argtypes = types
    return function
