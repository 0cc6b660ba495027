"""Which operations are deterministic and touch nothing but their arguments."""

from __future__ import annotations

from typing import Final

from torch import fx

from sage_compiler.passes.normalize import may_mutate, mutates_first_only, operation


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Bare names. Left out: what is random, reads memory that was never written, or picks one of several
# equal elements (argmax, sort), which devices do differently.
_PURE: Final = _names(
    """
    alias all amax amin any arange block_diag broadcast_tensors broadcast_to cat chunk column_stack
    combinations concat concatenate constant_pad_nd cumsum detach diag diag_embed diagonal diff
    dstack expand expand_as eye flatten flip fliplr flipud full full_like gather getitem hstack
    index index_select isfinite isin isinf isnan kron lift_fresh_copy linspace max meshgrid min
    movedim moveaxis narrow new_full new_ones new_tensor new_zeros not_ one_hot ones ones_like
    outer pad permute prod ravel repeat repeat_interleave reshape roll rot90 rsub scalar_tensor
    select slice split split_with_sizes squeeze stack sum swapaxes swapdims t take take_along_dim
    tensor tensor_split tile to transpose tril_indices triu_indices truth type type_as unbind
    unflatten unsqueeze view view_as vstack where zeros zeros_like
    bfloat16 bool byte clone contiguous double float half int long _to_copy
    __add__ __and__ __eq__ __floordiv__ __ge__ __getitem__ __gt__ __invert__ __le__ __lt__ __mod__
    __mul__ __ne__ __neg__ __or__ __pow__ __radd__ __rand__ __rmul__ __ror__ __rsub__ __rtruediv__
    __sub__ __truediv__ __xor__
    and_ floordiv inv invert mod or_ xor
    """
)
_PURE_OR_IN_PLACE: Final = _names(
    """
    abs absolute add bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift
    bitwise_xor clamp clamp_max clamp_min clip copy cumsum div divide eq fill fill_diagonal
    floor_divide fmod ge greater greater_equal gt index_add index_copy index_fill index_put le less
    less_equal logical_and logical_not logical_or logical_xor lt masked_fill masked_scatter maximum
    minimum mul multiply nan_to_num ne neg negative not_equal pow remainder rsub scatter sign sub
    subtract tril triu true_divide truediv zero
    """
)
_IN_PLACE_OPERATORS: Final = _names(
    """
    iadd iand ifloordiv imod imul ior ipow isub itruediv ixor setitem
    __iadd__ __iand__ __ifloordiv__ __imod__ __imul__ __ior__ __ipow__ __isub__ __itruediv__
    __ixor__ __setitem__
    """
)


def is_pure(node: fx.Node) -> bool:
    """Whether a node is a deterministic operation without side effects."""
    if node.op not in ("call_function", "call_method") or may_mutate(node):
        return False
    name = operation(node)
    if name == "getattr":
        return node.args[1] in ("T", "mT", "H", "mH")
    return name in _PURE or name in _PURE_OR_IN_PLACE


def is_pure_in_place(node: fx.Node) -> bool:
    """Whether a node writes a deterministic result to its first argument, and does no more."""
    if not mutates_first_only(node):
        return False
    name = operation(node)
    return name in _IN_PLACE_OPERATORS or name.removesuffix("_") in _PURE_OR_IN_PLACE
