"""What is noted beside a kernel that is kept in a file, and checked before it is used."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from sage_compiler.kernels.cuda.binary import Binary, Resources
from sage_compiler.kernels.cuda.spec import KernelSpec


@dataclass(frozen=True, slots=True)
class Entry:
    """One kept kernel.

    Attributes:
        symbol, arch: of its spec.
        compiler: the identity of what compiled it.
        sha256: of its image, in hexadecimal.
        source_sha256: of its source.
        size: of its image in bytes.
    """

    symbol: str
    arch: str
    compiler: str
    sha256: str
    source_sha256: str
    size: int
    resources: Resources

    @classmethod
    def of(cls, spec: KernelSpec, source: str, compiler: str, binary: Binary) -> Entry:
        """The entry of a kernel that was just compiled."""
        return cls(
            symbol=spec.symbol,
            arch=spec.arch,
            compiler=compiler,
            sha256=digest(binary.image),
            source_sha256=digest(source.encode()),
            size=len(binary.image),
            resources=binary.resources,
        )

    @classmethod
    def parse(cls, data: object) -> Entry:
        """The entry that ``to_dict`` wrote.

        Raises:
            ValueError: something else wrote it, or a part is missing.
        """
        values = dict(_members(data, Entry))
        resources = _members(values.pop("resources"), Resources)
        return cls(**values, resources=Resources(**resources))

    def to_dict(self) -> dict[str, Any]:
        """Its members, as JSON has them."""
        return asdict(self)

    def check(self, image: bytes) -> None:
        """Raises ValueError when ``image`` is not the one that was kept."""
        if len(image) != self.size:
            raise ValueError(f"{len(image)} bytes, not {self.size}")
        if digest(image) != self.sha256:
            raise ValueError("its checksum differs")


def digest(content: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def _members(data: object, kind: type[Entry] | type[Resources]) -> Mapping[str, Any]:
    """``data`` when it has the fields of ``kind``, each with a value of its type."""
    types = {"int": int, "str": str, "Resources": dict}
    if not isinstance(data, dict):
        raise ValueError(f"{type(data).__name__} in place of {kind.__name__}")
    wanted = {field.name: types[str(field.type)] for field in fields(kind)}
    if data.keys() != wanted.keys():
        raise ValueError(f"{kind.__name__} with {sorted(data)}, not {sorted(wanted)}")
    for name, needed in wanted.items():
        if type(data[name]) is not needed:
            raise ValueError(f"{name} = {data[name]!r}")
    return data
