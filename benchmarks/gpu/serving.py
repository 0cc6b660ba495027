"""The checks of what serves: packed batches, rotary embedding, caches, and their graphs.

Of plain kernels, since what is on top of an attention is the same there; as ``checks.py`` has them,
each adds to a trial's findings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor

from benchmarks.gpu.device import target
from benchmarks.gpu.guarded import Outcome, same_bits
from benchmarks.gpu.matrix import Case, make_call
from benchmarks.gpu.trial import Trial
from sage_compiler.kernels import reference
from sage_compiler.kernels.cuda import kernel
from sage_compiler.kernels.cuda.packed import CudaStore
from sage_compiler.kernels.cuda.varlen import Lengths
from sage_compiler.kernels.layout import empty_output
from sage_compiler.kernels.packed import PackedShape
from sage_compiler.kernels.rotary import Rotary, Tables
from sage_compiler.precision import Accumulator
from sage_compiler.semantics import MaskClass, RotaryPairs, Semantics
from tests.compiler.kernels.dense import Call

_LENGTHS: Final = ((1, 1), (130, 65), (0, 20), (70, 200))  # of queries and keys, by sequence
_APPENDS: Final = ((300,), (1, 63, 64, 130, 300), (299, 300))  # ends of what is appended at once
_KV_HEADS: Final = 2
_GROUP: Final = 2


def sequences(trial: Trial) -> None:
    """A packed batch, whose offsets are on the device: each sequence is the reference's."""
    if _is_skipped(trial):
        return
    queries, keys = (sum(lengths) for lengths in zip(*_LENGTHS, strict=True))
    call = _call(trial, queries, keys, Semantics(MaskClass.CAUSAL_BOTTOM_RIGHT))
    here = Case("", call).on(trial.device.place)
    ends = torch.tensor(((0, 0), *_LENGTHS)).cumsum(0)
    offsets = [side.to(trial.device.place, torch.int32) for side in ends.unbind(1)]
    lengths = Lengths.of(*offsets, here.query, here.key, read=False)
    output, lse = trial.run(here, lengths=lengths)
    trial.device.synchronize()
    for (first, first_key), (end, end_key) in zip(ends.tolist(), ends[1:].tolist(), strict=False):
        if first == end:
            continue
        rows, columns = slice(first, end), slice(first_key, end_key)
        part = dataclasses.replace(
            call,
            query=call.query[:, :, rows],
            key=call.key[:, :, columns],
            value=call.value[:, :, columns],
        )
        outcome = Outcome(output[:, :, rows], lse[:, :, rows], None)
        _expect_near(trial, f"sequence {end - first}x{end_key - first_key}", outcome, part)


def rotary(trial: Trial) -> None:
    """Q and K that are rotated as they are read: as if they had been rotated before."""
    if _is_skipped(trial):
        return
    call = _call(trial, 150, 130, Semantics(MaskClass.CAUSAL))
    here = Case("", call).on(trial.device.place)
    channels = call.query.shape[3]
    generator = torch.Generator().manual_seed(trial.plan.seed)
    for pairs in RotaryPairs:
        angles = torch.randn(150, channels // 2, generator=generator)
        tables = angles.cos(), angles.sin()

        def at(
            place: torch.device,
            pairs: RotaryPairs = pairs,
            tables: tuple[Tensor, Tensor] = tables,
        ) -> Rotary:
            of_query, of_key = (
                Tables(*(x[None, None, :length].to(place) for x in tables)) for length in (150, 130)
            )
            return Rotary(pairs, channels, torch.float32, of_query, of_key)

        output, lse = trial.run(here, rotary=at(trial.device.place))
        trial.device.synchronize()
        query, key = at(torch.device("cpu")).rotated(call.query.float(), call.key.float())
        rotated = dataclasses.replace(call, query=query, key=key, value=call.value.float())
        _expect_near(trial, f"rotary embedding, {pairs}", Outcome(output, lse, None), rotated)


def cache(trial: Trial) -> None:
    """A cache: the same bits however it was filled, within its recipe's tolerance of float64."""
    if _is_skipped(trial):
        return
    call = _call(trial, 5, _APPENDS[0][-1], Semantics(MaskClass.CAUSAL_BOTTOM_RIGHT))
    outcomes = []
    for ends in _APPENDS:
        with _filled(trial, call, ends) as store:
            output, lse = _attend(trial, store, call)
        trial.device.synchronize()
        outcomes.append(Outcome(output, lse, None))
    for ends, outcome in zip(_APPENDS[1:], outcomes[1:], strict=True):
        same = same_bits(outcome.output, outcomes[0].output)
        trial.expect(same and same_bits(outcome.lse, outcomes[0].lse), f"other bits filled {ends}")
    problem = trial.outside(outcomes[0], call)
    trial.expect(problem is None, f"a cache: {problem}")


def cache_graph(trial: Trial) -> None:
    """Decoding that is captured: replayed with another query, it has that one's bits."""
    if _is_skipped(trial):
        return
    calls = [_call(trial, 1, 300, Semantics(), number) for number in range(2)]
    with _filled(trial, calls[0], (300,)) as store:
        queries = [Case("", call).on(trial.device.place).query for call in calls]
        expected = [_attend(trial, store, calls[0], query)[0].clone() for query in queries]
        query = queries[0].clone()
        captured, replay = trial.device.capture(lambda: _attend(trial, store, calls[0], query))
        for number in (1, 0):
            query.copy_(queries[number])
            replay()
            trial.device.synchronize()
            same = same_bits(captured[0], expected[number])
            trial.expect(same, f"replay {number} of decoding gives other bits")


def _is_skipped(trial: Trial) -> bool:
    """Whether a subject's kernels are none of these; says why."""
    if not trial.subject.is_plain:
        trial.skipped = "what serves is checked without masks, windows and softcap"
    elif trial.subject.accumulator is not Accumulator.FP32:
        trial.skipped = "nothing that serves has this accumulator"
    return bool(trial.skipped)


def _call(trial: Trial, queries: int, keys: int, semantics: Semantics, number: int = 0) -> Call:
    """On the CPU, of heads that share keys."""
    return make_call(
        trial.subject,
        queries,
        keys,
        seed=trial.plan.seed + number,
        kv_heads=_KV_HEADS,
        group=_GROUP,
        semantics=semantics,
    )


def _expect_near(trial: Trial, label: str, outcome: Outcome, call: Call) -> None:
    expected = reference.attention(
        call.query, call.key, call.value, trial.subject.reference(), call.semantics
    )
    problems = [problem for problem in trial.far_from(outcome, *expected) if problem is not None]
    trial.expect(not problems, f"{label}: {'; '.join(problems)}")


@contextmanager
def _filled(trial: Trial, call: Call, ends: tuple[int, ...]) -> Iterator[CudaStore]:
    """A cache of a call's keys and values, appended up to each of these ends."""
    here = Case("", call).on(trial.device.place)
    batch, kv_heads, length, head_dim = call.key.shape
    shape = PackedShape(batch, kv_heads, head_dim, call.value.shape[3], length, call.key.dtype)

    @contextmanager
    def on(device: torch.device) -> Iterator[kernel.Target]:
        yield target(trial.device)

    store = CudaStore(shape, trial.device.place, trial.subject.recipe, on)
    for first, end in zip((0, *ends), ends, strict=False):
        store.append(first, here.key[:, :, first:end], here.value[:, :, first:end])
    yield store


def _attend(
    trial: Trial, store: CudaStore, call: Call, query: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Output and LSE, without waiting for them."""
    if query is None:
        query = call.query.to(trial.device.place)
    value = query.new_empty((call.value.shape[0], call.value.shape[1], 0, call.value.shape[3]))
    output = empty_output(query, value)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    store.attend(
        call.key.shape[2],
        query,
        call.semantics,
        output,
        attn_mask=None,
        sinks=None,
        lse=lse,
    )
    return output, lse


SERVING_CHECKS: Final[Mapping[str, Callable[[Trial], None]]] = {
    "sequences": sequences,
    "rotary": rotary,
    "cache": cache,
    "cache_graph": cache_graph,
}
