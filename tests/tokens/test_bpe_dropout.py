"""BPE dropout: segmentations of the same text, distributed as the definition requires."""

import hashlib
import itertools
import random
from collections import Counter

import numpy as np
import pytest

from folio.tokens import bpe_dropout, tokenizer

ODD = (
    "What, ho!\n\nMy lord? 'Tis  I'll--we've 1,024 <|endoftext|> \r\n \n\t\tna\u00efve \u4e2d\u6587"
    "\U0001f642\xa0x\u2003\u3000y\x85 z\x1cq\0 \u0928\u092e\u0938\u094d\u0924\u0947 A\u030a"
) + ("-" * 200 + " " * 150 + "x" * 127 + " " + "y" * 128 + "\u00e9" * 99 + "  \n  ")


@pytest.fixture
def in_small_pieces(monkeypatch):
    """The same code on many batches, decoded in chunks that divide characters."""
    monkeypatch.setattr(bpe_dropout, "_CHUNK", 7)
    monkeypatch.setattr(bpe_dropout, "_WORDS", 20)
    monkeypatch.setattr(tokenizer.pieces, "__defaults__", (30,))


def segment(tokens, count, dropout):
    """Each of the segmentations as a whole."""
    pieces = [*bpe_dropout.segment(tokens, count, dropout)]
    return [np.concatenate(each) for each in zip(*pieces, strict=True)]


def test_segmentations_without_dropout_are_those_of_tiktoken(tinyshakespeare):
    text = tinyshakespeare[:50_000] + ODD
    tokens = tokenizer.encode(text)
    for ids in segment(tokens, 2, 0.0):
        assert ids.dtype == np.uint16 and np.array_equal(ids, tokens)


@pytest.mark.usefixtures("in_small_pieces")
@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.5, 0.99])
def test_segmentations_are_of_the_same_documents(dropout):
    texts = [ODD, "a", "Speak, speak. ", ODD * 3, "\u4e2d\u6587" * 9, "  ", "We know't."]
    tokens = tokenizer.encode_documents(texts)
    for ids in segment(tokens, 3, dropout):
        parts = np.split(ids, np.flatnonzero(ids == 50256) + 1)
        assert [tokenizer.decode(part) for part in parts] == [
            *(f"{text}<|endoftext|>" for text in texts),
            "",
        ]
        assert np.array_equal(ids, tokens) == (dropout == 0)


def test_tokens_per_word_increase_with_the_dropout(tinyshakespeare):
    tokens = tokenizer.encode(tinyshakespeare[:10_000])
    lengths = [len(segment(tokens, 1, p)[0]) for p in (0.0, 0.1, 0.3, 0.9)]
    assert lengths == sorted(lengths) and lengths[0] == len(tokens)
    assert 1.1 * len(tokens) < lengths[1] < 1.3 * len(tokens)
    assert 3 * len(tokens) < lengths[-1] < 10_000


def simulate(characters, dropout, rng):
    """Algorithm 1 of the paper, read literally."""
    rank, parts = bpe_dropout._merges(), [*characters]
    while True:
        pairs = list(itertools.pairwise(parts))
        merges = [(rank[pair], at) for at, pair in enumerate(pairs) if pair in rank]
        merges = [merge for merge in merges if rng.random() >= dropout]
        if not merges:
            return tuple(parts)
        merged, at = min(merges)
        parts[at : at + 2] = [merged]


@pytest.mark.parametrize("dropout", [0.1, 0.4])
@pytest.mark.parametrize("word", [" the", " gracious", " understanding", " banana"])
def test_distribution_is_that_of_the_definition(word, dropout):
    draws, length = 10_000, len(word)
    rng = random.Random(7)
    characters = [int(tokenizer.encode(char)[0]) for char in word]
    expected = Counter(simulate(characters, dropout, rng) for _ in range(draws))
    [ids] = segment(tokenizer.encode(word * draws), 1, dropout)
    ends = np.cumsum([len(tokenizer.token_bytes(token)) for token in ids])
    cuts = np.flatnonzero(ends % length == 0) + 1
    assert len(cuts) == draws
    found = Counter(tuple(part.tolist()) for part in np.split(ids, cuts[:-1]))
    common = [ids for ids, count in expected.items() if count > draws / 100]
    assert len(common) > 3 or word == " the"
    for counts in (expected, found):
        counts["rare"] = draws - sum(counts[each] for each in common)
    for each in [*common, "rare"]:
        p, spread = expected[each] / draws, 1 / bpe_dropout._LARGEST_POOL + 2 / draws
        assert abs(found[each] / draws - p) < 4 * (p * spread) ** 0.5 + 1e-3, each


def test_segmentations_do_not_depend_on_their_number_and_differ(tinyshakespeare):
    tokens = tokenizer.encode(tinyshakespeare[:5_000])
    three, two = segment(tokens, 3, 0.1), segment(tokens, 2, 0.1)
    assert all(np.array_equal(*pair) for pair in zip(three, two, strict=False))
    assert len({each.tobytes() for each in three}) == 3


@pytest.mark.usefixtures("in_small_pieces")
def test_forgotten_pools_are_drawn_again_as_they_were(tinyshakespeare, monkeypatch):
    tokens = tokenizer.encode(tinyshakespeare[:5_000])
    kept = segment(tokens, 1, 0.3)
    monkeypatch.setattr(bpe_dropout, "_KEPT", 100)
    assert np.array_equal(segment(tokens, 1, 0.3)[0], kept[0])


def test_segmentations_are_the_same_on_every_machine():
    content = np.array(segment(tokenizer.encode(ODD * 20), 1, 0.1)[0], dtype="<u2").tobytes()
    assert hashlib.sha256(content).hexdigest() == (
        "f0e5e3004944dff8860cde1f0c8990717bb36aff8e2e19bcf4f69ec7697c7117"
    )
