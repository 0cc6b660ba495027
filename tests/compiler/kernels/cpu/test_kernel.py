"""The native kernel against attention from its formula, and against the reference."""

from __future__ import annotations

import functools
import mmap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from math import inf, nan
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sage_compiler.errors import InvalidAttentionError
from sage_compiler.kernels import reference
from sage_compiler.kernels.cpu import kernel, library
from sage_compiler.kernels.cpu.kernel import attention, refuse_head_dims
from sage_compiler.kernels.layout import empty_output
from sage_compiler.precision import RECIPES
from sage_compiler.semantics import UNBOUNDED, DeadRows, MaskClass, Semantics
from tests.compiler.calls import LAYOUTS, gaussian, laid_out, make_call
from tests.compiler.calls import run as through_operator
from tests.compiler.kernels.cpu.isas import every_isa, number_of
from tests.compiler.kernels.dense import Call, dense, random_call
from tests.tolerances import check, check_lse, cosine, rel_l1

BLOCK = 256  # keys that are packed together
FINFO_MIN = torch.finfo(torch.float32).min
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# How far the kernel may be from the reference, metrics as in tests/tolerances.py; at least twice
# the worst of 460 calls like those of the test. Where an integer of Q or K is rounded the other
# way, a row is off; all others agree to the last bits of P.
REFERENCE_MAX_ABS = {"int8_int8": 1e-2, "int8_int16": 1e-2}
REFERENCE_REL_L1 = {"int8_int8": 1.5e-3, "int8_int16": 2e-4}
REFERENCE_LSE = {"int8_int8": 1.5e-2, "int8_int16": 1.5e-2}

every_recipe = pytest.mark.parametrize("recipe", kernel.RECIPES)


def run(call: Call, recipe: str = "int8_int8", isa: int | None = None) -> tuple[Tensor, Tensor]:
    return attention(
        call.query,
        call.key,
        call.value,
        call.semantics,
        attn_mask=call.attn_mask,
        sinks=call.sinks,
        want_lse=True,
        recipe=recipe,
        isa=isa,
    )


def verify(call: Call, recipe: str = "int8_int8", isa: int | None = None) -> None:
    """One call is within its tolerance of the formula."""
    output, lse = run(call, recipe, isa)
    expected, expected_lse = dense(call)
    check(output, expected, call.value, recipe)
    check_lse(lse, expected_lse, recipe)


def assert_same(call: Call, other: Call, recipe: str = "int8_int8", isa: int | None = None) -> None:
    """Two calls give the same bits."""
    for actual, expected in zip(run(call, recipe, isa), run(other, recipe, isa), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def servable(seeds: range, longest: int = 200) -> Iterator[Call]:
    """The random calls of these seeds whose head_dims the kernel takes."""
    for seed in seeds:
        call = random_call(seed, longest=longest)
        if refuse_head_dims(call.query.shape[3], call.value.shape[3]) is None:
            yield call


# --- against the formula


@every_isa
@every_recipe
@pytest.mark.parametrize("first", range(0, 60, 30))
def test_random_calls(isa_name: str, recipe: str, first: int) -> None:
    isa = number_of(isa_name)
    for call in servable(range(first, first + 30)):
        given = (call.query, call.key, call.value, call.attn_mask, call.sinks)
        before = [None if x is None else x.clone() for x in given]
        output, lse = run(call, recipe, isa)
        expected, expected_lse = dense(call)
        check(output, expected, call.value, recipe)
        check_lse(lse, expected_lse, recipe)
        assert output.dtype == call.query.dtype
        assert output.stride() == empty_output(call.query, call.value).stride()
        assert lse.dtype == torch.float32 and lse.is_contiguous()
        for was, now in zip(before, given, strict=True):
            assert was is None or now is None or torch.equal(was, now)


@every_isa
@every_recipe
def test_it_computes_what_the_reference_does(isa_name: str, recipe: str) -> None:
    """Much closer than to the formula: both round the same numbers, but for the last bits."""
    isa = number_of(isa_name)
    for call in servable(range(200, 220), longest=600):
        output, lse = run(call, recipe, isa)
        expected, expected_lse = reference.attention(
            call.query, call.key, call.value, RECIPES[recipe], call.semantics,
            attn_mask=call.attn_mask, sinks=call.sinks,
        )  # fmt: skip
        assert torch.equal(output.isnan(), expected.isnan())
        unit = float(call.value.abs().max())
        rounding = torch.finfo(output.dtype).eps
        error = (output.double() - expected.double()).nan_to_num().abs()
        assert float(error.max()) <= (REFERENCE_MAX_ABS[recipe] + rounding) * unit
        if expected.numel() >= 1024:
            total = float(expected.double().nan_to_num().abs().sum())
            assert float(error.sum()) <= (REFERENCE_REL_L1[recipe] + rounding) * total + 1e-9
        low = expected_lse < -1e30
        assert torch.equal(lse < -1e30, low)
        difference = (lse - expected_lse)[~low].abs()
        assert not difference.numel() or float(difference.max()) <= REFERENCE_LSE[recipe]


HEAD_DIMS = (
    *((size, size) for size in (16, 24, 40, 64, 72, 80, 96, 104, 128, 160, 256)),
    *((64, 128), (128, 64), (16, 256), (256, 16), (40, 72), (192, 128)),
)


@every_isa
@every_recipe
@pytest.mark.parametrize("head_dims", HEAD_DIMS, ids=str)
def test_head_dims(isa_name: str, recipe: str, head_dims: tuple[int, int]) -> None:
    head_dim, value_dim = head_dims
    call = make_call(
        37, 301, batch=1, kv_heads=2, head_dim=head_dim, value_dim=value_dim, dtype=torch.bfloat16
    )
    verify(call, recipe, number_of(isa_name))


@every_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (8, 1), (1, 1)], ids=str)
def test_dtypes_and_head_groups(isa_name: str, dtype: torch.dtype, heads: tuple[int, int]) -> None:
    call = make_call(50, 70, heads=heads[0], kv_heads=heads[1], head_dim=32, dtype=dtype)
    verify(call, isa=number_of(isa_name))


@every_isa
def test_ragged_lengths(isa_name: str) -> None:
    isa = number_of(isa_name)
    step = 7 if isa_name == "portable" else 1
    for length in range(1, 131, step):
        for query_length in (length, 131 - length):
            call = make_call(query_length, length, batch=1, heads=2, kv_heads=1, head_dim=24)
            verify(call, isa=isa)


@every_recipe
@pytest.mark.parametrize("key_length", [255, 256, 257, 511, 513, 2900])
def test_long_keys(recipe: str, key_length: int) -> None:
    call = make_call(90, key_length, batch=1, heads=2, kv_heads=1, head_dim=64)
    verify(call, recipe)
    causal = Semantics(MaskClass.CAUSAL_BOTTOM_RIGHT)
    verify(replace(call, semantics=causal), recipe)


@every_recipe
def test_long_queries(recipe: str) -> None:
    call = make_call(2300, batch=1, heads=2, kv_heads=2, head_dim=32)
    verify(replace(call, semantics=Semantics(MaskClass.CAUSAL)), recipe)


@every_isa
@every_recipe
def test_exact_uniform_rows(isa_name: str, recipe: str) -> None:
    """With scale 0 every P is 1, and V in -127..127 is its own quantization."""
    generator = torch.Generator().manual_seed(0)
    value = torch.randint(-127, 128, (1, 2, 600, 16), generator=generator).float()
    value[:, :, ::BLOCK], value[:, :, 1::BLOCK] = 127.0, -127.0
    call = make_call(50, 600, batch=1, heads=2, kv_heads=2, head_dim=16)
    call = replace(call, value=value, semantics=Semantics(scale=0.0))
    output, lse = run(call, recipe, number_of(isa_name))
    expected, expected_lse = dense(call)
    torch.testing.assert_close(output.double(), expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("recipe", kernel.RECIPES)
def test_the_lse_is_computed_only_when_it_is_wanted(recipe: str) -> None:
    call = make_call(40, 50, head_dim=16)
    output, lse = attention(
        call.query, call.key, call.value, call.semantics,
        attn_mask=None, sinks=None, want_lse=False, recipe=recipe,
    )  # fmt: skip
    assert lse.numel() == 0
    assert torch.equal(output, run(call, recipe)[0])


def test_what_must_fail_does_fail() -> None:
    call = replace(
        make_call(128, head_dim=64), attn_mask=torch.rand(128, 128) < 0.5, sinks=torch.ones(4)
    )
    verify(call)
    for broken in (
        replace(call, attn_mask=None),
        replace(call, sinks=None),
        replace(call, semantics=Semantics(MaskClass.CAUSAL)),
        replace(call, semantics=Semantics(scale=0.25)),
        replace(call, semantics=Semantics(softcap=0.5)),
    ):
        output, _ = run(broken)
        with pytest.raises(AssertionError, match="int8_int8"):
            check(output, dense(call)[0], call.value, "int8_int8")


# --- layouts


@every_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_change_nothing(isa_name: str, dtype: torch.dtype) -> None:
    isa = number_of(isa_name)
    for layout in LAYOUTS:
        call = make_call(70, 300, kv_heads=2, head_dim=40, dtype=dtype, layout=layout)
        dense_call = Call(call.query.contiguous(), call.key.contiguous(), call.value.contiguous())
        assert_same(call, dense_call, isa=isa)
        assert run(call)[0].stride() == empty_output(call.query, call.value).stride()


def test_a_batch_that_is_expanded() -> None:
    call = make_call(40, 90, batch=1, head_dim=32)
    expanded = replace(call, key=call.key.expand(3, -1, -1, -1))
    expanded = replace(
        expanded, query=call.query.expand(3, -1, -1, -1), value=call.value.expand(3, -1, -1, -1)
    )
    output, lse = run(expanded)
    wanted, wanted_lse = run(call)
    for index in range(3):
        assert torch.equal(output[index], wanted[0]) and torch.equal(lse[index], wanted_lse[0])


def test_offsets_beyond_32_bits() -> None:
    """Heads, and rows of a mask, that lie 2**31 elements apart in memory that is never touched."""
    far, length, head_dim = 2**31 + 64, 70, 16
    span = length * head_dim
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    memory = mmap.mmap(-1, 2 * (far + 3 * span), flags=flags)  # bytes
    elements = torch.frombuffer(memory, dtype=torch.float16)
    shape, strides = (1, 2, length, head_dim), (far, far, head_dim, 1)
    call = make_call(length, batch=1, heads=2, kv_heads=2, head_dim=head_dim, dtype=torch.float16)
    apart = []
    for index, tensor in enumerate((call.query, call.key, call.value)):
        view = torch.as_strided(elements, shape, strides, index * span)
        apart.append(view.copy_(tensor))
    mask = torch.rand(length, length) < 0.5
    call = replace(call, attn_mask=mask.unsqueeze(0).expand(2, -1, -1))
    bits = torch.frombuffer(memory, dtype=torch.bool)[2 * 3 * span :]  # behind the first heads
    far_mask = torch.as_strided(bits, (2, length, length), (far, length, 1))
    far_mask.copy_(call.attn_mask)
    assert_same(Call(*apart, attn_mask=far_mask), call)
    verify(call)


# --- masks


@every_isa
@pytest.mark.parametrize("mask_class", MaskClass)
def test_mask_classes_show_what_they_say(isa_name: str, mask_class: MaskClass) -> None:
    isa = number_of(isa_name)
    sides = [(UNBOUNDED, UNBOUNDED)]
    if "window" in mask_class:
        sides = [(20, 3), (0, 0), (UNBOUNDED, 5), (5, UNBOUNDED), (300, 300), *sides]
    lengths = [(1, 130), (130, 1), (70, 300), (300, 70), (129, 129), (2, 600)]
    for (left, right), shape in product(sides, lengths):
        semantics = Semantics(mask_class, window_left=left, window_right=right)
        call = make_call(*shape, batch=1, heads=2, kv_heads=1, head_dim=16)
        verify(replace(call, semantics=semantics), isa=isa)


def test_bands_that_show_nothing() -> None:
    for mask_class, left, right in (
        (MaskClass.WINDOW, 3, 3),  # queries far behind the last key
        (MaskClass.WINDOW_BOTTOM_RIGHT, 2, 1),
        (MaskClass.CAUSAL_BOTTOM_RIGHT, UNBOUNDED, UNBOUNDED),
    ):
        for dead_rows in DeadRows:
            semantics = Semantics(
                mask_class, window_left=left, window_right=right, dead_rows=dead_rows
            )
            call = make_call(400, 20, batch=1, heads=2, kv_heads=2, head_dim=16)
            verify(replace(call, semantics=semantics))


MASK_SHAPES = (
    *product((2, 1), (4, 1), (45, 1), (70, 1)),
    *((4, 45, 70), (1, 1, 70), (4, 1, 1), (45, 70), (45, 1), (1, 70), (70,), (1,)),
)


@pytest.mark.parametrize("dtype", [torch.bool, *DTYPES], ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_masks_broadcast(dtype: torch.dtype, kv_heads: int) -> None:
    call = make_call(45, 70, heads=4, kv_heads=kv_heads, head_dim=16)
    for seed, shape in enumerate(MASK_SHAPES):
        mask = gaussian(*shape, seed=seed)
        mask = mask > -0.3 if dtype == torch.bool else mask.to(dtype)
        masked = replace(call, attn_mask=mask)
        verify(masked)
        full = mask.expand(2, 4, 45, 70)
        assert_same(masked, replace(call, attn_mask=full))
        assert_same(masked, replace(call, attn_mask=full.contiguous()))


@every_isa
@pytest.mark.parametrize("dtype", [torch.bool, *DTYPES], ids=str)
def test_masks_of_any_strides(isa_name: str, dtype: torch.dtype) -> None:
    isa = number_of(isa_name)
    call = make_call(70, 300, heads=4, kv_heads=2, head_dim=16)
    mask = gaussian(2, 4, 70, 300, seed=3)
    mask[gaussian(2, 4, 70, 300, seed=4) > 1.0] = -inf
    mask = mask > -0.3 if dtype == torch.bool else mask.to(dtype)
    masked = replace(call, attn_mask=mask)
    verify(masked, isa=isa)
    for layout in ("head_dim_first", "tokens_first", "every_other", "sliced"):
        assert_same(masked, replace(call, attn_mask=laid_out(mask, layout)), isa=isa)
    wide = torch.cat([mask, mask], -1)[..., 300:]  # rows that start anywhere
    assert_same(masked, replace(call, attn_mask=wide), isa=isa)


def test_a_mask_and_a_band_together() -> None:
    for mask_class in MaskClass:
        windowed = {"window_left": 30, "window_right": 9} if "window" in mask_class else {}
        semantics = Semantics(mask_class, softcap=8.0, **windowed)
        call = make_call(90, 300, batch=1, head_dim=16)
        for mask in (gaussian(90, 300, seed=5) > 0, gaussian(1, 4, 90, 300, seed=6)):
            verify(replace(call, semantics=semantics, attn_mask=mask))


def test_a_byte_that_is_not_one_is_true() -> None:
    call = make_call(30, 40, head_dim=16)
    visible = gaussian(30, 40, seed=7) > 0
    odd = torch.where(visible, torch.tensor(6, dtype=torch.uint8), 0).to(torch.uint8)
    assert_same(replace(call, attn_mask=odd.view(torch.bool)), replace(call, attn_mask=visible))


@every_isa
@every_recipe
@pytest.mark.parametrize("dead_rows", DeadRows)
def test_rows_that_see_nothing(isa_name: str, recipe: str, dead_rows: DeadRows) -> None:
    isa = number_of(isa_name)
    mask = torch.rand(2, 1, 70, 90) < 0.5
    mask[1, :, 5] = False
    call = make_call(70, 90, heads=2, kv_heads=2, head_dim=16)
    call = replace(call, semantics=Semantics(dead_rows=dead_rows))
    biases = torch.zeros(mask.shape).masked_fill(~mask, -inf)
    for given in (mask, biases, mask[1:], biases[1:]):
        masked = replace(call, attn_mask=given)
        verify(masked, recipe, isa)
        output, lse = run(masked, recipe, isa)
        assert (lse[1, :, 5] == -inf).all()
        dead = output[1, :, 5]
        assert bool(dead.isnan().all() if dead_rows is DeadRows.NAN else (dead == 0).all())
        with_sinks = replace(masked, sinks=torch.tensor([1.0, -2.0]))
        verify(with_sinks, recipe, isa)
        output, lse = run(with_sinks, recipe, isa)
        assert (output[1, :, 5] == 0).all()
        torch.testing.assert_close(lse[1, :, 5], torch.tensor([1.0, -2.0]), rtol=0, atol=1e-6)


@every_isa
@pytest.mark.parametrize("low", [-1e4, FINFO_MIN])
def test_finite_masks_stay_additive(isa_name: str, low: float) -> None:
    isa = number_of(isa_name)
    mask = torch.zeros(1, 1, 60, 80)
    mask[..., 50:] = low
    mask[:, :, 7] = low  # a row wholly masked
    call = replace(make_call(60, 80, batch=1, head_dim=64), attn_mask=mask)
    verify(call, isa=isa)
    if low == FINFO_MIN:
        output, _ = run(call, isa=isa)
        average = call.value.mean(2)
        check(output[:, :, 7], average, call.value, "int8_int8")


def test_masked_slots_have_no_weight_in_the_statistics() -> None:
    """300 of 4096 slots live, garbage in the rest: as accurate as with the rest cut off."""
    live, call = 300, make_call(64, 4096, batch=1, heads=2, kv_heads=2, head_dim=64)
    key, value = call.key.clone(), call.value.clone()
    key[:, :, :live] += 3 * gaussian(1, 2, 1, 64, seed=9)
    cut = Call(call.query, key[:, :, :live], value[:, :, :live])
    expected, _ = dense(cut)
    visible = (torch.arange(4096) < live).view(1, 1, 1, -1)
    masks = [visible, *(torch.zeros(visible.shape).masked_fill(~visible, x) for x in (-inf, -1e4))]
    wanted = rel_l1(run(cut)[0], expected)
    for garbage, mask in product((0.0, 30.0), masks):
        key[:, :, live:] = garbage * call.key[:, :, live:]
        value[:, :, live:] = garbage * call.value[:, :, live:]
        output, _ = run(Call(call.query, key, value, attn_mask=mask))
        assert rel_l1(output, expected) == pytest.approx(wanted, rel=0.02)


# --- sinks, softcap, scale


@every_isa
@every_recipe
def test_sinks_softcap_scale_and_a_biased_key(isa_name: str, recipe: str) -> None:
    isa = number_of(isa_name)
    call = make_call(100, 300, batch=1, heads=4, kv_heads=2, head_dim=64)
    call = replace(call, key=call.key + 4 * gaussian(1, 2, 1, 64, seed=8))
    for sinks, softcap, scale in product(
        (None, torch.tensor([3.0, -1.0, 12.0, -inf])), (None, 4.0), (None, -0.1)
    ):
        semantics = Semantics(softcap=softcap, scale=scale)
        verify(replace(call, semantics=semantics, sinks=sinks), recipe, isa)


def test_scalars_that_float32_cannot_tell_from_zero() -> None:
    """A softcap of zero would mean none."""
    call = make_call(40, 50, head_dim=16)
    nothing = replace(call, semantics=Semantics(scale=0.0))
    for semantics in (Semantics(scale=1e-60), Semantics(softcap=1e-60)):
        output, lse = run(replace(call, semantics=semantics))
        for actual, expected in zip((output, lse), run(nothing), strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_sinks_of_any_dtype_and_stride(dtype: torch.dtype) -> None:
    call = make_call(40, 50, head_dim=16)
    sinks = torch.tensor([3.0, 9.0, -1.0, 9.0, 0.5, 9.0, 2.0, 9.0], dtype=dtype)[::2]
    expected = replace(call, sinks=sinks.float().contiguous())
    assert_same(replace(call, sinks=sinks), expected)


# --- what is not finite


@every_isa
@every_recipe
def test_garbage_in_slots_nobody_sees_has_no_effect(isa_name: str, recipe: str) -> None:
    isa = number_of(isa_name)
    clean = make_call(70, 300, batch=1, heads=2, kv_heads=2, head_dim=32)
    hidden = torch.arange(300) % 3 == 1
    dead_query = torch.arange(70) == 9
    visible = ~hidden & ~dead_query.view(-1, 1)
    floats = torch.zeros(70, 300).masked_fill(~visible, -inf)
    windowed = Semantics(MaskClass.WINDOW, window_left=5, window_right=2)
    cases = [
        (Semantics(), visible, hidden, dead_query),
        (Semantics(softcap=5.0), floats, hidden, dead_query),
        (windowed, None, torch.arange(300) > 71, torch.zeros(70, dtype=torch.bool)),
    ]
    for semantics, mask, keys, queries in cases:
        filled = functools.partial(_filled, clean, keys, queries)
        zeros = replace(filled(0.0), semantics=semantics, attn_mask=mask)
        for garbage in (1e4, nan, inf, -inf):
            dirty = replace(filled(garbage), semantics=semantics, attn_mask=mask)
            assert_same(dirty, zeros, recipe, isa)


def _filled(call: Call, keys: Tensor, queries: Tensor, x: float) -> Call:
    return Call(
        call.query.masked_fill(queries.view(-1, 1), x),
        call.key.masked_fill(keys.view(-1, 1), x),
        call.value.masked_fill(keys.view(-1, 1), x),
    )


@every_isa
def test_nan_in_a_mask_shows_its_own_key_and_no_other(isa_name: str) -> None:
    call = make_call(70, 128, batch=1, heads=2, kv_heads=2, head_dim=16)
    mask = torch.zeros(70, 128)
    mask[:, 0] = -inf  # whichever lane of a vector's neighbours holds NaN
    mask[40, 1:40] = nan
    hidden, nobody = torch.arange(128) == 0, torch.zeros(70, dtype=torch.bool)
    filled = functools.partial(_filled, call, hidden, nobody)
    zeros, dirty = (replace(filled(x), attn_mask=mask) for x in (0.0, nan))
    assert_same(dirty, zeros, isa=number_of(isa_name))
    seen = run(dirty, isa=number_of(isa_name))[0].isfinite().all(-1)
    assert not seen[..., 40].any()
    assert seen.sum() == 2 * 69


@every_isa
@pytest.mark.parametrize("garbage", [nan, inf, -inf])
@pytest.mark.parametrize("where", ["query", "key", "value", "attn_mask"])
def test_what_is_not_finite_and_visible_shows(isa_name: str, garbage: float, where: str) -> None:
    if where == "attn_mask" and garbage == -inf:
        return  # an ordinary mask
    call = make_call(70, 90, batch=1, heads=2, kv_heads=2, head_dim=16)
    call = replace(call, attn_mask=torch.zeros(1, 2, 70, 90))
    poisoned = getattr(call, where).clone()
    poisoned[0, 1, 40, 3] = garbage
    call = replace(call, **{where: poisoned})
    output, _ = run(call, isa=number_of(isa_name))
    sdpa = F.scaled_dot_product_attention(
        call.query, call.key, call.value, attn_mask=call.attn_mask
    )
    assert output[sdpa.isnan()].isnan().all()
    if where == "value":  # SDPA's own result may be infinite there
        assert not output[0, 1, :, 3].isfinite().any()
    else:
        assert output[0, 1, 40].isnan().all()
    assert output[0, 0].isfinite().all()


@every_isa
def test_extreme_magnitudes_stay_finite(isa_name: str) -> None:
    isa = number_of(isa_name)
    for factor in (1e-30, 1e15):
        call = make_call(40, 70, batch=1, head_dim=16)
        call = replace(call, query=call.query / factor, key=call.key * factor)
        verify(call, isa=isa)
    output, _ = run(replace(call, value=call.value * 1e30), isa=isa)
    assert output.isfinite().all() and cosine(output * 1e-30, dense(call)[0]) > 0.999


# --- nothing at all


@pytest.mark.parametrize("want_lse", [False, True])
@pytest.mark.parametrize("shape", [(0, 2, 5, 6), (1, 0, 5, 6), (1, 2, 0, 6), (1, 2, 5, 0)], ids=str)
def test_empty_calls(shape: tuple[int, int, int, int], want_lse: bool) -> None:
    batch, heads, query_length, key_length = shape
    call = make_call(
        query_length, key_length, batch=batch, heads=heads, kv_heads=heads, head_dim=16
    )
    sinks = torch.full((heads,), 2.0)
    for dead_rows, sink, mask in product(DeadRows, (None, sinks), (None, torch.ones(key_length))):
        output, lse = attention(
            call.query, call.key, call.value, Semantics(dead_rows=dead_rows),
            attn_mask=mask, sinks=sink, want_lse=want_lse, recipe="int8_int8",
        )  # fmt: skip
        assert output.shape == call.query.shape and (output == 0).all()
        if want_lse:
            assert lse.shape == (batch, heads, query_length)
            assert (lse == (-inf if sink is None else 2.0)).all()


# --- threads


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def busy_call(seed: int = 0) -> Call:
    call = make_call(300, 700, heads=4, kv_heads=2, head_dim=32)
    return replace(
        call,
        query=call.query + seed,
        attn_mask=gaussian(2, 1, 300, 700, seed=seed) > -0.5,
        semantics=Semantics(MaskClass.CAUSAL_BOTTOM_RIGHT),
    )


@every_isa
def test_the_result_does_not_depend_on_the_threads(
    isa_name: str, threads: Callable[[int], None]
) -> None:
    isa = number_of(isa_name)
    call = busy_call()
    found = []
    for count in (1, 2, 3, 7, 2, 1):
        threads(count)
        found.append(run(call, isa=isa))
    for output, lse in found[1:]:
        assert torch.equal(output, found[0][0]) and torch.equal(lse, found[0][1])


def test_calls_from_several_threads_at_once(threads: Callable[[int], None]) -> None:
    threads(2)
    calls = [busy_call(seed) for seed in range(4)]
    expected = [run(call) for call in calls]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for (output, lse), (wanted, wanted_lse) in zip(
                pool.map(run, calls), expected, strict=True
            ):
                assert torch.equal(output, wanted) and torch.equal(lse, wanted_lse)


def test_a_torch_without_a_pool_for_us(monkeypatch: pytest.MonkeyPatch) -> None:
    call = busy_call()
    expected = run(call)
    monkeypatch.setattr(kernel.need(), "_host_functions", None)
    for actual, wanted in zip(run(call), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_memory_that_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the exact size, too: what is written beyond it is another's."""
    call = busy_call()
    expected = run(call)
    monkeypatch.setattr(library, "KEPT_BYTES", 0)
    monkeypatch.setattr(library._kept, "memory", None)
    for actual, wanted in zip(run(call), expected, strict=True):
        assert torch.equal(actual, wanted)
    assert library._kept.memory is None
    for call in servable(range(300, 310), longest=90):
        verify(call)


# --- through the operator


def test_the_gradient_is_that_of_exact_attention() -> None:
    gradients = []
    for recipe in ("int8_int8", "exact"):
        call = make_call(40, 50, head_dim=16)
        leaves = [x.requires_grad_() for x in (call.query, call.key, call.value)]
        through_operator(call, recipe).backward(gaussian(2, 4, 40, 16, seed=9))
        gradients.append([leaf.grad for leaf in leaves])
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_operator_hands_on_what_the_kernel_returns(layout: str) -> None:
    call = make_call(40, 50, head_dim=16, layout=layout)
    output, _ = run(call)
    found = through_operator(call, "int8_int8")
    assert torch.equal(found, output) and found.stride() == output.stride()


def test_tensors_whose_sign_is_a_flag() -> None:
    x = torch.randn(1, 2, 40, 16, dtype=torch.cfloat).conj().imag
    assert x.is_neg()
    call = Call(x, x, x)
    plain = Call(*(tensor.resolve_neg() for tensor in (x, x, x)))
    assert torch.equal(through_operator(call, "int8_int8"), run(plain)[0])


# --- bad calls


@pytest.mark.parametrize(
    "change, words",
    [
        ({"isa": 99}, "isa: "),
        ({"semantics": Semantics(scale=1e39)}, "scale: "),
        ({"semantics": Semantics(softcap=1e39)}, "softcap: "),
        ({"query": torch.ones(1, 4, 5, 12), "key": torch.ones(1, 2, 6, 12)}, "head_dim: "),
        ({"query": torch.ones(1, 4, 5, 264), "key": torch.ones(1, 2, 6, 264)}, "head_dim: "),
        ({"value": torch.ones(1, 2, 6, 8)}, "value_head_dim: "),
        ({"query": torch.ones(1, 3, 5, 16)}, "heads: "),
    ],
    ids=str,
)
def test_what_the_library_refuses_is_said(change: dict[str, Any], words: str) -> None:
    query, key = torch.ones(1, 4, 5, 16), torch.ones(1, 2, 6, 16)
    arguments: dict[str, Any] = {"query": query, "key": key, "value": key, "semantics": Semantics()}
    options: dict[str, Any] = {"attn_mask": None, "sinks": None, "want_lse": False}
    given = {**arguments, **options, "recipe": "int8_int8", **change}
    with pytest.raises(InvalidAttentionError) as error:
        attention(**given)
    assert words in str(error.value)


@pytest.mark.parametrize("sink", [FINFO_MIN, -1e38, torch.finfo(torch.float32).max, 1e38])
@pytest.mark.parametrize("dead_rows", list(DeadRows))
@pytest.mark.parametrize("hidden", [True, False], ids=["dead", "live"])
def test_sinks_of_any_finite_size(sink: float, dead_rows: DeadRows, hidden: bool) -> None:
    call = make_call(5, 70, head_dim=32)
    mask = torch.zeros(1, 1, 1, 70, dtype=torch.bool) if hidden else None
    sinks = torch.full((call.query.shape[1],), sink)
    call = replace(call, attn_mask=mask, sinks=sinks, semantics=Semantics(dead_rows=dead_rows))
    output, lse = run(call)
    expected, expected_lse = reference.attention(
        call.query,
        call.key,
        call.value,
        RECIPES["int8_int8"],
        call.semantics,
        attn_mask=mask,
        sinks=sinks,
    )
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-2)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("side", [2**40, 2**62, 2**63 - 1])
def test_windows_beyond_any_length(side: int) -> None:
    call = make_call(50, 90, head_dim=32)
    for sides in ((0, side), (side, 0), (side, side)):
        bounded = tuple(min(each, 200) for each in sides)
        wide = replace(call, semantics=Semantics(MaskClass.WINDOW, *sides))
        same = replace(call, semantics=Semantics(MaskClass.WINDOW, *bounded))
        assert_same(wide, same)
        recipe = RECIPES["int8_int8"]
        for one, other in zip(
            reference.attention(wide.query, wide.key, wide.value, recipe, wide.semantics),
            reference.attention(same.query, same.key, same.value, recipe, same.semantics),
            strict=True,
        ):
            assert torch.equal(one, other)
        for each in (wide, same):
            assert torch.equal(through_operator(each), through_operator(same))


@every_isa
def test_a_scale_of_zero_is_an_average(isa_name: str) -> None:
    call = make_call(5, 70, head_dim=32)
    call = replace(call, key=call.key * 1e34, semantics=Semantics(scale=0.0))
    output, lse = run(call, isa=number_of(isa_name))
    expected, expected_lse = dense(replace(call, key=torch.zeros_like(call.key)))
    check(output, expected, call.value, "int8_int8")
    check_lse(lse, expected_lse, "int8_int8")


def test_a_quarter_of_a_million_keys() -> None:
    call = make_call(3, 1 << 18, head_dim=16, batch=1)
    call = replace(call, semantics=Semantics(MaskClass.CAUSAL_BOTTOM_RIGHT))
    output, lse = run(call)
    expected, expected_lse = dense(call)
    check(output, expected, call.value, "int8_int8")
    check_lse(lse, expected_lse, "int8_int8")


def most_of_a_thread(dims: int) -> int:
    """More than the scratch memory of a thread, and 1024 packed keys, for D + Dv channels."""
    return 50_000 + 1700 * dims


@pytest.mark.parametrize("masked", ["not", "by one mask", "by one mask per head"])
@pytest.mark.parametrize("heads", [(1, 1), (8, 8), (64, 1), (4096, 1), (5000, 5000)])
def test_the_workspace_is_little_more_than_keys_and_values(
    heads: tuple[int, int], masked: str
) -> None:
    """At most 1.3 times their INT8 size, and so much per thread."""
    found, storage = kernel.need(), torch.empty((1 << 21) + 8192, dtype=torch.bool)
    head_dims = (16, 24, 40, 64, 96, 128, 248, 256)
    lengths = product((1, 4096, 1 << 18), (1, 2, 49, 65, 129, 257, 577, 1001, 1025, 4096, 1 << 18))
    for (query_length, length), dims in product(lengths, product(head_dims, head_dims)):
        mask = None
        if masked != "not":  # rows overlap: they are told apart by their strides alone
            several = masked == "by one mask per head"
            shape = (1, heads[0] if several else 1, query_length, length)
            mask = storage.as_strided(shape, (0, int(several), 1, 1))
        problem = kernel.pack_problem(
            found.isa,
            "int8_int8",
            torch.float32,
            (1, *heads, query_length, length, *dims, 0),
            Semantics(),
            attn_mask=mask,
        )
        for workers in (1, 9):
            most = 1.3 * heads[1] * length * sum(dims) + workers * most_of_a_thread(sum(dims))
            assert found.workspace_size(problem, workers) <= most, (query_length, length, dims)


@every_isa
@pytest.mark.parametrize("mask", [None, torch.bool, torch.float32])
def test_many_heads_of_few_keys(isa_name: str, mask: torch.dtype | None) -> None:
    """Packed all at once they would take several times the memory of their keys and values."""
    call = make_call(37, 70, batch=30, heads=24, kv_heads=12, head_dim=16)
    if mask is not None:
        shown = gaussian(30, 24, 37, 70, seed=13) > 0
        bias = gaussian(30, 24, 37, 70, seed=14).masked_fill(~shown, -inf)
        call = replace(call, attn_mask=shown if mask == torch.bool else bias)
    problem = kernel.pack_problem(
        number_of(isa_name),
        "int8_int8",
        torch.float32,
        (30, 24, 12, 37, 70, 16, 16, 0),
        Semantics(),
    )
    at_once = kernel.need().packed_size(problem)
    assert kernel.need().workspace_size(problem, 1) < at_once, "the case is not what it is to be"
    verify(call, isa=number_of(isa_name))


@every_isa
def test_more_heads_with_a_mask_each_than_there_is_room_to_describe(isa_name: str) -> None:
    shown = gaussian(2, 96, 5, 130, seed=15) > 0.5
    call = make_call(5, 130, batch=2, heads=96, kv_heads=1, head_dim=16)
    verify(replace(call, attn_mask=shown), isa=number_of(isa_name))


@every_isa
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_tiles_of_a_mask_seen_coarsely(isa_name: str, dtype: torch.dtype) -> None:
    """Many rows, few keys: the map of the mask has an entry for more than 64 rows."""
    call = make_call(1300, 200, batch=1, heads=8, kv_heads=1, head_dim=16)
    kinds = gaussian(8, 21, 4, seed=11)  # of tiles: hidden, shown, in between
    tiles = torch.where(kinds > 0.9, inf, torch.where(kinds < 0.2, -inf, 0.0))
    rows, keys = torch.arange(1300) // 64, torch.arange(200) // 64
    shown = tiles[:, rows][:, :, keys] + gaussian(8, 1300, 200, seed=12) > 0
    assert not shown.any(-1).all(), "some rows see nothing"
    mask = shown if dtype == torch.bool else torch.zeros(shown.shape).masked_fill(~shown, -inf)
    verify(replace(call, attn_mask=mask.unsqueeze(0)), isa=number_of(isa_name))
