"""A dozen attentions as models write them, with as many heads as positions as channels.

A dimension that can be mistaken for another has its size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

BATCH: Final = 2
LENGTH: Final = 8  # of queries and keys, and head_dim
HEADS: Final = LENGTH
WIDTH: Final = HEADS * LENGTH
PAIRS: Final = HEADS // 2


@dataclass(frozen=True, slots=True)
class Canonical:
    """A function and what makes its inputs."""

    function: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]

    def inputs(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(11)
        inputs = [torch.randn(shape, generator=generator) for shape in self.shapes]
        # Weights of projections would make scores that leave one key to each query.
        return [x * 0.2 if x.shape[-1] == WIDTH and x.dim() == 2 else x for x in inputs]


_FOUR: Final = (BATCH, HEADS, LENGTH, LENGTH)  # q, k or v, heads first; or a full mask
_LAST: Final = (BATCH, LENGTH, HEADS, LENGTH)
_FOLDED: Final = (BATCH * HEADS, LENGTH, LENGTH)
_TOKENS: Final = (BATCH, LENGTH, WIDTH)


def chain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = F.softmax(q @ k.transpose(-2, -1) * 0.4, dim=-1)
    return weights @ v


def bert(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, padding: Tensor) -> Tensor:
    q, k, v = (F.linear(x, w).view(BATCH, -1, HEADS, LENGTH).transpose(1, 2) for w in (wq, wk, wv))
    scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(LENGTH)
    scores = scores + (padding[:, None, None, :] > 1).float() * torch.finfo(scores.dtype).min
    weights = F.dropout(F.softmax(scores, dim=-1), p=0.1, training=False)
    out = torch.matmul(weights, v).permute(0, 2, 1, 3).contiguous()
    return out.view(BATCH, -1, WIDTH)


def gpt2(x: Tensor, w: Tensor) -> Tensor:
    q, k, v = (
        part.view(BATCH, LENGTH, HEADS, LENGTH).transpose(1, 2)
        for part in F.linear(x, w).split(WIDTH, dim=2)
    )
    scores = torch.matmul(q, k.transpose(-1, -2))
    scores = scores / torch.full([], LENGTH**0.5, dtype=scores.dtype)
    causal = torch.tril(torch.ones(LENGTH, LENGTH, dtype=torch.bool), diagonal=0)
    least = torch.full([], torch.finfo(scores.dtype).min, dtype=scores.dtype)
    scores = torch.where(causal, scores, least)
    weights = F.softmax(scores, dim=-1).type(v.dtype)
    return torch.matmul(weights, v).transpose(1, 2)


def llama(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (
        x[:, :, None].expand(BATCH, PAIRS, 2, LENGTH, LENGTH).reshape(BATCH, HEADS, LENGTH, LENGTH)
        for x in (k, v)
    )
    scores = torch.matmul(q, k.transpose(2, 3)) * LENGTH**-0.5
    future = torch.triu(torch.ones(LENGTH, LENGTH), diagonal=1)
    scores = scores + future.masked_fill(future == 1, float("-inf"))
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(weights, v).transpose(1, 2).contiguous()


def gemma2(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(2, 3)) * LENGTH**-0.5
    scores = scores / 5.0
    scores = torch.tanh(scores)
    scores = scores * 5.0
    scores = scores + mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(weights, v)


def gpt_oss(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, mask: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(2, 3)) * 0.3 + mask
    column = sinks.reshape(1, -1, 1, 1).expand(BATCH, -1, LENGTH, -1)
    combined = torch.cat([scores, column], dim=-1)
    combined = combined - combined.max(dim=-1, keepdim=True).values
    weights = F.softmax(combined, dim=-1, dtype=combined.dtype)[..., :-1]
    return torch.matmul(weights, v)


def bloom(q: Tensor, k: Tensor, v: Tensor, alibi: Tensor, hidden: Tensor) -> Tensor:
    scores = alibi.baddbmm(batch1=q, batch2=k.transpose(1, 2), beta=1.0, alpha=0.3)
    scores = scores.view(BATCH, HEADS, LENGTH, LENGTH)
    scores = scores.masked_fill(hidden > 1, torch.finfo(scores.dtype).min)
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.bmm(weights.view(BATCH * HEADS, LENGTH, LENGTH), v)


def unet(q: Tensor, k: Tensor, v: Tensor, ignored: Tensor) -> Tensor:
    scores = torch.baddbmm(ignored, q, k.transpose(-1, -2), beta=0, alpha=0.4)
    return torch.bmm(scores.softmax(dim=-1), v)


def swin(q: Tensor, k: Tensor, v: Tensor, relative: Tensor, windows: Tensor) -> Tensor:
    scores = (q * 0.3) @ k.transpose(-2, -1) + relative.unsqueeze(0)
    scores = scores.view(1, BATCH, HEADS, LENGTH, LENGTH) + windows.unsqueeze(1).unsqueeze(0)
    scores = scores.view(-1, HEADS, LENGTH, LENGTH)
    return (torch.softmax(scores, -1) @ v).transpose(1, 2).reshape(BATCH, LENGTH, WIDTH)


def einsums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("blhe,bshe->bhls", q, k)
    hidden = torch.triu(torch.ones(LENGTH, LENGTH, dtype=torch.bool), diagonal=1)
    scores = scores.masked_fill(hidden, -math.inf)
    weights = torch.softmax(0.3 * scores, dim=-1)
    return torch.einsum("bhls,bshd->blhd", weights, v)


def in_place(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(-1, -2))
    scores /= 3.0
    scores += mask
    return torch.matmul(torch.softmax(scores, dim=-1), v)


def nano(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
    # The first keys of the first element are hidden: under a causal mask, so are whole rows.
    scores = scores.masked_fill(padding[:, None, None, :] > 0.6, float("-inf"))
    causal = torch.tril(torch.ones(LENGTH, LENGTH))
    scores = scores.masked_fill(causal == 0, float("-inf"))
    weights = torch.nan_to_num(F.softmax(scores, dim=-1), nan=0.0)
    return weights @ v


def mistral(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(2, 3)) * LENGTH**-0.5
    rows, columns = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)[None, :]
    visible = (columns <= rows) & (rows - columns < 3)
    scores = torch.where(visible, scores, torch.finfo(scores.dtype).min)
    return torch.matmul(F.softmax(scores, dim=-1), v)


def t5(q: Tensor, k: Tensor, v: Tensor, relative: Tensor, mask: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(3, 2))
    scores += relative + mask
    weights = F.softmax(scores.float(), dim=-1).type_as(scores)
    return torch.matmul(F.dropout(weights, p=0.1, training=False), v)


def swin2(q: Tensor, k: Tensor, v: Tensor, factor: Tensor) -> Tensor:
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    return (scores * factor.exp()).softmax(dim=-1) @ v


def keys_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.softmax(k @ q.transpose(-1, -2) * 0.3, dim=-2)
    return weights.transpose(-1, -2) @ v


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.view(BATCH, PAIRS, 2, LENGTH, LENGTH)
    scores = torch.einsum("bhgqd,bhkd->bhgqk", q, k) / math.sqrt(LENGTH)
    weights = scores.softmax(-1)
    out = torch.einsum("bhgqk,bhkd->bhgqd", weights, v)
    return out.reshape(BATCH, HEADS, LENGTH, LENGTH)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)


_PADDING: Final = (BATCH, LENGTH)
_HEAD_BIAS: Final = (HEADS, LENGTH, LENGTH)
_PER_HEAD: Final = (HEADS, 1, 1)
_KEYS: Final = (BATCH, PAIRS, LENGTH, LENGTH)  # one head of keys or values for two of queries
_WEIGHT: Final = (WIDTH, WIDTH)

CANONICAL: Final = {
    form.function.__name__: form
    for form in (
        Canonical(chain, (_FOUR,) * 3),
        Canonical(bert, (_TOKENS, _WEIGHT, _WEIGHT, _WEIGHT, _PADDING)),
        Canonical(gpt2, (_TOKENS, (3 * WIDTH, WIDTH))),
        Canonical(llama, (_FOUR, _KEYS, _KEYS)),
        Canonical(gemma2, (_FOUR,) * 4),
        Canonical(gpt_oss, (_FOUR, _FOUR, _FOUR, (HEADS,), _FOUR)),
        Canonical(bloom, (*(_FOLDED,) * 4, _FOUR)),
        Canonical(unet, (_FOLDED,) * 4),
        Canonical(swin, (_FOUR, _FOUR, _FOUR, _HEAD_BIAS, (BATCH, LENGTH, LENGTH))),
        Canonical(einsums, (_LAST,) * 3),
        Canonical(in_place, (_FOUR,) * 4),
        Canonical(nano, (_FOUR, _FOUR, _FOUR, _PADDING)),
        Canonical(mistral, (_FOUR,) * 3),
        Canonical(t5, (_FOUR, _FOUR, _FOUR, (1, *_HEAD_BIAS), (BATCH, 1, 1, LENGTH))),
        Canonical(swin2, (_FOUR, _FOUR, _FOUR, _PER_HEAD)),
        Canonical(keys_first, (_FOUR,) * 3),
        Canonical(grouped, (_FOUR, _KEYS, _KEYS)),
        Canonical(sdpa, (_FOUR,) * 4),
    )
}
