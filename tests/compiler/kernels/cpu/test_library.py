"""The binding: finding, loading and refusing the library; the struct; memory and threads."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import sage_compiler as sage
from sage_compiler.errors import InvalidAttentionError, InvalidOptionError, KernelUnavailableError
from sage_compiler.kernels import registry
from sage_compiler.kernels.cpu import kernel, library
from sage_compiler.kernels.cpu.library import HOST, PROBLEM, Library, Unavailable, load
from sage_compiler.semantics import DeadRows, Semantics
from tests.compiler.calls import make_call, run
from tests.compiler.kernels.cpu.isas import ISAS
from tests.compiler.kernels.test_registry import PROBLEM as CALL

HEADER = (Path(__file__).parents[4] / "compiler/kernels/cpu/sage_cpu.h").read_text()


def enumerators() -> dict[str, int]:
    """Every enumerator of the header."""
    found = {}
    for body in re.findall(r"\benum \{(.*?)\};", HEADER, re.DOTALL):
        value = -1
        for item in re.sub(r"/\*.*?\*/", "", body, flags=re.DOTALL).split(","):
            name, _, given = item.partition("=")
            if name.strip():
                value = int(given) if given else value + 1
                found[name.strip()] = value
    return found


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As in a process that has not loaded the library yet."""
    monkeypatch.setattr(library, "_loaded", None)
    return monkeypatch


def need_c_compiler() -> str:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler")
    return compiler


# --- the two sides of the ABI agree


def test_numbers_are_those_of_the_header() -> None:
    known = enumerators()
    assert f"#define SAGE_CPU_ABI_VERSION {library.ABI_VERSION}\n" in HEADER
    for recipe, number in kernel.RECIPES.items():
        assert known[f"SAGE_CPU_{recipe.upper()}"] == number
    for dtype, number in kernel._DTYPES.items():
        assert known[f"SAGE_CPU_{str(dtype).removeprefix('torch.').upper()}"] == number
    for dead_rows in DeadRows:
        assert known[f"SAGE_CPU_DEAD_{dead_rows.upper()}"] == kernel._DEAD_ROWS[dead_rows]
    for number, name in enumerate(ISAS, 1):
        assert known[f"SAGE_CPU_ISA_{name.upper()}"] == number
        assert kernel.need().name_of(number) == name


def test_structs_are_laid_out_as_in_c(tmp_path: Path) -> None:
    def fields_of(name: str) -> list[str]:
        """The members in order, each tensor as its two."""
        (body,) = re.findall(r"typedef struct \{((?:(?!typedef).)*?)\} " + name, HEADER, re.DOTALL)
        body = re.sub(r"/\*.*?\*/", "", body, flags=re.DOTALL)
        body = re.sub(r"void \(\*(\w+)\)\((?:[^()]|\([^()]*\))*\)", r"void* \1", body)
        found = []
        for declaration in body.split(";"):
            words = declaration.split(None, 1 + declaration.strip().startswith("const"))
            for member in words[-1].split(",") if words else []:
                member = member.strip(" *\n")
                tensor = words[0] == "sage_cpu_tensor"
                found += [f"{member}.data", f"{member}.stride"] if tensor else [member]
        return found

    for name, layout in (("sage_cpu_problem", PROBLEM), ("sage_cpu_host", HOST)):
        fields = fields_of(name)
        prints = "".join(f'printf("%zu\\n", offsetof({name}, {field}));' for field in fields)
        source = tmp_path / "offsets.c"
        source.write_text(
            f"#include <stddef.h>\n#include <stdio.h>\n{HEADER}\n"
            f'int main(void) {{ {prints} printf("%zu\\n", sizeof({name})); return 0; }}\n'
        )
        program = tmp_path / name
        subprocess.run([need_c_compiler(), "-o", program, source], check=True)
        done = subprocess.run([program], capture_output=True, text=True, check=True)
        expected = [int(line) for line in done.stdout.split()]

        # One format for each field: as many as the struct has, strides as four.
        formats = re.findall(r"(\d*)([a-zA-Z])", layout.format.lstrip("@"))
        formats = [
            (n, c) if (n, c) == ("4", "q") else (1, c) for n, c in formats for _ in _times(n, c)
        ]
        so_far, offsets = "@", []
        for count, code in formats:
            # A trailing repeat of zero pads to where the next member starts.
            offsets.append(struct.calcsize(f"{so_far}0{code}"))
            so_far += f"{count}{code}"
        assert offsets == expected[:-1]
        assert layout.size == expected[-1]


def _times(count: str, code: str) -> range:
    """How many fields an item of a format is; four strides are one."""
    return range(1 if (count, code) == ("4", "q") else int(count or 1))


def test_a_struct_of_another_size_is_refused() -> None:
    size = struct.pack("i", PROBLEM.size + 8)
    with pytest.raises(InvalidAttentionError, match="struct_size"):
        kernel.need().attention(size + bytes(PROBLEM.size - len(size)))


def test_every_error_names_an_argument() -> None:
    described = kernel.need()._describe
    errors = {name: code for name, code in enumerators().items() if "_BAD_" in name}
    assert len(errors) > 20
    for name, code in errors.items():
        word = name.removeprefix("SAGE_CPU_BAD_").lower()
        assert described(code).decode().startswith(f"{word}: ")


# --- where it is


def test_it_is_there_and_loaded_once() -> None:
    found = load()
    assert isinstance(found, Library)
    assert load() is found
    assert found.isa_name in found.isas() and found.isas()["portable"] == 1


def test_beside_the_module_or_where_it_links_to(
    unloaded: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real, installed = tmp_path / "real", tmp_path / "installed"
    real.mkdir()
    installed.mkdir()
    (real / "library.py").touch()
    (installed / "library.py").symlink_to(real / "library.py")
    unloaded.delenv("SAGE_CPU_LIBRARY", raising=False)
    unloaded.setattr(library, "__file__", str(installed / "library.py"))
    assert isinstance(library._path(), Unavailable)
    for folder in (real, installed):
        (folder / library.FILE_NAME).touch()
        assert library._path() == folder / library.FILE_NAME


def test_where_the_environment_says(unloaded: pytest.MonkeyPatch, tmp_path: Path) -> None:
    unloaded.setenv("SAGE_CPU_LIBRARY", str(tmp_path / "absent.so"))
    assert load() == Unavailable(f"SAGE_CPU_LIBRARY={str(tmp_path / 'absent.so')!r} is not a file")
    chosen = tmp_path / "mine.so"
    chosen.touch()
    unloaded.setenv("SAGE_CPU_LIBRARY", str(chosen))
    assert library._path() == chosen


def test_a_file_that_is_no_library(unloaded: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "broken.so"
    path.write_text("not a library")
    unloaded.setenv("SAGE_CPU_LIBRARY", str(path))
    found = load()
    assert isinstance(found, Unavailable)
    assert found.reason.startswith(f"{path} cannot be loaded: ")


@pytest.mark.parametrize(
    "code, words",
    [
        (
            "int sage_cpu_abi_version(void) { return 7; }",
            "has ABI version 7 and this package needs",
        ),
        ("int another(void) { return 1; }", "cannot be loaded: .*sage_cpu_abi_version"),
    ],
)
def test_a_library_of_another_version(
    unloaded: pytest.MonkeyPatch, tmp_path: Path, code: str, words: str
) -> None:
    source, path = tmp_path / "other.c", tmp_path / "other.so"
    source.write_text(code)
    subprocess.run([need_c_compiler(), "-shared", "-fPIC", "-o", path, source], check=True)
    unloaded.setenv("SAGE_CPU_LIBRARY", str(path))
    found = load()
    assert isinstance(found, Unavailable)
    assert re.search(words, found.reason)


def test_without_a_library(unloaded: pytest.MonkeyPatch) -> None:
    """`auto` is exact, a recipe by name is emulated, and a cache says that it cannot be."""
    unloaded.setattr(library, "_loaded", Unavailable("it was not built"))
    assert registry.find("int8_int8", CALL) == registry.Unavailable("cpu: it was not built")
    assert registry.default(CALL) == registry.Default("exact", "cpu: it was not built")
    call = make_call(40, head_dim=16)
    assert torch.equal(run(call, "auto"), run(call))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not torch.equal(run(call, "int8_int8"), run(call))
    with pytest.raises(KernelUnavailableError, match="it was not built"):
        sage.PackedKV(1, 2, 16, capacity=10)


# --- the instruction set


def test_an_instruction_set_by_name() -> None:
    """The library reads the environment once, so each choice takes a process."""

    def printed(isa_name: str, program: str) -> str:
        environment = {**os.environ, "SAGE_CPU_ISA": isa_name}
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True, text=True, check=True, env=environment,
        )  # fmt: skip
        return done.stdout.strip()

    here = kernel.need()
    number = f"import ctypes; print(ctypes.CDLL({str(here.path)!r}).sage_cpu_isa())"
    assert {name: int(printed(name, number)) for name in here.isas()} == here.isas()
    assert printed("amx", number) == "-1"
    names = (
        "from sage_compiler.kernels.cpu.kernel import KERNELS\n"
        "print(*(kernel.name() for kernel in KERNELS))"
    )
    assert printed("portable", names) == "cpu-portable cpu-portable"


def test_an_instruction_set_that_is_not_here(unloaded: pytest.MonkeyPatch) -> None:
    real = library._function

    def function(handle: ctypes.CDLL, name: str, *types: object) -> object:
        return (lambda: -1) if name == "sage_cpu_isa" else real(handle, name, *types)

    loaded = kernel.need()
    unloaded.setattr(library, "_function", function)
    unloaded.setattr(library, "_path", lambda: loaded.path)
    unloaded.setattr(library, "_loaded", None)
    unloaded.setenv("SAGE_CPU_ISA", "amx")
    here = ", ".join(loaded.isas())
    call = make_call(40, head_dim=16)
    for use in (load, lambda: run(call, "auto"), lambda: sage.PackedKV(1, 2, 16, capacity=10)):
        with pytest.raises(InvalidOptionError) as error:
            use()
        assert str(error.value) == (
            f"SAGE_CPU_ISA='amx'; this machine and this build have {here}; set it to one of them, "
            "or unset it"
        )


# --- memory


def test_a_thread_keeps_its_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library._kept, "memory", None)
    monkeypatch.setattr(library, "KEPT_BYTES", 1000)
    first = library.borrow_workspace(500)
    assert first.data_ptr() % 64 == 0 and first.nbytes >= 500
    second = library.borrow_workspace(500)  # while the first is lent
    assert second.data_ptr() != first.data_ptr()
    library.return_workspace(first)
    assert library.borrow_workspace(400) is first
    library.return_workspace(first)
    larger = library.borrow_workspace(900)
    assert larger is not first
    library.return_workspace(larger)
    too_large = library.borrow_workspace(1001)
    library.return_workspace(too_large)
    assert library._kept.memory is None


def test_memory_does_not_come_from_the_default_device() -> None:
    call = make_call(40, head_dim=16)
    expected = run(call, "int8_int8")
    library._kept.memory = None
    with torch.device("meta"):
        assert torch.equal(run(call, "int8_int8"), expected)


# --- threads


def test_the_threads_are_those_of_torch() -> None:
    host = kernel.need()._host(3)
    assert host is not None
    pool, ranges, workers = HOST.unpack(host)
    assert pool and ranges and pool != ranges and workers == 3
    assert pool == library._torch_pool()


def test_inside_an_inference_mode_and_a_profiler() -> None:
    call = make_call(40, head_dim=16)
    expected = run(call, "int8_int8")
    with torch.inference_mode():
        assert torch.equal(run(call, "int8_int8"), expected)
    with torch.profiler.profile() as profile:
        run(call, "int8_int8")
    assert any("sage::attention" in event.key for event in profile.key_averages())


def test_scalars_that_are_not_set_are_none() -> None:
    problem = kernel.pack_problem(
        1, "int8_int16", torch.float16, (1, 2, 3, 4, 5, 16, 24, 0), Semantics()
    )
    fields = PROBLEM.unpack(problem)
    assert fields[:4] == (PROBLEM.size, 1, 1, 2)
    assert fields[4:12] == (1, 2, 3, 4, 5, 16, 24, 0)
    assert fields[12:15] == (-1, -1, 0)
    assert fields[15:19] == (0.25, 0.0, 0, 3)
    assert set(fields[19:]) == {0}
