"""The kernels of this process: each is loaded once on a device, whoever asks for it first."""

from __future__ import annotations

import threading
from functools import cache
from typing import Final, Protocol

from sage_compiler.errors import KernelUnavailableError
from sage_compiler.kernels.cuda.driver import Driver, Launch, system_driver
from sage_compiler.kernels.cuda.images import default_images
from sage_compiler.kernels.cuda.spec import KernelSpec


class Builder(Protocol):
    """What makes or finds images. Calls from several threads at once are fine."""

    def __call__(self, spec: KernelSpec) -> bytes:
        """The image of a kernel, as the driver loads it.

        Raises:
            KernelUnavailableError: it cannot be made here.
        """


class Loader:
    """Kernels on the devices of one driver; threads may share it."""

    def __init__(self, driver: Driver, build: Builder) -> None:
        self.driver: Final = driver
        self._build = build
        self._loaded: dict[tuple[KernelSpec, int], Launch] = {}
        self._locks: dict[tuple[KernelSpec, int], threading.Lock] = {}
        self._locks_lock = threading.Lock()

    def loaded(self, spec: KernelSpec, device: int, stream: int) -> Launch:
        """A kernel that is ready on a device, compiled and loaded if it is not yet.

        Args:
            stream: where it is going to be launched.

        Raises:
            KernelUnavailableError: it cannot be compiled or loaded, or would have to be while a
                CUDA graph is being captured on the stream.
            DriverError: the driver fails.
        """
        found = self._loaded.get((spec, device))
        return found if found is not None else self._load(spec, device, stream)

    def _load(self, spec: KernelSpec, device: int, stream: int) -> Launch:
        with self.driver.context(device):  # a thread may not have one yet
            is_capturing = self.driver.is_capturing(stream)
        if is_capturing:
            raise KernelUnavailableError(
                f"{spec.symbol} is not loaded, and nothing can be while a CUDA graph is captured; "
                "warm up before the capture: run the same call once outside of it"
            )
        name = (spec, device)
        with self._locks_lock:
            lock = self._locks.setdefault(name, threading.Lock())
        with lock:  # the others wait, and find it loaded
            if name not in self._loaded:
                self._loaded[name] = self.driver.load(
                    self._build(spec),
                    spec.symbol,
                    device,
                    threads=spec.threads,
                    shared_bytes=spec.shared_bytes,
                )
            return self._loaded[name]


def default_loader() -> Loader:
    """The process's loader: the machine's driver, and the images that it has or can make.

    Raises:
        KernelUnavailableError: there is no driver.
    """
    with _default_lock:  # a cache alone would let two threads make two
        return _make_default_loader()


_default_lock: Final = threading.Lock()


@cache
def _make_default_loader() -> Loader:
    return Loader(system_driver(), default_images())
