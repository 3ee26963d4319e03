"""benchmarks.ablation trains on DVC's queue, and shows MLflow's data."""

import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, commit, inside, set_params, warm_environment

from benchmarks import ablation
from folio.errors import UserError
from folio.tracking.queries import list_runs
from folio.tracking.store import Store

OFF = {
    "model.dropout": 0.0,
    "train.optimizer": "adamw",
    "train.factored_embedding": False,
    "train.unseen_probability": 0.0,
    "train.beta2": 0.95,
}
WORDS = ("--variant", "small", "--seeds", "1")


@pytest.fixture(scope="module")
def trained(make_project):
    """A project after an ablation of its only option, input noise, and what was printed."""
    folder = make_project(OFF)
    (folder / "variants").mkdir()
    (folder / "variants/small.yaml").write_text("train: {input_noise: 0.3}\n")
    commit(folder)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.ablation", *WORDS, "--part", "options", "--jobs", "2"],
        cwd=folder,
        env=warm_environment(ROOT),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def show(folder, *words):
    """Run the command in this process."""
    with inside(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ablation", *WORDS, *words])
        ablation.main()


def runs_of(folder):
    with inside(folder):
        return {run.experiment: run for run in list_runs(Store(None))}


def test_options_are_compared_by_the_runs_in_mlflow(trained):
    folder, printed = trained
    first, second = sorted(runs_of(folder).items())
    found = {"all on": first[1].metrics, "input noise": second[1].metrics}
    names = ("last_val_loss", "evaluate/val_loss_sliding", "evaluate/train_loss")
    lines = printed.splitlines()
    for name, metrics in found.items():
        [row] = [line for line in lines if line.startswith("| ") and f" {name} |" in line]
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert [cells[1], *cells[-2:]] == [f"{metrics[each]:.3f}" for each in names]
    assert first[1].params["train.input_noise"] == "0.3"
    assert second[1].params["train.input_noise"] == "0.0"
    assert second[1].params["train.seed"] == first[1].params["train.seed"] == "1"
    assert any(line.startswith(f"{second[0]}  no input noise, seed 1  vali") for line in lines)
    assert (folder / "docs/ablation-small.png").stat().st_size > 10_000


def test_same_command_trains_nothing_again(trained, capsys):
    folder, printed = trained
    before = runs_of(folder)
    show(folder, "--part", "options")
    again = capsys.readouterr().out
    assert "2 of 2 trials have already finished" in again
    assert again[again.index("| ") :] == printed[printed.index("| ") :]
    assert runs_of(folder).keys() == before.keys()


def test_runs_in_a_copied_store_are_shown_elsewhere(trained, make_project, tmp_path, capsys):
    folder, printed = trained
    shutil.copy(folder / "mlflow.db", tmp_path)
    home = make_project(OFF)
    shutil.copytree(folder / "variants", home / "variants")
    with pytest.raises(UserError, match="MLflow has none of these runs: run the command without"):
        show(home, "--draw")
    capsys.readouterr()
    show(home, "--draw", "--stores", f"sqlite:///{tmp_path}/mlflow.db")
    shown = capsys.readouterr().out
    assert "MLflow has no finished run: text: 1/16, seed 1\n" in shown
    assert printed[printed.index("| ") : printed.index("\n\ndrawn")] in shown
    [row] = [line for line in shown.splitlines() if line.startswith("|  all | ")]
    assert int(row.split("|")[2].replace(",", "")) > 2_000
    assert (home / "docs/ablation-small.png").stat().st_size > 10_000
    set_params(home, {"runtime.tracking_uri": f"sqlite:///{folder}/mlflow.db"})
    show(home, "--draw")
    assert capsys.readouterr().out == shown


def test_invalid_variant_is_one_line_and_queues_nothing(trained):
    folder, _ = trained
    (folder / "variants/wrong.yaml").write_text("train: {input_nose: 0.3}\n")
    for name, message in (("wrong", "train.input_nose"), ("none", "there is no variant 'none'")):
        with pytest.raises(UserError, match=message) as error:
            show(folder, "--variant", name)
        assert "\n" not in str(error.value)
