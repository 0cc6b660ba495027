"""``sage.export_onnx``: a rewritten model in a file for ONNX Runtime and every other runtime."""

from __future__ import annotations

import errno
import functools
import glob
import hashlib
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import InlinePass
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from sage_compiler.backend import transform
from sage_compiler.config import Options, parse_options
from sage_compiler.errors import InvalidOptionError, SageError
from sage_compiler.onnx import axes, schema, training, translate
from sage_compiler.onnx.body import function
from sage_compiler.onnx.standalone import Standalone
from sage_compiler.passes.pipeline import Decision
from sage_compiler.passes.rewrite import LAYER_KEY
from sage_compiler.passes.site import AttentionSite
from sage_compiler.policy import Policy
from sage_compiler.precision import AUTO
from sage_compiler.program import export_rewritten, refuse_timesteps
from sage_compiler.report import Report
from sage_compiler.semantics import DeadRows, MaskClass

DEFAULT_OPSET: Final = 21
LEAST_OPSET: Final = 20
_LEAST_IR_VERSION: Final = 10  # the first with overloads of functions

# A protobuf message stays below 2 GiB; what is no weight needs room too.
LARGEST_IN_FILE: int = (2 << 30) - (64 << 20)
_DIGEST_LENGTH: Final = 16  # of the name of a file of weights

_STACK_TRACE: Final = "pkg.torch.onnx.stack_trace"
_SCOPES: Final = "pkg.torch.onnx.name_scopes"


def export_onnx(
    model: nn.Module,
    args: tuple[Any, ...],
    path: str | os.PathLike[str],
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    policy: Policy | str | os.PathLike[str] | None = None,
    strict_policy: bool = True,
    precision: str = AUTO,
    opset: int | None = None,
    standalone: str | None = None,
    source_paths: bool = False,
) -> Report:
    """Export a model to ONNX, its attention as nodes of ``ai.sage::Attention``.

    The file runs in any runtime: it has a local function for each kind of node, in standard
    operators that compute the recipe. Where our operator library is registered, see
    ``onnx_session``, its kernels run instead.

    Args:
        model: in evaluation mode.
        args, kwargs: example inputs.
        path: the file; weights of 2 GiB and more go to a file beside it, which is named after it
            and what it holds.
        dynamic_shapes: the sizes that vary, as torch.onnx.export takes them: for each input a dict
            from dim to a name, such as ``{"x": {0: "batch", 1: "length"}}``, or to an
            torch.export.Dim.
        policy: a recipe for every layer, or the path of one.
        strict_policy: whether a layer that the policy does not fit is an error; else it is left as
            torch.onnx writes it.
        precision: "auto" leaves the recipe to the runtime that opens the file; "exact"; or a
            recipe for all layers.
        opset: of the standard operators, 20 or higher; default: 21.
        standalone: "function", the default; "standard" writes the functions out in place of the
            nodes, for tools that know no functions (no kernel of ours can serve these);
            "custom" leaves the functions away: the file needs the library.
        source_paths: whether the file tells where in the source code a node comes from.

    Returns:
        What was rewritten, and what was kept and why. The file has it in its metadata, without
        source paths unless these are asked for.

    Raises:
        InvalidOptionError: a value that an argument cannot have.
        InvalidAttentionError: a call of ``sage.attention`` that the operator cannot say.
        PolicyError: the policy cannot be read or does not fit the model.
        SageError: the file does not pass ONNX's checker.
        OSError: it cannot be written.
        torch._dynamo.exc.UserError, torch.onnx.OnnxExporterError: what torch cannot export.
        Whatever is raised, there is no new file, and an old one is what it was.
    """
    path = _target(path)
    exported = build(
        model,
        args,
        kwargs or {},
        dynamic_shapes=dynamic_shapes,
        options=parse_options(
            {"precision": precision, "policy": policy, "strict_policy": strict_policy}
        ),
        opset=opset,
        standalone=standalone,
        source_paths=source_paths,
    )
    save(exported.model, path)
    return exported.report


def _target(path: str | os.PathLike[str]) -> Path:
    """Where the file will be; raises OSError, before the work, where it cannot be."""
    target = Path(path).resolve()  # what a link leads to is replaced, not the link
    if target.is_dir():
        raise IsADirectoryError(
            errno.EISDIR, "is a folder; give the name of a file", os.fspath(path)
        )
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "there is no such folder", str(target.parent))
    return target


@dataclass(frozen=True, slots=True)
class Exported:
    """A model of ONNX, before it is a file.

    Attributes:
        model: what the file will hold.
        inputs: the example of each of its inputs.
        report: what was rewritten, and what was kept.
    """

    model: ir.Model
    inputs: Mapping[str, Tensor]
    report: Report


def build(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    dynamic_shapes: Any,
    options: Options,
    opset: int | None,
    standalone: str | None,
    source_paths: bool,
) -> Exported:
    """All of ``export_onnx``, which says what is what, but for the file."""
    model = getattr(model, "_orig_mod", model)  # of a compiled one
    if not isinstance(model, nn.Module):
        advice = "; its module() is one" if isinstance(model, ExportedProgram) else ""
        raise InvalidOptionError(
            f"model is a {type(model).__name__}; torch.export takes a torch.nn.Module{advice}"
        )
    if not isinstance(args, tuple) or not isinstance(kwargs, Mapping):
        raise InvalidOptionError(
            f"args is a {type(args).__name__} and kwargs a {type(kwargs).__name__}; args must be a "
            "tuple and kwargs a dict"
        )
    for name, weight in (*model.named_parameters(), *model.named_buffers()):
        if weight.is_meta:
            raise InvalidOptionError(f"{name} is on the meta device: load the weights first")
    refuse_timesteps(options.policy)
    form, opset = _standalone(standalone), _opset(opset)
    names = list(axes.named_axes(model, args, kwargs, dynamic_shapes))
    axes.check(names)
    program, report = export_rewritten(
        model,
        args,
        kwargs,
        axes.without_names(dynamic_shapes),
        functools.partial(_rewrite, options=options),
    )
    translate.check(program)
    exported = _to_onnx(program, opset)
    made = exported.model
    inputs = _inputs(made, program)
    exported.rename_axes(_names_of_sizes(inputs, names))
    _finish(made, program, form, opset)
    _describe(made, report, options.policy, source_paths)
    return Exported(made, {value.name or "": tensor for value, tensor in inputs}, report)


def _rewrite(graph: fx.GraphModule, options: Options) -> Report:
    training.refuse(graph)
    report = transform(graph, options, _decide)
    for node in graph.graph.nodes:
        if LAYER_KEY in node.meta and node.target in translate.OPERATORS:
            # Of what is ours, torch.export carries this entry alone to the next program.
            node.meta["custom"] = {**node.meta.get("custom", {}), LAYER_KEY: node.meta[LAYER_KEY]}
    return report


def _decide(site: AttentionSite, options: Options) -> Decision:
    """What becomes of a site in a file, which may run anywhere: never what suits this machine."""
    policy = options.policy
    if policy is None:
        if options.precision == AUTO:
            return Decision(
                AUTO, "precision='auto': the default of the runtime that opens the file"
            )
        return Decision(options.precision, f"precision={options.precision!r}")
    difference = policy.difference(site.layer, site.fingerprint)
    if difference is not None:
        return Decision(None, f"strict_policy=False: {difference}")
    choice = policy.layers[site.layer]
    return Decision(choice.recipes[0], f"policy: {choice.reason}" if choice.reason else "policy")


def _standalone(value: object) -> Standalone:
    if value is None:
        return Standalone.FUNCTION
    if isinstance(value, str) and value in list(Standalone):
        return Standalone(value)
    raise InvalidOptionError(f"standalone={value!r}; known: {', '.join(Standalone)}")


def _opset(value: object) -> int:
    if value is None:
        return DEFAULT_OPSET
    newest = onnx.defs.onnx_opset_version()
    if isinstance(value, int) and not isinstance(value, bool) and LEAST_OPSET <= value <= newest:
        return value
    raise InvalidOptionError(
        f"opset={value!r}; it must be an integer from {LEAST_OPSET} to {newest}"
    )


def _to_onnx(program: ExportedProgram, opset: int) -> torch.onnx.ONNXProgram:
    with _quiet():
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            output_names=_output_names(program),
            custom_translation_table=translate.table(),
            verbose=False,
        )
    assert exported is not None
    found = exported.model.opset_imports[""]
    if found != opset:
        raise InvalidOptionError(
            f"opset={opset}; torch.onnx exports this model to opset {found} alone: take that"
        )
    return exported


def _output_names(program: ExportedProgram) -> list[str] | None:
    """The keys of a model whose output is a dict of tensors, such as those of transformers."""
    specification = program.call_spec.out_spec
    assert specification is not None
    numbers = list(range(specification.num_leaves))
    structure = pytree.tree_unflatten(numbers, specification)
    if not isinstance(structure, Mapping) or list(structure.values()) != numbers:
        return None
    names = [str(key) for key in structure]
    return None if set(names) & set(program.graph_signature.user_inputs) else names


def _inputs(model: ir.Model, program: ExportedProgram) -> list[tuple[ir.Value, Tensor]]:
    """The inputs of a model with their examples."""
    # By position: an input that is an output as well gets another name.
    leaves = pytree.tree_leaves(program.example_inputs)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return list(zip(model.graph.inputs, tensors, strict=True))


def _names_of_sizes(
    inputs: list[tuple[ir.Value, Tensor]], named: list[tuple[Tensor, int, str]]
) -> dict[str | ir.SymbolicDim, str]:
    """The user's names of the sizes that vary, by the symbols that the model has for them."""
    of = {id(tensor): value for value, tensor in inputs}
    found = [(_symbol(of[id(tensor)], dim), name) for tensor, dim, name in named]
    examples = {
        symbol: size
        for value, tensor in inputs
        for dim, size in enumerate(tensor.shape)
        if (symbol := _symbol(value, dim)) is not None
    }
    known = [(symbol, name) for symbol, name in found if symbol is not None]
    return dict(axes.names_of_symbols(known, examples).items())


def _symbol(value: ir.Value, dim: int) -> str | None:
    """The symbol of a dim of an input; None where it does not vary."""
    assert value.shape is not None
    size = value.shape[dim]
    return str(size.value) if isinstance(size, ir.SymbolicDim) else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch.onnx says of packages that are not installed, and of its own insides."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", category=FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _finish(model: ir.Model, program: ExportedProgram, form: Standalone, opset: int) -> None:
    """Name the nodes by their layers, and give each the function that it calls."""
    layers = {
        node.name: node.meta.get("custom", {}).get(LAYER_KEY) for node in translate.calls(program)
    }
    nodes = [node for node in model.graph.all_nodes() if node.domain == schema.DOMAIN]
    for node in nodes:
        scopes = node.metadata_props.get(_SCOPES, "").rstrip("']").rpartition("'")[2]
        node.name = layers.get(scopes) or node.name
        if len(node.outputs) > 1 and not (
            node.outputs[1].uses() or node.outputs[1].is_graph_output()
        ):
            node.resize_outputs(1)
        if form is not Standalone.CUSTOM:
            variant = _variant(node)
            node.overload = variant.overload
            body = ir.serde.deserialize_function(function(variant, opset))
            model.functions[body.identifier()] = body
    model.opset_imports.pop(schema.DOMAIN, None)
    if form is Standalone.STANDARD:
        InlinePass()(model)
    elif nodes:
        model.opset_imports[schema.DOMAIN] = schema.VERSION
        model.ir_version = max(model.ir_version, _LEAST_IR_VERSION)


def _variant(node: ir.Node) -> schema.Variant:
    """What the body of a node depends on."""
    words = node.attributes
    present = [value is not None for value in node.inputs] + [False] * len(schema.INPUTS)
    mask = node.inputs[schema.MASK] if present[schema.MASK] else None
    return schema.Variant(
        recipe=words["recipe"].as_string(),
        mask_class=MaskClass(words["mask_class"].as_string()),
        mask=None
        if mask is None
        else schema.Mask.BOOL
        if mask.dtype == ir.DataType.BOOL
        else schema.Mask.FLOAT,
        sinks=present[schema.SINKS],
        softcap=words["softcap"].as_float() != schema.NO_SOFTCAP,
        dead_rows=DeadRows(words["dead_rows"].as_string()),
        lse=len(node.outputs) > 1,
        grouped=_heads(node, 0) != _heads(node, 1),
    )


def _heads(node: ir.Node, position: int) -> object:
    value = node.inputs[position]
    assert value is not None and value.shape is not None  # the exporter knows all shapes
    return value.shape[1]


def _describe(model: ir.Model, report: Report, policy: Policy | None, source_paths: bool) -> None:
    told = report.to_dict()
    if not source_paths:
        for site in told["sites"]:
            del site["source"]
        for node in model.graph.all_nodes():
            node.metadata_props.pop(_STACK_TRACE, None)
    model.metadata_props[schema.REPORT_KEY] = json.dumps(told, allow_nan=False)
    if policy is not None:
        model.metadata_props[schema.POLICY_KEY] = json.dumps(policy.to_dict(), allow_nan=False)


def save(model: ir.Model, path: Path, accept: Callable[[Path], None] = lambda file: None) -> int:
    """Write a file, and its weights beside it if they are large, once ONNX's checker has passed.

    Args:
        path: as ``_target`` has it.
        accept: sees the file before it takes its name, and may raise to refuse it.

    Returns:
        The bytes written.

    Raises:
        SageError: it does not pass.
        OSError: it cannot be written.
    """
    data = _name_of_weights(model, path)
    # Beside it, for a rename within one file system.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        file = Path(folder) / path.name
        ir.save(model, file, external_data=data)
        try:
            onnx.checker.check_model(file, full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            first = str(error).strip().splitlines()[0]
            raise SageError(f"the exported model does not pass ONNX's checker: {first}") from error
        accept(file)
        written = sum(each.stat().st_size for each in Path(folder).iterdir())
        # Other weights have another name, so at no moment does a model have those of another.
        if data is not None:
            os.replace(Path(folder) / data, path.parent / data)
        try:
            os.replace(file, path)
        except OSError:
            if data is not None:
                (path.parent / data).unlink()
            raise
    for old in path.parent.glob(f"{glob.escape(path.name)}.{'[0-9a-f]' * _DIGEST_LENGTH}.data"):
        if old.name != data:
            old.unlink()
    return written


def _name_of_weights(model: ir.Model, path: Path) -> str | None:
    """The name of the file that weights go to, by what they are; None where they stay inside."""
    values = (value.const_value for value in model.graph.initializers.values())
    weights = [weight for weight in values if weight is not None]
    if sum(weight.nbytes for weight in weights) <= LARGEST_IN_FILE:
        return None
    digest = hashlib.sha256()
    for weight in weights:
        digest.update(f"{weight.name} {weight.dtype} {weight.shape}".encode())
        digest.update(weight.tobytes())
    return f"{path.name}.{digest.hexdigest()[:_DIGEST_LENGTH]}.data"
