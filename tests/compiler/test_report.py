"""The report says the same in text, JSON and attributes."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sage_compiler as sage
from sage_compiler.report import Report, Site
from tests.capture import rewritten


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Attention(), Attention()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)


@pytest.fixture(scope="module")
def report() -> Report:
    return rewritten(Model(), torch.randn(1, 2, 6, 8), precision="exact")[1]


def test_attributes(report: Report) -> None:
    assert [site.layer for site in report.sites] == ["layers.0#0", "layers.1#0", "(root)#0"]
    assert len(report.rewritten) == 2 and len(report.kept) == 1
    site = report.rewritten[0]
    assert site == Site(
        layer="layers.0#0",
        fingerprint="q2 kv2 d8 dv8 causal",
        form="sdpa",
        q_shape=(1, 2, 6, 8),
        kv_shape=(1, 2, 6, 8),
        heads="2",
        mask="causal",
        proof="is_causal=True: top-left by definition",
        recipe="exact",
        decision="rewrite",
        reason="precision='exact': the unquantized operator",
        source=site.source,
    )
    assert Path(__file__).name in site.source and "is_causal=True" in site.source
    kept = report.kept[0]
    assert kept.recipe == kept.fingerprint == "" and "dropout_p=0.5" in kept.reason
    assert "dropout_p=0.5" in kept.source


def test_graphs_before_and_after(report: Report) -> None:
    (pair,) = report.graphs
    before = [node.target for node in pair.before.graph.nodes if node.op == "call_function"]
    after = [node.target for node in pair.after.graph.nodes if node.op == "call_function"]
    assert torch.ops.sage.attention.default not in before
    assert after.count(torch.ops.sage.attention.default) == 2
    x = torch.randn(1, 2, 6, 8)
    torch.manual_seed(0)
    expected = pair.before(x)[0]
    torch.manual_seed(0)
    torch.testing.assert_close(pair.after(x)[0], expected, rtol=0, atol=1e-5)


def test_text(report: Report) -> None:
    text = str(report)
    assert text.startswith("sage: 3 attention sites in 1 graph: 2 rewritten, 1 kept")
    for words in ("layers.1#0", "(1, 2, 6, 8)", "causal", "exact", "dropout_p=0.5"):
        assert words in text
    assert repr(report) == "Report(2 rewritten, 1 kept)"
    assert str(Report()) == "sage: 0 attention sites in 0 graphs: 0 rewritten, 0 kept"


def test_json(report: Report, tmp_path: Path) -> None:
    report.to_json(tmp_path / "report.json")
    data = json.loads((tmp_path / "report.json").read_text())
    assert (data["version"], data["graphs"], data["rewritten"], data["kept"]) == (1, 1, 2, 1)
    assert data["sites"][0]["layer"] == "layers.0#0"
    assert data["sites"][0]["fingerprint"] == "q2 kv2 d8 dv8 causal"
    assert data["sites"][0]["q_shape"] == [1, 2, 6, 8]
    assert data == json.loads(json.dumps(report.to_dict()))


def test_public_name() -> None:
    assert sage.Report is Report


def test_kept_sites_with_one_reason_are_told_once() -> None:
    text = str(
        rewritten(Model(), torch.randn(1, 2, 6, 8), fallback="sdpa", precision="int8_fp8")[1]
    )
    assert text.count("no int8_fp8 kernel for device 'cpu'; fallback='sdpa'") == 1
    assert "kept, 2 sites (sdpa):" in text
    assert "  - layers.0#0 (1, 2, 6, 8)\n  - layers.1#0 (1, 2, 6, 8)\n" in text
