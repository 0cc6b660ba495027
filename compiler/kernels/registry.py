"""Who can serve an attention call with a recipe, or why nobody can.

A kernel is *real* when it exists to be fast on its device. The reference serves every recipe
on every device, but it emulates: it is never a device's default.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from sage_compiler.precision import AUTO, EXACT
from sage_compiler.semantics import MaskClass, Semantics


class Run(Protocol):
    """A kernel's entry point; shapes and results as ``reference.attention``."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        semantics: Semantics,
        *,
        attn_mask: Tensor | None,
        sinks: Tensor | None,
    ) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True, slots=True)
class Problem:
    """What a kernel needs to know of a call to accept or refuse it; lengths may be unknown."""

    device_type: str
    dtype: torch.dtype
    head_dim: int
    value_head_dim: int
    heads: int
    kv_heads: int
    mask_class: MaskClass
    has_mask: bool


@dataclass(frozen=True, slots=True)
class Kernel:
    """A real kernel.

    Attributes:
        name: as reports show it.
        device_type: the torch device type it runs on.
        recipe: the recipe it computes.
        refuse: why it cannot serve a problem, in one sentence, or None when it can.
        run: the call.
    """

    name: str
    device_type: str
    recipe: str
    refuse: Callable[[Problem], str | None]
    run: Run


KERNELS: Final[list[Kernel]] = []  # in order of preference

# What `auto` means on a device that has a kernel for it.
DEFAULT_RECIPES: Final[dict[str, str]] = {"cpu": "int8_int8"}

# Shorter attention is kept by default. Where a prototype of a fused CPU kernel began to gain over
# scaled_dot_product_attention; to be measured again with the kernel that this gate is for.
MIN_SEQ_LEN: Final[dict[str, int]] = {"cpu": 64}


@dataclass(frozen=True, slots=True)
class Unavailable:
    """No real kernel serves the call; ``reason`` says why in one sentence."""

    reason: str


def find(recipe: str, problem: Problem) -> Kernel | Unavailable:
    """The first real kernel that serves this recipe and problem, or why there is none."""
    refusals = []
    for kernel in KERNELS:
        if kernel.recipe != recipe or kernel.device_type != problem.device_type:
            continue
        refusal = kernel.refuse(problem)
        if refusal is None:
            return kernel
        refusals.append(f"{kernel.name}: {refusal}")
    if refusals:
        return Unavailable("; ".join(refusals))
    return Unavailable(f"no {recipe} kernel for device {problem.device_type!r}")


@dataclass(frozen=True, slots=True)
class Default:
    """What `auto` resolves to: a recipe with a real kernel, or "exact" and why."""

    recipe: str
    reason: str


def default(problem: Problem) -> Default:
    """Resolve `auto` for this problem. Never picks a recipe that would be emulated."""
    recipe = DEFAULT_RECIPES.get(problem.device_type)
    if recipe is None:
        return Default(EXACT, f"no default recipe for device {problem.device_type!r}")
    found = find(recipe, problem)
    if isinstance(found, Unavailable):
        return Default(EXACT, found.reason)
    return Default(recipe, f"{AUTO}: the default on {problem.device_type}, kernel {found.name}")
