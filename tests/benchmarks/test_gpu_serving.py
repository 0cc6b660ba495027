"""The checks of what serves, on the driver look-alike, and kernels that they notice missing."""

from __future__ import annotations

import pytest

from benchmarks.gpu.matrix import Subject
from benchmarks.gpu.serving import SERVING_CHECKS
from benchmarks.gpu.trial import Trial
from sage_compiler.kernels.cuda.variants import variant
from tests.benchmarks.test_gpu import PLAN, SUBJECT, LookAlike, without
from tests.compiler.kernels.cuda import emulation
from tests.cutlass_templates import host

pytestmark = pytest.mark.skipif(host.missing() is not None, reason=str(host.missing()))

# What each check has to miss.
KINDS = {"sequences": "key", "rotary": "quantize", "cache": "append", "cache_graph": "query"}


@pytest.mark.parametrize("name", SERVING_CHECKS)
def test_what_serves_is_checked(name: str) -> None:
    found = Trial(LookAlike(), SUBJECT, PLAN)
    SERVING_CHECKS[name](found)
    assert found.calls >= 2 and found.failures == [] and not found.skipped
    missing = Trial(LookAlike(without(KINDS[name])), SUBJECT, PLAN)
    SERVING_CHECKS[name](missing)
    assert missing.failures


def test_what_has_no_kernels_that_serve_is_skipped() -> None:
    windowed = Subject(variant(emulation.ARCH, "float16", 64, "int8_fp16", window=True))
    for check in SERVING_CHECKS.values():
        found = Trial(LookAlike(), windowed, PLAN)
        check(found)
        assert found.skipped and not found.calls
