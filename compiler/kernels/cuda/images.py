"""Images of kernels: shipped in a pack, kept in the cache, or compiled now."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import cache

from sage_compiler.errors import KernelUnavailableError
from sage_compiler.kernels.cuda import pack, toolchain
from sage_compiler.kernels.cuda.cache import Cache, default_folder
from sage_compiler.kernels.cuda.pack import Pack
from sage_compiler.kernels.cuda.spec import KernelSpec
from sage_compiler.kernels.cuda.toolchain import Compiler


class Images:
    """Where the images of CUDA kernels come from; threads may share it."""

    def __init__(
        self, packs: Sequence[Pack], cache: Cache, find_compiler: Callable[[], Compiler]
    ) -> None:
        """``find_compiler`` is called for the first kernel that no pack has."""
        self._packs = packs
        self._cache = cache
        self._find_compiler = find_compiler
        self._found: Compiler | None = None
        self._lock = threading.Lock()

    def __call__(self, spec: KernelSpec) -> bytes:
        """The image of a kernel.

        Raises:
            KernelUnavailableError: no pack has it and it cannot be compiled; with what to install.
        """
        for candidate in self._packs:
            image = candidate.find(spec)
            if image is not None:
                return image
        compiler = self._compiler()
        return self._cache.image(
            spec, compiler.identity, lambda source: compiler.compile(source, spec.arch)
        )

    def missing(self, spec: KernelSpec) -> str | None:
        """Why the image of a kernel cannot be had, without making it; None where it can."""
        if any(candidate.has(spec) for candidate in self._packs):
            return None
        try:
            return self._compiler().lacking(spec.arch)
        except KernelUnavailableError as error:
            return str(error)

    def _compiler(self) -> Compiler:
        with self._lock:
            if self._found is None:
                self._found = self._find_compiler()
            return self._found


@cache
def default_images() -> Images:
    """The images of this process: its packs, its user's cache, and the compiler that is here."""
    return Images(pack.find_packs(), Cache(default_folder()), toolchain.find)


def obtainable_here(specs: Sequence[KernelSpec]) -> bool:
    """Whether kernels can be had by a pack that is here, or by a compiler.

    Without a pack they are taken to be, as on another machine that compiles.
    """
    packs = pack.find_packs()
    images = Images(packs, Cache(None), toolchain.find)
    return not packs or all(images.missing(spec) is None for spec in specs)
