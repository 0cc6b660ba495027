"""The command ``sagec kernels``."""

import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from sage_compiler import cli
from sage_compiler.commands import kernels, kernels_compiling
from sage_compiler.kernels.cuda import headers, ptx
from sage_compiler.kernels.cuda.arch import ARCHS
from sage_compiler.kernels.cuda.cache import Cache
from sage_compiler.kernels.cuda.preparation import preparation_specs
from sage_compiler.kernels.cuda.sass import Disassembler
from sage_compiler.kernels.cuda.spec import KernelSpec, StatisticsSpec
from tests.compiler.kernels.cuda.toy import TOY, FakeCompiler, listed


@pytest.fixture(autouse=True)
def tools(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two variants of each architecture, a compiler and a disassembler, an empty cache, no pack."""

    def all_specs(arch: str, *, further: bool = False) -> tuple[KernelSpec, ...]:
        dtypes = ("float32",) if further else ("float16", "bfloat16")
        return tuple(StatisticsSpec(arch, dtype, 64, 64) for dtype in dtypes)

    monkeypatch.setattr(kernels, "all_specs", all_specs)
    monkeypatch.setattr(kernels, "checked_specs", all_specs)
    monkeypatch.setattr(kernels_compiling, "find", lambda *names: FakeCompiler(" or ".join(names)))
    monkeypatch.setattr(Disassembler, "find", lambda: Disassembler(()))
    monkeypatch.setattr(Disassembler, "listing", lambda self, image: listed("EXIT"))
    monkeypatch.setattr(ptx, "target", lambda text: "sm_80")
    monkeypatch.setenv("SAGE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("SAGE_KERNEL_PACK", raising=False)


def test_check_compiles_every_architecture(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["kernels", "check", "--jobs", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 2 * (len(ARCHS) + 1)
    assert sum(line.startswith("compute_80 ") for line in lines) == 2
    assert all(line.endswith("ok") for line in lines[1:])


def test_check_looks_at_what_no_pack_has_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["kernels", "check", "--arch", "sm_89", "--further", "--jobs", "1"]) == 0
    (row,) = capsys.readouterr().out.splitlines()[1:]
    assert "float32" in row and row.endswith("ok")


def test_check_fails_with_its_table_and_its_rows(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Disassembler, "listing", lambda self, image: listed("BPT.TRAP"))
    arguments = ["kernels", "check", "--arch", "sm_80", "--jobs", "1"]
    assert cli.main(arguments) == 1
    output = capsys.readouterr()
    assert "BPT.TRAP 1 times, which it must not have" in output.out
    assert output.err.endswith("sagec: 2 of 2 kernels are not as they must be\n")
    assert cli.main([*arguments, "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)
    assert [row["arch"] for row in rows] == ["sm_80", "sm_80"]
    assert rows[0]["opcodes"] == {"BPT.TRAP": 1} and rows[0]["problems"]


def test_build_makes_a_pack_and_list_shows_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "pack"
    archs = ["--arch", "sm_89", "--arch", "sm_80", "--arch", "sm_89"]
    assert cli.main(["kernels", "build", *archs, "--out", str(out), "--jobs", "1"]) == 0
    assert capsys.readouterr().out.startswith("4 kernels, ")
    monkeypatch.setenv("SAGE_KERNEL_PACK", str(out))
    assert cli.main(["kernels", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["symbol", "arch", "bytes", "registers", "spills", "where", "age"]
    assert len(lines) == 5
    assert all(f"pack {out}" in line for line in lines[1:])
    assert cli.main(["kernels", "list", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["where"] for row in rows] == [f"pack {out}"] * 4
    assert {row["arch"] for row in rows} == {"sm_80", "sm_89"}


def test_the_pack_of_a_release(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "pack"
    release = ["kernels", "build", "--release", "--out", str(out), "--jobs", "1"]
    assert cli.main([*release, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    on_disk = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    assert made == {"folder": str(out), "kernels": 2 * (len(ARCHS) + 1), "bytes": on_disk}
    assert {path.name for path in out.iterdir()} == {"manifest.json", "compute_80", *ARCHS}
    monkeypatch.setattr(kernels, "MOST_COMPRESSED", on_disk - 1)
    assert cli.main(release) == 1
    assert f"the pack takes {on_disk} bytes, and may take {on_disk - 1}" in capsys.readouterr().err


def test_ahead_of_time_nvcc_is_asked_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pack"
    build = ["kernels", "build", "--arch", "sm_80", "--out", str(out), "--jobs", "1", "--json"]
    for more, identity in (([], "nvcc or nvrtc"), (["--compiler", "nvrtc"], "nvrtc")):
        assert cli.main([*build, *more]) == 0
        assert json.loads(capsys.readouterr().out)["kernels"] == 2
        manifest = json.loads((out / "manifest.json").read_text())
        assert {kernel["compiler"] for kernel in manifest["kernels"]} == {identity}


def test_list_shows_what_is_kept(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["kernels", "list"]) == 0
    assert capsys.readouterr().out.startswith("no kernels:")
    for spec in (TOY, replace(TOY, bytes=16)):
        build = partial(FakeCompiler().compile, arch=spec.arch)
        Cache(tmp_path / "cache").image(spec, "fake", build)
    manifests = sorted((tmp_path / "cache").glob("*/manifest.json"))
    for manifest, hours in zip(manifests, (3, 72), strict=True):
        written = manifest.stat().st_mtime - hours * 3600
        os.utime(manifest, (written, written))
    assert cli.main(["kernels", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[1].endswith(" 3 h") and lines[2].endswith(" 3 d")
    assert str(tmp_path / "cache") in lines[1]


def test_standalone_kernels_are_others(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(kernels, "standalone_specs", lambda arch: preparation_specs(arch))
    arguments = ["--arch", "sm_80", "--standalone", "--jobs", "1"]
    out = tmp_path / "pack"
    assert cli.main(["kernels", "build", *arguments, "--out", str(out)]) == 0
    assert capsys.readouterr().out.startswith("4 kernels, ")
    assert cli.main(["kernels", "check", *arguments]) == 0
    assert "sage_mask_rows_sm_80" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["check", "--arch", "sm_8"], "unknown architecture 'sm_8'; known: sm_80, sm_86"),
        (["build", "--out", "x"], "--arch is missing; known: sm_80"),
        (["build", "--out", "x", "--release", "--standalone"], "a pack is one of them"),
        (["cost", "--arch", "compute_80"], "unknown architecture 'compute_80'; known: sm_80"),
        (["check", "--jobs", "0"], "--jobs 0; it must be at least 1"),
    ],
    ids=str,
)
def test_errors_are_one_sentence(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["kernels", *arguments]) == 1
    assert words in capsys.readouterr().err


def test_a_missing_disassembler_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(headers, "tool", lambda name: None)
    assert cli.main(["kernels", "check", "--arch", "sm_80"]) == 1
    assert "pip install nvidia-cuda-nvdisasm" in capsys.readouterr().err
