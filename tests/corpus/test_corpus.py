"""Reading a corpus: a named one, or the user's own files under data/raw."""

import errno
import os
from pathlib import Path

import pytest

from folio.corpus import corpus
from folio.errors import UserError


def text_of(source):
    """The text of a corpus, after checks of its chunks."""
    chunks = list(source.chunks())
    assert all(0 < len(chunk) <= corpus.CHUNK for chunk in chunks)
    text = "".join(chunks)
    assert len(text) == source.characters
    assert "".join(source.chunks()) == text  # it can be read again
    return text


def split(name, root, validation_fraction=0.5):
    """The training and the validation text of a corpus."""
    source = corpus.read(name, validation_fraction, root)
    text = text_of(source)
    return text[: source.train_characters], text[source.train_characters :]


@pytest.fixture
def raw(tmp_path):
    folder = tmp_path / "data" / "raw"
    folder.mkdir(parents=True)
    return folder


def error_of(name, root, validation_fraction=0.1):
    """The one-line error for an unusable corpus."""
    with pytest.raises(UserError) as error:
        corpus.read(name, validation_fraction, root)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_named_corpus_ignores_the_validation_fraction(tmp_path):
    train, val = split("tinyshakespeare", tmp_path, 0.5)
    assert (len(train), len(val)) == (1_003_854, 111_540)


def test_named_corpus_can_be_added_as_a_loader(monkeypatch, tmp_path):
    monkeypatch.setitem(corpus.NAMED, "sonnets", lambda: ("Shall I compare thee", 10))
    assert split("sonnets", tmp_path) == ("Shall I co", "mpare thee")
    line = error_of("sonets", tmp_path)
    assert f"neither {' nor '.join(corpus.NAMED)} nor a path" in line
    assert line.endswith("did you mean sonnets?")


def test_file_is_split_by_the_validation_fraction(raw, tmp_path):
    (raw / "mine.txt").write_bytes(("abcde" * 20).encode())
    assert split("data/raw/mine.txt", tmp_path, 0.25) == ("abcde" * 15, "abcde" * 5)
    assert corpus.read("data/raw/mine.txt", 0.25, tmp_path).name == "data/raw/mine.txt"


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 1 << 20])
def test_file_is_read_unchanged_except_for_the_byte_order_mark(raw, tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(corpus, "CHUNK", chunk)
    content = "one\r\ntwo\rthree\n\u2028 na\u00efve \U0001f642\ufeff\x00\n\n"
    (raw / "mine.txt").write_bytes(content.encode("utf-8-sig"))
    assert text_of(corpus.read("data/raw/mine.txt", 0.5, tmp_path)) == content


def test_folder_is_read_as_its_txt_files_in_the_order_of_their_paths(raw, tmp_path):
    for name, content in {
        "b.txt": "second, without a line break",
        "c/deep.TXT": "\ufeffthird\r\n",
        "a.txt": "first\n",
        "d.txt": "",
        "e.txt": "last",
        "notes.md": "not text for training",
    }.items():
        (raw / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (raw / "set" / name).write_bytes(content.encode())
    mine = corpus.read("data/raw/set", 0.1, tmp_path)
    assert text_of(mine) == "first\nsecond, without a line break\nthird\r\nlast"
    assert mine.name == "data/raw/set"


def test_name_does_not_depend_on_how_the_path_is_written(raw, tmp_path, monkeypatch):
    (raw / "mine.txt").write_text("text enough")
    monkeypatch.chdir(tmp_path)
    here = type(tmp_path)()  # the root that a stage uses
    for name in ["data/raw/mine.txt", "./data/../data/raw/mine.txt", str(raw / "mine.txt")]:
        assert corpus.read(name, 0.1, here).name == "data/raw/mine.txt"


def test_data_raw_may_be_a_link_to_another_disk(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "mine.txt").write_text("text enough")
    (tmp_path / "root" / "data").mkdir(parents=True)
    (tmp_path / "root" / "data" / "raw").symlink_to(tmp_path / "disk")
    mine = corpus.read("data/raw/mine.txt", 0.1, tmp_path / "root")
    assert mine.name == "data/raw/mine.txt"


def test_unknown_name_error_suggests_a_similar_name(raw, tmp_path):
    (raw / "milton.txt").write_text("text")
    line = error_of("tinyshakespear", tmp_path)
    assert "neither tinyshakespeare nor shakespeare" in line
    assert "did you mean tinyshakespeare?" in line
    assert "did you mean data/raw/milton.txt?" in error_of("data/raw/miltn.txt", tmp_path)
    assert "did you mean" not in error_of("zzz", tmp_path)


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


@pytest.mark.parametrize("name", ["data/raw/set", "data/raw/set/mine.txt"])
@pytest.mark.parametrize("closed", ["scandir", "read"])
def test_unreadable_file_or_folder_is_named(raw, tmp_path, monkeypatch, name, closed):
    def deny(path, *_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    (raw / "set").mkdir()
    (raw / "set" / "mine.txt").write_text("text enough")
    monkeypatch.setattr(*{"scandir": (os, "scandir"), "read": (Path, "open")}[closed], deny)
    if (name, closed) == ("data/raw/set/mine.txt", "scandir"):
        assert split(name, tmp_path) == (
            "text ",
            "enough",
        )  # its folder is not listed
    else:
        line = error_of(name, tmp_path)
        assert "data/raw/set" in line and "cannot be read (Permission denied)" in line


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
    assert corpus.read(f"data/raw/{name}", 0.5, tmp_path).name == f"data/raw/{shown}"


def test_cyclic_links_are_a_missing_path(raw, tmp_path):
    (raw / "a").symlink_to(raw / "b")
    (raw / "b").symlink_to(raw / "a")
    assert "neither" in error_of("data/raw/a", tmp_path)


def test_empty_files_and_folders_are_rejected(raw, tmp_path):
    (raw / "empty.txt").write_text("")
    (raw / "blank.txt").write_text("\ufeff \n\n", encoding="utf-8")
    (raw / "folder").mkdir()
    (raw / "folder" / "readme.md").write_text("text")
    assert "data/raw/empty.txt contains no text" in error_of("data/raw/empty.txt", tmp_path)
    assert "data/raw/blank.txt contains no text" in error_of("data/raw/blank.txt", tmp_path)
    assert "data/raw/folder contains no .txt file" in error_of("data/raw/folder", tmp_path)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 1 << 20])
def test_invalid_utf_8_error_states_the_byte_position(raw, tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(corpus, "CHUNK", chunk)
    (raw / "latin.txt").write_bytes(b"\xef\xbb\xbfna\xefve")
    (raw / "wide.txt").write_bytes("text".encode("utf-16"))
    assert "latin.txt is not valid UTF-8 at byte 5" in error_of("data/raw/latin.txt", tmp_path)
    assert "wide.txt is not valid UTF-8 at byte 0" in error_of("data/raw/wide.txt", tmp_path)
    (raw / "half.txt").write_bytes("na\u00efve \U0001f642".encode()[:-1])
    assert "half.txt is not valid UTF-8 at byte 7:" in error_of("data/raw/half.txt", tmp_path)
    assert "half.txt is not valid UTF-8" in error_of("data/raw", tmp_path)


def test_text_too_short_to_be_split_is_rejected(raw, tmp_path):
    (raw / "short.txt").write_text("x")
    assert "leaves none for training" in error_of("data/raw/short.txt", tmp_path)


@pytest.mark.parametrize("new_text", ["text enoug", "text enough, and more"])
def test_file_that_changes_while_it_is_being_read_is_detected(raw, tmp_path, new_text):
    (raw / "mine.txt").write_text("text enough")
    mine = corpus.read("data/raw/mine.txt", 0.5, tmp_path)
    (raw / "mine.txt").write_text(new_text)
    with pytest.raises(UserError, match=r"data/raw/mine\.txt changed while it was being read"):
        list(mine.chunks())


def test_folder_lists_its_files_and_what_is_left_out(raw, tmp_path):
    for name in ("a.txt", "b/c.txt", ".ipynb_checkpoints/c-checkpoint.txt", "new\nline~.txt"):
        (raw / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (raw / "set" / name).write_text(f"text of {name!r}")
    mine = corpus.read("data/raw/set", 0.5, tmp_path)
    assert mine.files == ("a.txt", "b/c.txt") and mine.repeated == ()
    assert mine.left_out == (".ipynb_checkpoints/c-checkpoint.txt", "new\\nline~.txt")
    assert text_of(mine) == "text of 'a.txt'\ntext of 'b/c.txt'"
    one = corpus.read("data/raw/set/a.txt", 0.5, tmp_path)
    assert (one.files, one.left_out, one.repeated) == ((), (), ())


def test_folder_with_nothing_but_leftovers_is_rejected(raw, tmp_path):
    (raw / "set" / ".ipynb_checkpoints").mkdir(parents=True)
    (raw / "set" / ".ipynb_checkpoints" / "a-checkpoint.txt").write_text("text")
    line = error_of("data/raw/set", tmp_path)
    assert "no .txt file except .ipynb_checkpoints/a-checkpoint.txt, which is left out" in line
    for name in (
        "data/raw/set/.ipynb_checkpoints",
        "data/raw/set/.ipynb_checkpoints/a-checkpoint.txt",
    ):
        assert "in a folder .ipynb_checkpoints, which DVC ignores" in error_of(name, tmp_path)


def test_files_with_the_same_text_are_named(raw, tmp_path):
    texts = {
        "a.txt": "one two\nthree\n",
        "b/a.txt": "\ufeffone two\r\nthree",  # the same apart from white space
        "c.txt": "another text",
        "d.txt": "one  two three",
        "e.txt": "another text",
        "empty.txt": "",
        "blank.txt": " \n",
    }
    for name, text in texts.items():
        (raw / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (raw / "set" / name).write_bytes(text.encode())
    found = corpus.read("data/raw/set", 0.5, tmp_path).repeated
    assert found == (("a.txt", "b/a.txt", "d.txt"), ("c.txt", "e.txt"))
