"""What a sweep found, from MLflow's data: a table, a picture, and which params mattered."""

import statistics
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from folio import files
from folio.errors import UserError
from folio.run import project_root
from folio.run import RECORD, TRAINING, parse_record
from folio.sweeps import parallel_coordinates, sweep
from folio.sweeps.space import Point, label
from folio.sweeps.sweep import Plan, table
from folio.tracking import sync
from folio.tracking.dvc_cache import DvcCache
from folio.tracking.queries import list_runs
from folio.tracking.store import STORE_ERRORS, Store, first_line

SEED = "train.seed"
ENOUGH = 10  # points from which on an importance is shown


@dataclass(frozen=True, kw_only=True)
class Result:
    """A point that is done."""

    experiment: str
    point: Point  # of it what the sweep varies
    loss: float  # the best held-out loss, nats a token
    step: int  # that it was at
    seconds: float  # of its MLflow run
    run: str  # MLflow's id


def write(plan: Plan, address: str | None) -> Path:
    """Write the report and its picture to the sweep's folder; returns the report's path.

    address: of the MLflow store, which is first sent what it lacks. Raises UserError where it is
    away.
    """
    sync.run(address, project_root())
    try:
        found = results(plan, Store(address))
    except STORE_ERRORS as problem:
        way_out = f"`python -m folio sweep --report {plan.name}` tries again"
        raise UserError(f"MLflow did not answer: {first_line(problem)}; {way_out}") from None
    text = report(plan, found)
    if len(found) > 1 and found[0].point:
        path = plan.folder / "parallel_coordinates.png"
        parallel_coordinates.draw(
            [each.point for each in found], [each.loss for each in found], path
        )
        text += f"\n![Params and held-out loss of each point]({path.name})\n"
    files.write_text(plan.folder / "report.md", text)
    return plan.folder / "report.md"


def results(plan: Plan, store: Store) -> list[Result]:
    """The points that are done and in MLflow, the best first.

    A point that had been trained before came out of DVC's cache: its run in MLflow bears another
    experiment's name, so runs are found by the id that each experiment's files hold.
    """
    cache, path = DvcCache(Path.cwd()), f"{TRAINING}/{RECORD}"
    runs = {run.folio_id: run for run in list_runs(store)}
    found = []
    for name, commit in sweep.finished(plan).items():
        content = cache.read(cache.outs(commit).get(path, ""))
        run = runs.get(parse_record(content, Path(path)).id) if content else None
        if run and run.ended and "best_val_loss" in run.metrics:
            result = Result(
                experiment=name,
                point=plan.varied(name),
                loss=run.loss,
                step=int(run.metrics["best_step"]),
                seconds=(run.ended - run.started) / 1000,
                run=run.id,
            )
            found.append(result)
    return sorted(found, key=lambda each: each.loss)


def report(plan: Plan, found: list[Result]) -> str:
    """The report in Markdown, without its picture."""
    parts = [
        f"# Sweep {plan.name}",
        f"{len(found)} of {len(plan.points)} points of commit {plan.baseline[:7]}, the lowest"
        " held-out loss (nats a token) first.",
    ]
    if plan.base | plan.fixed:
        parts.append(f"All of them with `{sweep.told(plan.base | plan.fixed)}`.")
    if not found:
        return "\n\n".join([*parts, "No point is done."]) + "\n"
    parts += [
        _results(found),
        f"`dvc exp apply {found[0].experiment}` brings the files of the first one here.",
        "## Differences that seeds make",
        _seeds(found),
    ]
    if len(found[0].point) > 1:
        parts += ["## Which param matters", _importance(found)]
    return "\n\n".join(parts) + "\n"


def _results(found: list[Result]) -> str:
    varied = map(_key, found[0].point)
    head = ["experiment", *varied, "held-out", "at step", "training", "MLflow run"]
    rows = [
        [
            each.experiment,
            *map(label, each.point.values()),
            f"{each.loss:.4f}",
            f"{each.step:,}",
            f"{int(each.seconds // 60)} min {each.seconds % 60:02.0f} s",
            each.run[:8],
        ]
        for each in found
    ]
    return table(head, rows)


def _seeds(found: list[Result]) -> str:
    if SEED not in found[0].point:
        return (
            "Each setting was trained with one seed. Another seed alone gives another loss, and a"
            " smaller difference than that is none: `train.seed=1,2,3` in a sweep shows how much it"
            " is."
        )
    settings: dict[str, list[Result]] = {}
    for each in found:
        settings.setdefault(str(_without_seed(each.point)), []).append(each)
    groups = sorted(settings.values(), key=lambda group: statistics.mean(e.loss for e in group))
    head = [*map(_key, _without_seed(found[0].point)), "seeds", "mean", "lowest", "highest"]
    rows = [
        [
            *map(label, _without_seed(group[0].point).values()),
            str(len(group)),
            *(f"{of(e.loss for e in group):.4f}" for of in (statistics.mean, min, max)),
        ]
        for group in groups
    ]
    several = [[e.loss for e in group] for group in groups if len(group) > 1]
    if not several:
        return table(head, rows)
    freedom = sum(len(losses) - 1 for losses in several)
    squares = sum(statistics.variance(losses) * (len(losses) - 1) for losses in several)
    return (
        f"{table(head, rows)}\n\nWithin a setting, seeds move the loss by"
        f" {(squares / freedom) ** 0.5:.4f} (standard deviation, {freedom} degrees of freedom)."
        " Means that differ by less than about twice that do not differ."
    )


def _importance(found: list[Result]) -> str:
    if len(found) < ENOUGH:
        return f"Left out: {len(found)} points are too few to tell; from {ENOUGH} on it is here."
    try:
        import optuna
    except ImportError:
        return "Left out: Optuna is not installed; `make sweep`, then the same command again."
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    points = [each.point for each in found]
    kinds = {name: _distribution(optuna, name, [p[name] for p in points]) for name in points[0]}
    study = optuna.create_study(direction="minimize")
    for each in found:
        study.add_trial(
            optuna.trial.create_trial(params=each.point, distributions=kinds, value=each.loss)
        )
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    rows = [[_key(name), f"{share:.2f}"] for name, share in shares.items()]
    return (
        f"{table(['param', 'share'], rows)}\n\nThe share of the loss's variance over these points"
        " that a random forest puts down to each param alone (functional ANOVA, Hutter, Hoos and"
        " Leyton-Brown 2014, by Optuna). It holds for the values tried here and no others, and"
        f" {len(found)} points tell little beyond the first place."
    )


def _distribution(optuna: ModuleType, name: str, values: list[Any]) -> Any:
    """Where Optuna is to take a param's values from."""
    kinds = {type(value) for value in values}
    if name == SEED or not kinds <= {int, float} or len(set(values)) == 1:
        return optuna.distributions.CategoricalDistribution(list(dict.fromkeys(values)))
    kind = "Int" if kinds == {int} else "Float"
    distribution = getattr(optuna.distributions, f"{kind}Distribution")
    return distribution(min(values), max(values), log=parallel_coordinates.is_log(values))


def _without_seed(point: Point) -> Point:
    return {name: value for name, value in point.items() if name != SEED}


def _key(name: str) -> str:
    return name.partition(".")[2]
