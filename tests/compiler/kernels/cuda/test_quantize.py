"""Q, K and V quantized in one launch: bit by bit what four launches make, in any order of blocks,
and with whatever was in memory before; kernels whose blocks do not wait as they must fail.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from sage_compiler.kernels.cuda import sizes
from sage_compiler.kernels.cuda.arch import ARCHS
from sage_compiler.kernels.cuda.driver import DriverError
from sage_compiler.kernels.cuda.kernel import Target
from sage_compiler.kernels.cuda.loader import Loader
from sage_compiler.kernels.cuda.spec import QuantizeSpec
from sage_compiler.kernels.cuda.variants import Variant, variant
from sage_compiler.precision import RECIPES, Format
from sage_compiler.second_reading import Units, missed
from sage_compiler.semantics import MaskClass, RotaryPairs
from sage_compiler.traffic import CACHES, traffic
from tests.compiler.kernels.cuda.emulation import (
    ARCH,
    Result,
    attend,
    broken,
    replacing,
    the_host,
)
from tests.compiler.kernels.cuda.test_attention import make_call
from tests.compiler.kernels.cuda.test_rotary import FORMS, rotary_of
from tests.compiler.kernels.dense import Call
from tests.cutlass_templates import host

pytestmark = pytest.mark.skipif(host.missing() is not None, reason=str(host.missing()))

RECIPE_NAMES = ("int8_fp8", "int4_fp8", "int8_fp16", "int4_fp16")
COUNTERS = -4  # of the parts of the scratch memory
# What the launches hand on: all but the sums that only quantizers need.
OPERANDS = range(2, 9)


def be_ahead(monkeypatch: pytest.MonkeyPatch, tasks: int) -> None:
    """So many tasks of statistics come before the first conversion, or all of them."""

    def ahead(self: sizes.Sizes, kernels: Variant, multiprocessors: int, *, row_term: bool) -> int:
        return tasks

    monkeypatch.setattr(sizes.Sizes, "ahead", ahead)


def apart(kernels: Variant) -> Variant:
    """Four launches in place of one."""
    return replace(kernels, quantize=None)


def some_call(dtype: torch.dtype = torch.bfloat16, head_dim: int = 64, seed: int = 0) -> Call:
    """Several chunks of keys, ragged, and several heads of two sizes of groups."""
    return make_call(140, 600, head_dim, dtype, batch=2, kv_heads=2, group=2, seed=seed)


def quantized(call: Call, recipe: str, **options: object) -> Result:
    """The operands alone."""
    one = options.get("change") is not apart
    return attend(call, recipe, launches=1 if one else 4, **options)  # type: ignore[arg-type]


def assert_same(one: Result, other: Result) -> None:
    for part in OPERANDS:
        assert torch.equal(one.scratch[part], other.scratch[part]), part


@pytest.mark.parametrize("recipe", RECIPE_NAMES)
@pytest.mark.parametrize("ahead", [0, 15, 1000])
@pytest.mark.parametrize("want_lse", [False, True])
def test_one_launch_makes_what_four_do(
    recipe: str, ahead: int, want_lse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the statistics of no other, of part of one, of some and of all heads before the first
    conversion.
    """
    be_ahead(monkeypatch, ahead)
    call = some_call(torch.float16 if ahead % 2 else torch.bfloat16)
    expected = quantized(call, recipe, want_lse=want_lse, change=apart)
    for seed in (1, 2):
        assert_same(quantized(call, recipe, want_lse=want_lse, seed=seed), expected)


@pytest.mark.parametrize("recipe", ["int8_fp8", "int4_fp16"])
@pytest.mark.parametrize("head_dim", [64, 72, 160])
def test_masks_strides_and_dims(recipe: str, head_dim: int) -> None:
    """A band that hides keys and queries, a mask with keys that do not count, odd strides."""
    call = some_call(torch.float32 if head_dim == 64 else torch.bfloat16, head_dim, seed=3)
    mask = torch.where(torch.rand(140, 600, generator=torch.manual_seed(0)) < 0.5, 0.0, -1e4)
    mask[:, 500:] = -torch.inf
    spread = torch.empty(*call.key.shape[:3], 2 * head_dim, dtype=call.key.dtype)
    key = spread[..., ::2].copy_(call.key)
    semantics = replace(call.semantics, mask_class=MaskClass.CAUSAL)
    for other in (replace(call, attn_mask=mask, key=key), replace(call, semantics=semantics)):
        assert_same(quantized(other, recipe), quantized(other, recipe, change=apart))


def test_different_dims_of_key_and_value() -> None:
    call = some_call()
    call = replace(call, value=torch.cat([call.value, call.value.flip(1)], dim=3))
    assert_same(quantized(call, "int8_fp8"), quantized(call, "int8_fp8", change=apart))


@pytest.mark.parametrize("recipe", ["int8_fp8", "int4_fp8"])
def test_a_rotated_key(recipe: str) -> None:
    call = some_call()
    rotary = rotary_of(call, RotaryPairs.HALF, 20, FORMS[0])
    one = quantized(call, recipe, rotary=replace(rotary, query=None))
    assert_same(one, quantized(call, recipe, rotary=replace(rotary, query=None), change=apart))


# --- what must fail ---------------------------------------------------------------------------

UNPUBLISHED = "race between load_written .* and a store of the same launch: missing arrive or await"
NOT_YET = "deadlock: awaits .* it may only wait for those with lower tickets"
BREAKS = {
    "K without its sums": (
        "[&] { await_statistics(p, counters + kKeyDone);",
        "[&] {",
        UNPUBLISHED,
    ),
    "V without its magnitudes": (
        "await_statistics(p, counters_of(p, task.head) + kValueDone);",
        "",
        UNPUBLISHED,
    ),
    "K without the means of Q": (
        "await(counters + kQueryDone, "
        "static_cast<uint32_t>(p.query.group * p.query.query_blocks));",
        "",
        UNPUBLISHED,
    ),
    "K with the means of all blocks of Q but one": (
        "static_cast<uint32_t>(p.query.group * p.query.query_blocks));",
        "static_cast<uint32_t>(p.query.group * p.query.query_blocks) - 1);",
        UNPUBLISHED,
    ),
    "row terms without the mean of K": (
        "if (p.query.row_term != nullptr) await_statistics(p, counters + kKeyDone);",
        "",
        UNPUBLISHED,
    ),
    "all chunks are there, and not yet their sum": (
        "await(counter, arrivals(p) + 1);",
        "await(counter, arrivals(p));",
        UNPUBLISHED,
    ),
    "nobody but the first thread knows that it may go on": (
        "if (arch::thread_index() == 0) arch::await(counter, arrivals); arch::barrier();",
        "if (arch::thread_index() == 0) arch::await(counter, arrivals);",
        UNPUBLISHED,
    ),
    "a sum is published before all have stored it": (
        "* kHeadDim + channel, result); } arch::barrier();",
        "* kHeadDim + channel, result); }",
        UNPUBLISHED,
    ),
    "the statistics of the first head": (
        "OfKey::run(p.key, task.index, [&] {",
        "OfKey::run(p.key, task.index, [&] {uint32_t* const counters = counters_of(p, 0);",
        UNPUBLISHED,
    ),
    "a block that does not take the next ticket": (
        "arch::take_ticket(p.schedule.counters + kTickets)",
        "static_cast<uint32_t>(arch::block_index())",
        NOT_YET,
    ),
    "conversions before the last statistics of their unit": (
        "int const wanted = statistics + ",
        "int const wanted = statistics - 1 + ",
        NOT_YET,
    ),
}


@pytest.mark.parametrize("what", BREAKS)
def test_a_launch_whose_blocks_do_not_wait(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    be_ahead(monkeypatch, 0)
    old, new, message = BREAKS[what]
    kernels = broken("quantize", replacing(old, new))
    # Without what smooths Q, means of it have no part in it.
    recipe = "int4_fp8" if "of Q" in what else "int8_fp8"
    with pytest.raises(DriverError):
        quantized(some_call(), recipe, kernels=kernels)
    assert re.search(message, the_host().message())


def test_the_first_block_joins_what_the_others_have_not_stored() -> None:
    """It loads before they store, which no access shows: the sums do."""
    old, new = (
        "if (before + 1 != arrivals(p)) return;",
        "if (before != 0) return;",
    )
    kernels = broken("quantize", replacing(old, new))
    found = quantized(some_call(), "int8_fp8", kernels=kernels)
    with pytest.raises(AssertionError):
        assert_same(found, quantized(some_call(), "int8_fp8"))


def test_counters_that_are_not_cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever memory held before, or what the call before has counted."""
    monkeypatch.setattr(Target, "clear", lambda *_: None)
    with pytest.raises(DriverError):
        quantized(some_call(), "int8_fp8")
    assert "a counter must be zero before the launch" in the_host().message()


def test_one_launch_counts_its_blocks() -> None:
    """A block for each task: one more has nothing to do, and one fewer leaves something out."""
    call = some_call()
    for recipe in RECIPE_NAMES:
        running = quantized(call, recipe).call
        counters = quantized(call, recipe).scratch[COUNTERS].view(torch.int32).view(-1, 8)
        spec = running.kernels.quantize
        assert isinstance(spec, QuantizeSpec)
        arrivals, heads = 3 * spec.slices, 4
        assert counters.shape[0] >= 1 + heads
        assert counters[0, 0] == running.sizes.blocks(running.kernels, 1, 1)[0]
        assert (counters[1 : 1 + heads, 0] == arrivals + 1).all()
        assert (counters[1 : 1 + heads, 1] == (arrivals + 1 if spec.scales_value else 0)).all()
        smooths = RECIPES[recipe].qk is Format.INT4
        assert (counters[1 : 1 + heads, 2] == (2 * 2 if smooths else 0)).all()


# --- the account -------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [lambda same: same, apart])
@pytest.mark.parametrize("want_lse", [False, True])
@pytest.mark.parametrize("recipe", RECIPE_NAMES)
def test_the_bytes_are_those_of_the_account(
    recipe: str, want_lse: bool, change: Callable[[Variant], Variant]
) -> None:
    """What blocks load and store, sector by sector, is what ``traffic`` says."""
    call = make_call(256, 640, 64, torch.float16, kv_heads=2, group=2, value_dim=128)
    found = quantized(call, recipe, want_lse=want_lse, change=change, count_bytes=True)
    told = traffic(ARCHS[ARCH], found.call.kernels, found.call.sizes, row_term=want_lse)
    launches = the_host().launches()
    assert len(launches) == told.launches
    assert sum(each["loaded"] for each in launches) == told.loaded
    assert sum(each["stored"] for each in launches) == told.stored
    assert sum(each["streamed"] for each in launches) == told.streamed


def test_what_a_kernel_does_not_load_is_missed() -> None:
    """That the count can be wrong: statistics of half of each chunk."""
    call = make_call(256, 640, 64, torch.float16, kv_heads=2, group=2)
    old, new = "all = first + p.chunk_tokens;", "all = first + p.chunk_tokens / 2;"
    kernels = broken("statistics", replacing(old, new))
    found = quantized(call, "int8_fp8", kernels=kernels, count_bytes=True)
    told = traffic(ARCHS[ARCH], found.call.kernels, found.call.sizes, row_term=True)
    (logged,) = the_host().launches()
    assert logged["loaded"] < told.loaded


@pytest.mark.parametrize(
    ("arch", "recipe", "longest"),
    [("sm_90a", "int8_fp8", 16384), ("sm_80", "int8_fp16", 16384)],
)
def test_inputs_are_read_once_where_they_fit(arch: str, recipe: str, longest: int) -> None:
    """By the model: near the bound in one launch, and far from it in four."""
    kernels = variant(arch, "bfloat16", 128, recipe)
    for length in (1024, 4096, 16384, 131072):
        shape = sizes.Sizes.of(4, 32, 32, length, length)
        one, four = (traffic(ARCHS[arch], each, shape) for each in (kernels, apart(kernels)))
        assert (one.launches, four.launches) == (1, 4)
        assert (one.ratio < 1.05) == (length <= longest), length
        assert four.ratio > 1.39


@pytest.mark.parametrize(("length", "most"), [(32768, 1.01), (65536, 1.07), (131072, 1.2)])
@pytest.mark.parametrize(("arch", "recipe"), [("sm_90a", "int8_fp8"), ("sm_89", "int8_fp8")])
def test_heads_that_hardly_fit_are_read_again_in_part(
    arch: str, recipe: str, length: int, most: float
) -> None:
    """By the model: more where stores have no hint, and no more than twice."""
    kernels, shape = (
        variant(arch, "bfloat16", 128, recipe),
        sizes.Sizes.of(4, 32, 32, length, length),
    )
    hinted, plain = (
        traffic(ARCHS[arch], kernels, shape, streaming=streaming) for streaming in (True, False)
    )
    assert hinted.ratio < most
    assert hinted.ratio <= plain.ratio <= (hinted.inputs * 5 / 3 + hinted.stored) / hinted.bound
    fits = length * 256 <= CACHES[arch] // 2
    assert hinted.unfit == (0 if fits else 2 * hinted.inputs // 3)
    assert hinted.bound_of_cache == hinted.bound + hinted.unfit


def test_a_cache_keeps_what_was_touched_last() -> None:
    """By hand, one block after another: 16 blocks of 100 bytes, of which 50 are made."""
    units = Units(4, 1, 16, loaded=(100,), streamed=(50,), ahead=0, number=9)
    assert missed(units, 16 * 100 + 50, running=1) == 0  # what is made has gone first
    assert missed(units, 800, running=1) == 8 / 16  # the last half is read again first
    assert missed(units, 0, running=1) == 1
    # What is made takes room: 4 blocks and what was made of them, and the one that is read.
    assert missed(units, 800, running=1, streaming=False) == 11 / 16
    assert missed(units, 16 * 150, running=1, streaming=False) == 0
    # Between two readings of a unit two others are read, but at the ends.
    ahead = units._replace(ahead=4)
    assert missed(ahead, 2 * 1600, running=1) > 0.7
    assert missed(ahead, 3 * 1600 + 50, running=1) == 0
    assert 0 < missed(units, 1600, running=8) < 1


def test_what_is_followed_is_bounded() -> None:
    """Of heads without end, and of any number of heads."""
    for length, heads in ((1 << 24, 1), (300, 1 << 20)):
        kernels = variant("sm_90a", "bfloat16", 32, "int8_fp8")
        shape = sizes.Sizes.of(1, heads, heads, 128, length)
        assert traffic(ARCHS["sm_90a"], kernels, shape).again >= 0


AHEAD_IN_CACHE = 3
WITHIN = 0.04  # half a block of a unit, whose channels the model has in one piece or not at all
CACHES_IN_UNITS = (0.5, 0.75, 1.0, 1.5)


def missing(cache: float, kernels: Loader | None = None) -> tuple[float, float]:
    """Of 6 units, how often a byte of K and V is loaded that is not in a cache of so many units: as
    the kernels on a CPU do, and as the model says.
    """
    call = make_call(64, 1024, 64, torch.bfloat16, kv_heads=3)
    unit = call.key.nbytes // 3
    found = quantized(call, "int8_fp8", kernels=kernels, count_bytes=True, cache=int(cache * unit))
    (logged,) = the_host().launches()
    units = Units(4, 2, 16, (8192,), (4096,), ahead=AHEAD_IN_CACHE, number=6)
    assert found.call.kernels.quantize is not None
    return (logged["missed"] - call.query.nbytes) / (6 * unit), 1 + missed(
        units, int(cache * unit), running=1
    )


@pytest.mark.parametrize("cache", CACHES_IN_UNITS)
def test_tasks_touch_a_cache_in_the_order_of_the_model(
    cache: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    be_ahead(monkeypatch, AHEAD_IN_CACHE)
    found, told = missing(cache)
    assert found == pytest.approx(told, abs=WITHIN)


@pytest.mark.parametrize(
    ("header", "old", "new"),
    [
        ("quantize", "blocks - 1 - of_unit.inner;", "of_unit.inner;"),
        ("quantize", "static_cast<int>(p.schedule.ahead);", "2 * statistics;"),
        (
            "key",
            "arch::store_streaming(to, code);",
            "arch::store_global(to, code);",
        ),
        ("value", "arch::store_streaming(", "arch::store_global("),
    ],
)
def test_another_order_is_seen(
    header: str, old: str, new: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    be_ahead(monkeypatch, AHEAD_IN_CACHE)
    kernels = broken("quantize", replacing(old, new), header)
    found = [missing(cache, kernels) for cache in (0.75, 1.0)]
    assert any(abs(counted - told) > 2 * WITHIN for counted, told in found), found
