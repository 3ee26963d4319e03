"""Where a model comes from: the record of its training run, from files or from MLflow."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from folio.errors import UserError
from folio.gpt import huggingface
from folio.run import RECORD, TRAINING, read_evaluation, read_record, read_training

if TYPE_CHECKING:
    from folio.tracking.queries import TrackedRun


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What is recorded about the training run of a model, with the names that MLflow shows."""

    params: dict[str, str]  # model.*, train.*, data.*, evaluate.*
    metrics: dict[str, float]  # best_val_loss, ...; of the evaluation: evaluate/...
    tags: dict[str, str]
    started: int  # ms since 1970
    ended: int | None


def of_model(name: str, uri: str | None) -> Origin | None:
    """The origin of a model in MLflow. name: as for registry.fetch. uri: of the store.

    None if the run that trained the model was deleted. Raises UserError if there is no such model.
    """
    from folio.tracking import registry  # here, because importing MLflow takes two seconds
    from folio.tracking.queries import list_runs
    from folio.tracking.store import Store

    store = Store.existing(uri)
    run_id = registry.source_run_id(store, name)
    found = [run for run in list_runs(store) if run.id == run_id]
    return _of_run(found[0]) if found else None


def _of_run(run: "TrackedRun") -> Origin:
    return Origin(
        params=run.params,
        metrics=run.metrics,
        tags=run.tags,
        started=run.started,
        ended=run.ended,
    )


def of_folder(folder: Path) -> Origin | None:
    """The origin of the model in a folder, from the files of the pipeline next to it.

    None if there is no record there, or if it describes other weights. Metrics whose files are
    missing or belong to another training run are left out.
    """
    folder = folder.absolute()
    try:
        record = read_record(folder.parent / TRAINING.name / RECORD)
        if record.tags.get("weights_sha256") != huggingface.weights_sha256(folder):
            return None
    except UserError:
        return None
    params, root = dict(record.params), folder.parent.parent
    metrics: dict[str, float] = {}
    with contextlib.suppress(UserError):
        metrics |= read_training(root).summary
    with contextlib.suppress(UserError):
        evaluation = read_evaluation(root)
        if evaluation.record.parent == record.id:
            params |= evaluation.record.params
            metrics |= evaluation.summary
    return Origin(
        params=params,
        metrics=metrics,
        tags=record.tags,
        started=record.started,
        ended=record.ended,
    )
