"""The operator ``ai.sage::Attention``: its schema, and what tells one of its bodies from another.

The node carries the same words as ``sage::attention`` (see ``semantics`` and docs/numerics.md),
less what only training, variable lengths and timesteps need. docs/onnx.md is its reference.

A new attribute, or another meaning of one, raises ``VERSION`` and takes another ``NAME``. The
version alone does not keep an older library from a newer file: ONNX Runtime resolves a node to the
newest version that is registered and not above the file's, and then runs its kernel, which cannot
see what it does not ask for.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import onnx
import onnx.reference
from onnx.defs import OpSchema
from onnx.shape_inference import InferenceError

from sage_compiler.precision import AUTO
from sage_compiler.semantics import UNBOUNDED, DeadRows, MaskClass

DOMAIN: Final = "ai.sage"
NAME: Final = "Attention"
VERSION: Final = 1

# Positions.
INPUTS: Final = ("query", "key", "value", "attn_mask", "sinks")
OUTPUTS: Final = ("output", "lse")
MASK, SINKS, LSE = INPUTS.index("attn_mask"), INPUTS.index("sinks"), OUTPUTS.index("lse")

# Metadata of a file: the policy and the report of its export, as JSON.
POLICY_KEY: Final = "ai.sage.policy"
REPORT_KEY: Final = "ai.sage.report"

NO_SOFTCAP: Final = 0.0

_FLOATS: Final = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
_DOC: Final = """\
Scaled dot-product attention with quantized operands.

    score[i, j] = cap(scale * q_i . k_j) + attn_mask[i, j]     cap(x) = softcap * tanh(x / softcap)
    output_i    = sum over visible j of softmax(score[i])_j * v_j

Shapes: query (B, H, Lq, D), key (B, Hkv, Lk, D), value (B, Hkv, Lk, Dv); H is a multiple of Hkv,
and query head h uses key/value head h / (H / Hkv). A key is visible where the band of mask_class
shows it and attn_mask, if it is bool, is true.
"""


class Mask(StrEnum):
    """The explicit mask of a node."""

    BOOL = "bool"  # True: visible
    FLOAT = "float"  # added to the scores


@dataclass(frozen=True, slots=True)
class Variant:
    """What shapes the body of a node; the numbers reach the body as attributes.

    Attributes:
        recipe: of ``precision.PRECISIONS``.
        mask_class: the visible band.
        mask: the kind of attn_mask, or None without one.
        sinks, softcap, lse: whether the node has them; ``lse`` is the second output.
        dead_rows: what a row without a visible key yields.
        grouped: whether query heads may share keys and values. A body for it serves others too.
    """

    recipe: str = AUTO
    mask_class: MaskClass = MaskClass.NONE
    mask: Mask | None = None
    sinks: bool = False
    softcap: bool = False
    dead_rows: DeadRows = DeadRows.ZERO
    lse: bool = False
    grouped: bool = False

    @property
    def overload(self) -> str:
        """The name of the body, e.g. ``int8_fp8.causal.bool``."""
        parts = {
            self.recipe: True,
            str(self.mask_class): self.mask_class is not MaskClass.NONE,
            str(self.mask): self.mask is not None,
            "sinks": self.sinks,
            "softcap": self.softcap,
            "nan": self.dead_rows is DeadRows.NAN,
            "lse": self.lse,
            "grouped": self.grouped,
        }
        return ".".join(part for part, present in parts.items() if present)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the inputs that the node has, in order; a gap has the name ''."""
        last = 5 if self.sinks else 4 if self.mask is not None else 3
        present = (True, True, True, self.mask is not None, self.sinks)
        return tuple(
            name if there else "" for name, there in zip(INPUTS, present[:last], strict=False)
        )

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the outputs that the node has, in order."""
        return OUTPUTS if self.lse else OUTPUTS[:1]

    @property
    def attributes(self) -> tuple[str, ...]:
        """The names of all attributes of the node."""
        return tuple(attributes())


def attributes() -> dict[str, OpSchema.Attribute]:
    """The attributes of a node by name."""

    def default(name: str, value: Any, doc: str) -> OpSchema.Attribute:
        return OpSchema.Attribute(name, onnx.helper.make_attribute(name, value), doc)

    found = (
        default(
            "recipe", AUTO, "<Q and K>_<P and V>, e.g. int8_fp8; 'exact'; or 'auto', the device's"
        ),
        default("mask_class", str(MaskClass.NONE), f"The visible band: {', '.join(MaskClass)}"),
        OpSchema.Attribute("scale", OpSchema.AttrType.FLOAT, "Factor of Q K^T", required=True),
        default("softcap", NO_SOFTCAP, "softcap * tanh(score / softcap), before masks; 0: none"),
        default("window_left", UNBOUNDED, "Keys before the diagonal in a window; -1: no limit"),
        default("window_right", UNBOUNDED, "Keys after the diagonal in a window; -1: no limit"),
        default(
            "dead_rows",
            str(DeadRows.ZERO),
            f"What a row that sees no key yields: {', '.join(DeadRows)}",
        ),
    )
    return {attribute.name: attribute for attribute in found}


@functools.cache
def schema() -> OpSchema:
    """The schema, registered with the onnx package, so that its checker and shape inference know
    the operator."""
    optional = OpSchema.FormalParameterOption.Optional
    parameter = OpSchema.FormalParameter
    made = OpSchema(
        NAME,
        DOMAIN,
        VERSION,
        _DOC,
        inputs=[
            parameter("query", "T", "(B, H, Lq, D)"),
            parameter("key", "T", "(B, Hkv, Lk, D)"),
            parameter("value", "T", "(B, Hkv, Lk, Dv)"),
            parameter("attn_mask", "M", "Broadcasts to (B, H, Lq, Lk)", param_option=optional),
            parameter(
                "sinks",
                "S",
                "(H,), one more logit per head, in the denominator only",
                param_option=optional,
            ),
        ],
        outputs=[
            parameter("output", "T", "(B, H, Lq, Dv)"),
            parameter(
                "lse",
                "tensor(float)",
                "(B, H, Lq), natural log-sum-exp of the scores",
                param_option=optional,
            ),
        ],
        type_constraints=[
            ("T", _FLOATS, "Q, K, V and the output"),
            ("M", ["tensor(bool)", *_FLOATS], "bool: true is visible; float: added to the scores"),
            ("S", _FLOATS, "Sinks"),
        ],
        attributes=list(attributes().values()),
    )
    made.set_type_and_shape_inference_function(_infer)
    # Importing onnx.reference fails where two domains have an operator of one name, as this one and
    # onnx's own Attention: it is imported above, before.
    onnx.defs.register_schema(made)
    return made


def _infer(context: Any) -> None:
    """Types and shapes of the outputs, from those of Q and V.

    Raises:
        onnx.shape_inference.InferenceError: inputs that contradict each other.
    """
    query, key, value = (_dims(context, position) for position in range(3))
    for what, first, i, second, j in (
        ("batch", query, 0, key, 0),
        ("batch", query, 0, value, 0),
        ("head_dim", query, 3, key, 3),
        ("key/value heads", key, 1, value, 1),
        ("key length", key, 2, value, 2),
    ):
        if first is not None and second is not None:
            _require_equal(what, first[i], second[j])
    rows = [onnx.TensorShapeProto.Dimension()] * 3 if query is None else query[:3]
    value_dim = onnx.TensorShapeProto.Dimension() if value is None else value[3]
    given = context.get_input_type(0)
    if given is not None:
        _set_output(context, 0, given.tensor_type.elem_type, [*rows, value_dim])
    if context.get_num_outputs() > 1 and context.has_output(1):
        _set_output(context, 1, onnx.TensorProto.FLOAT, rows)


def _dims(context: Any, position: int) -> list[onnx.TensorShapeProto.Dimension] | None:
    """The four dims of an input; None where nothing is known of them."""
    given = context.get_input_type(position)
    if given is None or not given.tensor_type.HasField("shape"):
        return None
    dims = list(given.tensor_type.shape.dim)
    if len(dims) != 4:
        raise InferenceError(
            f"{DOMAIN}::{NAME}: {INPUTS[position]} has {len(dims)} dims; it must have 4: "
            "(batch, heads, length, head_dim)"
        )
    return dims


def _require_equal(
    what: str,
    first: onnx.TensorShapeProto.Dimension,
    second: onnx.TensorShapeProto.Dimension,
) -> None:
    sizes = [dim.dim_value for dim in (first, second) if dim.HasField("dim_value")]
    if len(set(sizes)) > 1:
        raise InferenceError(
            f"{DOMAIN}::{NAME}: {what} {sizes[0]} in one input and {sizes[1]} in another"
        )


def _set_output(
    context: Any, position: int, element: int, dims: Iterable[onnx.TensorShapeProto.Dimension]
) -> None:
    found = onnx.TypeProto()
    found.tensor_type.elem_type = element
    found.tensor_type.shape.dim.extend(dims)
    context.set_output_type(position, found)
