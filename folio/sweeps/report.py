"""The report of a sweep, based on MLflow's data: a table, a plot, and each param's importance."""

import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from folio import files
from folio.errors import UserError
from folio.run import RECORD, TRAINING, kept, parse_record, project_root
from folio.sweeps import importance, markdown, parallel_coordinates
from folio.sweeps.plan import Plan
from folio.sweeps.space import SEED, Trial, format_trial, format_value
from folio.tracking import sync
from folio.tracking.dvc_cache import DvcCache
from folio.tracking.queries import list_runs
from folio.tracking.store import STORE_ERRORS, Store, explain


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    experiment: str
    trial: Trial  # the params that the sweep varies
    loss: float  # the validation loss of the model in nats/token
    step: int  # the step of that loss
    seconds: float  # the duration of the MLflow run
    run: str  # the name of the MLflow run


def write_report(plan: Plan, uri: str | None) -> Path:
    """Write report.md and its plot to the sweep's folder. Returns the path of report.md.

    uri: the URI of the MLflow store. Runs that are missing from the store are sent first. Raises
    UserError if MLflow fails.
    """
    sync.run(uri, project_root())
    try:
        results = find_results(plan, Store(uri))
    except STORE_ERRORS as error:
        hint = f"`python -m folio sweep --report {plan.name}` tries again"
        raise UserError(f"MLflow failed: {explain(error)}; {hint}") from None
    text = format_report(plan, results)
    if len(results) > 1 and results[0].trial:
        plot = plan.folder / "parallel_coordinates.png"
        parallel_coordinates.draw(_trials(results), _losses(results), plot)
        text += f"\n![Params and validation loss of each trial]({plot.name})\n"
    path = plan.folder / "report.md"
    files.write_text(path, text)
    return path


def find_results(plan: Plan, store: Store) -> list[TrialResult]:
    """The results of the trials that have finished and are in MLflow, best first.

    If a model was trained with the same params before, DVC restores it from its cache, and the
    MLflow run has the name of another experiment. So runs are looked up by the id in the files of
    the experiment.
    """
    cache, path = DvcCache(Path.cwd()), TRAINING / RECORD
    runs = {run.folio_id: run for run in list_runs(store)}
    results = []
    for experiment, commit in plan.finished().items():
        content = cache.read(cache.outs(commit).get(path.as_posix(), ""))
        run = runs.get(parse_record(content, path).id) if content else None
        if run and run.ended and math.isfinite(run.loss):
            result = TrialResult(
                experiment=experiment,
                trial=plan.varied(experiment),
                loss=run.loss,
                step=int(kept(run.metrics)[1]),
                seconds=(run.ended - run.started) / 1000,
                run=run.name,
            )
            results.append(result)
    return sorted(results, key=lambda result: result.loss)


def format_report(plan: Plan, results: list[TrialResult]) -> str:
    """The report in Markdown, without the plot."""
    parts = [
        f"# Sweep {plan.name}",
        f"Finished trials: {len(results)} of {len(plan.trials)}, starting from commit"
        f" {plan.baseline[:7]}. The lowest validation loss (nats/token) comes first.",
    ]
    if plan.base | plan.fixed:
        parts.append(f"All trials use `{format_trial(plan.base | plan.fixed)}`.")
    if not results:
        return "\n\n".join([*parts, "No trial has finished."]) + "\n"
    parts += [
        _result_table(results),
        f"`dvc exp apply {results[0].experiment}` restores the params and the model of the best"
        " trial in the workspace.",
    ]
    if len(results) > 1:
        parts += ["## Variation between seeds", _seed_section(results)]
    if len(results[0].trial) > 1:
        text = importance.section(_trials(results), _losses(results))
        parts += ["## Importance of each param", text]
    return "\n\n".join(parts) + "\n"


def _result_table(results: list[TrialResult]) -> str:
    varied = map(_key, results[0].trial)
    header = ["experiment", *varied, "val loss", "at step", "duration", "MLflow run"]
    rows = [
        [
            result.experiment,
            *map(format_value, result.trial.values()),
            f"{result.loss:.4f}",
            f"{result.step:,}",
            _duration(result.seconds),
            result.run.removeprefix(f"{result.experiment} "),
        ]
        for result in results
    ]
    return markdown.table(header, rows)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def _seed_section(results: list[TrialResult]) -> str:
    """The statistics over the seeds for each setting, if the sweep varies the seed."""
    if SEED not in results[0].trial:
        return (
            "Each setting was trained with a single seed. A sweep over `train.seed=1,2,3` shows how"
            " much the loss varies between seeds; smaller differences are not significant."
        )
    groups: dict[str, list[TrialResult]] = {}
    for result in results:
        groups.setdefault(str(_without_seed(result.trial)), []).append(result)
    settings = sorted(groups.values(), key=lambda group: statistics.mean(r.loss for r in group))
    header = [*map(_key, _without_seed(results[0].trial)), "seeds", "mean", "lowest", "highest"]
    rows = [
        [
            *map(format_value, _without_seed(group[0].trial).values()),
            str(len(group)),
            *(f"{of(r.loss for r in group):.4f}" for of in (statistics.mean, min, max)),
        ]
        for group in settings
    ]
    table = markdown.table(header, rows)
    repeated = [[r.loss for r in group] for group in settings if len(group) > 1]
    if not repeated:
        return table
    freedom = sum(len(losses) - 1 for losses in repeated)
    squares = sum(statistics.variance(losses) * (len(losses) - 1) for losses in repeated)
    degrees = "1 degree" if freedom == 1 else f"{freedom} degrees"
    return (
        f"{table}\n\nWithin a setting, the losses of different seeds have a standard deviation of"
        f" {(squares / freedom) ** 0.5:.4f} ({degrees} of freedom). A difference between"
        " two means of less than about twice that is not significant."
    )


def _trials(results: list[TrialResult]) -> list[Trial]:
    return [result.trial for result in results]


def _losses(results: list[TrialResult]) -> list[float]:
    return [result.loss for result in results]


def _without_seed(trial: Trial) -> Trial:
    return {name: value for name, value in trial.items() if name != SEED}


def _key(name: str) -> str:
    return name.partition(".")[2]
