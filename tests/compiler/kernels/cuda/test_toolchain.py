"""Finding compilers and headers, compiling a small kernel, reading what ptxas says."""

import pickle
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from sage_compiler.errors import KernelUnavailableError
from sage_compiler.kernels.cuda import headers, nvrtc, toolchain
from sage_compiler.kernels.cuda.arch import ARCHS, PORTABLE
from sage_compiler.kernels.cuda.binary import Resources, read_log
from sage_compiler.kernels.cuda.toolchain import Compiler
from tests.compiler.kernels.cuda.toy import TOY, source

NVCC_LOG = """\
kernel.cu(3): warning #177-D: variable "x" was declared but never referenced
ptxas info    : 11 bytes gmem, 88 bytes cmem[4]
ptxas info    : Compiling entry function 'toy' for 'sm_89'
ptxas info    : Function properties for toy
    24 bytes stack frame, 28 bytes spill stores, 52 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 1024 bytes smem, 368 bytes cmem[0]
ptxas info    : Compile time = 9.376 ms
ptxas warning : Unresolved
"""
NVRTC_LOG = """\
ptxas info    : 2848 bytes gmem, 10200 bytes cmem[4]
ptxas info    : Compiling entry function 'toy' for 'sm_89'
ptxas info    : Function properties for toy
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers, 368 bytes cmem[0]
ptxas info    : Compile time = 8.072 ms
"""
CALLED = """\
ptxas info    : Function properties for divide
    8 bytes stack frame, 4 bytes spill stores, 6 bytes spill loads
"""


def test_what_ptxas_reports_is_read() -> None:
    resources, rest = read_log(NVCC_LOG)
    assert resources == Resources(255, 28, 52, 24, 1024)
    assert rest.splitlines() == [NVCC_LOG.splitlines()[0], NVCC_LOG.splitlines()[-1]]
    assert read_log(NVRTC_LOG) == (Resources(8, 0, 0, 0, 0), "")
    # What it calls "info" and is a warning.
    serialized = "ptxas info    : (C7514) Potential Performance Loss: wgmma is serialized"
    assert read_log(f"{NVRTC_LOG}\n{serialized}\n")[1] == serialized


@pytest.mark.parametrize("name", toolchain.NAMES)
def test_ptx_is_of_the_portable_architecture(name: str) -> None:
    try:
        compiler = toolchain.find(name)
    except KernelUnavailableError as error:
        pytest.skip(str(error))
    spec = replace(TOY, arch=PORTABLE.name)
    binary = compiler.compile(source(spec), spec.arch)
    text = binary.image.decode()
    assert ".target sm_80" in text and f".visible .entry {spec.symbol}(" in text
    assert not binary.image.endswith(b"\0")  # the driver's call adds it
    assert binary.resources == compiler.compile(source(TOY), TOY.arch).resources


def test_what_called_functions_take_is_added() -> None:
    assert read_log(NVCC_LOG + CALLED)[0] == Resources(255, 32, 58, 32, 1024)


@pytest.mark.parametrize("log", ["", NVRTC_LOG * 2, CALLED])
def test_a_log_must_report_one_kernel(log: str) -> None:
    with pytest.raises(ValueError, match="one was compiled"):
        read_log(log)


def test_a_failure_shows_the_log_from_its_first_error_on() -> None:
    lines = [f"warning {i}" for i in range(50)] + [f"x.cuh({i}): error: y" for i in range(50)]
    words = str(toolchain.failure("nvcc", "sm_80", "\n".join(lines)))
    assert words.startswith("nvcc cannot compile a kernel for sm_80:\nx.cuh(0): error: y\n")
    assert "warning" not in words and len(words.splitlines()) < 20


@pytest.fixture
def nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without a CUDA toolkit or a package of NVIDIA's."""
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CUDA_HOME", "SAGE_CUTLASS_INCLUDE", "SAGE_CUDA_INCLUDE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(headers, "_package", lambda name: ())
    monkeypatch.setattr(headers, "_SYSTEM_TOOLKIT", tmp_path)


@pytest.mark.usefixtures("nothing")
def test_what_is_missing_is_said_with_what_installs_it() -> None:
    install = r"pip install 'sage-compiler\[cuda\]'"
    with pytest.raises(KernelUnavailableError, match=f"nvrtc: .*{install}.* nvcc: .*{install}"):
        toolchain.find()
    with pytest.raises(KernelUnavailableError, match=f"CUTLASS.*nvidia-cutlass.*{install}"):
        headers.cutlass()
    with pytest.raises(KernelUnavailableError, match=f"CCCL.*{install}"):
        headers.cuda_for_rtc()
    assert headers.tool("nvdisasm") is None


@pytest.mark.usefixtures("nothing")
def test_a_folder_that_the_user_names_must_have_the_headers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SAGE_CUTLASS_INCLUDE", str(tmp_path))
    monkeypatch.setenv("SAGE_CUDA_INCLUDE", str(tmp_path))
    with pytest.raises(KernelUnavailableError, match="SAGE_CUTLASS_INCLUDE="):
        headers.cutlass()
    with pytest.raises(KernelUnavailableError, match="SAGE_CUDA_INCLUDE="):
        headers.cuda_for_rtc()


def write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def a_cutlass(folder: Path, minor: int) -> None:
    write(folder / "cute" / "tensor.hpp", "")
    lines = ["#define CUTLASS_MAJOR 4", f"#define CUTLASS_MINOR {minor}", "#define CUTLASS_PATCH 1"]
    write(folder / "cutlass" / "version.h", "\n".join(lines))


def a_cuda(folder: Path, cccl: int) -> None:
    write(folder / "cuda_runtime_api.h", "#define CUDART_VERSION  13000\n")
    write(folder / "cccl/cuda/std/__cccl/version.h", f"#define CCCL_VERSION {cccl}\n")


@pytest.mark.usefixtures("nothing")
def test_headers_tell_their_versions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    a_cutlass(tmp_path / "cutlass", 2)
    a_cuda(tmp_path / "toolkit" / "include", 3001004)
    monkeypatch.setenv("SAGE_CUTLASS_INCLUDE", str(tmp_path / "cutlass"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    cutlass, cuda = headers.cutlass(), headers.cuda_for_rtc()
    assert (cutlass.version, cutlass.identity) == ((4, 2, 1), "CUTLASS 4.2.1")
    assert (cuda.version, cuda.identity) == ((3, 1, 4), "CUDA 13000 CCCL 3001004")
    include = tmp_path / "toolkit" / "include"
    assert cuda.folders == (include, include / "cccl")
    headers.check_versions(cutlass, cuda)


@pytest.mark.usefixtures("nothing")
@pytest.mark.parametrize(("minor", "cccl", "fits"), [(2, 3002000, False), (3, 3002000, True)])
def test_a_cccl_that_is_too_new_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, minor: int, cccl: int, fits: bool
) -> None:
    a_cutlass(tmp_path, minor)
    a_cuda(tmp_path, cccl)
    monkeypatch.setenv("SAGE_CUTLASS_INCLUDE", str(tmp_path))
    monkeypatch.setenv("SAGE_CUDA_INCLUDE", str(tmp_path))
    found = headers.cutlass(), headers.cuda_for_rtc()
    if fits:
        headers.check_versions(*found)
    else:
        with pytest.raises(KernelUnavailableError, match=r"pip install 'nvidia-cuda-cccl<13\.2'"):
            headers.check_versions(*found)


FAKE_NVCC = """\
#!/bin/sh
[ "$1" = --version ] && { echo 'Cuda compilation tools, release 13.0, V13.0.88'; exit 0; }
[ "$1" = --list-gpu-code ] && { echo sm_80; echo sm_90; exit 0; }
[ -n "$NVCC_APPEND_FLAGS" ] && { echo "error: $NVCC_APPEND_FLAGS" >&2; exit 1; }
echo "$@" > kernel.cubin
cat >&2 <<'LOG'
%s
LOG
"""


def test_nvcc_is_called_without_flags_of_the_environment(
    nothing: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "toolkit" / "bin" / "nvcc"
    write(program, FAKE_NVCC % NVRTC_LOG)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    a_cutlass(tmp_path / "cutlass", 2)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    monkeypatch.setenv("SAGE_CUTLASS_INCLUDE", str(tmp_path / "cutlass"))
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-G")
    compiler = toolchain.find("nvcc")
    assert compiler.identity.startswith("nvcc 13.0.88 CUTLASS 4.2.1 --std=c++17 -DNDEBUG")
    binary = compiler.compile("", "sm_90a")
    assert binary.resources.registers == 8
    command = binary.image.decode()
    assert "--gpu-architecture=sm_90a" in command and f"-I{tmp_path / 'cutlass'}" in command
    assert set(toolchain.NVCC_FLAGS) <= set(command.split())
    assert compiler.lacking("sm_90a") is None
    assert compiler.lacking("sm_120a") == (
        "nvcc 13.0.88 does not compile for sm_120a, but for 80, 90; install one that does"
    )


def test_a_file_that_is_not_nvrtc_is_passed_over(
    nothing: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write(tmp_path / "lib64" / "libnvrtc.so.13", "no library")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(KernelUnavailableError, match=r"libnvrtc\.so\.13 cannot be loaded"):
        nvrtc.Nvrtc.find()


@pytest.fixture(scope="module", params=toolchain.NAMES)
def compiler(request: pytest.FixtureRequest) -> Compiler:
    """A real one."""
    try:
        return toolchain.find(request.param)
    except KernelUnavailableError as error:
        pytest.skip(str(error))


def test_a_small_kernel_compiles(compiler: Compiler) -> None:
    elsewhere = pickle.loads(pickle.dumps(compiler))
    assert elsewhere.identity == compiler.identity
    binary = elsewhere.compile(source(TOY), TOY.arch)
    assert binary.image.startswith(b"\x7fELF") and TOY.symbol.encode() in binary.image
    assert 0 < binary.resources.registers < 64
    assert binary.resources.spill_stores == 0
    assert binary.warnings == ""


def test_what_does_not_compile_is_said(compiler: Compiler) -> None:
    with pytest.raises(KernelUnavailableError, match=r'(?s)sm_80:\nkernel\.cu\(1\): .*"missing"'):
        compiler.compile("int here = missing;\n", "sm_80")
    with pytest.raises(KernelUnavailableError, match="sm_1"):
        compiler.compile(source(TOY), "sm_1")


def test_what_a_compiler_lacks_is_known_before(compiler: Compiler) -> None:
    for arch in (*ARCHS, PORTABLE.name):
        assert compiler.lacking(arch) is None
    lacking = compiler.lacking("sm_20")
    assert lacking is not None and "does not compile for sm_20, but for " in lacking
