"""How the products of an attention are cut into blocks, and that a call goes by it."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch

from sage_compiler import rates
from sage_compiler.kernels import reference
from sage_compiler.kernels.cuda import dispatch, kernel
from sage_compiler.kernels.cuda.arch import ARCHS
from sage_compiler.kernels.cuda.cut import Cut, cuts, query_tile, reason
from sage_compiler.kernels.cuda.sizes import Reach, Sizes
from sage_compiler.kernels.cuda.spec import HEAD_DIMS, QUERY_BLOCK, QueryTile
from sage_compiler.kernels.cuda.variants import Variant, all_specs, variant
from sage_compiler.precision import TILE_MMA
from sage_compiler.semantics import MaskClass, Semantics
from tests.compiler.kernels.cuda.emulation import ARCH, WGMMA, Way, loader, named, the_host
from tests.compiler.kernels.cuda.test_attention import distance, make_call
from tests.compiler.kernels.dense import class_mask
from tests.cutlass_templates import host

PORTABLE = Way("int8_fp16")


def possible(
    sizes: Sizes, way: Way = PORTABLE, *, head_dim: int = 128, multiprocessors: int = 128
) -> tuple[Cut, ...]:
    """Without a band."""
    return cuts(
        way.arch,
        way.recipe,
        "bfloat16",
        head_dim,
        head_dim,
        sizes,
        sizes.key_blocks,
        multiprocessors,
    )


def cut(*arguments: Any, **options: Any) -> Cut:
    """The best one."""
    return possible(*arguments, **options)[0]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        # a decoder's step, one sequence and many; heads that share nothing; one head
        ((1, 32, 8, 1, 4096), Cut(QueryTile(32, True, True), 16)),
        ((64, 32, 8, 1, 4096), Cut(QueryTile(32, True, False), 1)),
        ((1, 32, 32, 1, 4096), Cut(QueryTile(32, True, True), 4)),
        ((1, 1, 1, 1, 1 << 20), Cut(QueryTile(32, True, True), 128)),
        # a few tokens at once, and so many that they take several tiles
        ((1, 32, 8, 16, 4096), Cut(QueryTile(64, True, True), 16)),
        ((1, 32, 4, 64, 4096), Cut(QueryTile(128, True, True), 8)),
        # few keys
        ((1, 8, 8, 4, 77), Cut(QueryTile(32, True, False), 1)),
        # many queries, and many of few heads
        ((1, 32, 8, 4096, 4096), Cut(QUERY_BLOCK, 1)),
        ((1, 8, 8, 256, 32768), Cut(QueryTile(128, False, True), 8)),
        ((1, 8, 8, 65, 100), Cut(QUERY_BLOCK, 1)),
    ],
)
def test_cuts(sizes: tuple[int, int, int, int, int], expected: Cut) -> None:
    found = Sizes.of(*sizes)
    assert cut(found) == expected
    by_wgmma = cut(found, WGMMA)  # the same, but that no tile is lower
    assert by_wgmma.tile == expected.tile._replace(rows=128)
    assert (by_wgmma.splits > 1) == (expected.splits > 1)
    said = reason(expected, found, 128)
    assert ("packed" in said) == (expected.tile.packed_heads and found.group > 1)
    assert ("parts" in said) == (expected.splits > 1)


def test_what_every_cut_is() -> None:
    """No block twice as long as others wait, no part too small, no tile that a query is not in."""
    rng = random.Random(0)
    for _ in range(2000):
        arch, head_dim = rng.choice(list(ARCHS)), rng.choice(HEAD_DIMS)
        way = Way(rng.choice(ARCHS[arch].recipes), arch)
        kv_heads = rng.choice((1, 2, 8))
        group = rng.choice((1, 2, 3, 4, 8, 71))
        length = rng.choice((1, 2, 7, 16, 64, 65, 130, 4096))
        keys = rng.choice((1, 64, 500, 8192, 1 << 20))
        sizes = Sizes.of(rng.choice((1, 3, 64)), kv_heads * group, kv_heads, length, keys)
        multiprocessors = rng.choice((1, 20, 132))
        found = cut(sizes, way, head_dim=head_dim, multiprocessors=multiprocessors)
        tile = found.tile
        assert tile.split == (found.splits > 1)
        lowest = query_tile(sizes, head_dim, wgmma=way.is_wgmma)
        assert tile._replace(split=False) == lowest
        assert tile.packed_heads == (length <= TILE_MMA.q_block // 2)
        blocks = sizes.tiles(tile)
        assert blocks * tile.rows >= sizes.rows
        assert blocks <= sizes.tiles(QUERY_BLOCK)
        if tile.split:
            assert sizes.key_blocks // found.splits >= 4
            assert blocks * found.splits <= 8 * multiprocessors
        kernels = variant(arch, "float16", head_dim, way.recipe, tile=tile)
        assert (kernels.merge is not None) == tile.split
        assert kernels.attend.query_tile == tile
        assert kernels.attend.shared_bytes <= ARCHS[arch].shared_bytes


def test_what_packs_have_comes_behind_the_best_cut() -> None:
    """For few queries, in one tile or in some, but not where blocks would read less."""
    shipped = QueryTile(32, packed_heads=True, split=True)
    for sizes, expected in (
        ((1, 32, 8, 1, 4096), [(shipped, 16)]),
        ((64, 32, 8, 1, 4096), [(shipped._replace(split=False), 1), (shipped, 1)]),
        ((1, 32, 8, 16, 4096), [(QueryTile(64, True, True), 16), (shipped, 8)]),
        ((1, 8, 8, 64, 8192), [(QueryTile(64, True, True), 16)]),  # in two tiles each
        ((1, 32, 8, 4096, 4096), []),
    ):
        found = possible(Sizes.of(*sizes))
        assert list(found) == [Cut(*each) for each in expected] + [Cut(QUERY_BLOCK, 1)]
        by_wgmma = possible(Sizes.of(*sizes), WGMMA)
        assert by_wgmma[-1] == Cut(QUERY_BLOCK, 1)
        assert all(each.tile.rows == 128 for each in by_wgmma)
        assert (shipped._replace(rows=128) in [each.tile for each in by_wgmma]) == bool(expected)
    assert [each.tile.rows for each in possible(Sizes.of(1, 1, 1, 1, 99), head_dim=256)] == [
        64,
        128,
    ]


def test_what_a_band_shows_is_what_counts() -> None:
    """A window of a long cache is not split as the cache would be."""
    for mask_class in MaskClass:
        semantics = Semantics(mask_class=mask_class)
        if "WINDOW" in mask_class.name:
            semantics = Semantics(mask_class=mask_class, window_left=100, window_right=0)
        for query_length, key_length in ((1, 700), (5, 300), (40, 20), (3, 64)):
            reach = Reach.of(semantics, query_length, key_length)
            seen = class_mask(semantics, query_length, key_length).any(0).nonzero().flatten()
            tiles = len({int(key) // TILE_MMA.kv_block for key in seen})
            assert reach.key_tiles == tiles


def test_the_usual_boards_are_those_of_predictions() -> None:
    for name, arch in ARCHS.items():
        assert rates._BOARDS[name].multiprocessors == arch.multiprocessors


def test_a_plan_is_refused_as_its_kernels_are() -> None:
    sizes, reach = Sizes.of(1, 1, 1, 1, 9), Reach.of(Semantics(), 1, 9)
    arguments = ("float64", 64, 64)
    planned = dispatch.plan(ARCH, "int8_fp8", *arguments, sizes, reach)
    assert planned == dispatch.decide(ARCH, "int8_fp8", *arguments)


@pytest.mark.skipif(host.missing() is not None, reason=str(host.missing()))
@pytest.mark.parametrize("way", [PORTABLE, WGMMA], ids=str)
def test_a_call_is_cut(way: Way) -> None:
    """By the multiprocessors of its target; the result is that of the reference, cut likewise."""
    call = make_call(2, 900, 64, torch.float16, kv_heads=2, group=4)
    for multiprocessors, splits in ((1, 1), (None, 3)):
        target = kernel.Target(way.arch, 0, 0, loader(), multiprocessors=multiprocessors)
        the_host().reset()
        output, _ = kernel.run(
            target,
            call.query,
            call.key,
            call.value,
            call.semantics,
            want_lse=True,
            recipe=way.recipe,
        )
        launches = the_host().launches()
        kinds = [launch["symbol"].split("_")[1] for launch in launches]
        merge = ["merge"] * (splits > 1)
        assert kinds == ["quantize", "attend", *merge]
        rows = "" if way.is_wgmma else "32_"
        cut_as = f"_{rows}True_{splits > 1}_"  # packed heads, split keys
        assert cut_as in launches[1]["symbol"] + "_"
        persistent = way.is_wgmma and multiprocessors == 1
        assert launches[1]["grid"] == (1 if persistent else 2 * splits)
        recipe = named(way.recipe, way.accumulator, 2 if way.is_wgmma else 1)
        expected, _ = reference.attention(call.query, call.key, call.value, recipe, splits=splits)
        assert distance(output, expected) < 1.5e-3


@pytest.mark.skipif(host.missing() is not None, reason=str(host.missing()))
@pytest.mark.parametrize(
    ("way", "masked"),
    [(Way("int8_fp8"), False), (Way("int8_fp8"), True), (WGMMA, False)],
    ids=str,
)
def test_a_pack_alone_decodes(way: Way, masked: bool) -> None:
    """With split keys, and one part of them has the bits of kernels that do not split."""
    packed = set(all_specs(way.arch))
    names = {spec.symbol for spec in packed}
    call = make_call(2, 300, 64, torch.float16, kv_heads=2, group=4)
    mask = torch.rand(2, 300) < 0.7 if masked else None
    results = []
    for obtainable in (None, lambda kernels: packed.issuperset(kernels.specs())):
        the_host().reset()
        target = kernel.Target(way.arch, 0, 0, loader(), multiprocessors=1)
        if obtainable is not None:
            target = dataclasses.replace(target, obtainable=obtainable)
        tensors = (call.query, call.key, call.value)
        results += kernel.run(
            target, *tensors, call.semantics, want_lse=True, recipe=way.recipe, attn_mask=mask
        )
        symbols = [launch["symbol"] for launch in the_host().launches()]
        assert names.issuperset(symbols) is (obtainable is not None)
        merge = ["merge"] * (obtainable is not None)
        assert [symbol.split("_")[1] for symbol in symbols] == ["quantize", "attend", *merge]
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])


@pytest.mark.skipif(host.missing() is not None, reason=str(host.missing()))
@pytest.mark.parametrize("way", [PORTABLE, WGMMA], ids=str)
def test_a_call_whose_finer_kernels_cannot_be_had_is_not_cut(way: Way) -> None:
    """A pack has those of 128 queries, and nothing compiles others."""
    call = make_call(2, 900, 64, torch.float16, kv_heads=2, group=4)
    asked = []

    def obtainable(kernels: Variant) -> bool:
        asked.append(kernels)
        return False

    the_host().reset()
    output, _ = kernel.run(
        kernel.Target(way.arch, 0, 0, loader(), obtainable=obtainable),
        call.query,
        call.key,
        call.value,
        call.semantics,
        want_lse=False,
        recipe=way.recipe,
    )
    launches = the_host().launches()
    uncut = dispatch.decide(way.arch, way.recipe, "float16", 64, 64)
    assert isinstance(uncut, Variant)
    assert [launch["symbol"] for launch in launches] == [spec.symbol for spec in uncut.specs()]
    # The best cut, and the one that packs have, which of few keys of few heads are one.
    assert [kernels.merge is not None for kernels in asked] == [True] * len(set(asked))
    assert torch.equal(output, way.attend(call).output)
