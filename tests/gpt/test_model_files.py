"""A model folder that other programs replace while it is read: always one whole version of it."""

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from folio.errors import UserError
from folio.gpt import huggingface, model_files, safetensors_files, weight_files
from folio.gpt.model import GPT, ModelParams


def save(folder: Path, version: int) -> Path:
    """Write a model whose weights are all `version`, and whose config has as many heads.

    Only config.json has the number of heads: the weights of every version fit every config.
    """
    sizes = ModelParams(n_layer=1, n_head=version, n_embd=32, block_size=8, dropout=0.0)
    model = GPT(sizes, 31)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(version)
    huggingface.save(model, folder)
    return folder


def version_of(model: GPT) -> int:
    """The version of a loaded model. Its parts must all be of one version."""
    found = {int(value) for p in model.parameters() for value in p.unique()}
    assert found == {model.params.n_head}
    return found.pop()


@pytest.fixture(autouse=True)
def real_times(monkeypatch, unhurried) -> None:
    """The times that the other tests set to zero."""
    for name, seconds in unhurried.items():
        monkeypatch.setattr(model_files, name, seconds)


@pytest.fixture(scope="module")
def versions(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("versions")
    save(folder / "1", 1)
    save(folder / "2", 2)
    return folder


@pytest.fixture
def folder(versions, tmp_path) -> Path:
    shutil.copytree(versions, tmp_path / "versions")
    shutil.copytree(versions / "1", tmp_path / "gpt2")
    return tmp_path / "gpt2"


# Each replaces the folder by version after version in a process of its own, in one of the ways in
# which programs do so. `new` is the folder of the next version.
WAYS = {
    # as huggingface.save does
    "rename": """
        shutil.copytree(new, f"{folder.parent}/.gpt2.partial")
        os.rename(folder, f"{folder.parent}/.gpt2.previous")
        os.rename(f"{folder.parent}/.gpt2.partial", folder)
        shutil.rmtree(f"{folder.parent}/.gpt2.previous")
    """,
    # as `cp -r` does
    "overwrite": """
        for name in sorted(os.listdir(new)):
            shutil.copyfile(new / name, folder / name)
    """,
    # as `dvc checkout` does
    "unlink and link": """
        for name in sorted(os.listdir(new)):
            shutil.copyfile(new / name, folder / "temporary")
            os.unlink(folder / name)
            os.rename(folder / "temporary", folder / name)
    """,
    "replace file by file": """
        for name in sorted(os.listdir(new), reverse=True):
            shutil.copyfile(new / name, folder / "temporary")
            os.replace(folder / "temporary", folder / name)
    """,
    "symlink": """
        os.symlink(new, folder.parent / "link")
        shutil.rmtree(folder) if not folder.is_symlink() else None
        os.replace(folder.parent / "link", folder)
    """,
}


@contextlib.contextmanager
def replaced(folder: Path, way: str) -> Iterator[None]:
    code = f"""
import os, pathlib, shutil, time
folder, count = pathlib.Path({str(folder)!r}), 0
while True:
    count += 1
    new = folder.parent / "versions" / str(1 + count % 2)
    {textwrap.indent(textwrap.dedent(WAYS[way]), "    ").strip()}
    time.sleep(0.05)
"""
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        try:
            yield
            assert process.poll() is None
        finally:
            process.kill()


@pytest.mark.parametrize("way", WAYS)
def test_load_gives_one_version_while_the_folder_is_replaced(folder, way):
    if way not in ("rename", "symlink"):
        # A writer that is paused between two files leaves a folder of two versions.
        config = (folder / "config.json").read_text()
        (folder.parent / "versions/2/config.json").write_text(config)
    found, until = [], time.monotonic() + 30
    with replaced(folder, way):
        while len(set(found)) < 2 or len(found) < 20:
            assert time.monotonic() < until
            model = huggingface.load(folder)
            [version] = {int(value) for p in model.parameters() for value in p.unique()}
            assert way not in ("rename", "symlink") or version == model.params.n_head
            found.append(version)


def test_load_gives_one_version_while_the_folder_is_saved_again_and_again(folder):
    done = threading.Event()

    def save_again() -> None:
        for version in itertools.cycle((2, 1)):
            save(folder, version)
            if done.is_set():
                break

    thread, found, until = threading.Thread(target=save_again), [], time.monotonic() + 30
    thread.start()
    try:
        while len(set(found)) < 2 or len(found) < 20:
            assert time.monotonic() < until
            found.append(version_of(huggingface.load(folder)))
    finally:
        done.set()
        thread.join()


def test_error_in_a_file_that_was_just_written_is_tried_again(folder, monkeypatch):
    content, sleep = (folder / "config.json").read_text(), time.sleep
    (folder / "config.json").write_text(content[:50])  # its writer sleeps for a moment

    def complete(seconds: float) -> None:
        sleep(seconds)
        if time.time() - (folder / "config.json").stat().st_mtime > 0.3:
            (folder / "config.json").write_text(content)

    monkeypatch.setattr(time, "sleep", complete)
    assert version_of(huggingface.load(folder)) == 1


CHANGES: dict[str, Callable[[Path, Path], object]] = {
    "renamed away": lambda folder, new: (
        folder.rename(folder.with_name("old")),
        new.rename(folder),
    ),
    "removed": lambda folder, new: (shutil.rmtree(folder), new.rename(folder)),
    "overwritten": lambda folder, new: shutil.copytree(new, folder, dirs_exist_ok=True),
    "linked": lambda folder, new: [
        ((folder / path.name).unlink(), path.rename(folder / path.name)) for path in new.iterdir()
    ],
}


# The functions before which the folder changes.
MOMENTS = {
    "before config": (huggingface, "_read_config"),
    "before weights": (safetensors_files, "stored_tensors"),
    "between weights": (safetensors_files.StoredTensor, "read"),
    "after weights": (huggingface, "_check_finite"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("moment", MOMENTS)
def test_load_gives_one_version_whenever_the_folder_changes(folder, monkeypatch, change, moment):
    owner, name = MOMENTS[moment]
    function, calls = getattr(owner, name), []

    def change_once(*args):
        calls.append(args)
        if len(calls) == (2 if moment == "between weights" else 1):
            CHANGES[change](folder, folder.parent / "versions/2")
        return function(*args)

    monkeypatch.setattr(owner, name, change_once)
    assert version_of(huggingface.load(folder)) in (1, 2)
    assert calls and version_of(huggingface.load(folder)) == 2


def test_loaded_model_does_not_change_with_its_file(folder):
    model = huggingface.load(folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(100)  # in a mapped file, reading the rest would kill the process
    assert version_of(model) == 1


def test_sha256_is_that_of_one_version(folder):
    new = folder.parent / "versions/2"
    expected = {weight_files.sha256(each) for each in (folder, new)}
    with replaced(folder, "overwrite"):
        found = {weight_files.sha256(folder) for _ in range(50)}
    assert found <= expected


@pytest.mark.parametrize(
    ("name", "content"), [("SETTLED", "{}"), ("SETTLED_AFTER_ERROR", '{"n_layer": ')]
)
def test_folder_that_is_written_all_the_time_gives_a_one_line_error(
    folder, monkeypatch, name, content
):
    monkeypatch.setattr(model_files, "PATIENCE", 0.3)
    monkeypatch.setattr(model_files, name, 1_000)  # everything counts as just written
    (folder / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"gpt2 is being written: try again when"):
        huggingface.load(folder)


def test_missing_folder_is_waited_for_while_it_is_being_saved(folder, monkeypatch):
    moved = folder.rename(folder.with_name(".gpt2.partial"))
    sleep = time.sleep

    def rename(seconds: float) -> None:
        sleep(seconds)
        if moved.exists():
            moved.rename(folder)

    monkeypatch.setattr(time, "sleep", rename)
    assert version_of(huggingface.load(folder)) == 1


def test_files_with_times_in_the_future_are_read_at_once(folder):
    for path in folder.iterdir():
        os.utime(path, (time.time() + 1e6,) * 2)
    assert version_of(huggingface.load(folder)) == 1


def test_load_closes_all_files(folder, monkeypatch):
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    huggingface.load(folder)
    before = descriptors()
    models = [huggingface.load(folder) for _ in range(5)]
    (folder / "config.json").write_text(json.dumps({"n_layer": "x"}))
    monkeypatch.setattr(model_files, "SETTLED_AFTER_ERROR", 0.0)
    for _ in range(5):
        with pytest.raises(UserError):
            huggingface.load(folder)
    assert descriptors() == before and len(models) == 5
