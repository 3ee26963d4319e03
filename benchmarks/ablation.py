"""Measures what each option of a variant is worth, and what more text would be worth.

    python -m benchmarks.ablation --jobs 4             # trains, prints both tables, draws
    python -m benchmarks.ablation --draw               # only prints and draws
    python -m benchmarks.ablation --part curve --dry-run

Trains the variant with all of its options and with each option alone off, with several seeds, and
with the last 1/16, 1/8, 1/4, 1/2 and all of its training text. Each training is a DVC experiment,
queued as by a sweep: the same command resumes after a kill, and skips the finished ones. Everything
that is printed and drawn into docs/ablation.png comes from MLflow, where runs are found by their
params: also those of other experiments, and of a store that was copied from another machine.
"""

import argparse
import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.ablation_results import (
    ALL_ON,
    METRICS,
    Result,
    curve_table,
    draw,
    label,
    options_table,
)
from benchmarks.tracked import FRACTION, has_params, list_runs, open_stores, resolve
from folio import device, params
from folio.errors import UserError, one_line_errors
from folio.run import project_root
from folio.runtime import RuntimeParams
from folio.sweeps import plan, sweep, variants
from folio.sweeps.space import SEED, Trial
from folio.tracking import sync
from folio.tracking.queries import TrackedRun

FRACTIONS = {"1/16": 0.0625, "1/8": 0.125, "1/4": 0.25, "1/2": 0.5, "all": 1.0}
# What turns each option off; it is on if the first of these params has another value.
OPTIONS: dict[str, Trial] = {
    "Muon": {"train.optimizer": "adamw", "train.learning_rate": 1.5e-3},  # the best rate of AdamW
    "factored embedding": {"train.factored_embedding": False},
    "BPE dropout": {"prepare.segmentations": 0},
    "unseen smoothing": {"train.unseen_probability": 0.0},
    "input noise": {"train.input_noise": 0.0},
    "dropout": {"model.dropout": 0.0},
    "high beta2": {"train.beta2": 0.95},
    "distillation": {"train.distill_from": "none"},
}
PARTS = ("options", "curve")
VARIANT = "best-30m"


@dataclass(frozen=True)
class Setting:
    """A variant with some of its params changed, to be trained with some seeds."""

    name: str
    changes: Trial
    seeds: range


def settings_of(values: dict[str, Any], part: str, seeds: int) -> list[Setting]:
    """The settings of a part. values: all params of the variant.

    A variant with teachers keeps its text, which must be that of the teachers.
    """
    if part == "curve":
        found = [Setting(name, {FRACTION: f}, range(1, seeds + 1)) for name, f in FRACTIONS.items()]
    else:
        found = [Setting(ALL_ON, {}, range(1, seeds + 1))]
        for name, off in OPTIONS.items():
            first = next(iter(off))
            if values[first] != off[first]:
                found.append(Setting(name, off, range(1, seeds + 1)))
    if values["train.distill_from"] == "none":
        return found
    text = {name: value for name, value in values.items() if name.startswith("prepare.")}
    return [each for each in found if {**text, **each.changes}.items() >= text.items()]


def make_trials(values: dict[str, Any], settings: list[Setting]) -> dict[str, Trial]:
    """The different trials of some settings, by a description. All of them set the same params."""
    names = sorted({name for setting in settings for name in setting.changes})
    trials: dict[str, Trial] = {}
    for setting in settings:
        for seed in setting.seeds:
            changed = values | setting.changes | {SEED: seed}
            trial = {name: changed[name] for name in [*names, SEED]}
            if trial not in trials.values():
                trials[f"{describe(setting)}, seed {seed}"] = trial
    return trials


def describe(setting: Setting) -> str:
    if FRACTION in setting.changes:
        return f"text: {setting.name}"
    return label(setting.name)


def find(values: dict[str, Any], runs: list[TrackedRun]) -> TrackedRun | None:
    """The first finished and evaluated run with these params. values: all params."""
    for run in runs:
        if run.metrics.keys() >= METRICS and has_params(run, values):
            return run
    return None


def results_of(
    values: dict[str, Any], settings: list[Setting], runs: list[TrackedRun]
) -> list[Result]:
    """The results of the settings that have runs. Prints which runs are missing."""
    results = []
    for setting in settings:
        found = {
            seed: find(values | setting.changes | {SEED: seed}, runs) for seed in setting.seeds
        }
        if missing := [str(seed) for seed, run in found.items() if run is None]:
            print(f"MLflow has no finished run: {describe(setting)}, seed {', '.join(missing)}")
        if present := [run for run in found.values() if run]:
            results.append(Result(setting.name, present))
    return results


def train(trials: dict[str, Trial], variant: str, jobs: int, dry_run: bool) -> list[str]:
    """Train the trials, unless it is a dry run. Returns a message if some failed."""
    base = variants.read(variant)
    plan.check_trials([*trials.values()], base)
    made = plan.make_plan([*trials.values()], base, None)
    variants.report_uncommitted(variant, base | next(iter(trials.values())))
    described = dict(zip(made.trials, trials, strict=True))
    print(f"{variant}: {len(trials)} trainings")
    if dry_run:
        print(*(f"{name}  {text}" for name, text in described.items()), sep="\n")
        return []
    (runtime,) = params.load(runtime=RuntimeParams)
    environment = sweep.job_environment(jobs, device.resolve_device(runtime.device).type)
    failed = sweep.run(made, jobs, environment, described.__getitem__)
    sync.run(runtime.tracking_uri, project_root())
    return [sweep.failure_message(made, failed)] if failed else []


def show(
    parts: dict[str, list[Setting]], values: dict[str, Any], stores: list[str] | None, picture: Path
) -> None:
    """Print the tables and draw. Raises UserError if MLflow has nothing to show."""
    runs = [run for run, _ in list_runs(open_stores(stores))]
    found = {part: results_of(values, settings, runs) for part, settings in parts.items()}
    options, curve = (found.get(part, []) for part in PARTS)
    if options and options[0].name != ALL_ON:
        print("without a run with all options on, there is nothing to compare the others with")
        options = []
    if not options and not curve:
        raise UserError("MLflow has none of these runs: run the command without --draw")
    first = [*options, *curve][0].runs[0]
    print(f"\non {first.tags['device']}, {first.metrics['steps']:,.0f} steps; nats/token")
    if options:
        print(f"\n{options_table(options)}")
    if curve:
        print(f"\n{curve_table(curve)}")
    draw(options, curve, picture)
    print(f"\ndrawn: {picture}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", default=VARIANT, help="one of variants/")
    parser.add_argument("--part", choices=PARTS, help="only this one; default: both")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="for the options: 1 to N")
    parser.add_argument("--curve-seeds", type=int, default=1, metavar="N", help="for the curve")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="trainings at once")
    parser.add_argument("--dry-run", action="store_true", help="only list the trainings")
    parser.add_argument("--draw", action="store_true", help="only print and draw MLflow's data")
    parser.add_argument("--stores", nargs="+", metavar="URI", help="default: the project's store")
    options = parser.parse_args()
    if min(options.seeds, options.curve_seeds, options.jobs) < 1:
        raise UserError("--seeds, --curve-seeds and --jobs must be at least 1")
    values = resolve(variants.read(options.variant))
    suffix = "" if options.variant == VARIANT else f"-{options.variant}"
    picture = Path(f"docs/ablation{suffix}.png")
    seeds = {"options": options.seeds, "curve": options.curve_seeds}
    parts = {
        part: settings_of(values, part, seeds[part])
        for part in ([options.part] if options.part else PARTS)
    }
    failed: list[str] = []
    if not options.draw:
        trials = make_trials(values, [each for part in parts.values() for each in part])
        failed = train(trials, options.variant, options.jobs, options.dry_run)
    if failed:
        with contextlib.suppress(UserError):  # MLflow may have none of the runs
            show(parts, values, options.stores, picture)
        raise UserError(failed[0])
    if not options.dry_run:
        show(parts, values, options.stores, picture)


if __name__ == "__main__":
    with one_line_errors():
        main()
