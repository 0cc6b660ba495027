"""What an ONNX file has of ours: its nodes, their recipes, and what each runtime would run."""

from __future__ import annotations

import ctypes
import functools
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from math import isfinite, nan
from pathlib import Path
from typing import Any, Final

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from sage_compiler.errors import KernelUnavailableError, UsageError
from sage_compiler.kernels.cpu import gate
from sage_compiler.kernels.cpu.kernel import GREATEST_HEAD_DIM
from sage_compiler.kernels.cpu.library import Unavailable, load
from sage_compiler.onnx import schema
from sage_compiler.onnx.session import ort_library
from sage_compiler.precision import AUTO, EXACT, PRECISIONS
from sage_compiler.record import KEEP
from sage_compiler.semantics import DeadRows, MaskClass
from sage_compiler.text import columns, count

WITHOUT_LIBRARY: Final = "without the library"
_EXACT: Final = "exact attention"
_REPORT: Final = {"rewritten": int, "kept": int, "sites": list}
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
            if isinstance(site, dict) and site.get("decision") == KEEP:
                lines.append(f"kept: {site.get('layer')}: {site.get('reason')}")
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
    nodes = tuple(_node(node, functions) for node in _all_nodes(model))
    told = _told(model, schema.REPORT_KEY, Path(path), _REPORT)
    policy = _told(model, schema.POLICY_KEY, Path(path), {"layers": dict})
    return FileInfo(model.opset_imports.get("", 0) or 0, nodes, functions, told, policy)


def _load(path: Path) -> ir.Model:
    if not path.is_file():
        raise UsageError(f"{str(path)!r} is not a file")
    try:
        # By content: names of other endings are those of other formats.
        proto = onnx.load(path, format="protobuf", load_external_data=False)
    except (DecodeError, RecursionError):
        proto = None
    if proto is None or not proto.ir_version or not proto.HasField("graph"):
        raise UsageError(f"{str(path)!r} is not an ONNX file, or only a part of one")
    try:
        return ir.serde.deserialize_model(proto)
    except (ir.serde.SerdeError, UnicodeDecodeError, RecursionError) as error:
        first = str(error.__cause__ or error).splitlines()[0]
        raise UsageError(f"{str(path)!r} is damaged: {first}") from None


def _told(model: ir.Model, key: str, path: Path, known: Mapping[str, type]) -> Any:
    """An entry of the metadata, a JSON object with these members; None where there is none."""
    text = model.metadata_props.get(key)
    if text is None:
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{str(path)!r} is damaged: its {key} is no JSON: {error}") from None
    if not isinstance(found, dict) or not all(
        isinstance(found.get(name), kind) for name, kind in known.items()
    ):
        raise UsageError(f"{str(path)!r} is damaged: its {key} has no {', '.join(known)}")
    return found


def _all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """The nodes of ours in the graph, and in functions of others that it may call."""
    others = [each for each in model.functions.values() if each.domain != schema.DOMAIN]
    for holder in (model.graph, *(each.graph for each in others)):
        for node in holder.all_nodes():
            if (node.domain, node.op_type) == (schema.DOMAIN, schema.NAME):
                yield node


def _node(node: ir.Node, functions: tuple[str, ...]) -> NodeInfo:
    words = {name: str(attribute.value) for name, attribute in node.attributes.items()}
    recipe = words.get("recipe", AUTO)
    given = [*node.inputs, *[None] * len(schema.INPUTS)]
    mask = [words.get("mask_class", str(MaskClass.NONE))]
    explicit = given[schema.MASK]
    if explicit is not None:
        kind = "" if explicit.dtype is None else f"{explicit.dtype.name.lower()} "
        mask.append(f"{kind}{_shape(explicit)}".strip())
    if mask[0] == MaskClass.NONE and len(mask) > 1:
        del mask[0]
    wrong = _wrong(words)
    body = (node.overload or node.op_type) in functions
    widest = max(_head_dim(given[0]), _head_dim(given[2]))
    serves = {
        WITHOUT_LIBRARY: _without_library(recipe, body),
        **{
            runtime: _with_library(provider, recipe, widest)
            for runtime, provider in RUNTIMES.items()
        },
    }
    return NodeInfo(
        name=str(node.name or ""),
        recipe=recipe,
        query=_shape(given[0]),
        key=_shape(given[1]),
        mask=" and ".join(mask),
        serves=dict.fromkeys(serves, f"nothing: {wrong}") if wrong else serves,
    )


def _wrong(words: Mapping[str, str]) -> str | None:
    """Why no runtime should take a node with these attributes; None where all is well."""
    for name, known in (
        ("recipe", PRECISIONS),
        ("mask_class", tuple(MaskClass)),
        ("dead_rows", tuple(DeadRows)),
    ):
        if name in words and words[name] not in known:
            return f"attribute {name} is {words[name]!r}; known: {', '.join(known)}"
    try:
        scale = float(words.get("scale", "nan"))
    except ValueError:
        scale = nan
    return None if isfinite(scale) else "attribute scale is missing, or is no finite number"


def _head_dim(value: ir.Value | None) -> int:
    """The last size of an input; 0 where the file does not say."""
    if value is None or value.shape is None or len(value.shape) == 0:
        return 0
    size = value.shape[-1]
    return size if isinstance(size, int) else 0


def _shape(value: ir.Value | None) -> str:
    if value is None or value.shape is None:
        return ""
    sizes = (dim.value if isinstance(dim, ir.SymbolicDim) else dim for dim in value.shape)
    return f"({', '.join(map(str, sizes))})"


def _without_library(recipe: str, body: bool) -> str:
    if not body:
        return "nothing: the file has no function for it"
    if recipe in (AUTO, EXACT):
        return f"{_EXACT} in standard operators"
    return f"{recipe} in standard operators"


def _with_library(provider: str, recipe: str, widest: int) -> str:
    """What the library computes a recipe in; ``widest``: the larger head_dim."""
    served = _served_by(provider, recipe)
    if served is None:
        by_device = provider == RUNTIMES["CUDA"] and recipe == AUTO and _library() is not None
        return "what the device defaults to" if by_device else "nothing"
    if provider != RUNTIMES["CPU"]:
        return f"{_EXACT} by the CPU, with copies there and back" if served == "float" else served
    if served == "float" or widest > GREATEST_HEAD_DIM:
        return _EXACT
    if recipe != AUTO:
        return served
    library = load()
    isa = "" if isinstance(library, Unavailable) else library.isa_name
    if isa not in gate.GATES:
        return f"{_EXACT} (this machine does not gain by quantizing)"
    return f"{served} where the sizes of a call make that faster, else {_EXACT}"


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
