"""``sage.export_onnx``: what is in the file, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

import sage_compiler as sage
from sage_compiler.errors import InvalidAttentionError, InvalidOptionError, PolicyError, SageError
from sage_compiler.onnx import axes, export, schema, verify
from sage_compiler.policy import LayerPolicy, Policy
from tests.tolerances import cosine, rel_l1

WIDTH, HEADS = 64, 4
LENGTHS = {"x": {0: "batch", 1: "length"}}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1)
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Model(nn.Module):
    """Two attentions, one of which is written out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = Attention()
        self.second = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).unsqueeze(1)
        scores = self.second(y) @ y.mT / 8
        return (torch.softmax(scores, -1) @ y).squeeze(1)


class Direct(nn.Module):
    """Calls of ``sage.attention`` with all that it has."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor) -> Any:
        first, lse = sage.attention(
            q, k, v, mask, enable_gqa=True, softcap=20.0, sinks=sinks, return_lse=True
        )
        second = sage.attention(
            q, k, v, window=(7, 0), causal="bottom_right", enable_gqa=True, scale=0.3
        )
        return first, lse, second


def example(batch: int = 2, length: int = 40) -> Tensor:
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(length))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return Model().eval()


@pytest.fixture(scope="module")
def file(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with free sizes."""
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    sage.export_onnx(model, (example(),), path, dynamic_shapes=LENGTHS)
    return path


def ours(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.domain == schema.DOMAIN]


def words(node: onnx.NodeProto) -> dict[str, Any]:
    return {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}


def metadata(path: Path) -> dict[str, Any]:
    return {each.key: json.loads(each.value) for each in onnx.load(path).metadata_props}


def test_the_file_has_a_node_for_each_layer_and_a_function_for_each_kind(file: Path) -> None:
    loaded = onnx.load(file)
    assert [node.name for node in ours(loaded)] == ["first#0", "(root)#0"]
    assert [words(node)["recipe"] for node in ours(loaded)] == [b"auto", b"auto"]
    assert words(ours(loaded)[0])["scale"] == pytest.approx((WIDTH / HEADS) ** -0.5)
    assert words(ours(loaded)[1])["scale"] == pytest.approx(1 / 8)
    assert [len(node.output) for node in ours(loaded)] == [1, 1]
    assert [(f.domain, f.name, f.overload) for f in loaded.functions] == [
        ("ai.sage", "Attention", "auto")
    ]
    assert {each.domain: each.version for each in loaded.opset_import} == {"": 21, "ai.sage": 1}
    onnx.checker.check_model(loaded, full_check=True)


@pytest.mark.parametrize("library", [False, True])
def test_the_file_runs_at_other_sizes(model: nn.Module, file: Path, library: bool) -> None:
    session = sage.onnx_session(file) if library else verify.open_plain(file)
    assert [dim for dim in session.get_inputs()[0].shape] == ["batch", "length", WIDTH]
    assert [dim for dim in session.get_outputs()[0].shape] == ["batch", "length", WIDTH]
    for batch, length in ((2, 40), (1, 7), (3, 200), (1, 1)):
        x = example(batch, length)
        (output,) = verify.run(session, {"x": x})
        expected = model(x).detach()
        assert output.shape == expected.shape
        assert rel_l1(output, expected) < (0.02 if library else 1e-5)


def test_metadata_is_the_report_without_source_paths(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    report = sage.export_onnx(model, (example(),), path)
    told = metadata(path)[schema.REPORT_KEY]
    assert [site["layer"] for site in told["sites"]] == ["first#0", "(root)#0"]
    assert told["rewritten"] == len(report.rewritten) == 2
    here = Path(__file__).name
    assert here in report.sites[0].source
    assert here.encode() not in path.read_bytes() and b"source" not in json.dumps(told).encode()
    assert schema.POLICY_KEY not in metadata(path)


def test_source_paths_are_there_when_asked_for(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    report = sage.export_onnx(model, (example(),), path, source_paths=True)
    assert metadata(path)[schema.REPORT_KEY]["sites"][0]["source"] == report.sites[0].source
    assert Path(__file__).name.encode() in path.read_bytes()


def policy(**recipes: str) -> Policy:
    fingerprints = {
        "first#0": f"q{HEADS} kv{HEADS} d16 dv16 none",
        "(root)#0": f"q1 kv1 d{WIDTH} dv{WIDTH} none",
    }
    layers = {
        layer: LayerPolicy(
            fingerprints=(fingerprints.get(layer, "q1 kv1 d8 dv8 none"),),
            recipes=tuple(recipe.split("/")),
            reason="measured",
        )
        for layer, recipe in recipes.items()
    }
    ranges = {len(layer.recipes) for layer in layers.values()}
    return Policy(layers, target="cpu", timestep_ranges=ranges.pop())


def test_a_policy_chooses_for_every_layer(model: nn.Module, tmp_path: Path) -> None:
    chosen = policy(**{"first#0": "int8_fp8", "(root)#0": "exact"})
    path = tmp_path / "model.onnx"
    report = sage.export_onnx(model, (example(),), path, policy=chosen)
    assert [site.recipe for site in report.sites] == ["int8_fp8", "exact"]
    loaded = onnx.load(path)
    assert [words(node)["recipe"] for node in ours(loaded)] == [b"int8_fp8", b"exact"]
    assert sorted(each.overload for each in loaded.functions) == ["exact", "int8_fp8"]
    assert Policy.from_dict(metadata(path)[schema.POLICY_KEY]) == chosen
    (output,) = verify.run(verify.open_plain(path), {"x": example()})
    assert cosine(output, model(example()).detach()) > 0.999


def test_a_policy_of_another_model(model: nn.Module, tmp_path: Path) -> None:
    other = policy(**{"first#0": "int8_int8"})
    path = tmp_path / "model.onnx"
    with pytest.raises(PolicyError, match=r"\(root\)#0"):
        sage.export_onnx(model, (example(),), path, policy=other)
    assert not any(tmp_path.iterdir())
    report = sage.export_onnx(model, (example(),), path, policy=other, strict_policy=False)
    assert [site.decision for site in report.sites] == ["rewrite", "keep"]
    assert len(ours(onnx.load(path))) == 1


@pytest.mark.parametrize("opset", [20, 21, 22, 23])
def test_opsets(model: nn.Module, tmp_path: Path, opset: int) -> None:
    path = tmp_path / "model.onnx"
    sage.export_onnx(model, (example(),), path, opset=opset, precision="int8_int8")
    assert onnx.load(path).opset_import[0].version == opset
    (output,) = verify.run(verify.open_plain(path), {"x": example()})
    assert rel_l1(output, model(example()).detach()) < 0.02


def test_standalone_forms(model: nn.Module, tmp_path: Path) -> None:
    x, expected = example(), model(example()).detach()
    for form in ("standard", "custom"):
        sage.export_onnx(
            model, (x,), tmp_path / f"{form}.onnx", standalone=form, precision="int8_int8"
        )
    standard = onnx.load(tmp_path / "standard.onnx")
    assert not ours(standard) and not standard.functions
    assert {each.domain for each in standard.opset_import} == {""}
    (output,) = verify.run(verify.open_plain(tmp_path / "standard.onnx"), {"x": x})
    assert rel_l1(output, expected) < 0.02

    custom = onnx.load(tmp_path / "custom.onnx")
    assert len(ours(custom)) == 2 and not custom.functions
    with pytest.raises(verify.ERRORS, match=r"ai\.sage"):
        verify.open_plain(tmp_path / "custom.onnx")
    (output,) = verify.run(sage.onnx_session(tmp_path / "custom.onnx"), {"x": x})
    assert rel_l1(output, expected) < 0.02


def test_calls_of_the_operator_itself(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    q, k, v = (
        torch.randn(*shape, generator=generator)
        for shape in ((2, 4, 20, 16), (2, 2, 30, 16), (2, 2, 30, 24))
    )
    inputs = (q, k, v, torch.rand(20, 30, generator=generator) > 0.2, torch.randn(4))
    path = tmp_path / "direct.onnx"
    sage.export_onnx(Direct(), inputs, path)
    expected = [each.detach() for each in Direct()(*inputs)]
    names = ("q", "k", "v", "mask", "sinks")
    for session in (verify.open_plain(path), sage.onnx_session(path)):
        found = verify.run(session, dict(zip(names, inputs, strict=True)))
        for actual, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=0.02, atol=0.02)
    assert [each.overload for each in onnx.load(path).functions] == [
        "auto.bool.sinks.softcap.lse.grouped",
        "auto.window_bottom_right.grouped",
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_models(tmp_path: Path, dtype: torch.dtype) -> None:
    attention = Attention().to(dtype).eval()
    x = example().to(dtype)
    path = tmp_path / "narrow.onnx"
    sage.export_onnx(attention, (x,), path, precision="int8_int8")
    loaded = onnx.load(path)
    assert [words(node)["recipe"] for node in ours(loaded)] == [b"int8_int8"]
    if dtype is torch.bfloat16:  # ONNX Runtime's CPU provider has no MatMul of it
        return
    with torch.no_grad():
        expected = attention(x)
    for session in (verify.open_plain(path), sage.onnx_session(path)):
        (output,) = verify.run(session, {"x": x})
        assert output.dtype == dtype and rel_l1(output, expected) < 0.02


def test_large_weights_lie_beside_the_file(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "LARGEST_IN_FILE", 1000)
    path = tmp_path / "model.onnx"
    sage.export_onnx(model, (example(),), path)
    (data,) = tmp_path.glob("model.onnx.*.data")
    assert set(tmp_path.iterdir()) == {path, data}
    assert path.stat().st_size < data.stat().st_size
    (output,) = verify.run(sage.onnx_session(path), {"x": example()})
    assert rel_l1(output, model(example()).detach()) < 0.02


def test_weights_are_never_those_of_another_model(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "LARGEST_IN_FILE", 1000)
    path, x = tmp_path / "model.onnx", example()
    sage.export_onnx(model, (x,), path)
    before = verify.run(sage.onnx_session(path), {"x": x})[0]
    torch.manual_seed(1)
    other = Attention().eval()
    replace, calls = os.replace, []

    def fail_at_the_model(source: Any, target: Any) -> None:
        calls.append(target)
        if Path(target) == path:
            raise OSError("no more today")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail_at_the_model)
        with pytest.raises(OSError, match="no more today"):
            sage.export_onnx(other, (x,), path)
    assert calls[-1] == path and len(list(tmp_path.iterdir())) == 2
    assert torch.equal(verify.run(sage.onnx_session(path), {"x": x})[0], before)

    sage.export_onnx(other, (x,), path)
    assert len(list(tmp_path.iterdir())) == 2  # the weights of the first have gone
    monkeypatch.setattr(export, "LARGEST_IN_FILE", 1 << 30)
    sage.export_onnx(other, (x,), path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_leads_to_the_file(model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.onnx"
    link.symlink_to(tmp_path / "real" / "model.onnx")
    sage.export_onnx(model, (example(),), link)
    assert link.is_symlink() and (tmp_path / "real" / "model.onnx").is_file()


class WithDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Sequential(nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inside(x)
        return y


class Functional(nn.Module):
    """Dropout without a module that says so."""

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, dropout_p=0.3 if self.training else 0.0)


class Normalized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.BatchNorm1d(40)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inside(x)
        return y


class Echo(nn.Module):
    """An input that is an output, and a size that no attention has."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x, F.scaled_dot_product_attention(x, x, x) + y.sum()


class Named(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"hidden": F.scaled_dot_product_attention(x, x, x), "twice": x + x}


class Packed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        lengths = torch.tensor([0, 3, 8])
        return sage.attention(x, x, x, cu_seqlens=lengths)  # type: ignore[return-value]


@pytest.mark.parametrize(
    "given, options, error, message",
    [
        (Model(), {"precision": "int3"}, InvalidOptionError, "unknown precision 'int3'"),
        (Model(), {"standalone": "all"}, InvalidOptionError, "function, standard, custom"),
        (Model(), {"opset": 12}, InvalidOptionError, "opset=12; it must be an integer from 20"),
        (Model(), {"opset": True}, InvalidOptionError, "opset=True"),
        (Model(), {"policy": "absent.json"}, PolicyError, "absent.json"),
        (F.relu, {}, InvalidOptionError, "torch.export takes a torch.nn.Module"),
        (WithDropout(), {}, InvalidOptionError, "dropout in training mode.*call model.eval"),
        (Functional(), {}, InvalidOptionError, "dropout of attention in training mode"),
        (Normalized(), {}, InvalidOptionError, "batch normalization in training mode"),
        (
            nn.MultiheadAttention(8, 2, dropout=0.5),
            {"kwargs": [1]},
            InvalidOptionError,
            "kwargs a list",
        ),
        (
            Model(),
            {"kwargs": {"y": 1}, "dynamic_shapes": LENGTHS},
            InvalidOptionError,
            "does not take",
        ),
        (Model().to("meta"), {}, InvalidOptionError, "weight is on the meta device: load"),
    ],
    ids=[
        *("precision", "standalone", "opset", "bool", "policy", "function", "dropout"),
        *("functional", "batch", "kwargs", "unknown", "meta"),
    ],
)
def test_what_is_refused(
    given: Any, options: dict[str, Any], error: type[SageError], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        sage.export_onnx(given, (example(),), tmp_path / "model.onnx", **options)
    assert not any(tmp_path.iterdir())


def test_sizes_whose_example_cannot_vary(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with pytest.raises(
        InvalidOptionError, match=r"'batch'.* is 1 in the example.* give an example"
    ):
        sage.export_onnx(model, (example(1),), path, dynamic_shapes=LENGTHS)
    with pytest.raises(InvalidOptionError, match="'depth' is dim 5 of an input of shape"):
        sage.export_onnx(model, (example(),), path, dynamic_shapes=({5: "depth"},))
    with pytest.raises(InvalidOptionError, match=r"'width' is dim -1 .* counted from 0"):
        sage.export_onnx(model, (example(),), path, dynamic_shapes=({-1: "width"},))
    assert not any(tmp_path.iterdir())


class Cross(nn.Module):
    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, k)


def test_two_sizes_need_two_names(tmp_path: Path) -> None:
    inputs = (torch.randn(2, 4, 20, 16), torch.randn(2, 4, 30, 16))
    with pytest.raises(
        InvalidOptionError, match=r"'l' is of two sizes, which are 20 and 30 .* own"
    ):
        sage.export_onnx(
            Cross(),
            inputs,
            tmp_path / "model.onnx",
            dynamic_shapes={"q": {2: "l"}, "k": {2: "l"}},
        )
    assert not any(tmp_path.iterdir())


def test_a_name_is_no_symbol_of_another_size() -> None:
    examples = {"s1": 5, "s2": 6, "s3": 5}
    assert axes.names_of_symbols([("s1", "s0"), ("s1", "x")], examples) == {"s1": "s0"}
    same = [("s1", "n"), ("s3", "n")]  # the user says that they are equal
    assert axes.names_of_symbols(same, examples) == {"s1": "n", "s3": "n"}
    with pytest.raises(InvalidOptionError, match="'s2' is of two sizes, which are 6 and 5"):
        axes.names_of_symbols([("s1", "s2")], examples)


def test_sizes_have_the_first_of_their_names(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    sizes = {"q": {0: "batch", 2: Dim("queries")}, "k": {0: "also", 2: "keys"}}
    inputs = (torch.randn(2, 4, 20, 16), torch.randn(2, 4, 30, 16))
    sage.export_onnx(Cross(), inputs, path, dynamic_shapes=sizes)
    shapes = [each.shape for each in verify.open_plain(path).get_inputs()]
    assert shapes == [["batch", 4, "queries", 16], ["batch", 4, "keys", 16]]


def test_an_input_that_is_an_output(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    inputs = (torch.randn(2, 4, 20, 16), torch.randn(3))
    sage.export_onnx(Echo(), inputs, path, dynamic_shapes={"x": {0: "batch"}, "y": {0: "n"}})
    session = sage.onnx_session(path)
    assert [each.shape for each in session.get_inputs()] == [["batch", 4, 20, 16], ["n"]]


def test_outputs_have_the_keys_of_a_dict(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    sage.export_onnx(Named(), (torch.randn(2, 4, 20, 16),), path)
    assert [each.name for each in verify.open_plain(path).get_outputs()] == ["hidden", "twice"]


def test_a_compiled_model_is_the_model(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    compiled = torch.compile(model, backend="sage")
    report = sage.export_onnx(compiled, (example(),), path, dynamic_shapes=LENGTHS)
    assert len(report.rewritten) == 2


def test_a_file_without_attention_needs_nothing_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    sage.export_onnx(nn.Linear(4, 4), (torch.randn(2, 4),), path)
    assert [each.domain for each in onnx.load(path).opset_import] == [""]


def test_recipes_by_timestep_are_refused(model: nn.Module, tmp_path: Path) -> None:
    by_step = policy(**{"first#0": "int8_int8/exact", "(root)#0": "exact/exact"})
    with pytest.raises(InvalidOptionError, match="recipes by timestep"):
        sage.export_onnx(model, (example(),), tmp_path / "model.onnx", policy=by_step)


def test_packed_sequences_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidAttentionError, match=r"cu_seqlens_q has no ONNX form; pad"):
        sage.export_onnx(Packed(), (torch.randn(1, 2, 8, 16),), tmp_path / "model.onnx")
    assert not any(tmp_path.iterdir())


def test_a_file_that_fails_leaves_the_old_one(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise onnx.checker.ValidationError("not today\nat all")

    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    monkeypatch.setattr(onnx.checker, "check_model", refuse)
    with pytest.raises(SageError, match=r"does not pass ONNX's checker: not today$"):
        sage.export_onnx(model, (example(),), path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_not_there(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="absent"):
        sage.export_onnx(model, (example(),), tmp_path / "absent" / "model.onnx")


def test_the_original_model_is_what_it_was(tmp_path: Path) -> None:
    model = Model().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    code = [type(each) for each in model.modules()]
    sage.export_onnx(model, (example(),), tmp_path / "model.onnx", precision="int8_int8")
    assert [type(each) for each in model.modules()] == code
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_session_of_the_users_own(file: Path) -> None:
    """As the documentation has it for Python without sage_compiler's helper."""
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(sage.ort_library())
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": example().numpy()})[0].shape == (2, 40, WIDTH)
