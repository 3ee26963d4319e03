"""Removes a run everywhere: from MLflow, from DVC's experiments, and its checkpoint.

Removing is two steps. `remove` moves the run to MLflow's trash, where `restore` finds it, and
`garbage` frees the disk. A removed run is recorded in a tag of MLflow's experiment, so that no
clone sends it again, also after its permanent deletion (queries.mark_removed).
"""

import contextlib
import json

from folio import commands
from folio.errors import UserError
from folio.run import lock_if_idle, remove_unfinished
from folio.tracking import cache_usage, queries, sizes
from folio.tracking.inventory import Holdings, Inventory
from folio.tracking.registry import CHAMPION, NAME
from folio.tracking.store import SYNC, Store

_MAX_NOTE = 4000  # characters; MLflow stores 5,000 in a tag of an experiment


def find(inventory: Inventory, name: str) -> Holdings:
    """The training run that `name` refers to: as for queries.find_run, or the name of the folder in
    .checkpoints. Removed runs are found too, unless another run matches.

    Raises UserError unless there is exactly one such run.
    """
    removed = [run for run in inventory.runs if inventory.is_removed(run.id)]
    others = [run for run in inventory.runs if run not in removed]
    for group in (others, removed):
        found = [run for run in group if name and name in _names(run)]
        if not found and len(name) > 3:
            found = [run for run in group if _mlflow_id(run).startswith(name)]
        if len(found) == 1:
            return found[0]
        if found:
            ids = ", ".join(_mlflow_id(run) or run.id for run in found)
            raise UserError(f"{len(found)} runs match {name!r}; use the id of one: {ids}")
    for experiment in inventory.usage.experiments:
        if name == experiment.name:
            shown = inventory.usage.runs_in(experiment.objects)
            names = ", ".join(run.name for run in inventory.runs if run.id in shown)
            reason = f"shows the model of {names}" if names else "has no model"
            raise UserError(f"the experiment {name} {reason}: `dvc exp remove {name}` removes it")
    raise UserError(f"there is no run {name!r}: `python -m folio disk` lists all runs")


def reason_to_keep(inventory: Inventory, found: Holdings) -> str | None:
    """Why a run must not be removed, with a hint; None if it can be removed."""
    if found.is_training:
        return "it is being trained: stop that first (Ctrl-C, or `dvc queue kill`)"
    for alias in found.aliases:
        if alias == f"{NAME}@{CHAMPION}":
            return "it is the champion: `python -m folio promote OTHER --force` replaces it"
        return f"its model is {alias}: remove that alias in MLflow first"
    if found.commit:
        commit = cache_usage.commit_with(inventory.root, found.commit)
        if not commit:
            return (
                "a queued experiment or a stash needs its files: `dvc queue status`, `git stash"
                " list`"
            )
        return f"commit {commit} needs its files; Delete on MLflow's page of runs only hides it"
    if found.is_in_workspace:
        return (
            "its files are in the workspace: `git checkout HEAD -- . && dvc checkout --force`"
            " restores the last commit"
        )
    if found.run and queries.status_of(found.run) == "RUNNING" and not found.checkpoint:
        return f"it is running elsewhere; if not, {SYNC} there or MLflow's page ends it"
    return None


def is_elsewhere(inventory: Inventory, found: Holdings) -> bool:
    """Whether only another clone may have a run's files: a team shares MLflow's server."""
    is_shared = inventory.store is not None and inventory.store.path is None
    return is_shared and found.id not in inventory.usage.outs and not found.checkpoint


def describe(inventory: Inventory, found: Holdings) -> list[str]:
    """What `remove` removes, a line per item; [] if everything is removed already."""
    lines = []
    if found.run and queries.status_of(found.run) != "DELETED":
        nested = f" and {len(found.nested)} nested" if found.nested else ""
        lines.append(f"MLflow run {found.run.info.run_id}{nested}")
    lines += [f"logged model {model.model_id}" for model in found.models]
    lines += [f"version {v.version} of the registered model {v.name}" for v in found.versions]
    lines += [f"DVC experiment {e.name} (commit {e.commit[:7]})" for e in found.experiments]
    if found.checkpoint:
        size = sizes.shown(found.in_checkpoint)
        path = found.checkpoint.relative_to(inventory.root)
        lines.append(f"checkpoint {path} ({size}, at once and for good)")
    if lines and is_elsewhere(inventory, found):
        lines.append("(this clone does not have its files: another one may need the run)")
    if not lines and not found.run and not inventory.is_removed(found.id):
        lines.append("its entries in DVC's run cache")
    return lines


def remove(inventory: Inventory, runs: list[Holdings]) -> None:
    """Remove runs. If it is interrupted, removing them again continues.

    Raises UserError if DVC fails, or if a run cannot be removed without a store. MLflow's run goes
    last, so that the run can be found by its name until everything else is removed.
    """
    store = inventory.store
    for found in runs:
        if store is None and found.id in inventory.usage.outs:
            raise UserError(f"{found.name} is not in MLflow yet: {SYNC}, then remove it")
    notes = {run.id: _note(run) for run in runs if run.experiments or run.id not in inventory.notes}
    if store:
        for folio_id, note in notes.items():
            queries.mark_removed(store, folio_id, note)
    _remove_experiments(inventory, runs)
    for found in runs:
        if found.checkpoint:
            with lock_if_idle(found.checkpoint) as is_idle:
                if not is_idle:
                    raise UserError(f"{found.name} is being trained: stop that first")
                with contextlib.suppress(FileNotFoundError):
                    remove_unfinished(found.checkpoint)
        if store:
            _remove_from_mlflow(store, found)


def restore(inventory: Inventory, found: Holdings) -> list[str]:
    """Undo `remove`, except for the checkpoint. Returns a line per restored item.

    The logged model cannot be restored in MLflow: sync sends it again from DVC's cache. Raises
    UserError if the run is not in MLflow's trash.
    """
    store, lines = inventory.store, []
    if store is None or found.run is None or queries.status_of(found.run) != "DELETED":
        raise UserError(f"{found.name} is not in MLflow's trash, so it cannot be restored")
    note = json.loads(inventory.notes.get(found.id) or "{}")
    for run in [*found.nested, found.run]:
        if queries.status_of(run) == "DELETED":
            store.client.restore_run(run.info.run_id)
            lines.append(f"MLflow run {run.info.run_id}")
    existing = {experiment.ref for experiment in inventory.usage.experiments}
    for ref, commit in note.get("experiments", {}).items():
        if ref in existing:  # there is a new experiment of that name
            continue
        name = ref.rpartition("/")[2]
        try:
            commands.git("update-ref", ref, commit, root=inventory.root)
            lines.append(f"DVC experiment {name}")
        except UserError:  # `git gc` prunes commits that no ref has had for two weeks
            lines.append(f"not the DVC experiment {name}: git has deleted its commit {commit[:7]}")
    if found.id in inventory.notes:
        queries.unmark_removed(store, found.id)
    return lines


def _names(found: Holdings) -> set[str]:
    checkpoint = found.checkpoint.name if found.checkpoint else ""
    names = {_mlflow_id(found), found.id, found.name, found.experiment, checkpoint}
    return names - {""}


def _mlflow_id(found: Holdings) -> str:
    return found.run.info.run_id if found.run else ""


def _note(found: Holdings) -> str:
    """What `restore` needs: the commits of the experiments, by ref."""
    note = json.dumps({"experiments": {e.ref: e.commit for e in found.experiments}})
    return note if len(note) <= _MAX_NOTE else "{}"


def _remove_experiments(inventory: Inventory, runs: list[Holdings]) -> None:
    """Remove the experiments that show the runs' models. One that shows two of them counts once."""
    names = [experiment.name for experiment in inventory.usage.experiments]
    found = {e.ref: e.name for run in runs for e in run.experiments}
    if found:  # a name may occur on several commits
        words = [name if names.count(name) == 1 else ref for ref, name in sorted(found.items())]
        commands.dvc("exp", "remove", *words, root=inventory.root)


def _remove_from_mlflow(store: Store, found: Holdings) -> None:
    client = store.client
    for version in found.versions:
        client.delete_model_version(version.name, str(version.version))
    for model in found.models:
        client.delete_logged_model(model.model_id)
    for run in [*found.nested, *([found.run] if found.run else [])]:
        if queries.status_of(run) != "DELETED":
            client.delete_run(run.info.run_id)
