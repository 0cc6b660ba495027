"""Optional help before compiling: for every layer a graph of its own, and its full name."""

from __future__ import annotations

import functools
import inspect
from abc import ABCMeta
from collections.abc import Callable
from types import CellType, FunctionType
from typing import Any, Final, TypeVar

import torch
from torch import fx, nn

from sage_compiler.passes.identity import join, layer_of, name_code

Model = TypeVar("Model", bound=nn.Module)

_NO_FORWARD: Final = nn.Module.forward  # what a ModuleList has


def prepare(model: Model) -> Model:
    """Give each module of a model a ``forward`` of its own, equal to that of its class.

    Dynamo keeps graphs with the code they were captured from, so identical blocks that are
    compiled one by one share one graph: one name, and one precision. With code of its own, each
    block is captured for itself, its attention is named from ``model`` (``blocks.3.attn#0``),
    and no number of blocks reaches Dynamo's limit of recompilations. PyTorch's own modules, such
    as nn.TransformerEncoderLayer or nn.Sequential, can be compiled by themselves at all.

    What the model computes, its state_dict and its hooks stay what they were. The class of a
    module becomes a subclass, of the same name, of the class it was. docs/layers.md says more,
    and what is left alone.

    Args:
        model: the whole model, whose names the layers are to have; compiled already or not.

    Returns:
        ``model`` itself. Preparing it once more changes nothing.

    Raises:
        TypeError: ``model`` is no nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"prepare got {type(model).__name__}; it needs the nn.Module that is to be compiled, "
            "or the one that holds it: torch.compile(sage.prepare(model), backend='sage')"
        )
    for name, module in model.named_modules():
        _prepare(module, join("", name))
    return model


def _prepare(module: nn.Module, layer: str) -> None:
    """Move a module to a class of its own, unless that gains nothing."""
    own = type(module)
    written = _written(own)
    if own is not written:
        forward = vars(own)["forward"]
        patched = forward.__wrapped__ is not written.forward
        if layer_of(forward.__code__) == layer and not patched:
            return
    function = _source(module, written)
    if not isinstance(function, FunctionType):
        return
    forward = functools.update_wrapper(_copy(function, layer), written.forward)
    names = ("__module__", "__qualname__", "__doc__")
    attributes = {name: getattr(written, name) for name in names} | {"forward": forward}
    make: Callable[..., type[nn.Module]] = type(written)
    made = make(written.__name__, (_Prepared, written), attributes)
    object.__setattr__(module, "__class__", made)


class _Prepared:
    """What the classes made here have in common: nobody else is to know them."""

    def __init_subclass__(cls) -> None:
        """Keep the new class from the user's ``__init_subclass__``, which might register it."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle as the class that the module had, which can be found by its name."""
        # Protocol 1 has the class as a mere argument; later ones insist that it is the object's.
        reduced: Any = super().__reduce_ex__(1)
        if isinstance(reduced, str):
            return reduced
        made, arguments, *rest = reduced
        own = type(self)
        made, *plain = (_written(own) if each is own else each for each in (made, *arguments))
        return made, tuple(plain), *rest


def _written(own: type[Any]) -> type[Any]:
    """The class that a module had before it was prepared."""
    first, *others = own.__bases__
    return others[0] if first is _Prepared else own


def _source(module: nn.Module, written: type[nn.Module]) -> Callable[..., Any] | None:
    """The function of which a module gets a copy; None to leave the module alone."""
    if type(written) not in (type, ABCMeta) or "forward" in module.__dict__:
        return None  # somebody else decides what this class or this forward is
    if isinstance(module, (fx.GraphModule, torch.jit.ScriptModule)):
        return None
    if issubclass(written, _Prepared):
        return None  # derived from what was made here: its code is its own already
    forward = written.forward
    if not _is_torchs(module):
        return forward
    # Dynamo captures no code of PyTorch's files but what other code calls.
    attends = any(
        isinstance(each, nn.MultiheadAttention) or not _is_torchs(each) for each in module.modules()
    )
    callable_ = forward.__module__.startswith("torch.nn.modules.") and forward is not _NO_FORWARD
    return _outside_of_torch(forward) if attends and callable_ else None


def _is_torchs(module: nn.Module) -> bool:
    """Whether the forward of a module is PyTorch's own."""
    forward = inspect.getattr_static(type(module), "forward", None)
    return str(getattr(forward, "__module__", "")).startswith("torch.")


def _outside_of_torch(written: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls one of PyTorch's, and is none itself."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return written(self, *args, **kwargs)

    return forward


def _copy(function: FunctionType, layer: str) -> FunctionType:
    """A function that does the same with code of its own; so does what it decorates."""
    closure = function.__closure__ or ()
    inner = function.__dict__.get("__wrapped__")
    if isinstance(inner, FunctionType):
        closure = tuple(
            CellType(_copy(inner, layer)) if _holds(cell, inner) else cell for cell in closure
        )
    code = function.__code__.replace()
    name_code(code, layer)
    copied = FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, closure
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(copied, function)
    return copied


def _holds(cell: CellType, function: FunctionType) -> bool:
    try:
        return cell.cell_contents is function
    except ValueError:  # an empty cell
        return False
