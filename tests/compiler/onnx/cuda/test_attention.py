"""The core of the CUDA provider, executed on a CPU: the numbers of Python's, bit by bit."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from math import inf
from pathlib import Path

import pytest
import torch

from sage_compiler.kernels import reference
from sage_compiler.kernels.cuda.arch import ARCHS
from sage_compiler.precision import RECIPES
from sage_compiler.semantics import UNBOUNDED, DeadRows, MaskClass
from tests.compiler.kernels.cuda import emulation
from tests.compiler.kernels.cuda.test_attention import make_call
from tests.compiler.kernels.dense import Call, dense, random_mask
from tests.compiler.onnx.cuda.native import (
    STREAM,
    Device,
    NativeError,
    Prepared,
    TestDriver,
    opened,
)
from tests.compiler.onnx.cuda.packs import CASES, MASKED, Case
from tests.cutlass_templates import host as host_module
from tests.cutlass_templates.host import Host
from tests.tolerances import check, check_lse

pytestmark = pytest.mark.skipif(
    host_module.missing() is not None, reason=str(host_module.missing())
)
BANDS = (MaskClass.NONE, MaskClass.CAUSAL, MaskClass.CAUSAL_BOTTOM_RIGHT)


def random_call(case: Case, seed: int) -> Call:
    """A call that the kernel of a case takes."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    windows = (MaskClass.WINDOW, MaskClass.WINDOW_BOTTOM_RIGHT)
    call = make_call(
        rng.randint(1, 200),
        rng.randint(1, 250),
        case.head_dim,
        case.dtype,
        batch=rng.randint(1, 2),
        kv_heads=rng.randint(1, 2),
        group=rng.choice((1, 1, 3)),
        seed=seed,
        sinks=rng.random() < 0.5,
        mask_class=rng.choice(windows if case.window else BANDS),
        window_left=rng.choice((0, 5, 90)) if case.window else UNBOUNDED,
        window_right=rng.choice((UNBOUNDED, 0, 70)) if case.window else UNBOUNDED,
        scale=rng.choice((None, 0.05, -0.1)),
        softcap=20.0 if case.softcap else None,
        dead_rows=rng.choice(tuple(DeadRows)),
    )
    if call.sinks is not None:
        dtype = rng.choice((torch.float32, torch.float16, torch.bfloat16))
        call = dataclasses.replace(call, sinks=call.sinks.to(dtype))
    if case.masked and (seed % 3 > 0 or not case.plain):
        mask = random_mask(rng, generator, (*call.query.shape[:3], call.key.shape[2]))
        call = dataclasses.replace(call, attn_mask=mask.clone())
    return call


def verify(device: Device, host: Host, case: Case, seed: int) -> None:
    """Bit by bit what Python's launches give, and within the tolerance of the recipe."""
    call = random_call(case, seed)
    host.reset()
    prepared = Prepared(device, call, case.recipe)
    prepared.launch(host.allow)
    sinks = None if call.sinks is None else call.sinks.float()
    theirs = emulation.attend(dataclasses.replace(call, sinks=sinks), case.recipe)
    assert theirs.lse is not None and prepared.lse is not None
    assert torch.equal(prepared.output.nan_to_num(7.0), theirs.output.nan_to_num(7.0))
    assert torch.equal(prepared.lse, theirs.lse)
    exact, exact_lse = dense(call)
    check(prepared.output, exact, call.value, case.recipe)
    check_lse(prepared.lse, exact_lse.float(), case.recipe)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_random_calls(case: Case, emulated: Device, host: Host) -> None:
    """Batches, groups, bands, masks, sinks of any type, scales, dead rows."""
    for seed in range(6):
        verify(emulated, host, case, seed)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_many_random_calls(case: Case, emulated: Device, host: Host) -> None:
    for seed in range(100, 180):
        verify(emulated, host, case, seed)


def test_tiles_of_a_mask_that_are_copied(
    driver: TestDriver, host: Host, host_packs: Callable[[Case], Path]
) -> None:
    """On Hopper, by a tensor map; where the driver makes none, or there can be none, as Python."""
    case = dataclasses.replace(MASKED, arch="sm_90a")
    host.set_capability(*ARCHS[case.arch].capability)
    call = make_call(70, 144, 64, torch.float16, batch=2, kv_heads=2)
    cases: list[tuple[torch.Tensor, int, bool]] = [  # a mask, keys, whether there is a map
        (torch.rand(2, 1, 70, 144) < 0.7, 144, True),
        (torch.rand(2, 1, 70, 144) < 0.7, 143, False),
        (torch.randn(70, 144), 144, True),
        (torch.randn(2, 1, 1, 144).half(), 144, True),
        (torch.randn(2, 70, 144).bfloat16(), 144, True),
        (torch.rand(70, 1) < 0.7, 144, False),
    ]
    with opened(driver.path, host_packs(case)) as device:
        for mask, keys, has_map in cases:
            some = dataclasses.replace(
                call,
                key=call.key[:, :, :keys],
                value=call.value[:, :, :keys],
                attn_mask=mask[..., :keys],
            )
            theirs = emulation.attend(some, case.recipe, arch=case.arch)
            for refused in (False, True) if has_map else (False,):
                host.reset()
                host.set_capability(*ARCHS[case.arch].capability)
                prepared = Prepared(device, some, case.recipe)
                driver.fail("cuTensorMapEncodeTiled" if refused else "")
                prepared.launch(host.allow)
                assert driver.calls("cuTensorMapEncodeTiled") == has_map
                assert torch.equal(prepared.output, theirs.output)
                assert theirs.lse is not None and prepared.lse is not None
                assert torch.equal(prepared.lse, theirs.lse)


def test_without_lse(emulated: Device, host: Host) -> None:
    call = make_call(70, 90, 64, torch.float16)
    wanted, unwanted = (
        Prepared(emulated, call, "int8_fp8", want_lse=want_lse) for want_lse in (True, False)
    )
    host.reset()
    for prepared in (wanted, unwanted):
        prepared.launch(host.allow)
    assert torch.equal(wanted.output, unwanted.output)
    expected, _ = reference.attention(
        call.query, call.key, call.value, RECIPES["int8_fp8"], call.semantics
    )
    torch.testing.assert_close(wanted.output, expected, rtol=0, atol=2e-2)


def test_everything_is_on_the_stream(emulated: Device, driver: TestDriver) -> None:
    call = make_call(20, 30, 64, torch.float16, sinks=True)
    mask = torch.rand(20, 30) < 0.5
    assert call.sinks is not None
    call = dataclasses.replace(call, attn_mask=mask, sinks=call.sinks.half())
    Prepared(emulated, call, "int8_fp8").launch()
    launches = driver.launches()
    assert {launch.stream for launch in launches} == {STREAM}
    kinds = [launch.symbol.split("_sm_89")[0].removeprefix("sage_") for launch in launches]
    assert kinds == [
        *("mask_rows", "mask_keys", "mask_counts", "sinks"),
        *("quantize", "attend"),
    ]


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("sinks", [None, torch.float32, torch.bfloat16])
def test_nothing_to_attend_to(
    lengths: tuple[int, int], sinks: torch.dtype | None, emulated: Device, host: Host
) -> None:
    call = make_call(*lengths, 64, torch.float16, kv_heads=3, batch=2, dead_rows=DeadRows.NAN)
    if sinks is not None:
        call = dataclasses.replace(call, sinks=torch.tensor([1.5, -inf, 3.0]).to(sinks))
    host.reset()
    prepared = Prepared(emulated, call, "int8_fp8")
    prepared.launch(host.allow)
    assert not prepared.output.any()
    expected = torch.full((3,), -inf) if call.sinks is None else call.sinks.float()
    assert prepared.lse is not None
    assert torch.equal(prepared.lse, expected.view(1, 3, 1).expand(2, 3, lengths[0]))


def test_a_length_beyond_the_kernels_positions_is_refused(emulated: Device) -> None:
    call = make_call(1, 1, 64, torch.float16)
    prepared = Prepared(emulated, call, "int8_fp8")
    prepared.attention.key_length = 1 << 30
    with pytest.raises(NativeError, match="split the sequence"):
        prepared.launch()


@pytest.mark.parametrize("key_length", [1, 0])
def test_more_blocks_than_a_launch_has_are_refused(key_length: int, emulated: Device) -> None:
    call = make_call(1, key_length, 64, torch.float16)
    prepared = Prepared(emulated, call, "int8_fp8")
    prepared.attention.batch = 1 << 31
    with pytest.raises(NativeError, match="split the batch"):
        prepared.launch()
