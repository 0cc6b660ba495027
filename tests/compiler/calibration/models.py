"""Models with outliers where a test wants them, small enough to emulate and worth quantizing.

One channel of K is scaled up and that of Q down: scores stay what they are, and so does the exact
output, but the other channels of K lose their bits. One head of 512 tokens in float32 is the least
work for which INT4 is predicted to be more than one percent quicker than INT8 on sm_89.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OUTLIER: Final = 24.0  # INT4 loses the other channels, INT8 hardly any of them
LENGTH: Final = 512
HEAD_DIM: Final = 64
TARGET: Final[dict[str, Any]] = {
    "target": "sm_89",
    "candidates": ("int4_fp8", "int8_fp8"),
    "progress": False,
}


class Attention(nn.Module):
    """x (B, L, heads * 64) -> the same shape."""

    def __init__(self, heads: int = 1, outlier: float = 1.0) -> None:
        super().__init__()
        width = heads * HEAD_DIM
        self.heads, self.outlier = heads, outlier
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def split(self, x: Tensor, outlier: float | Tensor) -> list[Tensor]:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        size = torch.ones(HEAD_DIM)
        size = torch.where(torch.arange(HEAD_DIM) == 0, outlier, size).to(v.dtype)
        return [q / size, k * size, v]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def forward(self, x: Tensor, outlier: float | Tensor | None = None) -> Tensor:
        q, k, v = self.split(x, self.outlier if outlier is None else outlier)
        return x + self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))


class WrittenOut(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.matmul(q, k.transpose(-2, -1)) / HEAD_DIM**0.5
        return torch.matmul(torch.softmax(scores, dim=-1), v)


class Causal(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Stack(nn.Module):
    """Layers of one kind; those in ``planted`` have an outlier."""

    def __init__(
        self,
        layers: int,
        planted: Collection[int] = (),
        kind: type[Attention] = Attention,
        seed: int = 0,
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(
            kind(outlier=OUTLIER if at in planted else 1.0) for at in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def tokens(seed: int, length: int = LENGTH, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, HEAD_DIM, generator=generator)
