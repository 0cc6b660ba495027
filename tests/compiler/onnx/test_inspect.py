"""What ``sagec onnx inspect`` finds in a file."""

from __future__ import annotations

import json
import random
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from sage_compiler.errors import UsageError
from sage_compiler.kernels.cpu.gate import GATES
from sage_compiler.kernels.cpu.kernel import need
from sage_compiler.onnx import inspect as inspecting
from sage_compiler.onnx import schema
from sage_compiler.onnx.inspect import WITHOUT_LIBRARY, inspect
from sage_compiler.precision import PRECISIONS
from tests.compiler.calls import gaussian, make_call
from tests.compiler.kernels.dense import Call
from tests.compiler.onnx import bodies


def write(path: Path, recipe: str, call: Call | None = None) -> onnx.ModelProto:
    call = make_call(8, head_dim=16) if call is None else call
    model = bodies.model_of(call, bodies.variant_of(call, recipe), dynamic=False)
    model.graph.node[0].name = "layer#0"
    path.write_bytes(model.SerializeToString())
    return model


@pytest.mark.parametrize("recipe", PRECISIONS)
def test_every_recipe_has_somebody_to_serve_it(recipe: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    write(path, recipe)
    (node,) = inspect(path).nodes
    assert (node.name, node.recipe) == ("layer#0", recipe)
    assert node.query == "(2, 4, 8, 16)" and node.mask == "none"
    plain = "exact attention" if recipe in ("auto", "exact") else recipe
    assert node.serves[WITHOUT_LIBRARY] == f"{plain} in standard operators"
    assert node.serves["CPU"].startswith(
        {
            "auto": "int8_int8 where" if need().isa_name in GATES else "exact attention (this",
            "exact": "exact attention",
            "int8_fp16": "int8_int16",
            "int8_int16": "int8_int16",
        }.get(recipe, "int8_int8")
    )
    assert node.serves["CUDA"] == {
        "auto": "what the device defaults to",
        "exact": "exact attention by the CPU, with copies there and back",
        "int8_int8": "int8_fp16",
        "int8_int16": "int8_fp16",
    }.get(recipe, recipe)


def test_masks_are_told(tmp_path: Path) -> None:
    call = make_call(8, head_dim=16)
    call = Call(call.query, call.key, call.value, attn_mask=gaussian(1, 1, 8, 8, seed=1) > 0)
    write(tmp_path / "model.onnx", "auto", call)
    (node,) = inspect(tmp_path / "model.onnx").nodes
    assert node.mask == "bool (1, 1, 8, 8)"


def test_a_file_of_others(tmp_path: Path) -> None:
    path = tmp_path / "other.onnx"
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
    node = helper.make_node("Identity", ["x"], ["y"])
    other = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
    onnx.save(helper.make_model(helper.make_graph([node], "other", [value], [other])), path)
    found = inspect(path)
    assert (found.nodes, found.functions, found.report, found.policy) == ((), (), None, None)
    assert str(found).startswith("0 nodes of ai.sage::Attention, 0 functions for them; opset")


def test_without_the_library_nothing_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspecting, "_library", lambda: None)
    write(tmp_path / "model.onnx", "int8_int8")
    assert inspect(tmp_path / "model.onnx").nodes[0].serves["CPU"] == "nothing"


def test_a_newer_version_of_the_operator(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    model = write(path, "auto")
    model.opset_import[1].version = 2
    path.write_bytes(model.SerializeToString())
    with pytest.raises(UsageError, match=r"has ai\.sage in version 2, .* knows 1; update it"):
        inspect(path)


@pytest.mark.parametrize("kept", [0, 1, 40, 0.5])
def test_a_part_of_a_file(kept: float, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    write(path, "auto")
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    with pytest.raises(UsageError, match="is not an ONNX file, or only a part of one"):
        inspect(path)


def test_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("not a model at all")
    with pytest.raises(UsageError, match="is not an ONNX file"):
        inspect(tmp_path / "text.onnx")
    with pytest.raises(UsageError, match="is not a file"):
        inspect(tmp_path)


def test_altered_files_are_told_in_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    model = write(path, "int8_int8")
    report = {"rewritten": 1, "kept": 0, "sites": [{"layer": "layer#0", "decision": "rewrite"}]}
    helper.set_model_props(model, {schema.REPORT_KEY: json.dumps(report)})
    data = model.SerializeToString()
    rng = random.Random(0)
    refused = 0
    for _ in range(600):
        altered = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            altered[rng.randrange(len(altered))] = rng.randrange(256)
        path.write_bytes(altered)
        try:
            found = inspect(path)
        except UsageError:
            refused += 1
        else:
            assert json.dumps(found.to_dict()) and str(found)
    assert refused


@pytest.mark.parametrize(
    "text", ["[]", "1", "NaN", "{}", "{", '{"rewritten": 1, "kept": 0}', "[" * 100_000]
)
def test_metadata_that_is_no_report(text: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    model = write(path, "auto")
    helper.set_model_props(model, {schema.REPORT_KEY: text})
    path.write_bytes(model.SerializeToString())
    with pytest.raises(UsageError, match=r"is damaged: its ai\.sage\.report"):
        inspect(path)


def test_the_ending_of_the_name_says_nothing(tmp_path: Path) -> None:
    write(tmp_path / "model.json", "auto")
    assert len(inspect(tmp_path / "model.json").nodes) == 1


@pytest.mark.parametrize(
    "attribute, value, words",
    [
        ("recipe", "int3", "attribute recipe is 'int3'; known: auto"),
        ("recipe", "", "attribute recipe is ''"),
        ("mask_class", "diagonal", "attribute mask_class is 'diagonal'"),
        ("dead_rows", "one", "attribute dead_rows is 'one'"),
        ("scale", float("nan"), "attribute scale is missing, or is no finite number"),
        ("scale", None, "attribute scale is missing"),
    ],
)
def test_nodes_that_nobody_takes(attribute: str, value: object, words: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    model = write(path, "int8_int8")
    (node,) = model.graph.node
    kept = [each for each in node.attribute if each.name != attribute]
    del node.attribute[:]
    node.attribute.extend(kept)
    if value is not None:
        node.attribute.append(helper.make_attribute(attribute, value))
    path.write_bytes(model.SerializeToString())
    (found,) = inspect(path).nodes
    assert set(found.serves) == {WITHOUT_LIBRARY, "CPU", "CUDA"}
    assert all(what.startswith(f"nothing: {words}") for what in found.serves.values())


def test_wide_heads_are_computed_exactly(tmp_path: Path) -> None:
    write(tmp_path / "model.onnx", "int8_fp16", make_call(8, head_dim=300))
    assert inspect(tmp_path / "model.onnx").nodes[0].serves["CPU"] == "exact attention"


def test_nodes_within_functions_are_found(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    model = write(path, "auto")
    inner = helper.make_function(
        "user",
        "Layer",
        list(model.graph.node[0].input),
        list(model.graph.node[0].output),
        list(model.graph.node),
        list(model.opset_import),
    )
    outer = helper.make_node(
        "Layer", model.graph.node[0].input, model.graph.node[0].output, domain="user"
    )
    model.functions.append(inner)
    del model.graph.node[:]
    model.graph.node.append(outer)
    model.opset_import.append(helper.make_opsetid("user", 1))
    path.write_bytes(model.SerializeToString())
    assert [node.name for node in inspect(path).nodes] == ["layer#0"]
