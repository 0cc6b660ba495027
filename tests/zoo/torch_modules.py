"""torch.nn's own attention modules: self and cross, masks of every kind, fast paths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor, nn

from tests.zoo.architecture import WRITTEN, Architecture, Inputs, normal

FAMILY: Final = "torch.nn"
WIDTH: Final = 32
HEADS: Final = 4
L: Final = 10
SOURCE: Final = 7  # tokens of what is attended to across


def hidden(length: int, seed: int = 0) -> Tensor:
    """(length,) True where a key of the second sequence is hidden, as torch.nn counts."""
    mask = torch.zeros(2, length, dtype=torch.bool)
    mask[1, length - length // 3 :] = True
    return mask


def future(length: int) -> Tensor:
    """(length, length) True above the diagonal: what a causal torch.nn mask hides."""
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def _self_inputs(padded: bool) -> Inputs:
    return {"x": normal(2, L, WIDTH), "key_padding_mask": hidden(L) if padded else None}


def _cross_inputs(padded: bool) -> Inputs:
    return {
        "x": normal(2, L, WIDTH),
        "source": normal(2, SOURCE, WIDTH, seed=1),
        "key_padding_mask": hidden(SOURCE) if padded else None,
    }


class SelfAttention(nn.Module):
    """nn.MultiheadAttention on itself, with the weights returned, ignored, or not asked for."""

    def __init__(self, need_weights: bool = False, returned: bool = False) -> None:
        super().__init__()
        self.need_weights, self.returned = need_weights, returned
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        output, weights = self.attention(
            x, x, x, key_padding_mask=key_padding_mask, need_weights=self.need_weights
        )
        return (output, weights) if self.returned else (output,)


class CausalSelfAttention(nn.Module):
    """Sequence first, with a causal mask and the promise that it is one."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS)

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        x = x.transpose(0, 1)
        output, _ = self.attention(
            x,
            x,
            x,
            attn_mask=future(x.shape[0]),
            is_causal=True,
            need_weights=False,
            key_padding_mask=key_padding_mask,
        )
        return output


class BiasedSelfAttention(nn.Module):
    """A float mask per head, besides padding."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.bias = nn.Parameter(torch.zeros(2 * HEADS, L, L))

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        if key_padding_mask is not None:
            key_padding_mask = torch.zeros_like(key_padding_mask, dtype=x.dtype).masked_fill(
                key_padding_mask, -torch.inf
            )
        output, _ = self.attention(
            x, x, x, attn_mask=self.bias, need_weights=False, key_padding_mask=key_padding_mask
        )
        return output


class CrossAttention(nn.Module):
    """Keys and values of another width than the queries, a learned extra key, a zero key."""

    def __init__(self, width: int = WIDTH, extra: bool = False) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, width)
        self.attention = nn.MultiheadAttention(
            WIDTH,
            HEADS,
            batch_first=True,
            kdim=width,
            vdim=width,
            add_bias_kv=extra,
            add_zero_attn=extra,
        )

    def forward(self, x: Tensor, source: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        source = self.project(source)
        output, _ = self.attention(
            x, source, source, need_weights=False, key_padding_mask=key_padding_mask
        )
        return output


class Encoder(nn.Module):
    """nn.TransformerEncoder, whose fast path is one opaque call in evaluation."""

    def __init__(self, norm_first: bool = False, causal: bool = False) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 48, dropout=0.0, batch_first=True, norm_first=norm_first
        )
        self.causal = causal
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        mask = future(x.shape[1]) if self.causal else None
        return self.encoder(
            x, mask=mask, is_causal=self.causal, src_key_padding_mask=key_padding_mask
        )


class Decoder(nn.Module):
    """nn.TransformerDecoder: causal self-attention and cross-attention."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 48, dropout=0.0, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, 2)

    def forward(self, x: Tensor, source: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        return self.decoder(
            x,
            source,
            tgt_mask=nn.Transformer.generate_square_subsequent_mask(x.shape[1]),
            tgt_is_causal=True,
            memory_key_padding_mask=key_padding_mask,
        )


class Translator(nn.Module):
    """nn.Transformer as a whole, sequence first."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.Transformer(WIDTH, HEADS, 1, 1, 48, dropout=0.0)

    def forward(self, x: Tensor, source: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        x, source = x.transpose(0, 1), source.transpose(0, 1)
        return self.transformer(
            source,
            x,
            tgt_mask=nn.Transformer.generate_square_subsequent_mask(x.shape[0]),
            src_key_padding_mask=key_padding_mask,
            memory_key_padding_mask=key_padding_mask,
            tgt_is_causal=True,
        )


def _entry(
    name: str,
    build: Callable[[], nn.Module],
    inputs: Callable[[bool], Inputs],
    true_sites: int,
    *,
    pads: bool = True,
    keeps: str = "",
) -> Architecture:
    return Architecture(
        name=name,
        family=FAMILY,
        build=lambda implementation: build(),
        inputs=inputs,
        true_sites=true_sites,
        implementations=WRITTEN,
        pads=pads,
        keeps=keeps,
    )


ARCHITECTURES: Final[tuple[Architecture, ...]] = (
    _entry("MultiheadAttention, self", SelfAttention, _self_inputs, 1),
    _entry(
        "MultiheadAttention, weights ignored",
        lambda: SelfAttention(need_weights=True),
        _self_inputs,
        1,
    ),
    _entry(
        "MultiheadAttention, weights returned",
        lambda: SelfAttention(need_weights=True, returned=True),
        _self_inputs,
        1,
        keeps="the weights are a result",
    ),
    _entry("MultiheadAttention, causal, sequence first", CausalSelfAttention, _self_inputs, 1),
    _entry("MultiheadAttention, float mask per head", BiasedSelfAttention, _self_inputs, 1),
    _entry("MultiheadAttention, cross", CrossAttention, _cross_inputs, 1),
    _entry(
        "MultiheadAttention, cross, of another width",
        lambda: CrossAttention(24),
        _cross_inputs,
        1,
    ),
    _entry(
        "MultiheadAttention, cross, extra keys",
        lambda: CrossAttention(extra=True),
        _cross_inputs,
        1,
    ),
    _entry("TransformerEncoder", Encoder, _self_inputs, 2),
    _entry("TransformerEncoder, norm first", lambda: Encoder(norm_first=True), _self_inputs, 2),
    _entry("TransformerEncoder, causal", lambda: Encoder(causal=True), _self_inputs, 2, pads=False),
    _entry("TransformerDecoder", Decoder, _cross_inputs, 4),
    _entry("Transformer", Translator, _cross_inputs, 3),
)
