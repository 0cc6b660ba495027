"""The commands ``sagec bench`` and ``sagec completion``."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sage_compiler import cli
from sage_compiler.commands import bench
from tests.compiler.commands import error_of, write_models


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "path", list(sys.path))
    return write_models(tmp_path)


# --- bench ----------------------------------------------------------------------------------


def test_bench(models: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--precision", "int8_int8", "--rounds", "3", "--warmup", "1", "--json"]
    assert cli.main(["bench", f"{models}:build", *options]) == 0
    data = json.loads(capsys.readouterr().out)
    timings = {each["name"]: each for each in data["timings"]}
    assert list(timings) == ["eager", "inductor", "sage"]
    for each in timings.values():
        assert 0 < each["p10"] <= each["seconds"] <= each["p90"]
        assert each["first_seconds"] > 0 and each["speedup"] > 0
    assert timings["eager"]["speedup"] == 1
    assert timings["eager"]["rel_l1"] == 0 and timings["eager"]["cosine"] == 1
    assert 0 < timings["sage"]["rel_l1"] < 0.1 and 0.99 < timings["sage"]["cosine"] < 1
    assert data["report"]["rewritten"] == 1
    assert data["machine"]["threads"] == torch.get_num_threads() and data["machine"]["devices"]
    assert data["rounds"] == 3


@pytest.fixture
def unfair(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save the time of a compilation that only makes the first calls comparable."""
    monkeypatch.setattr(bench, "_start_inductor", lambda: None)


@pytest.mark.usefixtures("unfair")
def test_the_table_says_what_was_kept(models: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--rounds", "1", "--warmup", "0", "--threads", "1", "--min-seq-len", "5000"]
    assert cli.main(["bench", f"{models}:build", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "1 thread), torch " in lines[0] and lines[0].endswith("1 round")
    assert lines[1].split("  ")[-1] == "cosine"
    assert [line.split()[0] for line in lines[2:5]] == ["eager", "inductor", "sage"]
    assert lines[5] == "sage: 1 attention site, 0 rewritten"
    assert lines[6].startswith("  kept, 1 site: ")


def test_turns_are_taken() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    samples = bench.interleave(calls, lambda: order.append("."), rounds=2, warmup=1)
    assert "".join(order) == "ab." + "a.b." + "b.a."
    assert {name: len(times) for name, times in samples.items()} == {"a": 2, "b": 2}


@pytest.mark.usefixtures("unfair")
@pytest.mark.parametrize(
    "more, words",
    [
        (["--rounds", "0"], "--rounds 0; it must be at least 1"),
        (["--warmup", "-1"], "--warmup -1; it must be at least 0"),
        (["--threads", "0"], "--threads 0; it must be at least 1"),
        (["--precision", "int4_fp8", "--fallback", "error"], "no int4_fp8 kernel"),
    ],
    ids=str,
)
def test_errors_are_one_sentence(
    models: str, more: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in error_of(["bench", f"{models}:build", *more], capsys)


# --- completion -----------------------------------------------------------------------------


def test_completion(capsys: pytest.CaptureFixture[str]) -> None:
    for shell in ("bash", "zsh", "tcsh"):
        assert cli.main(["completion", shell]) == 0
        script = capsys.readouterr().out
        assert "sagec" in script and "calibrate" in script


def test_bash_completes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    (tmp_path / "model.py").touch()

    def completed(*words: str) -> set[str]:
        ask = (
            f"{script}\nCOMP_WORDS=(sagec {' '.join(words)} '')\nCOMP_CWORD={len(words) + 1}\n"
            '_shtab_sagec\nprintf "%s\\n" "${COMPREPLY[@]}"'
        )
        run = ["bash", "--norc", "-c", ask]
        done = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path)
        return set(done.stdout.split())

    assert {"explain", "policy", "bench"} <= completed()
    assert {"show", "diff", "check"} <= completed("policy")
    assert "int8_int8" in completed("explain", "--precision")
    assert completed("explain") >= {"model.py"}


def test_completion_without_shtab(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    said = error_of(["completion", "bash"], capsys)
    assert 'pip install "sage-compiler[cli]"' in said
