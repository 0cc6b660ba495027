"""The fast path of torch.nn's transformer modules: in evaluation one call for a whole layer.

``torch._native_multi_head_attention`` and ``torch._transformer_encoder_layer_fwd`` take inputs
(B, L, E) and do not say what their masks mean; that is read from PyTorch's
aten/src/ATen/native/transformers/attention.cpp, cuda/attention.cu and transformer.cpp.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import fx

from sage_compiler.passes.assembly import Unproved
from sage_compiler.passes.axes import Size, same
from sage_compiler.passes.call_masks import as_row, combine, explicit, known, padding_term
from sage_compiler.passes.masks import Analysis, analyze
from sage_compiler.passes.multi_head import (
    BATCH_FIRST,
    Arguments,
    conclude,
    merge_heads,
    only_output,
    project_packed,
    split_heads,
)
from sage_compiler.passes.normalize import shape_of
from sage_compiler.passes.site import Proof
from sage_compiler.passes.terms import Term, TermKind
from sage_compiler.passes.values import Apply, Value
from sage_compiler.passes.walk import Walk

_aten = torch.ops.aten
_DEVICES: Final = ("cpu", "cuda")


def _defaults(overload: torch._ops.OpOverload) -> dict[str, Any]:
    return {each.name: each.default_value for each in overload._schema.arguments}


_ATTENTION: Final = _defaults(_aten._native_multi_head_attention.default)
_LAYER: Final = _defaults(_aten._transformer_encoder_layer_fwd.default)


def recognize_native_attention(call: fx.Node, walk: Walk) -> Proof | str:
    """Prove what _native_multi_head_attention computes here, or say why it is kept."""
    try:
        return _prove_attention(call, Arguments(call, _ATTENTION, walk), walk)
    except Unproved as reason:
        return str(reason)


def recognize_encoder_layer(call: fx.Node, walk: Walk) -> Proof | str:
    """Prove what _transformer_encoder_layer_fwd computes here, or say why it is kept."""
    try:
        return _prove_layer(call, Arguments(call, _LAYER, walk), walk)
    except Unproved as reason:
        return str(reason)


def _prove_attention(call: fx.Node, given: Arguments, walk: Walk) -> Proof:
    output = only_output(call)
    nodes = [given.floating(name) for name in ("query", "key", "value")]
    shapes = [known(node).shape for node in nodes]
    if not all(len(each) == 3 and all(map(same, each, shapes[0])) for each in shapes):
        raise Unproved("query, key and value are not provably of one shape (B, L, E)")
    return _prove(call, output, given, (nodes[0], nodes[1], nodes[2]), nodes[0], None, walk)


def _prove_layer(call: fx.Node, given: Arguments, walk: Walk) -> Proof:
    layer = _Layer.read(given)
    x: Value = layer.source
    if layer.norm_first:
        x = layer.norm(x, 1)
    return _prove(call, call, given, (x, x, x), layer.source, layer, walk)


def _prove(
    call: fx.Node,
    output: fx.Node,
    given: Arguments,
    inputs: tuple[Value, Value, Value],
    source: fx.Node,
    layer: _Layer | None,
    walk: Walk,
) -> Proof:
    """The attention of one call on ``inputs``, which are of the shape of ``source``."""
    tensor = known(source)
    if tensor.device.type not in _DEVICES:
        raise Unproved(f"what the fast path computes on {tensor.device.type} is not known")
    if walk.may_autocast(tensor.device.type):
        raise Unproved("autocast may be on, which the fast path obeys only in parts")
    batch, length, _ = tensor.shape
    head_count = "num_head" if layer is None else "num_heads"
    embed_dim = int(given.number("embed_dim"))
    heads = split_heads(embed_dim, int(given.number(head_count)), BATCH_FIRST)
    weight, bias = given.floating("qkv_weight"), given.floating("qkv_bias")
    query, key, value = project_packed(inputs, weight, bias, heads)
    result = merge_heads(given.floating("proj_weight"), given.floating("proj_bias"), heads)
    if layer is not None:
        result = layer.rest(result)
    analysis = _masks(call, given, (batch, heads.count, length, length), walk)
    if tensor.device.type != "cpu" and not analysis.live:
        raise Unproved(
            "a row without a visible key yields NaN or zero, by the kernel that PyTorch chooses; "
            "torch.backends.mha.set_fastpath_enabled(False) settles that"
        )
    shape = (batch, heads.count, length, heads.dim)
    values = (query, key, value, result)
    return conclude(call, output, values, analysis, analysis.live, (shape, shape), walk)


# --- masks ----------------------------------------------------------------------------------


def _masks(
    call: fx.Node, given: Arguments, scores: tuple[Size, Size, Size, Size], walk: Walk
) -> Analysis:
    """What the mask of a call hides: every key where it is not zero.

    The type of a mask says what its dims are: 0 (L, L), 1 a key padding mask (B, L), 2 those of
    the scores (B, H, L, L); anything but 2-D is of type 2.
    """
    mask = given.tensor("mask")
    if mask is None:
        return Analysis(live=True)
    sizes = tuple(known(mask).shape)
    kind = int(given.number("mask_type")) if len(sizes) == 2 else 2
    batch, _, length, _ = scores
    wanted = {0: (length, length), 1: (batch, length), 2: scores}.get(kind)
    fits = wanted is not None and len(sizes) == len(wanted)
    if wanted is None or not fits or not all(map(same, sizes, wanted)):
        raise Unproved(f"a mask of shape {shape_of(sizes)} and of type {kind}")
    lengths = (length, length)
    if kind == 1:
        return combine([], _padding(mask, call, walk), lengths, walk)
    if known(mask).dtype == torch.bool:
        return analyze([Term(mask, TermKind.HIDDEN, call)], *lengths, walk.masks)
    if known(mask).is_floating_point():
        term = Term(mask, TermKind.ADDITIVE, call)
        pieces = walk.masks.reader.pieces(term, *lengths)
        found = analyze([term], *lengths, walk.masks)
        # A low number hides, as PyTorch's kernel does, where a live key is proved for every row.
        hides = all(piece.fill == -math.inf for piece in pieces) or not found.terms
        if hides and not any(piece.is_bias for piece in pieces):
            return found
    words = f"a mask of {known(mask).dtype} hides keys where it is not zero"
    return explicit((Term(mask, TermKind.HIDDEN, call, value=_not_zero(mask)),), words)


def _padding(mask: fx.Node, call: fx.Node, walk: Walk) -> Term:
    dtype = known(mask).dtype
    if dtype == torch.bool or dtype.is_floating_point:
        term = padding_term(mask, call, walk)
        if term.kind is not TermKind.ADDITIVE:
            return term
    return Term(mask, TermKind.HIDDEN, call, value=as_row(_not_zero(mask), mask))


def _not_zero(mask: fx.Node) -> Value:
    return Apply(_aten.ne.Scalar, (mask, 0))


# --- the layer around the attention ---------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Layer:
    """A transformer encoder layer without its attention.

    Attributes:
        source: its input (B, L, E).
        embed_dim: E.
        norm_first: whether normalization comes before attention and before the feed-forward part,
            or after what they are added to.
        use_gelu: GELU is the activation; else ReLU.
        eps: of both normalizations.
        weights: by the names of the call's arguments.
    """

    source: fx.Node
    embed_dim: int
    norm_first: bool
    use_gelu: bool
    eps: float
    weights: dict[str, fx.Node]

    @classmethod
    def read(cls, given: Arguments) -> _Layer:
        names = [
            f"{part}_{number}"
            for part in ("norm_weight", "norm_bias", "ffn_weight", "ffn_bias")
            for number in (1, 2)
        ]
        return cls(
            source=given.floating("src"),
            embed_dim=int(given.number("embed_dim")),
            norm_first=given.flag("norm_first"),
            use_gelu=given.flag("use_gelu"),
            eps=given.number("eps"),
            weights={name: given.floating(name) for name in names},
        )

    def norm(self, x: Value, number: int) -> Value:
        weight, bias = self.weights[f"norm_weight_{number}"], self.weights[f"norm_bias_{number}"]
        return Apply(_aten.layer_norm.default, (x, [self.embed_dim], weight, bias, self.eps))

    def rest(self, attention: Value) -> Value:
        """What the layer makes of its attention."""
        x: Value = Apply(_aten.add.Tensor, (attention, self.source))
        if self.norm_first:
            return Apply(_aten.add.Tensor, (self._feed_forward(self.norm(x, 2)), x))
        x = self.norm(x, 1)
        return self.norm(Apply(_aten.add.Tensor, (self._feed_forward(x), x)), 2)

    def _feed_forward(self, x: Value) -> Value:
        weights = self.weights
        hidden = Apply(_aten.linear.default, (x, weights["ffn_weight_1"], weights["ffn_bias_1"]))
        active = Apply(_aten.relu.default, (hidden,))
        if self.use_gelu:
            # What PyTorch's kernels for CUDA fuse into the product is the approximation.
            approximate = "tanh" if known(self.source).device.type == "cuda" else "none"
            active = Apply(_aten.gelu.default, (hidden,), (("approximate", approximate),))
        return Apply(_aten.linear.default, (active, weights["ffn_weight_2"], weights["ffn_bias_2"]))
