"""Whose attention ours is timed against: PyTorch's own, and packages that happen to be here.

A peer says in one sentence what it does not take. What it does not say it shows when it is called,
and then its own words are the reason; neither stops a run.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType, ModuleType
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, flex_attention, sdpa_kernel

from benchmarks.gpu.device import Device
from benchmarks.gpu.timing import Candidate
from sage_compiler.semantics import MaskClass
from tests.compiler.kernels.dense import Call

Attention = Callable[[Call], Tensor]

_REASON_LENGTH: Final = 300
# What foreign code raises that cannot do something; an error of the device is none of these.
_ERRORS: Final = (
    RuntimeError,
    ValueError,
    TypeError,
    AssertionError,
    AttributeError,
    ImportError,
    KeyError,
    OSError,
)


@dataclass(frozen=True)
class Peer:
    """Somebody's attention.

    Attributes:
        module: what it is imported from; None: PyTorch has it.
        refuses: why it does not take a call, in one sentence, or None.
        attention: its call, of the module, for calls that look like the given one: whatever can be
            made before the clock starts is made here. Its result is (B, H, Lq, Dv), any strides.
        context: what surrounds the calls; not timed.
    """

    module: str | None
    refuses: Callable[[Call], str | None]
    attention: Callable[[ModuleType, Call], Attention]
    context: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext


def is_causal(call: Call) -> bool:
    """Whether a call has a causal mask, top-left."""
    return call.semantics.mask_class is MaskClass.CAUSAL


# --- PyTorch ------------------------------------------------------------------------------------


def _sdpa(_: ModuleType, like: Call) -> Attention:
    def attention(call: Call) -> Tensor:
        return F.scaled_dot_product_attention(
            call.query,
            call.key,
            call.value,
            attn_mask=call.attn_mask,
            is_causal=is_causal(call),
            enable_gqa=call.query.shape[1] != call.key.shape[1],
        )

    return attention


def _takes_all(call: Call) -> str | None:
    """What it does not take, PyTorch says when it is called."""
    return None


def _compiled_flex() -> Any:
    return torch.compile(flex_attention.flex_attention, dynamic=False)


def _flex(_: ModuleType, like: Call) -> Attention:
    """Compiled, its mask made once; a bool or causal mask as a block mask, a float one as it is."""
    compiled = _compiled_flex()
    mask = like.attn_mask
    arguments: dict[str, Any] = {"enable_gqa": like.query.shape[1] != like.key.shape[1]}
    lengths = (like.query.shape[2], like.key.shape[2])
    if is_causal(like):
        arguments["block_mask"] = flex_attention.create_block_mask(
            lambda b, h, q, k: k <= q, None, None, *lengths, device=str(like.query.device)
        )
    elif mask is not None:
        shown = mask.expand(like.query.shape[0], like.query.shape[1], *lengths)
        if mask.dtype == torch.bool:
            batch = None if mask.shape[0] == 1 else mask.shape[0]
            heads = None if mask.shape[1] == 1 else mask.shape[1]
            arguments["block_mask"] = flex_attention.create_block_mask(
                lambda b, h, q, k: shown[b, h, q, k],
                batch,
                heads,
                *lengths,
                device=str(like.query.device),
            )
        else:
            arguments["score_mod"] = lambda score, b, h, q, k: score + shown[b, h, q, k]

    def attention(call: Call) -> Tensor:
        output: Tensor = compiled(call.query, call.key, call.value, **arguments)
        return output

    return attention


# --- packages -----------------------------------------------------------------------------------


def _no_mask(call: Call) -> str | None:
    return None if call.attn_mask is None else "it takes no explicit mask"


def _sage_refuses(call: Call) -> str | None:
    """It would take a mask among its keyword arguments, and ignore it."""
    if call.query.shape[3] > 128:
        return f"head_dim {call.query.shape[3]} is above 128"
    if is_causal(call) and call.query.shape[2] != call.key.shape[2]:
        return "a causal mask of other lengths than the query's"
    return _no_mask(call)


def _sage(module: ModuleType, like: Call) -> Attention:
    def attention(call: Call) -> Tensor:
        output: Tensor = module.sageattn(
            call.query, call.key, call.value, tensor_layout="HND", is_causal=is_causal(call)
        )
        return output

    return attention


def _flash_refuses(call: Call) -> str | None:
    """Its causal mask is bottom-right, ours top-left: the same where the lengths are."""
    if call.query.shape[3] > 256:
        return f"head_dim {call.query.shape[3]} is above 256"
    if is_causal(call) and call.query.shape[2] != call.key.shape[2]:
        return "a causal mask of other lengths than the query's"
    return _no_mask(call)


def _flash(module: ModuleType, like: Call) -> Attention:
    """Of (B, L, H, D); some versions give the LSE too."""

    def attention(call: Call) -> Tensor:
        query, key, value = (x.transpose(1, 2) for x in (call.query, call.key, call.value))
        found = module.flash_attn_func(query, key, value, causal=is_causal(call))
        output: Tensor = found[0] if isinstance(found, tuple) else found
        return output.transpose(1, 2)

    return attention


PEERS: Final[Mapping[str, Peer]] = MappingProxyType(
    {
        "flash": Peer(None, _takes_all, _sdpa, partial(sdpa_kernel, SDPBackend.FLASH_ATTENTION)),
        "cudnn": Peer(None, _takes_all, _sdpa, partial(sdpa_kernel, SDPBackend.CUDNN_ATTENTION)),
        "flex": Peer(None, _takes_all, _flex),
        "sageattention": Peer("sageattention", _sage_refuses, _sage),
        "flash_attn": Peer("flash_attn", _flash_refuses, _flash),
        "flash_attn_3": Peer("flash_attn_interface", _flash_refuses, _flash),
    }
)


def candidates(
    device: Device, calls: Sequence[Call], peers: Mapping[str, Peer]
) -> tuple[dict[str, Candidate], dict[str, str]]:
    """The peers that take these calls, each called once, and why the others do not.

    Raises:
        torch.AcceleratorError: the device failed.
    """
    found, refused = {}, {}
    for name, peer in peers.items():
        try:
            candidate = _candidate(device, peer, calls)
        except _ERRORS as error:
            if isinstance(error, torch.AcceleratorError):
                raise
            refused[name] = _shortened(f"{type(error).__name__}: {error}")
            continue
        if isinstance(candidate, str):
            refused[name] = candidate
        else:
            found[name] = candidate
    return found, refused


def _candidate(device: Device, peer: Peer, calls: Sequence[Call]) -> Candidate | str:
    """What is timed, or why it is not."""
    if peer.module is not None and importlib.util.find_spec(peer.module) is None:
        return f"there is no package {peer.module}"
    reason = peer.refuses(calls[0])
    if reason is not None:
        return reason
    module = importlib.import_module(peer.module or "torch")
    # PyTorch says in warnings why no kernel is available.
    with warnings.catch_warnings(record=True) as told, peer.context():
        warnings.simplefilter("always")
        attention = peer.attention(module, calls[0])
        try:
            attention(calls[0])
            device.synchronize()
        except RuntimeError as error:
            if isinstance(error, torch.AcceleratorError):
                raise
            reasons = [str(error), *(str(warning.message) for warning in told)]
            return _shortened(" ".join(reasons))
    return Candidate(lambda number: attention(calls[number]), peer.context)


def _shortened(reason: str) -> str:
    return " ".join(reason.split())[:_REASON_LENGTH]
