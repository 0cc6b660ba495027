"""The gradient of sage::attention: that of exact attention at the same inputs, recomputed.

It is an operator of its own, ``sage::attention_backward``, so that tracing a training step never
looks inside: a packed batch has lengths that only real tensors know.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Final

import torch
from torch import Tensor

from sage_compiler.kernels import exact
from sage_compiler.packed import join, sequences
from sage_compiler.semantics import parse_semantics

ARGUMENTS: Final = (
    "Tensor grad_output, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, "
    "Tensor? attn_mask, Tensor? sinks, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "str mask_class, float? scale, str dead_rows, float? softcap, int window_left, "
    "int window_right, bool[] needed"
)

# What torch.func.vjp dispatches through. The handler of a TorchDispatchMode (a FLOP counter,
# selective checkpointing) calls operators with these keys off.
_VJP_KEYS: Final = (
    torch._C.DispatchKey.FuncTorchDynamicLayerFrontMode,
    torch._C.DispatchKey.FuncTorchGradWrapper,
    torch._C.DispatchKey.FuncTorchDynamicLayerBackMode,
)


def vjp_on() -> AbstractContextManager[None]:
    """Make ``torch.func.vjp`` work whoever calls the operator."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in _VJP_KEYS:
        excluded = excluded.remove(key)
    guard: AbstractContextManager[None] = torch._C._ForceDispatchKeyGuard(
        torch._C._dispatch_tls_local_include_set(), excluded
    )
    return guard


def backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    mask_class: str,
    scale: float | None,
    dead_rows: str,
    softcap: float | None,
    window_left: int,
    window_right: int,
    needed: list[bool],
) -> tuple[Tensor, ...]:
    """The gradient of exact attention at these inputs, by recomputation.

    One gradient per query, key, value, attn_mask, sinks; empty where ``needed`` is False.
    """
    semantics = parse_semantics(mask_class, scale, dead_rows, softcap, window_left, window_right)
    given: list[Tensor | None] = [query, key, value, attn_mask, sinks]
    wanted = [index for index, need in enumerate(needed) if need]

    def forward(*primals: Tensor) -> tuple[Tensor, Tensor] | Tensor:
        inputs = list(given)
        for index, primal in zip(wanted, primals, strict=True):
            inputs[index] = primal
        q, k, v, mask, sink = inputs
        assert q is not None and k is not None and v is not None
        triples = [(q, k, v)]
        if cu_seqlens_q is not None and cu_seqlens_k is not None:
            triples = sequences(q, k, v, cu_seqlens_q, cu_seqlens_k)
        if grad_lse is None:
            outputs = [
                exact.attention(*triple, semantics, attn_mask=mask, sinks=sink)
                for triple in triples
            ]
            return torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]
        parts = [
            exact.attention_with_lse(*triple, semantics, attn_mask=mask, sinks=sink)
            for triple in triples
        ]
        return join(parts, q, v)

    primals = [tensor for index in wanted if (tensor := given[index]) is not None]
    cotangent = grad_output if grad_lse is None else (grad_output, grad_lse)
    with vjp_on():
        pull_back = torch.func.vjp(forward, *primals)[1]
        gradients = dict(zip(wanted, pull_back(cotangent), strict=True))
    return tuple(
        dense_like(gradients[index], tensor)
        if tensor is not None and index in gradients
        else query.new_empty(0)
        for index, tensor in enumerate(given)
    )


def fake_backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    mask_class: str,
    scale: float | None,
    dead_rows: str,
    softcap: float | None,
    window_left: int,
    window_right: int,
    needed: list[bool],
) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty_like(tensor) if tensor is not None and need else query.new_empty(0)
        for tensor, need in zip((query, key, value, attn_mask, sinks), needed, strict=True)
    )


# Positions of the differentiable arguments in the schema.
_DIFFERENTIABLE: Final = (0, 1, 2, 3, 10)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    (query, key, value, mask, mask_class, scale, _, _, dead_rows, softcap, sinks, left, right) = (
        inputs[:13]
    )
    ctx.save_for_backward(query, key, value, mask, sinks, inputs[13], inputs[14])
    ctx.scalars = (mask_class, scale, dead_rows, softcap, left, right)


def _gradients(ctx: Any, grad_output: Tensor, grad_lse: Tensor | None) -> tuple[Any, ...]:
    # As many entries as the call had arguments: the dispatcher strips trailing defaults.
    given: tuple[bool, ...] = ctx.needs_input_grad
    needed = [index < len(given) and given[index] for index in _DIFFERENTIABLE]
    found = torch.ops.sage.attention_backward.default(
        grad_output, grad_lse, *ctx.saved_tensors, *ctx.scalars, needed
    )
    gradients: list[Tensor | None] = [None] * len(given)
    for index, need, gradient in zip(_DIFFERENTIABLE, needed, found, strict=True):
        if need:
            gradients[index] = gradient
    return tuple(gradients)


def differentiate(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    return _gradients(ctx, grad_output, None)


def differentiate_lse(ctx: Any, grad_output: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
    return _gradients(ctx, grad_output, grad_lse)


def dense_like(gradient: Tensor, primal: Tensor) -> Tensor:
    """The gradient, freshly allocated with the strides that ``empty_like(primal)`` has."""
    return torch.empty_like(primal).copy_(gradient)
