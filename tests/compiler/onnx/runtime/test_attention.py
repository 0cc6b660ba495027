"""The operator library's kernels, in ONNX Runtime, against attention from its formula."""

from __future__ import annotations

import pytest

from tests.compiler.kernels.dense import Call, dense, random_call
from tests.compiler.onnx.runtime.models import run
from tests.tolerances import check, check_lse

# recipe -> what serves it.
SERVED = {
    "int4_fp8": "int8_int8",
    "int4_fp16": "int8_int8",
    "int8_fp8": "int8_int8",
    "int8_int8": "int8_int8",
    "int8_fp16": "int8_int16",
    "int8_int16": "int8_int16",
    "exact": "exact",
}


def verify(call: Call, recipe: str) -> None:
    """One call is within the tolerance of what serves its recipe."""
    output, lse = run(call, recipe)
    expected, expected_lse = dense(call)
    check(output, expected, call.value, SERVED[recipe])
    check_lse(lse, expected_lse, SERVED[recipe])


@pytest.mark.parametrize("recipe", SERVED)
def test_random_calls(recipe: str) -> None:
    for seed in range(60):
        verify(random_call(seed), recipe)
