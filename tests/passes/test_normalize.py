"""Names, sources and aliasing: what every pass reads off a node."""

from __future__ import annotations

import linecache
import math
import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sage_compiler.passes.normalize import (
    argument,
    is_plain,
    may_alias,
    may_mutate,
    operation,
    source_of,
)
from tests.passes.checks import captured, check, normal, sdpa


def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A node that calls something on two inputs, ahead of whatever else is given."""
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    if isinstance(target, str):
        return graph.call_method(target, (x, y, *args), kwargs)
    return graph.call_function(target, (x, y, *args), kwargs)


def spelled(value: Any) -> str:
    """A test id that is the same in every process."""
    target = value.target if isinstance(value, fx.Node) else value
    return target if isinstance(target, str) else getattr(target, "__name__", type(target).__name__)


# --- names ----------------------------------------------------------------------------------


@torch.library.custom_op("passes_test::softmax", mutates_args=())
def foreign_softmax(x: Tensor) -> Tensor:
    return x * 2


def softmax(x: Tensor) -> Tensor:
    return x * 3


@pytest.mark.parametrize(
    "target",
    [
        "softmax",
        F.softmax,
        torch.softmax,
        torch.ops.aten.softmax,
        torch.ops.aten.softmax.int,
        torch.Tensor.softmax,
    ],
    ids=spelled,
)
def test_every_spelling_has_one_name(target: Any) -> None:
    assert operation(call(target)) == "softmax"


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (torch.ops.passes_test.softmax, "passes_test::softmax"),
        (torch.ops.passes_test.softmax.default, "passes_test::softmax"),
        (softmax, f"{__name__}.softmax"),
        (torch.ops.sage.attention.default, "sage::attention"),
        (operator.getitem, "getitem"),
        (math.floor, "floor"),
        (getattr, "getattr"),
        (torch.ops.higher_order.cond, "cond"),
    ],
    ids=spelled,
)
def test_what_others_define_is_qualified(target: Any, name: str) -> None:
    assert operation(call(target)) == name


def test_arguments_by_position_and_by_name() -> None:
    node = call(sdpa, "third", dropout_p=0.5)
    assert argument(node, 2, "value") == "third"
    assert argument(node, 4, "dropout_p") == 0.5
    assert argument(node, 5, "is_causal", False) is False


X = normal(2, 4, 6, 8)


def test_source_is_the_innermost_frame() -> None:
    (site,) = check(lambda x: sdpa(x, x, x), X).rewritten
    path, line, code = site.source.split(":", 2)
    assert path == __file__
    assert code.strip().startswith("(site,) = check(lambda x: sdpa")
    assert code.strip() == linecache.getline(__file__, int(line)).strip()


@pytest.mark.parametrize("trace", [None, "", "no frame here"])
def test_no_source_is_an_empty_text(trace: str | None) -> None:
    node = call("add")
    node.meta["stack_trace"] = trace
    assert source_of(node) == ""


# --- mutation -------------------------------------------------------------------------------

IN_PLACE_METHODS = [
    name
    for name in dir(torch.Tensor)
    if callable(getattr(torch.Tensor, name))
    and ((name.endswith("_") and not name.endswith("__")) or name in ("__setitem__", "__ior__"))
]


def test_every_in_place_method_mutates() -> None:
    assert len(IN_PLACE_METHODS) > 150
    assert [name for name in IN_PLACE_METHODS if not may_mutate(call(name))] == []
    functions = [getattr(torch.Tensor, name) for name in IN_PLACE_METHODS]
    assert [function for function in functions if not may_mutate(call(function))] == []


def test_every_in_place_operator_mutates() -> None:
    names = [name for name in dir(operator) if f"__{name}__" in dir(operator)]
    in_place = [name for name in names if name.startswith("i") and name[1:] in names]
    in_place += ["iand", "ior", "setitem", "delitem", "iconcat"]
    assert len(in_place) > 12
    assert [name for name in in_place if not may_mutate(call(getattr(operator, name)))] == []


def test_every_mutable_schema_mutates() -> None:
    missed = []
    for name in dir(torch.ops.aten):
        packet = getattr(torch.ops.aten, name)
        if not isinstance(packet, torch._ops.OpOverloadPacket):
            continue
        for overload in (getattr(packet, each) for each in packet.overloads()):
            written = [
                given.name
                for given in overload._schema.arguments
                if given.alias_info is not None and given.alias_info.is_write
            ]
            if written and not may_mutate(call(overload)):
                missed.append(str(overload))
            # A packet decides by the output arguments that the call gives.
            if written and not may_mutate(call(packet, **dict.fromkeys(written, 0))):
                missed.append(str(packet))
    assert missed == []


@pytest.mark.parametrize(
    "node",
    [
        call(F.relu, inplace=True),
        call(F.relu, True),
        call(F.dropout, 0.5, False, True),
        call(torch.relu_),
        call(torch.add, out=1),
        call(torch._foreach_add_),
        call(torch.nn.init.zeros_),
        call(F.batch_norm),
        call(torch.batch_norm),
        call(torch.ops.aten.batch_norm.default),
        call(F.instance_norm),
        call(F.embedding, max_norm=1.0),
        call(F.embedding, None, 1.0),
        call(softmax),
        call(torch.ops.higher_order.cond),
        call(torch._dynamo.utils.numpy_operator_wrapper(operator.setitem)),
        call(torch._dynamo.utils.numpy_method_wrapper("fill")),
        call(setattr),
        fx.Graph().call_module("block"),
    ],
    ids=spelled,
)
def test_what_may_mutate(node: fx.Node) -> None:
    assert may_mutate(node)


@pytest.mark.parametrize(
    "node",
    [
        *map(call, ("add", "view", "__invert__", "__and__", "masked_fill", "to", "softmax")),
        *map(call, (operator.add, operator.and_, operator.or_, operator.not_, operator.invert)),
        *map(call, (operator.getitem, operator.index, operator.is_not, getattr, math.sqrt)),
        *map(call, (torch.add, torch.where, torch.arange, torch.tril, F.softmax, F.embedding)),
        *map(call, (torch.ops.aten.add, torch.ops.aten.tril.default, torch.Tensor.add, sdpa)),
        call(F.relu, inplace=False),
        call(torch.ops.passes_test.softmax.default),
        call(torch.add, out=None),
    ],
    ids=spelled,
)
def test_what_does_not_mutate(node: fx.Node) -> None:
    assert not may_mutate(node)


def test_inputs_and_outputs_do_not_mutate() -> None:
    graph = fx.Graph()
    x = graph.placeholder("relu_")
    assert not may_mutate(x)
    assert not may_mutate(graph.output(x))


# --- aliasing -------------------------------------------------------------------------------

# Each maps a bool matrix to something that shares, or does not share, its memory.
ALIASING: dict[str, Any] = {
    "bool": lambda m: m.bool(),
    "to": lambda m: m.to(torch.bool),
    "type": lambda m: m.type(torch.bool),
    "data": lambda m: m.data,
    "detach": lambda m: m.detach(),
    "ravel": lambda m: m.ravel(),
    "atleast_2d": lambda m: torch.atleast_2d(m),
    "atleast_3d": lambda m: torch.atleast_3d(m),
    "broadcast_tensors": lambda m: torch.broadcast_tensors(m, m),
    "broadcast_to": lambda m: torch.broadcast_to(m, (2, 6, 6)),
    "tensor_split": lambda m: torch.tensor_split(m, 2),
    "unsafe_split": lambda m: torch.unsafe_split(m, 2),
    "hsplit": lambda m: torch.hsplit(m, 2),
    "chunk": lambda m: m.chunk(2),
    "unbind": lambda m: m.unbind(),
    "einsum": lambda m: torch.einsum("ij->ji", m),
    "moveaxis": lambda m: torch.moveaxis(m, 0, 1),
    "adjoint": lambda m: torch.adjoint(m),
    "T": lambda m: m.T,
    "conj": lambda m: torch.conj(m),
    "resolve_conj": lambda m: m.resolve_conj(),
    "asarray": lambda m: torch.asarray(m),
    "as_tensor": lambda m: torch.as_tensor(m),
    "diagonal": lambda m: torch.linalg.diagonal(m, offset=1),
    "view dtype": lambda m: m.view(torch.uint8),
    "expand": lambda m: m.expand(3, 6, 6),
    "contiguous": lambda m: m.contiguous(),
    "slice": lambda m: m[1:, ::2],
    "item of a mask": lambda m: m[m],
    "clone": lambda m: m.clone(),
    "invert": lambda m: ~m,
    "float": lambda m: m.float(),
    "tril": lambda m: m.tril(),
    "cat": lambda m: torch.cat([m]),
    "repeat": lambda m: m.repeat(1, 1),
}


@pytest.mark.parametrize("name", ALIASING)
def test_aliasing_is_that_of_eager(name: str) -> None:
    function = ALIASING[name]

    def run(m: Tensor) -> Any:
        return function(m & m)

    source = torch.ones(6, 6, dtype=torch.bool)
    result = function(source)
    results = result if isinstance(result, tuple | list) else [result]
    storage = source.untyped_storage().data_ptr()
    shares = any(each.untyped_storage().data_ptr() == storage for each in results)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        graph = captured(run, source).graph
    (made,) = graph.find_nodes(op="call_function", target=operator.and_)
    users = [user for user in made.users if user.op != "output"]
    assert any(may_alias(user, made) for user in users) == shares or not users


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (torch.ops.aten.view.default, True),
        (torch.ops.aten.einsum.default, True),  # composite: the schema promises nothing
        (torch.ops.aten.type_as.default, True),
        (torch.ops.aten.add.Tensor, False),
        (torch.ops.aten.clone.default, False),
        (torch.ops.aten.scaled_dot_product_attention.default, False),
    ],
    ids=spelled,
)
def test_aliasing_of_overloads(target: Any, expected: bool) -> None:
    node = call(target)
    assert may_alias(node, node.all_input_nodes[0]) is expected


def test_an_unknown_result_may_alias() -> None:
    node = call(torch.add)
    assert may_alias(node, node.all_input_nodes[0])


def test_plain_tensors() -> None:
    assert is_plain(torch.ones(2))
    assert is_plain(nn.Parameter(torch.ones(2)))
    assert not is_plain(torch.ones(2, 2).to_sparse())
    assert not is_plain(torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged))
    seen = []
    torch.vmap(lambda x: seen.append(is_plain(x)) or x)(torch.ones(2, 2))
    assert seen == [False]
