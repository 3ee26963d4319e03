"""Fixtures: a tiny project with the real code and params.yaml, a short text and a tiny model."""

import compileall
import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the test processes share the cores

import contextlib
import gzip
import importlib
import json
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import warm
import yaml
from typer.testing import CliRunner

from folio.cli.main import app as commands
from folio.corpus import corpus, shakespeare
from folio.gpt import model_files
from folio.gpt.model import GPT, ModelParams

# The tests may run in the background, where a shell ignores SIGINT and SIGQUIT, or under nohup: the
# processes that they start do not.
for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, default)

ROOT = Path(__file__).parent.parent
COPIED = ("folio", "stages", ".dvc/config", ".dvcignore", ".gitignore", "dvc.yaml")
COPIED += ("data/pretrained/none", "data/pretrained/random", "models/.gitkeep")
TINY = {
    "prepare.corpus": "data/raw/verses.txt",
    "model.n_layer": 1,
    "model.n_head": 2,
    "model.n_embd": 16,
    "model.block_size": 16,
    "model.dropout": 0.1,
    "train.steps": 6,
    "train.batch_size": 2,
    "train.accumulation": 2,
    "train.eval_interval": 2,
    "train.warmup_steps": 1,
    "evaluate.stride": 8,
    "evaluate.prompts": ["The sea"],
    "evaluate.sample_tokens": 4,
    "runtime.log_interval": 1,
    "runtime.device": "cpu",
    "runtime.system_metrics": False,
}
PROGRAMS = "FOLIO_TEST_PROGRAMS"  # the folder of tests/warm.py, for all workers
VERSES = "".join(
    f"The sea of night {n} holds a star,\nand the star holds a sea of salt.\n\n" for n in range(150)
)


def pytest_configure() -> None:
    gc.disable()  # while the tests are imported, as in folio/__init__.py
    if "PYTEST_XDIST_WORKER" not in os.environ:
        os.environ[PROGRAMS] = tempfile.mkdtemp(prefix=f"folio-{os.getpid()}-")


def pytest_unconfigure() -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ[PROGRAMS])


def pytest_xdist_auto_num_workers() -> int:
    """More workers than cores: a third of the time, tests wait for processes that they started."""
    return (os.cpu_count() or 1) + 2


# The longest files first, so that a short one runs last. SLURM waits most of its time, and the page
# and the notebook can start while the others wait for the first run, which they share.
LONGEST = ("slurm", "sync", "app", "notebook", "housekeeping", "remedies", "sweep", "docs")
LONGEST += ("several_processes", "pipeline", "cli", "edits", "integrity", "resume", "sharded")
LONGEST += ("fuzz", "tracking", "init_from", "prepare", "ablation", "team", "bad_input", "variant")
LONGEST += ("distributed_training", "launch", "benchmarks", "processes", "tokenizer", "check_entry")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def set_params(folder: Path, settings: dict) -> None:
    """Apply {"train.steps": 6, ...} to a folder's params.yaml; the value ... removes the key."""
    file = folder / "params.yaml"
    tree = yaml.safe_load(file.read_text())
    for name, value in settings.items():
        section, key = name.split(".")
        if value is ...:
            del tree[section][key]
        else:
            tree[section][key] = value
    file.write_text(yaml.safe_dump(tree))


def environment(*first_on_path: Path, **more: str) -> dict[str, str]:
    """The environment of a test's process: this interpreter first on PATH, no outside settings.

    first_on_path: folders to put at the front of PYTHONPATH.
    """
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("DVC_", "MLFLOW_", "GIT_", "AWS_"))
    }
    python_path = [*map(str, first_on_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    return clean | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(python_path),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # a server would start seven more processes
        **more,
    }


def programs() -> Path:
    """The folder with `python` and `dvc` of tests/warm.py. Starts their server if needed."""
    folder = Path(os.environ[PROGRAMS])
    with filelock.FileLock(folder / "lock"):
        if not (folder / "socket").exists():
            warm.start(folder, int(folder.name.split("-")[1]), environment())
    return folder / "bin"


class WarmPython:
    """In place of `sys`: runs `python -m dvc` with tests/warm.py."""

    @property
    def executable(self) -> str:
        return str(programs() / "python")


def warm_environment(*first_on_path: Path, **more: str) -> dict[str, str]:
    """Like `environment`, with `python` and `dvc` of tests/warm.py first on PATH."""
    variables = environment(*first_on_path, **more)
    return variables | {"PATH": f"{programs()}{os.pathsep}{variables['PATH']}"}


def run(folder: Path, *command: str, **more: str) -> subprocess.CompletedProcess:
    """Run a command in a project's folder; `python` and `dvc` are those of tests/warm.py.

    more: environment variables.
    """
    return subprocess.run(
        command,
        cwd=folder,
        env=environment(**more) if command[0] == "git" else warm_environment(**more),
        capture_output=True,
        text=True,
        timeout=240,
    )


def succeed(folder: Path, *command: str, **more: str) -> str:
    """Run a command that must succeed; return everything that it printed."""
    done = run(folder, *command, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Run the block in a project's folder, in this process, where PyTorch and MLflow are imported
    already. MLflow keeps a store open even after its file is removed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("folio.commands.sys", WarmPython())
        patch.chdir(folder)
        patch.setenv("DVC_ROOT", str(folder))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield


def run_stages(folder: Path, *stages: str) -> None:
    with inside(folder):
        for stage in stages:
            importlib.import_module(f"stages.{stage}").main()


def folio(folder: Path, *words: str) -> str:
    """Run `python -m folio` in this process; return its stdout. Raises UserError as it does."""
    with inside(folder):
        done = CliRunner().invoke(commands, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def commit(folder: Path, message: str = "start") -> None:
    """Commit everything in a folder to a git repository there."""
    for command in (
        ["git", "init", "-q"],
        ["git", "config", "user.email", "test@example.org"],
        ["git", "config", "user.name", "Test"],
        ["git", "add", "-A"],
        ["git", "commit", "-qm", message],
    ):
        succeed(folder, *command)


def shared(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that all workers share and copy; the first worker that needs it makes it."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with filelock.FileLock(f"{folder}.lock"):
        if not folder.exists():
            new = factory.mktemp("shared")
            make(new)
            new.rename(folder)
    return folder


def open_store(folder: Path) -> None:
    """Create the store of a project, or repair that of a copied project."""
    from folio.tracking.store import Store  # imports MLflow

    with inside(folder):
        Store(None, repair=True)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An mlflow.db without runs, to be copied and opened: creating one takes five seconds."""
    return shared(tmp_path_factory, "store", open_store) / "mlflow.db"


@pytest.fixture(scope="session")
def server_store(empty_store, tmp_path_factory) -> Path:
    """A database for a server to copy: without experiments of its own, in which clients would have
    to write artifacts to a local folder."""
    copy = tmp_path_factory.mktemp("server") / "mlflow.db"
    shutil.copy(empty_store, copy)
    with contextlib.closing(sqlite3.connect(copy)) as database, database:
        database.execute("DELETE FROM experiment_tags")
        database.execute("DELETE FROM experiments WHERE name = 'folio'")
    return copy


@pytest.fixture(scope="session")
def make_project(empty_store, tmp_path_factory) -> Callable[..., Path]:
    """make_project(settings) returns a new folder with the code, tiny params and a short text.

    It has an empty MLflow store, unless store is False.
    """

    def copy_code(folder: Path) -> None:
        for name in COPIED:
            source, copy = ROOT / name, folder / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, copy)
        compileall.compile_dir(folder, quiet=1)  # otherwise each process compiles all of it

    def make(settings: dict | None = None, store: bool = True) -> Path:
        folder = tmp_path_factory.mktemp("project")
        code = shared(tmp_path_factory, "code", copy_code)
        shutil.copytree(code, folder, dirs_exist_ok=True)
        shutil.copy(ROOT / "params.yaml", folder)
        (folder / "data/raw").mkdir(parents=True)
        (folder / "data/raw/verses.txt").write_text(VERSES)
        set_params(folder, TINY | (settings or {}))
        if store:
            shutil.copy(empty_store, folder)
            open_store(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def make_trained(make_project, tmp_path_factory) -> Callable[..., Path]:
    """make_trained(settings) returns a committed project after `dvc repro`, with params edited.

    It has the MLflow store of that run, unless store is False.
    """

    def first_run(folder: Path) -> None:
        shutil.copytree(make_project(), folder, dirs_exist_ok=True)
        open_store(folder)
        commit(folder)
        succeed(folder, "dvc", "repro")
        commit(folder, "first run")

    def make(settings: dict | None = None, store: bool = True) -> Path:
        folder = tmp_path_factory.mktemp("trained")
        first = shared(tmp_path_factory, "first run", first_run)
        shutil.copytree(first, folder, dirs_exist_ok=True)
        if settings:
            set_params(folder, settings)
        if store:
            open_store(folder)
        else:
            (folder / "mlflow.db").unlink()
            shutil.rmtree(folder / "mlruns")
        return folder

    return make


def enter_copy(project: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy a project to `folder` for a test to change, and change to that folder."""
    from folio.tracking.store import Store

    shutil.copytree(project, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DVC_ROOT", str(folder))
    Store(None, repair=True)
    return folder


@pytest.fixture(scope="session")
def unhurried() -> dict[str, float]:
    """How long folio.gpt.model_files waits for files that were just written, in seconds."""
    return {name: getattr(model_files, name) for name in ("SETTLED", "SETTLED_AFTER_ERROR")}


@pytest.fixture(autouse=True)
def hurried(unhurried, monkeypatch) -> None:
    """Tests load the models that they have just written, and do not wait."""
    for name in unhurried:
        monkeypatch.setattr(model_files, name, 0.0)


NOT_FILES = ("folder", "pipe", "link to itself", "link to a device")


def replace_by(path: Path, kind: str) -> None:
    """Replace a file by one of NOT_FILES."""
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(path if kind == "link to itself" else "/dev/zero")


@pytest.fixture(scope="session")
def plays() -> dict[str, str]:
    return shakespeare.read_plays()


@pytest.fixture(scope="session")
def tinyshakespeare(plays) -> str:
    return shakespeare.build_tinyshakespeare(plays)


CONTEXT, ROWS = 12, 40  # of `model`


@pytest.fixture(scope="session")
def model() -> GPT:
    """A model of a few parameters, none of which has its initial value."""
    torch.manual_seed(1)
    model = GPT(ModelParams(n_layer=2, n_head=2, n_embd=16, block_size=CONTEXT, dropout=0.1), ROWS)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.4 * torch.randn_like(p)
    return model.eval()


class SmallDisk:
    """A file system of a few MB that can be filled to the last byte."""

    def __init__(self, folder: Path):
        self.folder = folder

    def fill(self) -> None:
        with contextlib.suppress(OSError), (self.folder / "filler").open("wb", 0) as file:
            while True:
                file.write(b"x" * 4096)

    def clear(self) -> None:
        (self.folder / "filler").unlink()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    folder = tmp_path / "small disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system takes root")
    yield SmallDisk(folder)
    subprocess.run(["umount", "-l", str(folder)], check=True)


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def jsonl(texts: list[str | None]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": zstd}


class CorpusFolder:
    """A root with a corpus in data/raw/set."""

    def __init__(self, root: Path) -> None:
        self.root, self.path = root, root / "data/raw/set"
        self.path.mkdir(parents=True)

    def write(self, name: str, content) -> Path:
        """Write text (.txt), documents (.jsonl, .parquet) or bytes, compressed as the suffix
        says."""
        path = self.path / name
        suffixes = [suffix for suffix in path.suffixes if suffix not in COMPRESS]
        if not isinstance(content, bytes) and suffixes == [".parquet"]:
            rows = pa.table({"id": range(len(content)), "text": pa.array(content, pa.string())})
            pq.write_table(rows, path, row_group_size=2)
            return path
        if not isinstance(content, bytes):
            content = content.encode() if isinstance(content, str) else jsonl(content)
        path.write_bytes(COMPRESS[path.suffix if path.suffix in COMPRESS else ""](content))
        return path

    def find(self, name: str = "data/raw/set") -> corpus.Corpus:
        return corpus.find(name, self.root)


@pytest.fixture
def corpus_folder(tmp_path: Path) -> CorpusFolder:
    return CorpusFolder(tmp_path)
