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
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import maybe_get_fake_mode
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sage_compiler.errors import InvalidAttentionError, RewriteError
from sage_compiler.passes.masks import is_pure
from sage_compiler.passes.normalize import tensor_of
from sage_compiler.passes.rotary import Rotation
from sage_compiler.passes.site import AttentionSite
from sage_compiler.passes.values import RESULT, Value, emit, nodes_of
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
        step_index, step_recipes: the tensor that holds the range of timesteps at run time, and the
            recipe of each range; None and empty: ``recipe`` serves all of them.
        guard: the operator's guard, "" for none.
        rotation: what the operator rotates itself; None: query and key are what the site says.
    """

    site: AttentionSite
    recipe: str
    min_seq_len: int = 0
    step_index: Tensor | None = None
    step_recipes: tuple[str, ...] = ()
    guard: str = ""
    rotation: Rotation | None = None


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
    for replacement in replacements:  # only now: a site may read what another one made superfluous
        if replacement.site not in failures:
            _erase(graph, replacement.site)
    try:
        graph.lint()
    except RuntimeError as error:
        first_line = str(error).partition("\n")[0]
        raise RewriteError(f"the rewritten graph is not well formed: {first_line}") from error
    return failures


def _replace(
    graph: fx.Graph, replacement: Replacement, now: dict[fx.Node, fx.Node], trial: _Trial
) -> str | None:
    """Insert the operator before the site's output and let it take its place; or say why not."""
    site = replacement.site
    old = site.output
    inserted: list[fx.Node] = []
    expected = tensor_of(old)
    assert expected is not None
    casts = site.autocasts and any(
        _value(now.get(node, node)).dtype != expected.dtype
        for given in (site.query, site.key, site.value)
        for node in nodes_of(given)
    )
    with graph.inserting_before(old):

        def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
            node = graph.call_function(target, args, kwargs)
            values = fx.map_arg((args, kwargs), _value)
            node.meta = {key: old.meta[key] for key in _INHERITED if key in old.meta}
            node.meta[LAYER_KEY] = site.layer
            node.meta[_value_key(old)] = trial.run(target, *values, expected, casts)
            inserted.append(node)
            return node

        try:
            index = None
            if replacement.step_recipes:
                index = _index_of_step(graph, replacement, _value_key(old), expected)
                inserted.append(index)
            new = _call_operator(call, replacement, now, index)
            new = _finish(call, site.result, new, now)
            if expected.dim() == 3 and site.result is RESULT:
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
    # Its example value too: just checked to be alike.
    new.meta = old.meta | {LAYER_KEY: site.layer}
    old.replace_all_uses_with(new)
    now[old] = new  # a later site may read this one
    return None


LAYER_KEY: Final = "sage_layer"  # of the metadata of inserted nodes: the layer they belong to

# Where a replaced node came from, for whoever reads the new graph.
_INHERITED: Final = ("stack_trace", "nn_module_stack", "source_fn_stack", "custom")


def _finish(call: Any, result: Value, made: fx.Node, now: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """What a site does with the operator's output."""

    def replace(part: Any) -> Any:
        return made if part is RESULT else now.get(part, part)

    final: fx.Node = emit(result, replace, call)
    return final


def _call_operator(
    call: Any, replacement: Replacement, now: Mapping[fx.Node, fx.Node], index: fx.Node | None
) -> fx.Node:
    site = replacement.site
    semantics = site.semantics

    done: dict[int, fx.Node] = {}  # what query, key and value share is computed once

    def build(value: Value | None) -> Any:
        return emit(value, lambda node: now.get(node, node), call, done)

    rotation = replacement.rotation
    of_query = None if rotation is None else rotation.query
    of_key = None if rotation is None else rotation.key
    query, key, value = (
        build(each)
        for each in (
            site.query if of_query is None else of_query.source,
            site.key if of_key is None else of_key.source,
            site.value,
        )
    )
    if _value(query).dim() == 3:
        query, key, value = (call(_aten.unsqueeze.default, node, 0) for node in (query, key, value))
    query, key, value = _share_batch(call, query, key, value)
    # In the order of the operator's schema; trailing defaults are left out.
    arguments: list[tuple[Any, Any]] = [
        (build(site.mask.value), None),
        (str(semantics.mask_class), "none"),
        (semantics.scale, None),
        (replacement.recipe, EXACT),
        (replacement.min_seq_len, 0),
        (str(semantics.dead_rows), "zero"),
        (semantics.softcap, None),
        (build(site.sinks), None),
        (semantics.window_left, UNBOUNDED),
        (semantics.window_right, UNBOUNDED),
        (None, None),  # cu_seqlens_q
        (None, None),  # cu_seqlens_k
        (index, None),  # step
        (list(replacement.step_recipes) or None, None),
        (replacement.guard, ""),
    ]
    while arguments and arguments[-1][0] == arguments[-1][1]:
        arguments.pop()
    given = [value for value, _ in arguments]
    operator = torch.ops.sage.attention.default
    if rotation is not None:
        operator = torch.ops.sage.rotary_attention.default
        tables = [
            build(table)
            for side in (of_query, of_key)
            for table in ((None, None) if side is None else (side.cosine, side.sine))
        ]
        dtype = str(rotation.dtype).removeprefix("torch.")
        given = [*tables, str(rotation.pairs), rotation.channels, dtype, *given]
    if not site.without_autocast:
        new: fx.Node = call(operator, query, key, value, *given)
        return new
    with _outside_autocast(call, _value(query).device.type):
        new = call(operator, query, key, value, *given)
    return new


@contextlib.contextmanager
def _outside_autocast(call: Any, device_type: str) -> Iterator[None]:
    """Nodes that switch autocast off and on again, as Dynamo writes them."""
    entered = call(_enter_autocast, device_type, None, False, None)
    yield
    call(_exit_autocast, entered)


def _index_of_step(
    graph: fx.Graph, replacement: Replacement, value_key: str, output: Tensor
) -> fx.Node:
    """A node for the tensor that holds the range of timesteps: a buffer, read in every call."""
    tensor, root = replacement.step_index, graph.owning_module
    assert tensor is not None and root is not None
    name = f"sage_step_of_{len(replacement.step_recipes)}"
    if not hasattr(root, name):
        root.register_buffer(name, tensor, persistent=False)
        # Dynamo's graphs say of every buffer where it comes from; others have no such table.
        sources = getattr(root, "_param_name_to_source", None)
        if sources is not None:
            sources[name] = ConstantSource(name)
    node = graph.get_attr(name)
    fake_mode = maybe_get_fake_mode(output)
    node.meta[value_key] = tensor if fake_mode is None else fake_mode.from_tensor(tensor)
    node.meta[LAYER_KEY] = replacement.site.layer
    return node


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
        if target in (_enter_autocast, _exit_autocast):
            return None  # modes: what is tried between them runs outside autocast anyway
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
    """Whether strides are provably the same where they matter: not in dims of size 1."""
    return all(
        _is_one(size) or statically_known_true(ours == theirs)
        for size, ours, theirs in zip(
            expected.shape, actual.stride(), expected.stride(), strict=True
        )
    )


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


def _erase(graph: fx.Graph, site: AttentionSite) -> None:
    """Erase what only the replaced attention used: its own nodes, mask arithmetic, repeats.

    Its own nodes may change each other in place, which nobody sees; of the others, none with a
    side effect is erased.
    """
    sources = list(site.output.all_input_nodes)
    graph.erase_node(site.output)
    position = {node: at for at, node in enumerate(site.interior)}
    for node in sorted(site.interior, key=position.__getitem__, reverse=True):
        _erase_unused(graph, list(node.users))
        sources += node.all_input_nodes
        if not node.users and not node._erased:
            graph.erase_node(node)
    _erase_unused(graph, sources)


def _erase_unused(graph: fx.Graph, nodes: list[fx.Node]) -> None:
    """Erase what only the replaced node used: mask arithmetic and repeats, never a side effect."""
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if not node.users and is_pure(node) and not node._erased:
            stack.extend(node.all_input_nodes)
            graph.erase_node(node)
