"""Token files on disk, and training batches out of them."""

import hashlib
import json
import resource

import numpy as np
import pytest
import torch
from conftest import NO_FILES, replace_by

from folio import files
from folio.tokens import batches, token_files
from folio.errors import UserError

TEXTS = {"train": "na\u00efve " * 100, "val": "\U0001f642" * 10}
IDS = {"train": np.arange(300, dtype=np.uint16), "val": np.arange(50, dtype=np.uint16) + 50_000}


@pytest.fixture
def folder(tmp_path):
    token_files.write(tmp_path / "prepared", "mine", 50_257, [(TEXTS, IDS)])
    return tmp_path / "prepared"


def refusal(folder):
    """The line that a user reads about token files that will not do."""
    with pytest.raises(UserError) as problem:
        token_files.read(folder)
    assert "\n" not in str(problem.value)
    assert "dvc repro --force prepare" in str(problem.value)
    return str(problem.value)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- files


def test_what_was_written_is_read(folder):
    read = token_files.read(folder)
    assert np.array_equal(read.train, IDS["train"])
    assert np.array_equal(read.val, IDS["val"])
    assert read.train.dtype == np.dtype("<u2")
    assert not read.train.flags.writeable


def test_a_token_is_two_bytes_with_the_low_one_first(tmp_path):
    token_files.write(tmp_path, "mine", 50_257, [(TEXTS, IDS | {"val": np.array([1, 50_256])})])
    assert (tmp_path / "val.bin").read_bytes() == bytes([1, 0, 0x50, 0xC4])


def test_meta_counts_tokens_characters_and_bytes(folder):
    meta = token_files.read(folder).meta
    assert meta["corpus"] == "mine"
    assert (meta["train_tokens"], meta["train_characters"], meta["train_bytes"]) == (300, 600, 700)
    assert (meta["val_tokens"], meta["val_characters"], meta["val_bytes"]) == (50, 10, 40)
    text = TEXTS["train"] + TEXTS["val"]
    assert meta["text_sha256"] == hashlib.sha256(text.encode()).hexdigest()


def test_a_text_in_pieces_makes_the_same_files_as_in_one(folder, tmp_path):
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


def test_the_digest_depends_on_both_parts_and_on_nothing_else(tmp_path):
    def digest(corpus, ids):
        token_files.write(tmp_path, corpus, 50_257, [(TEXTS, ids)])
        return token_files.read(tmp_path).digest

    first = digest("mine", IDS)
    assert digest("renamed", IDS) == first
    assert digest("mine", IDS | {"train": IDS["train"] + 1}) != first
    assert digest("mine", IDS | {"val": IDS["val"] + 1}) != first
    assert digest("mine", {"train": IDS["val"], "val": IDS["train"]}) != first


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "meta.json"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    assert f"{name} is missing" in refusal(folder)


@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
def test_a_file_cut_short_is_named_with_its_size(folder, name):
    size = (folder / name).stat().st_size
    with (folder / name).open("rb+") as file:
        file.truncate(size - 1)
    assert f"{name} holds {size - 1} bytes, not {size}" in refusal(folder)


@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
def test_a_single_changed_token_is_noticed(folder, name):
    content = bytearray((folder / name).read_bytes())
    content[20] ^= 1
    (folder / name).write_bytes(content)
    assert f"{name} is not the file that meta.json describes" in refusal(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"train_tokens": 1}', "\udcff"])
def test_a_damaged_meta_file_is_named(folder, content):
    (folder / "meta.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    assert "meta.json is damaged" in refusal(folder)


def test_ids_beyond_the_vocabulary_are_refused(tmp_path):
    token_files.write(tmp_path, "mine", 50_257, [(TEXTS, IDS | {"val": np.array([50_257])})])
    assert "val.bin holds ids beyond the vocabulary of 50257" in refusal(tmp_path)


def test_parts_without_tokens_are_refused(tmp_path):
    token_files.write(tmp_path, "mine", 50_257, [(TEXTS, IDS | {"val": IDS["val"][:0]})])
    assert "meta.json is damaged" in refusal(tmp_path)


@pytest.mark.parametrize("key", token_files.META)
@pytest.mark.parametrize("value", [..., None, True, 7, 7.0, "seven", [], float("nan")])
def test_a_figure_of_the_meta_file_that_is_gone_or_changed_is_noticed(folder, key, value):
    meta = json.loads((folder / "meta.json").read_text())
    meta = {k: v for k, v in meta.items() if k != key} | ({} if value is ... else {key: value})
    (folder / "meta.json").write_text(json.dumps(meta))
    assert "meta.json is damaged" in refusal(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vocabulary", 10**12),  # training would make room for so many
        ("val_characters", 0),  # evaluation divides by them
        ("train_tokens", -1),
        ("train_tokens", 10**4299),
        ("corpus", "two\nlines"),
        ("corpus", "\ud800"),
        ("val_bytes", 1.5),
    ],
)
def test_a_meta_file_that_lies_with_a_right_checksum_is_noticed(folder, key, value):
    meta = json.loads((folder / "meta.json").read_text()) | {key: value}
    del meta["sha256"]
    meta["sha256"] = hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
    (folder / "meta.json").write_text(json.dumps(meta))
    assert "meta.json is damaged" in refusal(folder)


def test_a_meta_file_may_be_written_with_other_spaces(folder):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(dict(reversed(meta.items()))))
    assert token_files.read(folder).meta["corpus"] == "mine"


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000, "1" * 5_000])
def test_a_meta_file_that_json_chokes_on_is_one_line(folder, content):
    (folder / "meta.json").write_text(content)
    assert "meta.json is damaged" in refusal(folder)


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "meta.json"])
@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_file_is_one_line_and_waited_for_by_nobody(folder, name, kind):
    replace_by(folder / name, kind)
    assert name in refusal(folder)


def test_a_write_that_fails_leaves_the_old_files_and_nothing_else(folder):
    before = contents(folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # bytes a file: the disk is full
    try:
        with pytest.raises(OSError, match="File too large"):
            token_files.write(folder, "larger", 50_257, [(TEXTS, IDS)] * 200)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(folder) == before


def test_pieces_that_break_off_leave_the_old_files_and_nothing_else(folder):
    def pieces():
        yield TEXTS, IDS
        raise KeyboardInterrupt

    before = contents(folder)
    with pytest.raises(KeyboardInterrupt):
        token_files.write(folder, "other", 50_257, pieces())
    assert contents(folder) == before


def test_an_interrupted_replacement_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with files.replacing(path) as temporary:
        temporary.write_text("old")
    assert path.read_text() == "old"
    with pytest.raises(KeyboardInterrupt), files.replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert contents(path.parent) == {"file.txt": b"old"}


# --- batches


def windows(batches, epoch):
    """The starts of an epoch's windows, in their order, read off batches of one window."""
    n = batches.windows_per_epoch
    return [int(batches[epoch * n + place][0][0, 0]) for place in range(n)]


def test_y_is_x_one_token_on():
    batches = batches.Batches(np.arange(1_000, dtype=np.uint16), 16, 4, seed=1)
    x, y = batches[3]
    assert x.shape == y.shape == (4, 16)
    assert x.dtype == y.dtype == torch.int64
    assert x.is_contiguous() and y.is_contiguous()
    assert torch.equal(y, x + 1)
    assert torch.equal(x - x[:, :1], torch.arange(16).expand(4, 16))


@pytest.mark.parametrize("length", [17, 32, 33, 48, 49, 50, 1_000])
def test_every_window_is_seen_once_an_epoch(length):
    batches = batches.Batches(np.arange(length, dtype=np.uint16), 16, 1, seed=1)
    n = batches.windows_per_epoch
    assert n == max(1, (length - 1) // 16 - 1)
    for epoch in range(3):
        starts = sorted(windows(batches, epoch))
        assert starts == list(range(starts[0], starts[0] + 16 * n, 16))
        assert 0 <= starts[0] <= length - 1 - 16 * n


def test_epochs_differ_in_order_and_offset():
    batches = batches.Batches(np.arange(1_000, dtype=np.uint16), 16, 1, seed=1)
    first, second = windows(batches, 0), windows(batches, 1)
    assert first[0] % 16 != second[0] % 16
    assert np.argsort(first).tolist() != np.argsort(second).tolist()
    assert first != sorted(first)


def test_offsets_reach_both_ends_of_the_text():
    batches = batches.Batches(np.arange(40, dtype=np.uint16), 16, 1, seed=1)
    x, y = zip(*(batches[epoch] for epoch in range(500)), strict=True)
    assert torch.cat(x).min() == 0
    assert torch.cat(y).max() == 39


def test_a_batch_is_a_pure_function_of_its_index():
    text = np.arange(1_000, dtype=np.uint16)
    straight = batches.Batches(text, 16, 8, seed=1)
    expected = [straight[index] for index in range(40)]
    jumping = batches.Batches(text, 16, 8, seed=1)
    for index in [39, 0, 17, 5, 38, 6, 6, 30]:
        for ours, theirs in zip(jumping[index], expected[index], strict=True):
            assert torch.equal(ours, theirs)


def test_the_batch_size_cuts_one_stream_and_does_not_change_it():
    text = np.arange(1_000, dtype=np.uint16)
    ones = batches.Batches(text, 16, 1, seed=1)
    stream = torch.cat([ones[index][0] for index in range(7 * 50)])
    for size in [7, 50, 175]:  # 61 windows an epoch: all straddle epochs, the last over two
        batches = batches.Batches(text, 16, size, seed=1)
        cut = torch.cat([batches[index][0] for index in range(7 * 50 // size)])
        assert torch.equal(cut, stream)


def test_seeds_give_different_batches():
    text = np.arange(1_000, dtype=np.uint16)
    one, two = (batches.Batches(text, 16, 8, seed=seed)[0][0] for seed in (1, 2))
    assert not torch.equal(one, two)


def test_batches_come_from_a_mapped_file_as_from_memory(folder):
    mapped, memory = token_files.read(folder).train, IDS["train"]
    assert torch.equal(
        batches.Batches(mapped, 16, 8, seed=1)[2][0], batches.Batches(memory, 16, 8, seed=1)[2][0]
    )


def test_a_text_shorter_than_a_window_is_one_line_with_the_way_out():
    text = np.arange(16, dtype=np.uint16)
    with pytest.raises(UserError, match=r"model\.block_size is 16, but the training part") as error:
        batches.Batches(text, 16, 1, seed=1)
    assert "only 16 tokens and needs 17" in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"larger prepare\.validation_fraction"):
        token_files.check_length(text, "validation", 16)
    token_files.check_length(text, "validation", 15)
