"""The cache of compiled kernels: what it keeps, what it refuses, and who builds."""

import json
import os
import shutil
import stat
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sage_compiler.errors import KernelUnavailableError
from sage_compiler.kernels.cuda import cache as cache_module
from sage_compiler.kernels.cuda.binary import Binary
from sage_compiler.kernels.cuda.cache import (
    IMAGE,
    MANIFEST,
    QUARANTINE,
    SOURCE,
    Cache,
    default_folder,
    key,
)
from sage_compiler.kernels.cuda.render import render
from sage_compiler.kernels.cuda.spec import KernelSpec
from tests.compiler.kernels.cuda.toy import TOY, FakeCompiler
from tests.packaging.layout import ROOT

POSIX = pytest.mark.skipif(os.name != "posix", reason="owners and modes are POSIX's")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def get(cache: Cache, compiler: FakeCompiler, spec: KernelSpec = TOY) -> bytes:
    return cache.image(spec, compiler.identity, lambda text: compiler.compile(text, spec.arch))


def test_a_kernel_is_built_once_and_kept_with_its_source(folder: Path) -> None:
    compiler = FakeCompiler()
    image = get(Cache(folder), compiler)
    assert image == compiler.compile(render(TOY), TOY.arch).image
    never = FakeCompiler(broken="SAGE")
    assert get(Cache(folder), never) == image and never.compiled == []
    kept = folder / key(TOY, compiler.identity)
    assert {path.name for path in kept.iterdir()} == {IMAGE, SOURCE, MANIFEST}
    assert (kept / SOURCE).read_text() == render(TOY)
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE(kept.stat().st_mode) == 0o700
    assert not list(folder.glob(".build*"))


def test_the_key_is_over_all_that_a_binary_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [
        key(TOY, "nvcc 13.0 -O3"),
        key(TOY, "nvcc 13.1 -O3"),
        key(TOY, "nvcc 13.0 -O2"),
        key(replace(TOY, arch="sm_86"), "nvcc 13.0 -O3"),
        key(replace(TOY, bytes=16), "nvcc 13.0 -O3"),
    ]
    monkeypatch.setattr(cache_module, "templates_digest", lambda: "other templates")
    names.append(key(TOY, "nvcc 13.0 -O3"))
    assert len(set(names)) == len(names)


def test_another_compiler_builds_its_own(folder: Path) -> None:
    assert get(Cache(folder), FakeCompiler("a")) != get(Cache(folder), FakeCompiler("b"))


def test_a_failed_build_publishes_nothing(folder: Path) -> None:
    cache = Cache(folder)
    with pytest.raises(KernelUnavailableError, match="it is broken"):
        get(cache, FakeCompiler(broken="SAGE_KERNEL"))
    assert [path.suffix for path in folder.iterdir()] == [".lock"]
    assert get(cache, FakeCompiler()) == get(Cache(folder), FakeCompiler(broken="SAGE_KERNEL"))


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def apply(kept: Path) -> None:
        manifest = json.loads((kept / MANIFEST).read_text())
        change(manifest)
        (kept / MANIFEST).write_text(json.dumps(manifest))

    return apply


def truncate(kept: Path) -> None:
    os.truncate(kept / IMAGE, (kept / IMAGE).stat().st_size - 1)


def flip(kept: Path) -> None:
    content = bytearray((kept / IMAGE).read_bytes())
    content[7] ^= 1
    (kept / IMAGE).write_bytes(content)


def empty(kept: Path) -> None:
    for path in kept.iterdir():
        path.unlink()


def replace_by_file(kept: Path) -> None:
    shutil.rmtree(kept)
    kept.write_text("no folder")


def replace_by_dangling_link(kept: Path) -> None:
    shutil.rmtree(kept)
    kept.symlink_to(kept.parent / "nowhere")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated image": truncate,
    "flipped bit": flip,
    "empty image": lambda kept: (kept / IMAGE).write_bytes(b""),
    "no image": lambda kept: (kept / IMAGE).unlink(),
    "no manifest": lambda kept: (kept / MANIFEST).unlink(),
    "empty manifest": lambda kept: (kept / MANIFEST).write_bytes(b""),
    "binary manifest": lambda kept: (kept / MANIFEST).write_bytes(b"\xff\xfe"),
    "truncated manifest": lambda kept: os.truncate(kept / MANIFEST, 40),
    "manifest is a list": lambda kept: (kept / MANIFEST).write_text("[]"),
    "another format": edit(lambda manifest: manifest.update(format=0)),
    "no kernel": edit(lambda manifest: manifest.pop("kernel")),
    "a field is missing": edit(lambda manifest: manifest["kernel"].pop("sha256")),
    "a field too many": edit(lambda manifest: manifest["kernel"].update(more=1)),
    "a field of another type": edit(lambda manifest: manifest["kernel"].update(size="4")),
    "a resource is missing": edit(lambda manifest: manifest["kernel"]["resources"].pop("stack")),
    "a resource of another type": edit(
        lambda manifest: manifest["kernel"]["resources"].update(stack="0")
    ),
    "another symbol": edit(lambda manifest: manifest["kernel"].update(symbol="sage_other")),
    "empty folder": empty,
    "a file in its place": replace_by_file,
    "a dangling link in its place": replace_by_dangling_link,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_what_is_damaged_is_put_aside_and_built_again(
    folder: Path, damage: Callable[[Path], object]
) -> None:
    image = get(Cache(folder), FakeCompiler())
    kept = folder / key(TOY, FakeCompiler().identity)
    damage(kept)
    compiler = FakeCompiler()
    with pytest.warns(RuntimeWarning, match="was not sound"):
        assert get(Cache(folder), compiler) == image
    assert len(compiler.compiled) == 1
    (aside,) = (folder / QUARANTINE).iterdir()
    assert aside.name.startswith(kept.name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert get(Cache(folder), FakeCompiler(broken="SAGE")) == image
    assert [found.entry.symbol for found in Cache(folder).kept()] == [TOY.symbol]


@POSIX
@pytest.mark.parametrize("mode", [0o770, 0o702, 0o1777])
def test_a_folder_that_others_can_write_to_is_refused(folder: Path, mode: int) -> None:
    get(Cache(folder), FakeCompiler())
    folder.chmod(mode)
    for spec in (TOY, replace(TOY, bytes=16)):  # the kept one, and one to build
        with pytest.raises(KernelUnavailableError, match=r"chmod go-w .*or set SAGE_CACHE_DIR"):
            get(Cache(folder), FakeCompiler(), spec)
    with pytest.raises(KernelUnavailableError, match="not safe"):
        list(Cache(folder).kept())


@POSIX
def test_what_is_made_is_safe_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        compiler = FakeCompiler()
        for _ in range(2):
            get(Cache(tmp_path / "new" / "and" / "deep"), compiler)
    finally:
        os.umask(before)
    assert len(compiler.compiled) == 1


@POSIX
def test_a_kernel_that_others_can_write_to_is_refused(folder: Path) -> None:
    get(Cache(folder), FakeCompiler())
    (folder / key(TOY, FakeCompiler().identity)).chmod(0o777)
    with pytest.raises(KernelUnavailableError, match="other users can write to"):
        get(Cache(folder), FakeCompiler())


@POSIX
def test_so_is_one_below_a_folder_that_others_can_write_to(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(KernelUnavailableError, match=f"other users can write to {shared}"):
        get(Cache(shared / "cache"), FakeCompiler())
    link = tmp_path / "link"
    (shared / "inner").mkdir(mode=0o700)
    link.symlink_to(shared / "inner")
    with pytest.raises(KernelUnavailableError, match="other users can write to"):
        get(Cache(link / "cache"), FakeCompiler())
    shared.chmod(0o1777)  # as /tmp: what is in it is its owner's
    get(Cache(shared / "cache"), FakeCompiler())


@POSIX
def test_a_folder_of_another_user_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    get(Cache(folder), FakeCompiler())
    owner = os.stat(folder).st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    monkeypatch.setattr(cache_module, "_ADMINISTRATOR", owner + 2)
    with pytest.raises(KernelUnavailableError, match=rf"another user \(uid {owner}\)"):
        get(Cache(folder), FakeCompiler())
    monkeypatch.setattr(cache_module, "_ADMINISTRATOR", owner)  # who could do anything anyway
    get(Cache(folder), FakeCompiler(broken="SAGE"))


def test_where_nothing_can_be_written_kernels_are_kept_in_memory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache, compiler = Cache(tmp_path / "file" / "cache"), FakeCompiler()
    with pytest.warns(RuntimeWarning, match="set SAGE_CACHE_DIR") as caught:
        image = get(cache, compiler)
        assert get(cache, compiler, replace(TOY, bytes=16)) != image
    assert len(caught) == 1
    assert get(cache, compiler) == image and len(compiler.compiled) == 2
    assert list(cache.kept()) == []


def test_a_full_disk_is_no_failure(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    cache, compiler = Cache(folder), FakeCompiler()
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.warns(RuntimeWarning, match="No space left"):
        image = get(cache, compiler)
    assert get(cache, compiler) == image and len(compiler.compiled) == 1
    assert [path.suffix for path in folder.iterdir()] == [".lock"]


def test_no_home_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("no home")

    for name in ("SAGE_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert default_folder() is None
    with pytest.warns(RuntimeWarning, match="no home"):
        get(Cache(None), FakeCompiler())


def test_the_folder_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SAGE_CACHE_DIR", str(tmp_path / "chosen"))
    assert default_folder() == tmp_path / "chosen"
    monkeypatch.delenv("SAGE_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "sage-compiler"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the specification has us ignore
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert default_folder() == tmp_path / ".cache" / "sage-compiler"


# A process that builds TOY in the folder argv[1], and writes a line to argv[2] for each build.
BUILDER = """\
import os, sys, time
from pathlib import Path
from sage_compiler.kernels.cuda.cache import Cache
from tests.compiler.kernels.cuda.toy import TOY, FakeCompiler

folder, log = map(Path, sys.argv[1:3])

def compile(source):
    with log.open("a") as file:
        file.write("built\\n")
    time.sleep(0.5)
    return FakeCompiler().compile(source, TOY.arch)

print("ready", flush=True)
sys.stdin.readline()
{before}
sys.stdout.buffer.write(Cache(folder).image(TOY, FakeCompiler().identity, compile))
"""


def start(folder: Path, log: Path, before: str = "") -> subprocess.Popen[bytes]:
    program = [sys.executable, "-c", BUILDER.format(before=before), str(folder), str(log)]
    process = subprocess.Popen(program, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def test_two_processes_build_a_kernel_once(folder: Path, tmp_path: Path) -> None:
    processes = [start(folder, tmp_path / "log") for _ in range(2)]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
    images = [process.communicate()[0] for process in processes]
    assert images == [FakeCompiler().compile(render(TOY), TOY.arch).image] * 2
    assert (tmp_path / "log").read_text() == "built\n"


def test_a_process_killed_before_publication_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    # Killed where all files are written and the folder is not yet in its place.
    before = "os.replace = lambda *_: (print('there', flush=True), time.sleep(60))"
    process = start(folder, tmp_path / "log", before)
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(b"\n")
    process.stdin.flush()
    assert process.stdout.readline() == b"there\n"
    assert len(list(folder.glob(".build*"))) == 1
    process.kill()
    process.communicate()
    assert list(Cache(folder).kept()) == []
    compiler = FakeCompiler()
    get(Cache(folder), compiler)
    assert len(compiler.compiled) == 1
    assert len(list(Cache(folder).kept())) == 1
    assert list(folder.glob(".build*")) == []


def test_a_lock_that_is_never_freed_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "LOCK_SECONDS", 0.1)

    def compile(source: str) -> Binary:
        with pytest.raises(KernelUnavailableError, match=r"\.lock for 0 seconds; end it"):
            get(Cache(folder), FakeCompiler())
        return FakeCompiler().compile(source, TOY.arch)

    Cache(folder).image(TOY, FakeCompiler().identity, compile)


def test_loading_takes_less_than_5_ms(folder: Path) -> None:
    def compile(source: str) -> Binary:
        return replace(FakeCompiler().compile(source, TOY.arch), image=bytes(250_000))

    Cache(folder).image(TOY, "fake", compile)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        Cache(folder).image(TOY, "fake", compile)
        times.append(time.perf_counter() - start)
    assert min(times) < 5e-3
