"""Files that were damaged or removed, in DVC's cache or in MLflow, are noticed and sent again."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import folio, inside, run, succeed

from folio.cli import project_checks
from folio.cli.promote import promote_run
from folio.errors import UserError
from folio.run import EVALUATION, TRAINING, read_evaluation, read_training
from folio.tracking import logged_models, queries, registry, sync
from folio.tracking.dvc_cache import CacheError, DvcCache
from folio.tracking.store import Store
from folio.tracking.writer import RunWriter


def zero_tail(path: Path) -> None:
    content = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
    path.chmod(0o444)


def truncate(path: Path) -> None:
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.chmod(0o644)
    path.write_bytes(b"")


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)


DAMAGE = [zero_tail, truncate, empty, flip_a_bit]


def cached(project: Path, path: str) -> Path:
    """The file in DVC's cache that has the content of an output, or of a file in one."""
    lock = yaml.safe_load((project / "dvc.lock").read_text())
    outs = {out["path"]: out["md5"] for s in lock["stages"].values() for out in s["outs"]}
    folder = next((out for out in outs if path.startswith(f"{out}/")), None)
    if folder and path not in outs:
        listing = json.loads(cached(project, folder).read_bytes())
        [md5] = [f["md5"] for f in listing if f"{folder}/{f['relpath']}" == path]
    else:
        md5 = outs[path]
    return project / ".dvc/cache/files/md5" / md5[:2] / md5[2:]


def remove_store(project: Path) -> None:
    for path in project.glob("mlflow.db*"):
        path.unlink()
    shutil.rmtree(project / "mlruns")


# --- DVC's cache


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> tuple[DvcCache, dict[str, str]]:
    """A cache with two outputs, a file and a folder with two files, and their MD5s by path."""
    root = tmp_path_factory.mktemp("cache")

    def add(content: bytes, suffix: str = "") -> str:
        md5 = hashlib.md5(content).hexdigest() + suffix
        path = root / ".dvc/cache/files/md5" / md5[:2] / md5[2:]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        path.chmod(0o444)
        return md5

    files = {name: add(name.encode() * 99) for name in ("a.txt", "deep/b.txt")}
    listing = [{"relpath": name, "md5": md5} for name, md5 in files.items()]
    folder = add(json.dumps(listing).encode(), ".dir")
    return DvcCache(root), {"file.txt": add(b"content"), "folder": folder}


def content(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("path", ["file.txt", "folder", "folder/deep/b.txt"])
def test_cache_copies_no_damaged_file(cache, tmp_path, path, damage):
    dvc, outs = cache
    dvc.copy(outs, tmp_path / "intact")
    intact = content(tmp_path / "intact")
    assert set(intact) == {"file.txt", "folder/a.txt", "folder/deep/b.txt"}
    md5 = outs[path] if path in outs else dvc.expand(outs)[path]
    file = dvc._path(md5)
    sound = file.read_bytes()
    damage(file)
    try:
        with pytest.raises(CacheError, match=f"^damaged in DVC's cache: {path} ") as error:
            dvc.copy(outs, tmp_path / "damaged")
        assert f"rm -f {file.relative_to(dvc._root)}" in str(error.value)
        assert "\n" not in str(error.value)
        if path != "folder":  # the workspace has no copy of the listing
            workspace = dvc._root / path
            workspace.parent.mkdir(parents=True, exist_ok=True)
            workspace.write_bytes(intact[path])
            dvc.copy(outs, tmp_path / "from the workspace")
            assert content(tmp_path / "from the workspace") == intact
            workspace.unlink()
    finally:
        file.write_bytes(sound)


@pytest.fixture(scope="module")
def pushed(make_trained) -> Path:
    """A project whose files are in a DVC remote too."""
    folder = make_trained()
    remote = folder.with_name(f"{folder.name}-remote")
    succeed(folder, "dvc", "remote", "add", "--default", "remote", str(remote))
    succeed(folder, "dvc", "push")
    return folder


@pytest.fixture
def clone(pushed, tmp_path) -> Path:
    """A copy of the project without a workspace and without a store."""
    folder = tmp_path / "clone"
    shutil.copytree(pushed, folder)
    remove_store(folder)
    for name in ("models", "data/prepared", "data/diagnostics"):
        shutil.rmtree(folder / name)
    (folder / "data/diagnostics.json").unlink()
    return folder


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("models/gpt2/model.safetensors", "1x2x16-"),
        ("data/diagnostics/lengths.png", "1x2x16-"),
        ("models/evaluation/metrics.json", "evaluate"),
    ],
)
def test_sync_sends_no_damaged_file_and_its_hint_restores_it(clone, path, kind):
    file = cached(clone, path)
    zero_tail(file)
    output = folio(clone, "sync")
    [line] = [line for line in output.splitlines() if "damaged" in line]
    assert line.startswith(f"damaged in DVC's cache: {path} of {kind}")
    with inside(clone):
        store = Store(None)
        models = logged_models.all_models(store)
        assert all(model.status == "READY" for model in models)
        assert len(models) == (kind == "evaluate")
    hint = line.partition("`")[2].partition("`")[0]
    assert hint == f"rm -f {file.relative_to(clone)}"
    succeed(clone, *hint.split())
    succeed(clone, "dvc", "fetch", "--all-commits")
    assert "sent " in folio(clone, "sync")
    assert folio(clone, "sync") == "MLflow has every run\n"


def test_sample_rejects_a_model_that_was_restored_from_a_damaged_cache(clone):
    zero_tail(cached(clone, "models/gpt2/model.safetensors"))
    succeed(clone, "dvc", "checkout")  # which does not notice it
    done = run(clone, "python", "-m", "folio", "sample", "--tokens", "1")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("folio: models/gpt2 is damaged, or is not the model that")


def test_a_damaged_model_is_not_logged(make_trained, tmp_path):
    folder = make_trained(store=False)
    flip_a_bit(folder / "models/gpt2/model.safetensors")
    with inside(folder):
        store = Store(None)
        with pytest.raises(
            UserError, match=r"the weights of 1x2x16-\w+ in models/gpt2 are damaged"
        ):
            RunWriter(store).send(read_training(folder), "FINISHED")
        assert queries.all_runs(store) == {} and logged_models.all_models(store) == []


# --- MLflow


@pytest.fixture(scope="module")
def project(make_trained) -> Path:
    return make_trained()


def run_folder(project: Path, kind: Path) -> Path:
    """The artifacts of the project's training run or of its evaluation, in the local store."""
    read = {TRAINING: read_training, EVALUATION: read_evaluation}[kind]
    with inside(project):
        run_id = queries.run_id(Store(None), read(project).record.id)
    return project / "mlruns" / run_id / "artifacts"


def model_folder(project: Path) -> Path:
    with inside(project):
        [model] = logged_models.all_models(Store(None))
    return project / "mlruns/models" / model.model_id / "artifacts"


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


# What was lost, how it was lost, and whether it belongs to the model.
LOSSES: dict[str, tuple[Callable[[Path], Path], Callable[[Path], None], bool]] = {
    "all artifacts": (lambda p: p / "mlruns", remove, True),
    "the artifacts of the training": (lambda p: run_folder(p, TRAINING), remove, False),
    "a folder": (lambda p: run_folder(p, TRAINING) / "data", remove, False),
    "a file": (lambda p: run_folder(p, TRAINING) / "training/history.csv", remove, False),
    "half a file": (lambda p: run_folder(p, TRAINING) / "training/run.json", truncate, False),
    "a bit": (lambda p: run_folder(p, TRAINING) / "data/diagnostics.json", flip_a_bit, False),
    "the loss curve": (lambda p: run_folder(p, TRAINING) / "training/loss.png", remove, False),
    "the evaluation": (lambda p: run_folder(p, EVALUATION), remove, False),
    "the samples": (lambda p: run_folder(p, EVALUATION) / "evaluation/samples.md", empty, False),
    "the model": (model_folder, remove, True),
    "its description": (lambda p: model_folder(p) / "MLmodel", remove, True),
    "its config": (lambda p: model_folder(p) / "artifacts/gpt2/config.json", truncate, True),
    "a bit of its config": (
        lambda p: model_folder(p) / "artifacts/gpt2/config.json",
        flip_a_bit,
        True,
    ),
    "its weights": (lambda p: model_folder(p) / "artifacts/gpt2/model.safetensors", remove, True),
    "half its weights": (
        lambda p: model_folder(p) / "artifacts/gpt2/model.safetensors",
        zero_tail,
        True,
    ),
    "its code": (lambda p: model_folder(p) / "code/folio/gpt/model.py", remove, True),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_files_that_mlflow_has_lost_are_reported_and_sent_again(project, loss):
    find, lose, is_model = LOSSES[loss]
    before = content(project / "mlruns")
    path = find(project)
    lose(path)
    assert content(project / "mlruns") != before
    with inside(project):
        store = Store(None)
        [finding] = [f for f in project_checks.mlflow_store() if f.hint]
        assert finding.text.startswith("files are missing or damaged in MLflow: ")
        assert finding.hint == ("`python -m folio sync` resends those that are in DVC's cache")
        name = read_training(project).record.id
        if is_model:
            with pytest.raises(UserError, match=r"`python -m folio sync` sends them again"):
                promote_run(store, name, force=True)
            assert registry.champion(store) == (None, "")
        messages = sync.run(None, project)
        assert messages and all(m.startswith(("sent ", "updated ")) for m in messages), messages
        assert sync.run(None, project) == []
        assert [f for f in project_checks.mlflow_store() if f.hint] == []
        registry.verify(store, queries.find_run(store, name).id)
    after = content(project / "mlruns")
    assert set(after) == set(before)
    changed = {name for name in before if before[name] != after[name]}
    assert {Path(name).name for name in changed} <= {"MLmodel"}  # has the time and a new path


def test_model_that_was_sent_again_keeps_its_versions(project):
    with inside(project):
        store = Store(None)
        assert "is now the champion" in promote_run(store, read_training(project).record.id)
        remove(project / "mlruns/models")
        with pytest.raises(
            UserError, match=r"files of the model models:/folio@champion are missing"
        ):
            registry.verify(store, "models:/folio@champion")
        [message] = sync.run(None, project)
        assert " again: " in message
        registry.verify(store, "models:/folio@champion")
        assert "already the champion" in promote_run(store, read_training(project).record.id)
        store.client.delete_registered_model("folio")


@pytest.mark.parametrize("words", [("sample", "--tokens", "1"), ("serve",)])
def test_damaged_champion_is_refused_in_one_line(project, words):
    with inside(project):
        store = Store(None)
        promote_run(store, read_training(project).record.id, force=True)
    weights = model_folder(project) / "artifacts/gpt2/model.safetensors"
    sound = weights.read_bytes()
    zero_tail(weights)
    try:
        command = ["python", "-m", "folio", *words, "--model", "models:/folio@champion"]
        done = run(project, *command)
        assert (done.returncode, done.stdout) == (1, "")
        [line] = done.stderr.strip().splitlines()
        assert "files of the model models:/folio@champion are missing or damaged in MLflow" in line
    finally:
        weights.chmod(0o644)
        weights.write_bytes(sound)
    with inside(project):
        assert len(sync.run(None, project)) == 1  # it was marked as damaged
        assert sync.run(None, project) == []
        store.client.delete_registered_model("folio")


def test_sync_reports_lost_files_that_dvc_does_not_have_either(make_trained):
    folder = make_trained()
    remove(model_folder(folder) / "artifacts/gpt2/model.safetensors")
    cached(folder, "models/gpt2/model.safetensors").unlink()
    (folder / "models/gpt2/model.safetensors").unlink()
    for _ in range(2):
        [line] = folio(folder, "sync").splitlines()
        assert line.startswith("not in DVC's cache: models/gpt2/model.safetensors of 1x2x16-")
    with (
        inside(folder),
        pytest.raises(UserError, match=r"sends them again if they are in DVC's cache"),
    ):
        promote_run(Store(None), read_training(folder).record.id)


def test_sync_restores_what_dvc_has_lost_from_the_workspace(make_trained):
    folder = make_trained()
    remove(folder / "mlruns")
    shutil.rmtree(folder / ".dvc/cache/files")
    assert folio(folder, "sync").count("sent ") == 2
