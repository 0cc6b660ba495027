"""sage::rotary_attention: what rotating in eager and then calling sage::attention gives."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from sage_compiler import ops_rotary as ops_rotary  # registers the operator
from sage_compiler.errors import InvalidAttentionError
from sage_compiler.kernels import registry
from sage_compiler.kernels.kernel import Kernel
from sage_compiler.kernels.rotary import Rotary
from sage_compiler.semantics import RotaryPairs
from tests.compiler.calls import attention, attention_lse, gaussian, make_call
from tests.compiler.kernels.dense import Call

rotary_attention = torch.ops.sage.rotary_attention.default
rotary_attention_lse = torch.ops.sage.rotary_attention.lse

PAIRS = tuple(RotaryPairs)
CHANNELS = 6  # of 8 and more


def rotated(x: Tensor, cosine: Tensor, sine: Tensor, pairs: RotaryPairs) -> Tensor:
    """As models write it: in the dtypes of their tensors."""
    turned, rest = x[..., :CHANNELS], x[..., CHANNELS:]
    if pairs is RotaryPairs.HALF:
        first, second = turned[..., : CHANNELS // 2], turned[..., CHANNELS // 2 :]
        other = torch.cat((-second, first), -1)
    else:
        other = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(-2)
    return torch.cat(((turned * cosine + other * sine).to(x.dtype), rest), -1)


def whole(table: Tensor, pairs: RotaryPairs) -> Tensor:
    if table.shape[-1] == CHANNELS:
        return table
    halves = pairs is RotaryPairs.HALF
    return torch.cat((table, table), -1) if halves else table.repeat_interleave(2, -1)


def tables(call: Call, dtype: torch.dtype, *, per_pair: bool) -> list[Tensor]:
    entries = CHANNELS // 2 if per_pair else CHANNELS
    batch, lengths = call.query.shape[0], (call.query.shape[2], call.key.shape[2])
    shapes = [(lengths[0], entries)] * 2 + [(batch, 1, lengths[1], entries)] * 2
    return [gaussian(*shape, seed=20 + seed).to(dtype) for seed, shape in enumerate(shapes)]


def apart(call: Call, given: list[Tensor], pairs: RotaryPairs) -> tuple[Tensor, Tensor]:
    cos_q, sin_q, cos_k, sin_k = (whole(table, pairs) for table in given)
    return rotated(call.query, cos_q, sin_q, pairs), rotated(call.key, cos_k, sin_k, pairs)


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("recipe", ["exact", "int8_fp8", "int8_int8"])
def test_bit_by_bit_as_rotated_before(recipe: str, pairs: RotaryPairs) -> None:
    """By every path: SDPA, the reference, the CPU's kernel."""
    cases = itertools.product(
        (torch.float32, torch.bfloat16), (torch.float32, torch.bfloat16), (False, True)
    )
    for dtype, of_tables, per_pair in cases:
        call = make_call(5, 7, kv_heads=2, head_dim=16, dtype=dtype, layout="tokens_first")
        given = tables(call, of_tables, per_pair=per_pair)
        query, key = apart(call, given, pairs)
        computed = str(torch.promote_types(dtype, of_tables)).removeprefix("torch.")
        how = (*given, pairs, CHANNELS, computed, None, "causal", 0.3, recipe)
        options: dict[str, Any] = {"mask_class": "causal", "scale": 0.3, "recipe": recipe}
        output, lse = rotary_attention_lse(call.query, call.key, call.value, *how)
        expected, expected_lse = attention_lse(query, key, call.value, **options)
        assert torch.equal(lse, expected_lse)
        assert torch.equal(output, expected)
        output = rotary_attention(call.query, call.key, call.value, *how)
        assert torch.equal(output, attention(query, key, call.value, **options))
        assert output.transpose(1, 2).is_contiguous()  # as the query lies


def test_one_side_alone_and_packed_sequences() -> None:
    call = make_call(6, batch=1)
    given = tables(call, torch.float32, per_pair=False)
    query, key = apart(call, given, RotaryPairs.HALF)
    tensors = (call.query, call.key, call.value)
    offsets = torch.tensor([0, 2, 6], dtype=torch.int32)
    packed = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets}
    how = ("half", CHANNELS, "float32")
    only_q = rotary_attention(*tensors, given[0], given[1], None, None, *how)
    assert torch.equal(only_q, attention(query, call.key, call.value))
    only_k = rotary_attention(*tensors, None, None, given[2], given[3], *how)
    assert torch.equal(only_k, attention(call.query, key, call.value))
    both = rotary_attention(*tensors, *given, *how, **packed)
    assert torch.equal(both, attention(query, key, call.value, **packed))


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_parts(dtype: torch.dtype, pairs: RotaryPairs) -> None:
    call = make_call(5, 7, kv_heads=2, dtype=dtype)
    mask = gaussian(5, 7, seed=9, dtype=dtype)
    leaves = [call.query, call.key, call.value, mask, *tables(call, dtype, per_pair=True)]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    name = str(dtype).removeprefix("torch.")
    for with_lse, wanted in itertools.product((False, True), (range(8), (0, 1), (2, 3), (6,))):
        q, k, v, m, *given = leaves
        ours: Any = rotary_attention_lse if with_lse else rotary_attention
        parts: Any = attention_lse if with_lse else attention
        fused = ours(q, k, v, *given, pairs, CHANNELS, name, m)
        query, key = apart(replace(call, query=q, key=k), given, pairs)
        expected = parts(query, key, v, m)
        if not with_lse:
            fused, expected = (fused,), (expected,)
        downstream = [gaussian(*x.shape, seed=30, dtype=x.dtype) for x in fused]
        asked = [leaves[index] for index in wanted]
        actual = torch.autograd.grad(fused, asked, downstream)
        for found, right in zip(
            actual, torch.autograd.grad(expected, asked, downstream), strict=True
        ):
            assert torch.equal(found, right)


@pytest.mark.parametrize("pairs", PAIRS)
def test_opcheck(pairs: RotaryPairs) -> None:
    call = make_call(3, 5, kv_heads=2, layout="tokens_first")
    tensors = [call.query, call.key, call.value, *tables(call, torch.float32, per_pair=True)]
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    for operator in (rotary_attention, rotary_attention_lse):
        opcheck(operator, (*leaves, pairs, CHANNELS, "float32"), {"recipe": "int8_fp8"})
        one = (*leaves[:5], None, None, pairs, CHANNELS, "float32")
        opcheck(operator, one, {"attn_mask": gaussian(3, 5, seed=2)})
    opcheck(
        torch.ops.sage.rotary_attention_backward.default,
        (
            *tensors[3:], pairs, CHANNELS, "float32", torch.ones(()).expand(2, 4, 3, 8), None,
            *tensors[:3], None, None, None, None, "causal", None, "zero", None, -1, -1,
            [True, False, True, False, False, True, True, False, False],
        ),
    )  # fmt: skip


def test_autocast_casts_what_attention_casts() -> None:
    call = make_call(3, 5)
    given = tables(call, torch.float32, per_pair=False)
    mask = gaussian(3, 5, seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        output = rotary_attention(
            call.query, call.key, call.value, *given, "half", CHANNELS, "float32", mask
        )
    low = replace(call, query=call.query.bfloat16(), key=call.key.bfloat16())
    query, key = apart(low, given, RotaryPairs.HALF)
    assert torch.equal(output, attention(query, key, call.value.bfloat16(), mask.bfloat16()))


def test_a_kernel_that_rotates_gets_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that does not gets Q and K rotated."""
    seen: list[Any] = []

    def run(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Any:
        seen.append((query, key, options.get("rotary")))
        return torch.zeros_like(query), torch.zeros(query.shape[:3])

    plain = Kernel(
        name=lambda: "test", device_type="cpu", recipe="int8_int8", refuse=lambda problem: None,
        gate=lambda problem: "never", run=run,
    )  # fmt: skip
    call = make_call(5, 7)
    given = tables(call, torch.float32, per_pair=False)
    for kernel in (plain, replace(plain, run_rotary=run)):
        monkeypatch.setattr(registry, "KERNELS", [kernel])
        rotary_attention(
            call.query, call.key, call.value, *given, "half", CHANNELS, "float32",
            recipe="int8_int8",
        )  # fmt: skip
    (query, key, nothing), (raw_query, raw_key, rotary) = seen
    expected = apart(call, given, RotaryPairs.HALF)
    assert nothing is None and torch.equal(query, expected[0]) and torch.equal(key, expected[1])
    assert raw_query is call.query and raw_key is call.key and isinstance(rotary, Rotary)
    assert rotary.query is not None and rotary.query.sine is given[1]


BAD: dict[str, dict[str, Any]] = {
    "only one of cos_q and sin_q": {"sin_q": None},
    "rotary 'quarter' in 'float32'; known: half, interleaved": {"rotary": "quarter"},
    "in 'float64'": {"rotary_dtype": "float64"},
    "7 rotated channels of 8": {"rotary_dim": 7},
    "must broadcast to": {"cos_k": torch.zeros(4, 6), "sin_k": torch.zeros(4, 6)},
    "rotate in float32": {"rotary_dtype": "bfloat16"},
}


@pytest.mark.parametrize("words", BAD)
def test_bad_calls(words: str) -> None:
    call = make_call(5, 7)
    names = ("cos_q", "sin_q", "cos_k", "sin_k")
    good = {
        "query": call.query, "key": call.key, "value": call.value,
        **dict(zip(names, tables(call, torch.float32, per_pair=False), strict=True)),
        "rotary": "half", "rotary_dim": CHANNELS, "rotary_dtype": "float32",
    }  # fmt: skip
    rotary_attention(**good)
    with pytest.raises(InvalidAttentionError, match=words):
        rotary_attention(**good | BAD[words])
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        pytest.raises(InvalidAttentionError, match=words),
    ):
        rotary_attention(**good | BAD[words])
