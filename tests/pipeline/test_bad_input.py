"""Each thing a user can get wrong: one line that names it and the way out, and nothing torn."""

import itertools
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import enter_copy, run, set_params

from folio.tracking import store
from folio.training import checkpoint
from folio.errors import one_line_errors
from folio.gpt.model import GPT
from stages import evaluate, prepare, train

STAGES = {"prepare": prepare, "train": train, "evaluate": evaluate}


@pytest.fixture(scope="module")
def trained(make_trained) -> Path:
    """A project in which all three stages have run."""
    return make_trained()


@pytest.fixture
def project(trained, tmp_path, monkeypatch) -> Path:
    """A copy of it, for the test to spoil."""
    return enter_copy(trained, tmp_path / "project", monkeypatch)


def fails(stage: str, capsys: pytest.CaptureFixture) -> str:
    """Run a stage that must stop with status 1 and one line; return the line."""
    capsys.readouterr()
    before = outs()
    with pytest.raises(SystemExit) as stopped, one_line_errors():
        STAGES[stage].main()
    assert stopped.value.code == 1
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
        ("train", {"train.steps": "many"}, "train.steps: 'many' will not do; it takes an int >= 1"),
        (
            "train",
            {"model.n_embd": 17},
            "model.n_embd: 17 is not divisible by n_head 2; take 16",
        ),
        ("train", {"model.block_size": 100_000}, "training part has only"),
        ("train", {"model.block_size": 2_000}, "validation part has only"),
        ("train", {"runtime.device": "cuda"}, "runtime.device: cuda, but PyTorch sees none here"),
        ("prepare", {"prepare.corpus": "data/raw/none.txt"}, "data/raw/none.txt"),
        ("prepare", {"prepare.corpus": "tinyshakespear"}, "did you mean tinyshakespeare?"),
        ("prepare", {"prepare.validation_fraction": 1.5}, "prepare.validation_fraction: 1.5"),
        ("evaluate", {"evaluate.stride": 17}, "evaluate.stride: 17 is more than"),
        ("evaluate", {"evaluate.prompts": [""]}, "evaluate.prompts: one is empty"),
    ],
)
def test_a_setting_that_will_not_do_is_named(project, capsys, stage, settings, words):
    if settings.get("runtime.device") == "cuda" and train.torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    set_params(project, settings)
    assert words in fails(stage, capsys)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_number_that_is_not_finite_stops_with_the_weights_of_the_last_good_step(
    project, capsys, monkeypatch, where
):
    set_params(project, {"runtime.device": "cpu"})  # a GPU's graph calls nothing at each step
    for made in ("models", ".checkpoints"):
        shutil.rmtree(made)
    train.main()
    undisturbed = Path("models/gpt2/model.safetensors").read_bytes()
    shutil.rmtree(".checkpoints")
    sound, calls = GPT.loss, itertools.count(1)

    def spoiled_from_the_fifth_step(model, x, y, scale):
        spoiled = where if next(calls) > 8 else None  # 2 calls a step
        loss = sound(model, x, y, scale * float("inf") if spoiled == "gradient" else scale)
        return loss * float("nan") if spoiled == "loss" else loss

    with monkeypatch.context() as spoiling:
        spoiling.setattr(GPT, "loss", spoiled_from_the_fifth_step)
        with pytest.raises(SystemExit) as stopped, one_line_errors():
            train.main()
    assert stopped.value.code == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"step 5: the {where} is not finite" in line and "lower train.learning_rate" in line
    [folder] = Path(".checkpoints").glob("*/")
    last = checkpoint.load(folder, 4).tensors
    assert all(tensor.isfinite().all() for tensor in last.values() if tensor.is_floating_point())
    store = store.Store(None)
    [status] = {*store.statuses().values()} - {"FINISHED"}
    assert status == "FAILED"

    train.main()  # it was chance, say: what comes out is as if it had not been
    assert Path("models/gpt2/model.safetensors").read_bytes() == undisturbed


def test_several_wrong_settings_are_all_named_at_once(project, capsys):
    set_params(project, {"train.stepz": 1, "model.n_layer": 0, "runtime.device": "tpu"})
    with pytest.raises(SystemExit), one_line_errors():
        train.main()
    told = capsys.readouterr().err
    assert all(name in told for name in ("train.stepz", "model.n_layer", "runtime.device"))


@pytest.mark.parametrize(
    ("content", "words"), [(b"", "holds no text"), (b"caf\xe9 au lait", "not UTF-8 at byte 3")]
)
def test_a_text_that_will_not_do_is_named(project, capsys, content, words):
    (project / "data/raw/verses.txt").write_bytes(content)
    line = fails("prepare", capsys)
    assert "data/raw/verses.txt" in line and words in line


@pytest.mark.parametrize("stage", ["train", "evaluate"])
def test_a_damaged_token_file_is_named(project, capsys, stage):
    file = project / "data/prepared/train.bin"
    content = bytearray(file.read_bytes())
    content[5] ^= 1
    file.write_bytes(content)
    line = fails(stage, capsys)
    assert "train.bin" in line and "dvc repro --force prepare" in line


def test_evaluate_without_a_model_says_how_to_make_one(project, capsys):
    shutil.rmtree(project / "models/gpt2")
    line = fails("evaluate", capsys)
    assert "models/gpt2" in line and "dvc repro train" in line


@pytest.mark.parametrize("content", [None, "", "[]", "{}"])
def test_evaluate_without_the_record_of_the_training_says_so(project, capsys, content):
    file = project / "models/training/record.json"
    file.unlink() if content is None else file.write_text(content)
    line = fails("evaluate", capsys)
    assert "record.json is missing or damaged: `dvc repro --force train`" in line


def test_evaluate_does_not_take_another_model_for_the_one_that_was_trained(project, capsys):
    file = project / "models/gpt2/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert "models/gpt2 is not the model that models/training tells of" in fails("evaluate", capsys)


def test_a_stage_run_by_hand_exits_with_1_and_no_traceback(project):
    set_params(project, {"train.steps": 0})
    done = run(project, "python", "-m", "stages.train")
    assert done.returncode == 1
    assert "train.steps: 0 will not do" in done.stderr and "Traceback" not in done.stderr


def test_a_folder_without_git_is_told_what_to_do(project):
    shutil.rmtree(project / ".git")
    shutil.copy(Path(__file__).parent.parent.parent / "Makefile", project)
    done = run(project, "make", "git")
    assert "no git repository here" in done.stdout and "git init" in done.stdout
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
    subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize("full", [".checkpoints", "models", "data/prepared"])
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(project, full_disk, capsys, full):
    stage = "prepare" if full == "data/prepared" else "train"
    shutil.rmtree(project / full, ignore_errors=True)
    (project / full).symlink_to(full_disk, target_is_directory=True)
    (full_disk / "filler").write_bytes(b"x" * 60 * 1024)
    assert "No space left on device" in fails(stage, capsys)
    assert {path.name for path in (project / full).rglob("*")} <= {"filler"} | lock_files(project)
    subprocess.run(["mount", "-o", "remount,size=64m", str(full_disk)], check=True)
    STAGES[stage].main()


def lock_files(project: Path) -> set[str]:
    """What a trainer leaves in .checkpoints beside checkpoints: its lock, folder and run's id."""
    folder = project / ".checkpoints"
    return {path.name for path in folder.rglob("*") if not path.name.startswith("step-")}
