"""The CUDA kernels in the registry: what they refuse, and a compiled model that runs in them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import types

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sage_compiler as sage
from sage_compiler.errors import InvalidAttentionError, KernelUnavailableError
from sage_compiler.kernels import registry
from sage_compiler.kernels.cuda import kernel
from sage_compiler.kernels.cuda.arch import ARCHS, PORTABLE, arch_of, named
from sage_compiler.kernels.cuda.spec import AttendSpec, HopperAttendSpec
from sage_compiler.kernels.cuda.variants import RARE, all_specs
from sage_compiler.kernels.kernel import OPEN, Kernel, Problem
from sage_compiler.kernels.registry import Default, Unavailable, default, find
from sage_compiler.precision import RECIPES
from sage_compiler.semantics import MaskClass, Semantics
from tests.compiler.kernels.cuda.emulation import ARCH, loader, the_host
from tests.compiler.kernels.cuda.test_attention import make_call
from tests.compiler.kernels.dense import dense
from tests.cutlass_templates import host
from tests.tolerances import check, check_lse

PROBLEM = Problem(
    device_type="cuda",
    dtype=torch.float16,
    head_dim=128,
    value_head_dim=128,
    heads=8,
    kv_heads=2,
    mask_class=MaskClass.CAUSAL,
    has_mask=False,
)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": torch.float64}, "float64 is none of float16, bfloat16, float32"),
        ({"head_dim": 257}, "head_dim 257 is not from 1 to 256"),
        ({"value_head_dim": 0}, "value head_dim 0 is not from 1 to 256"),
    ],
)
def test_refusals(change: dict[str, object], words: str) -> None:
    assert kernel.refuse("int8_fp8", PROBLEM, "sm_89") is None
    problem = dataclasses.replace(PROBLEM, **change)  # type: ignore[arg-type]
    refusal = kernel.refuse("int8_fp8", problem, "sm_89")
    assert refusal is not None
    assert words in refusal


def test_the_registry_asks_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    capability = {0: (8, 0), 1: (8, 9), 2: (7, 5), 3: (8, 6)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability.__getitem__)
    kernel._arch.cache_clear()
    try:
        on = [dataclasses.replace(PROBLEM, device_index=index) for index in capability]
        refused = find("int8_fp8", on[0])
        assert isinstance(refused, Unavailable)
        assert refused.reason == (
            "cuda-mma: no int8_fp8 on sm_80, but int8_fp16, int4_fp16: "
            "tensor cores multiply FP8 from sm_89 on"
        )
        assert isinstance(find("int8_fp8", on[1]), Kernel)
        old = find("int8_fp16", on[2])
        assert isinstance(old, Unavailable)
        assert "compute capability 7.5" in old.reason
        assert isinstance(find("int8_fp16", on[3]), Kernel)
        assert default(on[1]) == Default(
            "exact", "cuda-mma: int8_fp8 is not measured on this GPU (sm_89)"
        )
        told, also = old.reason.removeprefix("cuda-mma: ").split("; triton: ")
        assert default(on[2]) == Default("exact", told)
        assert also == "compute capability 7.5 is below 8.0"
        elsewhere = dataclasses.replace(on[1], capability=(8, 0))  # not that of its device
        assert find("int8_fp8", elsewhere) == refused
    finally:
        kernel._arch.cache_clear()


def test_architectures() -> None:
    assert [arch_of(arch.capability).name for arch in ARCHS.values()] == list(ARCHS)
    for old in ((6, 1), (7, 5)):
        with pytest.raises(KernelUnavailableError, match="on; use precision='exact'"):
            arch_of(old)
    # What the driver compiles PTX for: boards without kernels of their own, and those to come.
    for other in ((8, 7), (8, 8), (10, 3), (11, 0), (12, 1), (13, 0)):
        assert arch_of(other) is PORTABLE
    assert named(PORTABLE.name) is PORTABLE and all(named(name) is ARCHS[name] for name in ARCHS)
    assert PORTABLE.shared_bytes == min(arch.shared_bytes for arch in ARCHS.values())
    for arch in ARCHS.values():
        assert set(arch.recipes) <= set(RECIPES)


@pytest.mark.parametrize("arch", ARCHS)
def test_specs_are_told_apart_and_fit(arch: str) -> None:
    specs = all_specs(arch)
    assert len({spec.symbol for spec in specs}) == len(specs)
    attends = [spec for spec in specs if isinstance(spec, (AttendSpec, HopperAttendSpec))]
    offered = {f"{spec.qk}_{spec.pv}" for spec in attends}
    rare = {recipe for of, recipe in RARE if of == arch}
    assert rare < set(ARCHS[arch].recipes) and offered == set(ARCHS[arch].recipes) - rare
    for spec in specs:
        assert spec.shared_bytes <= ARCHS[arch].shared_bytes
        assert spec.symbol.isidentifier()


def test_scratch_is_aligned_and_apart() -> None:
    sizes = (1, 256, 0, 300, 7)
    addresses, arena = kernel.allocate(sizes, torch.device("cpu"))
    assert isinstance(arena, Tensor)
    end = arena.data_ptr() + arena.numel()
    ends = [*addresses[1:], end]
    for address, size, following in zip(addresses, sizes, ends, strict=True):
        assert address % 256 == 0
        assert arena.data_ptr() <= address <= address + size <= following <= end


@pytest.mark.skipif(host.missing() is not None, reason=str(host.missing()))
def test_the_callers_stream_and_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch says of them is where the kernels are launched."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 9))
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=4711)
    )
    monkeypatch.setattr(kernel, "default_loader", loader)
    kernel._arch.cache_clear()
    the_host().reset()
    call = make_call(70, 90, 64, torch.float16, sinks=True)
    output, lse = kernel.attention(
        call.query,
        call.key,
        call.value,
        call.semantics,
        attn_mask=None,
        sinks=call.sinks,
        want_lse=True,
        recipe="int8_fp16",
    )
    kernel._arch.cache_clear()
    exact, exact_lse = dense(call)
    check(output, exact, call.value, "int8_fp16")
    check_lse(lse, exact_lse.float(), "int8_fp16")
    assert {launch["stream"] for launch in the_host().launches()} == {4711}


@pytest.mark.skipif(host.missing() is not None, reason=str(host.missing()))
def test_a_length_beyond_the_kernels_positions_is_refused() -> None:
    call = make_call(1, 1, 64, torch.float16)
    endless = call.key.expand(1, 1, 1 << 30, 64)
    target = kernel.Target(ARCH, 0, 0, loader())
    with pytest.raises(InvalidAttentionError, match="split the sequence"):
        kernel.run(
            target, call.query, endless, endless, call.semantics, want_lse=False, recipe="int8_fp8"
        )


@pytest.mark.skipif(host.missing() is not None, reason=str(host.missing()))
@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0)])
def test_nothing_to_attend_to(lengths: tuple[int, int]) -> None:
    call = make_call(*lengths, 64, torch.float16, sinks=True)
    target = kernel.Target(ARCH, 0, 0, loader())
    output, lse = kernel.run(
        target,
        call.query,
        call.key,
        call.value,
        call.semantics,
        want_lse=True,
        recipe="int8_fp8",
        sinks=call.sinks,
    )
    assert output.shape == call.query.shape
    assert not output.any()
    assert call.sinks is not None
    assert torch.equal(lse, call.sinks.view(1, -1, 1).expand(1, 1, lengths[0]))


@pytest.mark.skipif(host.missing() is not None, reason=str(host.missing()))
def test_a_compiled_model_runs_in_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """From torch.compile to the launches, on the look-alike, which the log of launches proves."""
    target = kernel.Target(ARCH, 0, 0, loader())

    def run(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        semantics: Semantics,
        *,
        attn_mask: Tensor | None,
        sinks: Tensor | None,
        want_lse: bool,
    ) -> tuple[Tensor, Tensor]:
        return kernel.run(
            target,
            query,
            key,
            value,
            semantics,
            want_lse=want_lse,
            recipe="int8_fp8",
            attn_mask=attn_mask,
            sinks=sinks,
        )

    emulated = Kernel(
        name=lambda: "cuda-mma on the CPU",
        device_type="cpu",
        recipe="int8_fp8",
        refuse=functools.partial(kernel.refuse, "int8_fp8", arch=ARCH),
        gate=lambda problem: OPEN,
        run=run,
    )
    monkeypatch.setattr(registry, "KERNELS", [emulated])
    the_host().reset()
    call = make_call(100, 100, 64, torch.bfloat16, kv_heads=2, group=2)

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    torch._dynamo.reset()
    options = {"precision": "int8_fp8"}
    compiled = torch.compile(model, backend="sage", options=options)
    output = compiled(call.query, call.key, call.value)
    (site,) = sage.last_report().rewritten
    assert "cuda-mma on the CPU" in site.reason
    exact = model(call.query.double(), call.key.double(), call.value.double())
    check(output, exact, call.value, "int8_fp8")
    kinds = [launch["symbol"].split("_")[1] for launch in the_host().launches()]
    assert kinds == ["quantize", "attend"]
