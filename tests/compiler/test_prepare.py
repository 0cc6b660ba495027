"""prepare(): a graph and a full name for every layer, and in eager nothing but that."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import io
import pickle
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, fx, nn
from torch._dynamo import config as dynamo_config
from torch._dynamo.utils import counters

import sage_compiler as sage
from sage_compiler.passes.normalize import operation
from tests.recording import Recorder

sdpa = F.scaled_dot_product_attention
X = torch.randn(1, 2, 6, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(1)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 8)

    def forward(self, x: Tensor, *, causal: bool = False) -> Tensor:
        x = self.project(x)
        return sdpa(x, x, x, is_causal=causal)


class Block(nn.Module):
    """A layer of a model.

    With ``index``, Dynamo has to compile it anew for each layer, as it has to where a layer
    looks up its part of a cache. ``breaks`` says where its graph breaks.
    """

    def __init__(self, index: int | None = None, breaks: str = "") -> None:
        super().__init__()
        self.attn, self.index, self.breaks = Attention(), index, breaks

    def forward(self, x: Tensor) -> Tensor:
        if self.index is not None:
            x = x + self.index
        y = self.attn(x)
        if self.breaks == "between":
            torch._dynamo.graph_break()
        return x + self.attn(y, causal=True)


class Model(nn.Module):
    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.final = Attention()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.final(x)


def identical(count: int, **options: Any) -> Model:
    return Model(Block(**options) for _ in range(count)).eval()


def indexed(count: int) -> Model:
    return Model(Block(index) for index in range(count)).eval()


def full_names(count: int) -> list[str]:
    return [f"blocks.{at}.attn#{ordinal}" for at in range(count) for ordinal in (0, 1)]


def by_region(model: Any, *inputs: Tensor) -> Recorder:
    """Compile each block by itself, and check the result against eager."""
    recorder = Recorder()
    with torch.no_grad():
        expected = model(*inputs)
        for block in model.blocks:
            block.compile(backend=recorder)
        actual = model(*inputs)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    return recorder


def as_a_whole(model: nn.Module, *inputs: Tensor, **arguments: Any) -> Recorder:
    recorder = Recorder()
    with torch.no_grad():
        expected = model(*inputs, **arguments)
        actual = torch.compile(model, backend=recorder)(*inputs, **arguments)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    return recorder


# --- one graph per layer, named in full -----------------------------------------------------


def test_without_it_identical_blocks_share_one_graph_and_one_name() -> None:
    recorder = by_region(identical(12), X)
    assert recorder.layers == ["attn#0", "attn#1"]
    assert recorder.runs == {0: 12}


def test_identical_blocks_have_a_graph_and_a_name_each() -> None:
    recorder = by_region(sage.prepare(identical(12)), X)
    assert recorder.layers == full_names(12)
    assert recorder.runs == dict.fromkeys(range(12), 1)  # none of them ran in eager


def test_without_it_blocks_that_differ_reach_the_limit_of_recompilations() -> None:
    recorder = by_region(indexed(12), X)
    assert len(recorder.report.graphs) == dynamo_config.recompile_limit < 12


def test_no_number_of_blocks_reaches_the_limit_of_recompilations() -> None:
    recorder = by_region(sage.prepare(indexed(12)), X)
    assert recorder.layers == full_names(12)
    assert recorder.runs == dict.fromkeys(range(12), 1)


def test_blocks_whose_graph_breaks() -> None:
    model = sage.prepare(identical(10, breaks="between"))
    recorder = by_region(model, X)
    assert recorder.layers == full_names(10)
    assert recorder.runs == dict.fromkeys(range(20), 1)


def test_recompilation_of_blocks_gives_the_same_names() -> None:
    model = sage.prepare(identical(3, breaks="between"))
    recorder = by_region(model, X)
    with torch.no_grad():
        model(torch.randn(1, 2, 9, 8))
    assert recorder.layers == full_names(3) * 2


def test_blocks_of_the_real_backend() -> None:
    counters.clear()
    model = sage.prepare(identical(2))
    with torch.no_grad():
        expected = model(X)
        for block in model.blocks:
            block.compile(backend="sage", options={"precision": "exact"})
        torch.testing.assert_close(model(X), expected, rtol=0, atol=1e-5)
    assert [site.layer for site in sage.last_report().rewritten] == full_names(2)
    assert counters["inductor"]["fxgraph_cache_miss"] <= 1  # the graphs differ in name alone


@pytest.mark.parametrize("first", ["prepare", "compile"])
def test_blocks_that_torch_compile_has_wrapped(first: str) -> None:
    model, recorder = identical(3), Recorder()
    if first == "prepare":
        sage.prepare(model)
    for at, block in enumerate(model.blocks):
        model.blocks[at] = torch.compile(block, backend=recorder)
    if first == "compile":
        sage.prepare(model)
    model(X)
    assert recorder.layers == full_names(3)


def test_blocks_that_have_run_already_are_compiled_anew() -> None:
    model = identical(3)
    recorder = by_region(model, X)
    sage.prepare(model)(X)
    assert recorder.layers[-6:] == full_names(3)


def test_a_whole_model_is_named_as_before() -> None:
    model = identical(3)
    wanted = [*full_names(3), "final#0"]
    assert as_a_whole(model, X).layers == wanted
    prepared = as_a_whole(sage.prepare(model), X)
    assert prepared.layers == wanted
    assert len(prepared.report.graphs) == 1


def test_a_whole_model_whose_graph_breaks_in_a_layer() -> None:
    model = Model([Block(), Block(breaks="between"), Block(), Block(breaks="between")])
    assert as_a_whole(sage.prepare(model), X).layers == [*full_names(4), "final#0"]


def test_a_graph_break_in_the_middle_of_the_layers() -> None:
    class Halves(Model):
        def forward(self, x: Tensor) -> Tensor:
            for at, block in enumerate(self.blocks):
                x = block(x)
                if at == 1:
                    torch._dynamo.graph_break()
            return x

    model = Halves(Block() for _ in range(4))
    assert as_a_whole(sage.prepare(model), X).layers == full_names(4)


def test_explain_names_as_the_backend_does() -> None:
    model, options = sage.prepare(identical(3)), {"precision": "exact"}
    report = sage.explain(model.blocks[1], X, options=options)
    assert [site.layer for site in report.sites] == full_names(2)[2:]
    by_region(model, X)
    report = sage.explain(model, X, options=options)
    assert [site.layer for site in report.sites] == [*full_names(3), "final#0"]


@pytest.mark.parametrize("strict", [False, True])
def test_an_export_of_a_prepared_model(strict: bool) -> None:
    model = sage.prepare(identical(2))
    program = torch.export.export(model, (X,), strict=strict)
    recorder = as_a_whole(program.module(), X)
    assert recorder.layers == [*full_names(2), "final#0"]
    torch.testing.assert_close(program.module()(X), model(X), rtol=0, atol=0)


def test_a_shared_block_has_its_first_name() -> None:
    block = Block()
    model = sage.prepare(Model([block, Block(), block]))
    assert by_region(model, X).layers == full_names(2)


# --- forwards that are not simply functions of a class --------------------------------------


def passing_all(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


@pytest.mark.parametrize("decorator", [passing_all, torch.no_grad()], ids=["all", "no_grad"])
@pytest.mark.parametrize("breaks", ["", "between"])
def test_decorated_forwards(decorator: Any, breaks: str) -> None:
    class Decorated(Block):
        @decorator
        def forward(self, x: Tensor) -> Tensor:
            y = self.attn(x)
            if self.breaks:
                torch._dynamo.graph_break()
            return x + self.attn(y, causal=True)

    model = sage.prepare(Model(Decorated(breaks=breaks) for _ in range(10)))
    recorder = by_region(model, X)
    assert recorder.layers == full_names(10)
    assert set(recorder.runs.values()) == {1}


def test_forwards_that_call_super() -> None:
    class Scaled(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(2 * x)

    assert by_region(sage.prepare(Model([Scaled(), Scaled()])), X).layers == full_names(2)


def test_forwards_with_autocast() -> None:
    class Mixed(nn.Module):
        @torch.autocast("cpu", dtype=torch.bfloat16)
        def forward(self, x: Tensor) -> Tensor:
            return sdpa(x, x, x)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Mixed(), Mixed()])

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[0](x) + self.blocks[1](x)

    recorder = by_region(sage.prepare(Two()), X)
    assert recorder.layers == ["blocks.0#0", "blocks.1#0"]


def test_forwards_that_compile_themselves() -> None:
    recorder = Recorder()

    class Compiled(nn.Module):
        @torch.compile(backend=recorder)
        def forward(self, x: Tensor) -> Tensor:
            return sdpa(x, x, x)

    sage.prepare(nn.Sequential(Compiled(), Compiled()))(X)
    assert recorder.layers == ["0#0", "1#0"]


def test_forwards_that_dynamo_is_to_leave_alone_stay_so() -> None:
    class Disabled(nn.Module):
        @torch.compiler.disable
        def forward(self, x: Tensor) -> Tensor:
            assert not torch.compiler.is_compiling()
            return sdpa(x, x, x)

    assert as_a_whole(sage.prepare(nn.Sequential(Disabled())), X).layers == []


def test_keyword_only_arguments_and_defaults_are_kept() -> None:
    class Options(nn.Module):
        def forward(self, x: Tensor, factor: int = 2, *, offset: int = 3) -> Tensor:
            return x * factor + offset

    module, prepared = Options(), sage.prepare(Options())
    for arguments in ({}, {"factor": 5}, {"offset": 7}):
        assert torch.equal(prepared(X, **arguments), module(X, **arguments))
    assert inspect.signature(prepared.forward) == inspect.signature(module.forward)


def test_sequential_blocks() -> None:
    model = Model(nn.Sequential(Attention(), nn.Linear(8, 8)) for _ in range(10))
    recorder = by_region(sage.prepare(model), X)
    assert recorder.layers == [f"blocks.{at}.0#0" for at in range(10)]
    assert recorder.runs == dict.fromkeys(range(10), 1)
    called = [operation(node) for node in recorder.report.graphs[0].before.graph.nodes]
    assert called.count("linear") == 2  # the whole block, not its attention alone


def test_modules_of_torch_without_attention_are_left_alone() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), nn.ReLU())
    sage.prepare(model)
    assert [type(each) for each in model] == [nn.Sequential, nn.ReLU]
    assert type(model[0][0]) is nn.Linear


def test_a_forward_that_somebody_replaced_is_left_alone() -> None:
    model = identical(2)
    replaced = model.blocks[0]
    replaced.forward = lambda x: x + 1  # type: ignore[method-assign]
    sage.prepare(model)
    assert type(replaced) is Block and torch.equal(replaced(X), X + 1)
    assert type(model.blocks[1]) is not Block


def test_a_forward_may_be_replaced_afterwards() -> None:
    model = sage.prepare(identical(1))
    block = model.blocks[0]
    before, original = block(X), block.forward
    block.forward = lambda x: 2 * original(x)  # type: ignore[method-assign]
    assert torch.equal(block(X), 2 * before)


def test_a_class_may_be_derived_afterwards() -> None:
    model = sage.prepare(identical(2))
    block = model.blocks[0]
    block.__class__ = type("Sharded", (type(block),), {})  # as fully_shard does
    derived = type(block)
    assert type(sage.prepare(model).blocks[0]) is derived
    assert by_region(model, X).layers == full_names(2)


def test_classes_with_a_metaclass_of_their_own_are_left_alone() -> None:
    class Registry(type):
        pass

    class Registered(Attention, metaclass=Registry):
        pass

    module = Registered()
    assert type(sage.prepare(module)) is Registered


def test_abstract_base_classes() -> None:
    class Base(nn.Module, ABC):
        @abstractmethod
        def forward(self, x: Tensor) -> Tensor: ...

    class Concrete(Base):
        def forward(self, x: Tensor) -> Tensor:
            return sdpa(x, x, x)

    assert as_a_whole(sage.prepare(nn.Sequential(Concrete())), X).layers == ["0#0"]


def test_graph_modules_and_scripted_modules_are_left_alone() -> None:
    traced = fx.symbolic_trace(nn.Sequential(nn.Linear(8, 8)))
    scripted = torch.jit.script(nn.Linear(8, 8))
    kinds = type(traced), type(scripted)
    sage.prepare(nn.ModuleList([traced, scripted]))
    assert (type(traced), type(scripted)) == kinds


def test_nobody_is_told_of_the_new_classes() -> None:
    class Announcing(Attention):
        known: list[type] = []  # noqa: RUF012

        def __init_subclass__(cls) -> None:
            Announcing.known.append(cls)

    sage.prepare(Announcing())
    assert Announcing.known == []


# --- what stays as it was -------------------------------------------------------------------


def test_it_returns_the_same_module_with_the_same_content() -> None:
    model = identical(3)
    state, described = model.state_dict(), repr(model)
    modules = [(name, id(module)) for name, module in model.named_modules()]
    parameters = [(name, id(each)) for name, each in model.named_parameters()]
    assert sage.prepare(model) is model
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(now, state[key]) for key, now in model.state_dict().items())
    assert [(name, id(module)) for name, module in model.named_modules()] == modules
    assert [(name, id(each)) for name, each in model.named_parameters()] == parameters
    assert repr(model) == described
    model.load_state_dict(state)


def test_classes_look_as_they_did() -> None:
    block = sage.prepare(Block())
    assert isinstance(block, Block) and issubclass(type(block), Block)
    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(type(block), name) == getattr(Block, name)


@pytest.mark.parametrize("training", [False, True])
def test_eager_results_and_gradients_are_bitwise_equal(training: bool) -> None:
    model = identical(3).train(training)
    prepared = sage.prepare(copy.deepcopy(model))
    results = []
    for each in (model, prepared):
        given = X.clone().requires_grad_()
        each(given).square().sum().backward()
        results.append([each(X), given.grad, *(p.grad for p in each.parameters())])
    for before, after in zip(*results, strict=True):
        assert torch.equal(before, after)
    assert prepared.training == prepared.blocks[0].attn.training == training
    assert not prepared.eval().blocks[0].attn.training


def test_hooks_run_as_before() -> None:
    model, calls = identical(1), []
    model.blocks[0].register_forward_pre_hook(lambda module, inputs: calls.append("before"))
    sage.prepare(model)
    model.blocks[0].register_forward_hook(lambda module, inputs, output: calls.append("after"))
    model(X)
    assert calls == ["before", "after"]


@pytest.mark.parametrize(
    "again",
    [
        copy.copy,
        copy.deepcopy,
        *(
            functools.partial(lambda version, model: pickle.loads(pickle.dumps(model, version)), v)
            for v in (0, 2, pickle.HIGHEST_PROTOCOL)
        ),
    ],
    ids=["copy", "deepcopy", "pickle 0", "pickle 2", "pickle"],
)
def test_copies_have_the_class_that_the_model_had(again: Callable[[Any], Any]) -> None:
    model = sage.prepare(identical(2))
    copied = again(model)
    assert type(copied) is Model
    assert torch.equal(copied(X), model(X))
    assert by_region(sage.prepare(copied), X).layers == full_names(2)


def test_a_pickle_does_not_need_this_package() -> None:
    model = sage.prepare(identical(2))
    file = io.BytesIO()
    torch.save(model, file)
    assert b"sage_compiler" not in file.getvalue()
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert type(loaded.blocks[0]) is Block and torch.equal(loaded(X), model(X))


def test_pickling_of_the_user_s_own() -> None:
    model = sage.prepare(Rebuilt(3))
    loaded = pickle.loads(pickle.dumps(model))
    assert type(loaded) is Rebuilt and loaded.size == 3


class Rebuilt(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def __reduce__(self) -> Any:
        return type(self), (self.size,)

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_copies_of_a_prepared_layer_are_layers_of_their_own() -> None:
    block = sage.prepare(Block())
    model = sage.prepare(Model(copy.deepcopy(block) for _ in range(3)))
    assert by_region(model, X).layers == full_names(3)


def test_twice_is_once() -> None:
    model = sage.prepare(identical(2))
    classes = [type(module) for module in model.modules()]
    recorder = by_region(model, X)
    sage.prepare(model)
    assert [type(module) for module in model.modules()] == classes
    with torch.no_grad():
        model(X)
    assert len(recorder.report.graphs) == 2  # nothing was compiled anew


def test_a_larger_model_renames_its_part() -> None:
    model = identical(2)
    sage.prepare(model.blocks[1])
    first = type(model.blocks[1])
    sage.prepare(model)
    assert type(model.blocks[1]) is not first
    assert type(model.blocks[1]).__mro__[2] is Block  # not a subclass of the first
    assert by_region(model, X).layers == full_names(2)


def test_a_class_that_was_patched_since_is_taken_up() -> None:
    class Patched(Block):
        pass

    model = sage.prepare(Model([Patched()]))
    with mock.patch.object(Patched, "forward", lambda self, x: x + 1, create=True):
        assert torch.equal(sage.prepare(model).blocks[0](X), X + 1)
    assert not torch.equal(sage.prepare(model).blocks[0](X), X + 1)


def test_nothing_is_kept_alive() -> None:
    model = sage.prepare(identical(2))
    model(X)
    block, kind = weakref.ref(model.blocks[0]), weakref.ref(type(model.blocks[0]))
    del model
    assert block() is None  # at once: its memory is free
    gc.collect()
    assert kind() is None


def test_a_model_of_transformers() -> None:
    config = hf.LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        vocab_size=99,
    )
    model = hf.LlamaModel(config).eval()
    tokens = torch.arange(5, 17).view(1, 12)
    with torch.no_grad():
        expected = model(tokens, output_hidden_states=True)
        sage.prepare(model)
        actual = model(tokens, output_hidden_states=True)
        assert torch.equal(actual.last_hidden_state, expected.last_hidden_state)
        assert len(actual.hidden_states) == len(expected.hidden_states) == 3
        recorder = Recorder()
        for layer in model.layers:
            layer.compile(backend=recorder)
        compiled = model(tokens)
    torch.testing.assert_close(compiled.last_hidden_state, expected.last_hidden_state)
    assert recorder.layers == ["layers.0.self_attn#0", "layers.1.self_attn#0"]


# --- PyTorch's own transformer layers -------------------------------------------------------

SOURCE = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))
PADDING = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
CAUSAL = nn.Transformer.generate_square_subsequent_mask(6)


def encoder(layers: int = 2, **options: Any) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, **options)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).eval()


def encoder_names(layers: int) -> list[str]:
    return [f"layers.{at}.self_attn#0" for at in range(layers)]


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize(
    "masks",
    [
        {},
        {"src_key_padding_mask": PADDING},
        {"mask": CAUSAL},
        {"mask": CAUSAL, "is_causal": True},
        {"mask": CAUSAL != 0, "src_key_padding_mask": PADDING},
    ],
    ids=["none", "padding", "causal", "hint", "both"],
)
def test_an_encoder(norm_first: bool, masks: dict[str, Any]) -> None:
    model = encoder(norm_first=norm_first)
    with torch.no_grad():
        expected = model(SOURCE, **masks)
        assert torch.equal(sage.prepare(model)(SOURCE, **masks), expected)
    assert as_a_whole(model, SOURCE, **masks).layers == encoder_names(2)


def test_without_it_encoder_layers_by_region_are_not_compiled() -> None:
    model, recorder = encoder(), Recorder()
    for layer in model.layers:
        layer.compile(backend=recorder)
    model(SOURCE)
    assert recorder.layers == []


def test_encoder_layers_by_region() -> None:
    model = sage.prepare(encoder(12))
    recorder = Recorder()
    with torch.no_grad():
        expected = model(SOURCE)
        for layer in model.layers:
            layer.compile(backend=recorder)
        torch.testing.assert_close(model(SOURCE), expected, rtol=0, atol=1e-5)
    assert recorder.layers == encoder_names(12)
    assert recorder.runs == dict.fromkeys(range(12), 1)


def test_an_encoder_in_training() -> None:
    model = encoder(dropout=0.0).train()
    expected = model(SOURCE)
    assert torch.equal(sage.prepare(model)(SOURCE), expected)
    compiled = torch.compile(model, backend=Recorder())(SOURCE)
    torch.testing.assert_close(compiled, expected, rtol=0, atol=1e-5)


def test_an_encoder_with_nested_tensors_in_eager() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    with torch.no_grad():
        expected = model(SOURCE, src_key_padding_mask=PADDING)
        assert torch.equal(sage.prepare(model)(SOURCE, src_key_padding_mask=PADDING), expected)


def test_multihead_attention_by_region() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(
                nn.MultiheadAttention(16, 4, batch_first=True) for _ in range(3)
            )

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x, x, x, need_weights=False)[0]
            return x

    recorder = by_region(sage.prepare(Cross().eval()), SOURCE)
    assert recorder.layers == [f"blocks.{at}#0" for at in range(3)]


# --- what it refuses ------------------------------------------------------------------------


@pytest.mark.parametrize("given", [None, sdpa, {"model": Block()}, Block], ids=str)
def test_what_is_no_module_is_refused(given: Any) -> None:
    with pytest.raises(TypeError, match=f"prepare got {type(given).__name__}; it needs the nn.M"):
        sage.prepare(given)


def test_a_compiled_model_is_prepared_within() -> None:
    recorder = Recorder()
    compiled = torch.compile(identical(2), backend=recorder)
    assert sage.prepare(compiled) is compiled
    compiled(X)
    assert recorder.layers == [*full_names(2), "final#0"]
