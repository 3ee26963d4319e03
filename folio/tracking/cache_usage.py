"""Which objects in DVC's cache are in use, and by what.

An object is a file or the list of the files in a folder, and its name is its MD5. The workspace,
commits, experiments and the entries of the run cache refer to objects. Lock files and .dvc files
are searched for MD5s rather than parsed, so an object that any of them mentions is in use, whatever
else the file contains.

`dvc gc` does not do this: it frees what only the run cache refers to, such as the model of a run
that was never committed, and what only a stash or another worktree refers to.
"""

import contextlib
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from folio import commands
from folio.run import EVALUATION, RECORD, TRAINING, Record
from folio.tracking.dvc_cache import NO_NOTES, CacheError, DvcCache, Entry
from folio.tracking.run_sources import RunSources

_MD5 = re.compile(r"\b[0-9a-f]{32}(?:\.dir)?\b")
_PATHS = ("*.dvc", "*dvc.lock")  # in all folders
_EXPERIMENT = re.compile(r"refs/exps/[0-9a-f]{2}/[0-9a-f]{38,}/(?P<name>[^/]+)")
_NOT_EXPERIMENTS = "--exclude=refs/exps/[0-9a-f][0-9a-f]/*"
# The refs whose earlier values, in their reflog, are in use too: git's stash and DVC's queue.
_STASHES = ("refs/stash", "refs/exps/stash", "refs/exps/celery/stash")

Objects = frozenset[str]  # MD5s; those of folders end in .dir


@dataclass(frozen=True)
class Experiment:
    ref: str
    name: str
    commit: str
    objects: Objects


@dataclass(frozen=True)
class CachedStage:
    """An entry of the run cache."""

    file: Path
    entry: Entry
    record: Record | None  # of the training or the evaluation that it restores
    is_readable: bool  # False if it has a record that is damaged in the cache
    objects: Objects


@dataclass
class CacheUsage:
    folder: Path  # DVC's cache
    files: dict[str, Path]  # the files of all objects in the cache, by MD5
    workspace: Objects  # this workspace and those of other worktrees
    commits: Objects  # branches, tags, stashes, everything except experiments
    experiments: list[Experiment]
    run_cache: list[CachedStage]
    training: dict[str, Record]  # by the MD5 of record.json
    evaluations: dict[str, Record]
    outs: dict[str, set[str]]  # the objects that a training run and its evaluations made
    unlisted: Objects = field(default_factory=frozenset)  # only in earlier commits of experiments

    def runs_in(self, objects: Objects) -> set[str]:
        """The folio_ids of the training runs whose records are among the objects."""
        parents = {self.evaluations[md5].parent or "" for md5 in objects & self.evaluations.keys()}
        return ({self.training[md5].id for md5 in objects & self.training.keys()} | parents) - {""}


def read(root: Path) -> CacheUsage:
    """The usage of the cache of the project at `root`.

    Raises UserError if git or DVC fails, or if the workspace's dvc.lock is damaged.
    """
    cache = DvcCache(root)
    sources = RunSources(root, cache)
    reader = _Reader(root, cache)
    records: dict[Path, dict[str, Record]] = {TRAINING: {}, EVALUATION: {}}
    outs = defaultdict[str, set[str]](set)
    for kind, found in records.items():
        path = (kind / RECORD).as_posix()
        for source in sources.find(kind):
            for version in source.versions:
                outs[source.record.parent or source.record.id] |= reader.expand(version.values())
                if path in version:
                    found[version[path]] = source.record
    commits = reader.in_commits(_NOT_EXPERIMENTS)
    experiments = reader.experiments()
    everything = reader.in_commits() if experiments else commits
    listed = commits.union(*(each.objects for each in experiments))
    known = records[TRAINING] | records[EVALUATION]
    return CacheUsage(
        folder=cache.folder,
        files=reader.files,
        workspace=reader.in_workspaces(),
        commits=commits,
        experiments=experiments,
        run_cache=[
            reader.cached_stage(file, entry, known) for file, entry in cache.run_cache_entries()
        ],
        training=records[TRAINING],
        evaluations=records[EVALUATION],
        outs=outs,
        unlisted=everything - listed,
    )


def commit_with(root: Path, md5: str) -> str:
    """The abbreviated hash of a commit, of a branch or tag, whose dvc.lock mentions an MD5; ""
    if none does."""
    words = (
        "log",
        *NO_NOTES,
        _NOT_EXPERIMENTS,
        "--all",
        f"-S{md5}",
        "-1",
        "--format=%h",
        "--",
        "dvc.lock",
    )
    try:
        return commands.git(*words, root=root).strip()
    except commands.NoCommitError:
        return ""


class _Reader:
    """Finds the objects that commits, workspaces and the run cache refer to."""

    def __init__(self, root: Path, cache: DvcCache):
        self._root, self._cache = root, cache
        self.files = {
            path.parent.name + path.name: path for path in cache.folder.glob("files/md5/??/*")
        }
        self._folders: dict[str, Objects] = {}

    def expand(self, texts: Iterable[str]) -> Objects:
        """The objects that texts mention, and those in the folders among them."""
        mentioned = frozenset(md5 for text in texts for md5 in _MD5.findall(text))
        return mentioned.union(*(self._files_in(md5) for md5 in mentioned if md5.endswith(".dir")))

    def in_commits(self, *exclude: str) -> Objects:
        """The objects that commits refer to. exclude: options of `git rev-list`."""
        try:
            commits = "\n".join(self._stashed())
            words = (
                "rev-list",
                "--objects",
                "--full-history",
                "--stdin",
                *NO_NOTES,
                *exclude,
                "--all",
            )
            listed = commands.git(*words, "--", *_PATHS, root=self._root, text=f"{commits}\n")
        except commands.NoCommitError:
            return frozenset()
        # Commits and folders have no path, or one that does not end like that of a lock file.
        blobs = [sha for sha, _, path in map(_parts, listed.splitlines()) if _is_lock(path)]
        if not blobs:
            return frozenset()
        words = ("cat-file", "--batch")
        return self.expand([commands.git(*words, root=self._root, text="\n".join(blobs) + "\n")])

    def experiments(self) -> list[Experiment]:
        words = ("for-each-ref", "--format=%(objectname) %(refname)", "refs/exps")
        try:
            refs = [
                line.split(" ", 1) for line in commands.git(*words, root=self._root).split("\n")
            ]
        except commands.NoCommitError:
            return []
        found = []
        for commit, ref in (ref for ref in refs if len(ref) == 2):
            if match := _EXPERIMENT.fullmatch(ref):
                found.append(Experiment(ref, match["name"], commit, self._locked(commit)))
        return found

    def in_workspaces(self) -> Objects:
        """The objects that the lock files and .dvc files in this and other worktrees refer to, and
        in their indexes."""
        texts = []
        for folder in self._worktrees():
            texts += _staged(folder)
            for path in _locks_in(folder):
                with contextlib.suppress(OSError):
                    texts.append(path.read_text(encoding="utf-8", errors="replace"))
        return self.expand(texts)

    def cached_stage(self, file: Path, entry: Entry, records: dict[str, Record]) -> CachedStage:
        texts = [*entry.outs.values(), *entry.deps.values()]
        places = [(kind / RECORD).as_posix() for kind in (TRAINING, EVALUATION)]
        md5 = next((entry.outs[place] for place in places if place in entry.outs), None)
        record = records.get(md5 or "")
        is_readable = md5 is None or record is not None or md5 not in self.files
        return CachedStage(file, entry, record, is_readable, self.expand(texts))

    def _files_in(self, md5: str) -> Objects:
        if md5 not in self._folders:
            try:
                content = self._cache.read(md5) or b""
            except CacheError:  # damaged, but every MD5 that can be read in it is in use
                content = self.files[md5].read_bytes()
            text = content.decode("utf-8", errors="replace")
            self._folders[md5] = frozenset(_MD5.findall(text))
        return self._folders[md5]

    def _locked(self, commit: str) -> Objects:
        listed = commands.git("ls-tree", commit, "./dvc.lock", root=self._root).split()
        blob = listed[2] if listed else ""
        return self.expand(
            [commands.git("cat-file", "blob", blob, root=self._root)] if blob else []
        )

    def _stashed(self) -> list[str]:
        """The commits of all entries of git's stash and of DVC's queue."""
        existing = commands.git("for-each-ref", "--format=%(refname)", *_STASHES, root=self._root)
        logs = [
            commands.git("log", "--walk-reflogs", "--format=%H", ref, "--", root=self._root)
            for ref in existing.split()
        ]
        return [sha for log in logs for sha in log.split()]

    def _worktrees(self) -> list[Path]:
        """The folders of the project in all git worktrees; this one is always among them."""
        try:
            prefix = commands.git("rev-parse", "--show-prefix", root=self._root).strip()
            listed = commands.git("worktree", "list", "--porcelain", root=self._root)
        except commands.NoCommitError:
            return [self._root]
        lines = [line for line in listed.splitlines() if line.startswith("worktree ")]
        others = [Path(line.removeprefix("worktree ")) / prefix for line in lines]
        return [self._root, *(path for path in others if path.is_dir())]


def _locks_in(folder: Path) -> Iterable[Path]:
    words = ("ls-files", "--cached", "--others", "--exclude-standard", "-z", "--", *_PATHS)
    try:
        names = commands.git(*words, root=folder).split("\0")
    except commands.NoCommitError:
        names = ["dvc.lock", *(path.name for path in folder.glob("*.dvc") if path.is_file())]
    return [folder / name for name in {*names, "dvc.lock"} if name]


def _staged(folder: Path) -> list[str]:
    """The lock files and .dvc files in the index of a worktree."""
    try:
        listed = commands.git("ls-files", "--stage", "-z", "--", *_PATHS, root=folder)
        blobs = [entry.split()[1] for entry in listed.split("\0") if entry]
        words, text = ("cat-file", "--batch"), "\n".join(blobs) + "\n"
        return [commands.git(*words, root=folder, text=text)] if blobs else []
    except commands.NoCommitError:
        return []


def _parts(line: str) -> tuple[str, str, str]:
    return line.partition(" ")


def _is_lock(path: str) -> bool:
    return path.endswith((".dvc", "dvc.lock"))
