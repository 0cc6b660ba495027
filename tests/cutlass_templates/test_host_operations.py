"""The operations of the arch layer on the CPU, each against what it should do."""

from __future__ import annotations

import functools
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.cutlass_templates.host import Host, compile_kernel, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

KERNELS = Path(__file__).parent / "kernels"
GARBAGE = 0xCDCDCDCD - (1 << 32)


@functools.cache
def image(name: str) -> bytes:
    return compile_kernel((KERNELS / f"{name}.cu").read_text(), name)


def run(
    host: Host,
    kernel: str,
    source: torch.Tensor,
    output: torch.Tensor,
    *,
    grid: int = 1,
    threads: int = 128,
    shared_bytes: int = 0,
) -> torch.Tensor:
    """Runs a kernel of operations.cu and returns its output."""
    params = struct.pack("PPq", source.data_ptr(), output.data_ptr(), len(source))
    host.launch(image("operations"), kernel, grid, threads, shared_bytes, params)
    return output


def mapped(host: Host, kernel: str, source: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """An elementwise kernel's output of this dtype, for each row of its input."""
    width = 8 if kernel.startswith("unpack") else 4
    output = torch.zeros(len(source) * width // dtype.itemsize, dtype=dtype)
    return run(host, kernel, source, output, threads=32)


def any_floats(count: int) -> torch.Tensor:
    """Floats with random bits: all magnitudes, infinities and NaN."""
    generator = torch.Generator().manual_seed(count)
    numbers = torch.randint(-(1 << 31), 1 << 31, (count,), generator=generator).int()
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan])
    return torch.cat([numbers.view(torch.float32), special])


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("kernel", ["shuffle_float", "shuffle_int", "shuffle_uint"])
def test_shuffle_xor(host: Host, kernel: str, seed: int) -> None:
    host.seed(seed)
    source = torch.randint(-(1 << 31), 1 << 31, (128,)).int()
    result = run(host, kernel, source, torch.zeros(32, 128, dtype=torch.int32))
    for mask in range(32):
        assert torch.equal(result[mask], source[torch.arange(128) ^ mask])


@pytest.mark.parametrize("seed", range(20))
def test_collectives_take_all_lanes_of_the_same_round(host: Host, seed: int) -> None:
    host.seed(seed)
    expected = torch.zeros(128, dtype=torch.int64)
    state = torch.arange(128)
    for round_ in range(200):
        state = (state * 1664525 + 1013904223) % (1 << 32)
        expected += (state + round_)[torch.arange(128) ^ round_ % 32]
    result = run(host, "many_shuffles", torch.zeros(1), torch.zeros(128, dtype=torch.int32))
    assert torch.equal(result.long() % (1 << 32), expected % (1 << 32))


@pytest.mark.parametrize("seed", range(20))
def test_load_matrix(host: Host, seed: int) -> None:
    host.seed(seed)
    rows = torch.randperm(128, generator=torch.Generator().manual_seed(seed)).int()
    output = torch.zeros(4, 32, 4, dtype=torch.int32)
    result = run(host, "load_matrix", rows, output, shared_bytes=2048)
    # Of a warp's 32 rows, in 4 matrices of 8: row l / 4, word l % 4 of matrix i.
    lanes = torch.arange(32)
    words = torch.arange(512).view(128, 4)[rows.long()].view(4, 4, 8, 4)
    expected = words[:, :, lanes // 4, lanes % 4].transpose(1, 2)
    assert torch.equal(result.long(), expected)


def test_copies_land_at_their_wait_and_never_earlier(host: Host) -> None:
    source = torch.arange(4 * 128 * 4, dtype=torch.int32)
    with host.without_race_detector():
        output = torch.zeros(4, 128, 4, dtype=torch.int32)
        result = run(host, "copies", source, output, shared_bytes=8192)
    for wait, landed in enumerate([0, 1, 3, 4]):
        expected = source.view(4, 128, 4)[:, :, 0].T.clone()
        expected[:, landed:] = GARBAGE
        assert torch.equal(result[wait], expected)


@pytest.mark.parametrize("seed", range(20))
def test_barrier(host: Host, seed: int) -> None:
    host.seed(seed)
    source = torch.randint(1 << 20, (128,)).int()
    output = torch.zeros(128, dtype=torch.int32)
    result = run(host, "barriers", source, output, shared_bytes=512)
    assert torch.equal(result, source[(torch.arange(128) + 37 * 50) % 128] + 50)


def test_the_seed_chooses_the_order_of_threads(host: Host) -> None:
    results = []
    for seed in (0, 0, *range(1, 20)):
        host.seed(seed)
        counts = torch.zeros(129, dtype=torch.int32)
        with host.without_race_detector():
            results.append(tuple(run(host, "order", torch.zeros(1), counts).tolist()))
    assert results[0] == results[1]
    assert len(set(results)) == 20
    for total, *last in results:
        # Threads are interrupted between a load and the store of its sum, so that updates get lost.
        assert total < 20 * 128
        # Neither thread by thread nor warp by warp.
        assert last != sorted(last)
        by_warp = [last[first : first + 32] for first in range(0, 128, 32)]
        assert max(map(min, by_warp)) < min(map(max, by_warp))


def test_the_seed_chooses_the_order_of_blocks(host: Host) -> None:
    orders = set()
    for seed in range(5):
        host.seed(seed)
        output = torch.zeros(16, dtype=torch.int32)
        counter = torch.zeros(1, dtype=torch.int32)
        with host.without_race_detector():
            run(host, "order_of_blocks", counter, output, grid=16, threads=32)
        assert sorted(output.tolist()) == list(range(16))
        orders.add(tuple(output.tolist()))
    assert len(orders) == 5


def test_shared_memory_is_aligned_and_begins_as_garbage(host: Host) -> None:
    output = torch.zeros(32, 2, dtype=torch.int32)
    # The second block does not see what the first one wrote.
    run(host, "fresh_memory", torch.zeros(1), output, grid=2, threads=32, shared_bytes=65536)
    assert torch.equal(output, torch.tensor([GARBAGE, 0], dtype=torch.int32).expand(32, 2))


def test_launches_of_several_host_threads_do_not_mix(host: Host) -> None:
    image("operations")
    source = [torch.randint(1 << 20, (128,)).int() for _ in range(64)]

    def one(index: int) -> torch.Tensor:
        host.make_current()
        output = torch.zeros(128, dtype=torch.int32)
        return run(host, "barriers", source[index], output, shared_bytes=512)

    with ThreadPoolExecutor(4) as pool:
        for index, result in enumerate(pool.map(one, range(64))):
            assert torch.equal(result, source[index][(torch.arange(128) + 37 * 50) % 128] + 50)


def test_a_store_is_remembered_among_many(host: Host) -> None:
    """Outputs lie 40,000 elements after the inputs, so that the last inputs are outputs, too."""
    memory = torch.zeros(100_000)
    run(host, "round_to_int", memory[:40_000], memory[40_000:], threads=32)
    with pytest.raises(RuntimeError, match=r"race between load_global of 4 bytes .* and a store"):
        run(host, "round_to_int", memory[:40_032], memory[40_000:], threads=32)


def test_pack_e4m3(host: Host) -> None:
    near = torch.linspace(-500, 500, 50_001)
    small = torch.linspace(-0.03, 0.03, 50_001)
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    between = (codes[:126] + codes[1:127]) / 2  # ties
    source = torch.cat([any_floats(20_000), near, small, codes, between, -between])
    packed = mapped(host, "pack_e4m3", source, torch.uint8).view(-1, 4)
    # Torch's conversion does not saturate.
    expected = source.clamp(-448, 448).to(torch.float8_e4m3fn)
    number = ~source.isnan()
    assert torch.equal(packed[number, 0], expected.view(torch.uint8)[number])
    assert torch.equal(
        packed[number, 2], (-expected.float()).to(torch.float8_e4m3fn).view(torch.uint8)[number]
    )
    assert (packed[~number, 0] == 0x7F).all()
    assert (packed[:, 1] == 0).all() and (packed[:, 3] == 0x38).all()


@pytest.mark.parametrize(
    ("kernel", "dtype"), [("pack_half", torch.float16), ("pack_bfloat16", torch.bfloat16)]
)
def test_pack_16_bits(host: Host, kernel: str, dtype: torch.dtype) -> None:
    codes = torch.arange(1 << 16).to(torch.int16).view(dtype).float()
    ordered = codes[codes.isfinite()].sort().values.double()
    ties = ((ordered[1:] + ordered[:-1]) / 2).float()
    limits = torch.tensor([65519.99, 65520.0, 65536.0, 3.3961776e38])
    source = torch.cat([any_floats(50_000), codes, ties, limits, -limits])
    packed = mapped(host, kernel, source, dtype).view(-1, 2)
    number = ~source.isnan()
    expected = torch.stack([source, -source], dim=1).to(dtype)
    assert torch.equal(packed[number].view(torch.int16), expected[number].view(torch.int16))
    assert (packed[~number].view(torch.int16) == 0x7FFF).all()


@pytest.mark.parametrize(
    ("kernel", "dtype"), [("unpack_half", torch.float16), ("unpack_bfloat16", torch.bfloat16)]
)
def test_unpack_16_bits(host: Host, kernel: str, dtype: torch.dtype) -> None:
    codes = torch.arange(1 << 16).to(torch.int16).view(dtype)
    values = mapped(host, kernel, codes.view(torch.int32), torch.float32)
    torch.testing.assert_close(values, codes.float(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(values.signbit(), codes.signbit())


def test_to_tf32_rounds_to_nearest_and_ties_away_from_zero(host: Host) -> None:
    source = torch.cat([any_floats(50_000), torch.linspace(1, 2, 1 << 13)])
    result = mapped(host, "to_tf32", source, torch.float32)
    number = source.isfinite() & (source.abs() < torch.finfo(torch.float32).max * 0.999)
    mantissa, exponent = source[number].double().frexp()
    # 10 bits behind the leading one; subnormals keep the unit of the smallest normal numbers.
    unit = torch.ldexp(torch.ones_like(mantissa), exponent.clamp(min=-125) - 11)
    expected = (source[number].double().abs() / unit + 0.5).floor() * unit
    assert torch.equal(result[number].double().abs(), expected)
    assert torch.equal(result.signbit()[number], source.signbit()[number])
    infinite = source.isinf()
    assert torch.equal(result[infinite], source[infinite])
    assert (result.view(torch.int32)[source.isnan()] == 0x7FFFFFFF).all()


def test_round_to_int(host: Host) -> None:
    halves = torch.arange(-2000, 2000) / 2
    far = torch.tensor([2.0**31, -(2.0**31), 1e30, -1e30, torch.inf, -torch.inf, 2147483520.0])
    source = torch.cat([any_floats(20_000), halves, far])
    result = mapped(host, "round_to_int", source, torch.int32)
    limits = (-(1 << 31), (1 << 31) - 1)
    expected = source.double().nan_to_num(0, posinf=1e300, neginf=-1e300).round().clamp(*limits)
    assert torch.equal(result.double(), expected)


def test_divide_is_correctly_rounded(host: Host) -> None:
    """In the range that arch.cuh promises; where the dividend is less, off by a bit at most."""
    a, b = any_floats(100_000), any_floats(100_000).flip(0)
    # The quotient in float64 is precise enough that rounding it again rounds the true one.
    exact = a.double() / b.double()
    smallest, largest = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    valid = (b.abs() >= smallest) & (exact.abs() >= smallest) & (exact.abs() <= largest)
    valid &= b.abs() <= 2.0**126
    assert valid.sum() > 50_000
    pairs = torch.stack([a, b], dim=1)[valid].contiguous()
    result, exact = mapped(host, "divide", pairs, torch.float32), exact[valid].float()
    promised = pairs[:, 0].abs() >= 2.0**-100
    assert promised.sum() > 30_000
    assert torch.equal(result[promised], exact[promised])
    torch.testing.assert_close(result, exact, rtol=2.0**-22, atol=0)


def test_maximum_prefers_numbers_to_nan(host: Host) -> None:
    values = torch.tensor([1.0, -2.0, torch.inf, -torch.inf, torch.nan])
    pairs = torch.cartesian_prod(values, values).contiguous()
    result = mapped(host, "maximum", pairs, torch.float32)
    expected = torch.fmax(pairs[:, 0], pairs[:, 1])
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kernel", ["exp2_each", "log2_each"])
def test_exp2_and_log2(host: Host, kernel: str) -> None:
    function = torch.exp2 if kernel == "exp2_each" else torch.log2
    source = torch.cat([torch.linspace(0.01, 100, 10_000), torch.tensor([0.0, torch.inf])])
    if kernel == "exp2_each":
        source = torch.cat([source, -source])
    result = mapped(host, kernel, source, torch.float32)
    torch.testing.assert_close(result, function(source.double()).float(), rtol=3e-7, atol=1e-7)


INTEGERS = {"MmaS4": 4, "MmaS8": 8}
FLOATS = {
    "MmaE4m3": torch.float8_e4m3fn,
    "MmaE4m3Half": torch.float8_e4m3fn,
    "MmaF16": torch.float16,
    "MmaTf32": torch.float32,
}


def multiply(
    host: Host, atom: str, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor
) -> torch.Tensor:
    """A kernel of atoms.cu: a (16, K), b (8, K) and c (16, 8), codes as int32; c + a b^T."""
    output = c.clone()
    pointers = (a.data_ptr(), b.data_ptr(), output.data_ptr())
    host.launch(image("atoms"), atom, 1, 32, 0, struct.pack("PPP", *pointers))
    return output


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("atom", INTEGERS)
def test_integer_atoms_have_the_layouts_of_cute(host: Host, atom: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    limit = 1 << (INTEGERS[atom] - 1)
    k = 256 // INTEGERS[atom]
    a = torch.randint(-limit, limit, (16, k), generator=generator)
    b = torch.randint(-limit, limit, (8, k), generator=generator)
    c = torch.randint(-(1 << 31), 1 << 31, (16, 8), generator=generator)
    codes = [(x % (2 * limit)).int() for x in (a, b)]
    result = multiply(host, atom, codes[0], codes[1], c.int())
    assert torch.equal(result, (c + a @ b.T).int())  # wraps around


def codes_of(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The bits of the values in a floating-point format, each in an int32."""
    unsigned = {1: torch.uint8, 2: torch.uint16, 4: torch.int32}[dtype.itemsize]
    return values.to(dtype).view(unsigned).int()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("atom", FLOATS)
def test_float_atoms_have_the_layouts_of_cute(host: Host, atom: str, seed: int) -> None:
    """With values whose sums are exact in the accumulator's format, so that nothing is rounded."""
    generator = torch.Generator().manual_seed(seed)
    dtype = FLOATS[atom]
    k = 32 // dtype.itemsize
    accumulator = torch.float16 if atom == "MmaE4m3Half" else torch.float32
    a, b, c = (
        torch.randint(-7, 8, shape, generator=generator) / 4 for shape in [(16, k), (8, k), (16, 8)]
    )
    operands = (codes_of(a, dtype), codes_of(b, dtype), codes_of(c, accumulator))
    result = multiply(host, atom, *operands)
    assert torch.equal(result, codes_of(c + a @ b.T, accumulator))


@pytest.mark.parametrize("atom", FLOATS)
def test_float_atoms_decode_their_operands(host: Host, atom: str) -> None:
    """All codes of E4M3, and of the others a sample with infinities, NaN and subnormals."""
    dtype = FLOATS[atom]
    k = 32 // dtype.itemsize
    if dtype.itemsize == 1:
        codes = torch.arange(256).int()
    elif dtype.itemsize == 2:
        codes = torch.cat([torch.arange(0, 1 << 16, 17), torch.arange(0x7BF0, 0x7C10)]).int()
    else:
        codes = any_floats(4091).view(torch.int32)
    for rows in codes[: len(codes) // 16 * 16].view(-1, 16):
        a = torch.zeros(16, k, dtype=torch.int32)
        a[:, k // 2] = rows
        b = codes_of(torch.ones(8, k), dtype)
        result = multiply(host, atom, a, b, torch.zeros(16, 8, dtype=torch.int32))
        if atom == "MmaE4m3Half":
            products = result.to(torch.uint16).view(torch.float16).float()
        else:
            products = result.view(torch.float32)
        # The low bits of TF32 are ignored; a NaN in nothing but these is infinite.
        exact = rows & ~0x1FFF if atom == "MmaTf32" else rows
        narrow = {1: torch.uint8, 2: torch.uint16, 4: torch.int32}[dtype.itemsize]
        values = exact.to(narrow).view(dtype).float()[:, None].expand(16, 8)
        torch.testing.assert_close(products, values, rtol=0, atol=0, equal_nan=True)


def test_the_half_accumulator_is_rounded_after_each_product(host: Host) -> None:
    a = torch.full((16, 32), 1.0)
    b = torch.full((8, 32), 2.0**-6)  # a product of 0.5, below the unit of 1024 in halves
    c = codes_of(torch.full((16, 8), 1024.0), torch.float16)
    operands = (codes_of(a, torch.float8_e4m3fn), codes_of(b, torch.float8_e4m3fn))
    for _ in range(8):
        c = multiply(host, "MmaE4m3Half", *operands, c)
    assert torch.equal(c, codes_of(torch.full((16, 8), 1024.0), torch.float16))
