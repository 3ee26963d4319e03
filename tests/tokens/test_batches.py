"""Training batches as a pure function of their index."""

import numpy as np
import pytest
import torch

from folio.errors import UserError
from folio.tokens import token_files
from folio.tokens.batches import Batches


def window_starts(batches, epoch):
    """Where the windows of an epoch start, in order; the batches must have one window each."""
    n = batches.windows_per_epoch
    return [int(batches[epoch * n + i][0][0, 0]) for i in range(n)]


def test_y_is_x_shifted_by_one_token():
    batches = Batches(np.arange(1_000, dtype=np.uint16), 16, 4, seed=1)
    x, y = batches[3]
    assert x.shape == y.shape == (4, 16)
    assert x.dtype == y.dtype == torch.int64
    assert x.is_contiguous() and y.is_contiguous()
    assert torch.equal(y, x + 1)
    assert torch.equal(x - x[:, :1], torch.arange(16).expand(4, 16))


@pytest.mark.parametrize("length", [17, 32, 33, 48, 49, 50, 1_000])
def test_every_window_occurs_once_per_epoch(length):
    batches = Batches(np.arange(length, dtype=np.uint16), 16, 1, seed=1)
    n = batches.windows_per_epoch
    assert n == max(1, (length - 1) // 16 - 1)
    for epoch in range(3):
        starts = sorted(window_starts(batches, epoch))
        assert starts == list(range(starts[0], starts[0] + 16 * n, 16))
        assert 0 <= starts[0] <= length - 1 - 16 * n


def test_epochs_differ_in_order_and_offset():
    batches = Batches(np.arange(1_000, dtype=np.uint16), 16, 1, seed=1)
    first, second = window_starts(batches, 0), window_starts(batches, 1)
    assert first[0] % 16 != second[0] % 16
    assert np.argsort(first).tolist() != np.argsort(second).tolist()
    assert first != sorted(first)


def test_offsets_reach_both_ends_of_the_text():
    batches = Batches(np.arange(40, dtype=np.uint16), 16, 1, seed=1)
    x, y = zip(*(batches[epoch] for epoch in range(500)), strict=True)
    assert torch.cat(x).min() == 0
    assert torch.cat(y).max() == 39


def test_batch_is_a_pure_function_of_its_index():
    text = np.arange(1_000, dtype=np.uint16)
    in_order = Batches(text, 16, 8, seed=1)
    expected = [in_order[index] for index in range(40)]
    jumping = Batches(text, 16, 8, seed=1)
    for index in [39, 0, 17, 5, 38, 6, 6, 30]:
        for jumped, sequential in zip(jumping[index], expected[index], strict=True):
            assert torch.equal(jumped, sequential)


def test_batch_size_does_not_change_the_stream_of_windows():
    text = np.arange(1_000, dtype=np.uint16)
    ones = Batches(text, 16, 1, seed=1)
    stream = torch.cat([ones[index][0] for index in range(7 * 50)])
    for size in [7, 50, 175]:  # 61 windows per epoch: batches span 2 or 3 epochs
        batches = Batches(text, 16, size, seed=1)
        cut = torch.cat([batches[index][0] for index in range(7 * 50 // size)])
        assert torch.equal(cut, stream)


def test_seeds_give_different_batches():
    text = np.arange(1_000, dtype=np.uint16)
    one, two = (Batches(text, 16, 8, seed=seed)[0][0] for seed in (1, 2))
    assert not torch.equal(one, two)


def test_batches_of_a_mapped_file_are_those_of_an_array_in_memory(tmp_path):
    array = np.arange(300, dtype=np.uint16)
    array.tofile(tmp_path / "train.bin")
    mapped = np.memmap(tmp_path / "train.bin", dtype=token_files.DTYPE, mode="r")
    assert torch.equal(Batches(mapped, 16, 8, seed=1)[2][0], Batches(array, 16, 8, seed=1)[2][0])


def test_text_shorter_than_a_window_is_a_one_line_error_with_a_hint():
    text = np.arange(16, dtype=np.uint16)
    with pytest.raises(UserError, match=r"model\.block_size is 16, but the training part") as error:
        Batches(text, 16, 1, seed=1)
    assert "only 16 tokens and needs at least 17" in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"larger prepare\.validation_fraction"):
        token_files.check_length(text, "validation", 16)
    token_files.check_length(text, "validation", 15)
