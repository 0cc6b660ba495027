"""Triton programs compiled for a GPU that need not be here, with the arguments of a real call."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from sage_compiler.kernels.triton import kernel, programs
from tests.compiler.kernels.dense import Call

PROGRAMS = ("statistics", "quantize_query", "quantize_keys_values", "attend")
_OPTIONS = ("num_warps", "num_stages")
_POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
}


class _Recorder:
    """In place of a program: notes what it is started with."""

    def __init__(self) -> None:
        self.arguments: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert len(grid) == 1 and grid[0] > 0

        def start(*positional: Any, **named: Any) -> None:
            self.arguments = positional, named

        return start


def compile_for(capability: int, call: Call) -> dict[str, CompiledKernel]:
    """The programs of a call for a compute capability, as in 89.

    Raises:
        triton.errors.TritonError: one does not compile.
    """
    recorders = {name: _Recorder() for name in PROGRAMS}
    others = {name: getattr(programs, name) for name in ("NO_MASK", "BOOL_MASK", "FLOAT_MASK")}
    fake = SimpleNamespace(**recorders, **others)
    with mock.patch.object(kernel, "_programs", lambda: fake):
        kernel.run(
            call.query,
            call.key,
            call.value,
            call.semantics,
            attn_mask=call.attn_mask,
            sinks=call.sinks,
            want_lse=True,
        )
    return {name: _compile(name, recorders[name], capability) for name in PROGRAMS}


def _compile(name: str, recorder: _Recorder, capability: int) -> CompiledKernel:
    program = getattr(programs, name)
    assert recorder.arguments is not None
    positional, named = recorder.arguments
    options = {key: named[key] for key in _OPTIONS if key in named}
    values = dict(zip(program.arg_names, positional, strict=False))
    values |= {key: value for key, value in named.items() if key not in _OPTIONS}
    # As Triton specializes a call: ones are constants, and what is divisible by 16 is known to be.
    kept = {parameter.name for parameter in program.params if parameter.do_not_specialize}
    signature, constants, attributes = {}, {}, {}
    for position, key in enumerate(program.arg_names):
        value = values[key]
        signature[key] = _type(value) if key.islower() else "constexpr"
        if signature[key] == "constexpr" or (type(value) is int and value == 1 and key not in kept):
            signature[key], constants[key] = "constexpr", value
        elif isinstance(value, Tensor) or (
            isinstance(value, int) and value % 16 == 0 and key not in kept
        ):
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(program, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def _type(value: object) -> str:
    """As Triton names it; what a call leaves out is a constant."""
    if isinstance(value, Tensor):
        return _POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "constexpr" if value is None else "i32"
