"""What an ONNX file has of ours: its nodes, their recipes, and what each runtime would run."""

from __future__ import annotations

import ctypes
import functools
import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from sage_compiler.errors import KernelUnavailableError, UsageError
from sage_compiler.kernels.cpu import gate
from sage_compiler.kernels.cpu.library import Unavailable, load
from sage_compiler.onnx import schema
from sage_compiler.onnx.session import ort_library
from sage_compiler.precision import AUTO, EXACT
from sage_compiler.text import columns, count

WITHOUT_LIBRARY: Final = "without the library"
RUNTIMES: Final = {"CPU": "CPUExecutionProvider", "CUDA": "CUDAExecutionProvider"}


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """One node of ``ai.sage::Attention``.

    Attributes:
        name: that of its layer, where the file is of ours.
        recipe: as the node has it.
        query, key: shapes, in words; "" where the file does not say.
        mask: the mask class, and the kind of an explicit mask.
        serves: by runtime ("without the library", "CPU", "CUDA"), what would compute it.
    """

    name: str
    recipe: str
    query: str
    key: str
    mask: str
    serves: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class FileInfo:
    """What ``inspect`` finds in a file.

    Attributes:
        opset: of the standard operators.
        nodes: those of ours, in order.
        functions: the names of the bodies that the file has for them.
        report: the report of the export, as ``Report.to_dict``; None in a file of others.
        policy: the policy that chose the recipes, as ``Policy.to_dict``; None without one.
    """

    opset: int
    nodes: tuple[NodeInfo, ...]
    functions: tuple[str, ...]
    report: Mapping[str, Any] | None
    policy: Mapping[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data."""
        return asdict(self)

    def __str__(self) -> str:
        nodes = f"{count(len(self.nodes), 'node')} of {schema.DOMAIN}::{schema.NAME}"
        functions = f"{count(len(self.functions), 'function')} for them"
        lines = [f"{nodes}, {functions}; opset {self.opset}"]
        if self.report is not None:
            written_out = "" if self.nodes else ", in standard operators alone"
            lines.append(
                f"exported by sage-compiler: {count(self.report['rewritten'], 'attention')} "
                f"rewritten{written_out}, {self.report['kept']} kept"
            )
        if self.nodes:
            rows = [
                (node.name, node.recipe, node.query, node.key, node.mask) for node in self.nodes
            ]
            lines += columns([("node", "recipe", "query", "key", "mask"), *rows], "  ")
            lines += _served(self.nodes)
        for site in () if self.report is None else self.report["sites"]:
            if site["decision"] == "keep":
                lines.append(f"kept: {site['layer']}: {site['reason']}")
        return "\n".join(lines)


def _served(nodes: tuple[NodeInfo, ...]) -> list[str]:
    lines = []
    for runtime in (WITHOUT_LIBRARY, *RUNTIMES):
        served = Counter((node.recipe, node.serves[runtime]) for node in nodes)
        lines.append(f"{runtime}:")
        lines += [
            f"  {recipe}: {what} ({count(number, 'node')})"
            for (recipe, what), number in served.items()
        ]
    return lines


def inspect(path: str | os.PathLike[str]) -> FileInfo:
    """Read what a file has of ours; weights beside it are not looked at.

    Raises:
        UsageError: it is no ONNX file, or a damaged one, or has nodes of a newer version of the
            operator.
    """
    model = _load(Path(path))
    version = model.opset_imports.get(schema.DOMAIN, schema.VERSION)
    if version is not None and version > schema.VERSION:
        raise UsageError(
            f"{str(path)!r} has {schema.DOMAIN} in version {version}, and this sage-compiler knows "
            f"{schema.VERSION}; update it"
        )
    functions = tuple(
        function.overload or function.name
        for function in model.functions.values()
        if function.domain == schema.DOMAIN
    )
    nodes = tuple(
        _node(node, functions)
        for node in model.graph.all_nodes()
        if (node.domain, node.op_type) == (schema.DOMAIN, schema.NAME)
    )
    told, policy = (_told(model, key, Path(path)) for key in (schema.REPORT_KEY, schema.POLICY_KEY))
    return FileInfo(model.opset_imports.get("", 0) or 0, nodes, functions, told, policy)


def _load(path: Path) -> ir.Model:
    if not path.is_file():
        raise UsageError(f"{str(path)!r} is not a file")
    try:
        proto = onnx.load(path, load_external_data=False)
    except DecodeError:
        proto = None
    if proto is None or not proto.ir_version or not proto.graph.node:
        raise UsageError(f"{str(path)!r} is not an ONNX file, or only a part of one")
    try:
        return ir.serde.deserialize_model(proto)
    except ir.serde.SerdeError as error:
        first = str(error.__cause__ or error).splitlines()[0]
        raise UsageError(f"{str(path)!r} is damaged: {first}") from None


def _told(model: ir.Model, key: str, path: Path) -> Any:
    """An entry of the metadata that is JSON; None where there is none."""
    text = model.metadata_props.get(key)
    try:
        return None if text is None else json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"{str(path)!r} is damaged: its {key} is no JSON: {error}") from None


def _node(node: ir.Node, functions: tuple[str, ...]) -> NodeInfo:
    words = {name: str(attribute.value) for name, attribute in node.attributes.items()}
    recipe = words.get("recipe", AUTO)
    given = [*node.inputs, *[None] * len(schema.INPUTS)]
    mask = [words.get("mask_class", "none")]
    explicit = given[schema.MASK]
    if explicit is not None:
        kind = "" if explicit.dtype is None else f"{explicit.dtype.name.lower()} "
        mask.append(f"{kind}{_shape(explicit)}".strip())
    if mask[0] == "none" and len(mask) > 1:
        del mask[0]
    body = (node.overload or node.op_type) in functions
    return NodeInfo(
        name=node.name or "",
        recipe=recipe,
        query=_shape(given[0]),
        key=_shape(given[1]),
        mask=" and ".join(mask),
        serves={
            WITHOUT_LIBRARY: _without_library(recipe, body),
            **{runtime: _with_library(provider, recipe) for runtime, provider in RUNTIMES.items()},
        },
    )


def _shape(value: ir.Value | None) -> str:
    if value is None or value.shape is None:
        return ""
    return (
        "("
        + ", ".join(
            str(dim.value if isinstance(dim, ir.SymbolicDim) else dim) for dim in value.shape
        )
        + ")"
    )


def _without_library(recipe: str, body: bool) -> str:
    if not body:
        return "nothing: the file has no function for it"
    if recipe in (AUTO, EXACT):
        return "exact attention in standard operators"
    return f"{recipe} in standard operators"


def _with_library(provider: str, recipe: str) -> str:
    served = _served_by(provider, recipe)
    if served is None:
        told = recipe == AUTO and _library() is not None
        return "what the device defaults to" if told else "nothing"
    what = "exact attention" if served == "float" else served
    if recipe == EXACT and provider == RUNTIMES["CUDA"]:
        return f"{what} by the CPU, with copies there and back"
    if recipe == AUTO and provider == RUNTIMES["CPU"]:
        library = load()
        isa = "" if isinstance(library, Unavailable) else library.isa_name
        least = gate.GATES.get(isa)
        if least is None:
            return "exact attention (this machine does not gain by quantizing)"
        return (
            f"{what} where that is faster (here, {isa}: never below {least.query_length} queries "
            f"or {least.key_length} keys), else exact attention"
        )
    return what


@functools.cache
def _library() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(ort_library())
    except KernelUnavailableError:
        return None


def _served_by(provider: str, recipe: str) -> str | None:
    library = _library()
    if library is None:
        return None
    function = library["sage_ort_served"]
    function.argtypes, function.restype = [ctypes.c_char_p, ctypes.c_char_p], ctypes.c_char_p
    served: bytes | None = function(provider.encode(), recipe.encode())
    return None if served is None else served.decode()
