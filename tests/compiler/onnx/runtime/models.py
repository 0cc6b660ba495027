"""Models of a single ai.sage::Attention node, and their run in ONNX Runtime with the library."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper
from torch import Tensor

import sage_compiler
from sage_compiler.semantics import Semantics
from tests.compiler.kernels.dense import Call

PROVIDERS: Final = ["CPUExecutionProvider"]
_SUFFIX: Final = ".dylib" if sys.platform == "darwin" else ".so"
_HERE: Final = Path(sage_compiler.__file__).resolve().parent
LIBRARY: Final = _HERE / f"onnx/runtime/libsage_ort{_SUFFIX}"

ONNX_TYPES: Final = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.float64: TensorProto.DOUBLE,
    torch.bool: TensorProto.BOOL,
    torch.int64: TensorProto.INT64,
}
INPUTS: Final = ("query", "key", "value", "attn_mask", "sinks")


def attributes_of(semantics: Semantics, head_dim: int) -> dict[str, Any]:
    """The attributes of a node that computes this; those at their default are left out."""
    attributes: dict[str, Any] = {
        "mask_class": str(semantics.mask_class),
        "scale": semantics.scale_for(head_dim),
        "window_left": semantics.window_left,
        "window_right": semantics.window_right,
        "dead_rows": str(semantics.dead_rows),
    }
    if semantics.softcap is not None:
        attributes["softcap"] = semantics.softcap
    defaults = {"mask_class": "none", "window_left": -1, "window_right": -1, "dead_rows": "zero"}
    return {name: x for name, x in attributes.items() if defaults.get(name) != x}


def node_model(
    inputs: Sequence[Tensor | None],
    attributes: dict[str, Any],
    *,
    lse: bool = True,
    names: Sequence[str] = INPUTS,
    declared: Sequence[Sequence[int | str | None] | None] | None = None,
) -> onnx.ModelProto:
    """A model of one node whose inputs have these types.

    numpy has no bfloat16, so such an input of the model is float and is cast, and so is such an
    output; both casts are exact.

    Args:
        inputs: of the node; None leaves one out. Trailing ones may be missing.
        attributes: of the node.
        lse: whether the node has the second output.
        names: of the inputs.
        declared: the shapes of the inputs in the model; without, their ranks alone.
    """
    nodes, graph_inputs, node_inputs = [], [], []
    for i, x in enumerate(inputs):
        if x is None:
            node_inputs.append("")
            continue
        narrow = x.dtype == torch.bfloat16
        shape = [None] * x.dim() if declared is None else declared[i]
        dtype = TensorProto.FLOAT if narrow else ONNX_TYPES[x.dtype]
        graph_inputs.append(helper.make_tensor_value_info(names[i], dtype, shape))
        node_inputs.append(f"{names[i]}_narrow" if narrow else names[i])
        if narrow:
            nodes.append(_cast(names[i], node_inputs[-1], TensorProto.BFLOAT16))
    narrow = inputs[0] is not None and inputs[0].dtype == torch.bfloat16
    outputs = ["output_narrow" if narrow else "output", *(["lse"] if lse else [])]
    nodes.append(
        helper.make_node("Attention", node_inputs, outputs, domain="ai.sage", **attributes)
    )
    if narrow:
        nodes.append(_cast("output_narrow", "output", TensorProto.FLOAT))
    dtype = TensorProto.FLOAT if narrow or inputs[0] is None else ONNX_TYPES[inputs[0].dtype]
    graph_outputs = [helper.make_tensor_value_info("output", dtype, None)]
    if lse:
        graph_outputs.append(helper.make_tensor_value_info("lse", TensorProto.FLOAT, None))
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("ai.sage", 1)]
    graph = helper.make_graph(nodes, "attention", graph_inputs, graph_outputs)
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _cast(source: str, target: str, dtype: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], to=dtype)


def open_session(model: onnx.ModelProto, *, threads: int = 0) -> onnxruntime.InferenceSession:
    """A session with the library; ``threads`` as intra_op_num_threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # what is refused is looked at as an exception
    options.register_custom_ops_library(str(LIBRARY))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=PROVIDERS)


def feed(session: onnxruntime.InferenceSession, inputs: Sequence[Tensor | None]) -> list[Any]:
    """Run with the inputs that are given, in the order of ``INPUTS``; numpy arrays."""
    given = {
        name: (x.float() if x.dtype == torch.bfloat16 else x).contiguous().numpy()
        for name, x in zip(INPUTS, inputs, strict=False)
        if x is not None
    }
    results: list[Any] = session.run(None, given)
    return results


def inputs_of(call: Call) -> list[Tensor | None]:
    inputs = [call.query, call.key, call.value, call.attn_mask, call.sinks]
    while inputs[-1] is None:
        inputs.pop()
    return inputs


def run(call: Call, recipe: str | None, *, threads: int = 0) -> tuple[Tensor, Tensor]:
    """The output, in query's dtype, and the LSE; without a recipe the attribute is left out."""
    attributes = attributes_of(call.semantics, call.query.shape[3])
    if recipe is not None:
        attributes["recipe"] = recipe
    inputs = inputs_of(call)
    output, lse = feed(open_session(node_model(inputs, attributes), threads=threads), inputs)
    assert lse.dtype == np.float32
    return torch.from_numpy(output).to(call.query.dtype), torch.from_numpy(lse)
