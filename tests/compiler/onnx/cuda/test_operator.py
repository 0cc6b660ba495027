"""The operator on CUDA, as ONNX Runtime calls it: attributes, tensors, stream and scratch."""

from __future__ import annotations

import ctypes
import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sage_compiler.kernels.cuda.arch import ARCHS
from sage_compiler.kernels.cuda.variants import standalone_specs
from sage_compiler.precision import PRECISIONS
from sage_compiler.semantics import DeadRows, MaskClass
from tests.compiler.kernels.cuda.emulation import ARCH, the_host
from tests.compiler.kernels.cuda.test_attention import make_call
from tests.compiler.kernels.dense import dense
from tests.compiler.onnx.cuda import fake_ort
from tests.compiler.onnx.cuda.fake_ort import (
    CPU,
    CUDA,
    FAIL,
    INVALID_ARGUMENT,
    INVALID_GRAPH,
    Library,
    Node,
    OrtError,
    run,
)
from tests.compiler.onnx.cuda.native import STREAM, TestDriver
from tests.compiler.onnx.cuda.packs import MASKED, Case, pack_of_names
from tests.compiler.onnx.runtime.models import LIBRARY
from tests.cutlass_templates import host as host_module
from tests.tolerances import check, check_lse

SCALE = {"scale": 0.125}


@pytest.mark.skipif(host_module.missing() is not None, reason=str(host_module.missing()))
@pytest.mark.parametrize(
    ("arch", "kernel"),
    [(ARCH, f"sage_attend_{ARCH}_float16_64_64_"), ("sm_90a", "sage_attend_hopper_sm_90a_")],
)
def test_the_whole_way(
    arch: str,
    kernel: str,
    executing: TestDriver,
    host_packs: Callable[[Case], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From the node's attributes and tensors to the numbers, on the session's stream."""
    the_host().set_capability(*ARCHS[arch].capability)
    held, lent = executing.held(), fake_ort.lent()
    monkeypatch.setenv("SAGE_CUDA_DRIVER", str(executing.path))
    monkeypatch.setenv("SAGE_KERNEL_PACK", str(host_packs(dataclasses.replace(MASKED, arch=arch))))
    library = Library(tmp_path / "libsage_ort.so")
    for seed, mask_class in enumerate((MaskClass.NONE, MaskClass.CAUSAL_BOTTOM_RIGHT)):
        call = make_call(
            70,
            130,
            64,
            torch.float16,
            batch=2,
            kv_heads=2,
            group=2,
            seed=seed,
            sinks=True,
            mask_class=mask_class,
            dead_rows=DeadRows.NAN,
        )
        mask = torch.rand(2, 1, 70, 130) < 0.7
        assert call.sinks is not None
        for changes in (
            {},
            {"attn_mask": mask, "sinks": call.sinks.bfloat16()},
            {"attn_mask": torch.randn(4, 1, 130).half(), "sinks": None},
        ):
            changed = dataclasses.replace(call, **changes)
            output, lse = run(library, changed, "auto")
            exact, exact_lse = dense(changed)
            check(output, exact, call.value, "int8_fp8")
            check_lse(lse, exact_lse.float(), "int8_fp8")
            launches = executing.launches()
            assert {launch.stream for launch in launches} == {STREAM}
            assert launches[-1].symbol.startswith(kernel)
    assert fake_ort.lent() == lent
    # A process keeps a context and each kernel, once.
    gained = [after - before for before, after in zip(held, executing.held(), strict=True)]
    assert gained == [1, 7, 0]


def test_the_operators(library: Library) -> None:
    """One for each provider and dtype; float32 is the CPU's alone."""
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    on = {
        provider: [dtype for dtype in dtypes if library.operator(dtype, provider) is not None]
        for provider in (CUDA, CPU)
    }
    assert on == {CUDA: [torch.float16, torch.bfloat16], CPU: list(dtypes)}
    assert library.count == 5


@pytest.mark.parametrize(
    ("recipe", "served"),
    [
        ("auto", "int8_fp8"),
        ("int4_fp8", "int4_fp8"),
        ("int4_fp16", "int4_fp16"),
        ("int8_fp8", "int8_fp8"),
        ("int8_fp16", "int8_fp16"),
        ("int8_int8", "int8_fp16"),
        ("int8_int16", "int8_fp16"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_who_serves_a_recipe(
    recipe: str, served: str, dtype: torch.dtype, library: Library, installed: TestDriver
) -> None:
    run(library, make_call(9, 9, 64, dtype), recipe)
    name = str(dtype).removeprefix("torch.")
    symbol = installed.launches()[-1].symbol
    assert symbol.startswith(f"sage_attend_{ARCH}_{name}_")
    assert f"_{served}_fp32_" in symbol


def test_what_the_library_says_of_recipes() -> None:
    """The same, without a device; of `auto` it cannot."""
    served = ctypes.CDLL(str(LIBRARY)).sage_ort_served
    served.restype = ctypes.c_char_p
    said = {recipe: served(CUDA.encode(), recipe.encode()) for recipe in PRECISIONS}
    assert said == {
        "auto": None,
        "exact": b"float",
        "int4_fp8": b"int4_fp8",
        "int4_fp16": b"int4_fp16",
        "int8_fp8": b"int8_fp8",
        "int8_fp16": b"int8_fp16",
        "int8_int8": b"int8_fp16",
        "int8_int16": b"int8_fp16",
    }


@pytest.mark.parametrize("arch", ARCHS)
def test_the_default_of_a_device(
    arch: str, installed: TestDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FP8 where its products are single instructions, or there is ``wgmma``; else FP16."""
    installed.set_capability(*ARCHS[arch].capability)
    pack = pack_of_names(standalone_specs(arch), tmp_path / "pack")
    monkeypatch.setenv("SAGE_KERNEL_PACK", str(pack))
    run(Library(tmp_path / "libsage_ort.so"), make_call(9, 9, 128, torch.float16), "auto")
    kinds = {"sm_89": "_int8_fp8_", "sm_120a": "_int8_fp8_", "sm_90a": "_hopper_"}
    assert kinds.get(arch, "_int8_fp16_") in installed.launches()[-1].symbol


def refused(library: Library, attributes: dict[str, str | float | int]) -> tuple[int, str]:
    with pytest.raises(OrtError) as caught:
        Node(library, torch.float16, attributes)
    return caught.value.code, str(caught.value)


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({}, "scale is missing"),
        (SCALE | {"recipe": "int5_fp8"}, "int5_fp8"),
        (SCALE | {"window_left": 3}, "window"),
        ({"scale": float("inf")}, "scale"),
    ],
)
def test_attributes_are_checked_as_on_a_cpu(
    attributes: dict[str, str | float | int], words: str, library: Library
) -> None:
    code, said = refused(library, attributes)
    assert code == INVALID_GRAPH
    assert words in said


def test_tensors_are_checked_as_on_a_cpu(library: Library, installed: TestDriver) -> None:
    call = make_call(9, 9, 64, torch.float16)
    mask = torch.ones(8, 9, dtype=torch.bool)
    with pytest.raises(OrtError, match=r"attn_mask has shape \(8, 9\)") as caught:
        run(library, dataclasses.replace(call, attn_mask=mask), "auto")
    assert caught.value.code == INVALID_ARGUMENT
    assert installed.launches() == []


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"SAGE_KERNEL_PACK": ""}, "there is no kernel pack; build one with"),
        ({"SAGE_KERNEL_PACK": "/nowhere"}, "the kernel pack /nowhere: /nowhere: No such file"),
        ({"SAGE_CUDA_DRIVER": "/nowhere.so"}, "there is no CUDA driver: /nowhere.so"),
    ],
)
def test_without_driver_or_pack_there_are_no_operators_for_cuda(
    variables: dict[str, str],
    words: str,
    installed: TestDriver,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So that the runtime gives nodes to the CPU; once there are both, there are operators."""
    pack = pack_of_names(MASKED.specs(), tmp_path / "pack")
    monkeypatch.setenv("SAGE_KERNEL_PACK", str(pack))
    with monkeypatch.context() as without:
        for name, value in variables.items():
            without.setenv(name, value)
        library = Library(tmp_path / "libsage_ort.so")
        assert words in library.cuda_state()
        assert library.count == 3
        assert library.operator(torch.float16) is None
        assert library.operator(torch.float16, CPU) is not None
    library.register()
    assert library.cuda_state() == ""
    assert library.count == 5
    Node(library, torch.float16, SCALE).close()


def test_a_device_without_kernels(library: Library, installed: TestDriver) -> None:
    installed.set_capability(7, 5)
    _, said = refused(library, SCALE | {"recipe": "int8_fp8"})
    assert "compute capability 7.5" in said and "CPUExecutionProvider only" in said
    installed.set_capability(8, 9)
    Node(library, torch.float16, SCALE).close()  # a failure is not kept


def test_the_device_is_the_sessions(library: Library) -> None:
    fake_ort.set_device(3)
    _, said = refused(library, SCALE)
    assert "no CUDA device 3: the driver has 1" in said


def test_failures_of_a_call(library: Library, installed: TestDriver) -> None:
    """Scratch is given back, nothing is launched without; the next call is as any other."""
    call = make_call(9, 9, 64, torch.float16)
    node = Node(library, torch.float16, SCALE)
    inputs = (call.query, call.key, call.value)
    outputs = (torch.empty_like(call.query),)
    with pytest.raises(OrtError, match="out of device memory"):
        node.run(inputs, outputs, has_memory=False)
    with pytest.raises(OrtError, match="no CUDA stream"):
        node.run(inputs, outputs, stream=0)
    assert installed.launches() == []
    installed.fail("cuLaunchKernel", 719, 1)
    with pytest.raises(OrtError, match=r"sage_attend_\w+: cuLaunchKernel: CUDA_ERROR") as caught:
        node.run(inputs, outputs)
    assert caught.value.code == FAIL
    installed.reset()
    node.run(inputs, outputs)
    assert len(installed.launches()) == 2
    node.close()


def test_a_library_with_kernels_on_a_device_stays(
    library: Library, tmp_path: Path, installed: TestDriver
) -> None:
    """It alone knows of them."""
    Node(library, torch.float16, SCALE).close()
    held = installed.held()
    assert library.unload()
    Node(library, torch.float16, SCALE).close()
    assert installed.held() == held


def test_a_library_is_loaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its operators and their domain too, however often sessions come and go."""
    monkeypatch.delenv("SAGE_KERNEL_PACK", raising=False)
    library = Library(tmp_path / "idle.so")
    made = fake_ort.domains()
    for _ in range(3):
        assert library.unload()
        library.register()
    assert fake_ort.domains() == made


def test_the_package_may_carry_a_pack(
    installed: TestDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SAGE_KERNEL_PACK", raising=False)
    shipped = tmp_path / "package" / "kernels" / "cuda" / "pack"
    shipped.parent.mkdir(parents=True)
    pack_of_names(standalone_specs(ARCH), shipped)
    run(
        Library(tmp_path / "package" / "onnx" / "runtime" / "libsage_ort.so"),
        make_call(9, 9, 64, torch.float16),
        "auto",
    )
    assert len(installed.launches()) == 2
    (shipped / "launches.txt").unlink()  # as that of a release wheel, which is for Python
    library = Library(tmp_path / "package" / "onnx" / "runtime" / "python.so")
    assert "there is no kernel pack" in library.cuda_state()
    shutil.rmtree(shipped)
    library = Library(tmp_path / "package" / "onnx" / "runtime" / "other.so")
    assert "there is no kernel pack" in library.cuda_state()
