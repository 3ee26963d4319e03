"""The points of a sweep: what to vary, as it is written on the command line, and which settings
that makes.

    train.learning_rate=1e-3,2e-3      each of these values
    train.learning_rate=1e-4..1e-2     any value in between, where points are drawn at random
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from folio.errors import UserError

MOST = 500  # points of a sweep: a slip of the pen makes a grid of millions
ACROSS = 10  # a range that spans as many times its low end is drawn by its logarithm

Point = dict[str, Any]  # {"train.learning_rate": 0.001, ...}


@dataclass(frozen=True)
class Choice:
    values: tuple[Any, ...]

    def at(self, u: float) -> Any:
        """The value at u of [0, 1), each as likely."""
        return self.values[int(u * len(self.values))]


@dataclass(frozen=True)
class Range:
    """From low to high, both included; a range between ints holds ints."""

    low: int | float
    high: int | float
    log: bool

    def at(self, u: float) -> int | float:
        """The value at u of [0, 1), evenly or evenly by its logarithm, in three digits."""
        whole = type(self.low) is int
        low, high = (self.low, self.high + 1) if whole else (self.low, self.high)
        if self.log:
            value = math.exp(math.log(low) + u * (math.log(high) - math.log(low)))
        else:
            value = low + u * (high - low)
        value = math.floor(value) if whole else float(f"{value:.3g}")
        return min(max(value, self.low), self.high)


def label(value: Any) -> str:
    """A value as it is written on the command line."""
    if value is None:
        return "null"
    return f"{value:g}" if type(value) is float else str(value).lower()


def parse(settings: list[str], read: Callable[[str, str], Any]) -> dict[str, Choice | Range]:
    """What "train.learning_rate=1e-3,2e-3" and the like vary.

    read(name, text) is the value that the param of that name takes, or raises UserError, as this
    does where a setting is none.
    """
    space = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or not name:
            raise UserError(
                f"{setting!r} varies nothing: write train.learning_rate=1e-3,2e-3 or the like"
            )
        if name in space:
            raise UserError(f"{name} is there twice: name all its values at once, a,b,c")
        space[name] = _range(name, text, read) if ".." in text else _choice(name, text, read)
    return space


def grid(space: dict[str, Choice | Range]) -> list[Point]:
    """Every combination; the last param varies fastest. Raises UserError for a range."""
    for name, values in space.items():
        if isinstance(values, Range):
            raise UserError(
                f"{name}: a grid takes values, a,b,c; `--random 20` draws 20 points of a range"
            )
    count = math.prod(len(values.values) for values in space.values())
    if count > MOST:
        raise UserError(f"{count:,} points are too many, at most {MOST}: `--random 20` draws some")
    combinations = itertools.product(*(values.values for values in space.values()))
    return [dict(zip(space, values, strict=True)) for values in combinations]


def draw(space: dict[str, Choice | Range], count: int, seed: int) -> list[Point]:
    """As many points at random, each once: fewer where there are not as many.

    A Latin hypercube (McKay, Beckman and Conover 1979): of each param alone, one point lies in each
    of `count` equal parts, so that few points leave no gap, and choices come equally often.
    """
    if not 1 <= count <= MOST:
        raise UserError(f"--random {count}: from 1 to {MOST} points")
    rng = np.random.default_rng(seed)
    parts = rng.permuted(np.tile(np.arange(count), (len(space), 1)), axis=1)
    rows = (parts.T + rng.random((count, len(space)))) / count
    points: list[Point] = []
    for row in rows.tolist():
        point = {name: values.at(u) for (name, values), u in zip(space.items(), row, strict=True)}
        if point not in points:
            points.append(point)
    return points


def _choice(name: str, text: str, read: Callable[[str, str], Any]) -> Choice:
    texts = [each.strip() for each in text.split(",")]
    if not all(texts):
        raise UserError(f"{name}={text}: a value is missing (none at all is written null)")
    values = [read(name, each) for each in texts]
    if len(set(values)) < len(values):
        raise UserError(f"{name}={text}: a value is there twice")
    return Choice(tuple(values))


def _range(name: str, text: str, read: Callable[[str, str], Any]) -> Range:
    kind, colon, ends = text.rpartition(":")
    low, _, high = ends.partition("..")
    if colon and kind not in ("log", "lin"):
        raise UserError(f"{name}={text}: a range is low..high, log:low..high or lin:low..high")
    low, high = read(name, low), read(name, high)
    if not all(type(end) in (int, float) for end in (low, high)) or low >= high:
        raise UserError(f"{name}={text}: a range is from a number to a higher one, 1e-4..1e-2")
    if kind == "log" and low <= 0:
        raise UserError(f"{name}={text}: a logarithm takes a low end above 0; or write lin:")
    log = kind == "log" or (not kind and low > 0 and high >= ACROSS * low)
    return Range(low, high, log)
