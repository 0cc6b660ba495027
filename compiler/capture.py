"""Run a model with every captured graph handed to a function of ours, and nothing compiled."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType, MethodType
from typing import Any, Final, TypeAlias

import torch
from torch import fx, nn
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list, reset_code
from torch._dynamo import config as dynamo_config
from torch._dynamo.convert_frame import input_codes
from torch._dynamo.eval_frame import OptimizedModule, innermost_fn
from torch._dynamo.exc import BackendCompilerFailed

from sage_compiler.errors import SageError
from sage_compiler.passes.identity import layer_of, layer_of_module, name_code

# From a captured graph and its example inputs, what runs in its place.
Backend: TypeAlias = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]

_numbers: Final = itertools.count()


@contextlib.contextmanager
def captured(model: Callable[..., Any], backend: Backend) -> Iterator[Callable[..., Any]]:
    """A function that calls ``model``, compiled already or not, with its graphs run by ``backend``.

    Other compilations of the model, and of its parts, stay and are not used meanwhile; where it has
    graph breaks, they may have to compile once more (see ``_forget``). What ``backend`` raises of
    ours comes out as it was raised.
    """
    written = innermost_fn(getattr(model, "_orig_mod", model))
    compiled = torch.compile(_with_own_code(written), backend=backend)

    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return compiled(*args, **kwargs)
        except BackendCompilerFailed as error:
            if isinstance(error.inner_exception, SageError):
                raise error.inner_exception from None
            raise

    try:
        with _uncompiled(written):
            yield run
    finally:
        _forget(backend)


def _with_own_code(written: Callable[..., Any]) -> Callable[..., Any]:
    """A function that does the same, with code of its own, since Dynamo caches by code object."""
    function = getattr(written, "__func__", written)
    if isinstance(function, FunctionType):  # its own code, so that layers have the same names
        twin = FunctionType(
            function.__code__.replace(co_name=f"{function.__name__}_{next(_numbers)}"),
            function.__globals__,
            function.__name__,
            function.__defaults__,
            function.__closure__,
        )
        twin.__kwdefaults__ = function.__kwdefaults__
        name_code(twin.__code__, layer_of(function.__code__) or "")
        return MethodType(twin, written.__self__) if isinstance(written, MethodType) else twin

    def call(*args: Any, **kwargs: Any) -> Any:
        return written(*args, **kwargs)

    call.__code__ = call.__code__.replace(co_name=f"captured_{next(_numbers)}")
    name_code(call.__code__, layer_of_module(written))  # as if it were the model's own
    return call


@contextlib.contextmanager
def _uncompiled(written: Callable[..., Any]) -> Iterator[None]:
    """Take the compilations of a module's parts away for a while.

    Behind a graph break they would run by themselves, out of the backend's sight.
    """
    owner = getattr(written, "__self__", written)
    with contextlib.ExitStack() as undo:
        for module in list(owner.modules()) if isinstance(owner, nn.Module) else ():
            own = module._compiled_call_impl
            if own is not None:
                undo.callback(setattr, module, "_compiled_call_impl", own)
                module._compiled_call_impl = None
            for name, child in list(module._modules.items()):
                if isinstance(child, OptimizedModule):
                    undo.callback(module._modules.__setitem__, name, child)
                    module._modules[name] = child._orig_mod
        yield


def _forget(backend: Backend) -> None:
    """Drop what Dynamo has cached for a backend.

    After a graph break the model's own functions are compiled too. Left in place, the entries
    would count toward the limit of recompilations, and the model would silently run in eager.
    Entries can only be dropped all together: where others have compiled the same code, ours stay
    until they take half of the limit, and then the others compile once more.
    """
    for reference in list(input_codes.seen):
        code = reference()
        if code is None:
            continue
        entries = _debug_get_cache_entry_list(code)
        ours = [
            entry
            for entry in entries
            if getattr(entry.backend, "compiler_fn", entry.backend) is backend
        ]
        alone = len(ours) == len(entries)
        if ours and (alone or 2 * len(entries) >= dynamo_config.recompile_limit):
            reset_code(code)
