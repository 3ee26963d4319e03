"""Atomic file writes, and safe reads."""

import errno
import hashlib
import shutil

import numpy as np
import pytest
import torch
from conftest import NOT_FILES, replace_by

from folio import files
from folio.errors import disk_hint
from folio.gpt import huggingface
from folio.gpt.model import GPT, ModelParams
from folio.tokens import token_files, token_meta, tokenizer
from folio.training import checkpoint
from folio.training.checkpoint import Checkpoint


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_replacing_creates_the_parent_folder_and_keeps_the_suffix(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with files.replacing(path) as temporary:
        assert temporary.parent == path.parent and temporary.suffix == ".txt"
        temporary.write_text("new")
    assert contents(path.parent) == {"file.txt": b"new"}


def test_replacing_leaves_only_the_old_file_if_it_is_interrupted(tmp_path):
    path = tmp_path / "file.txt"
    files.write_text(path, "old")
    with pytest.raises(KeyboardInterrupt), files.replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert contents(tmp_path) == {"file.txt": b"old"}


def write_model(folder):
    size = ModelParams(n_layer=1, n_head=1, n_embd=64, block_size=8, dropout=0.0)
    huggingface.save(GPT(size, 100), folder)


def write_tokens(folder):
    facts = dict.fromkeys(token_meta.FACTS, 9_000) | {"vocabulary": tokenizer.VOCAB_SIZE}
    ids = {part: [np.zeros(9_000, np.uint16)] for part in token_meta.PARTS}
    token_files.write(folder, facts, np.zeros(tokenizer.VOCAB_SIZE), ids)


WRITERS = {
    "a text": lambda folder: files.write_text(folder / "a.txt", "x" * 9_000),
    "a checkpoint": lambda folder: checkpoint.save(
        folder, Checkpoint(7, {"model.w": torch.zeros(9_000)}, {})
    ),
    "a model": write_model,
    "token files": write_tokens,
    "the tokenizer": lambda folder: tokenizer.save(folder, 8),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_full_disk_is_an_error_that_names_the_place(small_disk, writer):
    folder = small_disk.folder / "a folder"
    WRITERS[writer](folder)  # so that all folders and libraries are there
    shutil.rmtree(folder)
    folder.mkdir()
    small_disk.fill()
    with pytest.raises(OSError, match="No space left on device") as error:
        WRITERS[writer](folder)
    assert f"while writing {folder}" in disk_hint(error.value)


def test_error_of_a_copy_names_the_target():
    error = OSError(errno.ENOSPC, "No space left on device", "source", None, "target")
    assert "while writing target: free some space" in disk_hint(error)


def test_remove_folder_accepts_a_missing_folder(tmp_path):
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    for _ in range(2):
        files.remove_folder(tmp_path / "folder")
        assert list(tmp_path.iterdir()) == []


def test_read_limits_the_size_of_a_file(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    assert files.read(tmp_path / "file", max_bytes=5) == b"12345"
    with pytest.raises(OSError, match="it is larger than 4 bytes"):
        files.read(tmp_path / "file", max_bytes=4)


@pytest.mark.parametrize("kind", NOT_FILES)
def test_read_raises_oserror_instead_of_waiting_for_a_pipe_or_device(tmp_path, kind):
    (tmp_path / "file").touch()
    replace_by(tmp_path / "file", kind)
    with pytest.raises(OSError, match=r"folder|not a regular file|symbolic links"):
        files.read(tmp_path / "file")


def test_sha256_is_that_of_the_content(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert files.sha256(tmp_path / "file") == hashlib.sha256(b"abc").hexdigest()
