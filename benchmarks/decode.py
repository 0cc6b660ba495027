"""Decoding with a packed cache of keys and values, beside SDPA over a cache of floats.

One query token against a context that grew before: SDPA reads the floats of all keys and values
each time, ``sage.PackedKV`` the INT8 that ``append`` made of them once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

import sage_compiler as sage
from benchmarks.cells import DTYPES, Cell, Inputs, accuracy, cast, make_inputs, sdpa_call
from benchmarks.measure import Samples, Spread, Table, interleave_for, ratio
from sage_compiler.kernels.cpu.library import Unavailable, load

# Tokens appended one by one: as many as the kernel packs together, for some cost more than others.
APPENDED: Final = 256

CONTEXTS: Final = (1024, 2048, 4096, 8192, 16384)
CELLS: Final = tuple(
    Cell(1, context, head_dim, "none", threads, heads=heads, kv_heads=8)
    for threads in (1, 2)
    for heads, head_dim in ((8, 64), (8, 128), (32, 128))
    for context in CONTEXTS
)


def make_packed(inputs: Inputs, capacity: int) -> Any:
    """A packed cache that holds the keys and values of the inputs."""
    batch, kv_heads, _, head_dim = inputs.key.shape
    packed = sage.PackedKV(batch, kv_heads, head_dim, capacity=capacity, dtype=inputs.key.dtype)
    packed.append(inputs.key, inputs.value)
    return packed


def folded_call(inputs: Inputs) -> Callable[[], Tensor]:
    """SDPA with the query heads of a group as queries of their one key head.

    The same result for a single token, and faster in torch than its own grouped heads.
    """
    batch, kv_heads, _, head_dim = inputs.key.shape
    query = inputs.query.reshape(batch, kv_heads, -1, head_dim)
    return partial(F.scaled_dot_product_attention, query, inputs.key, inputs.value)


def append_microseconds(inputs: Inputs, packed: Any) -> tuple[float, float]:
    """What one more token costs: written to a cache of floats, and appended to the packed one."""
    keys, values = (x[:, :, :1].clone() for x in (inputs.key, inputs.value))
    floats = [torch.empty_like(x[:, :, :APPENDED]) for x in (inputs.key, inputs.value)]
    start = time.perf_counter()
    for at in range(APPENDED):
        for cache, token in zip(floats, (keys, values), strict=True):
            cache[:, :, at : at + 1].copy_(token)
    between = time.perf_counter()
    for _ in range(APPENDED):
        packed.append(keys, values)
    end = time.perf_counter()
    return (between - start) / APPENDED * 1e6, (end - between) / APPENDED * 1e6


def measure(cell: Cell, dtypes: Sequence[str], seconds: float) -> list[dict[str, Any]]:
    """One row of results for each dtype."""
    torch.set_num_threads(cell.threads)
    inputs = make_inputs(cell)
    grouped = cell.heads != cell.kv_heads
    candidates: dict[str, Callable[[], Any]] = {}
    caches: dict[str, tuple[Inputs, Any]] = {}
    errors: dict[str, dict[str, tuple[float, float]]] = {}
    with torch.inference_mode():
        for dtype in dtypes:
            own = cast(inputs, DTYPES[dtype])
            packed = make_packed(own, capacity=cell.kv_len + APPENDED)
            caches[dtype] = own, packed
            candidates[f"sdpa {dtype}"] = sdpa_call(cell, own)
            if grouped:
                candidates[f"folded {dtype}"] = folded_call(own)
            candidates[f"packed {dtype}"] = partial(packed.attend, own.query)
            outputs = {name: candidates[f"{name} {dtype}"]() for name in ("sdpa", "packed")}
            errors[dtype] = accuracy(cell, own, outputs)
        samples = interleave_for(candidates, seconds=seconds)
        appends = {dtype: append_microseconds(*caches[dtype]) for dtype in dtypes}
    return [
        {
            **asdict(cell),
            "dtype": dtype,
            **_timing(samples, dtype, dtypes, grouped),
            **_step(samples, dtype, *appends[dtype]),
            "cosine": errors[dtype]["packed"][0],
            "rel_l1": errors[dtype]["packed"][1],
            "sdpa_cosine": errors[dtype]["sdpa"][0],
            "sdpa_rel_l1": errors[dtype]["sdpa"][1],
        }
        for dtype in dtypes
    ]


def _timing(samples: Samples, dtype: str, dtypes: Sequence[str], grouped: bool) -> dict[str, Any]:
    ours, theirs, folded = f"packed {dtype}", f"sdpa {dtype}", f"folded {dtype}"
    return {
        "rounds": len(samples[ours]),
        "sdpa_us": Spread.of(samples[theirs]).median,
        "folded_us": Spread.of(samples[folded]).median if grouped else None,
        **Spread.of(samples[ours]).fields("us"),
        **ratio(samples, theirs, ours).fields("ratio"),
        "vs_folded": ratio(samples, folded, ours).median if grouped else None,
        **{f"vs_{name}": ratio(samples, f"sdpa {name}", ours).median for name in dtypes},
    }


def _step(samples: Samples, dtype: str, write: float, append: float) -> dict[str, float]:
    """A whole step of decoding, the new token stored and attended, beside the best of SDPA."""
    calls = (f"sdpa {dtype}", f"folded {dtype}")
    floats = [samples[call] for call in calls if call in samples]
    best = min(Spread.of(found).median for found in floats)
    ours = Spread.of(samples[f"packed {dtype}"]).median
    return {
        "write_us": write,
        "append_us": append,
        "step_ratio": (best + write) / (ours + append),
    }


def run(cells: Sequence[Cell], dtypes: Sequence[str], seconds: float) -> Iterator[dict[str, Any]]:
    """Measure the cells, printing as they come.

    Raises:
        SystemExit: there is no kernel for the packed cache.
    """
    library = load()
    if isinstance(library, Unavailable):
        raise SystemExit(f"nothing to decode with: {library.reason}")
    table = Table(
        cell=37, dtype=8, SDPA_us=0, folded_us=0, packed_us=0, ratio_p10_p90=19, vs_folded=0,
        append_us=0, step_ratio=0, cosine=8, rel_L1=0,
    )  # fmt: skip
    for cell in cells:
        for row in measure(cell, dtypes, seconds):
            heads = f"{cell.heads}/{cell.kv_heads}"
            table.print_row(
                f"context {cell.kv_len} H={heads} D={cell.head_dim} t={cell.threads}",
                row["dtype"],
                f"{row['sdpa_us']:.0f}",
                f"{row['folded_us']:.0f}" if row["folded_us"] else "",
                f"{row['us']:.1f}",
                f"{row['ratio']:.2f} [{row['ratio_p10']:.2f}, {row['ratio_p90']:.2f}]",
                f"{row['vs_folded']:.2f}" if row["vs_folded"] else "",
                f"{row['append_us']:.1f}",
                f"{row['step_ratio']:.2f}",
                f"{row['cosine']:.6f}",
                f"{row['rel_l1']:.4f}",
            )
            yield row
