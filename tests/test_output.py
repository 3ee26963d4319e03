"""What happens when the terminal or the pipe that a command writes to is closed."""

import fcntl
import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from conftest import ROOT, environment

# Prints until something stops it, at most 2,000 times; `done` shows how it ended.
SCRIPT = """
import signal, sys, time
from folio import signals
from folio.errors import one_line_errors
if {ignored}:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
with one_line_errors(), signals.deferred():
    try:
        for _ in range({count}):
            print("a line", flush=True)
            print("a line", file=sys.stderr, flush=True)
            signals.check()
            time.sleep(0.01)
        how = "continued"
    except signals.Stopped as stopped:
        how = str(stopped)
        print("a last line")
        open("done", "w").write(how)
        raise
    open("done", "w").write(how)
"""


def in_terminal(folder: Path, ignored: bool) -> subprocess.Popen:
    """Start the script in a terminal of its own, which is closed after the first lines."""
    terminal, other_end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(ignored=ignored, count=100)],
        cwd=folder,
        env=environment(ROOT),
        stdin=other_end,
        stdout=other_end,
        stderr=other_end,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(other_end)
    assert os.read(terminal, 6) == b"a line"
    os.close(terminal)
    return process


def test_closed_terminal_is_a_stop_request(tmp_path):
    assert in_terminal(tmp_path, ignored=False).wait(60) == 129
    assert (tmp_path / "done").read_text().startswith("stopped by SIGHUP; ")


def test_closed_terminal_does_not_disturb_a_process_that_ignores_sighup(tmp_path):
    assert in_terminal(tmp_path, ignored=True).wait(60) == 0
    assert (tmp_path / "done").read_text() == "continued"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_closed_pipe_is_a_stop_request_in_a_deferred_block(tmp_path, stream):
    other = "stderr" if stream == "stdout" else "stdout"
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(ignored=False, count=1000)],
        cwd=tmp_path,
        env=environment(ROOT),
        **{stream: subprocess.PIPE, other: (tmp_path / other).open("w")},
    )
    pipe = getattr(process, stream)
    pipe.read(6)
    pipe.close()
    assert process.wait(60) == 141
    assert (tmp_path / "done").read_text().startswith("stopped by a closed pipe; ")
    assert "Traceback" not in (tmp_path / other).read_text()


def test_closed_pipe_ends_a_command_without_a_traceback(tmp_path):
    script = """
from folio.errors import one_line_errors
with one_line_errors():
    for _ in range(100_000):
        print("a line")
"""
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -c '{script}' | head -1; echo ${{PIPESTATUS[0]}}"],
        env=environment(ROOT),
        capture_output=True,
        text=True,
    )
    assert done.stdout == "a line\n141\n"
    assert done.stderr == (
        "folio: stopped by a closed pipe; run the same command again to continue\n"
    )


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_stream_that_is_closed_from_the_start_discards_the_output(tmp_path, closed):
    script = """
import sys
from pathlib import Path
from folio.errors import UserError, one_line_errors
with one_line_errors():
    Path("new").open("w").write("the content")
    print("a line", flush=True)
    print("a line", sys.stdout.isatty(), file=sys.stderr, flush=True)
    Path("done").write_text(Path("new").read_text())
    raise UserError("no")
"""
    command = f"exec {sys.executable} -c '{script}' {closed}"
    done = subprocess.run(
        ["sh", "-c", command], cwd=tmp_path, env=environment(ROOT), capture_output=True, text=True
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert (tmp_path / "done").read_text() == "the content"
    assert done.stdout == ("" if " >&-" in f" {closed}" else "a line\n")
