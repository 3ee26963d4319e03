"""What a sweep checks and decides before it starts the queue, and how it counts workers."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

from folio.errors import UserError
from folio.sweeps import queue, sweep
from folio.sweeps.plan import make_plan


def test_job_environment_divides_threads_and_gpus_among_the_jobs(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    threads = [sweep.job_environment(jobs, "cpu") for jobs in (1, 2, 3, 16)]
    assert threads == [{}, *({"OMP_NUM_THREADS": count} for count in "421")]
    assert sweep.job_environment(4, "cuda") == {"FOLIO_JOBS": "4", "OMP_NUM_THREADS": "2"}
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert [sweep.job_environment(2, kind) for kind in ("cpu", "cuda")] == [{}, {"FOLIO_JOBS": "2"}]


def test_count_workers_counts_the_processes_of_this_project(tmp_path, monkeypatch):
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


def test_run_rejects_a_name_that_experiments_of_another_sweep_have(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(queue, "require_dvc", lambda: None)
    who = ["-c", "user.name=Test", "-c", "user.email=test@example.org"]
    for words in (["init", "-q"], [*who, "commit", "-qm", "start", "--allow-empty"]):
        subprocess.run(["git", *words], check=True)
    (tmp_path / "text.txt").write_bytes(b"caf\xe9\n")  # a diff that is not UTF-8
    subprocess.run(["git", "add", "text.txt"], check=True)
    rates = [{"train.learning_rate": 1e-3}, {"train.learning_rate": 2e-3}]
    plan = make_plan(rates, {}, "mine")
    ref = f"refs/exps/{plan.baseline[:2]}/{plan.baseline[2:]}/mine-01"
    subprocess.run(["git", "update-ref", ref, "HEAD"], check=True)
    with pytest.raises(UserError, match="belong to another sweep: choose another --name"):
        sweep.run(plan, 1, {})
    assert not plan.folder.exists()


def test_failure_message_names_the_failed_trials_and_where_their_logs_are():
    plan = sweep.Plan(
        name="s", baseline="", changes="", base={}, trials={"s-1": {"a.b": 1}, "s-2": {"a.b": 2}}
    )
    assert sweep.failure_message(plan, ["s-2"]) == (
        "1 of 2 trials failed: s-2 (`dvc queue logs s-2` shows why); the same command retries them"
    )
