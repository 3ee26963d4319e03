"""What all benchmarks have in common."""

import copy
import io
import os
import re
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, inside, run_stages

from benchmarks import (
    ablation,
    attention,
    curve,
    distributed,
    generate,
    head,
    llmc,
    memory,
    recipe,
    step,
)
from folio import device, gpus
from folio.distributed import ONE_PROCESS
from folio.errors import UserError, one_line_errors
from folio.gpt.model import ModelParams
from folio.sweeps import variants

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


def test_benchmark_of_gpu_memory_without_a_gpu_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["memory", "gpt2-124m"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended, one_line_errors():
        memory.main()
    assert ended.value.code == 1
    message = "folio: this measures a GPU's memory, and PyTorch found no GPU on this machine\n"
    assert capsys.readouterr() == ("", message)


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
        def close(self): ...
        def join(self): ...
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


def test_jobs_of_recipe_share_the_cores(trained, monkeypatch):
    for name in ("OMP_NUM_THREADS", gpus.JOBS):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    measure(trained, monkeypatch, "{}", options=("--jobs", "4"))
    assert os.environ["OMP_NUM_THREADS"] == "2"


def test_job_of_recipe_that_cannot_reserve_gpus_ends_with_an_error(monkeypatch):
    monkeypatch.setenv(gpus.JOBS, "two")
    with pytest.raises(UserError, match="FOLIO_JOBS is 'two'"):  # in a pool's initializer, it would
        recipe.measure({}, "", recipe.PREPARED)  # be repeated forever


def test_ablation_with_teachers_keeps_the_text_that_they_know():
    with inside(ROOT):
        values = ablation.resolve(variants.read("distilled-30m"))
    options = {each.name for each in ablation.settings_of(values, "options", 1)}
    assert "distillation" in options and "BPE dropout" not in options
    assert [each.name for each in ablation.settings_of(values, "curve", 1)] == ["all"]
    values["train.distill_from"] = "none"
    assert "BPE dropout" in {each.name for each in ablation.settings_of(values, "options", 1)}
    assert len(ablation.settings_of(values, "curve", 1)) == 5


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


# Prints what train_gpt2cu prints, with the numbers of a step as its ms, after it has read its
# options and its token file as the real one does.
TRAIN_GPT2CU = """#!{python}
import struct, sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert int(options["-v"]) > 0 and options["-s"] == options["-m"] == "0" and "-o" not in options
data = open(options["-i"], "rb").read()
magic, version, count = struct.unpack_from("<3i", data)
assert (magic, version, len(data)) == (20240520, 1, 1024 + 2 * count)
tokens = struct.unpack_from(f"<{{count}}H", data, 1024)
assert count > int(options["-b"]) * int(options["-t"]) and max(tokens) < 50257
print(f"| sequence length T     | {{options['-t']:<50}} |")
print("| precision             | {precision:<50} |")
print(f"| weight init method    | {{options['-e']:<50}} |")
print("allocated 237 MiB for model parameters")
print("allocating 237 MiB for parameter gradients")
print("allocating 1000 MiB for activations")
print("allocating 474 MiB for AdamW optimizer state m")
print("{warning}")
print("val loss -nan")
steps = int(options["-x"])
for step in range(1, steps + 1):
    print(f"step {{step:4d}}/{{steps}} | loss 10.9 (+nanz)| norm 9.8 (+nanz)| lr 3.00e-04 |"
          f" {{step:.2f}} ms | 48.2% bf16 MFU | 90000 tok/s")
print("total average iteration time: 3.0 ms")
{end}
"""


def fake_llmc(folder, precision="FP32", warning="", end=""):
    program = folder / "train_gpt2cu"
    texts = {"precision": precision, "warning": warning, "end": end}
    program.write_text(TRAIN_GPT2CU.format(python=sys.executable, **texts))
    program.chmod(0o755)
    return folder


class Rounds:
    """The parent's end of a contender's pipe, for some rounds."""

    def __init__(self, rounds):
        self.requests, self.answers = [True] * rounds + [False], []

    def recv(self):
        return self.requests.pop(0)

    def send(self, answer):
        self.answers.append(answer)


SIZE = ModelParams(n_layer=6, n_head=6, n_embd=384, block_size=128, dropout=0.0)
WORK = step.Work(SIZE, batch_size=8, where=torch.device("cpu"), precision="fp32")


def run_llmc(folder):
    contender = llmc.contenders(folder, WORK, 3e-4, 0.1, 11_234)["llm.c"]
    rounds = Rounds(2)
    contender(WORK, 2, rounds)
    return rounds.answers


def test_llmc_contender_reads_the_times_after_the_warm_up_and_the_memory(tmp_path):
    assert run_llmc(fake_llmc(tmp_path)) == [3.5, 3.5, 1948 * 2**20 / 1e9]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"precision": "BF16"}, "computes in BF16, and the other contenders in FP32: build it"),
        ({"warning": "WARNING: Fell back to cudaMallocManaged when"}, "not find enough GPU memory"),
        (
            {"end": "print('[CUDA ERROR] at file a.cuh:9:\\nout of memory'); sys.exit(1)"},
            "train_gpt2cu failed with status 1: [CUDA ERROR] at file a.cuh:9: out of memory",
        ),
        ({"end": "assert False"}, "failed with status 1: assert False AssertionError"),
    ],
)
def test_llmc_contender_that_fails_sends_one_line(tmp_path, texts, message):
    [error] = run_llmc(fake_llmc(tmp_path, **texts))
    assert isinstance(error, UserError) and message in str(error) and "\n" not in str(error)


def test_llmc_contender_has_only_sizes_of_llmc(tmp_path):
    other = replace(WORK, size=replace(SIZE, n_layer=2))
    with pytest.raises(
        UserError, match="no model of 2/6/384 with a context of 128: it has 6/6/384"
    ):
        llmc.contenders(fake_llmc(tmp_path), other, 3e-4, 0.1, 11_234)
    with pytest.raises(UserError, match="has no program train_gpt2cu: build it there as"):
        llmc.contenders(tmp_path / "elsewhere", WORK, 3e-4, 0.1, 11_234)


def test_step_benchmark_takes_turns_with_llmc(tmp_path, capsys, monkeypatch):
    precision = device.resolve_precision("auto", device.resolve_device("auto")).upper()
    clone = fake_llmc(tmp_path, precision)
    command = ["step", "--variant", "seed-30m", "--llmc", str(clone)]
    only = ["--contenders", "llm.c", "llm.c, GELU fused", "--rounds", "1", "--steps", "3"]
    monkeypatch.setattr(sys, "argv", command + only)
    with inside(ROOT):
        step.main()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["llm.c", "5.00", "204,800", "2.04", "1.00", "1.00"] in lines


@pytest.mark.parametrize(("capability", "expected"), [((8, 0), False), ((8, 9), True)])
def test_step_benchmark_has_an_fp8_head_where_the_gpu_has_fp8(
    monkeypatch, capsys, capability, expected
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(sys, "argv", ["step", "--contenders", "all of them"])
    with inside(ROOT), pytest.raises(SystemExit):
        step.main()
    error = capsys.readouterr().err
    assert "Folio, compiled" in error and ("Folio, fp8 head" in error) == expected


@pytest.mark.parametrize("option", ["--rounds", "--steps", "--batch"])
def test_step_benchmark_rejects_a_number_below_one(monkeypatch, option):
    monkeypatch.setattr(sys, "argv", ["step", option, "0"])
    with inside(ROOT), pytest.raises(UserError, match=f"{option} is 0: it must be at least 1"):
        step.main()


@pytest.mark.parametrize("option", [["--batch", "0"], ["--heads", "-1"], ["--dropout", "1"]])
def test_attention_benchmark_rejects_numbers_out_of_range(monkeypatch, capsys, option):
    monkeypatch.setattr(sys, "argv", ["attention", *option])
    with pytest.raises(SystemExit):
        attention.main()
    assert "must be at least 1, and 0 <= --dropout < 1" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--batches", "1", "0"], ["--tokens", "0"], ["--rounds", "0"]])
def test_generation_benchmark_rejects_a_number_below_one(monkeypatch, capsys, option):
    monkeypatch.setattr(sys, "argv", ["generate", *option])
    with pytest.raises(SystemExit):
        generate.main()
    assert "must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "size", ["6", "6/6", "0/6/384", "6/5/384", "6/6/-384", "a/6/384", "1/1/1/"]
)
def test_generation_benchmark_rejects_sizes_of_no_model(monkeypatch, capsys, size):
    monkeypatch.setattr(sys, "argv", ["generate", "--size", size])
    with pytest.raises(SystemExit):
        generate.main()
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"argument --size: {size}: give layers/heads/width, such as 12/12/768" in line


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_texts_may_differ_only_where_rounding_explains_it(precision):
    size = generate.parse_size("2/2/32")
    model = generate.build_model(size, 16, torch.device("cpu"), device.DTYPES[precision])
    exact, prompt = copy.deepcopy(model).float(), torch.tensor([3, 1, 4])
    descending = exact(prompt[None])[0, -1].argsort(descending=True).tolist()
    same = [descending[0], 5]
    assert generate.gap(model, exact, prompt, same, same) == (0.0, 0.0)
    found, explained = generate.gap(model, exact, prompt, same, [descending[0], 6])
    assert found > 0 and explained < 0.5
    found, explained = generate.gap(model, exact, prompt, same, [descending[20_000], 5])
    assert found > explained >= 1e-5 and (explained == 1e-5) == (precision == "fp32")


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_generation_benchmark_compares_in_one_precision(monkeypatch, capsys, precision):
    words = ["--device", "cpu", "--tokens", "6", "--rounds", "1", "--batches", "2"]
    words += ["--precision", precision, "--size", "1/2/16"]
    monkeypatch.setattr(sys, "argv", ["generate", *words])
    generate.main()
    printed = capsys.readouterr().out
    assert f"per token, {2 if precision == 'bf16' else 3} MB of weights" in printed
    assert re.search(r"batch 1: [\d,]+ us per token .* \d+% of the memory-bound limit", printed)


def test_contender_whose_process_ends_is_one_line():
    with pytest.raises(UserError, match="nanoGPT: its process has ended; its error is above"):
        step.measure_in_turn({"nanoGPT": print}, None, rounds=1, steps=1)
