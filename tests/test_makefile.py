"""Which build of PyTorch the Makefile installs, with a pip that only records its arguments."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

PIP = '#!/bin/sh\necho "$*" >> pip.log\n'
PYTHON = f"""#!/bin/sh
[ "$1" = -m ] || exit 0
mkdir -p .venv/bin
printf '%s' '{PIP}' > .venv/bin/pip
chmod +x .venv/bin/pip
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "requirements").mkdir()
    (tmp_path / "requirements/torch.txt").write_text("torch==2\n")
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def installs(folder: Path, *options: str) -> list[str]:
    """The builds that `make .venv/torch` installs, each after it removed the other one."""
    environment = {key: value for key, value in os.environ.items() if key != "CPU"}
    (folder / "pip.log").unlink(missing_ok=True)
    command = ["make", ".venv/torch", "PYTHON=./python", *options]
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    log = folder / "pip.log"
    lines = log.read_text().splitlines() if log.exists() else []
    assert [line for line in lines[::2] if line != "uninstall -qqy torch"] == []
    assert all(line.endswith("-r requirements/torch.txt") for line in lines[1::2])
    return ["cpu" if "--index-url" in line else "cuda" for line in lines[1::2]]


def test_named_build_of_pytorch_replaces_the_other_one_once(folder):
    assert installs(folder, "CPU=1") == ["cpu"]
    assert installs(folder, "CPU=1") == []
    assert installs(folder, "CPU=") == ["cuda"]
    assert installs(folder, "CPU=") == []
    assert installs(folder) == []  # without CPU=, whatever is installed is kept
    assert installs(folder, "CPU=1") == ["cpu"]


def test_pytorch_of_unknown_build_is_replaced_only_by_name(folder):
    installs(folder)
    (folder / ".venv/torch").write_text("")
    assert installs(folder) == []
    assert installs(folder, "CPU=") == ["cuda"]
