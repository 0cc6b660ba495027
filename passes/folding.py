"""Constants of a graph: subgraphs that depend on no input are evaluated with real tensors.

A constant may be changed in place after it is made (``mask[:, :3] = 0``): what a reader sees is
what comes out when every write before it is done too, in the graph's order. Only operations that
are known to be deterministic, and to touch nothing but their arguments, are evaluated. Tensors
that a module holds (``get_attr``, placeholders) are no constants: nothing keeps them from being
changed between two calls of a compiled graph.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from torch import SymInt, Tensor, fx
from torch.fx.node import map_aggregate
from torch.utils._python_dispatch import _disable_current_modes

from sage_compiler.passes.effects import Effects
from sage_compiler.passes.normalize import argument, is_plain, may_mutate, operation, tensor_of
from sage_compiler.passes.purity import is_pure, is_pure_in_place

FOLD_LIMIT: Final = 1 << 26  # elements of one constant that folding will hold

# Operations whose result is no tensor; their tensors are checked where they are taken.
_TUPLES: Final = frozenset(
    [
        "broadcast_tensors",
        "chunk",
        "meshgrid",
        "split",
        "split_with_sizes",
        "tensor_split",
        "unbind",
    ]
)
# Of their first argument these read the dtype and the device, the second group its shape too.
_LIKE_DTYPE: Final = frozenset({"new_full", "new_ones", "new_zeros"})
_LIKE_SHAPE: Final = frozenset({"full_like", "ones_like", "zeros_like"})


def is_held(elements: int) -> bool:
    """Whether folding holds a constant of this many elements."""
    return elements <= FOLD_LIMIT


def literal(node: object) -> int | bool | None:
    """The number in a node that is one for the whole graph: a size, or arithmetic on sizes."""
    if not isinstance(node, fx.Node):
        return None
    value = node.meta.get("example_value", node.meta.get("val"))
    if isinstance(value, SymInt):
        expression = value.node.expr
        return int(expression) if expression.is_Integer else None
    return value if isinstance(value, int) else None


class ConstantFolder:
    """Evaluates the subgraphs of one graph that depend on no input."""

    def __init__(self, effects: Effects) -> None:
        self._effects = effects
        self._constant: dict[fx.Node, bool] = {}
        self._cones: dict[tuple[fx.Node, fx.Node | None], list[fx.Node] | None] = {}

    def cone(self, node: fx.Node, reader: fx.Node) -> list[fx.Node] | None:
        """The nodes whose evaluation, in this order, gives what ``reader`` reads in ``node``.

        Writes to any of them are among them. None when it is not provably a constant.
        """
        if not self._is_constant(node):
            return None
        key = (node, self._effects.latest(node, reader))
        if key not in self._cones:
            self._cones[key] = self._closure(node, reader)
        return self._cones[key]

    def value(self, node: fx.Node, cone: Sequence[fx.Node]) -> Tensor | None:
        """The value of ``node`` after its cone ran, computed with real tensors on the CPU.

        None when something is not of the dtype and shape that the tracer saw, which happens where
        autocast was on, or does not share memory as there.
        """
        writes = any(may_mutate(member) for member in cone)
        last = Counter(source for member in cone for source in _sources(member))
        last[node] += 1
        values: dict[fx.Node, Any] = {}
        with real_tensors():
            for member in cone:
                result = run(member, values)
                if not _is_as_traced(member, result):
                    return None
                if writes and not self._shares_as_traced(member, result, values):
                    return None
                values[member] = result
                for source in _sources(member):
                    last[source] -= 1
                    if not last[source]:
                        del values[source]  # masks of long sequences are large
        result = values[node]
        assert isinstance(result, Tensor)
        return result

    def _is_constant(self, root: fx.Node) -> bool:
        """Whether no input reaches a node through arguments; writes are looked at later."""
        stack = [root]
        while stack:
            node = stack[-1]
            if node in self._constant:
                stack.pop()
                continue
            if not _is_foldable(node):
                self._constant[node] = False
                continue
            waiting = [source for source in _sources(node) if source not in self._constant]
            if waiting:
                stack.extend(waiting)
                continue
            self._constant[node] = all(self._constant[source] for source in _sources(node))
        return self._constant[root]

    def _closure(self, root: fx.Node, reader: fx.Node) -> list[fx.Node] | None:
        """The cone of a node with every write that its reader sees; None if one is not known."""
        effects = self._effects
        until = {root: reader}  # until which node writes to a value matter
        stack = [root]

        def matters(node: fx.Node, end: fx.Node) -> None:
            if node not in until or effects.position(until[node]) < effects.position(end):
                until[node] = end
                stack.append(node)

        while stack:
            node = stack.pop()
            end = until[node]
            if not self._is_constant(node):
                return None
            for source in _sources(node):
                matters(source, end if effects.shares_memory(node, source) else node)
            for write in effects.written_before(node, end):
                matters(write, write)
        return sorted(until, key=effects.position)

    def _shares_as_traced(self, node: fx.Node, result: Any, values: Mapping[fx.Node, Any]) -> bool:
        """Whether a result lies in the memory of an argument exactly where the traced one did.

        It may not where a constant moves between devices.
        """
        if not isinstance(result, Tensor):
            return True
        for source in _sources(node):
            given = values[source]
            if not isinstance(given, Tensor):
                continue
            real = torch._C._is_alias_of(result, given)  # type: ignore[attr-defined]
            if real != self._effects.shares_memory(node, source):
                return False
        return True


def _sources(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values evaluation needs: not those read for their dtype and shape alone."""
    if literal(node) is not None:
        return []
    skipped = _prototype(node)
    return [source for source in node.all_input_nodes if source is not skipped]


def _prototype(node: fx.Node) -> fx.Node | None:
    """The argument that only says dtype, device and shape, unless the values come in elsewhere."""
    if operation(node) not in _LIKE_DTYPE | _LIKE_SHAPE:
        return None
    given = argument(node, 0, "input", node.kwargs.get("self"))
    again = [*node.args[1:], *(node.kwargs[key] for key in node.kwargs if key != "input")]
    used = given in again or tensor_of(given) is None
    return None if used or not isinstance(given, fx.Node) else given


def run(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """One operation on real tensors, on the CPU: a constant is the same on every device."""
    number = literal(node)
    if number is not None:
        return number
    prototype = _prototype(node)

    def real(part: Any) -> Any:
        if isinstance(part, fx.Node):
            return _stand_in(node, part) if part is prototype else values[part]
        return torch.device("cpu") if isinstance(part, torch.device) else part

    args: Any = map_aggregate(node.args, real)
    kwargs: Any = map_aggregate(node.kwargs, real)
    if "device" in kwargs:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if operation(node) == "to":
        args = tuple("cpu" if isinstance(part, str) else part for part in args)
    if node.op == "call_method":
        owner, *rest = args
        return getattr(owner, str(node.target))(*rest, **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _stand_in(node: fx.Node, prototype: fx.Node) -> Tensor:
    tensor = tensor_of(prototype)
    assert tensor is not None
    shape = tensor.shape if operation(node) in _LIKE_SHAPE else ()
    return torch.empty((), dtype=tensor.dtype).expand(shape)


@contextlib.contextmanager
def real_tensors() -> Iterator[None]:
    """Compute with real tensors while a tracer's modes are active; no gradient, no autocast."""
    with (
        _disable_current_modes(),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
    ):
        yield


def _is_foldable(node: fx.Node) -> bool:
    """Whether a node can be evaluated, given its arguments."""
    if literal(node) is not None:
        return True
    if node.op not in ("call_function", "call_method"):
        return False
    writes = is_pure_in_place(node)
    if not (writes or is_pure(node)):
        return False
    tensor = tensor_of(node)
    if tensor is None:
        return writes or operation(node) in _TUPLES
    if tensor.requires_grad or not is_plain(tensor):
        return False
    return all(isinstance(size, int) for size in tensor.shape) and is_held(tensor.numel())


def _is_as_traced(node: fx.Node, result: Any) -> bool:
    traced = tensor_of(node)
    if traced is None or not isinstance(result, Tensor):
        return traced is None and not isinstance(result, Tensor)
    return result.dtype == traced.dtype and result.shape == traced.shape


def signature(node: fx.Node, cone: Sequence[fx.Node]) -> str:
    """A text that two constants share only if they are computed alike: layers repeat theirs."""
    number = {member: at for at, member in enumerate(cone)}

    def name(part: fx.Node) -> object:
        if part in number:
            return f"%{number[part]}"
        tensor = tensor_of(part)  # a prototype
        assert tensor is not None
        return (tensor.dtype, tuple(tensor.shape))

    lines = [f"%{number[node]}"]
    for member in cone:
        given = literal(member)
        if given is None:
            called = member.target if isinstance(member.target, str) else id(member.target)
            arguments = fx.map_arg((member.args, member.kwargs), lambda part: _Text(name(part)))
            tensor = tensor_of(member)
            lines.append(f"{called} {arguments} {None if tensor is None else tensor.dtype}")
        else:
            lines.append(repr(given))
    return "\n".join(lines)


class _Text(str):
    """Text in the place of a node: shown without quotes, so that no string looks like it."""

    __slots__ = ()

    def __new__(cls, value: object) -> _Text:
        return super().__new__(cls, value)

    def __repr__(self) -> str:
        return str(self)
