"""`python -m folio promote`: make a run's model the champion if it is the best so far."""

from typing import TYPE_CHECKING, Annotated

import typer

from folio.cli.store import open_store
from folio.errors import UserError

if TYPE_CHECKING:
    from folio.tracking.queries import TrackedRun
    from folio.tracking.store import Store


def promote(
    run: Annotated[
        str | None,
        typer.Argument(help="Name or id of a run; by default, the one that trained models/gpt2."),
    ] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace the champion even if the champion's loss is lower."),
    ] = False,
) -> None:
    """Make a run's model the champion if its loss is lower.

    Registers the model in either case. The champion is the version with the alias `champion`,
    models:/folio@champion, which `make serve` serves. Losses are only compared if they were
    measured on the same validation text.

    Example: python -m folio promote
    """
    store = open_store()
    print(promote_run(store, run or _run_of_workspace(store), force))


def promote_run(store: "Store", name: str, force: bool = False) -> str:
    """Register a run's model, and make it the champion if its validation loss is lower.

    name: a name that `find_run` accepts. force: replace the champion even if the champion's loss is
    lower or cannot be compared. Returns a line that says what was done and why. Raises UserError if
    the run has not finished, or if its model is missing or damaged in MLflow.
    """
    from folio.tracking import registry
    from folio.tracking.queries import find_run

    run = find_run(store, name)
    if run.status != "FINISHED":
        raise UserError(f"{run.name} is {run.status}: only a finished run can be promoted")
    registry.verify(store, run.id)
    with store.exclusive():  # otherwise two processes could both replace the same champion
        version = registry.register(store, run)
        what = f"{run.name} (version {version}, validation loss {run.loss:.4f})"
        champion, number = registry.champion(store)
        if number == version:
            return f"{what} is already the champion"
        if champion and not force and (reason := reason_to_keep(champion, run)):
            return f"{what} is registered; version {number} remains the champion: {reason}"
        registry.set_champion(store, version)
    return f"{what} is now the champion: {_reason_to_replace(champion, number, run)}"


def reason_to_keep(champion: "TrackedRun", run: "TrackedRun") -> str | None:
    """Why the run does not replace the champion; None if it does."""
    ours, theirs = run.tags.get("held_out_digest"), champion.tags.get("held_out_digest")
    if ours is None or theirs != ours:
        return "the losses are not comparable, because the validation texts are different"
    if not run.loss < champion.loss:
        return f"its validation loss, {champion.loss:.4f} nats/token, is not higher"
    return None


def _reason_to_replace(champion: "TrackedRun | None", number: str, run: "TrackedRun") -> str:
    if champion is None:
        return f"the run of version {number} was deleted" if number else "there was none before"
    if reason := reason_to_keep(champion, run):
        return f"forced, although {reason}"
    difference = champion.loss - run.loss
    return f"{difference:.4f} nats/token lower than version {number} on the same validation text"


def _run_of_workspace(store: "Store") -> str:
    """The folio_id of the run that trained models/gpt2."""
    from folio.run import RECORD, TRAINING, read_record
    from folio.tracking import queries

    record = read_record(TRAINING / RECORD)
    run = queries.all_runs(store).get(record.id)
    if run is None or queries.status_of(run) == "DELETED":
        raise UserError(
            "the run that trained models/gpt2 is not in MLflow, or was deleted there: specify"
            " another run"
        )
    ours = record.tags.get("weights_sha256")
    if run.data.tags.get("weights_sha256", ours) != ours:
        raise UserError(
            "the run that trained models/gpt2 has different weights in MLflow, because another copy"
            " of this project finished it there: specify another run"
        )
    return record.id
