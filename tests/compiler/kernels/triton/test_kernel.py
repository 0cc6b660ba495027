"""The Triton kernel in the registry: whose calls it takes, and that its programs are right."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sage_compiler.errors import KernelUnavailableError
from sage_compiler.kernels.cuda import kernel as cuda_kernel
from sage_compiler.kernels.kernel import Problem
from sage_compiler.kernels.registry import Unavailable, default, find
from sage_compiler.kernels.triton import kernel
from sage_compiler.semantics import MaskClass
from tests.compiler.kernels.triton.test_interpreted import all_at_once, small_call

ROOT = Path(__file__).parents[4]
INTERPRETED = Path(__file__).with_name("test_interpreted.py")
NO_TRITON = pytest.mark.skipif(not kernel.is_installed(), reason="Triton is not installed")

PROBLEM = Problem(
    device_type="cuda",
    dtype=torch.bfloat16,
    head_dim=128,
    value_head_dim=128,
    heads=8,
    kv_heads=2,
    mask_class=MaskClass.CAUSAL,
    has_mask=False,
)


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """What is remembered of devices and images."""
    for remembered in (cuda_kernel._arch, cuda_kernel._missing):
        remembered.cache_clear()
    yield
    for remembered in (cuda_kernel._arch, cuda_kernel._missing):
        remembered.cache_clear()


def served(problem: Problem, recipe: str = "int8_fp16") -> str:
    """The kernel's name, or why there is none."""
    found = find(recipe, problem)
    return found.reason if isinstance(found, Unavailable) else found.name()


class Images:
    """Of a machine that has no kernel, or any."""

    reason: str | None = "no compiler for kernels"

    def missing(self, spec: object) -> str | None:
        return self.reason


@pytest.fixture
def bare_machine(monkeypatch: pytest.MonkeyPatch) -> type[Images]:
    """A GPU of compute capability 8.9, Triton, and neither a pack nor a compiler."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 9))
    monkeypatch.setattr(kernel, "is_installed", lambda: True)
    monkeypatch.setattr(cuda_kernel, "default_images", Images)
    monkeypatch.setattr(Images, "reason", Images.reason)
    return Images


def test_it_serves_where_no_cutlass_kernel_can_be_had(bare_machine: type[Images]) -> None:
    assert served(PROBLEM) == "triton"
    assert served(dataclasses.replace(PROBLEM, dtype=torch.float32, has_mask=True)) == "triton"
    assert "no compiler for kernels" in served(PROBLEM, "int8_fp8")
    assert default(PROBLEM).recipe == "exact"


def test_cutlass_kernels_come_first(bare_machine: type[Images]) -> None:
    bare_machine.reason = None
    assert served(PROBLEM) == "cuda-mma"
    refused = served(dataclasses.replace(PROBLEM, head_dim=300))
    assert "triton: sm_89 is left to the CUTLASS kernels" in refused
    for capability in ((8, 0), (8, 7), (8, 9), (9, 0), (12, 1)):  # of GPUs elsewhere
        assert served(dataclasses.replace(PROBLEM, capability=capability)) != "triton"


@pytest.mark.usefixtures("bare_machine")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": torch.float64}, "sm_89 is left to the CUTLASS kernels"),
        ({"capability": (7, 5)}, "compute capability 7.5 is below 8.0"),
    ],
)
def test_refusals(change: dict[str, object], words: str) -> None:
    told = served(dataclasses.replace(PROBLEM, **change))  # type: ignore[arg-type]
    assert f"triton: {words}" in told


def test_auto_is_exact() -> None:
    """On a GPU that nobody has measured."""
    (registered,) = kernel.KERNELS
    assert not registered.smallest().admits(1 << 30, 1 << 30, 1 << 60)
    assert registered.gate(PROBLEM) == "int8_fp16 in Triton is not measured on any GPU"


@pytest.mark.usefixtures("bare_machine")
def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "is_installed", lambda: False)
    assert "triton: Triton is not installed" in served(PROBLEM)


def test_rocm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its capabilities are other numbers: those of gfx90a look like sm_90."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    told = served(PROBLEM)
    assert "cuda-mma: the CUDA kernels are for GPUs of NVIDIA" in told
    assert "triton: it was never tried on ROCm" in told


def test_importing_the_package_does_not_import_the_programs() -> None:
    name = "sage_compiler.kernels.triton.programs"
    program = f"import sys, sage_compiler; print({name!r} in sys.modules)"
    run = [sys.executable, "-P", "-c", program]
    result = subprocess.run(run, capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "False"


@NO_TRITON
def test_in_the_interpreter() -> None:
    """Against the reference: test_interpreted.py, in a process that interprets."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["-W", "ignore", str(INTERPRETED)]
    hidden = ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    done = subprocess.run(
        command,
        env={**environment, "TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


@NO_TRITON
@pytest.mark.parametrize("capability", [80, 121])
def test_the_programs_compile(
    capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the oldest GPU that has them and a young one, neither of which need be here."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from tests.compiler.kernels.triton.compiled import compile_for

    call = all_at_once() if capability == 80 else small_call(dtype=torch.bfloat16)
    compiled = compile_for(capability, call)
    assert all(program.asm["cubin"] for program in compiled.values())
    assert "s32.s8.s8.s32" in compiled["attend"].asm["ptx"]  # INT8 on tensor cores
    assert max(program.metadata.shared for program in compiled.values()) <= 99 << 10


@NO_TRITON
@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120, 121])
def test_the_programs_fit(
    capability: int, head_dim: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into the shared memory of the GPU that has least, with everything on top."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from tests.compiler.kernels.triton.compiled import compile_for

    call = all_at_once()
    query, key, value = (
        torch.zeros(*x.shape[:3], head_dim) for x in (call.query, call.key, call.value)
    )
    call = dataclasses.replace(call, query=query, key=key, value=value)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        typed = [x.to(dtype) for x in (query, key, value)]
        call = dataclasses.replace(call, query=typed[0], key=typed[1], value=typed[2])
        compiled = compile_for(capability, call)
        assert max(program.metadata.shared for program in compiled.values()) <= 99 << 10


@NO_TRITON
def test_what_triton_cannot_do_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.errors import TritonError

    def fail(*arguments: object) -> None:
        raise TritonError("out of resource: shared memory")

    monkeypatch.setattr(kernel, "_launch", fail)
    call = small_call()
    with pytest.raises(KernelUnavailableError, match="shared memory; use precision='exact'"):
        kernel.run(
            call.query,
            call.key,
            call.value,
            call.semantics,
            attn_mask=None,
            sinks=None,
            want_lse=False,
        )
