"""``sage_compiler.PackedKV`` on a GPU: its kernels, executed on the CPU."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from math import inf, nan
from typing import Any

import numpy as np
import pytest
import torch

import sage_compiler as sage
from sage_compiler import packed_kv
from sage_compiler.errors import KernelUnavailableError
from sage_compiler.kernels import reference
from sage_compiler.kernels.cuda import kernel
from sage_compiler.kernels.cuda.arch import ARCHS
from sage_compiler.kernels.cuda.check import check as look_at
from sage_compiler.kernels.cuda.driver import DriverError
from sage_compiler.kernels.cuda.loader import Loader
from sage_compiler.kernels.cuda.packed import MEAN_TOKENS, CudaStore
from sage_compiler.kernels.cuda.sass import Disassembler
from sage_compiler.kernels.cuda.toolchain import find
from sage_compiler.kernels.cuda.variants import cache_variants
from sage_compiler.kernels.packed import PackedShape
from sage_compiler.kernels.quantize import key_groups, quantize_tokens, quantize_value
from sage_compiler.precision import RECIPES, TILE_MMA, Format, Granularity, Statistics
from sage_compiler.semantics import MaskClass, Semantics
from tests.compiler.calls import LAYOUTS, gaussian, laid_out, make_call
from tests.compiler.kernels.cuda import emulation
from tests.compiler.kernels.cuda.emulation import ARCH, broken, replacing
from tests.compiler.kernels.cuda.test_quantizers import integers, permutation
from tests.compiler.kernels.dense import Call, dense
from tests.cutlass_templates import host
from tests.tolerances import check, check_lse

pytestmark = pytest.mark.skipif(host.missing() is not None, reason=str(host.missing()))

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
# Every recipe, and every dtype with both formats of V; scales of V in all but one. The last two are
# by wgmma.
HOPPER = "sm_90a"
KINDS = [
    ("int8_fp8", BF16, ARCH),
    ("int8_fp16", F16, ARCH),
    ("int8_fp16", BF16, ARCH),
    ("int4_fp8", F16, ARCH),
    ("int4_fp16", F32, ARCH),
    ("int8_fp8", BF16, HOPPER),
    ("int8_fp8", F16, HOPPER),
]
every_kind = pytest.mark.parametrize(
    ("precision", "dtype", "caches_on_cuda"), KINDS, indirect=["caches_on_cuda"], ids=str
)
both_kernels = pytest.mark.parametrize("caches_on_cuda", [ARCH, HOPPER], indirect=True)
TILE = TILE_MMA.kv_block


@contextmanager
def on_cuda(loader: Loader | None = None, arch: str = ARCH) -> Iterator[None]:
    """Caches are those of a GPU, and executed here."""
    emulation.the_host().reset()
    emulation.the_host().set_capability(*ARCHS[arch].capability)
    target = kernel.Target(arch, 0, 0, loader or emulation.loader())

    def opened(shape: PackedShape, device: torch.device, precision: str | None) -> CudaStore:
        return CudaStore(shape, device, precision, lambda device: nullcontext(target))

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(packed_kv._OPEN, "cpu", opened)
        yield


@pytest.fixture(autouse=True)
def caches_on_cuda(request: pytest.FixtureRequest) -> Iterator[None]:
    """Of an architecture, by default of ``ARCH``."""
    with on_cuda(arch=getattr(request, "param", ARCH)):
        yield


def new(call: Call, precision: str = "int8_fp8", capacity: int | None = None) -> sage.PackedKV:
    """An empty cache for the keys and values of a call."""
    batch, kv_heads, length, head_dim = call.key.shape
    return sage.PackedKV(
        batch,
        kv_heads,
        head_dim,
        value_head_dim=call.value.shape[3],
        capacity=length if capacity is None else capacity,
        dtype=call.key.dtype,
        precision=precision,
    )


def append(cache: sage.PackedKV, call: Call, *ends: int) -> None:
    """Append the keys and values of a call, up to each of these, from where it is."""
    for end in ends:
        tokens = slice(cache.length, end)
        cache.append(call.key[:, :, tokens], call.value[:, :, tokens])


def filled(call: Call, precision: str = "int8_fp8", *ends: int) -> sage.PackedKV:
    cache = new(call, precision)
    append(cache, call, *ends, call.key.shape[2])
    return cache


def store(cache: sage.PackedKV) -> CudaStore:
    found = cache._store
    assert isinstance(found, CudaStore)
    return found


def tiles(cache: sage.PackedKV) -> np.ndarray:
    """What is packed, as bytes: (B * Hkv, tiles, bytes of a tile)."""
    packed = store(cache).tiles.numpy()
    used = -(-cache.length // TILE)
    return packed.reshape(cache.batch * cache.kv_heads, -1, store(cache).tile.bytes)[:, :used]


def in_rows(cache: sage.PackedKV, dims: tuple[int, int]) -> np.ndarray:
    """As ``tiles``, with codes row by row where they are in the order of wgmma: order.cuh.

    Args:
        dims: the channels that K and V are filled up to.
    """
    packed = tiles(cache).copy()
    if not store(cache)._kernels.append.panels:
        return packed
    tile = store(cache).tile
    for begin, end, rows, row_bytes in (
        (0, tile.value_offset, TILE, dims[0]),
        (tile.value_offset, tile.scales_offset, dims[1], TILE),
    ):
        row, byte = np.divmod(np.arange(rows * row_bytes), row_bytes)
        width = min(row_bytes, 128)
        column = byte % width ^ row * width // 128 % (width // 16) * 16
        at = byte // width * rows * width + row * width + column
        packed[..., begin:end] = packed[..., begin:end][..., at]
    return packed


def same(one: sage.PackedKV, other: sage.PackedKV) -> bool:
    """Whether all that an attention reads is the same to the bit."""
    bytes_of_scales = slice(store(one).tile.scales_offset + 16, store(one).tile.scales_offset + 128)
    a, b = (np.delete(tiles(cache), bytes_of_scales, 2) for cache in (one, other))
    return np.array_equal(a, b) and torch.equal(store(one).mean, store(other).mean)


# --- what it computes


@every_kind
def test_it_is_attention_to_its_tokens(precision: str, dtype: torch.dtype) -> None:
    for lengths, heads in (
        ((7, 330), 6),
        ((1, 256), 2),
        ((40, 40), 2),
        ((1, 1), 4),
        ((130, 65), 2),
    ):
        call = make_call(*lengths, heads=heads, kv_heads=2, head_dim=64, dtype=dtype)
        cache = filled(call, precision, min(lengths[1], 50))
        output, lse = cache.attend(call.query, return_lse=True)
        expected, expected_lse = dense(call)
        check(output, expected, call.value, precision)
        check_lse(lse, expected_lse, precision)
        assert output.dtype == dtype and lse.dtype == torch.float32
        assert torch.equal(cache.attend(call.query), output)
        assert cache.precision == precision and cache.length == lengths[1]


@pytest.mark.parametrize(
    ("precision", "caches_on_cuda"),
    [("int8_fp8", ARCH), ("int4_fp16", ARCH), ("int8_fp8", HOPPER)],
    indirect=["caches_on_cuda"],
)
def test_other_head_dims(precision: str) -> None:
    for head_dim, value_dim in ((128, 64), (80, 33), (1, 128)):
        call = make_call(5, 300, kv_heads=2, head_dim=head_dim, value_dim=value_dim, dtype=BF16)
        output = filled(call, precision, 70).attend(call.query)
        check(output, dense(call)[0], call.value, precision)


def test_it_is_the_operator_to_the_bit_while_both_know_the_same() -> None:
    """The mean of all tokens is that of the first, and FP16 takes float16 without scales."""
    target = kernel.Target(ARCH, 0, 0, emulation.loader())
    for length in (1, 64, 200, MEAN_TOKENS):
        call = make_call(30, length, batch=1, heads=2, kv_heads=1, head_dim=64, dtype=F16)
        found = filled(call, "int8_fp16", length // 2).attend(call.query, return_lse=True)
        expected = kernel.run(
            target,
            call.query,
            call.key,
            call.value,
            call.semantics,
            want_lse=True,
            recipe="int8_fp16",
        )
        assert all(torch.equal(a, e) for a, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("precision", ["int8_fp16", "int4_fp16"])
def test_it_is_the_reference_of_what_is_packed(precision: str) -> None:
    """K as the codes have it, which the reference, without smoothing, takes as it is."""
    call = make_call(150, 333, kv_heads=2, head_dim=64, dtype=F16)
    call = dataclasses.replace(call, query=call.query + 2)
    cache = filled(call, precision, 100)
    packed = tiles(cache)
    codes = integers(
        packed[..., : store(cache).tile.value_offset].copy(), RECIPES[precision].qk, 64
    )
    at = store(cache).tile.scales_offset
    scales = torch.from_numpy(packed[..., at : at + 16].copy().view(np.float32)).view(2, 2, -1)
    groups = key_groups(call.key.shape[2], Granularity.THREAD, TILE_MMA, scales.device)
    key = codes.view(2, 2, -1, 64)[:, :, :333] * scales[:, :, groups].unsqueeze(-1)
    recipe = dataclasses.replace(RECIPES[precision], smooth_k=False)
    expected, expected_lse = reference.attention(call.query.float(), key, call.value, recipe)
    mean = store(cache).mean.view(2, 2, 1, 64).repeat_interleave(2, 1)
    row_term = (call.query.float() * mean).sum(-1) / 8.0
    output, lse = cache.attend(call.query, return_lse=True)
    distance = (output.double() - expected.double()).norm() / expected.double().norm()
    assert distance < {"int8_fp16": 1.5e-3, "int4_fp16": 6e-3}[precision]
    torch.testing.assert_close(lse, expected_lse + row_term, rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("caches_on_cuda", [HOPPER], indirect=True)
def test_long_heads_by_wgmma() -> None:
    """P V in parts of the channels, each with its scales."""
    call = make_call(5, 200, kv_heads=2, head_dim=200, value_dim=256, dtype=BF16)
    output = filled(call, "int8_fp8", 70).attend(call.query)
    check(output, dense(call)[0], call.value, "int8_fp8")


@every_kind
def test_tiles_are_the_references(precision: str, dtype: torch.dtype) -> None:
    """Codes and scales, given the kernel's mean, which is rounded in another order."""
    length = 300
    call = make_call(1, length, kv_heads=2, head_dim=64, value_dim=128, dtype=dtype)
    cache = filled(call, precision, 3, 255, 270)
    tile, recipe = store(cache).tile, RECIPES[precision]
    packed = in_rows(cache, (64, 128))

    mean = store(cache).mean.view(2, 2, 1, 64)
    exact = call.key[:, :, :MEAN_TOKENS].double().mean(2, keepdim=True)
    torch.testing.assert_close(mean.double(), exact, rtol=1e-4, atol=1e-6)
    counted = torch.ones(length, dtype=torch.bool)
    groups = key_groups(length, Granularity.THREAD, TILE_MMA, mean.device)
    limit = 7 if recipe.qk is Format.INT4 else 127
    expected, scale = quantize_tokens(call.key.float() - mean, counted, groups, limit)
    codes = integers(packed[..., : tile.value_offset].copy(), recipe.qk, 64).view(2, 2, -1, 64)
    assert torch.equal(codes[:, :, :length], expected)
    assert not codes[:, :, length:].any()
    at = tile.scales_offset
    scales = torch.from_numpy(packed[..., at : at + 16].copy().view(np.float32)).view(2, 2, -1)
    assert torch.equal(scales[:, :, groups], scale)

    by_tile = dataclasses.replace(recipe, statistics=Statistics.KV_BLOCK)
    seen = counted.view(1, 1, -1)
    value = quantize_value(call.value, seen, seen, by_tile)
    data = packed[..., tile.value_offset : tile.scales_offset].copy()
    order = torch.arange(TILE)
    if recipe.pv is Format.FP8:
        found, order = torch.from_numpy(data).view(torch.float8_e4m3fn).float(), permutation()
    else:
        found = torch.from_numpy(data.view(np.float16)).float()
    found = found.view(2, 2, -1, 128, TILE)
    in_order = torch.empty_like(found)
    in_order[..., order] = found
    tokens = in_order.transpose(3, 4).flatten(2, 3)
    assert torch.equal(tokens[:, :, :length], value.data)
    assert not tokens[:, :, length:].any()
    if (precision, dtype) == ("int8_fp16", F16):
        assert tile.bytes == tile.scales_offset + 128  # none are needed
    else:
        of_value = packed[..., tile.scales_offset + 128 :].copy().view(np.float32)
        assert torch.equal(torch.from_numpy(of_value).view(2, 2, -1, 128), value.scale)


def random_ends(rng: random.Random, length: int) -> list[int]:
    """Where appends end: many short ones, few long ones, and those that end at borders."""
    ends = [0]
    while ends[-1] < length:
        step = rng.choice((1, 2, rng.randint(1, 40), rng.randint(1, 400), 64 - ends[-1] % 64))
        ends.append(min(length, ends[-1] + step))
    return ends[1:]


def assert_division_changes_nothing(precision: str, dtype: torch.dtype, seed: int) -> None:
    """After each append all is as if there had been one."""
    rng = random.Random(seed)
    length = rng.choice((65, 256, 257, 700))
    call = make_call(1, length, batch=1, heads=2, kv_heads=2, head_dim=64, dtype=dtype)
    parts, whole = new(call, precision, capacity=length + 70), new(call, precision)
    for end in random_ends(rng, length):
        append(parts, call, end)
        if end in (64, 255, 256, length) or rng.random() < 0.3:
            whole.reset()
            append(whole, call, end)
            assert same(parts, whole), f"{end} tokens of {length}, seed {seed}"


@every_kind
def test_how_tokens_are_divided_changes_nothing(precision: str, dtype: torch.dtype) -> None:
    for seed in range(6):
        assert_division_changes_nothing(precision, dtype, seed)


@both_kernels
def test_the_last_tile_never_is_staged_where_it_is_read() -> None:
    """Appends of five tiles and more, each from one partial tile to another."""
    call = make_call(1, 2000, batch=1, heads=1, kv_heads=1, head_dim=64, dtype=BF16)
    whole = new(call)
    parts = new(call)
    for end in (30, 300, 620, 945, 946, 1300, 1601, 1930):
        append(parts, call, end)
        whole.reset()
        append(whole, call, end)
        assert same(parts, whole)


@pytest.mark.parametrize(
    ("precision", "caches_on_cuda"),
    [("int8_fp8", ARCH), ("int4_fp16", ARCH), ("int8_fp8", HOPPER)],
    indirect=["caches_on_cuda"],
)
def test_masks_sinks_softcap_and_scale(precision: str) -> None:
    sinks = torch.tensor([1.0, -1.0, 3.0, -inf], dtype=torch.float64)
    masks = (
        None,
        gaussian(200, seed=1) > 0,
        gaussian(2, 1, 9, 200, seed=2),
        gaussian(9, 1, seed=3),
    )
    tops: tuple[dict[str, Any], ...] = (
        {},
        {"sinks": sinks, "softcap": 3.0},
        {"sinks": sinks, "scale": -0.1},
        {"softcap": 3.0, "scale": 0.3},
    )
    cells = [(mask, top) for mask in masks for top in tops]
    if precision != "int8_fp8":
        cells = [(masks[2], tops[1])]
    call = make_call(9, 200, kv_heads=2, head_dim=64, dtype=F16)
    for mask, top in cells:
        cache = filled(call, precision, 140)
        output, lse = cache.attend(call.query, attn_mask=mask, return_lse=True, **top)
        scalars = {name: top[name] for name in ("softcap", "scale") if name in top}
        full = dataclasses.replace(
            call, semantics=Semantics(**scalars), attn_mask=mask, sinks=top.get("sinks")
        )
        expected, expected_lse = dense(full)
        check(output, expected, call.value, precision)
        check_lse(lse, expected_lse, precision)


@pytest.mark.parametrize(
    "window", [None, (20, None), (20, 0), (0, 0), (None, 3), (400, 400)], ids=str
)
@pytest.mark.parametrize("is_causal", [False, True])
@both_kernels
def test_the_diagonal_ends_at_the_last_token(
    window: tuple[int | None, int | None] | None, is_causal: bool
) -> None:
    left, right = (-1 if side is None else side for side in window or (None, None))
    band = Semantics(
        MaskClass.WINDOW_BOTTOM_RIGHT, window_left=left, window_right=0 if is_causal else right
    )
    for queries in (1, 310):
        call = make_call(queries, 300, batch=1, heads=2, kv_heads=1, head_dim=64, dtype=BF16)
        output = filled(call).attend(call.query, is_causal=is_causal, window=window)
        expected, _ = dense(dataclasses.replace(call, semantics=band))
        check(output, expected, call.value, "int8_fp8")


@every_kind
def test_who_sees_one_key_gets_its_value(precision: str, dtype: torch.dtype) -> None:
    """As it is packed: whatever P is, it is 1 beside nothing."""
    call = make_call(200, 200, batch=1, heads=2, kv_heads=1, head_dim=64, dtype=dtype)
    size = torch.exp2(torch.arange(200.0) // 64 * 3).view(1, 1, -1, 1)  # from tile to tile
    call = dataclasses.replace(call, value=(call.value.float() * size).to(dtype))
    output = filled(call, precision, 77).attend(call.query, window=(0, 0))
    recipe = dataclasses.replace(RECIPES[precision], statistics=Statistics.KV_BLOCK)
    seen = torch.ones(1, 1, 200, dtype=torch.bool)
    packed = quantize_value(call.value, seen, seen, recipe)
    value = packed.data * packed.scale.repeat_interleave(TILE, 2)[:, :, :200]
    expected = value.expand(-1, 2, -1, -1).to(dtype)
    torch.testing.assert_close(output, expected, rtol=2 * torch.finfo(dtype).eps, atol=0.0)


@both_kernels
def test_decoding_is_causal_attention() -> None:
    """The prompt at once, then a token at a time, against one causal call in full precision."""
    call = make_call(275, batch=1, heads=4, kv_heads=2, head_dim=64, dtype=BF16)
    causal = dataclasses.replace(call, semantics=Semantics(MaskClass.CAUSAL))
    expected, _ = dense(causal)
    cache = new(call)
    append(cache, call, 250)
    outputs = [cache.attend(call.query[:, :, :250], is_causal=True)]
    for token in range(250, 275):
        append(cache, call, token + 1)
        outputs.append(cache.attend(call.query[:, :, token : token + 1]))
    check(torch.cat(outputs, 2), expected, call.value, "int8_fp8")


@every_kind
def test_few_queries_split_the_keys(precision: str, dtype: torch.dtype) -> None:
    """Of all heads that share them, in one tile; the parts are merged."""
    call = make_call(2, 600, batch=1, heads=6, kv_heads=2, head_dim=64, dtype=dtype)
    sinks = gaussian(6, seed=7)
    for top in ({}, {"sinks": sinks, "softcap": 3.0}, {"window": (100, 0)}):
        emulation.the_host().reset()
        cache = filled(call, precision, 300)
        output, lse = cache.attend(call.query, return_lse=True, **top)
        window = top.get("window")
        assert (launches()[-1] == "merge") == (window is None)
        band = Semantics(softcap=top.get("softcap"))
        if window is not None:
            band = Semantics(MaskClass.WINDOW_BOTTOM_RIGHT, window_left=100, window_right=0)
        expected, expected_lse = dense(
            dataclasses.replace(call, semantics=band, sinks=top.get("sinks"))
        )
        check(output, expected, call.value, precision)
        check_lse(lse, expected_lse, precision)


def launches() -> list[str]:
    """Which kernels were launched."""
    return [launch["symbol"].split("_")[1] for launch in emulation.the_host().launches()]


def test_an_empty_cache_gives_zeros() -> None:
    call = make_call(3, 10, kv_heads=2, head_dim=64)
    cache = new(call)
    sinks = torch.arange(4.0)
    for _ in range(2):
        output, lse = cache.attend(call.query, return_lse=True)
        assert output.shape == call.query.shape and (output == 0).all()
        assert lse.shape == call.query.shape[:3] and (lse == -inf).all()
        output, lse = cache.attend(call.query, return_lse=True, sinks=sinks)
        assert (output == 0).all() and torch.equal(lse, sinks.view(1, 4, 1).expand(2, 4, 3))
        append(cache, call, 4, 4, 10)
        assert not (cache.attend(call.query) == 0).any()
        cache.reset()
        assert cache.length == 0
    assert cache.attend(call.query[:, :, :0]).shape == (2, 4, 0, 64)


def test_what_was_there_before_a_reset_has_no_effect() -> None:
    call = make_call(3, 300, kv_heads=2, head_dim=64)
    fresh, used = new(call), new(call)
    garbage = torch.full_like(call.key, inf)
    used.append(garbage, garbage)
    used.reset()
    for cache in (fresh, used):
        append(cache, call, 7, 100, 290)
    assert same(fresh, used)
    assert torch.equal(used.attend(call.query), fresh.attend(call.query))


@both_kernels
def test_any_strides() -> None:
    call = make_call(5, 300, kv_heads=2, head_dim=64, dtype=BF16)
    expected = filled(call, "int8_fp8").attend(call.query)
    for layout in LAYOUTS:
        laid = dataclasses.replace(
            call, key=laid_out(call.key, layout), value=laid_out(call.value, layout)
        )
        cache = filled(laid, "int8_fp8", 90)
        query = laid_out(call.query, layout)
        output = cache.attend(query)
        if layout != "expanded_heads":
            assert torch.equal(output, expected)
        assert (output.stride(1) < output.stride(2)) == (query.stride(1) < query.stride(2))


@pytest.mark.parametrize(
    ("precision", "caches_on_cuda"),
    [("int4_fp8", ARCH), ("int8_fp8", HOPPER)],
    indirect=["caches_on_cuda"],
)
def test_nothing_outside_of_its_memory_is_touched(precision: str) -> None:
    """All that kernels may touch is registered, to the byte."""
    here = emulation.the_host()
    for length, capacity, head_dim in ((1, 1, 64), (64, 64, 80), (330, 333, 64)):
        call = make_call(
            3, length, heads=2, kv_heads=1, head_dim=head_dim, value_dim=40, dtype=BF16
        )
        here.reset()
        cache = new(call, precision, capacity)
        for memory in store(cache).memory:
            here.allow(memory, writable=True)
        for tensor in (call.query, call.key, call.value):
            here.allow(tensor, writable=False)
        append(cache, call, length // 3, length)
        packed = tiles(cache).copy()
        here.reset()
        output = cache.attend(call.query)
        check(output, dense(call)[0], call.value, precision)
        assert np.array_equal(packed, tiles(cache))


# --- what is hostile


@both_kernels
def test_what_is_not_finite_shows_in_its_tile_alone() -> None:
    call = make_call(3, 420, batch=1, heads=2, kv_heads=2, head_dim=64, dtype=BF16)
    clean = filled(call)
    for name, bad in (("key", nan), ("key", inf), ("value", nan), ("value", -inf)):
        tokens = getattr(call, name).clone()
        tokens[0, 0, 300, 5] = bad
        cache = filled(dataclasses.replace(call, **{name: tokens}), "int8_fp8", 290, 301)
        # Queries near the end do not see its tile, 256 to 319; all see it without a window.
        before = clean.attend(call.query, window=(90, 0))
        assert torch.equal(cache.attend(call.query, window=(90, 0)), before)
        output = cache.attend(call.query)
        channels = slice(None) if name == "key" else slice(5, 6)
        assert output[0, 0, :, channels].isnan().all()
        assert torch.equal(output[0, 1], clean.attend(call.query)[0, 1])


def test_a_key_that_is_not_finite_among_the_first_shows_everywhere() -> None:
    call = make_call(3, 300, batch=1, heads=1, kv_heads=1, head_dim=64, dtype=BF16)
    call.key[0, 0, 200] = inf
    assert filled(call).attend(call.query, window=(10, 0)).isnan().all()


@pytest.mark.parametrize(
    ("precision", "dtype", "large", "caches_on_cuda"),
    [
        ("int8_fp8", BF16, 1e30, ARCH),
        ("int8_fp16", BF16, 1e30, ARCH),
        ("int8_fp8", F16, 6e4, ARCH),
        ("int8_fp8", BF16, 1e30, HOPPER),
        ("int8_fp8", F16, 6e4, HOPPER),
    ],
    indirect=["caches_on_cuda"],
    ids=str,
)
def test_large_values_that_come_late_spoil_nothing(
    precision: str, dtype: torch.dtype, large: float
) -> None:
    """A scale of the head would round all others to zero; beyond float16's range too."""
    call = make_call(40, 330, batch=1, heads=2, kv_heads=2, head_dim=64, dtype=dtype)
    later = call.value.clone()
    later[:, :, 320:] = large
    cache = filled(dataclasses.replace(call, value=later), precision, 100)
    early = slice(0, 256)
    mask = torch.zeros(330, dtype=torch.bool)
    mask[early] = True
    expected, _ = dense(
        dataclasses.replace(call, key=call.key[:, :, early], value=call.value[:, :, early])
    )
    check(cache.attend(call.query, attn_mask=mask), expected, call.value, precision)
    output = cache.attend(call.query)
    expected, _ = dense(dataclasses.replace(call, value=later))
    check(output, expected, later, precision)
    # The rounded P may sum to more than 1, which makes no infinity of the largest.
    most = torch.finfo(F16).max if dtype == F16 else 1e30
    top = filled(dataclasses.replace(call, value=torch.full_like(later, most)), precision)
    torch.testing.assert_close(
        top.attend(call.query), torch.full_like(call.query, most), rtol=0.03, atol=0.0
    )


# --- what it says


@both_kernels
def test_what_it_tells_about_itself() -> None:
    cache = sage.PackedKV(2, 3, 64, capacity=640, dtype=BF16)
    # INT8 K and E4M3 V, scales, and five tiles in bfloat16.
    tokens = 2 * 3 * 640
    assert tokens * 128 < cache.nbytes < tokens * (128 + 8) + 2 * 3 * 320 * 256 + 2 * 3 * 256 + 1
    assert repr(cache).endswith("torch.bfloat16, int8_fp8)")
    assert cache.precision == ARCHS[ARCH].recipes[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"precision": "int8_int8"}, "'int8_int8'; a packed cache can be int8_fp8, int4_fp8, int8"),
        ({"head_dim": 257}, "head_dim 257 is not from 1 to 256"),
        ({"value_head_dim": 0}, "value head_dim 0 is not from 1 to 256"),
        ({"capacity": 1 << 30}, "capacity=1073741824; the CUDA kernels take fewer than"),
        ({"device": "cuda"}, "device='cuda'; torch finds no GPU here"),
        ({"device": "mps"}, "device='mps'; a packed cache can be on cpu or cuda"),
        ({"device": "nowhere"}, "device='nowhere': "),
    ],
)
def test_a_cache_that_cannot_be(
    change: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given: dict[str, Any] = {"batch": 2, "kv_heads": 3, "head_dim": 64, "capacity": 10, **change}
    with pytest.raises(sage.SageError, match=re.escape(words)):
        sage.PackedKV(**given)


def test_a_gpu_is_told_by_its_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert packed_kv._device("cuda") == torch.device("cuda", 3)
    assert packed_kv._device(torch.device("cuda", 1)) == torch.device("cuda", 1)


def test_tokens_that_do_not_fit_leave_it_as_it_was() -> None:
    call = make_call(3, 100, kv_heads=2, head_dim=64)
    cache = new(call)
    append(cache, call, 90)
    before = tiles(cache).copy()
    with pytest.raises(sage.InvalidAttentionError, match="has 90 of 100, so 10 more"):
        cache.append(call.key[:, :, :11], call.value[:, :, :11])
    assert cache.length == 90 and np.array_equal(before, tiles(cache))


def test_a_kernel_that_cannot_be_loaded_leaves_it_as_it_was() -> None:
    """As during the capture of a CUDA graph."""
    call = make_call(3, 100, kv_heads=2, head_dim=64)
    expected = filled(call)

    def build(spec: kernel.KernelSpec) -> bytes:
        if spec.kind == "append" and refusing:
            raise KernelUnavailableError("not now")
        return emulation.build(spec)

    refusing = True
    with on_cuda(Loader(emulation.loader().driver, build)):
        cache = new(call)
        with pytest.raises(KernelUnavailableError, match="not now"):
            append(cache, call, 50)
        assert cache.length == 0
        assert launches() == []
        refusing = False
        append(cache, call, 50, 100)
        assert same(cache, expected)


def test_a_token_is_one_launch_once_the_mean_is_known() -> None:
    call = make_call(1, 300, kv_heads=2, head_dim=64)
    cache = new(call)
    append(cache, call, 255)
    emulation.the_host().reset()
    for end in (256, 257):
        append(cache, call, end)
    cache.attend(call.query)
    assert launches() == ["key", "append", "append", "query", "attend"]


@pytest.mark.parametrize("inference", [True, False])
def test_inference_mode_may_begin_or_end_meanwhile(inference: bool) -> None:
    call = make_call(3, 300, kv_heads=2, head_dim=64)
    with torch.inference_mode(inference):
        cache = new(call)
        append(cache, call, 100)
    with torch.inference_mode(not inference):
        append(cache, call, 300)
        output = cache.attend(call.query)
    assert torch.equal(output, filled(call).attend(call.query))


# --- what must fail


@contextmanager
def broken_kernel(
    kind: str, change: Callable[[str], str], *headers: str, arch: str = ARCH
) -> Iterator[None]:
    """Kernels of one kind are broken, which must be noticed within; that it can be is sure."""
    *_, header = headers or (kind,)
    change((host.TEMPLATES / "include" / "sage" / f"{header}.cuh").read_text())
    with (
        on_cuda(broken(kind, change, *headers), arch),
        pytest.raises((AssertionError, DriverError)),
    ):
        yield


def without_first(text: str) -> Callable[[str], str]:
    return lambda header: header.replace(text, "", 1)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        # a mean of all tokens of an append, of too few, of K as it came last
        ("key_mean", replacing("p.end < kMeanTokens ? p.end : kMeanTokens", "p.end")),
        ("key_mean", replacing("p.end < kMeanTokens ? p.end : kMeanTokens", "p.end - p.length")),
        # tokens of a partial tile not kept, of K or of V
        ("append", without_first("tokens.stage(token, at.channel, chunk);")),
        ("append", replacing("token < p.end ? key[t][i] - mean[i] : 0.0f", "key[t][i] - mean[i]")),
        # scales of a part of the tile
        ("append", replacing("row < Value::At::kRows", "row < 1")),
    ],
)
def test_a_broken_append_is_noticed(kind: str, change: Callable[[str], str]) -> None:
    with broken_kernel(kind, change):
        for seed in range(6):
            assert_division_changes_nothing("int8_fp8", BF16, seed)
        test_tiles_are_the_references("int8_fp8", BF16)


def test_staging_where_it_is_read_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CudaStore, "_place_after", lambda self, length, end: 0)
    with pytest.raises((AssertionError, DriverError)):
        test_the_last_tile_never_is_staged_where_it_is_read()


@pytest.mark.parametrize(
    ("kind", "old", "new"),
    [
        ("append", "arch::store_global(stored + channel, scale);", ""),
        ("append", "store_global(stored + channel, scale)", "store_global(stored + channel, 1.0f)"),
        ("attend", "sum.x * scale.x, sum.y * scale.y", "sum.x * scale.x, sum.y * scale.x"),
        ("attend", "scale_of_tile(stage, 2 * pair + of_pair)", "scale_of_tile(stage, 2 * pair)"),
        ("attend", "p_.head_tiles + tile", "p_.key_blocks + tile"),
    ],
)
def test_a_scale_of_the_wrong_values_is_noticed(kind: str, old: str, new: str) -> None:
    with broken_kernel(kind, replacing(old, new)):
        test_who_sees_one_key_gets_its_value("int8_fp8", BF16)
        test_tokens_of_a_cache_with_room()


@pytest.mark.parametrize(
    ("where", "old", "new"),
    [
        ("append", "store_global(stored + channel, scale)", "store_global(stored + channel, 1.0f)"),
        ("append", "QuantizeKey<Input, Qk, kKeyDim, kPanels>", "QuantizeKey<Input, Qk, kKeyDim>"),
        ("append", "kValueDim, false, kPanels>", "kValueDim, false>"),
        ("attend_hopper", ": scales[i / 4].y", ": scales[i / 4].x"),
        ("attend_hopper", "of_part + atom * 8 + first_column()", "of_part + first_column()"),
        ("attend_hopper", "arch::fma(product[i], scale,", "arch::fma(product[i], 1.0f,"),
        ("attend_hopper", "arch::multiply(sum, decay[i / 2 % 2])", "sum"),
        ("attend_hopper/hopper_task", "<int>(p_.head_tiles)", "<int>(p_.key_blocks)"),
        ("attend_hopper/hopper_memory", "stage * kValueScaleBytes", "0"),
        ("attend_hopper/hopper_memory", "ValueOfTile::kBytes + kValueScaleBytes;",
         "ValueOfTile::kBytes;"),
    ],
)  # fmt: skip
def test_what_is_broken_of_wgmma_is_noticed(where: str, old: str, new: str) -> None:
    kind, *headers = where.split("/")
    with broken_kernel(kind, replacing(old, new), *headers, arch=HOPPER):
        test_who_sees_one_key_gets_its_value("int8_fp8", BF16)
        test_tokens_of_a_cache_with_room()
        test_maxima_that_rise()


@both_kernels
def test_maxima_that_rise() -> None:
    """The later the tile, the larger its scores: what came before decays, in each."""
    call = make_call(5, 400, kv_heads=2, head_dim=64, dtype=BF16)
    rising = (call.key.float() * torch.linspace(0.1, 3.0, 400)[:, None]).to(BF16)
    call = dataclasses.replace(call, key=rising)
    check(filled(call).attend(call.query), dense(call)[0], call.value, "int8_fp8")


@both_kernels
def test_tokens_of_a_cache_with_room() -> None:
    call = make_call(3, 70, kv_heads=2, head_dim=64, dtype=BF16)
    cache = new(call, capacity=500)
    append(cache, call, 70)
    check(cache.attend(call.query), dense(call)[0], call.value, "int8_fp8")


@pytest.mark.parametrize(
    ("old", "new"),
    [("<< (28 - 4 * i)", "<< (24 - 4 * i)"), ("at.row % 8 / 2", "at.row % 4 / 2")],
)
def test_a_broken_delta_is_noticed(old: str, new: str) -> None:
    with broken_kernel("delta", replacing(old, new)):
        test_it_is_the_reference_of_what_is_packed("int4_fp16")


# --- the machine code


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_the_machine_code(arch: str) -> None:
    kernels = list(dict.fromkeys(spec for each in cache_variants(arch) for spec in each.specs()))
    rows = look_at(kernels, find("nvrtc"), Disassembler.find(), jobs=2)
    for row in rows:
        assert row.problems == (), row.symbol
