"""Rotary embedding between a projection and an attention: found, proved, and left to the operator.

Where a kernel rotates Q and K as it reads them, the rotation in the graph is one pass over both too
many. It is taken out only where every channel is proved (``channels``), nobody else needs what was
rotated, and nothing changes in place on the way; else it stays in front of the operator.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sage_compiler.passes.channels import NO_TABLE, Channels, Form, Sum, Table, Term, Unknown
from sage_compiler.passes.normalize import operation, tensor_of
from sage_compiler.passes.purity import is_pure
from sage_compiler.passes.site import AttentionSite
from sage_compiler.passes.values import Apply, Value
from sage_compiler.passes.walk import Walk
from sage_compiler.semantics import DTYPES, RotaryPairs

_aten = torch.ops.aten

_DEPTH: Final = 24  # operations between what is rotated and the attention
_NODES: Final = 64  # that are looked at
_LARGEST: Final = 256  # head_dim that kernels take


@dataclass(frozen=True, eq=False, slots=True)
class Rotated:
    """Query or key before its rotation.

    Attributes:
        source: (B, heads, L, D), of the dtype that it has after it.
        cosine, sine: as the operator takes them.
    """

    source: Value
    cosine: Value
    sine: Value


@dataclass(frozen=True, slots=True)
class Rotation:
    """What the operator rotates itself.

    Attributes:
        pairs, channels: which channels make a pair, and how many are rotated.
        dtype: in which the model computes products and sums.
        query, key: None where it is not rotated, or stays so in the graph.
    """

    pairs: RotaryPairs
    channels: int
    dtype: torch.dtype
    query: Rotated | None
    key: Rotated | None


def find_rotation(site: AttentionSite, walk: Walk) -> tuple[Rotation | None, str]:
    """The rotation of a site's query and key, if there is one to take out, and a text on it.

    The text is for reports: ``fused (half, 64 of 64 channels)``, or why something is not; empty
    where nothing looks like a rotation.
    """
    query, key = (_rotated(value, site, walk) for value in (site.query, site.key))
    reasons = [
        f"{name}: {found}" for name, found in (("query", query), ("key", key)) if _is_reason(found)
    ]
    first = next((each for each in (query, key) if isinstance(each, _Proved)), None)
    if first is None:
        return None, f"not fused ({'; '.join(reasons)})" if reasons else ""
    if isinstance(query, _Proved) and isinstance(key, _Proved) and query.how != key.how:
        reasons.append("key: rotated in another way than the query")
        key = None
    sides = [each.side if isinstance(each, _Proved) else None for each in (query, key)]
    pairs, channels, dtype = first.how
    words = f"{pairs}, {channels} of {site.q_shape[3]} channels"
    if None in sides:
        words += ", query alone" if sides[0] is not None else ", key alone"
    text = "; ".join([f"fused ({words})", *reasons])
    return Rotation(pairs, channels, dtype, *sides), text


@dataclass(frozen=True, slots=True)
class _Proved:
    how: tuple[RotaryPairs, int, torch.dtype]
    side: Rotated


def _is_reason(found: object) -> bool:
    return isinstance(found, str)


def _rotated(value: Value, site: AttentionSite, walk: Walk) -> _Proved | str | None:
    """The rotation of one side; why it is none, where it looks like one; None where it does not."""
    end = _unshaped(value)
    if end is None:
        return None
    tensor = tensor_of(end)
    if tensor is None or tensor.dim() != 4 or tensor.dtype not in DTYPES:
        return None
    head_dim = tensor.shape[3]
    if not isinstance(head_dim, int) or not 2 <= head_dim <= _LARGEST:
        return None
    closest, followed = None, 0  # the reason of the attempt that came farthest
    behind = _behind(end)
    for root in sorted(behind, key=walk.effects.position, reverse=True):
        if root is end or not _may_be_root(root, tensor):
            continue
        channels = Channels(root, _between(root, end, behind))
        try:
            form = channels.form(end)
        except Unknown as reason:
            if channels.tables and len(channels.nodes) > followed:
                closest, followed = str(reason), len(channels.nodes)
            continue
        if not channels.tables or not form.multiplied:
            continue
        found = _proved(channels, form, site, walk)
        if isinstance(found, _Proved):
            return _used_elsewhere(end, channels, site) or found
        return found
    return closest


def _unshaped(value: Value) -> fx.Node | None:
    """The node that an operand is, perhaps after reshapes that come back to its own shape."""
    if isinstance(value, fx.Node):
        return value
    inner = value
    while isinstance(inner, Apply) and inner.target is _aten.reshape.default:
        inner = inner.args[0]
    tensor = tensor_of(inner)
    if not isinstance(value, Apply) or not isinstance(inner, fx.Node) or tensor is None:
        return None
    shape = value.args[1]
    if len(shape) != tensor.dim():
        return None
    same = all(
        isinstance(size, int) and statically_known_true(size == own)
        for size, own in zip(shape, tensor.shape, strict=True)
    )
    return inner if same else None


def _behind(end: fx.Node) -> set[fx.Node]:
    """The nodes that a value is computed by, the last ones before it."""
    found, fringe = {end}, [end]
    for _ in range(_DEPTH):
        fringe = [
            source for node in fringe for source in node.all_input_nodes if source not in found
        ]
        found.update(fringe)
        if not fringe or len(found) > _NODES:
            break
    return found


def _between(root: fx.Node, end: fx.Node, behind: set[fx.Node]) -> set[fx.Node]:
    """What depends on the root, of the nodes behind the end."""
    found, fringe = {root}, [root]
    while fringe:
        fringe = [
            user for node in fringe for user in node.users if user in behind and user not in found
        ]
        found.update(fringe)
    return found if end in found else {root}


def _may_be_root(node: fx.Node, rotated: Tensor) -> bool:
    tensor = tensor_of(node)
    return (
        tensor is not None
        and tensor.dim() == 4
        and tensor.dtype == rotated.dtype
        and isinstance(tensor.shape[3], int)
        and tensor.shape[3] == rotated.shape[3]
    )


def _proved(channels: Channels, form: Form, site: AttentionSite, walk: Walk) -> _Proved | str:
    """The rotation that the channels say; or what is wrong with it."""
    if form.sums.dim() != 4 or form.sums.shape[-1] != form.sums.numel():
        return "its channels are in several dims"
    if form.dtype != channels.root_dtype:
        return f"it is {form.dtype} after the rotation, and {channels.root_dtype} before"
    expected = tensor_of(site.output)
    assert expected is not None
    if site.autocasts and form.dtype != expected.dtype:
        return "autocast rounds it after the rotation"
    sums = channels.sums(form)
    count = sum(_is_turned(each) for each in sums)
    if not all(_is_turned(each) for each in sums[:count]):
        return "other channels than the first ones are rotated"
    if any(each != (Term(at),) for at, each in enumerate(sums[count:], count)):
        return "channels that are not rotated are not where they were"
    turned: list[tuple[Term, Term]] = []
    for at, each in enumerate(sums[:count]):
        ordered = _ordered(at, each)
        if isinstance(ordered, str):
            return ordered
        turned.append(ordered)
    pairs = _pairs(turned)
    if not isinstance(pairs, RotaryPairs):  # which are strings too
        return pairs
    permutation = (*form.outer, 3)
    tables = []
    for at in range(2):
        terms = [each[at] for each in turned]
        table = _table(channels.tables[terms[0].table], terms, pairs, permutation)
        if isinstance(table, str):
            return table
        tables.append(table)
    reason = _changes(channels, site, walk)
    if reason is not None:
        return reason
    source: Value = channels.root
    if permutation != (0, 1, 2, 3):
        source = Apply(_aten.permute.default, (channels.root, list(permutation)))
    assert channels.dtype is not None
    return _Proved((pairs, count, channels.dtype), Rotated(source, *tables))


def _is_turned(each: Sum) -> bool:
    return any(term.table != NO_TABLE for term in each)


def _ordered(channel: int, each: Sum) -> tuple[Term, Term] | str:
    """The term of the channel itself, and the other one."""
    if len(each) != 2:
        return f"channel {channel} is a sum of {len(each)} products"
    own = [term for term in each if term.channel == channel]
    if len(own) != 1:
        return f"channel {channel} is not made of itself and another one"
    (other,) = (term for term in each if term.channel != channel)
    if own[0].sign != 1:
        return f"the sign of channel {channel} is turned"
    return own[0], other


def _pairs(turned: Sequence[tuple[Term, Term]]) -> RotaryPairs | str:
    """Which channels are paired, each with the right sign."""
    count = len(turned)
    if count % 2:
        return f"{count} channels are rotated, an odd number"
    partners = [other.channel for _, other in turned]
    half = count // 2
    if partners == [(at + half) % count for at in range(count)]:
        pairs, signs = RotaryPairs.HALF, [-1] * half + [1] * half
    elif partners == [at ^ 1 for at in range(count)]:
        pairs, signs = RotaryPairs.INTERLEAVED, [-1, 1] * half
    else:
        return "channels are paired in another way than by halves or with their neighbours"
    if [other.sign for _, other in turned] != signs:
        return "signs are not those of a rotation: the first of each pair minus, the second plus"
    return pairs


def _table(
    table: Table, terms: Sequence[Term], pairs: RotaryPairs, permutation: Sequence[int]
) -> Value | str:
    """A table as the operator takes it, for tokens (B, heads, L) in the order of the operands."""
    if any(term.table != terms[0].table for term in terms):
        return "the halves of a table are different tensors"
    tensor = tensor_of(table.node)
    assert tensor is not None
    if table.channel is None:
        return "a table has no entries for channels"
    entries, count = [term.entry for term in terms], len(terms)
    size = int(tensor.shape[table.channel])
    half = count // 2
    each = [at % half if pairs is RotaryPairs.HALF else at // 2 for at in range(count)]
    if not (size == count and entries == list(range(count))) and not (
        size == half and entries == each
    ):
        return "a table has its entries in another order than the channels"
    value: Value = table.node
    if table.part:
        value = Apply(_aten.view_as_real.default, (value,))
        value = Apply(_aten.select.int, (value, -1, 0 if table.part == "real" else 1))
    wanted = [table.dims.index(dim) if dim in table.dims else None for dim in permutation[:3]]
    order = [*wanted, table.channel]
    rank = tensor.dim()
    if rank <= 4 and all(
        at is None or at == position - (4 - rank) for position, at in enumerate(order)
    ):
        return value  # it broadcasts as it is
    kept = [at for at in order if at is not None]
    idle = [at for at in range(rank) if at not in kept]
    if idle:
        value = Apply(_aten.squeeze.dims, (value, idle))
    moved = [sorted(kept).index(at) for at in kept]
    if moved != sorted(moved):
        value = Apply(_aten.permute.default, (value, moved))
    for position, at in enumerate(order):
        if at is None:
            value = Apply(_aten.unsqueeze.default, (value, position))
    return value


def _changes(channels: Channels, site: AttentionSite, walk: Walk) -> str | None:
    """Why the operator would not see what the model saw: something changes before it."""
    effects = walk.effects
    start = min(channels.nodes, key=effects.position)
    read = [channels.root, *(table.node for table in channels.tables)]
    written = [node for node in read if effects.changed(node, start, site.output)]
    written += [node for node in channels.nodes if effects.changed(node, node, site.output)]
    if written:
        return f"{operation(written[0])} is changed in place before the attention"
    if walk.crosses_border(start, site.output):
        return "autocast or the grad mode changes between the rotation and the attention"
    return None


def _used_elsewhere(end: fx.Node, channels: Channels, site: AttentionSite) -> str | None:
    """Why what was rotated is needed besides: then it has been computed anyway."""
    own = {site.output, *site.interior, *channels.nodes}
    for node in (end, *channels.nodes):
        for user in _readers(node):
            if user not in own and not _serves(user, own):
                return f"what is rotated is also used by {operation(user)}"
    return None


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """The users whose result somebody uses."""
    return (user for user in node.users if user.users or user.op == "output" or not is_pure(user))


def _serves(node: fx.Node, own: set[fx.Node]) -> bool:
    """Whether a node, such as a repeat of K over heads, is there for the attention alone."""
    if node.op == "output" or not is_pure(node):
        return False
    return all(user in own or _serves(user, own) for user in _readers(node))
