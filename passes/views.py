"""Rules for views, casts and indexing: the same elements at other indexes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

import torch
from torch import SymInt, Tensor, fx

from sage_compiler.passes.axes import Size, is_one
from sage_compiler.passes.bands import known
from sage_compiler.passes.calls import Call, computed
from sage_compiler.passes.forms import (
    Affine,
    Dims,
    Form,
    Formula,
    Leaf,
    Literal,
    Part,
    Sum,
    choose,
    is_uniform,
    least,
    move,
    relabel,
    substitute,
)
from sage_compiler.passes.normalize import tensor_of
from sage_compiler.passes.spelling import permutation_of

Rule: TypeAlias = Callable[[Call], Form | None]


def _moved(dims_of: Callable[[Call, Tensor], Dims | None]) -> Rule:
    """A view that only moves dims, says ``dims_of``; of a tensor of one number, any view."""

    def rule(call: Call) -> Form | None:
        source = call.source()
        tensor = tensor_of(source)
        if source is None or tensor is None or tensor.dtype != call.result.dtype:
            return None
        if call.name == "getattr" and call.given(1) not in ("T", "mT"):
            return None
        form = call.form_of(source)
        if is_uniform(form):
            return form
        dims = dims_of(call, tensor)
        if dims is None:
            return None
        return _expanded(call, source, tensor, dims) if form is None else move(form, dims)

    return rule


def _expanded(call: Call, source: fx.Node, tensor: Tensor, dims: Dims) -> Form | None:
    """A larger view of a tensor of which nothing is known: that tensor, through the view."""
    sizes = zip(dims, call.result.shape, strict=True)
    if all(dim is not None or is_one(size) for dim, size in sizes):
        return None
    leaf = Leaf(source, call.node, dims)
    if tensor.is_floating_point():
        return Sum((Part(leaf),))
    if tensor.dtype == torch.bool:
        return choose(Formula((Literal(None, leaf),), True), True, False)
    return None


def _by_shape(call: Call, source: Tensor) -> Dims | None:
    return relabel(source.shape, call.result.shape)


def _by_permutation(call: Call, source: Tensor) -> Dims | None:
    found = permutation_of(call.node, source.dim())
    return None if found is None else tuple(found)


def _unmoved(call: Call, source: Tensor) -> Dims | None:
    return None  # only a tensor of one number stays what it is


def _cast(call: Call) -> Form | None:
    """A copy, maybe in another dtype or on another device."""
    source = call.source()
    tensor = tensor_of(source)
    if source is None or tensor is None:
        return None
    form = call.form_of(source)
    if tensor.dtype == call.result.dtype:
        return form
    if isinstance(form, Affine):
        return None if call.result.is_floating_point() else form
    return computed(call)


# --- indexing -------------------------------------------------------------------------------


def _index(call: Call) -> Form | None:
    source = call.source()
    index = call.given(1, "index", "indices")
    parts = tuple(index) if isinstance(index, (tuple, list)) else (index,)
    return _indexed(call, source, parts)


def _select(call: Call) -> Form | None:
    dim, index = call.given(1, "dim"), call.given(2, "index")
    return _at_dim(call, dim, index)


def _narrow(call: Call) -> Form | None:
    dim, start = call.given(1, "dim"), call.given(2, "start")
    return _at_dim(call, dim, slice(start, None))


def _slice(call: Call) -> Form | None:
    dim, start = call.given(1, "dim", default=0), call.given(2, "start")
    return _at_dim(call, dim, slice(start, None, call.given(4, "step")))


def _at_dim(call: Call, dim: object, index: Any) -> Form | None:
    source = call.source()
    tensor = tensor_of(source)
    if tensor is None or not isinstance(dim, int):
        return None
    return _indexed(call, source, (*[slice(None)] * (dim % tensor.dim()), index))


def _indexed(call: Call, source: fx.Node | None, index: tuple[Any, ...]) -> Form | None:
    tensor = tensor_of(source)
    if source is None or tensor is None:
        return None
    form = call.form_of(source)
    if form is None:
        return None
    if any(tensor_of(part) is not None for part in index):
        if is_uniform(form):
            return form
        indexes = _gathered(call, tensor, index)
        return None if indexes is None else substitute(form, indexes, call.rank)
    found = _sliced(call, tensor, index)
    if found is None:
        return form if is_uniform(form) else None
    indexes, dims = found
    return move(form, dims) if dims is not None else substitute(form, indexes, call.rank)


def _sliced(
    call: Call, source: Tensor, index: Sequence[Any]
) -> tuple[list[Affine], Dims | None] | None:
    """Each index of the source in those of the result, for slices, numbers and None.

    With the dims when that only moves them.
    """
    taken = sum(part is not None and part is not Ellipsis for part in index)
    full = [slice(None)] * (source.dim() - taken)
    at = index.index(Ellipsis) if Ellipsis in index else len(index)
    indexes: list[Affine] = []
    dims: list[int | None] = []
    for part in (*index[:at], *full, *index[at + 1 :]):
        if part is None:
            dims.append(None)
            continue
        size = source.shape[len(indexes)]
        found = _start_and_step(call, part, size)
        if found is None:
            return None
        start, step = found
        if not isinstance(part, slice):
            indexes.append(Affine((0,) * call.rank, start))
            continue
        place = len(dims)
        slopes = [0] * call.rank
        slopes[place] = 0 if is_one(call.result.shape[place]) else step
        dims.append(len(indexes))
        indexes.append(Affine(tuple(slopes), start))
    return indexes, _only_moved(call, source, indexes, dims)


def _only_moved(
    call: Call, source: Tensor, indexes: Sequence[Affine], dims: Sequence[int | None]
) -> Dims | None:
    for dim, (index, size) in enumerate(zip(indexes, source.shape, strict=True)):
        whole = dim in dims and known(size == call.result.shape[dims.index(dim)])
        plain = isinstance(index.offset, int) and index.offset == 0
        if not (plain and (is_one(size) or (whole and sum(index.slopes) == 1))):
            return None
    return tuple(dims)


def _start_and_step(call: Call, part: Any, size: Size) -> tuple[Size, int] | None:
    """The first index that a slice or a number takes, and the distance between two."""
    given, step = (part.start, part.step) if isinstance(part, slice) else (part, 1)
    start = call.number(0 if given is None else given)
    step = call.number(1 if step is None else step)
    if not isinstance(start, (int, SymInt)) or isinstance(start, bool):
        return None
    if not isinstance(step, int) or isinstance(step, bool) or step < 1:
        return None
    if known(start < 0):
        start = start + size
    return (start, step) if known(start >= 0) else None


def _gathered(call: Call, source: Tensor, index: Sequence[Any]) -> list[Affine] | None:
    """Each index of the source in those of the result, for tensors of positions.

    The tensors index the first dims; those left over follow.
    """
    tensors = [tensor_of(part) for part in index]
    shapes = [tensor.shape for tensor in tensors if tensor is not None]
    if len(shapes) < len(tensors) or len(shapes) > source.dim():
        return None
    width = max(len(shape) for shape in shapes)
    rest = source.dim() - len(shapes)
    indexes = []
    for part, shape in zip(index, shapes, strict=True):
        form = call.form_of(part)
        # A negative position would count from the end.
        if not isinstance(form, Affine) or not known(least(form, shape) >= 0):
            return None
        slopes = (*[0] * (width - len(shape)), *form.slopes, *[0] * rest)
        indexes.append(Affine(slopes, form.offset))
    for at in range(rest):
        step = 0 if is_one(call.result.shape[width + at]) else 1
        indexes.append(Affine(tuple(step * (dim == width + at) for dim in range(call.rank)), 0))
    return indexes


_BY_SHAPE: Final = (
    "_unsafe_view alias broadcast_to detach expand expand_as flatten lift_fresh_copy repeat "
    "reshape reshape_as squeeze tile unflatten unsqueeze view view_as"
)
_BY_PERMUTATION: Final = "getattr movedim moveaxis permute swapaxes swapdims t transpose"
_CASTS: Final = (
    "_to_copy bfloat16 bool byte clone contiguous double float half int long to type type_as"
)

RULES: Final[Mapping[str, Rule]] = {
    **dict.fromkeys(_BY_SHAPE.split(), _moved(_by_shape)),
    **dict.fromkeys(_BY_PERMUTATION.split(), _moved(_by_permutation)),
    **dict.fromkeys(("flip", "roll"), _moved(_unmoved)),
    **dict.fromkeys(_CASTS.split(), _cast),
    "getitem": _index,
    "index": _index,
    "select": _select,
    "narrow": _narrow,
    "slice": _slice,
}
