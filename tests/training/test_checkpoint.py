"""A checkpoint is the complete state, written whole or not at all, and checked when it is read."""

import contextlib
import itertools
import json
import multiprocessing
import os
import resource
import signal

import numpy as np
import pytest
import torch

from folio import device
from folio.errors import UserError
from folio.gpt.model import GPT, ModelParams
from folio.tokens import batches
from folio.training import checkpoint, optimizer_state, optimizers
from folio.training.checkpoint import Checkpoint
from folio.training.step import TrainStep
from folio.training.weights import Weights

PARAMS = ModelParams(n_layer=2, n_head=2, n_embd=16, block_size=8, dropout=0.2)
ROWS = 50


class Training:
    """What Trainer does with checkpoints, around a tiny model."""

    def __init__(self, seed, precision="fp32", params=PARAMS):
        device.seed(seed)
        self.model = GPT(params, ROWS)
        self.optimizer = optimizers.adamw(self.model.parameters(), 0.1, (0.9, 0.95))
        self.take_step = TrainStep(Weights(self.model, precision), self.optimizer, grad_clip=1.0)
        text = np.random.default_rng(1).integers(ROWS, size=400).astype(np.uint16)
        self.batches = batches.Batches(text, params.block_size, seed=1)
        self.step = 0

    def train(self, until):
        """Train until step `until`; return the losses."""
        losses = []
        while self.step < until:
            device.seed_step(1, self.step, torch.device("cpu"))
            self.take_step([self.batches.windows(4 * self.step, 4)], learning_rate=1e-2)
            losses.append(self.take_step.read().loss)
            self.take_step.reset()
            self.step += 1
        return losses

    def save(self, folder):
        _, rest = optimizer_state.save(self.optimizer)
        checkpoint.save(folder, Checkpoint(self.step, self.tensors(), {"optimizer": rest}))

    def resume(self, folder):
        found = checkpoint.load_latest(folder)
        self.model.load_state_dict(found.part("model"))
        rest = found.state["optimizer"]
        optimizer_state.restore(self.optimizer, found.part("optimizer"), rest)
        self.take_step.load_state_dict(found.part("step"))
        self.step = found.step

    def tensors(self):
        optimizer, _ = optimizer_state.save(self.optimizer)
        parts = {
            "model": self.model.state_dict(),
            "optimizer": optimizer,
            "step": self.take_step.state_dict(),
        }
        return {f"{part}.{name}": t for part, found in parts.items() for name, t in found.items()}


def assert_equal(tensors, others):
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name


@pytest.fixture
def folder(tmp_path):
    """A folder with checkpoints of steps 2 and 3."""
    for step in (1, 2, 3):
        write(tmp_path / "key", step)
    return tmp_path / "key"


def write(folder, step, numbers=100):
    content = {"model.w": torch.full((numbers,), step)}
    checkpoint.save(folder, Checkpoint(step, content, {"history": [{"step": step}]}))


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextlib.contextmanager
def full_disk(limit):
    """Limit the size of files to `limit` bytes within the block."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def exit_code(function):
    """Run a function in a fork of this process."""

    def run():
        torch.set_num_threads(1)  # OpenMP's threads are missing in a fork
        function()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    return process.exitcode


# --- the complete state


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_resumed_training_equals_uninterrupted_one(tmp_path, precision):
    straight = Training(seed=1, precision=precision)
    expected = straight.train(until=8)
    stopped = Training(seed=1, precision=precision)
    losses = stopped.train(until=5)
    stopped.save(tmp_path / "key")
    resumed = Training(seed=2, precision=precision)  # other weights
    resumed.train(until=2)
    resumed.resume(tmp_path / "key")
    assert resumed.step == 5
    assert losses + resumed.train(until=8) == expected
    assert_equal(resumed.tensors(), straight.tensors())


def test_state_has_losses_that_are_not_logged_yet(tmp_path):
    stopped, resumed = Training(seed=1), Training(seed=1)
    device.seed_step(1, 0, torch.device("cpu"))
    stopped.take_step([stopped.batches.windows(0, 4)], learning_rate=1e-2)
    stopped.save(tmp_path / "key")
    resumed.resume(tmp_path / "key")
    assert resumed.take_step.read() == stopped.take_step.read()
    assert resumed.take_step.read().steps == 1


def test_save_changes_no_training(tmp_path):
    saving, other = Training(seed=1), Training(seed=1)
    losses = []
    for step in (1, 2, 3):
        losses += saving.train(until=step)
        saving.save(tmp_path / "key")
    assert other.train(until=3) == losses


def test_load_returns_state_as_json_has_it(tmp_path):
    state = {"history": [{"step": 1, "val_loss": 0.1 + 0.2}], "best": (1.5, 1), "none": None}
    tensors = {"a": torch.eye(3), "b": torch.tensor(2.5), "bytes": torch.arange(9).byte()}
    tensors["half"] = torch.ones(2, 3, dtype=torch.bfloat16).T
    checkpoint.save(tmp_path / "key", Checkpoint(7, tensors, state))
    found = checkpoint.load(tmp_path / "key", 7)
    assert found.step == 7
    assert found.state == json.loads(json.dumps(state))
    assert_equal(found.tensors, tensors)
    assert all(found.tensors[name].dtype == t.dtype for name, t in tensors.items())


def test_save_pickles_nothing(tmp_path):
    training = Training(seed=1)
    training.train(until=1)
    training.save(tmp_path / "key")
    found = contents(tmp_path / "key")
    assert sorted(path.name for path in found) == ["sha256", "state.safetensors"]
    for path, content in found.items():
        assert not content.startswith((b"PK", b"\x80")), path  # torch.save's zip, a bare pickle
        if path.name == "state.safetensors":
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            assert header.keys() - {"__metadata__"} == training.tensors().keys()


# --- damage


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 4
    path.write_bytes(content)


DAMAGE = {
    "the first byte": lambda place: flip(place / "state.safetensors", 0),
    "a bit in the middle": lambda place: flip(place / "state.safetensors", 0.5),
    "the last byte": lambda place: flip(place / "state.safetensors", 1),
    "its checksum": lambda place: flip(place / "sha256", 0.5),
    "cut short": lambda place: (place / "state.safetensors").write_bytes(
        (place / "state.safetensors").read_bytes()[:-1]
    ),
    "empty": lambda place: (place / "state.safetensors").write_bytes(b""),
    "no weights": lambda place: (place / "state.safetensors").unlink(),
    "no checksum": lambda place: (place / "sha256").unlink(),
    "binary checksum": lambda place: (place / "sha256").write_bytes(b"\xff\xfe"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=list(DAMAGE))
def test_damaged_checkpoint_is_reported_and_skipped(folder, damage, capsys):
    damage(folder / "step-00000003")
    found = checkpoint.load_latest(folder)
    assert found.step == 2 and found.tensors["model.w"].eq(2).all()
    (line,) = capsys.readouterr().err.splitlines()
    assert f"checkpoint {folder / 'step-00000003'} is damaged: " in line
    with pytest.raises(UserError, match="step-00000003 is damaged"):
        checkpoint.load(folder, 3)


def test_renamed_checkpoint_is_reported_and_skipped(folder, capsys):
    (folder / "step-00000003").rename(folder / "step-00000009")
    assert checkpoint.load_latest(folder).step == 2
    assert "step-00000009 is damaged: it belongs to step 3; skipping it" in capsys.readouterr().err


def test_undamaged_checkpoint_is_used_silently(folder, capsys):
    assert checkpoint.load_latest(folder).step == 3
    assert capsys.readouterr().err == ""


def test_load_latest_fails_in_one_line_when_all_are_damaged(folder, capsys):
    for step in (2, 3):
        flip(folder / f"step-{step:08d}" / "state.safetensors", 0.5)
    with pytest.raises(UserError, match="is damaged: remove it to start over") as error:
        checkpoint.load_latest(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_damaged_checkpoint_does_not_displace_an_undamaged_one(folder):
    flip(folder / "step-00000003" / "state.safetensors", 0.5)
    damaged = contents(folder / "step-00000003")
    for _ in range(2):  # the second time, there is no more damage
        assert checkpoint.load_latest(folder).step == 2
    write(folder, 4)
    assert checkpoint.steps(folder) == [2, 4]
    assert sorted(contents(folder / "step-00000003.damaged").values()) == sorted(damaged.values())
    write(folder, 3)  # repeated after another resume, and damaged again
    flip(folder / "step-00000003" / "state.safetensors", 0.2)
    assert checkpoint.load_latest(folder).step == 2
    names = ["step-00000002", "step-00000003.damaged"]
    assert sorted(path.name for path in folder.iterdir()) == names


def test_load_latest_fails_again_when_all_are_damaged(folder):
    for step in (2, 3):
        flip(folder / f"step-{step:08d}" / "state.safetensors", 0.5)
    for _ in range(2):  # they are not renamed, or training would start over
        with pytest.raises(UserError, match="is damaged: remove it to start over"):
            checkpoint.load_latest(folder)


def test_load_latest_is_none_without_checkpoints(tmp_path):
    assert checkpoint.load_latest(tmp_path / "nowhere") is None
    assert checkpoint.steps(tmp_path / "nowhere") == []


def test_load_of_missing_step_is_a_user_error(folder):
    with pytest.raises(UserError, match="step-00000009 is damaged"):
        checkpoint.load(folder, 9)


# --- interruptions


def test_save_on_full_disk_leaves_previous_checkpoints(folder):
    before = contents(folder)
    with full_disk(300), pytest.raises(OSError, match="File too large"):
        write(folder, 4)
    assert contents(folder) == before
    assert checkpoint.steps(folder) == [2, 3]


def test_kill_during_save_leaves_previous_checkpoints(folder):
    before = contents(folder)

    def save():
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # the kernel kills it at the 50,001st byte
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        write(folder, 4, numbers=100_000)

    assert exit_code(save) == -signal.SIGXFSZ
    after = contents(folder)
    half = {path: content for path, content in after.items() if path not in before}
    assert [len(content) for content in half.values()] == [50_000]  # it was at work
    assert {path: after[path] for path in before} == before
    assert checkpoint.load_latest(folder).step == 3
    write(folder, 4)  # and the next one is not disturbed by what is left
    assert checkpoint.load_latest(folder).step == 4
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000003", "step-00000004"]


# --- which are kept


def test_save_keeps_the_newest_two(tmp_path):
    kept = []
    for step in (10, 20, 30, 40):
        write(tmp_path / "key", step)
        kept.append(checkpoint.steps(tmp_path / "key"))
    assert kept == [[10], [10, 20], [20, 30], [30, 40]]


def test_save_removes_checkpoints_of_later_steps(folder):
    flip(folder / "step-00000003" / "state.safetensors", 0.5)
    write(folder, 2)
    assert checkpoint.steps(folder) == [2]


def test_save_replaces_checkpoint_of_same_step(folder):
    write(folder, 3, numbers=7)
    assert len(checkpoint.load(folder, 3).tensors["model.w"]) == 7
    assert checkpoint.steps(folder) == [2, 3]


@pytest.mark.parametrize("call", [1, 2, 3])
def test_kill_during_removal_leaves_no_partial_checkpoint(folder, call):
    calls, sound = itertools.count(1), os.unlink

    def unlink(*arguments, **options):  # shutil.rmtree removes files by it
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        sound(*arguments, **options)

    def save():
        os.unlink = unlink
        for step in (4, 5):
            write(folder, step)

    assert exit_code(save) == -signal.SIGKILL
    for step in checkpoint.steps(folder):
        checkpoint.load(folder, step)
    write(folder, 6)
    assert not list(folder.glob("*.tmp"))
