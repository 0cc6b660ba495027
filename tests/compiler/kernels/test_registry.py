"""Who serves a call, and why nobody does."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sage_compiler.errors import KernelUnavailableError
from sage_compiler.kernels import registry
from sage_compiler.kernels.kernel import Gate, Kernel, Problem
from sage_compiler.kernels.registry import Default, Unavailable, choose, default, find
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
    name: str,
    *,
    device_type: str = "cpu",
    recipe: str = "int8_int8",
    refusal: str | None = None,
    gate: Gate | str = Gate(32, 64),  # noqa: B008 - frozen
) -> Kernel:
    return Kernel(
        lambda: name, device_type, recipe, lambda problem: refusal, lambda problem: gate, _never
    )


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
    monkeypatch.setattr(registry, "DEFAULT_RECIPES", {"cpu": lambda problem: "int8_int8"})
    native = kernel("native")
    monkeypatch.setattr(registry, "KERNELS", [native])
    found = default(PROBLEM)
    assert found.recipe == "int8_int8" and "native" in found.reason
    assert found.kernel is native and found.gate == Gate(32, 64)

    monkeypatch.setattr(registry, "KERNELS", [kernel("native", refusal="no masks")])
    assert default(PROBLEM) == Default("exact", "native: no masks")

    monkeypatch.setattr(registry, "KERNELS", [kernel("native", gate="slower here")])
    assert default(PROBLEM) == Default("exact", "native: slower here")
    assert not isinstance(find("int8_int8", PROBLEM), Unavailable)  # by name it serves

    monkeypatch.setattr(registry, "KERNELS", [])
    assert default(PROBLEM) == Default("exact", "no int8_int8 kernel for device 'cpu'")

    def unknown(problem: Problem) -> str:
        raise KernelUnavailableError("an old device")

    monkeypatch.setattr(registry, "DEFAULT_RECIPES", {"cpu": unknown})
    assert default(PROBLEM) == Default("exact", "an old device")

    monkeypatch.setattr(registry, "DEFAULT_RECIPES", {})
    assert default(PROBLEM) == Default("exact", "no default recipe for device 'cpu'")


def test_what_is_registered_is_known() -> None:
    assert registry.DEFAULT_RECIPES["cpu"](PROBLEM) in RECIPES
    on_gpu = replace(PROBLEM, device_type="cuda", capability=(8, 9))
    assert registry.DEFAULT_RECIPES["cuda"](on_gpu) == "int8_fp8"
    assert set(registry.DEFAULT_RECIPES) == {"cpu", "cuda"}
    assert {kernel.recipe for kernel in registry.KERNELS} <= set(RECIPES)
    of_device: dict[str, set[str]] = {}
    for each in registry.KERNELS:
        of_device.setdefault(each.device_type, set()).add(each.recipe)
    assert of_device == {
        "cpu": {"int8_int8", "int8_int16"},
        "cuda": {"int8_fp8", "int4_fp8", "int8_fp16", "int4_fp16"},
    }


@pytest.mark.parametrize(
    "min_seq_len, lengths, serves",
    [
        (-1, (32, 64), True),
        (-1, (31, 64), False),
        (-1, (32, 63), False),
        (0, (1, 1), True),
        (40, (40, 40), True),
        (40, (39, 64), False),
        (40, (64, 39), False),
    ],
)
def test_who_serves_a_call_of_known_lengths(
    monkeypatch: pytest.MonkeyPatch, min_seq_len: int, lengths: tuple[int, int], serves: bool
) -> None:
    native = kernel("native")
    monkeypatch.setattr(registry, "KERNELS", [native])
    for recipe in ("auto", "int8_int8"):
        assert choose(recipe, PROBLEM, min_seq_len, *lengths, 1) is (native if serves else None)
    assert choose("exact", PROBLEM, min_seq_len, *lengths, 1) is None


def test_auto_is_never_emulated_and_a_name_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "KERNELS", [kernel("native", refusal="no masks")])
    assert choose("auto", PROBLEM, 0, 100, 100, 1) is None
    assert choose("int8_int8", PROBLEM, 0, 100, 100, 1) == Unavailable("native: no masks")
    monkeypatch.setattr(registry, "KERNELS", [kernel("native", gate="slower here")])
    assert choose("auto", PROBLEM, 0, 100, 100, 1) is None
    assert choose("int8_int8", PROBLEM, -1, 100, 100, 1) is None
    assert choose("int8_int8", PROBLEM, 0, 100, 100, 1) is registry.KERNELS[0]
