"""The launcher of several processes, with a program that does not train."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT

from folio import launch, signals
from folio.errors import LAUNCHER


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Let `python -m program` run the code that is passed. Returns the number of processes of each
    start."""

    def write(code):
        (tmp_path / "program.py").write_text(f"{_COMMON}\n{code}\n")
        return lambda: [int(line) for line in (tmp_path / "starts").read_text().split()]

    monkeypatch.setattr(launch, "_MOST_FAILURES", 3)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    for name in (LAUNCHER, "GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS", "TORCHELASTIC_ERROR_FILE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return write


_COMMON = """
import os, signal, sys, time
rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
if rank == count - 1:  # the one that may kill itself
    print(count, file=open("starts", "a"))
"""
_KILLED = "if rank == 2: os.kill(os.getpid(), 9)\nif count == 3: time.sleep(60)"
_LEFT_OUT = "folio: process 2 was killed by SIGKILL 3 times: continuing without it"


@pytest.mark.parametrize(
    ("usable", "last", "reason"), [(2, 2, ""), (1, 1, ", on 1 only: 2 cannot share a step")]
)
def test_process_that_is_killed_again_and_again_is_left_out(program, capsys, usable, last, reason):
    starts = program(_KILLED)
    launch.run("program", 3, "cpu", lambda: 0, largest_number=lambda most: min(most, usable))
    assert starts() == [3] * 3 + [last]
    assert capsys.readouterr().err.splitlines()[-1] == _LEFT_OUT + reason


def test_unused_gpu_replaces_that_of_a_process_that_is_left_out(program, monkeypatch):
    code = "gpus = os.environ['CUDA_VISIBLE_DEVICES']\nprint(gpus, file=open('gpus', 'a'))"
    starts = program(f"{code}\nif gpus == '4,5' and rank == 1: os.kill(os.getpid(), 9)")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    launch.run("program", 2, "cuda", lambda: 0, largest_number=lambda most: most)
    assert starts() == [2] * 4
    assert set(Path("gpus").read_text().split()) == {"4,5", "4,6"}


_JOIN = """
from folio import distributed
from folio.errors import one_line_errors
with one_line_errors():
    open(f"joins-{rank}", "w")
    distributed.join("cpu")
"""


def test_process_that_waits_for_a_killed_one_does_not_delay_the_restart(program, capfd):
    killed = "if rank == 1 and not os.path.exists('killed'):\n"
    killed += "    while not os.path.exists('joins-0'): time.sleep(0.01)\n"
    killed += "    open('killed', 'w'); time.sleep(0.5); os.kill(os.getpid(), 9)"
    starts = program(f"{killed}\n{_JOIN}")
    begin = time.monotonic()
    launch.run("program", 2, "cpu", lambda: 0, largest_number=lambda most: most)
    assert time.monotonic() - begin < 25  # the engine kills after 30 seconds
    assert starts() == [2, 2]
    line = "process 1 was killed by SIGKILL: starting all 2 again from the last checkpoint"
    assert capfd.readouterr().err == f"folio: {line}\n"


def test_stop_request_ends_a_process_that_hangs_while_it_starts(program, monkeypatch, capfd):
    monkeypatch.setattr(signals, "GRACE_PERIOD", 1.0)
    hangs = "while rank == 1: os.kill(os.getpid(), signal.SIGSTOP)"
    program(f"{hangs}\n{_JOIN}")
    monkeypatch.setattr(signals, "_cause", None)

    def stop():
        while not Path("joins-0").exists():
            time.sleep(0.01)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=stop, daemon=True).start()
    begin = time.monotonic()
    with pytest.raises(SystemExit) as ended, signals.handled(print):
        launch.run("program", 2, "cpu", lambda: 0, largest_number=lambda most: most)
    assert time.monotonic() - begin < 25
    assert ended.value.code == 128 + signal.SIGINT
    line = "stopped by Ctrl-C; run the same command again to continue"
    assert capfd.readouterr().err == f"folio: {line}\n"
