"""Rotary embedding inside the quantizers: bit by bit what they make of Q and K rotated before.

The rotation is computed here pair by pair from its formula, in float32, and handed to the kernels
that do not rotate; codes, scales, sums, means and row terms must then be the same bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import inf, nan

import numpy as np
import pytest
import torch
from torch import Tensor

from sage_compiler.errors import InvalidAttentionError
from sage_compiler.kernels import reference
from sage_compiler.kernels.cuda import kernel
from sage_compiler.kernels.rotary import Rotary, Tables
from sage_compiler.precision import RECIPES
from sage_compiler.semantics import MaskClass, RotaryPairs
from tests.compiler.kernels.cuda.emulation import (
    ARCH,
    Result,
    attend,
    broken,
    loader,
    replacing,
    the_host,
)
from tests.compiler.kernels.cuda.test_attention import DISTANCE, distance, make_call
from tests.compiler.kernels.dense import Call, dense
from tests.cutlass_templates import host
from tests.tolerances import check, check_lse

pytestmark = pytest.mark.skipif(host.missing() is not None, reason=str(host.missing()))

PAIRS = tuple(RotaryPairs)
# Of each padded head_dim one dtype; channels that are rotated: all, a quarter, halves that are no
# whole chunks of 8, chunks that are rotated in part, one pair.
SHAPES = [
    (64, torch.bfloat16, (64, 16, 20, 2)),
    (96, torch.float16, (96, 32, 52)),
    (128, torch.float16, (128, 64)),
    (256, torch.bfloat16, (256, 64)),
    (40, torch.float32, (40, 28)),
]
LAUNCHES_OF_Q_AND_K = 3


def pair_of(pairs: RotaryPairs, channels: int, pair: int) -> tuple[int, int]:
    if pairs is RotaryPairs.HALF:
        return pair, pair + channels // 2
    return 2 * pair, 2 * pair + 1


def turned(x: Tensor, cosine: Tensor, sine: Tensor, pairs: RotaryPairs, channels: int) -> Tensor:
    """Float32, from the formula; tables as of ``Tables``."""
    result, x = x.float().clone(), x.float()
    cosine, sine = cosine.float(), sine.float()
    whole = cosine.shape[-1] == channels
    for pair in range(channels // 2):
        first, second = pair_of(pairs, channels, pair)
        at = (first, second) if whole else (pair, pair)
        a, b = x[..., first], x[..., second]
        result[..., first] = a * cosine[..., at[0]] - b * sine[..., at[0]]
        result[..., second] = b * cosine[..., at[1]] + a * sine[..., at[1]]
    return result


@dataclass(frozen=True)
class Form:
    """How a table lies in memory.

    Attributes:
        per_pair: one entry for each pair, else one for each channel, all of them different.
        outer: which of batch, heads and tokens it varies over.
    """

    per_pair: bool
    outer: tuple[bool, bool, bool]
    dtype: torch.dtype
    layout: str

    def table(self, sizes: tuple[int, int, int], channels: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        outer = [size if varies else 1 for size, varies in zip(sizes, self.outer, strict=True)]
        entries = channels // 2 if self.per_pair else channels
        table = torch.randn(*outer, entries, generator=generator).to(self.dtype)
        match self.layout:
            case "dense":
                return table
            case "short":  # without the batch and the heads
                return table[0, 0]
            case "strided":  # as the real parts of complex numbers
                return torch.stack((table, table), -1)[..., 0]
            case "sliced":  # rows that do not begin at a multiple of 16 bytes
                return torch.cat((table[..., :1], table), -1)[..., 1:]
            case "transposed":
                return table.transpose(2, 3).contiguous().transpose(2, 3)
            case "expanded":
                return table.expand(*sizes, entries)
        raise AssertionError(self.layout)


TOKENS = (False, False, True)
FORMS = [
    Form(False, TOKENS, torch.float32, "dense"),
    Form(False, (True, False, True), torch.bfloat16, "dense"),
    Form(True, TOKENS, torch.float16, "short"),
    Form(True, TOKENS, torch.float32, "strided"),
    Form(False, (True, True, True), torch.float16, "sliced"),
    Form(True, (False, True, True), torch.bfloat16, "transposed"),
    Form(False, TOKENS, torch.float32, "expanded"),
    Form(True, (True, False, False), torch.float32, "dense"),
]


def rotary_of(call: Call, pairs: RotaryPairs, channels: int, form: Form) -> Rotary:
    def tables(tensor: Tensor, seed: int) -> Tables:
        batch, heads, length, _ = tensor.shape
        sizes = (batch, heads, length)
        return Tables(form.table(sizes, channels, seed), form.table(sizes, channels, seed + 1))

    dtype = torch.float32
    return Rotary(pairs, channels, dtype, tables(call.query, 1), tables(call.key, 3))


def rotated(call: Call, rotary: Rotary) -> Call:
    """The call in float32, with what ``rotary`` has tables for rotated."""
    query, key = call.query.float(), call.key.float()
    if rotary.query is not None:
        tables = rotary.query
        query = turned(query, tables.cosine, tables.sine, rotary.pairs, rotary.channels)
    if rotary.key is not None:
        tables = rotary.key
        key = turned(key, tables.cosine, tables.sine, rotary.pairs, rotary.channels)
    return replace(call, query=query, key=key, value=call.value.float())


def of_q_and_k(result: Result) -> Iterator[tuple[str, np.ndarray]]:
    """All that the quantizers of Q and K write, by name."""
    running = result.call
    names = ("key_sums", "query_codes", "query_scales", "means", "row_term", "delta")
    at = {memory.data_ptr(): memory.numpy() for memory in result.scratch}
    for name in names:
        if getattr(running, name):
            yield name, at[getattr(running, name)]
    tiles = at[running.tiles].reshape(-1, running.tile.bytes)
    yield "codes of K", tiles[:, : running.tile.value_offset]
    yield "scales of K", tiles[:, running.tile.scales_offset :][:, :16]


def assert_same_bytes(fused: Result, apart: Result) -> None:
    for (name, actual), (_, expected) in zip(of_q_and_k(fused), of_q_and_k(apart), strict=True):
        assert np.array_equal(actual, expected), name


def a_call(head_dim: int, dtype: torch.dtype, seed: int, **options: object) -> Call:
    """Grouped heads, and lengths with tails."""
    return make_call(
        140, 70, head_dim, dtype, kv_heads=2, group=2, seed=seed, value_dim=32, **options
    )


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}-{shape[1]}")
@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("recipe", ["int4_fp16", "int8_fp16"])
def test_as_rotated_before(
    recipe: str, pairs: RotaryPairs, shape: tuple[int, torch.dtype, tuple[int, ...]]
) -> None:
    """V's format takes no part: the kernels on Q and K are those of four recipes."""
    head_dim, dtype, all_channels = shape
    forms = itertools.cycle(FORMS)
    cases = 2 * len(all_channels) if head_dim == 64 else len(all_channels)
    for seed, channels in zip(range(cases), itertools.cycle(all_channels), strict=False):
        call = a_call(head_dim, dtype, seed)
        rotary = rotary_of(call, pairs, channels, next(forms))
        fused = attend(call, recipe, rotary=rotary, launches=LAUNCHES_OF_Q_AND_K, seed=seed)
        apart = attend(rotated(call, rotary), recipe, launches=LAUNCHES_OF_Q_AND_K)
        assert_same_bytes(fused, apart)


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_form_of_tables(pairs: RotaryPairs, form: Form) -> None:
    for channels in (64, 20):
        call = make_call(40, 70, 64, torch.bfloat16, batch=2, kv_heads=2, seed=channels)
        rotary = rotary_of(call, pairs, channels, form)
        fused = attend(call, "int8_fp16", rotary=rotary, launches=LAUNCHES_OF_Q_AND_K)
        apart = attend(rotated(call, rotary), "int8_fp16", launches=LAUNCHES_OF_Q_AND_K)
        assert_same_bytes(fused, apart)


@pytest.mark.parametrize("pairs", PAIRS)
def test_one_side_alone(pairs: RotaryPairs) -> None:
    call = a_call(64, torch.bfloat16, 5)
    both = rotary_of(call, pairs, 64, FORMS[0])
    for rotary in (replace(both, query=None), replace(both, key=None)):
        fused = attend(call, "int4_fp16", rotary=rotary, launches=LAUNCHES_OF_Q_AND_K)
        apart = attend(rotated(call, rotary), "int4_fp16", launches=LAUNCHES_OF_Q_AND_K)
        assert_same_bytes(fused, apart)


@pytest.mark.parametrize("pairs", PAIRS)
def test_inputs_of_any_strides_and_a_negative_scale(pairs: RotaryPairs) -> None:
    call = a_call(64, torch.bfloat16, 7, scale=-0.2)
    call = replace(
        call,
        query=call.query.transpose(1, 2).contiguous().transpose(1, 2),
        key=torch.cat((call.key, call.key), -1)[..., 1:65],  # unaligned
    )
    rotary = rotary_of(call, pairs, 32, FORMS[1])
    fused = attend(call, "int4_fp16", rotary=rotary, launches=LAUNCHES_OF_Q_AND_K)
    apart = attend(rotated(call, rotary), "int4_fp16", launches=LAUNCHES_OF_Q_AND_K)
    assert_same_bytes(fused, apart)


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("garbage", [nan, inf])
def test_what_nobody_sees_has_no_effect(pairs: RotaryPairs, garbage: float) -> None:
    """Rows of the tables of dead queries and unseen keys included."""
    call = make_call(100, 150, 64, torch.bfloat16, mask_class=MaskClass.CAUSAL, seed=2)
    rotary = rotary_of(call, pairs, 64, FORMS[0])
    assert rotary.key is not None
    clean = attend(call, "int8_fp16", rotary=rotary, launches=LAUNCHES_OF_Q_AND_K)
    rotary.key.cosine[..., 100:, :] = garbage
    rotary.key.sine[..., 100:, :] = garbage
    soiled = attend(call, "int8_fp16", rotary=rotary, launches=LAUNCHES_OF_Q_AND_K)
    assert_same_bytes(soiled, clean)


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("recipe", ["int4_fp8", "int8_fp8", "int4_fp16", "int8_fp16"])
def test_the_whole_attention(recipe: str, pairs: RotaryPairs) -> None:
    """Against the formula in float64, and against the kernels on what was rotated before."""
    call = make_call(
        130, 200, 64, torch.float16, kv_heads=2, group=2, mask_class=MaskClass.CAUSAL_BOTTOM_RIGHT
    )
    # No bias on K: after a rotation it would be none, and no mean would take it away.
    call = replace(call, key=call.key - call.key.mean(2, keepdim=True))
    angles = torch.outer(torch.arange(200.0), 100.0 ** -torch.linspace(0, 1, 16))
    cosine, sine = angles.cos(), angles.sin()
    rotary = Rotary(pairs, 32, torch.float32, Tables(cosine[70:], sine[70:]), Tables(cosine, sine))
    fused = attend(call, recipe, rotary=rotary)
    before = rotated(call, rotary)
    exact, exact_lse = dense(before)
    assert fused.lse is not None
    check(fused.output, exact, call.value, recipe)
    check_lse(fused.lse, exact_lse.float(), recipe)
    expected, _ = reference.attention(
        before.query, before.key, before.value, RECIPES[recipe], call.semantics
    )
    assert distance(fused.output, expected.half()) <= DISTANCE[recipe[:4]]


def test_run_takes_the_tables() -> None:
    """What the registry's kernel calls."""
    call = make_call(70, 90, 64, torch.float16, seed=4)
    rotary = rotary_of(call, RotaryPairs.HALF, 64, FORMS[0])
    the_host().reset()
    output, _ = kernel.run(
        kernel.Target(ARCH, 0, 0, loader()),
        call.query,
        call.key,
        call.value,
        call.semantics,
        want_lse=False,
        recipe="int8_fp16",
        rotary=rotary,
    )
    assert torch.equal(output, attend(call, "int8_fp16", rotary=rotary).output)


def test_where_kernels_that_rotate_cannot_be_had_torch_rotates() -> None:
    call = make_call(130, 150, 64, torch.float16, seed=5)
    rotary = rotary_of(call, RotaryPairs.INTERLEAVED, 64, FORMS[0])
    the_host().reset()
    output, _ = kernel.run(
        kernel.Target(ARCH, 0, 0, loader(), obtainable=lambda kernels: False),
        call.query,
        call.key,
        call.value,
        call.semantics,
        want_lse=False,
        recipe="int8_fp16",
        rotary=rotary,
    )
    assert not any("interleaved" in launch["symbol"] for launch in the_host().launches())
    query, key = rotary.rotated(call.query, call.key)
    expected = attend(replace(call, query=query, key=key), "int8_fp16").output
    assert torch.equal(output, expected)


# Each changes the text of rotary.cuh.
BREAKS = {
    "the sign": ("? partner[i] : -partner[i]", "? -partner[i] : partner[i]"),
    "the half": (
        "of < half_ ? of + half_ : of - half_)",
        "of < half_ ? of + half_ - 1 : of - half_)",
    ),
    "the neighbour": ("partner[i] = x[i ^ 1];", "partner[i] = x[7 - i];"),
    "the end": ("if (channel + i >= channels_) continue;", ""),
    "the tables": ("arch::multiply(other, sine[i])", "arch::multiply(other, cosine[i])"),
    "an FMA": (
        "arch::multiply(x[i], cosine[i]) + arch::multiply(other, sine[i])",
        "arch::fma(x[i], cosine[i], arch::multiply(other, sine[i]))",
    ),
}


@pytest.mark.parametrize("what", BREAKS)
def test_a_broken_rotation_is_noticed(what: str) -> None:
    old, new = BREAKS[what]
    pairs = RotaryPairs.INTERLEAVED if what == "the neighbour" else RotaryPairs.HALF
    call = make_call(40, 70, 64, torch.bfloat16, seed=1)
    rotary = rotary_of(call, pairs, 20, FORMS[0])
    kernels = broken("query", replacing(old, new), "rotary")
    apart = attend(rotated(call, rotary), "int8_fp16", launches=LAUNCHES_OF_Q_AND_K)
    fused = attend(call, "int8_fp16", rotary=rotary, launches=LAUNCHES_OF_Q_AND_K, kernels=kernels)
    with pytest.raises(AssertionError, match=r"query_(codes|scales)"):
        assert_same_bytes(fused, apart)


def test_tables_are_checked() -> None:
    call = make_call(10, 12, 64, torch.float16)
    good = rotary_of(call, RotaryPairs.HALF, 32, FORMS[0])
    good.check(call.query, call.key)
    assert good.query is not None
    table = good.query.cosine
    bad = {
        "33 rotated channels of 64": replace(good, channels=33),
        "66 rotated channels of 64": replace(good, channels=66),
        "float64": replace(good, query=Tables(table.double(), table.double())),
        "must both be one of": replace(good, query=Tables(table, table.half())),
        "rotate in float32": replace(good, dtype=torch.float16),
        "must broadcast to": replace(good, query=Tables(table[..., 1:, :], table)),
        "16 pairs": replace(good, query=Tables(table[..., :8], table)),
    }
    for words, rotary in bad.items():
        with pytest.raises(InvalidAttentionError, match=words):
            rotary.check(call.query, call.key)
