"""Where the headers and tools are that compiling a kernel takes: CUTLASS, CUDA, CCCL.

Environment:
    SAGE_CUTLASS_INCLUDE: CUTLASS's include folder, instead of the one of nvidia-cutlass.
    SAGE_CUDA_INCLUDE: CUDA's include folder, instead of the one of NVIDIA's packages.
    CUDA_HOME: a CUDA toolkit, looked at before those of the system.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sage_compiler.errors import KernelUnavailableError

INSTALL: Final = "pip install 'sage-compiler[cuda]'"
_SYSTEM_TOOLKIT: Final = Path("/usr/local/cuda")
# In C++ without a host's standard library, CUTLASS declares tuple_size a second time, otherwise
# than CCCL does from 3.2 on, up to this version of CUTLASS.
_CUTLASS_WITH_OLD_CCCL: Final = (4, 2)
_NEW_CCCL: Final = (3, 2)


@dataclass(frozen=True, slots=True)
class Headers:
    """Headers of one library.

    Attributes:
        folders: in the order of search.
        version: major, minor and patch.
        identity: all that tells these headers from others.
    """

    folders: tuple[Path, ...]
    version: tuple[int, int, int]
    identity: str


def cutlass() -> Headers:
    """CUTLASS with CuTe.

    Raises:
        KernelUnavailableError: there is none, with what installs it.
    """
    chosen = os.environ.get("SAGE_CUTLASS_INCLUDE")
    if chosen:
        folders = [Path(chosen)]
    else:
        folders = [folder / "source" / "include" for folder in _package("cutlass_library")]
    for folder in folders:
        version = folder / "cutlass" / "version.h"
        if (folder / "cute" / "tensor.hpp").is_file() and version.is_file():
            names = ("CUTLASS_MAJOR", "CUTLASS_MINOR", "CUTLASS_PATCH")
            major, minor, patch = (_defined(version, name) for name in names)
            return Headers((folder,), (major, minor, patch), f"CUTLASS {major}.{minor}.{patch}")
    where = f"SAGE_CUTLASS_INCLUDE={chosen!r}" if chosen else "the package nvidia-cutlass"
    raise KernelUnavailableError(
        f"compiling a kernel takes CUTLASS's headers, and {where} does not have them; {INSTALL}"
    )


def cuda_for_rtc() -> Headers:
    """CUDA's and CCCL's headers for a compiler that brings none, with CCCL's version.

    Raises:
        KernelUnavailableError: there are none, with what installs them.
    """
    chosen = os.environ.get("SAGE_CUDA_INCLUDE")
    folders = [Path(chosen)] if chosen else list(_cuda_includes())
    for folder in folders:
        for cccl in (folder / "cccl", folder):
            version = cccl / "cuda" / "std" / "__cccl" / "version.h"
            runtime = folder / "cuda_runtime_api.h"
            if runtime.is_file() and version.is_file():
                number = _defined(version, "CCCL_VERSION")
                split = (number // 1_000_000, number // 1000 % 1000, number % 1000)
                identity = f"CUDA {_defined(runtime, 'CUDART_VERSION')} CCCL {number}"
                return Headers((folder, cccl), split, identity)
    where = f"SAGE_CUDA_INCLUDE={chosen!r}" if chosen else "none of NVIDIA's packages and toolkits"
    raise KernelUnavailableError(
        f"compiling a kernel takes the headers of CUDA with CCCL, and {where} has both; {INSTALL}"
    )


def check_versions(cutlass: Headers, cccl: Headers) -> None:
    """Raises KernelUnavailableError when NVRTC cannot compile these two together."""
    if cutlass.version[:2] <= _CUTLASS_WITH_OLD_CCCL and cccl.version[:2] >= _NEW_CCCL:
        raise KernelUnavailableError(
            f"NVRTC cannot compile {cutlass.identity} with CCCL "
            f"{'.'.join(map(str, cccl.version))}, which must be older than 3.2; "
            "pip install 'nvidia-cuda-cccl<13.2'"
        )


def tool(name: str) -> Path | None:
    """A program of the CUDA toolkit: of CUDA_HOME, on PATH, of a package or of the system."""
    home = os.environ.get("CUDA_HOME")
    folders = [Path(home) / "bin"] if home else []
    folders += map(Path, os.environ.get("PATH", os.defpath).split(os.pathsep))
    folders += [folder / "bin" for folder in nvidia_folders()]
    folders.append(_SYSTEM_TOOLKIT / "bin")
    found = shutil.which(name, path=os.pathsep.join(map(str, folders)))
    return Path(found) if found else None


def nvidia_folders() -> Iterator[Path]:
    """The folders of NVIDIA's packages, such as ``nvidia/cu13``."""
    for folder in _package("nvidia"):
        yield from sorted(path for path in folder.iterdir() if path.is_dir())


def toolkits() -> Iterator[Path]:
    """The folders of CUDA toolkits."""
    home = os.environ.get("CUDA_HOME")
    if home:
        yield Path(home)
    yield _SYSTEM_TOOLKIT


def _cuda_includes() -> Iterator[Path]:
    for folder in (*nvidia_folders(), *toolkits()):
        yield folder / "include"


def _package(name: str) -> tuple[Path, ...]:
    """The folders of an installed package, which is not imported."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.submodule_search_locations is None:
        return ()
    return tuple(path for path in map(Path, spec.submodule_search_locations) if path.is_dir())


def _defined(header: Path, name: str) -> int:
    found = re.search(rf"#define {name}\s+(\d+)", header.read_text(encoding="utf-8"))
    if found is None:
        raise KernelUnavailableError(f"{header} does not define {name}; {INSTALL}")
    return int(found[1])
