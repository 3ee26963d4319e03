"""Detects changes in a stage's inputs while the stage is running.

DVC hashes a stage's deps and params after its command has ended. If they were edited in the
meantime, dvc.lock and DVC's run cache would record the edit as the input of a result that did not
depend on it. So a stage whose inputs have changed fails instead, and DVC records nothing.
"""

import hashlib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import yaml
from pathspec import GitIgnoreSpec

from folio import strict_yaml
from folio.errors import UserError, running_stage

Stat = tuple[int, ...]
Values = dict[str, Any]  # param -> value
Files = dict[str, tuple[Stat, str]]  # path -> (identity of the file, sha256)

# Bytes. A larger file counts as changed if its identity has: reading a corpus of 100 GB whenever a
# stage starts would take minutes.
_LARGE = 1 << 28

_at_start: "Inputs | None" = None


def remember() -> None:
    """Read the inputs of the stage that this process runs: `python -m stages.NAME`.

    Must be called before the stage's sources are imported.
    """
    global _at_start
    name = running_stage()
    is_main = os.environ.get("RANK", "0") == "0"  # of several processes, one checks for all
    if sys.argv[0] == "-m" and name and is_main:
        _at_start = Inputs(name, Path.cwd())


def check(strict: bool = False) -> None:
    """Raise UserError if an input has changed since `remember`; do nothing without `remember`.

    strict: also if a file was written, although its content is the same as before: it may have been
    different when the stage read it.
    """
    if _at_start:
        _at_start.check(strict)


def exit_after_check() -> NoReturn:
    """End the process at once, with exit status 0. To be called right after `check`.

    A regular exit takes PyTorch two seconds, during which no change would be detected.
    """
    os._exit(0)


class Inputs:
    def __init__(self, stage: str, root: Path):
        """The params and deps of a stage in root/dvc.yaml, as they are now."""
        self._stage, self._root = stage, root
        self._values = self._read_values()
        self._ignored = _read_ignored(root / ".dvcignore")
        self._files = self._read_files(known={})

    def check(self, strict: bool = False) -> None:
        """Raise UserError with the inputs that have changed since they were read, if any."""
        values, files = self._read_values(), self._read_files(known=self._files)
        identity = slice(None) if strict else slice(1, None)
        hashes = {path: found[identity] for path, found in files.items()}
        before = {path: found[identity] for path, found in self._files.items()}
        changed = [
            f"{name} in params.yaml ({_show(self._values.get(name))} -> {_show(values.get(name))})"
            for name in _differing(self._values, values)
        ]
        changed += _differing(before, hashes)
        if changed:
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise UserError(
                f"{', '.join(changed[:3])}{more} changed while {self._stage} was running, so its"
                " result is not recorded: undo the change, or keep it, and run the same command"
                " again"
            )

    def _read_values(self) -> Values:
        """The params of the stage, `section.key` -> value, as they are in the YAML file."""
        names = _stage(self._root, self._stage).get("params", [])
        tree = _load(self._root / "params.yaml", strict_yaml.load)
        values: Values = {}
        for name in names:
            section, _, key = name.partition(".")
            found = tree.get(section) if isinstance(tree, dict) else None
            if key:
                values[name] = found.get(key) if isinstance(found, dict) else None
            elif isinstance(found, dict):
                values |= {f"{section}.{key}": value for key, value in found.items()}
            else:
                values[section] = found
        return values

    def _read_files(self, known: Files) -> Files:
        """The files in the stage's deps. If the inode, size and times of a file are the same as in
        `known`, its content is not read again."""
        found: Files = {}
        for dep in _stage(self._root, self._stage).get("deps", []):
            path = self._root / self._interpolate(str(dep))
            for file in _files(path):
                name = file.relative_to(self._root).as_posix()
                if self._ignored.match_file(name):
                    continue
                try:
                    stat = _identity(file)
                    same = name in known and known[name][0] == stat
                    found[name] = (stat, known[name][1] if same else _content(file, stat))
                except OSError:
                    continue  # just removed; the stage reports a missing file
        return found

    def _interpolate(self, dep: str) -> str:
        """A dep in which each `${section.key}` is replaced by the value it had at the start."""
        return re.sub(r"\$\{([\w.]+)\}", lambda m: str(self._values.get(m[1], m[0])), dep)


def _stage(root: Path, name: str) -> dict[str, Any]:
    tree = _load(root / "dvc.yaml", yaml.safe_load)
    stages = tree.get("stages") if isinstance(tree, dict) else None
    stage = stages.get(name) if isinstance(stages, dict) else None
    return stage if isinstance(stage, dict) else {}


def _load(path: Path, load: Callable[[str], Any]) -> Any:
    """Load a YAML file. Returns None if that fails; the stage itself reports what is wrong."""
    try:
        return load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, OverflowError, RecursionError, yaml.YAMLError):
        return None


def _read_ignored(path: Path) -> GitIgnoreSpec:
    """The files that DVC ignores: Python, editors and other tools may write them at any time."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return GitIgnoreSpec.from_lines(["__pycache__/", "*.pyc", *lines])


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path] if path.is_file() else []
    found = []
    for folder, _, names in os.walk(path):
        found += [Path(folder, name) for name in names if Path(folder, name).is_file()]
    return found


def _identity(path: Path) -> Stat:
    stat = path.stat()
    return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


def _content(path: Path, stat: Stat) -> str:
    """What identifies the content of a file: its sha256 or, if it is large, its identity."""
    if stat[2] > _LARGE:
        return repr(stat)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _differing(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The names whose values differ; 1, 1.0 and true count as different."""
    return sorted(
        name
        for name in before.keys() | now.keys()
        if name not in before or name not in now or repr(before[name]) != repr(now[name])
    )


def _show(value: Any) -> str:
    return repr(value)[:40]
