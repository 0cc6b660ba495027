"""JSON that may come from anywhere: bounded, typed, and every complaint says where."""

from __future__ import annotations

import json
from collections.abc import Iterator
from math import isfinite
from pathlib import Path
from typing import Any, Final

from sage_compiler import files
from sage_compiler.errors import PolicyError

MOST_BYTES: Final = 64 << 20
MOST: Final = 1 << 53  # of an integer: from there on, floats skip some
_MISSING: Final = object()


def load_json(path: Path) -> object:
    """``parse_json`` of a file, which has a greatest size.

    Raises:
        PolicyError: it cannot be read, or is no such JSON.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: no name of a file
        raise PolicyError(f"cannot be read: {getattr(error, 'strerror', error)}") from None
    if len(text) > MOST_BYTES:
        raise PolicyError(f"larger than {MOST_BYTES} bytes")
    return parse_json(text)


def parse_json(text: bytes) -> object:
    """Parse strictly: UTF-8, no NaN, no duplicate keys, no depth beyond all bounds.

    Raises:
        PolicyError: it is no such JSON.
    """
    try:
        data = json.loads(
            text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant
        )
        # Escapes can spell half of a surrogate pair, which could be neither printed nor saved.
        json.dumps(data, ensure_ascii=False).encode("utf-8")
        return data
    except PolicyError:
        raise
    except (ValueError, RecursionError) as error:
        raise PolicyError(f"not JSON: {error}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise PolicyError(f"the key {_kind(key)} is there twice")
        found[key] = value
    return found


def _no_constant(name: str) -> None:
    raise PolicyError(f"{name} is not a number of JSON")


def write_json(path: Path, data: object) -> None:
    """Write indented JSON; the file appears whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    files.write(path, text.encode())


class Reader:
    """Typed access to an object of parsed JSON; what nobody has read is an error in ``done``."""

    def __init__(self, data: object, where: str = "") -> None:
        """Raises PolicyError: it is no object."""
        if not isinstance(data, dict):
            raise PolicyError(f"{where or 'the file'} is {_kind(data)}; it must be an object")
        for key in data:
            _check_printable(key, f"a key of {where or 'the file'}")
        self._data: dict[str, Any] = data
        self._where = where
        self._read: set[str] = set()

    def _place(self, key: str) -> str:
        return f"{self._where}.{key}" if self._where else key

    def _get(self, key: str, default: object = _MISSING) -> Any:
        self._read.add(key)
        if key in self._data:
            return self._data[key]
        if default is _MISSING:
            raise PolicyError(f"{self._place(key)} is missing")
        return default

    def _typed(self, key: str, kind: type, what: str, default: object = _MISSING) -> Any:
        value = self._get(key, default)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise PolicyError(f"{self._place(key)} is {_kind(value)}; it must be {what}")
        if isinstance(value, str):
            _check_printable(value, self._place(key))
        return value

    def text(self, key: str, default: object = _MISSING) -> str:
        """A string."""
        return str(self._typed(key, str, "a string", default))

    def integer(self, key: str, default: object = _MISSING) -> int:
        """An integer of at least 0, and not beyond ``MOST``."""
        value = int(self._typed(key, int, "an integer", default))
        if not 0 <= value <= MOST:
            raise PolicyError(
                f"{self._place(key)} is {_kind(value)}; it must be at least 0, at most {MOST}"
            )
        return value

    def flag(self, key: str) -> bool:
        """True or false; false when it is missing."""
        return bool(self._typed(key, bool, "true or false", False))

    def number(self, key: str, none: float | None = None) -> float:
        """A finite number; ``none``, if given, is what null means."""
        value = self._get(key)
        if value is None and none is not None:
            return none
        return _number(value, self._place(key))

    def numbers(self, key: str) -> dict[str, float]:
        """An object of finite numbers; empty when it is missing."""
        given = self._typed(key, dict, "an object", {})
        return {name: _number(each, f"{self._place(key)}.{name}") for name, each in given.items()}

    def texts(self, key: str) -> list[str]:
        """A list of strings; empty when it is missing."""
        return _texts(self._typed(key, list, "a list of strings", []), self._place(key))

    def text_or_texts(self, key: str) -> list[str]:
        """A string, or a list of at least one."""
        value = self._get(key)
        found = [value] if isinstance(value, str) else value
        if not isinstance(found, list) or not found:
            raise PolicyError(
                f"{self._place(key)} is {_kind(value)}; it must be a string or a list of strings"
            )
        return _texts(found, self._place(key))

    def named_texts(self, key: str) -> dict[str, str]:
        """An object of strings; empty when it is missing."""
        given = self._typed(key, dict, "an object", {})
        _texts([*given, *given.values()], self._place(key))
        return dict(given)

    def has(self, key: str) -> bool:
        """Whether there is such a member, be it null."""
        return key in self._data

    def child(self, key: str, optional: bool = False) -> Any:
        """An object, as a Reader; optional: None when it is null or missing."""
        value = self._get(key, None if optional else {})
        if value is None and optional:
            return None
        return Reader(value, self._place(key))

    def children(self, key: str) -> list[Reader]:
        """A list of objects; empty when it is missing."""
        given = self._typed(key, list, "a list", [])
        return [Reader(each, f"{self._place(key)}[{at}]") for at, each in enumerate(given)]

    def items(self, key: str) -> Iterator[tuple[str, Reader]]:
        """The members of an object of objects."""
        return Reader(self._get(key), self._place(key)).all_items()

    def all_items(self) -> Iterator[tuple[str, Reader]]:
        """All members of this object, which are objects."""
        for key, value in self._data.items():
            self._read.add(key)
            yield key, Reader(value, self._place(key))

    def done(self) -> None:
        """Raises PolicyError when there are members that nobody has read."""
        unknown = [key for key in self._data if key not in self._read]
        if unknown:
            known = ", ".join(sorted(self._read))
            raise PolicyError(f"{self._place(unknown[0])} is unknown; known there: {known}")


def _number(value: object, place: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not _is_finite(value):
        raise PolicyError(f"{place} is {_kind(value)}; it must be a finite number")
    return float(value)


def _is_finite(value: int | float) -> bool:
    try:
        return isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def _texts(values: list[Any], place: str) -> list[str]:
    for value in values:
        if not isinstance(value, str):
            raise PolicyError(f"{place} holds {_kind(value)}; it must hold strings")
        _check_printable(value, place)
    return values


def _check_printable(text: object, place: str) -> None:
    """Raises PolicyError: text with line breaks or terminal codes, which reports would print."""
    if not isinstance(text, str) or not text.isprintable():
        raise PolicyError(f"{place} is {ascii(text)[:80]}; it must be printable text")


def _kind(value: object) -> str:
    """A value in a few words, whatever its size."""
    match value:
        case None:
            return "null"
        case bool() | int() | float():
            text = repr(value)
            return text if len(text) < 40 else "a number beyond all bounds"
        case str():
            return repr(value if len(value) < 80 else f"{value[:80]}...")
        case list():
            return "a list"
        case _:
            return "an object"
