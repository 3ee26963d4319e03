"""Trains one trial of a sweep in a clone of the project, for schedulers that run trials as jobs.

Several `dvc exp run` cannot run in one folder: each changes params.yaml and holds DVC's lock. Each
trial therefore has a clone, which shares the project's DVC cache and checkpoints. The clone can be
lost at any time: the next attempt makes another and resumes from the checkpoint.
"""

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from os.path import relpath
from pathlib import Path

from folio import commands
from folio.errors import UserError
from folio.run import UNFINISHED, lock_if_idle
from folio.sweeps import queue
from folio.sweeps.overrides import param_options
from folio.sweeps.plan import Plan

CLONES = Path(".dvc/tmp/exps/standalone")  # where DVC puts its own copies; gc removes leftovers


def train(plan: Plan, number: int) -> None:
    """Train the trial with this number, counted from 1, unless it has finished already.

    Its experiment then is in the project's git repository, and its files are in DVC's cache. Raises
    UserError if there is no such trial, another process is training it, or it failed.
    """
    queue.require_dvc()
    experiments = list(plan.trials)
    if not 1 <= number <= len(experiments):
        raise UserError(f"there is no trial {number} in {plan.name}: 1 to {len(experiments)}")
    experiment = experiments[number - 1]
    with _lock(experiment):
        if experiment in plan.finished():
            print(f"{experiment} has already finished")
            return
        options = param_options(plan.base | plan.trials[experiment])
        with _clone(plan.baseline, experiment) as folder:
            command = ["dvc", "exp", "run", "--name", experiment, *options]
            if subprocess.run(command, cwd=folder).returncode:
                raise UserError(f"{experiment} has not finished: its output is above")
            commands.git("push", "--quiet", "origin", plan.ref(experiment), root=folder)
    print(f"`dvc exp apply {experiment}` restores its params and its model in the workspace")


@contextlib.contextmanager
def _lock(experiment: str) -> Iterator[None]:
    """Keep other processes from training this trial, and `gc` from removing its clone."""
    folder = Path(UNFINISHED)
    folder.mkdir(exist_ok=True)
    with lock_if_idle(folder / experiment) as is_idle:
        if not is_idle:
            raise UserError(f"another process is training {experiment}: wait until it has ended")
        yield


@contextlib.contextmanager
def _clone(baseline: str, experiment: str) -> Iterator[Path]:
    """A clone of the project at a commit, removed at the end of the block."""
    root, folder = Path.cwd(), CLONES / f"tmp-{experiment}"
    cache = Path(commands.dvc("cache", "dir").strip()).absolute()
    shutil.rmtree(folder, ignore_errors=True)  # left behind by an attempt that was killed
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        commands.git("clone", "--quiet", "--shared", "--no-checkout", str(root), str(folder))
        commands.git("checkout", "--quiet", "--detach", baseline, root=folder)
        if (settings := root / ".dvc/config.local").exists():
            shutil.copy(settings, folder / ".dvc")
        # Relative, because DVC cannot write every path to its settings.
        commands.dvc("config", "--local", "cache.dir", relpath(cache, folder), root=folder)
        (folder / UNFINISHED).symlink_to(root / UNFINISHED)
        if added := commands.git("ls-files", "-z", "*.dvc", root=folder):
            commands.dvc("checkout", *added.rstrip("\0").split("\0"), root=folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
