"""sage-compiler: quantized attention for PyTorch, as a torch.compile backend."""

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
from sage_compiler.packed_kv import PackedKV
from sage_compiler.policy import Policy
from sage_compiler.prepare import prepare
from sage_compiler.report import Report
from sage_compiler.steps import set_step

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
    "guarded_layers",
    "last_report",
    "prepare",
    "set_step",
]
