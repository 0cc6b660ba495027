"""Random calls of scaled_dot_product_attention, rewritten, against eager.

Every example is captured by Dynamo and rewritten as a user's model would be. ``exact`` must be
within 1e-5 of eager in float32; every recipe within its row of TOLERANCES. The last tests break
the code on purpose and demand that these checks notice.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sage_compiler import ops, precision
from sage_compiler.kernels import registry
from sage_compiler.passes import rewrite
from tests import tolerances
from tests.capture import operator_calls, rewritten

EXAMPLES = 500
EXACT_ABSOLUTE = 1e-5
HALF_ROUNDINGS = 2


@dataclass(frozen=True)
class Call:
    """One random SDPA call: how tensors look, and how it is spelled."""

    dims: int
    batch: int
    kv_heads: int
    group: int
    q_len: int
    kv_len: int
    head_dim: int
    value_head_dim: int
    mask: str
    is_causal: bool
    scale: float | None
    repeat: str  # how key/value heads come to match: flag, expand, interleave or broadcast
    layout: str
    spelling: str
    key_bias: float  # standard deviation of the channel bias of K
    dtype: torch.dtype
    seed: int


MASKS = ("none", "bool", "bool row", "key padding", "float", "float head", "constant causal")


@st.composite
def calls(draw: st.DrawFn) -> Call:
    dims = draw(st.sampled_from((4, 4, 4, 3)))
    is_causal = draw(st.booleans())
    group = draw(st.sampled_from((1, 1, 2, 3))) if dims == 4 else 1
    kv_heads = draw(st.integers(1, 3))
    repeats = ["flag", "expand", "interleave"] + (["broadcast"] if kv_heads == 1 else [])
    return Call(
        dims=dims,
        batch=draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        group=group,
        q_len=draw(st.integers(1, 70)),
        kv_len=draw(st.integers(1, 140)),
        head_dim=8 * draw(st.integers(1, 8)),
        value_head_dim=8 * draw(st.integers(1, 8)),
        mask="none" if is_causal else draw(st.sampled_from(MASKS)),
        is_causal=is_causal,
        scale=draw(st.sampled_from((None, 0.05, 0.125))),
        repeat=draw(st.sampled_from(repeats)),
        layout=draw(st.sampled_from(("contiguous", "projection", "strided"))),
        spelling=draw(st.sampled_from(("keywords", "positional", "aten", "packet"))),
        key_bias=2.0,
        dtype=draw(st.sampled_from((torch.float32,) * 4 + (torch.bfloat16, torch.float16))),
        seed=draw(st.integers(0, 2**31)),
    )


def tensors(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gaussian Q, K, V with a channel bias on K, in the drawn layout; and the mask."""
    generator = torch.Generator().manual_seed(call.seed)

    def normal(heads: int, length: int, width: int) -> Tensor:
        lead = (call.batch, heads) if call.dims == 4 else (call.batch,)
        if call.layout == "projection" and call.dims == 4:
            made = torch.randn(call.batch, length, heads, width, generator=generator)
            return made.transpose(1, 2)
        if call.layout == "strided":
            return torch.randn(*lead, length, 2 * width, generator=generator)[..., ::2]
        return torch.randn(*lead, length, width, generator=generator)

    heads = call.kv_heads * call.group
    query = normal(heads, call.q_len, call.head_dim)
    key = normal(call.kv_heads, call.kv_len, call.head_dim)
    key = key + call.key_bias * torch.randn(call.head_dim, generator=generator)
    value = normal(call.kv_heads, call.kv_len, call.value_head_dim)
    return (
        query.to(call.dtype),
        key.to(call.dtype),
        value.to(call.dtype),
        explicit_mask(call, generator),
    )


def explicit_mask(call: Call, generator: torch.Generator) -> Tensor | None:
    heads = call.kv_heads * call.group
    plane = (call.q_len, call.kv_len)
    full = (call.batch, heads, *plane) if call.dims == 4 else (call.batch, *plane)
    match call.mask:
        case "bool":  # may leave rows without a key
            return torch.rand(full, generator=generator) < 0.7
        case "bool row":
            return torch.rand(plane, generator=generator) < 0.2
        case "key padding":
            shape = (call.batch, 1, 1, call.kv_len) if call.dims == 4 else (call.kv_len,)
            return torch.rand(shape, generator=generator) < 0.8
        case "float":
            bias = torch.randn(plane, generator=generator)
            return bias.masked_fill(torch.rand(plane, generator=generator) < 0.2, -math.inf)
        case "float head":
            shape = (heads, 1, call.kv_len) if call.dims == 4 else (1, call.kv_len)
            bias = torch.randn(shape, generator=generator)
            low = torch.finfo(torch.float32).min
            return bias.masked_fill(torch.rand(shape, generator=generator) < 0.2, low)
    return None


def model(call: Call) -> Any:
    """The call as a function of Q, K, V and the mask, in the drawn spelling."""
    n = call.group

    def repeat(x: Tensor) -> Tensor:
        if n == 1 or call.repeat in ("flag", "broadcast"):
            return x
        if call.repeat == "interleave":
            return x.repeat_interleave(n, dim=1)
        batch, heads, length, width = x.shape
        wide = x[:, :, None, :, :].expand(batch, heads, n, length, width)
        return wide.reshape(batch, heads * n, length, width)

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        key, value = repeat(key), repeat(value)
        gqa = n > 1 and call.repeat == "flag"
        if call.mask == "constant causal":
            mask = torch.ones(call.q_len, call.kv_len, dtype=torch.bool).tril()
        if call.spelling == "positional":
            out = F.scaled_dot_product_attention(
                query, key, value, mask, 0.0, call.is_causal, scale=call.scale, enable_gqa=gqa
            )
        elif call.spelling == "keywords":
            out = F.scaled_dot_product_attention(
                query=query,
                key=key,
                value=value,
                attn_mask=mask,
                is_causal=call.is_causal,
                scale=call.scale,
                enable_gqa=gqa,
            )
        else:
            packet = torch.ops.aten.scaled_dot_product_attention
            target = packet if call.spelling == "packet" else packet.default
            out = target(
                query, key, value, mask, 0.0, call.is_causal, scale=call.scale, enable_gqa=gqa
            )
        # What models do next: valid only if the strides are those of the original.
        return out.transpose(-3, -2).flatten(-2) if call.dims == 4 else out

    return attend


def compare(call: Call, name: str) -> None:
    """One example: eager against the rewritten graph, in one precision."""
    inputs = tensors(call)
    function = model(call)
    with torch.no_grad():
        expected = function(*inputs)
        actual, report = rewritten(function, *inputs, precision=name)
    assert len(report.rewritten) == 1, str(report)
    assert operator_calls(report) == 1
    assert actual.shape == expected.shape
    assert actual.stride() == expected.stride()
    if name == precision.EXACT:
        if call.dtype == torch.float32:
            torch.testing.assert_close(actual, expected, rtol=0, atol=EXACT_ABSOLUTE)
        else:
            # Two of SDPA's kernels may round P and the output at different places.
            limit = HALF_ROUNDINGS * torch.finfo(call.dtype).eps * float(inputs[2].abs().max())
            torch.testing.assert_close(actual, expected, rtol=0, atol=limit)
        return
    tolerances.check(actual, expected, inputs[2], name)


@settings(
    max_examples=EXAMPLES,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(call=calls(), name=st.sampled_from(precision.PRECISIONS[1:]))
def test_rewritten_calls_equal_eager(call: Call, name: str) -> None:
    compare(call, precision.EXACT)
    if name != precision.EXACT:
        compare(call, name)


PLAIN = Call(
    dims=4,
    batch=2,
    kv_heads=2,
    group=1,
    q_len=64,
    kv_len=96,
    head_dim=64,
    value_head_dim=64,
    mask="bool",
    is_causal=False,
    scale=None,
    repeat="flag",
    layout="contiguous",
    spelling="keywords",
    key_bias=2.0,
    dtype=torch.float32,
    seed=7,
)


@pytest.mark.parametrize("name", precision.PRECISIONS[1:])
def test_unbroken_code_passes(name: str) -> None:
    compare(PLAIN, name)


@pytest.mark.parametrize("name", precision.PRECISIONS[1:])
@pytest.mark.parametrize("position, wrong", [(3, None), (5, 0.25)], ids=["mask", "scale"])
def test_a_wrong_argument_is_noticed(
    monkeypatch: pytest.MonkeyPatch, name: str, position: int, wrong: object
) -> None:
    """A mask ignored, or a scale twice too large (1 / 8 is right)."""
    call_operator = rewrite._call_operator

    def broken(call: Any, *args: Any) -> Any:
        def spoil(target: Any, *values: Any, **kwargs: Any) -> Any:
            if target is torch.ops.sage.attention.default:
                given = dict(enumerate(values)) | {position: wrong}
                schema = target._schema.arguments
                values = tuple(
                    given.get(at, schema[at].default_value) for at in range(max(given) + 1)
                )
            return call(target, *values, **kwargs)

        return call_operator(spoil, *args)

    monkeypatch.setattr(rewrite, "_call_operator", broken)
    with pytest.raises(AssertionError):
        compare(PLAIN, name)


@pytest.mark.parametrize("name", list(precision.RECIPES))
def test_smoothing_left_out_is_noticed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    biased = dataclasses.replace(PLAIN, key_bias=40.0)
    compare(biased, name)
    spoiled = dataclasses.replace(precision.RECIPES[name], smooth_k=False)
    monkeypatch.setattr(registry, "KERNELS", [])  # the reference, which can leave it out
    monkeypatch.setattr(ops, "RECIPES", {**precision.RECIPES, name: spoiled})
    with pytest.raises(AssertionError):
        compare(biased, name)
