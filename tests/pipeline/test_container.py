"""Commands under a user id that has no entry in /etc/passwd, as in some containers."""

import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, environment

NAMES = ("LOGNAME", "USER", "LNAME", "USERNAME")


@pytest.fixture(scope="module")
def in_container() -> list[str]:
    """A command before others, which then run under a user id without a name."""
    words = ["unshare", "--user", "--map-user=12345", "--map-group=12345"]
    if not shutil.which("unshare") or subprocess.run([*words, "true"]).returncode:
        pytest.skip("this system has no user namespaces")
    return words


def without_user(**more: str) -> dict[str, str]:
    variables = environment(**more)
    return {name: value for name, value in variables.items() if name not in (*NAMES, "HOME")}


def test_mlflow_tag_has_the_id_of_an_unnamed_user(in_container):
    code = "from folio.tracking import context; print(context.tags('x')['mlflow.user'])"
    command = [*in_container, sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=ROOT, env=without_user(), capture_output=True, text=True, check=True
    )
    assert done.stdout == "12345\n" and "getpwuid" not in done.stderr


def test_startup_file_of_the_environment_lets_dvc_run(in_container, tmp_path):
    shutil.copy(ROOT / "requirements/startup.pth", tmp_path)
    # What Python does in .venv, into which the Makefile copies the file.
    (tmp_path / "sitecustomize.py").write_text(f"import site; site.addsitedir({str(tmp_path)!r})")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    command = [*in_container, "dvc"]
    for words, variables in (
        (["init", "-q"], {"LOGNAME": "ada", "HOME": str(tmp_path)}),
        (["status"], {"PYTHONPATH": str(tmp_path)}),
    ):
        done = subprocess.run(
            [*command, *words],
            cwd=tmp_path,
            env=without_user() | variables,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr


def test_startup_file_keeps_dvc_out_of_folders_that_others_may_write_to(tmp_path):
    """If the environment has a folder `dvc` that the user may write to."""
    python = tmp_path / "bin/python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path], check=True)
    [packages] = tmp_path.glob("lib/python*/site-packages")
    shutil.copy(ROOT / "requirements/startup.pth", packages)
    code = "import os; print(os.environ.get('DVC_SITE_CACHE_DIR'))"
    variables = environment()
    variables.pop("DVC_SITE_CACHE_DIR", None)
    places = []
    for folder in (None, tmp_path / "dvc"):
        if folder:
            folder.mkdir(mode=0o700)
        places.append(subprocess.check_output([python, "-c", code], env=variables, text=True))
    assert places == ["None\n", f"{tmp_path / 'dvc'}\n"]


def test_startup_file_changes_nothing_for_a_known_user(tmp_path):
    shutil.copy(ROOT / "requirements/startup.pth", tmp_path)
    code = f"import os, site; site.addsitedir({str(tmp_path)!r}); print(*os.environ)"
    variables = without_user()
    del variables["MLFLOW_DISABLE_TELEMETRY"]
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], env=variables, capture_output=True, text=True
    )
    assert "LOGNAME" not in done.stdout.split() and "HOME" not in done.stdout.split()
    assert "MLFLOW_DISABLE_TELEMETRY" in done.stdout.split()
