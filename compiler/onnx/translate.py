"""From ``sage::attention`` in a program to nodes of ``ai.sage::Attention``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final

import onnxscript
import torch
from torch import fx
from torch.export import ExportedProgram

from sage_compiler.errors import InvalidAttentionError
from sage_compiler.onnx import schema
from sage_compiler.semantics import UNBOUNDED, parse_semantics

OPERATORS: Final = (torch.ops.sage.attention.default, torch.ops.sage.attention.lse)

# Arguments without an ONNX form, and what to do instead.
_WITHOUT_FORM: Final[Mapping[str, str]] = MappingProxyType(
    {
        "cu_seqlens_q": "pad the sequences to one length and mask the padding",
        "step": "calibrate with one timestep range",
        "guard": "export without a guard",
    }
)


def calls(program: ExportedProgram) -> Iterator[fx.Node]:
    """The calls of ``sage::attention``, in order."""
    for module in program.graph_module.modules():
        if isinstance(module, fx.GraphModule):
            yield from (node for node in module.graph.nodes if node.target in OPERATORS)


def check(program: ExportedProgram) -> None:
    """Raises InvalidAttentionError for a call that ``ai.sage::Attention`` cannot say."""
    names = [argument.name for argument in OPERATORS[0]._schema.arguments]
    for node in calls(program):
        given = dict(zip(names, node.args, strict=False)) | node.kwargs
        for name, instead in _WITHOUT_FORM.items():
            if given.get(name) not in (None, ""):
                raise InvalidAttentionError(
                    f"{node.name}: sage::attention with {name} has no ONNX form; {instead}"
                )


def table() -> dict[Any, Callable[..., Any]]:
    """What torch.onnx.export takes as its ``custom_translation_table``."""
    opset = onnxscript.values.Opset(schema.DOMAIN, schema.VERSION)
    operator = onnxscript.values.Op(opset, schema.NAME, schema.schema())

    def translate(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        mask_class: str = "none",
        scale: float | None = None,
        recipe: str = "exact",
        _min_seq_len: int = 0,  # a file has no gate
        dead_rows: str = "zero",
        softcap: float | None = None,
        sinks: Any = None,
        window_left: int = UNBOUNDED,
        window_right: int = UNBOUNDED,
        *_: Any,
        **__: Any,
    ) -> Any:
        semantics = parse_semantics(
            mask_class, scale, dead_rows, softcap, window_left, window_right
        )
        return operator(
            query,
            key,
            value,
            attn_mask,
            sinks,
            recipe=recipe,
            mask_class=mask_class,
            scale=semantics.scale_for(query.shape[3]),
            softcap=schema.NO_SOFTCAP if softcap is None else softcap,
            window_left=window_left,
            window_right=window_right,
            dead_rows=dead_rows,
        )

    def translate_output(*args: Any, **kwargs: Any) -> Any:
        return translate(*args, **kwargs)[0]

    default, with_lse = OPERATORS
    return {default: translate_output, with_lse: translate}
