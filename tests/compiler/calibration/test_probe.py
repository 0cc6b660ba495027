"""A watched model computes what it computes, every attention seen; afterwards nothing is left."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._dynamo.convert_frame import input_codes
from torch._dynamo.eval_frame import OptimizedModule

import sage_compiler as sage
from sage_compiler.calibration.probe import Call, Watched, watched
from sage_compiler.precision import EXACT
from tests.compiler.calibration.models import HEAD_DIM, Attention, Causal, Stack, WrittenOut, tokens

EXACTLY = {"precision": EXACT}


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


class Grouped(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = torch.cat([q, 2 * q], 1)
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)[:, :1]


class Masked(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        visible = torch.arange(k.shape[2]) < 20
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible.view(1, 1, 1, -1))


class Broken(Attention):
    """With a graph break before its attention, and one after."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        attended = super().attend(q, k, v)
        torch._dynamo.graph_break()
        return attended + super().attend(q, k, 2 * v)


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(HEAD_DIM, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        attended: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return attended


class Direct(nn.Module):
    """Calls the operator itself, before and after an attention that is found."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(1)
        y = sage.attention(x, x, x, precision=EXACT)
        y = y + F.scaled_dot_product_attention(y, x, x)
        return sage.attention(y, y, x, precision=EXACT).squeeze(1)


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(HEAD_DIM, 2, 32, batch_first=True)


def encoder() -> nn.Module:
    return nn.TransformerEncoder(encoder_layer(), 2, enable_nested_tensor=False)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "sdpa": lambda: Stack(2),
    "written out": lambda: Stack(2, kind=WrittenOut),
    "causal": lambda: Stack(2, kind=Causal),
    "grouped queries": lambda: Stack(2, kind=Grouped),
    "masked": lambda: Stack(2, kind=Masked),
    "graph breaks": lambda: Stack(2, kind=Broken),
    "nn.MultiheadAttention": SelfAttention,
    "nn.TransformerEncoderLayer": encoder_layer,
    "nn.TransformerEncoder": encoder,
    "the operator itself": Direct,
}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def recorded(watch: Watched) -> list[str]:
    """The layers of calls to come, in the order of the calls."""
    seen: list[str] = []

    def attend(call: Call) -> Tensor:
        seen.append(call.layer)
        return call.run(EXACT)

    watch.attend = attend
    return seen


def check(model: Any, *inputs: Tensor) -> tuple[list[str], dict[str, list[str]]]:
    """Under watch the model is what it is; the layers called, and all fingerprints."""
    with torch.no_grad():
        expected = [model(x) for x in inputs]
        with watched(model) as watch:
            seen = recorded(watch)
            for x, each in zip(inputs, expected, strict=True):
                torch.testing.assert_close(watch.run(x), each, rtol=1e-4, atol=1e-5)
    return seen, watch.fingerprints


@every_model
def test_equals_eager_and_has_the_names_of_explain(make: Callable[[], nn.Module]) -> None:
    model, x = make().eval(), tokens(0, length=40, batch=2)
    seen, fingerprints = check(model, x)
    with torch.no_grad():
        report = sage.explain(model, x, options=EXACTLY)
    # Behind a graph break, equal layers share a graph and its names: docs/layers.md.
    assert list(dict.fromkeys(seen)) == [site.layer for site in report.rewritten] != []
    assert {site.layer: [site.fingerprint] for site in report.rewritten} == fingerprints


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdpa", "graph breaks", "nn.TransformerEncoder"])
def test_names_are_those_of_compiling(name: str) -> None:
    model, x = MODELS[name]().eval(), tokens(0, length=40)
    seen, fingerprints = check(model, x)
    with torch.no_grad():
        torch.compile(model, backend="sage", options=EXACTLY)(x)
    sites = sage.last_report().rewritten
    assert [site.layer for site in sites] == list(dict.fromkeys(seen))
    assert {site.layer: [site.fingerprint] for site in sites} == fingerprints


@every_model
def test_what_computes_an_attention_is_seen_in_the_output(make: Callable[[], nn.Module]) -> None:
    model, x = make().eval(), tokens(0, length=40)
    with torch.no_grad(), watched(model) as watch:
        before = watch.run(x)
        watch.attend = lambda call: 2 * call.run(EXACT)
        assert not torch.allclose(watch.run(x), before, atol=1e-3)
        watch.attend = lambda call: call.run(EXACT)
        assert torch.equal(watch.run(x), before)


def test_a_function() -> None:
    def attention(x: Tensor) -> Tensor:
        x = x.unsqueeze(1)
        return F.scaled_dot_product_attention(x, x, x).squeeze(1)

    seen, _ = check(attention, tokens(0, length=40))
    assert seen == ["(root)#0"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    """What a call gets is what the operator casts to."""
    model, x = Stack(2).eval(), tokens(0, length=40)
    dtypes = set()

    def attend(call: Call) -> Tensor:
        dtypes.update({call.query.dtype, call.key.dtype, call.value.dtype, call.problem.dtype})
        return call.run(EXACT)

    with torch.no_grad(), torch.autocast("cpu", dtype):
        expected = model(x)
        with watched(model) as watch:
            watch.attend = attend
            torch.testing.assert_close(watch.run(x), expected, rtol=0.02, atol=0.02)
    assert dtypes == {dtype}


def test_lengths_that_vary() -> None:
    inputs = [tokens(0, length) for length in (40, 41, 50, 7, 1, 40)]
    seen, fingerprints = check(Stack(2).eval(), *inputs)
    assert seen == ["layers.0#0", "layers.1#0"] * len(inputs)
    assert set(map(tuple, fingerprints.values())) == {("q1 kv1 d64 dv64 none",)}


def test_more_shapes_than_dynamo_compiles_by_itself() -> None:
    """Beyond its limit a model runs in eager, unseen."""
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        lengths = range(2, torch._dynamo.config.recompile_limit + 4)
        inputs = [tokens(0, length) for length in lengths]
        seen, _ = check(Stack(1).eval(), *inputs)
    assert len(seen) == len(inputs)


# --- models that are compiled already


def whole(model: nn.Module) -> Any:
    return torch.compile(model, backend="sage", options=EXACTLY)


def in_place(model: nn.Module) -> Any:
    model.compile(backend="sage", options=EXACTLY)
    return model


def block_by_block(model: nn.Module) -> Any:
    for layer in model.get_submodule("layers").children():
        layer.compile(backend="sage", options=EXACTLY)
    return model


def prepared(model: nn.Module) -> Any:
    return block_by_block(sage.prepare(model))


def wrapped_blocks(model: nn.Module) -> Any:
    layers = model.get_submodule("layers")
    assert isinstance(layers, nn.ModuleList)
    for at, layer in enumerate(layers):
        layers[at] = torch.compile(layer, backend="eager")  # type: ignore[assignment]
    return model


def a_function(model: nn.Module) -> Any:
    return torch.compile(lambda x: model(x), backend="eager")


@pytest.mark.parametrize("compiled", [whole, in_place, block_by_block, prepared, wrapped_blocks])
@pytest.mark.parametrize("ran", [False, True], ids=["new", "has run"])
def test_models_that_are_compiled_already(compiled: Callable[[nn.Module], Any], ran: bool) -> None:
    model, x = compiled(Stack(2).eval()), tokens(0, length=40)
    if ran:
        with torch.no_grad():
            model(x)
    seen, _ = check(model, x)
    assert seen == ["layers.0#0", "layers.1#0"]


def test_a_function_that_is_compiled_already() -> None:
    seen, _ = check(a_function(Stack(2).eval()), tokens(0, length=40))
    assert len(seen) == 2


@pytest.mark.parametrize("name", ["sdpa", "graph breaks"])
def test_compiled_models_keep_what_was_compiled(name: str) -> None:
    compilations = 0

    def backend(gm: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Any:
        nonlocal compilations
        compilations += 1
        return gm.forward

    model, x = MODELS[name]().eval(), tokens(0, length=40)
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        expected = compiled(x)
        before = compilations
        check(model, x)
        assert torch.equal(compiled(x), expected)
    assert compilations == before > 0


# --- nothing is left behind


def entries() -> int:
    codes = [reference() for reference in list(input_codes.seen)]
    return sum(len(_debug_get_cache_entry_list(code)) for code in codes if code is not None)


@every_model
def test_nothing_stays_registered(make: Callable[[], nn.Module]) -> None:
    model, x = make().train(), tokens(0, length=40)
    for module in model.modules():  # dropout would be another computation
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if list(model.parameters()):
        model(x).sum().backward()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    attributes = [set(vars(module)) for module in model.modules()]
    with torch.no_grad(), watched(model.eval()) as watch:
        watch.run(x)
    assert entries() == 0
    assert model.state_dict().keys() == state.keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        assert parameter.requires_grad
        assert (parameter.grad is None) == (grad is None)
        assert grad is None or torch.equal(parameter.grad, grad)
    assert [set(vars(module)) for module in model.modules()] == attributes
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


@pytest.mark.parametrize("name", ["sdpa", "written out", "graph breaks"])
def test_every_activation_dies(name: str) -> None:
    """Of the calls before the present one within a run, and all of them after it."""
    alive: list[weakref.ref[Tensor]] = []
    most = 0
    model = MODELS[name]().eval()

    def attend(call: Call) -> Tensor:
        nonlocal most
        output = call.run(EXACT)
        most = max(most, sum(reference() is not None for reference in alive))
        alive.extend(map(weakref.ref, (call.query, call.key, call.value, output)))
        return output

    with torch.no_grad(), watched(model) as watch:
        watch.attend = attend
        for seed in range(3):
            output = watch.run(tokens(seed, length=40))
            del output
            gc.collect()
            assert not [reference for reference in alive if reference() is not None]
    assert most <= 4  # those of one call at most, and not of all before it


def test_the_model_itself_dies() -> None:
    model = Stack(2).eval()
    with torch.no_grad(), watched(model) as watch:
        watch.run(tokens(0, length=40))
    reference = weakref.ref(model)
    del model, watch
    gc.collect()
    assert reference() is None


def test_an_error_in_the_model_comes_out_and_leaves_nothing() -> None:
    def attend(call: Call) -> Tensor:
        raise KeyboardInterrupt

    model, x = Stack(2).eval(), tokens(0, length=40)
    with torch.no_grad(), pytest.raises(KeyboardInterrupt), watched(model) as watch:
        watch.attend = attend
        watch.run(x)
    assert entries() == 0
    check(model, x)


# --- parts that are compiled, functions that are


class Interrupted(nn.Module):
    """Blocks with a graph break between them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(SdpaBlock() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            torch._dynamo.graph_break()
        return x


class SdpaBlock(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + F.scaled_dot_product_attention(x, x, x)


def seen_layers(model: Callable[..., Any], x: Tensor) -> list[str]:
    layers = []
    with watched(model) as watch, torch.no_grad():
        watch.attend = lambda call: (layers.append(call.layer), call.run(EXACT))[1]
        watch.run(x)
    return layers


@pytest.mark.parametrize("wrap", ["compile", "torch.compile"])
def test_blocks_compiled_by_themselves_are_seen_behind_graph_breaks(wrap: str) -> None:
    torch._dynamo.reset()
    model, x = sage.prepare(Interrupted().eval()), torch.randn(1, 2, 16, 8)
    options = {"precision": "int4_fp8"}
    for name, block in list(model.blocks.named_children()):
        if wrap == "compile":
            block.compile(backend="sage", options=options)
        else:
            model.blocks[int(name)] = torch.compile(block, backend="sage", options=options)
    before = dict(model.blocks._modules)
    assert seen_layers(model, x) == ["blocks.0#0", "blocks.1#0"]
    assert dict(model.blocks._modules) == before  # as they were, compiled
    assert all(
        block._compiled_call_impl is not None or isinstance(block, OptimizedModule)
        for block in model.blocks
    )


_GLOBAL = nn.Sequential(SdpaBlock(), SdpaBlock()).eval()


def _global_function(x: Tensor) -> Tensor:
    return _GLOBAL(x)


@pytest.mark.parametrize("kind", ["closure", "global", "method"])
def test_functions_have_the_names_that_compiling_gives(kind: str) -> None:
    torch._dynamo.reset()
    model, x = nn.Sequential(SdpaBlock(), SdpaBlock()).eval(), torch.randn(1, 2, 16, 8)
    functions: dict[str, Callable[..., Any]] = {
        "closure": lambda x: model(x),
        "global": _global_function,
        "method": model.forward,
    }
    function = functions[kind]
    seen = seen_layers(function, x)
    assert len(set(seen)) == 2
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(function, backend="sage", options={"precision": "exact"})(x)
    assert [site.layer for site in sage.last_report().sites] == seen
