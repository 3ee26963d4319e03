"""Atomic file writes, and safe reads."""

import hashlib

import pytest
from conftest import NOT_FILES, replace_by

from folio import files


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_replacing_creates_the_parent_folder_and_keeps_the_suffix(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with files.replacing(path) as temporary:
        assert temporary.parent == path.parent and temporary.suffix == ".txt"
        temporary.write_text("new")
    assert contents(path.parent) == {"file.txt": b"new"}


def test_replacing_leaves_only_the_old_file_if_it_is_interrupted(tmp_path):
    path = tmp_path / "file.txt"
    files.write_text(path, "old")
    with pytest.raises(KeyboardInterrupt), files.replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert contents(tmp_path) == {"file.txt": b"old"}


def test_remove_folder_accepts_a_missing_folder(tmp_path):
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    for _ in range(2):
        files.remove_folder(tmp_path / "folder")
        assert list(tmp_path.iterdir()) == []


def test_read_limits_the_size_of_a_file(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    assert files.read(tmp_path / "file", max_bytes=5) == b"12345"
    with pytest.raises(OSError, match="it is larger than 4 bytes"):
        files.read(tmp_path / "file", max_bytes=4)


@pytest.mark.parametrize("kind", NOT_FILES)
def test_read_raises_oserror_instead_of_waiting_for_a_pipe_or_device(tmp_path, kind):
    (tmp_path / "file").touch()
    replace_by(tmp_path / "file", kind)
    with pytest.raises(OSError, match=r"folder|not a regular file|symbolic links"):
        files.read(tmp_path / "file")


def test_sha256_is_that_of_the_content(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert files.sha256(tmp_path / "file") == hashlib.sha256(b"abc").hexdigest()
