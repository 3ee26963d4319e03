"""The search space of a sweep, as written on the command line, and the trials drawn from it.

train.learning_rate=1e-3,2e-3      each of these values
train.learning_rate=1e-4..1e-2     any value in between, for random trials
"""

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from folio.errors import UserError

MAX_TRIALS = 500  # per sweep: a typo can create a grid of millions
LOG_RATIO = 10  # a range is sampled on a log scale if high is at least this many times low
SEED = "train.seed"

Trial = dict[str, Any]  # {"train.learning_rate": 0.001, ...}
ReadValue = Callable[[str, str], Any]  # (param, text) -> value; raises UserError


@dataclass(frozen=True)
class Choice:
    values: tuple[Any, ...]

    def at(self, u: float) -> Any:
        """The value at the quantile u in [0, 1) of the uniform distribution."""
        return self.values[int(u * len(self.values))]


@dataclass(frozen=True)
class Range:
    """From low to high, both included. If both are ints, it contains only ints."""

    low: int | float
    high: int | float
    log: bool

    def at(self, u: float) -> int | float:
        """The value at the quantile u in [0, 1) of the uniform or log-uniform distribution. Floats
        are rounded to three significant digits."""
        is_int = type(self.low) is int
        low, high = (self.low, self.high + 1) if is_int else (self.low, self.high)
        if self.log:
            value = math.exp(math.log(low) + u * (math.log(high) - math.log(low)))
        else:
            value = low + u * (high - low)
        value = math.floor(value) if is_int else float(f"{value:.3g}")
        return min(max(value, self.low), self.high)


Space = dict[str, Choice | Range]  # by param


def format_value(value: Any) -> str:
    """Format a value as on the command line."""
    if value is None:
        return "null"
    if type(value) is bool:
        return str(value).lower()
    short = f"{value:g}" if type(value) is float else ""
    return short if short and float(short) == value else str(value)


def format_trial(trial: Trial) -> str:
    """Format a trial as one line, as on the command line."""
    return " ".join(f"{name}={format_value(value)}" for name, value in trial.items())


def is_log_scale(values: Sequence[Any]) -> bool:
    """Whether a log scale suits these values: all are positive numbers, the highest is at least
    LOG_RATIO times the lowest, and the median is closer to the geometric mean of these two than to
    their arithmetic mean."""
    if not all(type(value) in (int, float) for value in values) or min(values) <= 0:
        return False
    low, high, median = min(values), max(values), statistics.median(values)
    return high >= LOG_RATIO * low and median - (low * high) ** 0.5 < (low + high) / 2 - median


def parse(settings: list[str], read_value: ReadValue) -> Space:
    """Parse settings such as "train.learning_rate=1e-3,2e-3" into a search space.

    Raises UserError for an invalid setting.
    """
    space: Space = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or not name:
            raise UserError(
                f"{setting!r} is not a setting: write, for example, train.learning_rate=1e-3,2e-3"
            )
        if name in space:
            raise UserError(f"{name} is given twice: list all its values together, as in a,b,c")
        parse_values = _parse_range if ".." in text else _parse_choice
        space[name] = parse_values(name, text, read_value)
    return space


def grid(space: Space) -> list[Trial]:
    """Every combination of values; the last param varies fastest.

    Raises UserError for a range, and for more than MAX_TRIALS combinations.
    """
    choices = []
    for name, values in space.items():
        if isinstance(values, Range):
            raise UserError(
                f"{name}: a grid needs a list of values, as in a,b,c; `--random 20` samples a range"
            )
        choices.append(values.values)
    count = math.prod(map(len, choices))
    if count > MAX_TRIALS:
        raise UserError(
            f"{count:,} trials are more than {MAX_TRIALS}: `--random 20` runs 20 of them"
        )
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*choices)]


def latin_hypercube(space: Space, count: int, seed: int) -> list[Trial]:
    """`count` distinct random trials, or fewer if the space is so small that some are repeated.

    A Latin hypercube sample (McKay, Beckman and Conover 1979): each param's range is divided into
    `count` equal parts, and every part contains one trial. So even a few trials leave no large
    gaps, and the values of a choice occur equally often. Raises UserError unless 1 <= count <=
    MAX_TRIALS.
    """
    if not 1 <= count <= MAX_TRIALS:
        raise UserError(f"--random {count}: use a number from 1 to {MAX_TRIALS}")
    rng = np.random.default_rng(seed)
    parts = rng.permuted(np.tile(np.arange(count), (len(space), 1)), axis=1)
    rows = (parts.T + rng.random((count, len(space)))) / count
    trials: list[Trial] = []
    for row in rows.tolist():
        trial = {name: values.at(u) for (name, values), u in zip(space.items(), row, strict=True)}
        if trial not in trials:
            trials.append(trial)
    return trials


def _parse_choice(name: str, text: str, read_value: ReadValue) -> Choice:
    texts = [each.strip() for each in text.split(",")]
    if not all(texts):
        raise UserError(f"{name}={text}: a value is missing (write null for no value)")
    values = [read_value(name, each) for each in texts]
    if len(set(values)) < len(values):
        raise UserError(f"{name}={text}: a value is given twice")
    return Choice(tuple(values))


def _parse_range(name: str, text: str, read_value: ReadValue) -> Range:
    kind, colon, ends = text.rpartition(":")
    if colon and kind not in ("log", "lin"):
        raise UserError(
            f"{name}={text}: write a range as low..high, log:low..high or lin:low..high"
        )
    low, high = (read_value(name, end) for end in ends.split("..", 1))
    if not all(type(end) in (int, float) for end in (low, high)) or low >= high:
        raise UserError(f"{name}={text}: a range needs a lower and a higher end, as in 1e-4..1e-2")
    if kind == "log" and low <= 0:
        raise UserError(f"{name}={text}: the low end of a log range must be above 0; or use lin:")
    log = kind == "log" or (not kind and low > 0 and high >= LOG_RATIO * low)
    return Range(low, high, log)
