"""deploy/slurm/train.sbatch on a real SLURM cluster: two nodes, both on this machine."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import psutil
import pytest
from conftest import ROOT, commit, environment, folio, run, run_stages, succeed

from folio.sweeps.trial import CLONES

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")
SBIN = "/usr/sbin:/sbin"
if not all(shutil.which(name, path=f"{os.environ['PATH']}:{SBIN}") for name in DAEMONS):
    pytest.skip("SLURM needs Debian's packages slurm-wlm and munge", allow_module_level=True)
if os.getuid():
    pytest.skip("SLURM's daemons run as root", allow_module_level=True)

# cred_expire: a requeued job waits for that many seconds. linuxproc, task/none: without cgroups.
# The nodes' GPUs are files, of which SLURM keeps count.
CONFIG = """\
ClusterName=folio
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=1,sched_interval=2
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
KillWait=30
ReturnToService=2
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=32 Gres=gpu:4 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=32 Gres=gpu:4 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Cluster:
    """SLURM's commands, with the configuration of the test's own cluster."""

    def __init__(self, folder: Path):
        self.conf = {"SLURM_CONF": str(folder / "slurm.conf")}

    def run(self, folder: Path, *command: str, **more: str) -> str:
        variables = environment(**self.conf, **more)
        done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, project: Path, *options: str, sweep: str = "", **more: str) -> str:
        """Submit train.sbatch; returns the job's id."""
        script = ["deploy/slurm/train.sbatch", *filter(None, [sweep])]
        return self.run(project, "sbatch", "--parsable", *options, *script, **more).strip()

    def job(self, project: Path, job: str) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        text = self.run(project, "scontrol", "show", "job", "--oneliner", job)
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def reach_time_limit(self, project: Path, job: str) -> None:
        """Let a job's time limit be near, and wait until SLURM has requeued the job. SLURM checks
        limits, which are whole minutes, every 30 seconds."""
        self.set_time_limit(project, job, 2 + int(self.run_time(project, job) / 60))
        end = time.monotonic() + 120
        while self.job(project, job)["Restarts"] == "0":
            assert time.monotonic() < end, log(project, job)
            time.sleep(0.2)
        self.set_time_limit(project, job, 60)

    def set_time_limit(self, project: Path, job: str, minutes: int) -> None:
        self.run(project, "scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")

    def run_time(self, project: Path, job: str) -> int:
        hours, minutes, seconds = map(int, self.job(project, job)["RunTime"].split(":"))
        return (60 * hours + minutes) * 60 + seconds

    def wait(self, project: Path, job: str, state: str) -> dict[str, str]:
        """Wait until the job has ended in this state; returns its fields."""
        end = time.monotonic() + 300
        while True:
            fields = self.job(project, job)
            if fields["JobState"] in ("PENDING", "RUNNING", "COMPLETING"):
                assert time.monotonic() < end, log(project, job)
                time.sleep(0.5)
                continue
            assert fields["JobState"] == state, log(project, job)
            return fields


def log(project: Path, job: str) -> str:
    file = project / f"slurm-{job}.out"
    return file.read_text() if file.exists() else "no log"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short enough for the path of a socket
    folder.chmod(0o755)
    for name in ("state", "n1", "n2"):
        (folder / name).mkdir()
    (folder / "key").write_bytes(os.urandom(128))
    (folder / "key").chmod(0o600)
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(3)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        ports = [each.getsockname()[1] for each in sockets]
    text = CONFIG.format(host=socket.gethostname(), folder=folder, ports=ports)
    (folder / "slurm.conf").write_text(text)
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-3]\n")
    for number in range(4):
        (folder / f"gpu{number}").touch()
    munge = ["--key-file=key", "--seed-file=seed", "--pid-file=munged.pid", "--force"]
    munge = [word.replace("=", f"={folder}/") for word in munge]
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        for command in (
            ["munged", "--foreground", f"--socket={folder}/munge.socket", *munge],
            ["slurmctld", "-D", "-c"],
            ["slurmd", "-D", "-N", "n1"],
            ["slurmd", "-D", "-N", "n2"],
        ):
            stack.enter_context(daemon(folder, *command))
        cluster = Cluster(folder)
        end = time.monotonic() + 15
        while True:
            states = run(folder, "sinfo", "-h", "-N", "-o", "%T", **cluster.conf)
            if states.stdout.split() == ["idle", "idle"]:
                break
            logs = "".join(file.read_text() for file in folder.glob("*.log"))
            assert time.monotonic() < end, f"{states}\n{logs}"
            time.sleep(0.2)
        yield cluster
        cluster.run(folder, "scancel", "--user=root")  # if a test has failed
        while cluster.run(folder, "squeue", "--noheader"):
            time.sleep(0.2)


@contextlib.contextmanager
def daemon(folder: Path, *command: str) -> Iterator[None]:
    variables = environment(SLURM_CONF=str(folder / "slurm.conf"))
    with (folder / f"{'-'.join(command[:1] + command[3:])[:20]}.log".replace("/", "-")).open(
        "w"
    ) as output:
        process = subprocess.Popen(
            command,
            env=variables | {"PATH": f"{variables['PATH']}:{SBIN}"},
            stdout=output,
            stderr=output,
        )
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


SETTINGS = {
    "train.steps": 40,
    "train.eval_interval": 10,
    "train.patience": None,
    "runtime.log_interval": 5,
    "model.dropout": 0.0,
    "runtime.processes": 2,
}

# Training waits after the step PAUSE until it is stopped, unless the job has been requeued. In an
# array, only trial 2 does.
PAUSE = """
import os, sys
task, starts = (os.environ.get(f"SLURM_{name}") for name in ("ARRAY_TASK_ID", "RESTART_COUNT"))
if task in (None, "2") and not starts and sys.orig_argv[-2:] == ["-m", "stages.train"]:
    import time
    from importlib.machinery import PathFinder
    class Finder(PathFinder):
        @classmethod
        def find_spec(cls, name, path=None, target=None):
            spec = super().find_spec(name, path, target)
            if name == "folio.training.trainer" and spec:
                sound = spec.loader.exec_module
                def exec_module(module):
                    sound(module)
                    step = module.Trainer.step
                    def pausing(self, *arguments):
                        from folio import signals
                        step(self, *arguments)
                        if self.steps_done == int(os.environ["PAUSE"]):
                            if os.environ.get("RANK", "0") == "0":
                                open("paused", "w").close()
                            while signals.seconds_left() is None:
                                time.sleep(0.05)
                    module.Trainer.step = pausing
                spec.loader.exec_module = exec_module
            return spec
    sys.meta_path.insert(0, Finder)
"""


def add_script(folder: Path) -> Path:
    """Add deploy/slurm to a project and commit it; link to .venv, which stays out of git."""
    shutil.copytree(ROOT / "deploy/slurm", folder / "deploy/slurm")
    commit(folder)
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


@pytest.fixture(scope="module")
def make(make_project) -> Callable[..., Path]:
    """make(settings) returns a committed project with deploy/slurm, in which no stage has run."""
    return lambda settings=None: add_script(make_project(SETTINGS | (settings or {})))


@pytest.fixture(scope="module")
def uninterrupted(make_project) -> Path:
    folder = make_project(SETTINGS)
    run_stages(folder, "prepare", "train")
    return folder


def until_paused(cluster: Cluster, project: Path, job: str, clone: str = "") -> None:
    end = time.monotonic() + 120
    while not (project / clone / "paused").exists():
        assert cluster.job(project, job)["JobState"] in ("PENDING", "RUNNING"), log(project, job)
        assert time.monotonic() < end, log(project, job)
        time.sleep(0.2)
    (project / clone / "paused").unlink()


def trainers(job: str) -> list[psutil.Process]:
    """The processes that torchrun has started to train in this job, by rank."""
    ranks = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            variables = process.environ()
            if variables.get("SLURM_JOB_ID") == job and "RANK" in variables:
                ranks[int(variables["RANK"])] = process
    return [ranks[rank] for rank in sorted(ranks)]


def weights(project: Path) -> bytes:
    return (project / "models/gpt2/model.safetensors").read_bytes()


def losses(project: Path) -> list[tuple]:
    rows = [json.loads(row) for row in (project / "models/training/history.jsonl").open()]
    return [(row["step"], row["train_loss"], row.get("val_loss")) for row in rows]


def assert_same_curve(project: Path, other: Path) -> None:
    """The losses differ by rounding alone."""
    for one, two in zip(losses(project), losses(other), strict=True):
        assert one == pytest.approx(two, abs=1e-4)


def only_run(project: Path) -> mlflow.entities.Run:
    """The training run in the project's store, which has only one."""
    client = mlflow.MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    found = client.search_runs([client.get_experiment_by_name("folio").experiment_id])
    [kept] = [each for each in found if "mlflow.parentRunId" not in each.data.tags]
    return kept


def test_job_is_saved_by_scancel_and_requeued_at_its_time_limit(
    cluster, make, uninterrupted, tmp_path
):
    project = make()
    (tmp_path / "sitecustomize.py").write_text(PAUSE)
    paused = environment(tmp_path)["PYTHONPATH"]

    job = cluster.submit(project, PYTHONPATH=paused, PAUSE="15")
    until_paused(cluster, project, job)
    cluster.run(project, "scancel", job)
    assert cluster.wait(project, job, "CANCELLED")["Restarts"] == "0"
    [first] = re.findall(r"stopped by SIGTERM; step (\d+) is saved", log(project, job))
    assert only_run(project).info.status == "KILLED"
    (project / ".dvc/tmp/rwlock").write_text("")  # as if dvc had been killed while it wrote it

    job = cluster.submit(project, PYTHONPATH=paused, PAUSE="25")
    until_paused(cluster, project, job)
    cluster.reach_time_limit(project, job)
    assert cluster.wait(project, job, "COMPLETED")["Restarts"] == "1"
    output = log(project, job)
    assert f"resuming from the checkpoint of step {first}" in output
    [second] = re.findall(r"step (\d+) is saved.*the job is requeued", output, re.DOTALL)
    assert f"resuming from the checkpoint of step {second}" in output
    assert "Traceback" not in output
    assert weights(project) == weights(uninterrupted)
    assert losses(project) == losses(uninterrupted)
    kept = only_run(project)
    assert kept.info.status == "FINISHED" and "stopped" not in kept.data.tags
    assert "evaluate/val_loss" in kept.data.metrics
    assert run(project, "dvc", "status", "--quiet").returncode == 0


@contextlib.contextmanager
def mlflow_server(folder: Path, store: Path) -> Iterator[str]:
    """The address of a server with a copy of a store."""
    shutil.copy(store, folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["mlflow", "server", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command += ["--artifacts-destination", str(folder / "store")]
    with (folder / "server.log").open("w") as output:
        server = subprocess.Popen(
            command, env=environment(), stdout=output, stderr=output, start_new_session=True
        )
    try:
        end = time.monotonic() + 90
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert server.poll() is None and time.monotonic() < end
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def test_array_trains_each_trial_of_a_sweep_in_a_clone(
    cluster, make_trained, tmp_path, server_store
):
    project = add_script(make_trained())
    (tmp_path / "sitecustomize.py").write_text(PAUSE)
    paused = environment(tmp_path)["PYTHONPATH"]
    output = folio(project, "sweep", "train.seed=1,2,3", "--plan", "--name", "seeds")
    assert "sbatch --array=1-3 deploy/slurm/train.sbatch seeds" in output
    with mlflow_server(tmp_path, server_store) as uri:
        variables = {"MLFLOW_TRACKING_URI": uri, "PAUSE": "3", "PYTHONPATH": paused}
        job = cluster.submit(project, "--array=1-3", sweep="seeds", **variables)
        until_paused(cluster, project, f"{job}_2", clone=str(CLONES / "tmp-seeds-02"))
        cluster.run(project, "scancel", "--signal=USR1", "--batch", f"{job}_2")
        end = time.monotonic() + 300
        while cluster.run(project, "squeue", "--noheader", "--jobs", job):
            assert time.monotonic() < end
            time.sleep(1)
        logs = [log(project, f"{job}_{number}") for number in (1, 2, 3)]
        client = mlflow.MlflowClient(uri)
        found = client.search_runs([client.get_experiment_by_name("folio").experiment_id])
        trained = [each for each in found if "mlflow.parentRunId" not in each.data.tags]
        by_name = {each.data.tags["dvc_experiment"]: each for each in trained}
        assert sorted(by_name) == ["seeds-01", "seeds-02", "seeds-03"], logs
        assert len(trained) == 3 and {each.info.status for each in trained} == {"FINISHED"}
        assert all("evaluate/val_loss" in each.data.metrics for each in trained)
        assert "the job is requeued" in logs[1] and "the checkpoint of step 3" in logs[1]
        assert not any("stopped" in each.data.tags for each in trained)
        assert [by_name[name].data.params["train.seed"] for name in sorted(by_name)] == [*"123"]

        assert run(project, "git", "diff", "HEAD").stdout == ""
        assert not list((project / CLONES).glob("*"))
        assert "already finished" in folio(project, "trial", "seeds", "2")
    assert "Finished trials: 3 of 3" in folio(
        project, "sweep", "--report", "seeds"
    )  # in a local store
    succeed(project, "dvc", "exp", "apply", "seeds-02")
    digest = by_name["seeds-02"].data.tags["weights_sha256"]
    assert hashlib.sha256(weights(project)).hexdigest() == digest


def test_two_nodes_train_one_model_and_dvc_records_it(cluster, make, uninterrupted, tmp_path):
    project = make()
    (tmp_path / "sitecustomize.py").write_text(PAUSE)
    paused = {"PYTHONPATH": environment(tmp_path)["PYTHONPATH"], "PAUSE": "15"}
    job = cluster.submit(project, "--nodes=2", **paused)
    until_paused(cluster, project, job)
    trainers(job)[1].kill()  # torchrun starts both again
    until_paused(cluster, project, job)
    cluster.run(project, "scancel", "--signal=USR1", "--batch", job)  # as at the time limit
    assert cluster.wait(project, job, "COMPLETED")["Restarts"] == "1"
    output = log(project, job)
    [saved] = set(re.findall(r"step (\d+) is saved", output))
    assert "on 2 x cpu" in output and f"resuming from the checkpoint of step {saved}" in output
    assert only_run(project).info.status == "FINISHED"
    assert run(project, "dvc", "status", "--quiet").returncode == 0
    assert_same_curve(project, uninterrupted)


def test_two_tasks_of_srun_train_one_model(cluster, make_project, uninterrupted):
    project = make_project(SETTINGS)
    shutil.copytree(uninterrupted / "data/prepared", project / "data/prepared")
    srun = ["srun", "--ntasks=2", "--overcommit", "python", "-m", "stages.train"]
    # the names of the nodes are not those of machines
    assert "on 2 x cpu" in cluster.run(project, *srun, MASTER_ADDR="127.0.0.1")
    assert only_run(project).info.status == "FINISHED"
    assert_same_curve(project, uninterrupted)


def test_job_that_fails_is_not_requeued(cluster, make):
    project = make({"model.n_head": 3})
    job = cluster.submit(project)
    assert cluster.wait(project, job, "FAILED")["Restarts"] == "0"
    assert "n_head" in log(project, job) and "requeued" not in log(project, job)


HANG = """
import sys
if sys.orig_argv[-2:] == ["-m", "stages.check"]:
    import time
    open("paused", "w").close()
    time.sleep(300)
"""


def test_job_that_has_saved_nothing_at_its_time_limit_is_not_requeued(cluster, make, tmp_path):
    project = make()
    (tmp_path / "sitecustomize.py").write_text(HANG)
    job = cluster.submit(project, PYTHONPATH=environment(tmp_path)["PYTHONPATH"])
    until_paused(cluster, project, job)
    cluster.run(project, "scancel", "--signal=USR1", "--batch", job)
    assert cluster.wait(project, job, "FAILED")["Restarts"] == "0"
    assert "nothing was saved since the job started: set a longer --time" in log(project, job)
