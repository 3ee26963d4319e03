"""Sweeps: what the command line means, a real one on DVC's queue, its report and its end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import psutil
import pytest
from conftest import ROOT, environment, folio, inside, run
from PIL import Image

from folio.sweeps import parallel_coordinates, queue, report, sweep
from folio.__main__ import _sections
from folio.errors import UserError
from folio.sweeps.space import MOST, Choice, Range
from folio.sweeps.report import Result

SECTIONS = _sections()
RATE = "train.learning_rate"


def points(*settings: str, count: int | None = None, seed: int = 1) -> list[dict]:
    return sweep.points(list(settings), count, seed, SECTIONS)


def test_a_grid_is_every_combination_with_the_values_of_their_types():
    assert points("train.learning_rate=1e-3,2e-3", "train.patience=3,null") == [
        {"train.learning_rate": 0.001, "train.patience": 3},
        {"train.learning_rate": 0.001, "train.patience": None},
        {"train.learning_rate": 0.002, "train.patience": 3},
        {"train.learning_rate": 0.002, "train.patience": None},
    ]
    [point] = points("train.learning_rate=1", "train.precision=fp32", "train.deterministic=false")
    assert [type(value) for value in point.values()] == [float, str, bool]


def test_random_points_are_the_same_for_a_seed_and_others_for_another():
    settings = ("train.learning_rate=1e-4..1e-2", "model.n_layer=1..4")
    assert points(*settings, count=8) == points(*settings, count=8)
    assert points(*settings, count=8) != points(*settings, count=8, seed=2)


def test_a_range_between_ints_gives_ints_of_which_each_comes_as_often():
    drawn = [
        point["model.n_layer"]
        for point in points("model.n_layer=2..5", RATE + "=1e-4..1", count=40)
    ]
    assert {type(value) for value in drawn} == {int}
    assert [drawn.count(value) for value in (2, 3, 4, 5)] == [10, 10, 10, 10]


def test_a_range_across_a_power_of_ten_is_drawn_by_its_logarithm():
    def below(setting: str, value: float) -> int:
        return sum(point[RATE] < value for point in points(setting, count=20))

    assert below(f"{RATE}=1e-4..1e-2", 1e-3) == 10
    assert below(f"{RATE}=lin:1e-4..1e-2", 5.05e-3) == 10
    assert below(f"{RATE}=2e-3..8e-3", 5e-3) == 10
    assert below(f"{RATE}=log:2e-3..8e-3", 4e-3) == 10


@pytest.mark.parametrize("log", [True, False])
@pytest.mark.parametrize(("low", "high"), [(1, 1000), (0.00123456, 0.0987654)])
def test_what_is_drawn_is_never_outside_its_range(low, high, log):
    drawn = [Range(low, high, log).at(u) for u in (0.0, 0.5, 1 - 1e-16, 1 - 1e-9)]
    assert all(low <= value <= high for value in drawn)


def test_random_points_are_each_there_once():
    drawn = points("model.n_layer=1,2", "train.seed=1,2", count=50)
    assert len(drawn) == 4 and {type(each) for point in drawn for each in point.values()} == {int}


@pytest.mark.parametrize(
    ("settings", "count", "words"),
    [
        ([], None, "what is to vary?"),
        (["train.learning_rate"], None, "'train.learning_rate' varies nothing"),
        (["=3"], None, "'=3' varies nothing"),
        (["train.learnign_rate=1"], None, "did you mean train.learning_rate?"),
        (["evaluate.stride=1,2"], None, "it varies params of model and train"),
        (["train.steps=10,ten"], None, "train.steps: 'ten' will not do; it takes an int >= 1"),
        (["train.steps=1.5"], None, "train.steps: '1.5' will not do"),
        (["train.steps=[1"], None, "train.steps: '[1' will not do"),
        (["train.beta1=0.5,1"], None, "it takes a float >= 0, < 1"),
        (["train.steps=10,,20"], None, "a value is missing"),
        (["train.steps=10,10"], None, "a value is there twice"),
        (["train.learning_rate=1e-3,0.001"], None, "a value is there twice"),
        (["train.steps=10", "train.steps=20"], None, "train.steps is there twice"),
        (["train.learning_rate=1e-4..1e-2"], None, "`--random 20` draws 20 points of a range"),
        (["train.steps=1..9", "train.seed=1..5"], 0, f"--random 0: from 1 to {MOST} points"),
        (["train.steps=9..1"], 4, "a range is from a number to a higher one"),
        (["train.steps=1..."], 4, "train.steps: '.' will not do"),
        (["train.precision=bf16..fp32"], 4, "a range is from a number"),
        (["train.learning_rate=ln:1e-4..1e-2"], 4, "log:low..high or lin:low..high"),
        (["model.dropout=log:0..0.5"], 4, "a low end above 0"),
        ([f"train.{key}={','.join(map(str, range(1, 31)))}" for key in ("seed", "steps")], None,
         "900 points are too many"),
    ],
)  # fmt: skip
def test_settings_that_mean_nothing_are_one_line(settings, count, words):
    with pytest.raises(UserError) as problem:
        points(*settings, count=count)
    assert words in str(problem.value) and "\n" not in str(problem.value)


@pytest.mark.parametrize(
    ("point", "words"),
    [
        ({"train.steps": 100}, "train.steps=100: train.warmup_steps: 300 leaves no step of 100"),
        ({"model.n_embd": 130}, "model.n_embd=130: model."),
        ({"model.block_size": 16}, "evaluate.stride 32 is more than a context of 16"),
    ],
)
def test_a_point_whose_params_do_not_go_together_is_one_line(point, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    sweep.check([{"train.steps": 400}], {}, SECTIONS)
    with pytest.raises(UserError) as problem:
        sweep.check([{"train.steps": 400}, point], {}, SECTIONS)
    assert words in str(problem.value) and "\n" not in str(problem.value)


def test_threads_are_shared_among_the_jobs_on_a_cpu_alone(monkeypatch):
    import torch

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [sweep.threads(jobs, cpu) for jobs in (1, 2, 3, 16)] == [None, 4, 2, 1]
    assert sweep.threads(4, gpu) is None
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert sweep.threads(2, cpu) is None


def test_a_worker_is_known_by_its_process_and_its_project(tmp_path, monkeypatch):
    sleep = [sys.executable, "-c", "import time; time.sleep(60)", "queue-worker"]
    worker = subprocess.Popen(sleep, cwd=tmp_path)
    try:
        monkeypatch.chdir(tmp_path)
        assert queue.count_workers() == 1
        monkeypatch.chdir(ROOT)
        assert queue.count_workers() == 0
    finally:
        worker.kill()
        worker.wait()
    monkeypatch.chdir(tmp_path)
    assert queue.count_workers() == 0


def result(number: int, loss: float, **point) -> Result:
    return Result(
        experiment=f"s-{number:02}",
        point={name.replace("__", "."): value for name, value in point.items()},
        loss=loss,
        step=90,
        seconds=61.4,
        run="0123456789abcdef",
    )


def plan(found: list[Result]) -> sweep.Plan:
    by_name = {each.experiment: each.point for each in found}
    return sweep.Plan(name="s", baseline="abcdef0123", changes="", base={}, points=by_name)


def test_the_report_shows_what_seeds_make():
    found = [
        result(seed + int(loss), loss + seed / 100, train__learning_rate=rate, train__seed=seed)
        for rate, loss in ((1e-3, 50.0), (2e-3, 40.0))
        for seed in (1, 2, 3)
    ]
    text = report.report(plan(found), sorted(found, key=lambda each: each.loss))
    assert "6 of 6 points of commit abcdef0" in text and "1 min 01 s" in text
    assert [line.split("|")[2:6] for line in text.splitlines() if "40.0100 |" in line][1] == [
        "     3 ", " 40.0200 ", " 40.0100 ", " 40.0300 ",
    ]  # fmt: skip
    assert "move the loss by 0.0100 (standard deviation, 4 degrees of freedom)" in text
    assert "6 points are too few to tell" in text


def test_what_all_points_share_is_told_once():
    same = {
        "s-1": {"model.n_layer": 2, "train.steps": 9},
        "s-2": {"model.n_layer": 3, "train.steps": 9},
    }
    shared = sweep.Plan(name="s", baseline="", changes="", base={}, points=same)
    assert sweep.listing(shared).splitlines() == [
        "| 2 points | model.n_layer |",
        "| -------: | ------------: |",
        "|      s-1 |             2 |",
        "|      s-2 |             3 |",
        "all with train.steps=9",
    ]


def test_without_seeds_the_report_says_that_small_differences_are_none():
    found = [result(i, 5.0 + i, train__steps=10 + i) for i in range(3)]
    text = report.report(plan(found), found)
    assert "`train.seed=1,2,3` in a sweep shows how much" in text
    assert "Which param matters" not in text  # there is one


def test_the_importance_puts_the_param_first_that_moves_the_loss():
    pytest.importorskip("optuna")
    found = [
        result(i, 5 - layers + dropout / 10, model__dropout=dropout, model__n_layer=layers)
        for i, (dropout, layers) in enumerate((d / 10, n) for d in range(4) for n in (1, 2, 3))
    ]
    text = report.report(plan(found), found)
    shares = [line.split("|") for line in text.split("Which param matters")[1].splitlines()]
    rows = [
        (cells[1].strip(), float(cells[2]))
        for cells in shares
        if len(cells) == 4 and "0." in cells[2]
    ]
    assert [name for name, _ in rows] == ["n_layer", "dropout"]
    assert rows[0][1] > 0.9 and abs(sum(share for _, share in rows) - 1) < 0.02


@pytest.mark.parametrize(
    ("count", "losses"),
    [
        (3, lambda i: 5 - i / 10),
        (60, lambda i: 5 + i % 7),
        (4, lambda i: 5.0),
        (5, lambda i: 10.0**i),
    ],
)
def test_the_picture_is_drawn_for_few_and_many_lines_equal_losses_and_outliers(
    count, losses, tmp_path
):
    varied = ("train.patience=null,3", "train.compile=auto,never", "model.dropout=0..0.3")
    drawn = points("train.learning_rate=1e-4..1e-2", *varied, count=count)
    parallel_coordinates.draw(
        drawn, [losses(i) for i in range(len(drawn))], tmp_path / "picture.png"
    )
    image = Image.open(tmp_path / "picture.png")
    assert image.size[0] > 1000 and len(image.convert("RGB").getcolors(10**6)) > 100


def test_an_axis_has_low_values_at_its_foot_and_null_at_its_head():
    scale = parallel_coordinates.Scale([5, None, 3])
    assert [scale.at(value) for value in (3, 5, None)] == [0, 0.5, 1]
    assert parallel_coordinates.Scale([1e-3, 1e-2, 1e-1]).at(1e-2) == pytest.approx(0.5)
    assert parallel_coordinates.Scale([0.01, 0.1, 0.2, 0.3]).log is False


SWEEP = ("python", "-m", "folio", "sweep")


@pytest.fixture(scope="module")
def swept(make_trained):
    """A project after a sweep of four points, three at once, into a store that is not there yet. A
    context of 9,999 tokens is more than there are, which shows only in training. With what the
    command left to read."""
    folder = make_trained(store=False)
    settings = ("model.block_size=12,9999,8,10", "--jobs", "3")
    done = subprocess.run(
        [*SWEEP, *settings, "--name", "mine"],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=900,
    )
    return folder, done


def test_points_that_fail_are_named_and_stop_no_others(swept):
    _, done = swept
    assert done.returncode == 1 and "Traceback" not in done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("folio: ")]
    assert "1 of 4 points failed: mine-02 (`dvc queue logs mine-02` says why)" in line
    assert "mine-01  model.block_size=12  held-out " in done.stdout


def test_the_report_is_made_of_the_runs_in_mlflow(swept):
    folder, done = swept
    text = (folder / "sweeps/mine/report.md").read_text()
    assert text in done.stdout and "3 of 4 points of commit" in text
    with inside(folder):
        runs = {each.experiment: each for each in report.Store(None).runs()}
    rows = [line.split() for line in text.splitlines() if "| mine-" in " ".join(line.split())]
    assert {row[1] for row in rows} == {"mine-01", "mine-03", "mine-04"} <= runs.keys()
    losses = [float(row[5]) for row in rows]
    assert losses == sorted(losses)
    for row in rows:
        assert float(row[5]) == pytest.approx(runs[row[1]].loss, abs=1e-4)
        assert runs[row[1]].id.startswith(row[-2])
    assert Image.open(folder / "sweeps/mine/parallel_coordinates.png").size[0] > 1000


@pytest.mark.parametrize("name", ["mine-01", "mine-03", "mine-04"])
def test_each_of_several_trainings_at_once_has_a_run_with_all_that_belongs_to_it(swept, name):
    folder, _ = swept
    store = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = store.get_experiment_by_name("folio").experiment_id
    found = store.search_runs([experiment], f"tags.dvc_experiment = '{name}'")
    [kept] = [each for each in found if "mlflow.parentRunId" not in each.data.tags]
    assert kept.info.status == "FINISHED" and kept.data.tags["dvc_baseline"]
    assert Path(kept.info.artifact_uri.removeprefix("file://")).is_relative_to(folder)
    assert "evaluate/val_loss" in kept.data.metrics
    points = store.get_metric_history(kept.info.run_id, "train_loss")
    assert sorted(point.step for point in points) == [1, 2, 3, 4, 5, 6]
    folders = {item.path for item in store.list_artifacts(kept.info.run_id)}
    assert folders == {"data", "training"}
    models = store.search_logged_models([experiment])
    assert kept.info.run_id in {model.source_run_id for model in models}


def test_a_sweep_leaves_the_working_tree_as_it_was(swept):
    assert run(swept[0], "git", "status", "--porcelain").stdout == ""


def test_a_former_sweep_is_reported_again_and_an_unknown_one_is_one_line(swept):
    folder, _ = swept
    (folder / "sweeps/mine/report.md").rename(folder / "sweeps/former.md")
    folio(folder, "sweep", "--report", "mine")
    assert (folder / "sweeps/mine/report.md").read_text() == (
        folder / "sweeps/former.md"
    ).read_text()
    with inside(folder):
        for name in ("yours", "../sweeps/mine"):
            with pytest.raises(UserError, match=f"no sweep '{name}' here; there are mine"):
                sweep.read(name)


def test_a_bad_point_or_a_name_that_is_taken_queues_nothing(swept):
    folder, _ = swept
    before = run(folder, "dvc", "queue", "status").stdout
    for settings, words in (
        (["train.steps=6,1"], "train.steps=1: train.warmup_steps: 1 leaves no step of 1"),
        (["train.seed=1,2", "--name", "mine"], "there is another sweep 'mine'"),
    ):
        with pytest.raises(UserError, match=words) as problem:
            folio(folder, "sweep", *settings)
        assert "\n" not in str(problem.value)
    assert run(folder, "dvc", "queue", "status").stdout == before


def test_ctrl_c_stops_the_trainings_and_the_same_command_goes_on(swept):
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

    def wait_for(what) -> None:
        end = time.monotonic() + 300
        while not what():
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
    assert "stopped by Ctrl-C; " in text and "the same command goes on" in text
    wait_for(lambda: not trainers())
    at = saved()[-1]

    sweeping = start()
    wait_for(lambda: saved()[-1] > at)  # goes on behind that step
    sweeping.send_signal(signal.SIGINT)
    text, _ = sweeping.communicate(timeout=60)
    assert sweeping.returncode == 130
    wait_for(lambda: not trainers())


def test_a_plan_that_is_damaged_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for content in ("{", "[]", json.dumps({"name": "x"})):
        (tmp_path / "sweeps/x").mkdir(parents=True, exist_ok=True)
        (tmp_path / "sweeps/x/plan.json").write_text(content)
        with pytest.raises(UserError, match="is damaged: remove sweeps/x and sweep again"):
            sweep.read("x")


@pytest.mark.parametrize("name", ["", "a/b", "-j", "..", "a" * 41])
def test_a_name_that_is_none_for_an_experiment_is_one_line(name):
    with pytest.raises(UserError, match="letters, digits, - and _ make a name"):
        sweep.plan(points("train.seed=1"), {}, name)


def test_choices_are_even_at_random():
    assert [Choice(("a", "b")).at(u) for u in (0, 0.49, 0.5, 0.999)] == ["a", "a", "b", "b"]


def test_experiments_of_another_sweep_are_not_taken_for_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    who = ["-c", "user.name=Test", "-c", "user.email=test@example.org"]
    for words in (["init", "-q"], [*who, "commit", "-qm", "start", "--allow-empty"]):
        subprocess.run(["git", *words], check=True)
    (tmp_path / "text.txt").write_bytes(b"caf\xe9\n")  # a diff that is not UTF-8
    subprocess.run(["git", "add", "text.txt"], check=True)
    plan = sweep.plan(points(RATE + "=1e-3,2e-3"), {}, "mine")
    ref = f"refs/exps/{plan.baseline[:2]}/{plan.baseline[2:]}/mine-01"
    subprocess.run(["git", "update-ref", ref, "HEAD"], check=True)
    with pytest.raises(UserError, match="of another sweep here: take another --name"):
        sweep.run(plan, 1, None)
    assert not plan.folder.exists()
