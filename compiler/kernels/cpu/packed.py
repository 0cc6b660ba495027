"""A cache in the memory of the CPU, which the native library packs and attends."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from sage_compiler.errors import InvalidAttentionError, InvalidOptionError
from sage_compiler.kernels.cpu.kernel import RECIPES, need, pack_problem, refuse_head_dims
from sage_compiler.kernels.packed import PackedShape
from sage_compiler.semantics import Semantics

BLOCK: Final = 256
"""Tokens that are packed together: they share the mean of K, and the scale and midpoint of V."""

_ANY: Final = Semantics()
_DEFAULT_RECIPE: Final = "int8_int8"


class CpuStore:
    """A ``PackedStore``. Whole blocks are packed for good; the tokens of the partial block are kept
    in their own dtype too, and the block is packed again with every append.

    Args:
        precision: a key of ``RECIPES``; None: "int8_int8".

    Raises:
        InvalidOptionError: another precision, or SAGE_CPU_ISA naming no instruction set that is
            here.
        InvalidAttentionError: a head_dim that the library does not take, or too large a size.
        KernelUnavailableError: there is no library.
    """

    def __init__(self, shape: PackedShape, precision: str | None) -> None:
        if precision is None:
            precision = _DEFAULT_RECIPE
        if precision not in RECIPES:
            known = ", ".join(RECIPES)
            raise InvalidOptionError(
                f"precision={precision!r}; a packed cache can be {known} on a CPU"
            )
        refusal = refuse_head_dims(shape.head_dim, shape.value_head_dim)
        if refusal is not None:
            raise InvalidAttentionError(f"{refusal}; a packed cache needs such a one")
        self._shape, self.precision = shape, precision
        self._library = need()
        self._isa = self._library.isa
        # Uninitialized: what is not yet packed is not read.
        packed_bytes = self._library.packed_size(self._problem(0))
        # Not inference tensors, which could only be written to in inference mode.
        with torch.inference_mode(False):
            self._packed = torch.empty(packed_bytes, dtype=torch.uint8, device="cpu")
            # The tokens of the partial block, in their places in the block.
            staged = (shape.batch, shape.kv_heads, min(BLOCK, shape.capacity))
            self._staged_key, self._staged_value = (
                torch.empty(*staged, size, dtype=shape.dtype, device="cpu")
                for size in (shape.head_dim, shape.value_head_dim)
            )

    @property
    def nbytes(self) -> int:
        """Bytes of memory, whatever the number of tokens."""
        return self._packed.nbytes + self._staged_key.nbytes + self._staged_value.nbytes

    def append(self, length: int, key: Tensor, value: Tensor) -> None:
        """As ``PackedStore.append``."""
        added = key.shape[2]
        end = length + added
        # First the tokens that fill the partial block, if there is one, then whole blocks and rest.
        staged = length % BLOCK
        filling = min(added, BLOCK - staged) if staged else 0
        if filling:
            self._stage(key[:, :, :filling], value[:, :, :filling], staged)
            self._pack(length - staged, length + filling, self._staged_key, self._staged_value)
        if filling < added:
            key, value = key[:, :, filling:], value[:, :, filling:]
            self._pack(length + filling, end, key, value)
            rest = end % BLOCK
            if rest:
                self._stage(key[:, :, -rest:], value[:, :, -rest:], 0)

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
        problem = self._problem(
            length,
            semantics,
            query=query,
            output=output,
            attn_mask=attn_mask,
            sinks=sinks,
            lse=lse,
        )
        self._library.attend(problem, self._packed.data_ptr(), self._packed.nbytes)

    def _stage(self, key: Tensor, value: Tensor, start: int) -> None:
        """Copy tokens to their places ``start``... in the partial block."""
        stop = start + key.shape[2]
        self._staged_key[:, :, start:stop] = key
        self._staged_value[:, :, start:stop] = value

    def _pack(self, first: int, end: int, key: Tensor, value: Tensor) -> None:
        """Pack tokens first..end-1, which key and value begin with."""
        problem = self._problem(end, key=key, value=value)
        self._library.pack_kv(problem, first, self._packed.data_ptr(), self._packed.nbytes)

    def _problem(
        self,
        key_length: int,
        semantics: Semantics = _ANY,
        *,
        query: Tensor | None = None,
        key: Tensor | None = None,
        value: Tensor | None = None,
        output: Tensor | None = None,
        attn_mask: Tensor | None = None,
        sinks: Tensor | None = None,
        lse: Tensor | None = None,
    ) -> bytes:
        shape = self._shape
        heads, query_length = shape.kv_heads, 0
        if query is not None:
            heads, query_length = query.shape[1], query.shape[2]
        sizes = (shape.batch, heads, shape.kv_heads, query_length, key_length, shape.head_dim)
        return pack_problem(
            self._isa,
            self.precision,
            shape.dtype,
            (*sizes, shape.value_head_dim, shape.capacity),
            semantics,
            query=query,
            key=key,
            value=value,
            output=output,
            attn_mask=attn_mask,
            sinks=sinks,
            lse=lse,
        )
