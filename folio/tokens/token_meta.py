"""The description of the token files in meta.json: which files there are, with their checksums."""

import hashlib
import json
from pathlib import Path
from typing import Any

from folio import files
from folio.errors import UserError

PARTS = ("train", "val")
FORMAT = 2
SHARD = 1 << 29  # tokens in a file; in bytes, a multiple of the page size
COUNTS = "train_counts.bin"  # how often each id occurs in training, little-endian int64
SEGMENTED_COUNTS = "train_segmented_counts.bin"  # in all segmentations besides train together
MAX_SEGMENTATIONS = 99  # all of them are written at once
HINT = "run `dvc repro --force prepare`"
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
SEGMENTED = {
    "bpe_dropout": float,  # the probability that a merge was dropped
    "segmented_tokens": list,  # the number in each file
    "segmented_sha256": list,  # of each file
    "segmented_counts_sha256": str,
}  # more fields, if there are segmentations


def names(part: str, meta: dict[str, Any]) -> list[str]:
    """The names of a part's files."""
    count = max(1, -(-meta[f"{part}_tokens"] // SHARD))
    return [f"{part}.bin"] if count == 1 else [f"{part}-{n:05d}.bin" for n in range(count)]


def segmented_names(count: int) -> list[str]:
    """The names of the files with segmentations, and at the end of their counts."""
    return [*(f"train-segmented-{n:02d}.bin" for n in range(1, count + 1)), SEGMENTED_COUNTS]


def dump(meta: dict[str, Any]) -> str:
    """Return the content of meta.json."""
    return json.dumps(meta | {"sha256": _meta_sha256(meta)}, indent=2) + "\n"


def read(folder: Path) -> dict[str, Any]:
    """Return the fields of a folder's meta.json. Raises UserError if it is missing or damaged."""
    path = folder / "meta.json"
    try:
        meta = json.loads(files.read(path, max_bytes=1 << 20))
        if meta.pop("sha256") != _meta_sha256(meta):
            raise ValueError
        if "format" not in meta:
            raise UserError(f"{folder} was written by an earlier version of Folio: {HINT}")
        _check(meta)
    except OSError as error:
        raise unreadable(path, error) from None
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path} is damaged: {HINT}") from None
    return meta


def _check(meta: dict[str, Any]) -> None:
    """Raise ValueError unless meta has the form that write() produces. It may come from an
    untrusted source."""
    types = META | (SEGMENTED if "segmented_tokens" in meta else {})
    if {key: type(value) for key, value in meta.items()} != types:
        raise ValueError
    if meta["format"] != FORMAT or not 0 <= meta["documents"] < 1 << 63:
        raise ValueError
    counts = [value for key, value in meta.items() if types[key] is int and key != "documents"]
    if "segmented_tokens" in meta:
        counts += meta["segmented_tokens"]
        hashes = meta["segmented_sha256"]
        if not 0 < len(hashes) == len(meta["segmented_tokens"]) <= MAX_SEGMENTATIONS:
            raise ValueError
        if {type(each) for each in hashes} != {str} or not 0 <= meta["bpe_dropout"] < 1:
            raise ValueError
    if not all(type(count) is int and 0 < count < 1 << 63 for count in counts):
        raise ValueError
    if meta["vocabulary"] > 1 << 24:  # training would allocate so many rows
        raise ValueError
    for part in PARTS:
        hashes = meta[f"{part}_shards"]
        if len(hashes) != len(names(part, meta)) or joined(hashes) != meta[f"{part}_sha256"]:
            raise ValueError
    if not meta["corpus"].isprintable():  # corpus.find returns only printable names
        raise ValueError


def unreadable(path: Path, error: OSError) -> UserError:
    if isinstance(error, FileNotFoundError):
        return UserError(f"{path} is missing: {HINT}")
    return UserError(f"{path} cannot be read ({error.strerror}): remove it, then {HINT}")


def joined(hashes: list[str]) -> str:
    """The checksum of a part, from those of its files."""
    return hashes[0] if len(hashes) == 1 else sha256("".join(hashes).encode())


def _meta_sha256(meta: dict[str, Any]) -> str:
    """Return the checksum of meta.json's fields, regardless of their order and white space."""
    return sha256(json.dumps(meta, sort_keys=True).encode())


def sha256(content: bytes | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()
