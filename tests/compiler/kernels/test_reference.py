"""The reference against attention from its formula, and against the rules of docs/numerics.md."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import inf, log, nan

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sage_compiler.errors import InvalidOptionError
from sage_compiler.kernels import reference
from sage_compiler.kernels.quantize import key_groups, quantize_tokens, query_groups
from sage_compiler.kernels.reference import attention
from sage_compiler.kernels.visibility import Visibility, count_in_blocks
from sage_compiler.precision import (
    RECIPES,
    TILE_CPU,
    TILE_MMA,
    TILE_WGMMA,
    Accumulator,
    Format,
    Granularity,
    Recipe,
    Statistics,
    Tile,
)
from sage_compiler.semantics import DeadRows, MaskClass, Semantics
from tests.compiler.kernels.dense import Call, channel_outliers, dense, random_call
from tests.tolerances import check, check_lse, cosine, rel_l1

FINFO_MIN = torch.finfo(torch.float32).min
CPU = torch.device("cpu")

every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
BY_BLOCK = {
    name: recipe for name, recipe in RECIPES.items() if recipe.statistics is Statistics.KV_BLOCK
}
every_recipe_by_block = pytest.mark.parametrize("recipe", BY_BLOCK.values(), ids=BY_BLOCK)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def run(call: Call, recipe: Recipe) -> tuple[Tensor, Tensor]:
    return attention(
        call.query,
        call.key,
        call.value,
        recipe,
        call.semantics,
        attn_mask=call.attn_mask,
        sinks=call.sinks,
    )


def gaussian(*lengths: int, heads: int = 2, head_dim: int = 64, seed: int = 0) -> Call:
    """Batch 1; lengths (Lq, Lk), or one for both."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(1, heads, length, head_dim, generator=generator)
        for length in (lengths[0], lengths[-1], lengths[-1])
    )
    return Call(query, key, value)


def several_blocks(length: int, width: int, queries: int = 50) -> Call:
    """Keys and values with another channel offset in every block of ``width`` keys."""
    call = gaussian(queries, length)
    key, value = call.key.clone(), call.value.clone()
    for key_block, value_block in zip(key.split(width, 2), value.split(width, 2), strict=True):
        key_block += torch.randn(1, 2, 1, 64)
        value_block += 2 * torch.randn(1, 2, 1, 64)
    return replace(call, key=key, value=value)


# --- against the formula


@every_recipe
@pytest.mark.parametrize("first", range(0, 120, 20))
def test_random_calls(recipe: Recipe, first: int) -> None:
    for seed in range(first, first + 20):
        call = random_call(seed)
        given = [x.clone() for x in (call.query, call.key, call.value)]
        output, lse = run(call, recipe)
        expected, expected_lse = dense(call)
        check(output, expected, call.value, recipe.name)
        check_lse(lse, expected_lse, recipe.name)
        assert output.dtype == call.query.dtype and output.is_contiguous()
        assert lse.dtype == torch.float32 and lse.is_contiguous()
        for before, after in zip(given, (call.query, call.key, call.value), strict=True):
            assert torch.equal(before, after)


@every_recipe
@pytest.mark.parametrize("tile", [TILE_MMA, TILE_WGMMA, TILE_CPU, Tile(8, 8, 8)], ids=str)
def test_tiles_and_granularities(recipe: Recipe, tile: Tile) -> None:
    call = random_call(5, longest=150)
    expected, _ = dense(call)
    for granularity in (Granularity.THREAD, Granularity.TOKEN):
        output, _ = run(call, replace(recipe, tile=tile, granularity=granularity))
        check(output, expected, call.value, recipe.name)


@pytest.mark.parametrize("mask_class", MaskClass)
@pytest.mark.parametrize("lengths", [(1, 130), (130, 1), (70, 200), (200, 70), (129, 129)])
def test_mask_classes_show_what_they_say(mask_class: MaskClass, lengths: tuple[int, int]) -> None:
    window = {"window_left": 20, "window_right": 3} if "window" in mask_class else {}
    call = replace(gaussian(*lengths), semantics=Semantics(mask_class=mask_class, **window))
    output, lse = run(call, RECIPES["int8_fp16"])
    expected, expected_lse = dense(call)
    check(output, expected, call.value, "int8_fp16")
    check_lse(lse, expected_lse, "int8_fp16")


@every_recipe
def test_smoothing_leaves_softcap_sinks_and_lse_as_they_are(recipe: Recipe) -> None:
    """The mean of K moves all scores of a row, which only a plain softmax does not notice."""
    call = gaussian(100)
    call = replace(call, key=call.key + 4 * torch.randn(1, 2, 1, 64))
    sinks = torch.tensor([3.0, -1.0])
    for softcap, scale in ((None, None), (4.0, None), (None, -0.1), (4.0, -0.1)):
        capped = replace(call, semantics=Semantics(softcap=softcap, scale=scale), sinks=sinks)
        output, lse = run(capped, recipe)
        expected, expected_lse = dense(capped)
        check(output, expected, call.value, recipe.name)
        check_lse(lse, expected_lse, recipe.name)


@every_recipe
def test_smoothed_values_come_back(recipe: Recipe) -> None:
    call = gaussian(100)
    call = replace(call, value=call.value + 5.0, sinks=torch.tensor([2.0, -inf]))
    output, _ = run(call, replace(recipe, smooth_v=True))
    check(output, dense(call)[0], call.value, recipe.name)


@every_recipe
def test_a_large_sink_does_not_cost_precision(recipe: Recipe) -> None:
    """In the running maximum it would: P next to it has few levels left."""
    call = gaussian(100)
    plain = rel_l1(run(call, recipe)[0], dense(call)[0])
    call = replace(call, sinks=torch.full((2,), 12.0))
    assert rel_l1(run(call, recipe)[0], dense(call)[0]) < 1.1 * plain


# --- exact results


def mirrored(half: Tensor) -> Tensor:
    """Tokens followed by their negatives: the mean is zero."""
    return torch.cat([half, -half], -2)


@pytest.mark.parametrize("name", ["int4_fp8", "int4_fp16", "int8_fp8", "int8_fp16"])
def test_exact_where_every_number_is_representable(name: str) -> None:
    """Integer Q and K, scores in whole units of log 2, so P in powers of two."""
    recipe = RECIPES[name]
    limit = 7.0 if recipe.qk is Format.INT4 else 127.0
    generator = torch.Generator().manual_seed(0)
    key = torch.randint(-7, 8, (2, 2, 45, 16), generator=generator).float()
    key[..., 15] = limit  # the amax of every group, in a channel that Q does not touch
    chosen = torch.randint(0, 15, (2, 4, 30), generator=generator)
    value = torch.randint(-8, 9, (2, 2, 90, 24), generator=generator).float()
    value[:, :, 7] = 448.0
    call = Call(
        mirrored(limit * F.one_hot(chosen, 16).float()),
        mirrored(key),
        value,
        Semantics(MaskClass.CAUSAL_BOTTOM_RIGHT, scale=log(2.0) / limit),
    )
    # A causal mask does not disturb the means: the last row sees every key.
    output, lse = run(call, recipe)
    expected, expected_lse = dense(call)
    torch.testing.assert_close(output.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["int8_int8", "int8_int16"])
def test_exact_uniform_rows(name: str) -> None:
    """With scale 0 every P is 1, and V in -127..127 is its own quantization."""
    generator = torch.Generator().manual_seed(0)
    value = torch.randint(-127, 128, (1, 2, 600, 16), generator=generator).float()
    value[:, :, ::256], value[:, :, 1::256] = 127.0, -127.0  # the extremes of every block
    call = replace(gaussian(50, 600, head_dim=16), value=value, semantics=Semantics(scale=0.0))
    output, lse = run(call, RECIPES[name])
    expected, expected_lse = dense(call)
    torch.testing.assert_close(output.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=1e-6)


# --- statistics of a block of keys


def test_which_recipes_have_self_contained_blocks() -> None:
    assert set(BY_BLOCK) == {"int8_int8", "int8_int16"}
    assert all(recipe.tile.kv_block == 256 for recipe in BY_BLOCK.values())


@every_recipe
@pytest.mark.parametrize("smooth_v", [False, True])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_a_block_knows_nothing_of_the_others(
    recipe: Recipe, smooth_v: bool, softcap: float | None
) -> None:
    """Blocks on their own, weighted by their LSE, are the whole: true of no other statistics."""
    recipe = replace(recipe, statistics=Statistics.KV_BLOCK, smooth_v=smooth_v)
    width = recipe.tile.kv_block
    call = several_blocks(2 * width + width // 3, width)
    call = replace(call, semantics=Semantics(softcap=softcap))
    whole, lse = run(call, recipe)
    parts = [
        run(replace(call, key=key, value=value), recipe)
        for key, value in zip(call.key.split(width, 2), call.value.split(width, 2), strict=True)
    ]
    lses = torch.stack([part_lse for _, part_lse in parts])
    shares = torch.softmax(lses, 0).unsqueeze(-1)
    together = (shares * torch.stack([output for output, _ in parts])).sum(0)
    torch.testing.assert_close(whole, together, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lse, torch.logsumexp(lses, 0), rtol=1e-5, atol=1e-5)

    of_the_head, _ = run(call, replace(recipe, statistics=Statistics.HEAD))
    assert rel_l1(of_the_head, together) > 10 * rel_l1(whole, together)


@every_recipe_by_block
def test_random_calls_of_several_blocks(recipe: Recipe) -> None:
    for seed in range(10):
        call = random_call(seed, longest=1200)
        output, lse = run(call, recipe)
        expected, expected_lse = dense(call)
        check(output, expected, call.value, recipe.name)
        check_lse(lse, expected_lse, recipe.name)


@every_recipe_by_block
def test_keys_and_values_that_differ_by_block(recipe: Recipe) -> None:
    """Offsets of K and V that move along the sequence: rows, softcap, sinks and LSE."""
    call = several_blocks(700, 256)
    for softcap, scale in ((None, None), (4.0, None), (None, -0.1), (4.0, -0.1)):
        for sinks in (None, torch.tensor([3.0, -1.0])):
            semantics = Semantics(MaskClass.CAUSAL_BOTTOM_RIGHT, softcap=softcap, scale=scale)
            some = replace(call, semantics=semantics, sinks=sinks)
            output, lse = run(some, recipe)
            expected, expected_lse = dense(some)
            check(output, expected, call.value, recipe.name)
            check_lse(lse, expected_lse, recipe.name)


def error_of(call: Call, recipe: Recipe, statistics: Statistics) -> float:
    output, _ = run(call, replace(recipe, statistics=statistics))
    return rel_l1(output, dense(call)[0])


@pytest.mark.parametrize("heavy", [0, 300, 511])
def test_p_is_relative_to_the_maximum_of_its_block(heavy: int) -> None:
    """A key of 1/6 of the weight, before or after a block whose keys are far below it."""
    call = gaussian(20, 512)
    query, key = torch.zeros_like(call.query), torch.zeros_like(call.key)
    query[..., 0], key[:, :, heavy, 0] = 8.0, 8.0  # a score of 8 beside zeros: 255 * exp(-8) < 1/2
    value = call.value.abs()
    value[:, :, :heavy] += 1.0
    call = replace(call, query=query, key=key, value=value)
    recipe = RECIPES["int8_int8"]
    expected, expected_lse = dense(call)
    # The 255 keys in the block of the heavy one still vanish: 255 of 3491 parts.
    output, lse = run(call, recipe)
    assert rel_l1(output, expected) < 0.09
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=0.09)
    if heavy == 0:  # nothing is left of the others when the maximum is the heavy key's
        output, lse = run(call, replace(recipe, statistics=Statistics.HEAD))
        assert rel_l1(output, value[:, :, :1].expand_as(output)) < 0.05
        assert (lse < expected_lse - 0.15).all()


def test_long_tailed_rows_keep_their_tail() -> None:
    call = gaussian(64, 2048)
    query = call.query.clone()
    query += 0.9 * call.key[:, :, 100:164]  # one key far above the thousands of others
    call = replace(call, query=query)
    of_the_head = error_of(call, RECIPES["int8_int8"], Statistics.HEAD)
    of_the_block = error_of(call, RECIPES["int8_int8"], Statistics.KV_BLOCK)
    assert of_the_block < 0.06 and of_the_head > 5 * of_the_block


@every_recipe_by_block
def test_an_outlier_of_v_costs_only_its_own_block(recipe: Recipe) -> None:
    call = gaussian(64, 768)
    value, bias = call.value.clone(), torch.zeros(1, 1, 1, 768)
    value[:, :, 256:512] *= 100.0
    bias[..., 256:512] = -20.0  # hardly seen, but it counts
    call = replace(call, value=value, attn_mask=bias)
    of_the_head = error_of(call, recipe, Statistics.HEAD)
    of_the_block = error_of(call, recipe, Statistics.KV_BLOCK)
    assert of_the_block < 0.05 and of_the_head > 10 * of_the_block


@every_recipe_by_block
def test_a_drift_of_k_leaves_with_the_mean_of_its_block(recipe: Recipe) -> None:
    """The mean over all keys leaves +-30 in a channel, and INT8 steps to match."""
    call = gaussian(64, 1024)
    key = call.key.clone()
    key[:, :, :, 5] += torch.linspace(-30.0, 30.0, 1024)
    query = call.query.clone()
    query[..., 5] *= 0.01
    call = replace(call, query=query, key=key)
    of_the_head = error_of(call, recipe, Statistics.HEAD)
    of_the_block = error_of(call, recipe, Statistics.KV_BLOCK)
    assert of_the_block < 0.03 and of_the_head > 2 * of_the_block


@every_recipe_by_block
@pytest.mark.parametrize("low", [-1e4, FINFO_MIN])
def test_a_block_without_counted_keys_adds_nothing(recipe: Recipe, low: float) -> None:
    """Its statistics are of what is there, so that garbage in it stays what it is: weightless."""
    call = gaussian(30, 600)
    mask = torch.zeros(1, 1, 1, 600)
    mask[..., 256:] = low
    key, value = call.key.clone(), call.value.clone()
    key[:, :, 256:] *= 100.0
    value[:, :, 256:] *= 1e37
    cut = Call(call.query, key[:, :, :256], value[:, :, :256])
    output, lse = run(Call(call.query, key, value, attn_mask=mask), recipe)
    expected, expected_lse = run(cut, recipe)
    assert torch.equal(output, expected) and torch.equal(lse, expected_lse)


@every_recipe_by_block
def test_a_block_without_counted_keys_is_quantized_as_any_other(recipe: Recipe) -> None:
    """Scores of 8000 outweigh a bias of -6000, and bring back more than clipped remains."""
    call = gaussian(30, 600)
    mask = torch.zeros(1, 1, 1, 600)
    mask[..., 256:512] = -6000.0
    query, key = torch.zeros_like(call.query), torch.zeros_like(call.key)
    query[..., 0] = 80.0
    key[:, :, 256:512, 0] = 800.0 + 0.1 * call.key[:, :, 256:512, 0]
    call = replace(call, query=query, key=key, attn_mask=mask)
    output, lse = run(call, recipe)
    expected, expected_lse = dense(call)
    check(output, expected, call.value, recipe.name)
    check_lse(lse, expected_lse, recipe.name)


@every_recipe_by_block
def test_rows_that_see_some_blocks_only(recipe: Recipe) -> None:
    mask = torch.rand(1, 2, 40, 700) < 0.5
    mask[:, :, 5] = False
    mask[:, :, 6, :512] = False
    mask[:, :, 7, 256:] = False
    mask[:, :, 8, :256] = mask[:, :, 8, 512:] = False
    finite = torch.zeros(mask.shape).masked_fill(~mask, FINFO_MIN)
    for attn_mask in (mask, finite, finite.clamp(min=-1e4)):
        call = replace(several_blocks(700, 256, queries=40), attn_mask=attn_mask)
        output, lse = run(call, recipe)
        expected, expected_lse = dense(call)
        check(output, expected, call.value, recipe.name)
        check_lse(lse, expected_lse, recipe.name)


def test_all_reachable_keys_count_where_none_would() -> None:
    reachable = torch.tensor([[[1, 1, 0, 1, 0, 1, 0, 0, 1]]]).bool()
    counted = torch.tensor([[[0, 1, 0, 0, 0, 0, 0, 0, 0]]]).bool()
    seen = Visibility(reachable, counted, torch.ones(1, 1, 1, 1, dtype=torch.bool))
    by_three = count_in_blocks(seen, 3).counted
    assert by_three.int().flatten().tolist() == [0, 1, 0, 1, 0, 1, 0, 0, 1]
    assert torch.equal(count_in_blocks(seen, 9).counted, counted)
    assert counted.sum() == 1  # the argument is as it was


@every_recipe_by_block
@pytest.mark.parametrize("garbage", [nan, inf, -inf])
def test_what_is_not_finite_stays_in_its_block(recipe: Recipe, garbage: float) -> None:
    """Key 300 is in the second block, which causal rows below 256 do not see."""
    causal = replace(gaussian(400), semantics=Semantics(MaskClass.CAUSAL))
    poisoned = causal.key.clone()
    poisoned[0, 1, 300, 3] = garbage
    output, lse = run(replace(causal, key=poisoned), recipe)
    assert output[0, 1, 256:].isnan().all() and lse[0, 1, 256:].isnan().all()
    clean, clean_lse = run(causal, recipe)
    assert torch.equal(output[0, 1, :256], clean[0, 1, :256])
    assert torch.equal(lse[0, 1, :256], clean_lse[0, 1, :256])

    poisoned = causal.value.clone()
    poisoned[0, 1, 300, 3] = garbage
    output, lse = run(replace(causal, value=poisoned), recipe)
    assert output[0, 1, 256:, 3].isnan().all() and torch.equal(lse, clean_lse)
    others = torch.arange(64) != 3
    assert torch.equal(output[..., others], clean[..., others])
    assert torch.equal(output[:, 0], clean[:, 0])


# --- accuracy as in the paper


def test_accuracy_orders_as_in_the_paper() -> None:
    call = channel_outliers()
    expected, _ = dense(call)
    base = RECIPES["int4_fp8"]

    def error(recipe: Recipe) -> float:
        return rel_l1(run(call, recipe)[0], expected)

    neither = error(replace(base, smooth_q=False, smooth_k=False))
    only_k = error(replace(base, smooth_q=False))
    only_q = error(replace(base, smooth_k=False))
    both = error(base)
    assert neither > 1.8 * only_k
    assert only_k > only_q > 1.8 * both
    assert cosine(run(call, base)[0], expected) > 0.99

    ladder = [error(replace(base, granularity=granularity)) for granularity in Granularity]
    assert all(coarse > fine for coarse, fine in pairwise(ladder))  # tensor first, token last
    tensor, block, _, thread, token = ladder
    assert tensor > 1.15 * block and block > 1.1 * thread and thread < 1.25 * token

    fp8, fp16 = both, error(replace(base, pv=Format.FP16))
    assert fp16 < fp8 < 1.1 * fp16


def test_masked_slots_have_no_weight_in_the_statistics() -> None:
    """300 of 4096 slots live, garbage in the rest: as accurate as with the rest cut off."""
    live, call = 300, gaussian(64, 4096)
    key, value = call.key.clone(), call.value.clone()
    key[:, :, :live] += 3 * torch.randn(1, 2, 1, 64)
    cut = Call(call.query, key[:, :, :live], value[:, :, :live])
    expected, _ = dense(cut)
    visible = (torch.arange(4096) < live).view(1, 1, 1, -1)
    masks = [visible, *(torch.zeros(visible.shape).masked_fill(~visible, x) for x in (-inf, -1e4))]
    masks.append(torch.zeros(visible.shape).masked_fill(~visible, FINFO_MIN))
    for name in ("int4_fp8", "int8_fp8", "int8_int8"):
        wanted = rel_l1(run(cut, RECIPES[name])[0], expected)
        for garbage in (0.0, 30.0):
            key[:, :, live:] = garbage * call.key[:, :, live:]
            value[:, :, live:] = garbage * call.value[:, :, live:]
            for mask in masks:
                output, _ = run(Call(call.query, key, value, attn_mask=mask), RECIPES[name])
                assert rel_l1(output, expected) == pytest.approx(wanted, rel=0.02)


# --- what must fail does fail


@every_recipe
def test_a_wrong_kernel_is_outside_the_tolerance(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = gaussian(128)
    biased = replace(call, key=call.key + 40 * torch.randn(1, 2, 1, 64))
    masked = replace(call, attn_mask=torch.rand(128, 128) < 0.5)

    def outside(wrong: Tensor, right: Call) -> None:
        with pytest.raises(AssertionError, match=recipe.name):
            check(wrong, dense(right)[0], right.value, recipe.name)

    check(run(biased, recipe)[0], dense(biased)[0], call.value, recipe.name)
    outside(run(biased, replace(recipe, smooth_k=False))[0], biased)
    outside(run(replace(masked, attn_mask=None), recipe)[0], masked)
    outside(2 * run(call, recipe)[0], call)

    def doubled(x: Tensor, counted: Tensor, groups: Tensor, limit: int) -> tuple[Tensor, Tensor]:
        integers, scale = quantize_tokens(x, counted, groups, limit)
        return integers, 2 * scale

    monkeypatch.setattr(reference, "quantize_tokens", doubled)
    outside(run(call, recipe)[0], call)


def test_formats_that_a_matrix_cannot_have() -> None:
    with pytest.raises(InvalidOptionError, match="Q and K in fp8; possible: int4, int8"):
        replace(RECIPES["int8_fp8"], qk=Format.FP8)
    with pytest.raises(InvalidOptionError, match="P and V in int4; possible: fp8"):
        replace(RECIPES["int8_fp8"], pv=Format.INT4)


# --- masks, dead rows, empty inputs


@every_recipe
@pytest.mark.parametrize("dead_rows", DeadRows)
def test_dead_rows(recipe: Recipe, dead_rows: DeadRows) -> None:
    mask = torch.rand(2, 1, 70, 90) < 0.5
    mask[1, :, 5] = False
    call = replace(gaussian(70, 90), semantics=Semantics(dead_rows=dead_rows))
    call = replace(call, query=call.query.expand(2, -1, -1, -1), key=call.key.expand(2, -1, -1, -1))
    call = replace(call, value=call.value.expand(2, -1, -1, -1), attn_mask=mask)
    output, lse = run(call, recipe)
    expected, _ = dense(call)
    check(output, expected, call.value, recipe.name)
    assert (lse[1, :, 5] == -inf).all() and lse.isfinite().sum() == lse.numel() - 2
    output, lse = run(replace(call, sinks=torch.tensor([1.0, -2.0])), recipe)
    assert (output[1, :, 5] == 0).all() and lse[1, :, 5].tolist() == [1.0, -2.0]


@every_recipe
@pytest.mark.parametrize("low", [-1e4, FINFO_MIN])
def test_finite_masks_stay_additive(recipe: Recipe, low: float) -> None:
    mask = torch.zeros(1, 1, 60, 80)
    mask[..., 50:] = low
    mask[:, :, 7] = low  # a row wholly masked
    call = replace(gaussian(60, 80), attn_mask=mask)
    output, _ = run(call, recipe)
    check(output, dense(call)[0], call.value, recipe.name)
    if low == FINFO_MIN:
        average = call.value.mean(2)
        check(output[:, :, 7], average, call.value, recipe.name)
        half = mask.clamp(min=torch.finfo(torch.bfloat16).min).to(torch.bfloat16)
        assert torch.equal(run(replace(call, attn_mask=half), recipe)[0], output)


@every_recipe
def test_garbage_in_slots_nobody_sees_has_no_effect(recipe: Recipe) -> None:
    clean = gaussian(70, 150)
    hidden = torch.arange(150) % 3 == 1
    dead_query = torch.arange(70) == 9
    visible = ~hidden & ~dead_query.view(-1, 1)
    floats = torch.zeros(70, 150).masked_fill(~visible, -inf)
    windowed = Semantics(MaskClass.WINDOW, window_left=5, window_right=2)
    cases = [
        (Semantics(), visible, hidden, dead_query),
        (Semantics(softcap=5.0), floats, hidden, dead_query),
        (windowed, None, torch.arange(150) > 71, torch.zeros(70, dtype=torch.bool)),
    ]
    for semantics, mask, keys, queries in cases:
        zeros = replace(
            clean,
            query=clean.query.masked_fill(queries.view(-1, 1), 0.0),
            key=clean.key.masked_fill(keys.view(-1, 1), 0.0),
            value=clean.value.masked_fill(keys.view(-1, 1), 0.0),
            semantics=semantics,
            attn_mask=mask,
        )
        expected = run(zeros, recipe)
        for garbage in (1e4, nan, inf, -inf):
            dirty = replace(
                zeros,
                query=clean.query.masked_fill(queries.view(-1, 1), garbage),
                key=clean.key.masked_fill(keys.view(-1, 1), garbage),
                value=clean.value.masked_fill(keys.view(-1, 1), garbage),
            )
            for actual, wanted in zip(run(dirty, recipe), expected, strict=True):
                assert torch.equal(actual, wanted)


@every_recipe
@pytest.mark.parametrize("garbage", [nan, inf, -inf])
@pytest.mark.parametrize("where", ["query", "key", "value", "attn_mask"])
def test_what_is_not_finite_and_visible_shows(recipe: Recipe, garbage: float, where: str) -> None:
    call = replace(gaussian(70, 90), attn_mask=torch.zeros(1, 2, 70, 90))
    if where == "attn_mask" and garbage == -inf:
        return  # an ordinary mask
    poisoned = getattr(call, where).clone()
    poisoned[0, 1, 40, 3] = garbage
    call = replace(call, **{where: poisoned})
    output, _ = run(call, recipe)
    sdpa = F.scaled_dot_product_attention(
        call.query, call.key, call.value, attn_mask=call.attn_mask
    )
    assert output[sdpa.isnan()].isnan().all()
    if where == "value":  # SDPA's own result may be infinite there
        assert not output[0, 1, :, 3].isfinite().any()
    else:
        assert output[0, 1, 40].isnan().all()
    assert output[0, 0].isfinite().all()


@every_recipe
@pytest.mark.parametrize("garbage", [nan, inf])
def test_what_is_not_finite_shows_through_a_finite_mask(recipe: Recipe, garbage: float) -> None:
    """Such a token does not count in statistics, yet it is added, as in SDPA."""
    mask = torch.zeros(1, 1, 1, 90)
    mask[..., 40] = FINFO_MIN
    call = replace(gaussian(70, 90), attn_mask=mask)
    for name in ("key", "value"):
        poisoned = getattr(call, name).clone()
        poisoned[:, :, 40] = garbage
        assert not run(replace(call, **{name: poisoned}), recipe)[0].isfinite().any()


@every_recipe
def test_garbage_beside_zeros_under_a_finite_mask_is_clipped(recipe: Recipe) -> None:
    """A group without an amax of its own has the smallest scale; its quotients overflow."""
    mask = torch.zeros(1, 1, 1, 256)
    mask[..., 64:] = -1e4
    call = replace(gaussian(40, 256), attn_mask=mask)
    output, _ = run(call, recipe)
    check(output, dense(call)[0], call.value[:, :, :64], recipe.name)


@every_recipe
def test_zeros_are_not_divided_by(recipe: Recipe) -> None:
    call = gaussian(140, 200)
    key, value, query = call.key.clone(), call.value.clone(), call.query.clone()
    key[:, :, 64:128], query[:, :, :128], value[..., 3] = 0.0, 0.0, 0.0
    for some in (
        Call(query, key, value),
        Call(query, torch.zeros_like(key), value),
        Call(query, key, torch.zeros_like(value)),
    ):
        output, lse = run(some, recipe)
        expected, expected_lse = dense(some)
        check(output, expected, call.value, recipe.name)
        check_lse(lse, expected_lse, recipe.name)


@every_recipe
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_values_beyond_the_range_of_fp16(recipe: Recipe, dtype: torch.dtype, size: float) -> None:
    call = gaussian(60)
    call = replace(call, query=call.query.to(dtype), key=call.key.to(dtype))
    call = replace(call, value=(call.value * size).to(dtype))
    check(run(call, recipe)[0], dense(call)[0], call.value, recipe.name)


@every_recipe
def test_empty_inputs(recipe: Recipe) -> None:
    semantics = Semantics(dead_rows=DeadRows.NAN)
    call = replace(gaussian(5), semantics=semantics)
    no_keys = replace(call, key=call.key[:, :, :0], value=call.value[:, :, :0, :24])
    output, lse = run(no_keys, recipe)
    assert output.shape == (1, 2, 5, 24) and (output == 0).all() and (lse == -inf).all()
    _, lse = run(replace(no_keys, sinks=torch.tensor([1.0, 2.0])), recipe)
    assert lse[0, :, 0].tolist() == [1.0, 2.0]
    for empty in (
        Call(call.query[:0], call.key[:0], call.value[:0]),
        replace(call, query=call.query[:, :, :0]),
    ):
        output, lse = run(empty, recipe)
        assert output.shape == empty.query.shape and lse.shape == empty.query.shape[:3]
    no_channels = replace(call, query=call.query[..., :0], key=call.key[..., :0])
    check(
        run(no_channels, recipe)[0],
        call.value.mean(2, True).expand(-1, -1, 5, -1),
        call.value,
        recipe.name,
    )


@every_recipe
def test_one_query_with_every_kind_of_mask(recipe: Recipe) -> None:
    call = replace(gaussian(1, 333, heads=4), semantics=Semantics(MaskClass.CAUSAL_BOTTOM_RIGHT))
    for mask in (None, torch.rand(333) < 0.5, torch.randn(1, 4, 1, 1), torch.randn(1, 333)):
        some = replace(call, attn_mask=mask)
        check(run(some, recipe)[0], dense(some)[0], call.value, recipe.name)


# --- memory


class Largest(TorchDispatchMode):
    """Records the bytes of the largest storage behind a result of any operator."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, Tensor):
                self.nbytes = max(self.nbytes, x.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("name", ["int4_fp8", "int8_int8"])
def test_8k_tokens_without_a_matrix_of_scores(name: str) -> None:
    length, head_dim, recipe = 8192, 32, RECIPES[name]
    mask = torch.ones(1, 1, 1, length, dtype=torch.bool)
    mask[..., 8000:] = False
    call = gaussian(length, heads=1, head_dim=head_dim)
    call = replace(call, attn_mask=mask.expand(1, 1, length, length))
    with Largest() as largest:
        output, _ = run(call, recipe)
    assert largest.nbytes == 4 * length * max(recipe.tile.kv_block, head_dim)
    expected = F.scaled_dot_product_attention(call.query, call.key, call.value, attn_mask=mask)
    check(output, expected, call.value[:, :, :8000], name)


# --- the accumulator of FP8


def test_fp22_is_worse_within_bounds() -> None:
    call = gaussian(64, 2048)
    call = replace(call, value=call.value.abs())  # truncation of one sign adds up
    expected, _ = dense(call)
    two_levels = RECIPES["int8_fp8"]
    one_level = replace(two_levels, tile=Tile(128, 32, 2048))
    full, _ = run(call, two_levels)

    def shortfall(recipe: Recipe) -> float:
        return rel_l1(run(call, replace(recipe, accumulator=Accumulator.FP22))[0], full)

    # Each cut loses at most 2**-13 of the sum so far: two per tile of 64 keys, 64 in one level.
    assert 0 < shortfall(two_levels) < 2 * 2**-13
    assert 5 * shortfall(two_levels) < shortfall(one_level) < 64 * 2**-13
    short, _ = run(call, replace(two_levels, accumulator=Accumulator.FP22))
    assert rel_l1(full, expected) < rel_l1(short, expected)
    check(short, expected, call.value, two_levels.name)


# --- groups of tokens that share a scale


def tokens_by_group(groups: Tensor) -> set[frozenset[int]]:
    return {frozenset((groups == g).nonzero().flatten().tolist()) for g in groups.unique()}


@pytest.mark.parametrize(
    ("tile", "warp_rows", "columns"),
    [(TILE_MMA, (0, 8, 16, 24), 64), (TILE_WGMMA, (0, 8), 128)],
    ids=["sm_80", "sm_90"],
)
def test_groups_of_a_thread(tile: Tile, warp_rows: tuple[int, ...], columns: int) -> None:
    """SageAttention2's per-thread groups, literally, over two blocks of each."""
    rows, span = 2 * tile.q_block, tile.q_warp
    expected = {
        frozenset(warp + i + row for row in warp_rows)
        for warp in range(0, rows, span)
        for i in range(8)
    }
    assert tokens_by_group(query_groups(rows, Granularity.THREAD, tile, CPU)) == expected

    expected = {
        frozenset(block + 8 * k + 2 * j + c for k in range(columns // 8) for c in (0, 1))
        for block in (0, columns)
        for j in range(4)
    }
    keys = tokens_by_group(key_groups(2 * columns, Granularity.THREAD, tile, CPU))
    assert keys == expected
    assert {len(group) for group in keys} == {columns // 4}


@pytest.mark.parametrize("tile", [TILE_MMA, TILE_WGMMA], ids=["sm_80", "sm_90"])
def test_coarser_and_finer_groups(tile: Tile) -> None:
    def runs(length: int, size: int) -> set[frozenset[int]]:
        return {frozenset(range(i, min(i + size, length))) for i in range(0, length, size)}

    length = 300  # ragged
    sizes = {
        Granularity.TENSOR: (length, length),
        Granularity.BLOCK: (tile.q_block, tile.kv_block),
        Granularity.WARP: (tile.q_warp, tile.kv_block),
        Granularity.TOKEN: (1, 1),
    }
    for granularity, (query_size, key_size) in sizes.items():
        queries = query_groups(length, granularity, tile, CPU)
        keys = key_groups(length, granularity, tile, CPU)
        assert tokens_by_group(queries) == runs(length, query_size)
        assert tokens_by_group(keys) == runs(length, key_size)


def test_scales_are_the_amax_of_counted_tokens() -> None:
    x = torch.tensor([[1.0, -7.0], [2.0, 3.0], [-700.0, 0.0], [0.0, 0.0], [nan, 0.0]])
    counted = torch.tensor([True, True, False, True, False])
    groups = torch.tensor([0, 0, 0, 1, 2])
    integers, scale = quantize_tokens(x, counted, groups, 7)
    assert integers[:4].tolist() == [[1, -7], [2, 3], [-7, 0], [0, 0]]
    assert scale[:3].tolist() == [1.0, 1.0, 1.0]
    assert scale[3] > 0 and scale[4].isnan() and integers[4].isnan().all()
