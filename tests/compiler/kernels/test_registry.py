"""Who serves a call, and why nobody does."""

import pytest
import torch
from torch import Tensor

from sage_compiler.kernels import registry
from sage_compiler.kernels.registry import Default, Kernel, Problem, Unavailable, default, find
from sage_compiler.precision import RECIPES
from sage_compiler.semantics import MaskClass

PROBLEM = Problem(
    device_type="cpu",
    dtype=torch.float32,
    head_dim=64,
    value_head_dim=64,
    heads=8,
    kv_heads=8,
    mask_class=MaskClass.NONE,
    has_mask=False,
)


def _never(*args: object, **options: object) -> tuple[Tensor, Tensor]:
    raise AssertionError("finding a kernel does not run it")


def kernel(
    name: str, *, device_type: str = "cpu", recipe: str = "int8_int8", refusal: str | None = None
) -> Kernel:
    return Kernel(name, device_type, recipe, lambda problem: refusal, _never)


def test_the_first_that_accepts(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = [
        kernel("other device", device_type="cuda"),
        kernel("other recipe", recipe="int8_fp8"),
        kernel("refuses", refusal="head_dim 64"),
        kernel("accepts"),
        kernel("late"),
    ]
    monkeypatch.setattr(registry, "KERNELS", kernels)
    assert find("int8_int8", PROBLEM) is kernels[3]


def test_every_refusal_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    refusing = [kernel("a", refusal="no masks"), kernel("b", refusal="head_dim 64")]
    monkeypatch.setattr(registry, "KERNELS", [*refusing, kernel("c", recipe="int4_fp8")])
    assert find("int8_int8", PROBLEM) == Unavailable("a: no masks; b: head_dim 64")
    assert find("int8_fp8", PROBLEM) == Unavailable("no int8_fp8 kernel for device 'cpu'")


def test_the_default_has_a_kernel_or_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "DEFAULT_RECIPES", {"cpu": "int8_int8"})
    monkeypatch.setattr(registry, "KERNELS", [kernel("native")])
    found = default(PROBLEM)
    assert found.recipe == "int8_int8" and "native" in found.reason

    monkeypatch.setattr(registry, "KERNELS", [kernel("native", refusal="no masks")])
    assert default(PROBLEM) == Default("exact", "native: no masks")

    monkeypatch.setattr(registry, "KERNELS", [])
    assert default(PROBLEM) == Default("exact", "no int8_int8 kernel for device 'cpu'")

    monkeypatch.setattr(registry, "DEFAULT_RECIPES", {})
    assert default(PROBLEM) == Default("exact", "no default recipe for device 'cpu'")


def test_what_is_registered_is_known() -> None:
    assert set(registry.DEFAULT_RECIPES.values()) <= set(RECIPES)
    assert {kernel.recipe for kernel in registry.KERNELS} <= set(RECIPES)
    assert all(length >= 0 for length in registry.MIN_SEQ_LEN.values())
