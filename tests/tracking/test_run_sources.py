"""Which files belong to a run, in DVC's cache and in the workspace."""

import hashlib
from pathlib import Path

import pytest
import yaml

from folio import commands
from folio.errors import UserError
from folio.run import ARTIFACTS, EVALUATION, TRAINING, Record, Run, write_record
from folio.tracking.run_sources import RunSources

RECORDS = {
    TRAINING: Record(id="t", name="trained", started=1, params={}, tags={}),
    EVALUATION: Record(id="e", name="evaluate", started=1, parent="t", params={}, tags={}),
}
# What 0.1 wrote in addition to today's files, or instead of them.
OF_0_1 = ("models/training/held_out.csv", "models/training/loss.png")


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """A project with a training run and its evaluation in the workspace, which DVC does not have.

    Next to their files are those of an earlier version, and one of the user.
    """

    def fail(*_: str, **__: object) -> str:
        raise commands.NoCommitError("there is no git repository")

    monkeypatch.setattr(commands, "git", fail)
    monkeypatch.setattr(commands, "dvc", lambda *_, **__: ".dvc/cache\n")
    (tmp_path / ".dvc").mkdir()
    for kind, record in RECORDS.items():
        for name in (*ARTIFACTS[kind], *OF_0_1, "models/evaluation/notes.txt"):
            write(tmp_path / name, "{}" if name.endswith("metrics.json") else name)
        write(tmp_path / kind / "history.jsonl", "")
        write_record(record, tmp_path / kind / "record.json")
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def commit_to_dvc(root: Path, *names: str) -> None:
    """Record these files as outs of a stage in dvc.lock, with copies in DVC's cache."""
    outs = []
    for name in names:
        content = (root / name).read_bytes()
        md5 = hashlib.md5(content).hexdigest()
        cached = root / ".dvc/cache/files/md5" / md5[:2] / md5[2:]
        cached.parent.mkdir(parents=True, exist_ok=True)
        cached.write_bytes(content)
        outs.append({"path": name, "md5": md5})
    lock = {"stages": {"train": {"cmd": "train", "outs": outs}}}
    (root / "dvc.lock").write_text(yaml.safe_dump(lock))


def uploaded(run: Run) -> set[str]:
    """The paths in MLflow of the files that a writer would upload."""
    found = set()
    for path, folder in run.files:
        for file in path.rglob("*") if path.is_dir() else [path]:
            if file.is_file() and file.name != "record.json":
                found.add(f"{folder}/{file.name}")
    return found


@pytest.mark.parametrize("kind", [TRAINING, EVALUATION])
def test_run_in_the_workspace_has_only_files_of_its_own(root, tmp_path, kind):
    sources = RunSources(root)
    [source] = sources.find(kind)
    [expected] = sources.artifacts(source)
    assert set(expected) == {f"{place}/{Path(f).name}" for f, place in ARTIFACTS[kind].items()}
    assert uploaded(sources.read(source, tmp_path / "copy")) == set(expected)


def test_run_of_an_earlier_version_keeps_its_files(root, tmp_path):
    outs = [f"models/training/{name}.json" for name in ("record", "metrics")]
    commit_to_dvc(root, *outs, "models/training/history.jsonl", *OF_0_1)
    sources = RunSources(root)
    [source] = sources.find(TRAINING)
    [expected] = sources.artifacts(source)
    names = ("held_out.csv", "history.jsonl", "loss.png", "metrics.json")
    assert set(expected) == {f"training/{name}" for name in names}
    assert uploaded(sources.read(source, tmp_path / "copy")) == set(expected)


@pytest.mark.parametrize("content", ["5", "[]", "{", '{"val_loss": null}', "[" * 100_000])
def test_damaged_metrics_of_an_evaluation_are_a_one_line_error(root, content):
    (root / "models/evaluation/metrics.json").write_text(content)
    sources = RunSources(root)
    [source] = sources.find(EVALUATION)
    with pytest.raises(UserError, match=r"^models/evaluation/metrics\.json is missing or damaged"):
        sources.metrics(source)
