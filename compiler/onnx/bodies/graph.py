"""Nodes of a function body, written as expressions over values.

The methods of ``Value`` are operators of ONNX; only what the bodies use is here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final, TypeAlias

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, helper, numpy_helper

Operand: TypeAlias = "Value | float | int"

_ATTRIBUTE: Final = {AttributeProto.FLOAT: "value_float", AttributeProto.INT: "value_int"}


class Graph:
    """A growing list of nodes in topological order; equal expressions are one node."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._names: dict[str, int] = {}
        self._made: dict[bytes, Value] = {}

    def input(self, name: str) -> Value:
        """A value that the caller of the function gives, by its name in the signature."""
        return Value(self, name)

    def add(self, operator: str, *inputs: Operand, name: str = "", **attributes: Any) -> Value:
        """The output of a node that has one.

        Args:
            operator: of the standard domain.
            inputs: values; a Python float is a FLOAT constant, an int an INT64 one.
            name: of the output; by default made of the operator.
            attributes: of the node.
        """
        names = [self.value(x).name for x in inputs]
        node = helper.make_node(operator, names, [], **attributes)
        return self._append(node, name or operator.lower())

    def value(self, x: Operand) -> Value:
        """``x``, as a constant if it is a Python number."""
        if isinstance(x, Value):
            return x
        return self.constant(np.asarray(x, np.float32 if isinstance(x, float) else np.int64))

    def constant(self, array: np.ndarray[Any, Any]) -> Value:
        return self.add("Constant", value=numpy_helper.from_array(array))

    def shape(self, *dims: int | Value) -> Value:
        """INT64 (n,), from numbers and INT64 (1,)."""
        parts: list[Value] = []
        for _, run in groupby(dims, lambda dim: isinstance(dim, int)):
            sizes = list(run)
            known = [size for size in sizes if isinstance(size, int)]
            parts += [size for size in sizes if isinstance(size, Value)]
            if known:
                parts.append(self.constant(np.asarray(known, np.int64)))
        return parts[0] if len(parts) == 1 else self.add("Concat", *parts, axis=0)

    def attribute(self, name: str, kind: AttributeProto.AttributeType) -> Value:
        """The scalar that the node has in its attribute ``name``: FLOAT or INT64."""
        node = helper.make_node("Constant", [], [])
        node.attribute.add(name=_ATTRIBUTE[kind], ref_attr_name=name, type=kind)
        return self._append(node, name)

    def scan(self, body: onnx.GraphProto, state: Value, x: Value) -> Value:
        """What ``body`` (state, slice) -> (state, slice) makes of x, along its first axis."""
        outputs = [self._unique("last_state"), self._unique("scan")]
        names = [state.name, x.name]
        self._nodes.append(helper.make_node("Scan", names, outputs, body=body, num_scan_inputs=1))
        return Value(self, outputs[1])

    def output(self, value: Value, name: str) -> None:
        """Make a value an output of the function, by its name in the signature."""
        self._nodes.append(helper.make_node("Identity", [value.name], [name]))

    def nodes_for(self, outputs: Iterable[str]) -> list[onnx.NodeProto]:
        """The nodes that these outputs need, in order."""
        needed, used = set(outputs), []
        for node in reversed(self._nodes):
            if not needed.isdisjoint(node.output):
                needed.update(node.input)
                used.append(node)
        return used[::-1]

    def _append(self, node: onnx.NodeProto, name: str) -> Value:
        """The output of a node that lacks only that; of the one that there is, if it is equal."""
        key = node.SerializeToString()
        if key not in self._made:
            node.output.append(self._unique(name))
            self._nodes.append(node)
            self._made[key] = Value(self, node.output[0])
        return self._made[key]

    def _unique(self, name: str) -> str:
        count = self._names.get(name, 0)
        self._names[name] = count + 1
        return f"{name}_{count}" if count else name


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor of the body. Operators between values broadcast as ONNX (and NumPy) does."""

    graph: Graph
    name: str

    def __add__(self, other: Operand) -> Value:
        return self.graph.add("Add", self, other)

    def __sub__(self, other: Operand) -> Value:
        return self.graph.add("Sub", self, other)

    def __mul__(self, other: Operand) -> Value:
        return self.graph.add("Mul", self, other)

    def __truediv__(self, other: Operand) -> Value:
        """Division; that of INT64 rounds down, as no operand is negative here."""
        return self.graph.add("Div", self, other)

    def __matmul__(self, other: Value) -> Value:
        return self.graph.add("MatMul", self, other)

    def __le__(self, other: Operand) -> Value:
        return self.graph.add("LessOrEqual", self, other)

    def __lt__(self, other: Operand) -> Value:
        return self.graph.add("Less", self, other)

    def __ge__(self, other: Operand) -> Value:
        return self.graph.add("GreaterOrEqual", self, other)

    def __gt__(self, other: Operand) -> Value:
        return self.graph.add("Greater", self, other)

    def __and__(self, other: Value) -> Value:
        return self.graph.add("And", self, other)

    def __or__(self, other: Value) -> Value:
        return self.graph.add("Or", self, other)

    def __invert__(self) -> Value:
        return self.graph.add("Not", self)

    def equals(self, other: Operand) -> Value:
        return self.graph.add("Equal", self, other)

    def where(self, condition: Value, otherwise: Operand, name: str = "") -> Value:
        """This value where ``condition`` is true, else the other one."""
        return self.graph.add("Where", condition, self, otherwise, name=name)

    def is_inf(self) -> Value:
        """Whether it is +inf: so -inf, the maximum of nothing, is not an infinite amax."""
        return self.graph.add("IsInf", self, detect_negative=0)

    def is_nan(self) -> Value:
        return self.graph.add("IsNaN", self)

    def maximum(self, other: Operand) -> Value:
        return self.graph.add("Max", self, other)

    def minimum(self, other: Operand) -> Value:
        return self.graph.add("Min", self, other)

    def clip(self, limit: float) -> Value:
        """To [-limit, limit]. NaN stays, as it does in ONNX Runtime."""
        return self.graph.add("Clip", self, -float(limit), float(limit))

    def abs(self) -> Value:
        return self.graph.add("Abs", self)

    def exp(self) -> Value:
        return self.graph.add("Exp", self)

    def log(self) -> Value:
        return self.graph.add("Log", self)

    def tanh(self) -> Value:
        return self.graph.add("Tanh", self)

    def floor(self) -> Value:
        return self.graph.add("Floor", self)

    def round(self, name: str = "") -> Value:
        """To the nearest integer, half to even."""
        return self.graph.add("Round", self, name=name)

    def softmax(self) -> Value:
        return self.graph.add("Softmax", self, axis=-1)

    def sum(self, *axes: int) -> Value:
        """The sum over ``axes``, which stay with size 1; over nothing it is zero."""
        return self.graph.add("ReduceSum", self, self.graph.shape(*axes), keepdims=1)

    def max(self, *axes: int) -> Value:
        """The maximum over ``axes``, which stay with size 1. It need not propagate NaN."""
        return self.graph.add("ReduceMax", self, self.graph.shape(*axes), keepdims=1)

    def min(self, *axes: int) -> Value:
        """The minimum over ``axes``, which stay with size 1. It need not propagate NaN."""
        return self.graph.add("ReduceMin", self, self.graph.shape(*axes), keepdims=1)

    def any(self, *axes: int) -> Value:
        """Whether any of these booleans is true; none is where there is none."""
        # A sum: ReduceMax has no kernel for booleans, and no value for empty axes.
        return self.to_float().sum(*axes) > 0.0

    def to_float(self) -> Value:
        """As FLOAT; without cost where it is."""
        return self.cast(TensorProto.FLOAT)

    def cast(self, to: TensorProto.DataType, name: str = "") -> Value:
        return self.graph.add("Cast", self, name=name, to=to)

    def cast_like(self, other: Value) -> Value:
        return self.graph.add("CastLike", self, other)

    def transpose(self, *permutation: int) -> Value:
        return self.graph.add("Transpose", self, perm=permutation)

    def reshape(self, shape: Value) -> Value:
        """The same elements in another shape; 0 in it is an empty axis."""
        return self.graph.add("Reshape", self, shape, allowzero=1)

    def unsqueeze(self, *axes: int) -> Value:
        return self.graph.add("Unsqueeze", self, self.graph.shape(*axes))

    def squeeze(self, *axes: int) -> Value:
        return self.graph.add("Squeeze", self, self.graph.shape(*axes))

    def expand(self, shape: Value) -> Value:
        """Broadcast with ``shape``."""
        return self.graph.add("Expand", self, shape)

    def dims(self) -> Value:
        """The shape, INT64 (rank,)."""
        return self.graph.add("Shape", self)

    def dim(self, axis: int) -> Value:
        """The size of one axis, INT64 (1,)."""
        return self.graph.add("Shape", self, start=axis, end=axis + 1)

    def indices(self) -> Value:
        """0, 1, ... below this INT64 (1,)."""
        return self.graph.add("Range", 0, self.squeeze(0), 1)

    def pad_end(self, amounts: Sequence[int | Value]) -> Value:
        """Append ``amounts`` of zeros (False) to each axis."""
        starts = [0] * len(amounts)
        return self.graph.add("Pad", self, self.graph.shape(*starts, *amounts))

    def slice(self, axis: int, start: int | Value, stop: int | Value) -> Value:
        shape = self.graph.shape
        return self.graph.add("Slice", self, shape(start), shape(stop), shape(axis))

    def gather(self, indices: Value, axis: int) -> Value:
        return self.graph.add("Gather", self, indices, axis=axis)
