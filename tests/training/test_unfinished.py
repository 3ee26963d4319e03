"""The working folder of an unfinished training: one trainer at a time, removed in a safe order."""

import itertools
import shutil
import signal
import subprocess
import sys
import threading

import pytest
import torch
from conftest import ROOT

from folio.run import lock_for_training, lock_if_idle, remove_unfinished
from folio.training import checkpoint
from folio.training.checkpoint import Checkpoint

HOLD = """
from pathlib import Path
from folio.run import lock_for_training
with lock_for_training(Path({!r})):
    print("held", flush=True)
    input()
"""


@pytest.fixture
def other(tmp_path):
    """Another process that trains the variant tmp_path/key."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(str(tmp_path / "key"))],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.communicate()


def test_lock_waits_with_a_message_until_other_trainer_ends(tmp_path, other, capsys):
    threading.Timer(1.0, other.kill).start()
    with lock_for_training(tmp_path / "other"):
        assert capsys.readouterr().err == ""
    with lock_for_training(tmp_path / "key"):
        assert other.wait(5) == -signal.SIGKILL
    assert "another process is training this variant (key): waiting" in capsys.readouterr().err


def test_lock_if_idle_yields_false_while_a_trainer_runs(tmp_path, other):
    with lock_if_idle(tmp_path / "key") as idle:
        assert not idle
    other.kill()
    other.wait()
    with lock_if_idle(tmp_path / "key") as idle:
        assert idle
    remove_unfinished(tmp_path / "key")
    assert not (tmp_path / "key").exists()


def test_killed_removal_leaves_the_record_until_the_end(tmp_path, monkeypatch):
    folder = tmp_path / "key"
    for step in (2, 3):
        checkpoint.save(folder, Checkpoint(step, {"model.w": torch.zeros(9)}, {}))
    (folder / "record.json").write_text("{}")
    sound, calls = shutil.rmtree, itertools.count(1)

    def killed(*arguments, **options):
        if next(calls) == 2:
            raise KeyboardInterrupt
        sound(*arguments, **options)

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove_unfinished(folder)
    assert (folder / "record.json").exists() and list(folder.glob("step-*"))
    remove_unfinished(folder)
    assert not folder.exists()


def test_lock_is_outside_the_folder(tmp_path):
    with lock_for_training(tmp_path / "key"):
        assert list((tmp_path / "key").iterdir()) == []
