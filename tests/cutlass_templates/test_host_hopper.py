"""Hopper's part of the arch layer on the CPU: products against CuTe's layouts, and every check."""

from __future__ import annotations

import functools
import re
import struct
from pathlib import Path

import pytest
import torch

from tests.cutlass_templates.host import Host, compile_kernel, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

KERNELS = Path(__file__).parent / "kernels"
SEEDS = range(8)
OTHER = r"thread \d+ \(warp \d+, lane \d+\)"


@functools.cache
def image(name: str) -> bytes:
    # The name of the file is for messages.
    source = (KERNELS / f"{name}.cu").read_text()
    return compile_kernel(f'#line 1 "{name}.cu"\n{source}', name)


def multiply(
    host: Host, kernel: str, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, wrong: int = 0
) -> torch.Tensor:
    """c + a @ b.T by a kernel of wgmma.cu: codes (64, K) and (N, K), and bits (64, N)."""
    result = c.clone()
    shared_bytes = (64 + len(b)) * a.shape[1]
    pointers = (a.data_ptr(), b.data_ptr(), result.data_ptr())
    host.launch(image("wgmma"), kernel, 1, 128, shared_bytes, struct.pack("3Pq", *pointers, wrong))
    return result


INTEGERS = [(64, 64, 64), (128, 64, 64), (128, 128, 128), (128, 256, 128)]
FLOATS = [(64, 64, 64), (96, 128, 64), (128, 128, 128), (256, 64, 64)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("columns", "k", "row_bytes"), INTEGERS)
def test_integer_products_have_the_layouts_of_cute(
    host: Host, columns: int, k: int, row_bytes: int, seed: int
) -> None:
    host.seed(seed)
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randint(-128, 128, (n, k), generator=generator).char() for n in (64, columns))
    c = torch.randint(-(1 << 31), 1 << 31, (64, columns), generator=generator).int()
    result = multiply(host, f"s8_{columns}_{k}_{row_bytes}", a, b, c)
    assert torch.equal(result, (c.long() + a.long() @ b.long().T).int())  # wraps around


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("columns", "k", "row_bytes"), FLOATS)
def test_float_products_have_the_layouts_of_cute(
    host: Host, columns: int, k: int, row_bytes: int, seed: int
) -> None:
    """With values whose sums are exact."""
    host.seed(seed)
    generator = torch.Generator().manual_seed(seed)
    a, b, c = (
        torch.randint(-7, 8, shape, generator=generator) / 4
        for shape in [(64, k), (columns, k), (64, columns)]
    )
    codes = [x.to(torch.float8_e4m3fn).view(torch.uint8) for x in (a, b)]
    result = multiply(host, f"e4m3_{columns}_{k}_{row_bytes}", *codes, c.view(torch.int32))
    assert torch.equal(result.view(torch.float32), c + a @ b.T)


@pytest.mark.parametrize("kernel", ["s8_64_64_64", "s8_128_128_128"])
def test_a_descriptor_of_another_swizzle_gives_another_product(host: Host, kernel: str) -> None:
    columns, k = int(kernel.split("_")[1]), int(kernel.split("_")[2])
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-128, 128, (n, k), generator=generator).char() for n in (64, columns))
    c = torch.zeros(64, columns, dtype=torch.int32)
    try:
        result = multiply(host, kernel, a, b, c, wrong=1)
    except RuntimeError as error:  # rows of 128 bytes where there are 64 end beyond the memory
        assert "outside of the block's" in str(error)
    else:
        assert not torch.equal(result, (a.long() @ b.long().T).int())


@pytest.mark.parametrize("row_bytes", [64, 128])
def test_descriptors_are_those_of_cute(host: Host, row_bytes: int) -> None:
    pair = torch.zeros(2, dtype=torch.int64)
    packed = struct.pack("3Pq", 0, 0, pair.data_ptr(), 0)
    host.launch(image("wgmma"), f"descriptor_{row_bytes}", 1, 128, 1024, packed)
    assert pair[0] == pair[1] != 0


@functools.cache
def number(kernel: str, fault: str) -> int:
    """Of a fault such as ``missing_arrive``, in the enumeration of a struct of hopper_faults.cu."""
    source = (KERNELS / "hopper_faults.cu").read_text()
    found = re.search(rf"struct {kernel} .*?enum Fault {{(.*?)}}", source, re.DOTALL)
    assert found is not None
    names = [name.strip() for name in found[1].split(",")]
    return names.index("k" + fault.title().replace("_", ""))


def ring(host: Host, fault: str = "none") -> torch.Tensor:
    """The sums of 16 tiles, that the ring brings, by 256 threads."""
    memory = torch.arange(1024, dtype=torch.int32)
    sums = torch.zeros(256, dtype=torch.int32)
    host.allow(memory, writable=False)
    host.allow(sums, writable=True)
    packed = struct.pack("2Pq", memory.data_ptr(), sums.data_ptr(), number("Ring", fault))
    host.launch(image("hopper_faults"), "ring", 1, 384, 3 * 272, packed)
    return sums


def products(host: Host, fault: str = "none") -> torch.Tensor:
    """Twice the sum of two products of ones, 64 long, and the bits of 32, by 256 threads."""
    sums = torch.zeros(256, dtype=torch.int32)
    packed = struct.pack("2Pq", 0, sums.data_ptr(), number("Products", fault))
    host.launch(image("hopper_faults"), "products", 1, 256, 96 * 64, packed)
    return sums


@pytest.mark.parametrize("seed", range(20))
def test_a_ring_of_bulk_copies(host: Host, seed: int) -> None:
    host.seed(seed)
    expected = torch.arange(1024, dtype=torch.int32).view(16, 64).sum(0, dtype=torch.int32)
    assert torch.equal(ring(host), expected.repeat(4))


@pytest.mark.parametrize("seed", range(20))
def test_warpgroups_that_take_turns(host: Host, seed: int) -> None:
    host.seed(seed)
    floats = torch.tensor(32 * 2.0**-9).view(torch.int32)
    assert torch.equal(products(host), (2 * 2 * 64 + floats).expand(256))


RING_FAULTS = {
    "missing_arrive": r"deadlock: nobody can run; .*waits at mbarrier_wait \(hopper_faults\.cu:\d+"
    r"\) for parity \d of mbarrier 5: 1 of 256 arrivals and 0 bytes missing in phase 1",
    "wrong_phase": r"race between (copy_bulk|load_shared) at offset .*|deadlock",
    "no_wait": r"race between (copy_bulk|load_shared) at offset .*",
    "refilled_at_once": r"race between copy_bulk at offset .*|all 1 arrivals of phase 0 have come",
    "too_few_bytes": r"copy_bulk of 256 bytes lands in phase|complete while 256 bytes|"
    r"all 1 arrivals .* but not its bytes|deadlock: .* -?\d+ bytes missing",
    "too_many_bytes": r"deadlock: .* for parity 0 of mbarrier 0: 0 of 1 arrivals and 16 bytes",
    "one_arrival_more": r"deadlock: .* of mbarrier 1: 1 of 257 arrivals and 0 bytes missing",
    "other_barrier": r"race between (copy_bulk|load_shared) at offset .*|deadlock",
    "odd_bytes": r"copy_bulk of 8 bytes: it must be a multiple of 16",
    "beyond_shared": r"copy_bulk to shared memory of 16 bytes .* outside of the block's 816 bytes",
    "beyond_global": r"copy_bulk from global memory of 16 bytes at .* is outside of the memory",
    "into_barrier": r"copy_bulk at offset 768 of shared memory, which is an mbarrier",
    "too_many_registers": r"block 0: setmaxnreg asks for 68608 registers; there are 65536",
    "not_made": r"mbarrier_(wait|arrive) at offset \d+ of shared memory, where no mbarrier",
    "unordered": r"where no mbarrier was made|race between mbarrier_(wait|arrive) .* and writing",
}


@pytest.mark.parametrize("fault", RING_FAULTS)
def test_a_fault_of_the_ring_is_found_in_every_order(host: Host, fault: str) -> None:
    for seed in SEEDS:
        host.seed(seed)
        with pytest.raises(RuntimeError, match=RING_FAULTS[fault]):
            ring(host, fault)


def test_a_copy_that_nobody_waits_for_is_found_where_it_is_in_flight_at_the_end(host: Host) -> None:
    found = 0
    for seed in range(40):
        host.seed(seed)
        try:
            ring(host, "early_end")
        except RuntimeError as error:
            found += 1
            message = r"block 0: it ends while a bulk copy is in flight \(hopper_faults\.cu:\d+\)"
            assert re.search(message, str(error))
    assert found > 0


PRODUCT_FAULTS = {
    "no_fence": "wgmma .*there is no wgmma_fence between it and what used its registers before",
    "no_async_fence": f"race between wgmma at offset .* writing by {OTHER}: missing fence_async",
    "no_commit": "exits with products of wgmma in flight|no wgmma_fence between it",
    "no_wait": "exits with products of wgmma in flight|no wgmma_fence between it",
    "overwritten": r"race between store_shared at offset 4096 .* and a product of wgmma of "
    r"warp \d in flight: missing wait|race between (store_shared|wgmma) at offset 4096",
    "accumulators_written": "accumulators were written while their product was in flight",
    "operand_written": "operand A's registers were written while its product was in flight",
    "one_warp_less": "warps 0 and 2 of a warpgroup differ in the products that they issued",
    "missing_arrive": r"deadlock: nobody can run; .* waits at named_barrier",
    "other_count": r"named_barrier 2 of (128|256) threads, to which others came as of (128|256)",
    "off_swizzle": "rows that begin at offset 64, not at a multiple of 512 bytes, the period",
    "beyond_shared": "wgmma of 16 bytes at offset 6144 is outside of the block's 6144 bytes",
    "written_without_order": r"race between (store_shared|wgmma) at offset 4096",
}


@pytest.mark.parametrize("fault", PRODUCT_FAULTS)
def test_a_fault_of_the_products_is_found_in_every_order(host: Host, fault: str) -> None:
    for seed in SEEDS:
        host.seed(seed)
        with pytest.raises(RuntimeError, match=PRODUCT_FAULTS[fault]):
            products(host, fault)


def test_accumulators_in_flight_are_garbage(host: Host) -> None:
    assert not torch.equal(products(host, "read_early"), products(host))
