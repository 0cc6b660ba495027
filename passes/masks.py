"""What a mask is, with a proof: constant subgraphs are evaluated and compared with bands.

Whatever is not proved stays an explicit mask, which is correct and still fused.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate
from torch.utils._python_dispatch import _disable_current_modes

from sage_compiler.passes.normalize import is_plain, may_alias, may_mutate, operation, tensor_of
from sage_compiler.passes.site import Mask, Shape
from sage_compiler.semantics import UNBOUNDED, MaskClass

FOLD_LIMIT: Final = 1 << 26  # elements of one constant that folding will hold

# Deterministic operations without side effects, by bare name. Only these are evaluated.
_PURE: Final = frozenset(
    [
        "abs",
        "add",
        "alias",
        "and_",
        "arange",
        "bitwise_and",
        "bitwise_not",
        "bitwise_or",
        "bitwise_xor",
        "bool",
        "cat",
        "clamp",
        "clone",
        "contiguous",
        "cumsum",
        "detach",
        "diag",
        "diff",
        "div",
        "eq",
        "expand",
        "expand_as",
        "eye",
        "flatten",
        "flip",
        "float",
        "floordiv",
        "full",
        "full_like",
        "ge",
        "getitem",
        "gt",
        "half",
        "bfloat16",
        "int",
        "invert",
        "isfinite",
        "isinf",
        "le",
        "linspace",
        "logical_and",
        "logical_not",
        "logical_or",
        "logical_xor",
        "long",
        "lt",
        "masked_fill",
        "max",
        "maximum",
        "meshgrid",
        "min",
        "minimum",
        "mod",
        "mul",
        "narrow",
        "ne",
        "neg",
        "new_full",
        "new_ones",
        "new_tensor",
        "new_zeros",
        "not_",
        "ones",
        "ones_like",
        "or_",
        "permute",
        "pow",
        "remainder",
        "repeat",
        "repeat_interleave",
        "reshape",
        "roll",
        "rsub",
        "scalar_tensor",
        "select",
        "slice",
        "split",
        "squeeze",
        "stack",
        "sub",
        "t",
        "to",
        "transpose",
        "tril",
        "triu",
        "truediv",
        "type",
        "type_as",
        "unflatten",
        "unsqueeze",
        "view",
        "where",
        "xor",
        "zeros",
        "zeros_like",
        "__add__",
        "__and__",
        "__eq__",
        "__ge__",
        "__getitem__",
        "__gt__",
        "__invert__",
        "__le__",
        "__lt__",
        "__mul__",
        "__ne__",
        "__neg__",
        "__or__",
        "__radd__",
        "__rsub__",
        "__sub__",
        "__xor__",
        "_to_copy",
        "lift_fresh_copy",
    ]
)


@dataclass(frozen=True, slots=True)
class Analysis:
    """What the operator is told of a mask."""

    mask: Mask
    mask_class: MaskClass = MaskClass.NONE
    window_left: int = UNBOUNDED
    window_right: int = UNBOUNDED


class ConstantFolder:
    """Evaluates the subgraphs of one graph that depend on no input, each once.

    A subgraph folds when it consists of pure operations on literals, is small enough, and
    nothing that may alias one of its values is mutated anywhere in the graph.
    """

    def __init__(self) -> None:
        self._constant: dict[fx.Node, bool] = {}
        self._verdicts: dict[tuple[fx.Node, Shape], Analysis | None] = {}

    def cone(self, node: fx.Node) -> list[fx.Node] | None:
        """The nodes that compute a constant, inputs first; None when it is not provably one."""
        if not self._is_constant(node):
            return None
        found: dict[fx.Node, None] = {}
        stack = [(node, False)]
        while stack:
            current, expanded = stack.pop()
            if expanded:
                found[current] = None
            elif current not in found:
                stack.append((current, True))
                stack.extend((source, False) for source in current.all_input_nodes)
        if any(_mutated(member) for member in found):
            return None
        return list(found)

    def value(self, cone: list[fx.Node]) -> Tensor | None:
        """The value of the cone's last node, computed with real tensors.

        None when it is not of the dtype and shape that the tracer saw, which happens where
        autocast was on.
        """
        waiting = Counter(source for node in cone for source in node.all_input_nodes)
        values: dict[fx.Node, Any] = {}
        with _real_tensors():
            for node in cone:
                values[node] = _run(node, values)
                for source in node.all_input_nodes:
                    waiting[source] -= 1
                    if not waiting[source]:
                        del values[source]  # masks of long sequences are large
        result, traced = values[cone[-1]], tensor_of(cone[-1])
        assert isinstance(result, Tensor) and traced is not None
        same = result.dtype == traced.dtype and result.shape == traced.shape
        return result if same else None

    def analyze(self, node: fx.Node, query_length: int, key_length: int) -> Analysis | None:
        """The proved class of a constant mask, or None when it is none of those known."""
        key = (node, (query_length, key_length))
        if key not in self._verdicts:
            cone = self.cone(node)
            found = None
            value = None if cone is None else self.value(cone)
            if cone is not None and value is not None:
                origin = f"folded from {len(cone)} constant nodes"
                found = classify(value, query_length, key_length, origin)
            self._verdicts[key] = found
        return self._verdicts[key]

    def _is_constant(self, root: fx.Node) -> bool:
        stack = [root]
        while stack:
            node = stack[-1]
            if node in self._constant:
                stack.pop()
                continue
            if not _foldable(node):
                self._constant[node] = False
                continue
            waiting = [source for source in node.all_input_nodes if source not in self._constant]
            if waiting:
                stack.extend(waiting)
                continue
            self._constant[node] = all(self._constant[s] for s in node.all_input_nodes)
        return self._constant[root]


def _run(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """One operation on real tensors, on the CPU: a constant is the same on every device."""

    def real(part: Any) -> Any:
        if isinstance(part, fx.Node):
            return values[part]
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


@contextlib.contextmanager
def _real_tensors() -> Iterator[None]:
    """Real arithmetic while a tracer's modes may be active, without a gradient or autocast."""
    with (
        _disable_current_modes(),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
    ):
        yield


def is_pure(node: fx.Node) -> bool:
    """Whether a node is a deterministic operation without side effects."""
    called = node.op in ("call_function", "call_method")
    return called and operation(node) in _PURE and not may_mutate(node)


def _foldable(node: fx.Node) -> bool:
    if not is_pure(node):
        return False
    tensor = tensor_of(node)
    if tensor is None:
        # A tuple (meshgrid, split) or a number; its tensors are checked where they are taken.
        return operation(node) in ("meshgrid", "split", "max", "min")
    if tensor.requires_grad or not is_plain(tensor):
        return False
    return all(isinstance(size, int) for size in tensor.shape) and tensor.numel() <= FOLD_LIMIT


def _mutated(node: fx.Node) -> bool:
    """Whether anything that may alias this node's value is changed in place."""
    seen = {node}
    stack = [node]
    while stack:
        current = stack.pop()
        for user in current.users:
            if may_mutate(user):
                return True
            if user not in seen and user.op != "output" and may_alias(user, current):
                seen.add(user)
                stack.append(user)
    return False


def classify(mask: Tensor, query_length: int, key_length: int, origin: str) -> Analysis | None:
    """Prove that a mask, broadcastable to (..., Lq, Lk), is a band; None when it is not.

    A float mask counts as boolean only when it holds nothing but 0 and -inf, or 0 and the
    dtype's finite minimum with a live key in every row: a row wholly at a finite minimum is a
    uniform average, not a dead row.
    """
    visible = _as_bool(mask)
    if visible is None:
        return None
    for dim in range(visible.dim() - 2):
        if visible.stride(dim) == 0:  # expanded: one is all
            visible = visible.narrow(dim, 0, min(1, visible.shape[dim]))
    planes = visible.flatten(0, -3) if visible.dim() > 2 else visible.unsqueeze(0)
    if planes.shape[0] == 0 or not bool((planes[1:] == planes[:1]).all()):
        return None
    size = (query_length, key_length)
    plane = planes[0].expand(size)
    if bool(plane.all()):
        return Analysis(Mask(None, "none", f"{origin}: every entry of {size} is visible"))
    diagonals = _diagonals(plane)
    return None if diagonals is None else _band(*diagonals, query_length, key_length, origin)


def _diagonals(plane: Tensor) -> tuple[int, int] | None:
    """low, high when bool (Lq, Lk) is exactly ``low <= key - query <= high``; else None.

    Row by row from the first and the last visible key, without an integer matrix.
    """
    query_length, key_length = plane.shape
    count = plane.sum(1)
    live = count > 0
    if not bool(live.any()):
        return None
    query = torch.arange(query_length)
    bytes_ = plane.contiguous().view(torch.uint8)
    first = bytes_.argmax(1)
    last = key_length - 1 - bytes_.flip(1).argmax(1)
    low, high = int((first - query)[live].min()), int((last - query)[live].max())
    band_first = (query + low).clamp(min=0)
    band_last = (query + high).clamp(max=key_length - 1)
    whole = bool((count == (band_last - band_first + 1).clamp(min=0)).all())
    inside = (first == band_first) & (last == band_last)
    return (low, high) if whole and bool(inside[live].all()) else None


def _band(low: int, high: int, query_length: int, key_length: int, origin: str) -> Analysis | None:
    """The band of visible diagonals low..high (key minus query) in the operator's words.

    Both corners can often say it; the one in whose words the mask ends at the diagonal, as
    causal ones do, comes first.
    """
    size = (query_length, key_length)
    bounded_left, bounded_right = low > 1 - query_length, high < key_length - 1
    corners = [
        (0, MaskClass.WINDOW, MaskClass.CAUSAL),
        (key_length - query_length, MaskClass.WINDOW_BOTTOM_RIGHT, MaskClass.CAUSAL_BOTTOM_RIGHT),
    ]
    for offset, windowed, causal in sorted(corners, key=lambda corner: corner[0] != high):
        if (bounded_left and low > offset) or (bounded_right and high < offset):
            continue  # the diagonal itself is hidden: a window from this corner cannot say that
        left = offset - low if bounded_left else UNBOUNDED
        right = high - offset if bounded_right else UNBOUNDED
        if left == UNBOUNDED and right == 0:
            proof = f"{origin}: equals tril(ones{size}, diagonal={offset})"
            return Analysis(Mask(None, _words(causal), proof), causal)
        sides = ["unbounded" if side == UNBOUNDED else str(side) for side in (left, right)]
        proof = f"{origin}: equals the band {low} <= key - query <= {high} of {size}"
        text = f"{_words(windowed)} ({sides[0]}, {sides[1]})"
        return Analysis(Mask(None, text, proof), windowed, left, right)
    return None


def _words(mask_class: MaskClass) -> str:
    return str(mask_class).replace("_bottom_right", " bottom-right")


def _as_bool(mask: Tensor) -> Tensor | None:
    """True where visible, if the mask says nothing but visible and hidden."""
    if mask.dim() < 2:
        mask = mask.reshape((1,) * (2 - mask.dim()) + tuple(mask.shape))
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        return None
    visible = mask == 0
    if bool((visible | (mask == -torch.inf)).all()):
        return visible
    finite = visible | (mask <= torch.finfo(mask.dtype).min)
    return visible if bool(finite.all() & visible.any(-1).all()) else None


def describe(node: fx.Node, why: str) -> Mask:
    """An explicit mask: its dtype and shape, and what it depends on."""
    tensor = tensor_of(node)
    assert tensor is not None
    kind = "bool" if tensor.dtype == torch.bool else "additive"
    sizes = ", ".join(str(size) for size in tensor.shape)
    return Mask(node, f"explicit {kind} ({sizes})", why)


def root_cause(node: fx.Node) -> str:
    """Why a mask is no constant: the first tensor input that it depends on, or what else."""
    seen: set[fx.Node] = set()
    stack = [node]
    inputs = []
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.op in ("placeholder", "get_attr"):
            inputs.append(current)
        stack.extend(current.all_input_nodes)
    if not inputs:
        return "it is computed by operations that are not folded"
    data = [found for found in inputs if found.op == "get_attr" or tensor_of(found) is not None]
    if not data:
        return "it depends on sizes that vary"
    return f"it depends on the input {min(data).target}"
