"""The Triton programs in Triton's interpreter, against the reference and against float64.

Run by test_kernel.py in a process of its own, since Triton looks at TRITON_INTERPRET when it is
imported:

    TRITON_INTERPRET=1 .venv/bin/pytest tests/compiler/kernels/triton/test_interpreted.py
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from math import inf, nan
from pathlib import Path
from types import ModuleType

import pytest
import torch

from sage_compiler.kernels import reference
from sage_compiler.kernels.triton import kernel
from sage_compiler.precision import RECIPES
from sage_compiler.semantics import DeadRows, MaskClass, Semantics
from tests.compiler.kernels.cuda.random_calls import (
    TEMPLATES,
    Form,
    RandomCall,
    distance,
    random_call,
    templates,
)
from tests.compiler.kernels.dense import Call, dense
from tests.tolerances import check, check_lse

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="in a process of its own: see test_kernel.py"
)

CALLS = 50
RUN = 100  # of random_calls: other calls than those of the CUDA kernels
# As of the CUDA kernels. The interpreter cuts to bfloat16 where a GPU rounds: 2**-8 at most.
DISTANCE = {torch.float16: 1.5e-3, torch.float32: 1.5e-3, torch.bfloat16: 6e-3}
DISTANCE_OF_FEW = {torch.float16: 3e-3, torch.float32: 3e-3, torch.bfloat16: 8e-3}
FEW_ELEMENTS = 4096
LSE_DISTANCE = 5e-3  # a code of K that is rounded the other way shows in rows of few keys


def attend(call: Call, *, want_lse: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    return kernel.run(
        call.query,
        call.key,
        call.value,
        call.semantics,
        attn_mask=call.attn_mask,
        sinks=call.sinks,
        want_lse=want_lse,
    )


def on(place: str, call: Call) -> Call:
    """The call on a device."""
    tensors = {
        name: tensor.to(place)
        for name in ("query", "key", "value", "attn_mask", "sinks")
        if (tensor := getattr(call, name)) is not None
    }
    return dataclasses.replace(call, **tensors)


def assert_right(
    call: Call, clean: Call | None = None, *, want_lse: bool = True, place: str = "cpu"
) -> None:
    """As the reference within rounding, and as float64 within the recipe's tolerance.

    Args:
        clean: the call without what no query sees, where that is not finite.
        place: the device that attends; the others are computed where the call is.
    """
    clean = clean or call
    output, lse = (x.to(call.query.device) for x in attend(on(place, call), want_lse=want_lse))
    expected, expected_lse = reference.attention(
        clean.query,
        clean.key,
        clean.value,
        RECIPES[kernel.RECIPE],
        clean.semantics,
        attn_mask=clean.attn_mask,
        sinks=clean.sinks,
    )
    limits = DISTANCE if output.numel() > FEW_ELEMENTS else DISTANCE_OF_FEW
    assert distance(output, expected) <= limits[output.dtype]
    exact, exact_lse = dense(clean)
    check(output, exact, clean.value, kernel.RECIPE)
    if want_lse:
        torch.testing.assert_close(lse, expected_lse, rtol=1e-6, atol=LSE_DISTANCE)
        check_lse(lse, exact_lse.float(), kernel.RECIPE)
    else:
        assert lse.numel() == 0


def chosen(number: int) -> RandomCall:
    """A random call of any kind that is one attention; only its recipe is always the same."""
    kinds = [i for i, kind in enumerate(templates(RUN)) if kind.form is Form.CALL]
    repeat, index = divmod(number, len(kinds))
    return random_call(RUN, repeat * TEMPLATES + kinds[index])


@pytest.mark.parametrize("number", range(CALLS))
def test_random_calls(number: int) -> None:
    """Layouts, dims, lengths, bands, masks of any broadcast, softcap, sinks, dead rows, garbage."""
    found = chosen(number)
    try:
        assert_right(found.call, found.clean, want_lse=found.want_lse)
    except AssertionError as error:
        error.add_note(found.label)
        raise


def test_the_random_calls_are_of_all_kinds() -> None:
    calls = [chosen(number).call for number in range(CALLS)]
    assert {call.query.dtype for call in calls} == {torch.float16, torch.bfloat16, torch.float32}
    assert {call.semantics.mask_class for call in calls} == set(MaskClass)
    masks = {call.attn_mask.dtype for call in calls if call.attn_mask is not None}
    assert masks >= {torch.bool, torch.float32, torch.float16, torch.bfloat16}
    assert max(call.query.shape[3] for call in calls) > 192
    assert any(call.query.shape[3] != call.value.shape[3] for call in calls)
    assert any(call.query.shape[1] != call.key.shape[1] for call in calls)


def small_call(*, group: int = 1, dtype: torch.dtype = torch.float16, **semantics: object) -> Call:
    """Gaussian, a channel offset on K; several tiles, the last ones cut off."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    key = normal(1, 1, 200, 40) + 2 * normal(1, 1, 1, 40)
    return Call(
        normal(1, group, 150, 40).to(dtype),
        key.to(dtype),
        normal(1, 1, 200, 24).to(dtype),
        Semantics(**semantics),  # type: ignore[arg-type]
        sinks=normal(group),
    )


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0)])
def test_nothing_to_attend_to(lengths: tuple[int, int]) -> None:
    call = small_call(group=2)
    call = dataclasses.replace(
        call,
        query=call.query[:, :, : lengths[0]],
        key=call.key[:, :, : lengths[1]],
        value=call.value[:, :, : lengths[1]],
    )
    output, lse = attend(call)
    assert output.shape == (1, 2, lengths[0], 24)
    assert not output.any()
    assert call.sinks is not None
    assert torch.equal(lse, call.sinks.view(1, 2, 1).expand(1, 2, lengths[0]))


@pytest.mark.parametrize("where", ["query", "key", "value"])
@pytest.mark.parametrize("what", [nan, inf])
def test_what_is_not_finite_is_seen(where: str, what: float) -> None:
    reached = {"query": (0, 0, 17), "key": (0, 0), "value": (0, 0, slice(None), 5)}
    for dtype in (torch.float16, torch.float32):
        call = small_call(dtype=dtype)
        poisoned = getattr(call, where).clone()
        poisoned[0, 0, 17, 5] = what
        output, _ = attend(dataclasses.replace(call, **{where: poisoned}))
        assert not output[reached[where]].isfinite().any()


def test_sinks() -> None:
    call = small_call(
        group=5, mask_class=MaskClass.CAUSAL_BOTTOM_RIGHT, dead_rows=DeadRows.NAN, softcap=1e31
    )
    call = dataclasses.replace(call, key=call.key[:, :, :100], value=call.value[:, :, :100])
    sinks = torch.tensor([0.5, 30.0, -80.0, -inf, 8.0])
    assert_right(dataclasses.replace(call, sinks=sinks))
    strided = torch.stack((sinks, torch.full((5,), 1e4)), dim=1)[:, 0]
    assert strided.stride() == (2,)
    found, expected = (
        attend(dataclasses.replace(call, sinks=each))[0] for each in (strided, sinks)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    for sink in (inf, nan):
        output, lse = attend(dataclasses.replace(call, sinks=torch.full((5,), sink)))
        assert output.isnan().all() and lse.isnan().all()


# --- what must fail ---------------------------------------------------------------------------


def broken(folder: Path, old: str, new: str) -> ModuleType:
    """The programs with a text replaced, which is there once."""
    source = Path(kernel._programs().__file__ or "").read_text()
    assert source.count(old) == 1, f"{old!r} is there {source.count(old)} times"
    path = folder / "broken_programs.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def all_at_once() -> Call:
    """Tiles hidden, shown and neither, sinks, a softcap, keys that do not count, dead rows."""
    call = small_call(group=2, softcap=3.0, mask_class=MaskClass.CAUSAL_BOTTOM_RIGHT)
    mask = torch.zeros(150, 200)
    mask[:, 64:128] = -inf
    mask[:, 190:] = -1e4
    mask[::3, 130:160] = -2.0
    mask[100:120] = -inf
    call.query[:, :, 100:120] = 50.0  # they see nothing, and may not set a scale
    call.key[:, :, 190:] = 20.0
    return dataclasses.replace(call, attn_mask=mask)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("* tl.load(key_scales + at_keys)[None, :]", "* tl.load(key_scales + kv_head)"),
        ("largest = tl.reshape(tl.max(tl.abs(q), 1)", "largest = tl.reshape(tl.abs(tl.sum(q, 1))"),
        ("k - mean[None, :], 0.0", "k, 0.0"),
        ("decay = tl.exp2(maximum - origin)", "decay = tl.exp2(origin - origin)"),
        ("row[:, None] + upper\n", "row[:, None] + upper + 1\n"),
        ("scores += _to_log2(bias.to(tl.float32))", "scores += 0.0"),
        ("if shown != HIDES_ALL:", "if shown == MIXED:"),
        ("_tanh((scores + term[:, None]) / softcap)", "_tanh(scores / softcap)"),
        ("result *= tl.exp2(log_sum - with_sink)[:, None]", "pass"),
        ("tl.where(counts, tl.max(tl.abs(k), 1), 0.0)", "tl.max(tl.abs(k), 1)"),
        ("live = bits != 0", "live = bits >= 0"),
        ("(query_head // group)", "(query_head * 0)"),
        ("v = tl.div_rn(v.to(tl.float32), of_channels[None, :])", "v = v.to(tl.float32)"),
    ],
)
def test_what_is_broken_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str
) -> None:
    call = all_at_once()
    if "v.to(tl.float32)" in new:
        call = small_call(dtype=torch.float32)
        call = dataclasses.replace(call, value=call.value * 1e-6)
    if "query_head" in new:
        key, value = (torch.cat([x, -x.flip(2)], 1) for x in (call.key, call.value))
        call = dataclasses.replace(call, key=key, value=value)
    assert_right(call)
    programs = broken(tmp_path, old, new)
    monkeypatch.setattr(kernel, "_programs", lambda: programs)
    with pytest.raises(AssertionError):
        assert_right(call)
