"""ONNX Runtime itself, without a GPU: operators for CUDA do not stand in a CPU's way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.compiler.onnx.cuda.native import HERE
from tests.cutlass_templates import host

OLDEST = host.ROOT / "build" / "onnxruntime-1.23.2"


@pytest.fixture(scope="module")
def probe() -> Path:
    runtime = host.ROOT / "compiler" / "onnx" / "runtime"
    source = HERE / "probe.cpp"
    flags = ("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror")
    arguments = [*flags, "-shared", "-I", str(runtime), str(source)]
    content = [source.read_bytes(), (runtime / "ort_abi.hpp").read_bytes()]
    return host._build("libprobe.so", arguments, content)


@pytest.mark.parametrize("where", [None, OLDEST], ids=["installed", "oldest"])
def test_a_session_on_a_cpu(where: Path | None, probe: Path) -> None:
    """The entries of the runtime's table that only CUDA needs are where they must be, and all
    dtypes run on the CPU, where no CUDA is."""
    if where is not None and not where.is_dir():
        pytest.skip(f"there is no {where}")
    path = [str(where)] if where is not None else []
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*path, str(host.ROOT)])}
    command = [sys.executable, "-m", "tests.compiler.onnx.cuda.sessions", str(probe)]
    done = subprocess.run(
        command, cwd=host.ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert where is None or found["version"] == "1.23.2"
    assert found["probe"] == [1.0] * 6
    (warning,) = [line for line in done.stderr.splitlines() if "the probe warns" in line]
    assert "[W:onnxruntime:" in warning and "probe.cpp:7 probe" in warning
    assert found["attention"] == [True] * 3
