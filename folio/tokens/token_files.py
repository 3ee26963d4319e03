"""Token files on disk: written by prepare, checked whenever they are opened."""

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
DTYPE = np.dtype("<u2")  # two bytes a token, the low one first, on every machine
WAY_OUT = "run `dvc repro --force prepare`"
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
}  # what meta.json holds, besides the sha256 of the rest


@dataclass(frozen=True)
class TokenData:
    train: np.ndarray  # [N] uint16, read-only, mapped from the file
    val: np.ndarray  # [M] uint16, as train; it follows train in the text
    meta: dict[str, Any]  # what write() returned: corpus, vocabulary, counts and sums of each part
    digest: str  # sha256 over those of the two files: what a model trained on them depends on


def write(
    folder: Path,
    corpus: str,
    vocabulary: int,
    pieces: Iterable[tuple[dict[str, str], dict[str, np.ndarray]]],
) -> dict[str, Any]:
    """Write train.bin, val.bin and meta.json, and return what meta.json says of them.

    `pieces` of the text, in its order, are each the text and the token ids, [tokens], of "train"
    and "val", where nearly always one of the two is empty; `vocabulary` is how many ids there are.
    All three files are whole before the first takes its name, and meta.json is the last to take
    its own.
    """
    meta: dict[str, Any] = {key: kind() for key, kind in META.items()}
    meta |= {"corpus": corpus, "vocabulary": vocabulary}
    with contextlib.ExitStack() as stack:  # the first to enter is the last to be renamed
        names = {"meta": "meta.json"} | {part: f"{part}.bin" for part in PARTS}
        paths = {
            key: stack.enter_context(files.replacing(folder / name)) for key, name in names.items()
        }
        _write_parts(paths, meta, pieces)
        content = meta | {"sha256": _meta_sha256(meta)}
        paths["meta"].write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return meta


def read(folder: Path) -> TokenData:
    """Open the token files, after checking each against meta.json, and that against itself.

    Raises UserError, naming the file, when one is missing, cut short or changed.
    """
    path = folder / "meta.json"
    try:
        meta = json.loads(files.read(path, most=1 << 20))
        if meta.pop("sha256") != _meta_sha256(meta):
            raise ValueError
        _check(meta)
    except OSError as problem:
        raise _unreadable(path, problem) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path} is damaged: {WAY_OUT}") from None
    parts = [_open(folder / f"{part}.bin", part, meta) for part in PARTS]
    digest = _sha256("".join(meta[f"{part}_sha256"] for part in PARTS).encode())
    return TokenData(*parts, meta, digest)


def check_length(tokens: np.ndarray, part: str, block_size: int) -> None:
    """Raise UserError when a part ("training" or "validation") is shorter than one window.

    A window is block_size tokens and the one after them, which the last of them has to predict.
    """
    if len(tokens) < block_size + 1:
        share = "larger" if part == "validation" else "smaller"
        raise UserError(
            f"model.block_size is {block_size}, but the {part} part has only {len(tokens)} tokens "
            f"and needs {block_size + 1}: set a smaller model.block_size, take a longer text, "
            f"or set a {share} prepare.validation_fraction"
        )


def _write_parts(
    paths: dict[str, Path],
    meta: dict[str, Any],
    pieces: Iterable[tuple[dict[str, str], dict[str, np.ndarray]]],
) -> None:
    """Write the ids of "train" and "val" to their paths; counts and sums go into meta."""
    sums = {key: hashlib.sha256() for key in ("text", *PARTS)}
    with contextlib.ExitStack() as stack:
        out = {part: stack.enter_context(paths[part].open("wb")) for part in PARTS}
        for texts, ids in pieces:
            for part in PARTS:
                text, content = texts[part].encode(), np.ascontiguousarray(ids[part], dtype=DTYPE)
                meta[f"{part}_tokens"] += len(content)
                meta[f"{part}_characters"] += len(texts[part])
                meta[f"{part}_bytes"] += len(text)  # of the text in UTF-8
                sums["text"].update(text)
                sums[part].update(content)  # of the file
                # Not ndarray.tofile: its error on a full disk does not carry ENOSPC.
                out[part].write(content)
    for key, summed in sums.items():
        meta[f"{key}_sha256"] = summed.hexdigest()


def _open(path: Path, part: str, meta: dict[str, Any]) -> np.ndarray:
    """A part's tokens, checked against meta. Hashing reads the file once; it stays mapped."""
    expected = meta[f"{part}_tokens"] * DTYPE.itemsize
    try:
        size = path.stat().st_size
        if size != expected:
            raise UserError(f"{path} holds {size} bytes, not {expected}: {WAY_OUT}")
        tokens = np.memmap(path, dtype=DTYPE, mode="r")
    except OSError as problem:
        raise _unreadable(path, problem) from None
    if _sha256(tokens) != meta[f"{part}_sha256"]:
        raise UserError(f"{path} is not the file that meta.json describes: {WAY_OUT}")
    if tokens.max() >= meta["vocabulary"]:
        raise UserError(
            f"{path} holds ids beyond the vocabulary of {meta['vocabulary']}: {WAY_OUT}"
        )
    return tokens


def _check(meta: dict[str, Any]) -> None:
    """ValueError unless meta is of the kind that write() makes: it may be a stranger's."""
    if {key: type(value) for key, value in meta.items()} != META:
        raise ValueError
    figures = [value for value in meta.values() if type(value) is int]
    if not all(0 < figure < 1 << 63 for figure in figures) or meta["vocabulary"] > 1 << 16:
        raise ValueError  # ids are of 16 bits
    if not meta["corpus"].isprintable():  # corpus.read gives no other
        raise ValueError


def _unreadable(path: Path, problem: OSError) -> UserError:
    if isinstance(problem, FileNotFoundError):
        return UserError(f"{path} is missing: {WAY_OUT}")
    return UserError(f"{path} cannot be read ({problem.strerror}): remove it, then {WAY_OUT}")


def _meta_sha256(meta: dict[str, Any]) -> str:
    """The sum of meta.json's figures, whatever their order and the file's spacing."""
    return _sha256(json.dumps(meta, sort_keys=True).encode())


def _sha256(content: bytes | np.ndarray) -> str:
    return hashlib.sha256(content).hexdigest()
