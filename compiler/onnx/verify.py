"""Whether a file computes in ONNX Runtime what the model computes in PyTorch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime
import torch
from onnxruntime.capi import onnxruntime_pybind11_state as state
from torch import Tensor

NO_KERNEL: Final = state.NotImplemented  # no kernel for an operator, or none for its types
# What ONNX Runtime raises of a file; it has no common base.
ERRORS: Final = (
    state.EPFail,
    state.EngineError,
    state.Fail,
    state.InvalidArgument,
    state.InvalidGraph,
    state.InvalidProtobuf,
    state.ModelLoaded,
    state.NoModel,
    state.NoSuchFile,
    state.NotFound,
    state.NotImplemented,
    state.RuntimeException,
)
_WITHOUT_NUMPY: Final = {torch.bfloat16: (torch.int16, np.uint16, 16)}  # its number in ONNX


def run(session: Any, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """The outputs of a session on the CPU; inputs that it does not have are left out."""
    wanted = {each.name for each in session.get_inputs()}
    given = {name: _to_ort(value) for name, value in inputs.items() if name in wanted}
    outputs: Iterable[Any] = session.run_with_ort_values(None, given)
    return [_from_ort(output) for output in outputs]


def _from_ort(value: Any) -> Tensor:
    # ONNX Runtime 1.23 hands out no DLPack that torch takes, so only what NumPy lacks goes by it.
    if value.data_type() == "tensor(bfloat16)":
        return torch.utils.dlpack.from_dlpack(value).clone()
    return torch.from_numpy(value.numpy())


def _to_ort(value: Tensor) -> Any:
    value = value.detach().cpu().contiguous()
    if value.dtype not in _WITHOUT_NUMPY:
        return onnxruntime.OrtValue.ortvalue_from_numpy(value.numpy())
    bits, held, number = _WITHOUT_NUMPY[value.dtype]
    array = value.view(bits).numpy().view(held)
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, number)


def open_plain(file: Path) -> Any:
    """A session on the CPU without our library."""
    return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
