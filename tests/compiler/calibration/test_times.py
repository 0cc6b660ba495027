"""Times: medians of what was measured here, kept between runs; predicted for other targets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sage_compiler import rates
from sage_compiler.calibration.measure import Measurement
from sage_compiler.calibration.probe import Call
from sage_compiler.calibration.subset import Subset
from sage_compiler.calibration.times import ENOUGH, Times, measured_with
from sage_compiler.errors import InvalidOptionError
from sage_compiler.kernels import registry
from sage_compiler.kernels.kernel import Gate, Kernel
from sage_compiler.machine import device_name
from sage_compiler.metrics import EXACT_ERRORS
from sage_compiler.precision import EXACT
from sage_compiler.semantics import MaskClass, Semantics

CPU = torch.device("cpu")
HERE = device_name(CPU)
KEY = measured_with(CPU)  # of the file


def call(length: int = 8, dtype: torch.dtype = torch.float32, **other: Any) -> Call:
    x = torch.randn(1, 2, length, 16, dtype=dtype)
    return replace(Call("layer", "", x, x, x, None, None, Semantics()), **other)


def measured(times: Times, given: Call, *taken: float, recipe: str = EXACT) -> None:
    """Count calls that took so long."""
    for seconds in taken:
        times.count(given.layer, times.of_call(given, {recipe: seconds}))


def kept(folder: Path) -> Any:
    return json.loads((folder / "times.json").read_text(encoding="utf-8"))


# --- here


def test_a_layer_takes_the_median() -> None:
    times = Times(None, CPU)
    measured(times, call(), 100.0, 1.0, 50.0, 2.0, 2.0)
    assert times.here and times.target == "cpu"
    assert times.of_layer("layer", inputs=5) == {EXACT: 2.0}


def test_each_shape_is_warmed_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    run, runs = Call.run, []
    monkeypatch.setattr(
        Call, "run", lambda self, recipe: (runs.append(recipe), run(self, recipe))[1]
    )
    times = Times(None, CPU)
    for given in (call(8), call(8, layer="other"), call(9)):
        times.run(given, EXACT)
    assert len(runs) == 5


def test_a_single_sample_is_all_there_is() -> None:
    times = Times(None, CPU)
    measured(times, call(), 7.0)
    assert times.of_layer("layer", inputs=1) == {EXACT: 7.0}


def test_calls_of_one_shape_share_their_times() -> None:
    """So that noise does not decide between layers."""
    times = Times(None, CPU)
    measured(times, call(layer="a"), 9.0, 1.0)
    measured(times, call(layer="b"), 3.0, 2.0, 1.0, 2.0)
    assert times.of_layer("a", inputs=1) == {EXACT: 4.0}  # two calls of 2.0
    assert times.of_layer("b", inputs=2) == {EXACT: 4.0}


@pytest.mark.parametrize(
    "other",
    [
        call(9),
        call(dtype=torch.bfloat16),
        call(key=torch.randn(1, 1, 8, 16), value=torch.randn(1, 1, 8, 16)),
        call(attn_mask=torch.ones(8, 8, dtype=torch.bool)),
        call(attn_mask=torch.ones(8, 8)),
        call(sinks=torch.ones(2)),
        call(semantics=Semantics(softcap=2.0)),
        call(semantics=Semantics(mask_class=MaskClass.CAUSAL)),
        call(semantics=Semantics(mask_class=MaskClass.WINDOW, window_left=1)),
        call(semantics=Semantics(mask_class=MaskClass.WINDOW, window_left=2)),
    ],
    ids=range(10),
)
def test_what_the_time_depends_on_is_told_apart(other: Call) -> None:
    times = Times(None, CPU)
    measured(times, call(layer="plain"), 1.0)
    measured(times, replace(other, layer="other"), 2.0)
    assert times.of_layer("plain", inputs=1) == {EXACT: 1.0}
    assert times.of_layer("other", inputs=1) == {EXACT: 2.0}


def test_a_recipe_that_serves_only_some_calls_has_no_time() -> None:
    times = Times(None, CPU)
    measured(times, call(8), 1.0)
    measured(times, call(9), 1.0)
    measured(times, call(8), 0.5, recipe="int8_int8")
    assert times.of_layer("layer", inputs=1).keys() == {EXACT}


def test_running_measures() -> None:
    output, seconds = Times(None, CPU).run(call(), EXACT)
    assert output.shape == (1, 2, 8, 16) and 0 < seconds < 60


def test_a_target_that_is_here_asks_its_kernels() -> None:
    times = Times("cpu", CPU)
    assert times.here and str(times) == f"measured on {HERE}"
    assert times.refusal("int4_fp8", call()) == "no int4_fp8 kernel for device 'cpu'"


# --- elsewhere


@pytest.mark.parametrize(("name", "target"), [("sm_89", "sm_89"), ("sm_90", "sm_90a")])
def test_a_target_elsewhere_is_predicted(name: str, target: str) -> None:
    times = Times(name, CPU)
    assert (times.target, times.here) == (target, False)
    given = call(512, semantics=Semantics(mask_class=MaskClass.CAUSAL))
    measured(times, given, 123.0, 456.0)  # what it takes here is beside the point
    work = rates.Work(1, 2, 2, 512, 512, 16, 16, itemsize=4, visible=513 / 1024)
    predicted = rates.seconds(target, EXACT, work)
    assert predicted is not None
    assert times.of_layer("layer", inputs=1) == {EXACT: pytest.approx(2 * predicted)}
    assert times.of_layer("layer", inputs=4) == {EXACT: pytest.approx(predicted / 2)}
    assert str(times) == f"predicted: {rates.explanation(target)}"


@pytest.mark.parametrize("shape", [(512, 512), (1, 1, 512, 512), (1, 2, 512, 512), (512,)])
def test_masks_are_counted_whatever_their_shape(shape: tuple[int, ...]) -> None:
    times, recipe = Times("sm_89", CPU), "int8_fp8"
    predicted = rates.seconds(
        "sm_89", recipe, rates.Work(1, 2, 2, 512, 512, 16, 16, 4, visible=1.0, mask_bytes=1)
    )
    mask = torch.ones(shape, dtype=torch.bool)
    taken = times.of_call(call(512, attn_mask=mask), {recipe: 0.0}).seconds[recipe]
    assert taken == predicted
    assert taken > times.of_call(call(512), {recipe: 0.0}).seconds[recipe]


@pytest.mark.parametrize(
    ("target", "recipe", "head_dim", "refusal"),
    [
        ("sm_89", "int8_fp8", 64, None),
        ("sm_80", "int8_fp8", 64, "no int8_fp8 kernel on sm_80"),
        ("sm_89", "int8_int8", 64, "no int8_int8 kernel on sm_89"),
        ("sm_89", "int8_fp8", 320, "no int8_fp8 kernel on sm_89"),
    ],
)
def test_refusals(target: str, recipe: str, head_dim: int, refusal: str | None) -> None:
    x = torch.randn(1, 1, 4, head_dim)
    given = call(query=x, key=x, value=x)
    assert Times(target, CPU).refusal(recipe, given) == refusal


@pytest.mark.parametrize("target", ["sm_75", "gpu", "", "SM_89"])
def test_unknown_targets_are_refused(target: str) -> None:
    with pytest.raises(InvalidOptionError, match="unknown target"):
        Times(target, CPU)


def test_devices_without_recipes_are_refused() -> None:
    with pytest.raises(InvalidOptionError, match="a model on meta"):
        Times(None, torch.device("meta"))


# --- the file


def test_times_are_kept_and_serve_runs_with_few_calls(tmp_path: Path) -> None:
    first = Times(None, CPU)
    measured(first, call(), 100.0, *(4.0,) * ENOUGH)
    first.recall(tmp_path / "new" / "folder")
    (machine,) = kept(tmp_path / "new" / "folder").items()
    assert machine[0] == KEY and list(machine[1].values()) == [4.0]

    second = Times(None, CPU)
    measured(second, call(), 50.0, 5.0)
    second.recall(tmp_path / "new" / "folder")
    assert second.of_layer("layer", inputs=2) == {EXACT: 4.0}
    assert kept(tmp_path / "new" / "folder") == dict([machine])


def test_enough_calls_of_its_own_replace_what_was_kept(tmp_path: Path) -> None:
    for taken in (4.0, 6.0):
        times = Times(None, CPU)
        measured(times, call(), 100.0, *(taken,) * ENOUGH)
        times.recall(tmp_path)
        assert times.of_layer("layer", inputs=ENOUGH + 1) == {EXACT: taken}
    assert list(kept(tmp_path)[KEY].values()) == [6.0]


def test_times_of_another_machine_are_kept_and_not_used(tmp_path: Path) -> None:
    times = Times(None, CPU)
    measured(times, call(), *(3.0,) * ENOUGH)
    times.recall(tmp_path)
    found = kept(tmp_path)
    found["another"] = {name: 0.001 for name in found.pop(KEY)}
    (tmp_path / "times.json").write_text(json.dumps(found), encoding="utf-8")
    times = Times(None, CPU)
    measured(times, call(), *(3.0,) * ENOUGH)
    times.recall(tmp_path)
    assert times.of_layer("layer", inputs=ENOUGH) == {EXACT: 3.0}
    assert kept(tmp_path).keys() == {"another", KEY}
    assert kept(tmp_path)["another"] == found["another"]


def test_the_folder_is_that_of_the_users_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAGE_CACHE_DIR", str(tmp_path))
    times = Times(None, CPU)
    measured(times, call(), *(3.0,) * ENOUGH)
    times.recall()
    assert kept(tmp_path).keys() == {KEY}


def test_predictions_are_not_kept(tmp_path: Path) -> None:
    times = Times("sm_89", CPU)
    measured(times, call(), *(3.0,) * ENOUGH)
    times.recall(tmp_path)
    assert list(tmp_path.iterdir()) == []


NAME = "exact float32 (1,2,8,16) (1,2,8,16) (1,2,8,16) none (-1,-1) nomask"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"[" * 100_000,
        b'{"a": 1, "a": 2}',
        b'{"a": NaN}',
        json.dumps({KEY: 3}).encode(),
        json.dumps({KEY: [1.0]}).encode(),
        *(json.dumps({KEY: {NAME: value}}).encode() for value in ("1", None, -1.0, 0.0, 5, True)),
        f'{{"{KEY}": {{"{NAME}": 1e999}}}}'.encode(),
        b'{"\\ud800": {"x": 1.0}}',
        f'{{"{KEY}": {{"\\ud800": 1.0}}}}'.encode(),
        f'{{"{KEY}": {{"{NAME}\\u0000": 1.0}}}}'.encode(),
    ],
    ids=range(19),
)
def test_a_file_of_anything_is_replaced(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "times.json").write_bytes(content)
    times = Times(None, CPU)
    measured(times, call(), *(3.0,) * ENOUGH)
    times.recall(tmp_path)
    assert times.of_layer("layer", inputs=ENOUGH) == {EXACT: 3.0}
    assert kept(tmp_path)[KEY] == {NAME: 3.0}


def test_too_few_calls_are_not_kept(tmp_path: Path) -> None:
    times = Times(None, CPU)
    measured(times, call(), *(3.0,) * (ENOUGH - 1))
    times.recall(tmp_path)
    assert kept(tmp_path) == {KEY: {}}


def test_the_name_in_these_files_is_the_one_that_is_looked_up(tmp_path: Path) -> None:
    (tmp_path / "times.json").write_text(json.dumps({KEY: {NAME: 1.5}}), encoding="utf-8")
    times = Times(None, CPU)
    measured(times, call(), 3.0)
    times.recall(tmp_path)
    assert times.of_layer("layer", inputs=1) == {EXACT: 1.5}


def test_where_nothing_can_be_written_the_times_of_the_run_serve(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "times.json").mkdir()
    for folder in (tmp_path / "file", tmp_path / "file" / "below", tmp_path):
        times = Times(None, CPU)
        measured(times, call(), *(3.0,) * ENOUGH)
        times.recall(folder)
        assert times.of_layer("layer", inputs=ENOUGH) == {EXACT: 3.0}


def test_what_the_backend_would_keep_is_measured_as_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy's recipe is not run below its kernel's gate, and costs what exact does."""
    kernel = registry.find("int8_int8", call(64).problem)
    if not isinstance(kernel, Kernel):
        pytest.skip("no kernel here")
    gated = replace(kernel, gate=lambda problem: Gate(query_length=32, key_length=48))
    monkeypatch.setattr(registry, "KERNELS", [gated])
    times, long, short = Times(None, CPU), call(64), call(64, query=torch.randn(1, 2, 31, 16))
    assert times.served(long, "int8_int8") == "int8_int8"
    assert times.served(short, "int8_int8") == times.served(call(47), "int8_int8") == EXACT
    assert Times("sm_89", CPU).served(short, "int8_fp8") == "int8_fp8"
    assert torch.equal(times.compute(short, "int8_int8"), short.run(EXACT))
    assert not torch.equal(times.compute(long, "int8_int8"), long.run(EXACT))
    measurement = Measurement(["int8_int8"], times, Subset(), 1)
    measurement.attend(short)
    measurement.finish()
    assert measurement.errors["layer", 0]["int8_int8"] == EXACT_ERRORS
    seconds = times.of_layer("layer", 1)
    assert seconds["int8_int8"] == seconds[EXACT]
