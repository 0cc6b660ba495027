"""The wheel holds the package's files at their mapped places, and nothing else."""

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Collection
from configparser import ConfigParser
from email import message_from_string
from pathlib import Path

import pytest

from tests.packaging.layout import CACHE_FOLDERS, PACKAGE_DIRS, PYPROJECT, ROOT, source_files


def expected_contents() -> set[str]:
    """The wheel's files, outside its dist-info, as the tree says."""
    return {
        f"{package.replace('.', '/')}/{file.as_posix()}"
        for package, folder in PACKAGE_DIRS.items()
        for file in source_files(ROOT / folder)
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
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from a copy: setuptools builds in the tree, and what a former build left
    there would end up in the wheel."""
    copy = tmp_path_factory.mktemp("tree")
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    for folder in PACKAGE_DIRS.values():
        shutil.copytree(ROOT / folder, copy / folder)
    caches = [copy / folder / "__pycache__" for folder in PACKAGE_DIRS.values()]
    for cache in caches:  # there whether or not the tree has been imported from
        cache.mkdir(exist_ok=True)
        (cache / "stale.cpython-311.pyc").touch()
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", "dist", "."], cwd=copy, check=True)
    (path,) = (copy / "dist").glob("*.whl")
    return zipfile.ZipFile(path)


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
    assert unconditional == ["numpy", "torch>=2.11"]


def test_the_wheel_holds_the_licence(wheel: zipfile.ZipFile) -> None:
    assert read_info(wheel, "licenses/LICENSE") == Path(ROOT / "LICENSE").read_text()
