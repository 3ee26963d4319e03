"""A project of its own for a benchmark: made, run, disturbed from outside and compared.

No network, and nothing of the working tree is touched: all of it is in a temporary folder.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"

import mlflow
import psutil
import torch
import yaml
from mlflow.entities import Run, ViewType
from safetensors.torch import load_file

from folio import params
from folio.sweeps import variants
from folio.tracking import registry

ROOT = Path(__file__).parent.parent
INJECTED = Path(__file__).with_name("injected.py")
EVERY = 5  # updates between evaluations, each with a checkpoint
LIMIT = 900.0  # seconds that one command may take
VERSES = "".join(
    f"The sea of night {n} holds a star,\nand the star holds a sea of salt.\n\n" for n in range(150)
)
TINY = """
prepare: {corpus: data/raw/verses.txt}
model: {n_layer: 2, n_head: 2, n_embd: 32, block_size: 32}
train: {batch_size: 4}
evaluate: {stride: 8, prompts: [The sea]}
"""
ALWAYS = """  # over a variant, too: what makes a lost random state or micro-batch show
model: {dropout: 0.1}
train: {accumulation: 2, warmup_steps: 1, patience: null}
evaluate: {sample_tokens: 4}
runtime: {log_interval: 2}
"""


def add_options(parser: argparse.ArgumentParser, steps: int) -> None:
    """What tiny reads."""
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--variant", help="one of the files in variants/, without .yaml")
    parser.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp16", "fp32"))


def tiny(options: argparse.Namespace, every: int = EVERY) -> dict[str, dict]:
    """Overlay of params.yaml by add_options' options; a variant has the corpus it has.

    every: updates between evaluations, each with a checkpoint.
    """
    tree: dict[str, dict] = {section: {} for section in params.SECTIONS}
    for overlay in ([] if options.variant else [TINY]) + [ALWAYS]:
        for section, values in yaml.safe_load(overlay).items():
            tree[section] |= values
    own = {"steps": options.steps, "precision": options.precision, "eval_interval": every}
    return tree | {"train": tree["train"] | own}


def write_project(folder: Path, variant: str | None, overlay: dict[str, dict]) -> None:
    """The repository's files, committed, with params.yaml under a variant under an overlay."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for file in filter(Path.is_file, (ROOT / name for name in names.split("\0"))):
        copy = folder / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    (folder / "data/raw").mkdir(parents=True, exist_ok=True)
    (folder / "data/raw/verses.txt").write_text(VERSES)
    tree = yaml.safe_load((folder / "params.yaml").read_text())
    for name, value in (variants.read(variant) if variant else {}).items():
        section, key = name.split(".")
        tree[section][key] = value
    for section, values in overlay.items():
        tree[section] |= values
    (folder / "params.yaml").write_text(yaml.safe_dump(tree))
    git = ["git", "-c", "user.name=faults", "-c", "user.email=faults@localhost"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "a project"]):
        subprocess.run([*git, *command], cwd=folder, check=True)


class Command:
    """`python -m ...` in a project, in a process group of its own; what it says is in a file."""

    def __init__(self, folder: Path, *words: str, fault: str = "", address: str = ""):
        around = folder.parent
        (around / "site").mkdir(exist_ok=True)
        shutil.copy(INJECTED, around / "site/sitecustomize.py")
        self.mark, self.go = around / "reached", around / "go"
        self.mark.unlink(missing_ok=True)
        self.go.unlink(missing_ok=True)
        former = os.environ.get("PYTHONPATH")
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "MLFLOW_"))}
        clean["PYTHONPATH"] = os.pathsep.join(filter(None, [str(around / "site"), former]))
        clean["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{clean['PATH']}"
        clean |= {"DVC_SITE_CACHE_DIR": str(around / "dvc"), "MLFLOW_DISABLE_TELEMETRY": "true"}
        clean |= {"FOLIO_FAULT": fault} if fault else {}
        clean |= {"MLFLOW_TRACKING_URI": address} if address else {}
        with tempfile.NamedTemporaryFile(dir=around, suffix=".log", delete=False) as log:
            self.log = Path(log.name)
            self.process = subprocess.Popen(
                [sys.executable, "-m", *words],
                cwd=folder,
                env=clean,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self) -> int:
        try:
            return self.process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            self.kill_group()
            return self.process.wait()

    def finish(self) -> None:
        """Wait for its end, which must be a good one."""
        if self.wait():
            raise RuntimeError(f"failed without a fault: {self.said[-2000:]}")

    def kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def reached(self) -> psutil.Process:
        """Wait until the stage is where its fault is; the stage's process."""
        while not (self.mark.exists() and self.mark.read_text().endswith("\n")):
            if self.process.poll() is not None:
                raise RuntimeError(f"ended before the fault's moment: {self.said[-2000:]}")
            time.sleep(0.01)
        return psutil.Process(int(self.mark.read_text()))

    def hurry(self) -> None:
        """A slow trainer may be quick again."""
        self.go.touch()


def repro(folder: Path, *words: str, fault: str = "", address: str = "") -> Command:
    return Command(folder, "dvc", "repro", *words, fault=fault, address=address)


def trainers(folder: Path) -> list[psutil.Process]:
    """The trainers at work in a project."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[-1:] == ["stages.train"] and process.cwd() == str(folder):
                found.append(process)
    return found


def seconds_to_end(process: psutil.Process) -> float:
    started = time.monotonic()
    with contextlib.suppress(psutil.Error):
        while process.status() != psutil.STATUS_ZOMBIE and time.monotonic() - started < LIMIT:
            time.sleep(0.02)
    return time.monotonic() - started


class Server:
    """A real MLflow server, whose store outlives it."""

    def __init__(self, place: Path):
        self.place, self.port = place, free_port()
        self.address = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        server = ["mlflow", "server", "--backend-store-uri", "sqlite:///served.db"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", *server, "--port", str(self.port), "--workers", "1"],
            cwd=self.place,
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},  # 7 processes less
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for _ in range(600):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.address}/health", timeout=5)
                return
            time.sleep(0.1)
        raise RuntimeError("the MLflow server does not start")

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def headline(folder: Path) -> str:
    tags = json.loads((folder / "models/training/record.json").read_text())["tags"]
    return f"{tags['device']}, {tags['precision']}, PyTorch {torch.__version__}"


def outs_differ(peer: Path, folder: Path) -> Iterator[str]:
    files = [project / "models/gpt2/model.safetensors" for project in (peer, folder)]
    if len({hashlib.sha256(file.read_bytes()).digest() for file in files}) > 1:
        one, other = map(load_file, files)
        furthest = max(float((one[name] - other[name]).abs().max()) for name in one)
        yield f"weights differ by at most {furthest:.2e}"
    columns = ("step", "train_loss", "learning_rate", "grad_norm", "val_loss")
    one, other = ([tuple(map(r.get, columns)) for r in read_history(p)] for p in (peer, folder))
    if one != other:
        unlike = sum(a != b for a, b in zip(one, other, strict=False))
        yield f"history has {len(other)} rows, not {len(one)}; {unlike} are not the same"
    one, other = (
        {
            str(f.relative_to(p))
            for where in ("models/**/*", ".checkpoints/*/*")
            for f in p.glob(where)
        }
        for p in (peer, folder)
    )
    if one != other:
        yield f"left over or missing: {sorted(one ^ other)}"


def read_history(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "models/training/history.jsonl").open()]


def mlflow_differs(folder: Path, store: str) -> Iterator[str]:
    """One training and, nested under it, one evaluation; all points once, all files as here."""
    client = mlflow.MlflowClient(store)
    runs = runs_of(client)
    nested = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    trained = [run for run in runs if run not in nested]
    for kind, found in (("training", trained), ("evaluation", nested)):
        statuses = [run.info.status for run in found]
        if statuses != ["FINISHED"]:
            yield f"MLflow's runs of one {kind} are {statuses}"
    rows = read_history(folder)
    wanted = {(k, r["step"], v) for r in rows for k, v in r.items() if k not in ("step", "time")}
    for run in runs:
        points = [
            (key, point.step, point.value)
            for key in run.data.metrics
            for point in client.get_metric_history(run.info.run_id, key)
        ]
        more = len(points) - len({point[:2] for point in points})
        less = len(wanted - set(points)) if run in trained else 0
        if more or less:
            yield f"MLflow has {more} points twice and lacks {less}"
    for found, sources in (
        (trained, {"training": "models/training", "data": "data"}),
        (nested, {"evaluation": "models/evaluation"}),
    ):
        here = {f"{to}/{n}": b for to, path in sources.items() for n, b in files_in(folder / path)}
        here = {  # data has the diagnostics, with no folder about them
            name.replace("data/diagnostics/", "data/"): content
            for name, content in here.items()
            if not name.startswith("data/") or name.startswith("data/diagnostics")
        }
        for run in found:
            with tempfile.TemporaryDirectory() as copy:
                client.download_artifacts(run.info.run_id, "", copy)
                sent = dict(files_in(Path(copy)))
            unlike = sorted(n for n in here.keys() | sent.keys() if here.get(n) != sent.get(n))
            if unlike:
                yield f"not the same in MLflow's artifacts: {unlike}"
    for run in trained:
        with tempfile.TemporaryDirectory() as copy:
            model = registry.of_run(client, run.info.experiment_id, run.info.run_id)
            sent = dict(files_in(registry.fetch(client, model, Path(copy)))) if model else {}
        if sent != dict(files_in(folder / "models/gpt2")):
            yield "not the same in MLflow's model"


def files_in(folder: Path) -> Iterator[tuple[str, bytes]]:
    for file in filter(Path.is_file, folder.rglob("*")):
        if file.name == "record.json":  # what it says is the run itself
            continue
        yield str(file.relative_to(folder)), file.read_bytes()


def runs_of(client: mlflow.MlflowClient) -> list[Run]:
    experiment = client.get_experiment_by_name("folio").experiment_id
    return client.search_runs([experiment], run_view_type=ViewType.ALL)
