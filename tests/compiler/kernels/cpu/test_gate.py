"""What `auto` gives the CPU kernel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sage_compiler as sage
from sage_compiler.kernels import registry
from sage_compiler.kernels.cpu import gate, kernel
from sage_compiler.kernels.kernel import Gate
from tests.compiler.calls import make_call, run
from tests.compiler.kernels.cpu.isas import ISAS
from tests.compiler.kernels.test_registry import PROBLEM

LEAST = Gate(query_length=40, key_length=50)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> dict[str, Gate]:
    """A table of our own, in which every instruction set gains; without AMX."""
    gates = dict.fromkeys(ISAS, LEAST)
    monkeypatch.setattr(gate, "GATES", gates)
    monkeypatch.setattr(gate, "has_amx", lambda dtype: False)
    return gates


def test_the_shipped_table() -> None:
    assert set(gate.GATES) <= set(ISAS)
    for least in gate.GATES.values():
        assert least.query_length > 1  # decoding gains with a packed cache alone
        assert least.key_length > 1
        assert least.products > 1


def test_an_instruction_set_that_does_not_gain(table: dict[str, Gate]) -> None:
    name = kernel.need().isa_name
    assert registry.default(PROBLEM).gate == LEAST
    del table[name]
    reason = f"cpu-{name}: no faster than scaled_dot_product_attention with {name} instructions"
    assert registry.default(PROBLEM) == registry.Default("exact", reason)
    assert isinstance(registry.find("int8_int8", PROBLEM), registry.Kernel)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_matrix_units_keep_half_precision(
    table: Mapping[str, Gate], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    problem = replace(PROBLEM, dtype=dtype)
    assert registry.default(problem).recipe == "int8_int8"
    monkeypatch.setattr(gate, "has_amx", lambda dtype: dtype != torch.float32)
    found = registry.default(problem)
    assert found.recipe == ("int8_int8" if dtype == torch.float32 else "exact")
    if dtype == torch.bfloat16:
        assert found.reason.endswith("scaled_dot_product_attention has AMX for bfloat16 here")
    assert isinstance(registry.find("int8_int8", problem), registry.Kernel)


def test_whether_there_are_matrix_units_is_asked_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, dtype in (("amx_bf16", torch.bfloat16), ("amx_fp16", torch.float16)):
        gate.has_amx.cache_clear()
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda name=name: {name: True})
        for other in (torch.float32, torch.bfloat16, torch.float16):
            assert gate.has_amx(other) is (other == dtype)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)  # not an x86
    gate.has_amx.cache_clear()
    assert not gate.has_amx(torch.bfloat16)
    gate.has_amx.cache_clear()


def test_one_thread_does_not_stand_in_for_many(
    table: Mapping[str, Gate], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel.need(), "has_threads", False)
    for threads, recipe in ((1, "int8_int8"), (2, "exact")):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert registry.default(PROBLEM).recipe == recipe
    assert "torch_parallel_for" in registry.default(PROBLEM).reason


def test_the_function_takes_it_where_it_gains(table: Mapping[str, Gate]) -> None:
    for lengths, gains in (
        ((40, 50), True),
        ((39, 50), False),
        ((40, 49), False),
        ((1, 99), False),
    ):
        call = make_call(*lengths, head_dim=16)
        output = sage.attention(call.query, call.key, call.value)
        assert torch.equal(output, run(call, "int8_int8")) is gains
        assert torch.equal(output, run(call)) is not gains
        by_name = sage.attention(call.query, call.key, call.value, precision="int8_int8")
        assert torch.equal(by_name, run(call, "int8_int8"))


def test_few_products_do_not_pay_for_the_call(
    table: dict[str, Gate], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = make_call(40, 50, head_dim=16)
    batch, heads, length, head_dim = call.query.shape
    products = batch * heads * length * head_dim * call.key.shape[2]
    for fewest, gains in ((products, True), (products + 1, False)):
        table.update(dict.fromkeys(table, replace(LEAST, products=fewest)))
        output = sage.attention(call.query, call.key, call.value)
        assert torch.equal(output, run(call, "int8_int8" if gains else "exact"))
        *_, report = compiled((40, 50))
        assert bool(report.rewritten) is gains
        if not gains:
            words = f"Q K^T has {products} products, fewer than {fewest}, where kernel cpu-"
            assert report.kept[0].reason.startswith(words)
        output, quantized, exact, _ = compiled((40, 50), dynamic=True)
        torch.testing.assert_close(output, quantized if gains else exact, rtol=0, atol=1e-5)


# --- through torch.compile


class Attend(torch.nn.Module):
    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, key)


def compiled(
    lengths: tuple[int, int], *, dynamic: bool = False, **options: Any
) -> tuple[Tensor, Tensor, Tensor, sage.Report]:
    """What it returns, what the kernel returns, what is exact, and the report."""
    call = make_call(*lengths, head_dim=16)
    torch._dynamo.reset()
    function = torch.compile(Attend(), backend="sage", dynamic=dynamic, options=options)
    with torch.no_grad():
        output = function(call.query, call.key)
    call = replace(call, value=call.key)
    return output, run(call, "int8_int8"), run(call), sage.last_report()


def test_lengths_that_are_known(table: Mapping[str, Gate]) -> None:
    name = f"cpu-{kernel.need().isa_name}"
    output, quantized, _, report = compiled((40, 50))
    assert torch.equal(output, quantized)
    assert report.rewritten[0].reason == f"auto: the default on cpu, kernel {name}"

    for lengths, words in (((39, 50), "query length 39 is below 40"), ((40, 1), "key length 1 is")):
        output, _, exact, report = compiled(lengths)
        torch.testing.assert_close(output, exact, rtol=0, atol=1e-5)
        (site,) = report.kept
        assert site.reason.startswith(words)
        assert f"where kernel {name} begins to gain; min_seq_len=0" in site.reason

    output, quantized, _, _ = compiled((3, 4), min_seq_len=0)
    assert torch.equal(output, quantized)
    *_, report = compiled((40, 50), min_seq_len=41)
    assert report.kept[0].reason == "query length 40 is below min_seq_len=41"


def test_lengths_that_are_known_at_run_time_alone(table: Mapping[str, Gate]) -> None:
    torch._dynamo.reset()
    function = torch.compile(Attend(), backend="sage", dynamic=True)
    for lengths, gains in (
        ((41, 51), True),
        ((39, 70), False),
        ((70, 49), False),
        ((40, 50), True),
    ):
        call = make_call(*lengths, head_dim=16)
        call = replace(call, value=call.key)
        with torch.no_grad():
            output = function(call.query, call.key)
        assert torch.equal(output, run(call, "int8_int8")) is gains
        torch.testing.assert_close(output, run(call), rtol=0, atol=0.2 if gains else 1e-5)
    assert len(sage.last_report().graphs) == 1


@pytest.mark.parametrize("least, gains", [(0, True), (45, True), (46, False)])
def test_a_least_length_of_the_users_holds_at_run_time(
    table: Mapping[str, Gate], least: int, gains: bool
) -> None:
    output, quantized, _, report = compiled((46, 45), dynamic=True, min_seq_len=least)
    assert torch.equal(output, quantized) is gains
    assert len(report.rewritten) == 1


def test_head_dims_that_it_does_not_take(table: Mapping[str, Gate]) -> None:
    call = make_call(64, head_dim=8)
    assert torch.equal(sage.attention(call.query, call.key, call.value), run(call))
    report = sage.explain(Attend(), call.query, call.key)
    assert "head_dim 8 is not a multiple of 8 from 16 to 256" in report.kept[0].reason
