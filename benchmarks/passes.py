"""What detection and rewriting cost on a large graph.

    python -m benchmarks.passes

A decoder of 100 layers with grouped-query attention, rotary embedding and a constant causal mask
shared by all layers, captured once by Dynamo; then the passes alone, several times. The goal is
at most 50 ms.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from benchmarks.measure import microseconds, save
from sage_compiler.backend import decide
from sage_compiler.config import parse_options
from sage_compiler.passes import pipeline
from sage_compiler.passes.detect import detect
from sage_compiler.passes.snapshot import Snapshot

LAYERS: Final = 100
LENGTH: Final = 512
GOAL: Final = 50.0  # ms
ROUNDS: Final = 9


class Layer(nn.Module):
    """One decoder layer in the style of Llama."""

    def __init__(self, width: int = 64, heads: int = 8, kv_heads: int = 2) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, width // heads
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.v = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        batch, length, _ = x.shape

        def split(y: Tensor, heads: int) -> Tensor:
            return y.view(batch, length, heads, self.head_dim).transpose(1, 2)

        def rotate(y: Tensor) -> Tensor:
            first, second = y.chunk(2, dim=-1)
            return y * cos + torch.cat((-second, first), dim=-1) * sin

        def repeat(y: Tensor) -> Tensor:
            n = self.heads // self.kv_heads
            wide = y[:, :, None].expand(batch, self.kv_heads, n, length, self.head_dim)
            return wide.reshape(batch, self.heads, length, self.head_dim)

        q = rotate(split(self.q(x), self.heads))
        k, v = rotate(split(self.k(x), self.kv_heads)), split(self.v(x), self.kv_heads)
        y = F.scaled_dot_product_attention(q, repeat(k), repeat(v), attn_mask=mask)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, -1))
        return x + F.silu(self.gate(x)) * x


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        position = torch.arange(x.shape[1])
        angles = position[:, None] * torch.logspace(0, -4, 4).repeat(2)
        mask = position[None, None, None, :] <= position[None, None, :, None]
        for layer in self.layers:
            x = layer(x, angles.cos(), angles.sin(), mask)
        return x


def capture() -> fx.GraphModule:
    """The graph of the decoder as Dynamo hands it to a backend."""
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    with torch.no_grad():
        torch.compile(Decoder(), backend=keep, fullgraph=True)(torch.randn(1, LENGTH, 64))
    (graph,) = graphs
    return graph


def main() -> None:
    gm = capture()
    decided = functools.partial(decide, options=parse_options({"precision": "int8_fp8"}))
    snapshot = Snapshot(gm.graph)
    # The passes edit the graph: every run needs a fresh one, made outside the timing.
    fresh = iter([fx.GraphModule(gm, snapshot.build()) for _ in range(ROUNDS + 2)])
    outcome = pipeline.run(next(fresh), decided)
    rewritten = sum(decision.recipe is not None for _, decision in outcome.findings)
    found = microseconds(
        {"detect": lambda: detect(gm), "all passes": lambda: pipeline.run(next(fresh), decided)},
        calls=1,
        rounds=ROUNDS,
    )
    print(f"{len(snapshot)} nodes, {rewritten} of {LAYERS} attentions rewritten")
    for name, time in found.items():
        print(f"{name}: {time / 1e3:.1f} ms (goal for all: {GOAL:.0f} ms)")
    save(
        "passes",
        {
            "nodes": len(snapshot),
            "rewritten": rewritten,
            "milliseconds": {name: time / 1e3 for name, time in found.items()},
        },
    )


if __name__ == "__main__":
    main()
