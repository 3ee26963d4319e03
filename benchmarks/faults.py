"""Whatever is done to a training, `dvc repro` again ends as if nothing had been done.

    python -m benchmarks.faults                                     # all, on a tiny model
    python -m benchmarks.faults --only kills --variant seed-30m --precision bf16

Trains a project of its own in a temporary folder, undisturbed and with each fault, and compares
the weights byte by byte, the history row by row and what MLflow has point by point. No network.
"""

import argparse
import importlib.util
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import mlflow

from benchmarks import project
from benchmarks.project import (
    EVERY,
    LIMIT,
    Command,
    Server,
    mlflow_differs,
    outs_differ,
    repro,
    runs_of,
    seconds_to_end,
    trainers,
)

# When a kill comes: as the training goes on, at its end, or in the next stage; the moment; then
# the stage, a file, a function in it, a word of the line (.: any line), and how many such lines
# go by at most before it. They are few, so that a training has some 10 steps between two kills.
MOMENTS = """
on    while the program starts         train     torch/__init__.py     <module>          .         400
on    while the program starts         train     stages/train.py       run               .          12
on    while the program starts         train     folio/folio.training/checkpoint.py   load              .           8
on    in mid-accumulation              train     folio/folio.training/step.py         Step._step        backward   40
on    in mid-accumulation              train     folio/folio.gpt/model.py        Block.forward     .         160
on    inside the optimizer's update    train     torch/optim/adam.py   _fused_adam       .         800
on    inside an evaluation             train     folio/folio.gpt/validation.py         token_losses      .          60
on    at an epoch's edge               train     folio/folio.tokens/token_files.py       Batches._windows  permut      3
on    inside a checkpoint write        train     folio/folio.training/checkpoint.py   save              .          80
on    inside a checkpoint write        train     folio/folio.training/checkpoint.py   _fsync            fsync      16
on    inside a checkpoint write        train     shutil.py             _rmtree_safe_fd   .          60
on    between checkpoint and history   train     folio/folio/run.py      write_history     .           3
on    between checkpoint and history   train     folio/folio/files.py        replacing         replace(    4
on    while telling MLflow             train     folio/folio.tracking/store.py     Store.send        .          50
on    while telling MLflow             train     folio/folio.tracking/store.py     Store._open       .          12
on    at a random time                 .         .                     .                 .           1
end   while the outs are written       train     stages/train.py       _write_outs       .          15
end   while the outs are written       train     folio/folio.gpt/huggingface.py  save              .          25
end   while the outs are written       train     folio/folio/files.py        replacing         .          40
end   while telling MLflow             train     folio/folio.tracking/store.py     Store._upload     .          60
end   just before the stage exits      train     folio/folio/run.py         only_trainer      release     1
end   just before the stage exits      train     threading.py          _shutdown         .           3
next  inside the evaluate stage        evaluate  stages/evaluate.py    run               .          15
next  inside the evaluate stage        evaluate  folio/folio.gpt/validation.py         token_losses      .          40
next  inside the evaluate stage        evaluate  folio/folio.tracking/store.py     Store.complete    .           4
next  inside the evaluate stage        evaluate  shutil.py             _rmtree_safe_fd   .          30
"""  # noqa: E501
PLAIN = "at a random time"
PLACES = [re.split("  +", line) for line in MOMENTS.strip().splitlines()]

Row = tuple[str, int, int, str]  # the fault, how often tried, how often survived, a note


class Bench:
    """The undisturbed run, and as many copies of its beginning as there are faults."""

    def __init__(self, place: Path, options: argparse.Namespace):
        self.place, self.options = place, options
        project.write_project(place / "base", options.variant, project.tiny(options))
        repro(place / "base", "prepare").finish()
        self.peer = self.fresh()
        repro(self.peer).finish()

    def fresh(self) -> Path:
        """A copy with data prepared and nothing trained, in a folder of its own."""
        folder = Path(tempfile.mkdtemp(dir=self.place)) / "project"
        shutil.copytree(self.place / "base", folder)
        return folder

    def half_way(self, deed: str = "be slow") -> str:
        """A fault in the middle of the steps; to be slow lasts until Command.hurry."""
        return f"train|stages/train.py|Trainer.advance|take_step|{self.options.steps // 2}|{deed}"

    def compare(self, folder: Path, wrong: list[str], address: str = "") -> str:
        """What was wrong with a training, and how its end differs; "" is as it should be."""
        try:
            store = address or f"sqlite:///{folder / 'mlflow.db'}"
            found = [*outs_differ(self.peer, folder), *mlflow_differs(folder, store)]
        except Exception as problem:  # whatever is missing or damaged
            found = [repr(problem)]
        return "; ".join(wrong + found)

    def verdict(
        self, name: str, folder: Path, note: str, wrong: list[str], address: str = ""
    ) -> list[Row]:
        """The row of a fault tried once, whose training has been brought to its end."""
        different = self.compare(folder, wrong, address)
        return [(name, 1, int(not different), f"{note}; {different}" if different else note)]


# The faults


def kills(bench: Bench) -> list[Row]:
    """SIGKILL at random moments of one training, until there have been so many."""
    dice, folder, number = random.Random(bench.options.seed), bench.fresh(), bench.options.kills
    tried, groups, wrong, queue = Counter(), 0, [], []
    end = time.monotonic() + 60 * bench.options.minutes
    for turn in range(2 * number):
        left = number - tried.total()
        on = latest_step(folder) < bench.options.steps - 10 * EVERY and left > 0.28 * number
        phase = "on" if on else "end" if left > 0.12 * number else "next"
        names = list(dict.fromkeys(place[1] for place in PLACES if place[0] == phase))
        queue = [name for name in queue if name in names] or dice.sample(names, len(names))
        if (
            not left
            or wrong
            or time.monotonic() > end
            or (folder / "dvc.lock").read_text().count("cmd:") == 3
        ):
            break  # with three stages done there is nothing left to kill
        name, whole_group = queue.pop(), turn % 2 == 1
        _, _, *place = dice.choice([place for place in PLACES if place[:2] == [phase, name]])
        far = latest_step(folder) + 8 * EVERY if on else sys.maxsize
        if killed := kill(folder, dice, place, whole_group, far, wrong):
            name = name if killed == "there" else PLAIN
            tried[name] += 1
            groups += whole_group
            print(f"kill {tried.total()}: {name}, step {latest_step(folder)}", file=sys.stderr)
    last = repro(folder)
    if last.wait():
        wrong.append(f"the last `dvc repro` failed: {last.said[-500:]}")
    different = bench.compare(folder, wrong)
    rows = [
        (f"kill {name}", tried[name], 0 if different else tried[name], "")
        for name in dict.fromkeys(place[1] for place in PLACES)
        if tried[name]
    ]
    note = f"seed {bench.options.seed}, {groups} with dvc's whole group; {different or 'all equal'}"
    return [*rows, (f"all {tried.total()} in one training", 1, int(not different), note)]


def kill(
    folder: Path,
    dice: random.Random,
    place: list[str],
    whole_group: bool,
    far: int,
    wrong: list[str],
) -> str:
    """Run `dvc repro`, and kill it at the place, or anywhere when it gets to a step too far.

    Returns "there", "elsewhere", or "" where it came to its end before.
    """
    *where, most = place
    timed = where[0] == "."
    end = time.monotonic() + (dice.uniform(0, 8) if timed else LIMIT)
    deed = "kill the group" if whole_group else "kill the stage"
    where[-1] = where[-1].replace(".", "")
    fault = "|".join([*where, str(dice.randint(1, int(most))), deed])
    command = repro(folder, fault="" if timed else fault)
    while command.process.poll() is None and latest_step(folder) < far and time.monotonic() < end:
        time.sleep(0.02)
    late = command.process.poll() is None and not command.mark.exists()
    if late:
        victims = [] if whole_group else trainers(folder)
        for victim in victims:
            victim.kill()
        if not victims:
            command.kill_group()
    status, done = command.wait(), late or command.mark.exists()
    if done != bool(status):
        wrong.append(f"`dvc repro` exits with {status}, killed or not: {command.said[-500:]}")
    return "elsewhere" if late else "there" if done else ""


def latest_step(folder: Path) -> int:
    found = [int(p.name[5:]) for p in folder.glob(".checkpoints/*/step-*") if p.name[5:].isdigit()]
    return max(found, default=0)


def told_to_stop(number: signal.Signals, cause: str, bench: Bench) -> list[Row]:
    """SIGTERM goes to the trainer alone, Ctrl-C to all that the terminal runs."""
    folder = bench.fresh()
    command = repro(folder, fault=bench.half_way())
    trainer = command.reached()
    if number == signal.SIGINT:
        os.killpg(command.process.pid, number)
    else:
        trainer.send_signal(number)
    seconds = seconds_to_end(trainer)
    command.wait()
    wrong = [] if seconds < 10 else ["that is too slow"]
    wrong += unsaid(command, f"stopped by {cause}")
    repro(folder).finish()
    return bench.verdict(f"{cause}", folder, f"gone after {seconds:.1f} s", wrong)


def unsaid(command: Command, line: str) -> list[str]:
    wrong = [] if line in command.said else [f"did not say {line!r}"]
    return wrong + (["a traceback"] if "Traceback" in command.said else [])


def dvc_killed(bench: Bench) -> list[Row]:
    """The trainer must end with its dvc; a `dvc repro` comes at once, and may not train beside."""
    folder = bench.fresh()
    command = repro(folder, fault=bench.half_way())
    trainer = command.reached()
    command.process.kill()
    command.wait()
    again = repro(folder, fault=bench.half_way())
    seconds = seconds_to_end(trainer)
    wrong = [] if seconds < 10 else ["that is too slow"]
    wrong += ["two trainers beside each other"] if len(trainers(folder)) > 1 else []
    wrong += unsaid(command, "stopped by the end of dvc")
    again.hurry()
    again.finish()
    note = f"trainer gone after {seconds:.1f} s; a `dvc repro` at once went on"
    return bench.verdict("SIGKILL of dvc alone", folder, note, wrong)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated": lambda file: os.truncate(file, file.stat().st_size // 2),
    "bit-flipped": flip,
    "empty": lambda file: os.truncate(file, 0),
    "missing": Path.unlink,
}


def broken_off(bench: Bench) -> tuple[Path, list[Path]]:
    """A project whose training was killed, and the states of its checkpoints, oldest first."""
    folder = bench.fresh()
    repro(folder, fault=bench.half_way("kill the group")).wait()
    return folder, sorted(folder.glob(".checkpoints/*/step-*/state.safetensors"))


def damaged(kind: str, bench: Bench) -> list[Row]:
    folder, states = broken_off(bench)
    DAMAGES[kind](states[-1])
    command = repro(folder)
    command.finish()
    former = int(states[-2].parent.name[5:])
    wrong = unsaid(command, f"{states[-1].parent.name} is damaged")
    wrong += unsaid(command, f"going on from the checkpoint of step {former:,}")
    return bench.verdict(f"newest checkpoint {kind}", folder, f"on from step {former}", wrong)


def all_damaged(bench: Bench) -> list[Row]:
    """It has to stop and say so. Once the user has removed them, it trains from the start."""
    folder, states = broken_off(bench)
    for state in states:
        DAMAGES["truncated"](state)
    command = repro(folder)
    wrong = ["it did not stop"] if command.wait() == 0 else []
    wrong += unsaid(command, "every checkpoint in")
    shutil.rmtree(folder / ".checkpoints")
    repro(folder).finish()
    wrong += outs_differ(bench.peer, folder)
    note = "stops with one line; removed, it trains anew to the same weights"
    return [("all checkpoints damaged", 1, int(not wrong), "; ".join([note, *wrong]))]


def server_away(there_at_first: bool, bench: Bench) -> list[Row]:
    """The server is there at the start, or at the end, and in between it is not."""
    folder = bench.fresh()
    with Server(folder.parent) as server:
        if there_at_first:
            server.start()
        command = repro(folder, fault=bench.half_way(), address=server.address)
        command.reached()
        if there_at_first:
            server.kill()
        while "going on without it" not in command.said and command.process.poll() is None:
            time.sleep(0.05)
        server.start()
        command.hurry()
        command.finish()
        wrong = unsaid(command, "going on without it")
        name = "MLflow server killed" if there_at_first else "MLflow server away at the start"
        note = f"said {command.said.count('going on without it')} times; back in the middle"
        return bench.verdict(name, folder, note, wrong, server.address)


def server_gone(bench: Bench) -> list[Row]:
    folder = bench.fresh()
    with Server(folder.parent) as server:
        repro(folder, address=server.address).finish()
        server.start()
        client, had = mlflow.MlflowClient(server.address), []
        for _ in range(2):
            sync = Command(folder, "folio", "sync", address=server.address)
            sync.finish()
            had.append([run.to_dictionary() for run in runs_of(client)])
        wrong = [] if had[0] == had[1] else ["the second changes what the first has sent"]
        note = f"the second says {sync.said.strip().splitlines()[-1]!r}"
        name = "MLflow away to the end, folio sync twice"
        return bench.verdict(name, folder, note, wrong, server.address)


def two_at_once(bench: Bench) -> list[Row]:
    folder = bench.fresh()
    both = [repro(folder), repro(folder)]
    statuses = sorted(command.wait() for command in both)
    wrong = [] if statuses[0] == 0 else ["both failed"]
    return bench.verdict("two dvc repro at once", folder, f"exit statuses {statuses}", wrong)


ROWS: dict[str, Callable[[Bench], list[Row]]] = {
    "kills": kills,
    "sigterm": partial(told_to_stop, signal.SIGTERM, "SIGTERM"),
    "ctrl-c": partial(told_to_stop, signal.SIGINT, "Ctrl-C"),
    "dvc-killed": dvc_killed,
    **{f"checkpoint-{kind}": partial(damaged, kind) for kind in DAMAGES},
    "checkpoints-all-damaged": all_damaged,
    "server-away-at-start": partial(server_away, False),
    "server-killed": partial(server_away, True),
    "server-gone": server_gone,
    "two-repro": two_at_once,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=ROWS, metavar="ROW", help=f"one of {', '.join(ROWS)}")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=60, help="no more kills after these")
    parser.add_argument("--seed", type=int, default=0, help="of the kills' moments")
    project.add_options(parser, steps=500)
    options = parser.parse_args()
    if not importlib.util.find_spec("dvc"):
        sys.exit("dvc is not installed here: `make run` installs it")
    started, bad = time.monotonic(), False
    with tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True) as place:
        bench = Bench(Path(place), options)
        print(project.headline(bench.peer), flush=True)
        print(f"{'fault':<40}  tried  survived  note")
        for name in [options.only] if options.only else ROWS:
            try:
                table = ROWS[name](bench)
            except Exception as problem:  # a fault that stops this script is not survived
                table = [(name, 1, 0, str(problem) or repr(problem))]
            for fault, tried, survived, note in table:
                print(f"{fault:<40}  {tried:5}  {survived:8}  {note}", flush=True)
                bad |= survived < tried
    print(f"{time.monotonic() - started:,.0f} s in all")
    sys.exit(bad)


if __name__ == "__main__":
    main()
