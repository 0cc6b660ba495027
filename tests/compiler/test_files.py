"""Files that appear whole or not at all."""

import os
from pathlib import Path

import pytest

from sage_compiler import files


def test_a_file_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no")

    file = tmp_path / "page"
    files.write(file, b"old")
    with monkeypatch.context() as broken:
        broken.setattr(os, "replace", refuse)
        with pytest.raises(OSError, match="no"):
            files.write(file, b"new")
    assert file.read_bytes() == b"old"
    files.write(str(file), b"new")
    assert file.read_bytes() == b"new" and list(tmp_path.iterdir()) == [file]


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("target")
    for data in (b"new", b"newer"):
        files.write(tmp_path / "link", data)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_bytes() == data


def test_a_device_stays_one() -> None:
    files.write(os.devnull, b"gone")
    assert not Path(os.devnull).is_file()
