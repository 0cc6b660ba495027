"""The bodies in the oldest ONNX Runtime that is supported, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from sage_compiler.precision import PRECISIONS
from tests.compiler.kernels.dense import random_call
from tests.compiler.onnx.bodies import evaluate, inputs_of, model_of, variant_of
from tests.compiler.onnx.closeness import assert_close

VERSION = "1.23.2"
INSTALLED = Path(__file__).parents[3] / "build" / f"onnxruntime-{VERSION}"
NEWEST_OPSET = 23  # that it knows
SEEDS = (0, 5, 21, 30)  # plain, of several tiles; bool with sinks; float with a window; a band

RUN = f"""
import pathlib, sys
import numpy, onnxruntime
assert onnxruntime.__version__ == "{VERSION}", onnxruntime.__version__
for folder in map(pathlib.Path, sys.argv[1:]):
    levels = onnxruntime.GraphOptimizationLevel
    for level in (levels.ORT_ENABLE_ALL, levels.ORT_DISABLE_ALL):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = level
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(
            str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        outputs = session.run(["output", "lse"], dict(numpy.load(folder / "inputs.npz")))
        numpy.savez(folder / f"{{level.name}}.npz", output=outputs[0], lse=outputs[1])
"""


@pytest.mark.skipif(not INSTALLED.is_dir(), reason=f"no ONNX Runtime {VERSION} in {INSTALLED}")
def test_the_oldest_runtime_agrees(tmp_path: Path) -> None:
    cases = [(recipe, seed) for recipe in PRECISIONS for seed in SEEDS]
    folders = []
    for recipe, seed in cases:
        call = random_call(seed, longest=150)
        assert call.query.dtype == torch.float32
        folder = tmp_path / f"{recipe}-{seed}"
        folder.mkdir()
        opset = NEWEST_OPSET if seed % 2 else 21
        onnx.save(model_of(call, variant_of(call, recipe), opset=opset), folder / "model.onnx")
        np.savez(folder / "inputs.npz", **{k: v.numpy() for k, v in inputs_of(call).items()})
        folders.append(folder)
    environment = {**os.environ, "PYTHONPATH": str(INSTALLED)}
    subprocess.run([sys.executable, "-c", RUN, *map(str, folders)], check=True, env=environment)
    for (recipe, seed), folder in zip(cases, folders, strict=True):
        call = random_call(seed, longest=150)
        expected = evaluate(model_of(call, variant_of(call, recipe)), call)
        for level in ("ORT_ENABLE_ALL", "ORT_DISABLE_ALL"):
            found = np.load(folder / f"{level}.npz")
            got = {name: torch.from_numpy(found[name]) for name in ("output", "lse")}
            assert_close(got, expected, call, recipe)
