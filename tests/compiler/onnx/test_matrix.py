"""Every recipe, mask and dtype in one file: its function, the library and PyTorch agree, and the
node stays where the library is and gives way to the function where it is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch

from sage_compiler.onnx import schema
from sage_compiler.onnx.session import ort_library
from sage_compiler.ops import expecting_emulation
from sage_compiler.precision import AUTO, EXACT, PRECISIONS
from sage_compiler.semantics import MaskClass, Semantics
from tests.compiler.calls import gaussian, make_call, run_lse
from tests.compiler.kernels.dense import Call, dense
from tests.compiler.onnx import bodies
from tests.compiler.onnx.runtime.models import open_session
from tests.tolerances import check, check_lse

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MASKS = ("none", "causal", "window", "bool", "float", "causal and bool")
# Which row of the tolerances holds for the library's kernel; it has the same recipe otherwise.
SERVED = {
    "auto": "int8_int8",
    "int4_fp8": "int8_int8",
    "int4_fp16": "int8_int8",
    "int8_fp8": "int8_int8",
    "int8_fp16": "int8_int16",
}


def call_with(mask: str, dtype: torch.dtype) -> Call:
    """Grouped heads over 80 queries and 150 keys."""
    call = make_call(80, 150, heads=4, kv_heads=2, head_dim=32, dtype=dtype)
    explicit = {
        "bool": gaussian(2, 1, 80, 150, seed=7) > -0.5,
        "float": gaussian(4, 80, 150, seed=8).to(dtype),
        "causal and bool": gaussian(80, 150, seed=9) > -0.5,
    }
    semantics = {
        "causal": Semantics(MaskClass.CAUSAL),
        "causal and bool": Semantics(MaskClass.CAUSAL_BOTTOM_RIGHT),
        "window": Semantics(MaskClass.WINDOW_BOTTOM_RIGHT, 40, 5),
    }
    return replace(
        call, attn_mask=explicit.get(mask), semantics=semantics.get(mask, call.semantics)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("recipe", PRECISIONS)
def test_function_library_and_pytorch_agree(
    recipe: str, mask: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    schema.schema()
    call = call_with(mask, dtype)
    model = bodies.model_of(call, bodies.variant_of(call, recipe), dynamic=False)
    for output in model.graph.output:
        output.ClearField("type")
    model = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    shapes = [
        [dim.dim_value for dim in output.type.tensor_type.shape.dim]
        for output in model.graph.output
    ]
    assert shapes == [[2, 4, 80, 32], [2, 4, 80]]
    onnx.checker.check_model(model, full_check=True)

    expected, expected_lse = dense(call)
    exact = EXACT if recipe in (AUTO, EXACT) else recipe
    by_function = bodies.run(bodies.session(model), call)
    by_library = bodies.run(open_session(model), call)
    with expecting_emulation():
        in_pytorch = run_lse(call, recipe)
    for output, lse, row in (
        (by_function["output"], by_function["lse"], exact),
        (by_library["output"], by_library["lse"], SERVED.get(recipe, recipe)),
        (*in_pytorch, SERVED["auto"] if recipe == AUTO else recipe),
    ):
        assert output.dtype == dtype
        check(output, expected, call.value, row)
        check_lse(lse, expected_lse, row)
    kept = bodies.optimized_operators(model, tmp_path, ort_library())
    assert kept.count(schema.NAME) == 1 and len(kept) == 1
    assert schema.NAME not in bodies.optimized_operators(model, tmp_path)
