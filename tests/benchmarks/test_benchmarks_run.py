"""The benchmarks run, on a tiny cell, and compute what their words say."""

import json

import pytest
import torch
import torch.nn.functional as F
from numpy.testing import assert_allclose
from onnxruntime import InferenceSession

from benchmarks import budgets, calibration, deal, kernels, onnx, onnx_nodes
from benchmarks.architectures import transformer
from benchmarks.cells import MASKS, Cell, accuracy, make_inputs, sage_call, sdpa_call
from benchmarks.measure import Spread, added, interleave_for, ratio
from benchmarks.presets import PRESETS, passed


def test_a_cell_is_measured_and_written(tmp_path):
    command = "--length 16 --mask causal --precision auto --dtype float32 --seconds 0.01 --no-plot"
    assert kernels.main([*command.split(), "--folder", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "kernels-custom.json").read_text())
    assert written["machine"].keys() >= {"cpu", "cores", "flags", "torch", "sage_isa", "date"}
    (row,) = written["rows"]
    assert row.keys() >= {"q_len", "kernel", "sdpa_us", "us", "ratio", "ratio_p10", "vs_float32"}
    assert row["cosine"] > 0.999 and row["rel_l1"] < 0.02


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kv_heads", (1, 4))
def test_accuracy_compares_the_same_attention(mask, kv_heads):
    cell = Cell(90, 70, 16, mask, batch=2, heads=4, kv_heads=kv_heads)
    inputs = make_inputs(cell)
    outputs = {"sdpa": sdpa_call(cell, inputs)(), "ours": sage_call(cell, inputs, "exact")()}
    outputs["wrong"] = outputs["sdpa"].roll(1, dims=2)
    found = accuracy(cell, inputs, outputs)
    assert found["sdpa"][1] < 1e-5 and found["ours"][1] < 1e-5
    assert found["wrong"][1] > 1e-3


def test_ratios_and_differences_go_round_by_round():
    samples = {"theirs": [10.0, 20.0, 30.0], "ours": [5.0, 5.0, 5.0]}
    assert ratio(samples, "theirs", "ours").median == 4.0
    assert added(samples, "theirs", "ours").median == -15.0
    assert Spread.of([float(i) for i in range(11)]) == Spread(5.0, 1.0, 9.0)


def test_candidates_take_turns_as_often_as_each_other():
    calls = []
    candidates = {name: lambda name=name: calls.append(name) for name in "ab"}
    samples = interleave_for(candidates, seconds=0.0, least_rounds=3)
    assert [len(found) for found in samples.values()] == [3, 3]
    assert calls.count("a") == calls.count("b")


def test_causal_counts_the_visible_pairs():
    for q_len, kv_len in ((5, 5), (3, 7), (7, 3)):
        visible = int(torch.ones(q_len, kv_len).tril().sum())
        cell = Cell(q_len, kv_len, 8, "causal", heads=1, kv_heads=1)
        assert cell.flops() == 4 * visible * 8


def test_never_slower_is_a_ratio_or_a_sum():
    assert passed({"sdpa_us": 1000.0, "ratio": 0.98, "added_us": 20.0})
    assert not passed({"sdpa_us": 1000.0, "ratio": 0.96, "added_us": 40.0})
    assert passed({"sdpa_us": 10.0, "ratio": 0.6, "added_us": 7.0})
    assert not passed({"sdpa_us": 10.0, "ratio": 0.5, "added_us": 9.0})


def test_no_preset_times_a_cell_twice():
    for preset in PRESETS.values():
        assert len(set(preset.cells)) == len(preset.cells)


def test_a_transformer_depends_on_its_condition():
    model, arguments = transformer(32, 2, 2, 9, adaptive=True)
    with torch.no_grad():
        output = model(**arguments)
        other = model(arguments["x"], -arguments["condition"])
    assert output.shape == (1, 9, 32)
    assert F.cosine_similarity(output.flatten(), other.flatten(), dim=0) < 0.99


def test_a_budget_is_kept_on_other_inputs():
    row = budgets.case(budgets.subject(2), 0.008)
    assert row["promised"] and row["holds"]
    assert 0 < row["held_out_worst"] <= 0.008
    assert "int4_fp8" in row["recipes"]


def test_the_cost_of_a_calibration_is_counted_in_runs():
    model, inputs = calibration.model_and_inputs(64, 1, 64)
    row = calibration.measure(
        model, inputs, "output", target="sm_89", candidates=("int8_fp8",), heads=1, queries=1
    )
    assert row["runs"] > 1 and row["subset"] == "1 heads, 1 queries"
    assert row["parts_s"].keys() >= {"exact", "int8_fp8", "comparing", "measuring", "searching"}


def test_files_of_onnx_are_timed_and_compared():
    (row,) = onnx.measure(onnx.vision(64, 2, 1, 66, adaptive=True), "int8_int8", 1, 0.01)
    assert row["tokens"] == 66 and row["ratio"] > 0 and row["ratio_opset_23"] > 0
    assert row["microseconds"].keys() == row["cosine"].keys() == row["rel_l1"].keys()
    assert row["rel_l1"][onnx.STOCK] < 1e-5 < row["rel_l1"][onnx.LIBRARY] < 0.02
    assert row["least_cosine"] > 0.999
    assert 0 < row["attention_share"][onnx.LIBRARY] < 1


def test_single_nodes_of_onnx_are_timed():
    cell = onnx_nodes.Cell(1, 2, 5, 7, 16, True)
    candidates = {onnx_nodes.CHAIN: (None, False), "auto": ("auto", True)}
    row = onnx_nodes.time_cell(cell, candidates, 1, 0.01)
    assert row["us"].keys() == candidates.keys() and row["ratio"]["auto"] > 0
    given, found = onnx_nodes.inputs_of(cell), []
    for recipe in (None, "exact"):
        session = InferenceSession(onnx_nodes.model(cell, recipe))
        found.append(session.run(None, given)[0])
    assert_allclose(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_a_deal_gives_each_task_to_one_block():
    work = deal.Work(2, 5, 700, causal=True, padded=True)
    times = deal.tasks(work)
    assert len(times) == 2 * 5 * 6
    for give in deal.DEALS.values():
        assert sum(give(times, 7)) == sum(times)
    assert deal.in_turns([5, 3, 2, 1], 2) == [7, 4]
    assert deal.back_and_forth([5, 3, 2, 1], 2) == [6, 5]
    assert sorted(deal.by_counter([5, 3, 2, 1], 2)) == [5, 6]
    even = deal.Work(1, 132, 128)
    assert {deal.imbalance(even, name) for name in deal.DEALS} == {1.0}
