"""`make gpu` without a GPU: its checks and timings on the driver look-alike, and all that can fail.

The kernels are executed on the CPU (tests/compiler/kernels/cuda/emulation.py); what a stream, an
event or a graph is there stands in ``LookAlike``.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib.machinery
import json
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu import (
    checks,
    correctness,
    decoding,
    environment,
    matrix,
    peers,
    presence,
    publish,
    speed,
    timing,
)
from benchmarks.gpu.__main__ import Work, chosen, main, parse, run
from benchmarks.gpu.checks import CHECKS
from benchmarks.gpu.device import Device, Result, target
from benchmarks.gpu.guarded import GARBAGE, Fenced, attend, same_bits
from benchmarks.gpu.matrix import Case, Subject, further_subjects, is_checked, make_call, subjects
from benchmarks.gpu.publish import MISSING
from benchmarks.gpu.serving import SERVING_CHECKS
from benchmarks.gpu.trial import Plan, Trial, distance, uncut
from benchmarks.measure import RESULTS
from sage_compiler.errors import KernelUnavailableError, UsageError
from sage_compiler.kernels.cuda import kernel
from sage_compiler.kernels.cuda.arch import ARCHS
from sage_compiler.kernels.cuda.driver import Driver, DriverError, Launch
from sage_compiler.kernels.cuda.loader import Loader
from sage_compiler.kernels.cuda.spec import KernelSpec
from sage_compiler.kernels.cuda.variants import further_variants, variant, variants
from sage_compiler.precision import Accumulator
from sage_compiler.semantics import MaskClass, Semantics
from tests.compiler.kernels.cuda import emulation
from tests.compiler.kernels.dense import Call
from tests.cutlass_templates import host

needs_kernels = pytest.mark.skipif(host.missing() is not None, reason=str(host.missing()))

SUBJECT = Subject(variant(emulation.ARCH, "float16", 64, "int8_fp16"))
PLAN = Plan(lengths=((65, 70),), random_calls=1, large=((9, 70),), pair=((9, 70), (12, 30)))
GRID = speed.Grid(
    head_dims=(64,),
    lengths=(70,),
    masked_lengths=(),
    decode_lengths=(),
    heads=2,
    batch=1,
    seconds=0.0,
)
WORK = Work(lambda _: (SUBJECT,), lambda _: (), PLAN, tuple(CHECKS), False, GRID, minutes=9.0)
NO_SPEED = dataclasses.replace(WORK, grid=None)


@pytest.fixture(autouse=True)
def few_peers(monkeypatch):
    """Those that need neither a package nor a compiler; the second does not run on a CPU."""
    few = {name: peers.PEERS[name] for name in ("flash", "cudnn")}
    monkeypatch.setattr(speed, "PEERS", few)


class LookAlike:
    """The driver look-alike as a device: everything is done at once, on the CPU."""

    def __init__(self, loader: Loader | None = None) -> None:
        self.host = emulation.the_host()
        self.host.reset()
        self.arch = emulation.ARCH
        self.index = 0
        self.place = torch.device("cpu")
        self.loader = loader or emulation.loader()

    def machine(self) -> dict[str, str]:
        names = ("gpu", "driver", "torch", "cuda", "date")
        return {**dict.fromkeys(names, "none"), "gpu": "Look-Alike (CPU) 1.0"}

    def free_bytes(self) -> int:
        return 1 << 30

    def cache_bytes(self) -> int:
        return 1 << 14

    def no_compiler(self) -> str | None:
        return None

    def build(self, specs: Sequence[KernelSpec]) -> Iterator[str | None]:
        for spec in specs:
            emulation.build(spec)
            yield None

    def fresh_loader(self) -> Loader:
        return Loader(Driver(str(host.driver())), emulation.build)

    def stream(self) -> int:
        return 0

    def other_stream(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def occupy(self) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def capture(self, work: Callable[[], Result]) -> tuple[Result, Callable[[], None]]:
        """The look-alike logs what is launched while it captures; a replay does it."""
        stream = ctypes.c_void_p(0)
        self.host.library.sage_host_set_capturing(stream, True)
        try:
            result = work()
        finally:
            self.host.library.sage_host_set_capturing(stream, False)

        def replay() -> None:
            for old, new in zip(result, work(), strict=True):  # type: ignore[call-overload]
                old.copy_(new)

        return result, replay

    def milliseconds(self, work: Callable[[], object]) -> float:
        # A clock of its own, which ticks with launches: real time would be the machine's load.
        before = len(emulation.the_host().launches())
        work()
        return 1.0 + len(emulation.the_host().launches()) - before

    def attention(self, call: Call, recipe: str) -> Tensor:
        return kernel.run(
            target(self),
            call.query,
            call.key,
            call.value,
            call.semantics,
            want_lse=False,
            recipe=recipe,
            sinks=call.sinks,
        )[0]


def published(folder: Path) -> dict[str, Any]:
    """The results that a run left, and nothing else but their table."""
    assert {".json", ".md"} <= {path.suffix for path in folder.iterdir()} <= {
        ".json", ".md", ".png"
    }  # fmt: skip
    (path,) = folder.glob("*.json")
    assert path.name == "look-alike-cpu-1-0.json"
    results: dict[str, Any] = json.loads(path.read_text())
    assert results.keys() == {"machine", "settings", "correctness", "rows", "left_out"}
    assert results["machine"].keys() >= {"gpu", "driver", "torch", "cuda"}
    for result in results["correctness"]:
        assert result.keys() >= {"check", "passed", "failures"}
        assert result["passed"] == (not result["failures"])
    return results


def failed(results: dict[str, Any]) -> set[str]:
    return {result["check"] for result in results["correctness"] if not result["passed"]}


# --- the whole flow -----------------------------------------------------------------------------


@needs_kernels
def test_checks_then_times_and_publishes_both(tmp_path, capsys):
    (tmp_path / MISSING).write_text("{}")
    assert run(LookAlike(), WORK, tmp_path) == 0
    results = published(tmp_path)
    assert not failed(results)
    assert [result["check"] for result in results["correctness"]] == [*CHECKS, "speed"]
    found = {result["check"]: result for result in results["correctness"]}
    assert found["matrix"]["calls"] == 6 and 0 < found["matrix"]["distance"] < 1.5e-3
    assert found["threads"]["calls"] == 16 and found["graph"]["calls"] == 3
    assert "GiB" in found["far"]["skipped"] and found["far"]["calls"] == 0

    assert {(row["peer"], row["causal"]) for row in results["rows"]} == {
        ("flash", False),
        ("flash", True),
    }
    for row in results["rows"]:
        assert row.keys() >= {
            "kernel", "peer", "head_dim", "seq_len", "causal", "tflops_kernel", "tflops_total",
            "ratio_total", "cosine",
        }  # fmt: skip
        assert row["kernel"] == "int8_fp16" and row["seq_len"] == 70 and row["cosine"] > 0.9998
        assert row["tflops_kernel"] > row["tflops_total"] > 0
        assert row["ratio_total"] == pytest.approx(row["tflops_total"] / row["tflops_peer"], rel=1)
    assert any(reason.startswith("cudnn") for reason in results["left_out"])
    table = (tmp_path / "look-alike-cpu-1-0.md").read_text()
    assert table.count("| int8_fp16 |") == 2 and "Look-Alike (CPU) 1.0" in table
    assert "FAILED" not in table + capsys.readouterr().out


@needs_kernels
def test_a_wrong_kernel_is_named_and_nothing_is_timed(tmp_path, capsys):
    loader = without("quantize")
    work = dataclasses.replace(WORK, checks=("matrix", "random", "special", "large"))
    assert run(LookAlike(loader), work, tmp_path) == 1
    results = published(tmp_path)
    assert results["rows"] == [] and failed(results) == set(work.checks)
    first = results["correctness"][0]
    assert len(first["failures"]) == first["calls"] == 6
    assert "L=65x70" in first["failures"][0] and "from the reference" in first["failures"][0]
    printed = capsys.readouterr().out
    assert "int8_fp16 D=64/64 float16: matrix FAILED, 6" in printed and "and 1 more" in printed
    assert "FAILED matrix" in (tmp_path / "look-alike-cpu-1-0.md").read_text()


@needs_kernels
def test_what_cannot_be_built_fails_by_itself(tmp_path):
    class Unbuildable(LookAlike):
        def build(self, specs):
            for spec in specs:
                yield "no compiler for kernels" if "bfloat16" in spec.symbol else None

    both = (SUBJECT, Subject(variant(emulation.ARCH, "bfloat16", 64, "int8_fp16")))
    work = dataclasses.replace(WORK, subjects=lambda _: both, checks=("operator",))
    assert run(Unbuildable(), work, tmp_path) == 1
    results = published(tmp_path)
    build, rest = results["correctness"]
    assert build["check"] == "build" and build["failures"] == ["no compiler for kernels"]
    assert rest["dtype"] == "float16" and rest["passed"] and results["rows"] == []


@needs_kernels
def test_an_error_of_the_driver_is_a_failure_and_the_rest_goes_on(tmp_path):
    class Refusing(Loader):
        def loaded(self, spec, device, stream):
            if spec.kind == "quantize":
                raise DriverError("cuLaunchKernel: CUDA_ERROR_ILLEGAL_ADDRESS", 700)
            return super().loaded(spec, device, stream)

    device = LookAlike(Refusing(Driver(str(host.driver())), emulation.build))
    assert run(device, NO_SPEED, tmp_path) == 1
    results = published(tmp_path)
    assert failed(results) == set(CHECKS) - {"far"}
    for result in results["correctness"]:
        if not result["passed"]:
            assert "ILLEGAL_ADDRESS" in result["failures"][0]


@needs_kernels
def test_a_device_that_answers_no_more_ends_the_checks(tmp_path, capsys):
    class Lost(LookAlike):
        def synchronize(self):
            raise torch.AcceleratorError("CUDA error: an illegal memory access\nmore")

    assert run(Lost(), WORK, tmp_path) == 1
    results = published(tmp_path)
    (only,) = results["correctness"]
    error, end = only["failures"]
    assert error == "AcceleratorError: CUDA error: an illegal memory access"
    assert "answers no more" in end and end in capsys.readouterr().out


@needs_kernels
def test_an_output_that_is_wrong_at_speed_is_not_published(tmp_path, monkeypatch, capsys):
    right = speed.total

    def wrong(device, subject, call):
        output = right(device, subject, call)
        return output if call.semantics.mask_class is MaskClass.NONE else output.roll(1, -1)

    monkeypatch.setattr(speed, "total", wrong)
    work = dataclasses.replace(WORK, checks=("operator",))
    assert run(LookAlike(), work, tmp_path) == 1
    results = published(tmp_path)
    assert failed(results) == {"speed"} and results["rows"] == []
    (failure,) = results["correctness"][-1]["failures"]
    assert "causal" in failure and "cosine" in failure
    assert "| int8_fp16" in capsys.readouterr().out  # the other cell was timed


@needs_kernels
def test_a_persistent_kernel_is_timed_doing_all_tasks_again(monkeypatch):
    """What counts them is set to zero by a kernel that is not timed."""
    device = LookAlike()
    device.arch = "sm_90a"
    place = dataclasses.replace(target(device), multiprocessors=2)
    monkeypatch.setattr(speed, "target", lambda device: place)
    subject = Subject(variant("sm_90a", "float16", 64, "int8_fp8"))
    (cell, _) = speed.cells(dataclasses.replace(GRID, lengths=(300,)), 1 << 30, 1 << 14)
    assert isinstance(cell, speed.Cell)
    (call, *_) = speed.make_calls(device, cell)
    prepared = speed.Prepared(device, subject, call)
    expected = prepared.output.clone()
    for _ in range(2):
        prepared.output.fill_(torch.nan)
        prepared.attend()
        assert same_bits(prepared.output, expected)


@needs_kernels
def test_a_kernel_that_is_timed_and_does_nothing_is_noticed(monkeypatch):
    monkeypatch.setattr(speed.Prepared, "attend", lambda _: None)
    (cell, _) = speed.cells(GRID, 1 << 30, 1 << 14)
    assert isinstance(cell, speed.Cell)
    measured = speed.measure(LookAlike(), SUBJECT, cell, 0.0)
    assert measured.rows == [] and "other bits" in str(measured.failure)


# --- what each check notices --------------------------------------------------------------------


def without(kind: str) -> Loader:
    """Kernels of which one kind does nothing."""

    class Nothing:
        def __call__(
            self, blocks: int, stream: int, params: bytes, *, dependent: bool = False
        ) -> None:
            pass

    class Skipping(Loader):
        def loaded(self, spec: KernelSpec, device: int, stream: int) -> Launch:
            if spec.kind == kind:
                return Nothing()  # type: ignore[return-value]
            return super().loaded(spec, device, stream)

    return Skipping(Driver(str(host.driver())), emulation.build)


def trial(device: Device) -> Trial:
    return Trial(device, SUBJECT, PLAN)


@needs_kernels
@pytest.mark.parametrize("kind", ["quantize", "attend"])
def test_a_kernel_that_is_not_launched_is_noticed(kind):
    found = trial(LookAlike(without(kind)))
    checks.matrix(found)
    assert len(found.failures) == found.calls


@needs_kernels
def test_a_result_that_changes_is_noticed():
    class Changing(LookAlike):
        def synchronize(self):
            self.loader = without("quantize")  # from the second time on

    found = trial(Changing())
    found.expect_right(Case("a call", make_call(SUBJECT, 10, 10, seed=0)))
    assert found.failures == ["a call: not the same bits twice"]


@needs_kernels
def test_nan_and_lse_are_compared():
    found = trial(LookAlike())
    call = make_call(SUBJECT, 10, 10, seed=0)
    outcome = attend(found.device, SUBJECT, call)
    other = outcome.output.clone()
    other[0, 0, 0, 0] = torch.nan
    assert list(found.far_from(outcome, other, outcome.lse)) == ["NaN in 0 elements, not 1"]
    (problem,) = found.far_from(outcome, outcome.output, outcome.lse + 0.1)
    assert problem is not None and "LSE 0.1" in problem
    assert list(found.far_from(outcome, outcome.output, outcome.lse)) == []
    assert found.outside(outcome, call) is None
    doubled = dataclasses.replace(outcome, output=2 * outcome.output)
    assert "int8_fp16" in str(found.outside(doubled, call))


@needs_kernels
def test_a_graph_that_is_not_replayed_is_noticed():
    class Forgetful(LookAlike):
        def capture(self, work):
            return work(), lambda: None

    found = trial(Forgetful())
    checks.graph(found)
    assert len(found.failures) == found.calls == 3


@needs_kernels
def test_launches_that_come_before_their_inputs_are_noticed():
    class Elsewhere(LookAlike):
        """Copies wait for a busy stream, and launches do not."""

        @contextlib.contextmanager
        def other_stream(self):
            waiting = []
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Tensor, "copy_", lambda to, x: waiting.append((to, x)) or to)
                yield
            for to, x in waiting:
                to.copy_(x)

    found = trial(Elsewhere())
    checks.stream(found)
    assert len(found.failures) == 1 and "stream" in found.failures[0]


@needs_kernels
def test_threads_that_disturb_each_other_are_noticed():
    class Disturbed(LookAlike):
        def fresh_loader(self):
            return without("quantize")

    found = trial(Disturbed())
    checks.threads(found)
    # Not in every call: fresh scratch may hold what an earlier call left there, K's codes included.
    assert found.calls == 16
    assert found.failures


@needs_kernels
def test_an_operator_that_takes_other_kernels_is_noticed():
    class Other(LookAlike):
        def attention(self, call, recipe):
            return super().attention(call, "int8_fp8")

    found = trial(Other())
    checks.operator(found)
    assert len(found.failures) == found.calls == 2


@needs_kernels
@pytest.mark.parametrize("part", ["_zeros", "_large_values", "_unseen", "_seen"])
def test_special_values_are_compared(part, monkeypatch):
    def wrong(device, subject, call, garbage=GARBAGE[0]):
        outcome = attend(device, subject, call, garbage)
        noise = torch.rand(outcome.output.shape)
        return dataclasses.replace(outcome, output=noise, lse=outcome.lse + 1)

    monkeypatch.setattr(checks, "attend", wrong)
    found = trial(LookAlike())
    getattr(checks, part)(found)
    assert len(found.failures) == found.calls > 0


def test_writes_beside_memory_are_noticed():
    for at, intact in ((255, False), (256, True), (319, True), (320, False)):
        fenced = Fenced(64, GARBAGE[0], torch.device("cpu"))
        inside = fenced.view(torch.empty(2, 16, dtype=torch.float16).t())
        assert inside.shape == (16, 2) and inside.stride() == (1, 16)
        assert inside.data_ptr() == fenced.address()
        (ctypes.c_uint8 * 1).from_address(fenced.address() - 256 + at)[0] = 1
        assert fenced.is_intact() == intact


def test_bits_are_compared():
    a = torch.tensor([[1.0, torch.nan], [0.0, 2.0]])
    assert same_bits(a, a.clone()) and same_bits(a.t(), a.t().clone())
    assert not same_bits(a, -a) and not same_bits(a, a.t()) and not same_bits(a, a[:1])


# --- the matrix ---------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
def test_every_variant_is_a_subject(arch):
    for find, theirs in ((subjects, variants), (further_subjects, further_variants)):
        found = find(arch)
        assert [subject.kernels for subject in found] == [*filter(is_checked, theirs(arch))]
        assert len({subject.label for subject in found}) == len(found) > 0
        assert all(subject.recipe in ARCHS[arch].recipes for subject in found)


@needs_kernels
def test_what_cannot_be_compiled_is_skipped_where_no_pack_has_to_have_it(tmp_path):
    class WithoutCompiler(LookAlike):
        def no_compiler(self):
            return "no compiler for kernels"

    other = Subject(variant(emulation.ARCH, "float32", 64, "int8_fp16"))
    work = dataclasses.replace(NO_SPEED, further=lambda _: (other,), checks=("operator",))
    assert run(WithoutCompiler(), work, tmp_path) == 0
    skipped, checked = sorted(published(tmp_path)["correctness"], key=lambda x: x["check"])
    assert skipped["dtype"] == "float32" and skipped["skipped"] == "no compiler for kernels"
    assert checked["dtype"] == "float16" and not checked["skipped"]


@needs_kernels
@pytest.mark.parametrize("window", [False, True])
def test_other_dims_dtypes_and_forms_are_checked(window):
    kernels = variant(
        emulation.ARCH, "float32", 64, "int8_fp16", value_head_dim=128, window=window, softcap=True
    )
    subject = Subject(kernels)
    found = Trial(LookAlike(), subject, PLAN)
    call = make_call(subject, 90, 66, seed=0, head_dim=40, sinks=True)
    assert call.key.shape[3] == 40 and call.value.shape[3] == 128
    found.expect_right(Case("a call", call))
    assert not found.failures
    wrong = dataclasses.replace(call, sinks=None)
    assert found.outside(attend(found.device, subject, call), wrong) is not None
    assert not speed.Cell(64, 70, False, 1, 1).is_of(subject)
    found.expect_right(Case("a plain call", dataclasses.replace(call, semantics=Semantics())))
    assert "a plain call: is served by other kernels" in found.failures[0]


@pytest.mark.parametrize("subject", further_subjects(emulation.ARCH), ids=lambda x: x.label)
def test_every_case_is_served_by_its_subject(subject):
    found = Trial(LookAlike(), subject, PLAN)
    cases = [matrix.arbitrary(subject, seed) for seed in range(30)]
    cases += matrix.ragged(subject, ((20, 30),), 0)
    for case in cases:
        assert uncut(found.chosen(case.on(torch.device("cpu"))), subject.kernels) == subject.kernels


def test_a_device_has_to_pass_what_the_cpu_passes():
    test_attention = pytest.importorskip("tests.compiler.kernels.cuda.test_attention")
    for name in ("LENGTHS", "MASKS", "DISTANCE", "DISTANCE_OF_FEW", "FEW_ELEMENTS", "LSE_DISTANCE"):
        ours, theirs = getattr(matrix, name), getattr(test_attention, name)
        assert ours == (tuple(theirs) if isinstance(theirs, list) else theirs)


def test_one_row_may_lie_at_a_tie_where_steps_are_coarse():
    coarse = Subject(variant(emulation.ARCH, "float16", 64, "int8_fp8"))
    assert [coarse.spared(rows) for rows in (1, 149, 1000)] == [1, 1, 10]
    assert SUBJECT.spared(1000) == 0
    expected = torch.ones(1, 2, 50, 64)
    actual = expected.clone()
    actual[0, 1, 7] += 0.5
    assert distance(actual, expected, 0) == pytest.approx(0.05)
    assert distance(actual, expected, 1) == 0.0
    actual[0, 0, 9] += 0.25
    assert distance(actual, expected, 1) == pytest.approx(0.025)
    assert distance(expected, torch.zeros_like(expected), 1) > 1


def test_cases_are_laid_out_on_the_device():
    case = Case("", make_call(SUBJECT, 5, 6, seed=0, batch=2), ("expanded", *["every_other"] * 2))
    call = case.on(torch.device("cpu"))
    assert call.query.stride(0) == 0 and call.key.stride(3) == 2
    assert torch.equal(call.query[0], case.call.query[0])
    seen = {layout for seed in range(20) for layout in matrix.arbitrary(SUBJECT, seed).layouts}
    assert seen == set(matrix.LAYOUTS)


# --- timing -------------------------------------------------------------------------------------


class Clock:
    """A device on which a call takes as many milliseconds as it returns."""

    def milliseconds(self, work: Callable[[], object]) -> float:
        self.spent = 0.0
        work()
        return self.spent


def test_candidates_take_turns_over_all_sets():
    clock = Clock()
    clock.spent = 0.0
    log: list[tuple[str, int]] = []

    def candidate(name: str, milliseconds: float) -> timing.Candidate:
        def call(number: int) -> None:
            log.append((name, number))
            clock.spent += milliseconds

        return timing.Candidate(call)

    candidates = {"fast": candidate("fast", 1.0), "slow": candidate("slow", 20.0)}
    samples = timing.interleave(clock, candidates, 3, 0.0)  # type: ignore[arg-type]
    assert samples == {"fast": [1.0] * 7, "slow": [20.0] * 7}
    for name in candidates:
        sets = [number for who, number in log if who == name]
        assert sets == [i % 3 for i in range(len(sets))]
    turns = "".join(name[0] for name, _ in log)
    # Two looks of 1 + 2 calls; a round is 1 + 8 short calls and 1 + 1 long ones, then backwards.
    assert turns.startswith("f" * 6 + "s" * 6 + "f" * 9 + "s" * 4 + "f" * 18 + "s" * 4)


def test_cells_shrink_until_they_fit():
    grid = dataclasses.replace(
        speed.Grid(), head_dims=(128,), lengths=(1024, 16384, 32768), masked_lengths=()
    )
    grid = dataclasses.replace(grid, decode_lengths=())
    roomy = [cell for cell in speed.cells(grid, 78 << 30, 50 << 20) if not isinstance(cell, str)]
    assert [(cell.seq_len, cell.batch, cell.heads) for cell in roomy[::2]] == [
        (1024, 4, 32),
        (16384, 4, 32),
        (32768, 1, 32),
    ]
    tight = list(speed.cells(grid, 4 << 30, 50 << 20))
    for cell in tight:
        assert isinstance(cell, speed.Cell)
        assert speed._bytes(cell, 50 << 20) <= 2 << 30
    assert any(cell.batch * cell.heads < 32 for cell in tight if isinstance(cell, speed.Cell))
    (reason, *_) = speed.cells(grid, 1 << 20, 50 << 20)
    assert isinstance(reason, str) and "more than half" in reason


def test_operations_are_counted_as_papers_do():
    cell = speed.Cell(64, 1000, False, 2, 3)
    assert cell.flops() == 4 * 2 * 3 * 1000 * 1000 * 64
    assert dataclasses.replace(cell, causal=True).flops() == cell.flops() / 2


def test_what_matters_most_is_timed_first():
    cells = [cell for cell in speed.cells(speed.Grid(), 140 << 30, 50 << 20)]
    assert all(isinstance(cell, speed.Cell) for cell in cells)
    dims = [cell.head_dim for cell in cells]
    assert dims == sorted(dims, key=(128, 64, 256).index) and set(dims) == {64, 128, 256}
    for head_dim in (64, 128, 256):
        lengths = {cell.seq_len for cell in cells if cell.head_dim == head_dim}
        assert lengths >= {1024 << i for i in range(6)}
    kinds = {(cell.mask, cell.query_length == 1, cell.cached) for cell in cells}
    assert kinds == {
        (speed.Mask.NONE, False, False),
        (speed.Mask.NONE, True, False),
        (speed.Mask.NONE, True, True),
        (speed.Mask.PADDING, False, False),
        (speed.Mask.BIAS, False, False),
    }
    assert speed.Cell(64, 1000, False, 2, 8, queries=1, group=4).flops() == 4 * 2 * 8 * 1000 * 64


def further_cells() -> list[speed.Cell]:
    """Decoding and masks, small."""
    grid = dataclasses.replace(
        GRID, lengths=(), masked_lengths=(70,), decode_lengths=(90,), heads=4, decode_group=2
    )
    return [cell for cell in speed.cells(grid, 1 << 30, 1 << 14) if isinstance(cell, speed.Cell)]


@needs_kernels
def test_decoding_and_masks_are_timed(monkeypatch):
    sdpa = {"sdpa": peers.Peer(None, lambda call: None, peers._sdpa)}
    monkeypatch.setattr(speed, "PEERS", sdpa)
    cells = further_cells()
    assert [cell.mask_name for cell in cells] == ["no mask", "no mask", "padding", "bias"]
    assert [cell.cached for cell in cells] == [False, True, False, False]
    for cell in cells:
        masked = cell.mask is not speed.Mask.NONE
        subject = Subject(variant(emulation.ARCH, "float16", 64, "int8_fp16", masked=masked))
        assert cell.is_of(subject) and cell.is_of(SUBJECT) != masked
        measured = speed.measure(LookAlike(), subject, cell, 0.0)
        assert measured.failure is None
        (row,) = measured.rows
        assert row["mask"] == cell.mask_name and row["peer"] == "sdpa"
        # 16 bits are nearer to float32 than 8 are.
        assert row["rel_l1_peer"] < row["rel_l1"] < 0.02 and row["cosine_peer"] > row["cosine"]
        assert row["kernel"].endswith("_cache") == cell.cached
        assert publish.texts(row)[2] == ("1x90" if cell.query_length == 1 else "70")


@needs_kernels
@pytest.mark.parametrize("keys", [90, 128])
def test_a_step_of_decoding_can_be_repeated(keys):
    length = decoding.length_of(keys)
    calls = [make_call(SUBJECT, 1, length, seed=seed, kv_heads=2, group=2) for seed in range(2)]
    step, other = (decoding.Decoding(LookAlike(), SUBJECT, call) for call in calls)
    first = step.total().clone()
    assert speed.accuracy(calls[0], first).cosine > 0.999
    step.output.fill_(torch.nan)
    assert same_bits(step.total(), first)
    step.output.fill_(torch.nan)
    step.attend()
    assert same_bits(step.output, first) and not same_bits(other.output, first)


def test_a_cache_is_not_timed_where_nothing_compiles_its_kernels():
    class WithoutCompiler(LookAlike):
        def no_compiler(self):
            return "no compiler for kernels"

    grid = dataclasses.replace(GRID, lengths=(), decode_lengths=(90,), decode_group=2)
    cell = further_cells()[1]
    assert cell.cached and cell.is_of(SUBJECT)
    halved = Subject(
        variant(emulation.ARCH, "float16", 64, "int8_fp8", accumulator=Accumulator.FP16)
    )
    assert not cell.is_of(halved) and dataclasses.replace(cell, cached=False).is_of(halved)
    found = speed.run(WithoutCompiler(), [halved, SUBJECT], grid, 0.0, lambda row: None)
    assert found.left_out[-1].endswith("no mask cache: no compiler for kernels")
    assert found.rows == []


def a_call(**changes: Any) -> Call:
    call = make_call(SUBJECT, 20, 30, seed=0, kv_heads=2, group=2)
    return dataclasses.replace(call, **changes)


def test_a_peer_that_fails_or_refuses_is_reported_and_the_others_go_on():
    def raising(error: BaseException) -> peers.Peer:
        def attention(module: object, like: Call) -> Callable[[Call], Tensor]:
            def call(call: Call) -> Tensor:
                raise error

            return call

        return peers.Peer(None, lambda call: None, attention)

    table = {
        "absent": peers.Peer("no_such_package", lambda call: None, peers._sage),
        "choosy": peers.Peer(None, lambda call: "it takes no such call", peers._sdpa),
        "broken": raising(RuntimeError("an ABI\n  that is another")),
        "foreign": raising(TypeError("an unexpected keyword")),
        "unloadable": peers.Peer("tests.benchmarks.no_such", lambda call: None, peers._sage),
        "right": peers.Peer(None, lambda call: None, peers._sdpa),
    }
    calls = [a_call(), a_call()]
    found, refused = peers.candidates(LookAlike(), calls, table)
    assert list(found) == ["right"]
    assert found["right"].call(1).shape == (1, 4, 20, 64)
    assert refused == {
        "absent": "there is no package no_such_package",
        "choosy": "it takes no such call",
        "broken": "an ABI that is another",
        "foreign": "TypeError: an unexpected keyword",
        "unloadable": "there is no package tests.benchmarks.no_such",
    }
    with pytest.raises(KeyboardInterrupt):
        peers.candidates(LookAlike(), calls, {"stopped": raising(KeyboardInterrupt())})


@pytest.mark.parametrize("causal", [False, True])
def test_packages_are_called_as_they_are_meant_to_be(causal, monkeypatch):
    """With stand-ins that have their signatures, and compute what they would."""
    mask_class = MaskClass.CAUSAL if causal else MaskClass.NONE
    call = a_call(semantics=Semantics(mask_class))
    call = dataclasses.replace(call, query=call.query[:, :, :20], key=call.key[:, :, :20])
    call = dataclasses.replace(call, value=call.value[:, :, :20])

    def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, **kwargs):
        assert tensor_layout == "HND" and not kwargs
        return sdpa(q, k, v, is_causal)

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
        assert q.shape[1] == 20 and q.shape[2] == 4 and k.shape[2] == 2
        output = sdpa(*(x.transpose(1, 2) for x in (q, k, v)), causal)
        return output.transpose(1, 2)

    def flash_attn_3_func(q, k, v, softmax_scale=None, causal=False):
        return flash_attn_func(q, k, v, causal=causal), None

    stand_ins = {
        "sageattention": {"sageattn": sageattn},
        "flash_attn": {"flash_attn_func": flash_attn_func},
        "flash_attn_interface": {"flash_attn_func": flash_attn_3_func},
    }
    for name, functions in stand_ins.items():
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)
    expected = sdpa(call.query, call.key, call.value, causal)
    table = {name: peer for name, peer in peers.PEERS.items() if peer.module is not None}
    found, refused = peers.candidates(LookAlike(), [call], table)
    assert refused == {} and len(found) == 3
    for candidate in found.values():
        assert torch.equal(candidate.call(0), expected)
    masked = dataclasses.replace(call, attn_mask=torch.ones(20, 20, dtype=torch.bool))
    found, refused = peers.candidates(LookAlike(), [masked], table)
    assert found == {} and set(refused.values()) == {"it takes no explicit mask"}


@pytest.mark.parametrize("kind", ["none", "causal", "padding", "bias"])
def test_flex_attention_gets_the_same_mask(kind, monkeypatch):
    """Not compiled here: that takes a GPU."""
    monkeypatch.setattr(peers, "_compiled_flex", lambda: peers.flex_attention.flex_attention)
    call = a_call()
    query = call.query.float()
    call = Call(query, call.key[:, :, :20].float(), call.value[:, :, :20].float())
    if kind == "causal":
        call = dataclasses.replace(call, semantics=Semantics(MaskClass.CAUSAL))
    elif kind != "none":
        shown = (torch.arange(20) < 15).view(1, 1, 1, 20)
        bias = torch.randn(1, 1, 20, 20)
        call = dataclasses.replace(call, attn_mask=shown if kind == "padding" else bias)
    attention = peers._flex(torch, call)
    torch.testing.assert_close(attention(call), peers._sdpa(torch, call)(call))


def test_results_become_a_picture(tmp_path):
    plot = pytest.importorskip("benchmarks.gpu.plot")
    row = {"kernel": "int8_fp16", "head_dim": 64, "seq_len": 70, "queries": 70, "mask": "causal"}
    row |= {"tflops_kernel": 2.0, "tflops_total": 1.0, "tflops_peer": None, "peer": None}
    rows = [row, row | {"seq_len": 140, "queries": 140}, row | {"queries": 1}]
    plot.plot([*rows, row | {"peer": "flash", "tflops_peer": 1.5}], "a GPU", tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")
    plot.plot(rows[2:], "a GPU", tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_inputs_are_larger_than_the_cache():
    for length in (64, 1024, 32768):
        cell = speed.Cell(64, length, False, 1, 1)
        count = speed._sets(cell, 1 << 20)
        assert count >= 2 and count * 6 * cell.elements() >= 4 << 20


@needs_kernels
def test_no_cell_is_begun_after_the_deadline():
    found = speed.run(LookAlike(), (SUBJECT,), GRID, time.monotonic() - 1, pytest.fail)
    assert found.rows == [] and len(found.left_out) == 2
    assert all(reason.endswith("out of time") for reason in found.left_out)


@needs_kernels
def test_without_peers_there_is_a_row_without_a_ratio(monkeypatch):
    monkeypatch.setattr(speed, "PEERS", {"cudnn": peers.PEERS["cudnn"]})
    (cell, _) = speed.cells(GRID, 1 << 30, 1 << 14)
    assert isinstance(cell, speed.Cell)
    measured = speed.measure(LookAlike(), SUBJECT, cell, 0.0)
    (row,) = measured.rows
    assert row["peer"] is None and row["ratio_total"] is None and "cudnn" in measured.refused


# --- without a GPU, and set-up ------------------------------------------------------------------


def test_without_a_gpu_there_is_a_sentence_and_no_number(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert main(["--out", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("no CUDA device: PyTorch") and "without CUDA" in printed.err
    assert printed.out == "" and list(tmp_path.iterdir()) == []


def test_why_there_is_no_device(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "nvidia-smi" in str(presence.missing())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert presence.missing(1) is None
    assert "device 2 is none of the 2" in str(presence.missing(2))
    assert presence.missing(-1) is not None


def test_a_device_without_kernels_is_none(capsys):
    def find(index: int) -> Device:
        raise KernelUnavailableError("compute capability 7.5: there are kernels for 8.0")

    assert main([], find) == 2
    assert "no CUDA device: compute capability 7.5" in capsys.readouterr().err


def test_what_is_checked_in_part_is_not_timed():
    assert chosen(parse([])).grid == speed.Grid() and chosen(parse([])).checks == (
        *CHECKS,
        *SERVING_CHECKS,
    )
    assert chosen(parse(["--quick"])).grid == speed.QUICK
    for arguments in (["--no-speed"], ["--few"], ["--checks", "graph"]):
        assert chosen(parse(arguments)).grid is None


@needs_kernels
def test_the_sanitizer_is_looked_for_before_anything_else(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="compute-sanitizer"):
        run(LookAlike(), dataclasses.replace(WORK, sanitizer=True), tmp_path)


def test_the_sanitizer_runs_some_checks_again(tmp_path):
    command = tmp_path / "compute-sanitizer"
    command.write_text('#!/bin/sh\necho "$@"\ncase "$*" in *racecheck*) exit 9;; esac\n')
    command.chmod(0o755)
    found = {result["check"]: result for result in correctness.sanitize(str(command), 1)}
    assert len(found) == 3 and [x["passed"] for x in found.values()] == [True, False, True]
    (told,) = found["compute-sanitizer racecheck"]["failures"]
    given = told.split()
    assert given[given.index("benchmarks.gpu") - 1] == "-m"
    given = given[given.index("benchmarks.gpu") + 1 :]
    arguments = parse(given)
    assert arguments.device == 1 and chosen(arguments).grid is None


def test_results_say_that_runs_on_hardware_are_missing():
    """Until a run on a GPU replaces the file."""
    files = [path for path in RESULTS.glob("*.json") if '"correctness"' in path.read_text()]
    if not (RESULTS / MISSING).exists():
        assert files, "neither results of a GPU nor the file that says that there are none"
        return
    assert files == [RESULTS / MISSING]
    found = json.loads(files[0].read_text())
    assert found["hardware_runs"] == "missing" and found["rows"] == [] and found["reason"]


def test_requirements_that_are_not_met_are_named():
    assert {"pip", "numpy"} < set(environment.requirements())
    versions = {"torch": "2.11.0a0+git1", "setuptools": "65.5", "pip": "24.0"}

    def find(name: str) -> str:
        if name not in versions:
            raise PackageNotFoundError(name)
        return versions[name]

    needed = ["pip", "setuptools>=77", "numpy", "torch>=2.11"]
    old, none = environment.unmet(needed, find)
    assert "has setuptools 65.5, and setuptools>=77 is needed" in old
    assert "has no numpy" in none
    assert list(environment.unmet(["torch>=2.11.1"], find)) != []


def test_set_up_ends_early_without_a_gpu(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "environment"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert environment.main([str(folder)]) == 2
    assert "no CUDA device" in capsys.readouterr().out and not folder.exists()
    monkeypatch.setattr(environment, "unmet", lambda _: ["no torch"])
    assert environment.main([str(folder)]) == 1
    assert "GPU_PYTHON" in capsys.readouterr().out and not folder.exists()


def test_the_environment_has_what_this_interpreter_has(tmp_path):
    python = environment.make(tmp_path / "environment")
    code = "import importlib.util, sys\n"
    code += "print(*(importlib.util.find_spec(x).origin for x in ('torch', 'setuptools', 'pip')))\n"
    code += "print(sys.prefix)"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    *origins, prefix = done.stdout.split()
    assert origins[0] == torch.__file__ and len(origins) == 3
    assert prefix == str(tmp_path / "environment")
    assert prefix != sys.prefix
