"""However a corpus is divided into tasks and segments, its tokens are those of the whole text."""

import contextlib
import io
import os
import random

import numpy as np
import pytest

from folio.corpus import assembly, corpus, encoding, processes, reading, segments, tables, tasks
from folio.corpus.statistics import CorpusStatistics
from folio.errors import UserError
from folio.tokens import tokenizer

PIECES = list("   \n\n\t\r\x85\u2028\u3000\x1c\xa0\u200babc.,'\u4e2d\U0001f642\u00e9")
PIECES += ["\n\n", " the", "<|endoftext|>"]
NONE = np.empty(0, dtype=np.uint16)
END = tokenizer.VOCAB_SIZE - 1


@pytest.fixture(autouse=True)
def one_core(monkeypatch):
    """The sizes that a test sets do not reach other processes."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(1), raising=False)


def text(chance: random.Random, length: int) -> str:
    return "".join(chance.choices(PIECES, k=chance.randrange(length)))


def encode(folder, work, fraction=0.1, lose=lambda segment: False, training=1.0):
    """Encode a corpus, lose some of the segments, and encode these again."""
    found = folder.find()
    plan = segments.Plan(found, "text", tasks.divide(found, "text"))
    work.mkdir(exist_ok=True)
    processes.encode(plan, work, True)
    for segment in segments.find(work):
        if lose(segment):
            segment.path.unlink()
    processes.encode(plan, work, True)
    return assembly.assemble(plan, segments.find(work), fraction, training)


def ids_of(encoded):
    return {part: np.concatenate([NONE, *pieces]) for part, pieces in encoded.ids.items()}


def joined(texts):
    """The running text of .txt files."""
    found = ""
    for each in texts[:-1]:
        found += each + ("\n" if each and not each.endswith("\n") else "")
    return found + texts[-1]


def expected_of_text(texts, fraction):
    whole = joined(texts)
    cut = int(len(whole) * (1 - fraction))
    parts = {"train": whole[:cut], "val": whole[cut:]}
    counts = CorpusStatistics(tokenizer.VOCAB_SIZE)
    for piece in tokenizer.pieces([whole]):
        counts.add_text(piece)
    usable = whole.strip() and all(parts.values())
    return (
        (
            {part: tokenizer.encode(each) for part, each in parts.items()},
            {part: len(each) for part, each in parts.items()},
            counts,
        )
        if usable
        else None
    )


def expected_of_documents(documents, fraction):
    kept = [each for each in documents if each and not each.isspace()]
    target, length, cut = int(sum(map(len, kept)) * (1 - fraction)), 0, 0
    while cut < len(kept) and length + len(kept[cut]) <= target:
        length += len(kept[cut])
        cut += 1
    parts = {"train": kept[:cut], "val": kept[cut:]}
    counts = CorpusStatistics(tokenizer.VOCAB_SIZE)
    for each in kept:
        for piece in tokenizer.pieces([each]):
            counts.add_text(piece)
        counts.end_document()
    return (
        (
            {
                part: np.concatenate([NONE, *(np.append(tokenizer.encode(t), END) for t in each)])
                for part, each in parts.items()
            },
            {part: sum(map(len, each)) for part, each in parts.items()},
            counts,
        )
        if all(parts.values())
        else None
    )


def is_utf8(content):
    with contextlib.suppress(UnicodeDecodeError):
        return content.decode() is not None


def check_training_fractions(folder, work, fraction, whole, chance):
    """The training text is the end of the one without a fraction, from a whole character on."""
    expected = ids_of(encode(folder, work, fraction))
    for training in chance.sample([1e-9, 0.1, 0.37, 0.999], 2):
        tokens = expected["train"]
        used = tokens[len(tokens) - int(len(tokens) * training) :]
        while not is_utf8(tokenizer.decode_bytes(used)):
            used = used[1:]
        text = tokenizer.decode_bytes(used[used != END])
        if not text:
            with pytest.raises(UserError, match=f"training_fraction {training} leaves none of"):
                encode(folder, work, fraction, training=training)
            continue
        part = encode(folder, work, fraction, training=training)
        found = ids_of(part)
        assert np.array_equal(found["train"], used)
        assert np.array_equal(found["val"], expected["val"])
        sizes = {"tokens": len(used), "characters": len(text.decode()), "bytes": len(text)}
        assert part.facts == whole.facts | {f"train_{unit}": n for unit, n in sizes.items()}
        assert np.array_equal(part.statistics.train, np.bincount(used, minlength=50257))
        assert np.array_equal(part.statistics.counts, whole.statistics.counts)


@pytest.mark.parametrize("kinds", [["txt"], ["txt", "jsonl", "parquet"]], ids=["text", "documents"])
@pytest.mark.parametrize("seed", range(40))
def test_tokens_are_those_of_the_whole_text(corpus_folder, tmp_path, monkeypatch, seed, kinds):
    chance = random.Random(seed)
    monkeypatch.setattr(reading, "CHUNK", chance.choice([1, 2, 5, 17, 1_000]))
    monkeypatch.setattr(tables, "_ROWS", chance.choice([1, 3]))
    monkeypatch.setattr(tokenizer.pieces, "__defaults__", (chance.choice([1, 7, 50]),))
    monkeypatch.setattr(tasks, "TASK", chance.choice([3, 20, 60, 1_000]))
    monkeypatch.setattr(encoding, "SEGMENT", chance.choice([5, 30, 200]))
    monkeypatch.setattr(encoding, "_BUFFER", chance.choice([1, 20, 1_000]))
    texts, documents = [], []
    for number in range(chance.randrange(1, 6)):
        kind = chance.choice(kinds)
        suffix = chance.choice(["", ".gz", ".zst"]) if kind != "parquet" else ""
        if kind == "txt":
            content = text(chance, chance.choice([3, 30, 200]))
            texts.append(content)
            documents.append(content)
        else:
            content = [text(chance, 60) for _ in range(chance.randrange(6))]
            documents += content
        corpus_folder.write(f"{number}.{kind}{suffix}", content)
    fraction = chance.choice([0.1, 0.5, 0.9])
    has_documents = corpus_folder.find().has_documents
    expected = (
        expected_of_documents(documents, fraction)
        if has_documents
        else expected_of_text(texts, fraction)
    )
    lose = lambda segment: chance.random() < 0.3  # noqa: E731
    if expected is None:
        with pytest.raises(UserError, match=r"contains no text|leaves none for"):
            encode(corpus_folder, tmp_path / "work", fraction, lose)
        return
    encoded = encode(corpus_folder, tmp_path / "work", fraction, lose)
    ids, characters, counts = expected
    for part, found in ids_of(encoded).items():
        assert np.array_equal(found, ids[part])
        assert encoded.facts[f"{part}_tokens"] == len(found)
        assert encoded.facts[f"{part}_characters"] == characters[part]
        assert np.array_equal(
            getattr(encoded.statistics, part), np.bincount(found, minlength=50257)
        )
    check_training_fractions(corpus_folder, tmp_path / "work", fraction, encoded, chance)
    assert encoded.facts["documents"] == (sum(found.tolist().count(END) for found in ids.values()))
    assert encoded.statistics.lines == counts.lines
    assert encoded.statistics.speeches == counts.speeches
    assert encoded.statistics.characters == counts.characters
    assert encoded.statistics.end_of_text == counts.end_of_text
    if has_documents:
        assert encoded.without_text == sum(not each.strip() for each in documents)


def test_end_of_text_in_a_document_is_plain_text(corpus_folder, tmp_path):
    texts = ["one<|endoftext|>two", "three", "four", "five"]
    corpus_folder.write("a.jsonl", texts)
    encoded = encode(corpus_folder, tmp_path / "work", 0.1)
    expected = [np.append(tokenizer.encode(each), END) for each in texts[:3]]
    assert np.array_equal(ids_of(encoded)["train"], np.concatenate(expected))
    assert encoded.statistics.end_of_text == 1


def test_validation_has_whole_documents_from_the_end(corpus_folder, tmp_path):
    corpus_folder.write("a.jsonl", ["a" * 50, "b" * 30])
    corpus_folder.write("b.txt", "c" * 20)
    for fraction, expected in [(0.1, "c" * 20), (0.2, "c" * 20), (0.21, "b" * 30 + "c" * 20)]:
        val = ids_of(encode(corpus_folder, tmp_path / f"{fraction}", fraction))["val"]
        assert tokenizer.decode(val).replace("<|endoftext|>", "") == expected


def test_too_few_documents_are_rejected(corpus_folder, tmp_path):
    corpus_folder.write("a.jsonl", ["one document"])
    with pytest.raises(UserError, match=r"has 1 documents with 12 characters.* none for training"):
        encode(corpus_folder, tmp_path / "work")


def test_documents_without_text_are_counted_and_the_first_is_named(
    corpus_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(tasks, "TASK", 20)
    corpus_folder.write("a.jsonl", ["one", "two", "three", "four", " \n", None, ""])
    corpus_folder.write("b.parquet", ["", "five"])
    corpus_folder.write("c.txt", " ")
    encoded = encode(corpus_folder, tmp_path / "work")
    assert encoded.without_text == 5
    assert encoded.first_without_text == "data/raw/set/a.jsonl line 5"
    (corpus_folder.path / "a.jsonl").write_bytes(b'{"text": "one"}\n')
    encoded = encode(corpus_folder, tmp_path / "work 2")
    assert encoded.first_without_text == "data/raw/set/b.parquet row 1"
    corpus_folder.write("a.txt", "")
    assert encode(corpus_folder, tmp_path / "work 3").first_without_text == "data/raw/set/a.txt"


def test_empty_and_blank_files_are_rejected(corpus_folder, tmp_path):
    corpus_folder.write("empty.txt", "")
    corpus_folder.write("blank.txt", "\ufeff \n\n")
    with pytest.raises(UserError, match=r"data/raw/set contains no text: add some"):
        encode(corpus_folder, tmp_path / "work")
    corpus_folder.write("short.txt", "x")
    (corpus_folder.path / "blank.txt").unlink()
    with pytest.raises(UserError, match=r"leaves none for training: change it, or use a longer"):
        encode(corpus_folder, tmp_path / "work 2")


def test_named_corpus_ignores_the_validation_fraction(tmp_path, monkeypatch):
    monkeypatch.setitem(corpus.NAMED, "sonnets", lambda: ("Shall I compare thee", 9))
    plan = segments.Plan(corpus.find("sonnets", tmp_path), "text", [[]])
    processes.encode(plan, tmp_path, True)
    for fraction in (0.1, 0.5):
        ids = ids_of(assembly.assemble(plan, segments.find(tmp_path), fraction))
        assert [*map(tokenizer.decode, ids.values())] == ["Shall I c", "ompare thee"]


def test_plan_is_the_same_after_it_was_saved(corpus_folder, tmp_path):
    corpus_folder.write("a.txt", "text")
    (corpus_folder.path / os.fsdecode(b"\xff.txt")).write_text("name that is not UTF-8")
    corpus_folder.write("b.parquet", ["a"] * 9)
    found = corpus_folder.find()
    plan = segments.Plan(found, "text", tasks.divide(found, "text"))
    plan.save(tmp_path)
    assert segments.Plan.load(tmp_path) == plan


def test_incomplete_segment_has_no_name(corpus_folder, tmp_path, monkeypatch):
    corpus_folder.write("a.txt", "text enough")
    found = corpus_folder.find()
    plan = segments.Plan(found, "text", tasks.divide(found, "text"))

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="No space"):
        processes.encode(plan, tmp_path, True)
    assert segments.find(tmp_path) == [] and not list(tmp_path.glob("*.npz"))


def test_bar_counts_the_bytes_of_the_files(corpus_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "TASK", 1_000)
    corpus_folder.write("a.txt", "word " * 1_000)
    corpus_folder.write("b.jsonl.gz", ["word " * 1_000] * 9)
    corpus_folder.write("c.parquet", ["word " * 1_000] * 9)
    found = corpus_folder.find()
    plan = segments.Plan(found, "text", tasks.divide(found, "text"))
    weights = [sum(part.weight for part in task) for task in plan.tasks]
    assert sum(weights) == pytest.approx(found.size)
    bars = []

    class Bar(io.StringIO):
        def update(self, count):
            bars.append(count)

    monkeypatch.setattr(processes.progress, "bar", lambda *_: Bar())
    processes.encode(plan, tmp_path, None)
    assert sum(bars) == pytest.approx(found.size)
