"""sage-compiler: quantized attention for PyTorch, as a torch.compile backend."""

from typing import TYPE_CHECKING, Any

from sage_compiler.backend import last_report
from sage_compiler.calibrate import calibrate
from sage_compiler.errors import (
    InvalidAttentionError,
    InvalidOptionError,
    KernelUnavailableError,
    PolicyError,
    SageError,
)
from sage_compiler.explain import explain
from sage_compiler.functional import attention
from sage_compiler.guard import GuardedLayer, guarded_layers
from sage_compiler.onnx.extra import require as _require
from sage_compiler.onnx.session import onnx_session, ort_library
from sage_compiler.packed_kv import PackedKV
from sage_compiler.policy import Policy
from sage_compiler.prepare import prepare
from sage_compiler.report import Report
from sage_compiler.steps import set_step

if TYPE_CHECKING:
    from sage_compiler.onnx.export import export_onnx

__all__ = [
    "GuardedLayer",
    "InvalidAttentionError",
    "InvalidOptionError",
    "KernelUnavailableError",
    "PackedKV",
    "Policy",
    "PolicyError",
    "Report",
    "SageError",
    "attention",
    "calibrate",
    "explain",
    "export_onnx",
    "guarded_layers",
    "last_report",
    "onnx_session",
    "ort_library",
    "prepare",
    "set_step",
]


def __getattr__(name: str) -> Any:
    """``export_onnx``, on first use: it imports onnx, which a plain installation does not have."""
    if name != "export_onnx":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _require("sage.export_onnx", "onnx", "onnxscript")
    from sage_compiler.onnx.export import export_onnx

    return export_onnx
