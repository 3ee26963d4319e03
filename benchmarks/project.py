"""Temporary projects for benchmarks: creates them and runs commands in them.

Does not use the network, and writes nothing outside the temporary folder.
"""

import argparse
import contextlib
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
from pathlib import Path

import psutil
import torch
import yaml

from folio import params
from folio.sweeps import variants

ROOT = Path(__file__).parent.parent
INJECTED = Path(__file__).with_name("injected.py")
EVAL_INTERVAL = 5  # updates between evaluations, each of which writes a checkpoint
TIMEOUT = 900.0  # seconds for one command
SERVER_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # it would start 7 more processes
}
VERSES = "".join(
    f"The sea of night {n} holds a star,\nand the star holds a sea of salt.\n\n" for n in range(150)
)
TINY = """
prepare: {corpus: data/raw/verses.txt}
model: {n_layer: 2, n_head: 2, n_embd: 32, block_size: 32}
train: {batch_size: 4}
evaluate: {stride: 8, prompts: [The sea]}
"""
ALWAYS = """  # also for a variant: reveals a lost random state or a lost micro-batch
model: {dropout: 0.1}
train: {accumulation: 2, warmup_steps: 1, patience: null}
evaluate: {sample_tokens: 4}
runtime: {log_interval: 2}
"""


def add_options(parser: argparse.ArgumentParser, steps: int) -> None:
    """Add the options that `tiny` reads."""
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--variant", help="one of the files in variants/, without .yaml")
    parser.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp16", "fp32"))


def tiny(options: argparse.Namespace, eval_interval: int = EVAL_INTERVAL) -> dict[str, dict]:
    """The overlay for params.yaml that matches the options of add_options: a tiny model, or a
    variant, which keeps its corpus."""
    tree: dict[str, dict] = {section: {} for section in params.SECTIONS}
    for overlay in ([] if options.variant else [TINY]) + [ALWAYS]:
        for section, values in yaml.safe_load(overlay).items():
            tree[section] |= values
    settings = {
        "steps": options.steps,
        "precision": options.precision,
        "eval_interval": eval_interval,
    }
    return tree | {"train": tree["train"] | settings}


def write_project(folder: Path, variant: str | None, overlay: dict[str, dict]) -> None:
    """Copy the repository's files, apply the variant and the overlay to params.yaml, and commit."""
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
    git = ["git", "-c", "user.name=benchmark", "-c", "user.email=benchmark@localhost"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "start"]):
        subprocess.run([*git, *command], cwd=folder, check=True)


class Command:
    """`python -m ...` in a project, in a new process group, with its output in a file."""

    def __init__(self, folder: Path, *words: str, fault: str = "", uri: str = ""):
        """fault: a fault as in injected.py. uri: the URI of the MLflow store."""
        parent = folder.parent
        (parent / "site").mkdir(exist_ok=True)
        shutil.copy(INJECTED, parent / "site/sitecustomize.py")
        self.reached, self._continue = parent / "reached", parent / "continue"
        self.reached.unlink(missing_ok=True)
        self._continue.unlink(missing_ok=True)
        python_path = os.environ.get("PYTHONPATH")
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "MLFLOW_"))}
        clean["PYTHONPATH"] = os.pathsep.join(filter(None, [str(parent / "site"), python_path]))
        clean["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{clean['PATH']}"
        clean |= {"DVC_SITE_CACHE_DIR": str(parent / "dvc"), "MLFLOW_DISABLE_TELEMETRY": "true"}
        clean |= {"FOLIO_FAULT": fault} if fault else {}
        clean |= {"MLFLOW_TRACKING_URI": uri} if uri else {}
        with tempfile.NamedTemporaryFile(dir=parent, suffix=".log", delete=False) as log:
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
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self) -> int:
        try:
            return self.process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            self.kill_group()
            return self.process.wait()

    def finish(self) -> None:
        """Wait for the command to end. Raises RuntimeError if it failed."""
        if self.wait():
            raise RuntimeError(f"the command failed: {self.output[-2000:]}")

    def kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def wait_for_fault(self) -> psutil.Process:
        """Wait until the stage reaches the line of its fault. Returns the process of the stage."""
        while not (self.reached.exists() and self.reached.read_text().endswith("\n")):
            if self.process.poll() is not None:
                raise RuntimeError(f"ended before the fault: {self.output[-2000:]}")
            time.sleep(0.01)
        return psutil.Process(int(self.reached.read_text()))

    def speed_up(self) -> None:
        """Let a slowed-down stage continue at full speed."""
        self._continue.touch()


def repro(folder: Path, *words: str, fault: str = "", uri: str = "") -> Command:
    return Command(folder, "dvc", "repro", *words, fault=fault, uri=uri)


def trainers(folder: Path) -> list[psutil.Process]:
    """The running train stages of a project."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[-1:] == ["stages.train"] and process.cwd() == str(folder):
                found.append(process)
    return found


def seconds_to_end(process: psutil.Process) -> float:
    started = time.monotonic()
    with contextlib.suppress(psutil.Error):
        while process.status() != psutil.STATUS_ZOMBIE and time.monotonic() - started < TIMEOUT:
            time.sleep(0.02)
    return time.monotonic() - started


class Server:
    """An MLflow server that can be killed and started again with the same store."""

    def __init__(self, folder: Path):
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        server = ["mlflow", "server", "--backend-store-uri", "sqlite:///served.db"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", *server, "--port", str(self.port), "--workers", "1"],
            cwd=self.folder,
            env=os.environ | SERVER_SETTINGS,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for _ in range(600):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.uri}/health", timeout=5)
                return
            time.sleep(0.1)
        raise RuntimeError("the MLflow server did not start")

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


def read_history(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "models/training/history.jsonl").open()]
