"""A training on several processes survives the loss of one, and stops as one."""

import contextlib
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import environment, programs, run_stages
from test_resume import assert_equals_uninterrupted

SETTINGS = {
    "train.steps": 120,
    "train.eval_interval": 10,
    "train.patience": None,
    "runtime.log_interval": 3,
    "runtime.processes": 2,
}


def finish(folder: Path) -> None:
    """Train to the end; nothing stops the processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", str(programs() / "python"))
        run_stages(folder, "train")


@pytest.fixture(scope="module")
def uninterrupted(make_project):
    folder = make_project(SETTINGS)
    run_stages(folder, "prepare")
    finish(folder)
    return folder


@pytest.fixture
def folder(make_project, uninterrupted):
    """A new project in which prepare has run."""
    folder = make_project(SETTINGS)
    shutil.copytree(uninterrupted / "data", folder / "data", dirs_exist_ok=True)
    return folder


class Training:
    """`python -m stages.train`, which starts the processes."""

    def __init__(self, folder: Path, *first_on_path: Path, command=("-m", "stages.train")):
        self.folder = folder
        self.launcher = psutil.Popen(
            [sys.executable, *command],
            cwd=folder,
            env=environment(*first_on_path),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def worker(self, rank: int) -> psutil.Process:
        """The process of a rank, once there is a checkpoint."""
        end = time.monotonic() + 120
        while time.monotonic() < end:
            assert self.launcher.poll() is None
            time.sleep(0.01)
            for process in self.launcher.children() if self.steps() else ():
                with contextlib.suppress(psutil.Error):
                    if process.environ().get("RANK") == str(rank):
                        return process
        raise AssertionError("no checkpoint after two minutes")

    def steps(self) -> list[Path]:
        return list(self.folder.glob(".checkpoints/*/step-*[0-9]"))

    def end(self) -> tuple[int, list[str]]:
        """The exit status, and the lines that Folio has reported, except for how long processes
        take to start. There are no tracebacks."""
        output, _ = self.launcher.communicate(timeout=120)
        assert "Traceback" not in output
        lines = [line for line in output.splitlines() if line.startswith("folio")]
        return self.launcher.returncode, [x for x in lines if ": waiting for process" not in x]


@pytest.mark.parametrize("rank", [0, 1])
def test_killed_process_is_restarted_and_the_run_is_that_of_an_uninterrupted_one(
    folder, uninterrupted, rank
):
    training = Training(folder)
    training.worker(rank).kill()
    killed = f"folio: process {rank} was killed by SIGKILL"
    line = f"{killed}: starting all 2 again from the last checkpoint"
    assert training.end() == (0, [line])
    assert_equals_uninterrupted(folder, uninterrupted, last=120)


@pytest.mark.parametrize(
    "receiver, number",
    [("launcher", signal.SIGTERM), ("launcher", signal.SIGINT), ("process 1", signal.SIGTERM)],
)
def test_stop_request_stops_all_processes_after_saving(folder, uninterrupted, receiver, number):
    training = Training(folder)
    worker = training.worker(1)
    (training.launcher if receiver == "launcher" else worker).send_signal(number)
    status, [line] = training.end()
    cause = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}[number]
    assert status == 128 + number
    assert line.startswith(f"folio: stopped by {cause}; step ") and "is saved" in line
    assert not worker.is_running()
    finish(folder)
    assert_equals_uninterrupted(folder, uninterrupted, last=120)


def test_processes_end_if_the_launcher_is_killed(folder, uninterrupted):
    training = Training(folder)
    workers = [training.worker(0), training.worker(1)]
    training.launcher.kill()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive
    finish(folder)
    assert_equals_uninterrupted(folder, uninterrupted, last=120)


FEWER_FAILURES = """
import runpy
from folio import launch
launch._MOST_FAILURES = 2  # instead of 6, which tests/test_launch.py tests
runpy.run_module("stages.train", run_name="__main__")
"""


def test_process_that_never_comes_back_is_left_out(folder, tmp_path):
    code = "import os\nif os.environ.get('LOCAL_RANK') == '1': os.kill(os.getpid(), 9)\n"
    (tmp_path / "sitecustomize.py").write_text(code)
    command = ["-c", FEWER_FAILURES, "-m", "stages.train"]
    status, lines = Training(folder, tmp_path, command=command).end()
    assert status == 0
    assert lines[-1] == "folio: process 1 was killed by SIGKILL 2 times: continuing without it"
    assert (folder / "models/gpt2/model.safetensors").exists()


def test_error_of_all_processes_is_reported_once_and_not_repeated(folder):
    shutil.rmtree(folder / "data/prepared")
    status, lines = Training(folder).end()
    assert status == 1
    assert len(lines) == 1 and "meta.json is missing" in lines[0]


def test_processes_of_an_outside_torchrun_are_used_and_restarted(folder, uninterrupted):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    training = Training(folder, command=[*command, "--max-restarts", "3", "-m", "stages.train"])
    training.worker(1).kill()
    output, _ = training.launcher.communicate(timeout=120)
    assert training.launcher.returncode == 0, output
    assert_equals_uninterrupted(folder, uninterrupted, last=120)
