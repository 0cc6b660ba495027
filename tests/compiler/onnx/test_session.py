"""``sage.onnx_session`` and ``sage.ort_library``."""

from __future__ import annotations

import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

import sage_compiler as sage
from sage_compiler.errors import InvalidOptionError, KernelUnavailableError, SageError
from sage_compiler.onnx import extra, session
from tests.compiler.calls import make_call
from tests.compiler.onnx import bodies


@pytest.fixture
def file(tmp_path: Path) -> Path:
    call = make_call(8, head_dim=16)
    path = tmp_path / "model.onnx"
    model = bodies.model_of(call, bodies.variant_of(call, "auto"))
    path.write_bytes(model.SerializeToString())
    return path


def test_the_library_is_one_file_that_needs_no_other_of_ours() -> None:
    path = Path(sage.ort_library())
    assert path.is_absolute() and path.is_file()
    if sys.platform == "linux":
        needed = subprocess.run(
            ["readelf", "--dynamic", path], capture_output=True, text=True, check=True
        ).stdout
        libraries = {
            line.split("[")[1].rstrip("]") for line in needed.splitlines() if "(NEEDED)" in line
        }
        assert not any("sage" in name or "onnx" in name or "torch" in name for name in libraries)


def test_a_session_has_the_providers_that_are_here(file: Path) -> None:
    opened = sage.onnx_session(file)
    assert opened.get_providers()[-1] == "CPUExecutionProvider"


def test_options_of_the_users(file: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    opened = sage.onnx_session(file, session_options=options)
    assert opened.get_session_options().intra_op_num_threads == 1


def test_options_serve_again(file: Path) -> None:
    options = onnxruntime.SessionOptions()
    for _ in range(2):
        sage.onnx_session(file, session_options=options)


def test_a_provider_that_is_not_in_a_list(file: Path) -> None:
    with pytest.raises(InvalidOptionError, match=r"must be a list: \['CPUExecutionProvider'\]"):
        sage.onnx_session(file, "CPUExecutionProvider")


def test_a_provider_that_is_not_there(file: Path) -> None:
    with pytest.raises(InvalidOptionError, match=r"'AbsentProvider'; onnxruntime .* has .*CPU"):
        sage.onnx_session(file, ["AbsentProvider", "CPUExecutionProvider"])


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidOptionError, match=r"absent\.onnx' is not a file"):
        sage.onnx_session(tmp_path / "absent.onnx")


def test_a_library_that_was_not_built(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_FILE_NAME", "libabsent.so")
    with pytest.raises(KernelUnavailableError, match=r"libabsent\.so was not built; reinstall"):
        sage.ort_library()
    with pytest.raises(KernelUnavailableError, match="was not built"):
        sage.onnx_session(file)


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_packages_that_are_not_installed(
    package: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = extra.find_spec

    def without(name: str, *more: Any) -> ModuleSpec | None:
        return None if name == package else find(name, *more)

    monkeypatch.setattr(extra, "find_spec", without)
    advice = rf"needs the package {package}, which is not installed: pip install .*\[onnx\]"
    with pytest.raises(SageError, match=advice):
        if package == "onnxruntime":
            sage.onnx_session(file)
        else:
            sage.export_onnx  # noqa: B018 - the attribute is what imports


def test_importing_the_package_imports_nothing_of_onnx() -> None:
    program = (
        "import sys, sage_compiler\n"
        "print([name for name in sys.modules if name.split('.')[0].startswith('onnx')])\n"
        "sage_compiler.ort_library()\n"
        "assert not hasattr(sage_compiler, 'absent')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
    assert done.returncode == 0, done.stderr
