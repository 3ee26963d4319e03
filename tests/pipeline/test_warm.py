"""A command that tests/warm.py starts is like one that Python starts."""

import signal
import subprocess
from pathlib import Path

import pytest
from conftest import environment, warm_environment

PROBE = """
import os, signal, sys
print(__name__, __file__, sys.argv, sys.orig_argv[1:], sys.path[0], os.getcwd(), os.environ["X"])
print(sys.stdin.read(), "torch" in sys.modules, flush=True)
if sys.argv[1:] == ["kill"]:
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1:] == ["wait"]:
    print("waiting", flush=True)
    signal.pause()
sys.exit(sys.argv[1])
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages/__init__.py").touch()
    (tmp_path / "stages/probe.py").write_text(PROBE)
    return tmp_path


@pytest.mark.parametrize("word", ["0", "a message", "kill"])
def test_warm_command_has_the_arguments_streams_and_status_of_a_real_one(folder, word):
    command, results = ["python", "-m", "stages.probe", word], []
    for variables in (environment(X="\u00fc"), warm_environment(X="\u00fc")):
        done = subprocess.run(
            command, cwd=folder, env=variables, input="in\n", capture_output=True, text=True
        )
        results.append((done.returncode, done.stdout, done.stderr))
    assert "in\n False" in results[0][1] and "in\n True" in results[1][1]
    assert results[1] == (results[0][0], results[0][1].replace("False", "True"), results[0][2])


def test_warm_command_receives_the_signals_of_a_stop_request(folder):
    variables, command = warm_environment(X=""), ["python", "-m", "stages.probe", "wait"]
    with subprocess.Popen(
        command, cwd=folder, env=variables, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    ) as process:
        assert any(line == b"waiting\n" for line in process.stdout)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == -signal.SIGTERM


def test_warm_command_is_a_real_one_if_python_would_start_in_another_way(folder):
    site = folder / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text("print('site')")
    for more in ({"PYTHONPATH": str(site)}, {"PYTHONIOENCODING": "ascii:replace"}):
        done = subprocess.run(
            ["python", "-m", "stages.probe", "0"],
            cwd=folder,
            env=warm_environment(X="\u00fc", **more),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert " False" in done.stdout, done.stderr
        assert ("site\n" in done.stdout) == ("PYTHONPATH" in more)
