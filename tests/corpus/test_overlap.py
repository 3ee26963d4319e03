"""The fraction of the validation text that also occurs in the training text."""

import numpy as np
import pytest

from folio.corpus import overlap
from folio.corpus.overlap import PASSAGE, shared_fraction

RNG = np.random.default_rng(1)


def tokens(count: int) -> np.ndarray:
    return RNG.integers(0, 50_257, count).astype(np.uint16)


def test_texts_without_common_passages_share_nothing():
    assert shared_fraction(tokens(5_000), tokens(1_000)) == 0


@pytest.mark.parametrize("chunk", [100, 137, 1 << 22])
@pytest.mark.parametrize("length", [PASSAGE - 1, PASSAGE, PASSAGE + 1, 400])
@pytest.mark.parametrize("at", [0, 321, "end"])
def test_common_passage_counts_from_64_tokens_on(monkeypatch, chunk, length, at):
    monkeypatch.setattr(overlap, "_CHUNK", chunk)
    train, val = tokens(3_000), tokens(1_000)
    start = 1_000 - length if at == "end" else at
    val[start : start + length] = train[777 : 777 + length]
    expected = length / 1_000 if length >= PASSAGE else 0
    assert shared_fraction(train, val) == pytest.approx(expected)


def test_validation_text_that_was_copied_from_training_is_shared_completely():
    train = tokens(1_000)
    assert shared_fraction(train, train[300:600]) == 1
    assert shared_fraction(np.zeros(500, np.uint16), np.zeros(100, np.uint16)) == 1


@pytest.mark.parametrize(("train", "val"), [(10, 500), (500, 10), (0, 0), (PASSAGE, PASSAGE)])
def test_short_texts_are_compared_too(train, val):
    assert shared_fraction(tokens(train), tokens(val)) == 0


def test_long_validation_text_is_sampled(monkeypatch):
    monkeypatch.setattr(overlap, "SAMPLE", 64 * 100)
    train, val = tokens(50_000), tokens(40_000)
    val[20_000:] = train[:20_000]
    assert shared_fraction(train, val) == pytest.approx(0.5, abs=0.02)
