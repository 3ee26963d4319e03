"""Training batches as a pure function of their index."""

import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from folio.errors import UserError
from folio.tokens import batches as batches_module
from folio.tokens import token_files
from folio.tokens.batches import Batches
from folio.tokens.read_ahead import ReadAhead


def window_starts(batches, epoch):
    """Where the windows of an epoch start, in order; the tokens must be 0, 1, 2, ..."""
    n = batches.windows_per_epoch
    return batches.windows(epoch * n, n)[0][:, 0].tolist()


def test_y_is_x_shifted_by_one_token():
    x, y = Batches(np.arange(1_000, dtype=np.uint16), 16, seed=1).windows(12, 4)
    assert x.shape == y.shape == (4, 16)
    assert x.dtype == y.dtype == torch.int64
    assert x.is_contiguous() and y.is_contiguous()
    assert torch.equal(y, x + 1)
    assert torch.equal(x - x[:, :1], torch.arange(16).expand(4, 16))


@pytest.mark.parametrize("length", [17, 32, 33, 48, 49, 50, 1_000])
def test_every_window_occurs_once_per_epoch(length):
    batches = Batches(np.arange(length, dtype=np.uint16), 16, seed=1)
    n = batches.windows_per_epoch
    assert n == max(1, (length - 1) // 16 - 1)
    for epoch in range(3):
        starts = sorted(window_starts(batches, epoch))
        assert starts == list(range(starts[0], starts[0] + 16 * n, 16))
        assert 0 <= starts[0] <= length - 1 - 16 * n


def test_epochs_differ_in_order_and_offset():
    batches = Batches(np.arange(1_000, dtype=np.uint16), 16, seed=1)
    first, second = window_starts(batches, 0), window_starts(batches, 1)
    assert first[0] % 16 != second[0] % 16
    assert np.argsort(first).tolist() != np.argsort(second).tolist()
    assert first != sorted(first)


def test_offsets_reach_both_ends_of_the_text():
    batches = Batches(np.arange(40, dtype=np.uint16), 16, seed=1)
    x, y = batches.windows(0, 500)  # an epoch has one window
    assert x.min() == 0
    assert y.max() == 39


def test_windows_are_a_pure_function_of_first_and_count():
    text = np.arange(1_000, dtype=np.uint16)
    stream = Batches(text, 16, seed=1).windows(0, 7 * 50)  # 61 windows per epoch
    jumping = Batches(text, 16, seed=1)
    for first, count in [(343, 7), (0, 1), (17, 8), (0, 350), (60, 2), (60, 2), (50, 175)]:
        found = jumping.windows(first, count)
        for part, whole in zip(found, stream, strict=True):
            assert torch.equal(part, whole[first : first + count])


def test_first_windows_are_those_of_earlier_versions():
    x, _ = Batches(np.arange(1_000, dtype=np.uint16), 16, seed=1).windows(58, 6)
    assert x[:, 0].tolist() == [219, 619, 827, 12, 812, 588]


def test_seeds_give_different_batches():
    text = np.arange(1_000, dtype=np.uint16)
    one, two = (Batches(text, 16, seed=seed).windows(0, 8)[0] for seed in (1, 2))
    assert not torch.equal(one, two)


def test_batches_of_a_mapped_file_are_those_of_an_array_in_memory(tmp_path):
    array = np.arange(300, dtype=np.uint16)
    array.tofile(tmp_path / "train.bin")
    mapped = np.memmap(tmp_path / "train.bin", dtype=token_files.dtype_of(50_257), mode="r")
    expected = Batches(array, 16, seed=1).windows(16, 8)
    assert torch.equal(Batches(mapped, 16, seed=1).windows(16, 8)[0], expected[0])


def test_text_shorter_than_a_window_is_a_one_line_error_with_a_hint():
    text = np.arange(16, dtype=np.uint16)
    with pytest.raises(UserError, match=r"model\.block_size is 16, but the training part") as error:
        Batches(text, 16, seed=1)
    assert "only 16 tokens and needs at least 17" in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"larger prepare\.validation_fraction"):
        token_files.check_length(text, "validation", 16)
    token_files.check_length(text, "validation", 15)


@pytest.fixture
def large(monkeypatch):
    """Batches whose order is computed instead of shuffled."""
    monkeypatch.setattr(batches_module, "SHUFFLED", 100)
    return Batches(np.arange(16 * 500, dtype=np.uint16), 16, seed=1)


def test_computed_order_has_every_window_once_per_epoch(large):
    n = large.windows_per_epoch
    first, second = window_starts(large, 0), window_starts(large, 1)
    for starts in (first, second):
        assert sorted(starts) == list(range(min(starts), min(starts) + 16 * n, 16))
    assert np.argsort(first).tolist() != np.argsort(second).tolist()


def test_computed_order_is_a_pure_function_of_first_and_count(large):
    stream, _ = large.windows(0, 1_500)  # three epochs
    for first, count in [(1_400, 8), (0, 1), (495, 10), (490, 700), (3, 2)]:
        assert torch.equal(large.windows(first, count)[0], stream[first : first + count])


def test_order_of_a_huge_text_takes_no_memory(tmp_path):
    with (tmp_path / "train.bin").open("wb") as file:
        file.truncate(2 * 10**11)  # a sparse file of 10^11 tokens
    tokens = np.memmap(tmp_path / "train.bin", dtype="<u2", mode="r")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    huge = Batches(tokens, 1_024, seed=1)
    assert huge.windows(10**9, 16)[0].shape == (16, 1_024)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KB
    assert huge.windows_per_epoch == 97_656_248
    maps = Path("/proc/self/smaps").read_text()
    assert " rr " in maps.partition("train.bin")[2].partition("VmFlags:")[2].partition("\n")[0]


def test_rows_replace_the_token_ids():
    text = np.random.default_rng(0).integers(50, size=500).astype(np.uint16)
    row = np.random.default_rng(1).permutation(50).astype(np.uint16)
    found = Batches(text, 16, seed=1, rows=row).windows(3, 8)
    for part, whole in zip(found, Batches(row[text], 16, seed=1).windows(3, 8), strict=True):
        assert torch.equal(part, whole)


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_largest_ids_are_read_unchanged(dtype):
    text = np.arange(1_000, dtype=dtype) + np.array(np.iinfo(dtype).max - 999, dtype=dtype)
    x, _ = Batches(text, 16, seed=1).windows(0, 61)
    assert x.min() > np.iinfo(dtype).max - 1_000 and x.max() <= np.iinfo(dtype).max


def test_read_ahead_windows_are_those_read_directly():
    text = np.random.default_rng(0).integers(1 << 16, size=5_000, dtype=np.uint16)
    direct, ahead = Batches(text, 16, seed=1), Batches(text, 16, seed=1)
    ahead._read = ReadAhead(ahead._read_windows)
    firsts = [*range(0, 2_000, 8), *range(77, 1_000, 40), 5, 5]  # several epochs; a jump
    for first in firsts:
        for one, two in zip(direct.windows(first, 8), ahead.windows(first, 8), strict=True):
            assert torch.equal(one, two)
    ahead._read.close()


CANONICAL = np.arange(5_000, dtype=np.uint16)
# Each of its ids is 10,000 times its number plus its position.
SEGMENTED = [
    np.arange(10_000 * n, 10_000 * n + length, dtype=np.uint16)
    for n, length in enumerate([5_900, 5_000, 6_000, 5_850], start=1)
]


def test_windows_are_from_random_segmentations():
    x, y = Batches(CANONICAL, 16, seed=1, segmented=SEGMENTED).windows(0, 20_000)
    assert torch.equal(y, x + 1) and torch.equal(x - x[:, :1], torch.arange(16).expand_as(x))
    counts = np.bincount(x[:, 0].numpy() // 10_000)
    expected = 20_000 * np.array([0.3, *[0.7 / 4] * 4])
    assert np.abs(counts - expected).max() < 5 * np.sqrt(6_000)
    other, _ = Batches(CANONICAL, 16, seed=2, segmented=SEGMENTED).windows(0, 20_000)
    same = (other[:, 0] // 10_000 == x[:, 0] // 10_000).float().mean()
    assert same < 0.3  # independent choices agree in 0.3^2 + 4 * 0.175^2


def test_window_of_a_segmentation_starts_where_that_of_the_tokens_does():
    x, y = Batches(CANONICAL, 16, seed=1, segmented=SEGMENTED).windows(0, 5_000)
    starts = Batches(CANONICAL, 16, seed=1).windows(0, 5_000)[0][:, 0]
    numbers, found = x[:, 0] // 10_000, x[:, 0] % 10_000
    for number, tokens in enumerate([CANONICAL, *SEGMENTED]):
        of_it = numbers == number
        scaled = starts[of_it].double() * (len(tokens) / 5_000)
        assert torch.equal(found[of_it], scaled.long())
        assert y[of_it].max() % 10_000 <= len(tokens) - 1


def test_windows_of_segmentations_are_a_pure_function_of_first_and_count():
    stream = Batches(CANONICAL, 16, seed=1, segmented=SEGMENTED).windows(0, 1_000)
    jumping = Batches(CANONICAL, 16, seed=1, segmented=SEGMENTED)
    for first, count in [(743, 7), (0, 1), (305, 30), (0, 350), (60, 2), (60, 2)]:
        for part, whole in zip(jumping.windows(first, count), stream, strict=True):
            assert torch.equal(part, whole[first : first + count])


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_segmentations_that_are_joined_or_read_ahead_give_the_same_windows(dtype):
    arrays = [each.astype(dtype) for each in (CANONICAL, *SEGMENTED)]
    row = np.random.default_rng(1).permutation(50_000)
    direct, joined, ahead = (
        Batches(arrays[0], 16, seed=1, rows=row, segmented=arrays[1:]) for _ in range(3)
    )
    joined._join(torch.device("cpu"))  # as on a GPU with enough memory
    assert len(joined._tensors) == 1
    ahead._read = ReadAhead(ahead._read_windows)
    for first in [*range(0, 800, 8), 3]:
        x, y = direct.windows(first, 8)
        for other in (joined, ahead):
            found = other.windows(first, 8)
            assert torch.equal(found[0], x) and torch.equal(found[1], y)
    ahead._read.close()


def test_window_at_the_end_of_a_shorter_segmentation_ends_within_it():
    tokens, shorter = np.arange(40, dtype=np.uint16), np.arange(100, 117, dtype=np.uint16)
    _, y = Batches(tokens, 16, seed=1, segmented=[shorter]).windows(0, 300)
    assert y[y >= 100].max() == 116 and y[y < 100].max() == 39
    with pytest.raises(UserError, match="only 16 tokens"):
        Batches(tokens, 16, seed=1, segmented=[shorter[:16]])
