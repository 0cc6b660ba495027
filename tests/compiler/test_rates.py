"""Predicted times: ordered as published speeds are, and sane for any sizes."""

import math
from dataclasses import replace
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_compiler.errors import InvalidOptionError
from sage_compiler.kernels.cuda.arch import ARCHS
from sage_compiler.precision import EXACT, RECIPES
from sage_compiler.rates import (
    TARGETS,
    Work,
    attention_seconds,
    candidates,
    explanation,
    parse_target,
    seconds,
)

LONG: Final = Work(4, 32, 32, 32768, 32768, 128, 128, itemsize=2, visible=1.0)

# TOPS of attention kernels alone on LONG, without and with a causal mask, as the authors of
# SageAttention2 (arXiv 2411.10958) publish them; "exact" is their FlashAttention-2.
PUBLISHED: Final = {
    ("sm_80", EXACT, 128): (204, 193),
    ("sm_80", "int8_fp16", 128): (278, 284),
    ("sm_89", EXACT, 128): (164, 161),
    ("sm_89", "int8_fp8", 128): (431, 424),
    ("sm_89", "int4_fp8", 128): (489, 478),
    ("sm_90a", EXACT, 128): (339, 329),
    ("sm_90a", EXACT, 64): (303, 302),
}
FITTED: Final = [key for key in PUBLISHED if key[1:] == (EXACT, 128)]  # by _Board.efficiency
FIT_TOLERANCE: Final = 0.01
TOLERANCE: Final = 0.14  # the worst is int8_fp16 on sm_80, causal
GAIN_TOLERANCE: Final = 0.19  # there too


def time(target: str, recipe: str, work: Work) -> float:
    predicted = seconds(target, recipe, work)
    assert predicted is not None
    return predicted


def tops(target: str, recipe: str, work: Work) -> float:
    """Predicted speed of the attention kernel, 10^12 operations per second."""
    predicted = attention_seconds(target, recipe, work)
    assert predicted is not None
    operations = 2 * work.pairs * work.visible * (work.head_dim + work.value_head_dim)
    return operations / predicted / 1e12


@pytest.mark.parametrize("key", PUBLISHED, ids=lambda key: "-".join(map(str, key)))
def test_speeds_are_near_published_ones(key: tuple[str, str, int]) -> None:
    target, recipe, head_dim = key
    work = replace(LONG, head_dim=head_dim, value_head_dim=head_dim)
    full, causal = PUBLISHED[key]
    tolerance = FIT_TOLERANCE if key in FITTED else TOLERANCE
    assert tops(target, recipe, work) == pytest.approx(full, rel=tolerance)
    assert tops(target, recipe, replace(work, visible=0.5)) == pytest.approx(causal, rel=TOLERANCE)


@pytest.mark.parametrize("visible", [1.0, 0.5])
@pytest.mark.parametrize("target", ["sm_80", "sm_89"])
def test_recipes_are_in_the_published_order(target: str, visible: float) -> None:
    recipes = [r for t, r, head_dim in PUBLISHED if t == target and head_dim == 128]
    column = 0 if visible == 1.0 else 1
    work = replace(LONG, visible=visible)
    by_time = sorted(recipes, key=lambda r: time(target, r, work))
    assert by_time == sorted(recipes, key=lambda r: -PUBLISHED[target, r, 128][column])


@pytest.mark.parametrize(
    ("target", "recipe"), [("sm_80", "int8_fp16"), ("sm_89", "int8_fp8"), ("sm_89", "int4_fp8")]
)
def test_gains_are_near_published_ones_and_never_above(target: str, recipe: str) -> None:
    """Those of the attention kernel alone over FlashAttention-2, without and with causal mask."""
    predicted = tops(target, recipe, LONG) / tops(target, EXACT, LONG)
    for quantized, exact in zip(
        PUBLISHED[target, recipe, 128], PUBLISHED[target, EXACT, 128], strict=True
    ):
        published = quantized / exact
        assert (1 - GAIN_TOLERANCE) * published < predicted < published


def test_candidates_are_the_recipes_with_kernels() -> None:
    assert set(TARGETS) == set(ARCHS)
    for target, arch in ARCHS.items():
        assert set(candidates(target)) == set(arch.recipes)


def test_candidates_are_cheapest_first() -> None:
    assert candidates("sm_80") == candidates("sm_86") == ("int4_fp16", "int8_fp16")
    assert candidates("sm_89") == ("int4_fp8", "int8_fp8", "int4_fp16", "int8_fp16")
    assert candidates("sm_90a") == ("int8_fp8", "int8_fp16")  # by wgmma, and by mma.sync
    assert candidates("sm_100a") == ("int8_fp16",)  # no kernel of tcgen05: by mma.sync
    assert candidates("sm_120a") == ("int8_fp8", "int8_fp16")
    assert candidates("cpu") == ("int8_int8", "int8_int16")


@pytest.mark.parametrize("target", TARGETS)
def test_long_attention_is_cheaper_quantized(target: str) -> None:
    for recipe in candidates(target):
        assert time(target, recipe, LONG) < time(target, EXACT, LONG)


@pytest.mark.parametrize("target", TARGETS)
def test_tiny_attention_is_cheapest_exact(target: str) -> None:
    tiny = replace(LONG, batch=1, heads=8, kv_heads=8, query_length=64, key_length=64)
    for recipe in candidates(target):
        assert time(target, EXACT, tiny) < time(target, recipe, tiny)


@pytest.mark.parametrize("target", TARGETS)
def test_one_query_is_cheapest_exact(target: str) -> None:
    """All keys would be quantized for it."""
    for recipe in candidates(target):
        decode = replace(LONG, query_length=1)
        assert time(target, EXACT, decode) < time(target, recipe, decode)


@pytest.mark.parametrize("target", ["sm_90a", "sm_100a", "sm_120a"])
def test_int4_is_never_offered_from_sm_90_up(target: str) -> None:
    for recipe in ("int4_fp8", "int4_fp16"):
        assert recipe not in candidates(target)
        assert seconds(target, recipe, LONG) is None


def test_causal_takes_about_half_the_time() -> None:
    """All but quantization and launches, which it does not halve."""
    for target in TARGETS:
        for recipe in (EXACT, *candidates(target)):
            ratio = time(target, recipe, replace(LONG, visible=0.5)) / time(target, recipe, LONG)
            assert 0.5 <= ratio < 0.55, (target, recipe)


def test_quantization_is_counted() -> None:
    whole, attention = time("sm_89", "int8_fp8", LONG), attention_seconds("sm_89", "int8_fp8", LONG)
    assert attention is not None and 0.01 < whole / attention - 1 < 0.1


@pytest.mark.parametrize(
    ("target", "recipe", "length", "itemsize", "passed"),
    [
        # Of each channel of a token, Q, K and V: its bytes, and those of its codes.
        ("sm_90a", "int8_fp8", 32768, 2, (2 + 2 + 2) + (1 + 1 + 1)),
        ("sm_80", "int8_fp16", 32768, 2, (2 + 2 + 2) + (1 + 1 + 2)),
        ("sm_80", "int8_fp16", 32768, 4, (4 + 4 + 4) + (1 + 1 + 2)),
        # K and V are read twice: a head has 32 MiB, and 3 or 25 MiB count of the cache.
        ("sm_90a", "int8_fp8", 131072, 2, (2 + 4 + 4) + (1 + 1 + 1)),
        ("sm_86", "int8_fp16", 16384, 2, (2 + 4 + 4) + (1 + 1 + 2)),
        ("sm_86", "int8_fp16", 8192, 2, (2 + 2 + 2) + (1 + 1 + 2)),
    ],
)
def test_quantizing_takes_what_is_launched(
    target: str, recipe: str, length: int, itemsize: int, passed: int
) -> None:
    """The bytes by hand, but for scales and sums."""
    work = replace(LONG, query_length=length, key_length=length, itemsize=itemsize)
    attention = attention_seconds(target, recipe, work)
    assert attention is not None
    quantizing = time(target, recipe, work) - attention - 3 * 5e-6
    channels = 4 * 32 * length * 128
    bandwidth = {"sm_80": 2039e9, "sm_86": 936e9, "sm_90a": 3350e9}[target]
    assert quantizing * bandwidth == pytest.approx(passed * channels, rel=0.01)


def test_a_call_is_three_launches() -> None:
    """A memset, what quantizes, and attention, each of 5 us; 64 tokens take no time."""
    few = Work(1, 1, 1, 64, 64, 64, 64, itemsize=2, visible=1.0)
    for target in TARGETS:
        for recipe in candidates(target):
            attention = attention_seconds(target, recipe, few)
            assert attention is not None
            assert time(target, recipe, few) - attention == pytest.approx(15e-6, abs=1e-7)


def test_quantizing_nothing_takes_no_time() -> None:
    nothing = replace(LONG, batch=0)
    assert time("sm_89", "int8_fp8", nothing) == time("sm_89", EXACT, nothing)


def test_float32_and_masks_cost_more() -> None:
    masked = replace(LONG, mask_bytes=1)
    assert time("sm_80", "int8_fp16", masked) > time("sm_80", "int8_fp16", LONG)
    assert time("sm_80", EXACT, masked) >= time("sm_80", EXACT, LONG)  # reading hides in products
    for recipe in (EXACT, "int8_fp16"):
        assert time("sm_80", recipe, replace(LONG, itemsize=4)) > time("sm_80", recipe, LONG)


@pytest.mark.parametrize(
    ("target", "recipe", "sizes"),
    [
        ("cpu", "int8_int8", {}),
        ("cpu", EXACT, {}),
        ("sm_80", "int8_fp8", {}),
        ("sm_86", "int4_fp8", {}),
        ("sm_100a", "int8_fp8", {}),
        ("sm_89", "int8_int8", {}),
        ("sm_89", "int8_fp8", {"head_dim": 320}),
        ("sm_89", "int8_fp8", {"value_head_dim": 320}),
        ("sm_89", "int8_fp8", {"itemsize": 8}),
        ("sm_89", "int8_fp8", {"key_length": 1 << 30}),
        ("sm_89", EXACT, {"itemsize": 8}),
    ],
)
def test_where_there_is_no_kernel_there_is_no_time(
    target: str, recipe: str, sizes: dict[str, Any]
) -> None:
    assert seconds(target, recipe, replace(LONG, **sizes)) is None


def test_exact_has_no_largest_head_dim() -> None:
    assert time("sm_89", EXACT, replace(LONG, head_dim=320)) > time("sm_89", EXACT, LONG)


def test_targets_are_parsed() -> None:
    for target in (*TARGETS, "cpu"):
        assert parse_target(target) == target
    assert parse_target("sm_90") == "sm_90a"
    assert parse_target("sm_120") == "sm_120a"
    assert seconds("sm_90", EXACT, LONG) == seconds("sm_90a", EXACT, LONG)


@pytest.mark.parametrize("name", ["sm_75", "sm_80a", "SM_80", "", "cuda"])
def test_unknown_targets_list_the_known_ones(name: str) -> None:
    for call in (parse_target, candidates, explanation):
        with pytest.raises(InvalidOptionError) as error:
            call(name)
        assert all(known in str(error.value) for known in (repr(name), *TARGETS, "cpu"))
    with pytest.raises(InvalidOptionError):
        seconds(name, EXACT, LONG)


def test_unknown_recipes_list_the_known_ones() -> None:
    for recipe in ("auto", "int3_fp8"):
        with pytest.raises(InvalidOptionError) as error:
            seconds("sm_89", recipe, LONG)
        assert all(known in str(error.value) for known in (repr(recipe), EXACT, *RECIPES))


def test_explanations_name_their_source() -> None:
    for target in TARGETS:
        assert "NVIDIA's" in explanation(target) and "docs/precision.md" in explanation(target)
    assert "Ada" in explanation("sm_89") and "RTX 4090" in explanation("sm_89")
    assert "measured" in explanation("cpu")


LENGTHS: Final = st.integers(1, 1 << 17)
DIMS: Final = st.integers(1, 256)
WORKS: Final = st.builds(
    lambda kv_heads, group, **sizes: Work(heads=kv_heads * group, kv_heads=kv_heads, **sizes),
    st.integers(1, 16),
    st.integers(1, 8),
    batch=st.integers(1, 64),
    query_length=LENGTHS,
    key_length=LENGTHS,
    head_dim=DIMS,
    value_head_dim=DIMS,
    itemsize=st.sampled_from([2, 4]),
    visible=st.floats(0.0, 1.0),
    mask_bytes=st.sampled_from([0, 1, 2, 4]),
)
SERVED: Final = [(target, r) for target in TARGETS for r in (EXACT, *candidates(target))]


@given(st.sampled_from(SERVED), WORKS)
def test_times_are_finite_and_positive(served: tuple[str, str], work: Work) -> None:
    predicted = time(*served, work)
    assert math.isfinite(predicted) and predicted > 0


@given(
    st.sampled_from(SERVED),
    WORKS,
    st.sampled_from(["batch", "query_length", "key_length", "head_dim", "value_head_dim"]),
    st.data(),
)
def test_more_of_anything_takes_no_less(
    served: tuple[str, str], work: Work, field: str, data: st.DataObject
) -> None:
    size = getattr(work, field)
    most = 256 if field.endswith("dim") else 4 * size
    more = replace(work, **{field: data.draw(st.integers(size, most), label="more")})
    assert time(*served, more) >= time(*served, work)
