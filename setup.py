"""Build the native libraries. All else about the package is declared in pyproject.toml.

    sage_compiler/kernels/cpu/libsage_cpu    attention on CPUs behind sage_cpu.h, loaded by ctypes
    sage_compiler/onnx/runtime/libsage_ort   ONNX Runtime's operator library, the first one inside

They know nothing of Python and are plain C to those who load them, so that one wheel
py3-none-<platform> serves every Python. They are compiled for the baseline of their architecture,
except for one source for each instruction set, which runs where the machine has that. A source
whose flags the compiler rejects is left out, and the others are told by its macro:

    *_avx512vnni.cpp  SAGE_CPU_WITHOUT_AVX512VNNI
    *_avxvnni.cpp     SAGE_CPU_WITHOUT_AVXVNNI
    *_avx2.cpp        SAGE_CPU_WITHOUT_AVX2

Environment: CXX compiles and CC links (C, so that no C++ runtime is needed); CPPFLAGS, CFLAGS,
CXXFLAGS and LDFLAGS come after the flags below. Where the libraries cannot be built, the package is
installed without them, with a warning; with SAGE_CPU_REQUIRED=1 that is an error.

SAGE_WHEEL_PACK names a folder that `sagec kernels build --release` made, of the templates that are
here: its kernels go into the wheel, where kernels/cuda/pack.py looks for them. Without it, as in
all other installations, the wheel has none, and they are compiled on first use.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError, FileError
from setuptools.modified import newer_group

CPU = Path("compiler/kernels/cpu")
ORT = Path("compiler/onnx/runtime")
TEMPLATES = Path("cutlass_templates/include")  # of the CUDA kernels
CPU_SOURCES = sorted(map(str, CPU.glob("src/*.cpp")))
ORT_SOURCES = sorted(map(str, ORT.rglob("*.cpp")))
CPU_HEADERS = sorted(map(str, [*CPU.glob("*.h"), *CPU.glob("src/*.hpp")]))
ORT_HEADERS = sorted(map(str, [*ORT.glob("*.h"), *ORT.rglob("*.hpp"), ORT / "exports.map"]))
TEMPLATE_FILES = sorted(str(path) for path in TEMPLATES.rglob("*") if path.is_file())

# -ffp-contract=fast and the two that assume no traps and no errno let the compiler use FMA and
# vectors; unlike -ffast-math they keep NaN and infinity.
FLAGS = f"""-std=c++20 -O3 -fPIC -fvisibility=hidden -fno-exceptions -fno-rtti -fno-math-errno
  -fno-trapping-math -ffp-contract=fast -Wall -Wextra -I{CPU} -I{TEMPLATES}""".split()
LINK_FLAGS = ["-shared", "-lm", *(["-Wl,-z,defs"] if sys.platform == "linux" else [])]

# libsage_ort exports nothing of sage_cpu.h, whose functions may be those of another libsage_cpu.
LINKER_SCRIPT = (
    ["-Wl,-exported_symbol,_RegisterCustomOps", "-Wl,-exported_symbol,_sage_ort_*"]
    if sys.platform == "darwin"
    else [f"-Wl,--version-script={ORT}/exports.map"]
)

# Libraries of their own where the C library is older than 2.34.
THREADS_AND_LOADING = ["-pthread", "-ldl"] if sys.platform == "linux" else []

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"]
# GCC 12 warns of its own AVX-512 intrinsics; Clang does not know all of these warnings.
QUIET = ["-Wno-unknown-warning-option", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
ISA_FLAGS = {
    "avx2": AVX2,
    "avxvnni": [*AVX2, "-mavxvnni"],
    "avx512vnni": [*AVX2, *AVX512, *QUIET],
}
# An assembler may be older than its compiler: what it must know besides.
PROBES = {
    "avx2": "vpmaddwd %ymm0, %ymm1, %ymm2",
    "avxvnni": "{vex} vpdpbusd %ymm0, %ymm1, %ymm2",
    "avx512vnni": "vpdpbusd %zmm0, %zmm1, %zmm2",
}


def templates_digest() -> str:
    """As kernels/cuda/render.py computes it, which cannot be imported before it is installed."""
    digest = hashlib.sha256()
    for path in sorted(path for path in TEMPLATES.rglob("*") if path.is_file()):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(TEMPLATES).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def isa_of(source: str) -> str:
    """The instruction set of a source, e.g. "avx2"; what follows the last underscore of others."""
    return Path(source).stem.rpartition("_")[2]


def from_environment(*names: str) -> list[str]:
    """The flags in environment variables, e.g. CFLAGS."""
    return [flag for name in names for flag in shlex.split(os.environ.get(name, ""))]


def compiler(variable: str, *names: str) -> list[str]:
    """The command that an environment variable holds, or the first of ``names`` that is installed.

    Raises:
        CompileError: there is none.
    """
    command = from_environment(variable) or [name for name in names if shutil.which(name)][:1]
    if not command or shutil.which(command[0]) is None:
        looked_for = command[0] if command else ", ".join(names)
        raise CompileError(
            f"no compiler found (looked for {looked_for}); install one or set {variable}"
        )
    return command


def run(command: list[str]) -> None:
    """Run one compiler command.

    Raises:
        CompileError: it failed.
    """
    logging.info(shlex.join(command))
    result = subprocess.run(command, capture_output=True, text=True)
    if result.stderr:
        print(result.stderr, end="", file=sys.stderr, flush=True)
    if result.returncode != 0:
        raise CompileError(f"{shlex.join(command)} failed")


def accepts(compile_command: list[str], flags: list[str], instruction: str) -> bool:
    """Whether compiler and assembler know them, for the machine that is compiled for."""
    probe = [*compile_command, *flags, "-Werror", "-x", "c++", "-c", "-", "-o", os.devnull]
    source = f'void f() {{ asm volatile("{instruction}"); }}'
    return subprocess.run(probe, input=source, text=True, capture_output=True).returncode == 0


def standard_of(source: str) -> list[str]:
    """The operator library is C++17, for the compilers of those who build it into their programs;
    the CPU kernels are C++20."""
    return ["-std=c++17"] if ORT in Path(source).parents else []


class BuildLibrary(build_ext):
    """Builds a plain shared library where setuptools would build an extension module."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.compiled: set[str] = set()  # objects of this build: the libraries share some

    def get_ext_filename(self, fullname: str) -> str:
        suffix = ".dylib" if sys.platform == "darwin" else ".so"
        return os.path.join(*fullname.split(".")) + suffix

    def get_output_mapping(self) -> dict[str, str]:
        """An editable install links these files: only what was built."""
        mapping = super().get_output_mapping().items()
        return {built: place for built, place in mapping if os.path.exists(built)}

    def build_extension(self, ext: Extension) -> None:
        library = self.get_ext_fullpath(ext.name)
        if not self.force and not newer_group([*ext.sources, *ext.depends], library):
            return
        cc = compiler("CC", "cc", "gcc", "clang")
        cxx = [*compiler("CXX", "c++", "g++", "clang++"), *FLAGS]
        flags_of = {source: ISA_FLAGS.get(isa_of(source), []) for source in ext.sources}
        rejected = [
            s
            for s, flags in flags_of.items()
            if flags and not accepts(cxx, flags, PROBES[isa_of(s)])
        ]
        for source in rejected:
            del flags_of[source]
            cxx.append(f"-DSAGE_CPU_WITHOUT_{isa_of(source).upper()}")

        cxx += [f"-D{name}={value}" for name, value in ext.define_macros]
        cxx += from_environment("CPPFLAGS", "CFLAGS", "CXXFLAGS")
        objects = {source: f"{self.build_temp}/{Path(source).stem}.o" for source in flags_of}
        os.makedirs(self.build_temp, exist_ok=True)
        os.makedirs(os.path.dirname(library), exist_ok=True)
        with ThreadPoolExecutor(self.parallel or os.cpu_count()) as pool:
            commands = (
                [*cxx, *flags, *standard_of(source), "-c", source, "-o", objects[source]]
                for source, flags in flags_of.items()
                if source not in self.compiled
            )
            list(pool.map(run, commands))
        self.compiled.update(flags_of)
        environment = from_environment("CFLAGS", "LDFLAGS")
        run(
            [*cc, *objects.values(), "-o", library, *LINK_FLAGS, *ext.extra_link_args, *environment]
        )


class BuildPackage(build_py):
    """Puts a kernel pack into the package, where there is one to put."""

    def run(self) -> None:
        super().run()
        named = os.environ.get("SAGE_WHEEL_PACK")
        if named and not self.editable_mode:
            check_pack(Path(named))
            place = Path(self.build_lib, "sage_compiler", "kernels", "cuda", "pack")
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(named, place)


def check_pack(pack: Path) -> None:
    """Refuse what would be no pack of the wheel, or one that nobody reads.

    Raises:
        FileError: with what to do.
    """
    build_it = "build it with `sagec kernels build --release --out DIR`"
    try:
        manifest = json.loads((pack / "manifest.json").read_bytes())
    except (OSError, ValueError) as error:
        raise FileError(f"SAGE_WHEEL_PACK={pack} is no kernel pack ({error}); {build_it}") from None
    if not manifest["compressed"]:
        raise FileError(f"SAGE_WHEEL_PACK={pack} is not the pack of a wheel; {build_it}")
    if manifest["templates"] != templates_digest():
        raise FileError(f"SAGE_WHEEL_PACK={pack} was built from other templates; {build_it}")


class PlatformWheel(bdist_wheel):
    """A wheel for one platform and any Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


OPTIONAL = os.environ.get("SAGE_CPU_REQUIRED") != "1"
VERSION = tomllib.loads(Path("pyproject.toml").read_text())["project"]["version"]

setup(
    ext_modules=[
        Extension(
            "sage_compiler.kernels.cpu.libsage_cpu",
            CPU_SOURCES,
            depends=[*CPU_HEADERS, "setup.py"],
            optional=OPTIONAL,
        ),
        Extension(
            "sage_compiler.onnx.runtime.libsage_ort",
            [*CPU_SOURCES, *ORT_SOURCES],
            depends=[*CPU_HEADERS, *ORT_HEADERS, *TEMPLATE_FILES, "setup.py", "pyproject.toml"],
            define_macros=[
                ("SAGE_VERSION", f'"{VERSION}"'),
                ("SAGE_TEMPLATES_DIGEST", f'"{templates_digest()}"'),
            ],
            extra_link_args=[*LINKER_SCRIPT, *THREADS_AND_LOADING],
            optional=OPTIONAL,
        ),
    ],
    cmdclass={
        "build_ext": BuildLibrary,
        "build_py": BuildPackage,
        "bdist_wheel": PlatformWheel,
    },
)
