"""What the operator library refuses, and in what words."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.compiler.onnx.runtime.models import LIBRARY, feed, node_model, open_session

# onnxruntime has no class for what it raises, but a module of them.
from onnxruntime.capi.onnxruntime_pybind11_state import (  # isort: skip
    Fail,
    InvalidArgument,
    InvalidGraph,
    RuntimeException,
)

GOOD: list[Tensor | None] = [torch.zeros(2, 4, 3, 16), torch.zeros(2, 2, 5, 16),
                             torch.zeros(2, 2, 5, 8)]  # fmt: skip
SCALE = {"scale": 0.25}
RECIPES = "auto, exact, int4_fp8, int4_fp16, int8_fp8, int8_fp16, int8_int8, int8_int16"
CLASSES = "none, causal, causal_bottom_right, window, window_bottom_right"


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({"recipe": "int3"}, f'attribute recipe is "int3"; known: {RECIPES}'),
        ({"recipe": ""}, f'attribute recipe is ""; known: {RECIPES}'),
        ({"recipe": "x" * 1000}, f'attribute recipe is "a longer word"; known: {RECIPES}'),
        ({"recipe": b"exact\0junk"}, f'attribute recipe is "a word and a zero"; known: {RECIPES}'),
        ({"recipe": 3}, "attribute recipe is an int; it must be a string"),
        ({"recipe": [3, 4]}, "attribute recipe is a list; it must be a string"),
        ({"mask_class": "diagonal"}, f'attribute mask_class is "diagonal"; known: {CLASSES}'),
        ({"dead_rows": "one"}, 'attribute dead_rows is "one"; known: zero, nan'),
        ({"scale": None}, "attribute scale is missing; it must be a float"),
        ({"scale": 1}, "attribute scale is an int; it must be a float"),
        ({"scale": float("inf")}, "scale is inf; it must be finite"),
        ({"softcap": -1.0}, "softcap is -1; it must be positive and finite, or 0 for none"),
        ({"softcap": float("nan")}, "softcap is nan; it must be positive and finite"),
        ({"softcap": "5"}, "attribute softcap is a string; it must be a float"),
        ({"softcap": [5.0]}, "attribute softcap is a list; it must be a float"),
        ({"mask_class": "window", "window_left": -2},
         "window_left and window_right are -2 and -1; each counts keys, -1 means no limit"),
        ({"mask_class": "window", "window_left": 2.0},
         "attribute window_left is a float; it must be an int"),
        ({"mask_class": "causal", "window_right": 3},
         'window_left and window_right are -1 and 3 with mask_class "causal"; use window or '
         "window_bottom_right, or leave them out"),
    ],
)  # fmt: skip
def test_attributes(attributes: dict[str, Any], words: str) -> None:
    given = {name: x for name, x in (SCALE | attributes).items() if x is not None}
    with pytest.raises(RuntimeException) as caught:
        open_session(node_model(GOOD, given))
    assert f"ai.sage::Attention: {words}" in str(caught.value)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({0: zeros(4, 3, 16)},
         "query has shape (4, 3, 16); 4 dims are needed: (batch, heads, length, head_dim)"),
        ({2: zeros(*range(1, 10))}, "value has shape (1, 2, 3, 4, 5, 6, 7, 8, ...); 4 dims are"),
        ({0: zeros(1, 4, 3, 16)},
         "query (1, 4, 3, 16), key (2, 2, 5, 16), value (2, 2, 5, 8); they must have the same "
         "batch"),
        ({1: zeros(2, 1, 5, 16)}, "; key and value must have the same number of heads"),
        ({0: zeros(2, 3, 3, 16)}, "; query's number of heads must be a multiple of key's"),
        ({1: zeros(2, 0, 5, 16), 2: zeros(2, 0, 5, 8)}, "must be a multiple of key's"),
        ({1: zeros(2, 2, 6, 16)}, "; key and value must have the same length"),
        ({1: zeros(2, 2, 5, 15)}, "; query and key must have the same head_dim"),
        ({3: zeros(2, 3, dtype=torch.bool)},
         "attn_mask has shape (2, 3), which does not broadcast to (B, H, Lq, Lk) = (2, 4, 3, 5)"),
        ({3: zeros(2, 2, 3, 5)}, "attn_mask has shape (2, 2, 3, 5), which does not broadcast to"),
        ({3: zeros(1, 1, 1, 1, 5)}, "attn_mask has shape (1, 1, 1, 1, 5), which does not"),
        ({3: zeros()}, "attn_mask has shape (), which does not broadcast to"),
        ({3: zeros(5, dtype=torch.int64)},
         "attn_mask is of type int64; it must be bool, float, float16 or bfloat16"),
        ({3: zeros(5, dtype=torch.float64)}, "attn_mask is of type double; it must be"),
        ({4: zeros(3)}, "sinks has shape (3,); one logit per head is needed: (4,)"),
        ({4: zeros(4, 1)}, "sinks has shape (4, 1); one logit per head is needed: (4,)"),
        ({4: zeros(4, dtype=torch.bool)},
         "sinks is of type bool; it must be float, float16 or bfloat16"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("recipe", ["exact", "int8_int8"])
def test_tensors(recipe: str, changes: dict[int, Tensor], words: str) -> None:
    inputs = [changes.get(i, GOOD[i] if i < 3 else None) for i in range(max(3, max(changes) + 1))]
    session = open_session(node_model(inputs, SCALE | {"recipe": recipe}))
    with pytest.raises((Fail, InvalidArgument)) as caught:
        feed(session, inputs)
    assert "ai.sage::Attention: " in str(caught.value) and words in str(caught.value)


def test_types_that_differ_are_the_runtimes_to_refuse() -> None:
    mixed = [GOOD[0], zeros(2, 2, 5, 16, dtype=torch.float16), GOOD[2]]
    with pytest.raises((Fail, InvalidGraph)):
        open_session(node_model(mixed, SCALE))
    with pytest.raises((Fail, InvalidGraph)):
        open_session(node_model([x.double() for x in GOOD if x is not None], SCALE))
    with pytest.raises((Fail, InvalidGraph)):
        open_session(node_model([GOOD[0], GOOD[1], None], SCALE))


def test_a_failure_leaves_the_session_as_it_was() -> None:
    inputs = [*GOOD[:3], zeros(5)]
    session = open_session(node_model(inputs, SCALE))
    with pytest.raises((Fail, InvalidArgument)):
        feed(session, [*GOOD[:3], zeros(4)])
    output, _ = feed(session, inputs)
    assert output.shape == (2, 4, 3, 8)


def test_an_instruction_set_that_is_not_here() -> None:
    script = f"""
import onnxruntime
from tests.compiler.onnx.runtime.test_refusals import GOOD, SCALE
from tests.compiler.onnx.runtime.models import node_model
options = onnxruntime.SessionOptions()
options.register_custom_ops_library({str(LIBRARY)!r})
model = node_model(GOOD, SCALE).SerializeToString()
onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
"""
    result = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"SAGE_CPU_ISA": "mmx"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1  # an exception, not a crash
    assert 'SAGE_CPU_ISA is "mmx"' in result.stderr
