"""`remove`, `disk` and `gc`: what is removed stays removed, and what is in use stays intact."""

import fcntl
import itertools
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import environment, folio, inside, run, run_stages, set_params, succeed

from folio import files
from folio.errors import UserError
from folio.run import HISTORY, Record, lock_for_training, write_record
from folio.tracking import local_store, queries, registry, removal, sizes
from folio.tracking.store import Store

EVERY_RUN = "MLflow has every run"


@pytest.fixture(scope="module")
def original(make_trained) -> Path:
    """Four runs: one committed, of which the model is the champion; the experiments `bad` and
    `good`; and one that only DVC's run cache has. The workspace is that of the commit."""
    folder = make_trained()
    folio(folder, "promote")
    for name, seed in (("bad", 1), ("good", 2)):
        succeed(folder, "dvc", "exp", "run", "-S", f"train.seed={seed}", "--name", name)
    set_params(folder, {"train.seed": 3})
    succeed(folder, "dvc", "repro")
    back_to_the_commit(folder)
    assert folio(folder, "sync").strip() == EVERY_RUN
    return folder


@pytest.fixture
def project(original, tmp_path) -> Path:
    return copy(original, tmp_path / "project")


def copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to, symlinks=True)
    with inside(to):
        Store(None, repair=True)
    return to


def back_to_the_commit(folder: Path) -> None:
    succeed(folder, "git", "checkout", "-q", "HEAD", "--", ".")
    succeed(folder, "dvc", "checkout", "-q", "-f")


def tree(folder: Path) -> dict[str, str]:
    """The MD5 of every file, except for locks; of the store, that of its content."""
    found = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        skipped = path.suffix in (".lock", ".pyc") or name.startswith((".git/", ".dvc/tmp/"))
        if path.is_file() and not skipped and not name.startswith("mlflow.db"):
            found[name] = files.md5(path)
    with sqlite3.connect(folder / "mlflow.db") as database:
        found["mlflow.db"] = "\n".join(database.iterdump())
    found["refs"] = succeed(folder, "git", "for-each-ref")
    return found


def names(folder: Path) -> list[str]:
    """The names of the training runs that MLflow shows, without that of the commit."""
    with inside(folder):
        return sorted(r.name for r in queries.list_runs(Store(None)) if " " in r.name)


def models(folder: Path) -> dict[str, str]:
    """The MD5 of each file in models/, after DVC has restored all of it from its cache."""
    shutil.rmtree(folder / "models/gpt2")
    succeed(folder, "dvc", "checkout", "-q", "-f")
    return {p.name: files.md5(p) for p in sorted((folder / "models").rglob("*")) if p.is_file()}


def committed_run(folder: Path) -> str:
    with inside(folder):
        champion, _ = registry.champion(Store(None))
    assert champion
    return champion.name


def cache_only_run(folder: Path) -> str:
    """The name of the run that only the run cache has."""
    with inside(folder):
        found = [r for r in queries.list_runs(Store(None)) if r.params["train.seed"] == "3"]
    return found[0].name


def test_dry_runs_and_disk_change_nothing(project):
    before = tree(project)
    output = folio(project, "remove", "bad", "--dry-run")
    assert "DVC experiment bad (commit " in output and "nothing was removed" in output
    output = folio(project, "remove", "--all", "--dry-run")
    assert output.count("logged model m-") == 3 and " stays: it is the champion" in output
    (project / ".dvc/tmp/exps/tmp1234").mkdir(parents=True)
    (project / ".dvc/tmp/exps/tmp1234/file").write_text("x" * 9000)
    assert "temporary copies" in folio(project, "gc", "--dry-run")
    assert (project / ".dvc/tmp/exps/tmp1234/file").exists()
    output = folio(project, "disk")
    assert "champion" in output and output.count("experiment") == 2 and "run only" in output
    assert max(map(len, output.splitlines())) <= 80
    with lock_for_training(project / ".checkpoints/new"):  # perhaps in the copy of the project
        for command in (["gc", "--dry-run"], ["disk"]):
            output = folio(project, *command)
            assert "is going on: until it has finished, `gc` frees nothing" in output
            assert "temporary copies" not in output and "checkpoints:" not in output
    for name, reason in (
        (committed_run(project), r"it is the champion: `python -m folio promote OTHER --force`"),
        ("nobody", r"there is no run 'nobody': `python -m folio disk` lists all runs"),
        ("", r"there is no run ''"),
        (cache_only_run(project)[:1], r"there is no run '1'"),
    ):
        with pytest.raises(UserError, match=reason):
            folio(project, "remove", "bad", name)
    for words in ([], ["bad", "--all"], ["--all", "--undo"]):
        with pytest.raises(UserError, match=r"^name the runs to remove, or use --all"):
            folio(project, "remove", *words)
    assert tree(project) == before


def test_run_that_is_in_use_is_not_removed(project):
    committed = committed_run(project)
    with inside(project):
        client = Store(None).client
        client.delete_registered_model_alias("folio", "champion")
        client.set_registered_model_alias("folio", "tested", "1")
    for reason in ("its model is folio@tested: remove that alias", "commit [0-9a-f]+ needs its fi"):
        with pytest.raises(UserError, match=rf"{committed} cannot be removed: {reason}"):
            folio(project, "remove", committed)
        client.delete_registered_model_alias("folio", "tested")
    succeed(project, "dvc", "exp", "apply", "good")
    with pytest.raises(UserError, match=r"its files are in the workspace: `git checkout HEAD"):
        folio(project, "remove", "good")
    back_to_the_commit(project)
    folder = project / ".checkpoints/0123456789abcdef"
    folder.mkdir()
    record = Record(id="new", name="interrupted", started=1, params={}, tags={})
    write_record(record, folder / "record.json")
    (folder / HISTORY).touch()
    with lock_for_training(folder):
        with pytest.raises(UserError, match=r"it is being trained: stop that first"):
            folio(project, "remove", folder.name)
        with pytest.raises(UserError, match=r"^a training run is going on: wait until"):
            folio(project, "gc")
    assert "interrupted" in folio(project, "disk")
    assert f"checkpoint {folder.relative_to(project)} (" in folio(project, "remove", folder.name)
    assert not folder.exists()
    with (project / ".dvc/tmp/lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"^a dvc command is running: wait until"):
            folio(project, "gc")
    output = folio(project, "remove", "--all")
    assert f"{committed} stays: commit " in output
    assert names(project) == [] and folio(project, "sync").strip() == EVERY_RUN


def test_run_that_was_deleted_on_mlflows_page_leaves_its_experiment(project, tmp_path, capfd):
    with inside(project):
        store = Store(None)
        store.client.delete_run(queries.find_run(store, "bad").id)
    (project / f"mlruns/{'e' * 32}/artifacts").mkdir(parents=True)  # of a store that was deleted
    cache = tmp_path / "shared cache"
    shutil.move(project / ".dvc/cache", cache)
    (project / ".dvc/cache").symlink_to(cache)
    before = sizes.of(cache)
    output = folio(project, "gc")
    assert "in MLflow's trash" in output and "others may use it" in output
    assert not (project / f"mlruns/{'e' * 32}").exists() and sizes.of(cache) == before
    # The experiment still works; a new evaluation of it is not sent to MLflow, and does not fail.
    succeed(project, "dvc", "exp", "apply", "bad")
    set_params(project, {"evaluate.stride": 4})
    run_stages(project, "evaluate")
    assert "MLflow" not in capfd.readouterr().err
    assert folio(project, "sync").strip() == EVERY_RUN
    back_to_the_commit(project)
    assert "DVC experiment bad" in folio(project, "remove", "bad")
    (project / ".dvc/cache").unlink()
    succeed(project, "dvc", "cache", "dir", "--local", str(cache))
    assert folio(project, "gc").startswith("DVC's cache is outside the project")
    assert "objects in DVC's cache" in folio(project, "gc", "--own-cache")
    assert sizes.of(cache) < before and models(project)
    assert folio(project, "sync").strip() == EVERY_RUN


def test_run_is_removed_from_a_server_for_every_clone(project, tmp_path, server_store):
    place = f"sqlite:///{shutil.copy(server_store, tmp_path / 'server.db')}"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["mlflow", "server", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", place, "--artifacts-destination", str(tmp_path / "store")]
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen(
            command, env=environment(), stdout=log, stderr=log, start_new_session=True
        )
    try:
        end = time.monotonic() + 90
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert server.poll() is None and time.monotonic() < end
            time.sleep(0.2)
        uri = f"http://127.0.0.1:{port}"
        set_params(project, {"runtime.tracking_uri": uri})
        clone = copy(project, tmp_path / "clone")
        assert folio(project, "sync").count("sent ") == 8
        folio(project, "remove", "bad")
        assert "on a server: docs/housekeeping.md shows how" in folio(project, "gc")
        gc = ["mlflow", "gc", "--backend-store-uri", place, "--tracking-uri", uri]
        assert "permanently deleted" in succeed(tmp_path, *gc)
        assert folio(clone, "sync").strip() == EVERY_RUN
        with pytest.raises(UserError, match=r"is not in MLflow's trash, so it cannot be restored"):
            folio(clone, "remove", "bad", "--undo")
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def row_of(folder: Path, name: str) -> str:
    """The line of a run in the tables of `disk`, with single spaces."""
    lines = [" ".join(line.split()) for line in folio(folder, "disk").splitlines()]
    return next(line for line in lines if line.startswith(name))


def test_removed_runs_stay_removed_and_the_others_stay_intact(project, tmp_path):
    clone = copy(project, tmp_path / "other clone")
    committed, amounts = models(project), row_of(project, "bad").split("experiment")[1]
    folio(project, "remove", "bad", cache_only_run(project))
    assert row_of(project, "bad").split("removed")[1] == amounts  # gc has not run yet
    assert [name.split()[0] for name in names(project)] == ["good"]
    assert "bad" not in succeed(project, "dvc", "exp", "list", "--all-commits")
    assert folio(project, "sync").strip() == EVERY_RUN
    assert "already removed" in folio(project, "remove", "bad")
    before = sizes.of(project / ".dvc/cache"), sizes.of(project / "mlruns")
    assert "freed " in folio(project, "gc")
    after = sizes.of(project / ".dvc/cache"), sizes.of(project / "mlruns")
    ratios = [new / old for old, new in zip(before, after, strict=True)]
    assert all(0.4 < ratio < 0.8 for ratio in ratios), ratios  # the runs share the tokenizer
    assert folio(project, "gc").strip() == "there is nothing to free"
    # Neither this clone sends them again, nor one that still has their files.
    assert folio(project, "sync").strip() == EVERY_RUN
    (project / "mlflow.db.lock").unlink(missing_ok=True)
    uri = f"sqlite:///{project}/mlflow.db"
    sent = succeed(clone, "python", "-m", "folio", "sync", MLFLOW_TRACKING_URI=uri)
    assert sent.strip() == EVERY_RUN
    assert [name.split()[0] for name in names(project)] == ["good"]
    # The commit, the experiment and the champion are complete.
    assert models(project) == committed
    succeed(project, "dvc", "exp", "apply", "good")
    assert models(project) == models_of_experiment(clone, "good")
    back_to_the_commit(project)
    with inside(project):
        registry.verify(Store(None), "models:/folio@champion")
    assert "up to date" in succeed(project, "dvc", "status")
    assert "FAIL files are missing" not in run(project, "python", "-m", "folio", "doctor").stdout


def models_of_experiment(folder: Path, name: str) -> dict[str, str]:
    succeed(folder, "dvc", "exp", "apply", name)
    return models(folder)


def test_undo_restores_a_removed_run(project):
    before, refs = names(project), succeed(project, "git", "for-each-ref", "refs/exps")
    folio(project, "remove", "bad")
    assert len(names(project)) == 1
    assert "DVC experiment bad" in folio(project, "remove", "bad", "--undo")
    assert "sent bad " in folio(project, "sync")  # its logged model
    assert names(project) == before
    assert succeed(project, "git", "for-each-ref", "refs/exps") == refs
    with inside(project):
        registry.verify(Store(None), "bad")
    folio(project, "gc")  # does not free what was restored
    everything = ("--workspace", "--all-commits", "--all-experiments")
    succeed(project, "dvc", "gc", "--force", *everything)  # what only the run cache refers to
    assert folio(project, "sync").strip() == EVERY_RUN
    assert "entries of DVC's run cache: 2, " in folio(project, "gc")
    succeed(project, "dvc", "exp", "apply", "bad")
    with pytest.raises(UserError, match=r"is not in MLflow's trash"):
        folio(project, "remove", "bad", "--undo")
    back_to_the_commit(project)
    folio(project, "remove", "bad")
    succeed(project, "git", "reflog", "expire", "--expire=now", "--all")
    succeed(project, "git", "gc", "--quiet", "--prune=now")
    restored = folio(project, "remove", "bad", "--undo")
    assert "MLflow run" in restored and "not the DVC experiment bad: git has deleted" in restored
    assert names(project) == before


def test_remove_and_gc_that_are_killed_reach_the_same_state(project, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(removal, "_remove_from_mlflow", killed_at(0, print))
        with pytest.raises(Killed):
            folio(project, "remove", "bad")
    assert len(names(project)) == 2  # the same command finds the run again
    folio(project, "remove", "bad", cache_only_run(project))
    other = copy(project, tmp_path / "other")
    folio(project, "gc")
    for kill_at in (0, 1, 6, 20):
        with monkeypatch.context() as patch:
            patch.setattr(sizes, "remove", killed_at(kill_at, sizes.remove))
            with pytest.raises(Killed):
                folio(other, "gc")
    assert models(other) and folio(other, "sync").strip() == EVERY_RUN
    with monkeypatch.context() as patch:
        patch.setattr(local_store, "delete_run", killed_at(0, print))
        with pytest.raises(Killed):
            folio(other, "gc")
    folio(other, "gc")
    assert state(other) == state(project)


class Killed(BaseException):
    """The end of a process, which no code can catch by accident."""


def killed_at(call: int, function: Callable) -> Callable:
    """The function, in a process that is killed at its call number `call`, counted from 0."""
    calls = itertools.count()

    def count(*arguments: object) -> object:
        if next(calls) == call:
            raise Killed
        return function(*arguments)

    return count


def state(folder: Path) -> tuple[set[Path], set[str], set[str]]:
    """The files in the cache and in mlruns, the ids in the store, and the removed runs."""
    found = [path for top in (".dvc/cache", "mlruns") for path in (folder / top).rglob("*")]
    with inside(folder):
        removed = queries.removed(Store(None))
    ids = local_store.ids(folder / "mlflow.db")
    return {path.relative_to(folder) for path in found}, ids, set(removed)


def test_folder_without_git_dvc_and_a_store_has_nothing_to_free(make_project, monkeypatch):
    folder = make_project(store=False)
    shutil.rmtree(folder / ".dvc")
    assert "total" in folio(folder, "disk")
    assert folio(folder, "gc").strip() == "there is nothing to free"
    with pytest.raises(UserError, match=r"^there is no run 'x': `python -m folio disk` lists all"):
        folio(folder, "remove", "x")
    assert folio(folder, "remove", "--all").strip() == "there is nothing to remove"
    assert not (folder / "mlflow.db").exists() and not (folder / ".dvc").exists()
    set_params(folder, {"runtime.tracking_uri": "http://127.0.0.1:9"})
    for words in (["disk"], ["gc"], ["remove", "x"]):
        with pytest.raises(
            UserError, match=r"^MLflow failed: http://127\.0\.0\.1:9 cannot be reach"
        ):
            folio(folder, *words)
