"""examples/onnx_runtime.cpp, compiled and run with the runtime inside the Python package."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

from sage_compiler.semantics import Semantics
from tests.compiler.kernels.dense import Call, dense
from tests.compiler.onnx.runtime.models import LIBRARY, attributes_of, inputs_of, node_model

ROOT = Path(__file__).parents[4]
RUNTIMES = sorted((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"))
COMPILER = shutil.which("c++")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not RUNTIMES or COMPILER is None:
        pytest.skip("needs a C++ compiler, and an onnxruntime with a library to link with")
    target = tmp_path_factory.mktemp("example") / "onnx_runtime"
    subprocess.run(
        [COMPILER, "-std=c++17", "-Wall", "-Wextra", "-Werror", "-O1",
         ROOT / "examples/onnx_runtime.cpp", "-I", ROOT / "tests/native_ort/include",
         RUNTIMES[-1], f"-Wl,-rpath,{RUNTIMES[-1].parent}", "-o", target],
        check=True,
    )  # fmt: skip
    # It looks for the runtime by the name that the runtime has for itself.
    soname = target.parent / "libonnxruntime.so.1"
    soname.symlink_to(RUNTIMES[-1])
    return target


def start(program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {"LD_LIBRARY_PATH": str(program.parent)}
    command = [str(program), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def filled(shift: int, *shape: int) -> Tensor:
    count = torch.Size(shape).numel()
    return (torch.arange(count, dtype=torch.float32) + shift).sin().view(shape)


def test_it_prints_the_mean(program: Path, tmp_path: Path) -> None:
    shape = (1, 4, 30, 16)
    call = Call(*(filled(i, *shape) for i in range(3)), Semantics())
    attributes = attributes_of(call.semantics, shape[3]) | {"recipe": "exact"}
    onnx.save(node_model(inputs_of(call), attributes, lse=False), tmp_path / "model.onnx")
    result = start(program, tmp_path / "model.onnx", LIBRARY, *shape)
    assert result.returncode == 0, result.stderr
    expected, _ = dense(call)
    assert result.stdout.startswith("mean ")
    assert abs(float(result.stdout.removeprefix("mean ")) - float(expected.mean())) < 2e-6


def test_what_goes_wrong_is_said(program: Path, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").touch()
    assert (
        "error: " in start(program, tmp_path / "model.onnx", tmp_path / "no.so", 1, 1, 1, 8).stderr
    )
    call = Call(*(filled(i, 1, 1, 4, 8) for i in range(3)))
    wrong = attributes_of(call.semantics, 8) | {"recipe": "int3"}
    onnx.save(node_model(inputs_of(call), wrong, lse=False), tmp_path / "model.onnx")
    result = start(program, tmp_path / "model.onnx", LIBRARY, 1, 1, 4, 8)
    assert result.returncode == 1
    assert 'attribute recipe is "int3"; known: auto, exact' in result.stderr
