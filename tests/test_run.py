"""A run as files: its record, its history, and the lock of an unfinished training."""

import pytest

from folio import run
from folio.errors import UserError

RECORD = run.Record(id="1", name="mine", started=1, params={"train.steps": "5"}, tags={"a": "b"})


def test_record_is_read_as_it_was_written(tmp_path):
    run.write_record(RECORD, tmp_path / "record.json")
    assert run.read_record(tmp_path / "record.json") == RECORD


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"id": 1}', "[" * 100_000])
def test_damaged_record_error_has_the_command_that_recreates_it(tmp_path, content):
    path = tmp_path / "training" / "record.json"
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(UserError, match=r"record\.json is missing or damaged: `dvc repro --force"):
        run.read_record(path)


def test_history_is_read_as_it_was_written(tmp_path):
    history = [{"step": 0, "val_loss": 4.5}, {"step": 10, "train_loss": 3.25}]
    run.write_history(history, tmp_path / "history.jsonl")
    assert run.read_history(tmp_path / "history.jsonl") == history
    assert (tmp_path / "history.jsonl").read_text().count("\n") == 2


def test_missing_history_is_a_one_line_error(tmp_path):
    with pytest.raises(UserError, match=r"history\.jsonl is missing or damaged: remove it"):
        run.read_history(tmp_path / "history.jsonl")


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
