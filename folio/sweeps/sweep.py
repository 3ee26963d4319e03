"""Runs the trials of a sweep on DVC's queue."""

import contextlib
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from folio import gpus, signals
from folio.errors import UserError
from folio.run import TRAINING, kept, unfinished_steps
from folio.sweeps import queue
from folio.sweeps.plan import Plan, read_plan
from folio.sweeps.space import format_trial
from folio.tracking.dvc_cache import DvcCache

# The sweep is abandoned after this many consecutive checks without a worker. One check would not be
# enough, because the last result may appear only after its worker has exited.
_MAX_CHECKS_WITHOUT_WORKERS = 3


def run(
    plan: Plan,
    jobs: int,
    environment: dict[str, str],
    describe: Callable[[str], str] | None = None,
) -> list[str]:
    """Run every trial that has not finished yet. Returns the experiments that failed.

    jobs: the number of trials to run in parallel. environment: additional variables for them.
    describe: returns what is printed about an experiment; None for the params that vary. Raises
    UserError if another sweep has the same name. On a stop request, stops the running trials, which
    save a checkpoint, and raises Stopped. If the terminal was closed, they continue in the
    background.
    """
    queue.require_dvc()
    queue.check_folder()
    _check_name_is_free(plan)
    plan.save()
    try:
        with signals.deferred():
            _queue_trials(plan)
            queue.start(jobs, **environment)
            signals.check()
        return _wait(plan, describe or (lambda name: format_trial(plan.varied(name))))
    except signals.Stopped as stopped:
        if stopped.terminal_closed:
            raise signals.Stopped(
                "running trials continue in the background; the same command resumes the sweep"
            ) from None
        with signals.deferred(), contextlib.suppress(UserError):  # an empty queue may be an error
            queue.stop()
            states = queue.read().states
            queue.remove([name for name in plan.trials if states.get(name) == "Queued"])
        raise signals.Stopped(
            "running trials save a checkpoint; the same command resumes the sweep"
        ) from None


def save_plan(plan: Plan) -> None:
    """Save the plan without running its trials, which are then trained in clones.

    Raises UserError if there are uncommitted changes, or if another sweep has the same name.
    """
    if not plan.starts_from_commit:
        raise UserError(
            "the trials would be trained in clones without your uncommitted changes: commit them,"
            " or undo them (`git diff HEAD` shows them)"
        )
    _check_name_is_free(plan)
    plan.save()


def job_environment(jobs: int, device_type: str) -> dict[str, str]:
    """The environment variables with which `jobs` parallel trials share the machine.

    Two trials with two threads each on two cores would almost grind to a halt (LOG.md). On several
    GPUs, each trial uses its own (folio/gpus.py).
    """
    if jobs == 1:
        return {}
    environment = {} if device_type == "cpu" else {gpus.JOBS: str(jobs)}
    if not os.environ.get("OMP_NUM_THREADS"):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        environment["OMP_NUM_THREADS"] = str(max(1, (cores or 1) // jobs))
    return environment


def failure_message(plan: Plan, failed: list[str]) -> str:
    return (
        f"{len(failed)} of {len(plan.trials)} trials failed: {', '.join(failed)}"
        f" (`dvc queue logs {failed[0]}` shows why); the same command retries them"
    )


def _check_name_is_free(plan: Plan) -> None:
    if plan.path.exists():
        if read_plan(plan.name) != plan:
            raise UserError(
                f"there is another sweep named {plan.name!r}, with different trials or code: choose"
                " another --name"
            )
    elif not plan.has_derived_name and plan.finished():
        raise UserError(
            f"experiments {plan.name}-... belong to another sweep: choose another --name"
        )


def _queue_trials(plan: Plan) -> None:
    """Queue every trial that has not finished and is neither queued nor running."""
    status, finished = queue.read(), plan.finished()
    states = {name: status.states[name] for name in plan.trials if name in status.states}
    if not status.workers:  # for example, after a power failure
        orphaned = [name for name, state in states.items() if state == "Running"]
        queue.mark_failed(orphaned)
        states |= dict.fromkeys(orphaned, "Failed")
    ended = [name for name, state in states.items() if state in ("Failed", "Success")]
    queue.remove([name for name in ended if name not in finished])
    new = [n for n in plan.trials if n not in finished and (n not in states or n in ended)]
    others = sum(s in ("Queued", "Running") for n, s in status.states.items() if n not in states)
    if others:
        print(f"{others} other experiments in the queue will also run: `dvc queue status`")
    for name in tqdm(new, desc="queueing", unit="trial", leave=False, disable=None):
        signals.check()
        queue.add(name, plan.base | plan.trials[name])
    signals.check()


def _wait(plan: Plan, describe: Callable[[str], str]) -> list[str]:
    """Wait until all trials have ended, and print a line for each. Returns those that failed."""
    finished, idle_checks, started = plan.finished(), 0, time.monotonic()
    if finished:
        print(f"{len(finished)} of {len(plan.trials)} trials have already finished")
    status = queue.QueueStatus(states={}, workers=0)
    steps = plan.steps()
    done = sum(steps[name] for name in finished)
    # smoothing=0: the time left follows from the mean speed, because steps are reported in batches.
    with tqdm(
        total=sum(steps.values()), initial=done, unit="step", smoothing=0, disable=None
    ) as bar:
        progress = _Progress(plan, set(finished), bar, describe)
        while True:
            try:
                status = queue.read()
            except UserError:  # DVC sees an incomplete queue while its last worker is cleaning up
                status = dataclasses.replace(status, workers=0)
            progress.update(status)
            if progress.is_complete:
                return sorted(progress.failed)
            idle_checks = 0 if status.workers else idle_checks + 1
            if idle_checks == _MAX_CHECKS_WITHOUT_WORKERS:
                raise UserError(
                    "the queue's workers exited before all trials had finished: the same command"
                    " resumes the sweep"
                )
            # A check takes a second of CPU time, so the checks of a long sweep are further apart.
            time.sleep(min(max(2.0, (time.monotonic() - started) / 20), 15.0))


class _Progress:
    """The trials that have ended so far. Prints each one as it ends."""

    def __init__(self, plan: Plan, finished: set[str], bar: tqdm, describe: Callable[[str], str]):
        self.finished, self.failed = finished, set[str]()
        self._plan, self._steps, self._bar = plan, plan.steps(), bar
        self._cache, self._describe = DvcCache(Path.cwd()), describe

    @property
    def is_complete(self) -> bool:
        return len(self.finished) + len(self.failed) == len(self._plan.trials)

    def update(self, status: queue.QueueStatus) -> None:
        finished = self._plan.finished()
        open_trials = [name for name in self._plan.trials if name not in finished]
        failed = {name for name in open_trials if status.states.get(name) == "Failed"}
        running = sum(status.states.get(name) == "Running" for name in open_trials)
        for name in sorted(finished.keys() - self.finished):
            self._print(name, _result(self._cache, finished[name]))
        for name in sorted(failed - self.failed):
            self._print(name, "failed")
        self.finished, self.failed = set(finished), failed
        ended = len(finished) + len(failed)
        self._bar.set_description(f"{ended} of {len(self._plan.trials)} trials", refresh=False)
        self._bar.set_postfix_str(f"{running} running, {len(failed)} failed", refresh=False)
        self._bar.update(self._steps_done() - self._bar.n)
        self._bar.refresh()
        sys.stdout.flush()  # stdout may be a file

    def _steps_done(self) -> int:
        """The steps of all trials so far. Those that have ended count in full."""
        training = unfinished_steps(Path.cwd())
        ended = self.finished | self.failed
        return sum(
            total if name in ended else min(training.get(name, 0), total)
            for name, total in self._steps.items()
        )

    def _print(self, name: str, result: str) -> None:
        self._bar.write(f"{name}  {self._describe(name)}  {result}")


def _result(cache: DvcCache, commit: str) -> str:
    content = cache.read(cache.outs(commit).get(f"{TRAINING}/metrics.json", "")) or b"{}"
    metrics = json.loads(content)
    loss, step = kept(metrics)
    return f"validation loss {loss:.4f} at step {step:,.0f}" if loss < math.inf else "finished"
