"""One cell of a benchmark of attention: its inputs, its candidates, its time and its accuracy.

A cell is a shape, a mask and a number of threads. All its candidates are timed in one run:
scaled_dot_product_attention in every dtype, and every precision in every dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

import sage_compiler as sage
from benchmarks.measure import Samples, Spread, added, interleave_for, ratio
from sage_compiler.kernels import registry
from sage_compiler.kernels.kernel import Problem
from sage_compiler.ops import SHIPPED_GATE
from sage_compiler.precision import AUTO
from sage_compiler.semantics import MaskClass
from tests.compiler.kernels.dense import Call, dense
from tests.tolerances import cosine, rel_l1

DTYPES: Final[Mapping[str, torch.dtype]] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# none and causal need no tensor; bool and float are (1, 1, Lq, Lk), the others (1, 1, 1, Lk).
MASKS: Final = ("none", "causal", "bool", "float", "bool_padding", "float_padding")

# Accuracy is computed against float64 for so many heads and query rows.
CHECKED_HEADS: Final = 2
CHECKED_ROWS: Final = 64


@dataclass(frozen=True, slots=True)
class Cell:
    """What is timed: query (B, H, Lq, D), key and value (B, Hkv, Lk, D)."""

    q_len: int
    kv_len: int
    head_dim: int
    mask: str = "none"
    threads: int = 1
    batch: int = 1
    heads: int = 8
    kv_heads: int = 8

    def flops(self) -> float:
        """Multiplications and additions of both products, over the visible pairs if causal."""
        pairs = self.q_len * self.kv_len
        if self.mask == "causal":
            triangle = min(self.q_len, self.kv_len)
            pairs = triangle * (triangle + 1) // 2 + (self.q_len - triangle) * self.kv_len
        return 4.0 * self.batch * self.heads * pairs * self.head_dim

    def label(self) -> str:
        """In a few words."""
        heads = f"{self.heads}" if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        length = f"L={self.q_len}" if self.q_len == self.kv_len else f"L={self.q_len}x{self.kv_len}"
        return f"B={self.batch} H={heads} {length} D={self.head_dim} {self.mask} t={self.threads}"


@dataclass(frozen=True, slots=True)
class Inputs:
    """The tensors of a cell in one dtype."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None


def make_inputs(cell: Cell) -> Inputs:
    """Gaussian, a channel offset on K as models have it; float32."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    query = normal(cell.batch, cell.heads, cell.q_len, cell.head_dim)
    keys = (cell.batch, cell.kv_heads, cell.kv_len, cell.head_dim)
    key = normal(*keys) + 2.0 * normal(1, cell.kv_heads, 1, cell.head_dim)
    value = normal(*keys)
    padding = torch.arange(cell.kv_len) < max(1, cell.kv_len * 7 // 8)  # the last eighth is padding
    match cell.mask:
        case "none" | "causal":
            mask = None
        case "bool":
            mask = torch.rand(1, 1, cell.q_len, cell.kv_len, generator=generator) < 0.9
            mask[..., 0] = True
        case "float":
            mask = normal(1, 1, cell.q_len, cell.kv_len)
        case "bool_padding":
            mask = padding.view(1, 1, 1, -1)
        case "float_padding":
            mask = torch.zeros(1, 1, 1, cell.kv_len).masked_fill(~padding, -torch.inf)
        case unknown:
            raise ValueError(f"mask={unknown!r}; known: {', '.join(MASKS)}")
    return Inputs(query, key, value, mask)


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The inputs in another dtype; a bool mask stays one."""
    mask = inputs.mask
    if mask is not None and mask.is_floating_point():
        mask = mask.to(dtype)
    return Inputs(inputs.query.to(dtype), inputs.key.to(dtype), inputs.value.to(dtype), mask)


def sdpa_call(cell: Cell, inputs: Inputs) -> Callable[[], Tensor]:
    """The baseline."""
    return partial(
        F.scaled_dot_product_attention,
        inputs.query,
        inputs.key,
        inputs.value,
        inputs.mask,
        0.0,
        cell.mask == "causal",
        enable_gqa=cell.heads != cell.kv_heads,
    )


def sage_call(cell: Cell, inputs: Inputs, precision: str) -> Callable[[], Any]:
    """Our call, its arguments bound beforehand.

    "auto" through the function ``sage.attention``, as users call it; a recipe through the operator.
    """
    query, key, value, mask = inputs.query, inputs.key, inputs.value, inputs.mask
    causal = cell.mask == "causal"
    if precision == AUTO:
        gqa = cell.heads != cell.kv_heads
        return partial(
            sage.attention, query, key, value, mask, causal, None, gqa, precision=precision
        )
    operator = torch.ops.sage.attention.default
    mask_class = str(MaskClass.CAUSAL if causal else MaskClass.NONE)
    return partial(operator, query, key, value, mask, mask_class, None, precision)


def serving(cell: Cell, precision: str, dtype: torch.dtype) -> tuple[str, str]:
    """The kernel that serves a precision, and why none does; one of both is empty."""
    problem = Problem(
        device_type="cpu",
        dtype=dtype,
        head_dim=cell.head_dim,
        value_head_dim=cell.head_dim,
        heads=cell.heads,
        kv_heads=cell.kv_heads,
        mask_class=MaskClass.CAUSAL if cell.mask == "causal" else MaskClass.NONE,
        has_mask=cell.mask not in ("none", "causal"),
    )
    gate = SHIPPED_GATE if precision == AUTO else 0
    products = cell.batch * cell.heads * cell.q_len * cell.kv_len * cell.head_dim
    found = registry.choose(precision, problem, gate, cell.q_len, cell.kv_len, products)
    if isinstance(found, registry.Unavailable):
        return "", found.reason
    return ("sdpa" if found is None else found.name()), ""


def visible_rows(cell: Cell, inputs: Inputs, rows: Tensor) -> Tensor | None:
    """The mask of some query rows, causality included."""
    if cell.mask == "causal":
        return torch.arange(cell.kv_len) <= rows.view(-1, 1)
    if inputs.mask is None or inputs.mask.shape[2] == 1:
        return inputs.mask
    return inputs.mask[:, :, rows]


def accuracy(
    cell: Cell, inputs: Inputs, outputs: Mapping[str, Tensor]
) -> dict[str, tuple[float, float]]:
    """Cosine and relative L1 of each output against float64, over some rows of some heads."""
    count = min(CHECKED_ROWS, cell.q_len)
    rows = torch.linspace(0, cell.q_len - 1, count).round().long()
    group = cell.heads // cell.kv_heads
    heads = min(CHECKED_HEADS, cell.heads)
    kv_heads = -(-heads // group)
    # The reference repeats each key head evenly, so take whole groups, then the heads that count.
    call = Call(
        inputs.query[:1, : kv_heads * group, rows],
        inputs.key[:1, :kv_heads],
        inputs.value[:1, :kv_heads],
        attn_mask=visible_rows(cell, inputs, rows),
    )
    expected = dense(call)[0][:, :heads]
    found = {name: output[:1, :heads, rows] for name, output in outputs.items()}
    return {name: (cosine(x, expected), rel_l1(x, expected)) for name, x in found.items()}


def measure(
    cell: Cell,
    precisions: Sequence[str],
    dtypes: Sequence[str],
    *,
    seconds: float,
    check: bool = True,
    peak: float | None = None,
) -> tuple[list[dict[str, Any]], list[str]]:
    """One row of results for each precision and dtype, and why some were left out.

    Args:
        seconds: how long to measure, about.
        check: compute the accuracy too.
        peak: G INT8 multiplications and additions per second and thread of this machine.
    """
    torch.set_num_threads(cell.threads)
    inputs = make_inputs(cell)
    candidates: dict[str, Callable[[], Any]] = {}
    kernels: dict[tuple[str, str], str] = {}
    left_out: list[str] = []
    errors: dict[str, tuple[float, float]] = {}
    for dtype in dtypes:
        own = cast(inputs, DTYPES[dtype])
        calls = {f"sdpa {dtype}": sdpa_call(cell, own)}
        for precision in precisions:
            kernel, reason = serving(cell, precision, DTYPES[dtype])
            if reason:
                left_out.append(f"{precision} in {dtype}: {reason}")
                continue
            kernels[precision, dtype] = kernel
            calls[f"{precision} {dtype}"] = sage_call(cell, own, precision)
        candidates |= calls
        if check:
            with torch.inference_mode():
                outputs = {name: function() for name, function in calls.items()}
                errors |= accuracy(cell, own, outputs)
    if not kernels:
        return [], left_out
    with torch.inference_mode():
        samples = interleave_for(candidates, seconds=seconds)
    rows = [
        {
            **asdict(cell),
            "precision": precision,
            "dtype": dtype,
            "kernel": kernel,
            **_timing(cell, samples, precision, dtype, dtypes, peak),
            **_errors(errors, precision, dtype),
        }
        for (precision, dtype), kernel in kernels.items()
    ]
    return rows, left_out


def _timing(
    cell: Cell,
    samples: Samples,
    precision: str,
    dtype: str,
    dtypes: Sequence[str],
    peak: float | None,
) -> dict[str, Any]:
    ours, theirs = f"{precision} {dtype}", f"sdpa {dtype}"
    time = Spread.of(samples[ours])
    gflops = cell.flops() / time.median / 1e3
    return {
        "rounds": len(samples[ours]),
        "sdpa_us": Spread.of(samples[theirs]).median,
        **time.fields("us"),
        **ratio(samples, theirs, ours).fields("ratio"),
        **{f"vs_{name}": ratio(samples, f"sdpa {name}", ours).median for name in dtypes},
        **added(samples, theirs, ours).fields("added_us"),
        "gflops": gflops,
        "sdpa_gflops": cell.flops() / Spread.of(samples[theirs]).median / 1e3,
        "of_peak": gflops / (peak * cell.threads) if peak else None,
    }


def _errors(
    errors: Mapping[str, tuple[float, float]], precision: str, dtype: str
) -> dict[str, float]:
    fields: dict[str, float] = {}
    for name, prefix in ((f"{precision} {dtype}", ""), (f"sdpa {dtype}", "sdpa_")):
        if name in errors:
            fields[f"{prefix}cosine"], fields[f"{prefix}rel_l1"] = errors[name]
    return fields
