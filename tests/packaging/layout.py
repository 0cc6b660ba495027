"""Where the package's folders are, as pyproject.toml maps them."""

import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[2]
PYPROJECT: Final[dict[str, Any]] = tomllib.loads((ROOT / "pyproject.toml").read_text())
# package -> its folder, e.g. "sage_compiler.passes" -> "passes"
PACKAGE_DIRS: Final[dict[str, str]] = PYPROJECT["tool"]["setuptools"]["package-dir"]

CACHE_FOLDERS: Final = frozenset({"__pycache__"})
BUILD_PRODUCTS: Final = frozenset({".pyc", ".o", ".so", ".dylib"})

# The native libraries: their sources, each of which the wheel holds as one file.
_SUFFIX: Final = ".dylib" if sys.platform == "darwin" else ".so"
NATIVE_SOURCES: Final = (ROOT / "compiler/kernels/cpu/src", ROOT / "compiler/onnx/runtime")
NATIVE_HEADER: Final = ROOT / "compiler/kernels/cpu/sage_cpu.h"
NATIVE_LIBRARY: Final = f"sage_compiler/kernels/cpu/libsage_cpu{_SUFFIX}"
ORT_HEADER: Final = ROOT / "compiler/onnx/runtime/sage_ort.h"
ORT_LIBRARY: Final = f"sage_compiler/onnx/runtime/libsage_ort{_SUFFIX}"


def source_files(folder: Path) -> Iterator[Path]:
    """The files under ``folder``, relative to it, without caches and build products."""
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        cached = path.suffix in BUILD_PRODUCTS or not CACHE_FOLDERS.isdisjoint(inside.parts)
        if path.is_file() and not cached:
            yield inside


def module_name(package: str, file: Path) -> str:
    """The dotted name of ``file``, a path inside the folder of ``package``.

    >>> module_name("sage_compiler", Path("kernels/__init__.py"))
    'sage_compiler.kernels'
    """
    parts = file.with_suffix("").parts
    return ".".join([package, *(parts[:-1] if parts[-1] == "__init__" else parts)])


def modules() -> dict[str, Path]:
    """Every module of the package, by dotted name."""
    return {
        module_name(package, file): ROOT / folder / file
        for package, folder in PACKAGE_DIRS.items()
        for file in source_files(ROOT / folder)
        if file.suffix == ".py"
    }
