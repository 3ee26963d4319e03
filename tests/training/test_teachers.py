"""Knowledge distillation: which teachers are found, what they predict, and a student's training."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_trainer import MODEL, TRAIN, advance, metrics

from folio.errors import UserError
from folio.gpt import huggingface
from folio.gpt.model import GPT
from folio.tokens import tokenizer, vocabulary
from folio.tokens.token_files import TokenData
from folio.training import teachers
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
