"""Variants of attention from research that change the formula, each a small module.

Q, K and V come projected from one input (B, L, C) unless the formula says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.architecture import WRITTEN, Architecture, Inputs, normal
from tests.zoo.written_out import HEAD, HEADS, WIDTH, L, merge, split

FAMILY: Final = "Research variants"
SCALE: Final = HEAD**-0.5


class Projected(nn.Module):
    """Q, K and V of (B, H, L, D), and an output projection; a variant is its ``attend``."""

    causal = False

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split(y) for y in self.qkv(x).chunk(3, -1))
        return self.out(merge(self.attend(q, k, v)))


def scores_of(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1) * SCALE


def distance(length: int) -> Tensor:
    """key - query, (length, length)."""
    position = torch.arange(length)
    return position[None, :] - position[:, None]


class Standard(Projected):
    """softmax(Q K^T / sqrt(d)) V (arXiv:1706.03762)."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scores_of(q, k).softmax(-1) @ v


class DifferentialMaps(Projected):
    """(softmax(Q1 K1^T) - lambda softmax(Q2 K2^T)) V (arXiv:2410.05258)."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.tensor(0.5))

    def maps(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        (q1, q2), (k1, k2) = q.chunk(2, -1), k.chunk(2, -1)
        first = q1 @ k1.transpose(-2, -1) * (HEAD // 2) ** -0.5
        second = q2 @ k2.transpose(-2, -1) * (HEAD // 2) ** -0.5
        return first.softmax(-1), second.softmax(-1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first, second = self.maps(q, k)
        return (first - self.mix * second) @ v


class DifferentialOutputs(DifferentialMaps):
    """The same with a product with V for each map, as its fast implementations do."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first, second = self.maps(q, k)
        return first @ v - self.mix * (second @ v)


class Agent(Projected):
    """softmax(Q A^T) (softmax(A K^T) V), A few pooled queries (arXiv:2312.08874)."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        agents = F.adaptive_avg_pool2d(q, (3, HEAD))
        gathered = scores_of(agents, k).softmax(-1) @ v
        return scores_of(q, agents).softmax(-1) @ gathered


class MixtureOfHeads(Projected):
    """Heads weighted by a router, token by token; one head is always on (arXiv:2410.11842)."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.balance = nn.Linear(WIDTH, HEADS - 1), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split(y) for y in self.qkv(x).chunk(3, -1))
        y = (scores_of(q, k).softmax(-1) @ v).transpose(1, 2)
        chosen = self.router(x).softmax(-1)
        least = chosen.topk(2, dim=-1).values[..., -1:]
        shared, routed = self.balance(x).softmax(-1).unsqueeze(-2).unbind(-1)
        weights = torch.cat((shared, routed * chosen * (chosen >= least)), -1)
        return self.out((y * weights[..., None]).flatten(2))


class Grouped(Projected):
    """Two heads of Q share one of K and V (arXiv:2305.13245)."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (y[:, ::2].repeat_interleave(2, dim=1) for y in (k, v))
        return scores_of(q, k).softmax(-1) @ v


class Sinks(Projected):
    """A learned logit per head takes its share of the softmax and returns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.randn(HEADS))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sinks = self.sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
        logits = torch.cat([scores_of(q, k), sinks], dim=-1)
        logits = logits - logits.max(dim=-1, keepdim=True).values
        return logits.softmax(-1)[..., :-1] @ v


class Sigmoid(Projected):
    """sigmoid(Q K^T + b) V (arXiv:2409.04431)."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.sigmoid(scores_of(q, k) - math.log(q.shape[2])) @ v


class Linear(Projected):
    """phi(Q) (phi(K)^T V), normalized (arXiv:2006.16236)."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = F.elu(q) + 1, F.elu(k) + 1
        return (q @ (k.transpose(-2, -1) @ v)) / (q @ k.sum(-2)[..., None])


class Lightning(Projected):
    """Causal linear attention with decay, block by block (arXiv:2401.04658)."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        block, decay = 5, 0.9
        state = q.new_zeros(*q.shape[:2], HEAD, HEAD)
        apart = distance(block)
        weights = torch.where(apart <= 0, decay ** (-apart).clamp(min=0).float(), 0.0)
        after = decay ** torch.arange(1, block + 1).float()[:, None]
        outputs = []
        for q_, k_, v_ in zip(*(y.split(block, 2) for y in (q, k, v)), strict=True):
            outputs.append((q_ @ k_.transpose(-2, -1) * weights) @ v_ + (q_ * after) @ state)
            state = decay**block * state + (k_ * after.flip(0) / decay).transpose(-2, -1) @ v_
        return torch.cat(outputs, 2)


class Efficient(Projected):
    """softmax(Q over features) (softmax(K over tokens)^T V) (arXiv:1812.01243)."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q.softmax(-1) @ (k.softmax(-2).transpose(-2, -1) @ v)


class CrossCovariance(Projected):
    """softmax of normalized K^T Q, over channels (XCiT, arXiv:2106.09681)."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(HEADS, 1, 1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (y.transpose(-2, -1) for y in (q, k, v))
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        return ((scores * self.temperature).softmax(-1) @ v).transpose(-2, -1)


class Cross(Projected):
    """Queries of one sequence, keys and values of another."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scores_of(q, k[:, :, 3:]).softmax(-1) @ v[:, :, 3:]


class Alibi(Projected):
    """A causal bias that grows with distance, a slope per head (arXiv:2108.12409)."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        apart = distance(q.shape[2])
        slopes = 2.0 ** -torch.arange(1, HEADS + 1)
        bias = torch.where(apart <= 0, slopes[:, None, None] * apart, -torch.inf)
        return (scores_of(q, k) + bias).softmax(-1) @ v


class RelativeBias(Projected):
    """A learned bias per head and distance; no scale, as in T5 (arXiv:1910.10683)."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(2 * L, HEADS)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1)
        scores += self.table(distance(q.shape[2]) + L).permute(2, 0, 1)[None]
        return scores.softmax(-1) @ v


class RelativeKeys(Projected):
    """Keys and learned embeddings of distance, both times Q (arXiv:1803.02155)."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(2 * L, HEAD)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        relative = self.table(distance(q.shape[2]) + L)
        scores = q @ k.transpose(-2, -1) + torch.einsum("bhid,ijd->bhij", q, relative)
        return (scores * SCALE).softmax(-1) @ v


class NormalizedScores(Projected):
    """Q and K of unit length, times a learned temperature per head (arXiv:2010.04245)."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(HEADS, 1, 1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        return (scores * self.temperature.exp()).softmax(-1) @ v


class Softcap(Projected):
    """Scores limited by a tanh before the mask, as in Gemma 2 (arXiv:2408.00118)."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.tanh(scores_of(q, k) / 5.0) * 5.0
        return scores.masked_fill(distance(q.shape[2]) > 0, -torch.inf).softmax(-1) @ v


class LocalitySelf(Projected):
    """No token attends to itself; the temperature is learned (arXiv:2112.13492)."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(math.log(SCALE)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1) * self.temperature.exp()
        own = torch.eye(q.shape[2], dtype=torch.bool)
        return scores.masked_fill(own, -torch.finfo(scores.dtype).max).softmax(-1) @ v


class TalkingHeads(Projected):
    """Heads are mixed before and after the softmax (arXiv:2003.02436)."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = (nn.Parameter(torch.randn(HEADS, HEADS)) for _ in range(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("bhij,hg->bgij", scores_of(q, k), self.before)
        return torch.einsum("bhij,hg->bgij", scores.softmax(-1), self.after) @ v


class InducedSet(nn.Module):
    """Learned points attend to the set, and the set to what they found (arXiv:1810.00825)."""

    def __init__(self) -> None:
        super().__init__()
        self.points = nn.Parameter(torch.randn(1, 4, WIDTH))
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def attend(self, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = split(self.q(x)), split(self.k(y)), split(self.v(y))
        return x + merge(scores_of(q, k).softmax(-1) @ v)

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x, self.attend(self.points, x))


class Slots(Projected):
    """The softmax is over the queries, which compete for each key (arXiv:2006.15055)."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = scores_of(q, k).softmax(-2) + 1e-8
        return (weights / weights.sum(-1, keepdim=True)) @ v


class Synthesizer(Projected):
    """Weights from a learned matrix, without Q and K (arXiv:2005.00743)."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(HEADS, L, L))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.weights.softmax(-1) @ v


class Additive(Projected):
    """softmax(w . tanh(Q + K)) V (arXiv:1409.0473): no product of Q and K."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(1, HEAD))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.tanh(q[:, :, :, None] + k[:, :, None]) @ self.weights[0]
        return scores.softmax(-1) @ v


def tokens(padded: bool) -> Inputs:
    return {"x": normal(2, L, WIDTH)}


def variant(
    name: str,
    build: Callable[[], nn.Module],
    true_sites: int = 1,
    inputs: Callable[[bool], Inputs] = tokens,
    **rest: Any,
) -> Architecture:
    return Architecture(
        name=name,
        family=FAMILY,
        build=lambda implementation: build(),
        inputs=inputs,
        true_sites=true_sites,
        implementations=WRITTEN,
        **rest,
    )


ARCHITECTURES: Final[tuple[Architecture, ...]] = (
    variant("standard softmax", Standard),
    variant(
        "differential, of maps",
        DifferentialMaps,
        2,
        keeps="one product of V with the difference of two maps",
    ),
    variant("differential, of outputs", DifferentialOutputs, 2),
    variant("agent", Agent, 2),
    variant(
        "mixture of heads",
        MixtureOfHeads,
        others=2,
        note="the others are the router's",
    ),
    variant("grouped queries", Grouped),
    variant("attention sinks", Sinks),
    variant("sigmoid", Sigmoid, 0, note="no softmax"),
    variant("linear", Linear, 0, note="no softmax"),
    variant("lightning", Lightning, 0, note="no softmax"),
    variant("efficient", Efficient, 0, others=2, note="softmaxes of Q and of K, not of scores"),
    variant(
        "cross-covariance (XCiT)",
        CrossCovariance,
        note="over channels: the operator gets the tokens as head_dim",
    ),
    variant("cross-attention", Cross),
    variant("ALiBi", Alibi),
    variant("T5 bias", RelativeBias),
    variant("relative keys", RelativeKeys),
    variant("QK-norm", NormalizedScores),
    variant("softcap", Softcap),
    variant("locality self-attention", LocalitySelf),
    variant("talking heads", TalkingHeads, keeps="heads are mixed before and after the softmax"),
    variant("induced set", InducedSet, 2),
    variant("slots", Slots, 0, others=1, note="the softmax is over the queries"),
    variant("synthesizer", Synthesizer, 0, others=1, note="no Q and K"),
    variant("additive", Additive, 0, others=1, note="no product of Q and K"),
)
