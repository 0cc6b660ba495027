"""One spelling for what Dynamo and torch.export write in many: calls, shapes, names, sources."""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

from torch import Tensor, fx
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

from sage_compiler.passes.site import Shape

_ROOT: Final = re.compile(r"^[LG]\['[^']*'\]\.?")
_INDEX: Final = re.compile(r"\[['\"]?([^\]'\"]+)['\"]?\]")
_FRAME: Final = re.compile(r'^\s*File "(?P<file>.+)", line (?P<line>\d+), in ')


def operation(node: fx.Node) -> str:
    """The bare name of what a node calls: ``softmax`` for a method, a function or an overload."""
    target = node.target
    if isinstance(target, str):
        return target
    if isinstance(target, OpOverload):
        return str(target.overloadpacket.__name__)
    return str(getattr(target, "__name__", target))


def tensor_of(node: object) -> Tensor | None:
    """The fake (or example) tensor that a node produces; None when it is not a known tensor."""
    if not isinstance(node, fx.Node):
        return None
    found = node.meta.get("example_value", node.meta.get("val"))
    return found if isinstance(found, Tensor) else None


def shape_of(tensor: Tensor) -> Shape:
    """Sizes as numbers, symbolic ones as text."""
    return tuple(size if isinstance(size, int) else str(size) for size in tensor.shape)


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


def module_of(node: fx.Node) -> str:
    """Qualified name of the innermost module a node was traced in; "" for the root."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(next(reversed(stack.values()))[0])
    path = _ROOT.sub("", path).removeprefix("L__self__")
    return _INDEX.sub(r".\1", path).replace("._modules.", ".").strip(".")


class LayerNames:
    """Hands out ``fqn#ordinal``: the ordinal counts attentions within one module."""

    def __init__(self) -> None:
        self._seen: Counter[str] = Counter()

    def next(self, node: fx.Node) -> str:
        module = module_of(node) or "(root)"
        ordinal = self._seen[module]
        self._seen[module] += 1
        return f"{module}#{ordinal}"


# --- aliasing -------------------------------------------------------------------------------

# Names under which a result may share memory with its input, as methods and as functions.
VIEWS: Final = frozenset(
    [
        "alias",
        "as_strided",
        "chunk",
        "contiguous",
        "detach",
        "diagonal",
        "expand",
        "expand_as",
        "flatten",
        "getitem",
        "movedim",
        "mT",
        "mH",
        "T",
        "H",
        "narrow",
        "permute",
        "real",
        "reshape",
        "select",
        "slice",
        "split",
        "squeeze",
        "swapaxes",
        "swapdims",
        "t",
        "to",
        "transpose",
        "type_as",
        "unbind",
        "unflatten",
        "unfold",
        "unsqueeze",
        "view",
        "view_as",
        "getattr",
        "float",
        "half",
        "bfloat16",
        "double",
        "type",
        "cpu",
        "cuda",
    ]
)

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
    if node.op == "call_method":
        name = str(node.target)
        return (name.endswith("_") and not name.endswith("__")) or (
            name.startswith("__i") and name not in ("__invert__", "__index__")
        )
    if node.op == "call_module":
        return True
    if node.op != "call_function":
        return False
    target = node.target
    if isinstance(target, OpOverload):
        return bool(target._schema.is_mutable)
    if isinstance(target, OpOverloadPacket):
        return any(getattr(target, name)._schema.is_mutable for name in target.overloads())
    if isinstance(target, HigherOrderOperator) or target in _IN_PLACE_OPERATORS:
        return True
    if node.kwargs.get("out") is not None or node.kwargs.get("inplace"):
        return True
    module = getattr(target, "__module__", None) or ""
    if module == "_operator" or getattr(operator, operation(node), None) is target:
        return False
    if operation(node).endswith("_"):
        return True
    if module == "torch.nn.functional":
        return _takes_inplace(target) and node.kwargs.get("inplace") is not False
    return module.split(".")[0] not in ("torch", "math", "builtins")


def _takes_inplace(target: Any) -> bool:
    code = getattr(target, "__code__", None)
    return code is not None and "inplace" in code.co_varnames[: code.co_argcount]


def may_alias(node: fx.Node) -> bool:
    """Whether a node's result might share memory with one of its tensor arguments."""
    return operation(node) in VIEWS
