"""Sends the runs that are missing from MLflow: `python -m folio sync`, in the project's root.

Sends every training and evaluation run in the workspace and in DVC's cache (from all commits,
experiments and the run cache) that is missing from MLflow, or has lost files there. Then updates
the evaluation metrics of each training run, and sends the last state of interrupted training runs.
Updates the artifact URIs in a local store if the project was moved. Idempotent: a second sync
changes nothing.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

from mlflow.entities import LoggedModel
from mlflow.entities import Run as MlflowRun

from folio.errors import UserError
from folio.run import (
    EVALUATION,
    HISTORY,
    RECORD,
    TRAINING,
    UNFINISHED,
    Run,
    lock_if_idle,
    read_history,
    read_record,
)
from folio.tracking import integrity, logged_models, queries
from folio.tracking.integrity import Listings
from folio.tracking.queries import EVALUATION_ID, status_of
from folio.tracking.run_sources import RunSource, RunSources
from folio.tracking.store import STORE_ERRORS, SYNC, Store, explain, reconnect
from folio.tracking.writer import RunWriter, is_linked, is_same

# The loss curve: its artifact path in an evaluation, and in the training run.
PLOT, PARENT_PLOT = "evaluation/loss.png", "training/loss.png"


def run(uri: str | None, root: Path) -> list[str]:
    """Bring the MLflow store up to date with the project at `root`.

    Returns a message for each run that was sent or is incomplete in the cache. Raises UserError if
    MLflow fails.
    """
    messages: list[str] = []
    try:
        reconnect(lambda: _sync(uri, root, messages))
    except STORE_ERRORS as problem:
        text = explain(problem)
        later = "" if SYNC in text else "; sync again later"
        raise UserError(f"MLflow failed: {text}{later}") from None
    return messages


def _sync(uri: str | None, root: Path, messages: list[str]) -> None:
    """Bring the MLflow store up to date, and append the messages to `messages`."""
    store = Store(uri, repair=True)
    synchronization = _Synchronization(store, root, messages)
    synchronization.send_runs()
    synchronization.update_training_runs()
    for folder in _unfinished(root):
        if message := _send_unfinished(store, synchronization.writer, folder):
            messages.append(message)


def runs_with_lost_files(store: Store, root: Path) -> list[str]:
    """The names of the finished runs some of whose files are missing or damaged in MLflow."""
    sources, runs, listings = RunSources(root), queries.all_runs(store), Listings(store)
    training, evaluations = sources.find(TRAINING), sources.find(EVALUATION)
    complete, damaged = integrity.check_models(store)
    lost = integrity.incomplete_runs(runs, training + evaluations, sources, listings, complete)
    for source in evaluations:
        parent = runs.get(source.record.parent or "")
        if parent and source.record.id in runs and source.record.id not in lost:
            has_plot = any(PLOT in version for version in sources.artifacts(source))
            if has_plot and not listings.of(parent).has(PARENT_PLOT):
                lost.add(source.record.parent or "")
    return sorted(
        run.info.run_name
        for folio_id, run in runs.items()
        if status_of(run) != "DELETED" and (folio_id in lost or run.info.run_id in damaged)
    )


class _Synchronization:
    """Sends the runs in `root` to a store. Appends a line per run that was sent to `messages`."""

    def __init__(self, store: Store, root: Path, messages: list[str]):
        self.writer = RunWriter(store)
        self._store = store
        self._sources = RunSources(root)
        self.messages = self._sources.messages = messages
        self._runs = queries.all_runs(store)
        self._removed = queries.removed(store)
        self._training = self._sources.find(TRAINING)
        self._evaluations = self._sources.find(EVALUATION)
        self._current = self._sources.in_workspace(EVALUATION)
        self._listings = Listings(store)
        self._sent: set[str] = set()  # folio_ids

    def send_runs(self) -> None:
        """Send the runs that are missing from MLflow or have lost files there."""
        found = self._training + self._evaluations  # evaluations are nested under training runs
        complete, _ = integrity.check_models(self._store)
        complete -= {id for id, model in self._models().items() if not model.metrics}
        lost = integrity.incomplete_runs(self._runs, found, self._sources, self._listings, complete)
        for source in found:
            status = self._status(source.record.id)
            if status == "DELETED" or (status == "FINISHED" and source.record.id not in lost):
                continue
            if source.record.parent and self._status(source.record.parent) in ("DELETED", ""):
                continue  # the user deleted the training run, or another message reports it
            try:
                self._send(source)
            except UserError as problem:  # a damaged file; the other runs are still sent
                self.messages.append(str(problem))
            else:
                again = " again: parts were missing from MLflow" if status == "FINISHED" else ""
                self.messages.append(f"sent {source.record.name}{again}")

    def update_training_runs(self) -> None:
        """Make each training run show the metrics of its current evaluation.

        The current evaluation is the one in the workspace if it belongs to that training run.
        Otherwise it is the one that MLflow already shows, or the first one if it shows none. In
        that case, evaluations that lock files list take precedence over all others.
        """
        evaluations: dict[str, list[RunSource]] = {}
        for source in self._evaluations:
            if source.record.parent and self._status(source.record.id) == "FINISHED":
                evaluations.setdefault(source.record.parent, []).append(source)
        models = self._models()
        for folio_id, candidates in evaluations.items():
            if self._status(folio_id) in ("DELETED", ""):
                continue
            training = self._runs[folio_id]
            try:
                current = self._choose(training, candidates)
                model = models.get(training.info.run_id)
                if current is None or self._shows(training, model, current):
                    continue
                with tempfile.TemporaryDirectory(prefix="folio-") as folder:
                    self.writer.update_parent(self._sources.read(current, Path(folder)))
            except UserError as problem:
                self.messages.append(str(problem))
                continue
            if not self._sent & {folio_id, current.record.id}:
                name = training.info.run_name
                self.messages.append(f"updated the evaluation metrics of {name}")

    def _send(self, source: RunSource) -> None:
        with tempfile.TemporaryDirectory(prefix="folio-") as folder:
            self.writer.send(self._sources.read(source, Path(folder)), "FINISHED")
        sent = queries.find(self._store, source.record.id)
        assert sent
        self._listings.forget(sent)
        self._runs[source.record.id] = sent
        self._sent.add(source.record.id)

    def _models(self) -> dict[str, LoggedModel]:
        """The completely logged model of each run, by the run's MLflow id."""
        models = logged_models.all_models(self._store)
        return {model.source_run_id or "": model for model in models if model.status == "READY"}

    def _status(self, folio_id: str) -> str:
        """The status of a run in MLflow; DELETED if it was removed, "" if it is missing there."""
        run = self._runs.get(folio_id)
        if run is None:
            return "DELETED" if folio_id in self._removed else ""
        return status_of(run)

    def _choose(self, training: MlflowRun, candidates: list[RunSource]) -> RunSource | None:
        """The current evaluation of a training run; None if it is missing from MLflow."""
        by_id = {source.record.id: source for source in candidates}
        if self._current and self._current.parent == candidates[0].record.parent:
            return by_id.get(self._current.id)
        candidates = [source for source in candidates if source.listed] or candidates
        shown = by_id.get(training.data.tags.get(EVALUATION_ID, ""))
        return shown if shown in candidates else candidates[0]

    def _shows(self, training: MlflowRun, model: LoggedModel | None, source: RunSource) -> bool:
        """Whether a training run and its model show the metrics of an evaluation, and the run its
        plot."""
        if training.data.tags.get(EVALUATION_ID) != source.record.id:
            return False
        logged = training.data.metrics
        linked = logged_models.linked_metrics(model) if model else logged
        for name, value in self._sources.metrics(source).items():
            key = f"evaluate/{name}"
            if key not in logged or not is_same(logged[key], value):
                return False
            if not is_linked(linked, key, value):
                return False
        artifacts = self._listings.of(training)
        return any(
            PLOT not in version or artifacts.has(PARENT_PLOT, *version[PLOT])
            for version in self._sources.artifacts(source)
        )


def _unfinished(root: Path) -> list[Path]:
    """The folders of unfinished training runs."""
    return sorted(path.parent for path in (root / UNFINISHED).glob(f"*/{RECORD}"))


def _send_unfinished(store: Store, writer: RunWriter, folder: Path) -> str:
    """Send an interrupted training run, and return a message; "" if there is nothing to send."""
    with lock_if_idle(folder) as idle:
        if not idle or not (folder / RECORD).exists():
            return ""  # its trainer sends it, or evaluate has just removed the folder
        try:
            record, path = read_record(folder / RECORD), folder / HISTORY
            history = read_history(path) if path.exists() else []
        except UserError as problem:  # a damaged file
            return str(problem)
        if not queries.is_outdated(store, record, history):
            return ""
        ended = history[-1]["time"] if history else record.started
        run = Run(record=replace(record, ended=ended), history=history)
        writer.send(run, "KILLED", "interrupted")
        return f"sent {record.name}, interrupted after step {history[-1]['step'] if history else 0}"
