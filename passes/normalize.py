"""One spelling for what Dynamo and torch.export write in many: calls, shapes, names, sources."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable
from typing import Any, Final

import torch
from torch import SymInt, Tensor, fx
from torch._C import DispatchKey
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sage_compiler.passes.site import Shape

_OWN: Final = frozenset({"torch", "_operator", "builtins", "math"})
_FRAME: Final = re.compile(r'^\s*File "(?P<file>.+)", line (?P<line>\d+), in ')


def operation(node: fx.Node) -> str:
    """The bare name of what a node calls: ``softmax`` for a method, a function or an overload.

    Only PyTorch's own have bare names; what others define under the same name means another
    thing, and is qualified: ``namespace::softmax`` or ``module.softmax``.
    """
    target = node.target
    if isinstance(target, str):
        return target
    if isinstance(target, HigherOrderOperator):
        return str(target.__name__)
    if isinstance(target, (OpOverload, OpOverloadPacket)):
        packet = target.overloadpacket if isinstance(target, OpOverload) else target
        namespace, _, name = packet._qualified_op_name.partition("::")
        return name if namespace == "aten" else f"{namespace}::{name}"
    name = str(getattr(target, "__name__", target))
    return f"{target.__module__}.{name}" if _is_foreign(target) else name


def _is_foreign(target: Any) -> bool:
    """Whether a function is not one of PyTorch's or of Python's own."""
    # Methods of Tensor, taken from the class, have no module.
    module = getattr(target, "__module__", None) or "torch"
    # torch._dynamo wraps calls of NumPy.
    return module.split(".")[0] not in _OWN or module.startswith("torch._dynamo")


def tensor_of(node: object) -> Tensor | None:
    """The fake (or example) tensor that a node produces; None when it is not a known tensor."""
    if not isinstance(node, fx.Node):
        return None
    found = node.meta.get("example_value", node.meta.get("val"))
    return found if isinstance(found, Tensor) else None


def shape_of(sizes: Iterable[int | SymInt]) -> Shape:
    """Sizes as numbers, symbolic ones as text."""
    return tuple(size if isinstance(size, int) else _symbol(size) for size in sizes)


def _symbol(size: SymInt) -> int | str:
    expression = size.node.expr
    return int(expression) if expression.is_number else str(size)


def argument(
    node: fx.Node, position: int, name: str, default: Any = None
) -> Any:  # whatever the call holds there
    """One argument of a call, however it was passed."""
    if name in node.kwargs:
        return node.kwargs[name]
    return node.args[position] if len(node.args) > position else default


def source_of(node: fx.Node) -> str:
    """``file:line: code`` of the innermost user frame that wrote the node; "" when unknown."""
    lines = str(node.meta.get("stack_trace") or "").splitlines()
    for number in range(len(lines) - 1, -1, -1):
        frame = _FRAME.match(lines[number])
        if frame:
            code = lines[number + 1].strip() if number + 1 < len(lines) else ""
            return f"{frame['file']}:{frame['line']}: {code}".removesuffix(": ")
    return ""


# --- aliasing -------------------------------------------------------------------------------

_IN_PLACE_OPERATORS: Final[frozenset[Callable[..., Any]]] = frozenset(
    function
    for name, function in vars(operator).items()
    if callable(function)
    and name.startswith("i")
    and not name.startswith("__")
    and hasattr(operator, f"__{name}__")
    and name not in ("is_", "is_not", "inv", "invert", "index", "indexOf")
) | {operator.setitem, operator.delitem}


def may_mutate(node: fx.Node) -> bool:
    """Whether a node might change an argument in place. Unknown calls might."""
    if node.op in ("placeholder", "get_attr", "output"):
        return False
    if node.op == "call_module":
        return True
    target, name = node.target, operation(node)
    if _mutates_silently(node, name):
        return True
    if isinstance(target, OpOverload):
        return bool(target._schema.is_mutable)
    if isinstance(target, OpOverloadPacket):
        return any(_writes(getattr(target, each)._schema, node) for each in target.overloads())
    if isinstance(target, HigherOrderOperator) or target in _IN_PLACE_OPERATORS:
        return True
    if node.kwargs.get("out") is not None or node.kwargs.get("inplace"):
        return True
    if getattr(operator, name, None) is not target:  # operator.and_ and others end so too
        in_place = name.endswith("_") and not name.endswith("__")
        dunder = name.startswith("__i") and name not in _HARMLESS_DUNDERS
        if in_place or dunder or name in _SETTERS:
            return True
    if node.op == "call_method":
        return False
    if getattr(target, "__module__", None) == "torch.nn.functional" and _takes_inplace(target):
        return node.kwargs.get("inplace") is not False
    return _is_foreign(target)


def mutates_first_only(node: fx.Node) -> bool:
    """Whether a mutating call is in-place arithmetic, which writes to its first argument alone."""
    name = operation(node)
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False  # a list of tensors: all of them
    if node.kwargs.get("out") is not None or _mutates_silently(node, name):
        return False
    if node.target in _IN_PLACE_OPERATORS:
        return True
    named = (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"
    return named and (node.op == "call_method" or not _is_foreign(node.target))


_HARMLESS_DUNDERS: Final = frozenset({"__index__", "__int__", "__invert__"})
_SETTERS: Final = frozenset({"__setitem__", "__delitem__", "setattr", "delattr"})


def _mutates_silently(node: fx.Node, name: str) -> bool:
    """Operations that write to an argument though neither name nor schema says so."""
    if name in ("embedding", "embedding_bag"):
        return argument(node, 3, "max_norm") is not None
    if name in ("fused_moving_avg_obs_fake_quant", "rrelu_with_noise"):
        return True
    return "batch_norm" in name or "instance_norm" in name  # running statistics


def _writes(schema: Any, node: fx.Node) -> bool:
    """Whether an overload writes to an argument; to an output argument only where one is given."""
    return any(
        given.alias_info is not None
        and given.alias_info.is_write
        and (not given.is_out or given.name in node.kwargs)
        for given in schema.arguments
    )


def _takes_inplace(target: Any) -> bool:
    code = getattr(target, "__code__", None)
    return code is not None and "inplace" in code.co_varnames[: code.co_argcount]


def may_alias(node: fx.Node, source: fx.Node) -> bool:
    """Whether a node's result might share memory with ``source``, one of its arguments."""
    target = node.target
    if isinstance(target, OpOverload):
        # Composite operators may return views that their schemas do not announce.
        composite = target.has_kernel_for_dispatch_key(DispatchKey.CompositeImplicitAutograd)
        announced = any(result.alias_info is not None for result in target._schema.returns)
        return announced or (composite and operation(node) != "scaled_dot_product_attention")
    # Dynamo runs every call on fake tensors, whose storages alias as the real ones do.
    if "example_value" not in node.meta or "example_value" not in source.meta:
        return True
    return any(
        not (is_plain(result) and is_plain(given)) or torch._C._is_alias_of(result, given)  # type: ignore[attr-defined]
        for result in _tensors(node)
        for given in _tensors(source)
    )


def _tensors(node: fx.Node) -> list[Tensor]:
    leaves = pytree.tree_leaves(node.meta["example_value"])
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is one strided block of numbers: not nested, sparse or a wrapper."""
    return (
        tensor.layout == torch.strided
        and not tensor.is_nested
        and not is_traceable_wrapper_subclass(tensor)
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )
