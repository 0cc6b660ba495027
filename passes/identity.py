"""Stable names of attention sites: ``fqn#ordinal``, the same in every graph of a model.

docs/layers.md says what the names promise, and where that ends.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from types import CodeType
from typing import Final

from torch import fx
from torch._dynamo.resume_execution import ContinueExecutionCache
from torch._guards import TracingContext
from torch.utils.weak import WeakIdKeyDictionary

from sage_compiler.passes.normalize import operation

ROOT: Final = "(root)"  # the module or function that was compiled

_SOURCE: Final = re.compile(r"^[LG]\['[^']*'\]\.?")  # a local or global variable
_INDEX: Final = re.compile(r"\[['\"]?([^\]'\"]+)['\"]?\]")
# Parts of a path that are no modules of the user's: torch.compile(module) has the module within.
_BETWEEN: Final = frozenset({"", "_modules", "_orig_mod"})
_SOFTMAX: Final = "torch.nn.modules.activation.Softmax"


def join(prefix: str, name: str) -> str:
    """Two qualified names as one, without the parts that torch.compile adds to them."""
    parts = f"{prefix}.{name}".split(".")
    return ".".join(part for part in parts if part not in _BETWEEN)


def module_of(node: fx.Node, root: str = "") -> str:
    """Qualified name of the module whose attention a node is part of; "" for the root.

    That is the innermost one that it was traced in, but not an nn.Softmax, which others call.
    The fast path of an encoder layer is one call in the layer, and stands for its self_attn.

    Args:
        node: of a graph of Dynamo's or of torch.export's.
        root: the variable that holds the root, where that is not simply a name.
    """
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(path) for path, kind in stack.values() if _SOFTMAX not in str(kind)]
    path = paths[-1].removeprefix(root) if paths else ""
    path = _SOURCE.sub("", path).removeprefix("L__self__")
    within = "self_attn" if operation(node) == "_transformer_encoder_layer_fwd" else ""
    return join(_INDEX.sub(r".\1", path), within)


# --- the code that a graph was captured from ------------------------------------------------

# Code that only one module runs -> the qualified name of that module. By identity: Python calls
# code objects equal when they do the same.
_layers: Final[MutableMapping[CodeType, str]] = WeakIdKeyDictionary()


def name_code(code: CodeType, layer: str) -> None:
    """Say that only the module of this qualified name runs ``code``; "" is the whole model.

    What is captured from the code is named from there. The entry lives as long as the code.
    """
    _layers[code] = layer


def layer_of(code: CodeType) -> str | None:
    """The qualified name given to ``name_code``; None when there was none."""
    return _layers.get(code)


def layer_of_module(module: object) -> str:
    """The qualified name of a module with code of its own; "" for anything else."""
    code = getattr(getattr(type(module), "forward", None), "__code__", None)
    return "" if code is None else layer_of(code) or ""


def captured_code() -> CodeType | None:
    """The code whose graph Dynamo is handing to a backend; None at any other time."""
    traced = TracingContext.get_traced_code()
    return traced[0] if traced else None


def written_code(code: CodeType) -> CodeType:
    """The user's function that a code comes from.

    What follows a graph break Dynamo makes a function of its own, with new code.
    """
    continued = ContinueExecutionCache.generated_code_metadata
    while code in continued:
        code = continued[code].code
    return code


def _root_of(code: CodeType) -> str:
    """The variable of the first argument, where Dynamo does not call it by a plain name.

    A decorator's ``wrapper(*args, **kwargs)`` has the module in ``args[0]``.
    """
    if code.co_argcount or not code.co_flags & inspect.CO_VARARGS:
        return ""
    return f"L['{code.co_varnames[code.co_kwonlyargcount]}'][0]"


# --- ordinals -------------------------------------------------------------------------------


@dataclass(slots=True)
class _Part:
    """What Dynamo captures of a function at once: up to a graph break, or from one on.

    Attributes:
        before: the part that was captured before this one; None for the first.
        ends: module -> attentions up to the end of this part.
    """

    before: _Part | None
    ends: Counter[str] = field(default_factory=Counter)


_parts: Final[MutableMapping[CodeType, _Part]] = WeakIdKeyDictionary()  # by their own code
_latest: Final[MutableMapping[CodeType, _Part]] = WeakIdKeyDictionary()  # by the function's


def _enter(code: CodeType, written: CodeType) -> _Part:
    """The part that is being captured, with the counts of the part before it.

    Every time it is captured, a function starts at 0, and a later part where the part before it
    ended last: so neither recompilations nor other models with the same code change names.
    """
    part = _parts.get(code)
    if part is None:
        part = _parts[code] = _Part(None if code is written else _latest.get(written))
    part.ends = Counter() if part.before is None else Counter(part.before.ends)
    _latest[written] = part
    return part


class LayerNames:
    """Hands out ``fqn#ordinal``: the ordinal counts attentions within one module.

    Made while Dynamo hands over a graph, it goes on from the graphs of the same function before
    it; at any other time it starts at 0.
    """

    def __init__(self) -> None:
        self._prefix = self._root = ""
        part = _Part(None)
        code = captured_code()
        if code is not None:
            written = written_code(code)
            self._prefix, self._root = layer_of(written) or "", _root_of(written)
            part = _enter(code, written)
        self._counts = part.ends

    def next(self, node: fx.Node) -> str:
        """The name of an attention; to be asked once for each, in the order of the graph."""
        module = join(self._prefix, module_of(node, self._root)) or ROOT
        ordinal = self._counts[module]
        self._counts[module] += 1
        return f"{module}#{ordinal}"
