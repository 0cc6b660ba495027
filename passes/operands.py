"""Query, key and value as the operator wants them, from what the model multiplies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import fx

from sage_compiler.passes.axes import (
    Axis,
    Dim,
    Layout,
    Sizes,
    arrange,
    axes_of,
    flat,
    is_one,
    product,
    reshape,
)
from sage_compiler.passes.contraction import Operand
from sage_compiler.passes.normalize import argument, is_plain, tensor_of
from sage_compiler.passes.scores import CASTS, PERMUTES, SAME, VIEWS
from sage_compiler.passes.spelling import (
    base_operation,
    is_inserting,
    is_whole_slice,
    permutation_of,
)
from sage_compiler.passes.values import Apply, Value
from sage_compiler.passes.walk import Walk

_DEPTH: Final = 16  # views and copies that are looked through


@dataclass(frozen=True, slots=True)
class Source:
    """A node that holds the numbers of an operand, perhaps in another shape.

    Attributes:
        node, layout: the tensor and its axes; an axis that it lacks is repeated over.
        reader: the node that reads it on the way to the product.
    """

    node: fx.Node
    layout: Layout
    reader: fx.Node


def sources(operand: Operand, reader: fx.Node, output: fx.Node, walk: Walk) -> list[Source]:
    """The operand, and what it was before views, copies, repeats and casts to a wider dtype.

    Only what still holds the same numbers where ``output`` is computed.
    """
    found = [Source(operand.node, operand.layout, reader)]
    for _ in range(_DEPTH):
        last = found[-1]
        before = _before(last)
        if before is None or walk.effects.latest(last.node, last.reader) is not None:
            break
        if walk.crosses_border(last.node, last.reader):
            break  # made where gradients are off, or in another dtype
        node, layout = before
        found.append(Source(node, layout, last.node))
        if _widens(last.node):
            found = found[-1:]
    return [each for each in found if not walk.effects.changed(each.node, each.reader, output)]


def _widens(node: fx.Node) -> bool:
    source, tensor = tensor_of(argument(node, 0, "input")), tensor_of(node)
    assert source is not None and tensor is not None
    return source.dtype != tensor.dtype


def _before(after: Source) -> tuple[fx.Node, Layout] | None:
    """One operation undone: its input, and the axes of that."""
    node, layout = after.node, after.layout
    name = base_operation(node)
    source = argument(node, 0, "input")
    tensor, made = tensor_of(source), tensor_of(node)
    if tensor is None or made is None or not is_plain(tensor) or not tensor.is_floating_point():
        return None
    if name == "getitem" and not is_inserting(node):
        return None
    if tensor.dtype != made.dtype and name not in CASTS:
        return None  # a view of the same bits as other numbers
    if name == "expand":
        return source, _unexpanded(layout, tensor)
    if name == "repeat_interleave":
        return _uninterleaved(node, source, layout, tensor, made)
    if name in CASTS:
        exact = tensor.dtype == made.dtype or (
            made.dtype == torch.float32 and tensor.dtype in (torch.bfloat16, torch.float16)
        )
        return (source, layout) if exact and tensor.device == made.device else None
    if name in SAME or is_whole_slice(node):
        return source, layout
    if name in PERMUTES:
        permutation = permutation_of(node, tensor.dim())
        if permutation is None:
            return None
        return source, tuple(layout[permutation.index(dim)] for dim in range(tensor.dim()))
    if name in VIEWS:
        unviewed = reshape(layout, tensor.shape)
        return None if unviewed is None else (source, unviewed)
    return None


def _unexpanded(layout: Layout, source: torch.Tensor) -> Layout:
    aligned = layout[len(layout) - source.dim() :]
    return tuple(
        () if is_one(size) and not all(is_one(axis.size) for axis in flat(dim)) else dim
        for size, dim in zip(source.shape, aligned, strict=True)
    )


def _uninterleaved(
    node: fx.Node, source: fx.Node, layout: Layout, before: torch.Tensor, after: torch.Tensor
) -> tuple[fx.Node, Layout] | None:
    """Every entry of one dim repeated n times in a row: the dim was the outer of two axes."""
    repeats, dim = argument(node, 1, "repeats"), argument(node, 2, "dim")
    if not isinstance(repeats, int) or not isinstance(dim, int) or repeats < 1:
        return None
    dim %= before.dim()
    shape = (*after.shape[:dim], before.shape[dim], repeats, *after.shape[dim + 1 :])
    split = reshape(layout, shape)
    return None if split is None else (source, (*split[: dim + 1], *split[dim + 2 :]))


@dataclass(frozen=True, slots=True)
class Heads:
    """How the axes of one attention become the operator's dims.

    Attributes:
        batch, heads: batch axes of the query, in two groups.
        shared: those of ``heads`` over which key and value do not vary; behind all others.
        query, key, channel, value: position and channel axes.
    """

    batch: Dim
    heads: Dim
    shared: frozenset[Axis]
    query: Dim
    key: Dim
    channel: Dim
    value: Dim

    @property
    def kv_heads(self) -> Dim:
        """The head axes over which key and value vary."""
        return tuple(axis for axis in self.heads if axis not in self.shared)


def group(outer: Sequence[Dim], without: frozenset[Axis]) -> tuple[Dim, Dim]:
    """Batch axes in (batch, heads): the last that key and value vary over is the head.

    Those behind it, over which they do not vary, are the query heads that share it.

    Args:
        outer: the batch dims, outermost first, some of them without an axis (a batch of 1).
        without: the axes over which key and value do not vary.
    """
    axes = [axis for dim in outer for axis in dim]
    full = [at for at, axis in enumerate(axes) if axis not in without]
    if not full:
        return tuple(axes[:-1]), tuple(axes[-1:])
    last = full[-1]
    if last == 0 and len(outer) > 1 and outer[0] == (axes[0],):
        return tuple(axes[:1]), tuple(axes[1:])  # one key/value head for all query heads
    return tuple(axes[:last]), tuple(axes[last:])


def repeated(axes: Sequence[Axis], found: Sequence[Source]) -> frozenset[Axis]:
    """The axes over which some source of an operand does not vary."""
    everywhere = set(axes)
    absent: set[Axis] = set()
    for source in found:
        absent |= everywhere - set(axes_of(source.layout))
    return frozenset(absent)


def choose(
    found: Sequence[Source], target: Sequence[Dim], sizes: Sizes
) -> tuple[Value, Source] | None:
    """The source from which the fewest calls make a tensor of these dims, and that tensor."""
    best: tuple[int, Value, Source] | None = None
    for source in found:
        value = _whole(source, target, sizes)
        if value is None:
            continue
        cost = count_calls(value)
        if best is None or cost < best[0]:
            best = (cost, value, source)
    return None if best is None else best[1:]


def _whole(source: Source, target: Sequence[Dim], sizes: Sizes) -> Value | None:
    """The source in these dims, expanded over those that it lacks."""
    value = arrange(source.node, source.layout, target, sizes)
    present = set(axes_of(source.layout))
    lacking = [not is_one(product(dim)) and present.isdisjoint(dim) for dim in target]
    if value is None or not any(lacking):
        return value
    wanted = [sizes.of(dim) if lacks else -1 for dim, lacks in zip(target, lacking, strict=True)]
    if None in wanted:
        return None
    return Apply(torch.ops.aten.expand.default, (value, wanted))


def count_calls(value: Any) -> int:
    """How many calls an expression makes."""
    if not isinstance(value, Apply):
        return 0
    return 1 + sum(
        count_calls(part)
        for given in value.args
        for part in (given if isinstance(given, (list, tuple)) else (given,))
    )
