"""Which files of a folder are its text, and what tools have left there."""

import os
from pathlib import Path

import pytest

from folio.corpus.folder import find_texts

LEFT_BEHIND = [
    ".ipynb_checkpoints/b-checkpoint.txt",
    "deep/.ipynb_checkpoints/b-checkpoint.txt",
    "__MACOSX/._b.txt",
    "__MACOSX/set/b.txt",
    "._b.txt",
    ".b.txt",
    ".txt",
    ".git/info/b.txt",
    ".Trash-1000/files/b.txt",
    ".stversions/b~20240101-120000.txt",
    "$RECYCLE.BIN/S-1-5/$RABC123.txt",
    "lost+found/b.txt",
    "@eaDir/b.txt",
    "#recycle/b.txt",
    "__pycache__/b.txt",
    "~$b.txt",
    "b~.txt",
    "b.bak.txt",
    "b.BAK.TXT",
    "b.swp.txt",
    "b.tmp.txt",
    "b.sync-conflict-20240101-120000-ABCDEFG.txt",
    "b (Anna's conflicted copy 2024-01-01).txt",
]
OTHER_FILES = ["b.txt~", "b.txt.bak", ".b.txt.swp", "#b.txt#", "Thumbs.db", ".DS_Store", "b.md"]
TEXTS = ["b.txt", "c.TXT", "deep/down/b.txt", "b copy.txt", "b (1).txt", "a.old.txt", "tmp.txt"]
TEXTS += [
    "~.d/b.txt",
    "bak.txt",
    "b.c.txt",
    "#b.txt",
    "b-checkpoint.txt",
    "lost/found.txt",
    "ü.txt",
]


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def found(folder: Path) -> tuple[list[str], list[str]]:
    texts, left_out = find_texts(folder)
    return [path.relative_to(folder).as_posix() for path in texts], left_out


@pytest.mark.parametrize("name", LEFT_BEHIND)
def test_file_that_a_tool_left_behind_is_left_out(tmp_path, name):
    write(tmp_path, "a.txt", name)
    assert found(tmp_path) == (["a.txt"], [name])


def test_all_other_txt_files_are_found_in_the_order_of_their_paths(tmp_path):
    write(tmp_path, *TEXTS, *LEFT_BEHIND, *OTHER_FILES)
    texts, left_out = found(tmp_path)
    assert texts == sorted(TEXTS)
    assert left_out == sorted(LEFT_BEHIND)


def test_data_of_other_forms_is_left_out(tmp_path):
    unread = ["a.JSON", "a.csv", "a.csv.gz", "a.jsonl.bz2", "a.tar.gz", "deep/a.txt.xz", "a.zip"]
    write(tmp_path, "a.txt", "a.ndjson", ".a.csv", "README.md", "LICENSE", "a.png", *unread)
    assert found(tmp_path) == (["a.ndjson", "a.txt"], sorted(unread))


def test_hidden_folder_itself_may_be_the_corpus(tmp_path):
    write(tmp_path / ".hidden", "a.txt")
    assert found(tmp_path / ".hidden") == (["a.txt"], [])


def test_lock_file_of_emacs_is_left_out(tmp_path):
    write(tmp_path, "a.txt")
    (tmp_path / ".#a.txt").symlink_to("user@host.1234:1700000000")
    assert found(tmp_path) == (["a.txt"], [".#a.txt"])


def test_link_to_a_folder_is_left_out(tmp_path):
    write(tmp_path / "set", "a.txt")
    write(tmp_path / "other", "b.txt")
    (tmp_path / "set" / "link").symlink_to(tmp_path / "other")
    assert found(tmp_path / "set") == (["a.txt"], ["link (a link to a folder)"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list any folder")
def test_folder_that_cannot_be_listed_is_an_error_unless_it_is_left_out(tmp_path):
    write(tmp_path, "a.txt", ".hidden/b.txt")
    (tmp_path / ".hidden").chmod(0)
    assert found(tmp_path)[0] == ["a.txt"]
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(PermissionError) as error:
        find_texts(tmp_path)
    assert error.value.filename == str(tmp_path / "closed")
