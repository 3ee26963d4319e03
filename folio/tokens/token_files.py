"""Token files on disk: written by the prepare stage and checked whenever they are opened.

A part of the text, "train" or "val", is a file such as train.bin, or several if it has more than
SHARD tokens: train-00000.bin, train-00001.bin, ... They contain the token ids and nothing else, 2
bytes each, or 4 if the vocabulary needs them. Additional segmentations of the training text are
each in one file: train-segmented-01.bin, ...
"""

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from folio import files
from folio.errors import UserError
from folio.tokens import token_meta
from folio.tokens.mapping import map_files

# Token files, and those that were not complete when the process was killed.
_OURS = re.compile(
    r"(train|val)(-(segmented-)?\d+)?\.bin|train_segmented_counts\.bin"
    r"|\.(train|val).*\.[0-9a-f]{8}\.bin"
)


@dataclass(frozen=True)
class TokenData:
    train: np.ndarray  # [N] uint16 or uint32, read-only, mapped from the files
    val: np.ndarray  # [M], like train; follows it in the text
    meta: dict[str, Any]  # as write() returned it: corpus, vocabulary, counts, checksums
    digest: str  # sha256 of the files' sha256: it identifies the data a model is trained on
    train_counts: np.ndarray  # [vocabulary] int64: how often each id occurs in train
    segmented: tuple[np.ndarray, ...] = ()  # like train: random segmentations of the same text
    segmented_counts: np.ndarray | int = 0  # like train_counts, of all of these together

    @property
    def trained_counts(self) -> np.ndarray:
        """How often each id occurs in train and its segmentations, [vocabulary] int64."""
        return self.train_counts + self.segmented_counts


@dataclass(frozen=True)
class Segmentations:
    """Random segmentations of the training text that `write` adds."""

    count: int
    bpe_dropout: float  # for meta.json
    # From the tokens of train, yields for each piece of the text its ids in each segmentation.
    segment: Callable[[np.ndarray], Iterable[list[np.ndarray]]]


def dtype_of(vocabulary: int) -> np.dtype:
    """The type of a token in a file; little-endian on every machine."""
    return np.dtype("<u2" if vocabulary <= 1 << 16 else "<u4")


def write(
    folder: Path,
    facts: dict[str, Any],
    train_counts: np.ndarray,
    ids: dict[str, Iterable[np.ndarray]],
    segmentations: Segmentations | None = None,
) -> dict[str, Any]:
    """Write the token files and meta.json, and return the content of meta.json.

    facts: as in token_meta.FACTS. train_counts: [vocabulary]. ids: for each part, its token ids, in
    pieces of any length. segmentations: to be added. All files are complete before the first one is
    renamed to its final name, and meta.json is renamed last. Then other token files in the folder
    are removed: those of an earlier call, and what a killed process left.
    """
    assert facts.keys() == token_meta.FACTS.keys()
    meta: dict[str, Any] = facts | {"format": token_meta.FORMAT}
    with contextlib.ExitStack() as stack:  # renames in reverse order of entering
        paths = {
            name: stack.enter_context(files.replacing(folder / name))
            for name in [
                *("meta.json", token_meta.COUNTS),
                *(name for part in token_meta.PARTS for name in token_meta.names(part, meta)),
                *(token_meta.segmented_names(segmentations.count) if segmentations else []),
            ]
        }
        stack.enter_context(files.naming(folder))
        dtype = dtype_of(meta["vocabulary"])
        for part in token_meta.PARTS:
            shards = [paths[name] for name in token_meta.names(part, meta)]
            hashes = list(_write_shards(shards, ids[part], dtype))
            meta |= {f"{part}_shards": hashes, f"{part}_sha256": token_meta.joined(hashes)}
        counts = np.ascontiguousarray(train_counts, dtype="<i8").data
        paths[token_meta.COUNTS].write_bytes(counts)
        meta["train_counts_sha256"] = token_meta.sha256(counts)
        if segmentations:
            train = map_files([paths[name] for name in token_meta.names("train", meta)], dtype)
            meta |= _write_segmented(paths, segmentations, train, len(train_counts))
        paths["meta.json"].write_text(token_meta.dump(meta), encoding="utf-8")
    for path in folder.iterdir():
        if _OURS.fullmatch(path.name) and path.name not in paths:
            path.unlink()
    return meta


def read(folder: Path) -> TokenData:
    """Check the token files against meta.json, and map them into memory.

    The sizes of all files are checked, and the checksum and the ids of a part that is a single
    file, and of the segmentations if they have no more tokens than such a file may have. Those of
    larger parts would take minutes (an SSD reads 100 GB in 20 s at best).
    Raises UserError with the name of the file if one is missing, truncated or modified.
    """
    meta = token_meta.read(folder)
    train, val = (_open(folder, part, meta) for part in token_meta.PARTS)
    counts = _read_counts(folder / token_meta.COUNTS, meta, meta["train_counts_sha256"])
    hashes = [digest for part in token_meta.PARTS for digest in meta[f"{part}_shards"]]
    if "segmented_tokens" not in meta:
        return TokenData(train, val, meta, token_meta.sha256("".join(hashes).encode()), counts)
    digest = token_meta.sha256("".join([*hashes, *meta["segmented_sha256"]]).encode())
    more = _read_counts(folder / token_meta.SEGMENTED_COUNTS, meta, meta["segmented_counts_sha256"])
    return TokenData(train, val, meta, digest, counts, _open_segmented(folder, meta), more)


def check_length(tokens: np.ndarray, part: str, block_size: int) -> None:
    """Raise UserError if the [N] tokens of a part are fewer than one window.

    part: "training" or "validation". A window has block_size tokens, plus the target of the last.
    """
    if len(tokens) < block_size + 1:
        share = (
            "a larger" if part == "validation" else "a larger prepare.training_fraction, a smaller"
        )
        raise UserError(
            f"model.block_size is {block_size}, but the {part} part has only {len(tokens)} tokens"
            f" and needs at least {block_size + 1}: use a smaller model.block_size, a longer text,"
            f" or {share} prepare.validation_fraction"
        )


def _write_segmented(
    paths: dict[str, Path], segmentations: Segmentations, train: np.ndarray, vocabulary: int
) -> dict[str, Any]:
    """Write the segmentations of some tokens and their counts; return the fields of meta.json."""
    *names, counts_name = token_meta.segmented_names(segmentations.count)
    lengths, hashes = [0] * len(names), [hashlib.sha256() for _ in names]
    counts = np.zeros(vocabulary, dtype="<i8")
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(paths[name].open("wb")) for name in names]
        for pieces in segmentations.segment(train):
            for n, (file, ids) in enumerate(zip(opened, pieces, strict=True)):
                content = np.ascontiguousarray(ids, dtype=train.dtype).data
                file.write(content)
                hashes[n].update(content)
                lengths[n] += len(ids)
                counts += np.bincount(ids, minlength=vocabulary)
    paths[counts_name].write_bytes(counts.data)
    return {
        "bpe_dropout": segmentations.bpe_dropout,
        "segmented_tokens": lengths,
        "segmented_sha256": [each.hexdigest() for each in hashes],
        "segmented_counts_sha256": token_meta.sha256(counts.data),
    }


def _write_shards(
    paths: list[Path], pieces: Iterable[np.ndarray], dtype: np.dtype
) -> Iterator[str]:
    """Write the ids to files of SHARD tokens, the last one with the rest; yield their sha256."""
    pieces, rest = iter(pieces), np.empty(0, dtype=dtype)
    for path in paths:
        digest, missing = hashlib.sha256(), token_meta.SHARD
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


def _open(folder: Path, part: str, meta: dict[str, Any]) -> np.ndarray:
    """Map a part's files into memory and check them as `read` says."""
    dtype = dtype_of(meta["vocabulary"])
    paths = [folder / name for name in token_meta.names(part, meta)]
    left = meta[f"{part}_tokens"]
    for path in paths:
        count, left = min(left, token_meta.SHARD), max(0, left - token_meta.SHARD)
        _check_size(path, count * dtype.itemsize)
    try:
        tokens = map_files(paths, dtype)
    except OSError as error:
        raise token_meta.unreadable(paths[0], error) from None
    if len(paths) == 1:
        _check_content(tokens, paths[0], meta[f"{part}_shards"][0], meta["vocabulary"])
    return tokens


def _open_segmented(folder: Path, meta: dict[str, Any]) -> tuple[np.ndarray, ...]:
    """Map the segmentations into memory and check them as `read` says."""
    dtype, found = dtype_of(meta["vocabulary"]), []
    lengths, hashes = meta["segmented_tokens"], meta["segmented_sha256"]
    names = token_meta.segmented_names(len(lengths))[:-1]
    for name, length, sha256 in zip(names, lengths, hashes, strict=True):
        path = folder / name
        _check_size(path, length * dtype.itemsize)
        try:
            found.append(map_files([path], dtype))
        except OSError as error:
            raise token_meta.unreadable(path, error) from None
        if sum(lengths) <= token_meta.SHARD:
            _check_content(found[-1], path, sha256, meta["vocabulary"])
    return tuple(found)


def _check_size(path: Path, expected: int) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise token_meta.unreadable(path, error) from None
    if size != expected:
        raise UserError(f"{path} has {size} bytes instead of {expected}: {token_meta.HINT}")


def _check_content(tokens: np.ndarray, path: Path, sha256: str, vocabulary: int) -> None:
    if token_meta.sha256(tokens.data) != sha256:
        raise UserError(f"{path} does not match its checksum in meta.json: {token_meta.HINT}")
    if tokens.max() >= vocabulary:
        raise UserError(
            f"{path} has token ids outside the vocabulary of {vocabulary}: {token_meta.HINT}"
        )


def _read_counts(path: Path, meta: dict[str, Any], sha256: str) -> np.ndarray:
    expected = 8 * meta["vocabulary"]
    _check_size(path, expected)
    try:
        content = files.read(path, max_bytes=expected)
    except OSError as error:
        raise token_meta.unreadable(path, error) from None
    if token_meta.sha256(content) != sha256:
        raise UserError(f"{path} does not match its checksum in meta.json: {token_meta.HINT}")
    return np.frombuffer(content, dtype="<i8")
