"""Launches that depend on one another: what one may do before those before it have ended."""

from __future__ import annotations

import functools
import struct
from pathlib import Path

import pytest
import torch

from tests.cutlass_templates import host as cuda
from tests.cutlass_templates.host import Host, compile_kernel, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

SEEDS = range(10)
WORDS = 256


@functools.cache
def image() -> bytes:
    source = Path(__file__).parent / "kernels" / "dependent.cu"
    # The name of the file is for messages.
    return compile_kernel('#line 1 "dependent.cu"\n' + source.read_text(), "dependent")


def make_memory() -> torch.Tensor:
    memory = torch.zeros(5 * WORDS, dtype=torch.int32)
    memory[:WORDS] = torch.arange(WORDS)
    return memory


def launch(
    host: Host,
    memory: torch.Tensor,
    kernel: str,
    *,
    fault: int = 0,
    dependent: bool = True,
    stream: int = 0,
) -> None:
    params = struct.pack("Pq", memory.data_ptr(), fault)
    geometry = (2, 128, 2048)
    host.launch(image(), kernel, *geometry, params, dependent=dependent, stream=stream)


def test_a_chain_of_launches(host: Host) -> None:
    for seed in SEEDS:
        host.seed(seed)
        memory = make_memory()
        launch(host, memory, "source", dependent=False)
        launch(host, memory, "relay")
        launch(host, memory, "sink")
        numbers = torch.arange(WORDS)
        assert torch.equal(memory[3 * WORDS : 4 * WORDS], 3 * numbers + 2)
    assert [launch["dependent"] for launch in host.launches()[:3]] == [False, True, True]


MISSING = "a store of a launch that this one depends on: missing await_prerequisites"
FAULTS = {
    1: f"race between load_written of 4 bytes .* and {MISSING}",
    2: "store_global of 4 bytes .* before await_prerequisites: a launch .* may still load or store",
    3: "arrive of 4 bytes .* before await_prerequisites",
    4: f"race between copy_async from global memory of 16 bytes .* and {MISSING}",
    5: "block 0: it ends without await_prerequisites",
    6: f"race between load_written of 4 bytes .* and {MISSING}",
    7: "load_global of 4 bytes .*, which a launch has stored .*: it must be load_written",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_in_every_order(host: Host, fault: int) -> None:
    for seed in SEEDS:
        host.seed(seed)
        memory = make_memory()
        launch(host, memory, "source", dependent=False)
        with pytest.raises(RuntimeError, match=FAULTS[fault]) as error:
            launch(host, memory, "relay", fault=fault)
        assert "block 0: it ends" in str(error.value) or "(dependent.cu:" in str(error.value)


@pytest.mark.parametrize("fault", [0, *FAULTS])
def test_what_depends_on_nothing_need_not_wait(host: Host, fault: int) -> None:
    memory = make_memory()
    launch(host, memory, "source", dependent=False)
    launch(host, memory, "relay", fault=fault, dependent=False)


def test_the_third_of_a_chain_may_begin_before_the_first_has_ended(host: Host) -> None:
    memory = make_memory()
    for dependent in (False, True):
        launch(host, memory, "source", dependent=False)
        launch(host, memory, "relay", dependent=dependent)
        if dependent:
            with pytest.raises(RuntimeError, match=f"race between load_written .* {MISSING}"):
                launch(host, memory, "sink", fault=1)
        else:  # then source has ended when relay begins
            launch(host, memory, "sink", fault=1)


def test_other_streams_are_not_waited_for(host: Host) -> None:
    memory = make_memory()
    launch(host, memory, "source", dependent=False, stream=0x10)
    launch(host, memory, "relay", fault=7, stream=0x20)


def test_an_attribute_that_is_not_imitated_is_refused(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "_PROGRAMMATIC_STREAM_SERIALIZATION", 4)  # a cluster
    with pytest.raises(RuntimeError, match="cuLaunchKernelEx: 1: relay: attribute 4 is not"):
        launch(host, make_memory(), "relay")
