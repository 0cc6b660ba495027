"""Kernel packs, and where an image comes from: a pack, the cache, or the compiler."""

import json
import os
import random
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from sage_compiler.errors import KernelUnavailableError, UsageError
from sage_compiler.kernels.cuda import launch_table, xz
from sage_compiler.kernels.cuda import pack as pack_module
from sage_compiler.kernels.cuda.binary import Binary
from sage_compiler.kernels.cuda.cache import Cache
from sage_compiler.kernels.cuda.images import Images
from sage_compiler.kernels.cuda.pack import (
    FORMAT,
    MANIFEST,
    MOST_COMPRESSED,
    Pack,
    PackTooLargeError,
    build,
    bytes_on_disk,
    find_packs,
)
from sage_compiler.kernels.cuda.parallel import each
from sage_compiler.kernels.cuda.render import render
from tests.compiler.kernels.cuda.toy import TOY, FakeCompiler, ToySpec

ADA = replace(TOY, arch="sm_89")
LARGE = replace(TOY, bytes=1024)
SPECS = [TOY, LARGE, ADA]


def image_of(spec: ToySpec) -> bytes:
    return FakeCompiler().compile(render(spec), spec.arch).image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A pack."""
    build(SPECS, tmp_path / "pack", FakeCompiler(), jobs=1)
    return tmp_path / "pack"


def test_a_pack_holds_images_sources_and_a_manifest(folder: Path) -> None:
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*.*")}
    kernels = {f"{spec.arch}/{spec.symbol}{end}" for spec in SPECS for end in (".cubin", ".cu")}
    assert files == {MANIFEST, launch_table.NAME, *kernels}
    assert (folder / "sm_89" / f"{ADA.symbol}.cu").read_text() == render(ADA)
    pack = Pack(folder)
    assert pack.entries.keys() == {spec.symbol for spec in SPECS}
    assert pack.entries[ADA.symbol].compiler == "fake 1.0"
    for spec in SPECS:
        assert pack.find(spec) == image_of(spec)


def test_a_pack_says_what_it_does_not_have(folder: Path) -> None:
    assert Pack(folder).find(replace(TOY, arch="sm_86")) is None


def test_building_again_replaces_the_pack(folder: Path) -> None:
    build([ADA], folder, FakeCompiler(), jobs=1)
    assert Pack(folder).entries.keys() == {ADA.symbol}
    assert list((folder / "sm_80").iterdir()) == []


def test_what_is_not_a_pack_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("42")
    with pytest.raises(UsageError, match="neither empty nor a kernel pack"):
        build(SPECS, tmp_path, FakeCompiler(), jobs=1)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_build_that_fails_leaves_no_pack(folder: Path) -> None:
    with pytest.raises(KernelUnavailableError, match="it is broken"):
        build(SPECS, folder, FakeCompiler(broken=LARGE.symbol), jobs=1)
    with pytest.raises(FileNotFoundError):
        Pack(folder)


def test_progress_is_shown_for_each_kernel(tmp_path: Path) -> None:
    shown = []

    def progress(binaries: Iterable[Binary]) -> Iterable[Binary]:
        for binary in binaries:
            shown.append(binary.image)
            yield binary

    build(SPECS, tmp_path / "pack", FakeCompiler(), jobs=1, progress=progress)
    assert shown == [image_of(spec) for spec in SPECS]


def test_processes_give_results_in_order() -> None:
    assert list(each(str.upper, ["a", "b", "c"], jobs=2)) == ["A", "B", "C"]
    with pytest.raises(ValueError, match="invalid literal"):
        list(each(int, ["1", "x", "3"], jobs=2))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes().replace(b"sage", b"Sage")),
    ],
    ids=["missing", "truncated", "changed"],
)
def test_a_damaged_kernel_is_left_out(folder: Path, damage: Callable[[Path], object]) -> None:
    damage(folder / "sm_80" / f"{TOY.symbol}.cubin")
    pack = Pack(folder)
    with pytest.warns(RuntimeWarning, match=f"{TOY.symbol}.*sagec kernels build"):
        assert pack.find(TOY) is None
    assert pack.find(LARGE) == image_of(LARGE)


PORTABLE = replace(TOY, arch="compute_80")


@pytest.fixture
def compressed(tmp_path: Path) -> Path:
    """A pack as that of a release wheel."""
    out = tmp_path / "compressed"
    build([*SPECS, PORTABLE], out, FakeCompiler(), jobs=1, most_compressed=MOST_COMPRESSED)
    return out


def test_a_compressed_pack_holds_the_same_images(compressed: Path) -> None:
    names = {path.name for path in compressed.rglob("*") if path.is_file()}
    images = {f"{spec.symbol}.cubin.xz" for spec in SPECS} | {f"{PORTABLE.symbol}.ptx.xz"}
    sources = {f"{spec.symbol}.cu" for spec in (*SPECS, PORTABLE)}
    assert names == {MANIFEST, *images, *sources}  # and no launch table
    pack = Pack(compressed)
    for spec in (*SPECS, PORTABLE):
        assert pack.has(spec) and pack.find(spec) == image_of(spec)
    assert not pack.has(replace(TOY, arch="sm_86"))
    # Read-only, as where an administrator installed it.
    for path in compressed.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    assert Pack(compressed).find(TOY) == image_of(TOY)


def test_building_again_replaces_compressed_kernels(compressed: Path) -> None:
    build([ADA], compressed, FakeCompiler(), jobs=1)
    names = {path.name for path in compressed.rglob("*") if path.is_file()}
    assert names == {MANIFEST, launch_table.NAME, f"{ADA.symbol}.cubin", f"{ADA.symbol}.cu"}


def test_a_pack_that_is_too_large_is_none(tmp_path: Path) -> None:
    out = tmp_path / "pack"
    build(SPECS, out, FakeCompiler(), jobs=1, most_compressed=MOST_COMPRESSED)
    size = bytes_on_disk(out)
    build(SPECS, out, FakeCompiler(), jobs=1, most_compressed=size)
    assert Pack(out).entries.keys() == {spec.symbol for spec in SPECS}
    with pytest.raises(PackTooLargeError, match=f"takes {size} bytes, and may take {size - 1}"):
        build(SPECS, out, FakeCompiler(), jobs=1, most_compressed=size - 1)
    with pytest.raises(FileNotFoundError):
        Pack(out)


def test_damaged_compressed_kernels_are_left_out(compressed: Path) -> None:
    path = compressed / "sm_80" / f"{TOY.symbol}.cubin.xz"
    image, whole = image_of(TOY), path.read_bytes()
    draw = random.Random(0)
    damaged = [b"", whole[:-1], whole[: len(whole) // 2], image, xz.compress(image + b"0")]
    damaged += [xz.compress(image[:-1]), xz.compress(image.replace(b"sage", b"Sage"))]
    damaged.append(xz.compress(bytes(1 << 28)))  # a bomb: no more is made than an image may be
    for _ in range(100):
        at = draw.randrange(len(whole))
        damaged.append(whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :])
    pack = Pack(compressed)
    refused = 0
    for content in damaged:
        path.write_bytes(content)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = pack.find(TOY)
        assert found in (None, image)  # of padding and headers some bits say nothing
        refused += found is None
        assert (found is None) == any(TOY.symbol in str(each.message) for each in caught)
    assert refused > len(damaged) * 0.8
    assert pack.find(LARGE) == image_of(LARGE)


def test_without_lzma_a_compressed_pack_is_not_used(
    compressed: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(xz, "is_available", lambda: False)
    with pytest.raises(ValueError, match="this Python was built without lzma"):
        Pack(compressed)
    assert Pack(folder).find(TOY) == image_of(TOY)


def test_hosts_are_not_told_of_ptx(folder: Path) -> None:
    build([TOY, PORTABLE], folder, FakeCompiler(), jobs=1)
    assert (folder / "compute_80" / f"{PORTABLE.symbol}.ptx").read_bytes() == image_of(PORTABLE)
    table = (folder / launch_table.NAME).read_text()
    assert TOY.symbol in table and "compute_80" not in table


def test_a_kernel_that_is_rendered_otherwise_is_left_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack_module, "render", lambda spec: render(spec) + " ")
    assert Pack(folder).find(TOY) is None


@pytest.fixture
def chosen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The pack, named by the environment; none is shipped."""
    monkeypatch.setenv("SAGE_KERNEL_PACK", str(folder))
    monkeypatch.setattr(pack_module, "SHIPPED", folder / "nowhere")
    return folder


def test_the_environment_names_a_pack_before_the_shipped_one(
    chosen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [pack.folder for pack in find_packs()] == [chosen]
    build([ADA], tmp_path / "shipped", FakeCompiler(), jobs=1)
    monkeypatch.setattr(pack_module, "SHIPPED", tmp_path / "shipped")
    assert [pack.folder for pack in find_packs()] == [chosen, tmp_path / "shipped"]
    monkeypatch.delenv("SAGE_KERNEL_PACK")
    assert [pack.folder for pack in find_packs()] == [tmp_path / "shipped"]


def test_a_pack_of_other_templates_is_ignored(
    chosen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack_module, "templates_digest", lambda: "others")
    with pytest.warns(RuntimeWarning, match="built from other templates"):
        assert find_packs() == []


def damage_manifest(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_text(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"format": 0}',
        f'{{"format": {FORMAT}}}',
        f'{{"format": {FORMAT}, "compressed": "yes"}}',
    ],
)
def test_a_pack_with_another_manifest_is_ignored(chosen: Path, text: str) -> None:
    damage_manifest(chosen, text)
    with pytest.warns(RuntimeWarning, match="is not used"):
        assert find_packs() == []


def test_a_manifest_without_a_list_of_kernels_is_ignored(chosen: Path) -> None:
    manifest = json.loads((chosen / MANIFEST).read_text())
    damage_manifest(chosen, json.dumps(manifest | {"kernels": {}}))
    with pytest.warns(RuntimeWarning, match="lists no kernels"):
        assert find_packs() == []


def test_a_folder_that_is_not_there_is_said(chosen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGE_KERNEL_PACK", str(chosen / "nowhere"))
    with pytest.warns(RuntimeWarning, match="nowhere is not used"):
        assert find_packs() == []


def test_images_come_from_the_pack_the_cache_and_the_compiler(folder: Path) -> None:
    compiler = FakeCompiler("newer")
    found = 0

    def find() -> FakeCompiler:
        nonlocal found
        found += 1
        return compiler

    cache = folder.parent / "cache"
    images = Images([Pack(folder)], Cache(cache), find)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert images(TOY) == image_of(TOY)
    assert (found, os.path.exists(cache)) == (0, False)
    missing = replace(TOY, arch="sm_86")
    assert images(missing) == images(missing)
    assert (found, len(compiler.compiled)) == (1, 1)
    never = FakeCompiler("newer", broken="SAGE")
    assert Images([], Cache(cache), lambda: never)(missing) == images(missing)


def test_what_is_missing_is_known_without_compiling(folder: Path) -> None:
    compiler = FakeCompiler(lacks="sm_120a")
    images = Images([Pack(folder)], Cache(None), lambda: compiler)
    assert images.missing(TOY) is None
    assert images.missing(replace(TOY, arch="sm_86")) is None
    assert images.missing(replace(TOY, arch="sm_120a")) == "fake is older than sm_120a"
    assert compiler.compiled == []


def test_without_a_compiler_the_reason_is_said(tmp_path: Path) -> None:
    def find() -> FakeCompiler:
        raise KernelUnavailableError("no compiler for kernels; pip install")

    with pytest.raises(KernelUnavailableError, match="pip install"):
        Images([], Cache(tmp_path), find)(TOY)
    missing = Images([], Cache(tmp_path), find).missing(TOY)
    assert missing is not None and "pip install" in missing
