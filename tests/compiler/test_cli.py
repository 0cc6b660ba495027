"""The command ``sagec``: parsing, models, errors, ``explain``."""

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sage_compiler import cli
from sage_compiler.report import GraphPair, Report
from tests.compiler.commands import FINGERPRINT, LAYER, error_of, write_models, write_policy

SAGEC = Path(sys.executable).parent / "sagec"


@pytest.fixture
def models(tmp_path: Path) -> str:
    return write_models(tmp_path)


@pytest.fixture(autouse=True)
def path_of_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))


# --- the command as a whole -----------------------------------------------------------------


def every_command(
    parser: argparse.ArgumentParser, words: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    """The commands that run something, and their parsers."""
    groups = [each for each in parser._actions if isinstance(each, argparse._SubParsersAction)]
    for group in groups:
        for name, command in group.choices.items():
            yield from every_command(command, (*words, name))
    if not groups:
        yield words, parser


COMMANDS = dict(every_command(cli.parser()))


def test_the_commands() -> None:
    assert [" ".join(words) for words in COMMANDS] == [
        "explain",
        "calibrate",
        "policy show",
        "policy diff",
        "policy check",
        "export",
        "onnx inspect",
        "bench",
        "kernels explain",
        "kernels cost",
        "kernels check",
        "kernels build",
        "kernels list",
        "completion",
    ]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_shows_an_example_and_exit_codes(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main([*words, "--help"])
    assert error.value.code == 0
    output = capsys.readouterr().out
    assert f"    sagec {' '.join(words)}" in output
    assert "exit codes: 0 " in output
    assert "--json" in output or words == ("completion",)


@pytest.mark.parametrize("words", [(), ("policy",), ("kernels",)], ids=" ".join)
def test_help_of_many_commands_shows_an_example(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main([*words, "--help"])
    (example,) = re.findall(r"^    (sagec .*)$", capsys.readouterr().out, re.MULTILINE)
    cli.parser().parse_args(example.split()[1:])


def test_help_names_the_default_of_what_can_be_left_out() -> None:
    silent = {
        f"{' '.join(words)} {action.option_strings[0]}"
        for words, command in COMMANDS.items()
        for action in command._actions
        if action.option_strings
        and action.nargs != 0  # no flag
        and not action.required
        and "default" not in str(action.help)
    }
    # Without these, something is left out, not chosen.
    assert silent == {
        "explain --html",
        "explain --graphs",
        "explain --policy",
        "policy show --layer",
        "export --dynamic",
        "export --policy",
        "bench --policy",
        "kernels explain --sequences",
        "kernels explain --rotary",
        "kernels cost --write",
    }


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_the_examples_of_the_help_are_commands(words: tuple[str, ...]) -> None:
    description = COMMANDS[words].description
    assert description is not None
    lines = [line.strip() for line in description.splitlines()]
    examples = [line for line in lines if line.startswith("sagec ")]
    for line in examples:
        cli.parser().parse_args(line.partition(" > ")[0].replace('"', "").split()[1:])


def test_the_commands_of_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs" / "command-line.md").read_text()
    blocks = re.findall(r"^```sh\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("sagec ")]
    for line in lines:
        cli.parser().parse_args(line.partition(" > ")[0].split()[1:])
    shown = {line.split()[1] for line in lines}
    assert shown == {words[0] for words in COMMANDS}


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main(["--version"])
    assert error.value.code == 0
    version = importlib.metadata.version("sage-compiler")
    assert capsys.readouterr().out.startswith(f"sagec {version}, torch ")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["explain"],
        ["explain", "a.py:b", "--precision", "int3"],
        ["explain", "a.py:b", "--fallback", "x"],
        ["policy"],
        ["policy", "diff", "a.json"],
        ["calibrate", "a.py:b", "--out", "p.json"],
        ["calibrate", "a.py:b", "--out", "p.json", "--budget", "cosine"],
        ["calibrate", "a.py:b", "--out", "p.json", "--budget", "cosine=high"],
        ["export", "a.py:b"],
        ["export", "a.py:b", "--out", "m.pt2", "--dynamic", "0"],
        ["bench", "a.py:b", "--rounds", "many"],
        ["completion", "cmd"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main(arguments)
    assert error.value.code == 2
    assert "usage: sagec" in capsys.readouterr().err


def test_an_interrupt_is_no_traceback(models: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert error_of(["explain", f"{models}:interrupted"], capsys, code=130) == (
        "sagec: interrupted\n"
    )


def test_a_reader_that_goes_away_is_no_error_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = write_policy(tmp_path / "policy.json")
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        assert cli.main(["policy", "show", policy]) == 1
    assert capsys.readouterr().err == ""


# --- naming models --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model, words",
    [
        ("nothing.py:build", "there is no file 'nothing.py'"),
        ("folder/nothing:build", "there is no file 'folder/nothing'"),
        ("{folder}/notes.txt:build", "is not a Python file"),
        ("model.py", "not of the form FILE.py:FUNCTION or MODULE:FUNCTION"),
        (":build", "not of the form"),
        ("{models}:", "not of the form"),
        ("not-a-module:build", "neither a file nor the name of a module"),
        ("absent_package.models:build", "there is no module 'absent_package'"),
        ("json.absent:build", "there is no module 'json.absent'"),
        ("json:absent", "'json' has no function 'absent'"),
        ("{models}:absent", "no function 'absent'"),
        ("{models}:number", "no function 'number'"),
        ("{models}:needy", "needy() needs arguments (x, size); it must take none"),
        ("{models}:wrong", "must return (model, args)"),
    ],
)
def test_a_model_that_is_not_there(
    models: str, model: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(models).parent
    (folder / "notes.txt").write_text("no code\n")
    assert words in error_of(["explain", model.format(models=models, folder=folder)], capsys)


def test_what_the_users_code_raises_keeps_its_traceback(
    models: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["explain", f"{models}:broken"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("Traceback") and "in broken\n" in said
    assert said.endswith("LookupError: in the user's code\n")
    Path(models).write_text("import a_module_that_is_missing\n")
    assert cli.main(["explain", f"{models}:build"]) == 1
    assert "ModuleNotFoundError: No module named 'a_mod" in capsys.readouterr().err


def test_a_module_of_the_current_directory(
    models: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(models).parent
    (folder / "a_package").mkdir()
    (folder / "a_package" / "code.py").write_text("from models import build\n")
    (folder / "a_package" / "user.py").write_text("import a_module_that_is_missing\n")
    monkeypatch.chdir(folder)
    monkeypatch.delitem(sys.modules, "models", raising=False)
    assert cli.main(["explain", "a_package.code:build"]) == 0
    assert "1 attention site" in capsys.readouterr().out
    assert cli.main(["explain", "a_package.user:build"]) == 1
    assert "ModuleNotFoundError: No module named 'a_mod" in capsys.readouterr().err


# --- explain --------------------------------------------------------------------------------


def test_text(models: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", f"{models}:build", "--precision", "int8_fp8"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("sage: 1 attention site in 1 graph: 1 rewritten, 0 kept")
    assert "emulated" in output


def test_json(models: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["explain", f"{models}:with_keywords", "--precision", "exact", "--json"]
    assert cli.main(arguments) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["sites"][0]["mask"] == "causal"
    assert data["sites"][0]["decision"] == "rewrite"


def test_options_reach_the_decision(models: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["explain", f"{models}:build", "--precision", "int4_fp8", "--fallback", "sdpa"]
    assert cli.main(arguments) == 0
    assert "fallback='sdpa'" in capsys.readouterr().out


def test_a_policy_reaches_the_decision(models: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(models).parent
    fits = write_policy(folder / "fits.json")
    assert cli.main(["explain", f"{models}:build", "--policy", fits, "--min-seq-len", "0"]) == 0
    assert "policy: as the test says" in capsys.readouterr().out
    other = write_policy(folder / "other.json", fingerprint="q8 kv8 d64 dv64 none")
    explain = ["explain", f"{models}:build", "--policy", other]
    assert cli.main(explain) == 1
    said = capsys.readouterr().err
    assert f"{LAYER} is q2 kv2" in said
    assert "what fits with --no-strict-policy" in said
    assert cli.main([*explain, "--no-strict-policy"]) == 0
    assert "strict_policy=False" in capsys.readouterr().out


def test_few_of_many_differences_are_listed(
    models: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = Path(models)
    deep = "def deep(self, x):\n    for _ in range(8):\n        x = once(self, x)\n    return x\n"
    file.write_text(f"{file.read_text()}\nonce = Model.forward\n{deep}\nModel.forward = deep\n")
    policy = write_policy(file.parent / "policy.json")
    assert cli.main(["explain", f"{models}:build", "--policy", policy]) == 1
    heading, *differences, more, advice = capsys.readouterr().err.splitlines()
    assert heading.endswith("7 differences:")
    assert differences == [
        f"  - (root)#{at} ({FINGERPRINT}) is not in the policy; close to it is '{LAYER}'"
        for at in range(1, 6)
    ]
    assert more == "  ... and 2 more; sagec policy check lists all"
    assert advice.startswith("calibrate this model")


def test_pages_and_graphs(
    models: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def to_html(report: Report, path: Path) -> None:
        path.write_text(f"<p>{report!r}")

    def to_svg(pair: GraphPair, path: Path, which: str = "after") -> None:
        path.write_text(f"<svg>{which}")

    monkeypatch.setattr(Report, "to_html", to_html, raising=False)
    monkeypatch.setattr(GraphPair, "to_svg", to_svg, raising=False)
    folder = Path(models).parent
    page, graphs = folder / "report.html", folder / "deep" / "graphs"
    arguments = ["explain", f"{models}:build", "--precision", "exact"]
    assert cli.main([*arguments, "--html", str(page), "--graphs", str(graphs)]) == 0
    assert page.read_text() == "<p>Report(1 rewritten, 0 kept)"
    assert (graphs / "graph0.before.svg").read_text() == "<svg>before"
    assert (graphs / "graph0.after.svg").read_text() == "<svg>after"
    assert "torch.ops.sage.attention" in (graphs / "graph0.after.py").read_text()
    assert len(list(graphs.iterdir())) == 3


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--precision", "int4_fp8", "--fallback", "error"], "no int4_fp8 kernel"),
        (["--min-seq-len", "-2"], "--min-seq-len -2; it must be an integer of at least 0"),
        (["--precision", "int8_int8", "--min-seq-len", "9"], "9 with --precision int8_int8; the"),
        (["--policy", "absent.json"], "absent.json: cannot be read: No such file"),
        (
            ["--policy", "absent.json", "--precision", "exact"],
            "a policy with --precision exact; the policy chooses the precision",
        ),
        (["--html", "absent/report.html"], "there is no folder 'absent' to write 'report.html' to"),
        (["--html", "."], "'.' is a folder"),
        (["--html", "/proc/report.html"], "cannot write '/proc/report.html': No such file or dir"),
        (["--html", "/dev/full"], "cannot write '/dev/full': No space left on device"),
        (["--graphs", __file__], "cannot make the folder"),
        (["--graphs", "/proc/self/fdinfo"], "cannot write '/proc/self/fdinfo/graph0.before.svg': "),
    ],
    ids=str,
)
def test_errors_are_one_sentence(
    models: str, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in error_of(["explain", f"{models}:build", *arguments], capsys)


# --- the installed command ------------------------------------------------------------------


def test_the_installed_command(models: str) -> None:
    result = subprocess.run(
        [SAGEC, "explain", f"{models}:build", "--json"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["kept"] == 1
