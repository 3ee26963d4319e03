"""A sweep: a training at each of many points, as DVC experiments on its queue.

sweeps/NAME/plan.json says which points those are. What is done of them DVC knows, so the same
command goes on from wherever it was stopped.
"""

import contextlib
import copy
import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from folio import files, params, signals
from folio.errors import UserError
from folio.run import TRAINING
from folio.sweeps import queue
from folio.sweeps.space import Point, draw, grid, label, parse
from folio.tracking.dvc_cache import DvcCache

FOLDER = Path("sweeps")
VARIED = ("model", "train")  # sections
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}")
_GONE = 3  # looks in a row that find no worker: the last result may come after the first of them


@dataclass(frozen=True, kw_only=True)
class Plan:
    name: str
    baseline: str  # the commit that the experiments are of
    changes: str  # sha256 of what the files in the workspace had changed since
    base: Point  # the variant that the points are laid over
    points: dict[str, Point]  # by experiment: what it sets besides

    @property
    def folder(self) -> Path:
        return FOLDER / self.name

    @property
    def own_name(self) -> bool:
        """Whether its name is made of its points, so that no other sweep has it."""
        what = {"baseline": self.baseline, "changes": self.changes, "base": self.base}
        return self.name == _name(what, [*self.points.values()])

    @property
    def fixed(self) -> Point:
        """What every point sets, and the same."""
        first, *others = self.points.values()
        same = {k: v for k, v in first.items() if all(point[k] == v for point in others)}
        return same if others else {}

    def varied(self, name: str) -> Point:
        """What the points do not have in common, of one of them."""
        return {k: v for k, v in self.points[name].items() if k not in self.fixed}


def points(
    settings: list[str], count: int | None, seed: int, sections: dict[str, type]
) -> list[Point]:
    """What "train.learning_rate=1e-3,2e-3" and the like mean: every combination, or `count` points
    at random. Raises UserError where they mean nothing."""
    if not settings:
        raise UserError("what is to vary? write train.learning_rate=1e-3,2e-3 or the like")

    def read(name: str, text: str) -> Any:
        if name.partition(".")[0] not in VARIED:
            raise UserError(f"{name}: a sweep is of trainings, it varies params of model and train")
        return params.read_value(name, text, **{each: sections[each] for each in VARIED})

    space = parse(settings, read)
    return grid(space) if count is None else draw(space, count, seed)


def check(points: list[Point], base: Point, sections: dict[str, type]) -> None:
    """Raises UserError where a point is no valid set of params, as the loader of a stage would."""
    given = params.read(params.FILE)
    for point in points:
        tree = copy.deepcopy(given)
        for name, value in (base | point).items():
            section, _, key = name.partition(".")
            if isinstance(tree.get(section), dict):  # else it is named below
                tree[section][key] = value
        loaded = dict(zip(sections, params.check(tree, told(point), **sections), strict=True))
        stride, context = loaded["evaluate"].stride, loaded["model"].block_size
        if stride > context:
            raise UserError(
                f"{told(point)}: evaluate.stride {stride} is more than a context of {context}"
            )


def plan(points: list[Point], base: Point, name: str | None) -> Plan:
    """A plan for these points from the workspace as it is; by default its name is made of it."""
    if name is not None and not _NAME.fullmatch(name):
        raise UserError(f"--name {name!r}: letters, digits, - and _ make a name, 40 at most")
    changes = hashlib.sha256(_git("diff", "HEAD").encode()).hexdigest()
    what = {"baseline": _git("rev-parse", "HEAD").strip(), "changes": changes, "base": base}
    name = name or _name(what, points)
    width = max(2, len(str(len(points))))
    names = [f"{name}-{number:0{width}}" for number in range(1, len(points) + 1)]
    return Plan(name=name, points=dict(zip(names, points, strict=True)), **what)


def read(name: str) -> Plan:
    """The plan of a former sweep. Raises UserError if there is none."""
    path = FOLDER / name / "plan.json"
    try:
        if not _NAME.fullmatch(name):
            raise FileNotFoundError
        return Plan(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        known = ", ".join(sorted(each.parent.name for each in FOLDER.glob("*/plan.json")))
        raise UserError(f"no sweep {name!r} here; there are {known or 'none'}") from None
    except (OSError, ValueError, TypeError):
        raise UserError(f"{path} is damaged: remove {path.parent} and sweep again") from None


def run(plan: Plan, jobs: int, threads: int | None) -> list[str]:
    """Train at each point that is not done yet. Returns the experiments that failed.

    jobs: how many at a time; threads: how many each may use, or None. Raises UserError
    where there is another sweep of that name, and Stopped when told to stop: the trainings that run
    are stopped as well, with their step saved.
    """
    queue.needs_dvc()
    if (plan.folder / "plan.json").exists() and read(plan.name) != plan:
        raise UserError(
            f"there is another sweep {plan.name!r}, of other points or other code: take another"
            " --name"
        )
    if not (plan.folder / "plan.json").exists() and not plan.own_name and finished(plan):
        raise UserError(
            f"there are experiments {plan.name}-... of another sweep here: take another --name"
        )
    files.write_text(plan.folder / "plan.json", json.dumps(dataclasses.asdict(plan), indent=2))
    try:
        with signals.deferred():
            _put(plan)
            queue.start(jobs, **({"OMP_NUM_THREADS": str(threads)} if threads else {}))
            signals.check()
        return _follow(plan)
    except signals.Stopped:
        # Of a queue that is empty by now, DVC may find no trace.
        with signals.deferred(), contextlib.suppress(UserError):
            queue.stop()
            states = queue.read().states
            queue.remove([name for name in plan.points if states.get(name) == "Queued"])
        raise signals.Stopped(
            "what trained saves its step, and the same command goes on from there"
        ) from None


def finished(plan: Plan) -> dict[str, str]:
    """The experiments that are done, each with its commit."""
    place = f"refs/exps/{plan.baseline[:2]}/{plan.baseline[2:]}/"
    refs = _git("for-each-ref", "--format=%(objectname) %(refname)", place).splitlines()
    commits = {name.removeprefix(place): commit for commit, name in map(str.split, refs)}
    return {name: commits[name] for name in plan.points if name in commits}


def threads(jobs: int, where: torch.device) -> int | None:
    """How many threads each of some trainings at a time is to have; None: as many as it likes.

    Two trainings of two threads each on two cores come almost to a stop (LOG.md).
    """
    if jobs == 1 or where.type != "cpu" or os.environ.get("OMP_NUM_THREADS"):
        return None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // jobs)


def listing(plan: Plan) -> str:
    """What is to run, a line a point."""
    rows = [[name, *map(label, plan.varied(name).values())] for name in plan.points]
    head = [f"{len(rows)} points", *plan.varied(next(iter(plan.points)))]
    fixed = f"\nall with {told(plan.fixed)}" if plan.fixed else ""
    return table(head, rows) + fixed


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose columns align as plain text, too."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    rule = ["-" * (width - 1) + ":" for width in widths]
    lines = [
        " | ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in (head, rule, *rows)
    ]
    return "\n".join(f"| {line} |" for line in lines)


def failure(plan: Plan, failed: list[str]) -> str:
    """A line that names the points that failed, and the way out."""
    return (
        f"{len(failed)} of {len(plan.points)} points failed: {', '.join(failed)}"
        f" (`dvc queue logs {failed[0]}` says why); the same command tries them again"
    )


def told(point: Point) -> str:
    """A point in a line."""
    return " ".join(f"{name}={label(value)}" for name, value in point.items())


def _put(plan: Plan) -> None:
    """Queue the points that are neither done nor queued, what failed among them."""
    now, done = queue.read(), finished(plan)
    states = {name: now.states[name] for name in plan.points if name in now.states}
    if not now.workers:  # as after a power cut
        lost = [name for name, state in states.items() if state == "Running"]
        queue.give_up(lost)
        states |= dict.fromkeys(lost, "Failed")
    over = [name for name, state in states.items() if state in ("Failed", "Success")]
    queue.remove([name for name in over if name not in done])
    new = [n for n in plan.points if n not in done and (n not in states or n in over)]
    others = sum(s in ("Queued", "Running") for n, s in now.states.items() if n not in states)
    if others:
        print(f"on the queue there is more ({others}), which runs as well: `dvc queue status`")
    for name in tqdm(new, desc="queueing", unit="point", leave=False, disable=None):
        signals.check()
        queue.put(name, plan.base | plan.points[name])
    signals.check()


def _follow(plan: Plan) -> list[str]:
    """Wait for the queue, and print a line for each point that ends. Returns those that failed."""
    cache, seen, gone, began = DvcCache(Path.cwd()), finished(plan).keys(), 0, time.monotonic()
    failed: set[str] = set()
    now = queue.Queue(states={}, workers=0)
    if seen:
        print(f"{len(seen)} of {len(plan.points)} points are done already")
    with tqdm(total=len(plan.points), initial=len(seen), unit="point", disable=None) as bar:
        while True:
            try:
                now = queue.read()
            except UserError:  # while the last worker clears up, DVC finds half a queue
                now = dataclasses.replace(now, workers=0)
            done = finished(plan)
            for name in sorted(done.keys() - seen):
                bar.write(f"{name}  {told(plan.varied(name))}  {_outcome(cache, done[name])}")
            ended = {n for n in plan.points if n not in done and now.states.get(n) == "Failed"}
            for name in sorted(ended - failed):
                bar.write(f"{name}  {told(plan.varied(name))}  failed")
            running = sum(now.states.get(n) == "Running" for n in plan.points if n not in done)
            bar.set_postfix_str(f"{running} running, {len(ended)} failed")
            bar.update(len(done) + len(ended) - bar.n)
            sys.stdout.flush()  # where it is no terminal
            seen, failed = done.keys(), ended
            if len(done) + len(failed) == len(plan.points):
                return sorted(failed)
            gone = 0 if now.workers else gone + 1
            if gone == _GONE:
                raise UserError(
                    "the queue's workers have ended before their work: the same command goes on"
                )
            # To look costs DVC a second of a core.
            time.sleep(min(max(2.0, (time.monotonic() - began) / 20), 15.0))


def _outcome(cache: DvcCache, commit: str) -> str:
    content = cache.read(cache.outs(commit).get(f"{TRAINING}/metrics.json", "")) or b"{}"
    metrics = json.loads(content)
    if "best_val_loss" not in metrics:
        return "done"
    return f"held-out {metrics['best_val_loss']:.4f} at step {metrics['best_step']:,}"


def _name(what: dict[str, Any], points: list[Point]) -> str:
    known = json.dumps([what, points], sort_keys=True).encode()
    return f"sweep-{hashlib.sha256(known).hexdigest()[:6]}"


def _git(*words: str) -> str:
    done = subprocess.run(  # a diff may hold any bytes
        ["git", *words], capture_output=True, encoding="utf-8", errors="backslashreplace"
    )
    if done.returncode:
        raise UserError(
            "a sweep starts from a git commit, and there is none here: git init && git add -A &&"
            " git commit -m start"
        )
    return done.stdout
