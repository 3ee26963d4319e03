"""Runs git and dvc. If one fails, its error is raised as a one-line UserError with a remedy."""

import os
import re
import subprocess
import sys
from pathlib import Path

from folio.errors import UserError

FIRST_COMMIT = "git init && git add -A && git commit -m start"
_INVALID_FILE = re.compile(r"'\./(.+)' (is invalid|validation failed)")  # on several lines


class NoCommitError(UserError):
    """There is no git repository, or it has no commit yet."""


def git(*words: str, root: Path = Path(), text: str = "") -> str:
    """The output of a git command in a folder. text: its standard input.

    Raises UserError if git is not installed or fails, and NoCommitError if there is no repository
    or no commit.
    """
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *words],
            input=text,
            capture_output=True,
            encoding="utf-8",
            errors="backslashreplace",  # a diff may contain bytes that are not valid UTF-8
            env=os.environ | {"LC_ALL": "C"},  # git's messages in English
        )
    except FileNotFoundError:
        raise UserError("git is not on the PATH: install it") from None
    if done.returncode:
        raise _git_error(done.stderr, done.returncode, root)
    return done.stdout


def head(root: Path = Path()) -> str:
    """The hash of the last commit. Raises UserError like `git`."""
    return git("log", "-1", "--format=%H", root=root).strip()


def dvc(*words: str, root: Path = Path()) -> str:
    """The output of a dvc command in a folder. Raises UserError if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *words],
        cwd=root,
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",  # a path may contain bytes that are not valid UTF-8
    )
    if done.returncode:
        raise UserError(f"`dvc {' '.join(words[:2])}` failed: {dvc_error(done.stderr)}")
    return done.stdout


def dvc_error(output: str) -> str:
    """DVC's error in one line: its first line that begins with ERROR, with a hint."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["no reason given"]
    first = next((number for number, line in enumerate(lines) if line.startswith("ERROR")), None)
    if file := _INVALID_FILE.match(lines[0]):
        return f"{' '.join(lines[:2])}: fix it, or `git checkout HEAD -- {file[1]}`"
    if first is None:
        return f"{lines[-1]}; `python -m folio doctor` may find the cause"
    error = lines[first].removeprefix("ERROR: ")
    if "not owned by current user" in error:
        return f"{error}; `python -m folio doctor` shows git's remedy"
    if error.endswith(":") and len(lines) > first + 1:
        error += f" {lines[first + 1]}"
    return error


def _git_error(stderr: str, status: int, root: Path) -> UserError:
    lines = stderr.splitlines()
    errors = [line for line in lines if line.startswith(("fatal: ", "error: "))] or lines
    reason = errors[0].partition(": ")[2] if errors else f"it exited with status {status}"
    if "not a git repository (or any" in reason:
        found = [folder for folder in _with_parents(root) if (folder / ".git").exists()]
        if not found:
            return NoCommitError(f"there is no git repository here: `{FIRST_COMMIT}`")
        return UserError(
            f"git does not recognize {found[0] / '.git'}: make it readable or, if it is damaged,"
            " clone the project again"
        )
    if "does not have any commits yet" in reason:
        first_commit = FIRST_COMMIT.removeprefix("git init && ")
        return NoCommitError(f"there is no git commit yet: `{first_commit}`")
    remedy = next((f"`{line.strip()}`" for line in lines if line.startswith("\t")), "")
    if "index.lock" in reason or "File exists" in reason:
        remedy = "remove that file if no git command is running"
    return UserError(f"git failed: {reason}" + (f"; {remedy}" if remedy else ""))


def _with_parents(root: Path) -> list[Path]:
    return [root.resolve(), *root.resolve().parents]
