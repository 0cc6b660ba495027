"""The operator ``sage::rotary_attention``: rotary embedding of Q and K, then ``sage::attention``.

An operator of its own, so that ordinary calls do not pay for the arguments. Kernels that rotate as
they read Q and K get the tables; for all others Q and K are rotated by torch, which gives what the
model gave, bit by bit. The tables come before what is optional:

    cos_q, sin_q    of query, broadcastable to (B, H, Lq, R), or with one entry for each pair to
                    (B, H, Lq, R / 2); None: query is not rotated
    cos_k, sin_k    of key: (B, Hkv, Lk, R) or (B, Hkv, Lk, R / 2)
    rotary          which channels make a pair, "half" or "interleaved"
    rotary_dim      R, how many channels are rotated, the first ones
    rotary_dtype    in which torch computes products and sums; "float32", "bfloat16" or "float16"

The other arguments, and the strides of the output, are those of ``sage::attention``.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from sage_compiler import gradient, ops
from sage_compiler.errors import InvalidAttentionError
from sage_compiler.kernels.rotary import Rotary, Tables
from sage_compiler.semantics import DTYPES, RotaryPairs

_TABLES: Final = (
    "Tensor? cos_q, Tensor? sin_q, Tensor? cos_k, Tensor? sin_k, str rotary, int rotary_dim, "
    "str rotary_dtype, "
)
_TENSORS, _VALUE, _OPTIONAL = ops.ARGUMENTS.partition("Tensor value, ")
ARGUMENTS: Final = f"{_TENSORS}{_VALUE}{_TABLES}{_OPTIONAL}"

ops.library.define(f"rotary_attention({ARGUMENTS}) -> Tensor", tags=ops.TAGS)
ops.library.define(f"rotary_attention.lse({ARGUMENTS}) -> (Tensor, Tensor)", tags=ops.TAGS)
ops.library.define(
    f"rotary_attention_backward({_TABLES}{gradient.ARGUMENTS}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)

_DTYPES: Final = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


def _parse(
    query: Tensor,
    key: Tensor,
    cos_q: Tensor | None,
    sin_q: Tensor | None,
    cos_k: Tensor | None,
    sin_k: Tensor | None,
    rotary: str,
    rotary_dim: int,
    rotary_dtype: str,
) -> Rotary:
    """The rotation that the arguments describe.

    Raises:
        InvalidAttentionError: they describe none, or one that query and key do not fit.
    """
    if rotary not in list(RotaryPairs) or rotary_dtype not in _DTYPES:
        raise InvalidAttentionError(
            f"rotary {rotary!r} in {rotary_dtype!r}; known: {', '.join(RotaryPairs)}, in "
            f"{', '.join(_DTYPES)}"
        )
    sides: list[Tables | None] = []
    for name, cosine, sine in (("q", cos_q, sin_q), ("k", cos_k, sin_k)):
        if (cosine is None) != (sine is None):
            raise InvalidAttentionError(
                f"only one of cos_{name} and sin_{name} is given; give both, or None for both"
            )
        sides.append(None if cosine is None or sine is None else Tables(cosine, sine))
    found = Rotary(RotaryPairs(rotary), rotary_dim, _DTYPES[rotary_dtype], *sides)
    if query.dim() == 4 and key.dim() == 4:  # else it is for the operator to say
        found.check(query, key)
    return found


_COUNT: Final = 7  # arguments of a rotation


def _attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    rotary = _parse(query, key, *rest[:_COUNT])
    return ops.general(query, key, value, *rest[_COUNT:], want_lse=False, rotary=rotary)[0]


def _attention_lse(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    rotary = _parse(query, key, *rest[:_COUNT])
    return ops.general(query, key, value, *rest[_COUNT:], want_lse=True, rotary=rotary)


def _fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    _parse(query, key, *rest[:_COUNT])
    return ops.fake_attention(query, key, value, *rest[_COUNT:])


def _fake_lse(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    output = _fake(query, key, value, *rest)
    return output, query.new_empty(query.shape[:3], dtype=torch.float32)


# --- gradient -------------------------------------------------------------------------------

# Positions of the differentiable arguments in the schema: query, key, value, attn_mask, sinks, and
# the four tables.
_DIFFERENTIABLE: Final = (0, 1, 2, 10, 17, 3, 4, 5, 6)


def _backward(
    cos_q: Tensor | None,
    sin_q: Tensor | None,
    cos_k: Tensor | None,
    sin_k: Tensor | None,
    rotary: str,
    rotary_dim: int,
    rotary_dtype: str,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    sinks: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    """The gradient of exact attention of what was rotated, then that of the rotation.

    One gradient per query, key, value, attn_mask, sinks, cos_q, sin_q, cos_k, sin_k; empty where
    ``needed``, the last argument, is False.
    """
    *scalars, needed = rest
    rotation: tuple[Any, ...] = (rotary, rotary_dim, rotary_dtype)
    given = [query, key, cos_q, sin_q, cos_k, sin_k]
    of_rotation = [needed[0], needed[1], *needed[5:]]
    wanted = [index for index, need in enumerate(of_rotation) if need]

    def rotate(*primals: Tensor) -> tuple[Tensor, Tensor]:
        inputs = list(given)
        for index, primal in zip(wanted, primals, strict=True):
            inputs[index] = primal
        q, k, *tables = inputs
        assert q is not None and k is not None
        cosine_q, sine_q, cosine_k, sine_k = tables
        found = _parse(q, k, cosine_q, sine_q, cosine_k, sine_k, *rotation)
        return found.rotated(q, k)

    primals = [tensor for index in wanted if (tensor := given[index]) is not None]
    if primals:
        with gradient.vjp_on():
            (q, k), pull_back = torch.func.vjp(rotate, *primals)[:2]
    else:  # of value, mask or sinks alone
        (q, k), pull_back = rotate(), lambda cotangents: ()
    turned = [needed[0] or needed[5] or needed[6], needed[1] or needed[7] or needed[8]]
    grad_q, grad_k, *others = torch.ops.sage.attention_backward.default(
        grad_output, grad_lse, q, k, value, attn_mask, sinks, *scalars, [*turned, *needed[2:5]]
    )
    cotangents = (
        grad_q if turned[0] else torch.zeros_like(q),
        grad_k if turned[1] else torch.zeros_like(k),
    )
    with gradient.vjp_on():
        found = dict(zip(wanted, pull_back(cotangents), strict=True))
    of_q, of_k, *of_tables = (
        gradient.dense_like(found[index], tensor)
        if tensor is not None and index in found
        else query.new_empty(0)
        for index, tensor in enumerate(given)
    )
    return (of_q, of_k, *others, *of_tables)


def _fake_backward(
    cos_q: Tensor | None,
    sin_q: Tensor | None,
    cos_k: Tensor | None,
    sin_k: Tensor | None,
    rotary: str,
    rotary_dim: int,
    rotary_dtype: str,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    sinks: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    given = (query, key, value, attn_mask, sinks, cos_q, sin_q, cos_k, sin_k)
    return tuple(
        torch.empty_like(tensor) if tensor is not None and need else query.new_empty(0)
        for tensor, need in zip(given, rest[-1], strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    query, key, value, *tables = inputs[:7]
    mask, mask_class, scale, _, _, dead_rows, softcap, sinks, left, right, cu_q, cu_k = inputs[
        10:22
    ]
    ctx.save_for_backward(query, key, value, mask, sinks, cu_q, cu_k, *tables)
    ctx.rotation = inputs[7:10]
    ctx.scalars = (mask_class, scale, dead_rows, softcap, left, right)


def _gradients(ctx: Any, grad_output: Tensor, grad_lse: Tensor | None) -> tuple[Any, ...]:
    # As many entries as the call had arguments: the dispatcher strips trailing defaults.
    given: tuple[bool, ...] = ctx.needs_input_grad
    needed = [index < len(given) and given[index] for index in _DIFFERENTIABLE]
    *saved, cos_q, sin_q, cos_k, sin_k = ctx.saved_tensors
    found = torch.ops.sage.rotary_attention_backward.default(
        *(cos_q, sin_q, cos_k, sin_k, *ctx.rotation),
        *(grad_output, grad_lse, *saved, *ctx.scalars, needed),
    )
    gradients: list[Tensor | None] = [None] * len(given)
    for index, need, each in zip(_DIFFERENTIABLE, needed, found, strict=True):
        if need:
            gradients[index] = each
    return tuple(gradients)


def _differentiate(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    return _gradients(ctx, grad_output, None)


def _differentiate_lse(ctx: Any, grad_output: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
    return _gradients(ctx, grad_output, grad_lse)


# --- registration ---------------------------------------------------------------------------


def _register() -> None:
    library = ops.library
    for name, forward, fake, differentiate in (
        ("rotary_attention", _attention, _fake, _differentiate),
        ("rotary_attention.lse", _attention_lse, _fake_lse, _differentiate_lse),
    ):
        library.impl(name, forward, "CompositeExplicitAutograd")
        torch.library.register_fake(f"sage::{name}", fake, lib=library)
        torch.library.register_autograd(
            f"sage::{name}", differentiate, setup_context=_setup_context, lib=library
        )
    library.impl("rotary_attention_backward", _backward, "CompositeExplicitAutograd")
    torch.library.register_fake("sage::rotary_attention_backward", _fake_backward, lib=library)
    overloads = torch.ops.sage.rotary_attention
    backward = torch.ops.sage.rotary_attention_backward.default
    for device_type in ("cpu", "cuda"):
        # What sage::attention casts: Q, K, V and a float mask. The tables stay.
        for name, overload in (("", overloads.default), (".lse", overloads.lse)):
            ops.register_autocast(
                overload, f"rotary_attention{name}", device_type, casts=(0, 1, 2, 10)
            )
        ops.register_autocast(backward, "rotary_attention_backward", device_type, casts=())


_register()
