"""Loading and launching, on the driver look-alike, which runs kernels on the CPU."""

import gc
import os
import threading
import time
import timeit
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from sage_compiler.errors import KernelUnavailableError
from sage_compiler.kernels.cuda import driver as driver_module
from sage_compiler.kernels.cuda.driver import Driver, DriverError, Launch
from sage_compiler.kernels.cuda.loader import Loader
from sage_compiler.kernels.cuda.spec import KernelSpec
from tests.compiler.kernels.cuda.toy import TOY, ToySpec, source
from tests.cutlass_templates import host

pytestmark = pytest.mark.skipif(host.missing() is not None, reason=str(host.missing()))

STREAM = 0
LARGE = ToySpec("sm_80", "float16", 64, bytes=64 << 10)


@pytest.fixture
def look_alike() -> Iterator[host.Host]:
    found = host.Host()
    yield found
    found.reset()


@pytest.fixture
def driver(look_alike: host.Host) -> Driver:
    return Driver(str(host.driver()))


class HostBuilder:
    """Compiles for the CPU, and counts."""

    def __init__(self) -> None:
        self.built: list[str] = []

    def __call__(self, spec: KernelSpec) -> bytes:
        assert isinstance(spec, ToySpec)
        self.built.append(spec.symbol)
        return host.compile_kernel(source(spec), spec.symbol)


@pytest.fixture
def builder() -> HostBuilder:
    return HostBuilder()


@pytest.fixture
def loader(driver: Driver, builder: HostBuilder) -> Loader:
    return Loader(driver, builder)


def run(launch: Launch, count: int = 100, scale: float = 0.5) -> torch.Tensor:
    output = torch.full((count,), -1.0)
    launch(2, STREAM, TOY.params.pack(output.data_ptr(), count, scale, 0.0))
    return output


def expected(count: int = 100, scale: float = 0.5) -> torch.Tensor:
    return torch.arange(count) * scale


def test_a_launch_runs_the_kernel(loader: Loader, look_alike: host.Host) -> None:
    torch.testing.assert_close(run(loader.loaded(TOY, 0, STREAM)), expected(), rtol=0, atol=0)
    (logged,) = look_alike.launches()
    assert (logged["symbol"], logged["grid"], logged["block"]) == (TOY.symbol, 2, 64)


def test_the_struct_is_the_launchs_own(loader: Loader) -> None:
    launch = loader.loaded(TOY, 0, STREAM)
    outputs = [torch.empty(100) for _ in range(3)]
    for i, output in enumerate(outputs):
        launch(2, STREAM, TOY.params.pack(output.data_ptr(), 100, float(i), 0.0))
        gc.collect()
    for i, output in enumerate(outputs):
        torch.testing.assert_close(output, expected(scale=float(i)), rtol=0, atol=0)


def test_more_shared_memory_than_48_KiB_is_asked_for(loader: Loader, look_alike: host.Host) -> None:
    run(loader.loaded(LARGE, 0, STREAM))
    assert look_alike.launches()[0]["shared_bytes"] == LARGE.shared_bytes


def test_a_kernel_is_loaded_once_on_a_device(loader: Loader, builder: HostBuilder) -> None:
    assert loader.loaded(TOY, 0, STREAM) is loader.loaded(TOY, 0, STREAM)
    assert builder.built == [TOY.symbol]


def test_each_device_has_its_own(loader: Loader, look_alike: host.Host) -> None:
    look_alike.library.sage_host_set_devices(2)
    first, second = (loader.loaded(TOY, device, STREAM) for device in (0, 1))
    assert first is not second
    run(first)
    with loader.driver.context(1):
        run(second)
    contexts = [logged["context"] for logged in look_alike.launches()]
    assert len(set(contexts)) == 2
    with pytest.raises(DriverError, match=r"CUDA_ERROR_INVALID_HANDLE \(400\)"):
        run(second)  # device 0's context is current


def test_loading_leaves_the_current_context_alone(
    loader: Loader, look_alike: host.Host, driver: Driver
) -> None:
    look_alike.library.sage_host_set_devices(2)
    loader.loaded(TOY, 1, STREAM)
    run(loader.loaded(TOY, 0, STREAM))


def test_many_threads_load_a_kernel_once(driver: Driver, builder: HostBuilder) -> None:
    barrier = threading.Barrier(8)

    def build(spec: KernelSpec) -> bytes:
        time.sleep(0.1)  # in which the others ask for it too
        return builder(spec)

    loader = Loader(driver, build)

    def work(scale: float) -> torch.Tensor:
        barrier.wait()
        return run(loader.loaded(TOY, 0, STREAM), scale=scale)  # a thread that has no context

    with ThreadPoolExecutor(8) as pool:
        outputs = list(pool.map(work, map(float, range(8))))
    assert builder.built == [TOY.symbol]
    for scale, output in enumerate(outputs):
        torch.testing.assert_close(output, expected(scale=float(scale)), rtol=0, atol=0)


def test_a_build_that_fails_is_tried_again(driver: Driver, builder: HostBuilder) -> None:
    failures = iter([KernelUnavailableError("no compiler")])

    def build(spec: KernelSpec) -> bytes:
        for failure in failures:
            raise failure
        return builder(spec)

    loader = Loader(driver, build)
    with pytest.raises(KernelUnavailableError, match="no compiler"):
        loader.loaded(TOY, 0, STREAM)
    run(loader.loaded(TOY, 0, STREAM))


def test_nothing_is_loaded_while_a_graph_is_captured(
    loader: Loader, builder: HostBuilder, look_alike: host.Host
) -> None:
    loader.loaded(TOY, 0, STREAM)
    look_alike.library.sage_host_set_capturing(None, True)
    with pytest.raises(KernelUnavailableError, match="warm up before the capture"):
        loader.loaded(LARGE, 0, STREAM)
    assert builder.built == [TOY.symbol]
    run(loader.loaded(TOY, 0, STREAM))  # loaded before: captured, not run
    (logged,) = look_alike.launches()
    assert logged["captured"]


@pytest.mark.parametrize("image", [b"", b"\x7fELF and then nothing", b"no image at all" * 100])
def test_an_image_for_another_device_is_refused(driver: Driver, image: bytes) -> None:
    loader = Loader(driver, lambda spec: image)
    with pytest.raises(KernelUnavailableError, match=r"CUDA_ERROR_NO_BINARY_FOR_GPU \(209\)"):
        loader.loaded(TOY, 0, STREAM)


def test_an_image_without_the_kernel_is_refused(driver: Driver, builder: HostBuilder) -> None:
    loader = Loader(driver, lambda spec: builder(LARGE))
    with pytest.raises(KernelUnavailableError, match=rf"{TOY.symbol}.*CUDA_ERROR_NOT_FOUND"):
        loader.loaded(TOY, 0, STREAM)


def test_a_launch_that_is_refused_is_said(driver: Driver, builder: HostBuilder) -> None:
    launch = driver.load(builder(TOY), TOY.symbol, 0, threads=32, shared_bytes=0)
    with pytest.raises(DriverError, match=r"cuLaunchKernel: CUDA_ERROR_INVALID_VALUE") as caught:
        run(launch)
    assert caught.value.code == host.CUDA_ERROR_INVALID_VALUE


def test_a_launch_may_depend_on_the_one_before(loader: Loader, look_alike: host.Host) -> None:
    """The toy waits for none, so the executor refuses what would be said wrongly."""
    launch = loader.loaded(TOY, 0, STREAM)
    packed = TOY.params.pack(torch.empty(100).data_ptr(), 100, 0.5, 0.0)
    look_alike.library.sage_host_dry_run(True)
    for stream, dependent in ((0, True), (0x50, True), (0, False)):
        launch(2, stream, packed, dependent=dependent)
        logged = look_alike.launches()[-1]
        assert (logged["stream"], logged["dependent"]) == (stream, dependent)
        assert (logged["grid"], logged["block"]) == (2, 64)
    look_alike.library.sage_host_dry_run(False)
    with pytest.raises(DriverError, match=r"cuLaunchKernel: CUDA_ERROR_LAUNCH_FAILED"):
        launch(2, STREAM, packed, dependent=True)
    with ThreadPoolExecutor(1) as pool:  # a thread that has no context
        look_alike.library.sage_host_dry_run(True)
        pool.submit(launch, 2, STREAM, packed, dependent=True).result()


@pytest.mark.parametrize(("version", "dependent"), [(12020, False), (12030, True)])
def test_drivers_whose_graphs_lose_dependence_have_none(
    version: int, dependent: bool, look_alike: host.Host, builder: HostBuilder
) -> None:
    look_alike.library.sage_host_set_version(version)
    loader = Loader(Driver(str(host.driver())), builder)
    look_alike.library.sage_host_dry_run(True)
    loader.loaded(TOY, 0, STREAM)(2, STREAM, TOY.params.pack(0, 0, 0.0, 0.0), dependent=True)
    assert look_alike.launches()[-1]["dependent"] == dependent


@pytest.mark.parametrize(("code", "launched"), [(801, True), (700, False)])
def test_where_dependence_is_not_supported_there_is_none(
    code: int, launched: bool, driver: Driver, loader: Loader, look_alike: host.Host
) -> None:
    """Other errors are errors."""
    driver.launch_ex = lambda *_: code
    launch = loader.loaded(TOY, 0, STREAM)
    look_alike.library.sage_host_dry_run(True)
    packed = TOY.params.pack(0, 0, 0.0, 0.0)
    if launched:
        launch(2, STREAM, packed, dependent=True)
    else:
        with pytest.raises(DriverError, match="cuLaunchKernel: CUresult 700"):
            launch(2, STREAM, packed, dependent=True)
    assert [each["dependent"] for each in look_alike.launches()] == [False] * launched


def test_an_unknown_device_is_said(loader: Loader) -> None:
    with pytest.raises(DriverError, match="cuDeviceGet: CUDA_ERROR_INVALID_DEVICE"):
        loader.loaded(TOY, 7, STREAM)


def test_the_capability(driver: Driver, look_alike: host.Host) -> None:
    look_alike.library.sage_host_set_capability(8, 9)
    assert driver.capability(0) == (8, 9)


def test_the_multiprocessors(driver: Driver) -> None:
    assert driver.multiprocessors(0) == 1  # what the look-alike has


def test_without_a_driver_there_are_no_kernels() -> None:
    with pytest.raises(KernelUnavailableError, match=r"no CUDA driver: libnone\.so.*install"):
        Driver("libnone.so")
    with pytest.raises(KernelUnavailableError, match=r"no CUDA driver: .*cuInit"):
        Driver("libm.so.6")


def test_the_environment_names_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGE_CUDA_DRIVER", "libnamed.so")
    driver_module.system_driver.cache_clear()
    with pytest.raises(KernelUnavailableError, match=r"libnamed\.so"):
        driver_module.system_driver()


def per_call(work: Callable[[], object]) -> float:
    """Seconds of the fastest of several series."""
    return min(timeit.repeat(work, number=2000, repeat=7)) / 2000


def test_a_launch_takes_less_than_5_microseconds(loader: Loader, look_alike: host.Host) -> None:
    output = torch.empty(100)
    launch, pointer = loader.loaded(TOY, 0, STREAM), output.data_ptr()
    look_alike.library.sage_host_dry_run(True)
    seconds = per_call(lambda: launch(2, STREAM, TOY.params.pack(pointer, 100, 0.5, 0.0)))
    assert seconds < 5e-6 * (3 if os.environ.get("CI") else 1)
