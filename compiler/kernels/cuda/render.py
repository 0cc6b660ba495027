"""From a spec to its source: a few lines that instantiate a template of ``cutlass_templates``."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from string import Template
from typing import Final

import sage_compiler.cutlass_templates
from sage_compiler.kernels.cuda.spec import KernelSpec

# Compilers read the headers as files. In an editable install the module may be a link, and the
# templates lie beside what it links to.
TEMPLATES: Final = Path(sage_compiler.cutlass_templates.__file__).resolve().parent
INCLUDE: Final = TEMPLATES / "include"
_INSTANTIATION: Final = TEMPLATES / "instantiate" / "kernel.cu.in"


def render(spec: KernelSpec) -> str:
    """The CUDA C++ source of one kernel, whose entry point is ``spec.symbol``."""
    return _instantiation().substitute(
        kind=spec.kind,
        symbol=spec.symbol,
        threads=spec.threads,
        shared_bytes=spec.shared_bytes,
        params_bytes=spec.params_bytes,
        instance=spec.instance,
    )


@cache
def _instantiation() -> Template:
    return Template(_INSTANTIATION.read_text(encoding="utf-8"))


@cache
def templates_digest(include: Path = INCLUDE) -> str:
    """SHA-256 over names and contents of all template headers, in hexadecimal.

    It is computed once in a process: a process compiles one state of the templates.
    """
    digest = hashlib.sha256()
    for path in sorted(include.rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            name = path.relative_to(include).as_posix()
            digest.update(f"{name}\0{len(content)}\0".encode())
            digest.update(content)
    return digest.hexdigest()
