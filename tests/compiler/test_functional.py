"""``sage_compiler.attention``: PyTorch's words for the operator, and under torch.compile."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise, product
from math import inf, nan
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx

import sage_compiler as sage
from sage_compiler.errors import InvalidAttentionError, InvalidOptionError
from sage_compiler.precision import RECIPES
from sage_compiler.semantics import UNBOUNDED, MaskClass, Semantics
from tests.compiler.calls import gaussian, make_call
from tests.compiler.kernels.dense import dense
from tests.tolerances import check, check_lse


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*emulates it.*")
        yield


def exact(*args: Any, **options: Any) -> Tensor:
    output = sage.attention(*args, precision="exact", **options)
    assert isinstance(output, Tensor)
    return output


# --- the words


def test_it_starts_like_sdpa_without_dropout() -> None:
    ours = inspect.signature(sage.attention).parameters
    order = ["query", "key", "value", "attn_mask", "is_causal", "scale", "enable_gqa"]
    assert list(ours)[: len(order)] == order
    keyword_only = [name for name, p in ours.items() if p.kind is p.KEYWORD_ONLY]
    assert keyword_only == list(ours)[len(order) :]
    assert not any(p.kind is p.VAR_KEYWORD for p in ours.values())


@pytest.mark.parametrize("dims", [3, 4])
def test_it_is_sdpa(dims: int) -> None:
    call = make_call(5, 7)
    q, k, v = (x if dims == 4 else x[0] for x in (call.query, call.key, call.value))
    for options in (
        {},
        {"is_causal": True},
        {"scale": 0.2},
        {"attn_mask": gaussian(5, 7, seed=5) > 0},
        {"attn_mask": gaussian(4, 5, 7, seed=5)},
    ):
        expected = F.scaled_dot_product_attention(q, k, v, **options)
        output = exact(q, k, v, **options)
        assert output.shape == expected.shape
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)
    fewer = (k[..., :2, :, :], v[..., :2, :, :])
    torch.testing.assert_close(
        exact(q, *fewer, enable_gqa=True),
        F.scaled_dot_product_attention(q, *fewer, enable_gqa=True),
        rtol=0,
        atol=1e-6,
    )


@pytest.mark.parametrize("lengths", [(6, 6), (4, 9), (9, 4)])
@pytest.mark.parametrize("bottom_right", [False, True])
def test_causal_and_windows(lengths: tuple[int, int], bottom_right: bool) -> None:
    call = make_call(*lengths)
    tensors = (call.query, call.key, call.value)
    causal = "bottom_right" if bottom_right else "top_left"
    suffix = "_bottom_right" if bottom_right else ""
    output = exact(*tensors, is_causal=True, causal=causal)
    semantics = Semantics(MaskClass(f"causal{suffix}"))
    check(output, dense(replace(call, semantics=semantics))[0], call.value, "exact")
    for left, right, is_causal in product((None, 0, 2), (None, 0, 1), (False, True)):
        output = exact(*tensors, None, is_causal, window=(left, right), causal=causal)
        semantics = Semantics(
            MaskClass(f"window{suffix}"),
            UNBOUNDED if left is None else left,
            0 if is_causal else UNBOUNDED if right is None else right,
        )
        check(output, dense(replace(call, semantics=semantics))[0], call.value, "exact")


def test_a_mask_joins_the_diagonal() -> None:
    call = make_call(5)
    visible = gaussian(5, 5, seed=5) > -1
    output = exact(call.query, call.key, call.value, visible, True)
    expected = replace(call, attn_mask=visible, semantics=Semantics(MaskClass.CAUSAL))
    check(output, dense(expected)[0], call.value, "exact")


@pytest.mark.parametrize("precision", ["exact", *RECIPES])
def test_everything_at_once(precision: str) -> None:
    call = replace(
        make_call(40, 50, kv_heads=2),
        semantics=Semantics(MaskClass.WINDOW_BOTTOM_RIGHT, 20, 3, scale=0.3, softcap=5.0),
        attn_mask=gaussian(2, 1, 1, 50, seed=6),
        sinks=gaussian(4, seed=7),
    )
    found = sage.attention(
        call.query, call.key, call.value, call.attn_mask, False, 0.3, True,
        causal="bottom_right", precision=precision, softcap=5.0, window=(20, 3), sinks=call.sinks,
        return_lse=True,
    )  # fmt: skip
    expected, expected_lse = dense(call)
    check(found[0], expected, call.value, precision)
    check_lse(found[1], expected_lse, precision)
    assert found[1].dtype == torch.float32


@pytest.mark.parametrize("unbatched", [False, True])
def test_packed_sequences(unbatched: bool) -> None:
    call = make_call(9, 12, batch=1)
    starts_q, starts_k = [0, 4, 9], [0, 5, 12]
    cu_q, cu_k = torch.tensor(starts_q), torch.tensor(starts_k)
    tensors = tuple(x[0] if unbatched else x for x in (call.query, call.key, call.value))
    output, lse = sage.attention(
        *tensors, is_causal=True, causal="bottom_right", precision="exact",
        cu_seqlens=(cu_q, cu_k), return_lse=True,
    )  # fmt: skip
    assert output.dim() == 3 + (not unbatched) and lse.dim() == 2 + (not unbatched)
    for (a, b), (c, d) in zip(pairwise(starts_q), pairwise(starts_k), strict=True):
        part = replace(
            call, query=call.query[:, :, a:b], key=call.key[:, :, c:d],
            value=call.value[:, :, c:d], semantics=Semantics(MaskClass.CAUSAL_BOTTOM_RIGHT),
        )  # fmt: skip
        expected, expected_lse = dense(part)
        check(output[..., a:b, :].reshape(expected.shape), expected, call.value, "exact")
        check_lse(lse[..., a:b].reshape(expected_lse.shape), expected_lse, "exact")
    one_for_both = exact(call.query, call.query, call.query, cu_seqlens=cu_q)
    pair = exact(call.query, call.query, call.query, cu_seqlens=(cu_q, cu_q))
    assert torch.equal(one_for_both, pair)


# --- bad calls: what differs from a good one, and words that the message must have

CALL = make_call(5, 6)
Q, K, V = CALL.query, CALL.key, CALL.value
OFFSETS = torch.tensor([0, 5])

BAD_CALLS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "precision": ({"precision": "fp8"}, ["'fp8'", "auto, exact", "int8_fp8"]),
    "no precision": ({"precision": None}, ["None", "auto, exact"]),
    "2-D": ({"query": Q[0, 0], "key": K[0, 0], "value": V[0, 0]}, ["2, 2 and 2 dims", "or 3"]),
    "ranks": ({"query": Q[0]}, ["3, 4 and 4 dims"]),
    "GQA not allowed": ({"key": K[:, :2], "value": V[:, :2]}, ["4 query", "2 key", "enable_gqa"]),
    "GQA not divisible": (
        {"key": K[:, :3], "value": V[:, :3], "enable_gqa": True}, ["4 query", "3 key", "multiple"],
    ),
    "dtypes": ({"key": K.half()}, ["torch.float16", "torch.float32", "one dtype"]),
    "devices": ({"value": V.to("meta")}, ["value is on meta", "cpu"]),
    "mask": ({"attn_mask": torch.ones(5, 7)}, ["(5, 7)", "(2, 4, 5, 6)"]),
    "unbatched mask": (
        {"query": Q[0], "key": K[0], "value": V[0], "attn_mask": torch.ones(2, 4, 5, 6)},
        ["(2, 4, 5, 6)", "(1, 4, 5, 6)"],
    ),
    "alignment": ({"is_causal": True, "causal": "x"}, ["'x'", "top_left, bottom_right"]),
    "window of one number": ({"window": 3}, ["window=3", "(left, right)"]),
    "window of three": ({"window": (1, 2, 3)}, ["(1, 2, 3)", "(left, right)"]),
    "negative window": ({"window": (-1, 2)}, ["(-1, 2)", "number of keys or None"]),
    "window of float": ({"window": (1.5, 2)}, ["(1.5, 2)", "number of keys"]),
    "window of text": ({"window": "ab"}, ["'ab'"]),
    "softcap": ({"softcap": 0.0}, ["softcap=0.0", "positive"]),
    "softcap inf": ({"softcap": inf}, ["softcap=inf", "finite"]),
    "scale": ({"scale": nan}, ["scale=nan", "finite"]),
    "sinks": ({"sinks": torch.ones(2)}, ["(2,)", "(4,)"]),
    "lengths of a batch": ({"cu_seqlens": OFFSETS}, ["batch size 2", "batch of 1"]),
    "lengths that do not fit": (
        {"query": Q[:1], "key": K[:1], "value": V[:1], "cu_seqlens": OFFSETS},
        ["cu_seqlens_k = [0, 5]", "packed length 6"],
    ),
    "lengths as a list": ({"cu_seqlens": [0, 5]}, ["[0, 5]", "pair"]),
    "three lengths": ({"cu_seqlens": (OFFSETS,) * 3}, ["pair", "(queries, keys)"]),
    "lengths of one side": ({"cu_seqlens": (None, OFFSETS)}, ["None", "pair"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CALLS)
@pytest.mark.parametrize("return_lse", [False, True])
def test_bad_calls(name: str, return_lse: bool) -> None:
    changes, words = BAD_CALLS[name]
    arguments = {"query": Q, "key": K, "value": V, "precision": "exact", **changes}
    with pytest.raises((InvalidAttentionError, InvalidOptionError)) as error:
        sage.attention(**arguments, return_lse=return_lse)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_bad_call_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="known: auto, exact"):
        sage.attention(Q, K, V, precision="int3")


# --- under torch.compile


class Block(nn.Module):
    """Self-attention as models write it: fused projection, heads transposed, causal."""

    def __init__(self, precision: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.precision = precision
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.sinks = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, 4, 8).permute(2, 0, 3, 1, 4)
        output, lse = sage.attention(
            q, k, v, bias, True, precision=self.precision, softcap=10.0, sinks=self.sinks,
            return_lse=True,
        )  # fmt: skip
        joined = output.transpose(1, 2).reshape(batch, length, 32)
        mixed: Tensor = self.out(torch.tanh(joined)) + lse.mean()
        return mixed


def train(block: Callable[[Tensor, Tensor], Tensor], owner: nn.Module, length: int) -> list[Tensor]:
    """The output and every gradient of one step."""
    x = gaussian(2, length, 32, seed=length).requires_grad_()
    bias = gaussian(4, length, length, seed=length + 1).requires_grad_()
    owner.zero_grad()
    output = block(x, bias)
    output.square().mean().backward()
    gradients = [p.grad for p in (x, bias, *owner.parameters())]
    return [output.detach(), *(gradient for gradient in gradients if gradient is not None)]


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("precision", ["exact", "int8_fp8"])
def test_compiled_training_with_dynamic_shapes(backend: str, precision: str) -> None:
    block = Block(precision)
    count = CompileCounterWithBackend(backend)
    compiled = torch.compile(block, backend=count, fullgraph=True, dynamic=True)
    for length in (6, 11, 17):
        found, expected = (train(f, block, length) for f in (compiled, block))
        assert len(found) == len(expected) == 8
        for actual, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)
    assert count.frame_count == 1


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_inference_in_every_precision(backend: str) -> None:
    call = make_call(40, kv_heads=2, layout="tokens_first")
    tensors = (call.query, call.key, call.value)
    for precision in ("auto", "exact", *RECIPES):

        def attend(q: Tensor, k: Tensor, v: Tensor, precision: str = precision) -> Tensor:
            output = sage.attention(q * 2.0, k, v, precision=precision, enable_gqa=True)
            assert isinstance(output, Tensor)
            return output.transpose(1, 2).flatten(2) + 1.0

        compiled = torch.compile(attend, backend=backend, fullgraph=True)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*tensors), attend(*tensors), rtol=0, atol=1e-5)


def test_compiled_scalars_may_change() -> None:
    call = make_call(5, 9)
    tensors = (call.query, call.key, call.value)

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, left: int) -> Tensor:
        return exact(q, k, v, scale=scale, softcap=2 * scale, window=(left, q.shape[2]))

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True, dynamic=True)
    for scale, left in ((0.3, 1), (0.4, 2), (0.5, 3), (0.25, 0)):
        assert torch.equal(compiled(*tensors, scale, left), attend(*tensors, scale, left))


def test_compiled_packed_sequences() -> None:
    compiled = torch.compile(exact, backend="aot_eager", fullgraph=True, dynamic=True)
    for lengths in ((3, 4), (1, 8, 2), (5,)):
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        call = make_call(sum(lengths), batch=1)
        tensors = (call.query, call.key, call.value)
        assert torch.equal(
            compiled(*tensors, cu_seqlens=offsets), exact(*tensors, cu_seqlens=offsets)
        )


def test_compiled_autocast() -> None:
    call = make_call(5)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return exact(q, k, v, is_causal=True)

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    output = compiled(call.query, call.key, call.value)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, attend(call.query, call.key, call.value))


def test_a_compiled_bad_call_says_what_is_wrong() -> None:
    compiled = torch.compile(exact, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="head_dim 8 and key 7"):
        compiled(Q, K[..., :7], V)


def test_auto_leaves_small_calls_alone_but_not_those_of_symbolic_sizes() -> None:
    """Traced with symbols, and compiled with dynamic shapes, a call may become long later."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = sage.attention(query, key, value, precision="auto")
        assert isinstance(output, Tensor)
        return output

    def calls(gm: torch.fx.GraphModule) -> list[torch.fx.Node]:
        operator = torch.ops.sage.attention.default
        return list(gm.graph.find_nodes(op="call_function", target=operator))

    def traced(gm: torch.fx.GraphModule) -> tuple[Any, ...]:
        (node,) = calls(gm)
        return node.args[3:]

    query, key, value = (gaussian(1, 2, n, 16, seed=seed) for seed, n in enumerate((3, 5, 5)))
    tensors = (query, key, value)
    assert torch.equal(attend(*tensors), F.scaled_dot_product_attention(*tensors))
    assert calls(make_fx(attend)(*tensors)) == []
    assert traced(make_fx(attend, tracing_mode="symbolic")(*tensors))[3] == "auto"
    graphs: list[torch.fx.GraphModule] = []

    def keep(gm: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(gm)
        return gm

    compiled = torch.compile(attend, backend=keep, fullgraph=True, dynamic=True)
    for length in (5, 300):
        longer = [gaussian(1, 2, length, 16, seed=seed) for seed in range(3)]
        assert torch.equal(compiled(*longer), attend(*longer))
    assert [traced(gm)[3] for gm in graphs] == ["auto"]


def test_export_keeps_the_operator() -> None:
    class Model(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return exact(q, k, v, is_causal=True)

    call = make_call(6)
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(
        Model(),
        (call.query, call.key, call.value),
        dynamic_shapes=({2: length}, {2: length}, {2: length}),
    )
    targets = [node.target for node in program.graph.nodes]
    assert torch.ops.sage.attention.default in targets
    longer = make_call(33)
    tensors = (longer.query, longer.key, longer.value)
    torch.testing.assert_close(program.module()(*tensors), exact(*tensors, is_causal=True))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"key": None}, "key is a NoneType; it must be a tensor"),
        ({"value": [1.0]}, "value is a list"),
        ({"is_causal": "yes"}, "is_causal='yes'; it must be True or False"),
        ({"scale": "0.5"}, "scale='0.5'; it must be a number"),
        ({"scale": torch.tensor(0.5)}, "it must be a number, or None"),
    ],
    ids=str,
)
def test_arguments_of_another_type(change: dict[str, object], words: str) -> None:
    x = torch.randn(1, 2, 3, 8)
    arguments: dict[str, object] = {"query": x, "key": x, "value": x, **change}
    with pytest.raises(InvalidAttentionError, match=re.escape(words)):
        sage.attention(**arguments)


def test_sparse_tensors_are_refused() -> None:
    x = torch.randn(1, 2, 3, 8)
    with pytest.raises(InvalidAttentionError, match=r"key is torch\.sparse_coo; it must be"):
        sage.attention(x, x.to_sparse(), x, precision="int8_fp8")
