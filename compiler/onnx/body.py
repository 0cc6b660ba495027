"""The body of ``ai.sage::Attention`` in operators of ONNX: what runs without an operator library.

A model has one local function for every overload among its nodes. A runtime in which no kernel of
that name is registered puts the body in the node's place. docs/onnx-function.md is its reference.
"""

from __future__ import annotations

from typing import Final

import onnx
from onnx import helper

from sage_compiler.errors import InvalidOptionError
from sage_compiler.onnx import schema
from sage_compiler.onnx.bodies.exact import exact
from sage_compiler.onnx.bodies.graph import Graph
from sage_compiler.onnx.bodies.quantized import quantized
from sage_compiler.precision import AUTO, EXACT, RECIPES

OLDEST_OPSET: Final = 19  # the first with E4M3


def function(variant: schema.Variant, opset: int) -> onnx.FunctionProto:
    """The local function that a node of this variant stands for.

    Its inputs are named up to the last that the node has, those that the node leaves out included:
    ONNX Runtime takes no unnamed input of a function. The body has no use of them.

    Args:
        variant: what the node has.
        opset: the version of the standard operators that the model imports.

    Raises:
        InvalidOptionError: an opset older than ``OLDEST_OPSET``.
    """
    if opset < OLDEST_OPSET:
        raise InvalidOptionError(f"opset {opset}; the bodies need {OLDEST_OPSET} or newer")
    graph = Graph()
    if variant.recipe in (AUTO, EXACT):
        output, lse = exact(graph, variant)
    else:
        output, lse = quantized(graph, variant, RECIPES[variant.recipe])
    graph.output(output, "output")
    if lse is not None:
        graph.output(lse, "lse")
    required = [a.name for a in schema.attributes().values() if a.required]
    defaults = [a.default_value for a in schema.attributes().values() if not a.required]
    return helper.make_function(
        schema.DOMAIN,
        schema.NAME,
        schema.INPUTS[: len(variant.inputs)],
        variant.outputs,
        graph.nodes_for(variant.outputs),
        [helper.make_opsetid("", opset)],
        required,
        defaults,
        overload=variant.overload,
    )
