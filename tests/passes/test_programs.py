"""Random attention programs: rewritten, each computes what it computed before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Final

import pytest
import torch
from torch import Tensor

import sage_compiler
from sage_compiler.precision import EXACT
from sage_compiler.report import Report
from tests.passes.programs import products
from tests.passes.programs.draft import Program
from tests.passes.programs.generate import program
from tests.passes.programs.hostile import EXTRAS
from tests.passes.programs.verdict import Runner, through_passes, verdict

CHUNK: Final = 50
CHUNKS: Final = 20  # in the default run
MANY: Final = 20_000  # in the slow one
# Of the programs that are plain attention, the share that has to be rewritten; of a few dozen, as
# in one chunk, less than of all.
FLOOR: Final = 0.8
FLOOR_OF_ALL: Final = 0.9


@pytest.fixture(autouse=True)
def unmeasured_guards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo flushes the CPU's caches to time its guards: a quarter of what a capture takes."""
    monkeypatch.setattr(torch._dynamo.guards, "profile_guard_manager", lambda *_: 0.0)


class Tally:
    """How many attentions without a doubt were rewritten, and why the others were kept."""

    def __init__(self) -> None:
        self.expected = 0
        self.rewritten = 0
        self.kept: Counter[str] = Counter()
        self.seeds: dict[str, int] = {}

    def add(self, drawn: Program, report: Report) -> None:
        if drawn.doubts:
            return
        self.expected += drawn.attentions
        self.rewritten += len(report.rewritten)
        reasons = [site.reason for site in report.kept]
        missing = drawn.attentions - len(report.sites)
        for reason in reasons + ["not found"] * missing:
            self.kept[reason] += 1
            self.seeds.setdefault(reason, drawn.seed)

    def __str__(self) -> str:
        lines = [f"{self.rewritten} of {self.expected} attentions rewritten; kept:"]
        lines += [
            f"{number:6} {reason} (seed {self.seeds[reason]})"
            for reason, number in self.kept.most_common()
        ]
        return "\n".join(lines)


def run(seeds: Iterable[int]) -> Tally:
    """The verdict on each program, which must be good."""
    tally = Tally()
    for seed in seeds:
        drawn = program(seed)
        done = False
        try:
            tally.add(drawn, verdict(drawn))
            done = True
        finally:
            if not done:
                print(drawn)
    return tally


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_programs(chunk: int) -> None:
    tally = run(range(chunk * CHUNK, (chunk + 1) * CHUNK))
    print(tally)
    assert tally.rewritten >= FLOOR * tally.expected


@pytest.mark.slow
def test_many_programs() -> None:
    first = CHUNK * CHUNKS
    tally = run(range(first, first + MANY))
    print(tally)
    assert tally.rewritten >= FLOOR_OF_ALL * tally.expected


# --- through Inductor -----------------------------------------------------------------------


def through_inductor(drawn: Program) -> tuple[Callable[..., Any], Callable[[], Report]]:
    torch._dynamo.reset()
    compiled = torch.compile(
        drawn.function(),
        backend="sage",
        options={"precision": EXACT},
        fullgraph=True,
        dynamic=drawn.dynamic,
    )
    return compiled, sage_compiler.last_report


def _draws_random_numbers(drawn: Program) -> bool:
    """Inductor draws others than eager."""
    return any(word in drawn.source for word in ("rand_like", "dropout(a, 0.2"))


def _sample(count: int) -> list[int]:
    seeds = (seed for seed in range(10**6) if not _draws_random_numbers(program(seed)))
    return [next(seeds) for _ in range(count)]


@pytest.mark.parametrize(
    "seed",
    [
        pytest.param(seed, marks=pytest.mark.slow if number >= 4 else ())
        for number, seed in enumerate(_sample(20))
    ],
)
def test_through_inductor(seed: int) -> None:
    verdict(program(seed), through_inductor)


# --- the generator --------------------------------------------------------------------------


def test_programs_repeat() -> None:
    one, other = program(7), program(7)
    assert one.source == other.source
    assert all(torch.equal(a, b) for a, b in zip(one.inputs, other.inputs, strict=True))


def test_programs_differ() -> None:
    assert len({program(seed).source for seed in range(200)}) == 200


def test_every_part_is_drawn() -> None:
    seen = Counter(feature for seed in range(CHUNK * CHUNKS) for feature in program(seed).features)
    parts = [f"form: {form.name}" for form in products.FORMS]
    parts += [f"hostile: {extra.name}" for extra in EXTRAS]
    assert [part for part in parts if not seen[part]] == []
    plain = [program(seed) for seed in range(200)]
    assert sum(not drawn.doubts for drawn in plain) > 120
    assert sum(drawn.gradients for drawn in plain) > 10
    assert sum(drawn.dynamic for drawn in plain) > 5
    assert sum(bool(drawn.again) for drawn in plain) > 3


# --- the verdict ----------------------------------------------------------------------------


def _corrupted(change: Callable[[Tensor], Any]) -> Runner:
    """A runner whose result is changed."""

    def runner(drawn: Program) -> tuple[Callable[..., Any], Callable[[], Report]]:
        compiled, reported = through_passes(drawn)
        return lambda *inputs: change(compiled(*inputs)), reported

    return runner


def _changing_an_input(drawn: Program) -> tuple[Callable[..., Any], Callable[[], Report]]:
    compiled, reported = through_passes(drawn)

    def call(*inputs: Tensor) -> Any:
        result = compiled(*inputs)
        inputs[0].view(-1)[0] += 1
        return result

    return call, reported


def _in_two_graphs(drawn: Program) -> tuple[Callable[..., Any], Callable[[], Report]]:
    compiled, reported = through_passes(drawn)
    return compiled, lambda: Report([], reported().graphs * 2)


def _first_to(value: float) -> Callable[[Tensor], Tensor]:
    def change(result: Tensor) -> Tensor:
        first = torch.zeros(result.shape, dtype=torch.bool).index_fill(0, torch.tensor([0]), True)
        return result.masked_fill(first, value)

    return change


class _WrongGradient(torch.autograd.Function):
    """The identity, whose gradient is 1.01 times what it should be."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 1.01


CORRUPTIONS: Final[dict[str, Runner]] = {
    "values": _corrupted(lambda result: result * 1.001),
    "NaN": _corrupted(_first_to(float("nan"))),
    "infinity": _corrupted(_first_to(float("inf"))),
    "one row": _corrupted(_first_to(0.0)),
    "strides": _corrupted(lambda result: result.mT.contiguous().mT),
    "shape": _corrupted(lambda result: result[:, :1]),
    "dtype": _corrupted(lambda result: result.double()),
    "one result too many": _corrupted(lambda result: (result, result)),
    "inputs": _changing_an_input,
    "graphs": _in_two_graphs,
    "gradients": _corrupted(_WrongGradient.apply),
    "no gradients": _corrupted(lambda result: result.detach()),
}


def _simple(dtype: torch.dtype = torch.float32, gradients: bool = False) -> Program:
    source = "def program(q, k, v):\n    return torch.softmax(q @ k.mT * 0.3, dim=-1) @ v\n"
    generator = torch.Generator().manual_seed(0)
    inputs = tuple(torch.randn(2, 3, 9, 8, generator=generator).to(dtype) for _ in range(3))
    nothing: frozenset[str] = frozenset()
    return Program(0, source, inputs, dtype, 1, nothing, nothing, gradients, False)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_verdict_fails(name: str) -> None:
    drawn = _simple(gradients="gradients" in name)
    verdict(drawn)
    with pytest.raises(AssertionError, match=r"program\(0\)"):
        verdict(drawn, CORRUPTIONS[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_verdict_fails_in_half_precision(dtype: torch.dtype) -> None:
    drawn = _simple(dtype)
    verdict(drawn)
    for change in (lambda result: result * 1.1, _first_to(0.0), _first_to(float("nan"))):
        with pytest.raises(AssertionError):
            verdict(drawn, _corrupted(change))


def test_verdict_lets_half_precision_be_better_than_eager() -> None:
    drawn = _simple(torch.bfloat16)

    def exact(drawn: Program) -> tuple[Callable[..., Any], Callable[[], Report]]:
        compiled, reported = through_passes(drawn)

        def call(*inputs: Tensor) -> Tensor:
            compiled(*inputs)
            result: Tensor = drawn.wide()(*(x.double() for x in inputs))
            return result.to(torch.bfloat16)

        return call, reported

    verdict(drawn, exact)


def test_verdict_looks_at_other_lengths() -> None:
    drawn = next(found for found in map(program, range(1000)) if found.again and not found.doubts)

    def at_first_only(drawn: Program) -> tuple[Callable[..., Any], Callable[[], Report]]:
        compiled, reported = through_passes(drawn)
        length = [x.shape for x in drawn.inputs]

        def call(*inputs: Tensor) -> Tensor:
            result: Tensor = compiled(*inputs)
            return result if [x.shape for x in inputs] == length else result * 1.01

        return call, reported

    verdict(drawn)
    with pytest.raises(AssertionError, match="other lengths"):
        verdict(drawn, at_first_only)
