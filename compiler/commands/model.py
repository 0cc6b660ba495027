"""Models on the command line: FILE.py:FUNCTION or MODULE:FUNCTION."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from sage_compiler.errors import UsageError

_FORM = "FILE.py:FUNCTION or MODULE:FUNCTION"


@dataclass(frozen=True, slots=True)
class Built:
    """A model, and what it is called with."""

    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def named_arguments(self) -> dict[str, Any]:
        """All arguments by the names that the model has for them, in its order.

        Raises:
            UsageError: an argument without a name.
        """
        signature = inspect.signature(getattr(self.model, "forward", self.model))
        try:
            bound = signature.bind(*self.args, **self.kwargs)
        except TypeError as error:
            raise UsageError(f"the model does not take these arguments: {error}") from None
        named: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            match signature.parameters[name].kind:
                case inspect.Parameter.VAR_KEYWORD:
                    named |= value
                case inspect.Parameter.VAR_POSITIONAL | inspect.Parameter.POSITIONAL_ONLY:
                    raise UsageError(f"the model takes {name!r} by position alone")
                case _:
                    named[name] = value
        return named


@dataclass(frozen=True, slots=True)
class Source:
    """The module that a command line names, and the function of it that builds the model."""

    place: str
    module: ModuleType
    attribute: str

    @classmethod
    def find(cls, name: str) -> Source:
        """Import what ``name`` names.

        Raises:
            UsageError: no such file, module or function. What the user's code raises propagates.
        """
        place, separator, attribute = name.rpartition(":")
        if not separator or not place or not attribute:
            raise UsageError(f"{name!r} is not of the form {_FORM}")
        is_file = place.endswith(".py") or os.sep in place or Path(place).is_file()
        source = cls(place, _load_file(place) if is_file else _load_module(place), attribute)
        source.function(attribute)
        return source

    def function(self, attribute: str) -> Callable[[], Any]:
        """A function of the module that takes no argument.

        Raises:
            UsageError: there is none of this name, or it needs arguments.
        """
        function = getattr(self.module, attribute, None)
        if not callable(function):
            raise UsageError(f"{self.place!r} has no function {attribute!r}")
        _require_no_arguments(function, attribute)
        found: Callable[[], Any] = function
        return found

    def build(self) -> Built:
        """Call the function.

        Raises:
            UsageError: a result of another form. What the function raises propagates.
        """
        made = self.function(self.attribute)()
        if (
            not isinstance(made, tuple)
            or len(made) not in (2, 3)
            or not callable(made[0])
            or not isinstance(made[1], tuple)
            or not (len(made) == 2 or isinstance(made[2], Mapping))
        ):
            raise UsageError(
                f"{self.attribute}() returned {type(made).__name__}; it must return (model, args) "
                "or (model, args, kwargs), args a tuple and kwargs a dict"
            )
        return Built(made[0], made[1], made[2] if len(made) == 3 else {})


def _require_no_arguments(function: Callable[..., Any], name: str) -> None:
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:
        return  # of a builtin that does not say what it takes
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [
        each.name
        for each in parameters
        if each.default is inspect.Parameter.empty and each.kind not in variadic
    ]
    if needed:
        raise UsageError(f"{name}() needs arguments ({', '.join(needed)}); it must take none")


def build(name: str) -> Built:
    """Import what ``name`` names and build the model; raises UsageError as ``Source``."""
    return Source.find(name).build()


def _load_file(path: str) -> ModuleType:
    file = Path(path)
    if not file.is_file():
        raise UsageError(f"there is no file {path!r}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path!r} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    # As for a program: it imports its neighbours, and pickle and dataclasses find it by name.
    sys.path.insert(0, str(file.resolve().parent))
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return module


def _load_module(name: str) -> ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise UsageError(f"{name!r} is neither a file nor the name of a module")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # Only what was named here: a module that the user's code misses is the user's error.
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise UsageError(
            f"there is no module {error.name!r}; the current directory is searched, and what is "
            "installed"
        ) from None
