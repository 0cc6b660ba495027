"""``sage.attention``: the operator as a function, in the words of PyTorch's own."""

from __future__ import annotations

import torch
from torch import Tensor

from sage_compiler import ops as ops  # registers sage::attention
from sage_compiler.errors import InvalidAttentionError
from sage_compiler.precision import AUTO, check_precision
from sage_compiler.semantics import UNBOUNDED, MaskClass

_attention = torch.ops.sage.attention.default  # looked up once


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    causal: str = "top_left",
    precision: str = AUTO,
    softcap: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    sinks: Tensor | None = None,
    cu_seqlens: Tensor | tuple[Tensor, Tensor] | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention, softmax(scale * Q K^T + mask) V, in the given precision.

    A row that sees no key yields 0, as in scaled_dot_product_attention. Differentiable; the
    gradient is that of exact attention at the same inputs.

    Args:
        query: (B, H, Lq, D), or (H, Lq, D); float32, bfloat16 or float16; any strides.
        key: (B, Hkv, Lk, D), or (Hkv, Lk, D).
        value: (B, Hkv, Lk, Dv), or (Hkv, Lk, Dv).
        attn_mask: broadcastable to (B, H, Lq, Lk): bool (True = visible), or added to the scores.
        is_causal: hide keys after the diagonal; applied on top of ``attn_mask``.
        scale: factor of the scores; None: 1 / sqrt(D).
        enable_gqa: allow H to be a multiple of Hkv.
        causal: where the diagonal starts when Lq != Lk: "top_left" (key i for query i, what
            scaled_dot_product_attention means) or "bottom_right" (the last key for the last
            query, what decoding with a cache means).
        precision: "auto", "exact", or a recipe such as "int8_fp8". "auto" is the device's default
            where it has a kernel that gains at these lengths, else "exact".
        softcap: scores become softcap * tanh(score / softcap) before masks.
        window: (left, right) keys visible around the diagonal, which is always visible; None
            for an unbounded side.
        sinks: (H,) logits that take part in the denominator only.
        cu_seqlens: cumulative lengths (N + 1,), int32 or int64, of N sequences packed along the
            length of a batch of 1; a pair (queries, keys) where they differ. They ascend from 0 to
            the packed length. On a GPU, with a recipe by name that has kernels for packed batches
            (docs/cuda-kernels.md), these read them on the device, and nobody checks them: they are
            clamped to the packed length, queries behind the last one yield zeros, and where they do
            not ascend from 0, what the tokens concerned yield is not defined. All else reads them
            on the host, which waits for the device, and checks them.
        return_lse: also return the log-sum-exp of the scores, float32 (B, H, Lq).

    Raises:
        InvalidAttentionError: arguments that do not describe an attention.
        InvalidOptionError: an unknown precision.
    """
    check_precision(precision)
    # Only what is wrong is looked at closely: short calls are as short as their overhead.
    tensors = isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)
    if not (tensors and isinstance(is_causal, bool) and (scale is None or type(scale) is float)):
        _check_types(query, key, value, is_causal, scale)
    shape, key_shape = query.shape, key.shape
    dims = len(shape)
    if not dims == len(key_shape) == value.dim() or dims not in (3, 4):
        raise InvalidAttentionError(
            f"query, key and value have {dims}, {key.dim()} and {value.dim()} dims; all must "
            "have 4 (batch, heads, length, head_dim), or 3 without the batch"
        )
    heads, kv_heads = shape[-3], key_shape[-3]
    if heads != kv_heads and not enable_gqa:
        raise InvalidAttentionError(
            f"{heads} query heads and {kv_heads} key/value heads; pass enable_gqa=True for "
            "grouped-query attention"
        )
    unbatched = dims == 3
    if unbatched:
        query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
    if window is None and causal == "top_left":
        mask_class, left, right = ("causal" if is_causal else "none"), UNBOUNDED, UNBOUNDED
        plain = softcap is None and sinks is None and cu_seqlens is None and not return_lse
        # What `auto` leaves alone does not pass through the dispatcher: it costs time, and the
        # layout that the operator promises may cost a copy. A graph that is being traced gets a
        # call that serves all sizes.
        if plain and precision == AUTO and not torch.compiler.is_compiling():
            exact = ops.plain(query, key, value, attn_mask, is_causal, scale, ops.SHIPPED_GATE)
            if exact is not None:
                return exact.squeeze(0) if unbatched else exact
    else:
        mask_class, left, right = parse_band(is_causal, causal, window)
    cu_q, cu_k = (None, None) if cu_seqlens is None else _both_sides(cu_seqlens)
    arguments = (
        query, key, value, attn_mask, mask_class, scale, precision,
        ops.SHIPPED_GATE if precision == AUTO else 0,
        "zero", softcap, sinks, left, right, cu_q, cu_k,
    )  # fmt: skip
    if not return_lse:
        output: Tensor = _attention(*arguments)
        return output.squeeze(0) if unbatched else output
    output, lse = torch.ops.sage.attention.lse(*arguments)
    return (output.squeeze(0), lse.squeeze(0)) if unbatched else (output, lse)


def parse_band(
    is_causal: bool, causal: str, window: tuple[int | None, int | None] | None
) -> tuple[str, int, int]:
    """The operator's mask class and window sides, for the words of ``attention``.

    Raises:
        InvalidAttentionError: an unknown alignment, or a window that is not two counts.
    """
    if causal not in ("top_left", "bottom_right"):
        raise InvalidAttentionError(f"causal={causal!r}; known: top_left, bottom_right")
    bottom_right = causal == "bottom_right"
    if window is None:
        if not is_causal:
            return str(MaskClass.NONE), UNBOUNDED, UNBOUNDED
        chosen = MaskClass.CAUSAL_BOTTOM_RIGHT if bottom_right else MaskClass.CAUSAL
        return str(chosen), UNBOUNDED, UNBOUNDED
    sides = window if isinstance(window, tuple | list) else ()
    if len(sides) != 2 or not all(
        side is None or (isinstance(side, int | torch.SymInt) and side >= 0) for side in sides
    ):
        raise InvalidAttentionError(
            f"window={window!r}; it must be (left, right), each a number of keys or None"
        )
    left, right = (UNBOUNDED if side is None else side for side in sides)
    if is_causal:
        right = 0
    chosen = MaskClass.WINDOW_BOTTOM_RIGHT if bottom_right else MaskClass.WINDOW
    return str(chosen), left, right


def _both_sides(
    cu_seqlens: Tensor | tuple[Tensor, Tensor] | None,
) -> tuple[Tensor | None, Tensor | None]:
    """The cumulative lengths of queries and of keys.

    Raises:
        InvalidAttentionError: neither a tensor nor a pair of tensors.
    """
    if cu_seqlens is None or isinstance(cu_seqlens, Tensor):
        return cu_seqlens, cu_seqlens
    if len(cu_seqlens) != 2 or not all(isinstance(side, Tensor) for side in cu_seqlens):
        raise InvalidAttentionError(
            f"cu_seqlens={cu_seqlens!r}; it must be a tensor (sequences + 1,), or a pair of them: "
            "(queries, keys)"
        )
    cu_q, cu_k = cu_seqlens
    return cu_q, cu_k


def _check_types(
    query: object, key: object, value: object, is_causal: object, scale: object
) -> None:
    """Check what the dispatcher would convert or fail on in words of its own.

    Raises:
        InvalidAttentionError: an argument of another type.
    """
    for name, given in (("query", query), ("key", key), ("value", value)):
        if not isinstance(given, Tensor):
            raise InvalidAttentionError(f"{name} is a {type(given).__name__}; it must be a tensor")
    if not isinstance(is_causal, bool | torch.SymBool):
        raise InvalidAttentionError(f"is_causal={is_causal!r}; it must be True or False")
    if scale is not None and not isinstance(scale, float | int | torch.SymFloat | torch.SymInt):
        raise InvalidAttentionError(f"scale={scale!r}; it must be a number, or None")
