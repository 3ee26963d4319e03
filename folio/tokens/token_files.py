"""Token files on disk: written by the prepare stage and checked whenever they are opened.

A part of the text, "train" or "val", is a file such as train.bin, or several if it has more than
SHARD tokens: train-00000.bin, train-00001.bin, ... They contain the token ids and nothing else, 2
bytes each, or 4 if the vocabulary needs them.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from folio import files
from folio.errors import UserError
from folio.tokens.mapping import map_files

PARTS = ("train", "val")
FORMAT = 2
SHARD = 1 << 29  # tokens in a file; in bytes, a multiple of the page size
COUNTS = "train_counts.bin"  # how often each id occurs in training, little-endian int64
# Token files, and those that were not complete when the process was killed.
_OURS = re.compile(r"(train|val)-\d+\.bin|(train|val)\.bin|\.(train|val).*\.[0-9a-f]{8}\.bin")
_HINT = "run `dvc repro --force prepare`"
FACTS = {
    "corpus": str,
    "vocabulary": int,  # number of token ids
    "documents": int,  # 0: the text is not divided into documents
    "text_sha256": str,
    "train_tokens": int,
    "train_characters": int,
    "train_bytes": int,  # of the text in UTF-8
    "val_tokens": int,
    "val_characters": int,
    "val_bytes": int,
}
META = FACTS | {
    "format": int,
    "train_shards": list,  # the sha256 of each file
    "train_sha256": str,  # the sha256 of the file; if there are several, of their sha256, joined
    "train_counts_sha256": str,
    "val_shards": list,
    "val_sha256": str,
}  # the fields of meta.json with their types; it also has the sha256 of these fields


@dataclass(frozen=True)
class TokenData:
    train: np.ndarray  # [N] uint16 or uint32, read-only, mapped from the files
    val: np.ndarray  # [M], like train; follows it in the text
    meta: dict[str, Any]  # as write() returned it: corpus, vocabulary, counts, checksums
    digest: str  # sha256 of the files' sha256: it identifies the data a model is trained on
    train_counts: np.ndarray  # [vocabulary] int64: how often each id occurs in train


def dtype_of(vocabulary: int) -> np.dtype:
    """The type of a token in a file; little-endian on every machine."""
    return np.dtype("<u2" if vocabulary <= 1 << 16 else "<u4")


def write(
    folder: Path,
    facts: dict[str, Any],
    train_counts: np.ndarray,
    ids: dict[str, Iterable[np.ndarray]],
) -> dict[str, Any]:
    """Write the token files and meta.json, and return the content of meta.json.

    facts: as in FACTS. train_counts: [vocabulary]. ids: for each part, its token ids, in pieces of
    any length. All files are complete before the first one is renamed to its final name, and
    meta.json is renamed last. Then other token files in the folder are removed: those of an earlier
    call, and what a killed process left.
    """
    assert facts.keys() == FACTS.keys()
    meta: dict[str, Any] = facts | {"format": FORMAT}
    with contextlib.ExitStack() as stack:  # renames in reverse order of entering
        paths = {
            name: stack.enter_context(files.replacing(folder / name))
            for name in [
                "meta.json",
                COUNTS,
                *(name for part in PARTS for name in _names(part, meta)),
            ]
        }
        for part in PARTS:
            shards = [paths[name] for name in _names(part, meta)]
            hashes = list(_write_shards(shards, ids[part], dtype_of(meta["vocabulary"])))
            meta |= {f"{part}_shards": hashes, f"{part}_sha256": _joined(hashes)}
        counts = np.ascontiguousarray(train_counts, dtype="<i8").data
        paths[COUNTS].write_bytes(counts)
        meta["train_counts_sha256"] = _sha256(counts)
        content = meta | {"sha256": _meta_sha256(meta)}
        paths["meta.json"].write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for path in folder.iterdir():
        if _OURS.fullmatch(path.name) and path.name not in paths:
            path.unlink()
    return meta


def read(folder: Path) -> TokenData:
    """Check the token files against meta.json, and map them into memory.

    The sizes of all files are checked, and the checksum and the ids of a part that is a single
    file. Those of several files would take minutes (an SSD reads 100 GB in 20 s at best), and
    `verify` checks them.
    Raises UserError with the name of the file if one is missing, truncated or modified.
    """
    meta = _read_meta(folder)
    train, val = (_open(folder, part, meta) for part in PARTS)
    counts = _read_counts(folder / COUNTS, meta)
    hashes = [digest for part in PARTS for digest in meta[f"{part}_shards"]]
    return TokenData(train, val, meta, _sha256("".join(hashes).encode()), counts)


def check_length(tokens: np.ndarray, part: str, block_size: int) -> None:
    """Raise UserError if the [N] tokens of a part are fewer than one window.

    part: "training" or "validation". A window has block_size tokens, plus the target of the last.
    """
    if len(tokens) < block_size + 1:
        share = "larger" if part == "validation" else "smaller"
        raise UserError(
            f"model.block_size is {block_size}, but the {part} part has only {len(tokens)} tokens"
            f" and needs at least {block_size + 1}: use a smaller model.block_size, a longer text,"
            f" or a {share} prepare.validation_fraction"
        )


def _names(part: str, meta: dict[str, Any]) -> list[str]:
    """The names of a part's files."""
    count = max(1, -(-meta[f"{part}_tokens"] // SHARD))
    return [f"{part}.bin"] if count == 1 else [f"{part}-{n:05d}.bin" for n in range(count)]


def _write_shards(
    paths: list[Path], pieces: Iterable[np.ndarray], dtype: np.dtype
) -> Iterator[str]:
    """Write the ids to files of SHARD tokens, the last one with the rest; yield their sha256."""
    pieces, rest = iter(pieces), np.empty(0, dtype=dtype)
    for path in paths:
        digest, missing = hashlib.sha256(), SHARD
        with path.open("wb") as file:
            while missing:
                if not len(rest):
                    following = next(pieces, None)
                    if following is None:
                        break
                    rest = np.ascontiguousarray(following, dtype=dtype)
                content, rest = rest[:missing].data, rest[missing:]
                missing -= len(content)
                digest.update(content)
                # Not ndarray.tofile: the error that it raises on a full disk has no errno.
                file.write(content)
        yield digest.hexdigest()


def _read_meta(folder: Path) -> dict[str, Any]:
    path = folder / "meta.json"
    try:
        meta = json.loads(files.read(path, max_bytes=1 << 20))
        if meta.pop("sha256") != _meta_sha256(meta):
            raise ValueError
        if "format" not in meta:
            raise UserError(f"{folder} was written by an earlier version of Folio: {_HINT}")
        _check(meta)
    except OSError as error:
        raise _unreadable(path, error) from None
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path} is damaged: {_HINT}") from None
    return meta


def _open(folder: Path, part: str, meta: dict[str, Any]) -> np.ndarray:
    """Map a part's files into memory and check them as `read` says."""
    dtype = dtype_of(meta["vocabulary"])
    paths = [folder / name for name in _names(part, meta)]
    left = meta[f"{part}_tokens"]
    for path in paths:
        count, left = min(left, SHARD), max(0, left - SHARD)
        _check_size(path, count * dtype.itemsize)
    try:
        tokens = map_files(paths, dtype)
    except OSError as error:
        raise _unreadable(paths[0], error) from None
    if len(paths) == 1:
        _check_content(tokens, paths[0], meta[f"{part}_shards"][0], meta["vocabulary"])
    return tokens


def _check_size(path: Path, expected: int) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise _unreadable(path, error) from None
    if size != expected:
        raise UserError(f"{path} has {size} bytes instead of {expected}: {_HINT}")


def _check_content(tokens: np.ndarray, path: Path, sha256: str, vocabulary: int) -> None:
    if _sha256(tokens.data) != sha256:
        raise UserError(f"{path} does not match its checksum in meta.json: {_HINT}")
    if tokens.max() >= vocabulary:
        raise UserError(f"{path} has token ids outside the vocabulary of {vocabulary}: {_HINT}")


def _read_counts(path: Path, meta: dict[str, Any]) -> np.ndarray:
    expected = 8 * meta["vocabulary"]
    _check_size(path, expected)
    try:
        content = files.read(path, max_bytes=expected)
    except OSError as error:
        raise _unreadable(path, error) from None
    if _sha256(content) != meta["train_counts_sha256"]:
        raise UserError(f"{path} does not match its checksum in meta.json: {_HINT}")
    return np.frombuffer(content, dtype="<i8")


def _check(meta: dict[str, Any]) -> None:
    """Raise ValueError unless meta has the form that write() produces. It may come from an
    untrusted source."""
    if {key: type(value) for key, value in meta.items()} != META:
        raise ValueError
    if meta["format"] != FORMAT or not 0 <= meta["documents"] < 1 << 63:
        raise ValueError
    counts = [value for key, value in meta.items() if META[key] is int and key != "documents"]
    if not all(0 < count < 1 << 63 for count in counts):
        raise ValueError
    if meta["vocabulary"] > 1 << 24:  # training would allocate so many rows
        raise ValueError
    for part in PARTS:
        hashes = meta[f"{part}_shards"]
        if len(hashes) != len(_names(part, meta)) or _joined(hashes) != meta[f"{part}_sha256"]:
            raise ValueError
    if not meta["corpus"].isprintable():  # corpus.find returns only printable names
        raise ValueError


def _unreadable(path: Path, error: OSError) -> UserError:
    if isinstance(error, FileNotFoundError):
        return UserError(f"{path} is missing: {_HINT}")
    return UserError(f"{path} cannot be read ({error.strerror}): remove it, then {_HINT}")


def _joined(hashes: list[str]) -> str:
    """The checksum of a part, from those of its files."""
    return hashes[0] if len(hashes) == 1 else _sha256("".join(hashes).encode())


def _meta_sha256(meta: dict[str, Any]) -> str:
    """Return the checksum of meta.json's fields, regardless of their order and white space."""
    return _sha256(json.dumps(meta, sort_keys=True).encode())


def _sha256(content: bytes | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()
