"""Interrupts training in many ways and checks that `dvc repro` still produces the same results.

    python -m benchmarks.faults                                     # everything, on a tiny model
    python -m benchmarks.faults --only kills --variant seed-30m --precision bf16

Trains temporary projects without interruption and with each fault, and compares the weights byte by
byte, the history row by row and MLflow's data point by point. Does not use the network.
"""

import argparse
import importlib.util
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import mlflow

from benchmarks import project
from benchmarks.bench import Bench, Row
from benchmarks.comparison import compare_outs, list_runs
from benchmarks.kills import kills
from benchmarks.project import Command, Server, repro, seconds_to_end, trainers
from folio.errors import one_line_errors


def stop(number: signal.Signals, cause: str, bench: Bench) -> list[Row]:
    """Send SIGTERM to the trainer alone, or Ctrl-C to the whole process group."""
    folder = bench.new_project()
    command = repro(folder, fault=bench.half_way())
    trainer = command.wait_for_fault()
    if number == signal.SIGINT:
        os.killpg(command.process.pid, number)
    else:
        trainer.send_signal(number)
    seconds = seconds_to_end(trainer)
    command.wait()
    problems = [] if seconds < 10 else ["it took too long"]
    problems += check_output(command, f"stopped by {cause}")
    repro(folder).finish()
    return bench.verdict(cause, folder, f"ended after {seconds:.1f} s", problems)


def check_output(command: Command, line: str) -> list[str]:
    """The problems with a command's output, which must contain the line and no traceback."""
    problems = [] if line in command.output else [f"it did not print {line!r}"]
    return problems + (["a traceback"] if "Traceback" in command.output else [])


def dvc_killed(bench: Bench) -> list[Row]:
    """The trainer must exit when dvc does. A `dvc repro` started right away must wait for that."""
    folder = bench.new_project()
    command = repro(folder, fault=bench.half_way())
    trainer = command.wait_for_fault()
    command.process.kill()
    command.wait()
    again = repro(folder, fault=bench.half_way())
    seconds = seconds_to_end(trainer)
    problems = [] if seconds < 10 else ["it took too long"]
    problems += ["two trainers at once"] if len(trainers(folder)) > 1 else []
    problems += check_output(command, "stopped by the exit of dvc")
    again.speed_up()
    again.finish()
    note = f"trainer ended after {seconds:.1f} s; a `dvc repro` right away resumed"
    return bench.verdict("SIGKILL of dvc alone", folder, note, problems)


def flip_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated": lambda file: os.truncate(file, file.stat().st_size // 2),
    "bit-flipped": flip_bit,
    "empty": lambda file: os.truncate(file, 0),
    "missing": Path.unlink,
}


def killed_half_way(bench: Bench) -> tuple[Path, list[Path]]:
    """A project whose training was killed, and the states of its checkpoints, oldest first."""
    folder = bench.new_project()
    repro(folder, fault=bench.half_way("kill the group")).wait()
    return folder, sorted(folder.glob(".checkpoints/*/step-*/state.safetensors"))


def damage(kind: str, bench: Bench) -> list[Row]:
    folder, states = killed_half_way(bench)
    DAMAGES[kind](states[-1])
    command = repro(folder)
    command.finish()
    previous = int(states[-2].parent.name[5:])
    problems = check_output(command, f"{states[-1].parent.name} is damaged")
    problems += check_output(command, f"resuming from the checkpoint of step {previous:,}")
    note = f"resumed from step {previous}"
    return bench.verdict(f"newest checkpoint {kind}", folder, note, problems)


def damage_all(bench: Bench) -> list[Row]:
    """Training must stop with a message. Once all checkpoints are removed, it must start over."""
    folder, states = killed_half_way(bench)
    for state in states:
        DAMAGES["truncated"](state)
    command = repro(folder)
    problems = ["it did not stop"] if command.wait() == 0 else []
    problems += check_output(command, "every checkpoint in")
    shutil.rmtree(folder / ".checkpoints")
    repro(folder).finish()
    problems += compare_outs(bench.uninterrupted, folder)
    note = "stops with one line; once they are removed, trains to the same weights"
    return [("all checkpoints damaged", 1, int(not problems), "; ".join([note, *problems]))]


def server_outage(from_start: bool, bench: Bench) -> list[Row]:
    """The MLflow server is down from the start or killed halfway, and then comes back."""
    folder, line = bench.new_project(), "continuing without it"
    with Server(folder.parent) as server:
        if not from_start:
            server.start()
        command = repro(folder, fault=bench.half_way(), uri=server.uri)
        command.wait_for_fault()
        if not from_start:
            server.kill()
        while line not in command.output and command.process.poll() is None:
            time.sleep(0.05)
        server.start()
        command.speed_up()
        command.finish()
        problems = check_output(command, line)
        name = "MLflow server down at the start" if from_start else "MLflow server killed"
        note = f"reported {command.output.count(line)} times; back in the middle of training"
        return bench.verdict(name, folder, note, problems, server.uri)


def server_never_there(bench: Bench) -> list[Row]:
    folder = bench.new_project()
    with Server(folder.parent) as server:
        repro(folder, uri=server.uri).finish()
        server.start()
        client, states = mlflow.MlflowClient(server.uri), []
        for _ in range(2):
            sync = Command(folder, "folio", "sync", uri=server.uri)
            sync.finish()
            states.append([run.to_dictionary() for run in list_runs(client)])
        problems = [] if states[0] == states[1] else ["the second sync changed something"]
        note = f"the second sync printed {sync.output.strip().splitlines()[-1]!r}"
        name = "MLflow server down, then folio sync twice"
        return bench.verdict(name, folder, note, problems, server.uri)


def two_at_once(bench: Bench) -> list[Row]:
    folder = bench.new_project()
    commands = [repro(folder), repro(folder)]
    statuses = sorted(command.wait() for command in commands)
    problems = [] if statuses[0] == 0 else ["both failed"]
    return bench.verdict("two dvc repro at once", folder, f"exit statuses {statuses}", problems)


FAULTS: dict[str, Callable[[Bench], list[Row]]] = {
    "kills": kills,
    "sigterm": partial(stop, signal.SIGTERM, "SIGTERM"),
    "ctrl-c": partial(stop, signal.SIGINT, "Ctrl-C"),
    "dvc-killed": dvc_killed,
    **{f"checkpoint-{kind}": partial(damage, kind) for kind in DAMAGES},
    "checkpoints-all-damaged": damage_all,
    "server-away-at-start": partial(server_outage, True),
    "server-killed": partial(server_outage, False),
    "server-gone": server_never_there,
    "two-repro": two_at_once,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ", ".join(FAULTS)
    parser.add_argument("--only", choices=FAULTS, metavar="FAULT", help=f"one of {names}")
    parser.add_argument("--kills", type=int, default=50, help="number of kills")
    parser.add_argument("--minutes", type=float, default=60, help="time limit for kills")
    parser.add_argument("--seed", type=int, default=0, help="seed for the moments of the kills")
    project.add_options(parser, steps=500)
    options = parser.parse_args()
    if not importlib.util.find_spec("dvc"):
        sys.exit("dvc is not installed: `make run` installs it")
    started, failed = time.monotonic(), False
    with tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True) as folder:
        bench = Bench(Path(folder), options)
        print(project.headline(bench.uninterrupted), flush=True)
        print(f"{'fault':<42}  tried  survived  note")
        for name in [options.only] if options.only else FAULTS:
            try:
                rows = FAULTS[name](bench)
            except Exception as error:  # a fault that breaks this script was not survived
                rows = [(name, 1, 0, str(error) or repr(error))]
            for fault, tried, survived, note in rows:
                print(f"{fault:<42}  {tried:5}  {survived:8}  {note}", flush=True)
                failed |= survived < tried
    print(f"{time.monotonic() - started:,.0f} s in total")
    sys.exit(failed)


if __name__ == "__main__":
    with one_line_errors():
        main()
