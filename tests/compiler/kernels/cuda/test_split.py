"""Packed heads and split keys: the numbers are those of the other kernels and of the reference."""

from __future__ import annotations

import dataclasses
import itertools
import random
from math import inf, nan

import pytest
import torch
from torch import Tensor

from sage_compiler.kernels import reference
from sage_compiler.kernels.cuda.driver import DriverError
from sage_compiler.kernels.cuda.spec import QueryTile
from sage_compiler.kernels.cuda.variants import Variant
from sage_compiler.precision import TILE_MMA
from sage_compiler.semantics import UNBOUNDED, DeadRows, MaskClass
from tests.compiler.kernels.cuda.emulation import (
    RECIPE_VARIANTS,
    WGMMA,
    Way,
    broken,
    named,
    replacing,
)
from tests.compiler.kernels.cuda.test_attention import (
    DISTANCE,
    DISTANCE_OF_FEW,
    FEW_ELEMENTS,
    LSE_DISTANCE,
    distance,
    make_call,
)
from tests.compiler.kernels.dense import Call, dense, laid_out, random_mask
from tests.cutlass_templates import host
from tests.tolerances import check, check_lse

pytestmark = pytest.mark.skipif(host.missing() is not None, reason=str(host.missing()))

WAYS = [*map(Way, ("int4_fp8", "int8_fp8", "int4_fp16", "int8_fp16")), WGMMA]
SOME_WAYS = [Way("int8_fp8"), Way("int4_fp16"), WGMMA]
SPLIT = QueryTile(split=True)
PACKED = QueryTile(32, packed_heads=True)
PACKED_SPLIT = QueryTile(32, packed_heads=True, split=True)
BOTTOM_RIGHT = MaskClass.CAUSAL_BOTTOM_RIGHT


def assert_right(
    call: Call, way: Way, *, tile: QueryTile = PACKED_SPLIT, splits: int = 3, **options: object
) -> None:
    """As the reference that splits likewise, within rounding, and as float64 within tolerance."""
    result = way.attend(call, tile, splits=splits, **options)
    assert result.lse is not None
    attend = result.call.kernels.attend
    # It splits what all queries see. Blocks of a few of them, under a band, split what these see.
    row_blocks = result.call.sizes.row_blocks(attend.query_tile)
    alike = row_blocks == 1 or call.semantics.mask_class is MaskClass.NONE
    expected, expected_lse = reference.attention(
        call.query,
        call.key,
        call.value,
        named(way.recipe, way.accumulator, attend.keys // TILE_MMA.kv_block),
        call.semantics,
        attn_mask=call.attn_mask,
        sinks=call.sinks,
        splits=splits if alike else 1,
    )
    if alike or way.recipe.endswith("fp16"):
        limits = DISTANCE if call.query.numel() > FEW_ELEMENTS else DISTANCE_OF_FEW
        assert distance(result.output, expected) <= limits[way.recipe[:4]]
    torch.testing.assert_close(result.lse, expected_lse, rtol=1e-6, atol=LSE_DISTANCE)
    exact, exact_lse = dense(call)
    check(result.output, exact, call.value, way.recipe)
    check_lse(result.lse, exact_lse.float(), way.recipe)


def same_bits(one: Tensor | None, other: Tensor | None) -> bool:
    assert one is not None and other is not None
    integers = {2: torch.int16, 4: torch.int32}[one.element_size()]
    return torch.equal(one.contiguous().view(integers), other.contiguous().view(integers))


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_packing_heads_changes_no_bit(way: Way) -> None:
    """Of any row: codes, scales, means and delta of Q stay those of its head and query."""
    lengths = [(1, 77), (3, 64), (17, 130), (40, 1), (40, 300), (130, 90)]
    masks = (MaskClass.NONE, MaskClass.CAUSAL, BOTTOM_RIGHT)
    groups = (1, 2, 7, 8, 3)
    for seed, ((queries, keys), group) in enumerate(itertools.product(lengths, groups)):
        call = make_call(
            queries,
            keys,
            64,
            torch.float16,
            batch=1 + seed % 2,
            kv_heads=2,
            group=group,
            seed=seed,
            mask_class=masks[seed % 3],
            sinks=seed % 4 == 0,
        )
        plain = way.attend(call)
        for tile in (PACKED._replace(rows=128), *([] if way.is_wgmma else [PACKED])):
            packed = way.attend(call, tile, seed=seed)
            assert same_bits(packed.output, plain.output)
            assert same_bits(packed.lse, plain.lse)


@pytest.mark.parametrize(
    "way",
    [*(Way(recipe, accumulator=sums) for recipe, sums in RECIPE_VARIANTS), WGMMA],
    ids=str,
)
def test_splits(way: Way) -> None:
    """From one to more than there are tiles, with groups, tails, diagonals and dead rows."""
    masks = (MaskClass.NONE, MaskClass.CAUSAL, BOTTOM_RIGHT)
    lengths = [(1, 400), (5, 64), (8, 333), (4, 3), (16, 513), (2, 130), (32, 20), (7, 256)]
    for splits, (queries, keys) in enumerate(lengths, 1):
        group = (1, 2, 4, 8)[splits % 4]
        call = make_call(
            queries,
            keys,
            64,
            torch.float16,
            batch=2,
            group=group,
            seed=splits,
            mask_class=masks[splits % 3],
            sinks=splits % 2 == 0,
        )
        assert_right(call, way, splits=splits, seed=splits)


@pytest.mark.parametrize("way", SOME_WAYS, ids=str)
def test_one_part_is_the_whole(way: Way) -> None:
    """Through the merging kernel, the same bits as without; dead rows and sinks included."""
    for seed, dead_rows in enumerate(DeadRows):
        call = make_call(
            30,
            20,
            64,
            torch.float16,
            group=3,
            sinks=seed == 0,
            mask_class=BOTTOM_RIGHT,
            dead_rows=dead_rows,
        )
        plain = way.attend(call)
        for tile in (SPLIT, PACKED_SPLIT):
            merged = way.attend(call, tile)
            assert same_bits(merged.output, plain.output)
            assert same_bits(merged.lse, plain.lse)


@pytest.mark.parametrize("way", SOME_WAYS, ids=str)
def test_many_queries_over_split_keys(way: Way) -> None:
    """Without packing, over several query blocks, each with parts of what it sees."""
    for splits, mask_class in ((2, MaskClass.NONE), (4, MaskClass.CAUSAL), (8, BOTTOM_RIGHT)):
        call = make_call(
            150, 333, 64, torch.float16, kv_heads=2, group=2, seed=splits, mask_class=mask_class
        )
        assert_right(call, way, tile=SPLIT, splits=splits)


def test_split_is_as_unsplit() -> None:
    """P in FP16 is hardly rounded, so that its maximum does not matter."""
    ways = (Way("int8_fp16"), Way("int4_fp16"))
    for way, splits in itertools.product(ways, (2, 5, 8)):
        call = make_call(9, 700, 64, torch.float16, kv_heads=2, group=4, seed=splits)
        plain, split = way.attend(call), way.attend(call, PACKED_SPLIT, splits=splits)
        assert distance(split.output, plain.output) < 4e-4
        assert plain.lse is not None and split.lse is not None
        torch.testing.assert_close(split.lse, plain.lse, rtol=0, atol=2e-6)


def random_call(seed: int) -> tuple[Call, int]:
    """A call with few queries, and splits: layouts, scales, bands, softcap, dead rows, masks."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    mask_class = rng.choice(tuple(MaskClass))
    windowed = mask_class in (MaskClass.WINDOW, MaskClass.WINDOW_BOTTOM_RIGHT)
    call = make_call(
        rng.randint(1, 40),
        rng.randint(1, 400),
        64 - rng.choice((0, 0, 8, 3)),
        torch.bfloat16,
        batch=rng.randint(1, 2),
        kv_heads=rng.randint(1, 2),
        group=rng.choice((1, 2, 3, 5, 8)),
        seed=seed,
        value_dim=64 - rng.choice((0, 0, 16, 5)),
        sinks=rng.random() < 0.4,
        mask_class=mask_class,
        window_left=rng.choice((UNBOUNDED, 0, 3, 70)) if windowed else UNBOUNDED,
        window_right=rng.choice((UNBOUNDED, 0, 5, 70)) if windowed else UNBOUNDED,
        scale=rng.choice((None, None, 0.05, -0.1)),
        softcap=20.0 if seed % 4 == 0 else None,
        dead_rows=rng.choice(tuple(DeadRows)),
    )
    layouts = ("contiguous", "tokens_first", "expanded", "every_other")
    query, key, value = (
        laid_out(x, rng.choice(layouts)) for x in (call.query, call.key, call.value)
    )
    call = dataclasses.replace(call, query=query, key=key, value=value)
    if seed % 2 == 0:
        mask = random_mask(rng, generator, (*call.query.shape[:3], call.key.shape[2]))
        call = dataclasses.replace(call, attn_mask=mask)
    return call, rng.randint(1, 8)


def windowed(kernels: Variant) -> Variant:
    """The kernel that takes any band, so that few are compiled."""
    return dataclasses.replace(kernels, attend=dataclasses.replace(kernels.attend, window=True))


@pytest.mark.parametrize("way", SOME_WAYS, ids=str)
def test_random_calls(way: Way) -> None:
    for seed in range(40):
        call, splits = random_call(seed)
        assert_right(call, way, splits=splits, change=windowed, seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_more_random_calls(way: Way) -> None:
    for seed in range(1000, 1200):
        call, splits = random_call(seed)
        rows = random.Random(seed).choice((32, 64, 128))
        assert_right(call, way, tile=PACKED_SPLIT._replace(rows=rows), splits=splits, seed=seed)


@pytest.mark.parametrize(("head_dim", "value_dim"), [(128, 128), (96, 40), (256, 192), (64, 256)])
def test_head_dims(head_dim: int, value_dim: int) -> None:
    rows = 64 if max(head_dim, value_dim) > 128 else 32
    tile = PACKED_SPLIT._replace(rows=rows)
    for way in (Way("int4_fp8"), Way("int8_fp16"), WGMMA):
        call = make_call(6, 200, head_dim, torch.bfloat16, value_dim=value_dim, group=4)
        assert_right(call, way, tile=tile, splits=2)


def test_float32() -> None:
    call = make_call(6, 200, 64, torch.float32, value_dim=63, group=4, sinks=True)
    for way in (Way("int8_fp8"), WGMMA):
        assert_right(call, way, splits=2)


def test_masks_of_each_head() -> None:
    """One head sees what others do not: tiles hidden for some, for all, and shown whole."""
    call = make_call(3, 400, 64, torch.float16, kv_heads=2, group=4)
    shown = torch.ones(1, 8, 3, 400, dtype=torch.bool)
    shown[:, :, :, 64:128] = False  # for all
    shown[:, 1, :, 128:192] = False
    shown[:, 2, :, :] = False  # a head that sees nothing
    shown[:, 5, 1, :] = False
    shown[:, 7, :, 200:] = False
    bias = torch.zeros(1, 8, 3, 400).masked_fill(~shown, -inf)
    bias[:, 3, :, 320:] = -1.5
    for mask in (shown, bias):
        masked = dataclasses.replace(call, attn_mask=mask)
        for way in SOME_WAYS:
            assert_right(masked, way, splits=3, change=windowed)


def test_dead_rows_beside_what_is_not_finite() -> None:
    """A row without keys is zeros, and its LSE -inf, whatever the others of its group are."""
    call = make_call(16, 10, 64, torch.float16, group=4, mask_class=BOTTOM_RIGHT)
    for name in ("query", "key"):
        poisoned = getattr(call, name).clone()
        poisoned[0, 0, 8, 5] = nan  # query 0 has a scale with this one
        poisoned_call = dataclasses.replace(call, **{name: poisoned})
        for way in SOME_WAYS:
            result = way.attend(poisoned_call, PACKED_SPLIT, splits=2)
            assert result.lse is not None
            assert not result.output[:, :, :6].any()
            assert (result.lse[:, :, :6] == -inf).all()
            assert result.output[0, 0, 8].isnan().all()


@pytest.mark.parametrize("what", [nan, inf])
def test_what_is_not_finite_is_seen(what: float) -> None:
    """In whichever part it is."""
    for name in ("query", "key", "value"):
        call = make_call(4, 300, 64, torch.bfloat16, group=2)
        poisoned = getattr(call, name).clone()
        poisoned[0, 0, 2, 5] = what
        reached = {"query": (0, 0, 2), "key": (0,), "value": (0, slice(None), slice(None), 5)}[name]
        poisoned_call = dataclasses.replace(call, **{name: poisoned})
        for way in (Way("int8_fp8"), WGMMA):
            result = way.attend(poisoned_call, PACKED_SPLIT, splits=4)
            assert result.output[reached].isnan().all()


@pytest.mark.parametrize("way", [Way("int4_fp16"), WGMMA], ids=str)
def test_the_order_of_threads_does_not_matter(way: Way) -> None:
    call = make_call(6, 300, 64, torch.float16, group=4)
    results = [way.attend(call, PACKED_SPLIT, splits=3, seed=seed) for seed in range(4)]
    for again in results[1:]:
        assert same_bits(again.output, results[0].output)
        assert same_bits(again.lse, results[0].lse)


def test_large_scores_and_values() -> None:
    """Parts whose maxima are thousands apart, and V near the top of float16."""
    call = make_call(4, 300, 64, torch.float16, group=2)
    call.query.mul_(30)
    for way in (Way("int8_fp16"), Way("int8_fp8"), WGMMA):
        plain = way.attend(call)
        split = way.attend(call, PACKED_SPLIT, splits=4)
        assert distance(split.output, plain.output) < 0.03
    large = dataclasses.replace(call, value=torch.full_like(call.value, 6e4))
    for way in (Way("int8_fp8"), WGMMA):
        output = way.attend(large, PACKED_SPLIT, splits=4).output
        torch.testing.assert_close(output, torch.full_like(output, 6e4), rtol=4e-2, atol=0)


# --- what must fail ---------------------------------------------------------------------------

WHOLE, QUERY = "attend_hopper", "query"
TASK = f"{WHOLE}/hopper_task"
ROWS = f"{TASK}/query_rows"
OF_WGMMA = (WHOLE, QUERY, TASK, ROWS)
DECODE = make_call(5, 514, 64, torch.float16, kv_heads=2, group=3, seed=1, mask_class=BOTTOM_RIGHT)


@pytest.mark.parametrize(
    ("where", "old", "new"),
    [
        # parts that are not made relative to one maximum
        ("merge", "arch::exp2(of_part.x - origin)", "1.0f"),
        ("merge", "total = arch::fma(of_part.y, share, total);", "total += of_part.y;"),
        ("merge", "for (int part = 0; part < p.parts; ++part) { float2 const of_part = "
         "load_sums(sums, part); if", "for (int part = 1; part < p.parts; ++part) { float2 const "
         "of_part = load_sums(sums, part); if"),
        # a tile that no part has, one that two have
        ("attend", "first_tile_ + share.outer + (part_ < share.inner)",
         "first_tile_ + share.outer"),
        ("attend", "(part_ < share.inner ? part_ : share.inner)", "0"),
        # rows of another head, of another query; scales and means of another row
        ("attend/query_rows", "static_cast<int>(p_.group) + pair.inner",
         "static_cast<int>(p_.group)"),
        ("attend/query_rows", "query_[band][half] = pair.outer", "query_[band][half] = 0"),
        ("attend/query_rows", "query_scale(p_, head(band, half), query(band, half))",
         "query_scale(p_, head(0, 0), query(0, 0))"),
        ("attend/query_rows", "head_[band][half] * p_.query_blocks",
         "head_[0][0] * p_.query_blocks"),
        # keys that only the first query of the tile sees
        ("attend/query_rows", "existing(kTileRows - 1).outer", "existing(0).outer"),
        # the same of wgmma: a step that no part has, that two have, keys of the part after
        (TASK, "(share.outer + (part_ < share.inner)) * kTiles", "share.outer * kTiles"),
        (TASK, "(part_ < share.inner ? part_ : share.inner)", "0"),
        (TASK, "if (end_tile_ > after) end_tile_ = after;", ""),
        # and codes, scales and results of rows in the places of others
        (QUERY, "place.token(t) * p.group + head.inner", "place.token(t) * p.group"),
        (QUERY, "place.token(t) * p.group + head.inner",
         "head.inner * p.query_length + place.token(t)"),
        (QUERY, "block = head.outer *", "block = 0 *"),
        (ROWS, "query_scale(p_, head(band, half), query(band, half))",
         "query_scale(p_, head(0, 0), query(0, 0))"),
        (ROWS, "static_cast<int>(p_.group) + pair.inner", "static_cast<int>(p_.group)"),
        (ROWS, "existing(kTileRows - 1).outer", "existing(0).outer"),
        (WHOLE, "remaining[Rows::scale_of(0, half)]", "remaining[0]"),
        (WHOLE, "index_of(half) * p_.parts + task_->part()", "index_of(half) * p_.parts"),
    ],
)  # fmt: skip
def test_broken_parts_and_rows_are_noticed(where: str, old: str, new: str) -> None:
    kind, *headers = where.split("/")
    kernels = broken(kind, replacing(old, new), *headers)
    way = WGMMA if where in OF_WGMMA else Way("int4_fp16")
    # DriverError: what is read outside of the tensors ends the launch.
    with pytest.raises((AssertionError, DriverError)):
        assert_right(DECODE, way, splits=4, kernels=kernels)


def test_heads_of_a_mask_left_out_are_noticed() -> None:
    call = make_call(3, 200, 64, torch.float16, group=2)
    mask = torch.ones(1, 2, 3, 200, dtype=torch.bool)
    mask[:, 0, :, 64:] = False
    call = dataclasses.replace(call, attn_mask=mask)
    change = replacing("p_.tiles.head_stride == 0 ? 1 : static_cast<int>(p_.group)", "1")
    for way, where in ((Way("int4_fp16"), "attend/query_rows"), (WGMMA, ROWS)):
        assert_right(call, way, change=windowed)
        kind, *headers = where.split("/")
        with pytest.raises(AssertionError):
            assert_right(call, way, change=windowed, kernels=broken(kind, change, *headers))


def test_dead_rows_left_to_their_sums_are_noticed() -> None:
    call = make_call(16, 10, 64, torch.float16, group=4, mask_class=BOTTOM_RIGHT)
    call.query[0, 0, 8, 5] = nan
    for way, kind, total in (
        (Way("int8_fp8"), "attend", "total_[band][half]"),
        (WGMMA, WHOLE, "total_[half]"),
    ):
        kernels = broken(kind, replacing(f"dead ? 0.0f : {total}", total))
        result = way.attend(call, PACKED_SPLIT, splits=2, kernels=kernels)
        assert result.output[:, :, :6].isnan().any()
