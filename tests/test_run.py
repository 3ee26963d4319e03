"""A run as files: its record, its history, and the lock of an unfinished training."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml

from folio import run
from folio.errors import UserError

ROOT = Path(__file__).parent.parent
RECORD = run.Record(id="1", name="mine", started=1, params={"train.steps": "5"}, tags={"a": "b"})


def test_record_is_read_as_it_was_written(tmp_path):
    run.write_record(RECORD, tmp_path / "record.json")
    assert run.read_record(tmp_path / "record.json") == RECORD


# The content of any damaged file that should be JSON.
DAMAGED = ["", "5", "[]", "null", '"text"', "[" * 100_000, "{", "\0" * 9, "\udcff"]


def write(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8", errors="surrogateescape")
    return path


def record_with(**fields) -> str:
    """A record in which some fields have other values."""
    return json.dumps(dataclasses.asdict(RECORD) | fields)


@pytest.mark.parametrize(
    "content",
    [
        *DAMAGED,
        "{}",
        '{"id": "1"}',
        record_with(id=1),
        record_with(name=["x"]),
        record_with(parent=5),
        record_with(started="1"),
        record_with(ended=1.5),
        record_with(params=5),
        record_with(params={"a": 1}),
        record_with(tags=["train_key"]),
        record_with(tags={"train_key": None}),
        record_with(unknown=1),
    ],
)
def test_damaged_record_error_has_the_command_that_recreates_it(tmp_path, content):
    path = write(tmp_path / "training/record.json", content)
    hint = "`dvc repro` restores it, otherwise `dvc repro --force train` recreates it"
    with pytest.raises(UserError, match=re.escape(f"{path} is missing or damaged: {hint}") + "$"):
        run.read_record(path)


def test_history_is_read_as_it_was_written(tmp_path):
    history = [
        {"step": 0, "time": 5, "val_loss": 4.5},
        {"step": 10, "time": 6, "train_loss": 3.25, "grad_norm": float("inf")},
    ]
    run.write_history(history, tmp_path / "history.jsonl")
    assert run.read_history(tmp_path / "history.jsonl") == history
    assert (tmp_path / "history.jsonl").read_text().count("\n") == 2


def test_missing_history_is_a_one_line_error(tmp_path):
    path = tmp_path / "history.jsonl"
    hint = f"`rm -f {path}`, then run the same command again"
    with pytest.raises(UserError, match=re.escape(f"{path} is missing or damaged: {hint}") + "$"):
        run.read_history(path)


@pytest.mark.parametrize(
    "content",
    [
        *DAMAGED[1:],  # an empty history is valid: training may be stopped before its first row
        "{}",
        '{"train_loss": 1, "time": 1}',
        '{"step": 1, "train_loss": 1}',
        '{"step": 1.0, "time": 1}',
        '{"step": true, "time": 1}',
        '{"step": "1", "time": 1}',
        '{"step": 1, "time": 1, "val_loss": null}',
        '{"step": 1, "time": 1, "val_loss": "2.5"}',
        '{"step": 1, "time": 1, "val_loss": [2.5]}',
        '{"step": 1, "time": 1, "val_loss": 2.5}\n5',
    ],
)
def test_history_whose_lines_are_not_rows_is_a_one_line_error(tmp_path, content):
    path = write(tmp_path / "training/history.jsonl", content + "\n")
    with pytest.raises(UserError, match=r"history\.jsonl is missing or damaged: `dvc repro`"):
        run.read_history(path)


def write_training(root: Path) -> None:
    for name, place in run.ARTIFACTS[run.TRAINING].items():
        write(root / name, place)
    write(root / "models/training/metrics.json", '{"steps": 5}')
    run.write_record(RECORD, root / "models/training/record.json")
    run.write_history([], root / "models/training/history.jsonl")


METRICS = [*DAMAGED, '{"steps": null}', '{"steps": [5]}', '{"steps": 1' + "0" * 400 + "}"]


@pytest.mark.parametrize("content", METRICS)
def test_damaged_metrics_are_a_one_line_error(tmp_path, content):
    write_training(tmp_path)
    assert run.read_training(tmp_path).summary == {"steps": 5.0}
    write(tmp_path / "models/training/metrics.json", content)
    with pytest.raises(UserError, match=r"metrics\.json is missing or damaged: `dvc repro`"):
        run.read_training(tmp_path)


def test_artifacts_are_the_files_that_the_stages_write():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    for kind, stage in ((run.TRAINING, "train"), (run.EVALUATION, "evaluate")):
        outs = stages[stage]["outs"] + stages[stage]["metrics"]
        written = [out for out in outs if Path(out).parent == kind and Path(out).name != run.RECORD]
        assert [path for path in run.ARTIFACTS[kind] if path.startswith("m")] == sorted(written)


def test_files_of_an_earlier_version_are_no_artifacts(tmp_path):
    write_training(tmp_path)
    for name in ("training/held_out.csv", "training/loss.png", "evaluation/losses.png"):
        write(tmp_path / "models" / name, "of another run")
    write(tmp_path / "models/evaluation/metrics.json", "{}")
    run.write_record(RECORD, tmp_path / "models/evaluation/record.json")
    write(tmp_path / "data/diagnostics/commonest_tokens.csv", "of another run")
    for found in (run.read_training(tmp_path), run.read_evaluation(tmp_path)):
        assert all(path.read_text() != "of another run" for path, _ in found.files if path.exists())
        assert not any(path.is_dir() for path, _ in found.files)


def test_run_name_begins_with_the_dvc_experiment(monkeypatch):
    monkeypatch.delenv("DVC_EXP_NAME", raising=False)
    assert run.run_name("2/4/128") == "2/4/128"
    monkeypatch.setenv("DVC_EXP_NAME", "wider")
    assert run.run_name("2/4/128") == "wider 2/4/128"


def test_project_root_is_that_of_dvc(tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    assert run.project_root() == tmp_path.resolve()


def test_lock_if_idle_yields_false_during_a_training(tmp_path):
    folder = tmp_path / ".checkpoints" / "key"
    with run.lock_for_training(folder), run.lock_if_idle(folder) as idle:
        assert folder.is_dir() and not idle
    with run.lock_if_idle(folder) as idle:
        assert idle
        run.remove_unfinished(folder)
    assert not folder.exists()
