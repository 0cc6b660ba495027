"""The Triton programs on this machine's GPU: `pytest -m gpu tests/compiler/kernels/triton`."""

from __future__ import annotations

import pytest
import torch

from sage_compiler.kernels.triton import kernel
from tests.compiler.kernels.triton.test_interpreted import assert_right, chosen

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.skipif(not kernel.is_installed(), reason="Triton is not installed"),
]


@pytest.mark.parametrize("number", range(200))
def test_random_calls(number: int) -> None:
    found = chosen(number)
    try:
        assert_right(found.call, found.clean, want_lse=found.want_lse, place="cuda")
    except AssertionError as error:
        error.add_note(found.label)
        raise
