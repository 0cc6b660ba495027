"""The driver look-alike for the tests of kernels on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cutlass_templates.host import Host


@pytest.fixture(scope="session")
def _loaded() -> Host:
    return Host()


@pytest.fixture
def host(_loaded: Host) -> Iterator[Host]:
    """As at the start, and reset afterwards; modules stay loaded."""
    _loaded.reset()
    yield _loaded
    _loaded.reset()
