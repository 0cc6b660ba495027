"""The models of benchmarks/models.py: vision and diffusion transformers in plain PyTorch.

Shapes as in the papers: DiT (arXiv 2212.09748), ViT (arXiv 2010.11929). The weights are random:
what is measured is time, and how far the errors of attention travel through the layers.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Self-attention over (B, L, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        # Scores with a standard deviation of about 1: with torch's default, a third of it, every
        # row is nearly the mean of V and any precision would look good.
        nn.init.normal_(self.qkv.weight, std=1.0 / math.sqrt(width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        # (B, L, 3 * width) -> three times (B, H, L, D)
        parts = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind(0)
        y = F.scaled_dot_product_attention(query, key, value)
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """Attention and an MLP of four times the width, each after a norm and around a residual.

    With ``adaptive``, as in DiT, a condition (B, width) shifts, scales and gates both.
    """

    def __init__(self, width: int, heads: int, *, adaptive: bool) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(width, elementwise_affine=not adaptive)
        self.norm_2 = nn.LayerNorm(width, elementwise_affine=not adaptive)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )
        self.modulation = nn.Linear(width, 6 * width) if adaptive else None

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        if self.modulation is None or condition is None:
            x = x + self.attention(self.norm_1(x))
            return x + self.mlp(self.norm_2(x))
        modulation = self.modulation(F.silu(condition)).unsqueeze(1)  # (B, 1, 6 * width)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = modulation.chunk(6, dim=-1)
        x = x + gate_1 * self.attention(self.norm_1(x) * (1.0 + scale_1) + shift_1)
        return x + gate_2 * self.mlp(self.norm_2(x) * (1.0 + scale_2) + shift_2)


class Transformer(nn.Module):
    """A stack of blocks over tokens (B, L, width), with a final norm."""

    def __init__(self, width: int, heads: int, layers: int, *, adaptive: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads, adaptive=adaptive) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x, condition)
        return self.norm(x)


def transformer(
    width: int, heads: int, layers: int, length: int, *, adaptive: bool
) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model with random weights and its arguments: one sequence of random tokens."""
    torch.manual_seed(0)
    model = Transformer(width, heads, layers, adaptive=adaptive).eval()
    arguments = {"x": torch.randn(1, length, width)}
    if adaptive:
        arguments["condition"] = torch.randn(1, width)
    return model, arguments
