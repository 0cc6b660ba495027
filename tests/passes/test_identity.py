"""Names: the same in every graph, and nobody else's; fingerprints: what a name must fit."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from types import FunctionType
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import sage_compiler as sage
from sage_compiler.passes import identity
from sage_compiler.passes.identity import LayerNames, join, module_of
from sage_compiler.precision import EXACT
from sage_compiler.report import Report
from tests.capture import rewritten
from tests.passes.checks import Compiled, check, normal, sdpa
from tests.recording import Recorder

X = normal(2, 4, 6, 8)
LONGER, LONGEST = normal(2, 4, 7, 8), normal(2, 4, 9, 8)


def names(report: Report) -> list[str]:
    return [site.layer for site in report.sites]


def graph_break() -> None:
    torch._dynamo.graph_break()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.project(x)
        return sdpa(sdpa(x, x, x), x, x)


class Once(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return sdpa(x, x, x)


# --- qualified names ------------------------------------------------------------------------


def node_in(*stack: tuple[str, Any]) -> fx.Node:
    node = fx.Graph().placeholder("x")
    node.meta["nn_module_stack"] = {str(at): entry for at, entry in enumerate(stack)}
    return node


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("L['self']", ""),
        ("L['self'].encoder.layer[3].attention", "encoder.layer.3.attention"),
        ("L['self']._modules['encoder']._modules['0'].attn", "encoder.0.attn"),
        ("L['self'].blocks['a b']", "blocks.a b"),
        ("L['self'].blocks.0._orig_mod.attn", "blocks.0.attn"),
        ("G['model'].layers.0", "layers.0"),
        ("L['args'][0].layers[1]", "0.layers.1"),
        ("L['self']._modules['0']", "0"),
        ("layers.0.attn", "layers.0.attn"),
        ("", ""),
    ],
)
def test_module_names(path: str, name: str) -> None:
    assert module_of(node_in(("L['self']", nn.Module), (path, nn.Module))) == name


def test_the_variable_of_the_root_is_no_part_of_the_name() -> None:
    node = node_in(("L['args'][0].layers[1]", nn.Module))
    assert module_of(node, root="L['args'][0]") == "layers.1"


def test_no_stack_is_the_root() -> None:
    assert module_of(fx.Graph().placeholder("x")) == module_of(node_in()) == ""


@pytest.mark.parametrize("kind", [nn.Softmax, "torch.nn.modules.activation.Softmax"])
def test_a_softmax_belongs_to_the_module_that_calls_it(kind: Any) -> None:
    node = node_in(("L['self'].attn", nn.Module), ("L['self'].shared.softmax", kind))
    assert module_of(node) == "attn"


def test_the_fast_path_of_an_encoder_layer_has_the_name_of_its_attention() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    model, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), X[:, 0]
    wanted = ["layers.0.self_attn#0", "layers.1.self_attn#0"]
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):  # which decides on the path
            assert names(rewritten(model, x, precision=EXACT)[1]) == wanted


def test_joined_names() -> None:
    assert join("", "") == "" and join("a", "") == join("", "a") == "a"
    assert join("blocks.3", "_orig_mod.attn") == "blocks.3.attn"


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Attention(), Attention()])
        self.named = nn.ModuleDict({"cross": Attention()})
        self.tail = nn.Sequential(nn.Identity(), Attention())

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        x = self.tail(self.named["cross"](x))
        return sdpa(x, x, x)


LAYERS = [
    f"{module}#{ordinal}"
    for module in ("blocks.0", "blocks.1", "named.cross", "tail.1")
    for ordinal in (0, 1)
] + ["(root)#0"]

MODEL = Model()


def test_layers_of_a_module() -> None:
    assert names(check(MODEL, X)) == LAYERS


def test_layers_of_a_module_called_by_a_function() -> None:
    assert names(check(lambda x: MODEL(x), X)) == LAYERS


def test_layers_of_a_module_that_an_object_holds() -> None:
    class Pipeline:
        def __init__(self) -> None:
            self.transformer = MODEL

    pipeline = Pipeline()
    wanted = [f"transformer.{name}" for name in LAYERS[:-1]] + ["transformer#0"]
    assert names(check(lambda x: pipeline.transformer(x), X)) == wanted


def test_layers_of_compiled_modules_in_a_compiled_module() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = torch.compile(Model(), backend="eager")

        def forward(self, x: Tensor) -> Tensor:
            return self.part(x)

    wanted = [f"part.{name}" for name in LAYERS[:-1]] + ["part#0"]
    assert names(rewritten(Outer(), X, precision=EXACT)[1]) == wanted


@pytest.mark.parametrize("strict", [False, True])
def test_layers_of_an_exported_program(strict: bool) -> None:
    program = torch.export.export(Model(), (X,), strict=strict)
    assert names(sage.explain(program.module(), X, options={"precision": EXACT})) == LAYERS


def passing_all(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


def test_layers_of_a_module_with_a_decorated_forward() -> None:
    class Decorated(Model):
        @passing_all
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    assert names(check(Decorated(), X)) == LAYERS


def test_a_shared_softmax_does_not_merge_layers() -> None:
    class Written(nn.Module):
        def __init__(self, softmax: nn.Module) -> None:
            super().__init__()
            self.softmax = softmax

        def forward(self, x: Tensor) -> Tensor:
            return self.softmax(x @ x.mT) @ x

    softmax = nn.Softmax(dim=-1)
    model = nn.Sequential(Written(softmax), Written(softmax))
    assert names(rewritten(model, X)[1]) == ["0#0", "1#0"]


# --- ordinals within one graph --------------------------------------------------------------


def test_ordinals_count_within_one_module() -> None:
    handed = LayerNames()
    first, second = (node_in((f"L['self'].{name}", nn.Module)) for name in "ab")
    root = node_in()
    found = [handed.next(node) for node in (first, second, first, root, root)]
    assert found == ["a#0", "b#0", "a#1", "(root)#0", "(root)#1"]


def test_outside_of_dynamo_every_graph_starts_at_0() -> None:
    for _ in range(2):
        assert LayerNames().next(node_in()) == "(root)#0"


def test_a_module_called_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Once()

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(self.attention(x))

    assert names(check(Twice(), X)) == ["attention#0", "attention#1"]


class Shared(nn.Module):
    """One module with four names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = Once()
        self.listed = nn.Sequential(self.first, self.first)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(self.second(self.listed(x)))


def test_a_shared_module_has_the_name_that_dynamo_reaches_it_by() -> None:
    found = names(check(Shared(), X))
    assert found == ["listed.0#0", "listed.1#0", "listed.1#1", "listed.1#2"]


def test_a_shared_module_in_an_export_has_the_name_it_is_called_by() -> None:
    program = torch.export.export(Shared(), (X,), strict=False)
    report = sage.explain(program.module(), X, options={"precision": EXACT})
    assert names(report) == ["listed.0#0", "listed.1#0", "second#0", "first#0"]


# --- ordinals over graph breaks -------------------------------------------------------------


class Broken(nn.Module):
    """Three parts with 1, 2 and 1 attentions of the root, and 1, 0 and 1 of ``inner``."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Once()

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(sdpa(x, x, x))
        graph_break()
        x = sdpa(sdpa(x, x, x), x, x)
        graph_break()
        return self.inner(sdpa(x, x, x))


BROKEN = ["(root)#0", "inner#0", "(root)#1", "(root)#2", "(root)#3", "inner#1"]


def test_ordinals_go_on_after_a_graph_break() -> None:
    report = check(Broken(), X)
    assert len(report.graphs) == 3
    assert names(report) == BROKEN


def test_ordinals_of_a_function_go_on_after_a_graph_break() -> None:
    def broken(x: Tensor) -> Tensor:
        x = MODEL.blocks[0](x)
        graph_break()
        return MODEL.tail(MODEL.blocks[0](sdpa(x, x, x)))

    wanted = ["blocks.0#0", "blocks.0#1", "(root)#0", "blocks.0#2", "blocks.0#3"]
    assert names(check(broken, X)) == [*wanted, "tail.1#0", "tail.1#1"]


def test_nothing_before_the_graph_break() -> None:
    def broken(x: Tensor) -> Tensor:
        graph_break()
        x = sdpa(x, x, x)
        graph_break()
        return sdpa(x, x, x)

    compiled = Compiled(broken)
    for given in (X, LONGER):
        compiled(given)
    assert names(compiled.report) == ["(root)#0", "(root)#1"] * 2


def test_a_graph_break_between_layers() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Once() for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            x = self.blocks[1](self.blocks[0](x))
            graph_break()
            return self.blocks[3](self.blocks[2](x))

    report = check(Halves(), X)
    assert len(report.graphs) == 2
    assert names(report) == [f"blocks.{at}#0" for at in range(4)]


class Block(nn.Module):
    def __init__(self, broken: bool = False) -> None:
        super().__init__()
        self.attn = Once()
        self.broken = broken

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(x)
        if self.broken:
            graph_break()
        return x + sdpa(x, x, x)


def test_without_prepare_a_graph_break_in_a_loop_leaves_names_relative_to_the_layer() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            for at, block in enumerate(self.blocks):
                x = block(x)
                if at == 1:
                    graph_break()
            return x

    report = check(Loop(), X)  # Dynamo gives up the loop, and captures what it calls
    assert names(report) == ["attn#0", "(root)#0"]


def test_a_layer_that_breaks_is_named_for_itself() -> None:
    model = nn.Sequential(Block(), Block(broken=True))
    assert set(names(check(model, X))) == {"attn#0", "(root)#0"}


# --- ordinals over recompilations -----------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, None, True])
def test_recompilation_for_other_shapes(dynamic: bool | None) -> None:
    compiled = Compiled(Broken(), dynamic=dynamic)
    for given in (X, LONGER, LONGEST):
        compiled(given)
    times = {False: 3, None: 2, True: 1}[dynamic]
    assert names(compiled.report) == BROKEN * times


def test_recompilation_of_the_beginning_alone() -> None:
    def broken(x: Tensor, scale: int) -> Tensor:
        x = sdpa(x * scale, x, x)
        graph_break()
        return sdpa(x, x, x)

    compiled = Compiled(broken, dynamic=False)
    compiled(X, 1), compiled(X, 2)
    assert names(compiled.report) == ["(root)#0", "(root)#1", "(root)#0"]


def test_recompilation_of_the_end_alone() -> None:
    def broken(x: Tensor, scale: int) -> Tensor:
        x = sdpa(x, x, x)
        graph_break()
        x = sdpa(x, x, x)
        graph_break()
        return sdpa(sdpa(x * scale, x, x), x, x)

    compiled = Compiled(broken, dynamic=False)
    compiled(X, 1), compiled(X, 2)
    assert names(compiled.report) == [f"(root)#{at}" for at in (0, 1, 2, 3, 2, 3)]


def test_recompilation_for_another_branch_starts_where_the_part_starts() -> None:
    def broken(x: Tensor, twice: bool) -> Tensor:
        x = sdpa(x, x, x)
        graph_break()
        if twice:
            x = sdpa(x, x, x)
        return sdpa(x, x, x)

    compiled = Compiled(broken)
    compiled(X, False), compiled(X, True)
    assert names(compiled.report) == [f"(root)#{at}" for at in (0, 1, 1, 2)]


def test_reset_starts_over() -> None:
    model = Broken()
    for _ in range(2):
        assert names(check(model, X)) == BROKEN  # it resets Dynamo first


# --- several models -------------------------------------------------------------------------


class Repeated(nn.Module):
    """As many attentions as asked for before and after a graph break."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = sdpa(x, x, x)
        graph_break()
        return sdpa(x, x, x)


def test_two_models_of_one_class() -> None:
    torch._dynamo.reset()
    for times in (3, 1, 2):
        recorder = Recorder()  # to Dynamo a backend of its own, which shares no graph
        torch.compile(Repeated(times), backend=recorder)(X)
        assert recorder.layers == [f"(root)#{at}" for at in range(times + 1)]


def test_two_models_and_two_functions() -> None:
    def first(x: Tensor) -> Tensor:
        return sdpa(x, x, x)

    def second(x: Tensor) -> Tensor:
        return sdpa(x * 2, x, x)

    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Once()

        def forward(self, x: Tensor) -> Tensor:
            x = self.inner(x + sdpa(x, x, x))
            graph_break()
            return self.inner(x + sdpa(x, x, x))

    recorder = Recorder()
    torch._dynamo.reset()
    for function in (first, Broken(), second, Other()):
        torch.compile(function, backend=recorder)(X)
    others = ["(root)#0", "inner#0", "(root)#1", "inner#1"]
    assert recorder.layers == ["(root)#0", *BROKEN, "(root)#0", *others]


def test_a_part_that_two_models_share_is_counted_for_both() -> None:
    class Other(Broken):
        pass

    recorder = Recorder()
    torch._dynamo.reset()
    for model in (Broken(), Other()):
        torch.compile(model, backend=recorder)(X)
    # The second part does not know whose it is: Dynamo compiles it once.
    assert recorder.layers == [*BROKEN, *BROKEN[:2], *BROKEN[-2:]]


def test_explain_names_as_the_backend_does() -> None:
    model, options = Broken(), {"precision": EXACT}
    compiled = Compiled(model, dynamic=False)
    for given in (X, LONGER, LONGEST):
        dry = sage.explain(model, given, options=options)
        compiled(given)
        assert names(dry) == names(compiled.report) == BROKEN
        assert names(sage.explain(model, given, options=options)) == BROKEN
        compiled.report.sites.clear()


def attend(x: Tensor) -> Tensor:
    return sdpa(x, x, x)


def test_nothing_is_kept_for_code_that_is_gone() -> None:
    def compile_one() -> None:
        function = FunctionType(attend.__code__.replace(), globals())
        assert names(rewritten(function, X)[1]) == ["(root)#0"]

    def kept() -> tuple[int, int]:
        torch._dynamo.reset()
        gc.collect()
        return len(identity._parts), len(identity._latest)

    compile_one()
    before = kept()
    for _ in range(3):
        compile_one()
    after = kept()
    assert after[0] <= before[0] and after[1] <= before[1]


# --- fingerprints ---------------------------------------------------------------------------


def fingerprints(function: Callable[..., Any], *inputs: Any, **options: Any) -> set[str]:
    report = rewritten(function, *inputs, precision=EXACT, **options)[1]
    assert report.sites
    return {site.fingerprint for site in report.sites}


KEYS, VALUES = normal(2, 2, 9, 8), normal(2, 2, 9, 24)


@pytest.mark.parametrize(
    ("options", "mask"),
    [
        ({}, "none"),
        ({"is_causal": True}, "causal"),
        ({"attn_mask": normal(6, 9) > 0}, "none+bool"),
        ({"attn_mask": normal(2, 1, 6, 9)}, "none+additive"),
    ],
    ids=["none", "causal", "bool", "additive"],
)
def test_fingerprint(options: dict[str, Any], mask: str) -> None:
    def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, k, v, enable_gqa=True, **options)

    assert fingerprints(grouped, X, KEYS, VALUES) == {f"q4 kv2 d8 dv24 {mask}"}


def test_fingerprint_of_a_folded_window() -> None:
    def window(x: Tensor) -> Tensor:
        at = torch.arange(x.shape[2])
        return sdpa(x, x, x, attn_mask=(at[:, None] - at).abs() <= 2)

    assert fingerprints(window, X) == {"q4 kv4 d8 dv8 window"}


def test_fingerprint_of_attention_written_out() -> None:
    def written(x: Tensor, mask: Tensor) -> Tensor:
        return ((x @ x.mT) / 3).masked_fill(mask, -torch.inf).softmax(-1) @ x

    assert fingerprints(written, X, normal(6, 6) > 0.5) == {"q4 kv4 d8 dv8 none+bool"}


@pytest.mark.parametrize("gradients", [False, True], ids=["fast path", "slow path"])
def test_fingerprint_of_an_encoder_layer(gradients: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    with torch.set_grad_enabled(gradients):
        found = fingerprints(lambda x: layer(x, src_key_padding_mask=padding), X[:, 0])
    assert found == {"q2 kv2 d4 dv4 none+bool"}


@pytest.mark.parametrize("dynamic", [False, True])
def test_neither_batch_nor_lengths_are_in_a_fingerprint(dynamic: bool) -> None:
    def causal(x: Tensor) -> Tensor:
        return sdpa(x, x, x, is_causal=True)

    found = [fingerprints(causal, x, dynamic=dynamic) for x in (X, normal(3, 4, 11, 8))]
    assert found == [{"q4 kv4 d8 dv8 causal"}] * 2


def test_heads_that_the_batch_is_part_of_are_unknown() -> None:
    assert fingerprints(lambda x: sdpa(x, x, x), X[0]) == {"q? kv? d8 dv8 none"}


def test_what_is_not_proved_has_no_fingerprint() -> None:
    assert fingerprints(lambda x: sdpa(x, x, x, dropout_p=0.5), X) == {""}
