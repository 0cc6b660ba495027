"""One step of decoding with a cache that stays quantized, as it is timed.

The step is what ``PackedKV`` does for a token: append its key and value, attend to all keys with
its query. The cache is as long as makes the step one that can be repeated: the last token is packed
into a tile that has others already, and packed again it is the same tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from benchmarks.gpu.device import Device, target
from benchmarks.gpu.matrix import Subject
from sage_compiler.kernels.cuda.kernel import Target
from sage_compiler.kernels.cuda.packed import CudaStore
from sage_compiler.kernels.layout import empty_output
from sage_compiler.kernels.packed import PackedShape
from sage_compiler.precision import TILE_MMA
from tests.compiler.kernels.dense import Call


def length_of(keys: int) -> int:
    """The length of a cache of about so many keys, after a step that can be repeated."""
    return keys - 1 if keys % TILE_MMA.kv_block == 0 else keys


class Decoding:
    """A cache that holds all keys of a call but the last one.

    Attributes:
        output: of the last step, (B, H, Lq, Dv).
    """

    def __init__(self, device: Device, subject: Subject, call: Call) -> None:
        self._call = call
        batch, kv_heads, length, head_dim = call.key.shape
        shape = PackedShape(batch, kv_heads, head_dim, call.value.shape[3], length, call.key.dtype)

        @contextmanager
        def on(place: torch.device) -> Iterator[Target]:
            yield target(device)

        self._store = CudaStore(shape, device.place, subject.recipe, on)
        self._before = length - 1
        self._store.append(0, call.key[:, :, :-1], call.value[:, :, :-1])
        self.output = empty_output(call.query, call.value)
        self.total()

    def attend(self) -> None:
        """Attention alone, to all keys: Q is quantized in it."""
        self._store.attend(
            self._before + 1,
            self._call.query,
            self._call.semantics,
            self.output,
            attn_mask=None,
            sinks=None,
            lse=None,
        )

    def total(self) -> Tensor:
        """The whole step."""
        last = slice(self._before, None)
        self._store.append(self._before, self._call.key[:, :, last], self._call.value[:, :, last])
        self.attend()
        return self.output
