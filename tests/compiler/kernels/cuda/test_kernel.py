"""The CUDA kernels in the registry: what they refuse, and a compiled model that runs in them."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sage_compiler as sage
from sage_compiler.errors import KernelUnavailableError
from sage_compiler.kernels import registry
from sage_compiler.kernels.cuda import kernel
from sage_compiler.kernels.cuda.spec import ARCHS, AttendSpec, arch_of
from sage_compiler.kernels.cuda.variants import all_specs
from sage_compiler.kernels.kernel import OPEN, Kernel, Problem
from sage_compiler.kernels.registry import Unavailable, default, find
from sage_compiler.precision import RECIPES
from sage_compiler.semantics import MaskClass, Semantics
from tests.compiler.kernels.cuda.emulation import ARCH, loader, the_host
from tests.compiler.kernels.cuda.test_attention import make_call
from tests.cutlass_templates import host
from tests.tolerances import check

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
        ({"dtype": torch.float64}, "torch.float64 is none of torch.float16, torch.bfloat16"),
        ({"head_dim": 257}, "head_dim 257 is not from 1 to 256"),
        ({"value_head_dim": 0}, "value head_dim 0 is not from 1 to 256"),
        ({"has_mask": True}, "an explicit mask is not supported"),
    ],
)
def test_refusals(change: dict[str, object], words: str) -> None:
    assert kernel.refuse("int8_fp8", PROBLEM, "sm_89") is None
    problem = dataclasses.replace(PROBLEM, **change)  # type: ignore[arg-type]
    refusal = kernel.refuse("int8_fp8", problem, "sm_89")
    assert refusal is not None
    assert words in refusal


def test_the_registry_asks_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    capability = {0: (8, 0), 1: (8, 9), 2: (7, 5), 3: (8, 7)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability.__getitem__)
    kernel._arch.cache_clear()
    try:
        on = [dataclasses.replace(PROBLEM, device_index=index) for index in capability]
        refused = find("int8_fp8", on[0])
        assert isinstance(refused, Unavailable)
        assert refused.reason == (
            "cuda-mma: sm_80 has no instructions for it, but for int8_fp16, int4_fp16"
        )
        assert isinstance(find("int8_fp8", on[1]), Kernel)
        old = find("int8_fp16", on[2])
        assert isinstance(old, Unavailable)
        assert "compute capability 7.5" in old.reason
        assert isinstance(find("int8_fp16", on[3]), Kernel)
        assert default(on[1]).recipe == "exact"  # not measured on any GPU
    finally:
        kernel._arch.cache_clear()


def test_architectures() -> None:
    assert [arch_of(arch.capability).name for arch in ARCHS.values()] == list(ARCHS)
    with pytest.raises(KernelUnavailableError, match="use precision='exact'"):
        arch_of((6, 1))
    for arch in ARCHS.values():
        assert set(arch.recipes) <= set(RECIPES)


@pytest.mark.parametrize("arch", ARCHS)
def test_specs_are_told_apart_and_fit(arch: str) -> None:
    specs = all_specs(arch)
    assert len({spec.symbol for spec in specs}) == len(specs)
    offered = {f"{spec.qk}_{spec.pv}" for spec in specs if isinstance(spec, AttendSpec)}
    assert offered == set(ARCHS[arch].recipes)
    for spec in specs:
        assert spec.shared_bytes <= ARCHS[arch].shared_bytes
        assert spec.symbol.isidentifier()


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
        assert attn_mask is None
        return kernel.run(
            target, query, key, value, semantics, want_lse=want_lse, recipe="int8_fp8", sinks=sinks
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
    assert kinds == ["statistics", "query", "key", "value", "attend"]
