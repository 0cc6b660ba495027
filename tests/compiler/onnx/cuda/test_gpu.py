"""The library on this machine's GPU and driver: `pytest -m gpu tests/compiler/onnx/cuda`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sage_compiler.kernels.cuda import kernel, toolchain
from sage_compiler.kernels.cuda.arch import ARCHS, arch_of
from sage_compiler.kernels.cuda.pack import build
from sage_compiler.kernels.cuda.preparation import preparation_specs
from sage_compiler.kernels.cuda.variants import variant
from sage_compiler.semantics import MaskClass
from tests.compiler.kernels.cuda.test_attention import make_call
from tests.compiler.kernels.dense import Call, dense
from tests.compiler.onnx.cuda import fake_ort
from tests.compiler.onnx.cuda.native import Device, Prepared, opened
from tests.compiler.onnx.runtime import models
from tests.tolerances import check, check_lse

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]

HEAD_DIMS = (64, 128)
DTYPES = (torch.float16, torch.bfloat16)


def recipes() -> tuple[str, ...]:
    return ARCHS[arch_of(torch.cuda.get_device_capability()).name].recipes


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    """The first device, with a pack that is compiled for it."""
    arch = arch_of(torch.cuda.get_device_capability()).name
    kernels = [
        spec
        for recipe in recipes()
        for dtype in ("float16", "bfloat16")
        for head_dim in HEAD_DIMS
        for masked in (False, True)
        for spec in variant(arch, dtype, head_dim, recipe, masked=masked).specs()
    ]
    pack: Path = tmp_path_factory.mktemp("gpu") / "pack"
    specs = [*dict.fromkeys(kernels), *preparation_specs(arch)]
    build(specs, pack, toolchain.find("nvcc", "nvrtc"), os.cpu_count() or 1)
    torch.cuda.init()
    with opened("libcuda.so.1", pack) as device:
        yield device


def on_gpu(call: Call) -> Call:
    tensors = {
        name: value.cuda()
        for name in ("query", "key", "value", "attn_mask", "sinks")
        if (value := getattr(call, name)) is not None
    }
    return dataclasses.replace(call, **tensors)


def run(device: Device, call: Call, recipe: str) -> tuple[Tensor, Tensor]:
    """On a stream of its own; waited for."""
    prepared = Prepared(device, call, recipe)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    prepared.launch(stream=stream.cuda_stream)
    stream.synchronize()
    assert prepared.lse is not None
    return prepared.output, prepared.lse


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_as_python_launches_them(head_dim: int, dtype: torch.dtype, gpu: Device) -> None:
    """The numbers of ``kernel.attention``, bit by bit, with and without masks and sinks."""
    for seed, mask_class in enumerate(list(MaskClass)[:3]):
        call = make_call(
            300,
            420,
            head_dim,
            dtype,
            batch=2,
            kv_heads=2,
            group=2,
            seed=seed,
            sinks=True,
            mask_class=mask_class,
        )
        padding = torch.arange(420) < torch.tensor([400, 77]).view(2, 1, 1, 1)
        bias = torch.randn(4, 300, 420).masked_fill(torch.rand(300, 420) < 0.3, -1e4)
        for mask in (None, padding, bias):
            each = on_gpu(dataclasses.replace(call, attn_mask=mask))
            for recipe in recipes():
                output, lse = run(gpu, each, recipe)
                theirs, their_lse = kernel.attention(
                    each.query,
                    each.key,
                    each.value,
                    each.semantics,
                    attn_mask=each.attn_mask,
                    sinks=each.sinks,
                    want_lse=True,
                    recipe=recipe,
                )
                assert torch.equal(output, theirs)
                assert torch.equal(lse, their_lse)
                exact, exact_lse = dense(dataclasses.replace(call, attn_mask=mask))
                check(output.cpu(), exact, call.value, recipe)
                check_lse(lse.cpu(), exact_lse.float(), recipe)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_cpu_takes_over(dtype: torch.dtype, tmp_path: Path) -> None:
    """Recipe exact, which needs no pack: bit by bit as on a CPU, after what is on the stream."""
    call = make_call(300, 420, 64, dtype, batch=2, kv_heads=2, group=2, sinks=True)
    call = dataclasses.replace(call, attn_mask=torch.rand(300, 420) < 0.7)
    library = fake_ort.Library(tmp_path / "libsage_ort.so")
    attributes = models.attributes_of(call.semantics, 64) | {"recipe": "exact"}
    node = fake_ort.Node(library, dtype, attributes)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        output, lse = fake_ort.run_node(node, on_gpu(call), stream=stream.cuda_stream)
    node.close()
    expected, expected_lse = models.run(call, "exact")
    assert torch.equal(output.cpu(), expected)
    assert torch.equal(lse.cpu(), expected_lse)
