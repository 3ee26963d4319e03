"""How trainings that run at once divide the GPUs, with processes that only reserve them."""

import multiprocessing
import os
import signal

import pytest

from folio import gpus
from folio.errors import UserError


def job(folder, end):
    gpus.reserve(folder)
    end.send(os.environ["CUDA_VISIBLE_DEVICES"])
    signal.pause()


@pytest.fixture
def start_job(tmp_path):
    """Start a job that reserves GPUs and then waits. Returns the process and its GPUs."""
    fork = multiprocessing.get_context("fork")
    jobs = []

    def start():
        mine, its = fork.Pipe()
        jobs.append(fork.Process(target=job, args=[tmp_path, its]))
        jobs[-1].start()
        its.close()
        return jobs[-1], mine.recv()

    yield start
    for each in jobs:
        each.kill()
        each.join()


def test_jobs_use_different_gpus_and_take_over_those_of_a_killed_one(start_job, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5,7,8")
    monkeypatch.setenv(gpus.JOBS, "2")
    first, its_gpus = start_job()
    assert [its_gpus, start_job()[1]] == ["2,3", "5,7"]
    first.kill()
    first.join()
    assert start_job()[1] == "2,3"
    assert start_job()[1] == "2,3"  # more jobs than expected, for example while one is exiting


def test_jobs_that_see_different_gpus_do_not_crowd_each_other(start_job, monkeypatch):
    monkeypatch.setenv(gpus.JOBS, "2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert start_job()[1] == "0"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert start_job()[1] == "2"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert start_job()[1] == "1"


@pytest.mark.parametrize(
    ("listed", "names"),
    [
        ("0, 1", ["0", "1"]),
        ("2,-1,3", ["2"]),
        ("-1", []),
        ("0,1,", ["0", "1"]),
        ("GPU-5a,GPU-6b", ["GPU-5a", "GPU-6b"]),
        ("MIG-5a,MIG-6b", ["MIG-5a", "MIG-6b"]),
    ],
)
def test_visible_reads_the_list_as_cuda_does(monkeypatch, listed, names):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    assert gpus.visible() == names


@pytest.mark.parametrize(
    ("visible", "jobs", "torchrun", "left"),
    [
        ("4,5", "1", False, "4,5"),
        ("4", "3", False, "4"),
        ("4,5", "2", True, "4,5"),
        ("4,5,6", "8", False, "4"),
    ],
)
def test_reserve_restricts_only_one_of_several_jobs_on_several_gpus(
    tmp_path, monkeypatch, visible, jobs, torchrun, left
):
    monkeypatch.setattr(gpus, "_held", [])
    for name in ("RANK", "WORLD_SIZE") if torchrun else ():
        monkeypatch.setenv(name, str(int(name != "RANK")))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setenv(gpus.JOBS, jobs)
    gpus.reserve(tmp_path)
    assert ",".join(gpus.visible()) == left


@pytest.mark.parametrize("jobs", ["0", "two", "-1", "²", " 2", "2\n", "9" * 5000])
def test_reserve_rejects_what_is_no_positive_number(tmp_path, monkeypatch, jobs):
    monkeypatch.setenv(gpus.JOBS, jobs)
    with pytest.raises(UserError, match=r"FOLIO_JOBS is .*: set it to the number of trainings"):
        gpus.reserve(tmp_path)
