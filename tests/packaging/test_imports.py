"""The direction of dependence between the rooms, read from the imports of every module.

All imports count: those inside functions and those for type checking alone too.
"""

import ast
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Final

import pytest

from tests.packaging.layout import PACKAGE_DIRS, ROOT, modules

PACKAGE: Final = "sage_compiler"

VOCABULARY: Final = ("errors", "precision", "semantics", "text")
MEASURES: Final = (*VOCABULARY, "metrics")
OPERATOR: Final = (
    "validate",
    "packed",
    "kernels",
    "gradient",
    "guard",
    "ops",
    "ops_rotary",
    "functional",
)
RUNTIME: Final = (*MEASURES, *OPERATOR, "packed_kv", "steps")
REPORTING: Final = ("drawing", "record", "verdict", "report_diff", "page", "report")
DECISION: Final = (*MEASURES, "config", "guard", "passes", "policy", "policy_json", *REPORTING)
MEETING: Final = (
    "fence",
    "rates",
    "costs",
    "second_reading",
    "traffic",
    "backend",
    "capture",
    "machine",
    "calibration",
    "calibrate",
    "explain",
    "onnx",
    "program",
    "prepare",
    "commands",
    "cli",
)
ANYTHING: Final = ("files", *RUNTIME, *DECISION, *MEETING, "")

# layer -> the layers it may import, besides itself. A layer is a module of the package, or a
# subpackage with all its modules; "" is the package itself, sage_compiler/__init__.py.
ALLOWED: Final[Mapping[str, Collection[str]]] = {
    "errors": (),
    "precision": ("errors",),
    "semantics": ("errors",),
    "text": (),
    "files": (),
    "metrics": VOCABULARY,
    "steps": VOCABULARY,
    "guard": MEASURES,
    "config": (*MEASURES, "guard", "policy"),
    # the operator: what runs
    "cutlass_templates": (),
    "validate": VOCABULARY,
    "packed": VOCABULARY,
    "kernels": (*VOCABULARY, "cutlass_templates", "packed"),
    "gradient": (*VOCABULARY, "packed", "kernels"),
    "ops": (*VOCABULARY, "validate", "packed", "kernels", "gradient", "guard"),
    "ops_rotary": (*VOCABULARY, "kernels", "gradient", "ops"),
    "functional": (*VOCABULARY, "ops"),
    "packed_kv": (*VOCABULARY, "validate", "kernels", "functional"),
    # the graph: what is found and decided
    "passes": VOCABULARY,
    "policy_json": (*VOCABULARY, "files"),
    "policy": (*MEASURES, "policy_json"),
    # what is told of it
    "drawing": ("files",),
    "record": (*VOCABULARY, "passes", "drawing"),
    "report_diff": ("text", "record"),
    "verdict": (*MEASURES, "policy", "record"),
    "page": (*MEASURES, "passes", "policy", "drawing", "record", "verdict"),
    "report": (*MEASURES, "files", "passes", "policy", *REPORTING),
    "prepare": ("passes",),
    # where both meet, and Inductor
    "fence": (),
    "rates": (*VOCABULARY, "kernels", "traffic"),
    "costs": (*VOCABULARY, "kernels", "rates"),
    "second_reading": (),
    "traffic": (*VOCABULARY, "kernels", "second_reading"),
    "backend": (*RUNTIME, *DECISION, "fence"),
    "capture": (*VOCABULARY, "passes"),
    "machine": (*VOCABULARY, "kernels"),
    "explain": (*RUNTIME, *DECISION, "backend", "capture"),
    "calibration": (*RUNTIME, "capture", "machine", "passes", "policy_json", "rates"),
    "calibrate": (*RUNTIME, *DECISION, "calibration", "machine", "rates"),
    "program": (*VOCABULARY, "policy", "report"),
    "onnx": (*RUNTIME, *DECISION, "backend", "files", "program"),
    "commands": ANYTHING,
    "cli": (*VOCABULARY, "commands"),
    "": ANYTHING,
}

# These are read without a compiler at hand: by tools, by exported models, by other rooms' tests.
WITHOUT_DYNAMO: Final = ("errors", "precision", "semantics", "policy", "config", "passes.site")


def imported_names(source: str, module: str, *, is_package: bool = False) -> Iterator[str]:
    """The dotted names that ``source`` imports, as absolute names.

    ``from a import b`` gives ``a.b``, whether b is a module or not. ``import_module("a.b")`` and
    ``__import__("a.b")`` count too.
    """
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import():
                yield from (alias.name for alias in node.names)
            case ast.ImportFrom():
                base = node.module or ""
                if node.level:
                    parents = module.split(".")
                    parents = parents[: len(parents) - node.level + is_package]
                    base = ".".join([*parents, base] if base else parents)
                yield from (f"{base}.{alias.name}" for alias in node.names)
            case ast.Call(
                func=ast.Attribute(attr="import_module")
                | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield name


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def layer_of(name: str, known_modules: Collection[str]) -> str:
    """The layer that importing ``name`` reaches. A name that is no module is an attribute."""
    while name != PACKAGE and name not in known_modules:
        name = name.rpartition(".")[0]
    return name.removeprefix(PACKAGE).removeprefix(".").partition(".")[0]


def violations(
    module: str, source: str, known_modules: Collection[str], *, is_package: bool = False
) -> list[str]:
    """What is wrong with the imports of ``module``, one sentence each; empty when nothing is."""
    found = []
    layer = layer_of(module, known_modules)
    if layer not in ALLOWED:
        return [
            f"{module}: its layer {layer!r} is not in the table ALLOWED of {Path(__file__).name}; "
            "add a row with the layers that it may import"
        ]
    for name in sorted(set(imported_names(source, module, is_package=is_package))):
        if is_within(name, PACKAGE):
            target = layer_of(name, known_modules)
            if target != layer and target not in ALLOWED[layer]:
                allowed = ", ".join(ALLOWED[layer]) or "nothing of the package"
                found.append(f"{module} imports {name}; {layer!r} may import {allowed}")
        elif is_within(name, "torch._dynamo") and any(
            is_within(module, f"{PACKAGE}.{plain}") for plain in WITHOUT_DYNAMO
        ):
            found.append(f"{module} imports {name}; it must work without torch._dynamo")
    return found


def folder_imports(source: str) -> list[str]:
    """The imports that name a folder of the repository instead of the package it is."""
    folders = set(PACKAGE_DIRS.values())
    return [
        name
        for name in imported_names(source, module="any.module")
        if name.partition(".")[0] in folders
    ]


def python_files() -> list[Path]:
    """Every Python file of the repository, outside what is built and what is hidden."""
    skipped = {"build", "dist", "__pycache__"}
    return [
        path
        for path in sorted(ROOT.rglob("*.py"))
        if not any(part in skipped or part.startswith(".") for part in path.relative_to(ROOT).parts)
    ]


def test_the_direction_of_dependence() -> None:
    known = modules()
    assert f"{PACKAGE}.errors" in known and f"{PACKAGE}.kernels" in known
    found = [
        sentence
        for module, path in known.items()
        for sentence in violations(
            module, path.read_text(), known, is_package=path.name == "__init__.py"
        )
    ]
    assert not found, "\n".join(found)


def test_the_table_names_only_its_own_layers() -> None:
    assert {target for allowed in ALLOWED.values() for target in allowed} <= set(ALLOWED)


def test_no_file_imports_a_folder_by_its_name() -> None:
    files = python_files()
    assert Path(__file__) in files
    found = [f"{path}: {name}" for path in files for name in folder_imports(path.read_text())]
    assert not found, "\n".join(found)


KNOWN: Final = (
    "sage_compiler",
    "sage_compiler.errors",
    "sage_compiler.precision",
    "sage_compiler.config",
    "sage_compiler.ops",
    "sage_compiler.kernels",
    "sage_compiler.kernels.registry",
    "sage_compiler.passes",
    "sage_compiler.passes.site",
    "sage_compiler.stray",
)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("sage_compiler.precision", "from sage_compiler.errors import SageError"),
        ("sage_compiler.kernels.registry", "from sage_compiler import precision"),
        ("sage_compiler.kernels", "from sage_compiler.kernels import registry"),
        ("sage_compiler.ops", "from sage_compiler.kernels import registry"),
        ("sage_compiler.passes.site", "import torch.fx\nimport torch._dynamic_name"),
        ("sage_compiler.ops", "import torch._dynamo"),
        ("sage_compiler", "from sage_compiler.ops import attention"),
    ],
)
def test_allowed_imports_pass(module: str, source: str) -> None:
    assert violations(module, source, KNOWN) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("sage_compiler.errors", "from sage_compiler import precision"),
        ("sage_compiler.kernels.registry", "import sage_compiler.ops"),
        ("sage_compiler.passes.site", "from sage_compiler.kernels import registry"),
        ("sage_compiler.passes.site", "from sage_compiler.kernels.registry import choose"),
        ("sage_compiler.passes.site", "def late():\n    from sage_compiler import ops"),
        ("sage_compiler.passes.site", "if TYPE_CHECKING:\n    import sage_compiler.ops"),
        ("sage_compiler.passes.site", "from ..kernels import registry"),
        ("sage_compiler.passes.site", "from .. import ops"),
        ("sage_compiler.passes.site", "importlib.import_module('sage_compiler.ops')"),
        ("sage_compiler.ops", "from sage_compiler import attention"),
        ("sage_compiler.ops", "import sage_compiler"),
        ("sage_compiler.config", "import torch._dynamo"),
        ("sage_compiler.config", "from torch import _dynamo"),
        ("sage_compiler.passes.site", "from torch._dynamo.utils import counters"),
    ],
)
def test_forbidden_imports_are_reported(module: str, source: str) -> None:
    (sentence,) = violations(module, source, KNOWN)
    assert sentence.startswith(f"{module} imports ")


def test_relative_imports_of_a_package_are_resolved() -> None:
    (sentence,) = violations("sage_compiler.passes", "from ..ops import x", KNOWN, is_package=True)
    assert "imports sage_compiler.ops.x" in sentence
    assert violations("sage_compiler.passes", "from .site import x", KNOWN, is_package=True) == []


def test_a_module_without_a_row_is_reported() -> None:
    (sentence,) = violations("sage_compiler.stray", "", KNOWN)
    assert "'stray' is not in the table" in sentence


@pytest.mark.parametrize(
    "source",
    ["import compiler", "import passes.site", "from compiler.kernels import registry"],
)
def test_an_import_of_a_folder_is_reported(source: str) -> None:
    assert len(folder_imports(source)) == 1
    assert folder_imports("import torch.compiler\nfrom sage_compiler import passes") == []


def test_importing_the_package_leaves_optional_packages_alone() -> None:
    optional = {"jinja2", "transformers", "onnx", "onnxruntime", "onnxscript", "matplotlib"}
    program = f"import sys, sage_compiler; print(sorted({optional} & set(sys.modules)))"
    # -P: without the working directory on the path, as in a program of a user's
    run = [sys.executable, "-P", "-c", program]
    result = subprocess.run(run, capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"


def test_importing_the_package_starts_no_process() -> None:
    # A compiler, say: the native library is built when the package is installed, or never.
    starts = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork")
    program = (
        "import sys; started = []\n"
        f"sys.addaudithook(lambda event, _: event in {starts} and started.append(event))\n"
        "import sage_compiler, sage_compiler.kernels.cpu; print(started)"
    )
    run = [sys.executable, "-P", "-c", program]
    result = subprocess.run(run, capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"
