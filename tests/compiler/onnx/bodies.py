"""Models of one attention, for the tests of the bodies: made, run and read."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx.inliner
import onnxruntime
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from sage_compiler.onnx import schema, verify
from sage_compiler.onnx.bodies.quantized import (
    KEY_CODES,
    QUERY_CODES,
    VALUE_CODES,
    WEIGHT_CODES,
)
from sage_compiler.onnx.body import function
from sage_compiler.onnx.schema import Mask, Variant
from tests.compiler.kernels.dense import Call

OPSET = 21
IR_VERSION = 10
CODES = (QUERY_CODES, KEY_CODES, VALUE_CODES, WEIGHT_CODES)

TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.bool: TensorProto.BOOL,
}


def variant_of(call: Call, recipe: str, *, lse: bool = True) -> Variant:
    """What a node for this call has."""
    mask = None
    if call.attn_mask is not None:
        mask = Mask.BOOL if call.attn_mask.dtype == torch.bool else Mask.FLOAT
    return Variant(
        recipe=recipe,
        mask_class=call.semantics.mask_class,
        mask=mask,
        sinks=call.sinks is not None,
        softcap=call.semantics.softcap is not None,
        dead_rows=call.semantics.dead_rows,
        lse=lse,
        grouped=call.query.shape[1] != call.key.shape[1],
    )


def node_of(call: Call, variant: Variant) -> onnx.NodeProto:
    """The node, with every attribute; its values have the names of the schema."""
    semantics = call.semantics
    return helper.make_node(
        schema.NAME,
        variant.inputs,
        variant.outputs,
        domain=schema.DOMAIN,
        overload=variant.overload,
        recipe=variant.recipe,
        mask_class=str(variant.mask_class),
        scale=semantics.scale_for(call.query.shape[-1]),
        softcap=semantics.softcap or 0.0,
        window_left=semantics.window_left,
        window_right=semantics.window_right,
        dead_rows=str(variant.dead_rows),
    )


def inputs_of(call: Call) -> dict[str, Tensor]:
    """The tensors of a call by the names of the schema."""
    found = {
        "query": call.query,
        "key": call.key,
        "value": call.value,
        "attn_mask": call.attn_mask,
        "sinks": call.sinks,
    }
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def model_of(
    call: Call, variant: Variant, *, opset: int = OPSET, dynamic: bool = True
) -> onnx.ModelProto:
    """A model of one node and its body, with symbolic dims or with those of the call."""
    inputs = [
        helper.make_tensor_value_info(
            name,
            TYPES[tensor.dtype],
            [f"{name}_{i}" for i in range(tensor.dim())] if dynamic else tuple(tensor.shape),
        )
        for name, tensor in inputs_of(call).items()
    ]
    types = {"output": (TYPES[call.query.dtype], 4), "lse": (TensorProto.FLOAT, 3)}
    outputs = [
        helper.make_tensor_value_info(name, types[name][0], [None] * types[name][1])
        for name in variant.outputs
    ]
    graph = helper.make_graph([node_of(call, variant)], "attention", inputs, outputs)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(schema.DOMAIN, schema.VERSION)]
    return helper.make_model(
        graph,
        opset_imports=imports,
        functions=[function(variant, opset)],
        ir_version=IR_VERSION,
    )


def session(model: onnx.ModelProto, *, optimize: bool = True) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def run(made: onnxruntime.InferenceSession, call: Call) -> dict[str, Tensor]:
    """The outputs of a session by name."""
    names = [output.name for output in made.get_outputs()]
    return dict(zip(names, verify.run(made, inputs_of(call)), strict=True))


def inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the body in the node's place, by the inliner of the onnx package."""
    return onnx.inliner.inline_local_functions(model)


def with_codes(model: onnx.ModelProto) -> onnx.ModelProto:
    """An inlined model whose codes of Q, K, V and P are outputs too, by their names."""
    model = inlined(model)
    for node in model.graph.node:
        for name in CODES:
            if node.output[0].startswith(f"{name}__"):  # the inliner adds a suffix
                model.graph.node.append(helper.make_node("Identity", node.output[:1], [name]))
                shape = [None] * 6
                output = helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
                model.graph.output.append(output)
    return model


def evaluate(model: onnx.ModelProto, call: Call) -> dict[str, Tensor]:
    """The outputs by name, as the onnx package's reference implementation computes them."""
    feeds = {}
    for name, tensor in inputs_of(call).items():
        if tensor.dtype == torch.bfloat16:
            feeds[name] = tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        else:
            feeds[name] = tensor.numpy()
    names = [output.name for output in model.graph.output]
    with np.errstate(all="ignore"):
        found = ReferenceEvaluator(model).run(names, feeds)
    return {
        name: torch.from_numpy(np.asarray(array, np.float32))
        for name, array in zip(names, found, strict=True)
    }


def optimized_operators(
    model: onnx.ModelProto, folder: Path, library: str | None = None
) -> list[str]:
    """The operators that ONNX Runtime, maybe with a library, runs in place of the model's."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 4
    if library is not None:
        options.register_custom_ops_library(library)
    onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    nodes = onnx.load(options.optimized_model_filepath).graph.node
    return [node.op_type for node in nodes]
