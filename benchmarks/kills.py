"""SIGKILL at random moments of one training run; part of benchmarks/faults.py."""

import random
import re
import sys
import time
from collections import Counter
from pathlib import Path

from benchmarks.bench import Bench, Row
from benchmarks.project import EVAL_INTERVAL, TIMEOUT, repro, trainers

# Where kills happen. Phase: during training, at its end, or in the next stage. Description. Stage,
# file, function, part of the line (. means any line), and the maximum number of such lines before
# the kill, small enough for about 10 steps between kills.
MOMENTS = """
train  while the program starts         train     torch/__init__.py              <module>                .         400
train  while the program starts         train     stages/train.py                run                     .          12
train  while the program starts         train     folio/training/checkpoint.py   load                    .           8
train  during gradient accumulation     train     folio/training/step.py         TrainStep._step         backward   40
train  during gradient accumulation     train     folio/gpt/model.py             Block.forward           .         160
train  inside the optimizer's update    train     torch/optim/adam.py            _fused_adam             .         800
train  inside an evaluation             train     folio/gpt/validation.py        token_losses            .          60
train  at the start of an epoch         train     folio/tokens/batches.py        Batches._window_starts  permut      3
train  inside a checkpoint write        train     folio/training/checkpoint.py   save                    .          80
train  inside a checkpoint write        train     folio/training/checkpoint.py   _fsync                  fsync      16
train  inside a checkpoint write        train     shutil.py                      _rmtree_safe_fd         .          60
train  between checkpoint and history   train     folio/run.py                   write_history           .           3
train  between checkpoint and history   train     folio/files.py                 replacing               replace(    4
train  while MLflow is updated          train     folio/tracking/writer.py       RunWriter.send          .          50
train  while MLflow is updated          train     folio/tracking/writer.py       RunWriter._open         .          12
train  at a random time                 .         .                              .                       .           1
end    while the outs are written       train     folio/training/outputs.py      write                   .          15
end    while the outs are written       train     folio/gpt/huggingface.py       save                    .          25
end    while the outs are written       train     folio/files.py                 replacing               .          40
end    while MLflow is updated          train     folio/tracking/writer.py       RunWriter._upload       .          60
end    just before the stage exits      train     folio/run.py                   lock_for_training       release     1
end    just before the stage exits      train     threading.py                   _shutdown               .           3
next   inside the evaluate stage        evaluate  stages/evaluate.py             run                     .          15
next   inside the evaluate stage        evaluate  folio/gpt/validation.py        token_losses            .          40
next   inside the evaluate stage        evaluate  folio/tracking/writer.py       RunWriter.complete      .           4
next   inside the evaluate stage        evaluate  shutil.py                      _rmtree_safe_fd         .          30
"""  # noqa: E501
ANY_TIME = "at a random time"
MOMENT_FIELDS = [re.split("  +", line) for line in MOMENTS.strip().splitlines()]


def kills(bench: Bench) -> list[Row]:
    """Send SIGKILL at random moments of one training run, up to options.kills times."""
    rng, folder, number = (
        random.Random(bench.options.seed),
        bench.new_project(),
        bench.options.kills,
    )
    tried: Counter[str] = Counter()
    problems: list[str] = []
    queue: list[str] = []
    groups = 0
    end = time.monotonic() + 60 * bench.options.minutes
    for attempt in range(2 * number):
        remaining = number - tried.total()
        finished = "\n  evaluate:\n" in (folder / "dvc.lock").read_text()
        if not remaining or problems or finished or time.monotonic() > end:
            break
        last_steps = latest_step(folder) >= bench.options.steps - 10 * EVAL_INTERVAL
        training = not last_steps and remaining > 0.28 * number
        phase = "train" if training else "end" if remaining > 0.12 * number else "next"
        names = list(dict.fromkeys(fields[1] for fields in MOMENT_FIELDS if fields[0] == phase))
        queue = [name for name in queue if name in names] or rng.sample(names, len(names))
        name, whole_group = queue.pop(), attempt % 2 == 1
        choices = [fields for fields in MOMENT_FIELDS if fields[:2] == [phase, name]]
        moment = rng.choice(choices)[2:]
        last_step = latest_step(folder) + 8 * EVAL_INTERVAL if training else sys.maxsize
        if killed := kill(folder, rng, moment, whole_group, last_step, problems):
            name = name if killed == "there" else ANY_TIME
            tried[name] += 1
            groups += whole_group
            print(f"kill {tried.total()}: {name}, step {latest_step(folder)}", file=sys.stderr)
    last = repro(folder)
    if last.wait():
        problems.append(f"the last `dvc repro` failed: {last.output[-500:]}")
    found = bench.compare(folder, problems)
    rows = [
        (f"kill {name}", tried[name], 0 if found else tried[name], "")
        for name in dict.fromkeys(fields[1] for fields in MOMENT_FIELDS)
        if tried[name]
    ]
    note = f"seed {bench.options.seed}, {groups} of dvc's whole group; {found or 'all equal'}"
    return [*rows, (f"all {tried.total()} in one training run", 1, int(not found), note)]


def kill(
    folder: Path,
    rng: random.Random,
    moment: list[str],
    whole_group: bool,
    last_step: int,
    problems: list[str],
) -> str:
    """Run `dvc repro`, and kill it at the given moment, or earlier if it reaches last_step.

    moment: the last five fields of a line of MOMENTS. Returns "there", "elsewhere", or "" if the
    command ended before it was killed.
    """
    *where, max_lines = moment
    is_timed = where[0] == "."
    end = time.monotonic() + (rng.uniform(0, 8) if is_timed else TIMEOUT)
    action = "kill the group" if whole_group else "kill the stage"
    where[-1] = where[-1].replace(".", "")
    fault = "|".join([*where, str(rng.randint(1, int(max_lines))), action])
    command = repro(folder, fault="" if is_timed else fault)
    while (
        command.process.poll() is None
        and latest_step(folder) < last_step
        and time.monotonic() < end
    ):
        time.sleep(0.02)
    elsewhere = command.process.poll() is None and not command.reached.exists()
    if elsewhere:
        victims = [] if whole_group else trainers(folder)
        for victim in victims:
            victim.kill()
        if not victims:
            command.kill_group()
    status, killed = command.wait(), elsewhere or command.reached.exists()
    if killed != bool(status):
        done = "killed" if killed else "not killed"
        problems.append(f"`dvc repro` was {done} and exited with {status}: {command.output[-500:]}")
    return "elsewhere" if elsewhere else "there" if killed else ""


def latest_step(folder: Path) -> int:
    """The step of the newest checkpoint."""
    found = [int(p.name[5:]) for p in folder.glob(".checkpoints/*/step-*") if p.name[5:].isdigit()]
    return max(found, default=0)
