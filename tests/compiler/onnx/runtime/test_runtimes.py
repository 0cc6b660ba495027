"""The operator library in its runtimes: versions, threads, sessions, and what sessions know."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from sage_compiler.semantics import MaskClass, Semantics
from tests.compiler.calls import make_call
from tests.compiler.kernels.dense import Call
from tests.compiler.onnx.runtime.models import (
    LIBRARY,
    PROVIDERS,
    attributes_of,
    feed,
    inputs_of,
    node_model,
    open_session,
    run,
)

ROOT = Path(__file__).parents[4]
OLD = ROOT / "build/onnxruntime-1.23.2"  # `make test` puts it there

# Every test of the other files runs every entry of the runtime's table that the library uses.
# These are enough of them to do so in an older runtime.
IN_OLD_RUNTIME = (
    "test_attention.py::test_random_calls[0]",
    "test_attention.py::test_head_dims",
    "test_attention.py::test_empty",
    "test_refusals.py::test_attributes",
    "test_refusals.py::test_tensors",
    "test_runtimes.py::test_the_number_of_threads_changes_nothing",
    "test_runtimes.py::test_a_registered_kernel_takes_precedence",
    "../test_matrix.py::test_function_library_and_pytorch_agree[auto-none-torch.float32]",
    "../test_matrix.py::test_function_library_and_pytorch_agree[int8_int8-bool-torch.float32]",
    "../test_matrix.py::test_function_library_and_pytorch_agree[int8_fp8-causal-torch.float16]",
    "../test_export.py::test_the_file_runs_at_other_sizes",
    "../test_export.py::test_standalone_forms",
    "../test_export.py::test_large_weights_lie_beside_the_file",
)


def test_in_an_older_runtime() -> None:
    if not OLD.is_dir():
        pytest.skip(f"{OLD} is not there; `make test` puts it there")
    here = Path(__file__).parent
    tests = [str(here / name) for name in IN_OLD_RUNTIME]
    environment = os.environ | {"PYTHONPATH": str(OLD), "SAGE_EXPECTED_ORT": "1.23.2"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", *tests,
         str(here / "test_runtimes.py::test_the_runtime_is_the_expected_one")],
        env=environment, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "skipped" not in result.stdout


def test_the_runtime_is_the_expected_one() -> None:
    expected = os.environ.get("SAGE_EXPECTED_ORT", onnxruntime.__version__)
    assert onnxruntime.__version__ == expected


@pytest.mark.parametrize("recipe", ["exact", "int8_int8"])
def test_the_number_of_threads_changes_nothing(recipe: str) -> None:
    mask = torch.rand(1, 1, 130, 300, generator=torch.Generator().manual_seed(0)) < 0.6
    calls = [
        make_call(130, 300, batch=2, heads=6, kv_heads=2, head_dim=40),
        replace(
            make_call(130, 300, batch=1, heads=2, kv_heads=1, head_dim=40),
            semantics=Semantics(MaskClass.CAUSAL_BOTTOM_RIGHT),
            attn_mask=mask,
        ),
        make_call(1, 300, batch=2, heads=6, kv_heads=2, head_dim=33),
    ]
    for call in calls:
        one, *more = [run(call, recipe, threads=threads) for threads in (1, 2, 4)]
        for other in more:
            for actual, expected in zip(other, one, strict=True):
                assert torch.equal(actual, expected)


def test_sessions_run_from_several_threads() -> None:
    call = make_call(70, 300, batch=1, heads=4, kv_heads=2, head_dim=32)
    inputs, attributes = inputs_of(call), attributes_of(call.semantics, 32)
    sessions = [
        open_session(node_model(inputs, attributes | {"recipe": recipe}), threads=2)
        for recipe in ("exact", "int8_int8")
    ]
    expected = [feed(session, inputs) for session in sessions]
    with ThreadPoolExecutor(4) as pool:  # two threads for each session
        found = list(pool.map(lambda i: (i % 2, feed(sessions[i % 2], inputs)), range(40)))
    for i, (output, lse) in found:
        assert np.array_equal(output, expected[i][0]) and np.array_equal(lse, expected[i][1])


def test_without_the_pools_arena() -> None:
    call = make_call(70, 300, batch=1, heads=4, kv_heads=2, head_dim=50)
    options = onnxruntime.SessionOptions()
    options.enable_cpu_mem_arena = False
    options.register_custom_ops_library(str(LIBRARY))
    model = node_model(inputs_of(call), attributes_of(call.semantics, 50) | {"recipe": "int8_int8"})
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=PROVIDERS)
    expected, _ = run(call, "int8_int8")
    for _ in range(3):
        assert np.array_equal(feed(session, inputs_of(call))[0], expected.numpy())


def test_libraries_are_registered_again_and_again() -> None:
    model = node_model(inputs_of(make_call(3, 4, head_dim=16)), {"scale": 0.25})
    for _ in range(20):
        options = onnxruntime.SessionOptions()
        options.register_custom_ops_library(str(LIBRARY))
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=PROVIDERS)


def function_model(call: Call) -> onnx.ModelProto:
    """A node with a local function of the same name, which gives the value, times 1000."""
    model = node_model(inputs_of(call), attributes_of(call.semantics, 16), lse=False)
    node = helper.make_node("Mul", ["value", "factor"], ["output"])
    factor = helper.make_node("Constant", [], ["factor"], value_float=1000.0)
    opsets = [helper.make_opsetid("", 21)]
    function = helper.make_function(
        "ai.sage", "Attention", ["query", "key", "value"], ["output"], [factor, node], opsets,
        attributes=["scale"],
    )  # fmt: skip
    model.functions.append(function)
    return model


def test_a_registered_kernel_takes_precedence(tmp_path: Path) -> None:
    call = make_call(5, 5, batch=1, heads=2, kv_heads=2, head_dim=16)
    model = function_model(call)
    output = feed(open_session(model), inputs_of(call))[0]
    assert np.allclose(output, run(call, "exact")[0].numpy())

    body = onnxruntime.InferenceSession(model.SerializeToString(), providers=PROVIDERS)
    assert np.allclose(feed(body, inputs_of(call))[0], 1000 * call.value.numpy())

    for library in (True, False):
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        options.log_severity_level = 4
        if library:
            options.register_custom_ops_library(str(LIBRARY))
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=PROVIDERS)
        optimized = onnx.load(tmp_path / "optimized.onnx")
        assert ("Attention" in {node.op_type for node in optimized.graph.node}) is library


def inferred(shapes: list[list[Any] | None], *, lse: bool = False) -> list[Any]:
    """What a session says of the output's shape, from the inputs'."""
    inputs = [torch.zeros(1, 1, 1, 16)] * 3
    model = node_model(inputs, {"scale": 0.25}, declared=shapes, lse=lse)
    shape: list[Any] = open_session(model).get_outputs()[0].shape
    return shape


@pytest.mark.skipif(
    tuple(map(int, onnxruntime.__version__.split(".")[:2])) < (1, 24),
    reason="this runtime does not infer shapes of registered operators safely",
)
@pytest.mark.parametrize("lse", [False, True])
def test_sessions_know_the_outputs_shape(lse: bool) -> None:
    full: list[list[Any] | None] = [[2, 4, 3, 16], [2, 2, 5, 16], [2, 2, 5, 8]]
    assert inferred(full, lse=lse) == [2, 4, 3, 8]
    named: list[list[Any] | None] = [["B", 4, "Lq", 16], ["B", 2, "Lk", 16], ["B", 2, "Lk", "E"]]
    assert inferred(named, lse=lse) == ["B", 4, "Lq", "E"]
    assert inferred([[None, 4, 3, 16], *full[1:]], lse=lse) == []
    assert inferred([None, *full[1:]], lse=lse) == []
    assert inferred([*full[:2], [2, 2, 5, None]], lse=lse) == []
    assert inferred([full[0], None, full[2]], lse=lse) == [2, 4, 3, 8]


def test_a_session_with_an_omitted_mask_and_sinks() -> None:
    """Runtimes before 1.24 crash on such a node where its operator infers shapes."""
    call = make_call(5, 5, batch=1, heads=2, kv_heads=2, head_dim=16)
    output, _ = run(replace(call, sinks=torch.zeros(2)), "exact")
    assert output.isfinite().all()


def test_a_chain_of_nodes() -> None:
    """Outputs that are inputs of the next: memory that the runtime shares among them."""
    nodes = []
    for i in range(6):
        source = "query" if i == 0 else f"x{i - 1}"
        nodes.append(
            helper.make_node(
                "Attention", [source, "key", "value"], [f"x{i}"], domain="ai.sage", scale=0.25
            )
        )
    infos = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2, 40, 16])
        for name in ("query", "key", "value", "x5")
    ]
    graph = helper.make_graph(nodes, "chain", infos[:3], infos[3:])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("ai.sage", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    call = make_call(40, 40, batch=1, heads=2, kv_heads=2, head_dim=16)
    found = torch.from_numpy(feed(open_session(model), inputs_of(call))[0])
    for _ in range(6):
        query, _ = run(call, None)
        call = replace(call, query=query)
    assert torch.equal(found, call.query)
