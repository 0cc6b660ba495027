"""explain() is a dry run: the same findings, nothing compiled, nothing left behind."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

import sage_compiler as sage


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 8)

    def forward(self, x: Tensor, *, causal: bool = False) -> Tensor:
        x = self.project(x)
        return F.scaled_dot_product_attention(x, x, x, is_causal=causal)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(1, 2, 6, 8)


def test_same_findings_as_compiling(x: Tensor) -> None:
    torch._dynamo.reset()
    model = Model()
    options = {"precision": "int8_fp8"}
    dry = sage.explain(model, x, options=options, causal=True)
    assert sage.last_report().sites == []
    torch.compile(model, backend="sage", options=options)(x, causal=True)
    assert dry.sites == sage.last_report().sites
    assert dry.sites[0].mask == "causal"


def test_nothing_is_compiled(x: Tensor) -> None:
    torch._dynamo.reset()
    counters.clear()
    report = sage.explain(Model(), x, options={"precision": "exact"})
    assert len(report.rewritten) == 1
    assert not counters["inductor"]


def test_can_be_asked_often(x: Tensor) -> None:
    """Dynamo gives up on code that it has compiled too often; asking must not count."""
    model = Model()
    for _ in range(2 * torch._dynamo.config.recompile_limit):
        assert len(sage.explain(model, x, options={"precision": "exact"}).rewritten) == 1


def test_can_be_asked_often_across_graph_breaks(x: Tensor) -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = F.scaled_dot_product_attention(x, x, x)
            torch._dynamo.graph_break()
            return F.scaled_dot_product_attention(x, x, x, is_causal=True)

    torch._dynamo.reset()
    model = Broken()
    options = {"precision": "exact"}
    for _ in range(2):  # the second time beside a compilation of the user's
        for _ in range(torch._dynamo.config.recompile_limit + 2):
            assert len(sage.explain(model, x, options=options).rewritten) == 2
        torch.compile(model, backend="sage", options=options)(x)
        assert len(sage.last_report().rewritten) >= 2


def test_options_are_checked_before_the_model_runs() -> None:
    def model() -> None:
        raise AssertionError("it must not run")

    with pytest.raises(sage.InvalidOptionError, match="unknown option 'presicion'"):
        sage.explain(model, options={"presicion": "exact"})


def test_a_graph_break_gives_two_graphs(x: Tensor) -> None:
    def model(x: Tensor) -> Tensor:
        x = F.scaled_dot_product_attention(x, x, x)
        torch._dynamo.graph_break()
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)

    report = sage.explain(model, x, options={"precision": "exact"})
    assert len(report.graphs) == 2
    assert [site.mask for site in report.rewritten] == ["none", "causal"]


def test_an_exported_program(x: Tensor) -> None:
    program = torch.export.export(Model(), (x,), {"causal": True})
    report = sage.explain(program.module(), x, causal=True, options={"precision": "exact"})
    assert [site.mask for site in report.rewritten] == ["causal"]


def test_auto_says_why_nothing_is_rewritten(x: Tensor) -> None:
    (site,) = sage.explain(Model(), x).kept
    assert site.reason.startswith("precision='auto': cpu")
    assert "head_dim 8 is not a multiple of 8" in site.reason


def test_fallback_error_names_the_layer_and_the_way_out(x: Tensor) -> None:
    options: dict[str, Any] = {"precision": "int4_fp8", "fallback": "error"}
    with pytest.raises(sage.KernelUnavailableError, match="no int4_fp8 kernel") as error:
        sage.explain(Model(), x, options=options)
    assert "fallback='emulate'" in str(error.value)
