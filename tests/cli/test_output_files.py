"""Files that commands write: refused before the work where they cannot be written, and whole or not there at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from normquant.cli.output_files import check_writable, replacing, write_atomically


def test_the_file_is_replaced_and_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text("old")
    path.chmod(0o640)
    write_atomically(path, "new é")
    assert path.read_text(encoding="utf-8") == "new é" and path.stat().st_mode & 0o777 == 0o640
    assert os.listdir(tmp_path) == ["page.html"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "page.html"
    path.write_text("old")
    with pytest.raises(type(error)), replacing(path) as part:
        part.write_text("hal")
        raise error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["page.html"]


def test_the_part_is_beside_the_file_and_has_its_suffix(tmp_path: Path) -> None:
    with replacing(tmp_path / "a.b.svg") as part:
        assert part.parent == tmp_path and part.suffix == ".svg" and part.name != "a.b.svg"
        part.write_text("drawn")
    assert (tmp_path / "a.b.svg").read_text() == "drawn"


def test_a_symbolic_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_atomically(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "text"


def test_a_device_is_not_replaced() -> None:
    check_writable(Path(os.devnull))
    write_atomically(Path(os.devnull), "text")
    assert not Path(os.devnull).is_file()


def test_paths_that_can_be_written_pass(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("old")
    check_writable(tmp_path / "old", None, tmp_path / "new")
    assert os.listdir(tmp_path) == ["old"]


@pytest.mark.parametrize(("read_only", "place"), [("old", "old"), (".", "")])
def test_what_is_read_only_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_only: str, place: str
) -> None:
    (tmp_path / "old").write_text("old")
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / read_only)  # root may write everywhere
    with pytest.raises(PermissionError, match="is read-only, so") as raised:
        check_writable(tmp_path / "old")
    assert str(raised.value).startswith(str(tmp_path / place))
