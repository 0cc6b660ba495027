"""A cache in the memory of a GPU: packed tiles that ``append`` adds to and ``attend`` walks.

An append is one launch, or two until there are MEAN_TOKENS tokens: their mean of K, by which K is
smoothed from then on, and the tiles that change. An attention is the launches that are left: Q
quantized, the fused attention, and one more where that splits the keys. docs/cuda-kernels.md, "A
cache", has the reasons.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Final

import torch
from torch import Tensor

from sage_compiler.errors import InvalidAttentionError, InvalidOptionError
from sage_compiler.kernels.cuda import dispatch, params
from sage_compiler.kernels.cuda.arch import named
from sage_compiler.kernels.cuda.attending import Attending, Operands
from sage_compiler.kernels.cuda.cut import choose
from sage_compiler.kernels.cuda.kernel import LOG2_E, Target, has_softcap, on_device, strided
from sage_compiler.kernels.cuda.masks import NO_FLAGS, Mask, flags
from sage_compiler.kernels.cuda.sizes import FAR, Reach, Sizes
from sage_compiler.kernels.cuda.spec import DeltaSpec, KernelSpec
from sage_compiler.kernels.cuda.variants import CacheVariant, cache_variant
from sage_compiler.kernels.packed import PackedShape
from sage_compiler.precision import TILE_MMA
from sage_compiler.semantics import UNBOUNDED, Semantics

MEAN_TOKENS: Final = 256
"""The first tokens, whose mean K is smoothed by: kMeanTokens of params.cuh."""

_ONE_KEY: Final = (0, 1, 1)  # of sums that are a mean: first_key, end_key, chunks


class CudaStore:
    """A ``PackedStore``. Tiles of 64 tokens are packed for good once there are MEAN_TOKENS tokens;
    the tokens of the tiles that are not are kept in their own dtype too, and their tiles are packed
    again with every append.

    Args:
        device: the GPU, with its index.
        precision: a recipe of its architecture; None: the one it prefers.
        on: what launches on a device.

    Raises:
        InvalidOptionError: another precision.
        InvalidAttentionError: a head_dim that the kernels do not take, or too large a capacity.
        KernelUnavailableError: there are no kernels for the device, or no driver.
    """

    def __init__(
        self,
        shape: PackedShape,
        device: torch.device,
        precision: str | None,
        on: Callable[[torch.device], AbstractContextManager[Target]] = on_device,
    ) -> None:
        self.shape, self._device, self._on = shape, device, on
        with on(device) as target:
            arch = target.arch
        recipes = named(arch).recipes
        self.precision = recipes[0] if precision is None else precision
        if self.precision not in recipes:
            known = ", ".join(recipes)
            raise InvalidOptionError(
                f"precision={precision!r}; a packed cache can be {known} on {arch}"
            )
        if shape.capacity >= FAR:
            raise InvalidAttentionError(
                f"capacity={shape.capacity}; the CUDA kernels take fewer than {FAR} keys"
            )
        self._dtype = str(shape.dtype).removeprefix("torch.")
        refusal = dispatch.decide(
            arch, self.precision, self._dtype, shape.head_dim, shape.value_head_dim
        )
        if isinstance(refusal, str):
            raise InvalidAttentionError(f"{refusal}; a packed cache needs such a one")
        # What is on top of an attention changes neither how tokens are packed nor the tiles.
        self._kernels = cache_variant(
            arch,
            self._dtype,
            shape.head_dim,
            self.precision,
            value_head_dim=shape.value_head_dim,
        )
        self.tile = self._kernels.attend.tile
        key_dim, value_dim = self._kernels.append.head_dim, self._kernels.append.value_head_dim
        self.head_tiles = -(-shape.capacity // TILE_MMA.kv_block)
        # One place more than there are tiles before the mean is known: see _place_after.
        self._places = min(self.head_tiles, MEAN_TOKENS // TILE_MMA.kv_block + 1)
        self._place = 0  # of the last tile, once there are MEAN_TOKENS tokens
        heads = shape.batch * shape.kv_heads
        staged = (heads, self._places * TILE_MMA.kv_block)
        # Uninitialized: what is not yet packed or staged is not read. Not inference tensors, which
        # could only be written to in inference mode.
        with torch.inference_mode(False):
            size = heads * self.head_tiles * self.tile.bytes
            self.tiles = torch.empty(size, dtype=torch.uint8, device=device)
            self.mean = torch.empty(heads, key_dim, dtype=torch.float32, device=device)
            self._staged_key, self._staged_value = (
                torch.empty(*staged, dim, dtype=shape.dtype, device=device)
                for dim in (key_dim, value_dim)
            )

    @property
    def nbytes(self) -> int:
        """Bytes of memory, whatever the number of tokens."""
        return sum(tensor.nbytes for tensor in self.memory)

    @property
    def memory(self) -> tuple[Tensor, ...]:
        """All of it, on the device."""
        return self.tiles, self.mean, self._staged_key, self._staged_value

    def append(self, length: int, key: Tensor, value: Tensor) -> None:
        """As ``PackedStore.append``."""
        end = length + key.shape[2]
        if end == length:
            return
        shape, width = self.shape, TILE_MMA.kv_block
        heads = shape.batch * shape.kv_heads
        is_mean_known = length >= MEAN_TOKENS
        first = length // width if is_mean_known else 0
        changed = -(-end // width) - first
        place = self._place_after(length, end)
        staged_key, staged_value = (
            (tensor.data_ptr(), self._place, place, self._places)
            for tensor in (self._staged_key, self._staged_value)
        )
        launches: list[tuple[KernelSpec, int, bytes]] = []
        if not is_mean_known:
            packed = params.KEY_MEAN.pack(
                *strided(key),
                *staged_key,
                self.mean.data_ptr(),
                shape.kv_heads,
                length,
                end,
            )
            launches.append((self._kernels.key_mean, heads, packed))
        packed = params.APPEND.pack(
            *strided(key),
            *strided(value),
            *staged_key,
            *staged_value,
            self.mean.data_ptr(),
            self.tiles.data_ptr(),
            shape.kv_heads,
            self.head_tiles,
            length,
            end,
            first,
            changed,
            heads * changed,
        )
        launches.append((self._kernels.append, 2 * heads * changed, packed))
        with self._on(self._device) as target:
            for spec, _, _ in launches:  # what cannot be loaded leaves the cache as it was
                target.loader.loaded(spec, target.device, target.stream)
            for launch in launches:
                target.launch(*launch, dependent=launch is not launches[0])
        self._place = place

    def _place_after(self, length: int, end: int) -> int:
        """Where the last of ``end`` tokens will be staged: not where those before are read, unless
        they are in one tile."""
        if length // TILE_MMA.kv_block == end // TILE_MMA.kv_block:
            return self._place
        return self._places - 1 if length < MEAN_TOKENS or self._place == 0 else 0

    def attend(
        self,
        length: int,
        query: Tensor,
        semantics: Semantics,
        output: Tensor,
        *,
        attn_mask: Tensor | None,
        sinks: Tensor | None,
        lse: Tensor | None,
    ) -> None:
        """As ``PackedStore.attend``."""
        if query.shape[2] == 0 or length == 0:
            output.zero_()
            if lse is not None:
                lse.fill_(-torch.inf)
                if sinks is not None:
                    lse.copy_(sinks[:, None])
            return
        with self._on(self._device) as target:
            _Call(self, target, length, query, semantics, output, attn_mask, sinks, lse).run()

    def plan(
        self,
        target: Target,
        sizes: Sizes,
        reach: Reach,
        *,
        window: bool,
        masked: bool,
        softcap: bool,
    ) -> tuple[CacheVariant, int]:
        """The kernels of one attention, and into how many parts they split the keys."""
        shape = self.shape
        cut = choose(
            target.arch,
            self.precision,
            self._dtype,
            shape.head_dim,
            shape.value_head_dim,
            sizes,
            reach.key_tiles,
            target.processors,
            masked=masked,
        )
        kernels = cache_variant(
            target.arch,
            self._dtype,
            shape.head_dim,
            self.precision,
            value_head_dim=shape.value_head_dim,
            window=window,
            masked=masked,
            softcap=softcap,
            tile=cut.tile,
        )
        return kernels, cut.splits


class _Call:
    """One attention to a cache: its sizes, its scratch memory, its launches."""

    def __init__(
        self,
        store: CudaStore,
        target: Target,
        length: int,
        query: Tensor,
        semantics: Semantics,
        output: Tensor,
        attn_mask: Tensor | None,
        sinks: Tensor | None,
        lse: Tensor | None,
    ) -> None:
        """Decide what is launched, and take the scratch memory; no length is zero."""
        self.store, self.target, self.query = store, target, query
        batch, heads, query_length, head_dim = query.shape
        kv_heads = store.shape.kv_heads
        self.sizes = Sizes.of(batch, heads, kv_heads, query_length, length)
        self.scale = semantics.scale_for(head_dim)
        self.reach = Reach.of(semantics, query_length, length)
        self.kernels, splits = store.plan(
            target,
            self.sizes,
            self.reach,
            window=semantics.window_left != UNBOUNDED,
            masked=attn_mask is not None,
            softcap=has_softcap(semantics),
        )
        self.mask = None
        if attn_mask is not None:
            band = semantics.band(query_length, length)
            group = self.sizes.group
            self.mask = Mask.of(attn_mask, band, batch, kv_heads, group, query_length, length)

        attend = self.kernels.attend
        row_term = lse is not None or sinks is not None or attend.softcap
        parts = self.sizes.query_scratch(attend, row_term=row_term, splits=splits)
        addresses, self._scratch = target.allocate(parts, query.device)
        present = [address if size else 0 for address, size in zip(addresses, parts, strict=True)]
        codes, scales, self.means, self.row_term, delta, part_outputs, part_sums, taken = present
        self.operands = Operands(
            codes,
            scales,
            store.tiles.data_ptr(),
            0,
            delta,
            self.row_term,
            part_outputs,
            part_sums,
            taken,
            store.head_tiles,
        )
        self.attending = Attending(
            target,
            self.kernels,
            self.sizes,
            self.reach,
            semantics,
            self.operands,
            target.processors,
            output,
            lse,
            sinks,
            self.mask,
            splits,
        )

    def run(self) -> None:
        """Start the kernels."""
        self._query()
        if self.kernels.delta is not None:
            self._delta(self.kernels.delta)
        for step in self.attending.steps():
            step()

    def _query(self) -> None:
        sizes, reach = self.sizes, self.reach
        packed = params.QUERY.pack(
            *strided(self.query),
            self.store.mean.data_ptr(),
            self.operands.query_codes,
            self.operands.query_scales,
            self.means,
            self.row_term,
            0,
            self.operands.taken,
            *(NO_FLAGS if self.mask is None else flags(self.mask.live)),
            sizes.heads,
            sizes.group,
            sizes.query_length,
            sizes.query_blocks,
            reach.first_live,
            reach.end_live,
            *_ONE_KEY,
            abs(self.scale) * (1.0 if self.kernels.attend.softcap else LOG2_E),
            self.scale,
        )
        blocks = sizes.batch * sizes.heads * sizes.query_blocks
        self.target.launch(self.kernels.query, blocks, packed)

    def _delta(self, spec: DeltaSpec) -> None:
        sizes, store = self.sizes, self.store
        packed = params.DELTA.pack(
            self.means,
            self.operands.tiles,
            self.operands.tiles + store.tile.scales_offset,
            self.operands.delta,
            store.tile.bytes,
            store.head_tiles,
            sizes.key_blocks,
            sizes.group * sizes.query_blocks,
        )
        self.target.launch(spec, sizes.batch * sizes.kv_heads * sizes.key_blocks, packed)
