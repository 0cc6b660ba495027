"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def write(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file; until all of it is there, what has its name stays as it was.

    Raises:
        OSError: it cannot be written.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        # A device or a pipe takes what it is given; a file must not take its place.
        path.write_bytes(data)
        return
    file = path.resolve()  # what a link leads to is replaced, not the link
    # Opened as any new file, so with the permissions that the user's files have.
    unfinished = file.with_name(f".{secrets.token_hex(8)}")
    try:
        with open(unfinished, "xb") as opened:
            opened.write(data)
        os.replace(unfinished, file)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
