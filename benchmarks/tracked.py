"""The runs in MLflow stores, read only, and which of them were trained with given params.

A store may be a copy from another machine, or belong to another project: nothing is written to it.
"""

import contextlib
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import sqlalchemy

from folio import params, sections
from folio.cli.store import tracking_uri
from folio.errors import UserError
from folio.sweeps.space import SEED
from folio.tracking import failures, local_store, queries
from folio.tracking.queries import TrackedRun
from folio.tracking.store import EXPERIMENT, STORE_ERRORS, Store

FRACTION = "prepare.training_fraction"
# What trained the runs of older versions, which do not have these params.
OLDER = {
    "tie_unseen_tokens": "False",
    "unseen_probability": "0.0",
    "distill_from": "none",
    "input_noise": "0.0",
    "optimizer": "adamw",
    "factored_embedding": "False",
    "fp8_head": "False",
    "keep": "best",
    "overfit_batches": "None",
}
_DATABASES = ("postgresql", "mysql", "mssql")


class ReadStore(Store):
    """An existing store that is only read: of a SQLite file, a temporary copy."""

    def __init__(self, uri: str):
        """Raises UserError if there is no such store, if it does not respond, or if it does not
        have Folio's experiment."""
        shown = failures.without_password(uri)
        self.uri, self.path = uri, local_store.path_of(uri)
        if self.path:
            self._folder = tempfile.TemporaryDirectory()
            self.uri = f"sqlite:///{_copy(self.path, Path(self._folder.name))}"
        elif uri.startswith(("http://", "https://")) or uri.startswith(_DATABASES):
            failures.check_uri(uri)
        else:
            file = f": use sqlite:///{uri}" if Path(uri).is_file() else f": use {failures.URIS}"
            raise UserError(f"{shown} is not the URI of an MLflow store{file}")
        with reading(self.uri, shown):
            if not uri.startswith("http"):  # MLflow would create its tables
                engine = sqlalchemy.create_engine(self.uri)
                has_tables = sqlalchemy.inspect(engine).has_table("experiments")
                engine.dispose()
                if not has_tables:
                    raise UserError(f"{shown} is not an MLflow store: it has no experiments")
            self.client = mlflow.MlflowClient(self.uri)
            experiment = self.client.get_experiment_by_name(EXPERIMENT)
        if experiment is None:
            raise UserError(
                f"{shown} has no experiment {EXPERIMENT}: Folio has not used this store"
            )
        self.experiment_id = experiment.experiment_id


def _copy(path: Path, folder: Path) -> Path:
    """Copy a SQLite file, which may be in use, to a folder. Raises UserError if it is not one."""
    if not path.is_file():
        raise UserError(f"there is no MLflow store {path}")
    copy = folder / "mlflow.db"
    try:
        with (
            contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as source,
            contextlib.closing(sqlite3.connect(copy)) as target,
        ):
            source.backup(target)
    except sqlite3.Error as problem:
        raise UserError(f"{path} cannot be read as an MLflow store: {problem}") from None
    return copy


@contextlib.contextmanager
def reading(uri: str, shown: str) -> Iterator[None]:
    """Raise UserError for a failure of the store at `uri` in the block."""
    try:
        yield
    except STORE_ERRORS as problem:
        if local_store.path_of(uri):  # the hints of `explain` are for the project's own store
            text = f"{shown} cannot be read: {failures.first_line(problem)}"
        else:
            text = f"MLflow failed: {failures.explain(problem, uri)}"
        raise UserError(text) from None


def open_stores(uris: list[str] | None) -> list[Store]:
    """Existing stores. None: the project's, as `python -m folio compare` uses it."""
    if uris is None:
        return [Store.existing(tracking_uri())]
    return [ReadStore(uri) for uri in uris]


def list_runs(stores: list[Store]) -> list[tuple[TrackedRun, Store]]:
    """The training runs in all of the stores, newest first, each with its store."""
    found = []
    for store in stores:
        with reading(store.uri, failures.without_password(store.uri)):
            found += [(run, store) for run in queries.list_runs(store)]
    return sorted(found, key=lambda each: -each[0].started)


def resolve(settings: dict[str, Any]) -> dict[str, Any]:
    """All params, {"train.steps": 2400, ...}, of params.yaml with some settings applied to it."""
    tree = params.read(params.FILE)
    for name, value in settings.items():
        section, key = name.split(".")
        if isinstance(tree.get(section), dict):  # otherwise sections.check reports it
            tree[section][key] = value
    return params.flatten(**sections.check(tree, str(params.FILE)))


def has_params(run: TrackedRun, values: dict[str, Any], any_seed: bool = False) -> bool:
    """Whether a run was trained with these params. values: all params, as from `resolve`.

    Params without an effect are not compared, and those that an older version did not have only
    if its runs were trained with a certain value.
    """
    unused = {SEED} if any_seed else set()
    if values["train.optimizer"] == "adamw":
        unused |= {"train.muon_learning_rate", "train.muon_weight_decay"}
    if values["train.distill_from"] == "none":
        unused.add("train.distill_weight")
    for name, value in values.items():
        section, key = name.split(".")
        if section not in ("model", "train") or name in unused:
            continue
        if run.params.get(name, OLDER.get(key, str(value))) != str(value):
            return False
    # The neutral values of the last three are not recorded (stages/prepare.py,
    # folio/training/outputs.py).
    recorded = {"corpus": values["prepare.corpus"]}
    if values[FRACTION] != 1:
        recorded["training_fraction"] = values[FRACTION]
    if values["prepare.segmentations"]:
        recorded |= {key: values[f"prepare.{key}"] for key in ("segmentations", "bpe_dropout")}
    facts = ("corpus", "training_fraction", "segmentations", "bpe_dropout")
    expected = {key: str(recorded[key]) if key in recorded else None for key in facts}
    return all(run.params.get(f"data.{key}") == value for key, value in expected.items())
