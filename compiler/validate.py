"""Checks of an attention call's tensors: errors that say what was got and what is needed.

Written for real and for fake tensors: a symbolic length is only compared where the answer is
known, so tracing adds no guard of ours.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sage_compiler.errors import InvalidAttentionError
from sage_compiler.semantics import DTYPES


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _differ(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return a != b
    return statically_known_true(a != b)


def check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Check query (B, H, Lq, D), key (B, Hkv, Lk, D) and value (B, Hkv, Lk, Dv).

    Raises:
        InvalidAttentionError: ranks, dtypes, devices, batch sizes, head counts, head_dims or
            key lengths that do not go together.
    """
    named = (("query", query), ("key", key), ("value", value))
    for name, tensor in named:
        if tensor.layout != torch.strided:
            raise InvalidAttentionError(f"{name} is {tensor.layout}; it must be strided")
        if tensor.dim() != 4:
            raise InvalidAttentionError(
                f"{name} has shape {_shape(tensor)}; it must be 4-D: (batch, heads, length, "
                "head_dim)"
            )
    if query.dtype not in DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise InvalidAttentionError(
            f"query is {query.dtype}; supported: {known}. Convert it, or use "
            "scaled_dot_product_attention"
        )
    for name, tensor in named[1:]:
        if tensor.dtype != query.dtype:
            raise InvalidAttentionError(
                f"{name} is {tensor.dtype} and query {query.dtype}; they must have one dtype"
            )
        if tensor.device != query.device:
            raise InvalidAttentionError(
                f"{name} is on {tensor.device} and query on {query.device}; move them to one device"
            )
    batch, heads, _, head_dim = query.shape
    kv_heads = key.shape[1]
    for name, tensor in named[1:]:
        if _differ(tensor.shape[0], batch):
            raise InvalidAttentionError(
                f"{name} has batch size {tensor.shape[0]} and query {batch}; expand one to match"
            )
    if _differ(value.shape[1], kv_heads) or _differ(value.shape[2], key.shape[2]):
        raise InvalidAttentionError(
            f"key is {_shape(key)} and value {_shape(value)}; heads and length must match"
        )
    if _differ(key.shape[3], head_dim):
        raise InvalidAttentionError(
            f"query has head_dim {head_dim} and key {key.shape[3]}; they must be equal"
        )
    if _differ(heads, kv_heads) and (
        statically_known_true(kv_heads == 0) or _differ(heads % kv_heads, 0)
    ):
        raise InvalidAttentionError(
            f"{heads} query heads and {kv_heads} key/value heads; the first must be a multiple "
            "of the second"
        )


def check_mask(attn_mask: Tensor, query: Tensor, key_length: int | torch.SymInt) -> None:
    """Check an explicit mask: bool, query's dtype or float32; broadcastable to (B, H, Lq, Lk).

    Raises:
        InvalidAttentionError: otherwise.
    """
    if attn_mask.dtype not in (torch.bool, query.dtype, torch.float32):
        raise InvalidAttentionError(
            f"attn_mask is {attn_mask.dtype}; it must be bool (True = visible) or additive in "
            f"{query.dtype} or float32"
        )
    if attn_mask.device != query.device:
        raise InvalidAttentionError(
            f"attn_mask is on {attn_mask.device} and query on {query.device}; move it there"
        )
    target = (*query.shape[:3], key_length)
    sizes = tuple(attn_mask.shape)
    fits = len(sizes) <= 4 and not any(
        _differ(size, 1) and _differ(size, wanted)
        for size, wanted in zip(reversed(sizes), reversed(target), strict=False)
    )
    if not fits:
        raise InvalidAttentionError(
            f"attn_mask has shape {_shape(attn_mask)}; it must broadcast to (batch, heads, "
            f"query length, key length) = ({', '.join(map(str, target))})"
        )


def check_sinks(sinks: Tensor, query: Tensor) -> None:
    """Check sink logits: floating point, one per query head, on query's device.

    Raises:
        InvalidAttentionError: otherwise.
    """
    if sinks.dim() != 1 or _differ(sinks.shape[0], query.shape[1]):
        raise InvalidAttentionError(
            f"sinks has shape {_shape(sinks)}; it needs one logit per query head: "
            f"({query.shape[1]},)"
        )
    if not sinks.is_floating_point() or sinks.device != query.device:
        raise InvalidAttentionError(
            f"sinks is {sinks.dtype} on {sinks.device}; it must be floating point on {query.device}"
        )


def check_varlen(
    query: Tensor, attn_mask: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None
) -> None:
    """Check a packed batch of sequences: batch 1, both offsets, no explicit mask.

    Raises:
        InvalidAttentionError: otherwise.
    """
    if cu_q is None or cu_k is None:
        raise InvalidAttentionError(
            "cumulative lengths of one side only; give those of queries and of keys"
        )
    for name, offsets in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)):
        if offsets.dim() != 1 or offsets.dtype not in (torch.int32, torch.int64):
            raise InvalidAttentionError(
                f"{name} is {offsets.dtype} of shape {_shape(offsets)}; it must be int32 or int64 "
                "of shape (sequences + 1,)"
            )
        if offsets.device != query.device and offsets.device.type != "cpu":
            raise InvalidAttentionError(
                f"{name} is on {offsets.device}; it must be on {query.device} or the CPU"
            )
    if _differ(cu_q.shape[0], cu_k.shape[0]):
        raise InvalidAttentionError(
            f"cu_seqlens_q describes {cu_q.shape[0] - 1} sequences and cu_seqlens_k "
            f"{cu_k.shape[0] - 1}; they must be equal"
        )
    if _differ(query.shape[0], 1):
        raise InvalidAttentionError(
            f"batch size {query.shape[0]} with cu_seqlens; pack the sequences along the length "
            "of a batch of 1"
        )
    if attn_mask is not None:
        raise InvalidAttentionError("attn_mask with cu_seqlens; a packed batch takes none")


def check_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    sinks: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    step: Tensor | None = None,
    step_recipes: list[str] | None = None,
) -> None:
    """Check everything about the tensors of a call.

    Raises:
        InvalidAttentionError: tensors that do not describe an attention.
    """
    check_tensors(query, key, value)
    if attn_mask is not None:
        check_mask(attn_mask, query, key.shape[2])
    if sinks is not None:
        check_sinks(sinks, query)
    if cu_seqlens_q is not None or cu_seqlens_k is not None:
        check_varlen(query, attn_mask, cu_seqlens_q, cu_seqlens_k)
    if (step is None) != (step_recipes is None):
        raise InvalidAttentionError("step and step_recipes belong together; give both or neither")
    if step is not None and (
        step.dim() != 0 or step.dtype != torch.int64 or step.device.type != "cpu"
    ):
        raise InvalidAttentionError(
            f"step is {step.dtype} of {step.dim()} dims on {step.device}; it must be a 0-d int64 "
            "tensor on the CPU, so that reading it never waits for a device"
        )
