"""The native CPU kernel as the registry knows it: `int8_int8` and `int8_int16`.

Tensors are handed over as they lie, with their strides; nothing is copied but sinks.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor

from sage_compiler.errors import KernelUnavailableError
from sage_compiler.kernels.cpu import gate
from sage_compiler.kernels.cpu.library import PROBLEM, Library, Unavailable, load
from sage_compiler.kernels.kernel import CLOSED, OPEN, Gate, Kernel, Problem
from sage_compiler.kernels.layout import empty_output
from sage_compiler.semantics import UNBOUNDED, Band, DeadRows, Semantics

# Numbers of sage_cpu.h.
RECIPES: Final[Mapping[str, int]] = MappingProxyType({"int8_int8": 0, "int8_int16": 1})
_DTYPES: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.bool: 3}
_DEAD_ROWS: Final = {DeadRows.ZERO: 0, DeadRows.NAN: 1}

HEAD_DIM_STEP: Final = 8
LEAST_HEAD_DIM, GREATEST_HEAD_DIM = 16, 256

_FLOAT32_TINY: Final = torch.finfo(torch.float32).tiny
_EVERYTHING: Final = Band(None, None, 0)
_NO_TENSOR: Final = (0, 0, 0, 0, 0)
_NO_LSE: Final = torch.empty(0, dtype=torch.float32, device="cpu")


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    semantics: Semantics,
    *,
    attn_mask: Tensor | None,
    sinks: Tensor | None,
    want_lse: bool,
    recipe: str,
    isa: int | None = None,
) -> tuple[Tensor, Tensor]:
    """As ``reference.attention``, the output in the layout that the operator promises.

    Args:
        query, key, value, attn_mask: any strides.
        want_lse: without it the LSE is empty.
        recipe: "int8_int8" or "int8_int16".
        isa: the number of an instruction set; None: the library's choice.

    Raises:
        InvalidAttentionError: arguments that the library refuses.
        KernelUnavailableError: there is no library.
    """
    library = need()
    output = empty_output(query, value)
    lse = _NO_LSE
    if want_lse:
        lse = torch.empty(query.shape[:3], dtype=torch.float32, device="cpu")
    if sinks is not None:
        sinks = sinks.to(torch.float32).contiguous()
    batch, heads, query_length, head_dim = query.shape
    _, kv_heads, key_length, value_head_dim = value.shape
    problem = pack_problem(
        library.isa if isa is None else isa,
        recipe,
        query.dtype,
        (batch, heads, kv_heads, query_length, key_length, head_dim, value_head_dim, 0),
        semantics,
        query=query,
        key=key,
        value=value,
        output=output,
        attn_mask=attn_mask,
        sinks=sinks,
        lse=lse if want_lse else None,
    )
    library.attention(problem)
    return output, lse


def pack_problem(
    isa: int,
    recipe: str,
    dtype: torch.dtype,
    sizes: tuple[int, int, int, int, int, int, int, int],
    semantics: Semantics,
    *,
    query: Tensor | None = None,
    key: Tensor | None = None,
    value: Tensor | None = None,
    output: Tensor | None = None,
    attn_mask: Tensor | None = None,
    sinks: Tensor | None = None,
    lse: Tensor | None = None,
) -> bytes:
    """A ``sage_cpu_problem``. It holds addresses: the tensors must outlive its use.

    Args:
        isa: the number of an instruction set.
        recipe: "int8_int8" or "int8_int16".
        dtype: of query, key, value and output.
        sizes: batch, heads, kv_heads, query_length, key_length, head_dim, value_head_dim, and
            the keys that packed memory is laid out for, or 0.
        semantics: with the lengths among the sizes, the visible band; scale, softcap, dead rows.
        query, key, value, output: 4-D, any strides.
        attn_mask: of 1 to 4 dims; size 1 broadcasts.
        sinks, lse: float32, dense.
    """
    band = semantics.band(sizes[3], sizes[4]) or _EVERYTHING
    softcap = semantics.softcap
    return PROBLEM.pack(
        PROBLEM.size,
        isa,
        RECIPES[recipe],
        _DTYPES[dtype],
        *sizes,
        UNBOUNDED if band.left is None else band.left,
        UNBOUNDED if band.right is None else band.right,
        band.offset,
        semantics.scale_for(sizes[5]),
        0.0 if softcap is None else max(softcap, _FLOAT32_TINY),  # zero would mean none
        _DEAD_ROWS[semantics.dead_rows],
        _DTYPES[torch.bool if attn_mask is None else attn_mask.dtype],
        *_address(query),
        *_address(key),
        *_address(value),
        *_address(output),
        *_mask_address(attn_mask),
        0 if sinks is None else sinks.data_ptr(),
        0 if lse is None else lse.data_ptr(),
    )


def _address(tensor: Tensor | None) -> tuple[int, ...]:
    """Data and strides."""
    return _NO_TENSOR if tensor is None else (tensor.data_ptr(), *tensor.stride())


def _mask_address(mask: Tensor | None) -> tuple[int, ...]:
    """Data and strides of a mask of 1 to 4 dims; a dim that broadcasts has stride 0."""
    if mask is None:
        return _NO_TENSOR
    strides = (
        0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True)
    )
    return (mask.data_ptr(), *(0,) * (4 - mask.dim()), *strides)


def need() -> Library:
    """The library.

    Raises:
        KernelUnavailableError: there is none; the reason.
        InvalidOptionError: SAGE_CPU_ISA names no instruction set that is here.
    """
    library = load()
    if isinstance(library, Unavailable):
        raise KernelUnavailableError(f"the CPU kernel: {library.reason}")
    return library


def _refuse(problem: Problem) -> str | None:
    library = load()
    if isinstance(library, Unavailable):
        return library.reason
    return refuse_head_dims(problem.head_dim, problem.value_head_dim)


def refuse_head_dims(head_dim: int, value_head_dim: int) -> str | None:
    """Why the kernel does not take these, in one sentence, or None when it does."""
    for name, size in (("head_dim", head_dim), ("value head_dim", value_head_dim)):
        if size % HEAD_DIM_STEP or not LEAST_HEAD_DIM <= size <= GREATEST_HEAD_DIM:
            return (
                f"{name} {size} is not a multiple of {HEAD_DIM_STEP} from {LEAST_HEAD_DIM} to "
                f"{GREATEST_HEAD_DIM}"
            )
    return None


def _name() -> str:
    library = load()
    return "cpu" if isinstance(library, Unavailable) else f"cpu-{library.isa_name}"


def _gate(problem: Problem) -> Gate | str:
    library = need()
    if not library.has_threads and torch.get_num_threads() > 1:
        return "this torch does not export torch_parallel_for, so that it would run on one thread"
    return gate.gate(problem, library.isa_name)


def _smallest() -> Gate:
    library = load()
    return OPEN if isinstance(library, Unavailable) else gate.GATES.get(library.isa_name, CLOSED)


KERNELS: Final = tuple(
    Kernel(
        name=_name,
        device_type="cpu",
        recipe=recipe,
        refuse=_refuse,
        gate=_gate,
        run=functools.partial(attention, recipe=recipe),
        smallest=_smallest,
    )
    for recipe in RECIPES
)
