"""Token files: what is written, and how damaged files are detected."""

import hashlib
import json
import mmap
import resource
from pathlib import Path

import numpy as np
import pytest
from conftest import NOT_FILES, replace_by

from folio.errors import UserError
from folio.tokens import token_files, token_meta

IDS = {"train": np.arange(300, dtype=np.uint16), "val": np.arange(50, dtype=np.uint16) + 50_000}


def write(folder, ids, corpus="mine", vocabulary=50_257, segmentations=None):
    """Write token files: {part: ids, or a list of pieces of them}."""
    pieces = {part: each if isinstance(each, list) else [each] for part, each in ids.items()}
    facts = {"corpus": corpus, "vocabulary": vocabulary, "documents": 0, "text_sha256": "of a text"}
    for part, each in pieces.items():
        facts[f"{part}_tokens"] = sum(map(len, each))
        facts[f"{part}_characters"], facts[f"{part}_bytes"] = 10, 20
    counts = np.bincount(np.concatenate(pieces["train"]), minlength=vocabulary)
    return token_files.write(folder, facts, counts, pieces, segmentations)


def two_segmentations(ids):
    """Yields two segmentations of some ids, in pieces."""
    for piece in np.array_split(ids, 3):
        yield [piece[::-1], piece.repeat(2)]


SEGMENTED = token_files.Segmentations(2, 0.1, two_segmentations)


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "prepared", IDS)
    return tmp_path / "prepared"


@pytest.fixture
def segmented(tmp_path):
    """Token files with two more segmentations."""
    write(tmp_path / "segmented", IDS, segmentations=SEGMENTED)
    return tmp_path / "segmented"


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
    assert np.array_equal(read.train_counts, np.bincount(IDS["train"], minlength=50_257))
    assert read.meta["val_tokens"] == 50 and read.meta["val_characters"] == 10


def test_token_is_two_bytes_in_little_endian_order(tmp_path):
    write(tmp_path, IDS | {"val": np.array([1, 50_256])})
    assert (tmp_path / "val.bin").read_bytes() == bytes([1, 0, 0x50, 0xC4])


@pytest.mark.parametrize("size", [1, 7, 299, 300])
def test_files_do_not_depend_on_how_the_ids_are_split_into_pieces(folder, tmp_path, size):
    pieces = [IDS["train"][start : start + size] for start in range(0, 300, size)]
    write(tmp_path / "pieces", IDS | {"train": pieces})
    assert contents(tmp_path / "pieces") == contents(folder)


PAGE = mmap.PAGESIZE // 2  # tokens


@pytest.fixture
def sharded(tmp_path, monkeypatch):
    """Token files of 3 and 1 files, and their ids."""
    monkeypatch.setattr(token_meta, "SHARD", PAGE)
    ids = {"train": np.arange(2 * PAGE + 5).astype(np.uint16), "val": IDS["val"]}
    write(tmp_path / "sharded", ids)
    return tmp_path / "sharded", ids


def test_large_part_is_several_files_mapped_as_one(sharded):
    folder, ids = sharded
    assert sorted(path.name for path in folder.glob("*.bin")) == [
        *("train-00000.bin", "train-00001.bin", "train-00002.bin", "train_counts.bin", "val.bin")
    ]
    data = token_files.read(folder)
    assert np.array_equal(data.train, ids["train"]) and not data.train.flags.writeable
    assert np.array_equal(data.train[PAGE - 3 : 2 * PAGE + 3], ids["train"][PAGE - 3 :][: PAGE + 6])
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("t*-*"))]
    assert data.meta["train_shards"] == hashes
    expected = "".join([*hashes, *data.meta["val_shards"]])
    assert data.digest == hashlib.sha256(expected.encode()).hexdigest()


@pytest.mark.parametrize("tokens", [PAGE, PAGE + 1, 2 * PAGE])
def test_pieces_may_end_anywhere_in_a_file(tmp_path, monkeypatch, tokens):
    monkeypatch.setattr(token_meta, "SHARD", PAGE)
    ids = np.arange(tokens).astype(np.uint16)
    write(tmp_path, IDS | {"train": [*np.array_split(ids, 7)]})
    assert np.array_equal(token_files.read(tmp_path).train, ids)


def test_missing_or_truncated_shard_is_named(sharded):
    folder, _ = sharded
    with (folder / "train-00001.bin").open("rb+") as file:
        file.truncate(100)
    assert f"train-00001.bin has 100 bytes instead of {2 * PAGE}" in error_of(folder)
    (folder / "train-00002.bin").unlink()
    (folder / "train-00001.bin").unlink()
    assert "train-00001.bin is missing" in error_of(folder)


def test_memory_of_mapped_shards_is_given_back(sharded):
    folder, _ = sharded

    def mapped():
        return "train-00001.bin" in Path("/proc/self/maps").read_text()

    data = token_files.read(folder)
    assert mapped()
    part = data.train[5:10]
    del data
    assert mapped() and part.tolist() == [5, 6, 7, 8, 9]
    del part
    assert not mapped()


def test_files_of_earlier_token_files_are_removed(sharded):
    folder, _ = sharded
    (folder / "mine.bin").touch()
    (folder / ".train-00007.0123abcd.bin").touch()  # of a killed process
    (folder / ".val.0123abcd.bin").touch()
    write(folder, IDS)
    assert sorted(path.name for path in folder.iterdir()) == [
        *("meta.json", "mine.bin", "train.bin", "train_counts.bin", "val.bin")
    ]


def test_segmentations_are_read_as_written(segmented):
    read = token_files.read(segmented)
    pieces = [*two_segmentations(IDS["train"])]
    for found, written in zip(read.segmented, zip(*pieces, strict=True), strict=True):
        assert np.array_equal(found, np.concatenate(written))
        assert found.dtype == np.dtype("<u2") and not found.flags.writeable
    assert read.meta["bpe_dropout"] == 0.1 and read.meta["segmented_tokens"] == [300, 600]
    assert np.array_equal(read.train_counts, np.bincount(IDS["train"], minlength=50_257))
    assert np.array_equal(read.trained_counts, 4 * read.train_counts)


def test_segmentations_change_the_digest_and_no_other_file(segmented, folder):
    before, after = contents(folder), contents(segmented)
    assert {name for name in before if before[name] != after[name]} == {"meta.json"}
    assert {*after} - {*before} == {
        *("train-segmented-01.bin", "train-segmented-02.bin", "train_segmented_counts.bin")
    }
    first = token_files.read(segmented).digest
    assert first != token_files.read(folder).digest
    other = token_files.Segmentations(2, 0.1, lambda ids: [[ids, ids]])
    write(segmented, IDS, segmentations=other)
    assert token_files.read(segmented).digest != first
    (segmented / ".train-segmented-03.0123abcd.bin").touch()  # of a killed process
    write(segmented, IDS)
    assert contents(segmented) == before
    assert token_files.read(segmented).digest == token_files.read(folder).digest


def test_segmentations_of_several_files_of_tokens_are_one_file_each(tmp_path, monkeypatch):
    monkeypatch.setattr(token_meta, "SHARD", PAGE)
    ids = {"train": np.arange(2 * PAGE + 5).astype(np.uint16), "val": IDS["val"]}
    write(tmp_path, ids, segmentations=SEGMENTED)
    read = token_files.read(tmp_path)
    assert np.array_equal(read.segmented[1], ids["train"].repeat(2))
    with (tmp_path / "train-segmented-02.bin").open("rb+") as file:
        file.truncate(100)
    assert "train-segmented-02.bin has 100 bytes" in error_of(tmp_path)


@pytest.mark.parametrize("name", ["train-segmented-02.bin", "train_segmented_counts.bin"])
def test_damaged_segmentation_is_named(segmented, name):
    content = (segmented / name).read_bytes()
    (segmented / name).write_bytes(bytes([content[0] ^ 1]) + content[1:])
    assert f"{name} does not match its checksum in meta.json" in error_of(segmented)
    (segmented / name).write_bytes(content[:-1])
    assert f"{name} has {len(content) - 1} bytes instead of {len(content)}" in error_of(segmented)
    (segmented / name).unlink()
    assert f"{name} is missing" in error_of(segmented)


def test_interrupted_segmentation_leaves_only_the_old_files(folder):
    def interrupted(ids):
        yield [ids[:5], ids[:5]]
        raise KeyboardInterrupt

    before = contents(folder)
    with pytest.raises(KeyboardInterrupt):
        more = token_files.Segmentations(2, 0.1, interrupted)
        write(folder, IDS | {"val": IDS["val"] + 1}, segmentations=more)
    assert contents(folder) == before


def test_large_vocabulary_takes_four_bytes_a_token(tmp_path):
    write(tmp_path, IDS | {"val": np.array([1, 99_999])}, vocabulary=100_000)
    assert (tmp_path / "val.bin").read_bytes() == bytes([1, 0, 0, 0, 0x9F, 0x86, 1, 0])
    assert token_files.read(tmp_path).val.tolist() == [1, 99_999]


def test_token_files_of_an_earlier_version_are_named(folder):
    meta = json.loads((folder / "meta.json").read_text())
    meta = {key: meta[key] for key in token_meta.FACTS if key != "documents"}
    meta["sha256"] = hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
    (folder / "meta.json").write_text(json.dumps(meta))
    assert "was written by an earlier version of Folio" in error_of(folder)


def test_digest_depends_only_on_the_two_parts(tmp_path):
    def digest(corpus, ids):
        write(tmp_path, ids, corpus)
        return token_files.read(tmp_path).digest

    first = digest("mine", IDS)
    assert digest("renamed", IDS) == first
    assert digest("mine", IDS | {"train": IDS["train"] + 1}) != first
    assert digest("mine", IDS | {"val": IDS["val"] + 1}) != first
    assert digest("mine", {"train": IDS["val"], "val": IDS["train"]}) != first


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "train_counts.bin", "meta.json"])
def test_missing_file_is_named(folder, name):
    (folder / name).unlink()
    assert f"{name} is missing" in error_of(folder)


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "train_counts.bin"])
def test_truncated_file_is_named_with_its_size(folder, name):
    size = (folder / name).stat().st_size
    with (folder / name).open("rb+") as file:
        file.truncate(size - 1)
    assert f"{name} has {size - 1} bytes instead of {size}" in error_of(folder)


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "train_counts.bin"])
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
    write(tmp_path, IDS | {"val": np.array([50_257])})
    assert "val.bin has token ids outside the vocabulary of 50257" in error_of(tmp_path)


def test_parts_without_tokens_are_rejected(tmp_path):
    write(tmp_path, IDS | {"val": IDS["val"][:0]})
    assert "meta.json is damaged" in error_of(tmp_path)


@pytest.mark.parametrize("key", token_meta.META)
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
        ("format", 3),
        ("documents", -1),
        ("train_shards", []),
        ("train_shards", ["0" * 64]),
        ("train_shards", [7]),
        ("train_tokens", 1 << 40),
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


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bpe_dropout", 1.0),
        ("bpe_dropout", float("nan")),
        ("bpe_dropout", 0),
        ("segmented_tokens", []),
        ("segmented_tokens", [300]),
        ("segmented_tokens", [300, True]),
        ("segmented_tokens", [300, 0]),
        ("segmented_tokens", [300, 600.0]),
        ("segmented_tokens", None),
        ("segmented_sha256", ["0" * 64, 7]),
        ("segmented_counts_sha256", 7),
    ],
)
def test_impossible_segmentations_with_a_correct_checksum_are_detected(segmented, key, value):
    meta = json.loads((segmented / "meta.json").read_text()) | {key: value}
    del meta["sha256"]
    (segmented / "meta.json").write_text(token_meta.dump(meta))
    assert "meta.json is damaged" in error_of(segmented)


def test_meta_file_may_have_other_white_space_and_order(folder):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(dict(reversed(meta.items()))))
    assert token_files.read(folder).meta["corpus"] == "mine"


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000, "1" * 5_000])
def test_meta_file_that_json_cannot_parse_is_a_one_line_error(folder, content):
    (folder / "meta.json").write_text(content)
    assert "meta.json is damaged" in error_of(folder)


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "train_counts.bin", "meta.json"])
@pytest.mark.parametrize("kind", NOT_FILES)
def test_pipe_device_link_or_folder_is_a_one_line_error_without_waiting(folder, name, kind):
    replace_by(folder / name, kind)
    assert name in error_of(folder)


def test_failed_write_leaves_only_the_old_files(folder):
    before = contents(folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))  # bytes per file, like a full disk
    try:
        with pytest.raises(OSError, match="File too large"):
            write(folder, IDS | {"train": [IDS["train"]] * 1_000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(folder) == before


def test_interrupted_write_leaves_only_the_old_files(folder):
    def pieces():
        yield IDS["train"][:10]
        raise KeyboardInterrupt

    before = contents(folder)
    facts = {key: token_files.read(folder).meta[key] for key in token_meta.FACTS}
    with pytest.raises(KeyboardInterrupt):
        token_files.write(folder, facts, np.zeros(50_257), {"train": pieces(), "val": []})
    assert contents(folder) == before
