"""One table of what each recipe may differ from exact attention, and the metrics it is in.

Metrics, flattened over the output in float64, as in SageAttention (arXiv 2410.02367) and
SageAttention2 (arXiv 2411.10958): cosine similarity, relative L1, RMSE.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Limits of one recipe.

    Attributes:
        cosine: least cosine similarity.
        rel_l1: greatest sum|O' - O| / sum|O|.
        max_abs: greatest max|O' - O| / max|V|; holds for an output of a single element too.
        lse: greatest absolute error of the LSE, natural units.
    """

    cosine: float
    rel_l1: float
    max_abs: float
    lse: float


# Q, K, V gaussian with standard deviation 1, K with a channel bias of up to 3 standard deviations,
# a scale of at most 1 / sqrt(D), so scores with a standard deviation of about 1 beside the bias.
# Sharper scores have larger errors: an error of a score is relative to the amax of Q and K.
# Worst measured of 1800 calls of `dense.random_call`, lengths 1 to 200, and 40 up to 1500; of
# int8_int8 and int8_int16, which have an error of their own in each block of 256 keys, of 5400
# and 160:
#               cosine   rel_l1  max_abs  lse
#   int4_fp8    .9781    .210    .28      .76
#   int4_fp16   .9788    .207    .27      .76
#   int8_fp8    .9985    .055    .036     .042    (few keys, or sinks: the E4M3 of V unaveraged)
#   int8_fp16   .99993   .011    .014     .042
#   int8_int8   .99985   .016    .020     .058    (lse: its denominator is the rounded P)
#   int8_int16  .99992   .012    .016     .042
#   exact       float32 SDPA: max_abs 5.3e-7; 3e-6 is 1e-5 absolute for V of unit variance
TOLERANCES: Final[Mapping[str, Tolerance]] = MappingProxyType(
    {
        "int4_fp8": Tolerance(cosine=0.965, rel_l1=0.28, max_abs=0.42, lse=1.1),
        "int4_fp16": Tolerance(cosine=0.965, rel_l1=0.28, max_abs=0.42, lse=1.1),
        "int8_fp8": Tolerance(cosine=0.997, rel_l1=0.08, max_abs=0.055, lse=0.065),
        "int8_fp16": Tolerance(cosine=0.9998, rel_l1=0.018, max_abs=0.022, lse=0.065),
        "int8_int8": Tolerance(cosine=0.9995, rel_l1=0.027, max_abs=0.04, lse=0.1),
        "int8_int16": Tolerance(cosine=0.9998, rel_l1=0.018, max_abs=0.022, lse=0.065),
        "exact": Tolerance(cosine=0.999999, rel_l1=1e-5, max_abs=3e-6, lse=1e-5),
    }
)

# Averages mean little over few elements, or where the output is nearly zero beside V.
FEWEST_ELEMENTS: Final = 1024
LEAST_OUTPUT: Final = 1e-3

# Rows of finite masks have an LSE near finfo.min, which float32 cannot place exactly.
LEAST_LSE: Final = -1e30


def cosine(actual: Tensor, expected: Tensor) -> float:
    """Cosine similarity of the flattened outputs."""
    a, e = actual.double().flatten(), expected.double().flatten()
    return float(a @ e / (a.norm() * e.norm()))


def rel_l1(actual: Tensor, expected: Tensor) -> float:
    """sum|actual - expected| / sum|expected|."""
    a, e = actual.double(), expected.double()
    return float((a - e).abs().sum() / e.abs().sum())


def rmse(actual: Tensor, expected: Tensor) -> float:
    """Root of the mean squared error."""
    return float((actual.double() - expected.double()).square().mean().sqrt())


def check(actual: Tensor, expected: Tensor, value: Tensor, recipe_name: str) -> None:
    """Assert that an output is within the recipe's row of ``TOLERANCES``.

    Args:
        actual: the output under test; its dtype's rounding is allowed on top.
        expected: the same shape, from a float64 or float32 computation.
        value: V, without what no query sees; max|V| is the unit of ``max_abs``.
        recipe_name: a recipe, or "exact".

    Raises:
        AssertionError: outside, with the numbers; or NaN in different places.
    """
    limit = TOLERANCES[recipe_name]
    assert actual.shape == expected.shape, f"{actual.shape} != {expected.shape}"
    a, e = actual.double(), expected.double()
    finite = ~e.isnan()
    assert torch.equal(a.isnan(), e.isnan()), f"{recipe_name}: NaN in different places"
    if not finite.any():
        return
    a, e = a[finite], e[finite]
    largest, unit = float(e.abs().max()), float(value.double().abs().max())
    rounding = torch.finfo(actual.dtype).eps
    error = float((a - e).abs().max())
    allowed = limit.max_abs * unit + rounding * largest
    assert error <= allowed, (
        f"{recipe_name}: max|O' - O| = {error:.3g}, allowed {allowed:.3g} (max|V| = {unit:.3g})"
    )
    if e.numel() < FEWEST_ELEMENTS or float(e.abs().mean()) <= LEAST_OUTPUT * unit:
        return
    measured_cosine, measured_l1 = cosine(a, e), rel_l1(a, e)
    assert measured_cosine >= limit.cosine - rounding, (
        f"{recipe_name}: cosine {measured_cosine:.6f}, at least {limit.cosine}"
    )
    assert measured_l1 <= limit.rel_l1 + rounding, (
        f"{recipe_name}: relative L1 {measured_l1:.4g}, at most {limit.rel_l1}"
    )


def check_lse(actual: Tensor, expected: Tensor, recipe_name: str) -> None:
    """Assert that an LSE is within the recipe's row, and -inf in the same places."""
    limit = TOLERANCES[recipe_name].lse
    low = expected < LEAST_LSE
    assert torch.equal(actual < LEAST_LSE, low), f"{recipe_name}: LSE of dead rows differs"
    if low.all():
        return
    a, e = actual[~low].double(), expected[~low].double()
    error = (a - e).abs() - 1e-6 * e.abs()
    worst = float(error.max())
    assert worst <= limit, f"{recipe_name}: LSE off by {worst:.3g}, at most {limit}"
