"""Which subgraphs are constants, and what they come to when something is written to them."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sage_compiler.passes import folding
from sage_compiler.passes.effects import Effects
from sage_compiler.passes.folding import ConstantFolder, signature
from sage_compiler.passes.masks import MaskContext
from tests.passes.checks import captured, normal

L = 6
INF = math.inf
X = normal(L, L)


def output_of(gm: fx.GraphModule) -> fx.Node:
    (found,) = (node for node in gm.graph.nodes if node.op == "output")
    return found


def folded(function: Callable[..., Any], *inputs: Any, result: int = 0) -> Tensor | None:
    """The value that a result of the function folds to, as whoever calls it sees it."""
    gm = captured(lambda x, *rest: (as_tuple(function(*rest)), x + 1), X, *inputs)
    output = output_of(gm)
    node = output.all_input_nodes[result]
    folder = ConstantFolder(Effects(gm.graph))
    cone = folder.cone(node, output)
    return None if cone is None else folder.value(node, cone)


def as_tuple(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


def ones(*size: int) -> Tensor:
    return torch.ones(size or (L, L), dtype=torch.bool)


def changed(change: Callable[[Tensor], Any], *, dtype: torch.dtype = torch.bool) -> Any:
    def mask() -> Tensor:
        made = torch.ones(L, L, dtype=dtype).tril()
        change(made)
        return made

    return mask


def _imul(m: Tensor) -> None:
    m *= torch.eye(L, dtype=torch.bool)


def _rows_by_index(m: Tensor) -> None:
    row, column = torch.triu_indices(L, L, 2)
    m[row, column] = True


def _windows(m: Tensor) -> None:
    for start in range(0, L, 2):
        m[start : start + 2, start : start + 2] = False


UNDERSTOOD: dict[str, Callable[[], Tensor]] = {
    "triu_": lambda: torch.full((L, L), -INF).triu_(1),
    "triu_, result unused": lambda: changed(lambda m: m.tril_(-1))(),
    "setitem, slice": changed(lambda m: m.__setitem__((slice(None), slice(3)), True)),
    "setitem, number": changed(lambda m: m.__setitem__(2, True)),
    "setitem, mask": changed(lambda m: m.__setitem__(ones().triu(2), True)),
    "setitem, tensors": changed(_rows_by_index),
    "setitem, loop": changed(_windows),
    "imul": changed(_imul),
    "iadd": lambda: operator.iadd(torch.zeros(L, L), torch.full((L, L), -INF).triu(1)),
    "masked_fill_": changed(lambda m: m.masked_fill_(torch.eye(L, dtype=torch.bool), False)),
    "fill_ of a view": changed(lambda m: m[2].fill_(True)),
    "fill_ of a transposed view": changed(lambda m: m.mT[1:3].fill_(True)),
    "zero_": changed(lambda m: m[1:].zero_()),
    "copy_": changed(lambda m: m.copy_(torch.eye(L))),
    "logical_not_": changed(lambda m: m.logical_not_()),
    "scatter_": changed(lambda m: m.scatter_(0, torch.zeros(1, L, dtype=torch.int64), True)),
    "fill_diagonal_": changed(lambda m: m.fill_diagonal_(False)),
    "index_fill_": changed(lambda m: m.index_fill_(1, torch.tensor([0, 2]), True)),
    "views of views": changed(lambda m: m.view(-1)[3:].unflatten(0, (3, 11))[1].t().logical_not_()),
    "read before it is written": lambda: _read_then_write(ones().tril()),
    "written after a copy": lambda: _write_after_copy(ones().tril()),
    "expanded, then written at its source": lambda: _expand_then_write(ones(1, L)),
    "chunk": lambda: torch.cat([part.flip(0) for part in ones().tril().chunk(3)]),
    "split and unbind": lambda: torch.stack(ones().tril().split(2)[1].unbind(0)),
    "roll, repeat": lambda: ones(2, 2).tril().repeat(3, 3).roll(1, 0),
    "repeat_interleave": lambda: ones(3, 3).tril().repeat_interleave(2, 0).repeat_interleave(2, 1),
    "one_hot": lambda: F.one_hot(torch.arange(L) % 3, 3).bool(),
    "block_diag": lambda: torch.block_diag(*[torch.ones(2, 2)] * 3).bool(),
    "isin": lambda: torch.isin(torch.arange(L), torch.tensor([1, 4]))[None],
    "pad": lambda: F.pad(ones(L, 3), (3, 0)),
    "floor_divide, remainder": lambda: torch.arange(L)[:, None] // 2 == torch.arange(L) % 3,
    "any, all": lambda: ones().tril().any(0)[None] & ones().tril().all(1, keepdim=True),
    "where, isinf": lambda: torch.where(ones().tril(), 0.0, -INF).isinf(),
    "gather, take": lambda: (
        ones().tril().gather(1, torch.arange(L).expand(L, L)).take(torch.arange(L))
    ),
    "index": lambda: torch.tril(ones())[torch.tensor([0, 2, 1])],
    "cumsum, clamp": lambda: torch.ones(L, L).cumsum(0).clamp(max=3) <= torch.arange(L),
    "meshgrid": lambda: torch.ge(*torch.meshgrid(*[torch.arange(L)] * 2, indexing="ij")),
    "literal": lambda: torch.tensor([[True, False], [False, True]]).mT,
    "torch.nn": lambda: nn.Transformer.generate_square_subsequent_mask(L),
    "swin": lambda: _shifted_windows(),
}


def _read_then_write(mask: Tensor) -> Tensor:
    seen = mask.triu(-2)
    mask[0] = False
    return seen


def _write_after_copy(mask: Tensor) -> Tensor:
    copy = mask.clone()
    copy[0] = True
    return mask


def _expand_then_write(mask: Tensor) -> Tensor:
    wide = mask.expand(L, L)
    mask[:, 3:] = False
    return wide


def _shifted_windows() -> Tensor:
    """The attention mask of Swin for 4x4 pixels, windows of 2, shifted by 1."""
    image = torch.zeros(1, 4, 4, 1)
    count = 0
    for rows in (slice(0, -2), slice(-2, -1), slice(-1, None)):
        for columns in (slice(0, -2), slice(-2, -1), slice(-1, None)):
            image[:, rows, columns, :] = count
            count += 1
    windows = image.view(1, 2, 2, 2, 2, 1).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4)
    difference = windows.unsqueeze(1) - windows.unsqueeze(2)
    return difference.masked_fill(difference != 0, -100.0).masked_fill(difference == 0, 0.0)


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_constants_come_out_as_in_eager(name: str) -> None:
    found = folded(UNDERSTOOD[name])
    assert found is not None
    expected = UNDERSTOOD[name]()
    assert found.dtype == expected.dtype and torch.equal(found, expected)


def test_each_reader_sees_the_writes_before_it() -> None:
    def attend(x: Tensor) -> tuple[Tensor, ...]:
        mask = ones().tril()
        first = x.masked_fill(mask, 0.0)
        mask[0] = True
        second = x.masked_fill(mask, 0.0)
        mask.logical_not_()
        return first, second, x.masked_fill(mask, 0.0)

    gm = captured(attend, X)
    folder = ConstantFolder(Effects(gm.graph))
    readers = [node for node in gm.graph.nodes if node.target == "masked_fill"]
    expected = ones().tril()
    for step, reader in enumerate(readers):
        if step == 1:
            expected[0] = True
        if step == 2:
            expected.logical_not_()
        node = reader.args[1]
        cone = folder.cone(node, reader)
        assert cone is not None
        found = folder.value(node, cone)
        assert found is not None and torch.equal(found, expected)


@torch.library.custom_op("passes_test::set_first", mutates_args=("x",))
def set_first(x: Tensor) -> None:
    x[0] = True


NOT_UNDERSTOOD: dict[str, Callable[..., Any]] = {
    "random": lambda: torch.rand(L, L),
    "random, written": changed(lambda m: m.bernoulli_(), dtype=torch.float32),
    "random, added": changed(lambda m: m.add_(torch.rand(L, L)), dtype=torch.float32),
    "random, in a view": changed(lambda m: m[0].uniform_(), dtype=torch.float32),
    "memory that was never written": lambda: torch.empty(L, L),
    "the order of equal elements": lambda: torch.ones(L).argsort(),
    "one of several maxima": lambda: torch.ones(L).argmax(0)[None],
    "set_": changed(lambda m: m.set_(~m)),
    "out": changed(lambda m: torch.logical_not(m, out=m)),
    "numpy": changed(lambda m: m.numpy().fill(True)),
    "as_strided": changed(lambda m: torch.as_strided(m, (L,), (1,)).fill_(True)),
    "a custom operator": changed(set_first),
    "a gradient": lambda: torch.zeros(L, L, requires_grad=True),
}


@pytest.mark.parametrize("name", NOT_UNDERSTOOD)
def test_what_is_not_understood_is_no_constant(name: str) -> None:
    assert folded(NOT_UNDERSTOOD[name]) is None


INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda x: x * 1,
    "written to a constant": lambda x: torch.zeros(L, L).copy_(x),
    "written to a row": lambda x: changed(lambda m: m.__setitem__(0, x[0]), dtype=x.dtype)(),
    "where it is written": lambda x: changed(lambda m: m.masked_fill_(x > 0, True))(),
    "written through a view": lambda x: changed(lambda m: m.view(-1).copy_(x.view(-1)))(),
    "deep in an argument": lambda x: torch.ones(L, L) * (torch.zeros(L, L) + x.sum()),
}


@pytest.mark.parametrize("name", INPUTS)
def test_what_depends_on_an_input_is_no_constant(name: str) -> None:
    assert folded(INPUTS[name], normal(L, L, seed=1)) is None


SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "ones_like": lambda x: torch.ones_like(x).tril(),
    "full_like": lambda x: torch.full_like(x, -INF).triu(1),
    "zeros_like": lambda x: torch.zeros_like(x, dtype=torch.int64),
    "new_ones": lambda x: x.new_ones((L, L), dtype=torch.bool).tril(),
    "new_full": lambda x: x.new_full((L, L), -INF).triu(1),
    "size": lambda x: torch.ones(x.shape[0], x.size(1)).tril(),
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_shape_of_an_input_is_no_data(name: str) -> None:
    x = normal(L, L, seed=1)
    found = folded(SHAPES[name], x)
    assert found is not None and torch.equal(found, SHAPES[name](x))


def test_a_value_of_a_prototype_is_data() -> None:
    assert (
        folded(lambda x: x.new_full((L, L), 2.0) * x.new_ones(L) + torch.full_like(x, 1), X)
        is not None
    )
    assert folded(lambda x: x.new_tensor([1.0]) + x.sum(), X) is None


@pytest.mark.parametrize("kind", ["parameter", "buffer", "attribute"])
def test_tensors_of_a_module_are_no_constants(kind: str) -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            mask = torch.full((L, L), -INF).triu(1)
            if kind == "parameter":
                self.mask = nn.Parameter(mask, requires_grad=False)
            elif kind == "buffer":
                self.register_buffer("mask", mask)
            else:
                self.mask = mask

        def forward(self) -> Tensor:
            return self.mask.clone()

    assert folded(Holder()) is None


def test_attributes_of_the_graph_are_no_constants() -> None:
    gm = fx.symbolic_trace(lambda x: x)
    gm.register_buffer("mask", ones())
    (x,) = (node for node in gm.graph.nodes if node.op == "placeholder")
    with gm.graph.inserting_after(x):
        held = gm.graph.get_attr("mask")
        held.meta["example_value"] = ones()
    assert ConstantFolder(Effects(gm.graph)).cone(held, output_of(gm)) is None


def test_a_copy_on_another_device_shares_no_memory() -> None:
    def masks() -> tuple[Tensor, Tensor]:
        mask = ones()
        moved = mask.to("meta")
        moved.tril_()
        return mask, moved

    # Evaluated on one device, writing to the copy would write to the original too.
    assert folded(masks, result=1) is None
    found = folded(masks, result=0)
    assert found is None or torch.equal(found, ones())


def test_large_constants_are_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    def mask() -> Tensor:
        return torch.ones(L * L).view(L, L)[:, :1]

    monkeypatch.setattr(folding, "FOLD_LIMIT", L * L)
    assert folded(mask) is not None
    monkeypatch.setattr(folding, "FOLD_LIMIT", L * L - 1)
    assert folded(mask) is None


def test_intermediate_dtypes_must_be_the_traced_ones() -> None:
    gm = captured(lambda x: (torch.ones(L, L).tril().bool(), x + 1), X)
    output = output_of(gm)
    (made,) = (node for node in gm.graph.nodes if node.target is torch.ones)
    made.meta["example_value"] = made.meta["example_value"].to(torch.float16)
    folder = ConstantFolder(Effects(gm.graph))
    node = output.all_input_nodes[0]
    cone = folder.cone(node, output)
    assert cone is not None and folder.value(node, cone) is None


PAIRS: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor], bool]] = {
    "alike": (lambda: ones().tril(), lambda: ones().tril(), True),
    "another diagonal": (lambda: ones().tril(1), lambda: ones().tril(-1), False),
    "another dtype": (lambda: torch.ones(L), lambda: torch.ones(L, dtype=torch.int64), False),
    "1 and True": (lambda: torch.full((L,), 1), lambda: torch.full((L,), True), False),
    "0 and -0": (lambda: torch.full((L,), 0.0), lambda: torch.full((L,), -0.0), False),
    "another order": (
        lambda: torch.arange(L)[:, None] - torch.ones(L, dtype=torch.int64),
        lambda: torch.ones(L, dtype=torch.int64) - torch.arange(L)[:, None],
        False,
    ),
    "a write": (lambda: ones().clone(), lambda: ones().clone().tril_(), False),
}


@pytest.mark.parametrize("name", PAIRS)
def test_only_what_is_computed_alike_has_the_same_signature(name: str) -> None:
    first, second, alike = PAIRS[name]
    gm = captured(lambda x: (first(), second(), x + 1), X)
    output = output_of(gm)
    folder = ConstantFolder(Effects(gm.graph))
    texts = []
    for node in output.args[0][:2]:
        cone = folder.cone(node, output)
        assert cone is not None
        texts.append(signature(node, cone))
    assert (texts[0] == texts[1]) == alike


def test_constant_numbers() -> None:
    def numbers(x: Tensor) -> Any:
        low = torch.full((), -1e4)
        twice = torch.tensor(2.0)
        twice += 1
        return low, twice, x.sum(), torch.zeros(2), x + 1

    gm = captured(numbers, X)
    output = output_of(gm)
    context = MaskContext(Effects(gm.graph))
    found = [context.constant_number(node, output) for node in output.args[0]]
    assert found == [-1e4, 3.0, None, None, None]
