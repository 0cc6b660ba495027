"""Kernels that begin before those that they depend on have ended: who waits, and for what."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

from sage_compiler.kernels.cuda.arch import ARCHS
from sage_compiler.kernels.cuda.driver import DriverError
from sage_compiler.kernels.cuda.loader import Loader
from sage_compiler.kernels.cuda.spec import QueryTile
from tests.compiler.kernels.cuda.emulation import WGMMA, Way, broken, replacing, the_host
from tests.compiler.kernels.cuda.test_attention import make_call
from tests.compiler.kernels.cuda.test_packed import filled, on_cuda
from tests.compiler.kernels.cuda.test_varlen import make_batch
from tests.compiler.kernels.dense import Call
from tests.cutlass_templates import host

pytestmark = pytest.mark.skipif(host.missing() is not None, reason=str(host.missing()))

MMA = Way("int8_fp8", "sm_120a")
WAYS = [WGMMA, MMA, Way("int8_fp16", "sm_100a")]
PACKED_SPLIT = QueryTile(32, packed_heads=True, split=True)
CHAIN = ["statistics", "query", "key", "value", "attend"]


def launches() -> list[tuple[str, bool]]:
    """The kinds of kernels that were launched, and whether dependent on the one before."""
    found = []
    for launch in the_host().launches():
        kind = re.match("sage_(key_mean|[a-z]+)_", launch["symbol"])
        assert kind is not None
        found.append((kind[1], launch["dependent"]))
    return found


def few_queries() -> Call:
    """Which split their keys, with everything that the last kernel reads."""
    return make_call(3, 300, 64, torch.float16, kv_heads=2, group=2, sinks=True)


def test_what_every_gpu_below_sm_90_runs_is_launched_as_ever() -> None:
    Way("int8_fp8").attend(few_queries(), PACKED_SPLIT, splits=2)
    assert launches() == [("quantize", False), ("attend", False), ("merge", False)]
    assert [arch.name for arch in ARCHS.values() if arch.overlaps_launches] == [
        "sm_90a",
        "sm_100a",
        "sm_120a",
    ]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_attention_depends_on_the_quantizers_and_merging_on_it(way: Way) -> None:
    call = few_queries()
    split = [way.attend(call, PACKED_SPLIT, splits=2, seed=seed) for seed in range(3)]
    assert launches() == [("quantize", False), ("attend", True), ("merge", True)]
    assert all(torch.equal(split[0].output, each.output) for each in split)
    way.attend(call)
    assert launches() == [("quantize", False), ("attend", True)]


@pytest.mark.parametrize("way", [WGMMA, MMA], ids=str)
def test_kernels_of_a_packed_batch_depend_on_one_another(way: Way) -> None:
    batch = make_batch((65, 0, 70), (64, 5, 129), kv_heads=2, group=2)
    way.attend(batch.call, lengths=batch.lengths())
    assert launches() == [(kind, kind != "statistics") for kind in CHAIN]


def test_quantizers_of_one_task_each_that_do_not_wait_are_not_dependent() -> None:
    MMA.attend(few_queries(), change=lambda kernels: replace(kernels, quantize=None))
    assert launches() == [(kind, kind == "attend") for kind in CHAIN]


@pytest.mark.parametrize("arch", ["sm_90a", "sm_120a"])
def test_the_kernels_of_a_cache(arch: str) -> None:
    call = few_queries()
    with on_cuda(arch=arch):
        cache = filled(call, "int8_fp8", 70)
        assert launches() == [("key_mean", False), ("append", True)] * 2
        cache.attend(call.query)
    kinds = launches()[4:]
    assert kinds[:2] == [("query", False), ("attend", True)]
    assert kinds[2:] in ([], [("merge", True)])


# --- kernels that do not wait -------------------------------------------------------------------


def attention(way: Way) -> Callable[[Loader], object]:
    return lambda kernels: way.attend(few_queries(), PACKED_SPLIT, splits=2, kernels=kernels)


def packed_batch(kernels: Loader) -> object:
    # Sequences that leave tiles over.
    batch = make_batch((65, 1, 70), (64, 5, 129), kv_heads=2, group=2)
    return MMA.attend(batch.call, lengths=batch.lengths(), kernels=kernels)


def appending(kernels: Loader) -> object:
    with on_cuda(kernels, MMA.arch):
        return filled(few_queries())


class Fault(NamedTuple):
    """A kernel that is broken, what runs it, and what the executor says."""

    run: Callable[[Loader], object]
    kind: str
    change: Callable[[str], str]
    found_by: str
    headers: tuple[str, ...] = ()


WAIT = "arch::await_prerequisites();"
MISSING = "missing await_prerequisites"
FAULTS = {
    "attention does not wait": Fault(attention(MMA), "attend", replacing(WAIT, ""), MISSING),
    "one warp waits": Fault(
        attention(MMA),
        "attend",
        replacing(WAIT, f"if (arch::thread_index() < 32) {WAIT}"),
        MISSING,
    ),
    "attention loads through a cache that is not coherent": Fault(
        attention(MMA),
        "attend",
        replacing("load_written(p.query_scales", "load_global(p.query_scales"),
        "load_global .* which a launch has stored",
        ("query_rows",),
    ),
    "the producer does not wait": Fault(
        attention(WGMMA),
        "attend_hopper",
        replacing(f"{WAIT} if (thread == kConsumers)", "if (thread == kConsumers)"),
        f"copy_bulk from .* {MISSING}",
    ),
    "consumers do not wait": Fault(
        attention(WGMMA),
        "attend_hopper",
        replacing(f"{WAIT} consume(p);", "consume(p);"),
        f"load_written .* {MISSING}",
    ),
    "merging does not wait": Fault(attention(MMA), "merge", replacing(WAIT, ""), MISSING),
    "merging waits too late": Fault(
        attention(MMA),
        "merge",
        lambda text: replacing("// A NaN beside keys", f"{WAIT} //")(replacing(WAIT, "")(text)),
        f"load_written .* {MISSING}",
    ),
    "an append does not wait": Fault(
        appending, "append", replacing(WAIT, ""), "await_prerequisites"
    ),
    "kernels of a packed batch do not wait": Fault(
        packed_batch, "", replacing(WAIT, ""), MISSING, ("varlen",)
    ),
    "blocks with nothing to do leave without waiting": Fault(
        packed_batch,
        "",
        replacing(WAIT, f"if (task >= 0) {WAIT}"),
        "block .*: it ends without await_prerequisites",
        ("varlen",),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_kernel_that_does_not_wait_is_found(name: str) -> None:
    fault = FAULTS[name]
    with pytest.raises(DriverError):
        fault.run(broken(fault.kind, fault.change, *fault.headers))
    assert re.search(fault.found_by, the_host().message()), the_host().message()
