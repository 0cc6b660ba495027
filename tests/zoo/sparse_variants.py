"""Variants of attention from research that choose which keys a query sees, in space or by mask."""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.architecture import Architecture, Inputs, normal
from tests.zoo.variants import Projected, distance, scores_of, variant
from tests.zoo.written_out import HEADS, WIDTH, merge, split

SIDE: Final = 8  # of images (B, SIDE, SIDE, C)
WINDOW: Final = 4


class ShiftedWindow(Projected):
    """Attention in windows of a rolled image, with a bias and a mask between regions (Swin)."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(HEADS, WINDOW**2, WINDOW**2))
        shift, side = WINDOW // 2, SIDE
        region = torch.zeros(side)
        region[-WINDOW:-shift], region[-shift:] = 1, 2
        regions = windows((region[:, None] * 3 + region)[None, :, :, None])[..., 0]
        self.register_buffer("mask", (regions[:, None] != regions[:, :, None]) * -100.0)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens = WINDOW**2
        scores = scores_of(q, k) + self.bias
        scores = scores.view(-1, self.mask.shape[0], HEADS, tokens, tokens)
        scores = scores + self.mask[None, :, None]
        return scores.view(-1, HEADS, tokens, tokens).softmax(-1) @ v

    def forward(self, x: Tensor) -> Tensor:
        shift = WINDOW // 2
        return super().forward(windows(x.roll((-shift, -shift), (1, 2))))


def windows(x: Tensor) -> Tensor:
    """(B, H, W, C) to (B * windows, WINDOW * WINDOW, C)."""
    batch, height, width, channels = x.shape
    x = x.view(batch, height // WINDOW, WINDOW, width // WINDOW, WINDOW, channels)
    return x.transpose(2, 3).reshape(-1, WINDOW**2, channels)


class VariedWindow(Projected):
    """Each window attends to a region of learned place and size, sampled from K and V (VSA)."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        batch, count = x.shape[0], (SIDE // WINDOW) ** 2
        q, k, v = self.qkv(x).chunk(3, -1)
        offset, size = self.place(windows(x).mean(1)).tanh().chunk(2, -1)
        line = torch.linspace(-1, 1, WINDOW)
        grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).flatten(0, 1)
        grid = offset[:, None] + grid * (0.5 + 0.5 * size[:, None])

        def sampled(y: Tensor) -> Tensor:
            image = y.permute(0, 3, 1, 2).repeat_interleave(count, 0)
            found = F.grid_sample(image, grid[:, None], align_corners=False)
            return split(found[:, :, 0].transpose(1, 2))

        y = scores_of(split(windows(q)), sampled(k)).softmax(-1) @ sampled(v)
        return self.out(merge(y)).view(batch, -1, WIDTH)


class Neighborhood(Projected):
    """Each pixel attends to a neighborhood, or every second pixel of one, by a mask."""

    def __init__(self, dilation: int = 1) -> None:
        super().__init__()
        self.dilation = dilation

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, columns = torch.arange(SIDE**2) // SIDE, torch.arange(SIDE**2) % SIDE
        visible = torch.ones(SIDE**2, SIDE**2, dtype=torch.bool)
        for line in (rows, columns):
            apart = (line[None, :] - line[:, None]).abs()
            visible = visible & (apart <= self.dilation) & (apart % self.dilation == 0)
        return scores_of(q, k).masked_fill(~visible, -torch.inf).softmax(-1) @ v

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1, 2))


class BandNeighborhood(Projected):
    """Neighborhood attention over a sequence: a band of diagonals."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        hidden = distance(q.shape[2]).abs() > 2
        return scores_of(q, k).masked_fill(hidden, -torch.inf).softmax(-1) @ v


class BiLevelRouting(Projected):
    """Attention to the regions that a region's mean query likes best (BiFormer)."""

    def forward(self, x: Tensor) -> Tensor:
        batch, best = x.shape[0], 2
        q, k, v = (y.view(batch, -1, WINDOW**2, WIDTH) for y in self.regions(x))
        routes = q.mean(2) @ k.mean(2).transpose(-2, -1) * WIDTH**-0.5
        weights, index = routes.topk(best, dim=-1)
        weights = weights.softmax(-1)
        chosen = index[..., None, None].expand(-1, -1, -1, WINDOW**2, WIDTH)

        def gathered(y: Tensor) -> Tensor:
            from_all = y[:, None].expand(-1, y.shape[1], -1, -1, -1)
            found = from_all.gather(2, chosen) * weights[..., None, None]
            return split(found.flatten(2, 3).flatten(0, 1))

        y = scores_of(split(q.flatten(0, 1)), gathered(k)).softmax(-1) @ gathered(v)
        return self.out(merge(y))

    def regions(self, x: Tensor) -> tuple[Tensor, ...]:
        return windows(self.qkv(x)).chunk(3, -1)


class SinkTokens(Projected):
    """A causal window that always sees the first tokens (arXiv:2309.17453)."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        apart = distance(q.shape[2])
        near = (apart <= 0) & (apart > -4)
        first = (torch.arange(q.shape[2]) < 2) & (apart <= 0)
        return scores_of(q, k).masked_fill(~(near | first), -torch.inf).softmax(-1) @ v


class TopK(Projected):
    """Each query sees the keys with its largest scores."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = scores_of(q, k)
        least = scores.topk(3, dim=-1).values[..., -1:]
        return scores.masked_fill(scores < least, -torch.inf).softmax(-1) @ v


class Pruned(Projected):
    """The same with a mask that was found before, from pooled queries and keys."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rough = q.mean(1, keepdim=True) @ k.mean(1, keepdim=True).transpose(-2, -1)
        index = rough.topk(3, dim=-1).indices
        visible = torch.zeros_like(rough, dtype=torch.bool).scatter(-1, index, True)
        return scores_of(q, k).masked_fill(~visible, -torch.inf).softmax(-1) @ v


def images(padded: bool) -> Inputs:
    return {"x": normal(2, SIDE, SIDE, WIDTH)}


ARCHITECTURES: Final[tuple[Architecture, ...]] = (
    variant("shifted window", ShiftedWindow, inputs=images),
    variant("varied-size window", VariedWindow, inputs=images),
    variant("neighborhood", Neighborhood, inputs=images),
    variant("dilated neighborhood", lambda: Neighborhood(2), inputs=images),
    variant("neighborhood of a sequence", BandNeighborhood),
    variant(
        "bi-level routing",
        BiLevelRouting,
        inputs=images,
        others=1,
        note="the other softmax weighs the regions",
    ),
    variant("sink tokens", SinkTokens),
    variant("top-k", TopK, keeps="the mask is made from the scores"),
    variant("pruned by an explicit mask", Pruned),
)
