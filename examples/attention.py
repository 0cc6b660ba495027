"""A small model for ``sagec explain examples/attention.py:build``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Causal self-attention, (B, L, width) -> (B, L, width), its mask written as a comparison."""

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.qkv = heads, nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        position = torch.arange(x.shape[1], device=x.device)
        mask = position[:, None] >= position
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def build() -> tuple[nn.Module, tuple[Tensor]]:
    """The model and the arguments of one call."""
    return nn.Sequential(Attention(), Attention()).eval(), (torch.randn(1, 128, 64),)
