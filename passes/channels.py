"""What each channel of a tensor is in terms of the channels of another one, and of tables.

A rotary embedding is written with slices, stacks, signs and products in many ways. Instead of
patterns, every channel is followed: it is a sum of terms, each a sign, a channel of the root and
perhaps an entry of a table. Views of the channels are carried out on small tensors that hold the
numbers of such sums; the other dims, which stay as they are, have size 1 there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._python_dispatch import _disable_current_modes

from sage_compiler.passes.normalize import argument, is_plain, operation, tensor_of
from sage_compiler.passes.spelling import base_operation, called, permutation_of
from sage_compiler.semantics import DTYPES

Part: TypeAlias = str  # of a table: "" for a real one, "real" or "imag" of a complex one
NO_TABLE: Final = -1


@dataclass(frozen=True, slots=True)
class Term:
    """sign * x[channel] * table[entry]; ``table`` is a number of ``Channels.tables``."""

    channel: int
    sign: int = 1
    table: int = NO_TABLE
    entry: int = 0


Sum: TypeAlias = tuple[Term, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """A tensor that does not depend on the root.

    Attributes:
        node: the tensor.
        dims: for each of its dims the dim of the root that it runs along; None: it has size 1.
        channel: the dim of it whose index is a term's ``entry``; None: it has none.
        part: "" or, of complex numbers, "real" or "imag".
    """

    node: fx.Node
    dims: tuple[int | None, ...]
    channel: int | None
    part: Part = ""


@dataclass(frozen=True, slots=True)
class Form:
    """A tensor that depends on the root.

    Attributes:
        outer: the dims of the root that its first dims are; the channels follow.
        sums: int64, of size 1 in the outer dims: numbers of sums. Of a complex tensor it has one
            more dim at the end, the real and the imaginary parts.
        dtype: that of the tensor.
        multiplied: whether there are products in it.
        summed: whether there are sums of products in it.
    """

    outer: tuple[int, ...]
    sums: Tensor
    dtype: torch.dtype
    multiplied: bool = False
    summed: bool = False
    is_complex: bool = False


class Unknown(Exception):
    """Why a tensor cannot be followed; caught where following began."""


class Channels:
    """The channels of tensors between a root and what is made of it.

    Args:
        root: of float32, bfloat16 or float16; its last dim is the channels.
        inside: the nodes to look at; what is outside does not depend on the root.

    Attributes:
        tables: what the channels were multiplied by.
        nodes: what was followed, the root not counted.
        dtype: in which products and sums were computed; None before there was one.
    """

    def __init__(self, root: fx.Node, inside: Collection[fx.Node]) -> None:
        tensor = _known(root)
        self.root, self.root_dtype = root, tensor.dtype
        self.tables: list[Table] = []
        self.nodes: set[fx.Node] = set()
        self.dtype: torch.dtype | None = None
        self._inside = inside
        self._sums: list[Sum] = []
        self._forms: dict[fx.Node, Form | list[Form]] = {}
        rank, size = tensor.dim(), tensor.shape[-1]
        ids = [self._number((Term(channel),)) for channel in range(int(size))]
        shape = (*[1] * (rank - 1), len(ids))
        with _disable_current_modes():
            self._forms[root] = Form(
                tuple(range(rank - 1)), torch.tensor(ids).view(shape), tensor.dtype
            )

    def sums(self, form: Form) -> list[Sum]:
        """Those of all its channels, in order."""
        return [self._sums[number] for number in form.sums.flatten().tolist()]

    def form(self, node: fx.Node) -> Form:
        """What a tensor is.

        Raises:
            Unknown: it is something else than views, signs, products with tables, and sums.
        """
        with _disable_current_modes():
            found = self._of(node)
        if isinstance(found, list):
            raise Unknown(f"{operation(node)} yields several tensors")
        return found

    def _number(self, each: Sum) -> int:
        self._sums.append(each)
        return len(self._sums) - 1

    def _of(self, node: Any) -> Form | list[Form]:
        if node not in self._forms:
            self._forms[node] = self._follow(node)
            self.nodes.add(node)
        return self._forms[node]

    def _one(self, given: Any) -> Form:
        if not self._depends(given):
            raise Unknown("it is also made of something else")
        found = self._of(given)
        if isinstance(found, list):
            raise Unknown("several tensors at once")
        return found

    def _depends(self, given: Any) -> bool:
        return isinstance(given, fx.Node) and given in self._inside

    def _follow(self, node: fx.Node) -> Form | list[Form]:
        name = base_operation(node)
        if name in ("add", "sub") and argument(node, 2, "alpha", 1) == 1:
            return self._add(node, -1 if name == "sub" else 1)
        if name == "mul":
            return self._multiply(node)
        if name in ("cat", "concat", "concatenate", "stack"):
            return self._join(node)
        source = argument(node, 0, "input")
        if name == "getitem" and self._depends(source):
            several = self._of(source)
            if isinstance(several, list):
                index = argument(node, 1, "index")
                if not isinstance(index, int):
                    raise Unknown("a slice of several tensors")
                return several[index]
        rule = _RULES.get(name)
        if rule is None:
            raise Unknown(f"{operation(node)} is neither a view, a sign, a product nor a sum")
        return rule(self, node, self._one(source))

    # --- views ------------------------------------------------------------------------------

    def _cast(self, node: fx.Node, form: Form) -> Form:
        tensor, source = _known(node), _known(argument(node, 0, "input"))
        if tensor.device != source.device or form.is_complex:
            raise Unknown("it moves to another device, or is cast as complex numbers")
        dtype = tensor.dtype
        if dtype == form.dtype:
            return form
        if form.summed:
            allowed = dtype == self.root_dtype and form.dtype == self.dtype
        else:  # no bit of what the root holds may get lost
            allowed = not form.multiplied and dtype in (self.root_dtype, torch.float32)
        if not allowed:
            raise Unknown(f"a cast from {form.dtype} to {dtype} on the way")
        return replace(form, dtype=dtype)

    def _same(self, node: fx.Node, form: Form) -> Form:
        if _known(node).dtype != form.dtype:
            raise Unknown("other numbers of the same bits")
        return form

    def _permute(self, node: fx.Node, form: Form) -> Form:
        _check_constants(node)
        rank = _known(node).dim()
        permutation, count = permutation_of(node, rank), len(form.outer)
        if permutation is None or form.is_complex:
            raise Unknown(f"{operation(node)} is no transposition that is known")
        if any((dim < count) != (at < count) for at, dim in enumerate(permutation)):
            raise Unknown("channels are moved between the other dims")
        outer = tuple(form.outer[dim] for dim in permutation[:count])
        return replace(form, outer=outer, sums=form.sums.permute(permutation))

    def _reshape(self, node: fx.Node, form: Form) -> Form:
        return self._checked(node, form, form.sums.reshape(self._shape(node, form)))

    def _shape(self, node: fx.Node, form: Form) -> list[int]:
        count = len(form.outer)
        sizes = [*_known(node).shape[count:], *([2] if form.is_complex else [])]
        if not all(isinstance(size, int) for size in sizes):
            raise Unknown("a number of channels that varies")
        if torch.Size(sizes).numel() != form.sums.numel():
            raise Unknown(f"{operation(node)} goes across the channels and other dims")
        return [1] * count + [int(size) for size in sizes]

    def _index(self, node: fx.Node, form: Form) -> Form:
        if form.is_complex:
            raise Unknown("a slice of complex numbers")
        return self._checked(node, form, _carried_out(node, form.sums))

    def _take_apart(self, node: fx.Node, form: Form) -> list[Form]:
        if form.is_complex:
            raise Unknown("parts of complex numbers")
        parts = list(_carried_out(node, form.sums))
        tensors = node.meta.get("example_value", node.meta.get("val"))
        if not isinstance(tensors, (tuple, list)) or len(tensors) != len(parts):
            raise Unknown(f"{operation(node)} of other dims than channels")
        return [
            self._checked_against(tensor, form, part)
            for tensor, part in zip(tensors, parts, strict=True)
        ]

    def _checked(self, node: fx.Node, form: Form, sums: Tensor) -> Form:
        return self._checked_against(_known(node), form, sums)

    def _checked_against(self, tensor: Tensor, form: Form, sums: Tensor) -> Form:
        """The form with these sums, when the other dims are what they were."""
        count, before = len(form.outer), _known(self.root).shape
        shape = list(tensor.shape) + ([2] if form.is_complex else [])
        kept = (
            sums.dim() == len(shape)
            and all(size == 1 for size in sums.shape[:count])
            and all(
                statically_known_true(size == before[dim])
                for size, dim in zip(shape[:count], form.outer, strict=False)
            )
            and list(sums.shape[count:]) == shape[count:]
        )
        if not kept or tensor.is_complex() != form.is_complex:
            raise Unknown("a view of other dims than the channels")
        return replace(form, sums=sums)

    def _join(self, node: fx.Node) -> Form:
        given = argument(node, 0, "tensors")
        if not isinstance(given, (tuple, list)):
            raise Unknown("parts that are not known one by one")
        parts = [self._one(part) for part in given]
        first = parts[0]
        if any(part.outer != first.outer or part.is_complex for part in parts):
            raise Unknown("parts of different dims are joined")
        if any(part.multiplied and not part.summed for part in parts):
            raise Unknown("products are joined before they are added")
        tensor = _known(node)
        narrowed = any(part.summed and part.dtype != tensor.dtype for part in parts)
        if narrowed or tensor.dtype not in (self.root_dtype, torch.float32, self.dtype):
            raise Unknown("parts of different dtypes are joined")
        sums = _carried_out(node, [part.sums for part in parts])
        joined = replace(
            first,
            dtype=tensor.dtype,
            multiplied=any(part.multiplied for part in parts),
            summed=any(part.summed for part in parts),
        )
        return self._checked(node, joined, sums)

    # --- arithmetic -------------------------------------------------------------------------

    def _map(self, form: Form, change: Callable[[Sum], Sum]) -> Tensor:
        numbers = [
            self._number(change(self._sums[number])) for number in form.sums.flatten().tolist()
        ]
        return torch.tensor(numbers).view(form.sums.shape)

    def _negate(self, node: fx.Node, form: Form) -> Form:
        if form.summed:
            raise Unknown("a sum is negated")
        return replace(form, sums=self._map(form, _negated))

    def _add(self, node: fx.Node, sign: int) -> Form:
        left, right = (self._one(argument(node, at, name)) for at, name in enumerate(_OPERANDS))
        if left.outer != right.outer or left.sums.shape != right.sums.shape:
            raise Unknown("tensors of different dims are added")
        products = all(part.multiplied and not part.summed for part in (left, right))
        dtypes = {left.dtype, right.dtype, _known(node).dtype}
        if not products or dtypes != {self.dtype} or left.is_complex:
            raise Unknown("what is added are not products of one dtype")
        numbers = [
            self._number(self._sums[a] + (_negated(self._sums[b]) if sign < 0 else self._sums[b]))
            for a, b in zip(
                left.sums.flatten().tolist(), right.sums.flatten().tolist(), strict=True
            )
        ]
        sums = torch.tensor(numbers).view(left.sums.shape)
        return self._checked(node, replace(left, summed=True), sums)

    def _multiply(self, node: fx.Node) -> Form:
        x, by = (argument(node, at, name) for at, name in enumerate(_OPERANDS))
        if not self._depends(x):
            x, by = by, x
        form = self._one(x)
        if self._depends(by) or not isinstance(by, fx.Node):
            raise Unknown("it is multiplied by itself, or by a number")
        if form.multiplied:
            raise Unknown("it is multiplied twice")
        tensor, table = _known(node), _known(by)
        if form.is_complex != table.is_complex():
            raise Unknown("real numbers times complex ones")
        of_parts = torch.float32 if table.dtype == torch.complex64 else table.dtype
        computed = torch.promote_types(form.dtype, of_parts)
        if of_parts not in DTYPES or self.dtype not in (None, computed):
            raise Unknown(f"the tables are {table.dtype}, or products of several dtypes")
        self.dtype = computed
        made = replace(form, dtype=computed, multiplied=True, summed=form.is_complex)
        expected = torch.complex64 if form.is_complex else computed
        if tensor.dtype != expected:
            raise Unknown(f"a product in {tensor.dtype}")
        return self._checked(node, made, self._products(form, by, tensor))

    def _products(self, form: Form, by: fx.Node, tensor: Tensor) -> Tensor:
        """The sums of x times a table."""
        count, table = len(form.outer), _known(by)
        missing = tensor.dim() - table.dim()
        if missing < 0:
            raise Unknown("the table has more dims than what it multiplies")
        dims: list[int | None] = []
        channel, entries = None, torch.zeros(1, dtype=torch.int64)
        shape = form.sums.shape[:-1] if form.is_complex else form.sums.shape
        for at, size in enumerate(table.shape):
            of = at + missing
            if isinstance(size, int) and size == 1:
                dims.append(None)
            elif not statically_known_true(size == tensor.shape[of]):
                raise Unknown("the table broadcasts what it multiplies")
            elif of < count:
                dims.append(form.outer[of])
            elif channel is not None:
                raise Unknown("a table of channels in several dims")
            else:
                dims.append(None)
                channel = at
                view = [1] * len(shape)
                view[of] = int(size)
                entries = torch.arange(int(size)).view(view)
        at_entry = entries.expand(shape).flatten().tolist()
        if not form.is_complex:
            number = self._table(Table(by, tuple(dims), channel))
            changed = [
                self._number(_times(self._sums[x], number, entry))
                for x, entry in zip(form.sums.flatten().tolist(), at_entry, strict=True)
            ]
            return torch.tensor(changed).view(form.sums.shape)
        cosine = self._table(Table(by, tuple(dims), channel, "real"))
        sine = self._table(Table(by, tuple(dims), channel, "imag"))
        changed = []
        for (a, b), entry in zip(form.sums.flatten(0, -2).tolist(), at_entry, strict=True):
            real, imaginary = self._sums[a], self._sums[b]
            down = _negated(_times(imaginary, sine, entry))
            changed.append(self._number(_times(real, cosine, entry) + down))
            up = _times(real, sine, entry)
            changed.append(self._number(_times(imaginary, cosine, entry) + up))
        return torch.tensor(changed).view(form.sums.shape)

    def _table(self, table: Table) -> int:
        if table not in self.tables:
            self.tables.append(table)
        return self.tables.index(table)

    # --- complex numbers --------------------------------------------------------------------

    def _as_complex(self, node: fx.Node, form: Form) -> Form:
        if form.is_complex or form.multiplied or form.dtype != torch.float32:
            raise Unknown("complex numbers of anything but float32")
        return replace(form, is_complex=True)

    def _as_real(self, node: fx.Node, form: Form) -> Form:
        if not form.is_complex:
            raise Unknown("real numbers as real ones")
        return replace(form, is_complex=False)


_OPERANDS: Final = ("input", "other")
_Rule: TypeAlias = Callable[[Channels, fx.Node, Form], Form | list[Form]]
_RULES: Final[dict[str, _Rule]] = {
    **dict.fromkeys(
        ("to", "float", "half", "bfloat16", "type", "type_as", "_to_copy"), Channels._cast
    ),
    **dict.fromkeys(("contiguous", "clone", "alias"), Channels._same),
    **dict.fromkeys(
        ("transpose", "permute", "swapaxes", "swapdims", "movedim", "moveaxis"), Channels._permute
    ),
    **dict.fromkeys(
        ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze"),
        Channels._reshape,
    ),
    **dict.fromkeys(("getitem", "slice", "narrow", "select"), Channels._index),
    **dict.fromkeys(
        ("chunk", "split", "split_with_sizes", "tensor_split", "unbind"), Channels._take_apart
    ),
    "neg": Channels._negate,
    "view_as_complex": Channels._as_complex,
    "view_as_real": Channels._as_real,
}


def _carried_out(node: fx.Node, sums: Any) -> Any:
    """What a node makes of the numbers of sums."""
    _check_constants(node)
    try:
        return called(node, sums)
    except (IndexError, RuntimeError, ValueError) as error:  # the other dims have size 1 here
        raise Unknown("a view of other dims than the channels") from error


def _check_constants(node: fx.Node) -> None:
    """A view must be known, but for what it views."""
    given: list[fx.Node] = []
    fx.map_arg((node.args[1:], {**node.kwargs, "tensors": ()}), given.append)
    if any(each is not argument(node, 0, "input") for each in given):
        raise Unknown(f"{operation(node)} depends on what the graph computes")


def _negated(sum_: Sum) -> Sum:
    return tuple(replace(term, sign=-term.sign) for term in sum_)


def _times(sum_: Sum, table: int, entry: int) -> Sum:
    return tuple(replace(term, table=table, entry=entry) for term in sum_)


def _known(node: fx.Node) -> Tensor:
    tensor = tensor_of(node)
    if tensor is None or not is_plain(tensor):
        raise Unknown("a tensor of which the graph says nothing")
    return tensor
