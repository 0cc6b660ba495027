"""Attention from its formula, dense and in float64, and random calls to try it on.

Independent of the package's kernels: masks come from the definitions of the mask classes, not
from a band. Used wherever a kernel needs an expected result.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from math import inf, nan, pi

import torch
from torch import Tensor

from sage_compiler.semantics import UNBOUNDED, DeadRows, MaskClass, Semantics


@dataclass(frozen=True)
class Call:
    """The arguments of one attention."""

    query: Tensor
    key: Tensor
    value: Tensor
    semantics: Semantics = Semantics()  # noqa: RUF009 - frozen
    attn_mask: Tensor | None = None
    sinks: Tensor | None = None


def dense(call: Call) -> tuple[Tensor, Tensor]:
    """The output (B, H, Lq, Dv) and the LSE (B, H, Lq) in float64."""
    query, key, value = call.query.double(), call.key.double(), call.value.double()
    semantics, (batch, heads, query_length, head_dim) = call.semantics, query.shape
    group = heads // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)

    scale = semantics.scale if semantics.scale is not None else head_dim**-0.5
    scores = query @ key.mT * scale
    if semantics.softcap is not None:
        scores = semantics.softcap * torch.tanh(scores / semantics.softcap)
    if call.attn_mask is not None:
        if call.attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~call.attn_mask, -inf)
        else:
            # In float32 a score vanishes beside finfo.min: eager's rows of it are uniform.
            scores = (scores.float() + call.attn_mask.float()).double()
    scores = scores.masked_fill(~class_mask(semantics, query_length, key.shape[2]), -inf)

    sink = torch.full((heads,), -inf) if call.sinks is None else call.sinks
    sink = sink.double().view(1, heads, 1, 1).expand(batch, heads, query_length, 1)
    logits = torch.cat([scores, sink], -1)
    lse = torch.logsumexp(logits, -1)
    dead = lse == -inf
    output = torch.softmax(logits, -1).nan_to_num(0.0)[..., :-1] @ value
    if semantics.dead_rows is DeadRows.NAN and key.shape[2] > 0:
        output[dead] = nan
    return output, lse


def class_mask(semantics: Semantics, query_length: int, key_length: int) -> Tensor:
    """Which keys a mask class shows, straight from its definition: bool (Lq, Lk)."""
    bottom_right = semantics.mask_class in (
        MaskClass.CAUSAL_BOTTOM_RIGHT,
        MaskClass.WINDOW_BOTTOM_RIGHT,
    )
    row = torch.arange(query_length).view(-1, 1)
    diagonal = row + (key_length - query_length if bottom_right else 0)
    key = torch.arange(key_length).view(1, -1)
    match semantics.mask_class:
        case MaskClass.NONE:
            return torch.ones(query_length, key_length, dtype=torch.bool)
        case MaskClass.CAUSAL | MaskClass.CAUSAL_BOTTOM_RIGHT:
            return key <= diagonal
        case MaskClass.WINDOW | MaskClass.WINDOW_BOTTOM_RIGHT:
            left = semantics.window_left if semantics.window_left != UNBOUNDED else 10**9
            right = semantics.window_right if semantics.window_right != UNBOUNDED else 10**9
            return (diagonal - left <= key) & (key <= diagonal + right)


def random_call(seed: int, *, longest: int = 200) -> Call:
    """A random call: gaussian Q, K, V with a channel bias on K, and any mask, layout and dtype."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    batch, kv_heads, group = rng.randint(1, 3), rng.randint(1, 3), rng.choice((1, 1, 2, 4))
    heads = kv_heads * group
    query_length, key_length = rng.randint(1, longest), rng.randint(1, longest)
    if rng.random() < 0.3:
        query_length = key_length
    head_dim = rng.choice((8, 16, 32, 64, 80, 128))
    value_dim = head_dim if rng.random() < 0.7 else rng.choice((8, 24, 48))
    dtype = rng.choice((torch.float32, torch.float32, torch.bfloat16, torch.float16))

    bias = rng.choice((0.0, 1.0, 3.0)) * normal(batch, kv_heads, 1, head_dim)
    query = normal(batch, heads, query_length, head_dim)
    key = normal(batch, kv_heads, key_length, head_dim) + bias
    value = normal(batch, kv_heads, key_length, value_dim)
    layout = rng.choice(("contiguous", "tokens_first", "expanded", "every_other"))
    query, key, value = (laid_out(x.to(dtype), layout) for x in (query, key, value))

    mask_class = rng.choice((MaskClass.NONE, MaskClass.NONE, *MaskClass))
    semantics = Semantics(
        mask_class=mask_class,
        scale=rng.choice((None, None, 0.5 * head_dim**-0.5)),
        softcap=rng.choice((None, None, 5.0, 30.0)),
        dead_rows=rng.choice(tuple(DeadRows)),
    )
    if mask_class in (MaskClass.WINDOW, MaskClass.WINDOW_BOTTOM_RIGHT):
        semantics = replace(
            semantics,
            window_left=rng.choice((UNBOUNDED, 0, 3, 70)),
            window_right=rng.choice((UNBOUNDED, 0, 5, 70)),
        )
    full = (batch, heads, query_length, key_length)
    mask = random_mask(rng, generator, full) if rng.random() < 0.6 else None
    sinks = normal(heads) if rng.random() < 0.3 else None
    return Call(query, key, value, semantics, mask, sinks)


def channel_outliers(length: int = 1024, heads: int = 4, seed: int = 0) -> Call:
    """Q and K with channel offsets, as SageAttention2 (arXiv 2411.10958) finds in models.

    Every channel has an offset, every 16th a large one; the offset of Q drifts along the sequence,
    and so does the spread of Q and K. Shapes (1, heads, length, 64), float32.
    """
    generator = torch.Generator().manual_seed(seed)
    head_dim = 64

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def offsets() -> Tensor:
        size = torch.ones(head_dim)
        size[::16] = 5.0
        return normal(1, heads, 1, head_dim) * size

    shape = (1, heads, length, head_dim)
    phase = torch.linspace(0.0, 2.0 * pi, length).view(1, 1, length, 1)
    query = normal(*shape) * (0.3 * phase.sin()).exp() + offsets() * (1.0 + 0.3 * phase.sin())
    key = normal(*shape) * (0.3 * phase.cos()).exp() + offsets()
    return Call(query, key, normal(*shape))


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same shape with other strides; "expanded" repeats the first batch by stride 0."""
    match layout:
        case "tokens_first":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        case "expanded":
            return x[:1].expand_as(x)
        case "every_other":
            return x.repeat_interleave(2, -1)[..., ::2]
        case _:
            return x


def random_mask(
    rng: random.Random, generator: torch.Generator, full: tuple[int, int, int, int]
) -> Tensor:
    """A bool or float mask of 1 to 4 dims, each of full length or 1, sometimes expanded."""
    shape = [length if rng.random() < 0.6 else 1 for length in full]
    uniform = torch.rand(shape, generator=generator)
    hidden = uniform < rng.choice((0.1, 0.5, 0.9))
    if rng.random() < 0.5:
        mask = ~hidden
    else:
        low = rng.choice((-inf, -1e4, torch.finfo(torch.float32).min))
        mask = torch.randn(shape, generator=generator).masked_fill(hidden, low)
    if rng.random() < 0.3:
        return mask.expand(full)
    while mask.dim() > 1 and mask.shape[0] == 1 and rng.random() < 0.5:
        mask = mask[0]
    return mask
