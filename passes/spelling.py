"""The many spellings of views, casts and in-place operations."""

from __future__ import annotations

import sys
from typing import Any, Final

import torch
from torch import fx
from torch.utils._python_dispatch import _disable_current_modes

from sage_compiler.passes.normalize import argument, operation, tensor_of

_SAME_OPERATION: Final = {
    "iadd": "add",
    "isub": "sub",
    "imul": "mul",
    "itruediv": "truediv",
    "true_divide": "div",
    "divide": "div",
    "multiply": "mul",
    "subtract": "sub",
    "__add__": "add",
    "__radd__": "add",
    "__sub__": "sub",
    "__rsub__": "rsub",
    "__mul__": "mul",
    "__rmul__": "mul",
    "__truediv__": "truediv",
    "__neg__": "neg",
    "negative": "neg",
    "__getitem__": "getitem",
}
# Of real numbers; H is T of a matrix.
_TRANSPOSES: Final = {"mT": "mT", "mH": "mT", "T": "T", "H": "T"}
_PERMUTING: Final = frozenset(
    ["transpose", "permute", "t", "swapaxes", "swapdims", "movedim", "moveaxis"]
)


def base_operation(node: fx.Node) -> str:
    """The name of what a node computes, the same for its in-place and operator spellings."""
    name = operation(node)
    if name in _SAME_OPERATION:
        return _SAME_OPERATION[name]
    if name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
    return _SAME_OPERATION.get(name, name)


def permutation_of(node: fx.Node, rank: int) -> list[int] | None:
    """Which dim of its input each dim of a transposed tensor is; None for other operations."""
    name = base_operation(node)
    if name == "getattr":
        if node.args[1] not in _TRANSPOSES:
            return None
        name = _TRANSPOSES[str(node.args[1])]
    elif name not in _PERMUTING:
        return None
    with _disable_current_modes():
        probe = torch.empty(tuple(range(2, rank + 2)), device="meta")  # each dim has its own size
        if name == "mT":
            result = probe.mT
        elif name == "T":
            result = probe.permute(*range(rank - 1, -1, -1))
        else:
            result = called(node, probe)
    return [size - 2 for size in result.shape]


def called(node: fx.Node, first: Any) -> Any:
    """What a node computes, with ``first`` for its first argument."""
    args, kwargs = list(node.args), dict(node.kwargs)
    for name in ("input", "self", "tensors"):
        if name in kwargs:
            args.insert(0, kwargs.pop(name))
    if node.op == "call_method":
        return getattr(first, str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(first, *args[1:], **kwargs)


def is_inserting(node: fx.Node) -> bool:
    """Whether an indexing takes everything, and at most inserts dims of size 1."""
    index = argument(node, 1, "index")
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is None or part is Ellipsis or part == slice(None) for part in parts)


def is_whole_slice(node: fx.Node) -> bool:
    """Whether a slice takes everything: what torch.export leaves of a ``:`` where sizes vary."""
    if operation(node) != "slice":
        return False
    start, end = argument(node, 2, "start"), argument(node, 3, "end")
    return (
        start in (None, 0)
        and (end is None or (isinstance(end, int) and end >= sys.maxsize))
        and argument(node, 4, "step") in (None, 1)
    )


def cast_of(node: fx.Node) -> torch.dtype | None:
    """The dtype that a cast casts to; None when it does more, or it is not known."""
    tensor, source = tensor_of(node), tensor_of(argument(node, 0, "input"))
    if tensor is None or source is None or tensor.device != source.device:
        return None
    return tensor.dtype
