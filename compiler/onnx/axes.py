"""Names of sizes that vary, as the user gives them among ``dynamic_shapes``."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from sage_compiler.errors import InvalidOptionError

LEAST_EXAMPLE: Final = 2  # torch.export takes 0 and 1 for constants


def without_names(dynamic_shapes: Any) -> Any:
    """The same for torch.export, which takes no names."""
    return pytree.tree_map(lambda dim: Dim.DYNAMIC if isinstance(dim, str) else dim, dynamic_shapes)


def named_axes(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic_shapes: Any
) -> Iterator[tuple[Tensor, int, str]]:
    """Each dim of an input tensor that has a name, a string or that of a Dim, and the name."""
    if isinstance(dynamic_shapes, Mapping):
        yield from _walk(_by_name(model, args, kwargs), dynamic_shapes)
    else:
        yield from _walk([*args, *kwargs.values()], dynamic_shapes)


def _by_name(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InvalidOptionError(
            f"the model does not take these args and kwargs: {error}"
        ) from None
    given: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        # As torch.export has it: what **kwargs takes is among the others.
        variadic = signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
        given |= value if variadic else {name: value}
    return given


def check(named: Iterable[tuple[Tensor, int, str]]) -> None:
    """Raises InvalidOptionError for a dim that is not there, or whose example cannot vary."""
    for tensor, dim, name in named:
        shape = tuple(tensor.shape)
        if not 0 <= dim < tensor.dim():
            raise InvalidOptionError(
                f"dynamic_shapes: {name!r} is dim {dim} of an input of shape {shape}; dims are "
                "counted from 0"
            )
        if shape[dim] < LEAST_EXAMPLE:
            raise InvalidOptionError(
                f"dynamic_shapes: {name!r}, dim {dim} of an input of shape {shape}, is "
                f"{shape[dim]} in the example, which torch.export takes for a constant; give an "
                f"example with {LEAST_EXAMPLE} or more"
            )


def names_of_symbols(
    found: Iterable[tuple[str, str]], examples: Mapping[str, int]
) -> dict[str, str]:
    """The name of each symbol.

    Args:
        found: pairs of a symbol and a name that the user has for it; the first name counts.
        examples: the size in the example of every symbol of the model.

    Raises:
        InvalidOptionError: one name for two sizes, which runtimes would take for equal. Sizes that
            are equal in the example may share a name: the user knows more than the model.
    """
    names: dict[str, str] = {}
    for symbol, name in found:
        names.setdefault(symbol, name)
    owners = {symbol: symbol for symbol in examples if symbol not in names}
    for symbol, name in names.items():
        other = owners.setdefault(name, symbol)
        if examples[other] != examples[symbol]:
            raise InvalidOptionError(
                f"dynamic_shapes: the name {name!r} is of two sizes, which are {examples[other]} "
                f"and {examples[symbol]} in the example; give each a name of its own"
            )
    return names


def _walk(value: Any, shapes: Any) -> Iterator[tuple[Tensor, int, str]]:
    if isinstance(value, Tensor):
        dims = shapes.items() if isinstance(shapes, Mapping) else enumerate(shapes or ())
        for dim, given in dims:
            name = given.__name__ if isinstance(given, Dim) else given
            if isinstance(name, str):
                yield value, dim, name
    elif isinstance(value, Mapping) and isinstance(shapes, Mapping):
        for key in value:
            if key in shapes:
                yield from _walk(value[key], shapes[key])
    elif isinstance(value, Sequence) and isinstance(shapes, Sequence):
        for each, its_shapes in zip(value, shapes, strict=False):
            yield from _walk(each, its_shapes)
