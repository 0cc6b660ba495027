"""How close two computations of one body, or a body and the reference, are."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor

from tests.compiler.kernels.dense import Call
from tests.tolerances import LEAST_LSE, rel_l1

# Sums in another order move codes across ties: of Q and K, and with FP8 of P and V by a sixteenth.
# Of one output max|O' - O| / max|V|; worst measured over 350 calls of `random_call` against the
# reference: int4_fp8 .026, int8_fp8 .021, int4_fp16 .0022, int8_int8 .0016, others 7e-4; of the
# LSE, relative to 1 + |LSE|, .0024. Over an output, relative L1: int4 8e-4, int8_fp8 6e-4,
# others 3e-4.
MAX_ABS: Final[Mapping[str, float]] = MappingProxyType(
    {
        "int4_fp8": 0.05,
        "int4_fp16": 0.01,
        "int8_fp8": 0.05,
        "int8_fp16": 0.003,
        "int8_int8": 0.005,
        "int8_int16": 0.003,
        "exact": 3e-6,
        "auto": 3e-6,
    }
)
REL_L1: Final = 2e-3
LSE: Final = 5e-3
FEWEST_ELEMENTS: Final = 256


def assert_close(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], call: Call, recipe: str
) -> None:
    """The outputs are the same but for rounding, and NaN and infinite in the same places."""
    a, e = actual["output"].double(), expected["output"].double()
    assert a.shape == e.shape
    assert torch.equal(a.isnan(), e.isnan()), f"{recipe}: NaN in different places"
    a, e = a[~e.isnan()], e[~e.isnan()]
    if a.numel():
        eps = torch.finfo(actual["output"].dtype).eps
        unit = float(call.value.double().nan_to_num(0.0, 0.0, 0.0).abs().max())
        error = float((a - e).abs().max())
        allowed = MAX_ABS[recipe] * unit + eps * float(e.abs().max())
        assert error <= allowed, f"{recipe}: max|O' - O| = {error:.3g}, allowed {allowed:.3g}"
        if a.numel() >= FEWEST_ELEMENTS:
            assert rel_l1(a, e) <= REL_L1 + eps, f"{recipe}: relative L1 {rel_l1(a, e):.3g}"
    a, e = actual["lse"].double(), expected["lse"].double()
    assert torch.equal(a.isfinite(), e.isfinite()), f"{recipe}: LSE of dead rows differs"
    placed = e.isfinite() & (e > LEAST_LSE)
    limit = 1e-5 if MAX_ABS[recipe] < 1e-5 else LSE
    a, e = a[placed], e[placed]
    assert ((a - e).abs() <= limit * (1 + e.abs())).all(), f"{recipe}: LSE"
