"""The bodies on random and on hostile calls, against the reference and attention in float64."""

from __future__ import annotations

from dataclasses import replace
from math import inf, nan

import pytest
import torch
from torch import Tensor

from sage_compiler.kernels import reference
from sage_compiler.precision import EXACT, PRECISIONS, RECIPES
from tests.compiler.kernels.dense import Call, dense, random_call
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
            assert_close(got, expected_of(call, recipe), call, recipe)


def expected_of(call: Call, recipe: str) -> dict[str, Tensor]:
    """What the reference computes."""
    output, lse = reference.attention(
        call.query,
        call.key,
        call.value,
        RECIPES[recipe],
        call.semantics,
        attn_mask=call.attn_mask,
        sinks=call.sinks,
    )
    return {"output": output, "lse": lse}


def plain_call() -> Call:
    generator = torch.Generator().manual_seed(0)
    shapes = (1, 2, 40, 16), (1, 2, 150, 16), (1, 2, 150, 16)
    return Call(*(torch.randn(shape, generator=generator) for shape in shapes))


def assert_as_the_reference(call: Call, recipe: str) -> dict[str, Tensor]:
    """NaN and infinities in the same places, and the rest close. Returns the body's outputs."""
    got = run(session(model_of(call, variant_of(call, recipe))), call)
    assert_close(got, expected_of(call, recipe), call, recipe)
    return got


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("garbage", [nan, inf, -inf])
def test_what_is_not_finite_spreads_as_in_the_reference(recipe: str, garbage: float) -> None:
    call = plain_call()
    for name in ("query", "key", "value"):
        poisoned = getattr(call, name).clone()
        poisoned[0, 1, 30, 3] = garbage
        got = assert_as_the_reference(replace(call, **{name: poisoned}), recipe)
        assert got["output"][0, 1].isnan().any()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_sink_of_plus_infinity_is_nan(recipe: str) -> None:
    got = assert_as_the_reference(replace(plain_call(), sinks=torch.tensor([inf, 0.5])), recipe)
    assert got["output"][:, 0].isnan().all() and got["output"][:, 1].isfinite().all()


@pytest.mark.parametrize("recipe", ["int4_fp8", "int8_fp8", "int8_int8", "int8_int16"])
def test_the_largest_values_do_not_overflow(recipe: str) -> None:
    """A channel of finfo.max, whose weights may sum to a little more than 1 in E4M3; and for
    integers, whose sums of that are not finite, one whose extremes have no finite difference."""
    call = plain_call()
    value = call.value.clone()
    largest = torch.finfo(torch.float32).max
    value[..., 0] = largest if "fp8" in recipe else value[..., 0].sign() * (0.6 * largest)
    call = replace(call, value=value)
    got = run(session(model_of(call, variant_of(call, recipe))), call)["output"]
    assert torch.equal(got.isfinite(), expected_of(call, recipe)["output"].isfinite())
    assert got[..., 1:].isfinite().all() and not got.isnan().any()
    assert "fp8" not in recipe or got.isfinite().all()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_head_wholly_of_negligible_bias(recipe: str) -> None:
    """There all keys count, though none has an ordinary bias."""
    mask = torch.zeros(1, 2, 1, 150)
    mask[:, 1] = -1e4
    call = replace(plain_call(), attn_mask=mask)
    got = assert_as_the_reference(call, recipe)
    check(got["output"], dense(call)[0], call.value, recipe)
