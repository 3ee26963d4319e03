"""Token files: what is written, and how damaged files are detected."""

import hashlib
import json
import resource

import numpy as np
import pytest
from conftest import NOT_FILES, replace_by

from folio.errors import UserError
from folio.tokens import token_files

TEXTS = {"train": "na\u00efve " * 100, "val": "\U0001f642" * 10}
IDS = {"train": np.arange(300, dtype=np.uint16), "val": np.arange(50, dtype=np.uint16) + 50_000}


@pytest.fixture
def folder(tmp_path):
    token_files.write(tmp_path / "prepared", "mine", 50_257, [(TEXTS, IDS)])
    return tmp_path / "prepared"


def error_of(folder):
    """The one-line error for damaged token files."""
    with pytest.raises(UserError) as error:
        token_files.read(folder)
    assert "\n" not in str(error.value)
    assert "dvc repro --force prepare" in str(error.value)
    return str(error.value)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_read_returns_what_was_written(folder):
    read = token_files.read(folder)
    assert np.array_equal(read.train, IDS["train"])
    assert np.array_equal(read.val, IDS["val"])
    assert read.train.dtype == np.dtype("<u2")
    assert not read.train.flags.writeable


def test_token_is_two_bytes_in_little_endian_order(tmp_path):
    token_files.write(tmp_path, "mine", 50_257, [(TEXTS, IDS | {"val": np.array([1, 50_256])})])
    assert (tmp_path / "val.bin").read_bytes() == bytes([1, 0, 0x50, 0xC4])


def test_meta_counts_tokens_characters_and_bytes(folder):
    meta = token_files.read(folder).meta
    assert meta["corpus"] == "mine"
    assert (meta["train_tokens"], meta["train_characters"], meta["train_bytes"]) == (300, 600, 700)
    assert (meta["val_tokens"], meta["val_characters"], meta["val_bytes"]) == (50, 10, 40)
    text = TEXTS["train"] + TEXTS["val"]
    assert meta["text_sha256"] == hashlib.sha256(text.encode()).hexdigest()


def test_files_do_not_depend_on_how_the_text_is_split_into_pieces(folder, tmp_path):
    pieces = [
        (
            {"train": TEXTS["train"][:7], "val": ""},
            {"train": IDS["train"][:3], "val": IDS["val"][:0]},
        ),
        (
            {"train": TEXTS["train"][7:], "val": TEXTS["val"][:2]},
            {"train": IDS["train"][3:], "val": IDS["val"][:40]},
        ),
        (
            {"train": "", "val": TEXTS["val"][2:]},
            {"train": IDS["train"][:0], "val": IDS["val"][40:]},
        ),
    ]
    token_files.write(tmp_path / "pieces", "mine", 50_257, iter(pieces))
    assert contents(tmp_path / "pieces") == contents(folder)


def test_digest_depends_only_on_the_two_parts(tmp_path):
    def digest(corpus, ids):
        token_files.write(tmp_path, corpus, 50_257, [(TEXTS, ids)])
        return token_files.read(tmp_path).digest

    first = digest("mine", IDS)
    assert digest("renamed", IDS) == first
    assert digest("mine", IDS | {"train": IDS["train"] + 1}) != first
    assert digest("mine", IDS | {"val": IDS["val"] + 1}) != first
    assert digest("mine", {"train": IDS["val"], "val": IDS["train"]}) != first


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "meta.json"])
def test_missing_file_is_named(folder, name):
    (folder / name).unlink()
    assert f"{name} is missing" in error_of(folder)


@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
def test_truncated_file_is_named_with_its_size(folder, name):
    size = (folder / name).stat().st_size
    with (folder / name).open("rb+") as file:
        file.truncate(size - 1)
    assert f"{name} has {size - 1} bytes instead of {size}" in error_of(folder)


@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
def test_single_modified_token_is_detected(folder, name):
    content = bytearray((folder / name).read_bytes())
    content[20] ^= 1
    (folder / name).write_bytes(content)
    assert f"{name} does not match its checksum in meta.json" in error_of(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"train_tokens": 1}', "\udcff"])
def test_damaged_meta_file_is_named(folder, content):
    (folder / "meta.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    assert "meta.json is damaged" in error_of(folder)


def test_ids_outside_the_vocabulary_are_rejected(tmp_path):
    token_files.write(tmp_path, "mine", 50_257, [(TEXTS, IDS | {"val": np.array([50_257])})])
    assert "val.bin has token ids outside the vocabulary of 50257" in error_of(tmp_path)


def test_parts_without_tokens_are_rejected(tmp_path):
    token_files.write(tmp_path, "mine", 50_257, [(TEXTS, IDS | {"val": IDS["val"][:0]})])
    assert "meta.json is damaged" in error_of(tmp_path)


@pytest.mark.parametrize("key", token_files.META)
@pytest.mark.parametrize("value", [..., None, True, 7, 7.0, "seven", [], float("nan")])
def test_missing_or_modified_field_of_the_meta_file_is_detected(folder, key, value):
    meta = json.loads((folder / "meta.json").read_text())
    meta = {k: v for k, v in meta.items() if k != key} | ({} if value is ... else {key: value})
    (folder / "meta.json").write_text(json.dumps(meta))
    assert "meta.json is damaged" in error_of(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vocabulary", 10**12),  # training would allocate so many rows
        ("val_characters", 0),  # evaluation divides by it
        ("train_tokens", -1),
        ("train_tokens", 10**4299),
        ("corpus", "two\nlines"),
        ("corpus", "\ud800"),
        ("val_bytes", 1.5),
    ],
)
def test_impossible_meta_file_with_a_correct_checksum_is_detected(folder, key, value):
    meta = json.loads((folder / "meta.json").read_text()) | {key: value}
    del meta["sha256"]
    meta["sha256"] = hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
    (folder / "meta.json").write_text(json.dumps(meta))
    assert "meta.json is damaged" in error_of(folder)


def test_meta_file_may_have_other_white_space_and_order(folder):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(dict(reversed(meta.items()))))
    assert token_files.read(folder).meta["corpus"] == "mine"


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000, "1" * 5_000])
def test_meta_file_that_json_cannot_parse_is_a_one_line_error(folder, content):
    (folder / "meta.json").write_text(content)
    assert "meta.json is damaged" in error_of(folder)


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "meta.json"])
@pytest.mark.parametrize("kind", NOT_FILES)
def test_pipe_device_link_or_folder_is_a_one_line_error_without_waiting(folder, name, kind):
    replace_by(folder / name, kind)
    assert name in error_of(folder)


def test_failed_write_leaves_only_the_old_files(folder):
    before = contents(folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # bytes per file, like a full disk
    try:
        with pytest.raises(OSError, match="File too large"):
            token_files.write(folder, "larger", 50_257, [(TEXTS, IDS)] * 200)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(folder) == before


def test_interrupted_write_leaves_only_the_old_files(folder):
    def pieces():
        yield TEXTS, IDS
        raise KeyboardInterrupt

    before = contents(folder)
    with pytest.raises(KeyboardInterrupt):
        token_files.write(folder, "other", 50_257, pieces())
    assert contents(folder) == before
