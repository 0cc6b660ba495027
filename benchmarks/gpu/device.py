"""The GPU, as the checks and the timings use it; tests put something else in its place."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import torch
from torch import Tensor

from benchmarks.gpu.presence import missing
from sage_compiler.errors import KernelUnavailableError
from sage_compiler.kernels.cuda import toolchain
from sage_compiler.kernels.cuda.arch import arch_of
from sage_compiler.kernels.cuda.driver import system_driver
from sage_compiler.kernels.cuda.images import default_images
from sage_compiler.kernels.cuda.kernel import Allocate, Target, allocate
from sage_compiler.kernels.cuda.loader import Loader, default_loader
from sage_compiler.kernels.cuda.parallel import each
from sage_compiler.kernels.cuda.spec import KernelSpec
from tests.compiler.kernels.dense import Call

Result = TypeVar("Result")

# Writes of 256 MiB each keep a stream busy for milliseconds, a launch takes microseconds.
_BUSY_BYTES: Final = 1 << 28
_BUSY_WRITES: Final = 64


class Device(Protocol):
    """A GPU that runs the kernels of an architecture.

    Attributes:
        arch: a key of ``arch.ARCHS``.
        index: the number of the device.
        place: where its tensors are.
        loader: where its kernels come from.
    """

    arch: str
    index: int
    place: torch.device
    loader: Loader

    def machine(self) -> dict[str, str]:
        """What results belong to: gpu, driver, torch, cuda, and more."""

    def free_bytes(self) -> int:
        """Memory that is not in use."""

    def cache_bytes(self) -> int:
        """The size of its last-level cache."""

    def no_compiler(self) -> str | None:
        """Why kernels that no pack has cannot be compiled here, or None if they can."""

    def build(self, specs: Sequence[KernelSpec]) -> Iterator[str | None]:
        """Make the kernels' images available; for each None, or why there is none."""

    def fresh_loader(self) -> Loader:
        """A loader that has loaded nothing yet."""

    def stream(self) -> int:
        """The CUstream that this thread's work goes to."""

    def other_stream(self) -> AbstractContextManager[None]:
        """Inside, this thread's work goes to a stream of its own, also in a new thread."""

    def occupy(self) -> None:
        """Give the current stream work for some milliseconds."""

    def synchronize(self) -> None:
        """Wait until the device has done everything."""

    def capture(self, work: Callable[[], Result]) -> tuple[Result, Callable[[], None]]:
        """Record what ``work`` launches as a graph: what it returns, and how to replay it."""

    def milliseconds(self, work: Callable[[], object]) -> float:
        """How long the device takes for what ``work`` launches."""

    def attention(self, call: Call, recipe: str) -> Tensor:
        """The output by the way that users take, the operator."""


def target(device: Device, scratch: Allocate = allocate, loader: Loader | None = None) -> Target:
    """Where kernels are launched: the current stream of a device."""
    kernels = loader or device.loader
    return Target(device.arch, device.index, device.stream(), kernels, scratch)


class CudaDevice:
    """A GPU of PyTorch's, made the current one of this thread."""

    def __init__(self, index: int) -> None:
        """Raises KernelUnavailableError when there is no such device, or no kernel for it."""
        reason = missing(index)
        if reason is not None:
            raise KernelUnavailableError(reason)
        self.arch = arch_of(torch.cuda.get_device_capability(index)).name
        self.index = index
        self.place = torch.device("cuda", index)
        self.loader = default_loader()
        torch.cuda.set_device(index)
        self._properties: Any = torch.cuda.get_device_properties(index)

    def machine(self) -> dict[str, str]:
        major, minor = torch.cuda.get_device_capability(self.index)
        return {
            "gpu": self._properties.name,
            "driver": _driver_version(),
            "torch": torch.__version__,
            "cuda": str(torch.version.cuda),
            "cudnn": str(torch.backends.cudnn.version()),
            "capability": f"{major}.{minor}",
            "arch": self.arch,
            "memory": f"{self._properties.total_memory / 2**30:.0f} GiB",
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        }

    def free_bytes(self) -> int:
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.index)[0]

    def cache_bytes(self) -> int:
        return int(self._properties.L2_cache_size)

    def no_compiler(self) -> str | None:
        try:
            toolchain.find()
        except KernelUnavailableError as error:
            return str(error)
        return None

    def build(self, specs: Sequence[KernelSpec]) -> Iterator[str | None]:
        return each(_why_no_image, specs, os.cpu_count() or 1)

    def fresh_loader(self) -> Loader:
        return Loader(system_driver(), default_images())

    def stream(self) -> int:
        return torch.cuda.current_stream(self.index).cuda_stream

    @contextlib.contextmanager
    def other_stream(self) -> Iterator[None]:
        with torch.cuda.device(self.index), torch.cuda.stream(torch.cuda.Stream(self.index)):
            yield

    def occupy(self) -> None:
        memory = torch.empty(_BUSY_BYTES, dtype=torch.uint8, device=self.place)
        for value in range(_BUSY_WRITES):
            memory.fill_(value)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.index)

    def capture(self, work: Callable[[], Result]) -> tuple[Result, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = work()
        return result, graph.replay

    def milliseconds(self, work: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    def attention(self, call: Call, recipe: str) -> Tensor:
        semantics = call.semantics
        output: Tensor = torch.ops.sage.attention.default(
            call.query,
            call.key,
            call.value,
            call.attn_mask,
            str(semantics.mask_class),
            semantics.scale,
            recipe,
            0,  # min_seq_len
            str(semantics.dead_rows),
            semantics.softcap,
            call.sinks,
            semantics.window_left,
            semantics.window_right,
        )
        return output


def _why_no_image(spec: KernelSpec) -> str | None:
    """None when the packs or the cache have the image now; in a process of its own."""
    try:
        default_images()(spec)
    except KernelUnavailableError as error:
        return str(error)
    return None


def _driver_version() -> str:
    """The version of NVIDIA's driver, as nvidia-smi or the kernel's module names it."""
    path = shutil.which("nvidia-smi")
    if path is not None:
        command = [path, "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.split()[0]
    module = Path("/proc/driver/nvidia/version")
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", module.read_text()) if module.exists() else None
    return found[0] if found else "unknown"
