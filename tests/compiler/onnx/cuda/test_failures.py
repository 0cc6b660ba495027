"""What can fail in the core, fails in a sentence, and gives back what it held."""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import os
import random
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from sage_compiler.kernels.cuda import params
from sage_compiler.kernels.cuda.launch_table import FORMAT, NAME, signed
from sage_compiler.kernels.cuda.preparation import preparation_specs
from sage_compiler.kernels.cuda.render import templates_digest
from sage_compiler.kernels.cuda.variants import standalone_specs
from sage_compiler.semantics import Semantics
from tests.compiler.kernels.cuda.emulation import ARCH
from tests.compiler.kernels.cuda.test_attention import make_call
from tests.compiler.kernels.dense import Call
from tests.compiler.onnx.cuda import native
from tests.compiler.onnx.cuda.native import Device, NativeError, Prepared, TestDriver, opened
from tests.compiler.onnx.cuda.packs import MASKED, pack_of_names
from tests.cutlass_templates import host

REBUILD = "sagec kernels build --standalone"


@pytest.fixture
def pretending() -> Iterator[TestDriver]:
    """A driver that only pretends."""
    driver = TestDriver()
    held = driver.held()
    yield driver
    assert driver.held() == held
    driver.reset()


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    """A pack of names, for int8_fp8, float16 and head_dim 64 on sm_89."""
    return pack_of_names(MASKED.specs(), tmp_path / "pack")


def a_call() -> Call:
    """One that needs all kinds of kernels of ``pack``."""
    call = make_call(20, 30, 64, torch.float16, sinks=True)
    assert call.sinks is not None
    mask = torch.ones(20, 30, dtype=torch.bool)
    return dataclasses.replace(call, attn_mask=mask, sinks=call.sinks.half())


def launch(device: Device) -> None:
    Prepared(device, a_call(), "int8_fp8").launch()


# --- the driver ---------------------------------------------------------------------------------


def test_no_driver(pack: Path) -> None:
    with (
        pytest.raises(NativeError, match=r"no CUDA driver.*nowhere\.so.*CPUExecutionProvider only"),
        opened("/nowhere.so", pack),
    ):
        pass


def test_a_driver_without_an_entry(pack: Path, tmp_path: Path) -> None:
    library = tmp_path / "old.so"
    source = "int cuInit(unsigned flags) { return 0; }"
    command = [host.COMPILER, "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)]
    subprocess.run(command, input=source, text=True, check=True)
    with (
        pytest.raises(NativeError, match="has no cuDriverGetVersion; update"),
        opened(library, pack),
    ):
        pass


@pytest.mark.parametrize(
    ("function", "code"),
    [
        ("cuInit", 100),
        ("cuDeviceGetCount", 3),
        ("cuDeviceGet", 101),
        ("cuDeviceGetAttribute", 1),
        ("cuDevicePrimaryCtxRetain", 2),
    ],
)
def test_a_device_that_cannot_be_opened(
    function: str, code: int, pretending: TestDriver, pack: Path
) -> None:
    pretending.fail(function, code)
    said = refusal(pretending, pack)
    assert re.search(rf"{function}: CUDA_ERROR_\w+ \({code}\), as a test", said)


def test_an_error_that_has_no_name(pretending: TestDriver, pack: Path) -> None:
    pretending.fail("cuInit", 12345)
    with pytest.raises(NativeError, match="cuInit: CUresult 12345"), opened(pretending.path, pack):
        pass


@pytest.mark.parametrize(
    ("ordinal", "words"),
    [(1, "no CUDA device 1: the driver has 1"), (-1, "from 0 to 63"), (64, "from 0 to 63")],
)
def test_a_device_that_is_not_there(
    ordinal: int, words: str, pretending: TestDriver, pack: Path
) -> None:
    with pytest.raises(NativeError, match=words), opened(pretending.path, pack, ordinal):
        pass


def test_a_device_that_the_pack_has_nothing_for(pretending: TestDriver, pack: Path) -> None:
    pretending.set_capability(7, 5)
    said = refusal(pretending, pack)
    assert re.search(r"capability 7\.5.*kernels for 8\.9.*CPUExecution", said)


@pytest.mark.parametrize(
    ("function", "after"),
    [
        ("cuCtxPushCurrent_v2", 0),
        ("cuStreamIsCapturing", 0),
        *(("cuModuleLoadData", after) for after in range(6)),
        *(("cuModuleGetFunction", after) for after in (0, 3, 5)),
        *(("cuLaunchKernel", after) for after in range(6)),
        ("cuMemsetD8Async", 0),  # of the counters
    ],
)
def test_a_call_that_fails(function: str, after: int, pretending: TestDriver, pack: Path) -> None:
    """At every step; nothing stays current, and a module that is of no use is unloaded."""
    with opened(pretending.path, pack) as device:
        pretending.fail(function, 2, after)
        with pytest.raises(NativeError, match=rf"{function}: CUDA_ERROR_OUT_OF_MEMORY \(2\)"):
            launch(device)
        launched = len(pretending.launches())
        prepared = {"cuLaunchKernel": after + 1, "cuMemsetD8Async": 4}  # mask and sinks
        assert launched == prepared.get(function, 0)
        assert pretending.held()[2] == 0
        pretending.fail("", 0)
        launch(device)  # and it goes on
        assert len(pretending.launches()) == 6


@pytest.mark.parametrize(
    ("version", "code", "dependent"), [(12030, 0, 1), (12020, 0, 0), (12030, 801, 1)]
)
def test_launches_that_cannot_depend_on_one_another(
    version: int, code: int, dependent: int, pretending: TestDriver, tmp_path: Path
) -> None:
    """Then the attention kernel is launched as any other; other errors are errors."""
    pack = pack_of_names(standalone_specs("sm_90a"), tmp_path / "pack")
    pretending.set_capability(9, 0)
    pretending.set_version(version)
    prepared = {"call": make_call(20, 30, 128, torch.float16), "recipe": "int8_fp8"}
    with opened(pretending.path, pack) as device:
        pretending.fail("cuLaunchKernelEx" if code else "", code)
        Prepared(device, **prepared).launch()
        launched = [(each.symbol[:13], each.dependent) for each in pretending.launches()]
        attends = [("sage_attend_h", True)] * dependent
        attends += [("sage_attend_h", False)] * (not dependent or code != 0)
        assert launched == [("sage_quantize", False), *attends]
        if dependent:
            pretending.fail("cuLaunchKernelEx", 700)
            with pytest.raises(NativeError, match=r"cuLaunchKernel: CUDA_ERROR_OF_A_TEST \(700\)"):
                Prepared(device, **prepared).launch()


def test_shared_memory_that_is_refused(pretending: TestDriver, tmp_path: Path) -> None:
    specs = [spec for spec in standalone_specs(ARCH) if spec.shared_bytes > 48 << 10]
    assert specs
    pack = pack_of_names(standalone_specs(ARCH), tmp_path / "pack")
    call = make_call(20, 30, 128, torch.float16)
    with opened(pretending.path, pack) as device:
        pretending.fail("cuFuncSetAttribute", 1)
        with pytest.raises(NativeError, match="cannot be loaded: cuFuncSetAttribute"):
            Prepared(device, call, "int8_fp16").launch()


def test_no_memory_to_fill(pretending: TestDriver, pack: Path) -> None:
    with opened(pretending.path, pack) as device:
        pretending.fail("cuMemsetD8Async", 700)
        with pytest.raises(NativeError, match="cuMemsetD8Async"):
            Prepared(device, make_call(5, 0, 64, torch.float16), "int8_fp8").launch()


@pytest.mark.skipif(host.missing() is not None, reason=str(host.missing()))
def test_nothing_is_loaded_while_a_graph_is_captured(
    emulated: Device, driver: TestDriver, host: host.Host
) -> None:
    call, stream = a_call(), ctypes.c_void_p(native.STREAM)
    host.library.sage_host_set_capturing(stream, True)
    with pytest.raises(NativeError, match="warm up before the capture"):
        Prepared(emulated, call, "int8_fp8").launch()
    assert driver.calls("cuModuleLoadData") == 0
    host.library.sage_host_set_capturing(stream, False)
    Prepared(emulated, call, "int8_fp8").launch()
    host.library.sage_host_set_capturing(stream, True)
    Prepared(emulated, call, "int8_fp8").launch()
    assert [entry["captured"] for entry in host.launches()] == [False] * 6 + [True] * 6


def test_threads_load_a_kernel_once(pretending: TestDriver, pack: Path) -> None:
    with opened(pretending.path, pack) as device:
        start = threading.Barrier(8)
        failures: list[Exception] = []

        def run() -> None:
            start.wait()
            try:
                for _ in range(20):
                    launch(device)
            except NativeError as error:
                failures.append(error)

        threads = [threading.Thread(target=run) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert pretending.calls("cuModuleLoadData") == 6
        assert len(pretending.launches()) == 8 * 20 * 6


# --- the pack -----------------------------------------------------------------------------------


def refusal(driver: TestDriver, pack: Path) -> str:
    """Why a pack is not opened."""
    with pytest.raises(NativeError) as caught, opened(driver.path, pack):
        pass
    return str(caught.value)


def test_a_table_that_is_damaged(pretending: TestDriver, pack: Path) -> None:
    """Cut off anywhere; and bytes that are changed, left out, doubled."""
    table = (pack / NAME).read_bytes()
    for end in range(0, len(table), 29):
        (pack / NAME).write_bytes(table[:end])
        words = refusal(pretending, pack)
        assert "cut off" in words and REBUILD in words
    rng = random.Random(0)
    for _ in range(300):
        damaged = bytearray(table)
        at = rng.randrange(len(damaged))
        match rng.randrange(3):
            case 0:
                damaged[at] = (damaged[at] + rng.randrange(1, 256)) % 256
            case 1:
                del damaged[at : at + rng.randint(1, 60)]
            case _:
                damaged[at:at] = damaged[at : at + rng.randint(1, 60)]
        (pack / NAME).write_bytes(damaged)
        words = refusal(pretending, pack)
        assert "cut off" in words or "its checksum differs" in words


def change_table(pack: Path, change: Callable[[str], str]) -> None:
    """Change its records, with a checksum that says that they are as they were built."""
    *lines, _ = (pack / NAME).read_text().splitlines(keepends=True)
    records = "".join(lines)
    changed = change(records)
    assert changed != records
    (pack / NAME).write_text(signed(changed))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: "", "not a launch table"),
        (lambda text: "{}\n", "not a launch table"),
        (lambda text: text.replace(f"launches {FORMAT}", "launches 99"), "not a launch table"),
        (lambda text: text.replace(templates_digest(), "0" * 64), "built from other templates"),
        (lambda text: text.replace(templates_digest(), ""), "built from other templates"),
        (lambda text: text.replace("arch sm_89", "arch ../sm_89", 1), "line 2"),
        (lambda text: text.replace("int8_fp8,", "int9_fp8,"), "line 2"),
        (lambda text: text.replace(" 256 17424 ", " 256 -17424 "), "line 3"),
        (lambda text: text.replace(" 256 17424 ", " 256 "), "line 3"),
        (lambda text: text.replace(" 256 17424 ", " 256 17424 7 "), "line 3"),
        (lambda text: text.replace("8 9", "8 9x", 1), "line 2"),
        (lambda text: text.replace(" 0 1 0 1 0 0 0 2 2 ", " 0 99 0 1 0 0 0 2 2 "), "names kernels"),
        (lambda text: text + "more\n", "is not as it must be"),
        (lambda text: text + "a " * 100 + "\n", "is not as it must be"),
    ],
)
def test_a_table_of_something_else(
    change: Callable[[str], str], words: str, pretending: TestDriver, pack: Path
) -> None:
    change_table(pack, change)
    refused = refusal(pretending, pack)
    assert words in refused and REBUILD in refused


DAMAGE = ("", "\n", " ", "7", "-", "\x7f")


def test_random_tables_are_refused_or_harmless(pretending: TestDriver, pack: Path) -> None:
    """Whatever their records are: never a crash."""
    rng = random.Random(0)

    def damage(text: str) -> str:
        letters = list(text)
        while letters == list(text):  # a 7 may become a 7
            for _ in range(rng.randint(1, 5)):
                at = rng.randrange(len(letters))
                letters[at : at + rng.choice((1, 1, 30))] = rng.choice(DAMAGE)
        return "".join(letters)

    records = (pack / NAME).read_text()
    for _ in range(300):
        (pack / NAME).write_text(records)
        change_table(pack, damage)
        try:
            with opened(pretending.path, pack) as device:
                launch(device)
        except NativeError as error:
            assert len(str(error)) > 20
        pretending.launches()


def test_kernels_that_are_damaged(pretending: TestDriver, pack: Path) -> None:
    (kernel,) = (pack / ARCH).glob("sage_quantize_*.cubin")
    image = kernel.read_bytes()
    for content, words in (
        (image[:-1], f"has {len(image) - 1} bytes, not {len(image)}"),
        (image + b"x", "bytes, not"),
        (image.replace(b"sage", b"Sage"), "its checksum differs"),
        (b"", "has 0 bytes"),
        (None, "No such file"),
    ):
        if content is None:
            kernel.unlink()
        else:
            kernel.write_bytes(content)
        with opened(pretending.path, pack) as device:
            with pytest.raises(NativeError, match=words) as caught:
                launch(device)
            assert REBUILD in str(caught.value)
        assert pretending.launches() == []  # nothing half done


def test_a_pack_of_another_version(pretending: TestDriver, pack: Path) -> None:
    """A kernel that takes other parameters than the library passes."""

    def change(records: str) -> str:
        (line,) = [line for line in records.splitlines() if " sage_quantize_" in line]
        words = line.split(" ")
        words[5] = str(int(words[5]) + 8)
        return records.replace(line, " ".join(words))

    change_table(pack, change)
    words_of_refusal = (
        rf"passes {params.quantize(rotary_query=False, rotary_key=False).size}: the kernel pack"
    )
    with (
        opened(pretending.path, pack) as device,
        pytest.raises(NativeError, match=words_of_refusal),
    ):
        launch(device)


def test_a_pack_that_others_can_write_to(pretending: TestDriver, pack: Path) -> None:
    pack.chmod(0o777)
    assert "other users can write" in refusal(pretending, pack)
    pack.chmod(0o755)
    pack.parent.chmod(0o777)
    assert "other users can write" in refusal(pretending, pack)
    pack.parent.chmod(0o1777)  # nobody can replace what is another's
    with opened(pretending.path, pack):
        pass
    pack.parent.chmod(0o700)


@pytest.mark.skipif(os.geteuid() != 0, reason="only the administrator gives folders away")
def test_a_pack_of_another_user(pretending: TestDriver, pack: Path) -> None:
    os.chown(pack, 12345, 12345)
    assert "belongs to another user (uid 12345)" in refusal(pretending, pack)
    os.chown(pack, 0, 0)
    link = pack.parent / "link"
    link.symlink_to(pack)
    with opened(pretending.path, link):
        pass
    os.chown(pack, 12345, 12345)
    assert "belongs to another user" in refusal(pretending, link)


@pytest.mark.parametrize("name", ["nowhere", "x" * 3000])
def test_a_pack_that_is_not_there(name: str, pretending: TestDriver, pack: Path) -> None:
    assert "the kernel pack" in refusal(pretending, pack / name)


@pytest.mark.parametrize(
    ("sizes", "dtype", "semantics", "recipe", "words"),
    [
        ((64, 64), torch.bfloat16, {}, "int8_fp8", "no int8_fp8 kernel for sm_89, bfloat16"),
        ((64, 64), torch.float16, {}, "int4_fp16", "no int4_fp16 kernel"),
        ((72, 64), torch.float16, {}, "auto", "no int8_fp8 kernel for sm_89, float16, head_dim 72"),
        ((64, 65), torch.float16, {}, "int8_fp8", "of V 65"),
        ((64, 64), torch.float16, {"softcap": 3.0}, "int8_fp8", "with a softcap"),
        ((0, 64), torch.float16, {}, "int8_fp8", "head_dim 0"),
        ((1 << 40, 64), torch.float16, {}, "int8_fp8", "head_dim 1099511627776"),
    ],
)
def test_what_there_is_no_kernel_for(
    sizes: tuple[int, int],
    dtype: torch.dtype,
    semantics: dict[str, float],
    recipe: str,
    words: str,
    pretending: TestDriver,
    pack: Path,
) -> None:
    a = native.describe(
        (1, 1, 1, 5, 5, *sizes),
        dtype,
        Semantics(scale=0.1, **semantics),
        recipe,  # type: ignore[arg-type]
    )
    with opened(pretending.path, pack) as device:
        with pytest.raises(NativeError, match=words) as caught:
            device.scratch_bytes(a)
        assert f"{REBUILD} --arch sm_89" in str(caught.value)
        assert "CPUExecutionProvider only" in str(caught.value)


def test_a_recipe_that_the_pack_lacks_is_said_at_once(pretending: TestDriver, pack: Path) -> None:
    with opened(pretending.path, pack) as device:
        device.check_recipe(torch.float16, "int8_fp8")
        device.check_recipe(torch.float16, "auto")
        device.check_recipe(torch.float16, "int4_fp8")  # int8_fp8 serves it
        with pytest.raises(NativeError, match="no int8_fp16 kernel for sm_89 and float16"):
            device.check_recipe(torch.float16, "int8_fp16")
        with pytest.raises(NativeError, match="no int8_fp8 kernel for sm_89 and bfloat16"):
            device.check_recipe(torch.bfloat16, "auto")


def test_a_pack_without_the_kernels_that_prepare(pretending: TestDriver, tmp_path: Path) -> None:
    """One that was built without --standalone serves what needs none of them."""
    specs = [spec for spec in MASKED.specs() if spec not in preparation_specs(ARCH)]
    pack = pack_of_names(specs, tmp_path / "pack")
    call = a_call()
    with opened(pretending.path, pack) as device:
        for lacking, words in (
            (call, "no kernels for an attn_mask"),
            (dataclasses.replace(call, attn_mask=None), "no kernels for 16-bit sinks"),
            (make_call(3, 0, 64, torch.float16), "no kernel for the LSE"),
        ):
            with pytest.raises(NativeError, match=words):
                Prepared(device, lacking, "int8_fp8")
        Prepared(device, make_call(3, 4, 64, torch.float16, sinks=True), "int8_fp8").launch()
        assert len(pretending.launches()) == 2


# --- the rest -----------------------------------------------------------------------------------


def test_sha256() -> None:
    rng = random.Random(0)
    for length in (0, 1, 3, 54, 55, 56, 57, 63, 64, 65, 119, 120, 1000, 4096):
        data = rng.randbytes(length)
        assert native.sha256(data) == hashlib.sha256(data).hexdigest()


def test_the_parameters_are_those_of_this_format() -> None:
    """A kernel that means something else by its parameters needs another FORMAT in the table, which
    C++ compares: raise it, in launch_table.py and pack.cpp, and write the new digest here."""
    header = host.TEMPLATES / "include" / "sage" / "params.cuh"
    digest = hashlib.sha256(header.read_bytes()).hexdigest()
    assert (FORMAT, digest[:16]) == (8, "c3e0a63cec8f74c5")


def test_the_process_has_one_runtime(
    pretending: TestDriver, pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by the environment; what failed is tried again, and what is found is kept."""
    monkeypatch.delenv("SAGE_KERNEL_PACK", raising=False)
    monkeypatch.setenv("SAGE_CUDA_DRIVER", "/nowhere.so")
    with pytest.raises(NativeError, match=f"no kernel pack; build one with `{REBUILD}`"):
        native.call("shared")
    monkeypatch.setenv("SAGE_KERNEL_PACK", str(pack / "nowhere"))
    with pytest.raises(NativeError, match="no CUDA driver"):
        native.call("shared")
    monkeypatch.setenv("SAGE_CUDA_DRIVER", str(pretending.path))
    with pytest.raises(NativeError, match="nowhere: No such file"):
        native.call("shared")
    monkeypatch.setenv("SAGE_KERNEL_PACK", str(pack))
    found = native.call("shared")
    monkeypatch.setenv("SAGE_KERNEL_PACK", "/elsewhere")
    assert native.call("shared") == found
