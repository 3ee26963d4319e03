"""What all benchmarks have in common."""

import io
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, inside, run_stages

from benchmarks import curve, distributed, head, recipe
from folio.distributed import ONE_PROCESS
from folio.errors import UserError
from folio.gpt.model import ModelParams

SCRIPTS = [
    path.stem
    for path in sorted((ROOT / "benchmarks").glob("*.py"))
    if "__main__" in path.read_text()
]
OTHERS = {"fuzz", "check_entry"}  # pytest handles its errors; it uses nothing of Folio


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name not in OTHERS])
def test_benchmark_turns_errors_into_one_line(name):
    source = (ROOT / f"benchmarks/{name}.py").read_text()
    assert source.endswith("    with one_line_errors():\n        main()\n")


def test_benchmark_of_gpu_memory_without_a_gpu_is_one_line():
    command = [sys.executable, "-m", "benchmarks.memory", "gpt2-124m"]
    done = subprocess.run(
        command, cwd=ROOT, env={"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == (
        "folio: this measures a GPU's memory, and PyTorch found no GPU on this machine\n"
    )


@pytest.fixture(scope="module")
def trained(make_project):
    """A project with a prepared text, and its model as the teacher `ts`."""
    folder = make_project()
    run_stages(folder, "prepare", "train")
    shutil.copytree(folder / "models/gpt2", folder / "data/pretrained/ts/a")
    return folder


def measure(folder, monkeypatch, *lines, options=()):
    """Run benchmarks.recipe; returns the settings and the tokens of its trainings, which are left
    out."""

    class Pool:
        def __init__(self, *args, **options): ...
        def __enter__(self):
            return self

        def __exit__(self, *args): ...
        def starmap(self, function, tasks, chunksize):
            return [
                (0.0, built.append(recipe.build(settings, tokens)[0]) or "")
                for settings, _, tokens in tasks
            ]

    built = []
    monkeypatch.setattr(sys, "argv", ["recipe", *options])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(lines).encode())))
    context = type("Context", (), {"Pool": Pool})
    monkeypatch.setattr(recipe.multiprocessing, "get_context", lambda kind: context)
    with inside(folder):
        recipe.main()
    return built


def test_recipe_trains_with_teachers(trained, monkeypatch):
    [without, trainer] = measure(trained, monkeypatch, "{}", '{"train.distill_from": "ts"}')
    assert without.teachers is None
    assert [path.name for path in trainer.teachers.paths] == ["a"]


def test_recipe_prepares_the_text_that_a_line_or_an_option_requires(trained, monkeypatch):
    lines = ["{}", '{"prepare.training_fraction": 0.5}', '{"prepare.segmentations": 2}']
    whole, half, segmented = measure(trained, monkeypatch, *lines)
    assert 2 * len(half.data.train) == pytest.approx(len(whole.data.train), abs=2)
    assert (len(whole.data.segmented), len(segmented.data.segmented)) == (0, 2)
    file = "data/raw/verses.txt"
    [same] = measure(trained, monkeypatch, "{}", options=("--corpus", file))
    assert same.data.digest == whole.data.digest


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"foo": 1}', "foo: unknown section"),
        ('{"trian.steps": 1}', "trian: unknown section; did you mean train?"),
        ('{"train.stesp": 1}', "train.stesp: unknown; did you mean train.steps?"),
        ('{"train.steps": "many"}', "train.steps: 'many' is not valid; expected an int >= 1"),
        ("{bad", 'is not a JSON object such as {"train.steps": 50}'),
        ("[1]", 'is not a JSON object such as {"train.steps": 50}'),
        ("\udcff", "is not a JSON object"),
        ('{"train.distill_from": "tss"}', "train.distill_from: 'tss' is not a folder of GPT-2"),
        (
            '{"train.init_from": "gpt3", "train.tie_unseen_tokens": false,'
            ' "train.unseen_probability": 0}',
            "train.init_from: 'gpt3' is not a GPT-2 folder in",
        ),
        ('{"prepare.corpus": "data/raw/verse.txt"}', "did you mean data/raw/verses.txt?"),
    ],
)
def test_invalid_line_of_recipe_is_one_line_that_names_it(trained, line, message):
    lines = [b"{}", b"", line.encode(errors="surrogateescape")]
    with inside(trained), pytest.raises(UserError) as error:
        recipe.read_lines(lines, {})
    assert message in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).startswith("line 3")


def test_benchmark_of_the_output_layer_trains_with_and_without_tied_tokens(trained):
    with inside(trained):
        for tie in (False, True):
            head.build_step(tie)()


def test_plain_step_has_the_loss_of_folios_step(trained):
    with inside(trained):
        trainers = [recipe.build(curve.PLAIN)[0] for _ in range(2)]
        folio = curve.folio_losses(trainers[0], 6)
        plain = curve.plain_losses(trainers[1], 6, reverse=False)
    assert plain == pytest.approx(folio, abs=0.005)


def test_process_of_the_distributed_benchmark_trains():
    size = ModelParams(**distributed.TINY, dropout=0.0)
    setting = distributed.Setting(size, windows=2, precision="fp32", seconds=0.1)
    for parallel in ("ddp", "fsdp"):
        changed = distributed.replace(setting, parallel=parallel)
        answer = distributed.train_task(changed, ONE_PROCESS, torch.device("cpu"))
        assert answer(1)[0] > 0
