"""The Triton programs on this machine's GPU: `pytest -m gpu tests/compiler/kernels/triton`."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from sage_compiler.kernels import reference
from sage_compiler.kernels.triton import kernel
from sage_compiler.precision import RECIPES
from tests.compiler.kernels.cuda.random_calls import distance, random_call
from tests.compiler.kernels.dense import Call, dense
from tests.compiler.kernels.triton.test_interpreted import (
    DISTANCE,
    DISTANCE_OF_FEW,
    FEW_ELEMENTS,
    LSE_DISTANCE,
    RUN,
)
from tests.tolerances import check

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.skipif(not kernel.is_installed(), reason="Triton is not installed"),
]


def on_gpu(call: Call) -> Call:
    def there(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.cuda()

    changes = {
        name: there(getattr(call, name)) for name in ("query", "key", "value", "attn_mask", "sinks")
    }
    return dataclasses.replace(call, **changes)


@pytest.mark.parametrize("number", range(200))
def test_random_calls(number: int) -> None:
    found = random_call(RUN, number)
    here = on_gpu(found.call)
    output, lse = kernel.run(
        here.query,
        here.key,
        here.value,
        here.semantics,
        attn_mask=here.attn_mask,
        sinks=here.sinks,
        want_lse=True,
    )
    clean = found.clean or found.call
    expected, expected_lse = reference.attention(
        clean.query,
        clean.key,
        clean.value,
        RECIPES[kernel.RECIPE],
        clean.semantics,
        attn_mask=clean.attn_mask,
        sinks=clean.sinks,
    )
    limits = DISTANCE if output.numel() > FEW_ELEMENTS else DISTANCE_OF_FEW
    assert distance(output.cpu(), expected) <= limits[output.dtype], found.label
    check(output.cpu(), dense(clean)[0], clean.value, kernel.RECIPE)
    torch.testing.assert_close(lse.cpu(), expected_lse, rtol=1e-6, atol=LSE_DISTANCE)
