"""The runs whose files are in DVC's cache or in the workspace."""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from folio import files
from folio.errors import UserError
from folio.run import (
    ARTIFACTS,
    EVALUATION,
    HISTORY,
    MODEL,
    RECORD,
    TRAINING,
    Record,
    Run,
    parse_metrics,
    parse_record,
    read_evaluation,
    read_record,
    read_training,
)
from folio.tracking.dvc_cache import FETCH, CacheError, DvcCache, Entry
from folio.tracking.writer import is_artifact

PREPARED = "data/prepared"
# The artifacts of a run whose files are in DVC's cache: file or folder -> folder in MLflow. In
# the cache, the folders contain only files of the run, whichever version of Folio wrote them.
_PLACES = {
    TRAINING: {
        "data/diagnostics": "data",
        "data/diagnostics.json": "data",
        TRAINING.as_posix(): "training",
    },
    EVALUATION: {EVALUATION.as_posix(): "evaluation"},
}
_READ = {TRAINING: read_training, EVALUATION: read_evaluation}

Files = dict[str, str]  # path -> MD5
Artifact = tuple[int | None, str | None]  # size and MD5; None if unknown


@dataclass
class RunSource:
    record: Record
    kind: Path  # TRAINING or EVALUATION
    listed: bool  # in a lock file; otherwise only in the run cache or the workspace
    # The files of the run. There are several versions if the report on the corpus was written
    # several times: each belongs to the run. There is none if the stage ran without DVC.
    versions: list[Files] = field(default_factory=list)


class RunSources:
    """Finds and restores runs. `messages` contains a line per missing or damaged file."""

    def __init__(self, root: Path, cache: DvcCache | None = None):
        self.messages: list[str] = []
        self._root, self._cache = root, cache or DvcCache(root)
        self._entries = self._cache.entries()

    def find(self, kind: Path) -> list[RunSource]:
        """The runs of a kind, TRAINING or EVALUATION, in the order of DvcCache.entries."""
        found: dict[str, RunSource] = {}
        missing = set()
        for entry in self._entries:
            md5 = entry.outs.get((kind / RECORD).as_posix())
            if md5 is None:
                continue  # another stage
            try:
                content = self._cache.read(md5, str(kind / RECORD))
                record = parse_record(content or b"", kind / RECORD)
            except CacheError as damaged:
                self._report(str(damaged))
            except UserError:
                if entry.listed:  # `dvc gc` removes what only the run cache refers to
                    missing.add(md5)
            else:
                source = found.setdefault(record.id, RunSource(record, kind, entry.listed))
                new = self._versions(entry, kind)
                source.versions += [files for files in new if files not in source.versions]
        if missing:
            path = kind / RECORD
            self._report(
                f"not in DVC's cache: {len(missing)} x {path}, listed in lock files"
                f" ({FETCH} may restore them)"
            )
        current = self.in_workspace(kind)
        if current and current.id not in found:
            found[current.id] = RunSource(current, kind, False)
        return list(found.values())

    def in_workspace(self, kind: Path) -> Record | None:
        """The record of the run of a kind whose files are in the workspace, if there is one."""
        path = self._root / kind / RECORD
        try:
            return read_record(path) if path.exists() else None
        except UserError as damaged:
            self._report(str(damaged))
            return None

    def history_md5(self, source: RunSource) -> str | None:
        """The MD5 of a training run's history; None for an evaluation."""
        path = (TRAINING / HISTORY).as_posix()
        if source.versions:
            return source.versions[0].get(path)
        file = self._root / path
        return files.md5(file) if source.kind == TRAINING and file.is_file() else None

    def read(self, source: RunSource, folder: Path) -> Run:
        """Read a run. Its files are copied into a folder, unless they are only in the workspace.

        Raises UserError if a file is missing or damaged.
        """
        problem = None
        for version in source.versions:
            try:
                self._cache.copy(version, folder)
            except CacheError as error:
                problem = problem or error
            else:
                places = _PLACES[source.kind].items()
                artifacts = [(folder / path, place) for path, place in places]
                return replace(_READ[source.kind](folder), files=artifacts)
        if problem:
            raise problem.of(source.record.name)
        return _READ[source.kind](self._root)

    def artifacts(self, source: RunSource) -> list[dict[str, Artifact]]:
        """The artifacts that a run should have in MLflow, by path, for each version of its files.

        Omits folders whose contents are unknown because they are not in DVC's cache.
        """
        if not source.versions:
            return [self._artifacts_in_workspace(source.kind)]
        found = []
        for version in source.versions:
            artifacts: dict[str, Artifact] = {}
            for path, md5 in self._expand(version).items():
                if artifact := _artifact_path(source.kind, path):
                    artifacts[artifact] = self._cache.size(path, md5), md5
            if _OLD_PLOT in artifacts:
                artifacts[_OLD_PLOT] = None, None
            found.append(artifacts)
        return found

    def metrics(self, source: RunSource) -> dict[str, float]:
        """The content of an evaluation's metrics.json. Raises UserError if it is damaged."""
        path = (source.kind / "metrics.json").as_posix()
        try:
            content = (
                self._cache.load(path, source.versions[0][path])
                if source.versions
                else (self._root / path).read_bytes()
            )
        except (OSError, KeyError):
            content = b""
        return parse_metrics(content, Path(path))

    def _versions(self, entry: Entry, kind: Path) -> list[Files]:
        """All versions of the files of the run that a stage execution produced."""
        own = _under((kind, MODEL), entry.outs)
        if kind != TRAINING:
            return [own]
        prepared = entry.deps.get(PREPARED)
        places = [Path(path) for path in _PLACES[TRAINING]]
        reports = [
            _under(places, e.outs) for e in self._entries if prepared == e.outs.get(PREPARED, "")
        ]
        return [own | report for report in reports or [{}]]

    def _artifacts_in_workspace(self, kind: Path) -> dict[str, Artifact]:
        found: dict[str, Artifact] = {}
        for path, place in ARTIFACTS[kind].items():
            file = self._root / path
            if file.is_file():
                found[f"{place}/{file.name}"] = file.stat().st_size, files.md5(file)
        return found

    def _expand(self, version: Files) -> Files:
        """The files of a version, except the model and folders that are not in the cache."""
        found: Files = {}
        for path, md5 in version.items():
            if path != MODEL.as_posix():
                with contextlib.suppress(CacheError):
                    found |= self._cache.expand({path: md5})
        return found

    def _report(self, message: str) -> None:
        if message not in self.messages:
            self.messages.append(message)


# Written by the train stage in an earlier version, and replaced in MLflow by the evaluate stage's.
_OLD_PLOT = "training/loss.png"


def _under(places: Iterable[Path], outs: Files) -> Files:
    """The outputs whose path is one of the places or below one of them."""
    return {
        path: md5
        for path, md5 in outs.items()
        if any(Path(path).is_relative_to(place) for place in places)
    }


def _artifact_path(kind: Path, path: str) -> str | None:
    """The path of a run's file among its artifacts in MLflow; None if it is not uploaded."""
    file = Path(path)
    for place, folder in _PLACES[kind].items():
        if file.is_relative_to(place) and is_artifact(file.name):
            inside = file.name if path == place else file.relative_to(place)
            return (folder / Path(inside)).as_posix()
    return None
