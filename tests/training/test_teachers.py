"""Knowledge distillation: which teachers are found, what they predict, and a student's training."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_trainer import MODEL, TRAIN, advance, metrics

from folio.errors import UserError
from folio.gpt import huggingface
from folio.gpt.model import GPT
from folio.tokens import tokenizer, vocabulary
from folio.tokens.token_files import TokenData
from folio.training import messages, pretrained, teachers
from folio.training.trainer import Trainer

CPU = torch.device("cpu")
SIZE = tokenizer.VOCAB_SIZE
COUNTS = np.bincount(np.arange(90), minlength=SIZE)
KNOWN = vocabulary.tied_vocabulary(COUNTS)
WIDE = replace(MODEL, n_embd=24, n_head=3, block_size=2 * MODEL.block_size)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two teachers of different sizes, trained on the same tokens, and one that was not."""
    folder = tmp_path_factory.mktemp("root")
    for seed, (name, params) in enumerate({"both/1": MODEL, "both/2": WIDE}.items()):
        torch.manual_seed(seed)
        model = GPT(params, KNOWN.rows, KNOWN.multiplicity)
        with torch.no_grad():
            model.transformer.wte.weight.normal_(0.0, 0.5)
        huggingface.save(model, folder / "data/pretrained" / name, KNOWN.row)
    huggingface.save(GPT(MODEL, SIZE), folder / "data/pretrained/other/1")
    return folder


def load(root, name="both", known=KNOWN, context=MODEL.block_size):
    return teachers.find(name, root).load(known, context, CPU, "fp32")


def test_none_has_no_teachers(root):
    assert teachers.find("none", root) is None


@pytest.mark.parametrize("name", ["bot", "", "both/1", "..", "random"])
def test_folder_without_teachers_is_one_line(root, name):
    with pytest.raises(UserError, match="is not a folder of GPT-2 folders") as error:
        teachers.find(name, root)
    assert "\n" not in str(error.value)
    assert ("did you mean both?" in str(error.value)) == (name in ("bot", "both/1"))


def test_teachers_predict_the_mean_of_their_probabilities(root):
    x = torch.arange(2 * MODEL.block_size).view(2, -1) % 90
    found = load(root)(x)
    assert found.shape == (x.numel(), KNOWN.rows)
    expected = 0
    for name in ("1", "2"):
        model = huggingface.load(root / "data/pretrained/both" / name)
        with torch.no_grad():
            expected += model(x).softmax(-1).flatten(0, 1) / 2
    close = {"atol": 1e-4, "rtol": 1e-3}
    torch.testing.assert_close(found[:, :90], expected[:, :90], **close)
    torch.testing.assert_close(found[:, 90], expected[:, 90:].sum(1), **close)
    full = load(root, known=vocabulary.full_vocabulary(SIZE))(x)
    torch.testing.assert_close(full, expected, **close)


def test_teacher_that_does_not_fit_is_one_line(root):
    cases = [
        ({"name": "other"}, "was not trained with one embedding row"),
        ({"context": MODEL.block_size + 1}, "has a context of"),
        ({"known": vocabulary.full_vocabulary(97)}, "50,257 tokens, but the text is encoded with"),
    ]
    for options, words in cases:
        with pytest.raises(UserError, match=words) as error:
            load(root, **options)
        assert "\n" not in str(error.value)


def test_changed_teachers_are_another_training(root, tmp_path):
    before = teachers.find("both", root)
    for number in ("1", "2"):
        huggingface.save(GPT(MODEL, SIZE), tmp_path / "data/pretrained/both" / number)
    assert teachers.find("both", tmp_path).sha256 not in ("", before.sha256)


def copy(root: Path, folder: Path) -> Path:
    """A root with a copy of the teachers `both`; return their folder."""
    return shutil.copytree(root / "data/pretrained/both", folder / "data/pretrained/both")


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_another_number_of_heads_is_another_training(root, tmp_path):
    folder = copy(root, tmp_path)
    before = teachers.find("both", tmp_path)
    edit_config(folder / "2", n_head=1)
    assert teachers.find("both", tmp_path).sha256 != before.sha256
    with pytest.raises(UserError, match="changed while it was being read"):
        before.load(KNOWN, MODEL.block_size, CPU, "fp32")


def test_hidden_folders_and_files_are_no_teachers(root, tmp_path):
    folder = copy(root, tmp_path)
    shutil.copytree(folder / "1", folder / ".ipynb_checkpoints")
    (folder / "README.md").touch()
    assert [path.name for path in teachers.find("both", tmp_path).paths] == ["1", "2"]


@pytest.mark.parametrize(
    ("name", "source", "words"),
    [
        ("0", None, "both/0 is not a GPT-2 folder, because it has no config.json"),
        ("3/gpt2", "1", "both/3 is not a GPT-2 folder, because it has no config.json"),
        ("1/gpt2", "2", "both/1 contains another GPT-2 folder, 'gpt2'"),
    ],
)
def test_subfolder_that_is_no_teacher_is_one_line(root, tmp_path, name, source, words):
    folder = copy(root, tmp_path)
    if source:
        shutil.copytree(folder / source, folder / name)
    else:
        (folder / name).mkdir()
    with pytest.raises(UserError) as error:
        teachers.find("both", tmp_path)
    assert words in str(error.value) and "\n" not in str(error.value)


DAMAGE = {
    "no weights": lambda f: (f / "model.safetensors").unlink(),
    "truncated": lambda f: (f / "model.safetensors").write_bytes(
        (f / "model.safetensors").read_bytes()[:-9]
    ),
    "invalid config": lambda f: (f / "config.json").write_text("{"),
    "another activation": lambda f: edit_config(f, activation_function="relu"),
    "another size": lambda f: edit_config(f, n_embd=32),
    "another context": lambda f: huggingface.save(
        GPT(replace(MODEL, block_size=MODEL.block_size - 1), SIZE), f
    ),
    "another vocabulary": lambda f: huggingface.save(GPT(MODEL, 97), f),
}


@pytest.mark.parametrize("fault", DAMAGE)
def test_check_finds_what_training_would_with_the_same_words(root, tmp_path, fault):
    folder = copy(root, tmp_path)
    DAMAGE[fault](folder / "1")
    with pytest.raises(UserError) as checked:
        teachers.check("both", tmp_path, MODEL.block_size)
    with pytest.raises(UserError) as trained:
        teachers.find("both", tmp_path).load(KNOWN, MODEL.block_size, CPU, "fp32")
    assert str(checked.value) == str(trained.value) and "\n" not in str(checked.value)
    (folder / "1").rename(folder.parent / "one")
    with pytest.raises(UserError) as checked:
        pretrained.check("one", tmp_path, MODEL)
    with pytest.raises(UserError) as trained:
        pretrained.find("one", tmp_path).weights(MODEL, SIZE)
    assert str(checked.value) == str(trained.value) and "\n" not in str(checked.value)


def test_check_accepts_what_fits(root, tmp_path):
    shutil.copytree(copy(root, tmp_path) / "1", tmp_path / "data/pretrained/one")
    for name in ("none", "both"):
        teachers.check(name, tmp_path, MODEL.block_size)
    for name in ("random", "one"):
        pretrained.check(name, tmp_path, MODEL)


def test_training_prints_its_teachers(root):
    assert "\n2 teachers from data/pretrained/both: 1, 2\n" in messages.introduction(
        make_student(root)
    )


def make_student(root, **options):
    ids = np.random.default_rng(1).integers(90, size=700).astype(np.uint16)
    counts = np.bincount(ids[:600], minlength=SIZE)
    counts[:90] += 1
    data = TokenData(ids[:600], ids[600:], {"vocabulary": SIZE}, "digest", counts, (), 0 * counts)
    params = replace(TRAIN, tie_unseen_tokens=True, distill_from="both", **options)
    found = teachers.find("both", root)
    return Trainer(MODEL, params, data, CPU, "fp32", None, teachers=found)


def test_student_approaches_its_teachers_and_resumes_bit_for_bit(root, tmp_path):
    options = {"distill_weight": 1.0, "input_noise": 0.1, "learning_rate": 0.02}
    uninterrupted, stopped = make_student(root, **options), make_student(root, **options)
    [(x, _), *_] = uninterrupted.batches(0)
    teach = load(root)

    def divergence(trainer):
        with torch.no_grad():
            expected, found = teach(x), trainer.model.eval().row_probabilities(x)
        trainer.model.train()
        return float((expected * (expected / found).log()).sum(1).mean())

    start = divergence(uninterrupted)
    advance(uninterrupted, 20)
    assert divergence(uninterrupted) < 0.85 * start
    advance(stopped, 8)
    stopped.save(tmp_path)
    resumed = make_student(root, **options)
    resumed.resume(tmp_path)
    advance(resumed, 12)
    assert metrics(resumed) == metrics(uninterrupted)
    for name, weight in uninterrupted.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name
