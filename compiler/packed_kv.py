"""``sage_compiler.PackedKV``: a key/value cache that stays quantized between calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal, overload

import torch
from torch import Tensor

from sage_compiler.errors import InvalidAttentionError, KernelUnavailableError
from sage_compiler.functional import parse_band
from sage_compiler.kernels.cpu.packed import CpuStore
from sage_compiler.kernels.cuda.packed import CudaStore
from sage_compiler.kernels.layout import empty_output
from sage_compiler.kernels.packed import PackedShape, PackedStore
from sage_compiler.semantics import DTYPES, parse_semantics
from sage_compiler.validate import check_mask, check_sinks

_OPEN: Final[dict[str, Callable[[PackedShape, torch.device, str | None], PackedStore]]] = {
    "cpu": lambda shape, device, precision: CpuStore(shape, precision),
    "cuda": CudaStore,
}
"""What has the tokens of a cache, by the type of its device."""


class PackedKV:
    """Keys and values of one attention layer, quantized once and attended many times.

    For decoding: quantizing all keys anew for one query costs more than it gains, so an attention
    of a few queries gains only with keys that stay packed. Inference only.

        cache = sage.PackedKV(batch=1, kv_heads=8, head_dim=128, capacity=4096)
        cache.append(key, value)                      # the prompt: (1, 8, 500, 128)
        output = cache.attend(query, is_causal=True)  # (1, 32, 500, 128)
        for each further token:
            cache.append(key, value)                  # (1, 8, 1, 128)
            output = cache.attend(query)              # (1, 32, 1, 128)

    Whole blocks of tokens, 256 on a CPU and 64 on a GPU, are packed for good. The tokens of the
    last, partial block are kept in their own dtype too, and the block is packed again with every
    append: the result does not depend, to the bit, on how tokens were divided among appends. On a
    GPU all of the first 256 tokens are packed again until they are there, since all later ones
    share their mean of K. See docs/numerics.md for what the tokens of a block share; here it
    includes tokens that a mask later hides, so what is not finite shows in all of its block, and
    on a GPU, in K of the first 256 tokens, in all.

    One cache may be attended by several threads at once, but append and reset need it alone. On a
    GPU all is launched on the current stream, and nothing waits for it; who uses several streams
    orders them. A CUDA graph that captured ``attend`` attends, whenever it is replayed, to as many
    tokens as there were at the capture, and one that captured ``append`` writes to where it wrote
    then: lengths are the host's.

    Args:
        batch: sequences, all of one length.
        kv_heads: key/value heads.
        head_dim: of keys and queries; on a CPU a multiple of 8 from 16 to 256, on a GPU 1 to 256.
        value_head_dim: of values and outputs; the same range; None: head_dim.
        capacity: the most tokens it can hold; their memory is reserved at once.
        dtype: of keys, values, queries and outputs: float32, bfloat16 or float16.
        precision: on a CPU "int8_int8", or "int8_int16" for P in 16 bits; on a GPU a recipe of its
            architecture, see docs/cuda-kernels.md. None: the first of them.
        device: where the cache is, and all tensors have to be: "cpu", or a GPU.

    Raises:
        InvalidAttentionError: a size, head_dim, dtype or device that it cannot have.
        InvalidOptionError: a precision that it cannot have, or SAGE_CPU_ISA naming no instruction
            set that is here.
        KernelUnavailableError: the native CPU kernel is not there, or there is no such GPU, or no
            kernels for it.
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
        precision: str | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, size in (("batch", batch), ("kv_heads", kv_heads), ("capacity", capacity)):
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise InvalidAttentionError(f"{name}={size!r}; it must be an integer of at least 1")
        if dtype not in DTYPES:
            known = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
            raise InvalidAttentionError(f"dtype={dtype}; supported: {known}")
        if value_head_dim is None:
            value_head_dim = head_dim
        self.batch, self.kv_heads, self.capacity = batch, kv_heads, capacity
        self.head_dim, self.value_head_dim = head_dim, value_head_dim
        self.dtype, self.device = dtype, _device(device)
        self._length = 0
        shape = PackedShape(batch, kv_heads, head_dim, value_head_dim, capacity, dtype)
        self._store = _OPEN[self.device.type](shape, self.device, precision)

    @property
    def precision(self) -> str:
        """The recipe."""
        return self._store.precision

    @property
    def length(self) -> int:
        """The number of tokens in the cache."""
        return self._length

    @property
    def nbytes(self) -> int:
        """The bytes that the cache occupies, whatever its length."""
        return self._store.nbytes

    def __repr__(self) -> str:
        where = "" if self.device.type == "cpu" else f", {self.device}"
        return (
            f"PackedKV({self._length} of {self.capacity} tokens, batch {self.batch}, "
            f"{self.kv_heads} heads, head_dim {self.head_dim}, value_head_dim "
            f"{self.value_head_dim}, {self.dtype}, {self.precision}{where})"
        )

    def reset(self) -> None:
        """Forget all tokens; the memory stays."""
        self._length = 0

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's has no types
    def append(self, key: Tensor, value: Tensor) -> None:
        """Add n tokens at the end.

        Args:
            key: (batch, kv_heads, n, head_dim) in the cache's dtype, on its device; any
                strides.
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
        self._store.append(self._length, key, value)
        self._length += added

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
            query: (batch, H, Lq, head_dim) in the cache's dtype, on its device, H a multiple of
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
        # It has the batch size and channels of V, which is all that is asked of it.
        value = query.new_empty((self.batch, self.kv_heads, 0, self.value_head_dim))
        output = empty_output(query, value)
        lse = query.new_empty(query.shape[:3], dtype=torch.float32) if return_lse else None
        self._store.attend(
            self._length, query, semantics, output, attn_mask=attn_mask, sinks=sinks, lse=lse
        )
        return output if lse is None else (output, lse)

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
        if tensor.dtype != self.dtype or tensor.device != self.device:
            raise InvalidAttentionError(
                f"{name} is {tensor.dtype} on {tensor.device}; the cache is {self.dtype} on "
                f"{self.device}"
            )
        _check_no_gradient(name, tensor)


def _check_no_gradient(name: str, tensor: Tensor) -> None:
    if tensor.requires_grad and torch.is_grad_enabled():
        raise InvalidAttentionError(
            f"{name} requires a gradient; a packed cache is for inference only: call it under "
            "torch.no_grad()"
        )


def _device(device: torch.device | str) -> torch.device:
    """A device that a cache can be on, with its index."""
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise InvalidAttentionError(f"device={device!r}: {error}") from None
    if found.type not in _OPEN:
        raise InvalidAttentionError(
            f"device={device!r}; a packed cache can be on {' or '.join(_OPEN)}"
        )
    if found.type == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise KernelUnavailableError(f"device={device!r}; torch finds no GPU here")
    index = torch.cuda.current_device() if found.index is None else found.index
    return torch.device("cuda", index)
