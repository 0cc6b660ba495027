"""Boxes of tensors, as TMA copies them by tensor maps, on the CPU: against slices, and CuTe's
swizzles."""

from __future__ import annotations

import ctypes
import functools
import random
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cutlass_templates.host import (
    CUDA_ERROR_INVALID_VALUE,
    CUDA_SUCCESS,
    Host,
    compile_kernel,
    missing,
)

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

SOURCE = Path(__file__).parent / "kernels" / "tensor_boxes.cu"
SEEDS = range(8)
SHARED_BYTES = (32 << 10) + 128
SWIZZLES = (0, 32, 64, 128)  # bytes of a row; CUtensorMapSwizzle is the position
DTYPES = {torch.uint8: 0, torch.int16: 1, torch.int32: 3, torch.int64: 5}  # CUtensorMapDataType


@functools.cache
def image() -> bytes:
    return compile_kernel(f'#line 1 "{SOURCE.name}"\n{SOURCE.read_text()}', SOURCE.stem)


@functools.cache
def number(fault: str) -> int:
    found = re.search(r"enum Fault {(.*?)}", SOURCE.read_text(), re.DOTALL)
    assert found is not None
    names = [name.strip() for name in found[1].split(",")]
    return names.index("k" + fault.title().replace("_", ""))


def encode(host: Host, tensor: Tensor, box: Sequence[int], swizzle: int, **changes: Any) -> Any:
    """A map of a tensor; or the CUresult, where there can be none. Dims as torch has them."""
    rank = changes.pop("rank", tensor.dim())
    memory = ctypes.create_string_buffer(128 + 127)
    place = -ctypes.addressof(memory) % 128 + changes.pop("off", 0)
    sizes = changes.pop("sizes", tensor.shape)
    strides = changes.pop("strides", [n * tensor.element_size() for n in tensor.stride()[:-1]])
    arguments = dict(
        data_type=DTYPES[tensor.dtype],
        rank=ctypes.c_uint32(rank),
        address=ctypes.c_void_p(tensor.data_ptr()),
        sizes=(ctypes.c_uint64 * 5)(*reversed(sizes)),
        strides=(ctypes.c_uint64 * 5)(*reversed(strides)),
        box_sizes=(ctypes.c_uint32 * 5)(*reversed(box)),
        element_strides=(ctypes.c_uint32 * 5)(1, 1, 1, 1, 1),
        interleave=0,
        swizzle_kind=SWIZZLES.index(swizzle),
        promotion=0,
        fill=0,
    )
    values = (arguments | changes).values()
    to = ctypes.c_void_p(ctypes.addressof(memory) + place)
    code = host.call("cuTensorMapEncodeTiled", to, *values)
    return memory.raw[place : place + 128] if code == CUDA_SUCCESS else code


def copied(
    host: Host,
    tensor: Tensor,
    box: Sequence[int],
    at: Sequence[int],
    swizzle: int,
    *,
    fault: str = "none",
    read_as: int | None = None,
    **changes: Any,
) -> Tensor:
    """A box that begins at an element, read as ``read_as``, or as it is swizzled."""
    made = encode(host, tensor, box, swizzle, **changes)
    assert isinstance(made, bytes), host.message()
    out = torch.zeros(*box, dtype=tensor.dtype)
    host.allow(tensor, writable=False)
    host.allow(out, writable=True)
    size = out.numel() * out.element_size()
    place = tuple(reversed(at))
    packed = struct.pack("Pqq8x4i16x128s128x", out.data_ptr(), number(fault), size, *place, made)
    name = f"box_{SWIZZLES.index(swizzle if read_as is None else read_as)}"
    host.launch(image(), name, 1, 128, SHARED_BYTES, packed)
    return out


def expected(tensor: Tensor, box: Sequence[int], at: Sequence[int]) -> Tensor:
    """What of the tensor is in the box; zeros besides."""
    found = torch.zeros(*box, dtype=tensor.dtype)
    target, source = found, tensor
    for dim, (start, length) in enumerate(zip(at, box, strict=True)):
        begin, end = max(start, 0), min(start + length, tensor.shape[dim])
        count = max(0, end - begin)
        target = target.narrow(dim, begin - start if count else 0, count)
        source = source.narrow(dim, begin if count else 0, count)
    target.copy_(source)
    return found


def random_tensor(rng: random.Random, dtype: torch.dtype) -> Tensor:
    """(a few, a few, rows, elements), with rows at multiples of 16 bytes."""
    element = dtype.itemsize
    shape = [rng.randint(1, 3), rng.randint(1, 3), rng.randint(1, 40), rng.randint(1, 200)]
    row = -(-shape[3] * element // 16) * 16 // element + rng.choice((0, 16))
    generator = torch.Generator().manual_seed(rng.randint(0, 1 << 30))
    high = 256 if dtype == torch.uint8 else 1 << 15
    whole = torch.randint(0, high, (*shape[:3], row), generator=generator, dtype=dtype)
    if rng.random() < 0.3:  # rows of different heads behind one another
        whole = whole.transpose(1, 2).contiguous().transpose(1, 2)
    return whole[..., : shape[3]]


@pytest.mark.parametrize("swizzle", SWIZZLES)
def test_boxes(host: Host, swizzle: int) -> None:
    """Inside of a tensor, across each of its ends, and outside; of all sizes of elements."""
    rng = random.Random(swizzle)
    for seed in range(24):
        host.reset()
        host.seed(seed)
        dtype = rng.choice(tuple(DTYPES))
        tensor = random_tensor(rng, dtype)
        row = swizzle or rng.choice((16, 48, 128, 256))
        keys = min(row // dtype.itemsize, 256)
        box = (rng.choice((1, 2)), 1, rng.choice((1, 8, 20)), keys)
        at = [rng.randint(-n // 2, n) for n in tensor.shape]
        got = copied(host, tensor, box, at, swizzle)
        assert torch.equal(got, expected(tensor, box, at)), (seed, tensor.shape, box, at)


def some_tensor() -> Tensor:
    return torch.arange(2 * 3 * 20 * 64, dtype=torch.int16).view(2, 3, 20, 64)


BOX, AT, SWIZZLE = (1, 1, 16, 64), (1, 2, 3, 0), 128


def test_another_swizzle_reads_something_else(host: Host) -> None:
    tensor = some_tensor()
    right = expected(tensor, BOX, AT)
    assert torch.equal(copied(host, tensor, BOX, AT, SWIZZLE), right)
    for read_as in (0, 32, 64):
        assert not torch.equal(copied(host, tensor, BOX, AT, SWIZZLE, read_as=read_as), right)


def test_coordinates_in_another_order_copy_something_else(host: Host) -> None:
    tensor = some_tensor()
    got = copied(host, tensor, BOX, AT, SWIZZLE, fault="other_order")
    assert torch.equal(got, expected(tensor, BOX, (1, 3, 2, 0)))
    assert not torch.equal(got, expected(tensor, BOX, AT))


def test_a_map_with_another_stride_copies_something_else_or_is_outside(host: Host) -> None:
    tensor = some_tensor()
    strides = [3 * 20 * 128, 20 * 128, 64]
    got = copied(host, tensor, BOX, AT, SWIZZLE, strides=strides)
    assert not torch.equal(got, expected(tensor, BOX, AT))
    with pytest.raises(RuntimeError, match=r"copy_tensor from global memory of 16 bytes at .* is "):
        copied(host, tensor, BOX, AT, SWIZZLE, strides=[3 * 20 * 128, 20 * 128, 256])


def test_a_map_of_more_elements_is_outside(host: Host) -> None:
    tensor = some_tensor()[:1].clone()
    with pytest.raises(RuntimeError, match=r"copy_tensor from global memory of 16 bytes at .* is "):
        copied(host, tensor, BOX, AT, SWIZZLE, sizes=(2, 3, 20, 64))


FAULTS = {
    "no_wait": r"race between load_shared at offset \d+ .* an asynchronous copy of .*in flight|"
    r"race between load_shared .* has landed: missing barrier|"
    r"race between copy_tensor at offset .* reading by",
    "too_few_bytes": r"copy_tensor of 2048 bytes lands in phase|complete while 2048 bytes|"
    r"deadlock: .* -?\d+ bytes missing",
    "too_many_bytes": r"deadlock: .* for parity 0 of mbarrier 0: 0 of 1 arrivals and 16 bytes",
    "other_barrier": r"deadlock: .* of mbarrier 0: 0 of 1 arrivals and 2048 bytes missing",
    "off_line": r"copy_tensor to offset 64 of shared memory: it must be a multiple of 128",
    "beyond_shared": r"copy_tensor to shared memory of 16 bytes .* outside of the block's",
    "into_barrier": r"copy_tensor at offset 32768 of shared memory, which is an mbarrier",
    "no_map": "copy_tensor by what is no tensor map among the parameters",
    "misaligned_map": "copy_tensor by what is no tensor map among the parameters",
    "map_elsewhere": "copy_tensor by what is no tensor map among the parameters",
    "overwritten": r"race between (store_shared|copy_tensor) at offset",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_in_every_order(host: Host, fault: str) -> None:
    for seed in SEEDS:
        host.seed(seed)
        with pytest.raises(RuntimeError, match=FAULTS[fault]):
            copied(host, some_tensor(), BOX, AT, SWIZZLE, fault=fault)


def test_a_box_that_nobody_waits_for_is_found_where_it_is_in_flight_at_the_end(host: Host) -> None:
    found = 0
    for seed in range(40):
        host.seed(seed)
        try:
            copied(host, some_tensor(), BOX, AT, SWIZZLE, fault="not_awaited")
        except RuntimeError as error:
            found += "it ends while a bulk copy is in flight (tensor_boxes.cu:" in str(error)
    assert found > 0


def test_coordinates_for_another_rank(host: Host) -> None:
    tensor = some_tensor().flatten(0, 1)
    with pytest.raises(RuntimeError, match="at 4 coordinates of a tensor of 3 dims"):
        copied(host, tensor, (1, 16, 64), (0, 0, 0, 0), SWIZZLE)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a map off 64 bytes": ({"off": 32}, "the map is not 64-byte aligned"),
    "a tensor off 16 bytes": ({"address": ctypes.c_void_p(0x1008)}, "not 16-byte aligned"),
    "no such type": ({"data_type": 13}, "no such data type"),
    "six dims": ({"rank": 6}, "the rank is 6"),
    "an odd stride": ({"strides": [7680, 2560, 120]}, "the stride of dim 1 is 120; it must be a"),
    "no stride": ({"strides": [7680, 0, 128]}, "the stride of dim 2 is 0; it must be a multiple"),
    "a far stride": ({"strides": [1 << 40, 2560, 128]}, "the stride of dim 3 is"),
    "no elements": ({"sizes": (2, 0, 20, 64)}, "the size of dim 2 is 0"),
    "a large box": (
        {"box_sizes": (ctypes.c_uint32 * 5)(64, 257, 1, 1, 1)},
        "the box of dim 1 is 257",
    ),
    "a row of 24 bytes": (
        {"box_sizes": (ctypes.c_uint32 * 5)(12, 1, 1, 1, 1), "swizzle_kind": 0},
        "the bytes of a box's row is 24; they must be a multiple of 16",
    ),
    "a row beyond its swizzle": ({"swizzle_kind": 2}, "wider ones are wrong"),
    "strides of elements": (
        {"element_strides": (ctypes.c_uint32 * 5)(2, 1, 1, 1, 1)},
        "the element stride of dim 0 is 2",
    ),
    "an interleaved layout": ({"interleave": 1}, "interleaved layouts are not imitated"),
    "NaN out of bounds": ({"fill": 1}, "what is out of bounds is zero"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_driver_refuses(host: Host, case: str) -> None:
    changes, words = REFUSED[case]
    code = encode(host, some_tensor(), BOX, SWIZZLE, **changes)
    assert code == CUDA_ERROR_INVALID_VALUE
    assert words in host.message()
