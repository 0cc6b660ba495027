"""ONNX Runtime with our operator library: ``sage.ort_library`` and ``sage.onnx_session``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final
from weakref import WeakSet

from sage_compiler.errors import InvalidOptionError, KernelUnavailableError
from sage_compiler.onnx.extra import require

_SUFFIX: Final = ".dylib" if sys.platform == "darwin" else ".so"
_FILE_NAME: Final = f"libsage_ort{_SUFFIX}"
_FOLDER: Final = "runtime"

# In order of preference, where the build of ONNX Runtime has them.
_PROVIDERS: Final = ("CUDAExecutionProvider", "CPUExecutionProvider")

# The options that have the library: registering it again is an error.
_with_library: WeakSet[Any] = WeakSet()


def ort_library() -> str:
    """The path of the library of ``ai.sage::Attention`` for ONNX Runtime.

    It is one file that needs nothing else, for every language: its path goes to
    ``SessionOptions.register_custom_ops_library`` (Python), ``RegisterCustomOpsLibrary_V2`` (C), or
    the like.

    Raises:
        KernelUnavailableError: it was not built.
    """
    here = Path(__file__)
    # In an editable install this file may be a link, and the library lies beside either.
    for folder in (here.parent, here.resolve().parent):
        file = folder / _FOLDER / _FILE_NAME
        if file.is_file():
            return str(file)
    raise KernelUnavailableError(
        f"{_FILE_NAME} was not built; reinstall sage-compiler with a C++ compiler"
    )


def onnx_session(
    path: str | os.PathLike[str],
    providers: Sequence[str | tuple[str, dict[str, Any]]] | None = None,
    *,
    session_options: Any = None,
) -> Any:
    """An onnxruntime.InferenceSession of a file, with the operator library registered.

    Args:
        path: the ONNX file.
        providers: as InferenceSession takes them; None: CUDA, where this ONNX Runtime has it, then
            the CPU.
        session_options: an onnxruntime.SessionOptions, which is given the library too, and can
            serve again. None: the defaults.

    Raises:
        KernelUnavailableError: there is no library.
        SageError: onnxruntime is not installed.
        InvalidOptionError: no such file, or a provider that this ONNX Runtime does not have.
        onnxruntime's own errors: what it says of the file.
    """
    require("sage.onnx_session", "onnxruntime")
    import onnxruntime

    if not Path(path).is_file():
        raise InvalidOptionError(f"path={os.fspath(path)!r} is not a file")
    available = onnxruntime.get_available_providers()
    if isinstance(providers, str):
        raise InvalidOptionError(f"providers={providers!r}; it must be a list: [{providers!r}]")
    chosen = [name for name in _PROVIDERS if name in available] if providers is None else providers
    for provider in chosen:
        name = provider if isinstance(provider, str) else provider[0]
        if name not in available:
            raise InvalidOptionError(
                f"provider {name!r}; onnxruntime {onnxruntime.__version__} has "
                f"{', '.join(available)}"
            )
    options = onnxruntime.SessionOptions() if session_options is None else session_options
    if options not in _with_library:
        options.register_custom_ops_library(ort_library())
        _with_library.add(options)
    return onnxruntime.InferenceSession(os.fspath(path), options, providers=list(chosen))
