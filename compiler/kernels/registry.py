"""Who can serve an attention call with a recipe, or why nobody can.

A kernel is *real* when it exists to be fast on its device. The reference serves every recipe
on every device, but it emulates: it is never a device's default.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from sage_compiler.errors import KernelUnavailableError
from sage_compiler.kernels.cpu import kernel as cpu_kernel
from sage_compiler.kernels.cuda import kernel as cuda_kernel
from sage_compiler.kernels.kernel import OPEN, Gate, Kernel, Problem
from sage_compiler.kernels.triton import kernel as triton_kernel
from sage_compiler.precision import AUTO, EXACT

# In order of preference.
KERNELS: Final[list[Kernel]] = [
    *cpu_kernel.KERNELS,
    *cuda_kernel.KERNELS,
    *triton_kernel.KERNELS,
]

# What `auto` means on a device that has a kernel for it, by its type. Whether it gains there, the
# gate of the kernel says; on GPUs that nobody has measured, no gate opens.
DEFAULT_RECIPES: Final[Mapping[str, Callable[[Problem], str]]] = MappingProxyType(
    {"cpu": lambda problem: "int8_int8", "cuda": cuda_kernel.default_recipe}
)


def too_small(
    device_type: str, min_seq_len: int, query_length: int, key_length: int, products: int
) -> bool:
    """Whether attention is exact by its sizes alone; ``choose`` decides what this leaves open.

    Asked before anything else of a call is looked at: where the operator is
    scaled_dot_product_attention, it may cost little more.
    """
    if min_seq_len >= 0:
        return min(query_length, key_length) < min_seq_len
    for kernel in KERNELS:  # a generator for `any` costs a quarter of a microsecond
        if kernel.device_type == device_type and kernel.smallest().admits(
            query_length, key_length, products
        ):
            return False
    return True


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
        refusals.append(f"{kernel.name()}: {refusal}")
    if refusals:
        return Unavailable("; ".join(refusals))
    return Unavailable(f"no {recipe} kernel for device {problem.device_type!r}")


@dataclass(frozen=True, slots=True)
class Default:
    """What `auto` resolves to: a recipe with a real kernel and its gate, or "exact" and why."""

    recipe: str
    reason: str
    kernel: Kernel | None = None
    gate: Gate = OPEN


def default(problem: Problem) -> Default:
    """Resolve `auto` for this problem.

    Never picks a recipe that would be emulated, nor one whose kernel does not gain here.
    """
    recipe_for = DEFAULT_RECIPES.get(problem.device_type)
    if recipe_for is None:
        return Default(EXACT, f"no default recipe for device {problem.device_type!r}")
    try:
        recipe = recipe_for(problem)
    except KernelUnavailableError as error:
        return Default(EXACT, str(error))
    found = find(recipe, problem)
    if isinstance(found, Unavailable):
        return Default(EXACT, found.reason)
    gate = found.gate(problem)
    if isinstance(gate, str):
        return Default(EXACT, f"{found.name()}: {gate}")
    reason = f"{AUTO}: the default on {problem.device_type}, kernel {found.name()}"
    return Default(recipe, reason, found, gate)


def choose(
    recipe: str,
    problem: Problem,
    min_seq_len: int,
    query_length: int,
    key_length: int,
    products: int,
) -> Kernel | Unavailable | None:
    """Who serves a call of known sizes: a kernel; the reference, and why; None: nobody quantizes.

    Args:
        recipe: a recipe, "exact" or "auto".
        min_seq_len: shorter attention is exact, whatever the recipe. Negative: what `auto` leaves
            alone, by the gate of the kernel that would serve it.
        query_length, key_length, products: as in ``Gate``.
    """
    if recipe == EXACT or min(query_length, key_length) < min_seq_len:
        return None
    if recipe == AUTO:
        found = default(problem).kernel
        if found is None:
            return None
    else:
        kernel_or_not = find(recipe, problem)
        if isinstance(kernel_or_not, Unavailable):
            return kernel_or_not
        found = kernel_or_not
    if min_seq_len < 0:
        gate = found.gate(problem)
        if isinstance(gate, str) or not gate.admits(query_length, key_length, products):
            return None
    return found
