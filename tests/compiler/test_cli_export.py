"""The command ``sagec export``."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import sage_compiler as sage
from sage_compiler import cli
from sage_compiler.commands import export_onnx, export_program
from tests.compiler.commands import error_of, write_models, write_policy
from tests.tolerances import cosine


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "path", list(sys.path))
    return write_models(tmp_path)


def load(path: Path) -> torch.nn.Module:
    return torch.export.load(path).module()


def test_the_file_holds_the_operator(models: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = Path(models).parent / "model.pt2"
    arguments = ["export", f"{models}:with_keywords", "--out", str(out)]
    assert cli.main([*arguments, "--precision", "int8_int8"]) == 0
    output = capsys.readouterr().out
    assert "1 rewritten, 0 kept" in output
    assert f"written and checked: {out}, {out.stat().st_size} bytes" in output
    code = torch.export.load(out).graph_module.code
    assert "torch.ops.sage.attention.default" in code and "int8_int8" in code
    x = torch.randn(1, 2, 70, 16)
    exact = torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
    assert cosine(load(out)(x, causal=True), exact) > 0.999
    assert {file.suffix for file in out.parent.iterdir() if file.is_file()} == {".pt2", ".py"}


def test_another_process_loads_it(models: str) -> None:
    out = Path(models).parent / "model.pt2"
    assert cli.main(["export", f"{models}:build", "--out", str(out), "--precision", "exact"]) == 0
    program = (
        "import torch, sage_compiler\n"
        f"module = torch.export.load({str(out)!r}).module()\n"
        "print(*module(torch.ones(1, 2, 70, 16)).shape)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "1 2 70 16\n", done.stderr


@pytest.mark.parametrize("given", ["0:2", "x:2"])
def test_a_size_that_varies(models: str, given: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(models).parent
    out = folder / "model.pt2"
    policy = write_policy(folder / "policy.json")
    arguments = ["export", f"{models}:build", "--out", str(out), "--json", "--min-seq-len", "0"]
    assert cli.main([*arguments, "--policy", policy, "--dynamic", given]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["file"] == str(out) and data["bytes"] == out.stat().st_size
    assert data["report"]["sites"][0]["recipe"] == "int8_int8"
    assert load(out)(torch.randn(1, 2, 33, 16)).shape == (1, 2, 33, 16)


def test_a_file_that_computes_something_else_is_not_kept(
    models: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = iter([[torch.zeros(3)], [torch.ones(3)]])

    def output(*_: Any) -> list[Any]:
        return next(outputs)

    monkeypatch.setattr(export_program, "output", output)
    out = Path(models).parent / "model.pt2"
    said = error_of(["export", f"{models}:build", "--out", str(out)], capsys)
    assert "the file does not give the output of the model" in said
    assert not list(out.parent.glob("*pt2*"))


def test_an_error_of_the_model_is_not_one_of_the_file(
    models: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def output(*_: Any) -> list[Any]:
        raise OSError("in the model")

    monkeypatch.setattr(export_program, "output", output)
    out = Path(models).parent / "model.pt2"
    assert cli.main(["export", f"{models}:build", "--out", str(out)]) == 1
    assert capsys.readouterr().err.endswith("OSError: in the model\n")
    assert not list(out.parent.glob("*pt2*"))


@pytest.mark.parametrize(
    "function, more, words",
    [
        ("build", ["--out", "model.xyz"], "the known formats: .pt2 (torch.export), .onnx"),
        ("build", ["--out", "absent/model.pt2"], "there is no folder 'absent'"),
        ("function", [], "the model is a function; torch.export takes a torch.nn.Module"),
        ("build", ["--dynamic", "1:0"], "--dynamic 1:0; the inputs are x"),
        ("build", ["--dynamic", "y:0"], "--dynamic y:0; the inputs are x"),
        ("build", ["--dynamic", "x:4"], "the input 'x' has shape (1, 2, 70, 16)"),
        ("with_keywords", ["--dynamic", "causal:0"], "the input 'causal' is a bool, not a tensor"),
        ("build", ["--policy", "{steps}"], "has recipes by timestep (int8_int8/exact)"),
        ("build", ["--precision", "int4_fp8", "--fallback", "error"], "no int4_fp8 kernel"),
    ],
    ids=str,
)
def test_errors_are_one_sentence(
    models: str, function: str, more: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(models).parent
    steps = write_policy(folder / "steps.json", ("int8_int8", "exact"))
    out = str(folder / "model.pt2")
    given = [each.format(steps=steps) for each in more]
    assert words in error_of(["export", f"{models}:{function}", "--out", out, *given], capsys)
    assert not Path(out).exists()


def test_a_size_that_the_model_fixes(models: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = Path(models)
    file.write_text(f"{file.read_text()}\nModel.forward = lambda self, x: x + torch.ones(70, 16)\n")
    out = str(file.parent / "model.pt2")
    arguments = ["export", f"{models}:build", "--out", out, "--dynamic", "x:2"]
    assert "the model fixes a size that should vary" in error_of(arguments, capsys)


def test_an_onnx_file(models: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = Path(models).parent / "model.onnx"
    arguments = ["export", f"{models}:with_keywords", "--out", str(out), "--precision", "int8_int8"]
    assert cli.main([*arguments, "--dynamic", "0:2"]) == 0
    output = capsys.readouterr().out
    assert "1 rewritten, 0 kept" in output
    assert f"written and checked: {out}, {out.stat().st_size} bytes" in output
    assert "its output in ONNX Runtime is that of the model but for 0.0" in output
    session = sage.onnx_session(out)
    assert session.get_inputs()[0].shape == [1, 2, "x_2", 16]
    x = torch.randn(1, 2, 33, 16)
    (found,) = session.run(None, {"x": x.numpy()})
    exact = torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
    assert cosine(torch.from_numpy(found), exact) > 0.999

    assert cli.main(["onnx", "inspect", str(out)]) == 0
    output = capsys.readouterr().out
    assert "(root)#0  int8_int8  (1, 2, x_2, 16)  (1, 2, x_2, 16)  causal" in output
    assert "without the library:\n  int8_int8: int8_int8 in standard operators (1 node)" in output


def test_an_onnx_file_for_programs(models: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = Path(models).parent / "model.onnx"
    policy = write_policy(out.parent / "policy.json")
    arguments = ["export", f"{models}:build", "--out", str(out), "--json", "--policy", policy]
    assert cli.main([*arguments, "--opset", "22", "--standalone", "custom"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["file"] == str(out) and data["bytes"] == out.stat().st_size
    assert 0 < data["rel_l1"] < 0.02
    assert cli.main(["onnx", "inspect", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["opset"] == 22 and found["functions"] == []
    (node,) = found["nodes"]
    assert (node["name"], node["recipe"]) == ("(root)#0", "int8_int8")
    assert node["serves"] == {
        "without the library": "nothing: the file has no function for it",
        "CPU": "int8_int8",
        "CUDA": "int8_fp16",
    }
    assert found["policy"]["layers"] and found["report"]["rewritten"] == 1


@pytest.mark.parametrize(
    "more, words",
    [
        (["--min-seq-len", "0"], "--min-seq-len is about kernels on this machine"),
        (["--fallback", "error"], "--fallback is about kernels on this machine"),
        (["--opset", "7"], "--opset 7; it must be an integer from 20"),
        (["--dynamic", "x:9=length"], "--dynamic x:9=length; the input 'x' has shape"),
        (["--dynamic", "x:0"], "--dynamic x:0; that size of the input 'x' is 1"),
        (["--policy", "{steps}"], "has recipes by timestep (int8_int8/exact)"),
    ],
    ids=str,
)
def test_errors_of_onnx_are_one_sentence(
    models: str, more: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(models).parent
    steps = write_policy(folder / "steps.json", ("int8_int8", "exact"))
    out = str(folder / "model.onnx")
    given = [each.format(steps=steps) for each in more]
    assert words in error_of(["export", f"{models}:build", "--out", out, *given], capsys)
    assert not Path(out).exists()


@pytest.mark.parametrize(
    "more", [["--opset", "21"], ["--standalone", "custom"], ["--source-paths"]]
)
def test_options_of_onnx_for_another_format(
    models: str, more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(Path(models).parent / "model.pt2")
    said = error_of(["export", f"{models}:build", "--out", out, *more], capsys)
    assert f"{more[0]} is for .onnx, not .pt2" in said


def test_names_of_sizes_for_another_format(models: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(Path(models).parent / "model.pt2")
    arguments = ["export", f"{models}:build", "--out", out, "--dynamic", "x:2=length"]
    assert "only .onnx has names of sizes: leave =length out" in error_of(arguments, capsys)


def test_an_onnx_file_that_computes_something_else_is_not_kept(
    models: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(*_: Any) -> list[Any]:
        return [torch.ones(1, 2, 70, 16)]

    monkeypatch.setattr(export_onnx, "output", other)
    out = Path(models).parent / "model.onnx"
    said = error_of(["export", f"{models}:build", "--out", str(out)], capsys)
    assert "the file does not give the output of the model: they differ by" in said
    assert not list(out.parent.glob("*onnx*"))
