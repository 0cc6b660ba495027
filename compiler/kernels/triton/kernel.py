"""The Triton kernel as the registry knows it: attention where no CUTLASS kernel can be had.

It takes what is left to it on NVIDIA's GPUs: calls whose CUTLASS kernels are neither in a pack nor
compiled on this machine; what these would refuse, it does too. An attention is four launches on the
caller's stream: statistics of K and V, then Q, then K and V quantized, then the attention.
``programs`` has them; it is imported on first use, and Triton with it.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
from math import log, nan
from types import ModuleType
from typing import Final

import torch
from torch import Tensor

from sage_compiler.errors import KernelUnavailableError
from sage_compiler.kernels.cuda.arch import arch_of
from sage_compiler.kernels.cuda.kernel import has_softcap, unobtainable
from sage_compiler.kernels.cuda.masks import Mask, flags
from sage_compiler.kernels.cuda.sizes import Reach, Sizes
from sage_compiler.kernels.kernel import CLOSED, Gate, Kernel, Problem
from sage_compiler.kernels.layout import empty_output
from sage_compiler.kernels.quantize import power_of_two_scale
from sage_compiler.precision import TILE_MMA
from sage_compiler.semantics import DeadRows, Semantics

RECIPE: Final = "int8_fp16"
# Triton has INT8 products of tensor cores from there on.
LEAST_CAPABILITY: Final = (8, 0)

_LOG2_E: Final = 1.0 / log(2.0)
_LEAST_SOFTCAP: Final = 1e-30  # what is less becomes it
_LEAST_DIM: Final = 32  # channels that an INT8 product takes at once
_CHUNK: Final = 512  # tokens whose statistics are taken apart
_LONGEST_OF_FOUR_WARPS: Final = 64
_LONGEST_OF_TWO_STAGES: Final = 128  # beyond, shared memory holds one tile of K and V


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    semantics: Semantics,
    *,
    attn_mask: Tensor | None,
    sinks: Tensor | None,
    want_lse: bool,
) -> tuple[Tensor, Tensor]:
    """As ``reference.attention`` in the recipe ``int8_fp16``, on the tensors' device.

    Args:
        query, key, value: float16, bfloat16 or float32, any strides.
        attn_mask: any strides; read as it lies.
        want_lse: without it the LSE is empty.

    Raises:
        KernelUnavailableError: Triton cannot compile a program for this device, or it does not fit.
        InvalidAttentionError: a length that positions in the programs do not hold.
    """
    with torch.cuda.device(query.device):
        return run(
            query, key, value, semantics, attn_mask=attn_mask, sinks=sinks, want_lse=want_lse
        )


def run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    semantics: Semantics,
    *,
    attn_mask: Tensor | None,
    sinks: Tensor | None,
    want_lse: bool,
) -> tuple[Tensor, Tensor]:
    """As ``attention``, on the current device, or in Triton's interpreter."""
    from triton.errors import TritonError  # an optional package

    output = empty_output(query, value)
    lse = query.new_empty(query.shape[:3] if want_lse else 0, dtype=torch.float32)
    if min(*query.shape[:3], key.shape[2]) == 0:  # no query, or no key to see
        lse.fill_(-torch.inf)
        if sinks is not None and want_lse:
            lse.copy_(sinks[:, None])
        return output.zero_(), lse
    try:
        _launch(query, key, value, semantics, attn_mask, sinks, output, lse)
    except (TritonError, subprocess.CalledProcessError) as error:
        told = " ".join(str(error).split())[:300]
        raise KernelUnavailableError(
            f"Triton cannot run {RECIPE} here: {told}; use precision='exact'"
        ) from error
    return output, lse


def _launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    semantics: Semantics,
    attn_mask: Tensor | None,
    sinks: Tensor | None,
    output: Tensor,
    lse: Tensor,
) -> None:
    """Start the programs; no length is zero. ``lse`` is empty where it is not wanted."""
    programs = _programs()
    if sinks is not None:
        sinks = sinks.to(torch.float32).contiguous()
    batch, heads, query_length, head_dim = query.shape
    kv_heads, key_length, value_dim = key.shape[1], key.shape[2], value.shape[3]
    sizes = Sizes.of(batch, heads, kv_heads, query_length, key_length)
    group = heads // kv_heads
    dims = {"DIM": _padded(head_dim), "VALUE_DIM": _padded(value_dim)}
    band = semantics.band(query_length, key_length)
    reach = Reach.of(semantics, query_length, key_length)
    mask = None
    if attn_mask is not None:
        mask = Mask.of(attn_mask, band, batch, kv_heads, group, query_length, key_length)
    key_flags = (None, (0, 0, 0)) if mask is None else (mask.keys, flags(mask.keys)[1:])
    live_flags = (None, (0, 0, 0)) if mask is None else (mask.live, flags(mask.live)[1:])

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=query.device)

    # Statistics: sums of K and largest magnitudes of V over chunks of tokens.
    chunks = -(-key_length // _CHUNK)
    sums = scratch(batch * kv_heads, chunks, dims["DIM"])
    largest = scratch(batch * kv_heads, chunks, dims["VALUE_DIM"])
    programs.statistics[(batch * kv_heads * chunks,)](
        key,
        value,
        key_flags[0],
        sums,
        largest,
        *key.stride(),
        *value.stride(),
        *key_flags[1],
        kv_heads,
        head_dim,
        value_dim,
        reach.first_key,
        reach.end_key,
        chunks,
        HAS_FLAGS=mask is not None,
        CHUNK=_CHUNK,
        **dims,
    )
    if mask is None:
        key_mean = sums.sum(1) / max(1, reach.end_key - reach.first_key)
    else:
        key_mean = sums.sum(1) / mask.counts.view(-1, 1).clamp(min=1)
    scales_value = value.dtype != torch.float16
    amax = largest.amax(1)
    value_scale = power_of_two_scale(amax) if scales_value else torch.ones_like(amax)

    softcap = has_softcap(semantics)
    factor = semantics.scale_for(head_dim) * (1.0 if softcap else _LOG2_E)
    has_row_term = softcap or sinks is not None or lse.numel() > 0
    rows = batch * heads * sizes.query_blocks * TILE_MMA.q_block
    query_codes = scratch(rows, dims["DIM"], dtype=torch.int8)
    query_scales = scratch(rows)
    row_term = scratch(rows) if has_row_term else None
    query_warps = sizes.query_blocks * (TILE_MMA.q_block // TILE_MMA.q_warp)
    programs.quantize_query[(batch * heads * query_warps,)](
        query,
        key_mean,
        live_flags[0],
        query_codes,
        query_scales,
        row_term,
        *query.stride(),
        *live_flags[1],
        heads,
        group,
        head_dim,
        query_warps,
        reach.first_live,
        reach.end_live,
        factor,
        HAS_FLAGS=mask is not None,
        ROW_TERM=has_row_term,
        DIM=dims["DIM"],
    )

    tokens = batch * kv_heads * sizes.key_blocks * TILE_MMA.kv_block
    key_codes = scratch(tokens, dims["DIM"], dtype=torch.int8)
    key_scales = scratch(tokens)
    halves = scratch(tokens, dims["VALUE_DIM"], dtype=torch.float16)
    programs.quantize_keys_values[(batch * kv_heads * sizes.key_blocks,)](
        key,
        value,
        key_mean,
        value_scale,
        key_flags[0],
        key_codes,
        key_scales,
        halves,
        *key.stride(),
        *value.stride(),
        *key_flags[1],
        kv_heads,
        head_dim,
        value_dim,
        sizes.key_blocks,
        reach.first_key,
        reach.end_key,
        HAS_FLAGS=mask is not None,
        SCALED_VALUE=scales_value,
        **dims,
        num_warps=8,
    )

    elements, tiles, kind = None, None, programs.NO_MASK
    element_strides: tuple[int, ...] = (0, 0, 0, 0)
    tile_strides: tuple[int, ...] = (0, 0, 0)
    if mask is not None:
        is_bool = mask.values.dtype == torch.bool
        kind = programs.BOOL_MASK if is_bool else programs.FLOAT_MASK
        elements = mask.values.view(torch.uint8) if is_bool else mask.values
        element_strides = mask.packed()[1:5]
        tiles, tile_strides = mask.tiles, flags(mask.tiles)[1:]
    longest = max(dims.values())
    programs.attend[(batch * heads * sizes.query_blocks,)](
        query_codes,
        query_scales,
        row_term,
        key_codes,
        key_scales,
        halves,
        value_scale,
        elements,
        tiles,
        sinks,
        output,
        lse,
        *element_strides,
        *tile_strides,
        *output.stride()[:3],
        heads,
        group,
        value_dim,
        query_length,
        key_length,
        sizes.query_blocks,
        sizes.key_blocks,
        reach.lower,
        reach.upper,
        max(semantics.softcap or 0.0, _LEAST_SOFTCAP),
        nan if semantics.dead_rows is DeadRows.NAN else 0.0,
        MASK=kind,
        SOFTCAP=softcap,
        SINKS=sinks is not None,
        ROW_TERM=has_row_term,
        LSE=lse.numel() > 0,
        **dims,
        num_warps=4 if longest <= _LONGEST_OF_FOUR_WARPS else 8,
        num_stages=2 if longest <= _LONGEST_OF_TWO_STAGES else 1,
    )


def _padded(head_dim: int) -> int:
    """The channels that operands have."""
    return max(_LEAST_DIM, 1 << (head_dim - 1).bit_length())


@functools.cache
def _programs() -> ModuleType:
    from sage_compiler.kernels.triton import programs  # imports Triton

    return programs


@functools.cache
def is_installed() -> bool:
    """Whether Triton is here, without importing it."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _has_c_compiler() -> bool:
    return any(map(shutil.which, filter(None, (os.environ.get("CC"), "gcc", "clang", "cc"))))


def _refuse(problem: Problem) -> str | None:
    """Why it does not take a problem, in one sentence, or None."""
    capability = problem.capability
    if capability is None:  # of a GPU that is here
        if torch.version.hip is not None:
            return "it was never tried on ROCm; this PyTorch is built for it"
        if not is_installed():
            return "Triton is not installed; pip install triton, of the version that PyTorch names"
        if not _has_c_compiler():
            return "Triton compiles its launchers with a C compiler, and there is none; install gcc"
        capability = torch.cuda.get_device_capability(problem.device_index)
    if capability < LEAST_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    if unobtainable(RECIPE, problem) is None:
        return f"{arch_of(capability).name} is left to the CUTLASS kernels"
    return None


def _gate(problem: Problem) -> Gate | str:
    return f"{RECIPE} in Triton is not measured on any GPU"


KERNELS: Final = (
    Kernel(
        name=lambda: "triton",
        device_type="cuda",
        recipe=RECIPE,
        refuse=_refuse,
        gate=_gate,
        run=attention,
        smallest=lambda: CLOSED,
    ),
)
