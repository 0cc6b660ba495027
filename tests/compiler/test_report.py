"""The report says the same in text, JSON and attributes."""

import json
from dataclasses import replace
from math import inf, nan
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sage_compiler as sage
from sage_compiler.metrics import Errors
from sage_compiler.policy import Calibration, EndToEnd, LayerPolicy, Policy
from sage_compiler.report import Report, Site
from tests.capture import rewritten
from tests.compiler.sites import site


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
    assert (data["version"], data["graphs"], data["rewritten"], data["kept"]) == (2, 1, 2, 1)
    assert data["sites"][0]["layer"] == "layers.0#0"
    assert data["sites"][0]["fingerprint"] == "q2 kv2 d8 dv8 causal"
    assert data["sites"][0]["q_shape"] == [1, 2, 6, 8]
    assert data["policies"] == []
    assert data == json.loads(json.dumps(report.to_dict()))


@pytest.fixture(scope="module")
def judged() -> Report:
    """Two layers by a policy, one of them with an error that is no number."""
    errors = Errors(0.9995, 0.03125, 0.1, 0.9, 0.2, 0.9996, 0.02)
    broken = replace(errors, cosine=-1.0, rel_l1=inf)
    layers = {
        f"layers.{at}#0": LayerPolicy(
            ("q2 kv2 d8 dv8 causal",),
            ("int8_fp8",),
            measured=({"int8_fp8": each},),
            seconds={"exact": 3e-3, "int8_fp8": seconds},
        )
        for at, (each, seconds) in enumerate([(errors, 1e-3), (broken, 2e-3)])
    }
    made = Calibration(
        end_to_end=EndToEnd("output_rel_l1", 0.1, 1.0, inf, False, 3),
        model_seconds={"exact": 5e-3, "policy": 4e-3},
    )
    policy = Policy(layers, target="cpu", calibration=made)
    return rewritten(Model(), torch.randn(1, 2, 6, 8), policy=policy)[1]


def test_text_with_a_policy(judged: Report) -> None:
    text = str(judged)
    assert text.startswith(
        "sage: 3 attention sites in 1 graph: 2 rewritten, 1 kept\n"
        "predicted: attention 2.00 times as fast (6 ms exact, 3 ms by the policy)\n"
        "measured: the model 1.25 times as fast (5 ms exact, 4 ms by the policy)\n"
        "worst error: rel_l1 inf, cosine -1.000000 in layers.1#0\n"
        "output_rel_l1: does NOT hold: inf of at most 0.1 (0.1 with margin 1)\n"
        "rewritten:\n"
    )
    heading, first, second = (line.split() for line in text.splitlines()[6:9])
    assert heading[-5:] == ["recipe", "cosine", "rel_l1", "time", "exact"]
    assert first[-7:] == ["int8_fp8", "0.999500", "0.0312", "1", "ms", "3", "ms"]
    assert second[-7:] == ["int8_fp8", "-1.000000", "inf", "2", "ms", "3", "ms"]


def test_a_policy_without_measurements_adds_empty_columns_only() -> None:
    text = str(Report([site()], [], [Policy({}, target="cpu")]))
    assert "predicted" not in text and "worst" not in text
    assert "recipe    cosine  rel_l1  time  exact\n" in text


def test_json_with_a_policy_has_no_number_that_json_lacks(judged: Report, tmp_path: Path) -> None:
    judged.to_json(tmp_path / "report.json")

    def no_constant(name: str) -> None:
        raise AssertionError(name)

    data = json.loads((tmp_path / "report.json").read_text(), parse_constant=no_constant)
    verdict = str(judged.policies[0].calibration.end_to_end)
    assert data["policies"] == [{"target": "cpu", "verdict": verdict}]
    assert [each["rel_l1"] for each in data["sites"]] == [0.03125, None, None]
    assert [each["seconds"] for each in data["sites"]] == [1e-3, 2e-3, None]
    nan_only = Report([site(cosine=nan, seconds=-inf)]).to_dict()["sites"][0]
    assert nan_only["cosine"] is nan_only["seconds"] is None


def test_long_names_lose_their_middle_in_the_table() -> None:
    name = f"model.{'blocks.' * 20}attention#0"
    text = str(Report([site(layer=name)]))
    assert name not in text and "  model.blocks." in text and ".attention#0  (1, 2, 6, 8)" in text
    assert max(map(len, text.splitlines())) < 140


def test_public_name() -> None:
    assert sage.Report is Report


def test_kept_sites_with_one_reason_are_told_once() -> None:
    text = str(
        rewritten(Model(), torch.randn(1, 2, 6, 8), fallback="sdpa", precision="int8_fp8")[1]
    )
    assert text.count("no int8_fp8 kernel for device 'cpu'; fallback='sdpa'") == 1
    assert "kept, 2 sites (sdpa):" in text
    assert "  - layers.0#0 (1, 2, 6, 8)\n  - layers.1#0 (1, 2, 6, 8)\n" in text
