"""The wheel with a kernel pack, in an environment that has no compiler for kernels."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

from sage_compiler.errors import KernelUnavailableError
from sage_compiler.kernels.cuda import toolchain
from sage_compiler.kernels.cuda.pack import MOST_COMPRESSED, build
from sage_compiler.kernels.cuda.spec import KernelSpec
from sage_compiler.kernels.cuda.variants import all_specs, variant
from tests.compiler.kernels.cuda.toy import FakeCompiler
from tests.packaging.layout import NATIVE_LIBRARY, PACKAGE_DIRS, ROOT

PLACE = "sage_compiler/kernels/cuda/pack/"
# What torch imports, and we: all that the environment has.
NEEDED = ("torch", "filelock", "jinja2", "markupsafe", "numpy", "tqdm")
# One cubin and one PTX, real ones.
SMALLEST = (
    *variant("sm_89", "bfloat16", 64, "int8_fp8").quantizers(),
    *variant("compute_80", "bfloat16", 64, "int8_fp16").quantizers(),
)
WITHOUT_COMPILER = {"CXX": "no-such-compiler"}  # the native libraries are not what is looked at


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to build in."""
    copy = tmp_path_factory.mktemp("tree")
    for file in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    for folder in PACKAGE_DIRS.values():
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignored)
    return copy


def build_wheel(tree: Path, out: Path, pack: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    return subprocess.run(
        [*command, "--wheel-dir", str(out), "."],
        cwd=tree,
        env=os.environ | WITHOUT_COMPILER | {"SAGE_WHEEL_PACK": str(pack)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack with two kernels."""
    try:
        compiler = toolchain.find("nvrtc")
    except KernelUnavailableError as error:
        pytest.skip(str(error))
    out = tmp_path_factory.mktemp("pack")
    build(SMALLEST, out, compiler, jobs=1, most_compressed=MOST_COMPRESSED)
    return out


@pytest.fixture(scope="module")
def environment(tree: Path, pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders with the wheel, unpacked as pip does it, and with what it requires."""
    out = tmp_path_factory.mktemp("environment")
    result = build_wheel(tree, out, pack)
    assert result.returncode == 0, result.stdout
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        assert NATIVE_LIBRARY not in opened.namelist()
        held = {name.removeprefix(PLACE) for name in opened.namelist() if PLACE in name}
    files = {path.relative_to(pack).as_posix() for path in pack.rglob("*") if path.is_file()}
    assert held == files
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
    subprocess.run([*install, "--target", str(out / "site"), str(wheel)], check=True)
    required = out / "required"
    required.mkdir()
    waiting, seen = list(NEEDED), set[str]()
    while waiting:  # with what they require themselves, but no compilers, which CUDA's torch brings
        name = waiting.pop()
        if name in seen or name.startswith(("nvidia", "cuda", "triton")):
            continue
        seen.add(name)
        try:
            found = distribution(name)
        except PackageNotFoundError:  # of another system
            continue
        for file in found.files or ():
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (required / top).is_symlink():
                (required / top).symlink_to(Path(str(found.locate_file(top))))
        waiting += [
            requirement.split(";")[0].split("[")[0].split(" ")[0].rstrip("<>=!~.0123456789,")
            for requirement in found.requires or ()
            if "extra ==" not in requirement
        ]
    return out


def run(environment: Path, *arguments: str) -> str:
    """A command of that environment: nothing else can be imported, and PATH has no tools."""
    paths = [str(environment / name) for name in ("site", "required")]
    program = f"import sys; sys.path += {paths}; sys.argv[1:] = {list(arguments)}\n"
    if arguments[0] == "-c":
        program += arguments[1]
    else:
        program += "from sage_compiler.cli import main; sys.exit(main())"
    home = environment / "home"
    home.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, "-S", "-I", "-c", program],
        env={"HOME": str(home), "PATH": str(home), "CUDA_HOME": str(home)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


IMAGES = f"""
import importlib.util
from sage_compiler.errors import KernelUnavailableError
from sage_compiler.kernels.cuda import headers, toolchain
from sage_compiler.kernels.cuda.images import default_images
from sage_compiler.kernels.cuda.pack import SHIPPED, find_packs
from sage_compiler.kernels.cuda.variants import variant

assert not any(map(importlib.util.find_spec, ("nvidia", "cutlass_library")))
headers._SYSTEM_TOOLKIT = SHIPPED / "nowhere"  # a machine with a toolkit has it there
assert [pack.folder for pack in find_packs()] == [SHIPPED]
images = default_images()
cubin = images(variant("sm_89", "bfloat16", 64, "int8_fp8").quantize)
ptx = images(variant("compute_80", "bfloat16", 64, "int8_fp16").quantize)
assert cubin.startswith(b"\\x7fELF") and b"{SMALLEST[0].symbol}" in cubin
assert b".visible .entry {SMALLEST[1].symbol}(" in ptx
try:
    images(variant("sm_89", "bfloat16", 64, "int8_fp8").attend)
except KernelUnavailableError as error:
    print(error)
"""


def test_kernels_are_found_without_a_compiler(environment: Path) -> None:
    said = run(environment, "-c", IMAGES)
    assert "no compiler for kernels" in said and "pip install" in said
    rows = json.loads(run(environment, "kernels", "list", "--json"))
    assert [row["symbol"] for row in rows] == [spec.symbol for spec in SMALLEST]
    place = f"pack {environment / 'site' / PLACE.rstrip('/')}"
    assert {row["where"] for row in rows} == {place}
    for arch, recipe in (("sm_89", "int8_fp8"), ("sm_121", "int8_fp16")):
        words = ("1x2x128x64", "--arch", arch, "--recipe", recipe)
        lines = run(environment, "kernels", "explain", *words).splitlines()
        built = [line.rsplit("  ", 1)[1] for line in lines if line.startswith("  sage_")]
        assert built == ["in the pack", "on first use; release wheels have it"]


def test_what_is_no_pack_of_a_wheel_is_refused(tree: Path, tmp_path: Path) -> None:
    specs: list[KernelSpec] = [SMALLEST[0]]
    result = build_wheel(tree, tmp_path / "none", tmp_path / "nowhere")
    assert result.returncode != 0 and "is no kernel pack" in result.stdout
    build(specs, tmp_path / "plain", FakeCompiler(), jobs=1)
    result = build_wheel(tree, tmp_path / "none", tmp_path / "plain")
    assert result.returncode != 0 and "is not the pack of a wheel" in result.stdout
    other = tmp_path / "other"
    build(specs, other, FakeCompiler(), jobs=1, most_compressed=MOST_COMPRESSED)
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(manifest | {"templates": "0" * 64}))
    result = build_wheel(tree, tmp_path / "none", other)
    assert result.returncode != 0 and "was built from other templates" in result.stdout
    assert not list(tmp_path.glob("none/*"))


def test_how_many_kernels_are_shipped() -> None:
    archs = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a")
    cubins = [spec for arch in archs for spec in all_specs(arch)]
    ptx = all_specs("compute_80")
    assert len({spec.symbol for spec in (*cubins, *ptx)}) == len(cubins) + len(ptx)
    assert (len(cubins), len(ptx)) == (270, 36)
