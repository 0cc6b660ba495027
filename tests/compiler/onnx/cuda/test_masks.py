"""The kernels that look through a mask, against ``masks.py``, bit by bit."""

from __future__ import annotations

import random
from dataclasses import dataclass
from math import inf, nan

import pytest
import torch
from torch import Tensor

from sage_compiler.kernels.cuda import params
from sage_compiler.kernels.cuda.masks import Mask
from sage_compiler.semantics import MaskClass, Semantics
from tests.compiler.kernels.dense import Call, random_mask
from tests.compiler.onnx.cuda.native import Device, NativeError, Prepared, TestDriver
from tests.cutlass_templates import host as host_module
from tests.cutlass_templates.host import Host

pytestmark = pytest.mark.skipif(
    host_module.missing() is not None, reason=str(host_module.missing())
)


@dataclass(frozen=True)
class Found:
    """What the kernels found, each of all batches and heads that the mask has."""

    tiles: Tensor
    live: Tensor
    keys: Tensor
    counts: Tensor


def look(device: Device, driver: TestDriver, host: Host, call: Call) -> Found:
    """Run the three kernels, and no other."""
    prepared = Prepared(device, call, "int8_fp8")
    host.reset()
    driver.fail("cuLaunchKernel", after=3)
    with pytest.raises(NativeError, match="quantize"):
        prepared.launch(host.allow)
    rows, keys, counts, _ = driver.launches()
    (*_, tiles, live, _, heads, query_length, key_length, query_blocks, key_blocks, _, _) = (
        params.MASK_ROWS.unpack(rows.params)
    )
    batches = rows.blocks // heads // query_blocks
    of_keys = params.MASK_KEYS.unpack(keys.params)
    of_counts = params.MASK_COUNTS.unpack(counts.params)
    kv_heads = of_counts[2]
    shape = (call.query.shape[0], call.key.shape[1])

    def read(address: int, *shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        start = address - prepared.scratch.data_ptr()
        size = torch.Size(shape).numel() * dtype.itemsize
        return prepared.scratch[start : start + size].view(dtype).view(shape)

    return Found(
        read(tiles, batches, heads, query_blocks, key_blocks),
        read(live, batches, heads, query_length),
        read(of_keys[7], batches, kv_heads, key_length),
        read(of_counts[1], *shape, dtype=torch.float32),
    )


def assert_same(device: Device, driver: TestDriver, host: Host, call: Call) -> None:
    assert call.attn_mask is not None
    batch, heads, query_length, _ = call.query.shape
    kv_heads, key_length = call.key.shape[1:3]
    mask = call.attn_mask.contiguous()
    expected = Mask.of(
        mask,
        call.semantics.band(query_length, key_length),
        batch,
        kv_heads,
        heads // kv_heads,
        query_length,
        key_length,
    )
    found = look(device, driver, host, call)
    assert torch.equal(found.tiles, expected.tiles.expand_as(found.tiles))
    assert torch.equal(found.live, expected.live.expand_as(found.live))
    assert torch.equal(found.keys, expected.keys.expand_as(found.keys))
    assert torch.equal(found.counts, expected.counts)


def call_of(mask: Tensor, sizes: tuple[int, int, int, int, int], semantics: Semantics) -> Call:
    """Sizes are B, Hkv, G, Lq, Lk; no kernel looks at Q, K and V."""
    batch, kv_heads, group, query_length, key_length = sizes
    query = torch.zeros(batch, kv_heads * group, query_length, 64, dtype=torch.float16)
    key = torch.zeros(batch, kv_heads, key_length, 64, dtype=torch.float16)
    return Call(query, key, key, semantics, mask)


@pytest.mark.parametrize("block", range(4))
def test_random_masks(block: int, emulated: Device, driver: TestDriver, host: Host) -> None:
    """Bool and float, of any broadcast, under any band; with NaN and rows that see nothing."""
    for seed in range(25 * block, 25 * (block + 1)):
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        batch, kv_heads, group = rng.randint(1, 2), rng.randint(1, 2), rng.choice((1, 1, 3))
        query_length, key_length = rng.randint(1, 200), rng.randint(1, 200)
        mask = random_mask(
            rng, generator, (batch, kv_heads * group, query_length, key_length)
        ).clone()
        if mask.is_floating_point():
            mask = mask.to(rng.choice((torch.float32, torch.float16, torch.bfloat16)))
            mask.view(-1)[rng.randrange(mask.numel())] = rng.choice((nan, inf, 0.0))
        if rng.random() < 0.3:
            mask[..., rng.randrange(mask.shape[-1]) :] = False if mask.dtype == torch.bool else -inf
        semantics = Semantics(mask_class=rng.choice((MaskClass.NONE, *list(MaskClass)[:3])))
        sizes = (batch, kv_heads, group, query_length, key_length)
        assert_same(emulated, driver, host, call_of(mask, sizes, semantics))


@pytest.mark.parametrize("low", [-inf, -1e4, -5000.0, -4999.0, torch.finfo(torch.float32).min])
def test_padding_and_what_does_not_count(
    low: float, emulated: Device, driver: TestDriver, host: Host
) -> None:
    """Keys, rows and heads that are hidden, whole or but for a bias that says so."""
    for rows in (slice(None), slice(0, 100), slice(30, 31)):
        mask = torch.zeros(2, 4, 150, 130)
        mask[:, 1:3, rows, 64:] = low
        mask[1, :, rows] = low
        call = call_of(mask, (2, 2, 2, 150, 130), Semantics(mask_class=MaskClass.CAUSAL))
        assert_same(emulated, driver, host, call)


def test_tiles_that_are_hidden_shown_and_mixed(
    emulated: Device, driver: TestDriver, host: Host
) -> None:
    mask = torch.ones(1, 1, 300, 700, dtype=torch.bool)
    mask[..., :128, 64:128] = False
    mask[..., 299, 650] = False
    call = call_of(mask, (2, 1, 1, 300, 700), Semantics())
    tiles = look(emulated, driver, host, call).tiles
    expected = torch.ones(1, 1, 3, 11, dtype=torch.uint8)
    expected[0, 0, 0, 1], expected[0, 0, 2, 10] = 0, 2
    assert torch.equal(tiles, expected)
    assert_same(emulated, driver, host, call)
