"""A real sweep on DVC's queue: its trials, its report, and what stops and resumes it."""

import signal
import subprocess
import time
from pathlib import Path

import mlflow
import psutil
import pytest
from conftest import environment, folio, inside, run, warm_environment
from PIL import Image

from benchmarks import entry
from folio.errors import UserError
from folio.sweeps.plan import read_plan
from folio.tracking.queries import list_runs
from folio.tracking.store import Store

SWEEP = ("python", "-m", "folio", "sweep")


@pytest.fixture(scope="module")
def swept(make_trained):
    """A project after a sweep of three trials, all at once, into a new store; and the finished
    command. One trial fails: its context of 9,999 tokens is longer than the validation text, which
    only the train stage notices."""
    folder = make_trained(store=False)
    settings = ("model.block_size=12,9999,8", "--jobs", "3")
    done = subprocess.run(
        [*SWEEP, *settings, "--name", "mine"],
        cwd=folder,
        env=warm_environment(),
        capture_output=True,
        text=True,
        timeout=900,
    )
    return folder, done


def queued(folder: Path) -> list[str]:
    """The trials in DVC's queue, without the line about its workers, which exit when idle."""
    status = run(folder, "dvc", "queue", "status").stdout
    return [line for line in status.splitlines() if not line.startswith("Worker status")]


def test_failed_trials_are_named_and_do_not_stop_the_others(swept):
    _, done = swept
    assert done.returncode == 1 and "Traceback" not in done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("folio: ")]
    assert "1 of 3 trials failed: mine-02 (`dvc queue logs mine-02` shows why)" in line
    assert "mine-01  model.block_size=12  validation loss " in done.stdout


def test_report_is_made_from_the_runs_in_mlflow(swept):
    folder, done = swept
    text = (folder / "sweeps/mine/report.md").read_text()
    assert text in done.stdout and "Finished trials: 2 of 3, starting from commit" in text
    with inside(folder):
        runs = {each.experiment: each for each in list_runs(Store(None))}
    rows = [line.split() for line in text.splitlines() if "| mine-" in " ".join(line.split())]
    assert {row[1] for row in rows} == {"mine-01", "mine-03"} <= runs.keys()
    losses = [float(row[5]) for row in rows]
    assert losses == sorted(losses)
    for row in rows:
        assert float(row[5]) == pytest.approx(runs[row[1]].loss, abs=1e-4)
        assert runs[row[1]].name == f"{row[1]} {row[-2]}"
    assert Image.open(folder / "sweeps/mine/parallel_coordinates.png").size[0] > 1000


@pytest.mark.parametrize("name", ["mine-01", "mine-03"])
def test_each_of_several_simultaneous_trainings_has_a_complete_run(swept, name):
    folder, _ = swept
    store = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = store.get_experiment_by_name("folio").experiment_id
    found = store.search_runs([experiment], f"tags.dvc_experiment = '{name}'")
    [kept] = [each for each in found if "mlflow.parentRunId" not in each.data.tags]
    assert kept.info.status == "FINISHED" and kept.data.tags["dvc_baseline"]
    assert Path(kept.info.artifact_uri.removeprefix("file://")).is_relative_to(folder)
    assert "evaluate/val_loss" in kept.data.metrics
    losses = store.get_metric_history(kept.info.run_id, "train_loss")
    assert sorted(loss.step for loss in losses) == [1, 2, 3, 4, 5, 6]
    folders = {item.path for item in store.list_artifacts(kept.info.run_id)}
    assert folders == {"data", "training"}
    models = store.search_logged_models([experiment])
    assert kept.info.run_id in {model.source_run_id for model in models}


def test_models_of_a_sweep_are_measured_as_an_entry_of_the_leaderboard(swept, tmp_path):
    folder, _ = swept
    [text] = (folder / "data/raw").glob("*.txt")
    with inside(folder):
        found = dict(entry.restore(read_plan("mine"), tmp_path))
    rows = {name: entry.measure(restored, text) for name, restored in found.items()}
    assert rows.keys() == {"mine-01", "mine-03"}
    for row in rows.values():
        assert row["script"] == pytest.approx(row["validation"], abs=1e-4)
        assert row["script, sliding"] == pytest.approx(row["sliding"], abs=0.1)
        assert row["best"] <= row["validation"] + 1e-6 and row["at step"] in (2, 4, 6)
    mean = sum(row["validation"] for row in rows.values()) / 2
    lines = entry.table(rows).splitlines()
    assert len(lines) == 6 and f"{mean:.4f}" in lines[3] and len(set(map(len, lines))) == 1
    with inside(folder):
        size = entry.count_parameters(folder / "models/gpt2")
        line = entry.leaderboard_row(read_plan("mine"), rows, size)
    assert line.startswith("| `mine` | 0.8 M | 6 x ") and f"| {mean:.3f} (" in line


def test_sweep_leaves_the_working_tree_unchanged(swept):
    assert run(swept[0], "git", "status", "--porcelain").stdout == ""


def test_report_option_writes_the_report_of_an_earlier_sweep(swept):
    folder, _ = swept
    path = folder / "sweeps/mine/report.md"
    text = path.read_text()
    path.unlink()
    folio(folder, "sweep", "--report", "mine")
    assert path.read_text() == text
    with inside(folder):
        for name in ("yours", "../sweeps/mine"):
            with pytest.raises(UserError, match=f"there is no sweep '{name}'; available: mine"):
                read_plan(name)


def test_invalid_trial_or_taken_name_queues_nothing(swept):
    folder, _ = swept
    before = queued(folder)
    for settings, message in (
        (["train.steps=6,1"], "train.steps=1: train.warmup_steps: 1 "),
        (["train.seed=1,2", "--name", "mine"], "another sweep named 'mine'"),
    ):
        with pytest.raises(UserError, match=message) as error:
            folio(folder, "sweep", *settings)
        assert "\n" not in str(error.value)
    assert queued(folder) == before


def test_ctrl_c_stops_the_trainings_and_the_same_command_resumes_them(swept):
    folder, _ = swept
    settings = ("train.steps=1000000", "train.eval_interval=500", "train.patience=null")

    def start() -> subprocess.Popen:
        return subprocess.Popen(
            [*SWEEP, *settings],
            cwd=folder,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait_for(condition) -> None:
        end = time.monotonic() + 300
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.2)

    def saved() -> list[str]:
        return sorted(path.name for path in folder.glob(".checkpoints/*/step-*"))

    def trainers() -> list[psutil.Process]:
        found = psutil.process_iter(["cmdline", "cwd"])
        return [
            each
            for each in found
            if "stages.train" in (each.info["cmdline"] or [])
            and str(each.info["cwd"]).startswith(str(folder))
        ]

    sweeping = start()
    wait_for(saved)
    sweeping.send_signal(signal.SIGINT)
    text, _ = sweeping.communicate(timeout=60)
    assert sweeping.returncode == 130 and "Traceback" not in text
    assert "stopped by Ctrl-C; " in text and "the same command resumes the sweep" in text
    wait_for(lambda: not trainers())
    at = saved()[-1]

    sweeping = start()
    wait_for(lambda: saved()[-1] > at)  # resumed: it gets beyond that step
    sweeping.send_signal(signal.SIGINT)
    text, _ = sweeping.communicate(timeout=60)
    assert sweeping.returncode == 130
    wait_for(lambda: not trainers())
