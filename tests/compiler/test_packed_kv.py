"""``sage_compiler.PackedKV``: a cache that is packed once gives what packing at once gives."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from math import inf
from typing import Any

import pytest
import torch
from torch import Tensor

import sage_compiler as sage
from sage_compiler.kernels.cpu import library
from sage_compiler.kernels.cpu.packed import BLOCK
from sage_compiler.semantics import MaskClass, Semantics
from tests.compiler.calls import LAYOUTS, gaussian, laid_out, make_call, run, run_lse
from tests.compiler.kernels.dense import Call, dense
from tests.tolerances import check, check_lse

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RECIPES = ("int8_int8", "int8_int16")


def new(call: Call, capacity: int | None = None, precision: str = "int8_int8") -> sage.PackedKV:
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


def append(cache: sage.PackedKV, call: Call, *, step: int) -> None:
    """Append the keys and values of a call, ``step`` tokens at a time."""
    for start in range(0, call.key.shape[2], step):
        tokens = slice(start, start + step)
        cache.append(call.key[:, :, tokens], call.value[:, :, tokens])


def same(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> bool:
    return all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


# --- what it computes


@pytest.mark.parametrize("precision", RECIPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_attention_to_its_tokens(precision: str, dtype: torch.dtype) -> None:
    for lengths, value_dim in (((7, 700), 16), ((1, 256), 64), ((40, 40), 48), ((1, 1), 16)):
        call = make_call(*lengths, kv_heads=2, head_dim=32, value_dim=value_dim, dtype=dtype)
        cache = new(call, precision=precision)
        append(cache, call, step=300)
        output, lse = cache.attend(call.query, return_lse=True)
        expected, expected_lse = dense(call)
        check(output, expected, call.value, precision)
        check_lse(lse, expected_lse, precision)
        assert output.dtype == dtype and lse.dtype == torch.float32
        assert torch.equal(cache.attend(call.query), output)


@pytest.mark.parametrize("precision", RECIPES)
def test_it_is_the_operator_to_the_bit_where_every_key_is_seen(precision: str) -> None:
    """Without a mask both know the same; packed tokens do not know who will see them."""
    for layout in LAYOUTS:
        call = make_call(40, 600, kv_heads=2, head_dim=24, layout=layout)
        cache = new(call, precision=precision)
        append(cache, call, step=600)
        output, lse = cache.attend(call.query, return_lse=True)
        assert same((output, lse), run_lse(call, precision))
        assert output.stride() == run(call, precision).stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("steps", [(1,), (3,), (255,), (256,), (257,), (100, 1, 155, 300)], ids=str)
def test_how_tokens_are_divided_changes_nothing(dtype: torch.dtype, steps: tuple[int, ...]) -> None:
    call = make_call(5, 600, batch=1, kv_heads=2, head_dim=16, value_dim=24, dtype=dtype)
    whole, parts = new(call), new(call, capacity=900)
    start = 0
    for index in range(600):
        step = steps[index % len(steps)]
        tokens = slice(start, start + step)
        parts.append(call.key[:, :, tokens], call.value[:, :, tokens])
        start = min(start + step, 600)
        assert parts.length == start
        if start in (1, 255, 256, 257, 511, 600) or len(steps) > 1:
            whole.reset()
            whole.append(call.key[:, :, :start], call.value[:, :, :start])
            expected = whole.attend(call.query, return_lse=True)
            assert same(parts.attend(call.query, return_lse=True), expected)
        if start == 600:
            break


def test_masks_sinks_softcap_and_scale() -> None:
    call = make_call(9, 300, kv_heads=2, head_dim=16)
    cache = new(call)
    append(cache, call, step=140)
    sinks = torch.tensor([1.0, -1.0, 3.0, -inf], dtype=torch.float64)
    masks = (
        None,
        gaussian(300, seed=1) > 0,
        gaussian(2, 1, 9, 300, seed=2),
        gaussian(9, 1, seed=3),
    )
    for mask, sink, softcap, scale in product(masks, (None, sinks), (None, 3.0), (None, 0.1)):
        output, lse = cache.attend(
            call.query, attn_mask=mask, sinks=sink, softcap=softcap, scale=scale, return_lse=True
        )
        semantics = Semantics(softcap=softcap, scale=scale)
        full = replace(call, semantics=semantics, attn_mask=mask, sinks=sink)
        expected, expected_lse = dense(full)
        check(output, expected, call.value, "int8_int8")
        check_lse(lse, expected_lse, "int8_int8")


@pytest.mark.parametrize(
    "window", [None, (20, None), (20, 0), (0, 0), (None, 3), (400, 400)], ids=str
)
@pytest.mark.parametrize("is_causal", [False, True])
def test_the_diagonal_ends_at_the_last_token(
    window: tuple[int | None, int | None] | None, is_causal: bool
) -> None:
    for queries in (1, 9, 300, 310):
        call = make_call(queries, 300, batch=1, kv_heads=1, head_dim=16)
        cache = new(call)
        append(cache, call, step=300)
        output = cache.attend(call.query, is_causal=is_causal, window=window)
        left, right = (-1 if side is None else side for side in window or (None, None))
        right = 0 if is_causal else right
        expected, _ = dense(
            replace(
                call,
                semantics=Semantics(
                    MaskClass.WINDOW_BOTTOM_RIGHT, window_left=left, window_right=right
                ),
            )
        )
        check(output, expected, call.value, "int8_int8")


def test_decoding_is_causal_attention() -> None:
    """The prompt at once, then a token at a time, against one causal call in full precision."""
    call = make_call(330, batch=1, heads=4, kv_heads=2, head_dim=32)
    expected, _ = dense(replace(call, semantics=Semantics(MaskClass.CAUSAL)))
    cache = new(call)
    cache.append(call.key[:, :, :250], call.value[:, :, :250])
    outputs = [cache.attend(call.query[:, :, :250], is_causal=True)]
    for token in range(250, 330):
        here = slice(token, token + 1)
        cache.append(call.key[:, :, here], call.value[:, :, here])
        outputs.append(cache.attend(call.query[:, :, here]))
    check(torch.cat(outputs, 2), expected, call.value, "int8_int8")


def test_an_empty_cache_gives_zeros() -> None:
    call = make_call(3, 10, kv_heads=2, head_dim=16)
    cache = new(call)
    for _ in range(2):
        output, lse = cache.attend(call.query, return_lse=True)
        assert output.shape == call.query.shape and (output == 0).all()
        assert lse.shape == call.query.shape[:3] and (lse == -inf).all()
        append(cache, call, step=4)
        assert not (cache.attend(call.query) == 0).any()
        cache.reset()
        assert cache.length == 0
    assert cache.attend(call.query[:, :, :0]).shape == (2, 4, 0, 16)


def test_what_was_there_before_a_reset_has_no_effect() -> None:
    call = make_call(3, 300, kv_heads=2, head_dim=16)
    fresh, used = new(call), new(call)
    garbage = torch.full_like(call.key, inf)
    used.append(garbage, garbage)
    used.reset()
    for cache in (fresh, used):
        append(cache, replace(call, key=call.key[:, :, :270], value=call.value[:, :, :270]), step=7)
    assert same(used.attend(call.query, return_lse=True), fresh.attend(call.query, return_lse=True))


def test_inputs_stay_as_they_are_and_may_change_afterwards() -> None:
    call = make_call(3, 270, kv_heads=2, head_dim=16)
    key, value, query = call.key.clone(), call.value.clone(), call.query.clone()
    cache = new(call, capacity=300)
    cache.append(key, value)
    output = cache.attend(query)
    assert torch.equal(key, call.key) and torch.equal(value, call.value)
    assert torch.equal(query, call.query)
    more_key, more_value = key[:, :, :5].clone(), value[:, :, :5].clone()
    key.fill_(7.0), value.fill_(7.0)
    assert torch.equal(cache.attend(query), output)
    cache.append(more_key, more_value)
    whole = new(call, capacity=300)
    whole.append(call.key, call.value)
    whole.append(more_key, more_value)
    assert torch.equal(cache.attend(query), whole.attend(query))


def test_any_strides() -> None:
    call = make_call(5, 300, kv_heads=2, head_dim=16)
    expected = new(call)
    append(expected, call, step=300)
    for layout in ("tokens_first", "every_other", "head_dim_first", "sliced"):
        cache = new(call)
        laid = replace(call, key=laid_out(call.key, layout), value=laid_out(call.value, layout))
        append(cache, laid, step=90)
        query = laid_out(call.query, layout)
        assert torch.equal(cache.attend(query), expected.attend(call.query))


def test_tensors_whose_sign_is_a_flag() -> None:
    x = torch.randn(1, 2, 40, 16, dtype=torch.cfloat).conj().imag
    outputs = []
    for tensor in (x, x.resolve_neg()):
        cache = sage.PackedKV(1, 2, 16, capacity=40)
        cache.append(tensor, tensor)
        outputs.append(cache.attend(tensor))
    assert torch.equal(*outputs)


def test_several_threads_attend_one_cache() -> None:
    call = make_call(20, 600, kv_heads=2, head_dim=32)
    cache = new(call)
    append(cache, call, step=600)
    queries = [call.query + shift for shift in range(6)]
    expected = [cache.attend(query) for query in queries]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(5):
            found = list(pool.map(cache.attend, queries))
            assert all(torch.equal(a, e) for a, e in zip(found, expected, strict=True))


def test_memory_of_the_exact_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "KEPT_BYTES", 0)
    monkeypatch.setattr(library._kept, "memory", None)
    for length in (1, 255, 256, 257, 520):
        call = make_call(3, length, kv_heads=2, head_dim=24, value_dim=40)
        cache = new(call)
        append(cache, call, step=100)
        check(cache.attend(call.query), dense(call)[0], call.value, "int8_int8")


def test_under_torch_compile() -> None:
    call = make_call(5, 60, kv_heads=2, head_dim=16)
    eager, compiled = new(call), new(call)

    def step(cache: sage.PackedKV, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache.append(k * 2.0, v)
        output = cache.attend(q + 1.0)
        return output.sin()

    arguments = (call.query, call.key, call.value)
    expected = step(eager, *arguments)
    found = torch.compile(step, backend="aot_eager")(compiled, *arguments)
    torch.testing.assert_close(found, expected)
    assert compiled.length == 60


# --- what it says


def test_what_it_tells_about_itself() -> None:
    cache = sage.PackedKV(2, 3, 16, value_head_dim=24, capacity=300, dtype=torch.bfloat16)
    empty = cache.nbytes
    # INT8 K and V, what belongs to tokens and channels, and a block in bfloat16.
    tokens, channels = 2 * 3 * 2 * BLOCK, 16 + 24
    assert tokens * channels < empty < 3 * tokens * channels
    cache.append(torch.ones(2, 3, 4, 16).bfloat16(), torch.ones(2, 3, 4, 24).bfloat16())
    assert (cache.length, cache.nbytes, cache.capacity) == (4, empty, 300)
    assert repr(cache) == (
        "PackedKV(4 of 300 tokens, batch 2, 3 heads, head_dim 16, value_head_dim 24, "
        "torch.bfloat16, int8_int8)"
    )


KEY, VALUE, QUERY = torch.ones(2, 3, 4, 16), torch.ones(2, 3, 4, 24), torch.ones(2, 6, 5, 16)

BAD_CACHES: dict[str, tuple[dict[str, Any], str]] = {
    "batch": ({"batch": 0}, "batch=0; it must be an integer of at least 1"),
    "heads": ({"kv_heads": True}, "kv_heads=True"),
    "capacity": ({"capacity": 2.5}, "capacity=2.5"),
    "dtype": ({"dtype": torch.float64}, "torch.float64; supported: float32, bfloat16, float16"),
    "precision": ({"precision": "int8_fp8"}, "'int8_fp8'; a packed cache can be int8_int8, int8_i"),
    "head_dim": ({"head_dim": 20}, "head_dim 20 is not a multiple of 8 from 16 to 256"),
    "large": ({"head_dim": 264}, "head_dim 264 is not"),
    "value": ({"value_head_dim": 8}, "value head_dim 8 is not a multiple of 8 from 16"),
    "huge": ({"capacity": 2**60}, "kv_capacity: "),
}


@pytest.mark.parametrize("name", BAD_CACHES)
def test_a_cache_that_cannot_be(name: str) -> None:
    change, words = BAD_CACHES[name]
    given: dict[str, Any] = {"batch": 2, "kv_heads": 3, "head_dim": 16, "capacity": 10, **change}
    with pytest.raises((sage.InvalidAttentionError, sage.InvalidOptionError)) as error:
        sage.PackedKV(**given)
    assert words in str(error.value)


BAD_TOKENS: dict[str, tuple[dict[str, Any], str]] = {
    "type": ({"key": None}, "key is a NoneType; it must be a tensor"),
    "dims": ({"value": VALUE[0]}, "value is torch.strided of shape (3, 4, 24); it must be"),
    "sparse": ({"key": KEY.to_sparse()}, "key is torch.sparse_coo"),
    "dtype": ({"key": KEY.half()}, "key is torch.float16 on cpu; the cache is torch.float32"),
    "device": ({"value": VALUE.to("meta")}, "value is torch.float32 on meta"),
    "batch": ({"key": KEY[:1]}, "(1, 3, 4, 16); the cache needs (2, 3, tokens, 16)"),
    "heads": ({"value": VALUE[:, :2]}, "(2, 2, 4, 24); the cache needs (2, 3, tokens, 24)"),
    "head_dim": ({"key": VALUE}, "key has shape (2, 3, 4, 24); the cache needs (2, 3, tokens, 16)"),
    "lengths": ({"value": VALUE[:, :, :3]}, "key has 4 tokens and value 3"),
    "room": (
        {"key": KEY.repeat(1, 1, 2, 1), "value": VALUE.repeat(1, 1, 2, 1)},
        "8 tokens; the cache has 5 of 10, so 5 more fit",
    ),
    "gradient": (
        {"key": KEY.clone().requires_grad_()},
        "key requires a gradient; a packed cache is",
    ),
}


@pytest.mark.parametrize("name", BAD_TOKENS)
def test_tokens_that_do_not_fit_leave_it_as_it_was(name: str) -> None:
    change, words = BAD_TOKENS[name]
    cache = sage.PackedKV(2, 3, 16, value_head_dim=24, capacity=10)
    cache.append(gaussian(2, 3, 5, 16, seed=0), gaussian(2, 3, 5, 24, seed=1))
    before = cache.attend(QUERY)
    with pytest.raises(sage.InvalidAttentionError, match=re.escape(words)):
        cache.append(**{"key": KEY, "value": VALUE, **change})
    assert cache.length == 5 and torch.equal(cache.attend(QUERY), before)
    cache.append(KEY, VALUE)
    assert cache.length == 9


BAD_CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "dims": ({"query": QUERY[0]}, "query is torch.strided of shape (6, 5, 16)"),
    "dtype": ({"query": QUERY.bfloat16()}, "query is torch.bfloat16 on cpu; the cache is"),
    "heads": ({"query": QUERY[:, :4]}, "(2, 4, 5, 16); the cache needs (2, a multiple of 3 heads"),
    "no heads": ({"query": QUERY[:, :0]}, "(2, 0, 5, 16)"),
    "head_dim": ({"query": QUERY[..., :8]}, "(2, 6, 5, 8)"),
    "mask": ({"attn_mask": torch.ones(5, 3)}, "(5, 3); it must broadcast to"),
    "mask dtype": ({"attn_mask": torch.ones(4).double()}, "attn_mask is torch.float64"),
    "sinks": ({"sinks": torch.ones(3)}, "one logit per query head: (6,)"),
    "window": ({"window": (1,)}, "window=(1,)"),
    "softcap": ({"softcap": 0.0}, "softcap=0.0"),
    "scale": ({"scale": inf}, "scale=inf"),
    "gradient": ({"query": QUERY.clone().requires_grad_()}, "query requires a gradient"),
    "gradient of sinks": ({"sinks": torch.ones(6).requires_grad_()}, "sinks requires a gradient"),
    "gradient of a mask": (
        {"attn_mask": torch.ones(4).requires_grad_()}, "attn_mask requires a gradient",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(name: str) -> None:
    change, words = BAD_CALLS[name]
    cache = sage.PackedKV(2, 3, 16, value_head_dim=24, capacity=10)
    cache.append(KEY, VALUE)
    with pytest.raises(sage.InvalidAttentionError, match=re.escape(words)):
        cache.attend(**{"query": QUERY, **change})


def test_what_requires_a_gradient_is_taken_under_no_grad() -> None:
    cache = sage.PackedKV(2, 3, 16, value_head_dim=24, capacity=10)
    wanted = [tensor.clone().requires_grad_() for tensor in (KEY, VALUE, QUERY)]
    with torch.no_grad():
        cache.append(wanted[0], wanted[1])
        assert not cache.attend(wanted[2]).requires_grad


@pytest.mark.parametrize("inference", [True, False])
def test_inference_mode_may_begin_or_end_meanwhile(inference: bool) -> None:
    key, value, query = (gaussian(1, 2, 300, 32, seed=seed) for seed in range(3))
    with torch.inference_mode(inference):
        cache = sage.PackedKV(1, 2, 32, capacity=300)
        cache.append(key[:, :, :100], value[:, :, :100])
    with torch.inference_mode(not inference):
        cache.append(key[:, :, 100:], value[:, :, 100:])
        output = cache.attend(query)
    whole = sage.PackedKV(1, 2, 32, capacity=300)
    whole.append(key, value)
    assert torch.equal(output, whole.attend(query))


def test_an_append_that_is_interrupted_leaves_the_tokens_before_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    key, value, query = (gaussian(1, 2, 110, 32, seed=seed) for seed in range(3))
    cache = sage.PackedKV(1, 2, 32, capacity=600)
    cache.append(key[:, :, :10], value[:, :, :10])
    before = cache.attend(query)
    pack_kv = library.Library.pack_kv

    def interrupted(*args: Any) -> None:
        pack_kv(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(library.Library, "pack_kv", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.append(key[:, :, 10:], value[:, :, 10:])
    assert cache.length == 10
    # Their block may be packed with tokens that do not count: other roundings, the same attention.
    check(cache.attend(query), before, value, "int8_int8")
