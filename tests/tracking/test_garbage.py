"""Which artifacts and checkpoints `gc` frees; tests/pipeline/test_housekeeping.py has the rest."""

import os
import shutil
import sqlite3
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from folio.run import HISTORY, Record, lock_for_training, write_record
from folio.tracking import garbage
from folio.tracking.garbage import Garbage
from folio.tracking.inventory import Holdings

IDS = {letter: letter * 32 for letter in "abcde"}


@pytest.fixture
def store(tmp_path) -> SimpleNamespace:
    """A store with a run and a model, a copy of it with one more run, and five folders."""
    for name, runs in (("mlflow.db", "a"), ("copy of mlflow.db", "ab")):
        with sqlite3.connect(tmp_path / name) as database:
            database.execute("CREATE TABLE runs (run_uuid TEXT)")
            database.execute("CREATE TABLE logged_models (model_id TEXT)")
            database.executemany("INSERT INTO runs VALUES (?)", [(IDS[run],) for run in runs])
            database.execute("INSERT INTO logged_models VALUES (?)", (f"m-{IDS['a']}",))
    for name in (IDS["a"], IDS["b"], IDS["c"], "0/mine", f"models/m-{IDS['a']}", "models/mine"):
        (tmp_path / "mlruns" / name).mkdir(parents=True)
    (tmp_path / f"mlruns/models/m-{IDS['d']}").mkdir()
    (tmp_path / "notes.db").write_text("no database")
    return SimpleNamespace(path=tmp_path / "mlflow.db")


def orphans(store: SimpleNamespace) -> tuple[set[str], list[str]]:
    found = Garbage()
    garbage._add_orphans(found, store)
    return {path.name for path in found.orphans}, found.notes


def test_artifacts_that_no_store_beside_them_refers_to_are_orphans(store):
    assert orphans(store) == ({IDS["c"], f"m-{IDS['d']}"}, [])


def test_artifacts_are_kept_if_a_store_beside_them_cannot_be_read(store):
    (store.path.parent / "mlflow.db.damaged").write_bytes(b"SQLite format 3\0" + bytes(99))
    found, [note] = orphans(store)
    assert not found and "mlflow.db.damaged, which cannot be read" in note


def test_artifacts_in_a_linked_folder_are_kept(store, tmp_path):
    shutil.move(tmp_path / "mlruns", tmp_path / "big disk")
    (tmp_path / "mlruns").symlink_to("big disk")
    assert orphans(store) == (set(), [])


@pytest.fixture
def root(tmp_path) -> Path:
    """A project with the checkpoints of five runs: removed, interrupted now, interrupted long ago,
    half-removed by a kill, and one with a damaged record."""
    for name in ("removed", "interrupted", "old", "killed", "damaged"):
        folder = tmp_path / ".checkpoints" / name
        (folder / "step-00000001").mkdir(parents=True)
        (tmp_path / f".checkpoints/{name}.lock").touch()
        if name != "killed":
            write_record(
                Record(id=name, name=name, started=1, params={}, tags={}), folder / "record.json"
            )
            (folder / HISTORY).touch()
    (tmp_path / ".checkpoints/damaged/record.json").write_text("{")
    long_ago = time.time() - 10 * 86_400
    for file in (tmp_path / ".checkpoints/old").glob("*.json*"):
        os.utime(file, (long_ago, long_ago))
    return tmp_path


def checkpoints(root: Path, days: float | None = None) -> set[str]:
    runs = []
    for name in ("removed", "interrupted", "old"):
        runs.append(Holdings(id=name, name=name, checkpoint=root / ".checkpoints" / name))
    inventory = SimpleNamespace(root=root, runs=runs, is_removed=lambda id: id == "removed")
    found = Garbage()
    garbage._add_checkpoints(found, inventory, days)
    return {folder.name for folder in found.checkpoints}


def test_checkpoints_are_kept_unless_their_run_was_removed(root):
    assert checkpoints(root) == {"removed", "killed"}


def test_checkpoints_of_runs_interrupted_long_ago_go_on_request(root):
    assert checkpoints(root, 9) == {"removed", "killed", "old"}
    assert checkpoints(root, 11) == {"removed", "killed"}


def test_checkpoint_of_a_training_run_is_not_removed(root, tmp_path):
    folder = root / ".checkpoints/old"
    inventory = SimpleNamespace(store=None, notes={}, root=root)
    with lock_for_training(folder):
        assert garbage.free(Garbage(checkpoints=[folder]), inventory) == 0
        assert folder.exists()
    garbage.free(Garbage(checkpoints=[folder]), inventory)
    assert not folder.exists()
