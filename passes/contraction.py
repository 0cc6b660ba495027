"""Products of two tensors, however they are written: matmul, bmm, baddbmm, einsum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from torch import fx

from sage_compiler.passes.axes import Axis, Dim, Layout, is_one, product
from sage_compiler.passes.normalize import argument, operation, tensor_of
from sage_compiler.passes.walk import scalar

OPERATIONS: Final = frozenset(
    ["matmul", "bmm", "mm", "baddbmm", "einsum", "__matmul__", "__rmatmul__"]
)


@dataclass(frozen=True, slots=True)
class Operand:
    """One factor: a node, and the axes that its dims run over."""

    node: fx.Node
    layout: Layout


@dataclass(frozen=True, slots=True)
class Contraction:
    """``node`` = factor * (left * right, summed over their common axes) + bias_factor * bias."""

    left: Operand
    right: Operand
    layout: Layout
    summed: Dim
    factor: float = 1.0
    bias: fx.Node | None = None
    bias_factor: float = 0.0


def contract(node: fx.Node, known: fx.Node | None = None, layout: Layout = ()) -> Contraction | str:
    """A product with axes for its dims, or why it cannot be read as one.

    Args:
        node: one of ``OPERATIONS``.
        known: a factor whose axes are known, as ``layout``; the others get new ones.
    """
    name = operation(node)
    if name == "einsum":
        return _einsum(node, known, layout)
    if name == "baddbmm":
        return _baddbmm(node, known, layout)
    left, right = argument(node, 0, "input"), _second(node)
    if name == "__rmatmul__":
        left, right = right, left
    return _product(left, right, known, layout)


def _second(node: fx.Node) -> Any:
    for name in ("other", "mat2"):
        if name in node.kwargs:
            return node.kwargs[name]
    return argument(node, 1, "tensor2")


def _baddbmm(node: fx.Node, known: fx.Node | None, layout: Layout) -> Contraction | str:
    if not isinstance(argument(node, 0, "input"), fx.Node):
        return "baddbmm with its arguments in an order that PyTorch has given up"
    found = _product(argument(node, 1, "batch1"), argument(node, 2, "batch2"), known, layout)
    alpha, beta = (scalar(node.kwargs.get(name, 1)) for name in ("alpha", "beta"))
    if isinstance(found, str):
        return found
    if not (isinstance(alpha, float) and isinstance(beta, float)):
        return "alpha or beta of baddbmm is computed at run time"
    bias = argument(node, 0, "input") if beta != 0 else None  # beta=0 ignores even NaN
    return Contraction(found.left, found.right, found.layout, found.summed, alpha, bias, beta)


def _product(left: Any, right: Any, known: fx.Node | None, layout: Layout) -> Contraction | str:
    """(..., m, c) times (..., c, n), the dims before broadcast against each other."""
    sizes = _shapes(left, right)
    if isinstance(sizes, str):
        return sizes
    a, b = sizes
    if min(len(a), len(b)) < 2:
        return "a product with a vector"
    rank = max(len(a), len(b))
    rows, columns, summed = "m", "n", "c"
    batch = [f"b{at}" for at in range(rank - 2)]
    labels = [
        [*batch[rank - len(a) :], rows, summed],
        [*batch[rank - len(b) :], summed, columns],
    ]
    return _label((left, right), labels, [*batch, rows, columns], known, layout)


def _einsum(node: fx.Node, known: fx.Node | None, layout: Layout) -> Contraction | str:
    equation = argument(node, 0, "equation")
    operands = node.args[1:]
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2:
        return "an einsum of other than two factors"
    sizes = _shapes(*operands)
    if isinstance(sizes, str):
        return sizes
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = [
        _letters(term, len(shape)) for term, shape in zip(inputs.split(","), sizes, strict=True)
    ]
    dots = max((len([x for x in term if x.isdigit()]) for term in terms), default=0)
    if not arrow:
        letters = [x for term in terms for x in term]
        once = sorted({x for x in letters if letters.count(x) == 1 and not x.isdigit()})
        result = [str(at) for at in range(dots - 1, -1, -1)] + once
    else:
        result = _letters(output, len(output.replace("...", "")) + dots)
    return _label(operands, terms, result, known, layout)


def _letters(term: str, rank: int) -> list[str]:
    """One label a dim; those of an ellipsis are numbered from its end."""
    before, dots, after = term.partition("...")
    if not dots:
        return list(term)
    count = rank - len(before) - len(after)
    return [*before, *(str(at) for at in range(count - 1, -1, -1)), *after]


def _shapes(left: Any, right: Any) -> tuple[Any, Any] | str:
    tensors = tensor_of(left), tensor_of(right)
    if tensors[0] is None or tensors[1] is None:
        return "the shapes of a product's factors are not recorded in the graph"
    return tensors[0].shape, tensors[1].shape


def _label(
    operands: Sequence[Any],
    labels: Sequence[Sequence[str]],
    result: Sequence[str],
    known: fx.Node | None,
    layout: Layout,
) -> Contraction | str:
    """Axes for the labels of both factors; a dim of size 1 broadcasts where the other is larger."""
    if any(len(set(each)) != len(each) for each in (*labels, result)):
        return "an einsum that takes a diagonal"
    if known is not None and operands[0] is operands[1]:
        return "a product of a tensor with itself"
    shapes = [tensor.shape for tensor in map(tensor_of, operands) if tensor is not None]
    if any(len(each) != len(shape) for each, shape in zip(labels, shapes, strict=True)):
        return "an einsum whose letters and dims differ in number"
    first, second = (
        dict(zip(each, shape, strict=True)) for each, shape in zip(labels, shapes, strict=True)
    )
    dims: dict[str, Dim] = {}
    for operand, names in zip(operands, labels, strict=True):
        if operand is known:
            dims.update(zip(names, layout, strict=True))
    for label in dict.fromkeys((*labels[0], *labels[1])):
        sizes = [side[label] for side in (first, second) if label in side]
        if label in dims:
            if is_one(product(dims[label])) and not all(is_one(size) for size in sizes):
                return "a factor varies along a dim over which the scores do not"
            continue
        # A dim of size 1 that both have needs no axis; one that only one factor has does.
        if len(sizes) == 2 and label in result and all(is_one(size) for size in sizes):
            dims[label] = ()
            continue
        larger = [size for size in sizes if not is_one(size)]
        dims[label] = (Axis(larger[0] if larger else 1),)
    summed = [label for label in dims if label not in result]
    if not all(label in first and label in second for label in summed):
        return "an einsum that sums one factor by itself"
    for label in summed:
        if is_one(first[label]) != is_one(second[label]):
            return "a product whose summed dim is broadcast"
    left, right = (
        Operand(operand, tuple(_present(dims[x], side[x]) for x in names))
        for operand, names, side in zip(operands, labels, (first, second), strict=True)
    )
    return Contraction(
        left,
        right,
        tuple(dims[label] for label in result),
        tuple(axis for label in summed for axis in dims[label]),
    )


def _present(dim: Dim, size: Any) -> Dim:
    return () if is_one(size) and not is_one(product(dim)) else dim
