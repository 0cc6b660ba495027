"""The bodies on random calls, against the reference and against attention in float64."""

from __future__ import annotations

import pytest

from sage_compiler.kernels import reference
from sage_compiler.precision import EXACT, PRECISIONS, RECIPES
from tests.compiler.kernels.dense import dense, random_call
from tests.compiler.onnx.bodies import model_of, run, session, variant_of
from tests.compiler.onnx.closeness import assert_close
from tests.tolerances import check, check_lse


@pytest.mark.parametrize("recipe", PRECISIONS)
@pytest.mark.parametrize("first", range(0, 40, 10))
def test_random_calls(recipe: str, first: int) -> None:
    for seed in range(first, first + 10):
        call = random_call(seed, longest=200)
        model = model_of(call, variant_of(call, recipe), dynamic=seed % 3 != 0)
        got = run(session(model, optimize=seed % 2 == 0), call)
        expected, expected_lse = dense(call)
        name = recipe if recipe in RECIPES else EXACT
        check(got["output"], expected, call.value, name)
        check_lse(got["lse"], expected_lse, name)
        if recipe in RECIPES:
            output, lse = reference.attention(
                call.query,
                call.key,
                call.value,
                RECIPES[recipe],
                call.semantics,
                attn_mask=call.attn_mask,
                sinks=call.sinks,
            )
            assert_close(got, {"output": output, "lse": lse}, call, recipe)
