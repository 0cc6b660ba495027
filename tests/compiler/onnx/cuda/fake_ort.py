"""ONNX Runtime as far as one node goes, see ``fake_ort.cpp``, by ctypes."""

from __future__ import annotations

import ctypes
import functools
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from tests.compiler.kernels.dense import Call
from tests.compiler.onnx.cuda.native import HERE
from tests.compiler.onnx.runtime.models import LIBRARY, attributes_of
from tests.cutlass_templates import host

CUDA: Final = "CUDAExecutionProvider"
CPU: Final = "CPUExecutionProvider"
TYPES: Final = {torch.float32: 1, torch.bool: 9, torch.float16: 10, torch.float64: 11}
TYPES[torch.bfloat16] = 16
INVALID_ARGUMENT, NOT_IMPLEMENTED, INVALID_GRAPH, FAIL = 2, 9, 10, 1

_RUNTIME: Final = host.ROOT / "compiler" / "onnx" / "runtime"
_MESSAGE_BYTES: Final = 2048


class OrtError(Exception):
    """A status with a message.

    Attributes:
        code: an OrtErrorCode.
    """

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


@functools.cache
def _runtime() -> ctypes.CDLL:
    source, header = HERE / "fake_ort.cpp", _RUNTIME / "ort_abi.hpp"
    flags = ("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror")
    arguments = [*flags, "-shared", "-I", str(_RUNTIME), str(source), "-ldl"]
    content = [source.read_bytes(), header.read_bytes()]
    library = ctypes.CDLL(str(host._build("libfake_ort.so", arguments, content)))
    for name in ("find", "info", "context"):
        getattr(library, f"fake_{name}").restype = ctypes.c_void_p
    library.fake_unload.restype = ctypes.c_bool
    library.fake_domains.restype = ctypes.c_long
    library.fake_warning.restype = ctypes.c_char_p
    return library


def lent() -> tuple[int, ...]:
    """Statuses, infos, allocators and scratch that are not given back."""
    counts = (ctypes.c_long * 4)()
    _runtime().fake_lent(ctypes.byref(counts))
    return tuple(counts)


def domains() -> int:
    """Domains that were ever made."""
    return int(_runtime().fake_domains())


def set_device(ordinal: int) -> None:
    """Where memory is allocated from now on."""
    _runtime().fake_set_device(ordinal)


def set_logger(is_there: bool) -> None:
    """Whether nodes that are made from now on have a logger."""
    _runtime().fake_set_logger(is_there)


def warnings() -> list[str]:
    """What was logged since this was last asked."""
    found: list[str] = []
    while (words := _runtime().fake_warning(ctypes.c_size_t(len(found)))) is not None:
        found.append(words.decode())
    return found


class Library:
    """A copy of the operator library, with nothing loaded yet, and its operators."""

    def __init__(self, path: Path) -> None:
        """Copies the library to ``path``."""
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(LIBRARY, path)
        self._path = path
        self.register()

    def register(self) -> None:
        """As a session that loads it; its operators are those that it has now."""
        path = self._path
        self.count: int = _runtime().fake_register(str(path).encode())
        assert self.count > 0
        self._found = {
            (provider, dtype): _runtime().fake_find(provider.encode(), number)
            for provider in (CUDA, CPU)
            for dtype, number in TYPES.items()
        }

    def cuda_state(self) -> str:
        """What the library says of CUDA."""
        state = ctypes.CDLL(str(self._path)).sage_ort_cuda_state
        state.restype = ctypes.c_char_p
        said: bytes = state()
        return said.decode()

    def unload(self) -> bool:
        """Close it, as after the last session; whether it stays loaded all the same."""
        return bool(_runtime().fake_unload(str(self._path).encode()))

    def operator(self, dtype: torch.dtype, provider: str = CUDA) -> ctypes.c_void_p | None:
        """The operator of a provider for a type of query, if there is one."""
        found = self._found[provider, dtype]
        return None if found is None else ctypes.c_void_p(found)


class Node:
    """The kernel of one node."""

    def __init__(
        self,
        library: Library,
        dtype: torch.dtype,
        attributes: Mapping[str, str | float | int],
        name: str = "layer",
    ) -> None:
        """Raises OrtError."""
        operator = library.operator(dtype)
        assert operator is not None
        self._operator = operator
        info = ctypes.c_void_p(_runtime().fake_info())
        _runtime().fake_word(info, b"name of the node", name.encode())
        for key, value in attributes.items():
            match value:
                case str():
                    _runtime().fake_word(info, key.encode(), value.encode())
                case int():
                    _runtime().fake_integer(info, key.encode(), ctypes.c_int64(value))
                case float():
                    _runtime().fake_float(info, key.encode(), ctypes.c_float(value))
        self._kernel = ctypes.c_void_p()
        _checked("create", operator, info, ctypes.byref(self._kernel))

    def close(self) -> None:
        """Destroy it."""
        _runtime().fake_destroy(self._operator, self._kernel)

    def run(
        self,
        inputs: Sequence[Tensor | None],
        outputs: Sequence[Tensor | None],
        *,
        stream: int = 0x5A6E,
        has_memory: bool = True,
    ) -> None:
        """One call.

        Args:
            inputs: up to five, dense.
            outputs: up to two, of the shapes that they must have, dense.

        Raises:
            OrtError: it fails.
        """
        context = ctypes.c_void_p(_runtime().fake_context(ctypes.c_void_p(stream), has_memory))
        for is_output, tensors in ((False, inputs), (True, outputs)):
            for index, tensor in enumerate(tensors):
                if tensor is None:
                    continue
                assert tensor.is_contiguous()
                dims = (ctypes.c_int64 * tensor.dim())(*tensor.shape)
                _runtime().fake_tensor(
                    context,
                    is_output,
                    ctypes.c_size_t(index),
                    TYPES[tensor.dtype],
                    dims,
                    ctypes.c_size_t(tensor.dim()),
                    ctypes.c_void_p(tensor.data_ptr() or 1),
                )
        _checked("compute", self._operator, self._kernel, context)


def run(library: Library, call: Call, recipe: str) -> tuple[Tensor, Tensor]:
    """One node of this call; what is not written stays NaN.

    Raises:
        OrtError: it cannot be made, or fails.
    """
    attributes = attributes_of(call.semantics, call.query.shape[3]) | {"recipe": recipe}
    node = Node(library, call.query.dtype, attributes)
    try:
        return run_node(node, call)
    finally:
        node.close()


def run_node(node: Node, call: Call, **how: Any) -> tuple[Tensor, Tensor]:
    """As ``run``, of a node that is there; ``how`` as of ``Node.run``."""
    shape = call.query.shape[:3]
    output = call.query.new_full((*shape, call.value.shape[3]), torch.nan)
    results = (output, call.query.new_full(shape, torch.nan, dtype=torch.float32))
    given = (call.query, call.key, call.value, call.attn_mask, call.sinks)
    node.run([None if x is None else x.contiguous() for x in given], results, **how)
    return results


def _checked(name: str, *arguments: Any) -> None:
    message = ctypes.create_string_buffer(_MESSAGE_BYTES)
    function = getattr(_runtime(), f"fake_{name}")
    code = function(*arguments, message, ctypes.c_size_t(_MESSAGE_BYTES))
    if code != 0:
        raise OrtError(code, message.value.decode())
