"""A tiny project of one's own: the real code and params.yaml, a short text, a model of a few KB."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests' processes share the cores

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
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
VERSES = "".join(
    f"The sea of night {n} holds a star,\nand the star holds a sea of salt.\n\n" for n in range(150)
)


def set_params(folder: Path, settings: dict) -> None:
    """Lay {"train.steps": 6, ...} over a folder's params.yaml; a value of ... takes the key out."""
    file = folder / "params.yaml"
    tree = yaml.safe_load(file.read_text())
    for name, value in settings.items():
        section, key = name.split(".")
        if value is ...:
            del tree[section][key]
        else:
            tree[section][key] = value
    file.write_text(yaml.safe_dump(tree))


def run(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess:
    """Run a command in a project's folder, with this interpreter first on the PATH."""
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("DVC_", "MLFLOW_", "GIT_"))
    }
    paths = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(
        command,
        cwd=folder,
        env=clean | paths | {"MLFLOW_DISABLE_TELEMETRY": "true"} | environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture(scope="session")
def make_project(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make_project(**settings) is a new folder with the code, tiny params and a short text."""

    def make(settings: dict | None = None) -> Path:
        folder = tmp_path_factory.mktemp("project")
        for name in ("folio", "stages", ".dvc/config", ".dvcignore", ".gitignore", "dvc.yaml"):
            source, copy = ROOT / name, folder / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, copy)
        shutil.copy(ROOT / "params.yaml", folder)
        (folder / "data/raw").mkdir(parents=True)
        (folder / "data/raw/verses.txt").write_text(VERSES)
        set_params(folder, TINY | (settings or {}))
        return folder

    return make
