"""sage-compiler: quantized attention for PyTorch, as a torch.compile backend."""

from sage_compiler.backend import last_report
from sage_compiler.errors import (
    InvalidAttentionError,
    InvalidOptionError,
    KernelUnavailableError,
    SageError,
)
from sage_compiler.explain import explain
from sage_compiler.functional import attention
from sage_compiler.packed_kv import PackedKV
from sage_compiler.prepare import prepare
from sage_compiler.report import Report

__all__ = [
    "InvalidAttentionError",
    "InvalidOptionError",
    "KernelUnavailableError",
    "PackedKV",
    "Report",
    "SageError",
    "attention",
    "explain",
    "last_report",
    "prepare",
]
