"""``sage_compiler.PackedKV``: a key/value cache that stays quantized between calls."""

from __future__ import annotations

from typing import Final, Literal, overload

import torch
from torch import Tensor

from sage_compiler.errors import InvalidAttentionError, InvalidOptionError
from sage_compiler.functional import parse_band
from sage_compiler.kernels.cpu.kernel import RECIPES, need, pack_problem, refuse_head_dims
from sage_compiler.kernels.layout import empty_output
from sage_compiler.semantics import DTYPES, Semantics, parse_semantics
from sage_compiler.validate import check_mask, check_sinks

BLOCK: Final = 256
"""Tokens that are packed together: they share the mean of K, and the scale and midpoint of V."""

_ANY: Final = Semantics()


class PackedKV:
    """Keys and values of one attention layer, quantized once and attended many times.

    For decoding on the CPU: quantizing all keys anew for one query costs more than it gains, so
    an attention of a few queries gains only with keys that stay packed. Inference only.

        cache = sage.PackedKV(batch=1, kv_heads=8, head_dim=128, capacity=4096)
        cache.append(key, value)                      # the prompt: (1, 8, 500, 128)
        output = cache.attend(query, is_causal=True)  # (1, 32, 500, 128)
        for each further token:
            cache.append(key, value)                  # (1, 8, 1, 128)
            output = cache.attend(query)              # (1, 32, 1, 128)

    Whole blocks of 256 tokens are packed for good. The tokens of the last, partial block are kept
    in their own dtype too, and the block is packed again with every append: the result does not
    depend, to the bit, on how tokens were divided among appends. See docs/numerics.md for what the
    tokens of a block share; here it includes tokens that a mask later hides, so what is not finite
    shows in all of its block.

    One cache may be attended by several threads at once, but append and reset need it alone.

    Args:
        batch: sequences, all of one length.
        kv_heads: key/value heads.
        head_dim: of keys and queries; a multiple of 8 from 16 to 256.
        value_head_dim: of values and outputs; the same range; None: head_dim.
        capacity: the most tokens it can hold; their memory is reserved at once.
        dtype: of keys, values, queries and outputs: float32, bfloat16 or float16.
        precision: "int8_int8", or "int8_int16" for P in 16 bits.

    Raises:
        InvalidAttentionError: a size, head_dim or dtype that it cannot have.
        InvalidOptionError: a precision that it cannot have, or SAGE_CPU_ISA naming no instruction
            set that is here.
        KernelUnavailableError: the native CPU kernel is not there.
    """

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        head_dim: int,
        *,
        value_head_dim: int | None = None,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        precision: str = "int8_int8",
    ) -> None:
        for name, size in (("batch", batch), ("kv_heads", kv_heads), ("capacity", capacity)):
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise InvalidAttentionError(f"{name}={size!r}; it must be an integer of at least 1")
        if dtype not in DTYPES:
            known = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
            raise InvalidAttentionError(f"dtype={dtype}; supported: {known}")
        if precision not in RECIPES:
            known = ", ".join(RECIPES)
            raise InvalidOptionError(f"precision={precision!r}; a packed cache can be {known}")
        if value_head_dim is None:
            value_head_dim = head_dim
        refusal = refuse_head_dims(head_dim, value_head_dim)
        if refusal is not None:
            raise InvalidAttentionError(f"{refusal}; a packed cache needs such a one")

        self.batch, self.kv_heads, self.capacity = batch, kv_heads, capacity
        self.head_dim, self.value_head_dim = head_dim, value_head_dim
        self.dtype, self.precision = dtype, precision
        self._length = 0
        self._library = need()
        self._isa = self._library.isa
        # Uninitialized: what is not yet packed is not read.
        packed_bytes = self._library.packed_size(self._problem(0))
        # Not inference tensors, which could only be written to in inference mode.
        with torch.inference_mode(False):
            self._packed = torch.empty(packed_bytes, dtype=torch.uint8, device="cpu")
            # The tokens of the partial block, in their places in the block.
            staged = (batch, kv_heads, min(BLOCK, capacity))
            self._staged_key = torch.empty(*staged, head_dim, dtype=dtype, device="cpu")
            self._staged_value = torch.empty(*staged, value_head_dim, dtype=dtype, device="cpu")

    @property
    def length(self) -> int:
        """The number of tokens in the cache."""
        return self._length

    @property
    def nbytes(self) -> int:
        """The bytes that the cache occupies, whatever its length."""
        return self._packed.nbytes + self._staged_key.nbytes + self._staged_value.nbytes

    def __repr__(self) -> str:
        return (
            f"PackedKV({self._length} of {self.capacity} tokens, batch {self.batch}, "
            f"{self.kv_heads} heads, head_dim {self.head_dim}, value_head_dim "
            f"{self.value_head_dim}, {self.dtype}, {self.precision})"
        )

    def reset(self) -> None:
        """Forget all tokens; the memory stays."""
        self._length = 0

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's has no types
    def append(self, key: Tensor, value: Tensor) -> None:
        """Add n tokens at the end.

        Args:
            key: (batch, kv_heads, n, head_dim) in the cache's dtype, on the CPU; any strides.
            value: (batch, kv_heads, n, value_head_dim), likewise.

        Raises:
            InvalidAttentionError: tensors that do not fit, or more tokens than there is room for;
                the cache is as it was.
        """
        self._check_tokens("key", key, self.head_dim)
        self._check_tokens("value", value, self.value_head_dim)
        added = key.shape[2]
        if value.shape[2] != added:
            raise InvalidAttentionError(
                f"key has {added} tokens and value {value.shape[2]}; they must be equal"
            )
        left = self.capacity - self._length
        if added > left:
            raise InvalidAttentionError(
                f"{added} tokens; the cache has {self._length} of {self.capacity}, so {left} more "
                "fit: make it larger, or reset it"
            )
        key, value = key.detach().resolve_neg(), value.detach().resolve_neg()
        length, end = self._length, self._length + added
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
        self._length = end

    @overload
    def attend(
        self,
        query: Tensor,
        *,
        is_causal: bool = ...,
        scale: float | None = ...,
        softcap: float | None = ...,
        window: tuple[int | None, int | None] | None = ...,
        sinks: Tensor | None = ...,
        attn_mask: Tensor | None = ...,
        return_lse: Literal[False] = ...,
    ) -> Tensor: ...

    @overload
    def attend(
        self,
        query: Tensor,
        *,
        is_causal: bool = ...,
        scale: float | None = ...,
        softcap: float | None = ...,
        window: tuple[int | None, int | None] | None = ...,
        sinks: Tensor | None = ...,
        attn_mask: Tensor | None = ...,
        return_lse: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's has no types
    def attend(
        self,
        query: Tensor,
        *,
        is_causal: bool = False,
        scale: float | None = None,
        softcap: float | None = None,
        window: tuple[int | None, int | None] | None = None,
        sinks: Tensor | None = None,
        attn_mask: Tensor | None = None,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention of these queries on all tokens in the cache.

        The last query stands at the last token: the diagonal of ``is_causal`` and ``window`` is
        aligned to the end, so that appending n tokens and attending with their n queries is
        causal attention. A row that sees no key, as all do while the cache is empty, yields 0.

        Args:
            query: (batch, H, Lq, head_dim) in the cache's dtype, on the CPU, H a multiple of
                kv_heads; any strides.
            is_causal: hide keys after the diagonal.
            scale: factor of the scores; None: 1 / sqrt(head_dim).
            softcap: scores become softcap * tanh(score / softcap) before masks.
            window: (left, right) keys visible around the diagonal; None for an unbounded side.
            sinks: (H,) logits that take part in the denominator only.
            attn_mask: broadcastable to (batch, H, Lq, length): bool (True = visible), or added to
                the scores.
            return_lse: also return the log-sum-exp of the scores, float32 (batch, H, Lq).

        Returns:
            (batch, H, Lq, value_head_dim), stored as (batch, Lq, H, value_head_dim) when query is.

        Raises:
            InvalidAttentionError: arguments that do not fit.
        """
        self._check_query(query)
        if attn_mask is not None:
            check_mask(attn_mask, query, self._length)
            _check_no_gradient("attn_mask", attn_mask)
        if sinks is not None:
            check_sinks(sinks, query)
            _check_no_gradient("sinks", sinks)
        mask_class, left, right = parse_band(is_causal, "bottom_right", window)
        semantics = parse_semantics(mask_class, scale, "zero", softcap, left, right)
        query = query.detach().resolve_neg()
        if attn_mask is not None:
            attn_mask = attn_mask.resolve_neg()
        if sinks is not None:
            sinks = sinks.resolve_neg().to(torch.float32).contiguous()
        output = empty_output(query, self._staged_value)
        lse = None
        if return_lse:
            lse = torch.empty(query.shape[:3], dtype=torch.float32, device="cpu")
        problem = self._problem(
            self._length,
            semantics,
            query=query,
            output=output,
            attn_mask=attn_mask,
            sinks=sinks,
            lse=lse,
        )
        self._library.attend(problem, self._packed.data_ptr(), self._packed.nbytes)
        return output if lse is None else (output, lse)

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
        heads, query_length = self.kv_heads, 0
        if query is not None:
            heads, query_length = query.shape[1], query.shape[2]
        sizes = (self.batch, heads, self.kv_heads, query_length, key_length, self.head_dim)
        return pack_problem(
            self._isa,
            self.precision,
            self.dtype,
            (*sizes, self.value_head_dim, self.capacity),
            semantics,
            query=query,
            key=key,
            value=value,
            output=output,
            attn_mask=attn_mask,
            sinks=sinks,
            lse=lse,
        )

    def _check_tokens(self, name: str, tensor: Tensor, head_dim: int) -> None:
        self._check_tensor(name, tensor)
        batch, kv_heads, size = tensor.shape[0], tensor.shape[1], tensor.shape[3]
        if (batch, kv_heads, size) != (self.batch, self.kv_heads, head_dim):
            raise InvalidAttentionError(
                f"{name} has shape {tuple(tensor.shape)}; the cache needs ({self.batch}, "
                f"{self.kv_heads}, tokens, {head_dim})"
            )

    def _check_query(self, query: Tensor) -> None:
        self._check_tensor("query", query)
        batch, heads, _, head_dim = query.shape
        if (batch, head_dim) != (self.batch, self.head_dim) or heads % self.kv_heads or not heads:
            raise InvalidAttentionError(
                f"query has shape {tuple(query.shape)}; the cache needs ({self.batch}, a multiple "
                f"of {self.kv_heads} heads, queries, {self.head_dim})"
            )

    def _check_tensor(self, name: str, tensor: Tensor) -> None:
        if not isinstance(tensor, Tensor):
            raise InvalidAttentionError(f"{name} is a {type(tensor).__name__}; it must be a tensor")
        if tensor.dim() != 4 or tensor.layout != torch.strided:
            raise InvalidAttentionError(
                f"{name} is {tensor.layout} of shape {tuple(tensor.shape)}; it must be strided and "
                "4-D: (batch, heads, length, head_dim)"
            )
        if tensor.dtype != self.dtype or tensor.device.type != "cpu":
            raise InvalidAttentionError(
                f"{name} is {tensor.dtype} on {tensor.device}; the cache is {self.dtype} on the CPU"
            )
        _check_no_gradient(name, tensor)


def _check_no_gradient(name: str, tensor: Tensor) -> None:
    if tensor.requires_grad and torch.is_grad_enabled():
        raise InvalidAttentionError(
            f"{name} requires a gradient; a packed cache is for inference only: call it under "
            "torch.no_grad()"
        )
