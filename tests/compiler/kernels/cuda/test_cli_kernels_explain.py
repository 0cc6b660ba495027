"""The command ``sagec kernels explain``: what it prints; test_dispatch.py has whether it is so."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sage_compiler import cli
from sage_compiler.errors import KernelUnavailableError
from sage_compiler.kernels.cuda import toolchain
from sage_compiler.kernels.cuda.arch import PORTABLE
from sage_compiler.kernels.cuda.pack import MOST_COMPRESSED, build
from sage_compiler.kernels.cuda.variants import all_specs
from tests.compiler.commands import error_of
from tests.compiler.kernels.cuda.toy import FakeCompiler

COMMAND = ["kernels", "explain"]


@pytest.fixture(autouse=True)
def nothing_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a GPU nor a compiler."""

    def never(*names: str) -> None:
        raise AssertionError("an explanation compiles nothing")

    monkeypatch.setattr(toolchain, "find", never)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def explained(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main([*COMMAND, *words]) == 0
    return capsys.readouterr().out


def explained_json(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(explained(capsys, *words, "--json"))
    return found


def test_a_recipe_that_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("1x32x4096x128", "--arch", "sm_89", "--kv", "1x8x4000x128", "--recipe", "int4_fp8")
    text = explained(capsys, *words)
    lines = text.splitlines()
    assert lines[0] == (
        "bfloat16, Q (1, 32, 4096, 128), K (1, 8, 4000, 128), V (1, 8, 4000, 128); on sm_89"
    )
    assert lines[1] == "int4_fp8: int4_fp8, kernel cuda-mma"
    assert "int4_fp8 launches" in lines
    symbols = [line.split()[0] for line in lines if line.startswith("  sage_")]
    kinds = [symbol.split("_")[1] for symbol in symbols]
    assert kinds == ["quantize", "attend"]
    assert text.count("on first use; release wheels have it") == 2 and "in the pack" not in text
    assert "tile: 128 queries and 64 keys, 16 queries a warp, 2 stages" in lines
    assert "times are predicted, none is measured" in lines[-1]
    names = [line.split()[0] for line in lines[lines.index(heading(lines)) + 1 : -1]]
    assert names == ["int8_fp8", "int4_fp8", "int8_fp16", "int4_fp16", "exact"]


def test_who_serves_where_no_kernel_can_be_had(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("1x8x1024x128", "--arch", "sm_89", "--recipe")
    assert "Triton's serve" in explained(capsys, *words, "int8_fp16")
    assert "Triton" not in explained(capsys, *words, "int8_fp8")


def heading(lines: list[str]) -> str:
    """That of the table of recipes."""
    return next(line for line in lines if line.split()[:2] == ["recipe", "predicted"])


def test_auto_says_who_serves_and_what_a_name_would_launch(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = explained(capsys, "2x8x1000x64", "--arch", "sm_90", "--softcap").splitlines()
    assert lines[0].endswith(", softcap; on sm_90a")
    assert lines[1] == (
        "auto: float arithmetic serves: cuda-mma: int8_fp8 is not measured on this GPU (sm_90a)"
    )
    assert "int8_fp8, where it is asked for by name, launches" in lines
    assert any(
        "tile: 128 queries and 128 keys, 16 queries a warp, 4 stages" in line for line in lines
    )
    assert any(line.endswith("on first use") for line in lines)  # a softcap is in no pack
    names = [line.split()[:2] for line in lines[lines.index(heading(lines)) + 1 : -1]]
    assert [name for name, _ in names] == [
        "int8_fp8", "int8_fp16", "int4_fp16", "int4_fp8", "exact",
    ]  # fmt: skip
    assert [time for _, time in names][2:] == ["-"] * 3  # no prediction for float arithmetic


def test_what_no_kernel_takes(capsys: pytest.CaptureFixture[str]) -> None:
    lines = explained(
        capsys, "1x2x64x64", "--arch", "sm_120a", "--recipe", "int4_fp16", "--mask", "float"
    ).splitlines()
    assert lines[1] == (
        "int4_fp16: no kernel: cuda-mma: no int4_fp16 on sm_120a, but int8_fp8, int8_fp16: INT4 "
        "products are emulated from sm_90 on, slower than INT8 and less accurate. The reference "
        "emulates it, slowly; with fallback='sdpa', scaled_dot_product_attention serves"
    )
    assert not any("launches" in line for line in lines)


@pytest.mark.parametrize("recipe", ["auto", "int8_fp8"])
def test_a_gpu_without_kernels(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("1x2x64x64", "--arch", "sm_75", "--recipe", recipe)
    lines = explained(capsys, *words).splitlines()
    assert len(lines) == 2
    assert lines[0].endswith("; on compute capability 7.5")
    assert "compute capability 7.5: there are kernels for 8.0, 8.6" in lines[1]
    found = explained_json(capsys, *words)
    assert (found["arch"], found["launches"], found["recipes"]) == (None, [], [])
    assert found["served_by"] == ("exact" if recipe == "auto" else "reference")


def test_a_gpu_with_ptx_alone(capsys: pytest.CaptureFixture[str]) -> None:
    lines = explained(
        capsys, "1x2x128x64", "--arch", "sm_121", "--recipe", "int8_fp16"
    ).splitlines()
    assert lines[0].endswith("; on compute capability 12.1, by PTX of compute_80")
    assert lines[1] == "int8_fp16: int8_fp16, kernel cuda-mma"
    assert len([line for line in lines if line.startswith("  sage_")]) == 2
    assert "  sage_attend_compute_80_bfloat16_64_64_" in "\n".join(lines)
    names = [line.split()[:2] for line in lines[lines.index(heading(lines)) + 1 : -1]]
    assert [name for name, _ in names] == [
        "int8_fp16", "int4_fp16", "int8_fp8", "int4_fp8", "exact",
    ]  # fmt: skip
    assert {time for _, time in names} == {"-"}
    refused = explained(capsys, "1x2x128x64", "--arch", "sm_103", "--recipe", "int8_fp8")
    assert (
        "no int8_fp8 on compute_80, but int8_fp16: this GPU has no kernels of its own but PTX for "
        "all from compute capability 8.0 on, which has no FP8 products. The reference"
    ) in refused.splitlines()[1]
    found = explained_json(capsys, "1x2x128x64", "--arch", "sm_87")
    assert (found["arch"], found["asked"], found["served_by"]) == ("compute_80", "auto", "exact")
    assert "int8_fp16 is not measured on this GPU" in found["reason"]
    assert all(each["shipped"] and not each["packed"] for each in found["launches"])
    assert found["exact_seconds"] is None


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("1x4x300x96", "--arch", "sm_80", "--value-dim", "40", "--recipe", "int8_fp16")
    more = ("--mask", "window_bottom_right:128,0", "--mask", "bool", "--dtype", "float32")
    found = explained_json(capsys, *words, *more, "--sinks")
    assert found["attention"] == (
        "float32, Q (1, 4, 300, 96), K (1, 4, 300, 96), V (1, 4, 300, 40), "
        "window_bottom_right:128,0, a mask of bool, sinks"
    )
    assert (found["served_by"], found["recipe"], found["shown"]) == (
        "kernels", "int8_fp16", "int8_fp16",
    )  # fmt: skip
    assert found["launches"][1]["symbol"] == (
        "sage_attend_sm_80_float32_96_64_True_True_False_int8_fp16_fp32_16_2_128_False_False_False"
    )
    assert [each["blocks"] for each in found["launches"]] == [4 * 16 + 2 * 12 + 2 * 20, 12]
    assert not any(each["packed"] or each["shipped"] for each in found["launches"])
    assert found["tile"]["warp_rows"] == 16 and found["tile"]["reason"]
    assert found["exact_seconds"] is None  # sinks
    offered = {each["recipe"]: each["offered"] for each in found["recipes"]}
    assert offered == {
        "int8_fp16": True, "int4_fp16": True, "int8_fp8": False, "int4_fp8": False,
    }  # fmt: skip
    assert all(each["reason"] for each in found["recipes"])
    sums, amax, codes = 4 * 2 * 128 * 4, 4 * 2 * 64 * 4, 12 * 128 * 128
    scales, row_term, tiles = 12 * 32 * 4, 4864, 20 * (64 * 128 + 64 * 64 * 2 + 128)
    scales_of_v, alignment = 4 * 64 * 4, 256
    counters, totals = 256, 4 * 128 * 4 + 4 * 64 * 4
    assert found["scratch_bytes"] == (
        sums
        + amax
        + codes
        + scales
        + row_term
        + tiles
        + scales_of_v
        + counters
        + totals
        + alignment
    )


def test_few_queries(capsys: pytest.CaptureFixture[str]) -> None:
    """Heads that are packed, keys that are split, and the kernel that merges."""
    words = ("1x32x1x128", "--arch", "sm_89", "--kv", "1x8x4096x128", "--recipe", "int8_fp8")
    lines = explained(capsys, *words).splitlines()
    assert "cut: heads packed by 4, keys in 16 parts" in lines
    assert "tile: 32 queries and 64 keys, 16 queries a warp, 2 stages" in lines
    found = explained_json(capsys, *words)
    assert [each["blocks"] for each in found["launches"]] == [4 * 256 + 2 * 32 + 2 * 512, 8 * 16, 8]
    assert found["launches"][2]["symbol"] == "sage_merge_sm_89_bfloat16_128"
    about = found["cut"]
    assert (about["packed_heads"], about["splits"], about["multiprocessors"]) == (4, 16, 128)
    assert "a last kernel merges" in about["reason"]
    whole = explained_json(capsys, *words[:3], "--kv", "1x8x200x128", *words[5:])
    assert found["scratch_bytes"] - 16 * 32 * (128 + 2) * 4 > whole["scratch_bytes"]


@pytest.fixture
def pack_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The kernels that release wheels have, by their names, and no compiler."""
    specs = [spec for arch in ("sm_89", "sm_90a", PORTABLE.name) for spec in all_specs(arch)]
    build(specs, tmp_path, FakeCompiler(), jobs=1, most_compressed=MOST_COMPRESSED)
    monkeypatch.setenv("SAGE_KERNEL_PACK", str(tmp_path))

    def none(*names: str) -> None:
        raise KernelUnavailableError("no compiler for kernels")

    monkeypatch.setattr(toolchain, "find", none)


@pytest.mark.usefixtures("pack_alone")
@pytest.mark.parametrize("arch", ["sm_89", "sm_90a", "sm_103"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_pack_alone_decodes(
    dtype: str, head_dim: int, arch: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sequence and many, whose keys need not be split; some tokens at once; with a mask."""
    recipe = "int8_fp16" if arch == "sm_103" else "int8_fp8"
    for batch, length, mask in (
        (1, 1, None),
        (64, 1, "bool"),
        (1, 8, "float"),
        (2, 5, "causal_bottom_right"),
    ):
        shape, keys = f"{batch}x32x{length}x{head_dim}", f"{batch}x8x2000x{head_dim}"
        words = (shape, "--kv", keys, "--arch", arch, "--dtype", dtype)
        words = words if mask is None else (*words, "--mask", mask)
        found = explained_json(capsys, *words, "--recipe", recipe)
        kinds = [each["symbol"].split("_")[1] for each in found["launches"]]
        assert kinds == ["quantize", "attend", "merge"]
        assert all(each["packed"] and each["shipped"] for each in found["launches"])
        assert found["cut"]["packed_heads"] == 4
        assert (found["cut"]["splits"] > 1) == (batch < 64)
        if head_dim == 128 and mask in (None, "causal_bottom_right"):
            found = explained_json(capsys, *words, "--cache")
            kinds = [each["symbol"].split("_")[1] for each in found["launches"]]
            assert kinds == ["append", "query", "attend", "merge"]
            assert all(each["packed"] and each["shipped"] for each in found["launches"])


@pytest.mark.usefixtures("pack_alone")
def test_a_pack_alone_takes_prompts_into_a_cache(capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        "1x32x700x128",
        "--kv",
        "1x8x700x128",
        "--arch",
        "sm_90a",
        "--mask",
        "causal_bottom_right",
    )
    launches = explained_json(capsys, *words, "--cache")["launches"]
    kinds = [each["symbol"].split("_sm_")[0] for each in launches]
    assert kinds == ["sage_key_mean", "sage_append", "sage_query", "sage_attend_hopper"]
    assert all(each["packed"] for each in launches)


def test_packed_sequences(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("1x4x1000x64", "--arch", "sm_89", "--kv", "1x2x700x64", "--sequences", "5")
    found = explained_json(capsys, *words, "--recipe", "int4_fp8")
    assert found["attention"].endswith(", 5 packed sequences") and found["sequences"] == 5
    assert all(each["symbol"].endswith("_varlen") for each in found["launches"])
    queries, keys = 4 * (1000 // 128 + 6), 2 * (700 // 64 + 5)
    blocks = [each["blocks"] for each in found["launches"]]
    assert blocks == [2 * 2 * (700 // 256 + 5), queries, keys, keys, queries]
    delta = queries * 11 * 64 * 4  # one sequence may have all 700 keys
    assert delta < found["scratch_bytes"] < delta + 1_000_000
    assert found["exact_seconds"] is None
    assert all(each["seconds"] is None for each in found["recipes"])
    text = " ".join(explained(capsys, *words).split())
    assert "int8_fp8, where it is asked for by name, launches" in text
    assert "With auto, a least length or a guard, each sequence is a call of its own" in text
    by_wgmma = ("1x4x1000x64", "--arch", "sm_90a", "--sequences", "5", "--recipe", "int8_fp8")
    launches = explained_json(capsys, *by_wgmma)["launches"]
    assert all(each["symbol"].endswith("_varlen") for each in launches)
    assert launches[-1]["symbol"].startswith("sage_attend_hopper_")


def test_rotary_embedding(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("1x4x300x64", "--arch", "sm_90a", "--recipe", "int8_fp8", "--rotary", "interleaved")
    found = explained_json(capsys, *words)
    assert found["attention"].endswith(", rotary embedding, interleaved")
    assert found["rotary"] == "interleaved"
    symbols = [each["symbol"] for each in found["launches"]]
    rotated = [symbol.split("_")[1] for symbol in symbols if symbol.endswith("_interleaved")]
    assert rotated == ["quantize"]
    assert not found["launches"][0]["shipped"]
    packed = explained(capsys, *words[:2], "sm_89", *words[3:], "--sequences", "2")
    assert "Q and K are rotated before, by torch" in " ".join(packed.split())
    assert "_interleaved" not in packed


def test_a_cache(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("1x32x1x128", "--kv", "1x8x4096x128", "--arch", "sm_89", "--cache")
    lines = explained(capsys, *words).splitlines()
    assert lines[0].endswith("V (1, 8, 4096, 128), K and V in a cache; on sm_89")
    assert lines[1] == "auto: int8_fp8, kernel cuda-mma; append packs the queries' tokens"
    assert "cut: heads packed by 4, keys in 16 parts" in lines
    tile, mean, staged = 2 * 64 * 128 + 128 + 4 * 128, 4 * 128, 2 * 5 * 64 * 128 * 2
    assert f"cache: {8 * (64 * tile + mean + staged)} bytes for 4096 tokens" in lines
    found = explained_json(capsys, *words, "--recipe", "int4_fp16")
    kinds = [each["symbol"].split("_sm_")[0] for each in found["launches"]]
    assert kinds == [f"sage_{kind}" for kind in ("append", "query", "delta", "attend", "merge")]
    assert [each["blocks"] for each in found["launches"]] == [16, 32, 512, 128, 8]
    assert found["recipes"][0]["seconds"] is found["exact_seconds"] is None
    young = ("1x8x10x64", "--arch", "sm_80", "--cache")
    assert "key_mean and append pack the queries' tokens" in explained(capsys, *young)
    assert explained_json(capsys, *young)["launches"][0]["symbol"].startswith("sage_key_mean")


def test_exact_is_exact(capsys: pytest.CaptureFixture[str]) -> None:
    found = explained_json(capsys, "1x2x64x64", "--arch", "sm_89", "--recipe", "exact")
    assert (found["served_by"], found["reason"]) == ("exact", "it is asked for")
    assert found["shown"] is None and found["exact_seconds"] > 0


def test_the_gpu_that_is_here(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    assert explained_json(capsys, "1x2x64x64")["arch"] == "sm_86"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["1x2x64", "--arch", "sm_89"], "shape '1x2x64'; it must be BATCHxHEADSxLENGTHxHEAD_DIM"),
        (["1x2x0x64", "--arch", "sm_89"], "each at least 1, such as 1x32x4096x128"),
        (["1x2x64x-64", "--arch", "sm_89"], "shape '1x2x64x-64'"),
        (["9999999x9999999x9x64", "--arch", "sm_89"], "no GPU holds them"),
        (["1x2x64x64"], "--arch is missing, and there is no GPU here; known: sm_80"),
        (["1x2x64x64", "--arch", "hopper"], "unknown architecture 'hopper'; known: sm_80"),
        (["1x2x64x64", "--arch", "sm_89", "--kv", "1x3x64x64"], "2 query heads and 3 key/value"),
        (["1x2x64x64", "--arch", "sm_89", "--kv", "1x2x64x32"], "query has head_dim 64 and key 32"),
        (["1x2x64x64", "--arch", "sm_89", "--kv", "2x2x64x64"], "batch size 2 and query 1"),
        (["1x2x64x64", "--arch", "sm_89", "--kv", "12"], "shape '12'"),
        (["1x2x64x64", "--arch", "sm_89", "--value-dim", "0"], "--value-dim 0; it must be at"),
        (["1x1x1073741824x64", "--arch", "sm_89"], "fewer than 1073741824 of each; split"),
        (["1x2x64x64", "--arch", "sm_89", "--sequences", "0"], "--sequences 0; it must be at"),
        (["2x2x64x64", "--arch", "sm_89", "--sequences", "3"], "batch size 2 with cu_seqlens"),
        (
            ["1x2x64x64", "--arch", "sm_89", "--sequences", "3", "--mask", "bool"],
            "attn_mask with cu_seqlens; a packed batch takes none",
        ),
        (
            ["1x2x64x64", "--arch", "sm_89", "--cache", "--sequences", "1"],
            "--cache and --sequences",
        ),
        (
            ["1x2x64x64", "--arch", "sm_89", "--cache", "--rotary", "half"],
            "tokens of one length, r",
        ),
        (["1x2x64x64", "--arch", "sm_89", "--cache", "--recipe", "exact"], "a cache is quantized"),
        (["1x2x9x64", "--arch", "sm_89", "--cache", "--kv", "1x2x8x64"], "8 tokens for 9 queries"),
        (["1x2x9x64", "--arch", "sm_89", "--cache", "--mask", "causal"], "causal_bottom_right"),
        (
            ["1x2x9x64", "--arch", "sm_80", "--cache", "--recipe", "int8_fp8"],
            "a packed cache can be int8_fp16, int4_fp16 on sm_80",
        ),
        (["1x2x9x300", "--arch", "sm_80", "--cache"], "head_dim 300 is not from 1 to 256"),
        (["1x2x9x64", "--arch", "sm_75", "--cache"], "compute capability 7.5"),
        (["1x2x64x64", "--arch", "sm_89", "--mask", "triangle"], "--mask triangle; it must be boo"),
        (["1x2x64x64", "--arch", "sm_89", "--mask", "window"], "--mask window; it must be bool"),
        (["1x2x64x64", "--arch", "sm_89", "--mask", "causal:1,2"], "--mask causal:1,2; it must"),
        (["1x2x64x64", "--arch", "sm_89", "--mask", "window:-2,0"], "each side counts keys"),
        (
            ["1x2x64x64", "--arch", "sm_89", "--mask", "bool", "--mask", "float"],
            "--mask bool --mask float; at most one band and one explicit mask go together",
        ),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, list) else "",
)
def test_errors_are_one_sentence(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in error_of([*COMMAND, *words], capsys)


@pytest.mark.parametrize("words", [["--dtype", "float64"], ["--recipe", "int2_fp4"]], ids=" ".join)
def test_unknown_words_are_wrong_usage(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main([*COMMAND, "1x2x64x64", "--arch", "sm_89", *words])
    assert error.value.code == 2
    assert "invalid choice" in capsys.readouterr().err
