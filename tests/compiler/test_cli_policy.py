"""The commands ``sagec policy`` and ``sagec calibrate``."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sage_compiler import cli
from sage_compiler.commands import calibrate
from sage_compiler.errors import InvalidOptionError
from sage_compiler.policy import LayerPolicy, Policy
from tests.compiler.commands import FINGERPRINT, LAYER, error_of, write_models, write_policy


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "path", list(sys.path))
    return write_models(tmp_path)


# --- show -----------------------------------------------------------------------------------


@pytest.fixture
def two_layers(tmp_path: Path) -> str:
    layers = {
        name: LayerPolicy(fingerprints=(FINGERPRINT,), recipes=(recipe,))
        for name, recipe in (("blocks.0#0", "int8_int8"), ("blocks.1#0", "exact"))
    }
    Policy(layers, target="cpu").save(tmp_path / "two.json")
    return str(tmp_path / "two.json")


def test_show(two_layers: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["policy", "show", two_layers]) == 0
    assert capsys.readouterr().out == f"{Policy.load(two_layers)}\n"
    assert cli.main(["policy", "show", two_layers, "--json"]) == 0
    shown = Policy.from_dict(json.loads(capsys.readouterr().out))
    assert shown == Policy.load(two_layers)


def test_show_some_layers(two_layers: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["policy", "show", two_layers, "--layer", "*.1*"]) == 0
    output = capsys.readouterr().out
    assert "blocks.1#0" in output and "blocks.0#0" not in output
    said = error_of(["policy", "show", two_layers, "--layer", "heads*"], capsys)
    assert "matches 'heads*'; it has 2 layers" in said


def test_a_file_that_is_no_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "p.json"
    assert "cannot be read: No such file" in error_of(["policy", "show", str(file)], capsys)
    file.write_text("{")
    assert "not JSON" in error_of(["policy", "show", str(file)], capsys)


# --- diff -----------------------------------------------------------------------------------


def test_diff_answers_as_diff(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write_policy(tmp_path / "a.json")
    b = write_policy(tmp_path / "b.json", "exact")
    assert cli.main(["policy", "diff", a, a]) == 0
    assert capsys.readouterr().out == "no differences\n"
    assert cli.main(["policy", "diff", a, b]) == 1
    assert capsys.readouterr().out == f"{LAYER}: int8_int8 -> exact (as the test says)\n"
    assert cli.main(["policy", "diff", a, b, "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)["differences"]) == 1
    absent = str(tmp_path / "absent.json")
    assert "absent.json" in error_of(["policy", "diff", a, absent], capsys, code=2)


# --- check ----------------------------------------------------------------------------------


def test_check(models: str, capsys: pytest.CaptureFixture[str]) -> None:
    policy = write_policy(Path(models).parent / "policy.json")
    assert cli.main(["policy", "check", policy, f"{models}:build"]) == 0
    assert capsys.readouterr().out == "the policy fits: 1 layer\n"
    assert cli.main(["policy", "check", policy, f"{models}:with_keywords"]) == 1
    assert capsys.readouterr().out == (
        f"{LAYER} is q2 kv2 d16 dv16 causal; in the policy it is {FINGERPRINT}\n"
    )
    assert cli.main(["policy", "check", policy, f"{models}:function", "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == {
        "differences": [f"{LAYER} is in the policy, and not in the model"]
    }
    absent = ["policy", "check", policy, f"{models}:absent"]
    assert "no function 'absent'" in error_of(absent, capsys, code=2)
    assert cli.main(["policy", "check", policy, f"{models}:broken"]) == 2  # 1 is an answer
    assert capsys.readouterr().err.endswith("LookupError: in the user's code\n")


# --- calibrate ------------------------------------------------------------------------------


class Calibrator:
    """Stands for ``sage.calibrate``: remembers the call, and answers with a policy."""

    def __call__(self, model: Any, inputs: Any, **options: Any) -> Policy:
        if "speed" in options["budget"]:
            raise InvalidOptionError("unknown metric 'speed'")
        self.inputs, self.options = list(inputs), options
        layer = LayerPolicy(fingerprints=(FINGERPRINT,), recipes=("int8_int8",))
        return Policy({LAYER: layer}, target="cpu")


@pytest.fixture
def calibrator(monkeypatch: pytest.MonkeyPatch) -> Calibrator:
    stub = Calibrator()
    monkeypatch.setattr(calibrate, "calibrate", stub)
    return stub


def test_calibrate(models: str, calibrator: Calibrator, capsys: pytest.CaptureFixture[str]) -> None:
    out = Path(models).parent / "policy.json"
    start = ["calibrate", f"{models}:build", "--out", str(out), "--budget", "cosine=0.998"]
    assert cli.main(start) == 0
    policy = Policy.load(out)
    assert capsys.readouterr().out == f"{policy}\nwritten: {out}\n"
    assert calibrator.options == {"budget": {"cosine": 0.998}, "progress": True}
    (((only,), named),) = calibrator.inputs
    assert isinstance(only, Tensor) and only.shape == (1, 2, 70, 16) and named == {}

    more = "--candidates int8_int8,exact --target sm_89 --timestep-ranges 2 --margin 0.8 --heads 3"
    more += " --queries 64 --budget output_rel_l1=1e-2"
    assert cli.main([*start, *more.split(), "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    assert calibrator.options == {
        "budget": {"cosine": 0.998, "output_rel_l1": 0.01},
        "candidates": ("int8_int8", "exact"),
        "target": "sm_89",
        "timestep_ranges": 2,
        "margin": 0.8,
        "heads": 3,
        "queries": 64,
        "progress": False,
    }
    assert cli.main([*start, "--json"]) == 0
    assert Policy.from_dict(json.loads(capsys.readouterr().out)) == policy


def test_a_real_calibration(models: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = Path(models).parent / "policy.json"
    start = ["calibrate", f"{models}:build", "--out", str(out), "--budget", "cosine=0.9"]
    assert cli.main([*start, "--inputs", "inputs", "--candidates", "int8_int8", "--json"]) == 0
    policy = Policy.from_dict(json.loads(capsys.readouterr().out))
    assert policy == Policy.load(out)
    assert list(policy.layers) == [LAYER] and policy.calibration.inputs == 2


def test_inputs_of_calibration(models: str, calibrator: Calibrator) -> None:
    out = str(Path(models).parent / "policy.json")

    def inputs_of(function: str, *more: str) -> list[Any]:
        start = ["calibrate", f"{models}:{function}", "--out", out, "--budget", "rmse=1", "--quiet"]
        assert cli.main([*start, *more]) == 0
        return calibrator.inputs

    ((args, kwargs),) = inputs_of("with_keywords")
    assert len(args) == 1 and kwargs == {"causal": True}
    first, second = inputs_of("build", "--inputs", "inputs")
    assert isinstance(first, tuple) and torch.equal(second["x"], torch.ones(1, 2, 70, 16))


@pytest.mark.parametrize(
    "function, more, words",
    [
        ("build", ["--budget", "cosine=0.9"], "--budget has 'cosine' twice"),
        ("build", ["--budget", "speed=2"], "unknown metric 'speed'"),
        ("build", ["--inputs", "absent"], "no function 'absent'"),
        ("build", ["--inputs", "needy"], "needy() needs arguments (x, size)"),
        ("build", ["--out", "absent/p.json"], "there is no folder 'absent' to write 'p.json' to"),
    ],
    ids=str,
)
def test_errors_of_calibrate(
    models: str,
    calibrator: Calibrator,
    function: str,
    more: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = str(Path(models).parent / "policy.json")
    start = ["calibrate", f"{models}:{function}", "--out", out, "--budget", "cosine=0.998"]
    assert words in error_of([*start, *more], capsys)
    assert not Path(out).exists()
