"""The packages that ONNX needs, which a plain installation does not have."""

from __future__ import annotations

from importlib.util import find_spec

from sage_compiler.errors import SageError


def require(what: str, *packages: str) -> None:
    """Raises SageError when a package is not installed; ``what`` needs it."""
    for package in packages:
        if find_spec(package) is None:
            raise SageError(
                f"{what} needs the package {package}, which is not installed: "
                "pip install 'sage-compiler[onnx]'"
            )
