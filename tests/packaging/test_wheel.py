"""The wheel holds the package's files at their mapped places and the native libraries, and
nothing else; the libraries are plain C."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Collection
from configparser import ConfigParser
from email import message_from_string
from pathlib import Path

import pytest

from tests.packaging.layout import (
    CACHE_FOLDERS,
    NATIVE_HEADER,
    NATIVE_LIBRARY,
    NATIVE_SOURCES,
    ORT_HEADER,
    ORT_LIBRARY,
    PACKAGE_DIRS,
    PYPROJECT,
    ROOT,
    source_files,
)

READS_ELF = pytest.mark.skipif(sys.platform != "linux", reason="reads the library with binutils")


def expected_contents() -> set[str]:
    """The wheel's files, outside its dist-info, as the tree says."""
    header = "sage_compiler/onnx/runtime/sage_ort.h"  # the others are beside their sources
    return {NATIVE_LIBRARY, ORT_LIBRARY, header} | {
        f"{package.replace('.', '/')}/{file.as_posix()}"
        for package, folder in PACKAGE_DIRS.items()
        for file in source_files(ROOT / folder)
        if not any((ROOT / folder / file).is_relative_to(sources) for sources in NATIVE_SOURCES)
    }


def difference(wheel: Collection[str], tree: Collection[str]) -> list[str]:
    """What is wrong with the contents of a wheel, one sentence each; empty when nothing is."""
    missing = [
        f"{name} is missing from the wheel: list its package under tool.setuptools.packages, or "
        "its kind of file under tool.setuptools.package-data, in pyproject.toml"
        for name in sorted(set(tree) - set(wheel))
    ]
    surplus = [
        f"{name} is in the wheel, not in the tree" for name in sorted(set(wheel) - set(tree))
    ]
    return missing + surplus


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to build in: setuptools builds in the tree, and what a former build left there would
    end up in the wheel."""
    copy = tmp_path_factory.mktemp("tree")
    for file in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    for folder in PACKAGE_DIRS.values():
        shutil.copytree(ROOT / folder, copy / folder)
    caches = [copy / folder / "__pycache__" for folder in PACKAGE_DIRS.values()]
    for cache in caches:  # there whether or not the tree has been imported from
        cache.mkdir(exist_ok=True)
        (cache / "stale.cpython-311.pyc").touch()
    return copy


def build_wheel(
    tree: Path, folder: str, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """Build the wheel of ``tree`` into a folder of it; the result holds what pip printed."""
    build = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation"]
    return subprocess.run(
        [*build, "--wheel-dir", folder, "."],
        cwd=tree,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def open_wheel(folder: Path) -> zipfile.ZipFile:
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def wheel(tree: Path) -> zipfile.ZipFile:
    # Without most optimizations: what they make of the code is not looked at here.
    result = build_wheel(tree, "dist", {"SAGE_CPU_REQUIRED": "1", "CFLAGS": "-O1"})
    assert result.returncode == 0, result.stdout
    return open_wheel(tree / "dist")


@pytest.fixture(scope="module", params=[NATIVE_LIBRARY, ORT_LIBRARY])
def library(
    wheel: zipfile.ZipFile,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Path:
    """A native library, out of the wheel."""
    return Path(wheel.extract(request.param, tmp_path_factory.mktemp("library")))


def read_info(wheel: zipfile.ZipFile, name: str) -> str:
    (path,) = (file for file in wheel.namelist() if file.endswith(f".dist-info/{name}"))
    return wheel.read(path).decode()


def test_contents_are_the_tree(wheel: zipfile.ZipFile) -> None:
    names = [name for name in wheel.namelist() if ".dist-info/" not in name]
    assert not difference(names, expected_contents())


def test_the_tree_has_what_a_wheel_cannot_miss() -> None:
    expected = expected_contents()
    for needed in (
        "sage_compiler/errors.py",
        "sage_compiler/py.typed",
        "sage_compiler/kernels/__init__.py",
        "sage_compiler/kernels/cpu/sage_cpu.h",
        "sage_compiler/onnx/runtime/sage_ort.h",
        "sage_compiler/cutlass_templates/__init__.py",
    ):
        assert needed in expected
    assert not any(folder in name for name in expected for folder in CACHE_FOLDERS)


def test_a_forgotten_and_a_stale_file_are_reported() -> None:
    tree = expected_contents()
    forgotten, stale = "sage_compiler/kernels/registry.py", "sage_compiler/removed.py"
    missing, surplus = difference(tree - {forgotten} | {stale}, tree)
    assert forgotten in missing and "tool.setuptools.packages" in missing
    assert stale in surplus and "not in the tree" in surplus


def test_entry_points(wheel: zipfile.ZipFile) -> None:
    entry_points = ConfigParser()
    entry_points.read_string(read_info(wheel, "entry_points.txt"))
    assert dict(entry_points["torch_dynamo_backends"]) == {"sage": "sage_compiler.backend:sage"}
    assert dict(entry_points["console_scripts"]) == {"sagec": "sage_compiler.cli:main"}


def test_metadata(wheel: zipfile.ZipFile) -> None:
    metadata = message_from_string(read_info(wheel, "METADATA"))
    assert metadata["Name"] == "sage-compiler"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra", [])) == set(
        PYPROJECT["project"]["optional-dependencies"]
    )
    unconditional = [
        requirement
        for requirement in metadata.get_all("Requires-Dist", [])
        if "extra ==" not in requirement
    ]
    assert unconditional == ["filelock", "jinja2", "markupsafe", "numpy", "torch>=2.11", "tqdm"]


def test_the_wheel_holds_the_licence(wheel: zipfile.ZipFile) -> None:
    assert read_info(wheel, "licenses/LICENSE") == Path(ROOT / "LICENSE").read_text()


def test_one_wheel_serves_every_python_of_a_platform(wheel: zipfile.ZipFile) -> None:
    (tag,) = message_from_string(read_info(wheel, "WHEEL")).get_all("Tag", [])
    python, abi, platform = tag.split("-")
    assert (python, abi) == ("py3", "none") and platform != "any"
    if sys.platform == "linux":
        assert platform == f"linux_{os.uname().machine}"
    assert Path(str(wheel.filename)).name.endswith(f"-{tag}.whl")


def printed(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@READS_ELF
def test_a_library_exports_what_its_header_declares(library: Path) -> None:
    symbols = printed("nm", "--dynamic", "--defined-only", "--format=posix", library)
    header = NATIVE_HEADER if library.match(NATIVE_LIBRARY) else ORT_HEADER
    declared = re.findall(r"^SAGE_\w+_EXPORT .*?(\w+)\(", header.read_text(), re.MULTILINE)
    assert len(declared) > 2
    assert sorted(line.split()[0] for line in symbols.splitlines()) == sorted(declared)


@READS_ELF
def test_a_library_needs_the_c_library_alone(library: Path) -> None:
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", printed("readelf", "--dynamic", library))
    assert needed
    assert not [name for name in needed if not re.match(r"(libc|libm|ld-linux.*)\.so", name)]


@READS_ELF
def test_the_objects_share_no_code(wheel: zipfile.ZipFile, tree: Path) -> None:
    # Of a function that several objects define the linker keeps one, which may be one compiled for
    # an instruction set that the machine lacks. nm marks such functions W, V or u.
    assert wheel.testzip() is None  # it was built
    objects = sorted(tree.glob("build/temp*/*.o"))
    assert len(objects) > 2
    for file in objects:
        lines = printed("nm", "--defined-only", "--format=posix", file).splitlines()
        shared = [line for line in lines if line.split()[1] in "WVu"]
        assert not shared, f"{file.name}: {shared}"


def test_without_a_compiler_the_wheel_is_built_without_the_library(
    tree: Path, wheel: zipfile.ZipFile
) -> None:
    shutil.rmtree(tree / "build")
    without = {"CXX": "no-such-compiler"}
    result = build_wheel(tree, "without", without)
    assert result.returncode == 0, result.stdout
    warnings = [line for line in result.stdout.splitlines() if "no-such-compiler" in line]
    for library, warning in zip(("libsage_cpu", "libsage_ort"), warnings, strict=True):
        assert library in warning and "CXX" in warning
    names = set(open_wheel(tree / "without").namelist())
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} - names == {
        NATIVE_LIBRARY,
        ORT_LIBRARY,
    }
    assert build_wheel(tree, "required", without | {"SAGE_CPU_REQUIRED": "1"}).returncode != 0
