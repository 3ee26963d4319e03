"""`python -m folio promote`: make a run's model the champion if it is the best one so far."""

from typing import TYPE_CHECKING, Annotated

import typer

from folio.cli.store import open_store
from folio.errors import UserError

if TYPE_CHECKING:
    from folio.tracking.queries import TrackedRun
    from folio.tracking.store import Store


def promote(
    run: Annotated[
        str | None, typer.Argument(help="Name or id of a run; by default that of models/gpt2.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Make it the champion whatever the losses are.")
    ] = False,
) -> None:
    """Make a run's model the champion if its loss is lower.

    Registers the model in any case. The champion is the version with the alias `champion`,
    models:/folio@champion, which `make serve` serves. Only validation losses on the same text are
    compared.

    Example: python -m folio promote
    """
    store = open_store()
    print(promote_run(store, run or _run_of_workspace(store), force))


def promote_run(store: "Store", name: str, force: bool = False) -> str:
    """Register a run's model, and make it the champion if its validation loss is lower.

    name: a run, as `find_run` takes it. force: make it the champion whatever the losses are.
    Returns a line that says what was done and why. Raises UserError if the training has not
    finished or has no model.
    """
    from folio.tracking import registry
    from folio.tracking.queries import find_run
    from folio.tracking.store import exclusive

    run = find_run(store, name)
    if run.status != "FINISHED":
        raise UserError(f"{run.name} is {run.status}: only a finished training can be promoted")
    with exclusive():  # otherwise two processes could both replace the same champion
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
        return "the losses are not comparable, because the validation texts are not the same"
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

    folio_id = read_record(TRAINING / RECORD).id
    if queries.statuses(store).get(folio_id, "DELETED") == "DELETED":
        raise UserError(
            "the run of models/gpt2 is not in MLflow, or was deleted there: name another run"
        )
    return folio_id
