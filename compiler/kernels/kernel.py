"""What a kernel is: the problem it is asked about, the call it serves, what `auto` takes of it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from sage_compiler.kernels.rotary import Rotary
from sage_compiler.semantics import UNBOUNDED, MaskClass, Semantics


class Run(Protocol):
    """A kernel's entry point; shapes as ``reference.attention``.

    Returns the output (B, H, Lq, Dv) and the LSE (B, H, Lq). Without ``want_lse``, nobody reads the
    second, and it may be empty.
    """

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        semantics: Semantics,
        *,
        attn_mask: Tensor | None,
        sinks: Tensor | None,
        want_lse: bool,
    ) -> tuple[Tensor, Tensor]: ...


class RunPacked(Protocol):
    """A kernel's entry point for a packed batch: N sequences along the lengths of a batch of 1.

    As ``Run`` of each sequence alone, for tensors (1, heads, total, channels) and cumulative
    lengths (N + 1,), int32 or int64, on the tensors' device or the CPU, where they are checked.
    """

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        semantics: Semantics,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        *,
        sinks: Tensor | None,
        want_lse: bool,
    ) -> tuple[Tensor, Tensor]: ...


class RunRotary(Protocol):
    """As ``Run``, of query and key that the kernel rotates as it reads them."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        semantics: Semantics,
        *,
        attn_mask: Tensor | None,
        sinks: Tensor | None,
        want_lse: bool,
        rotary: Rotary,
    ) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True, slots=True)
class Problem:
    """What a kernel needs to know of a call to accept or refuse it; lengths may be unknown.

    Attributes:
        window: whether a window hides the first keys.
        softcap: whether there is a softcap.
        capability: the compute capability of a GPU that need not be here; None: that of the device.
    """

    device_type: str
    dtype: torch.dtype
    head_dim: int
    value_head_dim: int
    heads: int
    kv_heads: int
    mask_class: MaskClass
    has_mask: bool
    window: bool = False
    softcap: bool = False
    device_index: int = 0
    capability: tuple[int, int] | None = None

    @classmethod
    def of(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        semantics: Semantics,
        attn_mask: Tensor | None,
        capability: tuple[int, int] | None = None,
    ) -> Problem:
        """That of a call; ``capability`` asks about another GPU, of tensors on the meta device."""
        return cls(
            device_type=query.device.type if capability is None else "cuda",
            dtype=query.dtype,
            head_dim=query.shape[3],
            value_head_dim=value.shape[3],
            heads=query.shape[1],
            kv_heads=key.shape[1],
            mask_class=semantics.mask_class,
            has_mask=attn_mask is not None,
            window=semantics.window_left != UNBOUNDED,
            softcap=semantics.softcap is not None,
            device_index=query.device.index or 0,
            capability=capability,
        )


@dataclass(frozen=True, slots=True)
class Gate:
    """The least sizes that `auto` gives a kernel: where it begins to gain.

    Attributes:
        query_length, key_length: with fewer queries, quantizing all keys does not pay.
        products: batch * heads * query length * key length * head_dim; with fewer, the overhead of
            a call does not.
    """

    query_length: int = 0
    key_length: int = 0
    products: int = 0

    def admits(self, query_length: int, key_length: int, products: int) -> bool:
        """Whether attention of these sizes is large enough."""
        return (
            query_length >= self.query_length
            and key_length >= self.key_length
            and products >= self.products
        )


OPEN: Final = Gate()
CLOSED: Final = Gate(sys.maxsize, sys.maxsize, sys.maxsize)


@dataclass(frozen=True, slots=True)
class Kernel:
    """A real kernel.

    Attributes:
        name: as reports show it; asked when it is needed, since it may take loading a library.
        device_type: the torch device type it runs on.
        recipe: the recipe it computes.
        refuse: why it cannot serve a problem, in one sentence, or None when it can.
        gate: for a problem that it can serve: the least sizes that `auto` gives it, or why
            `auto` gives it nothing, in one sentence. An explicit recipe does not ask.
        run: the call.
        smallest: the least sizes of all its gates, without a look at the problem.
        run_packed: the call of a packed batch; None: its sequences are calls of their own.
        run_rotary: the call with a rotary embedding of Q and K in it; None: the kernel does not
            rotate, and gets them rotated.
    """

    name: Callable[[], str]
    device_type: str
    recipe: str
    refuse: Callable[[Problem], str | None]
    gate: Callable[[Problem], Gate | str]
    run: Run
    smallest: Callable[[], Gate] = lambda: OPEN
    run_packed: RunPacked | None = None
    run_rotary: RunRotary | None = None
