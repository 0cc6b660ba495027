"""Attention as it is written in repositories: the same formula in a dozen spellings."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.architecture import BOTH, SDPA, WRITTEN, Architecture, Inputs, normal

FAMILY: Final = "Written out in PyTorch"
WIDTH: Final = 32
HEADS: Final = 4
HEAD: Final = WIDTH // HEADS
L: Final = 10
SOURCE: Final = 7


def split(x: Tensor, heads: int = HEADS) -> Tensor:
    """(B, L, heads * D) to (B, heads, L, D)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge(x: Tensor) -> Tensor:
    """(B, heads, L, D) to (B, L, heads * D)."""
    return x.transpose(1, 2).flatten(2)


class NanoGPT(nn.Module):
    """One projection for Q, K and V; a causal buffer, or scaled_dot_product_attention."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.attn_dropout = nn.Dropout(0.0)
        self.register_buffer("bias", torch.tril(torch.ones(64, 64)).view(1, 1, 64, 64))

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(WIDTH, dim=2)
        k = k.view(B, T, HEADS, C // HEADS).transpose(1, 2)
        q = q.view(B, T, HEADS, C // HEADS).transpose(1, 2)
        v = v.view(B, T, HEADS, C // HEADS).transpose(1, 2)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
            att = self.attn_dropout(F.softmax(att, dim=-1))
            y = att @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))


class TimmStyle(nn.Module):
    """Q, K and V by one reshape and permute, the scale on Q, the softmax a method."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, HEADS, HEAD).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            attn = (q * HEAD**-0.5) @ k.transpose(-2, -1)
            x = attn.softmax(dim=-1) @ v
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


class Einsum(nn.Module):
    """Heads beside tokens, contracted by einsum; padding is subtracted."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (HEADS, HEAD)) for f in (self.q, self.k, self.v))
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / HEAD**0.5
        if mask is not None:
            scores = scores - 1e4 * (1.0 - mask[:, None, None, :].float())
        return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).flatten(2)


class XTransformersStyle(nn.Module):
    """Multi-query, null key and value, a causal mask by triu, the maximum subtracted."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.to_kv = nn.Linear(WIDTH, 2 * HEAD, bias=False)
        self.null_kv = nn.Parameter(torch.randn(2, HEAD))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        batch = x.shape[0]
        q = split(self.to_q(x)) * HEAD**-0.5
        k, v = self.to_kv(x).chunk(2, dim=-1)
        null_k, null_v = (null.expand(batch, 1, HEAD) for null in self.null_kv.unbind(0))
        k, v = torch.cat((null_k, k), dim=-2), torch.cat((null_v, v), dim=-2)
        sim = torch.einsum("b h i d, b j d -> b h i j", q, k)
        if mask is not None:
            mask = F.pad(mask.bool(), (1, 0), value=True)
            sim = sim.masked_fill(~mask[:, None, None, :], -torch.finfo(sim.dtype).max)
        i, j = sim.shape[-2:]
        causal = torch.ones((i, j), dtype=torch.bool, device=x.device).triu(j - i + 1)
        sim = sim.masked_fill(causal, -torch.finfo(sim.dtype).max)
        sim = sim - sim.amax(dim=-1, keepdim=True).detach()
        attn = sim.softmax(dim=-1)
        return merge(torch.einsum("b h i j, b j d -> b h i d", attn, v))


class PerceiverStyle(nn.Module):
    """Learned queries, heads folded into the batch, padding repeated for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(6, WIDTH))
        self.to_q, self.to_kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        batch = x.shape[0]
        q = self.to_q(self.latents.expand(batch, -1, -1))
        k, v = self.to_kv(x).chunk(2, dim=-1)
        q, k, v = (split(t).reshape(batch * HEADS, -1, HEAD) for t in (q, k, v))
        sim = torch.einsum("b i d, b j d -> b i j", q, k) * HEAD**-0.5
        if mask is not None:
            hidden = (mask == 0).repeat_interleave(HEADS, 0)[:, None, :]
            sim.masked_fill_(hidden, -torch.finfo(sim.dtype).max)
        out = torch.einsum("b i j, b j d -> b i d", sim.softmax(dim=-1), v)
        return merge(out.view(batch, HEADS, -1, HEAD))


class Axial(nn.Module):
    """Video (B, T, P, C): attention in space, then in time, of 5-D Q, K and V."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.space, self.time = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH)

    def attend(self, x: Tensor, project: nn.Linear) -> Tensor:
        q, k, v = project(x).unflatten(-1, (3, HEADS, HEAD)).permute(3, 0, 1, 4, 2, 5)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = torch.softmax(q @ k.transpose(-1, -2) / HEAD**0.5, -1) @ v
        return x + y.transpose(2, 3).flatten(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attend(x, self.space)
        return self.attend(x.transpose(1, 2), self.time).transpose(1, 2)


class LlamaReference(nn.Module):
    """Complex rotary embedding, repeat_kv, an additive causal mask, the softmax in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.wq = nn.Linear(WIDTH, WIDTH, bias=False)
        self.wk, self.wv = (nn.Linear(WIDTH, WIDTH // 2, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        bsz, seqlen, _ = x.shape
        angles = torch.outer(torch.arange(seqlen), 100.0 ** -torch.linspace(0, 1, HEAD // 2))
        rotation = torch.polar(torch.ones_like(angles), angles)[None, :, None]

        def rotate(y: Tensor) -> Tensor:
            pairs = torch.view_as_complex(y.float().reshape(*y.shape[:-1], -1, 2))
            return torch.view_as_real(pairs * rotation).flatten(3).type_as(y)

        def repeat_kv(y: Tensor) -> Tensor:
            wide = y[:, :, :, None, :].expand(bsz, seqlen, HEADS // 2, 2, HEAD)
            return wide.reshape(bsz, seqlen, HEADS, HEAD)

        xq = rotate(self.wq(x).view(bsz, seqlen, HEADS, HEAD))
        xk = rotate(self.wk(x).view(bsz, seqlen, HEADS // 2, HEAD))
        xv = self.wv(x).view(bsz, seqlen, HEADS // 2, HEAD)
        xq, keys, values = (y.transpose(1, 2) for y in (xq, repeat_kv(xk), repeat_kv(xv)))
        scores = torch.matmul(xq, keys.transpose(2, 3)) / math.sqrt(HEAD)
        scores = scores + torch.full((seqlen, seqlen), float("-inf")).triu(1)
        scores = F.softmax(scores.float(), dim=-1).type_as(xq)
        return torch.matmul(scores, values).transpose(1, 2).contiguous().view(bsz, seqlen, -1)


class GroupedBroadcast(nn.Module):
    """Grouped heads as a dimension of their own, (B, Hkv, G, L, D), which K and V lack."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, WIDTH)
        self.k, self.v = (nn.Linear(WIDTH, WIDTH // 2) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q = split(self.q(x)).unflatten(1, (HEADS // 2, 2))
        k, v = (split(f(x), HEADS // 2)[:, :, None] for f in (self.k, self.v))
        scores = torch.matmul(q, k.mT) * HEAD**-0.5
        if mask is not None:
            scores = scores.masked_fill(mask[:, None, None, None, :] == 0, -1e9)
        return merge(torch.matmul(scores.softmax(-1), v).flatten(1, 2))


class FairseqStyle(nn.Module):
    """Sequence first, bmm over (B * heads), the mask added to a view of the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x.transpose(0, 1)
        length, batch, _ = x.shape
        q, k, v = (
            f(x).contiguous().view(length, batch * HEADS, HEAD).transpose(0, 1)
            for f in (self.q, self.k, self.v)
        )
        q = q * HEAD**-0.5
        weights = torch.bmm(q, k.transpose(1, 2))
        if mask is not None:
            weights = weights.view(batch, HEADS, length, length)
            weights = weights.masked_fill((mask == 0)[:, None, None], float("-inf"))
            weights = weights.view(batch * HEADS, length, length)
        probabilities = F.softmax(weights, dim=-1, dtype=torch.float32).type_as(weights)
        return torch.bmm(probabilities, v).transpose(0, 1).reshape(length, batch, WIDTH)


class Baddbmm(nn.Module):
    """The scale as alpha of a baddbmm whose first input counts for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (split(f(x)).flatten(0, 1) for f in (self.q, self.k, self.v))
        if mask is None:
            bias, beta = q.new_empty(q.shape[0], q.shape[1], k.shape[1]), 0
        else:
            bias, beta = ((mask - 1.0) * 1e4).repeat_interleave(HEADS, 0)[:, None, :], 1
            bias = bias.expand(-1, q.shape[1], -1)
        scores = torch.baddbmm(bias, q, k.transpose(-1, -2), beta=beta, alpha=HEAD**-0.5)
        return merge(torch.bmm(scores.softmax(-1), v).unflatten(0, (-1, HEADS)))


class BertStyle(nn.Module):
    """nn.Softmax, nn.Dropout, an additive mask of the dtype's minimum; three passes, one module."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.softmax, self.dropout = nn.Softmax(dim=-1), nn.Dropout(0.0)

    def attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (split(f(x)) for f in (self.query, self.key, self.value))
        scores = torch.matmul(q, k.transpose(-1, -2))
        scores = scores / math.sqrt(HEAD)
        if mask is not None:
            scores = scores + (1.0 - mask[:, None, None, :].float()) * torch.finfo(x.dtype).min
        return merge(torch.matmul(self.dropout(self.softmax(scores)), v))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for _ in range(3):
            x = F.layer_norm(x + self.attend(x, mask), (WIDTH,))
        return x


class CacheInBuffers(nn.Module):
    """A decoding step that writes K and V into its buffers at a position, as gpt-fast does."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.register_buffer("keys", normal(2, HEADS, 16, HEAD))
        self.register_buffer("values", normal(2, HEADS, 16, HEAD, seed=1))
        self.register_buffer("mask", torch.ones(16, 16, dtype=torch.bool).tril())

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        q, k, v = (split(y) for y in self.qkv(x).chunk(3, -1))
        self.keys[:, :, position] = k
        self.values[:, :, position] = v
        mask = self.mask[None, None, position]
        return merge(F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=mask))


class Experts(nn.Module):
    """Attention, then a mixture of experts whose router ends in a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = TimmStyle(fused=False)
        self.router = nn.Linear(WIDTH, 3)
        self.experts = nn.Parameter(torch.randn(3, WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        weights = torch.softmax(self.router(x), dim=-1)
        return x + torch.einsum("ble,blc,ecd->bld", weights, x, self.experts)


class Classifier(nn.Module):
    """Attention, pooling by learned weights, and a head that ends in a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = TimmStyle(fused=False)
        self.pool, self.head = nn.Linear(WIDTH, 1), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        pooled = (torch.softmax(self.pool(x), dim=1) * x).sum(1)
        return torch.softmax(self.head(pooled), dim=-1)


def tokens_only(padded: bool) -> Inputs:
    """(2, L, WIDTH) without a mask."""
    return {"x": normal(2, L, WIDTH)}


def tokens_and_mask(padded: bool) -> Inputs:
    """The same with a mask (2, L), int64, 1 where visible."""
    mask = torch.ones(2, L, dtype=torch.long)
    mask[1, L - 3 :] = 0
    return {"x": normal(2, L, WIDTH), "mask": mask if padded else None}


def _entry(
    name: str, build: Callable[[], nn.Module], pads: bool = True, **rest: Any
) -> Architecture:
    return Architecture(
        name=name,
        family=FAMILY,
        build=lambda implementation: build(),
        inputs=tokens_and_mask if pads else tokens_only,
        true_sites=rest.pop("true_sites", 1),
        implementations=WRITTEN,
        pads=pads,
        **rest,
    )


def _two_ways(name: str, build: Callable[[bool], nn.Module], **rest: Any) -> Architecture:
    return Architecture(
        name=name,
        family=FAMILY,
        build=lambda implementation: build(implementation == SDPA),
        inputs=rest.pop("inputs", tokens_only),
        true_sites=rest.pop("true_sites", 1),
        implementations=BOTH,
        **rest,
    )


ARCHITECTURES: Final[tuple[Architecture, ...]] = (
    _two_ways("nanoGPT", NanoGPT),
    _two_ways("timm style", TimmStyle),
    _two_ways(
        "axial video, 5-D",
        Axial,
        true_sites=2,
        inputs=lambda padded: {"x": normal(2, 3, 4, WIDTH)},
        note="scaled_dot_product_attention of 5-D Q, K and V",
    ),
    _entry("einsum", Einsum),
    _entry("x-transformers style", XTransformersStyle),
    _entry("Perceiver style", PerceiverStyle),
    _entry("Llama's reference code", LlamaReference, pads=False),
    _entry("grouped heads by broadcasting, 5-D", GroupedBroadcast),
    _entry("fairseq style", FairseqStyle),
    _entry("baddbmm", Baddbmm),
    _entry("BERT style, one module three times", BertStyle, true_sites=3),
    Architecture(
        name="gpt-fast, a decoding step",
        family=FAMILY,
        build=lambda implementation: CacheInBuffers(),
        inputs=lambda padded: {"x": normal(2, 1, WIDTH), "position": torch.tensor([6])},
        true_sites=1,
        implementations=WRITTEN,
        trains=False,
    ),
    _entry(
        "mixture of experts",
        Experts,
        pads=False,
        others=1,
        note="the other softmax is the router's",
    ),
    _entry(
        "classifier",
        Classifier,
        pads=False,
        others=2,
        note="the others: pooling by learned weights, and the classes",
    ),
)
