"""How many sites of each case are rewritten and kept: one table, asserted exactly.

``expectations.txt`` has a row for each architecture and implementation and a column for each of
the circumstances; a cell is ``rewritten+kept``. After a change of the passes,
``python -m benchmarks.zoo --expect`` writes it anew: read the difference before committing it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final, TypeAlias

from tests.zoo.harness import CIRCUMSTANCES, Case, cases_of
from tests.zoo.registry import ARCHITECTURES

PATH: Final = Path(__file__).with_name("expectations.txt")
NO_CASE: Final = "-"

# (architecture, implementation, circumstances)
Key: TypeAlias = tuple[str, str, str]
# Numbers of rewritten and of kept sites.
Counts: TypeAlias = tuple[int, int]


def key_of(case: Case) -> Key:
    """The place of a case in the table."""
    return case.architecture.name, case.implementation, case.circumstances


def read(path: Path = PATH) -> dict[Key, Counts]:
    """The table as it is in the file.

    Raises:
        ValueError: a malformed row.
    """
    table: dict[Key, Counts] = {}
    for line in path.read_text(encoding="utf-8").splitlines()[1:]:
        name, implementation, *cells = (cell.strip() for cell in line.split("|"))
        for circumstances, cell in zip(CIRCUMSTANCES, cells, strict=True):
            if cell != NO_CASE:
                rewritten, kept = cell.split("+")
                table[name, implementation, circumstances] = int(rewritten), int(kept)
    return table


def write(table: Mapping[Key, Counts], path: Path = PATH) -> None:
    """Write the table, in the order of the zoo; what the zoo no longer has is dropped."""
    rows = [["architecture", "implementation", *CIRCUMSTANCES]]
    for architecture in ARCHITECTURES:
        for implementation in architecture.implementations:
            counts = [
                table.get((architecture.name, implementation, circumstances))
                for circumstances in CIRCUMSTANCES
            ]
            cells = [NO_CASE if found is None else f"{found[0]}+{found[1]}" for found in counts]
            rows.append([architecture.name, implementation, *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def expected_keys() -> set[Key]:
    """Every case of the zoo, whether this environment can run it or not."""
    return {key_of(case) for architecture in ARCHITECTURES for case in cases_of(architecture)}
