"""Training batches as a pure function of their index."""

import numpy as np
import pytest
import torch

from folio.errors import UserError
from folio.tokens import token_files
from folio.tokens.batches import Batches


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
    mapped = np.memmap(tmp_path / "train.bin", dtype=token_files.DTYPE, mode="r")
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
