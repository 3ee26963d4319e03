"""Stop requests: SIGTERM, Ctrl-C and all other signals that end a process by default."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from conftest import ROOT, environment

from folio import signals


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """Keep a stop request from ending pytest after the grace period, or stopping other tests."""
    monkeypatch.setattr(signals, "GRACE_PERIOD", 24 * 3600.0)
    monkeypatch.setattr(signals, "_cause", None)


def test_stop_request_raises_at_once():
    request = pytest.raises(signals.Stopped, match="stopped by SIGTERM; run the same command")
    with request as stopped, signals.handled(print):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("not reached")
    assert stopped.value.status == 143


NAMES = {**{int(s): s.name for s in signal.Signals}, signal.SIGINT: "Ctrl-C"}
NAMES[signal.SIGQUIT] = "Ctrl-\\"


@pytest.mark.parametrize("number", signals.STOPPING)
def test_every_signal_that_ends_a_process_requests_a_stop(number):
    with pytest.raises(signals.Stopped) as stopped, signals.handled(print):
        os.kill(os.getpid(), number)
        raise AssertionError("not reached")
    assert stopped.value.status == 128 + number
    name = NAMES.get(number, f"signal {number}")
    assert str(stopped.value) == f"stopped by {name}; run the same command again to continue"
    assert stopped.value.terminal_closed == (number == signal.SIGHUP)


def test_signals_that_request_no_stop_cannot_be_caught_or_do_not_end_a_healthy_process():
    harmless = {"SIGCHLD", "SIGCONT", "SIGTSTP", "SIGTTIN", "SIGTTOU", "SIGURG", "SIGWINCH"}
    faults = {"SIGBUS", "SIGFPE", "SIGILL", "SIGSEGV", "SIGSYS", "SIGTRAP"}
    ignored_by_python = {"SIGPIPE", "SIGXFSZ"}
    others = {NAMES[number] for number in signal.valid_signals() - {*signals.STOPPING}}
    assert others == harmless | faults | ignored_by_python | {"SIGKILL", "SIGSTOP"}


@pytest.mark.parametrize("number", signals.STOPPING)
def test_ignored_signal_stays_ignored(number):
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with signals.handled(print):
            os.kill(os.getpid(), number)
            assert signal.getsignal(number) is signal.SIG_IGN
            signals.check()
    finally:
        signal.signal(number, before)


def test_dvc_that_ends_stops_the_stage_even_if_sigterm_is_ignored(monkeypatch):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    dvc = psutil.Process(ended.pid)
    ended.wait()
    monkeypatch.setattr(signals, "_supervisors", {dvc: "dvc"})
    monkeypatch.setattr(signals, "_ended", "")
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        request = pytest.raises(signals.Stopped, match="stopped by the exit of dvc")
        with request as stopped, signals.handled(print):
            time.sleep(30)
        assert stopped.value.status == 143
    finally:
        signal.signal(signal.SIGTERM, before)


def test_deferred_stop_request_waits_for_check():
    done = []
    with pytest.raises(signals.Stopped), signals.handled(print), signals.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        done.append("the step")
        assert signals.seconds_left() > 0
        signals.check()
        done.append("the next step")
    assert done == ["the step"]


def test_stop_request_that_a_library_swallows_raises_at_the_end():
    with pytest.raises(signals.Stopped) as stopped, signals.handled(print):
        with contextlib.suppress(BaseException):
            os.kill(os.getpid(), signal.SIGINT)
        finished = True
    assert stopped.value.status == 130 and finished


def test_deferred_stop_request_after_the_last_check_lets_the_block_end():
    with signals.handled(print), signals.deferred():
        os.kill(os.getpid(), signal.SIGTERM)


def test_deferred_stop_request_raises_in_an_interruptible_block():
    done = []
    with pytest.raises(signals.Stopped), signals.handled(print), signals.deferred():
        with signals.interruptible():
            done.append("the first block")
        os.kill(os.getpid(), signal.SIGTERM)
        with signals.interruptible():
            done.append("the second block")
    assert done == ["the first block"]


def test_handled_restores_the_previous_handlers():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with signals.handled(print):
        assert signal.getsignal(signal.SIGTERM) != before[0]
        signals.check()
        assert signals.seconds_left() is None
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def run_with_two_signals(action: str) -> subprocess.CompletedProcess:
    """Run a process that sends itself a signal twice in a deferred block."""
    script = f"""
import os, signal
from folio import signals
from folio.errors import one_line_errors
with one_line_errors(), signals.deferred():
    for _ in range(2):
        os.kill(os.getpid(), signal.{action})
    print("the step is done", flush=True)
    signals.check()
"""
    return subprocess.run(
        [sys.executable, "-c", script], env=environment(ROOT), capture_output=True, text=True
    )


def test_second_sigterm_does_not_interrupt_a_step():
    done = run_with_two_signals("SIGTERM")
    assert (done.returncode, done.stdout) == (143, "the step is done\n")
    assert done.stderr.startswith("folio: stopped by SIGTERM; ")


@pytest.mark.parametrize(("name", "keys"), [("SIGINT", "Ctrl-C"), ("SIGQUIT", "Ctrl-\\")])
def test_second_ctrl_c_exits_at_once(name, keys):
    done = run_with_two_signals(name)
    assert (done.returncode, done.stdout) == (128 + signal.Signals[name], "")
    assert done.stderr == (
        f"folio: stopped by {keys}; run the same command again to resume from the last checkpoint\n"
    )


def test_process_that_cannot_stop_exits_after_grace_period(tmp_path):
    script = """
from folio import signals
from folio.errors import one_line_errors
signals.GRACE_PERIOD = 1.0
with one_line_errors(), signals.deferred():
    print("ready", flush=True)
    while True:
        pass
"""
    with subprocess.Popen(
        [sys.executable, "-c", script],
        env=environment(ROOT),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as stuck:
        assert stuck.stdout.readline() == "ready\n"
        for _ in range(2):  # a scheduler may send it twice
            stuck.send_signal(signal.SIGTERM)
        _, stderr = stuck.communicate(timeout=10)
    assert stuck.returncode == 143
    assert stderr == (
        "folio: stopped by SIGTERM; run the same command again to resume from the last checkpoint\n"
    )
