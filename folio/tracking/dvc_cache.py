"""The results of earlier stage executions, read directly from DVC's lock files and cache.

DVC's commands restore one revision at a time, and nothing from the run cache. Therefore this module
reads the lock files itself (dvc.lock in the workspace, in every commit and in every experiment, and
the entries of the run cache) and copies files from the cache by their MD5.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Entry:
    """An execution of a stage: its dependencies and outputs, as path -> MD5."""

    deps: dict[str, str]
    outs: dict[str, str]


class DvcCache:
    """The cache of the DVC project at `root`. It is empty if there is no DVC project."""

    def __init__(self, root: Path):
        dvc = [sys.executable, "-m", "dvc", "cache", "dir"]
        process = subprocess.run(dvc, cwd=root, capture_output=True, text=True)
        self._root = root
        self._folder = root / (process.stdout.strip() or ".dvc/cache")

    def entries(self) -> list[Entry]:
        """Every distinct execution of a stage, whether it ran here or was fetched with git."""
        stages = [*self._run_cache()]
        for lock in self._locks():
            stages += (lock.get("stages") or {}).values()
        distinct = {}
        for stage in stages:
            entry = Entry(_hashes(stage.get("deps", [])), _hashes(stage.get("outs", [])))
            distinct[json.dumps([entry.deps, entry.outs], sort_keys=True)] = entry
        return list(distinct.values())

    def outs(self, commit: str) -> dict[str, str]:
        """The outputs of all stages in a commit, as path -> MD5."""
        stages = _parse(self._git("show", f"{commit}:./dvc.lock")).get("stages") or {}
        hashes = [_hashes(stage.get("outs", [])) for stage in stages.values()]
        return {path: md5 for outs in hashes for path, md5 in outs.items()}

    def read(self, md5: str) -> bytes | None:
        """The content of a file, or None if it is not in the cache."""
        path = self._path(md5)
        return path.read_bytes() if path.is_file() else None

    def copy(self, outs: dict[str, str], folder: Path) -> bool:
        """Copy outputs to their paths under a folder. Returns False if the cache misses a file."""
        for path, md5 in outs.items():
            files = {path: md5}
            if md5.endswith(".dir"):
                listing = self.read(md5)
                if listing is None:
                    return False
                files = {f"{path}/{f['relpath']}": f["md5"] for f in json.loads(listing)}
            for name, content in files.items():
                if not self._path(content).exists():
                    return False
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self._path(content), folder / name)
        return True

    def _path(self, md5: str) -> Path:
        return self._folder / "files/md5" / md5[:2] / md5[2:]

    def _locks(self) -> Iterator[dict[str, Any]]:
        """dvc.lock in the workspace and in the commits of all branches and experiments, parsed."""
        workspace = self._root / "dvc.lock"
        if workspace.exists():
            yield _parse(workspace.read_text(encoding="utf-8", errors="replace"))
        log = ["log", "--all", "--full-history", "--format=%H", "--", "dvc.lock"]
        for commit in self._git(*log).split():
            yield _parse(self._git("show", f"{commit}:./dvc.lock"))

    def _run_cache(self) -> Iterator[dict[str, Any]]:
        for file in self._folder.glob("runs/??/*/*"):
            yield _parse(file.read_text(encoding="utf-8", errors="replace"))

    def _git(self, *arguments: str) -> str:
        command = ["git", "-C", str(self._root), *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout


def _parse(text: str) -> dict[str, Any]:
    """The content of a lock file, or {} if it is damaged or was deleted by the commit."""
    try:
        tree = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError:
        return {}
    return tree if isinstance(tree, dict) else {}


def _hashes(entries: list[dict[str, Any]]) -> dict[str, str]:
    return {entry["path"]: entry["md5"] for entry in entries if "md5" in entry}
