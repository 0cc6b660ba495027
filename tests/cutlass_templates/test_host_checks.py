"""The checks of the host execution, each with a kernel that must fail it and one that must not."""

from __future__ import annotations

import functools
import re
import struct
from pathlib import Path

import pytest
import torch

from tests.cutlass_templates.host import Host, compile_kernel, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

SEEDS = range(20)
OTHER = r"thread \d+ \(warp \d, lane \d+\)"


@functools.cache
def image() -> bytes:
    folder = Path(__file__).parent / "kernels"
    # The name of the file is for messages.
    return compile_kernel('#line 1 "faults.cu"\n' + (folder / "faults.cu").read_text(), "faults")


def run(host: Host, kernel: str, fault: int) -> torch.Tensor:
    """Runs a kernel of faults.cu; its memory afterwards, which was 0 .. 1023."""
    memory = torch.arange(1024, dtype=torch.int32)
    host.launch(image(), kernel, 1, 128, 4096, struct.pack("Pq", memory.data_ptr(), fault))
    return memory


# Either the thread that exits finds one that waits for it, or the other way round.
EXITED = r"thread 37 \(warp 1, lane 5\)"


def exit_before(operation: str) -> str:
    where = rf"{operation} \(faults\.cu:\d+\)"
    return (
        f"{EXITED}: exits while {OTHER} waits for it at {where}"
        f"|{OTHER}: waits at {where}, which {EXITED} has exited without reaching: all"
    )


FAULTS = {
    "removed_wait": f"race between load_shared .* copy of {OTHER} in flight: missing wait",
    "newest_not_landed": "asynchronous copy .* in flight: missing wait",
    "removed_commit": "exits with 1 asynchronous copies in flight, 1 of them not committed",
    "missing_barrier": rf"race between (load|store)_shared .* {OTHER}: missing barrier",
    "overwritten_while_read": rf"race between (load|store)_shared .* by {OTHER}: missing barrier",
    "overwritten_while_others_read": r"race between (load|store)_shared at offset 0 .*: missing",
    "overwritten_by_a_reader": r"race between (load|store)_shared at offset 0 .*: missing",
    "written_twice": f"race between store_shared .* and writing by {OTHER}: missing barrier",
    "unordered_lanes": rf"race between (load|store)_shared .* {OTHER}: missing barrier",
    "unordered_matrix": rf"race between load_matrix_x4 .* writing by {OTHER}: missing barrier",
    "landed_without_barrier": f"asynchronous copy of {OTHER} that has landed: missing barrier",
    "refilled_while_read": "race between (copy_async|load_matrix_x4) at offset",
    "copied_twice": f"race between copy_async .* asynchronous copy of {OTHER}",
    "loaded_after_ticket": r"race between load_global of 4 bytes at 0x\w+ and a store of the same",
    "loaded_after_store": r"race between load_global of 4 bytes at 0x\w+ and a store of the same",
    "copied_after_store": "race between copy_async from global memory of 16 bytes .* and a store",
    "partial_barrier": f"waits .*at barrier|exits while {OTHER} waits for it at barrier",
    "divergent_barrier": f"divergent barrier: .* {OTHER} of the same warp at barrier",
    "divergent_operations": r"divergent warp collective: it is at (shuffle_xor|mma<MmaS8>) "
    rf"\(faults.cu:\d+\), and {OTHER} of the same warp at (shuffle_xor|mma<MmaS8>)",
    "divergent_places": "divergent warp collective: it is at shuffle_xor .* at shuffle_xor",
    "deadlock": r"deadlock: nobody can run; thread 0 .* waits at barrier .*, "
    r"thread 1 .* waits at shuffle_xor .*, thread 32 .* waits at barrier",
    "early_exit": exit_before("shuffle_xor"),
    "late_exit": exit_before("shuffle_xor"),
    "early_exit_before_barrier": exit_before("barrier"),
    "late_exit_before_barrier": exit_before("barrier"),
    "wrong_mask": "shuffle_xor with lane mask 32: it must be 0 to 31",
}


@pytest.mark.parametrize("kernel", FAULTS)
def test_a_fault_is_found_in_every_order(host: Host, kernel: str) -> None:
    for seed in SEEDS:
        host.seed(seed)
        run(host, kernel, 0)
        with pytest.raises(RuntimeError, match=FAULTS[kernel]) as error:
            run(host, kernel, 1)
        assert re.search(rf"cuLaunchKernel: 719: {kernel}: block 0, thread", str(error.value))
        if kernel != "removed_commit":
            assert re.search(r"\(faults\.cu:\d+\)", str(error.value))


def test_races_are_found_after_the_clock_of_the_detector_started_over(host: Host) -> None:
    run(host, "after_long", 0)
    with pytest.raises(RuntimeError, match="missing barrier"):
        run(host, "after_long", 1)


UNPUBLISHED = "race between load_written .* missing arrive or await, or a barrier"
RELAY_FAULTS = {
    1: f"deadlock: awaits 1 arrivals|{UNPUBLISHED}",  # blocks run in any order, tickets do not
    2: UNPUBLISHED,  # the others have perhaps not stored yet
    3: UNPUBLISHED,
    4: "deadlock: awaits 2 arrivals at .* where 1 came",
    5: UNPUBLISHED,
    6: UNPUBLISHED,
    7: UNPUBLISHED,  # one thread has been told
    8: "race between load_global .* a device loads through a cache that is not kept coherent",
}


def relay(host: Host, fault: int, begin: int = 0) -> torch.Tensor:
    memory = torch.full((1024,), begin, dtype=torch.int32)
    host.launch(image(), "relay", 3, 128, 4096, struct.pack("Pq", memory.data_ptr(), fault))
    return memory[256:384]


@pytest.mark.parametrize("fault", RELAY_FAULTS)
def test_blocks_see_what_was_published_to_them(host: Host, fault: int) -> None:
    found = 0
    for seed in SEEDS:
        host.seed(seed)
        assert relay(host, 0).tolist() == [*range(1, 128), 0]
        try:
            relay(host, fault)
        except RuntimeError as error:
            assert re.search(RELAY_FAULTS[fault], str(error)), error
            found += 1
    # With its index for a ticket, a block is right in one order of six.
    assert found == len(SEEDS) if fault != 1 else found > len(SEEDS) // 2


def test_counters_begin_at_zero(host: Host) -> None:
    with pytest.raises(RuntimeError, match=r"take_ticket at .* must be zero before the launch"):
        relay(host, 0, begin=1)


def test_bytes_of_global_memory_are_counted(host: Host) -> None:
    """In sectors of 32 bytes: 512 bytes that a block stores, and another one loads and stores."""
    host.library.sage_host_count_bytes(True)
    relay(host, 0)
    (logged,) = host.launches()
    assert (logged["loaded"], logged["loaded_once"], logged["stored"]) == (512, 512, 1024 + 3 * 32)


BEYOND = "outside of the block's 4096 bytes of shared memory"
OUTSIDE = "outside of the memory that the kernel may touch"


@pytest.mark.parametrize(
    ("kernel", "distance", "message"),
    [
        ("off_load_global", 2, r"load_global of 4 bytes at 0x\w+ is misaligned"),
        ("off_store_global", 1, r"store_global of 4 bytes at 0x\w+ is misaligned"),
        ("off_load_shared", 2, "load_shared of 4 bytes at offset 2 of shared memory is misaligned"),
        ("off_store_shared", 2, "store_shared of 4 bytes at offset 282 .* is misaligned"),
        ("off_load_matrix", 8, "load_matrix_x4 of 16 bytes at offset 1128 .* is misaligned"),
        ("off_copy_from", 8, r"copy_async from global memory of 16 bytes at 0x\w+ is misaligned"),
        ("off_copy_to", 8, "copy_async to shared memory of 16 bytes at offset 1128 .* misaligned"),
        ("off_load_shared", 4096, f"load_shared of 4 bytes at offset 4096 is {BEYOND}"),
        ("off_load_shared", -4, f"load_shared of 4 bytes at offset -4 is {BEYOND}"),
        ("off_store_shared", 3816, f"store_shared of 4 bytes at offset 4096 is {BEYOND}"),
        ("off_load_matrix", 2976, f"load_matrix_x4 of 16 bytes at offset 4096 is {BEYOND}"),
        ("off_copy_to", 1 << 20, f"copy_async to shared memory of 16 bytes .* is {BEYOND}"),
        ("off_load_global", 4096, f"{OUTSIDE}, 0 bytes after the end of"),
        ("off_load_global", -4, f"{OUTSIDE}, 4 bytes before the begin of"),
        ("off_store_global", 3816, f"{OUTSIDE}, 0 bytes after the end of"),
        ("off_copy_from", 1 << 20, OUTSIDE),
    ],
)
def test_an_access_that_is_off_is_found(
    host: Host, kernel: str, distance: int, message: str
) -> None:
    # Two parts of one buffer: which of them is the nearer one is not for the allocator to say.
    around = torch.zeros(4096, dtype=torch.int32).numpy()
    memory = torch.frombuffer(around, dtype=torch.int32, count=1024, offset=4096)
    host.allow(memory, writable=True)
    host.allow(torch.frombuffer(around, dtype=torch.int32, count=16, offset=16000), writable=True)
    arguments = (image(), kernel, 1, 128, 4096)
    host.launch(*arguments, struct.pack("Pq", memory.data_ptr(), 0))
    with pytest.raises(RuntimeError, match=message) as error:
        host.launch(*arguments, struct.pack("Pq", memory.data_ptr(), distance))
    assert re.search(r"block 0, thread 70 \(warp 2, lane 6\): .* \(faults\.cu:", str(error.value))


def test_a_read_only_tensor_refuses_writes(host: Host) -> None:
    memory = torch.zeros(1024, dtype=torch.int32)
    host.allow(memory, writable=False)
    params = struct.pack("Pq", memory.data_ptr(), 0)
    host.launch(image(), "off_load_global", 1, 128, 4096, params)
    with pytest.raises(RuntimeError, match=r"store_global of 4 bytes at .* to read-only memory"):
        host.launch(image(), "off_store_global", 1, 128, 4096, params)
    assert not memory.any()


@pytest.mark.parametrize(("offset", "side"), [(4096, "after"), (8188, "after"), (-4, "before")])
def test_a_raw_write_beside_shared_memory_is_found(host: Host, offset: int, side: str) -> None:
    run(host, "raw_store", 0)
    with pytest.raises(RuntimeError, match=f"block 0: the memory {side} its shared memory"):
        run(host, "raw_store", offset)


def test_without_the_race_detector_a_removed_wait_gives_garbage(host: Host) -> None:
    with host.without_race_detector():
        expected = (torch.arange(128, dtype=torch.int32) * 4 + 64) % 512
        assert torch.equal(run(host, "removed_wait", 0)[512:640], expected)
        # What other threads copy lands whenever these have come to their second wait.
        result = run(host, "removed_wait", 1)[512:640]
        garbage = result == 0xCDCDCDCD - (1 << 32)
        assert garbage.any()
        assert torch.equal(result[~garbage], expected[~garbage])


def test_a_failed_launch_leaves_the_executor_usable(host: Host) -> None:
    """Fibers are abandoned where they are; the next launch starts anew, on the same stacks."""
    for _ in range(50):
        with pytest.raises(RuntimeError, match="deadlock"):
            run(host, "deadlock", 1)
        run(host, "deadlock", 0)
