"""Every form of SDPA that is found, and every near miss that must not be."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

from sage_compiler.passes.detect import detect
from sage_compiler.passes.site import Rejected
from tests.capture import operator_calls
from tests.passes.checks import Compiled, check, keeps, normal, same, sdpa

B, H, L, D = 2, 4, 6, 8
Q, K, V = normal(B, H, L, D), normal(B, H, L, D, seed=1), normal(B, H, L, D, seed=2)
K2, V2 = normal(B, 2, L, D, seed=1), normal(B, 2, L, D, seed=2)
K1, V1 = normal(B, 1, L, D, seed=1), normal(B, 1, L, D, seed=2)
packet = torch.ops.aten.scaled_dot_product_attention


def found(function: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    """The one site of a function: rewritten, and equal to eager."""
    report = check(function, *inputs, **options)
    (site,) = report.rewritten
    assert not report.kept, str(report)
    assert operator_calls(report) == 1
    return site


# --- spellings ------------------------------------------------------------------------------

M = normal(B, 1, L, L) > -0.5
SPELLINGS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "plain": lambda q, k, v, m: sdpa(q, k, v),
    "positional": lambda q, k, v, m: sdpa(q, k, v, m, 0.0, False),
    "keywords": lambda q, k, v, m: sdpa(value=v, key=k, query=q, attn_mask=m, dropout_p=0.0),
    "mixed": lambda q, k, v, m: sdpa(q, k, value=v, attn_mask=m, scale=0.3),
    "no mask": lambda q, k, v, m: sdpa(q, k, v, None, 0.0, True, scale=None, enable_gqa=False),
    "integers": lambda q, k, v, m: sdpa(q, k, v, dropout_p=0, scale=2),
    "scale 0": lambda q, k, v, m: sdpa(q, k, v, scale=0.0),
    "scale below 0": lambda q, k, v, m: sdpa(q, k, v, scale=-0.5),
    "packet": lambda q, k, v, m: packet(q, k, v, attn_mask=m),
    "packet, keywords": lambda q, k, v, m: packet(query=q, key=k, value=v, is_causal=True),
    "overload": lambda q, k, v, m: packet.default(q, k, v, m, 0.0, False, scale=0.25),
    "overload, keywords": lambda q, k, v, m: packet.default(key=k, query=q, value=v, attn_mask=m),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str) -> None:
    site = found(SPELLINGS[name], Q, K, V, M)
    assert site.form == "sdpa"
    assert site.q_shape == site.kv_shape == (B, H, L, D)


MASKS = {
    "bool": (normal(B, H, L, L) > 0, "explicit bool (2, 4, 6, 6)"),
    "float": (normal(B, H, L, L), "explicit additive (2, 4, 6, 6)"),
    "2-D": (normal(L, L) > 0, "explicit bool (6, 6)"),
    "3-D": (normal(H, L, L), "explicit additive (4, 6, 6)"),
    "padding": (normal(B, 1, 1, L) > 0, "explicit bool (2, 1, 1, 6) key padding"),
    "one per query": (normal(B, H, L, 1), "explicit additive (2, 4, 6, 1)"),
    "dead rows": (torch.zeros(L, L, dtype=torch.bool), "explicit bool (6, 6)"),
    "dead -inf": (torch.full((L, L), -torch.inf), "explicit additive (6, 6)"),
    "dead lowest": (torch.full((L, L), torch.finfo().min), "explicit additive (6, 6)"),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str) -> None:
    mask, text = MASKS[name]
    assert found(lambda q, m: sdpa(q, q, q, m), Q, mask).mask == text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    found(lambda q, m: sdpa(q, q, q, m), Q.to(dtype), normal(L, L).to(dtype))


SHAPES = {
    "3-D": ((H, L, D), (H, L, D)),
    "3-D, keys of batch 1": ((H, L, D), (1, L, D)),
    "lengths": ((B, H, L, D), (B, H, 11, D)),
    "one query": ((B, H, 1, D), (B, H, 11, D)),
    "one head over four": ((B, H, L, D), (B, 1, L, D)),
    "keys of batch 1": ((B, H, L, D), (1, H, 7, D)),
    "query of batch 1": ((1, H, L, D), (3, H, 7, D)),
    "batch and head 1": ((B, H, L, D), (1, 1, L, D)),
    "no batch": ((0, H, L, D), (0, H, L, D)),
    "no query": ((B, H, 0, D), (B, H, L, D)),
    "no key": ((B, H, L, D), (B, H, 0, D)),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("is_causal", [False, True])
def test_shapes(name: str, is_causal: bool) -> None:
    q, k = (normal(*size) for size in SHAPES[name])
    found(lambda q, k: sdpa(q, k, k, is_causal=is_causal), q, k)


def test_another_head_dim_of_the_value() -> None:
    site = found(lambda q, v: sdpa(q, q, v), Q, normal(B, H, L, 5))
    assert site.kv_shape == (B, H, L, 5)


# --- repeated heads -------------------------------------------------------------------------


def whole(x: Tensor, dim: int) -> Tensor:
    """What torch.export makes of ``:`` where sizes vary."""
    sliced: Tensor = torch.ops.aten.slice.Tensor(x, dim, 0, sys.maxsize)
    return sliced


REPEATS: dict[str, Callable[[Tensor], Tensor]] = {
    "getitem": lambda k: k[:, :, None, :, :].expand(B, 2, 2, L, D).reshape(B, H, L, D),
    "short getitem": lambda k: k[:, :, None].expand(B, 2, 2, L, D).reshape(B, H, L, D),
    "minus one": lambda k: k[:, :, None].expand(-1, -1, 2, -1, -1).reshape(B, -1, L, D),
    "unsqueeze": lambda k: k.unsqueeze(2).expand(-1, -1, 2, -1, -1).flatten(1, 2),
    "unsqueeze -3": lambda k: k.unsqueeze(-3).expand(-1, -1, 2, -1, -1).flatten(1, 2),
    "functions": lambda k: torch.flatten(torch.unsqueeze(k, 2).expand(B, 2, 2, L, D), 1, 2),
    "keywords": lambda k: torch.reshape(
        input=torch.unsqueeze(input=k, dim=2).expand(B, 2, 2, L, D), shape=(B, H, L, D)
    ),
    "aten": lambda k: torch.ops.aten.reshape.default(
        torch.ops.aten.expand.default(torch.ops.aten.unsqueeze.default(k, 2), [B, 2, 2, L, D]),
        [B, H, L, D],
    ),
    "slices of torch.export": lambda k: torch.ops.aten.reshape.default(
        torch.ops.aten.expand.default(
            whole(torch.ops.aten.unsqueeze.default(whole(k, 0), 2), 3), [B, 2, 2, L, D]
        ),
        [B, H, L, D],
    ),
    "repeat_interleave": lambda k: k.repeat_interleave(2, dim=1),
    "positional": lambda k: k.repeat_interleave(2, 1),
    "from the end": lambda k: k.repeat_interleave(2, dim=-3),
    "torch.repeat_interleave": lambda k: torch.repeat_interleave(k, 2, 1, output_size=H),
    "all keywords": lambda k: torch.repeat_interleave(input=k, repeats=2, dim=1),
}


@pytest.mark.parametrize("name", REPEATS)
def test_repeats_are_undone(name: str) -> None:
    repeat = REPEATS[name]
    site = found(lambda q, k, v: sdpa(q, repeat(k), repeat(v)), Q, K2, V2)
    assert site.heads == "4 over 2"


@pytest.mark.parametrize("start, end, step", [(1, sys.maxsize, 1), (0, 3, 1), (0, sys.maxsize, 2)])
def test_repeats_of_a_part_are_of_the_part(start: int, end: int, step: int) -> None:
    def repeat(x: Tensor) -> Tensor:
        part = torch.ops.aten.slice.Tensor(x, 2, start, end, step)
        return part[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, repeat(k), repeat(v))

    site = found(attend, Q, K2, V2)
    part = len(range(L)[start:end:step])
    assert part < L and site.kv_shape == (B, 2, part, D)


def test_one_head_repeated_for_all() -> None:
    def repeat(x: Tensor) -> Tensor:
        return x[:, :, None].expand(B, 1, H, L, D).reshape(B, H, L, D)

    assert found(lambda q, k, v: sdpa(q, repeat(k), repeat(v)), Q, K1, V1).heads == "4 over 1"


def test_groups_by_flag() -> None:
    site = found(lambda q, k, v: sdpa(q, k, v, enable_gqa=True), Q, K2, V2)
    assert site.heads == "4 over 2"


def test_repeats_and_flag_together() -> None:
    def attend(q: Tensor, k: Tensor) -> Tensor:
        k = k.repeat_interleave(2, 1)
        return sdpa(q, k, k, enable_gqa=True)

    assert found(attend, normal(B, 8, L, D), K2).heads == "8 over 2"


def test_repeats_with_a_symbolic_length() -> None:
    def attend(q: Tensor, k: Tensor) -> Tensor:
        batch, heads, length, width = k.shape
        wide = k[:, :, None].expand(batch, heads, 2, length, width)
        k = wide.reshape(batch, heads * 2, length, width)
        return sdpa(q, k, k)

    q, k = Q.clone(), K2.clone()
    torch._dynamo.mark_dynamic(q, 2)
    torch._dynamo.mark_dynamic(k, 2)
    compiled = Compiled(attend)
    for inputs in ((q, k), (normal(B, H, 3, D), normal(B, 2, 9, D))):
        same(compiled(*inputs), attend(*inputs))
    assert [site.heads for site in compiled.report.sites] == ["4 over 2"]


@torch.library.custom_op("passes_test::repeat_interleave", mutates_args=())
def foreign_repeat(x: Tensor, repeats: int, dim: int) -> Tensor:
    return x.repeat(1, repeats, 1, 1)


foreign_repeat.register_fake(lambda x, repeats, dim: x.repeat(1, repeats, 1, 1))

OTHER_ORDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "wrong axis": lambda k: k[:, None].expand(B, 2, 2, L, D).reshape(B, H, L, D),
    "unsqueeze 1": lambda k: k.unsqueeze(1).expand(B, 2, 2, L, D).flatten(1, 2),
    "unsqueeze -4": lambda k: k.unsqueeze(-4).expand(B, 2, 2, L, D).flatten(1, 2),
    "repeat": lambda k: k.repeat(1, 2, 1, 1),
    "tile": lambda k: torch.tile(k, (1, 2, 1, 1)),
    "cat": lambda k: torch.cat([k, k], 1),
    "transposed": lambda k: k[:, :, None].expand(B, 2, 2, L, D).transpose(1, 2).flatten(1, 2),
    "foreign": lambda k: foreign_repeat(k, 2, 1),
    "repeats per head": lambda k: k.repeat_interleave(torch.tensor([1, 3]), 1, output_size=H),
}


@pytest.mark.parametrize("name", OTHER_ORDERS)
def test_other_orders_of_heads_are_not_undone(name: str) -> None:
    repeat = OTHER_ORDERS[name]
    site = found(lambda q, k, v: sdpa(q, repeat(k), repeat(v)), Q, K2, V2)
    assert site.heads == "4"


MIXING: dict[str, tuple[tuple[int, ...], tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "batch grows too": (
        (1, 12, L, D),
        (1, 2, L, D),
        lambda k: k[:, :, None].expand(3, 2, 2, L, D).reshape(1, 12, L, D),
    ),
    "head_dim grows too": (
        (1, 16, L, 1),
        (1, 2, L, 1),
        lambda k: k[:, :, None].expand(1, 2, 2, L, 4).reshape(1, 16, L, 1),
    ),
    "heads become tokens": (
        (B, 2, L, D),
        (B, 2, L, D),
        lambda k: k[:, :, None].expand(B, 2, 2, L, D).reshape(B, 2, 2 * L, D),
    ),
    "tokens and heads trade places": (
        (B, H, L, D),
        (B, 2, L, D),
        lambda k: k.repeat_interleave(2, 2).view(B, H, L, D),
    ),
}


@pytest.mark.parametrize("name", MIXING)
def test_views_that_mix_dims_are_not_undone(name: str) -> None:
    query, key, repeat = MIXING[name]
    site = found(lambda q, k: sdpa(q, repeat(k), repeat(k)), normal(*query), normal(*key))
    assert site.kv_shape == tuple(repeat(normal(*key)).shape)


def test_different_repeats_of_key_and_value_are_not_undone() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, k.repeat_interleave(2, 1), v.repeat_interleave(4, 1))

    assert found(attend, Q, K2, V1).heads == "4"
    one = found(lambda q, k, v: sdpa(q, k.repeat_interleave(2, 1), v), Q, K2, V)
    assert one.heads == "4"


CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "method": lambda k: k.mul_(2),
    "setitem": lambda k: k.__setitem__((0, 0), 0.0),
    "view": lambda k: k[0].transpose(0, 1).zero_(),
    "data": lambda k: k.data.mul_(2),
    "out": lambda k: torch.add(k, 1, out=k),
    "numpy": lambda k: k.numpy().fill(2),
    "running statistics": lambda k: F.batch_norm(
        normal(3, D), k[0, 0, 0], k[0, 0, 1], training=True
    ),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("when", ["before the copy", "after the copy"])
def test_repeats_of_what_changes_are_not_undone(name: str, when: str) -> None:
    def attend(q: Tensor, k: Tensor) -> Tensor:
        wide = k[:, :, None].expand(B, 2, 2, L, D)
        if when == "before the copy":
            CHANGES[name](k)
            wide = wide.reshape(B, H, L, D)
        else:
            wide = wide.reshape(B, H, L, D)
            CHANGES[name](k)
        return sdpa(q, wide, wide)

    assert found(attend, Q, K2).heads == "4"


def test_several_batch_dims() -> None:
    q, k = normal(2, 3, H, L, D), normal(2, 3, H, L + 1, D, seed=1)
    for mask in (None, normal(L, L + 1), normal(H, 1, L + 1)):
        report = check(lambda q, k, m: sdpa(q, k, k, m), q, k, mask)
        assert report.rewritten[0].q_shape == (6, H, L, D)
    assert check(lambda q: sdpa(q, q, q, is_causal=True), q).rewritten


# --- what is kept, and why ------------------------------------------------------------------

KEPT: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], str]] = {
    "dropout": (lambda q: sdpa(q, q, q, dropout_p=0.5), (Q,), "dropout_p=0.5"),
    "float64": (lambda q: sdpa(q, q, q), (Q.double(),), "torch.float64"),
    "5-D batches": (
        lambda q, k: sdpa(q, k, k),
        (normal(2, B, H, L, D), normal(1, B, H, L, D)),
        "query has batch",
    ),
    "5-D mask": (
        lambda q, m: sdpa(q, q, q, m),
        (normal(2, B, H, L, D), normal(B, 1, L, L)),
        "4-D mask for a 5-D query",
    ),
    "2-D": (lambda q: sdpa(q, q, q), (normal(L, D),), "2-D query"),
    "ranks": (lambda q, k: sdpa(q, k, k), (Q, normal(H, L, D)), "4-D query, 3-D key"),
    "more ranks": (lambda q, k: sdpa(q, k, k), (normal(H, L, D), Q), "3-D query, 4-D key"),
    "query heads broadcast": (lambda q, k: sdpa(q, k, k), (K1, K), "1 heads and key 4"),
    "value heads": (lambda q, k, v: sdpa(q, k, v), (Q, K1, V), "key has 1 heads and value 4"),
    "value groups": (
        lambda q, k, v: sdpa(q, k, v, enable_gqa=True),
        (Q, K2, V1),
        "key has 2 heads and value 1",
    ),
    "value batch": (lambda q, k, v: sdpa(q, k, v), (Q, K[:1], V), "key has batch 1 and value 2"),
    "mask and causal": (
        lambda q: sdpa(q, q, q, torch.ones(L, L, dtype=torch.bool), is_causal=True),
        (Q,),
        "attn_mask together with is_causal",
    ),
    "infinite scale": (lambda q: sdpa(q, q, q, scale=torch.inf), (Q,), "scale=inf"),
    "head_dim 0": (lambda q: sdpa(q, q, q), (normal(B, H, L, 0),), "head_dim 0"),
    "softmax": (lambda q: q.softmax(-1) @ q.mT, (Q,), "the scores come from the input L_q_"),
    "F.softmax": (lambda q: F.softmax(q @ q.mT, 1) @ q, (Q,), "other dims than the softmax"),
    "operator": (
        lambda q: torch.ops.sage.attention(q, q, q),
        (Q,),
        "already sage::attention, called by the model",
    ),
    "a kernel of SDPA": (
        lambda q: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q)[0],
        (Q,),
        "already lowered to one of its kernels",
    ),
    "subclass": (lambda q: sdpa(q, q, q), (TwoTensor(Q, Q.clone()),), "tensor subclass"),
    "vmap": (lambda q: torch.vmap(lambda x: sdpa(x, x, x))(q), (Q,), "transform of torch.func"),
    "vmap, one mapped": (
        lambda q, k: torch.vmap(lambda x: sdpa(x, k, k))(q),
        (normal(3, B, H, L, D), K),
        "transform of torch.func",
    ),
    "grad": (
        lambda q: torch.func.grad(lambda x: sdpa(x, x, x).square().sum())(q),
        (Q,),
        "transform of torch.func",
    ),
    "grad of something else": (
        lambda q, k: torch.func.grad(lambda x: (sdpa(k, k, k) * x).sum())(q),
        (Q, K),
        "transform of torch.func",
    ),
    "checkpoint": (
        lambda q: checkpoint(lambda x: sdpa(x, x, x), q, use_reentrant=False),
        (Q,),
        "inside the body of the higher-order operator tag_activation_checkpoint",
    ),
    "cond": (
        lambda q: torch.cond(q.sum() > 0, lambda x: sdpa(x, x, x), lambda x: x.clone(), (q,)),
        (Q,),
        "inside the body of the higher-order operator cond",
    ),
    "checkpoint in cond": (
        lambda q: torch.cond(
            q.sum() > 0,
            lambda x: checkpoint(lambda y: sdpa(y, y, y), x, use_reentrant=False),
            lambda x: x.clone(),
            (q,),
        ),
        (Q,),
        "inside the body of the higher-order operator tag_activation_checkpoint",
    ),
    "flex_attention": (
        lambda q: flex_attention(q, q, q),
        (normal(1, 2, 16, 16),),
        "flex_attention is a higher-order operator",
    ),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # eager, in vmap
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", KEPT)
def test_kept_with_a_reason(name: str) -> None:
    function, inputs, reason = KEPT[name]
    reasons = keeps(function, *inputs)
    assert len(reasons) == 1
    assert reason in reasons[0]


def test_kept_sites_say_where_and_what() -> None:
    (site,) = check(lambda q: sdpa(q, q, q, dropout_p=0.5), Q).kept
    assert site.form == "sdpa"
    assert site.q_shape == site.kv_shape == (B, H, L, D)
    assert __file__ in site.source


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return sdpa(x, x, x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def test_bodies_of_an_autograd_function() -> None:
    q = Q.clone().requires_grad_()
    (site,) = check(lambda x: Attention.apply(x * 1), q).kept
    assert "autograd_function_apply" in site.reason


def test_rewriting_resumes_after_a_transform() -> None:
    def attend(q: Tensor) -> Tensor:
        return sdpa(torch.vmap(lambda y: torch.vmap(lambda x: sdpa(x, x, x))(y))(q), q, q)

    report = check(attend, Q)
    assert len(report.rewritten) == len(report.kept) == 1


def pinned(q: Tensor) -> Tensor:
    first = sdpa(q, q, q)
    with sdpa_kernel(SDPBackend.MATH):
        second = sdpa(first, q, q)
    return sdpa(second, q, q)


def pinned_twice(q: Tensor) -> Tensor:
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        with sdpa_kernel(SDPBackend.MATH):
            q = sdpa(q, q, q)
        q = sdpa(q, q, q)
    return sdpa(q, q, q)


def pinned_across_a_break(q: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        q = sdpa(q, q, q)
        torch._dynamo.graph_break()
        q = sdpa(q, q, q)
    return sdpa(q, q, q)


@pytest.mark.parametrize(
    ("function", "kept", "rewrites"),
    [(pinned, 1, 2), (pinned_twice, 2, 1), (pinned_across_a_break, 2, 1)],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_chosen_backend_is_respected(
    function: Callable[..., Tensor], kept: int, rewrites: int
) -> None:
    report = check(function, Q)
    assert len(report.rewritten) == rewrites
    assert [site.reason.partition(":")[0] for site in report.kept] == [
        "inside sdpa_kernel(...)"
    ] * kept


# --- what is no attention -------------------------------------------------------------------


@torch.library.custom_op("passes_test::scaled_dot_product_attention", mutates_args=())
def foreign_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q + 2 * k + 3 * v


foreign_sdpa.register_fake(lambda q, k, v: torch.empty_like(q))


@torch.compiler.allow_in_graph
def scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q - k - v


@pytest.mark.parametrize("function", [foreign_sdpa, scaled_dot_product_attention], ids=["op", "py"])
def test_a_namesake_is_no_attention(function: Callable[..., Tensor]) -> None:
    assert not check(lambda q, k, v: function(q, k, v), Q, K, V).sites


def test_a_graph_without_shapes_is_kept() -> None:
    gm = fx.symbolic_trace(lambda q: sdpa(q, q, q))
    (finding,) = detect(gm)
    assert isinstance(finding, Rejected)
    assert "not recorded in the graph" in finding.reason


@pytest.mark.parametrize("name", ["scale", "dropout_p", "is_causal", "enable_gqa"])
def test_a_scalar_computed_at_run_time_is_kept(name: str) -> None:
    graph = fx.Graph()
    q, scalar = graph.placeholder("q"), graph.placeholder("scalar")
    node = graph.call_function(sdpa, (q, q, q), {name: scalar})
    q.meta["example_value"] = node.meta["example_value"] = Q
    graph.output(node)
    (finding,) = detect(fx.GraphModule({}, graph))
    assert isinstance(finding, Rejected)
    assert finding.reason == f"{name} is computed at run time; a constant is needed"


# --- autocast -------------------------------------------------------------------------------


def in_autocast(function: Callable[..., Tensor], enabled: bool = True) -> Callable[..., Tensor]:
    def wrapped(*inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            return function(*inputs)

    return wrapped


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v, is_causal=True)


BF16 = torch.bfloat16
DTYPES = {
    "float32": (Q, K, V),
    "rotary: Q and K float32": (Q, K, V.to(BF16)),
    "Q bfloat16": (Q.to(BF16), K, V),
    "all bfloat16": (Q.to(BF16), K.to(BF16), V.to(BF16)),
    "float16": (Q.half(), K, V.half()),
}


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("where", ["inside", "ambient"])
def test_autocast(name: str, where: str) -> None:
    if where == "inside":
        found(in_autocast(attend), *DTYPES[name])
    else:
        with torch.autocast("cpu", dtype=BF16):
            found(attend, *DTYPES[name])


def test_autocast_switched_off_inside() -> None:
    found(in_autocast(in_autocast(attend, enabled=False)), Q, K, V)


def test_autocast_and_masks() -> None:
    def masked(q: Tensor, m: Tensor) -> Tensor:
        return sdpa(q, q, q, m)

    assert found(in_autocast(masked), Q, normal(L, L)).mask == "explicit additive (6, 6)"

    def constant(q: Tensor) -> Tensor:
        lowest = torch.full((L, L), torch.finfo(torch.float32).min)  # -inf in bfloat16
        return sdpa(q, q, q, lowest.triu(1))

    assert found(in_autocast(constant), Q).mask == "causal"
