"""The operator ``sage::attention``: schema, dispatch to kernels, fake, autocast, autograd.

Two overloads share every argument: ``default`` returns the output, ``lse`` the output and the
log-sum-exp. Arguments that calls often set come first: the dispatcher strips trailing defaults,
and a positional argument costs half of a keyword one.

Strides of the output are a contract: (B, Lq, H, Dv) in memory when query lies so (a transposed
projection), else (B, H, Lq, Dv); always dense, whatever kernel runs.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from sage_compiler.errors import InvalidAttentionError
from sage_compiler.kernels import exact, reference, registry
from sage_compiler.precision import AUTO, EXACT, RECIPES, check_precision
from sage_compiler.semantics import (
    DTYPES,
    UNBOUNDED,
    Semantics,
    parse_dead_rows,
    parse_mask_class,
)
from sage_compiler.validate import (
    check_mask,
    check_sinks,
    check_tensors,
    check_varlen,
    sequence_offsets,
)

ARGUMENTS: Final = (
    "Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, str mask_class='none', "
    "float? scale=None, str recipe='exact', str dead_rows='zero', float? softcap=None, "
    "Tensor? sinks=None, int window_left=-1, int window_right=-1, Tensor? cu_seqlens_q=None, "
    "Tensor? cu_seqlens_k=None, Tensor? step=None, str[]? step_recipes=None, int min_seq_len=0"
)
BACKWARD_ARGUMENTS: Final = (
    "Tensor grad_output, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, "
    "Tensor? attn_mask, Tensor? sinks, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "str mask_class, float? scale, str dead_rows, float? softcap, int window_left, "
    "int window_right, bool[] needed"
)

_library = torch.library.Library("sage", "DEF")
_library.define(f"attention({ARGUMENTS}) -> Tensor")
_library.define(f"attention.lse({ARGUMENTS}) -> (Tensor, Tensor)")
_library.define(
    f"attention_backward({BACKWARD_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)

# What the first branch of the operator hands to scaled_dot_product_attention as it is.
_PLAIN: Final = {"none": False, "causal": True}  # mask class -> is_causal


@functools.lru_cache(maxsize=1024)
def parse_semantics(
    mask_class: str,
    scale: float | None,
    dead_rows: str,
    softcap: float | None,
    window_left: int,
    window_right: int,
) -> Semantics:
    """The operator's scalar arguments as one object.

    Raises:
        InvalidAttentionError: an unknown word or values that contradict each other.
    """
    return Semantics(
        parse_mask_class(mask_class),
        window_left,
        window_right,
        scale,
        softcap,
        parse_dead_rows(dead_rows),
    )


@functools.cache
def _warn_emulated(recipe: str, reason: str) -> None:
    warnings.warn(
        f"sage: {reason}; the reference emulates it: the right numerics, but slow",
        stacklevel=2,
    )


# --- layout ---------------------------------------------------------------------------------


def _lies_length_first(query: Tensor) -> bool:
    """Whether query is stored as (B, Lq, H, D), the layout of a transposed projection."""
    return guard_or_false(query.stride(1) < query.stride(2))


def _in_layout(output: Tensor, query: Tensor) -> Tensor:
    """The output in the layout that the operator promises; copies only where a kernel differs."""
    if _lies_length_first(query):
        return output.transpose(1, 2).contiguous().transpose(1, 2)
    return output.contiguous()


def _dense_like(gradient: Tensor, primal: Tensor) -> Tensor:
    """The gradient, freshly allocated with the strides that ``empty_like(primal)`` has."""
    return torch.empty_like(primal).copy_(gradient)


# --- forward --------------------------------------------------------------------------------


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    mask_class: str = "none",
    scale: float | None = None,
    recipe: str = "exact",
    dead_rows: str = "zero",
    *rest: Any,
) -> Tensor:
    # The commonest call first: everything between here and the kernel is overhead per layer.
    if recipe == "exact" and dead_rows == "zero" and not rest:
        is_causal = _PLAIN.get(mask_class)
        if is_causal is not None and (attn_mask is None or not is_causal):
            shape, key_shape = query.shape, key.shape
            if (
                len(shape) == 4
                and len(key_shape) == 4
                and shape[0] == key_shape[0]
                and key_shape[:3] == value.shape[:3]
                and query.dtype in DTYPES
                and (attn_mask is None or attn_mask.dim() in (2, 3, 4))
            ):
                output = F.scaled_dot_product_attention(
                    query,
                    key,
                    value,
                    attn_mask,
                    0.0,
                    is_causal,
                    scale=scale,
                    enable_gqa=shape[1] != key_shape[1],
                )
                if output.stride() == query.stride():
                    return output
                return _in_layout(output, query)
    return _general(
        query, key, value, attn_mask, mask_class, scale, recipe, dead_rows, *rest, want_lse=False
    )[0]


def _attention_lse(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _general(query, key, value, *rest, want_lse=True)


def _general(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    mask_class: str = "none",
    scale: float | None = None,
    recipe: str = EXACT,
    dead_rows: str = "zero",
    softcap: float | None = None,
    sinks: Tensor | None = None,
    window_left: int = UNBOUNDED,
    window_right: int = UNBOUNDED,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    step: Tensor | None = None,
    step_recipes: list[str] | None = None,
    min_seq_len: int = 0,
    *,
    want_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Validate, choose the kernel, run it. The second result is empty unless it is wanted."""
    check_arguments(
        query, key, value, attn_mask, sinks, cu_seqlens_q, cu_seqlens_k, step, step_recipes
    )
    semantics = parse_semantics(mask_class, scale, dead_rows, softcap, window_left, window_right)
    recipe = check_precision(_recipe_of_step(recipe, step, step_recipes))

    def serve(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return _serve(q, k, v, attn_mask, sinks, semantics, recipe, min_seq_len, want_lse)

    if cu_seqlens_q is None or cu_seqlens_k is None:
        output, lse = serve(query, key, value)
    else:
        parts = [serve(*part) for part in _sequences(query, key, value, cu_seqlens_q, cu_seqlens_k)]
        output, lse = _join(parts, query, value)
    return _in_layout(output, query), lse


def _serve(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    sinks: Tensor | None,
    semantics: Semantics,
    recipe: str,
    min_seq_len: int,
    want_lse: bool,
) -> tuple[Tensor, Tensor]:
    problem = registry.Problem(
        device_type=query.device.type,
        dtype=query.dtype,
        head_dim=query.shape[3],
        value_head_dim=value.shape[3],
        heads=query.shape[1],
        kv_heads=key.shape[1],
        mask_class=semantics.mask_class,
        has_mask=attn_mask is not None,
    )
    if recipe == AUTO:
        short = min(query.shape[2], key.shape[2]) < min_seq_len
        recipe = EXACT if short else registry.default(problem).recipe
    if recipe == EXACT:
        if want_lse:
            return exact.attention_with_lse(
                query, key, value, semantics, attn_mask=attn_mask, sinks=sinks
            )
        output = exact.attention(query, key, value, semantics, attn_mask=attn_mask, sinks=sinks)
        return output, query.new_empty(0, dtype=torch.float32)
    found = registry.find(recipe, problem)
    if isinstance(found, registry.Kernel):
        return found.run(query, key, value, semantics, attn_mask=attn_mask, sinks=sinks)
    _warn_emulated(recipe, found.reason)
    return reference.attention(
        query, key, value, RECIPES[recipe], semantics, attn_mask=attn_mask, sinks=sinks
    )


def check_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    step: Tensor | None,
    step_recipes: list[str] | None,
) -> None:
    """Check everything about the tensors of a call.

    Raises:
        InvalidAttentionError: tensors that do not describe an attention.
    """
    check_tensors(query, key, value)
    if attn_mask is not None:
        check_mask(attn_mask, query, key)
    if sinks is not None:
        check_sinks(sinks, query)
    if cu_seqlens_q is not None or cu_seqlens_k is not None:
        check_varlen(query, key, attn_mask, cu_seqlens_q, cu_seqlens_k)
    if (step is None) != (step_recipes is None):
        raise InvalidAttentionError("step and step_recipes belong together; give both or neither")
    if step is not None and (
        step.dim() != 0 or step.dtype != torch.int64 or step.device.type != "cpu"
    ):
        raise InvalidAttentionError(
            f"step is {step.dtype} of {step.dim()} dims on {step.device}; it must be a 0-d int64 "
            "tensor on the CPU, so that reading it never waits for a device"
        )


def _recipe_of_step(recipe: str, step: Tensor | None, step_recipes: list[str] | None) -> str:
    if step is None or step_recipes is None:
        return recipe
    index = int(step.item())
    if not 0 <= index < len(step_recipes):
        raise InvalidAttentionError(
            f"step {index} with a table of {len(step_recipes)} recipes; it must be in range"
        )
    return step_recipes[index]


def _sequences(
    query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The packed sequences, one triple of views each."""
    starts_q = sequence_offsets("cu_seqlens_q", cu_q, query.shape[2])
    starts_k = sequence_offsets("cu_seqlens_k", cu_k, key.shape[2])
    bounds = zip(starts_q, starts_q[1:], starts_k, starts_k[1:], strict=False)
    return [(query[:, :, a:b], key[:, :, c:d], value[:, :, c:d]) for a, b, c, d in bounds]


def _join(
    parts: list[tuple[Tensor, Tensor]], query: Tensor, value: Tensor
) -> tuple[Tensor, Tensor]:
    if not parts:
        output = query.new_zeros((*query.shape[:3], value.shape[3]))
        return output, query.new_zeros(query.shape[:3], dtype=torch.float32)
    outputs, lses = zip(*parts, strict=True)
    lse = lses[0] if lses[0].dim() == 1 else torch.cat(lses, dim=2)
    return torch.cat(outputs, dim=2), lse


# --- fake -----------------------------------------------------------------------------------


def _fake_output(query: Tensor, value: Tensor) -> Tensor:
    batch, heads, length, _ = query.shape
    if _lies_length_first(query):
        return query.new_empty((batch, length, heads, value.shape[3])).transpose(1, 2)
    return query.new_empty((batch, heads, length, value.shape[3]))


def _fake_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    mask_class: str = "none",
    scale: float | None = None,
    recipe: str = EXACT,
    dead_rows: str = "zero",
    softcap: float | None = None,
    sinks: Tensor | None = None,
    window_left: int = UNBOUNDED,
    window_right: int = UNBOUNDED,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    step: Tensor | None = None,
    step_recipes: list[str] | None = None,
    min_seq_len: int = 0,
) -> Tensor:
    check_arguments(
        query, key, value, attn_mask, sinks, cu_seqlens_q, cu_seqlens_k, step, step_recipes
    )
    parse_semantics(mask_class, scale, dead_rows, softcap, window_left, window_right)
    for name in (recipe, *(step_recipes or ())):
        check_precision(name)
    return _fake_output(query, value)


def _fake_attention_lse(
    query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    output = _fake_attention(query, key, value, *rest)
    return output, query.new_empty(query.shape[:3], dtype=torch.float32)


# --- backward -------------------------------------------------------------------------------


def _backward(
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
            triples = _sequences(q, k, v, cu_seqlens_q, cu_seqlens_k)
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
        return _join(parts, q, v)

    primals = [tensor for index in wanted if (tensor := given[index]) is not None]
    pull_back = torch.func.vjp(forward, *primals)[1]
    cotangent = grad_output if grad_lse is None else (grad_output, grad_lse)
    gradients = dict(zip(wanted, pull_back(cotangent), strict=True))
    return tuple(
        _dense_like(gradients[index], tensor)
        if tensor is not None and index in gradients
        else query.new_empty(0)
        for index, tensor in enumerate(given)
    )


def _fake_backward(
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
_DIFFERENTIABLE: Final = (0, 1, 2, 3, 9)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    (query, key, value, mask, mask_class, scale, _, dead_rows, softcap, sinks, left, right) = (
        inputs[:12]
    )
    ctx.save_for_backward(query, key, value, mask, sinks, inputs[12], inputs[13])
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


def _differentiate(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    return _gradients(ctx, grad_output, None)


def _differentiate_lse(ctx: Any, grad_output: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
    return _gradients(ctx, grad_output, grad_lse)


# --- autocast -------------------------------------------------------------------------------


def _register_autocast(overload: torch._ops.OpOverload, name: str, device_type: str) -> None:
    """Cast as autocast casts scaled_dot_product_attention: Q, K, V and a float mask."""
    dispatch_key = f"Autocast{torch._C._dispatch_key_for_device(device_type)}"
    keyset = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, dispatch_key))

    def cast(tensor: Tensor | None) -> Tensor | None:
        if (
            tensor is None
            or not tensor.is_floating_point()
            or tensor.dtype == torch.float64
            or tensor.device.type != device_type
        ):
            return tensor
        return tensor.to(torch.get_autocast_dtype(device_type))

    def inner(_: Any, *args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(keyset):
            return overload(*(cast(tensor) for tensor in args[:4]), *args[4:])

    _library.impl(name, inner, dispatch_key, with_keyset=True)


# --- registration ---------------------------------------------------------------------------


def _register() -> None:
    overloads = torch.ops.sage.attention
    plain, with_lse = overloads.default, overloads.lse
    _library.impl("attention", _attention, "CompositeExplicitAutograd")
    _library.impl("attention.lse", _attention_lse, "CompositeExplicitAutograd")
    _library.impl("attention_backward", _backward, "CompositeExplicitAutograd")
    torch.library.register_fake("sage::attention", _fake_attention, lib=_library)
    torch.library.register_fake("sage::attention.lse", _fake_attention_lse, lib=_library)
    torch.library.register_fake("sage::attention_backward", _fake_backward, lib=_library)
    torch.library.register_autograd(
        "sage::attention", _differentiate, setup_context=_setup_context, lib=_library
    )
    torch.library.register_autograd(
        "sage::attention.lse", _differentiate_lse, setup_context=_setup_context, lib=_library
    )
    for device_type in ("cpu", "cuda"):
        _register_autocast(plain, "attention", device_type)
        _register_autocast(with_lse, "attention.lse", device_type)


_register()
