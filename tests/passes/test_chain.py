"""Attention written out as single operations: each rule, and what looks like it but is not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.passes.checks import Compiled, check, keeps, normal, same

INF = math.inf


def rewrites(function: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    """The one attention of the function is rewritten, and the results agree; its site."""
    report = check(function, *inputs, **options)
    assert not report.kept, str(report)
    (site,) = report.rewritten
    return site


def qkv(length: int = 5, key_length: int = 7, heads: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value; value's head_dim is another one."""
    return (
        normal(2, heads, length, 8),
        normal(2, heads, key_length, 8, seed=1),
        normal(2, heads, key_length, 6, seed=2),
    )


# --- scale, products, layouts ---------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize(
    "scores",
    [
        lambda q, k: q @ k.transpose(-2, -1) / math.sqrt(8),
        lambda q, k: torch.matmul(q * 0.25, k.mT),
        lambda q, k: q @ k.mT / math.sqrt(q.size(-1)),
        lambda q, k: q @ k.mT * k.shape[-1] ** -0.5,
        lambda q, k: q @ (k / 2).permute(0, 1, 3, 2),
        lambda q, k: (q @ k.swapaxes(2, 3)).mul(0.3).div_(2.0),
        lambda q, k: 0.5 * torch.einsum("bhqd,bhkd->bhqk", q, k),
        lambda q, k: torch.einsum("...kd, ...qd -> ...qk", k, q),
        lambda q, k: -(-q @ k.mT),
        lambda q, k: q @ k.mT / torch.sqrt(torch.tensor(8.0)),
        lambda q, k: torch.baddbmm(
            torch.empty(8, 5, 7), q.flatten(0, 1), k.flatten(0, 1).mT, beta=0, alpha=0.3
        ).view(2, 4, 5, 7),
    ],
)
def test_a_scaled_product(scores: Callable[..., Tensor], dynamic: bool | None) -> None:
    site = rewrites(lambda q, k, v: scores(q, k).softmax(-1) @ v, *qkv(), dynamic=dynamic)
    assert site.mask == "none"
    assert site.heads == "4"


def test_keys_first() -> None:
    """The transposed scores, their softmax over the rows, and values times weights."""
    rewrites(lambda q, k, v: (k @ q.mT * 0.3).softmax(-2).mT @ v, *qkv())
    rewrites(lambda q, k, v: (v.mT @ (k @ q.mT * 0.3).softmax(2)).mT, *qkv())


def test_one_head_without_batch() -> None:
    q, k, v = (part[0, 0] for part in qkv())
    assert rewrites(lambda q, k, v: (q @ k.t()).softmax(1) @ v, q, k, v).q_shape == (1, 1, 5, 8)


def test_heads_in_the_third_dim() -> None:
    q, k, v = normal(2, 5, 4, 8), normal(2, 7, 4, 8, seed=1), normal(2, 7, 4, 8, seed=2)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.einsum("bqhd,bkhd->bhqk", q, k).mul(0.3).softmax(-1)
        return torch.einsum("bhqk,bkhd->bqhd", weights, v)

    assert rewrites(function, q, k, v).q_shape == (2, 4, 5, 8)


@pytest.mark.parametrize("dynamic", [None, True])
def test_folded_batch(dynamic: bool | None) -> None:
    """(B * H, L, D) for the products, (B, H, Lq, Lk) for a mask between."""
    q, k, v = qkv()

    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        flat = [part.reshape(-1, *part.shape[2:]) for part in (q, k, v)]
        scores = torch.bmm(flat[0], flat[1].transpose(1, 2)).view(q.shape[0], 4, 5, -1)
        weights = (scores * 0.3 + mask).softmax(-1).view(q.shape[0] * 4, 5, -1)
        return torch.bmm(weights, flat[2]).view(q.shape[0], 4, 5, -1).transpose(1, 2).flatten(2)

    site = rewrites(function, q, k, v, normal(2, 1, 5, 7), dynamic=dynamic)
    assert site.q_shape[1] == 4


def test_grouped_heads_five_dims() -> None:
    q, k, v = normal(2, 2, 3, 5, 8), normal(2, 2, 7, 8, seed=1), normal(2, 2, 7, 6, seed=2)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.unsqueeze(2).mT).softmax(-1) @ v.unsqueeze(2)

    site = rewrites(function, q, k, v)
    assert (site.q_shape, site.kv_shape, site.heads) == ((2, 6, 5, 8), (2, 2, 7, 6), "6 over 2")


def test_grouped_heads_einsum() -> None:
    q, k, v = normal(2, 5, 2, 3, 8), normal(2, 7, 2, 8, seed=1), normal(2, 7, 2, 6, seed=2)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.einsum("bqhgd,bkhd->bhgqk", q, k).softmax(-1)
        return torch.einsum("bhgqk,bkhd->bqhgd", weights, v)

    assert rewrites(function, q, k, v).heads == "6 over 2"


@pytest.mark.parametrize("repeat", ["expand", "interleave"])
def test_repeated_heads_are_undone(repeat: str) -> None:
    q, k, v = normal(2, 6, 5, 8), normal(2, 2, 7, 8, seed=1), normal(2, 2, 7, 6, seed=2)

    def repeated(part: Tensor) -> Tensor:
        if repeat == "interleave":
            return part.repeat_interleave(3, dim=1)
        batch, heads, length, width = part.shape
        wide = part[:, :, None, :, :].expand(batch, heads, 3, length, width)
        return wide.reshape(batch, heads * 3, length, width)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ repeated(k).transpose(2, 3) * 0.3).softmax(-1) @ repeated(v)

    assert rewrites(function, q, k, v).kv_shape[1] == 2


def test_heads_that_repeat_in_another_order() -> None:
    """k, k, k and not k0, k0, k0, k1, ...: right, without undoing it."""
    q, k, v = normal(2, 6, 5, 8), normal(2, 2, 7, 8, seed=1), normal(2, 2, 7, 6, seed=2)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.repeat(1, 3, 1, 1).mT).softmax(-1) @ v.repeat(1, 3, 1, 1)

    rewrites(function, q, k, v)


def test_one_key_head_for_all() -> None:
    q, k, v = normal(2, 5, 4, 8), normal(2, 7, 8, seed=1), normal(2, 7, 6, seed=2)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.einsum("bqhd,bkd->bhqk", q, k).softmax(-1)
        return torch.einsum("bhqk,bkd->bqhd", weights, v)

    assert rewrites(function, q, k, v).kv_shape[1] == 1


def test_learned_queries_and_keys_without_batch() -> None:
    _, k, v = qkv()
    rewrites(lambda q, k, v: (q @ k.mT).softmax(-1) @ v, normal(5, 8), k, v)
    rewrites(lambda q, k, v: (q @ k.mT).softmax(-1) @ v, normal(2, 4, 5, 8), k[0], v)


def test_video() -> None:
    """Two batch axes before the heads."""
    parts = [normal(2, 3, 4, length, 8, seed=length) for length in (5, 7, 7)]
    site = rewrites(lambda q, k, v: (q @ k.mT).softmax(-1) @ v, *parts)
    assert site.q_shape == (6, 4, 5, 8)


def test_a_tensor_that_scales_each_head() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Tensor:
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * scale.exp()
        return scores.softmax(-1) @ v

    rewrites(function, *qkv(), normal(4, 1, 1))
    rewrites(lambda q, k, v, s: (q @ k.mT / s).softmax(-1) @ v, *qkv(), normal(2, 4, 1, 7).exp())


def test_softcap() -> None:
    site = rewrites(lambda q, k, v: (torch.tanh(q @ k.mT / 5) * 5).softmax(-1) @ v, *qkv())
    assert site.mask == "none"
    rewrites(lambda q, k, v: (-3 * (q @ k.mT).tanh()).softmax(-1) @ v, *qkv())


# --- biases and masks -----------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize(
    "masked",
    [
        lambda s, m: s + m,
        lambda s, m: m + s * 0.3 + m,
        lambda s, m: (s - m) * 0.3,
        lambda s, m: s.masked_fill(m > 0.5, -INF),
        lambda s, m: s.masked_fill(m > 0.5, torch.finfo(s.dtype).min),
        lambda s, m: torch.where(m > 0.5, s, -1e9),
        lambda s, m: torch.where(m > 0.5, torch.full_like(s, -1e9), s),
        lambda s, m: s.where(m < 0.5, torch.tensor(-INF)),
        lambda s, m: s.masked_fill(m > 1, -INF) + m,
        lambda s, m: (s + m).masked_fill(m == m.max(), -1e9),
        lambda s, m: torch.add(s, m, alpha=2),
        lambda s, m: s + 3.0 + m,
    ],
)
def test_masks_and_biases(masked: Callable[..., Tensor], dynamic: bool | None) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return masked(q @ k.mT, mask).softmax(-1) @ v

    for shape in ((2, 1, 5, 7), (5, 7), (4, 5, 7), (2, 1, 1, 7)):
        rewrites(function, *qkv(), normal(*shape), dynamic=dynamic)


@pytest.mark.parametrize("fill", [-INF, -1e4, -1e9, torch.finfo(torch.float32).min])
def test_rows_without_a_visible_key(fill: float) -> None:
    """NaN where all scores are -inf, an average where all are the same finite number."""
    mask = torch.zeros(2, 1, 5, 7, dtype=torch.bool)
    mask[0, 0, 2] = mask[1, 0, :, 3:] = True

    def function(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
        return (q @ k.mT).masked_fill(hidden, fill).softmax(-1) @ v

    rewrites(function, *qkv(), mask)
    if fill > -INF:  # what is replaced has no gradient
        inputs = [part.requires_grad_() for part in qkv()]
        expected = torch.autograd.grad(function(*inputs, mask).square().sum(), inputs)
        actual = torch.autograd.grad(Compiled(function)(*inputs, mask).square().sum(), inputs)
        for found, wanted in zip(actual, expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_dead_rows_that_become_zero() -> None:
    mask = torch.zeros(2, 1, 5, 7, dtype=torch.bool)
    mask[0, 0, 2] = True

    def number(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
        return torch.nan_to_num((q @ k.mT).masked_fill(hidden, -INF).softmax(-1)) @ v

    def fill(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
        return (q @ k.mT).masked_fill(hidden, -1e9).softmax(-1).masked_fill(hidden, 0.0) @ v

    def both(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
        scores = torch.where(~hidden, q @ k.mT, -INF)
        return scores.softmax(-1).masked_fill(hidden, 0.0) @ v

    def other(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
        return (q @ k.mT).masked_fill(~hidden, -INF).softmax(-1).masked_fill(hidden, 0.0) @ v

    for function in (number, fill, both):
        rewrites(function, *qkv(), mask)
    assert "not the one of the scores" in keeps(other, *qkv(), mask)[0]


def test_a_mask_expanded_to_the_scores() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = q @ k.mT
        scores.masked_fill_((mask == 0)[:, None, None].expand_as(scores), -INF)
        return scores.float().softmax(-1).type_as(scores) @ v

    site = rewrites(function, *qkv(), torch.ones(2, 7).tril(4))
    assert "(2, 1, 1, 7)" in site.mask


def test_in_place_spellings() -> None:
    """As expressions, and as statements whose results nobody names."""

    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = q @ k.mT
        scores /= 3.0
        scores.add_(mask)
        scores.masked_fill_(mask > 1, -INF)
        weights = scores.softmax(-1)
        weights.nan_to_num_(0.0)
        return weights @ v

    rewrites(function, *qkv(), normal(2, 1, 5, 7))


@pytest.mark.parametrize("dynamic", [None, True])
def test_views_between_terms(dynamic: bool | None) -> None:
    """A relative bias, then a mask for each window: scores in five dims for a moment."""
    q, k, v = (normal(6, 2, 4, 8, seed=seed) for seed in range(3))

    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
        scores = (q * 0.3) @ k.transpose(-2, -1) + bias.unsqueeze(0)
        windows = mask.shape[0]
        scores = scores.view(q.shape[0] // windows, windows, 2, 4, 4)
        scores = scores + mask.unsqueeze(1).unsqueeze(0)
        return scores.view(-1, 2, 4, 4).softmax(-1) @ v

    rewrites(function, q, k, v, normal(2, 4, 4), normal(3, 4, 4), dynamic=dynamic)


@pytest.mark.parametrize("first", [False, True])
def test_sinks(first: bool) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        column = sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)
        scores = q @ k.mT * 0.3
        joined = torch.cat([column, scores] if first else [scores, column], dim=-1)
        joined = joined - joined.max(dim=-1, keepdim=True).values
        weights = F.softmax(joined, dim=-1, dtype=joined.dtype)
        return (weights[..., 1:] if first else weights[..., :-1]) @ v

    rewrites(function, *qkv(), normal(4))


def test_a_zero_beside_the_keys() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.pad(q @ k.mT, (0, 1)).softmax(-1)[..., :-1] @ v

    rewrites(function, *qkv())


def test_maxima_change_nothing() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT
        scores = scores - scores.amax(-1, keepdim=True)
        scores = scores - torch.max(scores, -1, True)[0].detach()
        return scores.softmax(-1) @ v

    rewrites(function, *qkv())


# --- dtypes, dropout, gradients -------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_softmax_in_float32(dtype: torch.dtype) -> None:
    q, k, v = (part.to(dtype) for part in qkv())

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT * 0.3
        return F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v

    report = _approximately(function, q, k, v)
    assert len(report.rewritten) == 1


def test_widened_operands_are_taken_as_they_were() -> None:
    q, k, v = (part.bfloat16() for part in qkv())

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q.float() @ k.float().mT).softmax(-1).type_as(v) @ v

    report = _approximately(function, q, k, v)
    call = next(n for n in report.graphs[0].after.graph.nodes if n.op == "call_function")
    assert call.target is torch.ops.sage.attention.default  # no cast before it


def test_gradients_through_rows_that_an_additive_mask_hides() -> None:
    """What is added has a gradient, what is replaced has none."""
    inputs = [part.requires_grad_() for part in qkv()]
    hidden = torch.zeros(2, 1, 5, 7, dtype=torch.bool)
    hidden[0, 0, 2] = True

    def added(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
        low = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)
        return ((q @ k.mT + low).softmax(-1) @ v)[:, :, 2].square().sum()

    expected = torch.autograd.grad(added(*inputs, hidden), inputs[:2])
    compiled = Compiled(added)
    actual = torch.autograd.grad(compiled(*inputs, hidden), inputs[:2])
    assert len(compiled.report.rewritten) == 1
    for found, wanted in zip(actual, expected, strict=True):
        assert bool(wanted[0].any()) == bool(found[0].any())


@pytest.mark.parametrize("inside", [False, True])
def test_autocast(inside: bool) -> None:
    q, k, v = qkv()
    mask = torch.full((5, 7), torch.finfo(torch.float32).min).triu(1)
    mask[3] = torch.finfo(torch.float32).min  # finite in float32, -inf in bfloat16

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * 0.3 + mask).softmax(-1) @ v

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            return attention(q, k, v)

    with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        report = _approximately(function, q, k, v)
    assert len(report.rewritten) == 1


def _approximately(function: Callable[..., Any], *inputs: Tensor) -> Any:
    """As ``check``, with the accuracy of the narrower dtypes."""
    expected = function(*inputs)
    compiled = Compiled(function)
    actual = compiled(*inputs)
    assert actual.dtype == expected.dtype and actual.stride() == expected.stride()
    torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.02)
    return compiled.report


def test_dropout() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, p: float, training: bool) -> Tensor:
        return F.dropout((q @ k.mT).softmax(-1), p, training=training) @ v

    rewrites(function, *qkv(), 0.5, False)
    rewrites(function, *qkv(), 0.0, True)
    assert "dropout_p=0.5 in training" in keeps(function, *qkv(), 0.5, True)[0]


def test_gradients() -> None:
    inputs = [part.requires_grad_() for part in (*qkv(), normal(4, 5, 7), normal(4, 1, 1))]

    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
        scores = torch.tanh(q @ k.mT * scale) * 3 + bias
        return (scores.masked_fill(bias > 1, -INF).softmax(-1) @ v).square().sum()

    expected = torch.autograd.grad(function(*inputs), inputs)
    compiled = Compiled(function)
    actual = torch.autograd.grad(compiled(*inputs), inputs)
    assert len(compiled.report.rewritten) == 1
    for found, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_other_lengths_of_the_same_graph() -> None:
    """One compiled function, several lengths, a causal mask that grows with them."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.shape[-2]
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        return (q @ k.mT * 0.3).masked_fill(hidden, -INF).softmax(-1) @ v

    compiled = Compiled(function, dynamic=True)
    for length in (5, 9, 31):
        inputs = qkv(length, length)
        same(compiled(*inputs), function(*inputs))
    assert len(compiled.report.rewritten) == 1


# --- what is kept ---------------------------------------------------------------------------

NEAR_MISSES: list[tuple[str, str, Callable[..., Any]]] = [
    (
        "subtracted from the maximum",
        "used by amax",
        lambda q, k, v: ((s := q @ k.mT).amax(-1, keepdim=True) - s).softmax(-1) @ v,
    ),
    (
        "shifted without its sink",
        "not to their sinks",
        lambda q, k, v: F.pad(q @ k.mT + 3, (0, 1)).softmax(-1)[..., :-1] @ v,
    ),
    (
        "shifted by its maximum without its sink",
        "not to their sinks",
        lambda q, k, v: (
            F.pad((s := q @ k.mT) - s.amax(-1, keepdim=True), (0, 1)).softmax(-1)[..., :-1] @ v
        ),
    ),
    ("a large number added", "digits", lambda q, k, v: (q @ k.mT + 1e8).softmax(-1) @ v),
    (
        "a mask scaled away",
        "no mask",
        lambda q, k, v: ((q @ k.mT).masked_fill(q[..., :1] > 0, -1e4) * 1e-4).softmax(-1) @ v,
    ),
    ("softmax over queries", "other dims", lambda q, k, v: (q @ k.mT).softmax(-2) @ v),
    ("softmax over heads", "other dims", lambda q, k, v: (q @ k.mT).softmax(1) @ v),
    ("scores used", "also used", lambda q, k, v: ((s := q @ k.mT).softmax(-1) @ v, s)),
    ("weights used", "also used", lambda q, k, v: ((w := (q @ k.mT).softmax(-1)) @ v, w)),
    ("weights scaled", "mul", lambda q, k, v: ((q @ k.mT).softmax(-1) * 2) @ v),
    ("weights doubled", "also used", lambda q, k, v: (w := (q @ k.mT).softmax(-1)) @ v + w @ v),
    ("a softmax of a softmax", "softmax", lambda q, k, v: (q @ k.mT).softmax(-1).softmax(-1) @ v),
    (
        "bias before tanh",
        "tanh",
        lambda q, k, v: (q @ k.mT + k[..., 0][..., None, :]).tanh().softmax(-1) @ v,
    ),
    ("squared scores", "themselves", lambda q, k, v: ((s := q @ k.mT) * s).softmax(-1) @ v),
    (
        "fill that is no mask",
        "no mask",
        lambda q, k, v: (q @ k.mT).masked_fill(q[..., :1] > 0, 1.0).softmax(-1) @ v,
    ),
    ("scores clamped", "clamp", lambda q, k, v: (q @ k.mT).clamp(-1, 1).softmax(-1) @ v),
    ("a router", "linear", lambda q, k, v: F.linear(q, k[0, 0]).softmax(-1) @ v),
    ("weights gathered", "topk", lambda q, k, v: (q @ k.mT).softmax(-1).topk(2).values),
    (
        "a maximum of columns",
        "max",
        lambda q, k, v: ((s := q @ k.mT) - s.amax(-2, keepdim=True)).softmax(-1) @ v,
    ),
    (
        "half of the weights",
        "part",
        lambda q, k, v: (q @ k.mT).softmax(-1)[..., :3] @ v[..., :3, :],
    ),
    (
        "a sink that stays",
        "also|sliced|dropped|summed",
        lambda q, k, v: torch.cat([s := q @ k.mT, s[..., :1] * 0], -1).softmax(-1)[..., 1:] @ v,
    ),
]


@pytest.mark.parametrize(
    ("reason", "function"),
    [case[1:] for case in NEAR_MISSES],
    ids=[case[0] for case in NEAR_MISSES],
)
def test_near_misses_are_kept(reason: str, function: Callable[..., Any]) -> None:
    (given,) = {keeps(function, *qkv())[0]}
    assert any(word in given for word in reason.split("|")), given


def test_many_ways_through_additions_end() -> None:
    """Each step has two sources: the search must not follow every combination."""

    def function(x: Tensor) -> Tensor:
        for _ in range(40):
            x = x * 0.5 + x
        return x.softmax(-1)

    keeps(function, normal(2, 3))


def test_a_mask_computed_from_the_scores() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT
        least = scores.topk(3, dim=-1).values[..., -1:]
        return scores.masked_fill(scores < least, -INF).softmax(-1) @ v

    assert "also used" in keeps(function, *qkv())[0]


def test_a_result_written_into_another_tensor() -> None:
    def mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        mask += q @ k.mT  # the mask is changed, and the caller sees it
        return mask.softmax(-1) @ v

    def product(q: Tensor, k: Tensor, v: Tensor, buffer: Tensor) -> Tensor:
        return torch.matmul(q, k.mT, out=buffer).softmax(-1) @ v

    for function in (mask, product):
        assert "into another tensor" in keeps(function, *qkv(), normal(2, 4, 5, 7))[0]


def test_fills_and_masks_of_about_the_same_size() -> None:
    """In a row that the mask hides but for what is replaced, scores and fills would mix."""

    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return ((q @ k.mT).masked_fill(mask > 0, -1e4) + mask).softmax(-1) @ v

    assert "beside an additive mask" in keeps(function, *qkv(), normal(5, 7))[0]


def _maximum(scores: Tensor) -> Tensor:
    return scores - scores.amax(-1, keepdim=True)


LOW = torch.finfo(torch.float32).min
HALF_DEAD = torch.zeros(2, 1, 5, 7, dtype=torch.bool)
HALF_DEAD[0, 0, 2] = True
HOSTILE: dict[str, Callable[..., Any]] = {
    "shift, then a factor of the keys": lambda s, v, x: ((s + 3) * x).softmax(-1) @ v,
    "maximum, then a factor": lambda s, v, x: (_maximum(s) * x).softmax(-1) @ v,
    "maximum, then tanh": lambda s, v, x: (5 * torch.tanh(_maximum(s) / 5)).softmax(-1) @ v,
    "integer constant": lambda s, v, x: (
        (s * torch.full((), 2.7, dtype=torch.int64)).softmax(-1) @ v
    ),
    "integers like": lambda s, v, x: (
        (s * torch.full_like(s, 2.7, dtype=torch.int32)).softmax(-1) @ v
    ),
    "constant of more dims": lambda s, v, x: (s * torch.full((3, 1, 1, 1, 1), 0.5)).softmax(-1) @ v,
    "fill of more dims": lambda s, v, x: (
        torch.where(x > 0, s, torch.full((3, 1, 1, 1, 1), -1e9)).softmax(-1) @ v
    ),
    "bits of scores": lambda s, v, x: s.half().view(torch.bfloat16).softmax(-1).float() @ v,
    "bits of weights": lambda s, v, x: s.softmax(-1).half().view(torch.bfloat16).float() @ v,
    "bits of values": lambda s, v, x: s.softmax(-1) @ v.half().view(torch.bfloat16).float(),
    "another tensor in the weights' dtype": lambda s, v, x: x.expand_as(s).to(s.softmax(-1)) @ v,
    "fill that scaling makes infinite": lambda s, v, x: (
        (s.masked_fill(HALF_DEAD, LOW) * 2).softmax(-1) @ v
    ),
    "mask that scaling makes infinite": lambda s, v, x: (
        ((s + torch.zeros(5, 7).masked_fill(HALF_DEAD, LOW)) * 2).softmax(-1) @ v
    ),
    "fill that a cast makes infinite": lambda s, v, x: (
        s.masked_fill(HALF_DEAD, -1e9).half().softmax(-1).float() @ v
    ),
    "mask that a cast makes infinite": lambda s, v, x: (
        F.softmax(s + HALF_DEAD * -1e9, dim=-1, dtype=torch.float16).float() @ v
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_looks_like_attention(name: str) -> None:
    """Rewritten or kept, it stays what it was."""
    factor = normal(2, 1, 1, 7)
    inputs = (*qkv(), factor)
    check(lambda q, k, v, x: HOSTILE[name](q @ k.mT, v, x), *inputs)


def test_adjoints_are_transposes() -> None:
    q, k, v = (normal(6, 6, seed=seed) for seed in range(3))
    rewrites(lambda q, k, v: (q @ k.mT).mH.softmax(-1) @ v, q, k, v)
    check(lambda q, k, v: (q @ k.mT).softmax(-1).H @ v, q, k, v)


def test_keys_transposed_without_gradients() -> None:
    """What is made where gradients are off has none, though it lies in the memory of the key."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            turned = k.transpose(-2, -1)
        return ((q @ turned).softmax(-1) @ v).square().sum()

    inputs = [part.requires_grad_() for part in qkv()]
    compiled = Compiled(function)
    compiled(*inputs).backward()
    assert inputs[1].grad is None and inputs[0].grad is not None
    assert len(compiled.report.rewritten) == 1


@pytest.mark.parametrize("part", [0, 1, 2])
def test_operands_changed_between_the_products(part: int) -> None:
    """Query and key are read before the change, the operator would read them after it."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        operands = [q + 1, k + 1, v + 1]
        scores = operands[0] @ operands[1].mT
        operands[part][..., :1].mul_(2.0)
        return scores.softmax(-1) @ operands[2]

    report = check(function, *qkv())
    assert len(report.rewritten) == (part == 2)


def test_a_mask_changed_after_it_was_added() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = q @ k.mT + mask
        mask.zero_()
        return scores.softmax(-1) @ v

    assert "changed in place" in keeps(function, *qkv(), normal(5, 7))[0]


def test_scores_changed_through_a_view() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT
        scores[..., 0] = 3.0
        return scores.softmax(-1) @ v

    keeps(function, *qkv())


def test_autocast_that_ends_between_the_products() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            scores = q @ k.mT
        return scores.float().softmax(-1) @ v

    assert "autocast" in keeps(function, *qkv())[0]
