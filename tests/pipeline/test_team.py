"""The team's server of docs/team.md: PostgreSQL, an S3 store, MLflow and two clones."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import conftest
import mlflow
import pytest
import requests
import yaml
from conftest import ROOT, environment

from folio.errors import UserError
from folio.tracking import registry, sync
from folio.tracking.store import Store

COMPOSE = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())
COMMAND = COMPOSE["services"]["mlflow"]["command"]
MEMBERS = {"ada": "ada's password", "grace": "grace's password"}


def program(name: str) -> str | None:
    """The path of a PostgreSQL program, from Debian's newest version or from the PATH."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return shutil.which(name, path=os.pathsep.join([*map(str, folders), os.environ["PATH"]]))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_until(condition: Callable[[], bool], process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(0.05)


def listens(port: int) -> bool:
    with socket.socket() as attempt:
        return attempt.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def started(
    command: list[str], log: Path, end: int = signal.SIGKILL, **options: object
) -> Iterator[subprocess.Popen]:
    """Run a process. At the end, it and its child processes receive the signal `end`."""
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, **options
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, end)
        process.wait()


@contextlib.contextmanager
def postgresql(log: Path) -> Iterator[dict[str, str]]:
    """Run PostgreSQL. Yields the environment variables to log in as the role mlflow."""
    # PostgreSQL refuses to run as root, and other users cannot read pytest's folders.
    user = {"user": "postgres", "group": "postgres", "extra_groups": []} if not os.getuid() else {}
    folder, port = Path(tempfile.mkdtemp(prefix="folio-")), free_port()
    if user:
        shutil.chown(folder, "postgres", "postgres")
    options = ["--auth-local=trust", "--auth-host=scram-sha-256", "--username=postgres"]
    initdb = [program("initdb"), "--no-sync", *options, str(folder / "data")]
    subprocess.run(initdb, check=True, capture_output=True, cwd=folder, **user)
    postgres = [program("postgres"), "-F", "-D", str(folder / "data"), "-k", str(folder)]
    postgres += ["-c", "listen_addresses=127.0.0.1", "-p", str(port), "-c", "lc_messages=C"]
    with started(postgres, log, signal.SIGQUIT, cwd=folder, **user) as process:
        wait_until(lambda: "ready to accept connections" in log.read_text(), process, log)
        for line in (
            "CREATE ROLE mlflow LOGIN PASSWORD 'a secret'",
            "CREATE DATABASE mlflow OWNER mlflow",
        ):
            sql = [program("psql"), "--quiet", "--username=postgres", "--command", line]
            host = {"PGHOST": str(folder), "PGPORT": str(port)}
            subprocess.run(sql, check=True, env=os.environ | host)
        role = {"PGUSER": "mlflow", "PGPASSWORD": "a secret"}
        yield {"PGHOST": "127.0.0.1", "PGPORT": str(port), **role}
    shutil.rmtree(folder)


@dataclass
class Server:
    mlflow: str  # its URL
    s3: str  # its URL
    process: subprocess.Popen
    log: Path

    def ready(self) -> None:
        """Wait until MLflow answers, then create the members' logins as the admin."""
        port = int(self.mlflow.rpartition(":")[2])
        wait_until(lambda: listens(port), self.process, self.log)
        for name, password in MEMBERS.items():
            response = requests.post(
                f"{self.mlflow}/api/2.0/mlflow/users/create",
                auth=("admin", "admin's password"),
                json={"username": name, "password": password},
            )
            assert response.ok, response.text


def login(member: str) -> dict[str, str]:
    """The environment variables with a member's login for MLflow and identity for git."""
    return {
        "MLFLOW_TRACKING_USERNAME": member,
        "MLFLOW_TRACKING_PASSWORD": MEMBERS[member],
        **{f"GIT_{role}_NAME": member for role in ("AUTHOR", "COMMITTER")},
        **{f"GIT_{role}_EMAIL": f"{member}@example.org" for role in ("AUTHOR", "COMMITTER")},
    }


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    """MLflow, started by the command in the compose file, with PostgreSQL and an S3 store.

    Does not wait for MLflow: ready() does.
    """
    if not program("initdb"):
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    import boto3

    logs = tmp_path_factory.mktemp("logs")
    s3_port, port = free_port(), free_port()
    s3 = f"http://127.0.0.1:{s3_port}"
    moto = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(s3_port)]
    with (
        started(moto, logs / "s3.log", env=environment()) as process,
        postgresql(logs / "postgresql.log") as database,
    ):
        wait_until(lambda: listens(s3_port), process, logs / "s3.log")
        keys = {"aws_access_key_id": "mlflow", "aws_secret_access_key": "a key"}
        client = boto3.client("s3", endpoint_url=s3, region_name="us-east-1", **keys)
        for bucket in ("mlflow", "dvc"):
            client.create_bucket(Bucket=bucket)
        command = [*COMMAND, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
        settings = {
            **database,
            "MLFLOW_S3_ENDPOINT_URL": s3,
            "AWS_ACCESS_KEY_ID": "mlflow",
            "AWS_SECRET_ACCESS_KEY": "a key",
            "MLFLOW_AUTH_CONFIG_PATH": str(ROOT / "deploy/auth.ini"),
            "MLFLOW_AUTH_ADMIN_PASSWORD": "admin's password",
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "a key",
            "MLFLOW_SERVER_ALLOWED_HOSTS": "",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }
        assert settings.keys() - {"PGPORT"} <= COMPOSE["services"]["mlflow"]["environment"].keys()
        log = logs / "mlflow.log"
        with started(command, log, env=environment(**settings), cwd=logs) as process:
            yield Server(f"http://127.0.0.1:{port}", s3, process, log)


def succeed(folder: Path, member: str, *command: str) -> str:
    return conftest.succeed(folder, *command, **login(member))


@pytest.fixture(scope="module")
def clones(server, make_project, tmp_path_factory) -> dict[str, Path]:
    """The clones of two members: Ada trained and pushed; Grace pulled, trained and pushed."""
    settings = {"runtime.tracking_uri": server.mlflow}
    ada = make_project(settings, store=False)
    shared, grace = ada.with_name("shared.git"), tmp_path_factory.mktemp("clones") / "grace"
    for command in (
        ["git", "init", "-q"],
        ["dvc", "remote", "add", "--default", "team", "s3://dvc"],
        ["dvc", "remote", "modify", "team", "endpointurl", server.s3],
    ):
        succeed(ada, "ada", *command)
    for key in ("access_key_id", "secret_access_key"):
        succeed(ada, "ada", "dvc", "remote", "modify", "--local", "team", key, "team")
    succeed(ada, "ada", "dvc", "repro", "prepare")
    server.ready()
    for command in (
        ["dvc", "repro"],
        ["git", "add", "-A"],
        ["git", "commit", "-qm", "the first model"],
        ["dvc", "push"],
        ["git", "clone", "-q", "--bare", ".", str(shared)],
        ["git", "remote", "add", "origin", str(shared)],
    ):
        succeed(ada, "ada", *command)

    succeed(grace.parent, "grace", "git", "clone", "-q", str(shared), str(grace))
    shutil.copy(ada / ".dvc/config.local", grace / ".dvc")
    for command in (
        ["dvc", "pull"],
        ["dvc", "exp", "run", "--name", "faster", "-S", "train.learning_rate=0.02", "train"],
        ["dvc", "exp", "push", "origin", "faster"],
    ):
        succeed(grace, "grace", *command)
    return {"ada": ada, "grace": grace}


def weights(folder: Path) -> bytes:
    return (folder / "models/gpt2/model.safetensors").read_bytes()


def as_member(member: str, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """Set a member's login for this process, and remove all keys to S3 stores."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "MLFLOW_S3_"))]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name, value in {**login(member), "HOME": str(home)}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("member", MEMBERS)
def test_members_see_the_runs_of_all_members(clones, server, member, monkeypatch, tmp_path):
    as_member(member, monkeypatch, tmp_path)
    client = mlflow.MlflowClient(server.mlflow)
    runs = client.search_runs([client.get_experiment_by_name("folio").experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED"] * 3
    trainings = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert {run.data.params["train.learning_rate"] for run in trainings} == {"0.004", "0.02"}


@pytest.mark.parametrize("member", MEMBERS)
def test_members_fetch_models_through_the_server_without_a_key_to_its_store(
    clones, server, member, monkeypatch, tmp_path
):
    as_member(member, monkeypatch, tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(clones[member]))
    store = Store.existing(server.mlflow)
    query = "params.`train.learning_rate` = '0.02'"
    [run] = store.client.search_runs([store.experiment_id], query)
    assert run.info.artifact_uri.startswith("mlflow-artifacts:/")
    model = registry.fetch(store, run.info.run_id, tmp_path)
    assert (model / "model.safetensors").read_bytes() == weights(clones["grace"])


def test_members_pull_the_experiments_that_others_pushed(clones):
    before = weights(clones["ada"])
    succeed(clones["ada"], "ada", "dvc", "exp", "pull", "origin", "faster")
    succeed(clones["ada"], "ada", "dvc", "exp", "apply", "faster")
    assert weights(clones["ada"]) == weights(clones["grace"]) != before


@pytest.mark.parametrize("member", MEMBERS)
def test_sync_has_nothing_to_send_to_the_server(clones, server, member, monkeypatch, tmp_path):
    as_member(member, monkeypatch, tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(clones[member]))
    assert sync.run(server.mlflow, clones[member]) == []


def test_git_has_the_url_of_the_store_and_no_key(clones):
    for folder in clones.values():
        config = (folder / ".dvc/config").read_text()
        assert "s3://dvc" in config and "key" not in config
        committed = succeed(folder, "ada", "git", "ls-files", ".dvc").split()
        assert sorted(committed) == [".dvc/.gitignore", ".dvc/config"]


def test_server_rejects_a_wrong_login_and_folio_reports_it_in_one_line(
    clones, server, monkeypatch, tmp_path
):
    search = f"{server.mlflow}/api/2.0/mlflow/experiments/search?max_results=9"
    assert requests.get(search).status_code == 401
    as_member("ada", monkeypatch, tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "a guess")
    monkeypatch.setenv("DVC_ROOT", str(clones["ada"]))
    with pytest.raises(UserError, match=r"^MLflow failed: .*401.*; sync again later$"):
        sync.run(server.mlflow, clones["ada"])


def test_server_rejects_other_host_names_and_other_origins(clones, server):
    search = f"{server.mlflow}/api/2.0/mlflow/runs/search"
    for headers in ({"Host": "example.org"}, {"Origin": "http://example.org"}):
        response = requests.post(search, json={}, headers=headers, auth=("ada", MEMBERS["ada"]))
        assert response.status_code == 403, response.text


# --- the files in deploy/


def test_docs_start_the_server_with_the_command_of_the_compose_file():
    text = (ROOT / "docs/team.md").read_text().replace("\\\n", " ")
    [command] = re.findall(r"^mlflow server .+", text, re.MULTILINE)
    assert options(shlex.split(command)) == options(COMMAND)


def options(command: list[str]) -> dict[str, str]:
    """The options of a command, without the address to listen on."""
    words = command[2:]
    found = dict(zip(words[::2], words[1::2], strict=True))
    return {name: value for name, value in found.items() if name != "--host"}


def test_compose_file_requires_every_secret_and_has_no_default_secret():
    used = dict(re.findall(r"\$\{(\w+)(:[?-][^}]*)\}", (ROOT / "deploy/compose.yaml").read_text()))
    example = dict(
        re.findall(r"^(?:# )?(\w+)=(.*)", (ROOT / "deploy/.env.example").read_text(), re.MULTILINE)
    )
    assert used.keys() == example.keys()
    secrets = {name for name, rule in used.items() if rule.startswith(":?")}
    assert secrets == {name for name, value in example.items() if not value}
    assert secrets == example.keys() - {"LISTEN", "ALLOWED_HOSTS", "ALLOWED_ORIGINS"}


def test_each_key_of_the_s3_store_gives_access_to_one_bucket():
    store = COMPOSE["services"]["s3"]["command"]
    assert "-bucket=mlflow,dvc" in store
    keys = json.loads(COMPOSE["configs"]["s3"]["content"])["identities"]
    opened = {key["name"]: {action.partition(":")[2] for action in key["actions"]} for key in keys}
    assert opened == {"mlflow": {"mlflow"}, "team": {"dvc"}}
    assert COMMAND[COMMAND.index("--artifacts-destination") + 1] == "s3://mlflow"


def test_ports_are_published_on_localhost_by_default():
    published = {name: each.get("ports", []) for name, each in COMPOSE["services"].items()}
    assert published.pop("postgres") == []
    assert published == {
        "s3": ["${LISTEN:-127.0.0.1}:8333:8333"],
        "mlflow": ["${LISTEN:-127.0.0.1}:5000:5000"],
    }
