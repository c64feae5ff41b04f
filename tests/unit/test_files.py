"""Files: umask, links, permissions, places tried first; text that cannot command a terminal."""

import os
import stat

import pytest

from flashomni.util.files import check_file, check_folder, published, write_bytes
from flashomni.util.words import clean


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_file_respects_the_umask(tmp_path):
    """Nothing is readable that the user did not want readable."""
    old = os.umask(0o077)
    try:
        path = write_bytes(tmp_path / "a", b"1")
    finally:
        os.umask(old)
    assert mode(path) == 0o600


def test_an_old_file_keeps_its_permissions(tmp_path):
    """A private file stays private."""
    path = write_bytes(tmp_path / "a", b"1")
    path.chmod(0o640)
    write_bytes(path, b"2")
    assert mode(path) == 0o640 and path.read_bytes() == b"2"


def test_a_link_stays_a_link(tmp_path):
    """Its target is written."""
    (tmp_path / "target").write_bytes(b"1")
    (tmp_path / "link").symlink_to("target")
    write_bytes(tmp_path / "link", b"2")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_bytes() == b"2"


def test_a_long_name_can_be_written(tmp_path):
    """As long as the system allows."""
    assert write_bytes(tmp_path / ("x" * 255), b"1").read_bytes() == b"1"


def test_folders_are_tried_without_a_trace(tmp_path):
    """A file, a parent that is a file and a NUL are refused; what was made goes away."""
    check_folder("out", tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    for bad in (tmp_path / "file", tmp_path / "file" / "b", f"{tmp_path}/a\0b"):
        with pytest.raises(ValueError, match="out must be a folder that can be written"):
            check_folder("out", bad)
    with pytest.raises(ValueError, match="csv must be a file that can be written"):
        check_file("csv", tmp_path)


def test_a_run_is_published_whole_or_not_at_all(tmp_path):
    """A failure leaves the earlier run; a success leaves nothing of it."""
    (tmp_path / "old.webp").write_text("old")
    (tmp_path / "mine.txt").write_text("kept")
    names = frozenset({"old.webp", "new.png"})
    with pytest.raises(OSError, match="full"), published(tmp_path, names) as stage:
        (stage / "new.png").write_text("new")
        raise OSError("full")
    assert {path.name for path in tmp_path.iterdir()} == {"old.webp", "mine.txt"}
    with published(tmp_path, names) as stage:
        (stage / "new.png").write_text("new")
    assert {path.name for path in tmp_path.iterdir()} == {"new.png", "mine.txt"}


def test_text_cannot_command_a_terminal():
    """Escapes are shown; scripts and emoji stay."""
    assert clean("\x1b[31m\a\u202e\udcff") == "\\x1b[31m\\x07\\u202e\\udcff"
    assert clean("שלום 🎉 [/red]\n") == "שלום 🎉 [/red]\n"
