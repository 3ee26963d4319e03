"""`python -m folio ui`: MLflow's pages, once they can be opened."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterable
from typing import Annotated

import typer

from folio import loopback, signals
from folio.cli.store import open_store
from folio.errors import UserError

# By default, MLflow also answers to names such as 10.example.com, as if they were addresses.
ALLOWED = ("localhost", "localhost:*", "127.0.0.1", "127.0.0.1:*", "[[]::1]:*", "folio.localhost:*")
# On pages of 127.0.0.1 and localhost, MLflow opens the panel of an assistant at the first visit.
# Browsers resolve all names that end with .localhost to this machine.
_NAME = "folio.localhost"
# No messages about its start, and no processes for jobs, of which this project has none.
_SETTINGS = {"MLFLOW_LOGGING_LEVEL": "WARNING", "PYTHONWARNINGS": "ignore"}
_SETTINGS |= {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
_HOSTS, _ORIGINS = "MLFLOW_SERVER_ALLOWED_HOSTS", "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"


def ui(
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen on.")] = 5000,
) -> None:
    """Start MLflow and print the address of the runs.

    It listens on 127.0.0.1. If the runs are on a server, only prints their address.

    Example: python -m folio ui
    """
    store = open_store()
    remote = store.uri.startswith(("http://", "https://"))
    server_page = re.sub("://[^/@]*@", "://", store.uri).rstrip("/")  # without a login
    base = server_page if remote else f"http://{_NAME}:{port}"
    page = (
        f"{base}/#/experiments/{store.experiment_id}/runs"
        "?workflowType=machine_learning&viewStateShareKey=folio&compareRunsMode=CHART"
    )
    if remote:
        print(page)
        return
    loopback.check_port(port)
    names = [each for name in loopback.parse_hosts([]) for each in (name, f"{name}:*")]
    defaults = _SETTINGS | {_HOSTS: ",".join([*ALLOWED, *names]), _ORIGINS: base}
    command = [sys.executable, "-m", "mlflow", "ui", "--host", loopback.HOST, "--port", str(port)]
    command += ["--workers", "1", "--uvicorn-opts", "--log-level warning"]
    # In the environment, because everyone can see the arguments of a process.
    stores = dict.fromkeys(("MLFLOW_BACKEND_STORE_URI", "MLFLOW_REGISTRY_STORE_URI"), store.uri)
    server = subprocess.Popen(
        command,
        env=defaults | os.environ | stores,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    threading.Thread(target=_relay, args=[server.stderr], daemon=True).start()
    try:
        _wait_until_ready(server, f"http://{loopback.HOST}:{port}/health")
        print(f"{page}\nCtrl-C stops MLflow.", flush=True)
        raise UserError(f"MLflow exited with status {server.wait()}")
    except signals.Stopped:
        raise signals.Stopped("the same command starts MLflow again") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)  # MLflow's server has processes of its own


def _relay(lines: Iterable[str]) -> None:
    """Print what the server prints, except for its line on the allowed hosts."""
    for line in lines:
        if not line.startswith("[MLflow] Security"):
            print(line, end="", file=sys.stderr, flush=True)


def _wait_until_ready(server: subprocess.Popen, url: str) -> None:
    """Wait until the server answers. Raises UserError if it exits before that."""
    from rich.console import Console

    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with Console(stderr=True).status("Starting MLflow"):
        while server.poll() is None:
            with contextlib.suppress(OSError):
                direct.open(url, timeout=5).close()
                return
            time.sleep(0.2)
    raise UserError(f"MLflow exited with status {server.returncode} before it answered")
