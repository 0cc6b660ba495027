"""Sessions without a GPU of libraries with operators for CUDA; a process of its own for each
version of ONNX Runtime:

    python -m tests.compiler.onnx.cuda.sessions PROBE
"""

from __future__ import annotations

import json
import sys

import onnxruntime
import torch
from onnx import TensorProto, helper

from tests.compiler.kernels.cuda.test_attention import make_call
from tests.compiler.onnx.runtime import models


def probe(library: str) -> list[float]:
    """What the operator of ``probe.cpp`` answers."""
    node = helper.make_node("Probe", ["x"], ["answers"], "the node", domain="test")
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    answers = helper.make_tensor_value_info("answers", TensorProto.FLOAT, None)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("test", 1)]
    graph = helper.make_graph([node], "probe", [x], [answers])
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(library)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=models.PROVIDERS
    )
    found: list[float] = session.run(None, {"x": torch.zeros(1).numpy()})[0].tolist()
    return found


def attention(dtype: torch.dtype) -> bool:
    """Whether a node of ``libsage_ort``, which has operators for CUDA too, runs on the CPU."""
    output, lse = models.run(make_call(40, 50, 64, dtype, sinks=True), "int8_fp8")
    return bool(output.isfinite().all() and lse.isfinite().all())


def main() -> None:
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    found = {
        "version": onnxruntime.__version__,
        "probe": probe(sys.argv[1]),
        "attention": [attention(dtype) for dtype in dtypes],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
