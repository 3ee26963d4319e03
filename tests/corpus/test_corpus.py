"""Reading a corpus: a named one, or the user's own files under data/raw."""

import errno
import os

import pytest

from folio.corpus import corpus
from folio.errors import UserError


@pytest.fixture
def raw(tmp_path):
    folder = tmp_path / "data" / "raw"
    folder.mkdir(parents=True)
    return folder


def error_of(name, root):
    """The one-line error for an unusable corpus."""
    with pytest.raises(UserError) as error:
        corpus.find(name, root)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_named_corpus_can_be_added_as_a_loader(monkeypatch, tmp_path):
    monkeypatch.setitem(corpus.NAMED, "sonnets", lambda: ("Shall I compare thee", 10))
    assert corpus.find("sonnets", tmp_path) == corpus.Corpus("sonnets")
    line = error_of("sonets", tmp_path)
    assert f"neither {' nor '.join(corpus.NAMED)} nor a path" in line
    assert line.endswith("did you mean sonnets?")


@pytest.mark.parametrize(
    ("name", "kind", "compression"),
    [
        *(("a.txt", "txt", ""), ("a.TXT.GZ", "txt", "gz"), ("a.jsonl.zst", "jsonl", "zst")),
        *(("a.parquet", "parquet", ""), ("notes.md", "txt", ""), ("gz", "txt", "")),
        *(("a.ndjson.gz", "jsonl", "gz"), ("a.csv", "txt", "")),
    ],
)
def test_suffix_says_how_a_file_is_read(raw, tmp_path, name, kind, compression):
    (raw / name).write_text("text enough")
    mine = corpus.find(f"data/raw/{name}", tmp_path)
    [file] = mine.files
    assert (file.kind, file.compression, file.size) == (kind, compression, 11)
    assert mine.has_documents == (kind != "txt") and not mine.is_folder


def test_compressed_parquet_is_rejected(raw, tmp_path):
    (raw / "a.parquet.gz").write_text("x")
    assert "data/raw/a.parquet.gz: decompress it" in error_of("data/raw", tmp_path)


@pytest.mark.parametrize("name", ["a.txt.xz", "a.jsonl.BZ2", "a.txt.zip", "a.csv.gz", "a.tar.gz"])
def test_file_that_is_compressed_in_another_way_is_rejected(raw, tmp_path, name):
    (raw / name).write_text("x")
    line = error_of(f"data/raw/{name}", tmp_path)
    assert f"data/raw/{name}: decompress it; only .txt and .jsonl files may be compressed" in line


def test_folder_is_read_in_the_order_of_the_paths(raw, tmp_path):
    for name in ("b.txt", "c/deep.TXT", "a.jsonl.gz", "d.parquet", "notes.md"):
        (raw / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (raw / "set" / name).touch()
    mine = corpus.find("data/raw/set", tmp_path)
    names = ["a.jsonl.gz", "b.txt", "c/deep.TXT", "d.parquet"]
    assert [file.name for file in mine.files] == [f"data/raw/set/{name}" for name in names]
    assert mine.name == "data/raw/set" and mine.is_folder and mine.has_documents


def test_name_does_not_depend_on_how_the_path_is_written(raw, tmp_path, monkeypatch):
    (raw / "mine.txt").write_text("text enough")
    monkeypatch.chdir(tmp_path)
    here = type(tmp_path)()  # the root that a stage uses
    for name in ["data/raw/mine.txt", "./data/../data/raw/mine.txt", str(raw / "mine.txt")]:
        assert corpus.find(name, here).name == "data/raw/mine.txt"


def test_data_raw_may_be_a_link_to_another_disk(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "mine.txt").write_text("text enough")
    (tmp_path / "root" / "data").mkdir(parents=True)
    (tmp_path / "root" / "data" / "raw").symlink_to(tmp_path / "disk")
    mine = corpus.find("data/raw/mine.txt", tmp_path / "root")
    assert mine.name == "data/raw/mine.txt"


def test_unknown_name_error_suggests_a_similar_name(raw, tmp_path):
    (raw / "milton.txt").write_text("text")
    line = error_of("tinyshakespear", tmp_path)
    assert "neither tinyshakespeare nor shakespeare" in line
    assert "did you mean tinyshakespeare?" in line
    assert "did you mean data/raw/milton.txt?" in error_of("data/raw/miltn.txt", tmp_path)
    assert "did you mean" not in error_of("zzz", tmp_path)
    assert "did you mean" not in error_of("data/raw/qq", tmp_path)


@pytest.mark.parametrize("name", ["", "..", "outside.txt", "data/raw/../outside.txt"])
def test_path_outside_data_raw_is_rejected(raw, tmp_path, name):
    (tmp_path / "outside.txt").write_text("text")
    (tmp_path / "data" / "outside.txt").write_text("text")
    assert "outside data/raw" in error_of(name, tmp_path)


def test_link_to_a_target_outside_data_raw_is_rejected(raw, tmp_path):
    (tmp_path / "outside.txt").write_text("text")
    (raw / "set").mkdir()
    (raw / "set" / "link.txt").symlink_to(tmp_path / "outside.txt")
    assert "outside data/raw" in error_of("data/raw/set/link.txt", tmp_path)
    line = error_of("data/raw/set", tmp_path)
    assert "data/raw/set/link.txt is outside data/raw" in line


@pytest.mark.parametrize("kind", ["pipe", "device", "broken link", "links in a circle"])
def test_pipe_device_or_bad_link_is_named_without_waiting_for_it(raw, tmp_path, kind):
    odd = raw / "set" / "odd.txt"
    odd.parent.mkdir()
    (odd.parent / "good.txt").write_text("text enough")
    if kind == "pipe":
        os.mkfifo(odd)
    else:
        target = {"device": "/dev/zero", "broken link": raw / "none", "links in a circle": odd}
        odd.symlink_to(target[kind])
    assert "data/raw/set/odd.txt" in error_of("data/raw/set", tmp_path)
    assert "data/raw/set/odd.txt" in error_of("data/raw/set/odd.txt", tmp_path)


def test_unreadable_folder_is_named(raw, tmp_path, monkeypatch):
    def deny(path, *_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    (raw / "set").mkdir()
    (raw / "set" / "mine.txt").write_text("text enough")
    monkeypatch.setattr(os, "scandir", deny)
    line = error_of("data/raw/set", tmp_path)
    assert "data/raw/set cannot be read (Permission denied)" in line


@pytest.mark.parametrize(
    "name", ["data/raw/\0", "x" * 300, "x" * 100_000, "../" * 50_000, "\ud800", "a\nb", "\x1b[31m"]
)
def test_impossible_name_is_a_one_line_printable_error(raw, tmp_path, name):
    line = error_of(name, tmp_path)
    assert line.isprintable() and len(line) < 600


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("two\nlines.txt", "two\\nlines.txt"),
        ("\x1b[31m.txt", "\\x1b[31m.txt"),
        ("\udcff.txt", "\\udcff.txt"),  # the byte 0xFF, which is not UTF-8
        ("$na\u00efve\\.txt", "$na\u00efve\\.txt"),
    ],
)
def test_corpus_name_is_printable(raw, tmp_path, name, shown):
    (raw / name).write_text("text enough")
    assert corpus.find(f"data/raw/{name}", tmp_path).name == f"data/raw/{shown}"


def test_cyclic_links_are_a_missing_path(raw, tmp_path):
    (raw / "a").symlink_to(raw / "b")
    (raw / "b").symlink_to(raw / "a")
    assert "neither" in error_of("data/raw/a", tmp_path)


def test_folder_without_texts_is_rejected(raw, tmp_path):
    (raw / "folder").mkdir()
    (raw / "folder" / "readme.md").write_text("text")
    line = error_of("data/raw/folder", tmp_path)
    assert "data/raw/folder contains no .txt, .jsonl or .parquet file to be read:" in line


def test_folder_lists_its_files_and_what_is_left_out(raw, tmp_path):
    for name in ("a.txt", "b/c.txt", ".ipynb_checkpoints/c-checkpoint.txt", "new\nline~.txt"):
        (raw / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (raw / "set" / name).write_text(f"text of {name!r}")
    mine = corpus.find("data/raw/set", tmp_path)
    assert [file.name for file in mine.files] == ["data/raw/set/a.txt", "data/raw/set/b/c.txt"]
    assert mine.left_out == (".ipynb_checkpoints/c-checkpoint.txt", "new\\nline~.txt")
    assert corpus.find("data/raw/set/a.txt", tmp_path).left_out == ()


def test_folder_with_nothing_but_leftovers_is_rejected(raw, tmp_path):
    (raw / "set" / ".ipynb_checkpoints").mkdir(parents=True)
    (raw / "set" / ".ipynb_checkpoints" / "a-checkpoint.txt").write_text("text")
    line = error_of("data/raw/set", tmp_path)
    assert "to be read (.ipynb_checkpoints/a-checkpoint.txt is left out)" in line
    for name in (
        "data/raw/set/.ipynb_checkpoints",
        "data/raw/set/.ipynb_checkpoints/a-checkpoint.txt",
    ):
        assert "in a folder .ipynb_checkpoints, which DVC ignores" in error_of(name, tmp_path)
