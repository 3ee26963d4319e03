"""What `doctor` checks in the project: git, DVC, MLflow, unfinished training runs, params."""

import contextlib
import json
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from folio import commands, files, user
from folio.errors import UserError

# The folders of a project, each with the command that restores its contents.
_FOLDERS = {
    ".dvc/tmp": "",  # first: without it, dvc cannot restore the others
    ".dvc/cache": "dvc commit --force",
    "data": "git checkout HEAD -- data && dvc checkout",
    "data/raw": "git checkout HEAD -- data/raw && dvc checkout",
    "data/prepared": "dvc checkout data/prepared",
    "data/diagnostics": "dvc checkout data/diagnostics",
    "models": "git checkout HEAD -- models && dvc checkout",
    "models/gpt2": "dvc checkout models/gpt2",
    "models/training": "dvc checkout train",
    "models/evaluation": "dvc checkout evaluate",
    ".checkpoints": "dvc repro",
    "mlruns": "python -m folio sync",
    "sweeps": "",
}
RWLOCKS = (".dvc/tmp/rwlock", ".dvc/tmp/exps/rwlock")
# Such a change gives the run a different train_key, so training starts over.
_UNLESS = ", unless its params, the text or the code have changed since it started"
WAY_BACK = "git checkout HEAD -- . && dvc checkout --force"


@dataclass(frozen=True)
class Finding:
    text: str
    hint: str = ""  # how to fix the problem; empty if there is none


def user_and_home() -> Iterator[Finding]:
    if user.COMPLETED:
        missing = " ".join(f"{name}={value}" for name, value in user.COMPLETED.items())
        yield Finding(
            f"user id {os.getuid()} is not in /etc/passwd, so dvc fails", f"`export {missing}`"
        )
    home = os.environ.get("HOME")
    try:
        next(Path(home or "/").iterdir(), None)
    except FileNotFoundError:
        pass  # dvc does not need it to exist
    except OSError:
        yield Finding(
            f"HOME={home} cannot be read by this user, so dvc fails",
            "set HOME to a folder that belongs to this user",
        )


def git_repository() -> Iterator[Finding]:
    commit = commands.head()  # raises UserError with git's remedy
    branch = commands.git("rev-parse", "--abbrev-ref", "HEAD").strip()
    where = f"branch {branch}" if branch != "HEAD" else "not on a branch"
    yield Finding(f"git commit {commit[:7]}, {where}")
    yield from _params_in_git(commit, is_detached=branch == "HEAD")


def project_folders() -> Iterator[Finding]:
    for name, restore in _FOLDERS.items():
        path = Path(name)
        if path.is_symlink() and not path.exists():
            yield Finding(f"{name} is a link to a folder that does not exist", f"`rm {name}`")
        elif path.exists() and not path.is_dir():
            then = f", then `{restore}`" if restore else ""
            hint = f"`mv {name} {name}.moved`{then}"
            yield Finding(f"{name} is a file where Folio needs a folder", hint)


def dvc_project() -> Iterator[Finding]:
    if not Path(".dvc").is_dir():
        yield Finding(
            "no .dvc folder here", "run this in the root folder of the project, or run `dvc init`"
        )
        return
    if running := dvc_processes():
        yield Finding("dvc is running: " + ", ".join(f"process {pid}" for pid in running))
    for name in RWLOCKS:
        yield from _rwlock(Path(name), running)
    problem = None
    if Path("dvc.lock").exists():
        from folio.tracking.dvc_cache import lock_problem

        if problem := lock_problem(Path("dvc.lock")):
            yield Finding("", problem)
    cache = Path(commands.dvc("cache", "dir").strip())  # raises UserError with DVC's message
    if problem is None:
        commands.dvc("stage", "list", "--name-only")  # raises UserError if dvc.yaml is invalid
    from folio.tracking import sizes

    size = sizes.shown(sizes.of(cache))
    is_writable = os.access(cache if cache.exists() else ".dvc", os.W_OK)
    yield Finding(f"DVC cache, {size}", "" if is_writable else "make it writable")


def experiment_queue() -> Iterator[Finding]:
    from folio.sweeps import queue

    queue.check_folder()  # raises UserError
    yield Finding("DVC queue of experiments")


def mlflow_store() -> Iterator[Finding]:
    from folio.cli.store import open_store, tracking_uri
    from folio.run import project_root
    from folio.tracking import failures, queries, store, sync

    uri = tracking_uri()
    if not store.exists(uri):
        yield Finding("no MLflow store yet; the first run creates one")
        return
    failures.check_content(store.resolve(uri))  # raises UserError
    try:
        opened = open_store()
        runs = queries.list_runs(opened)
        lost = sync.runs_with_lost_files(opened, project_root())
    except store.STORE_ERRORS as problem:
        raise UserError(f"MLflow failed: {store.explain(problem)}") from None
    yield Finding(f"MLflow store, training runs: {len(runs)}")
    if lost:
        names = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
        hint = f"{store.SYNC} resends those that are in DVC's cache"
        yield Finding(f"files are missing or damaged in MLflow: {names}", hint)


def training_runs() -> Iterator[Finding]:
    """Damaged records of the last training and evaluation, and the unfinished training runs."""
    from folio.run import EVALUATION, RECORD, TRAINING, UNFINISHED, project_root, read_record

    for folder in (TRAINING, EVALUATION):
        if (folder / RECORD).exists():
            with _problem_as_finding() as findings:
                read_record(folder / RECORD)
            yield from findings
    unfinished = project_root() / UNFINISHED
    for folder in sorted(unfinished.iterdir()) if unfinished.is_dir() else ():
        if (folder / RECORD).exists():
            with _problem_as_finding() as findings:
                findings.append(Finding(f"training run {folder.name} {_state(folder)}"))
            yield from findings


def params_file() -> Iterator[Finding]:
    from folio import params, sections

    sections.check(params.read(params.FILE), str(params.FILE))  # raises UserError
    yield Finding("params.yaml")


def dvc_processes() -> list[int]:
    """The ids of the processes of DVC and of stages in this project, including the copies of it in
    .dvc/tmp, in which `dvc exp run --temp` and the queue run experiments."""
    here = Path.cwd()
    found = psutil.process_iter(["cmdline", "cwd"])
    return [
        process.pid
        for process in found
        if process.info["cwd"]
        and Path(process.info["cwd"]).is_relative_to(here)
        and _is_dvc(process.info["cmdline"] or [])
    ]


def _is_dvc(words: list[str]) -> bool:
    return any(Path(word).name == "dvc" or word.startswith("stages.") for word in words[:3])


def _params_in_git(commit: str, is_detached: bool) -> Iterator[Finding]:
    """Changes in params.yaml since the last commit, and what a killed experiment left behind.

    `dvc exp run -S` changes params.yaml, stages it and detaches HEAD while it runs.
    """
    with contextlib.suppress(OSError):
        files.touch(Path("params.yaml"))
    status = commands.git("status", "--porcelain", "--", "params.yaml")
    is_staged = status[:1] not in ("", " ", "?")
    if dvc_processes():
        return
    if is_detached and (is_staged or commands.git("for-each-ref", "refs/exps/exec")):
        moved = commands.git("log", "-g", "-1", "--format=%gs", "HEAD").strip()
        if moved.endswith(f" to {commit}"):  # DVC's way of writing a commit, in full
            branch = shlex.quote(moved.removeprefix("checkout: moving from ").partition(" ")[0])
            way_back = WAY_BACK.replace("&&", f"&& git switch {branch} &&")
            yield Finding(
                "a `dvc exp run` was killed: HEAD is detached, and params.yaml may have its params",
                f"`{way_back}`, which also discards your own uncommitted edits, or run the same"
                f" command again and then `git switch {branch}`",
            )
            is_staged = False
    elif status:
        yield Finding(
            f"params.yaml has {'staged ' if is_staged else ''}changes since the last commit"
            f" (`git diff HEAD params.yaml`); `{WAY_BACK}` undoes all changes"
        )
    if stashed := commands.git("stash", "list").splitlines():
        yield Finding(
            f"`git stash list` is not empty ({len(stashed)}): if a `dvc exp run` was killed while"
            " starting, your edits may be there (`git stash pop`)"
        )


def _rwlock(path: Path, running: list[int]) -> Iterator[Finding]:
    """Problems in DVC's list of the files that its processes use.

    DVC itself removes the entries of processes that no longer exist.
    """
    remedy = f"`rm -r {path}`"
    try:
        lock = json.loads(files.read(path))
        pids = {int(each["pid"]) for each in users(lock)}
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        if not running:  # otherwise it may be writing the file just now
            yield Finding(f"{path} is damaged, so dvc fails", remedy)
        return
    others = [pid for pid in pids - {*running} if psutil.pid_exists(pid)]
    if others:  # the id of a dvc that was killed now belongs to another process
        names = ", ".join(str(pid) for pid in others)
        yield Finding(
            f"{path} lists process {names}, which is not a dvc process of this project, but dvc"
            " waits for it",
            remedy,
        )


def users(lock: Any) -> list[dict[str, Any]]:
    readers = [each for group in lock.get("read", {}).values() for each in group]
    return [*lock.get("write", {}).values(), *readers]


def _state(folder: Path) -> str:
    from folio.run import HISTORY, RECORD, lock_if_idle, read_history, read_record

    with lock_if_idle(folder) as idle:
        if not idle:
            return "is running"
        record = read_record(folder / RECORD)
        history = read_history(folder / HISTORY) if (folder / HISTORY).exists() else []
    if _has_finished(record.params, history):
        return f"has finished: `dvc repro` evaluates it{_UNLESS}"
    return f"was interrupted: `dvc repro` resumes it{_UNLESS}"


def _has_finished(params: dict[str, str], history: list[dict[str, Any]]) -> bool:
    """Whether the history ends at the last step, or where early stopping ends training."""
    losses = [row["val_loss"] for row in history if "val_loss" in row]
    since_best = len(losses) - 1 - losses.index(min(losses)) if losses else 0
    patience = params.get("train.patience", "")
    is_last = bool(history) and str(history[-1]["step"]) == params.get("train.steps")
    return is_last or (patience.isdecimal() and since_best >= int(patience))


@contextlib.contextmanager
def _problem_as_finding() -> Iterator[list[Finding]]:
    """Yield a list of findings. A UserError raised in the block is added to it."""
    findings: list[Finding] = []
    try:
        yield findings
    except UserError as problem:
        findings.append(Finding("", str(problem)))
