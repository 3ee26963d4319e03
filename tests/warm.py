"""Commands of tests that start within milliseconds: forks of a server that has imported PyTorch,
MLflow and DVC, but nothing of Folio.

Of the three seconds of CPU time that `python -m stages.train` takes in a tiny project, nearly all
are for these imports, and a test may run ten such commands. `start` writes two programs, `python`
and `dvc`; first on the PATH, they pass what the server should run, and are otherwise the real ones.
Each command is a process of its own, with its own folder, environment, streams and exit status, and
imports Folio's sources from its folder. Tests of the start of a command, or of what happens when it
is killed, use the real programs.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import traceback
from pathlib import Path

import psutil
import sqlalchemy.orm

PRELOADED = (
    *("dvc.cli.parser", "dvc.commands.repro", "dvc.repo.experiments", "networkx", "ruamel.yaml"),
    *("torch", "safetensors.torch", "tiktoken", "transformers", "typer", "git", "IPython"),
    *("mlflow", "mlflow.pyfunc", "mlflow.store.tracking.sqlalchemy_store"),
    *("sqlalchemy.dialects.sqlite", "alembic.command", "pandas", "pyarrow.parquet"),
    *("matplotlib.figure", "matplotlib.backends.backend_agg"),
)

# What Python and PyTorch read from the environment when they start.
AT_START = ("PYTHON", "OMP_", "MKL_", "LANG", "LC_", "LD_")

# What both programs run, with their name as the first argument. It waits for its fork, and ends
# with the same status.
CLIENT = """\
import json, os, signal, socket, sys
_, name, *words = sys.argv
command = ["-m", "dvc", *words] if name == "dvc" else words
paths = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
settings = {{n: v for n, v in os.environ.items() if n.startswith({at_start!r})}}
settings.pop("PYTHONPATH", None)
if (
    command[:1] != ["-m"]
    or command[1].partition(".")[0] not in ("dvc", "folio", "stages")
    or settings != {settings!r}
    or any(os.path.exists(os.path.join(path, "sitecustomize.py")) for path in paths)
):
    path = os.path.join({scripts!r}, name)
    os.execv(path, [path, *words])
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    socket.send_fds(server, [b"."], [0, 1, 2])
    request = [command, dict(os.environ), os.getcwd(), os.getpgrp()]
    server.sendall(json.dumps(request).encode())
    server.shutdown(socket.SHUT_WR)
    pid = int(server.recv(10))
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, _: os.kill(pid, number))
    status = int(server.recv(10) or 1)
if status < 0:
    if -status != signal.SIGKILL:
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
"""


def start(folder: Path, owner: int, environment: dict[str, str]) -> None:
    """Start the server, and write the two programs to folder/bin. The server ends when the process
    `owner` has."""
    address, client, programs = folder / "socket", folder / "client.py", folder / "bin"
    settings = {n: v for n, v in environment.items() if n.startswith(AT_START)}
    settings.pop("PYTHONPATH", None)
    scripts = sysconfig.get_path("scripts")
    client.write_text(
        CLIENT.format(at_start=AT_START, settings=settings, scripts=scripts, address=str(address))
    )
    programs.mkdir()
    for name in ("python", "dvc"):
        command = shlex.join([sys.executable, "-IS", str(client), name])
        (programs / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        (programs / name).chmod(0o755)
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, __file__, str(address), str(owner)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    assert server.wait() == 0, (folder / "log").read_text()


def serve(address: str, owner: int) -> None:
    """Fork a process for each request until the process `owner` ends."""
    for name in PRELOADED:
        importlib.import_module(name)
    sqlalchemy.orm.configure_mappers()  # MLflow's, before the first query
    assert threading.active_count() == 1  # a fork has only one thread
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{address}.new")
        listener.listen(100)
        Path(f"{address}.new").rename(address)
        if os.fork():  # so that the server is no child of the worker whose test has started it
            os._exit(0)
        while psutil.pid_exists(owner):
            if select.select([listener], [], [], 1)[0]:
                connection, _ = listener.accept()
                if os.fork() == 0:
                    listener.close()
                    return answer(connection)
                connection.close()


def answer(connection: socket.socket) -> None:
    """Run what a client requests in a fork, and send its exit status."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, files, *_ = socket.recv_fds(connection, 1, 3)
    request = json.loads(b"".join(iter(lambda: connection.recv(1 << 16), b"")))
    if pid := os.fork():
        for file in files:
            os.close(file)
        connection.sendall(b"%10d" % pid)
        _, status = os.waitpid(pid, 0)
        connection.sendall(b"%10d" % os.waitstatus_to_exitcode(status))
        os._exit(0)
    connection.close()
    run(files, *request)


def run(files: list[int], words: list[str], variables: dict, folder: str, group: int) -> None:
    """Become the process that `python *words` starts in a folder."""
    for target, file in enumerate(files):
        os.dup2(file, target)
        os.close(file)
    with contextlib.suppress(PermissionError):  # of another session
        os.setpgid(0, group)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    paths = filter(None, variables.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:] = [folder, *paths, *LIBRARIES]
    sys.orig_argv[:] = [sys.executable, *words]
    if words[1] == "folio":  # which runs `python -m dvc`
        sys.executable = shutil.which("python") or sys.executable
    sys.argv[:] = ["-m", *words[2:]]
    status: int | str | None = None
    try:
        runpy._run_module_as_main(words[1])
    except SystemExit as ended:
        status = ended.code
    except Exception:
        traceback.print_exc()
        status = 1
    # Python's own exit would write to all the memory that this process shares with the server.
    threading._shutdown()
    atexit._run_exitfuncs()
    if isinstance(status, str):
        print(status, file=sys.stderr)
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


if __name__ == "__main__":
    given = [*filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    LIBRARIES = [path for path in sys.path[1:] if path not in given]
    serve(sys.argv[1], int(sys.argv[2]))
