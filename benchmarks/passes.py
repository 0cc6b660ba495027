"""What detection and rewriting cost: on large graphs, and beside the whole compilation.

    python -m benchmarks.passes
    python -m benchmarks.passes --layers 100 --compile 0

A decoder with grouped-query attention, rotary embedding and a constant causal mask shared by all
layers, captured once by Dynamo; then the passes alone, several times. Its attention is either a
call of scaled_dot_product_attention or written out as products and a softmax. ``--compile`` says
how many layers to compile wholly, by Inductor and without caches, and what share the passes have.
Writes benchmarks/results/passes.json.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._inductor import config as inductor_config

from benchmarks.measure import Table, microseconds, save
from sage_compiler import backend
from sage_compiler.config import parse_options
from sage_compiler.passes import pipeline
from sage_compiler.passes.detect import detect
from sage_compiler.passes.snapshot import Snapshot

LENGTH: Final = 512
ROUNDS: Final = 5


class Layer(nn.Module):
    """One decoder layer in the style of Llama."""

    def __init__(
        self, written_out: bool, width: int = 64, heads: int = 8, kv_heads: int = 2
    ) -> None:
        super().__init__()
        self.written_out = written_out
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
        k, v = repeat(k), repeat(v)
        if self.written_out:
            scores = (q @ k.transpose(2, 3) * self.head_dim**-0.5).masked_fill(~mask, -torch.inf)
            y = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, -1))
        return x + F.silu(self.gate(x)) * x


class Decoder(nn.Module):
    """As many layers, with one mask for all."""

    def __init__(self, layers: int, written_out: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(written_out) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        position = torch.arange(x.shape[1])
        angles = position[:, None] * torch.logspace(0, -4, 4).repeat(2)
        mask = position[None, None, None, :] <= position[None, None, :, None]
        for layer in self.layers:
            x = layer(x, angles.cos(), angles.sin(), mask)
        return x


def capture(layers: int, written_out: bool) -> fx.GraphModule:
    """The graph of the decoder as Dynamo hands it to a backend."""
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        model = torch.compile(Decoder(layers, written_out), backend=keep, fullgraph=True)
        model(torch.randn(1, LENGTH, 64))
    (graph,) = graphs
    return graph


def passes(layers: int, written_out: bool) -> dict[str, Any]:
    """Milliseconds of detection and of all passes on one graph."""
    gm = capture(layers, written_out)
    decided = functools.partial(backend.decide, options=parse_options({"precision": "int8_fp8"}))
    snapshot = Snapshot(gm.graph)
    # The passes edit the graph: every run needs a fresh one, made outside the timing.
    fresh = iter([fx.GraphModule(gm, snapshot.build()) for _ in range(ROUNDS + 2)])
    outcome = pipeline.run(next(fresh), decided)
    found = microseconds(
        {"detect": lambda: detect(gm), "all": lambda: pipeline.run(next(fresh), decided)},
        calls=1,
        rounds=ROUNDS,
    )
    return {
        "form": "written out" if written_out else "sdpa",
        "layers": layers,
        "nodes": len(snapshot),
        "rewritten": sum(decision.recipe is not None for _, decision in outcome.findings),
        "detect_ms": found["detect"] / 1e3,
        "all_ms": found["all"] / 1e3,
    }


def whole(layers: int, written_out: bool) -> dict[str, Any]:
    """Seconds of one compilation by the backend without caches, and those of the passes in it."""
    torch._dynamo.reset()
    with timed_passes() as spent, inductor_config.patch(force_disable_caches=True):
        start = time.perf_counter()
        with torch.no_grad():
            options = {"precision": "int8_int8", "min_seq_len": 0}
            model = torch.compile(Decoder(layers, written_out), backend="sage", options=options)
            model(torch.randn(1, LENGTH, 64))
        seconds = time.perf_counter() - start
    form = "written out" if written_out else "sdpa"
    return {"form": form, "layers": layers, "seconds": seconds, "passes_seconds": sum(spent)}


@contextmanager
def timed_passes() -> Iterator[list[float]]:
    """The seconds of every run of the passes."""
    run, spent = pipeline.run, []

    def timed(*args: Any) -> Any:
        start = time.perf_counter()
        try:
            return run(*args)
        finally:
            spent.append(time.perf_counter() - start)

    pipeline.run = timed
    try:
        yield spent
    finally:
        pipeline.run = run


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[25, 50, 100, 200])
    parser.add_argument("--compile", type=int, default=12, help="layers to compile; 0: none")
    given = parser.parse_args(arguments)
    table = Table(form=11, layers=0, nodes=5, rewritten=0, detect_ms=0, all_ms=7, us_a_node=0)
    rows = []
    for written_out in (False, True):
        for layers in given.layers:
            row = passes(layers, written_out)
            rows.append(row)
            times = f"{row['detect_ms']:.1f}", f"{row['all_ms']:.1f}"
            each = f"{1e3 * row['all_ms'] / row['nodes']:.1f}"
            counts = (str(row[name]) for name in ("form", "layers", "nodes", "rewritten"))
            table.print_row(*counts, *times, each)
    compiled = [whole(given.compile, form) for form in (False, True)] if given.compile else []
    for found in compiled:
        share = 100 * found["passes_seconds"] / found["seconds"]
        print(
            f"compiling {found['layers']} layers ({found['form']}): {found['seconds']:.1f} s, "
            f"the passes {found['passes_seconds'] * 1e3:.0f} ms: {share:.2f} %"
        )
    save("passes", {"passes": rows, "compilations": compiled})


if __name__ == "__main__":
    main()
