"""The rules of docs/numerics.md, on the bodies: the tests of the reference, run on them."""

from __future__ import annotations

from math import inf, nan

import pytest
import torch
from torch import Tensor

from sage_compiler.precision import RECIPES, Recipe
from sage_compiler.semantics import DeadRows
from tests.compiler.kernels import test_reference as rules
from tests.compiler.kernels.dense import Call
from tests.compiler.onnx.bodies import model_of, run, session, variant_of

every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
every_recipe_by_block = pytest.mark.parametrize(
    "recipe", rules.BY_BLOCK.values(), ids=rules.BY_BLOCK
)


@pytest.fixture(autouse=True)
def _on_bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the tests of the reference run the body in ONNX Runtime."""

    def run_body(call: Call, recipe: Recipe) -> tuple[Tensor, Tensor]:
        got = run(session(model_of(call, variant_of(call, recipe.name))), call)
        return got["output"], got["lse"]

    monkeypatch.setattr(rules, "run", run_body)
    torch.manual_seed(0)


@every_recipe
def test_smoothing_leaves_softcap_sinks_and_lse_as_they_are(recipe: Recipe) -> None:
    rules.test_smoothing_leaves_softcap_sinks_and_lse_as_they_are(recipe)


@every_recipe
def test_a_large_sink_does_not_cost_precision(recipe: Recipe) -> None:
    rules.test_a_large_sink_does_not_cost_precision(recipe)


@every_recipe
@pytest.mark.parametrize("dead_rows", DeadRows)
def test_dead_rows(recipe: Recipe, dead_rows: DeadRows) -> None:
    rules.test_dead_rows(recipe, dead_rows)


@every_recipe
@pytest.mark.parametrize("low", [-1e4, rules.FINFO_MIN])
def test_finite_masks_stay_additive(recipe: Recipe, low: float) -> None:
    rules.test_finite_masks_stay_additive(recipe, low)


@every_recipe
def test_garbage_in_slots_nobody_sees_has_no_effect(recipe: Recipe) -> None:
    rules.test_garbage_in_slots_nobody_sees_has_no_effect(recipe)


@every_recipe
@pytest.mark.parametrize("garbage", [nan, inf, -inf])
@pytest.mark.parametrize("where", ["query", "key", "value", "attn_mask"])
def test_what_is_not_finite_and_visible_shows(recipe: Recipe, garbage: float, where: str) -> None:
    rules.test_what_is_not_finite_and_visible_shows(recipe, garbage, where)


@every_recipe
@pytest.mark.parametrize("garbage", [nan, inf])
def test_what_is_not_finite_shows_through_a_finite_mask(recipe: Recipe, garbage: float) -> None:
    rules.test_what_is_not_finite_shows_through_a_finite_mask(recipe, garbage)


@every_recipe
def test_garbage_beside_zeros_under_a_finite_mask_is_clipped(recipe: Recipe) -> None:
    rules.test_garbage_beside_zeros_under_a_finite_mask_is_clipped(recipe)


@every_recipe
def test_zeros_are_not_divided_by(recipe: Recipe) -> None:
    rules.test_zeros_are_not_divided_by(recipe)


@every_recipe
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_values_beyond_the_range_of_fp16(recipe: Recipe, dtype: torch.dtype, size: float) -> None:
    rules.test_values_beyond_the_range_of_fp16(recipe, dtype, size)


@every_recipe
def test_empty_inputs(recipe: Recipe) -> None:
    rules.test_empty_inputs(recipe)


@every_recipe
def test_one_query_with_every_kind_of_mask(recipe: Recipe) -> None:
    rules.test_one_query_with_every_kind_of_mask(recipe)


@every_recipe_by_block
def test_keys_and_values_that_differ_by_block(recipe: Recipe) -> None:
    rules.test_keys_and_values_that_differ_by_block(recipe)


@every_recipe_by_block
@pytest.mark.parametrize("garbage", [nan, inf, -inf])
def test_what_is_not_finite_stays_in_its_block(recipe: Recipe, garbage: float) -> None:
    rules.test_what_is_not_finite_stays_in_its_block(recipe, garbage)


@every_recipe_by_block
@pytest.mark.parametrize("low", [-1e4, rules.FINFO_MIN])
def test_a_block_without_counted_keys_adds_nothing(recipe: Recipe, low: float) -> None:
    rules.test_a_block_without_counted_keys_adds_nothing(recipe, low)


@every_recipe_by_block
def test_a_block_without_counted_keys_is_quantized_as_any_other(recipe: Recipe) -> None:
    rules.test_a_block_without_counted_keys_is_quantized_as_any_other(recipe)


@every_recipe_by_block
def test_rows_that_see_some_blocks_only(recipe: Recipe) -> None:
    rules.test_rows_that_see_some_blocks_only(recipe)
