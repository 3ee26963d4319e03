"""Encoding a corpus piece by piece, on all cores."""

import os

import numpy as np

from folio.corpus.corpus import Corpus
from folio.corpus.encoding import encode_corpus
from folio.tokens import tokenizer


def test_encode_corpus_yields_the_ids_of_both_parts_in_order(monkeypatch):
    monkeypatch.setattr(tokenizer.pieces, "__defaults__", (20,))
    text = "What, ho!\n\nMy lord? 'Tis  I.\r\n \n\U0001f642" * 30
    source = Corpus("mine", len(text), 500, lambda: iter(text))
    pieces = list(encode_corpus(source))
    assert len(pieces) > 10
    for part, expected in {"train": text[:500], "val": text[500:]}.items():
        assert "".join(piece[part] for piece, _ in pieces) == expected
        ids = np.concatenate([ids[part] for _, ids in pieces])
        assert tokenizer.decode(ids) == expected


def test_encode_corpus_queues_only_a_few_pieces(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(2), raising=False)
    monkeypatch.setattr(tokenizer.pieces, "__defaults__", (1_000,))
    read = []  # the chunks read so far, each a little longer than a piece

    def chunks():
        for number in range(500):
            read.append(number)
            yield "word " * 201

    source = Corpus("mine", 500 * 1_005, 1_000, chunks)
    ahead = [len(read) - yielded for yielded, _ in enumerate(encode_corpus(source))]
    assert len(ahead) > 400 and max(ahead) < 10
