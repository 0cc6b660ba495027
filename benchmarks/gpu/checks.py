"""The checks of one kind of call on a device. Each adds to a trial's findings."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from math import inf, log, nan
from typing import Final

import torch
from torch import Tensor

from benchmarks.gpu.guarded import Outcome, attend, same_bits
from benchmarks.gpu.matrix import (
    LSE_DISTANCE,
    Case,
    arbitrary,
    make_call,
    ragged,
)
from benchmarks.gpu.trial import Trial, differ
from sage_compiler.precision import Accumulator
from sage_compiler.semantics import MaskClass, Semantics
from tests.compiler.kernels.dense import Call

_REPEATS: Final = 8  # of each thread
_PATIENCE: Final = 60.0  # seconds until a thread that does not come is an error
_FAR_LENGTH: Final = 6  # tokens, so far apart that offsets leave 32 bits


def matrix(trial: Trial) -> None:
    """All masks and groups at lengths around the edges of tiles."""
    for case in ragged(trial.subject, trial.plan.lengths, trial.plan.seed):
        trial.expect_right(case)


def random_calls(trial: Trial) -> None:
    """Layouts, batches, scales and rows that see nothing, in any combination."""
    for number in range(trial.plan.random_calls):
        trial.expect_right(arbitrary(trial.subject, trial.plan.seed + number))


def large(trial: Trial) -> None:
    """More blocks than a GPU runs at once, against the reference on the same device."""
    for case in ragged(trial.subject, trial.plan.large, trial.plan.seed, batch=2):
        trial.expect_right(case, on_device=True)


def special_values(trial: Trial) -> None:
    """Zeros, large values, and NaN: where it is seen, and where it is not."""
    trial.expect_right(_with_semantics(trial, 70, 90, Semantics(MaskClass.CAUSAL, scale=0.0)))
    _zeros(trial)
    _large_values(trial)
    _unseen(trial)
    _seen(trial)


def _with_semantics(trial: Trial, queries: int, keys: int, semantics: Semantics) -> Case:
    call = make_call(trial.subject, queries, keys, seed=trial.plan.seed, semantics=semantics)
    return Case(f"L={queries}x{keys} {semantics.mask_class} scale={semantics.scale}", call)


def _attend(trial: Trial, call: Call) -> Outcome:
    """On the device, from a call on the CPU."""
    return attend(trial.device, trial.subject, Case("", call).on(trial.device.place))


def _zeros(trial: Trial) -> None:
    like = make_call(trial.subject, 70, 90, seed=trial.plan.seed)
    query, key, value = (torch.zeros_like(x) for x in (like.query, like.key, like.value))
    outcome = _attend(trial, Call(query, key, value, like.semantics))
    right = (outcome.lse - log(90)).abs().max() <= LSE_DISTANCE and not outcome.output.any()
    trial.expect(bool(right), "Q, K, V of zeros do not give zeros and an LSE of log(keys)")


def _large_values(trial: Trial) -> None:
    call = make_call(trial.subject, 64, 128, seed=trial.plan.seed)
    size = 6e4 if trial.subject.dtype is torch.float16 else 1e30
    outcome = _attend(trial, dataclasses.replace(call, value=torch.full_like(call.value, size)))
    near = (outcome.output.double() / size - 1).abs().max() <= 4e-2
    trial.expect(bool(near), f"V of {size:g} does not give {size:g}")


def _unseen(trial: Trial) -> None:
    call = make_call(
        trial.subject, 100, 150, seed=trial.plan.seed, semantics=Semantics(MaskClass.CAUSAL)
    )
    outcomes = []
    for unseen in (0.0, nan):
        key, value = call.key.clone(), call.value.clone()
        key[:, :, 100:], value[:, :, 100:] = unseen, unseen
        outcomes.append(_attend(trial, dataclasses.replace(call, key=key, value=value)))
    trial.expect(differ(*outcomes) is None, "keys that nobody sees have an effect")

    bottom_right = Semantics(MaskClass.CAUSAL_BOTTOM_RIGHT)
    call = make_call(trial.subject, 100, 40, seed=trial.plan.seed, semantics=bottom_right)
    outcomes = []
    for unseen in (0.0, inf):
        query = call.query.clone()
        query[:, :, :60] = unseen
        outcomes.append(_attend(trial, dataclasses.replace(call, query=query)))
    trial.expect(differ(*outcomes) is None, "queries that see nothing have an effect")


def _seen(trial: Trial) -> None:
    """No plausible number in what NaN or infinity has a part in, as docs/numerics.md has it."""
    reached = {"query": (0, 0, 17), "key": (0, 0), "value": (0, 0, slice(None), 5)}
    for name, part in reached.items():
        for bad in (nan, inf):
            call = make_call(trial.subject, 70, 100, seed=trial.plan.seed)
            tensor = getattr(call, name).clone()
            tensor[0, 0, 17, 5] = bad
            outcome = _attend(trial, dataclasses.replace(call, **{name: tensor}))
            is_seen = not outcome.output[part].isfinite().any()
            trial.expect(is_seen, f"{bad} in {name} gives numbers that look right")


def far_apart(trial: Trial) -> None:
    """Offsets beyond 2**31 elements."""
    needed = 4 * trial.subject.dtype.itemsize << 31  # three tensors, and the rest
    if trial.device.free_bytes() < needed:
        trial.skipped = f"needs {needed >> 30} GiB of free memory"
        return
    call = make_call(trial.subject, _FAR_LENGTH, _FAR_LENGTH, seed=trial.plan.seed)
    near = Case("", call).on(trial.device.place)
    far = dataclasses.replace(
        near, query=_spread(near.query), key=_spread(near.key), value=_spread(near.value)
    )
    outcomes = [attend(trial.device, trial.subject, call) for call in (near, far)]
    trial.expect(differ(*outcomes) is None, "other bits where offsets exceed 2**31 elements")


def _spread(x: Tensor) -> Tensor:
    """The same, its last token more than 2**31 elements after its first."""
    length, width = x.shape[2:]
    stride = (1 << 31) // (length - 1) + width
    memory = x.new_empty(stride * (length - 1) + width)
    return memory.as_strided(x.shape, (0, 0, stride, 1)).copy_(x)


def _call(trial: Trial, number: int, lengths: tuple[int, int], mask_class: MaskClass) -> Call:
    """On the device, of several heads; each number has inputs of its own."""
    call = make_call(
        trial.subject,
        *lengths,
        seed=trial.plan.seed + number,
        kv_heads=2,
        group=2,
        semantics=Semantics(mask_class),
        sinks=mask_class is MaskClass.CAUSAL,
    )
    return Case("", call).on(trial.device.place)


def _pair(trial: Trial) -> list[Call]:
    """Two calls that have nothing in common."""
    masks = (MaskClass.NONE, MaskClass.CAUSAL)
    return [_call(trial, i, trial.plan.pair[i], mask_class) for i, mask_class in enumerate(masks)]


def _filled_like(call: Call) -> Call:
    """The same with NaN in all inputs."""
    query, key, value = (torch.full_like(x, nan) for x in (call.query, call.key, call.value))
    sinks = None if call.sinks is None else torch.full_like(call.sinks, nan)
    return Call(query, key, value, call.semantics, sinks=sinks)


def _copy(source: Call, to: Call) -> None:
    """Give the inputs of one call to another, on the current stream."""
    to.query.copy_(source.query)
    to.key.copy_(source.key)
    to.value.copy_(source.value)
    if source.sinks is not None and to.sinks is not None:
        to.sinks.copy_(source.sinks)


def graph(trial: Trial) -> None:
    """Captured once, replayed with other inputs in the same memory."""
    calls = [_call(trial, number, trial.plan.pair[0], MaskClass.CAUSAL) for number in range(2)]
    expected = [attend(trial.device, trial.subject, call) for call in calls]
    inputs = _filled_like(calls[0])
    result, replay = trial.device.capture(lambda: trial.run(inputs))
    for number in (1, 0, 1):
        _copy(calls[number], inputs)
        result[0].fill_(nan)
        replay()
        trial.device.synchronize()
        same = same_bits(result[0], expected[number].output)
        trial.expect(same, f"replay {number} of a graph gives other bits")


def stream(trial: Trial) -> None:
    """On a busy stream, after inputs that are written there: a launch elsewhere comes too early."""
    call = _call(trial, 0, trial.plan.pair[0], MaskClass.NONE)
    expected = attend(trial.device, trial.subject, call)
    late = _filled_like(call)
    trial.device.synchronize()
    with trial.device.other_stream():
        trial.device.occupy()
        _copy(call, late)
        output, lse = trial.run(late)
        trial.device.synchronize()
    same = same_bits(output, expected.output) and same_bits(lse, expected.lse)
    trial.expect(same, "other bits on a stream of its own: not all launches go to it")


def threads(trial: Trial) -> None:
    """Two at once, each on its stream with its call, loading the kernels at the same time."""
    calls = _pair(trial)
    expected = [attend(trial.device, trial.subject, call) for call in calls]
    loader = trial.device.fresh_loader()
    together = threading.Barrier(len(calls), timeout=_PATIENCE)

    def repeat(call: Call) -> list[tuple[Tensor, Tensor]]:
        with trial.device.other_stream():
            together.wait()
            results = [trial.run(call, loader) for _ in range(_REPEATS)]
            trial.device.synchronize()
            return results

    with ThreadPoolExecutor(len(calls)) as pool:
        found = list(pool.map(repeat, calls))
    for results, outcome in zip(found, expected, strict=True):
        for output, lse in results:
            same = same_bits(output, outcome.output) and same_bits(lse, outcome.lse)
            trial.expect(same, "other bits in two threads at once")


def operator(trial: Trial) -> None:
    """What users call takes these kernels, so it gives the same bits."""
    if trial.subject.accumulator is not Accumulator.FP32:
        trial.skipped = "the operator does not offer this accumulator"
        return
    for call in _pair(trial):
        expected = attend(trial.device, trial.subject, call)
        output = trial.device.attention(call, trial.subject.recipe)
        trial.device.synchronize()
        same = same_bits(output, expected.output)
        trial.expect(same, f"the operator gives other bits, {call.semantics.mask_class}")


CHECKS: Final[Mapping[str, Callable[[Trial], None]]] = {
    "matrix": matrix,
    "random": random_calls,
    "special": special_values,
    "large": large,
    "far": far_apart,
    "graph": graph,
    "stream": stream,
    "threads": threads,
    "operator": operator,
}
