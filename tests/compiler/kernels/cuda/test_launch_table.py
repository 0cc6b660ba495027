"""The launch table of a pack: what it says of the kernels that are there, and of no others."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from sage_compiler.kernels.cuda.arch import ARCHS
from sage_compiler.kernels.cuda.launch_table import FORMAT, NAME
from sage_compiler.kernels.cuda.manifest import digest
from sage_compiler.kernels.cuda.pack import build
from sage_compiler.kernels.cuda.preparation import preparation_specs
from sage_compiler.kernels.cuda.render import templates_digest
from sage_compiler.kernels.cuda.spec import KernelSpec
from sage_compiler.kernels.cuda.variants import all_specs, standalone_specs, variant
from tests.compiler.kernels.cuda.toy import FakeCompiler, ToySpec


def records_of(specs: list[KernelSpec], out: Path) -> list[list[str]]:
    """The table of a pack with these kernels, without its first and last line."""
    build(specs, out, FakeCompiler(), jobs=1)
    *lines, last = (out / NAME).read_text().splitlines(keepends=True)
    content = "".join(lines).encode()
    assert last == f"end {hashlib.sha256(content).hexdigest()}\n"
    first, *records = (line.rstrip("\n").split(" ") for line in lines)
    assert first == ["sage-launches", str(FORMAT), templates_digest()]
    return records


def test_one_attention(tmp_path: Path) -> None:
    kernels = variant("sm_89", "float16", 96, "int4_fp16", window=True)
    specs = [*kernels.specs(), *preparation_specs("sm_89")]
    arch, *rest = records_of(specs, tmp_path / "pack")
    recipes = "int8_fp8,int4_fp8,int8_fp16,int4_fp16"
    assert arch == ["arch", "sm_89", "8", "9", recipes, "2", "3", "4", "5"]
    for spec, record in zip(specs, rest, strict=False):
        image = (tmp_path / "pack" / "sm_89" / f"{spec.symbol}.cubin").read_bytes()
        geometry = (spec.threads, spec.shared_bytes, spec.params.size, len(image))
        assert record == ["kernel", "sm_89", spec.symbol, *map(str, geometry), digest(image)]
    (attention,) = rest[len(specs) :]
    choice = "sm_89 float16 int4_fp16 65 96 65 96 1 0 0"
    layout = "1 0 0 0 0 1 4 128 128 8192 4096 20480 20608"
    assert " ".join(attention) == f"attention {choice} 0 1 {layout}"


@pytest.mark.parametrize("arch", ARCHS)
def test_launches_depend_on_one_another_from_sm_90_on(arch: str, tmp_path: Path) -> None:
    recipe = ARCHS[arch].recipes[0]
    records = records_of(list(variant(arch, "float16", 64, recipe).specs()), tmp_path / "pack")
    assert records[-1][0] == "attention"
    assert records[-1][17] == str(int(ARCHS[arch].capability >= (9, 0)))


def test_what_lacks_a_kernel_is_left_out(tmp_path: Path) -> None:
    kernels = variant("sm_89", "float16", 64, "int8_fp8").specs()
    for lacking in kernels:
        specs: list[KernelSpec] = [spec for spec in kernels if spec is not lacking]
        records = records_of(specs, tmp_path / "pack")
        assert [record[0] for record in records] == ["arch", "kernel"]
        assert records[0][-4:] == ["-1"] * 4


def test_other_kernels_are_only_listed(tmp_path: Path) -> None:
    records = records_of([ToySpec("sm_80", "float16", 64)], tmp_path / "pack")
    assert [record[0] for record in records] == ["arch", "kernel"]


@pytest.mark.parametrize("arch", ARCHS)
def test_a_standalone_pack_has_what_the_ordinary_one_serves(arch: str, tmp_path: Path) -> None:
    """And more: each of its attentions, by dtype, recipe, dims and what is on top."""

    def served(specs: tuple[KernelSpec, ...]) -> set[tuple[str, ...]]:
        records = records_of(list(specs), tmp_path / "pack")
        return {tuple(record[2:11]) for record in records if record[0] == "attention"}

    ordinary, standalone = served(all_specs(arch)), served(standalone_specs(arch))
    recipes = len(ARCHS[arch].recipes)
    assert ordinary < standalone
    assert len(standalone) == 2 * 4 * recipes * 8
