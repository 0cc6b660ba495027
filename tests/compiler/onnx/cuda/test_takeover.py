"""What a device has no kernel for is computed by the CPU's, between two copies."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sage_compiler.kernels.cuda.variants import variant
from sage_compiler.semantics import DeadRows, MaskClass
from tests.compiler.kernels.cuda.emulation import ARCH
from tests.compiler.kernels.cuda.test_attention import make_call
from tests.compiler.kernels.dense import Call, random_call
from tests.compiler.onnx.cuda import fake_ort
from tests.compiler.onnx.cuda.fake_ort import FAIL, Library, Node, OrtError, run, run_node
from tests.compiler.onnx.cuda.native import TestDriver
from tests.compiler.onnx.cuda.packs import pack_of_names
from tests.compiler.onnx.runtime import models
from tests.compiler.onnx.runtime.models import attributes_of

SCALE = {"scale": 0.125}
COPIES = ("cuMemcpyDtoHAsync_v2", "cuMemcpyHtoDAsync_v2")
CAPTURING = 906  # CUDA_ERROR_STREAM_CAPTURE_IMPLICIT


def assert_same(actual: tuple[Tensor, Tensor], call: Call, recipe: str) -> None:
    """Bit by bit what ONNX Runtime computes with the CPU's kernel."""
    for mine, wanted in zip(actual, models.run(call, recipe), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=0, equal_nan=True)


def everything(dtype: torch.dtype = torch.float16, mask: Tensor | None = None) -> Call:
    """A call with all that there is to copy, and a head_dim that no pack has."""
    call = make_call(
        70, 130, 136, dtype, batch=2, kv_heads=2, group=2, value_dim=40, sinks=True,
        mask_class=MaskClass.CAUSAL_BOTTOM_RIGHT, dead_rows=DeadRows.NAN,
    )  # fmt: skip
    assert call.sinks is not None
    given = torch.randn(4, 1, 130) > -0.5 if mask is None else mask
    return dataclasses.replace(call, attn_mask=given, sinks=call.sinks.bfloat16())


def narrow(call: Call, dtype: torch.dtype) -> Call:
    return dataclasses.replace(
        call, query=call.query.to(dtype), key=call.key.to(dtype), value=call.value.to(dtype)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_exact_is_the_cpus(dtype: torch.dtype, library: Library, installed: TestDriver) -> None:
    for seed in range(30):
        call = narrow(random_call(seed), dtype)
        assert_same(run(library, call, "exact"), call, "exact")
    assert installed.launches() == []


@pytest.mark.parametrize("recipe", ["auto", "int4_fp8", "int8_fp8", "int8_fp16", "int8_int8"])
def test_a_head_dim_that_the_pack_lacks(
    recipe: str, library: Library, installed: TestDriver
) -> None:
    for call in (everything(), everything(torch.bfloat16, torch.randn(70, 1))):
        assert_same(run(library, call, recipe), call, recipe)
    assert installed.launches() == []


@pytest.mark.parametrize("size", ["batch", "queries", "keys", "head_dim", "value_dim"])
def test_nothing_to_copy(size: str, library: Library) -> None:
    call = everything()
    match size:
        case "batch":
            sizes = (0, 70, 130, 136, 40)
        case "queries":
            sizes = (2, 0, 130, 136, 40)
        case "keys":
            sizes = (2, 70, 0, 136, 40)
        case "head_dim":
            sizes = (2, 70, 130, 0, 40)
        case _:
            sizes = (2, 70, 130, 136, 0)
    batch, queries, keys, head_dim, value_dim = sizes
    call = dataclasses.replace(
        call,
        query=call.query[:batch, :, :queries, :head_dim],
        key=call.key[:batch, :, :keys, :head_dim],
        value=call.value[:batch, :, :keys, :value_dim],
        semantics=dataclasses.replace(call.semantics, scale=0.1),
        attn_mask=torch.ones(queries, keys, dtype=torch.bool),
    )
    assert_same(run(library, call, "exact"), call, "exact")


@pytest.fixture
def of_few_kernels(
    installed: TestDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Library:
    """The library with one attention: int8_fp8, float16, head_dim 64, and nothing on top."""
    specs = variant(ARCH, "float16", 64, "int8_fp8").specs()
    monkeypatch.setenv("SAGE_KERNEL_PACK", str(pack_of_names(specs, tmp_path / "few")))
    return Library(tmp_path / "few.so")


def combinations() -> Iterator[tuple[Call, str]]:
    """Calls that this attention is not for, each for one reason, and a word of it."""
    call = make_call(20, 70, 64, torch.float16)
    yield make_call(20, 70, 72, torch.float16), "head_dim 72"
    yield make_call(20, 70, 64, torch.float16, value_dim=65), "of V 65"
    yield dataclasses.replace(call, attn_mask=torch.rand(20, 70) < 0.7), "with an attn_mask"
    yield make_call(20, 70, 64, torch.float16, softcap=3.0), "with a softcap"
    window = {"mask_class": MaskClass.WINDOW, "window_left": 5, "window_right": 3}
    yield make_call(20, 70, 64, torch.float16, **window), "with a window"
    yield dataclasses.replace(call, sinks=torch.randn(1).half()), "16-bit sinks"
    yield make_call(20, 0, 64, torch.float16), "the LSE of no keys"


def test_combinations_that_the_pack_lacks(of_few_kernels: Library, installed: TestDriver) -> None:
    for call, reason in combinations():
        assert_same(run(of_few_kernels, call, "int8_fp8"), call, "int8_fp8")
        (said,) = fake_ort.warnings()
        assert reason in said and "sagec kernels build --standalone" in said
    assert installed.launches() == []
    run(of_few_kernels, make_call(20, 70, 64, torch.float16), "int8_fp8")
    assert len(installed.launches()) == 2
    assert fake_ort.warnings() == []


def test_a_recipe_or_dtype_that_the_pack_lacks(of_few_kernels: Library) -> None:
    """It is said when the session is made."""
    for dtype, recipe in ((torch.float16, "int8_fp16"), (torch.bfloat16, "int8_fp8")):
        call = make_call(20, 70, 64, dtype)
        node = Node(of_few_kernels, dtype, attributes_of(call.semantics, 64) | {"recipe": recipe})
        (said,) = fake_ort.warnings()
        assert f"no {recipe} kernel for sm_89 and" in said
        assert_same(run_node(node, call), call, recipe)
        node.close()
        assert fake_ort.warnings() == []


# --- what is said -------------------------------------------------------------------------------


def test_a_node_warns_once(library: Library) -> None:
    call = make_call(9, 9, 72, torch.float16, value_dim=64)
    node = Node(library, torch.float16, SCALE | {"recipe": "int8_fp8"}, "encoder.0")
    assert fake_ort.warnings() == []
    run_node(node, make_call(9, 9, 64, torch.float16))
    assert fake_ort.warnings() == []
    run_node(node, call)
    (said,) = fake_ort.warnings()
    assert said.startswith(
        'ai.sage::Attention: node "encoder.0" is computed on the CPU, with copies there and back: '
        "no int8_fp8 kernel for sm_89, float16, head_dim 72, of V 64"
    )
    run_node(node, call)
    assert fake_ort.warnings() == []
    node.close()
    for name in ("decoder", "n" * 1000):
        exact = Node(library, torch.float16, SCALE | {"recipe": "exact"}, name)
        run_node(exact, call)
        exact.close()
        shown = name if len(name) < 256 else ""
        (said,) = fake_ort.warnings()
        assert said == (
            f'ai.sage::Attention: node "{shown}" is computed on the CPU, with copies there and '
            "back: recipe exact has no CUDA kernel"
        )


def test_without_a_logger_nothing_is_said(library: Library) -> None:
    call = everything()
    fake_ort.set_logger(False)
    try:
        assert_same(run(library, call, "exact"), call, "exact")
    finally:
        fake_ort.set_logger(True)
    assert fake_ort.warnings() == []


# --- what fails ---------------------------------------------------------------------------------


def test_exact_needs_no_kernels_for_the_device(library: Library, installed: TestDriver) -> None:
    installed.set_capability(7, 5)
    call = everything()
    assert_same(run(library, call, "exact"), call, "exact")
    with pytest.raises(OrtError, match=r"compute capability 7\.5; the kernel pack"):
        run(library, call, "auto")


def test_an_instruction_set_that_is_not_there(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAGE_CPU_ISA", "nonsense")
    for recipe in ("exact", "int8_fp8"):
        with pytest.raises(OrtError, match='SAGE_CPU_ISA is "nonsense"'):
            run(library, everything(), recipe)


@pytest.mark.parametrize(
    ("function", "after"),
    [
        ("cuStreamGetCtx", 0),
        ("cuCtxPushCurrent_v2", 0),
        ("cuStreamIsCapturing", 0),
        *((COPIES[0], after) for after in range(5)),
        *((COPIES[1], after) for after in range(2)),
        *(("cuStreamSynchronize", after) for after in range(2)),
    ],
)
@pytest.mark.parametrize("recipe", ["exact", "int8_fp8"])
def test_failures(
    recipe: str, function: str, after: int, library: Library, installed: TestDriver
) -> None:
    """Each call on the driver: a sentence, nothing is left, and the next call is as any other."""
    call = everything()
    node = Node(library, torch.float16, attributes_of(call.semantics, 136) | {"recipe": recipe})
    installed.fail(function, 700, after)
    with pytest.raises(OrtError, match=rf"{function}: CUDA_ERROR_OF_A_TEST \(700\)") as caught:
        run_node(node, call)
    assert caught.value.code == FAIL
    assert installed.calls(function) == after + 1
    assert (installed.copies(), installed.held()[2]) == (0, 0)
    installed.fail("", 0)
    assert_same(run_node(node, call), call, recipe)
    assert installed.calls(COPIES[0]) == 5 and installed.calls(COPIES[1]) == 2
    node.close()


def test_nothing_is_computed_while_a_graph_is_captured(
    library: Library, installed: TestDriver
) -> None:
    call = everything()
    for recipe in ("exact", "int8_fp8"):
        installed.fail("cuStreamIsCapturing", CAPTURING)
        with pytest.raises(OrtError, match="cannot while a CUDA graph is captured") as caught:
            run(library, call, recipe)
        assert caught.value.code == FAIL
        assert [installed.calls(copy) for copy in COPIES] == [0, 0]
        installed.fail("", 0)
        assert_same(run(library, call, recipe), call, recipe)


def test_what_the_device_fails_at_stays_a_failure(library: Library, installed: TestDriver) -> None:
    """The CPU takes over what there is no kernel for, not what goes wrong."""
    call = make_call(9, 9, 64, torch.float16)
    node = Node(library, torch.float16, SCALE | {"recipe": "int8_fp8"})
    with pytest.raises(OrtError, match="out of device memory"):
        run_node(node, call, has_memory=False)
    installed.fail("cuLaunchKernel", 719)
    with pytest.raises(OrtError, match="cuLaunchKernel"):
        run_node(node, call)
    assert [installed.calls(copy) for copy in COPIES] == [0, 0]
    node.close()


def test_no_memory_on_the_host(library: Library) -> None:
    """Of a call whose tensors nobody could have: keys for 2^55 bytes."""
    call = make_call(1, 1, 64, torch.float16)
    huge = torch.empty(1, 1, 1 << 48, 64, dtype=torch.float16, device="meta")
    node = Node(library, torch.float16, SCALE | {"recipe": "exact"})
    results = (call.query.clone(), None)
    with pytest.raises(OrtError, match=r"no memory on the host for tensors of \d{17} bytes"):
        node.run((call.query, huge, huge), results)
    node.close()
