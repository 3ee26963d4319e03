"""The plan of a sweep: its trials, each of which becomes a DVC experiment.

It is stored in sweeps/NAME/plan.json. DVC records which experiments have finished, so running the
same command again resumes a sweep that was stopped.
"""

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from folio import commands, files, params, sections
from folio.errors import UserError
from folio.sweeps import markdown, overrides, space
from folio.sweeps.space import Trial, format_trial, format_value

FOLDER = Path("sweeps")
VARIED = ("model", "train")  # sections of params.yaml whose params a sweep may vary
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}")


@dataclass(frozen=True, kw_only=True)
class Plan:
    name: str
    baseline: str  # the commit that the experiments start from
    changes: str  # sha256 of the uncommitted changes in the workspace
    base: Trial  # the settings of the variant that the trials are applied to
    trials: dict[str, Trial]  # by experiment name

    @property
    def folder(self) -> Path:
        return FOLDER / self.name

    @property
    def path(self) -> Path:
        return self.folder / "plan.json"

    @property
    def has_derived_name(self) -> bool:
        """Whether the name is derived from the content, so that no other sweep can have it."""
        trials = list(self.trials.values())
        return self.name == _derive_name(self.baseline, self.changes, self.base, trials)

    @property
    def starts_from_commit(self) -> bool:
        """Whether the workspace had no uncommitted changes."""
        return self.changes == _digest("")

    @property
    def fixed(self) -> Trial:
        """The settings that are the same in every trial. Empty if there is only one trial."""
        first, *others = self.trials.values()
        same = {k: v for k, v in first.items() if all(trial[k] == v for trial in others)}
        return same if others else {}

    def varied(self, experiment: str) -> Trial:
        """The settings of a trial that vary between trials."""
        return {k: v for k, v in self.trials[experiment].items() if k not in self.fixed}

    def steps(self) -> dict[str, int]:
        """The maximum number of training steps of each experiment."""
        default = params.read(params.FILE)["train"]["steps"]
        key = "train.steps"
        return {
            name: trial.get(key, self.base.get(key, default)) for name, trial in self.trials.items()
        }

    def finished(self) -> dict[str, str]:
        """The experiments that have finished, each with its commit."""
        prefix = self.ref("")
        refs = commands.git(
            "for-each-ref", "--format=%(objectname) %(refname)", prefix
        ).splitlines()
        commits = {name.removeprefix(prefix): commit for commit, name in map(str.split, refs)}
        return {name: commits[name] for name in self.trials if name in commits}

    def ref(self, experiment: str) -> str:
        """Git's reference to an experiment, once it has finished."""
        return f"refs/exps/{self.baseline[:2]}/{self.baseline[2:]}/{experiment}"

    def save(self) -> None:
        files.write_text(self.path, json.dumps(dataclasses.asdict(self), indent=2))

    def overview(self) -> str:
        """A Markdown table with a row per trial."""
        rows = [[name, *map(format_value, self.varied(name).values())] for name in self.trials]
        header = [f"trials: {len(rows)}", *self.varied(next(iter(self.trials)))]
        fixed = f"\nall trials use {format_trial(self.fixed)}" if self.fixed else ""
        return markdown.table(header, rows) + fixed


def make_trials(settings: list[str], count: int | None, seed: int) -> list[Trial]:
    """The trials described by settings such as "train.learning_rate=1e-3,2e-3": every combination
    of the values, or `count` random trials.

    Raises UserError for invalid settings.
    """
    if not settings:
        raise UserError("nothing to vary: add, for example, train.learning_rate=1e-3,2e-3")

    def read_value(name: str, text: str) -> Any:
        if name.partition(".")[0] not in VARIED:
            raise UserError(f"{name}: a sweep can only vary params of model and train")
        return params.read_value(name, text, **{each: sections.SECTIONS[each] for each in VARIED})

    parsed = space.parse(settings, read_value)
    return space.grid(parsed) if count is None else space.latin_hypercube(parsed, count, seed)


def check_trials(trials: list[Trial], base: Trial) -> None:
    """Raise UserError if any trial is not a valid set of params for the pipeline."""
    tree = params.read(params.FILE)
    for trial in trials:
        overrides.check(tree, base | trial, format_trial(trial))


def make_plan(trials: list[Trial], base: Trial, name: str | None) -> Plan:
    """A plan of these trials for the workspace in its current state.

    name: if None, derived from the trials and the workspace. Raises UserError if it is not valid as
    the name of an experiment, or if there is no git commit.
    """
    if name is not None and not _NAME.fullmatch(name):
        raise UserError(f"--name {name!r}: use at most 40 letters, digits, - and _")
    try:
        baseline = commands.head()
    except commands.NoCommitError as error:
        raise UserError(f"a sweep starts from a git commit, but {error}") from None
    changes = _digest(commands.git("diff", "HEAD"))
    name = name or _derive_name(baseline, changes, base, trials)
    width = max(2, len(str(len(trials))))
    names = [f"{name}-{number:0{width}}" for number in range(1, len(trials) + 1)]
    return Plan(
        name=name,
        baseline=baseline,
        changes=changes,
        base=base,
        trials=dict(zip(names, trials, strict=True)),
    )


def read_plan(name: str) -> Plan:
    """The plan of an earlier sweep. Raises UserError if it does not exist or is damaged."""
    path = FOLDER / name / "plan.json"
    try:
        if not _NAME.fullmatch(name):
            raise FileNotFoundError
        content = json.loads(path.read_text(encoding="utf-8"))
        if "points" in content:  # the name of `trials` in Folio 0.1
            content["trials"] = content.pop("points")
        plan = Plan(**content)
        if plan.name != name or not _is_valid(plan):
            raise ValueError
        return plan
    except FileNotFoundError:
        known = ", ".join(sorted(each.parent.name for each in FOLDER.glob("*/plan.json")))
        raise UserError(f"there is no sweep {name!r}; available: {known or 'none'}") from None
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        raise UserError(
            f"{path} is damaged: remove {path.parent} and run the sweep again"
        ) from None


def _digest(changes: str) -> str:
    return hashlib.sha256(changes.encode()).hexdigest()


def _is_valid(plan: Plan) -> bool:
    """Whether the fields have the types of a plan, and all trials set the same params."""
    trials = list(plan.trials.values())
    return (
        all(isinstance(text, str) for text in (plan.baseline, plan.changes))
        and all(isinstance(trial, dict) for trial in [plan.base, *trials])
        and len({frozenset(trial) for trial in trials}) == 1
    )


def _derive_name(baseline: str, changes: str, base: Trial, trials: list[Trial]) -> str:
    workspace = {"baseline": baseline, "changes": changes, "base": base}
    content = json.dumps([workspace, trials], sort_keys=True).encode()
    return f"sweep-{hashlib.sha256(content).hexdigest()[:6]}"
