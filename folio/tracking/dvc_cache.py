"""What DVC keeps of the stages that ran, read as plain files.

DVC's commands bring back one revision at a time, and nothing of the run cache; so the lock files
(dvc.lock here and in every commit and experiment, and the run cache's entries) are read directly,
and files copied out of the cache by their md5.
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
    """A stage that ran: what it read and what it wrote, as path -> md5."""

    deps: dict[str, str]
    outs: dict[str, str]


class DvcCache:
    def __init__(self, root: Path):
        """Of the DVC project at root; where there is none, it keeps nothing."""
        dvc = [sys.executable, "-m", "dvc", "cache", "dir"]
        found = subprocess.run(dvc, cwd=root, capture_output=True, text=True)
        self._root = root
        self._folder = root / (found.stdout.strip() or ".dvc/cache")

    def entries(self) -> list[Entry]:
        """Every stage that ran here or came from elsewhere by git, each once."""
        stages = [*self._runs()]
        for lock in self._locks():
            stages += (lock.get("stages") or {}).values()
        found = {}
        for stage in stages:
            entry = Entry(_hashes(stage.get("deps", [])), _hashes(stage.get("outs", [])))
            found[json.dumps([entry.deps, entry.outs], sort_keys=True)] = entry
        return list(found.values())

    def outs(self, commit: str) -> dict[str, str]:
        """What the pipeline wrote by a commit, as path -> md5."""
        stages = _parse(self._git("show", f"{commit}:./dvc.lock")).get("stages") or {}
        hashes = [_hashes(stage.get("outs", [])) for stage in stages.values()]
        return {path: md5 for outs in hashes for path, md5 in outs.items()}

    def read(self, md5: str) -> bytes | None:
        """The content of a file, or None where the cache does not have it."""
        path = self._path(md5)
        return path.read_bytes() if path.is_file() else None

    def copy(self, outs: dict[str, str], folder: Path) -> bool:
        """Put outs into a folder, by their paths; False where the cache lacks one of them."""
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
        """dvc.lock as it is here, and as it was in every commit of every branch and experiment."""
        here = self._root / "dvc.lock"
        if here.exists():
            yield _parse(here.read_text(encoding="utf-8", errors="replace"))
        log = ["log", "--all", "--full-history", "--format=%H", "--", "dvc.lock"]
        for commit in self._git(*log).split():
            yield _parse(self._git("show", f"{commit}:./dvc.lock"))

    def _runs(self) -> Iterator[dict[str, Any]]:
        for file in self._folder.glob("runs/??/*/*"):
            yield _parse(file.read_text(encoding="utf-8", errors="replace"))

    def _git(self, *arguments: str) -> str:
        command = ["git", "-C", str(self._root), *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout


def _parse(text: str) -> dict[str, Any]:
    """A lock file's content; {} where it is damaged or of a deletion."""
    try:
        tree = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError:
        return {}
    return tree if isinstance(tree, dict) else {}


def _hashes(entries: list[dict[str, Any]]) -> dict[str, str]:
    return {entry["path"]: entry["md5"] for entry in entries if "md5" in entry}
