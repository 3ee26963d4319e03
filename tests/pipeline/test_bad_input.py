"""Every user error is one line with the problem and a hint, and leaves no damaged file."""

import itertools
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import enter_copy, run, set_params

from folio.errors import one_line_errors
from folio.gpt.model import GPT
from folio.tracking import queries
from folio.tracking.store import Store
from folio.training import checkpoint
from stages import evaluate, prepare, train

STAGES = {"prepare": prepare, "train": train, "evaluate": evaluate}


@pytest.fixture(scope="module")
def trained(make_trained) -> Path:
    """A project after all three stages."""
    return make_trained()


@pytest.fixture
def project(trained, tmp_path, monkeypatch) -> Path:
    """A copy of `trained` that a test may damage."""
    return enter_copy(trained, tmp_path / "project", monkeypatch)


def error_of(stage: str, capsys: pytest.CaptureFixture) -> str:
    """Run a stage that must exit with status 1 and one line on stderr; return the line."""
    capsys.readouterr()
    before = outs()
    with pytest.raises(SystemExit) as exit_info, one_line_errors():
        STAGES[stage].main()
    assert exit_info.value.code == 1
    line = capsys.readouterr().err.strip()
    assert "\n" not in line and line.startswith("folio")
    assert outs() == before
    return line


def outs() -> dict[str, bytes]:
    return {
        str(path): path.read_bytes()
        for top in ("data/prepared", "data/diagnostics", "models")
        for path in Path(top).rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("stage", "settings", "words"),
    [
        ("train", {"train.learnign_rate": 0.1}, "train.learnign_rate: unknown; did you mean"),
        ("train", {"train.seed": ...}, "train.seed: missing"),
        (
            "train",
            {"train.steps": "many"},
            "train.steps: 'many' is not valid; expected an int >= 1",
        ),
        (
            "train",
            {"model.n_embd": 17},
            "model.n_embd: 17 is not divisible by n_head 2; try 16",
        ),
        ("train", {"model.block_size": 100_000}, "training part has only"),
        ("train", {"model.block_size": 2_000}, "validation part has only"),
        ("train", {"runtime.device": "cuda"}, "runtime.device: PyTorch found no cuda device"),
        ("prepare", {"prepare.corpus": "data/raw/none.txt"}, "data/raw/none.txt"),
        ("prepare", {"prepare.corpus": "tinyshakespear"}, "did you mean tinyshakespeare?"),
        ("prepare", {"prepare.validation_fraction": 1.5}, "prepare.validation_fraction: 1.5"),
        ("evaluate", {"evaluate.stride": 17}, "evaluate.stride: 17 is longer than"),
        ("evaluate", {"evaluate.prompts": [""]}, "evaluate.prompts: a prompt is empty"),
    ],
)
def test_invalid_param_is_named(project, capsys, stage, settings, words):
    if settings.get("runtime.device") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    set_params(project, settings)
    assert words in error_of(stage, capsys)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_non_finite_loss_or_gradient_saves_the_last_finite_step_and_can_be_resumed(
    project, capsys, monkeypatch, where
):
    set_params(project, {"runtime.device": "cpu"})  # with a CUDA graph, a step calls no Python
    for folder in ("models", ".checkpoints"):
        shutil.rmtree(folder)
    train.main()
    uninterrupted = Path("models/gpt2/model.safetensors").read_bytes()
    shutil.rmtree(".checkpoints")
    original, calls = GPT.loss, itertools.count(1)

    def non_finite_from_step_5(model, x, y, scale):
        broken = where if next(calls) > 8 else None  # 2 calls per step
        loss = original(model, x, y, scale * float("inf") if broken == "gradient" else scale)
        return loss * float("nan") if broken == "loss" else loss

    with monkeypatch.context() as patch:
        patch.setattr(GPT, "loss", non_finite_from_step_5)
        with pytest.raises(SystemExit) as exit_info, one_line_errors():
            train.main()
    assert exit_info.value.code == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"step 5: the {where} is not finite" in line and "lower train.learning_rate" in line
    [folder] = Path(".checkpoints").glob("*/")
    last = checkpoint.load(folder, 4).tensors
    assert all(tensor.isfinite().all() for tensor in last.values() if tensor.is_floating_point())
    [status] = {*queries.statuses(Store(None)).values()} - {"FINISHED"}
    assert status == "FAILED"

    train.main()  # resumes, as if the fault had been temporary
    assert Path("models/gpt2/model.safetensors").read_bytes() == uninterrupted


def test_invalid_params_are_all_named_at_once(project, capsys):
    set_params(project, {"train.stepz": 1, "model.n_layer": 0, "runtime.device": "tpu"})
    with pytest.raises(SystemExit), one_line_errors():
        train.main()
    error = capsys.readouterr().err
    assert all(name in error for name in ("train.stepz", "model.n_layer", "runtime.device"))


@pytest.mark.parametrize(
    ("content", "words"), [(b"", "contains no text"), (b"caf\xe9 au lait", "valid UTF-8 at byte 3")]
)
def test_unusable_text_is_named(project, capsys, content, words):
    (project / "data/raw/verses.txt").write_bytes(content)
    line = error_of("prepare", capsys)
    assert "data/raw/verses.txt" in line and words in line


@pytest.mark.parametrize("stage", ["train", "evaluate"])
def test_damaged_token_file_is_named(project, capsys, stage):
    file = project / "data/prepared/train.bin"
    content = bytearray(file.read_bytes())
    content[5] ^= 1
    file.write_bytes(content)
    line = error_of(stage, capsys)
    assert "train.bin" in line and "dvc repro --force prepare" in line


def test_evaluate_without_a_model_has_a_hint_how_to_train_one(project, capsys):
    shutil.rmtree(project / "models/gpt2")
    line = error_of("evaluate", capsys)
    assert "models/gpt2" in line and "dvc repro train" in line


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("record.json", content) for content in (None, "", "[]", "{}", '{"id": 5}')),
        *(("history.jsonl", content) for content in (None, "5", '{"train_loss": 1}', "[]")),
        *(("metrics.json", content) for content in (None, "", "5", '{"steps": null}')),
    ],
)
def test_evaluate_without_valid_files_of_the_training_has_a_hint(project, capsys, name, content):
    file = project / "models/training" / name
    file.unlink()  # it may be a link into DVC's cache
    if content is not None:
        file.write_text(content)
    line = error_of("evaluate", capsys)
    hint = "`dvc repro` restores it, otherwise `dvc repro --force train` recreates it"
    assert line.endswith(f"models/training/{name} is missing or damaged: {hint}")


@pytest.mark.parametrize("content", ["", "5", "[]", "null"])
def test_train_without_valid_statistics_has_a_hint(project, capsys, content):
    file = project / "data/diagnostics.json"
    file.unlink()
    file.write_text(content)
    line = error_of("train", capsys)
    assert line.endswith("diagnostics.json is damaged: `dvc repro --force prepare` recreates it")


def test_evaluate_rejects_a_model_from_another_training(project, capsys):
    file = project / "models/gpt2/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert "models/gpt2 is not the model that models/training describes" in error_of(
        "evaluate", capsys
    )


def test_stage_run_directly_exits_with_status_1_and_no_traceback(project):
    set_params(project, {"train.steps": 0})
    done = run(project, "python", "-m", "stages.train")
    assert done.returncode == 1
    assert "train.steps: 0 is not valid" in done.stderr and "Traceback" not in done.stderr


def test_make_git_without_a_repository_has_a_hint(project):
    shutil.rmtree(project / ".git")
    shutil.copy(Path(__file__).parent.parent.parent / "Makefile", project)
    done = run(project, "make", "git")
    assert "DVC needs a git repository" in done.stdout and "git init" in done.stdout
    assert done.returncode != 0


@pytest.fixture
def full_disk(project) -> Path:
    """project/models and project/.checkpoints on a file system of 64 KB."""
    small = project / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system takes root")
    yield small
    subprocess.run(["umount", "--lazy", str(small)], check=True)  # a file may still be open


@pytest.mark.parametrize("full", [".checkpoints", "models", "data/prepared"])
def test_full_disk_is_one_line_and_the_command_can_be_run_again(project, full_disk, capsys, full):
    stage = "prepare" if full == "data/prepared" else "train"
    shutil.rmtree(project / full, ignore_errors=True)
    (project / full).symlink_to(full_disk, target_is_directory=True)
    (full_disk / "filler").write_bytes(b"x" * 60 * 1024)
    assert "No space left on device" in error_of(stage, capsys)
    assert {path.name for path in (project / full).rglob("*")} <= {"filler"} | lock_files(project)
    subprocess.run(["mount", "-o", "remount,size=64m", str(full_disk)], check=True)
    STAGES[stage].main()


def lock_files(project: Path) -> set[str]:
    """The names in .checkpoints except checkpoints: the lock, the folder and the record."""
    folder = project / ".checkpoints"
    return {path.name for path in folder.rglob("*") if not path.name.startswith("step-")}
