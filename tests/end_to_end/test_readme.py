"""The README's Python, by copy and paste, in one process from top to bottom."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from sage_compiler.cli import parser

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_the_tour_runs_and_prints_what_it_says(tmp_path: Path) -> None:
    blocks = BLOCK.findall((ROOT / "README.md").read_text())
    # The first block is the one line that the page opens with; it has no model.
    tour = [code for language, code in blocks if language == "python"][1:]
    assert len(tour) == 8
    script = tmp_path / "tour.py"
    script.write_text("\n".join(tour))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    first, second = [code for language, code in blocks if language == "text"]
    assert done.stdout.startswith(first)
    # The last line names the kernel, which the machine decides.
    assert second.rpartition("  recipe ")[0] in done.stdout
    assert done.stdout.endswith("['0#0', '1#0', '2#0']\n")
    assert "2 rewritten; []" in done.stdout
    assert "sage.attention.default" in done.stdout
    assert "PackedKV(123 of 4096 tokens" in done.stdout
    assert (tmp_path / "report.json").is_file()
    assert "policy for sm_89: 2 layers" in done.stdout
    assert "<html" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "model.onnx").is_file()


def test_the_page_about_onnx_runs(tmp_path: Path) -> None:
    blocks = BLOCK.findall((ROOT / "docs/onnx.md").read_text())
    script = tmp_path / "page.py"
    script.write_text("\n".join(code for language, code in blocks if language == "python"))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert "2 rewritten, 0 kept" in done.stdout


def test_the_commands_run() -> None:
    blocks = BLOCK.findall((ROOT / "README.md").read_text())
    lines = [line for language, code in blocks if language == "sh" for line in code.splitlines()]
    commands = [
        shlex.split(line, comments=True)[1:]
        for line in lines
        if line.startswith(".venv/bin/sagec ")
    ]
    explains = [command for command in commands if command[0] == "explain"]
    assert len(explains) == 2
    for command in explains:
        done = subprocess.run(
            [sys.executable, "-m", "sage_compiler.cli", *command],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        assert done.returncode == 0, done.stderr
        assert "layer" in done.stdout
    # Those of kernels compile for minutes; here, that they are commands. Other tests run the rest.
    kernels = [command for command in commands if command[0] == "kernels"]
    assert [command[1] for command in kernels] == ["build", "check", "list", "cost", "explain"]
    others = [command for command in commands if command[0] not in ("explain", "kernels")]
    assert [command[0] for command in others] == ["calibrate", "policy", "export", "onnx"]
    for command in others:
        parser().parse_args(command)
    for command in kernels:
        parser().parse_args(command)
