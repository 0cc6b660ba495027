"""The operator ``sage::attention``: schema, dispatch to kernels, fake, autocast, registration.

Two overloads share every argument: ``default`` returns the output, ``lse`` the output and the
log-sum-exp. Arguments that calls often set come first: the dispatcher strips trailing defaults,
and a positional argument costs half of a keyword one.

Strides of the output are a contract: (B, Lq, H, Dv) in memory when query lies so (a transposed
projection), else (B, H, Lq, Dv); always dense, whatever kernel runs.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from math import inf
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from sage_compiler import gradient
from sage_compiler import guard as guards
from sage_compiler.errors import InvalidAttentionError
from sage_compiler.kernels import exact, reference, registry
from sage_compiler.kernels.kernel import Kernel, Problem, RunPacked
from sage_compiler.kernels.layout import empty_output, in_layout
from sage_compiler.kernels.rotary import Rotary
from sage_compiler.packed import join, sequences
from sage_compiler.precision import EXACT, PRECISIONS, RECIPES, check_precision
from sage_compiler.semantics import (
    DTYPES,
    UNBOUNDED,
    Semantics,
    parse_semantics,
)
from sage_compiler.validate import check_arguments

ARGUMENTS: Final = (
    "Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, str mask_class='none', "
    "float? scale=None, str recipe='exact', int min_seq_len=0, str dead_rows='zero', "
    "float? softcap=None, Tensor? sinks=None, int window_left=-1, int window_right=-1, "
    "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? step=None, "
    "str[]? step_recipes=None, str guard=''"
)

# As min_seq_len: the least lengths that `auto` has for the kernel, where and when the call runs.
SHIPPED_GATE: Final = -1

library = torch.library.Library("sage", "DEF")
# Kernels read by strides: what Inductor computes for them it may lay out as it likes. Without the
# tag it does so as the captured model did, and calls with every default as a keyword, which takes
# two microseconds.
TAGS: Final = (torch.Tag.flexible_layout,)
library.define(f"attention({ARGUMENTS}) -> Tensor", tags=TAGS)
library.define(f"attention.lse({ARGUMENTS}) -> (Tensor, Tensor)", tags=TAGS)
library.define(
    f"attention_backward({gradient.ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)

# What the first branch of the operator hands to scaled_dot_product_attention as it is.
_PLAIN: Final = {"none": False, "causal": True}  # mask class -> is_causal

_expected: Final = ContextVar("emulation is expected", default=False)


@contextlib.contextmanager
def expecting_emulation() -> Iterator[None]:
    """Without the warning: recipes of another device are tried on purpose."""
    token = _expected.set(True)
    try:
        yield
    finally:
        _expected.reset(token)


@functools.cache
def _warn_emulated(reason: str) -> None:
    warnings.warn(
        f"sage: {reason}; the reference emulates it: the right numerics, but slow",
        stacklevel=2,
    )


# --- forward --------------------------------------------------------------------------------


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    mask_class: str = "none",
    scale: float | None = None,
    recipe: str = "exact",
    min_seq_len: int = 0,
    *rest: Any,
) -> Tensor:
    # The commonest calls first: everything between here and the kernel is overhead per layer.
    if not rest and mask_class in _PLAIN and recipe in PRECISIONS:
        below = None if recipe == EXACT else min_seq_len
        output = plain(query, key, value, attn_mask, _PLAIN[mask_class], scale, below)
        if output is not None:
            strides = output.stride()
            # Those of query, where its batch is outermost: in the promised layout already.
            if strides == query.stride() and strides[0] >= max(strides) and strides[3] == 1:
                return output
            return in_layout(output, query)
    return general(
        query, key, value, attn_mask, mask_class, scale, recipe, min_seq_len, *rest, want_lse=False
    )[0]


def plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    below: int | None = None,
) -> Tensor | None:
    """Exact attention by scaled_dot_product_attention alone, in whatever layout it likes.

    None where that would not be the same as the operator: for what it does not take, for what it
    takes and the operator refuses, and for what is large enough to be quantized.

    Args:
        below: the operator's min_seq_len, for calls that are exact by their sizes alone; where
            these are symbols, none is. None: whatever the sizes.

    Raises:
        InvalidAttentionError: arguments that do not describe an attention.
    """
    shape, key_shape = query.shape, key.shape
    if not (
        len(shape) == 4
        and len(key_shape) == 4
        and (below is None or _is_too_small(query, shape[2], key_shape[2], below))
        and shape[0] == key_shape[0]
        and shape[3] == key_shape[3]
        and key_shape[1]
        and key_shape == value.shape
        and query.dtype in DTYPES
        and (attn_mask is None or (attn_mask.dim() in (2, 3, 4) and not is_causal))
        and (scale is None or -inf < scale < inf)
        and forward_ad._current_level < 0
    ):
        return None
    grouped = shape[1] != key_shape[1]
    try:
        if scale is None and not grouped:  # a keyword costs a tenth of a microsecond
            return F.scaled_dot_product_attention(query, key, value, attn_mask, 0.0, is_causal)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=grouped
        )
    except RuntimeError:
        # In our words where the arguments are wrong; else it is not ours to say.
        check_arguments(query, key, value, attn_mask)
        raise


def _is_too_small(query: Tensor, length: int, key_length: int, min_seq_len: int) -> bool:
    if min_seq_len == 0:
        return False
    products = query.numel() * key_length
    if type(products) is not int:
        return False
    device_type = "cpu" if query.is_cpu else query.device.type  # the first is quick
    return registry.too_small(device_type, min_seq_len, length, key_length, products)


def _attention_lse(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return general(query, key, value, *rest, want_lse=True)


def general(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    mask_class: str = "none",
    scale: float | None = None,
    recipe: str = EXACT,
    min_seq_len: int = 0,
    dead_rows: str = "zero",
    softcap: float | None = None,
    sinks: Tensor | None = None,
    window_left: int = UNBOUNDED,
    window_right: int = UNBOUNDED,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    step: Tensor | None = None,
    step_recipes: list[str] | None = None,
    guard: str = "",
    *,
    want_lse: bool,
    rotary: Rotary | None = None,
) -> tuple[Tensor, Tensor]:
    """Validate, choose the kernel, run it. The second result is empty unless it is wanted."""
    check_arguments(
        query, key, value, attn_mask, sinks, cu_seqlens_q, cu_seqlens_k, step, step_recipes
    )
    if forward_ad._current_level >= 0:
        # A tangent is out of sight here, and would become zero without a word.
        raise NotImplementedError(
            "sage::attention has no forward-mode derivative (forward_ad, torch.func.jvp); use "
            "reverse mode, or scaled_dot_product_attention"
        )
    semantics = parse_semantics(mask_class, scale, dead_rows, softcap, window_left, window_right)
    for name in (recipe, *(step_recipes or ())):
        check_precision(name)
    recipe = _recipe_of_step(recipe, step, step_recipes)

    def serve(
        q: Tensor, k: Tensor, v: Tensor, rotary: Rotary | None = None
    ) -> tuple[Tensor, Tensor]:
        return _serve(
            q, k, v, attn_mask, sinks, semantics, recipe, min_seq_len, guard, want_lse, rotary
        )

    if cu_seqlens_q is None or cu_seqlens_k is None:
        output, lse = serve(query, key, value, rotary)
    else:
        if rotary is not None:
            query, key = rotary.rotated(query, key)
        run_packed = _packed_kernel(query, key, value, semantics, recipe, min_seq_len, guard)
        offsets = cu_seqlens_q, cu_seqlens_k
        if run_packed is not None:
            output, lse = run_packed(
                query, key, value, semantics, *offsets, sinks=sinks, want_lse=want_lse
            )
        else:
            parts = [serve(*part) for part in sequences(query, key, value, *offsets)]
            output, lse = join(parts, query, value)
    return in_layout(output, query), lse.contiguous()


def _packed_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    semantics: Semantics,
    recipe: str,
    min_seq_len: int,
    guard: str,
) -> RunPacked | None:
    """What serves a packed batch at once; None: each sequence is a call of its own.

    It is one where its length decides, by a gate, or where a guard looks at it.
    """
    if recipe not in RECIPES or min_seq_len != 0 or guard:
        return None
    found = registry.find(recipe, Problem.of(query, key, value, semantics, None))
    return found.run_packed if isinstance(found, Kernel) else None


def _serve(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    sinks: Tensor | None,
    semantics: Semantics,
    recipe: str,
    min_seq_len: int,
    guard: str,
    want_lse: bool,
    rotary: Rotary | None,
) -> tuple[Tensor, Tensor]:
    problem = Problem.of(query, key, value, semantics, attn_mask)
    length, key_length = query.shape[2], key.shape[2]
    served_by = registry.choose(
        recipe, problem, min_seq_len, length, key_length, query.numel() * key_length
    )

    def rotated() -> tuple[Tensor, Tensor]:
        return (query, key) if rotary is None else rotary.rotated(query, key)

    def run_exact() -> tuple[Tensor, Tensor]:
        q, k = rotated()
        if want_lse:
            return exact.attention_with_lse(
                q, k, value, semantics, attn_mask=attn_mask, sinks=sinks
            )
        output = exact.attention(q, k, value, semantics, attn_mask=attn_mask, sinks=sinks)
        return output, query.new_empty(0, dtype=torch.float32)

    def run_quantized() -> tuple[Tensor, Tensor]:
        if rotary is not None and isinstance(served_by, Kernel) and served_by.run_rotary:
            return served_by.run_rotary(
                query,
                key,
                value,
                semantics,
                attn_mask=attn_mask,
                sinks=sinks,
                want_lse=want_lse,
                rotary=rotary,
            )
        q, k = rotated()
        if isinstance(served_by, Kernel):
            return served_by.run(
                q, k, value, semantics, attn_mask=attn_mask, sinks=sinks, want_lse=want_lse
            )
        return reference.attention(
            q, k, value, RECIPES[recipe], semantics, attn_mask=attn_mask, sinks=sinks
        )

    if served_by is None:
        return run_exact()
    if isinstance(served_by, registry.Unavailable) and not _expected.get():
        _warn_emulated(served_by.reason)
    return guards.run(guard, run_quantized, run_exact) if guard else run_quantized()


def _recipe_of_step(recipe: str, step: Tensor | None, step_recipes: list[str] | None) -> str:
    if step is None or step_recipes is None:
        return recipe
    index = int(step.item())
    if not 0 <= index < len(step_recipes):
        raise InvalidAttentionError(
            f"step {index} with a table of {len(step_recipes)} recipes; it must be in range. Where "
            "a policy depends on the timestep, call sage.set_step(step, total) before the model"
        )
    return step_recipes[index]


# --- fake -----------------------------------------------------------------------------------


def fake_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    mask_class: str = "none",
    scale: float | None = None,
    recipe: str = EXACT,
    min_seq_len: int = 0,
    dead_rows: str = "zero",
    softcap: float | None = None,
    sinks: Tensor | None = None,
    window_left: int = UNBOUNDED,
    window_right: int = UNBOUNDED,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    step: Tensor | None = None,
    step_recipes: list[str] | None = None,
    guard: str = "",
) -> Tensor:
    check_arguments(
        query, key, value, attn_mask, sinks, cu_seqlens_q, cu_seqlens_k, step, step_recipes
    )
    parse_semantics(mask_class, scale, dead_rows, softcap, window_left, window_right)
    for name in (recipe, *(step_recipes or ())):
        check_precision(name)
    return empty_output(query, value)


def _fake_attention_lse(
    query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    output = fake_attention(query, key, value, *rest)
    return output, query.new_empty(query.shape[:3], dtype=torch.float32)


# --- autocast -------------------------------------------------------------------------------


def register_autocast(
    overload: torch._ops.OpOverload, name: str, device_type: str, *, casts: Sequence[int]
) -> None:
    """Run outside autocast, after casting the arguments at ``casts`` as autocast does."""
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
            return overload(*(cast(x) if at in casts else x for at, x in enumerate(args)))

    library.impl(name, inner, dispatch_key, with_keyset=True)


# --- registration ---------------------------------------------------------------------------


def _register() -> None:
    overloads = torch.ops.sage.attention
    plain, with_lse = overloads.default, overloads.lse
    backward = torch.ops.sage.attention_backward.default
    library.impl("attention", _attention, "CompositeExplicitAutograd")
    library.impl("attention.lse", _attention_lse, "CompositeExplicitAutograd")
    library.impl("attention_backward", gradient.backward, "CompositeExplicitAutograd")
    torch.library.register_fake("sage::attention", fake_attention, lib=library)
    torch.library.register_fake("sage::attention.lse", _fake_attention_lse, lib=library)
    torch.library.register_fake("sage::attention_backward", gradient.fake_backward, lib=library)
    torch.library.register_autograd(
        "sage::attention",
        gradient.differentiate,
        setup_context=gradient.setup_context,
        lib=library,
    )
    torch.library.register_autograd(
        "sage::attention.lse",
        gradient.differentiate_lse,
        setup_context=gradient.setup_context,
        lib=library,
    )
    for device_type in ("cpu", "cuda"):
        # As for scaled_dot_product_attention: Q, K, V and a float mask. Its backward keeps dtypes.
        register_autocast(plain, "attention", device_type, casts=range(4))
        register_autocast(with_lse, "attention.lse", device_type, casts=range(4))
        register_autocast(backward, "attention_backward", device_type, casts=())


_register()
