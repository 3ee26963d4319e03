"""Token files on disk: written by the prepare stage and verified whenever they are opened."""

import contextlib
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from folio import files
from folio.errors import UserError

PARTS = ("train", "val")
DTYPE = np.dtype("<u2")  # little-endian on every machine
_HINT = "run `dvc repro --force prepare`"
META = {
    "corpus": str,
    "vocabulary": int,
    "text_sha256": str,
    "train_tokens": int,
    "train_characters": int,
    "train_bytes": int,
    "train_sha256": str,
    "val_tokens": int,
    "val_characters": int,
    "val_bytes": int,
    "val_sha256": str,
}  # the fields of meta.json with their types; it also has the sha256 of these fields


@dataclass(frozen=True)
class TokenData:
    train: np.ndarray  # [N] uint16, read-only, mapped from the file
    val: np.ndarray  # [M] uint16, like train; follows it in the text
    meta: dict[str, Any]  # as write() returned it: corpus, vocabulary, counts, checksums
    digest: str  # sha256 of the two files' sha256: it identifies the data a model is trained on


def write(
    folder: Path,
    corpus: str,
    vocabulary: int,
    pieces: Iterable[tuple[dict[str, str], dict[str, np.ndarray]]],
) -> dict[str, Any]:
    """Write train.bin, val.bin and meta.json, and return the content of meta.json.

    `vocabulary` is the number of token ids. `pieces` are the consecutive pieces of the text, each
    with the text and the token ids, [tokens], of its "train" and "val" parts; in most pieces one of
    the two parts is empty. All three files are complete before the first one is renamed to its
    final name, and meta.json is renamed last.
    """
    meta: dict[str, Any] = {key: kind() for key, kind in META.items()}
    meta |= {"corpus": corpus, "vocabulary": vocabulary}
    with contextlib.ExitStack() as stack:  # renames in reverse order of entering
        names = {"meta": "meta.json"} | {part: f"{part}.bin" for part in PARTS}
        paths = {
            key: stack.enter_context(files.replacing(folder / name)) for key, name in names.items()
        }
        _write_parts(paths, meta, pieces)
        content = meta | {"sha256": _meta_sha256(meta)}
        paths["meta"].write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return meta


def read(folder: Path) -> TokenData:
    """Verify the token files against the checksums in meta.json, and map them into memory.

    Raises UserError with the name of the file if one is missing, truncated or modified.
    """
    path = folder / "meta.json"
    try:
        meta = json.loads(files.read(path, max_bytes=1 << 20))
        if meta.pop("sha256") != _meta_sha256(meta):
            raise ValueError
        _check(meta)
    except OSError as error:
        raise _unreadable(path, error) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path} is damaged: {_HINT}") from None
    train, val = (_open(folder / f"{part}.bin", part, meta) for part in PARTS)
    digest = _sha256("".join(meta[f"{part}_sha256"] for part in PARTS).encode())
    return TokenData(train, val, meta, digest)


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


def _write_parts(
    paths: dict[str, Path],
    meta: dict[str, Any],
    pieces: Iterable[tuple[dict[str, str], dict[str, np.ndarray]]],
) -> None:
    """Write the train and val ids to their files, and add counts and checksums to meta."""
    hashes = {key: hashlib.sha256() for key in ("text", *PARTS)}
    with contextlib.ExitStack() as stack:
        outputs = {part: stack.enter_context(paths[part].open("wb")) for part in PARTS}
        for texts, ids in pieces:
            for part in PARTS:
                text = texts[part].encode()
                content = np.ascontiguousarray(ids[part], dtype=DTYPE).data
                meta[f"{part}_tokens"] += len(content)
                meta[f"{part}_characters"] += len(texts[part])
                meta[f"{part}_bytes"] += len(text)  # the size of the text in UTF-8
                hashes["text"].update(text)
                hashes[part].update(content)  # the hash of the file
                # Not ndarray.tofile: the error that it raises on a full disk has no errno.
                outputs[part].write(content)
    for key, digest in hashes.items():
        meta[f"{key}_sha256"] = digest.hexdigest()


def _open(path: Path, part: str, meta: dict[str, Any]) -> np.ndarray:
    """Map a part's file into memory and verify its size, its checksum and its token ids."""
    expected = meta[f"{part}_tokens"] * DTYPE.itemsize
    try:
        size = path.stat().st_size
        if size != expected:
            raise UserError(f"{path} has {size} bytes instead of {expected}: {_HINT}")
        tokens = np.memmap(path, dtype=DTYPE, mode="r")
    except OSError as error:
        raise _unreadable(path, error) from None
    if _sha256(tokens.data) != meta[f"{part}_sha256"]:
        raise UserError(f"{path} does not match its checksum in meta.json: {_HINT}")
    if tokens.max() >= meta["vocabulary"]:
        raise UserError(
            f"{path} has token ids outside the vocabulary of {meta['vocabulary']}: {_HINT}"
        )
    return tokens


def _check(meta: dict[str, Any]) -> None:
    """Raise ValueError unless meta has the form that write() produces. It may come from an
    untrusted source."""
    if {key: type(value) for key, value in meta.items()} != META:
        raise ValueError
    counts = [value for value in meta.values() if type(value) is int]
    if not all(0 < count < 1 << 63 for count in counts):
        raise ValueError
    if meta["vocabulary"] > 1 << 16:  # ids have 16 bits
        raise ValueError
    if not meta["corpus"].isprintable():  # corpus.read returns only printable names
        raise ValueError


def _unreadable(path: Path, error: OSError) -> UserError:
    if isinstance(error, FileNotFoundError):
        return UserError(f"{path} is missing: {_HINT}")
    return UserError(f"{path} cannot be read ({error.strerror}): remove it, then {_HINT}")


def _meta_sha256(meta: dict[str, Any]) -> str:
    """Return the checksum of meta.json's fields, regardless of their order and white space."""
    return _sha256(json.dumps(meta, sort_keys=True).encode())


def _sha256(content: bytes | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()
