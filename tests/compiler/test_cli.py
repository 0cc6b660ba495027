"""The command ``sagec``."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sage_compiler import cli

MODEL = """\
import torch, helper
from torch import nn
import torch.nn.functional as F

class Model(nn.Module):
    def forward(self, x, causal=False):
        return F.scaled_dot_product_attention(x, x, x, is_causal=causal) * helper.ONE

def build():
    return Model(), (torch.randn(1, 2, 70, 8),)

def with_keywords():
    return Model(), (torch.randn(1, 2, 70, 8),), {"causal": True}

def wrong():
    return Model()

number = 3
"""


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "helper.py").write_text("ONE = 1.0\n")
    (tmp_path / "model.py").write_text(MODEL)
    return str(tmp_path / "model.py")


def test_text(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", f"{model}:build", "--precision", "int8_fp8"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("sage: 1 attention site in 1 graph: 1 rewritten, 0 kept")
    assert "emulated" in output


def test_json(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["explain", f"{model}:with_keywords", "--precision", "exact", "--json"]
    assert cli.main(arguments) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["sites"][0]["mask"] == "causal"
    assert data["sites"][0]["decision"] == "rewrite"


def test_options_reach_the_decision(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["explain", f"{model}:build", "--precision", "int4_fp8", "--fallback", "sdpa"]
    assert cli.main(arguments) == 0
    assert "fallback='sdpa'" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["nothing.py:build"], "there is no file 'nothing.py'"),
        (["model.py"], "not of the form MODEL.py:FUNCTION"),
        (["{model}:absent"], "no function 'absent'"),
        (["{model}:number"], "no function 'number'"),
        (["{model}:wrong"], "must return (model, args)"),
        (["{model}:build", "--precision", "int3"], "unknown precision 'int3'; known: auto"),
        (["{model}:build", "--precision", "int4_fp8", "--fallback", "error"], "no int4_fp8 kernel"),
        (["{model}:build", "--fallback", "x"], "fallback='x'; known: emulate"),
        (["{model}:build", "--min-seq-len", "-2"], "at least 0"),
    ],
    ids=str,
)
def test_errors_are_one_sentence(
    model: str, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [argument.format(model=model) for argument in arguments]
    assert cli.main(["explain", *given]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("sagec: ") and words in captured.err
    assert captured.err.count("\n") == 1


def test_usage_errors_exit_with_2() -> None:
    with pytest.raises(SystemExit) as error:
        cli.main(["explain"])
    assert error.value.code == 2


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main(["explain", "--help"])
    assert error.value.code == 0
    assert "sagec explain model.py:build" in capsys.readouterr().out


def test_the_installed_command(model: str) -> None:
    command = Path(sys.executable).parent / "sagec"
    result = subprocess.run(
        [command, "explain", f"{model}:build", "--json"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["kept"] == 1
