"""The results of earlier stage executions, read directly from DVC's lock files and cache.

DVC's commands restore one revision at a time, and nothing from the run cache. This module therefore
reads the lock files itself (dvc.lock in the workspace, in every commit and in every experiment, and
the entries of the run cache) and copies files from the cache by their MD5. It verifies each MD5,
because DVC does not: it assumes that files in its cache are intact because they are read-only.
"""

import contextlib
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from folio import commands, files
from folio.errors import UserError

_MD5 = re.compile(r"[0-9a-f]{32}(\.dir)?")
FETCH = "`dvc fetch --all-commits`"
# For git, before --all: without DVC's notes on the last `dvc exp run` and `dvc exp apply`, which
# keep an experiment that was removed, and what was in the workspace before.
NO_NOTES = ("--exclude=refs/exps/exec/*", "--exclude=refs/exps/apply/*")


@dataclass(frozen=True)
class Entry:
    """An execution of a stage: its dependencies and outputs, as path -> MD5."""

    deps: dict[str, str]
    outs: dict[str, str]
    listed: bool  # in a lock file, of the workspace or a commit; otherwise only in the run cache


class CacheError(UserError):
    """DVC's cache does not contain a file, or contains a damaged copy of it."""

    def __init__(self, state: str, path: str, hint: str):
        super().__init__(f"{state} in DVC's cache: {path} ({hint})")
        self.state, self.path, self.hint = state, path, hint

    def of(self, run: str) -> "CacheError":
        """The same error, with the name of the run that the file belongs to."""
        return CacheError(self.state, f"{self.path} of {run}", self.hint)


class DvcCache:
    """The cache of the DVC project at `root`. It is empty if there is no DVC project."""

    def __init__(self, root: Path):
        """Raises UserError if DVC fails."""
        self._root = root
        folder = ".dvc/cache"
        if (root / ".dvc").is_dir():
            folder = commands.dvc("cache", "dir", root=root).strip()
        self.folder = root / folder

    def entries(self) -> list[Entry]:
        """Every distinct execution of a stage, whether it ran here or was fetched with git.

        Those in the workspace's lock file come first, then those in commits, newest first, then
        those that are only in the run cache, newest first. Raises UserError if git fails, or if the
        workspace's lock file is damaged.
        """
        stages = [(stage, True) for lock in self._locks() for stage in _stages(lock)]
        stages += [(stage, False) for stage in self._run_cache()]
        distinct: dict[str, Entry] = {}
        for stage, listed in stages:
            entry = Entry(_hashes(stage.get("deps")), _hashes(stage.get("outs")), listed)
            distinct.setdefault(json.dumps([entry.deps, entry.outs], sort_keys=True), entry)
        return list(distinct.values())

    def outs(self, commit: str) -> dict[str, str]:
        """The outputs of all stages in a commit, as path -> MD5."""
        listed = commands.git("ls-tree", commit, "./dvc.lock", root=self._root).split()
        return _outs(self._committed(listed[2])) if listed else {}

    def read(self, md5: str, path: str = "a file") -> bytes | None:
        """The content of a file, or None if it is not in the cache.

        path: the path in the workspace. Raises CacheError, with that path, if the file is damaged.
        """
        cached = self._path(md5)
        if not cached.is_file():
            return None
        if not _is_intact(cached, md5):
            raise self._damaged(path, cached)
        return cached.read_bytes()

    def load(self, path: str, md5: str) -> bytes:
        """The content of a file in the cache or workspace. Raises CacheError if neither has it."""
        return self._find(path, md5).read_bytes()

    def expand(self, outs: dict[str, str]) -> dict[str, str]:
        """Replace each folder with its files. Raises CacheError if that is not possible."""
        found = {}
        for path, md5 in outs.items():
            if not md5.endswith(".dir"):
                found[path] = md5
                continue
            listing = self.read(md5, path)
            if listing is None:
                raise _missing(path)
            found |= {f"{path}/{f['relpath']}": f["md5"] for f in json.loads(listing)}
        return found

    def copy(self, outs: dict[str, str], folder: Path) -> None:
        """Copy outputs to their paths under a folder.

        If a file is missing or damaged in the cache, the file in the workspace is copied if it has
        the same content. Otherwise raises CacheError.
        """
        for path, md5 in self.expand(outs).items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self._find(path, md5), folder / path)

    def size(self, path: str, md5: str) -> int | None:
        """The size of a file in bytes, or None if neither the cache nor the workspace has it."""
        cached = self._path(md5)
        if cached.is_file():
            return cached.stat().st_size
        workspace = self._root / path
        return workspace.stat().st_size if _is_intact(workspace, md5) else None

    def _find(self, path: str, md5: str) -> Path:
        """An intact copy of a file, in the cache or in the workspace."""
        cached = self._path(md5)
        for copy in (cached, self._root / path):
            if _is_intact(copy, md5):
                return copy
        if cached.exists():
            raise self._damaged(path, cached)
        raise _missing(path)

    def _damaged(self, path: str, cached: Path) -> CacheError:
        file = cached.relative_to(self._root) if cached.is_relative_to(self._root) else cached
        remove = f"`rm -f {shlex.quote(str(file))}`"
        return CacheError("damaged", path, f"{remove}, then {FETCH} restores it from DVC's remote")

    def _path(self, md5: str) -> Path:
        return self.folder / "files/md5" / md5[:2] / md5[2:]

    def _locks(self) -> Iterator[dict[str, Any]]:
        """dvc.lock in the workspace and in the commits of all branches and experiments, parsed."""
        workspace = self._root / "dvc.lock"
        if workspace.exists():
            if problem := lock_problem(workspace):
                raise UserError(problem)
            yield _parse(workspace.read_text(encoding="utf-8", errors="replace"))
        words = ["rev-list", "--objects", *NO_NOTES, "--all", "--full-history", "--", "dvc.lock"]
        with contextlib.suppress(commands.NoCommitError):  # other branches may have commits
            commands.head(self._root)
        try:
            objects = commands.git(*words, root=self._root).splitlines()
        except commands.NoCommitError:
            return
        for listed in objects:  # commits, their folders, and each version of the file once
            sha, _, path = listed.partition(" ")
            if Path(path).name == "dvc.lock":
                yield self._committed(sha)

    def _committed(self, sha: str) -> dict[str, Any]:
        return _parse(commands.git("cat-file", "blob", sha, root=self._root))

    def run_cache_entries(self) -> list[tuple[Path, Entry]]:
        """The entries of the run cache, each with its file; invalid ones have no deps and outs."""
        return [
            (file, Entry(_hashes(stage.get("deps")), _hashes(stage.get("outs")), listed=False))
            for file in sorted(self.folder.glob("runs/??/*/*"))
            for stage in [_parse(file.read_text(encoding="utf-8", errors="replace"))]
        ]

    def _run_cache(self) -> list[dict[str, Any]]:
        """The entries of the run cache, newest first, parsed."""
        newest_first = sorted(
            ((file.stat().st_mtime_ns, file) for file in self.folder.glob("runs/??/*/*")),
            reverse=True,
        )
        return [
            _parse(file.read_text(encoding="utf-8", errors="replace")) for _, file in newest_first
        ]


def outs_in_workspace(root: Path) -> dict[str, str]:
    """The outputs in root/dvc.lock, as path -> MD5; {} if it does not exist or is damaged."""
    try:
        return _outs(_parse((root / "dvc.lock").read_text(encoding="utf-8", errors="replace")))
    except OSError:
        return {}


def lock_problem(path: Path) -> str | None:
    """What is wrong with a dvc.lock in the workspace, and its remedy; None if it is valid."""
    try:
        text = path.read_text(encoding="utf-8")
        stages = _load(text)["stages"]
        complete = all("cmd" in stage and _are_files(stage) for stage in stages.values())
        if complete and text.endswith("\n"):
            return None
        reason = "it is incomplete"
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        reason = f"not valid YAML{f' at line {mark.line + 1}' if mark else ''}"
    except OSError as error:
        reason = error.strerror or str(error)
    except (ValueError, RecursionError) as error:
        reason = str(error)
    except (TypeError, KeyError, AttributeError):
        reason = "no stages are listed"
    restore = "`git checkout HEAD -- dvc.lock`"
    try:
        commands.git("cat-file", "-e", "HEAD:./dvc.lock", root=path.parent)
    except UserError:
        restore = "`rm -r dvc.lock`"
    return f"dvc.lock is damaged ({reason}): {restore}, then `dvc repro`"


def _are_files(stage: dict[str, Any]) -> bool:
    """Whether all deps and outs of a stage have a path and an MD5."""
    entries = [*stage.get("deps", []), *stage.get("outs", [])]
    return all(_is_file(e.get("path"), e.get("md5")) and _MD5.fullmatch(e["md5"]) for e in entries)


def _missing(path: str) -> CacheError:
    return CacheError("not", path, f"{FETCH} may restore it")


def _parse(text: str) -> dict[str, Any]:
    """The content of a lock file, or {} if it is damaged or was deleted by the commit."""
    try:
        tree = _load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _load(text: str) -> Any:
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def _stages(lock: dict[str, Any]) -> list[dict[str, Any]]:
    stages = lock.get("stages")
    values = stages.values() if isinstance(stages, dict) else ()
    return [stage for stage in values if isinstance(stage, dict)]


def _outs(lock: dict[str, Any]) -> dict[str, str]:
    """The outputs of all stages in a lock file, as path -> MD5."""
    hashes = [_hashes(stage.get("outs")) for stage in _stages(lock)]
    return {path: md5 for outs in hashes for path, md5 in outs.items()}


def _is_intact(path: Path, md5: str) -> bool:
    """Whether a file has the given MD5."""
    try:
        return path.is_file() and files.md5(path) == md5.removesuffix(".dir")
    except OSError:  # it cannot be read, for example because of a bad sector
        return False


def _hashes(entries: Any) -> dict[str, str]:
    """The path -> MD5 of the files in a list of deps or outs. Skips invalid entries, which a
    damaged lock file may contain."""
    entries = [e for e in entries if isinstance(e, dict)] if isinstance(entries, list) else []
    return {e["path"]: e["md5"] for e in entries if _is_file(e.get("path"), e.get("md5"))}


def _is_file(path: Any, md5: Any) -> bool:
    return isinstance(path, str) and isinstance(md5, str)
