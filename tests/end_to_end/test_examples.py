"""The examples of calibration: each runs as it is, with little to do, and says what it promises."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from sage_compiler.kernels.cpu.gate import GATES
from sage_compiler.kernels.cpu.kernel import need

EXAMPLES = Path(__file__).parents[2] / "examples"
has_cpu_kernel = pytest.mark.skipif(
    need().isa_name not in GATES, reason="recipes of the CPU do not pay on this machine"
)


def output_of(example: str, *arguments: str) -> str:
    """What an example prints; it must succeed, which includes its own comparison with exact."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", EXAMPLES / example, *arguments],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_real_model_is_calibrated_for_a_gpu_that_is_not_here() -> None:
    printed = output_of("calibrate_minilm.py", "--passages", "1")
    assert "policy for sm_89: 6 layers" in printed
    assert "distance: holds" in printed
    table = printed.partition("least cosine with exact")[2].splitlines()[1:6]
    rows = {line[:11].strip(): ["", *line[11:].split()] for line in table}
    assert list(rows) == ["int4_fp8", "int8_fp8", "exact", "one int4", "adaptive"]
    # INT4 everywhere is too coarse for this model, and the table must show it.
    assert float(rows["int4_fp8"][1]) < 0.9995 < float(rows["adaptive"][1])
    assert rows["exact"][1:3] == ["1.000000", "1.000000"]
    assert "INT4 is in" in printed


@has_cpu_kernel
def test_a_diffusion_model_is_told_its_steps_and_compiled_once() -> None:
    printed = output_of("diffusion.py", "--train", "50")
    assert "policy for cpu: 2 layers, 4 timestep ranges" in printed
    assert "output_rel_l1: holds" in printed
    assert "16 steps of sampling, nothing compiled after the first call" in printed


@has_cpu_kernel
def test_a_language_model_is_calibrated_with_its_cache() -> None:
    printed = output_of("causal_lm.py", "--train", "20", "--tokens", "8")
    assert "policy for cpu: 2 layers" in printed
    assert "extra_nats: holds" in printed
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn#0"
        assert f"{name}: q4 kv2 d32 dv32 causal and q4 kv2 d32 dv32 none" in printed
    exact, policy = (
        float(line.split()[1])
        for line in printed.splitlines()
        if line.startswith(("exact ", "policy  "))
    )
    assert abs(exact - policy) < 0.001


def test_a_real_model_keeps_its_embeddings_in_onnx_runtime() -> None:
    printed = output_of("onnx_minilm.py", "--passages", "2")
    assert "6 nodes of ai.sage::Attention, 1 function for them" in printed
    assert "function: cosine with PyTorch least 1.000000" in printed
    assert re.search(r"library: cosine with PyTorch least (0\.999|1\.)", printed)
