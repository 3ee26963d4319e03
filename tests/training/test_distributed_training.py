"""Training on several processes: the same losses, weights and checkpoints as on one."""

import contextlib
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_trainer import MODEL, TRAIN, make_trainer

from folio import signals
from folio.distributed import Group, join
from folio.errors import LAUNCHER, UserError
from folio.training.micro_batches import micro_batches, useful_processes

PARAMS = {"batch_size": 4, "accumulation": 3, "gradient_checkpointing": False}
PARAMS |= {"overfit_batches": 4}  # of 6 steps


@pytest.fixture(scope="module")
def server():
    """A process that has imported everything, and is forked for each process of a test."""
    path = os.pathsep.join(sys.path)
    inherited = {name: value for name, value in os.environ.items() if name != LAUNCHER}
    process = subprocess.Popen(
        [sys.executable, __file__],
        env=inherited | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield process
    process.stdin.close()
    assert process.wait(10) == 0


@pytest.fixture
def spawn(server):
    def run(count, *words, expected=0):
        """Run a command of this file in `count` processes. Returns their output.

        expected: the exit status of all, or of each."""
        print(json.dumps([count, *map(str, words)]), file=server.stdin, flush=True)
        statuses, outputs = json.loads(server.stdout.readline())
        wanted = expected if isinstance(expected, list) else [expected] * count
        assert statuses == wanted, "\n".join(outputs)
        return outputs

    return run


def serve():
    for name in ("folio.training.sharded_weights", "folio.training.sharded_checkpoint"):
        importlib.import_module(name)
    importlib.import_module("torch._dynamo")  # otherwise each process with FSDP imports it
    gc.freeze()
    for line in sys.stdin:
        count, *words = json.loads(line)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ.update(shared | {"GLOO_SOCKET_IFNAME": "lo"})
        logs = [tempfile.TemporaryFile("w+") for _ in range(count)]  # noqa: SIM115
        processes = [fork(rank, log, words) for rank, log in enumerate(logs)]
        statuses = [os.waitstatus_to_exitcode(os.waitpid(each, 0)[1]) for each in processes]
        outputs = [log.read() for log in logs if not log.seek(0)]
        print(json.dumps([statuses, outputs]), flush=True)


def fork(rank, log, words):
    """Run a command in a child process, as torchrun would. Returns its id."""
    if child := os.fork():
        return child
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank)})
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    status = 1
    try:
        commands = {"train": train, "fail": fail, "stop": stop, "meet": meet, "hold": hold}
        commands[words[0]](*words[1:])
        status = 0
    except SystemExit as exit:
        status = exit.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def train(folder, parallel, precision, until):
    """Train from the checkpoint in the folder, if any, and save losses and weights there."""
    folder, until, group = Path(folder), int(until), join("cpu")
    settings = replace(TRAIN, **PARAMS, parallel=parallel)
    trainer = make_trainer(replace(MODEL, dropout=0.0), settings, precision, group)
    trainer.resume(folder)
    while trainer.steps_done < until:
        group.check_stop()
        step = trainer.steps_done
        trainer.step(trainer.batches(step), trainer.learning_rate(step))
        row = trainer.read() | {"val_loss": trainer.validate()}
        trainer.early_stopping.update(row["val_loss"], trainer.steps_done, trainer.weights.state())
        trainer.log(row)
    trainer.save(folder)
    weights = {name: t.clone() for name, t in trainer.weights.full(trainer.weights.state())}
    best = {
        name: t.clone() for name, t in trainer.weights.full(trainer.early_stopping.best_weights)
    }
    if group.is_main:
        save_file(weights, folder / "weights.safetensors")
        save_file(best, folder / "best.safetensors")
        rows = [{k: v for k, v in row.items() if k != "time"} for row in trainer.history.rows]
        (folder / "rows.json").write_text(json.dumps(rows))
    group.leave()


@pytest.fixture
def run(spawn):
    def trained(folder, count, parallel="auto", precision="fp32", until=6):
        """Returns the rows of the history and the weights, whole."""
        folder.mkdir(exist_ok=True)
        spawn(count, "train", folder, parallel, precision, until)
        rows = json.loads((folder / "rows.json").read_text())
        return rows, load_file(folder / "weights.safetensors")

    return trained


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The history and the weights of one process."""
    folder = tmp_path_factory.mktemp("single")
    train(folder, "auto", "fp32", 6)
    rows = json.loads((folder / "rows.json").read_text())
    return rows, load_file(folder / "weights.safetensors")


@pytest.mark.parametrize("count, parallel", [(2, "ddp"), (4, "ddp"), (2, "fsdp"), (3, "fsdp")])
def test_processes_have_the_losses_of_one(run, tmp_path, single, count, parallel):
    rows, weights = run(tmp_path, count, parallel)
    for mine, its in zip(rows, single[0], strict=True):
        assert mine == pytest.approx(its, rel=2e-5)
    for name, weight in single[1].items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_processes_in_half_precision_have_the_losses_of_one(run, tmp_path, parallel, precision):
    one, _ = run(tmp_path / "one", 1, "auto", precision)
    two, _ = run(tmp_path / "two", 2, parallel, precision)
    for mine, its in zip(two, one, strict=True):
        assert mine == pytest.approx(its, rel=0.02)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_processes_resume_bit_for_bit(run, tmp_path, parallel):
    uninterrupted = run(tmp_path / "uninterrupted", 2, parallel, "bf16")
    run(tmp_path / "stopped", 2, parallel, "bf16", until=3)
    rows, weights = run(tmp_path / "stopped", 2, parallel, "bf16")
    assert rows == uninterrupted[0]
    assert all(torch.equal(weights[name], w) for name, w in uninterrupted[1].items())
    best = [
        load_file(tmp_path / name / "best.safetensors") for name in ("stopped", "uninterrupted")
    ]
    assert all(torch.equal(best[0][name], weight) for name, weight in best[1].items())


@pytest.mark.parametrize(
    "before, after",
    [((2, "fsdp"), (1, "auto")), ((1, "auto"), (2, "fsdp")), ((2, "fsdp"), (3, "fsdp"))],
)
def test_checkpoint_of_another_number_of_processes_resumes(run, tmp_path, single, before, after):
    run(tmp_path, *before, until=3)
    rows, weights = run(tmp_path, *after)
    for mine, its in zip(rows, single[0], strict=True):
        assert mine == pytest.approx(its, rel=2e-5)
    for name, weight in single[1].items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=2e-5)


def test_sharded_checkpoint_has_no_pickle_and_detects_damage(run, spawn, tmp_path):
    run(tmp_path, 2, "fsdp", until=2)
    [step] = tmp_path.glob("step-*")
    names = sorted(str(f.relative_to(step)) for f in step.rglob("*") if f.is_file())
    assert names[0] == "sha256" and len(names) == 4
    assert all(name.endswith(".safetensors") for name in names[1:])
    shard = step / names[1]
    assert shard.parent.name == "shards"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    output = "".join(spawn(2, "train", tmp_path, "fsdp", "fp32", 3, expected=1))
    assert "UserError: every checkpoint in" in output


def test_sharded_checkpoint_on_a_full_disk_names_the_place(spawn, small_disk):
    small_disk.fill()
    output = "".join(spawn(2, "train", small_disk.folder / "run", "fsdp", "fp32", 1, expected=1))
    assert f"No space left on device: '{small_disk.folder}/run/step-00000001'" in output


def test_error_in_one_process_ends_all_and_is_reported_once(spawn):
    outputs = spawn(3, "fail", expected=1)
    assert ["disk full" in output for output in outputs] == [False, True, False]
    assert not any("Traceback" in output for output in outputs)


def test_stop_request_in_one_process_stops_all_at_the_same_step(spawn):
    outputs = spawn(3, "stop", expected=143)
    steps = [
        line.split()[1] for output in outputs for line in output.splitlines() if "step" in line
    ]
    assert len(steps) == 3 and len(set(steps)) == 1
    assert "".join(outputs).count("stopped by SIGTERM") == 1


def fail():
    from folio.errors import one_line_errors

    with one_line_errors():
        group = join("cpu")
        with group.agreeing():
            if group.rank == 1:
                raise UserError("disk full: free some space")


def stop():
    from folio.errors import one_line_errors

    with one_line_errors(), signals.deferred():
        group = join("cpu")
        for step in range(10_000):
            try:
                group.check_stop()
            except signals.Stopped:
                print("step", step, flush=True)
                group.leave()
                raise
            if group.rank == 2 and step == 20:
                os.kill(os.getpid(), 15)


@pytest.mark.parametrize(
    ("rank", "count", "awaited"),
    [(0, 2, "process 1"), (0, 3, "the other 2 processes"), (1, 3, "process 0")],
)
def test_process_that_waits_for_others_says_so_and_stops_at_once(spawn, rank, count, awaited):
    [output] = spawn(1, "meet", rank, count, expected=143)
    waiting, stopped = [line for line in output.splitlines() if line.startswith("folio")]
    assert f": waiting for {awaited} at 127.0.0.1:" in waiting
    assert stopped.endswith(": stopped by SIGTERM; run the same command again to continue")


def meet(rank, count):
    """Wait for processes that do not exist, until SIGTERM, which comes after the report."""
    from folio import distributed, errors
    from folio.errors import one_line_errors

    def report_and_stop(text):
        report(text)
        if text.startswith("waiting"):
            threading.Timer(0.1, os.kill, [os.getpid(), signal.SIGTERM]).start()

    distributed._SECONDS_BEFORE_REPORT = 0.1
    report, errors.report = errors.report, report_and_stop
    os.environ.update({"RANK": rank, "WORLD_SIZE": count})
    with one_line_errors():
        begin = time.monotonic()
        try:
            join("cpu")
        finally:
            assert time.monotonic() - begin < 3


def test_process_that_waits_for_a_lock_of_the_main_one_stops_after_the_grace_period(spawn):
    outputs = spawn(2, "hold", expected=[0, 143])
    assert "(process 1): stopped by SIGTERM" in outputs[1]


def hold():
    """Stop process 1 while process 0 waits for its lock, which it gets once process 1 has ended."""
    from folio.errors import one_line_errors

    @contextlib.contextmanager
    def lock():
        processes = psutil.Process(os.getppid()).children()
        [other] = [each for each in processes if each.pid != os.getpid()]
        for _ in range(2_000):
            if other.status() == psutil.STATUS_ZOMBIE:
                os._exit(0)
            time.sleep(0.01)
        yield

    signals.GRACE_PERIOD = 0.2
    with one_line_errors():
        group = join("cpu")
        if group.rank == 1:
            threading.Timer(0.1, os.kill, [os.getpid(), signal.SIGTERM]).start()
        with group.main_holds(lock()):
            pass


class Pretended(Group):
    def __init__(self, rank, count):
        self.rank, self.count = rank, count


@pytest.mark.parametrize(
    "windows, batch_size, count", [(32, 8, 1), (32, 8, 2), (30, 8, 4), (9, 3, 2)]
)
def test_micro_batches_cover_the_windows_of_a_step(windows, batch_size, count):
    shares = [micro_batches(windows, batch_size, Pretended(n, count)) for n in range(count)]
    covered = [n for share in shares for first, size in share for n in range(first, first + size)]
    assert covered == list(range(windows))
    assert len({len(share) for share in shares}) == 1
    assert all(1 <= size <= batch_size for share in shares for _, size in share)


def test_micro_batches_of_one_process_are_those_of_params():
    assert micro_batches(24, 8, Group()) == [(0, 8), (8, 8), (16, 8)]


@pytest.mark.parametrize("windows, batch_size, count", [(2, 2, 4), (3, 1, 2)])
def test_params_reject_more_processes_than_can_share_a_step(windows, batch_size, count):
    p = replace(TRAIN, batch_size=batch_size, accumulation=windows // batch_size)
    with pytest.raises(UserError, match=f"{count} processes cannot share the {windows} windows"):
        p.check_processes(count)


def test_useful_processes_have_enough_tokens_each():
    assert useful_processes(replace(TRAIN, batch_size=8, accumulation=1), 64) == 1
    assert useful_processes(replace(TRAIN, batch_size=64, accumulation=4), 1024) == 64
    assert useful_processes(replace(TRAIN, batch_size=1, accumulation=9), 8192) == 9
    assert useful_processes(replace(TRAIN, batch_size=64, parallel="none"), 1024) == 1


def test_srun_of_several_tasks_is_joined(monkeypatch):
    from folio import distributed

    monkeypatch.delenv("RANK", raising=False)
    for name, value in {
        "STEP_ID": 3,
        "STEP_NUM_TASKS": 4,
        "PROCID": 2,
        "LOCALID": 0,
        "JOB_ID": 7,
    }.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    monkeypatch.setenv("MASTER_ADDR", "node1")
    monkeypatch.setenv("MASTER_PORT", "")
    monkeypatch.delenv("MASTER_PORT")
    assert distributed._from_srun() == (2, 4, 0)
    assert os.environ["MASTER_PORT"] == "20703"
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")  # `srun` of one task, or a batch script
    assert distributed._from_srun() is None


def test_srun_without_scontrol_needs_an_address(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="set MASTER_ADDR to the first"):
        join("cpu")


TWO = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "29500"}
TASKS = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0"}


@pytest.mark.parametrize(
    ("others", "name", "value", "allowed"),
    [
        (TWO, "RANK", "5", "from 0 to 1"),
        (TWO, "RANK", "-1", "from 0 to 1"),
        (TWO, "RANK", "", "from 0 to 1"),
        (TWO, "WORLD_SIZE", "0", "of at least 1"),
        (TWO, "WORLD_SIZE", "-2", "of at least 1"),
        (TWO, "WORLD_SIZE", "x", "of at least 1"),
        (TWO, "LOCAL_RANK", "-1", "of at least 0"),
        (TWO, "MASTER_PORT", "65536", "from 1 to 65535"),
        (TASKS | {"SLURM_LOCALID": "0", "MASTER_ADDR": "x"}, "SLURM_PROCID", "2", "from 0 to 1"),
        ({}, "SLURM_STEP_NUM_TASKS", "-2", "of at least 1"),
    ],
)
def test_environment_with_an_impossible_number_is_rejected(
    monkeypatch, others, name, value, allowed
):
    for each in TWO:
        monkeypatch.delenv(each, raising=False)
    for each, its in (others | {name: value}).items():
        monkeypatch.setenv(each, its)
    with pytest.raises(UserError, match=f"variable {name} is '{value}', not a number {allowed}"):
        join("cpu")


def test_missing_network_interface_is_named_with_those_that_exist(monkeypatch):
    for name, value in (TWO | {"GLOO_SOCKET_IFNAME": "none0"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"GLOO_SOCKET_IFNAME is 'none0', but .* are .*lo"):
        join("cpu")


def test_join_reports_an_unreachable_main_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match="process 1 of 2 cannot reach the others"):
        join("cpu")


if __name__ == "__main__":
    serve()
    os._exit(0)  # without finalizing all that PyTorch has created
