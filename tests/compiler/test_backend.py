"""torch.compile(model, backend="sage") for real, Inductor included."""

import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

import sage_compiler as sage
from sage_compiler.kernels import reference, registry
from sage_compiler.kernels.kernel import Gate, Kernel, Problem
from sage_compiler.precision import RECIPES
from tests import tolerances

EXACT = {"precision": "exact"}
ABSOLUTE = 1e-5


class Layer(nn.Module):
    """Projections around one attention, as models write it."""

    def __init__(self, width: int = 32, heads: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        p = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        return x + self.out(attended.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, layers: int = 2, dropout: float = 0.0, width: int = 32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(width=width, dropout=dropout) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(1)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 24, 32)


def check(model: nn.Module, x: Tensor, **arguments: Any) -> sage.Report:
    """Compiled with these arguments, the model equals eager; returns the report."""
    with torch.no_grad():
        expected = model(x)
        actual = torch.compile(model, backend="sage", **arguments)(x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=ABSOLUTE)
    return sage.last_report()


def test_found_by_name_without_an_import() -> None:
    assert "sage" in torch._dynamo.list_backends()


@pytest.mark.parametrize(
    "arguments",
    [
        {"fullgraph": True, "options": EXACT},
        {"dynamic": True, "options": EXACT},
        {"options": {**EXACT, "mode": "max-autotune-no-cudagraphs"}},
        {"options": {**EXACT, "mode": "default"}},
        {"options": {**EXACT, "inductor": {"max-autotune": False, "epilogue_fusion": False}}},
    ],
    ids=str,
)
def test_ways_to_call(x: Tensor, arguments: dict[str, Any]) -> None:
    report = check(Model(), x, **arguments)
    assert [site.layer for site in report.rewritten] == ["layers.0#0", "layers.1#0"]
    assert report.kept == []


def test_mode_alone_is_auto(x: Tensor) -> None:
    report = check(Model(), x, mode="reduce-overhead")
    assert len(report.kept) == 2
    assert "head_dim 8 is not a multiple of 8 from 16 to 256" in report.kept[0].reason


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"options": {"precison": "exact"}}, "unknown option 'precison'; known: fallback"),
        ({"options": {"precision": "int2_fp8"}}, "unknown precision 'int2_fp8'; known: auto"),
        ({"options": {"mode": "fastest"}}, "mode='fastest'; known: default"),
        ({"options": {"inductor": {"max_autotun": True}}}, "'max_autotun'"),
        (
            {"options": {"inductor": {"max_autotune": "yes"}}},
            "'yes'; its type is bool",
        ),
        ({"options": {"precision": "int4_fp8", "fallback": "error"}}, "no int4_fp8 kernel"),
    ],
    ids=str,
)
def test_bad_options_raise_and_nothing_is_reported(
    x: Tensor, arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=words):
        torch.compile(Model(), backend="sage", **arguments)(x)
    assert sage.last_report().graphs == []


@pytest.mark.parametrize("name", ["int8_fp8", "int4_fp16", "int8_int8"])
def test_recipes_are_computed(x: Tensor, name: str) -> None:
    model = Model(layers=1)
    with torch.no_grad():
        expected = model(x) - x
        actual = torch.compile(model, backend="sage", options={"precision": name})(x) - x
    # The projection after the attention mixes its errors; it does not enlarge them.
    assert tolerances.rel_l1(actual, expected) < tolerances.TOLERANCES[name].rel_l1
    assert not torch.equal(actual, expected)
    (site,) = sage.last_report().rewritten
    assert site.recipe == name
    assert site.reason.startswith("emulated: ")
    assert "head_dim 8" in site.reason or f"no {name} kernel for device 'cpu'" in site.reason


@pytest.mark.parametrize("name", ["int8_int8", "int8_int16"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_the_native_kernel_computes_its_recipes(name: str, dynamic: bool) -> None:
    model, x = Model(layers=1, width=64), torch.randn(2, 100, 64)
    options = {"precision": name}
    with torch.no_grad():
        expected = model(x) - x
        actual = torch.compile(model, backend="sage", dynamic=dynamic, options=options)(x) - x
    assert tolerances.rel_l1(actual, expected) < tolerances.TOLERANCES[name].rel_l1
    assert not torch.equal(actual, expected)
    (site,) = sage.last_report().rewritten
    assert site.reason.startswith(f"precision={name!r}, kernel cpu-")


def test_training(x: Tensor) -> None:
    model = Model().train()
    model(x).sin().sum().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    for name, limit in (("exact", 1e-5), ("int8_fp16", 2e-2)):
        model.zero_grad()
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="sage", options={"precision": name})
        compiled(x).sin().sum().backward()
        assert len(sage.last_report().rewritten) == 2
        for wanted, parameter in zip(expected, model.parameters(), strict=True):
            size = float(wanted.abs().max())
            torch.testing.assert_close(parameter.grad, wanted, rtol=0, atol=limit * max(size, 1))


def test_dropout_in_training_is_kept_and_rewritten_in_evaluation(x: Tensor) -> None:
    model = Model(layers=1, dropout=0.3).train()
    compiled = torch.compile(model, backend="sage", options=EXACT)
    compiled(x)
    assert "dropout_p=0.3" in sage.last_report().kept[0].reason
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=ABSOLUTE)
    assert len(sage.last_report().rewritten) == 1


@pytest.mark.parametrize("where", ["around", "inside"])
def test_autocast(x: Tensor, where: str) -> None:
    inner = Model(layers=1)

    def inside(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return inner(x) * 1.0

    def around(x: Tensor) -> Tensor:
        return inner(x) * 1.0

    function = {"inside": inside, "around": around}[where]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=where == "around"):
        expected = function(x)
        actual = torch.compile(function, backend="sage", options=EXACT)(x)
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0, atol=0.05)
    (site,) = sage.last_report().rewritten
    assert site.recipe == "exact"


def test_graph_breaks_and_recompilations_are_merged(x: Tensor) -> None:
    model = Model(layers=1)

    def function(x: Tensor) -> Tensor:
        y = model(x)
        torch._dynamo.graph_break()
        return F.scaled_dot_product_attention(y, y, y)

    with torch.no_grad():
        compiled = torch.compile(function, backend="sage", options=EXACT, dynamic=False)
        for batch in (1, 2):
            data = x[:batch].contiguous()
            torch.testing.assert_close(compiled(data), function(data), rtol=0, atol=ABSOLUTE)
    report = sage.last_report()
    assert len(report.graphs) == 4
    assert [site.q_shape[0] for site in report.rewritten if site.layer == "layers.0#0"] == [1, 2]


def test_dynamic_lengths_are_right_at_every_length() -> None:
    model = Model(layers=1)
    compiled = torch.compile(model, backend="sage", options=EXACT, dynamic=True)
    with torch.no_grad():
        for batch, length in ((2, 24), (3, 7), (5, 130)):
            x = torch.randn(batch, length, 32)
            torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=ABSOLUTE)
    report = sage.last_report()
    assert len(report.graphs) == 1
    assert all(isinstance(size, str) for size in (report.sites[0].q_shape[i] for i in (0, 2)))


def test_exported_programs(x: Tensor) -> None:
    model = Model(layers=1)
    module = torch.export.export(model, (x,)).module()
    report = check(module, x, options=EXACT)
    assert [site.layer for site in report.rewritten] == ["layers.0#0"]


def test_last_report_is_empty_until_something_is_compiled(x: Tensor) -> None:
    assert sage.last_report().sites == [] and str(sage.last_report())
    check(Model(), x, options=EXACT)
    kept = sage.last_report()
    torch._dynamo.reset()
    assert sage.last_report().sites == []
    assert len(kept.sites) == 2  # what was handed out stays


SECOND_PROCESS = textwrap.dedent("""
    import json, sys
    import torch
    import torch.nn.functional as F
    from torch._dynamo.utils import counters

    def model(x):
        y = F.scaled_dot_product_attention(x, x, x, is_causal=True)
        return (y @ y.mT * 0.2).softmax(-2) @ y

    torch.manual_seed(0)
    x = torch.randn(2, 4, 16, 16)
    y = torch.compile(model, backend="sage", options={"precision": "int8_fp8"})(x)
    import sage_compiler
    report = sage_compiler.last_report().to_dict()
    hits = counters["aot_autograd"]["autograd_cache_hit"]
    print(json.dumps([report, y.double().sum().item(), hits]))
""")


def test_a_warm_cache_gives_the_same_result_and_report(tmp_path: Path) -> None:
    script = tmp_path / "second.py"
    script.write_text(SECOND_PROCESS)
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    runs = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", script],
            capture_output=True,
            text=True,
            env=environment,
            check=True,
        )
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    (cold_report, cold, cold_hits), (warm_report, warm, warm_hits) = runs
    assert cold_hits == 0 and warm_hits > 0
    assert warm_report == cold_report
    assert warm == cold
    assert (warm_report["rewritten"], warm_report["kept"]) == (1, 1)


# --- auto, with a kernel to choose ----------------------------------------------------------


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A stand-in for a native kernel; yields the calls it served."""
    served: list[str] = []

    def run(
        query: Tensor, key: Tensor, value: Tensor, semantics: Any, *, want_lse: bool, **masks: Any
    ) -> Any:
        served.append(str(tuple(query.shape)))
        assert not want_lse
        return reference.attention(query, key, value, RECIPES["int8_int8"], semantics, **masks)

    def refuse(problem: Problem) -> str | None:
        return None if problem.head_dim == 8 else f"head_dim {problem.head_dim} is not 8"

    def gate(problem: Problem) -> Gate:
        return Gate(query_length=32, key_length=64)

    stand_in = Kernel(lambda: "stand-in", "cpu", "int8_int8", refuse, gate, run)
    monkeypatch.setattr(registry, "KERNELS", [stand_in])
    yield served


def test_auto_takes_the_default_where_a_kernel_serves_it(kernel: list[str]) -> None:
    model, x = Model(), torch.randn(1, 80, 32)
    with torch.no_grad():
        torch.compile(model, backend="sage")(x)
    report = sage.last_report()
    assert [site.recipe for site in report.rewritten] == ["int8_int8"] * 2
    assert "kernel stand-in" in report.rewritten[0].reason
    assert kernel == ["(1, 4, 80, 8)"] * 2


def test_a_compiled_graph_hands_over_views_and_no_defaults(
    kernel: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is computed for an attention lies as Inductor likes, but what is expanded is no copy; and
    # arguments that say nothing would cost time in every call.
    sizes: list[int] = []

    def run(*arguments: Any, attn_mask: Tensor, **others: Any) -> Any:
        sizes.append(attn_mask.untyped_storage().nbytes() // attn_mask.itemsize)
        return served.run(*arguments, attn_mask=attn_mask, **others)

    served = registry.KERNELS[0]
    monkeypatch.setattr(registry, "KERNELS", [replace(served, run=run)])

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            q + 1, k, v, (mask.float() * 0.5).expand(2, 4, 80, 80)
        )

    q, k, v = (torch.randn(2, 80, 4, 8).transpose(1, 2) for _ in range(3))
    mask = torch.rand(2, 1, 1, 80) > 0.5
    with torch.no_grad():
        # It begins with a reset, so that it compiles, too.
        found, codes = run_and_get_code(
            lambda *inputs: torch.compile(attention, backend="sage", dynamic=True)(*inputs),
            q, k, v, mask,
        )  # fmt: skip
    torch.testing.assert_close(found, attention(q, k, v, mask), rtol=0, atol=0.05)
    assert kernel == ["(2, 4, 80, 8)"]
    assert sizes == [mask.numel()]
    (call,) = re.findall(r"sage\.attention\.default\((.*)\)", codes[0])
    assert "int8_int8" in call and "=" not in call


def test_mode_with_a_rewritten_model(kernel: list[str]) -> None:
    model, x = Model(layers=1), torch.randn(1, 80, 32)
    with torch.no_grad():
        torch.compile(model, backend="sage", mode="max-autotune-no-cudagraphs")(x)
    assert len(sage.last_report().rewritten) == 1
    assert kernel == ["(1, 4, 80, 8)"]


def test_auto_keeps_what_no_kernel_serves(kernel: list[str]) -> None:
    x = torch.randn(1, 2, 80, 16)
    torch.compile(lambda x: F.scaled_dot_product_attention(x, x, x), backend="sage")(x)
    (site,) = sage.last_report().kept
    assert "stand-in: head_dim 16 is not 8" in site.reason
    assert kernel == []


@pytest.mark.parametrize("gate, rewritten", [(None, 0), (24, 2), (25, 0), (0, 2)])
def test_short_attention_is_kept(kernel: list[str], gate: int | None, rewritten: int) -> None:
    x = torch.randn(1, 24, 32)
    options = {} if gate is None else {"min_seq_len": gate}
    with torch.no_grad():
        torch.compile(Model(), backend="sage", options=options)(x)
    report = sage.last_report()
    assert len(report.rewritten) == rewritten == len(kernel)
    if not rewritten:
        least = (
            "32, where kernel stand-in begins to gain" if gate is None else f"min_seq_len={gate}"
        )
        assert f"query length 24 is below {least}" in report.kept[0].reason


def test_few_keys_are_kept(kernel: list[str]) -> None:
    q, kv = torch.randn(1, 2, 40, 8), torch.randn(1, 2, 63, 8)
    torch.compile(lambda q, k: F.scaled_dot_product_attention(q, k, k), backend="sage")(q, kv)
    (site,) = sage.last_report().kept
    assert "key length 63 is below 64" in site.reason
    assert kernel == []


def test_the_gate_works_at_run_time_for_dynamic_lengths(kernel: list[str]) -> None:
    model = Model(layers=1)
    compiled = torch.compile(model, backend="sage", dynamic=True)
    with torch.no_grad():
        for length in (80, 40, 70):
            x = torch.randn(2, length, 32)
            compiled(x)
    assert kernel == ["(2, 4, 80, 8)", "(2, 4, 70, 8)"]
    assert len(sage.last_report().graphs) == 1


def test_symbols_for_heads_and_head_dim_become_constants_that_are_guarded() -> None:
    """dynamic=True on bare tensors makes every size a symbol; the kernel needs two as numbers."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scale = q.shape[-1] ** -0.5  # a symbol too, until head_dim is a number
        return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True)

    compiled = torch.compile(function, backend="sage", options=EXACT, dynamic=True)
    graphs = []
    for heads, kv_heads, head_dim, length in (
        (4, 2, 8, 24),
        (4, 2, 8, 51),
        (6, 3, 8, 24),
        (6, 3, 16, 9),
    ):
        q = torch.randn(2, heads, length, head_dim)
        k, v = torch.randn(2, 2, kv_heads, length + 3, head_dim).unbind()
        torch.testing.assert_close(compiled(q, k, v), function(q, k, v), rtol=0, atol=ABSOLUTE)
        graphs.append(len(sage.last_report().graphs))
    assert graphs == [1, 1, 2, 3]
    report = sage.last_report()
    assert [site.q_shape[1::2] for site in report.rewritten] == [(4, 8), (6, 8), (6, 16)]
    assert [site.heads for site in report.rewritten] == ["4 over 2", "6 over 3", "6 over 3"]
