"""Packs of host images, and the driver that executes them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sage_compiler.kernels.cuda.variants import standalone_specs
from tests.compiler.kernels.cuda.emulation import ARCH, the_host
from tests.compiler.onnx.cuda import fake_ort
from tests.compiler.onnx.cuda.fake_ort import Library
from tests.compiler.onnx.cuda.native import Device, TestDriver, opened
from tests.compiler.onnx.cuda.packs import MASKED, Case, pack_of_host_images, pack_of_names
from tests.cutlass_templates.host import Host


@pytest.fixture(scope="session")
def host_packs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Path]:
    """The pack with the kernels of a case, which is made when it is asked for."""

    @functools.cache
    def make(case: Case) -> Path:
        return pack_of_host_images(case.specs(), tmp_path_factory.mktemp("host") / "pack")

    return make


@pytest.fixture(scope="session")
def _driver() -> TestDriver:
    return TestDriver()


@pytest.fixture
def executing(_driver: TestDriver) -> Iterator[TestDriver]:
    """A driver that executes."""
    the_host().reset()
    _driver.reset(executes=True)
    yield _driver
    _driver.reset()
    the_host().reset()


@pytest.fixture
def driver(executing: TestDriver) -> Iterator[TestDriver]:
    """As ``executing``; whatever it was asked for is given back at the end of a test."""
    held = executing.held()
    yield executing
    assert executing.held() == held


@pytest.fixture
def emulated(
    driver: TestDriver, host_packs: Callable[[Case], Path], request: pytest.FixtureRequest
) -> Iterator[Device]:
    """A device of the look-alike, with the kernels of the test's case."""
    case: Case = request.getfixturevalue("case")
    with opened(driver.path, host_packs(case)) as device:
        yield device


@pytest.fixture
def case() -> Case:
    """Of tests that do not name one: one with a mask, the same for all."""
    return MASKED


@pytest.fixture
def host(driver: TestDriver) -> Host:
    """The look-alike that ``driver`` hands launches to."""
    return the_host()


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[TestDriver]:
    """A driver that pretends, which the library finds; nothing stays lent, and no copy is going
    on that nobody has waited for."""
    driver = TestDriver()
    monkeypatch.setenv("SAGE_CUDA_DRIVER", str(driver.path))
    lent = fake_ort.lent()
    fake_ort.warnings()
    yield driver
    assert fake_ort.lent() == lent
    assert driver.held()[2] == 0
    assert driver.copies() == 0
    fake_ort.set_device(0)
    driver.reset()


@pytest.fixture
def library(installed: TestDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Library:
    """The library with all standalone kernels of sm_89, by name."""
    pack = pack_of_names(standalone_specs(ARCH), tmp_path / "pack")
    monkeypatch.setenv("SAGE_KERNEL_PACK", str(pack))
    return Library(tmp_path / "libsage_ort.so")
