"""Replace proved sites by sage::attention.

Every replacement is checked by running it on fake tensors: shape, dtype and strides must be
those of the value it replaces, because what comes after was traced with them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, fx
from torch._prims_common import check_significant_strides
from torch._subclasses.fake_tensor import maybe_get_fake_mode
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sage_compiler.errors import InvalidAttentionError, RewriteError
from sage_compiler.passes.masks import is_pure
from sage_compiler.passes.normalize import tensor_of
from sage_compiler.passes.site import AttentionSite
from sage_compiler.precision import EXACT
from sage_compiler.semantics import UNBOUNDED

_aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Replacement:
    """How one site is to be rewritten.

    Attributes:
        site: the proved attention.
        recipe: a recipe's name, "exact" or "auto".
        min_seq_len: the operator's run-time gate for lengths not known here; 0: none, -1: that of
            its kernel.
    """

    site: AttentionSite
    recipe: str
    min_seq_len: int = 0


def rewrite(graph: fx.Graph, replacements: list[Replacement]) -> dict[AttentionSite, str]:
    """Replace sites in place; each one wholly, or not at all.

    Args:
        graph: edited.
        replacements: sites of this graph, in its order.

    Returns:
        For each site whose replacement failed its check, the reason; it keeps its nodes.

    Raises:
        RewriteError: the edited graph is not well formed; the caller takes the edit back.
    """
    failures: dict[AttentionSite, str] = {}
    now: dict[fx.Node, fx.Node] = {}  # replaced nodes, and what replaced them
    trial = _Trial()
    for replacement in replacements:
        reason = _replace(graph, replacement, now, trial)
        if reason is not None:
            failures[replacement.site] = reason
    try:
        graph.lint()
    except RuntimeError as error:
        first_line = str(error).partition("\n")[0]
        raise RewriteError(f"the rewritten graph is not well formed: {first_line}") from error
    return failures


def _replace(
    graph: fx.Graph, replacement: Replacement, now: dict[fx.Node, fx.Node], trial: _Trial
) -> str | None:
    """Insert the operator before the site's node and let it take its place; or say why not."""
    site = replacement.site
    old = site.node
    inputs = [tensor_of(now.get(node, node)) for node in (site.query, site.key, site.value)]
    inserted: list[fx.Node] = []
    expected = tensor_of(old)
    assert expected is not None
    casts = any(tensor is not None and tensor.dtype != expected.dtype for tensor in inputs)
    with graph.inserting_before(old):

        def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
            node = graph.call_function(target, args, kwargs)
            values = fx.map_arg((args, kwargs), _value)
            node.meta = {key: old.meta[key] for key in _INHERITED if key in old.meta}
            node.meta[_value_key(old)] = trial.run(target, *values, expected, casts)
            inserted.append(node)
            return node

        try:
            new = _call_operator(call, replacement, now)
            if expected.dim() == 3:
                new = call(_aten.squeeze.dim, new, 0)
            if not _same_strides(_value(new), expected):
                new = _lay_out(call, new, expected)
            reason = _difference(_value(new), expected)
        except InvalidAttentionError as error:
            reason = str(error)
    if reason is not None:
        for node in reversed(inserted):
            graph.erase_node(node)
        return f"the replacement failed its check: {reason}"
    new.meta = dict(old.meta)  # its example value too: just checked to be alike
    old.replace_all_uses_with(new)
    now[old] = new  # a later site may read this one
    sources = old.all_input_nodes
    graph.erase_node(old)
    _erase_unused(graph, sources)
    return None


# Where a replaced node came from, for whoever reads the new graph.
_INHERITED: Final = ("stack_trace", "nn_module_stack", "source_fn_stack", "custom")


def _call_operator(call: Any, replacement: Replacement, now: Mapping[fx.Node, fx.Node]) -> fx.Node:
    site = replacement.site
    semantics = site.semantics
    query, key, value = (now.get(node, node) for node in (site.query, site.key, site.value))
    if _value(query).dim() == 3:
        query, key, value = (call(_aten.unsqueeze.default, node, 0) for node in (query, key, value))
    query, key, value = _share_batch(call, query, key, value)
    mask = site.mask.node
    # In the order of the operator's schema; trailing defaults are left out.
    arguments: list[tuple[Any, Any]] = [
        (None if mask is None else now.get(mask, mask), None),
        (str(semantics.mask_class), "none"),
        (semantics.scale, None),
        (replacement.recipe, EXACT),
        (str(semantics.dead_rows), "zero"),
        (semantics.softcap, None),
        (None, None),  # sinks
        (semantics.window_left, UNBOUNDED),
        (semantics.window_right, UNBOUNDED),
        (None, None),  # cu_seqlens_q
        (None, None),  # cu_seqlens_k
        (None, None),  # step
        (None, None),  # step_recipes
        (replacement.min_seq_len, 0),
    ]
    while arguments and arguments[-1][0] == arguments[-1][1]:
        arguments.pop()
    given = [value for value, _ in arguments]
    new: fx.Node = call(torch.ops.sage.attention.default, query, key, value, *given)
    return new


def _share_batch(
    call: Any, query: fx.Node, key: fx.Node, value: fx.Node
) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Expand a batch of 1, as scaled_dot_product_attention broadcasts it; no copy."""
    batch, key_batch = _value(query).shape[0], _value(key).shape[0]
    if isinstance(key_batch, int) and key_batch == 1 and not _is_one(batch):
        key, value = (
            call(_aten.expand.default, node, [_size(call, query), -1, -1, -1])
            for node in (key, value)
        )
    elif _is_one(batch) and not _is_one(key_batch):
        query = call(_aten.expand.default, query, [_size(call, key), -1, -1, -1])
    return query, key, value


def _lay_out(call: Any, node: fx.Node, like: Tensor) -> fx.Node:
    """A copy whose dims follow each other in memory as those of ``like`` do."""

    def outer_first(a: int, b: int) -> int:
        outer, inner = like.stride(a), like.stride(b)
        return statically_known_true(outer < inner) - statically_known_true(outer > inner)

    order = sorted(range(like.dim()), key=functools.cmp_to_key(outer_first))
    ordered = order == list(range(like.dim()))
    if not ordered:
        node = call(_aten.permute.default, node, order)
    node = call(_aten.clone.default, node, memory_format=torch.contiguous_format)
    if not ordered:
        node = call(_aten.permute.default, node, [order.index(dim) for dim in range(like.dim())])
    return node


def _is_one(size: int | torch.SymInt) -> bool:
    return isinstance(size, int) and size == 1


def _size(call: Any, node: fx.Node) -> Any:
    """The batch size of a node: a number, or a node that computes it."""
    size = _value(node).shape[0]
    return size if isinstance(size, int) else call(_aten.sym_size.int, node, 0)


def _value_key(node: fx.Node) -> str:
    return "val" if "val" in node.meta and "example_value" not in node.meta else "example_value"


def _value(node: fx.Node) -> Any:
    return node.meta.get("example_value", node.meta.get("val"))


class _Trial:
    """Runs inserted calls on fake tensors. The layers of a model are alike: each once."""

    def __init__(self) -> None:
        self._results: dict[Any, Any] = {}

    def run(self, target: Any, args: Any, kwargs: Any, output: Tensor, casts: bool) -> Any:
        """The result of a call at a site with this output, where autocast cast or did not."""
        key = _description((target, args, kwargs, output, casts))
        if key is not None and key in self._results:
            return self._results[key]
        with _tracing(output, casts):
            result = target(*args, **kwargs)
        if key is not None:
            self._results[key] = result
        return result


def _description(value: Any) -> Any:
    """What the fake result of a call depends on, hashable; None where symbols are involved."""
    if isinstance(value, Tensor):
        sizes = (*value.shape, *value.stride())
        if not all(isinstance(size, int) for size in sizes):
            return None
        return (sizes, value.dtype, value.device, maybe_get_fake_mode(value))
    if isinstance(value, dict):
        value = tuple(value.items())
    if isinstance(value, (tuple, list)):
        parts = tuple(_description(part) for part in value)
        return None if None in parts else parts
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return None
    return (type(value), value)


@contextlib.contextmanager
def _tracing(output: Tensor, casts: bool) -> Iterator[None]:
    """The modes under which the site was traced: its fake mode, and autocast where it cast."""
    fake_mode = maybe_get_fake_mode(output)
    device = output.device.type
    with contextlib.ExitStack() as stack:
        if fake_mode is not None:
            stack.enter_context(fake_mode)
        stack.enter_context(torch.no_grad())
        if casts:
            stack.enter_context(torch.autocast(device, dtype=output.dtype))
        elif torch.amp.is_autocast_available(device):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


def _same_strides(actual: Tensor, expected: Tensor) -> bool:
    return bool(check_significant_strides(actual, expected, only_cuda=False)[0])


def _difference(actual: Tensor, expected: Tensor) -> str | None:
    if tuple(actual.shape) != tuple(expected.shape):
        return f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if actual.dtype != expected.dtype:
        return f"dtype {actual.dtype}, expected {expected.dtype}"
    if actual.device != expected.device:
        return f"device {actual.device}, expected {expected.device}"
    if not _same_strides(actual, expected):
        return f"strides {actual.stride()}, expected {expected.stride()}"
    return None


def _erase_unused(graph: fx.Graph, nodes: list[fx.Node]) -> None:
    """Erase what only the replaced node used: mask arithmetic and repeats, never a side effect."""
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if not node.users and is_pure(node) and not node._erased:
            stack.extend(node.all_input_nodes)
            graph.erase_node(node)
