"""The codes of Q, K, V and P in the bodies, against the formulas in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sage_compiler.onnx.bodies.quantized import (
    KEY_CODES,
    QUERY_CODES,
    VALUE_CODES,
    WEIGHT_CODES,
)
from sage_compiler.precision import RECIPES, Format, Recipe
from tests.compiler.kernels.dense import random_call
from tests.compiler.onnx.bodies import model_of, run, session, variant_of, with_codes
from tests.compiler.onnx.operands import operands, rounded, weights

# Of the operand's size, float32 against float64. Within it of a tie, both neighbours are right.
ROUNDING = 1e-5
SCORE_ROUNDING = 2e-4  # of P: scores reach some tens


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("first", range(0, 24, 8))
def test_codes(recipe: Recipe, first: int) -> None:
    for seed in range(first, first + 8):
        call = random_call(seed, longest=300)
        model = with_codes(model_of(call, variant_of(call, recipe.name)))
        got = run(session(model, optimize=seed % 2 == 0), call)
        expected = operands(call, recipe)
        key_length = call.key.shape[2]

        query = got[QUERY_CODES].squeeze(2)
        key, value = (got[name].flatten(2, 4) for name in (KEY_CODES, VALUE_CODES))
        assert (key[:, :, key_length:] == 0).all() and (value[:, :, key_length:] == 0).all()
        key, value = key[:, :, :key_length], value[:, :, :key_length]
        # (B, Hkv, T, G, Lq, n) -> (B, Hkv, G, Lq, Lk)
        p = got[WEIGHT_CODES].permute(0, 1, 3, 4, 2, 5).flatten(4, 5)
        assert (p[..., key_length:] == 0).all()
        p = p[..., :key_length]

        _assert_rounded(query, expected.query, recipe.qk, ROUNDING * 127)
        _assert_rounded(key, expected.key, recipe.qk, ROUNDING * 127)
        v_format = Format.INT8 if recipe.pv is Format.INT16 else recipe.pv
        _assert_rounded(value, expected.value, v_format, ROUNDING * 127)
        expected_p = weights(call, recipe, expected, query, key)
        _assert_rounded(p, expected_p, recipe.pv, expected_p.abs() * SCORE_ROUNDING)


def _assert_rounded(
    codes: Tensor, exact: Tensor, number_format: Format, margin: float | Tensor
) -> None:
    """The codes are what ``exact`` rounds to, or a neighbour within ``margin`` of a tie."""
    assert codes.shape == exact.shape
    assert (codes >= rounded(exact - margin, number_format)).all()
    assert (codes <= rounded(exact + margin, number_format)).all()
    assert torch.isfinite(codes).all()
