"""Compilers of kernels: NVRTC, which takes no toolkit, and nvcc."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Final, Protocol

from sage_compiler.errors import KernelUnavailableError
from sage_compiler.kernels.cuda import headers
from sage_compiler.kernels.cuda.arch import PORTABLE
from sage_compiler.kernels.cuda.binary import Binary, read_log
from sage_compiler.kernels.cuda.nvrtc import Nvrtc
from sage_compiler.kernels.cuda.render import INCLUDE

FLAGS: Final = ("--std=c++17", "-DNDEBUG", "--ptxas-options=-v")
# CuTe calls constexpr functions of the host's standard library.
NVCC_FLAGS: Final = (*FLAGS, "--expt-relaxed-constexpr")
# There is no host: what is not marked is for the device.
NVRTC_FLAGS: Final = (*FLAGS, "--device-as-default-execution-space")
_LOG_LINES: Final = 12


class Compiler(Protocol):
    """What compiles a kernel. Calls from several threads at once are fine."""

    @property
    def identity(self) -> str:
        """Everything besides the source, the templates and the arch that a binary depends on."""

    def compile(self, source: str, arch: str) -> Binary:
        """Compile a source with one kernel, to a cubin, or for ``PORTABLE`` to PTX.

        Resources of PTX are those of the cubin for ``PORTABLE``'s own compute capability.

        Raises:
            KernelUnavailableError: it does not compile, with the first lines of the log.
        """

    def lacking(self, arch: str) -> str | None:
        """Why it compiles nothing for an architecture that is newer than it is, or too old.

        None where it does.
        """


class NvccCompiler:
    """nvcc, with the CUDA headers that it brings."""

    def __init__(self) -> None:
        """Raises KernelUnavailableError when nvcc or CUTLASS is missing."""
        path = headers.tool("nvcc")
        if path is None:
            raise KernelUnavailableError(
                "there is no nvcc on PATH or in CUDA_HOME; install a CUDA toolkit, or NVRTC: "
                f"{headers.INSTALL}"
            )
        self._path = path
        self._cutlass = headers.cutlass()
        printed = _run([str(path), "--version"]).stdout
        version = re.search(r"V(\d+\.\d+\.\d+)", printed)
        if version is None:
            raise KernelUnavailableError(f"{path} --version names no version: {printed!r}")
        self._name = f"nvcc {version[1]}"
        listed = _run([str(path), "--list-gpu-code"]).stdout
        self._capabilities = frozenset(map(int, re.findall(r"\bsm_(\d+)", listed)))
        self.identity = " ".join((self._name, self._cutlass.identity, *NVCC_FLAGS))

    def compile(self, source: str, arch: str) -> Binary:
        with tempfile.TemporaryDirectory(prefix="sage-nvcc-") as name:
            folder = Path(name)
            (folder / "kernel.cu").write_text(source, encoding="utf-8")
            command = [str(self._path), *NVCC_FLAGS, f"--gpu-architecture={_real(arch)}", "--cubin"]
            if arch == PORTABLE.name:
                command.append("--keep")  # the PTX that the cubin is made of, kernel.ptx
            command += [f"-I{path}" for path in (INCLUDE, *self._cutlass.folders)]
            done = _run([*command, "--output-file=kernel.cubin", "kernel.cu"], cwd=folder)
            log = done.stdout + done.stderr
            if done.returncode:
                raise failure("nvcc", arch, log)
            return _binary((folder / f"kernel.{_kind(arch)}").read_bytes(), log)

    def lacking(self, arch: str) -> str | None:
        return _lacking(self._name, self._capabilities, arch)


class NvrtcCompiler:
    """NVRTC, a library, with the CUDA headers of NVIDIA's packages or of a toolkit."""

    def __init__(self) -> None:
        """Raises KernelUnavailableError when NVRTC or headers are missing."""
        self._nvrtc = Nvrtc.find()
        cutlass, cuda = headers.cutlass(), headers.cuda_for_rtc()
        headers.check_versions(cutlass, cuda)
        self._folders = (INCLUDE, *cutlass.folders, *cuda.folders)
        libraries = (cutlass.identity, cuda.identity)
        self.identity = " ".join(("nvrtc", self._nvrtc.version, *libraries, *NVRTC_FLAGS))

    def compile(self, source: str, arch: str) -> Binary:
        options = [*NVRTC_FLAGS, f"--gpu-architecture={_real(arch)}"]
        options += [f"-I{path}" for path in self._folders]
        image, log = self._nvrtc.compile(source, options, _kind(arch).upper())
        if image is None:
            raise failure("NVRTC", arch, log)
        return _binary(image, log)

    def lacking(self, arch: str) -> str | None:
        return _lacking(
            f"NVRTC {self._nvrtc.version.partition('+')[0]}", self._nvrtc.capabilities, arch
        )


_COMPILERS: Final[Mapping[str, Callable[[], Compiler]]] = {
    "nvrtc": NvrtcCompiler,
    "nvcc": NvccCompiler,
}
NAMES: Final = tuple(_COMPILERS)


def find(*names: str) -> Compiler:
    """The first of these compilers that is here; without names, NVRTC or else nvcc.

    NVRTC starts at once and needs no host compiler; the images of nvcc are smaller.

    Raises:
        KernelUnavailableError: none is here, with what installs each.
    """
    problems = []
    for name in names or NAMES:
        try:
            return _COMPILERS[name]()
        except KernelUnavailableError as error:
            problems.append(f"{name}: {error}")
    raise KernelUnavailableError(f"no compiler for kernels. {'. '.join(problems)}")


def failure(compiler: str, arch: str, log: str) -> KernelUnavailableError:
    """The error for a source that does not compile, with the log from its first error on."""
    lines = [line for line in log.splitlines() if line.strip()]
    first = next((i for i, line in enumerate(lines) if "error" in line), 0)
    shown = "\n".join(lines[first : first + _LOG_LINES])
    return KernelUnavailableError(f"{compiler} cannot compile a kernel for {arch}:\n{shown}")


def _lacking(compiler: str, capabilities: Collection[int], arch: str) -> str | None:
    capability = re.sub(r"\D", "", arch)
    if int(capability) in capabilities:
        return None
    known = ", ".join(str(each) for each in sorted(capabilities))
    return f"{compiler} does not compile for {arch}, but for {known}; install one that does"


def _real(arch: str) -> str:
    """What is compiled for: PTX of ``PORTABLE`` comes with a cubin, which tells of resources."""
    return arch.replace("compute_", "sm_")


def _kind(arch: str) -> str:
    return "ptx" if arch == PORTABLE.name else "cubin"


def _binary(image: bytes, log: str) -> Binary:
    resources, warnings = read_log(log)
    return Binary(image, resources, warnings)


def _run(command: list[str], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    # What these two variables add would change the binary, and nobody would know of it.
    hidden = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, errors="replace"
    )
