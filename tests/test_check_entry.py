"""The checker of LEADERBOARD.md, which uses transformers alone: its losses and its errors."""

import json
import runpy
import shutil
import sys
from importlib import metadata

import pytest
import torch
from conftest import ROOT, VERSES
from safetensors.torch import load_file, save_file

from benchmarks import check_entry
from folio.gpt import huggingface
from folio.gpt.model import GPT, ModelParams
from folio.gpt.validation import token_losses
from folio.tokens import tokenizer

SCRIPT = ROOT / "benchmarks/check_entry.py"
CONTEXT, STRIDE = 16, 5
TEXT = VERSES[:1_500]


@pytest.fixture(scope="module")
def ours():
    torch.manual_seed(4)
    size = ModelParams(n_layer=2, n_head=2, n_embd=16, block_size=CONTEXT, dropout=0.1)
    model = GPT(size, tokenizer.VOCAB_SIZE).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def entry(ours, tmp_path_factory):
    folder = tmp_path_factory.mktemp("entry") / "gpt2"
    huggingface.save(ours, folder)
    (folder.parent / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture
def copied(entry, tmp_path):
    return shutil.copytree(entry, tmp_path / "gpt2")


def report(folder, stride=None, whole=False):
    return check_entry.check(folder, folder.parent / "text.txt", stride, whole).splitlines()


@pytest.mark.parametrize("whole", [True, False])
def test_checker_agrees_with_folio(ours, entry, whole):
    text = TEXT if whole else TEXT[int(0.9 * len(TEXT)) :]
    ids = tokenizer.encode(text)
    lines = [line.split() for line in report(entry, stride=STRIDE, whole=whole)]
    assert f"{len(text):,}" in lines[1] and f"{len(ids):,}" in lines[1]
    for line, stride in zip(lines[-2:], (CONTEXT, STRIDE), strict=True):
        losses = token_losses(ours, ids, stride)
        assert float(line[-2]) == pytest.approx(losses.mean(), abs=6e-5)
        assert float(line[-1]) == pytest.approx(losses.sum() / len(text), abs=6e-5)


def test_checker_scores_each_token_once_whatever_the_stride():
    for n, context, stride in [(2, 4, 1), (5, 4, 4), (6, 4, 4), (17, 4, 3), (40, 8, 1)]:
        found = list(check_entry.windows(n, context, stride))
        scored = [token for _, end, first in found for token in range(first, end + 1)]
        assert scored == list(range(1, n))
        assert all(end - start <= context for start, end, _ in found)


def test_checker_takes_nothing_from_folio(entry, monkeypatch, capsys):
    expected = report(entry, whole=True)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("folio", "benchmarks")]:
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    monkeypatch.setattr(
        sys, "argv", [SCRIPT.name, str(entry), f"{entry.parent}/text.txt", "--whole"]
    )
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert capsys.readouterr().out.splitlines() == expected
    assert "folio" not in SCRIPT.read_text()


def test_modules_beside_the_checker_hide_none_that_it_may_import():
    names = {path.stem for path in SCRIPT.parent.iterdir() if path.suffix in ("", ".py")}
    assert not names & {*sys.stdlib_module_names, *metadata.packages_distributions()}


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, edit):
    path = folder / "model.safetensors"
    weights = load_file(path)
    edit(weights)
    save_file(weights, path, {"format": "pt"})


def swap_tokens(folder):
    path = folder / "tokenizer.json"
    tree = json.loads(path.read_text())
    vocabulary = tree["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(tree))


BAD = {
    "no folder": (shutil.rmtree, "is not a folder"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "config.json is missing or"),
    "another model": (lambda f: edit_config(f, model_type="llama"), "of type 'llama', not gpt2"),
    "another vocabulary": (
        lambda f: edit_config(f, vocab_size=65),
        "65 tokens, not GPT-2's 50,257",
    ),
    "another tokenizer": (swap_tokens, "the tokenizer in .* is not GPT-2's"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), "cannot open the tokenizer"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "transformers cannot open"),
    "half the weights": (
        lambda f: (f / "model.safetensors").write_bytes(b"\1" * 1_000),
        "transformers cannot open",
    ),
    "a weight is missing": (
        lambda f: edit_weights(f, lambda w: w.pop("transformer.h.1.mlp.c_fc.weight")),
        "incomplete: 1 weights are missing: transformer.h.1.mlp.c_fc.weight",
    ),
    "not finite": (
        lambda f: edit_weights(f, lambda w: w["transformer.ln_f.bias"].fill_(torch.nan)),
        "weights that are not finite",
    ),
}


@pytest.mark.parametrize("fault", BAD)
def test_checker_reports_a_bad_entry_in_one_line(copied, fault):
    damage, words = BAD[fault]
    (copied.parent / "text.txt").write_text(TEXT)
    damage(copied)
    with pytest.raises(check_entry.EntryError, match=words) as error:
        report(copied)
    assert "\n" not in str(error.value)


def test_checker_reports_a_bad_text_or_stride_in_one_line(copied):
    with pytest.raises(check_entry.EntryError, match=r"text\.txt cannot be read: No such file"):
        report(copied)
    for content, words in ((b"\xff", "not a text file in UTF-8"), (b"", "too short")):
        (copied.parent / "text.txt").write_bytes(content)
        with pytest.raises(check_entry.EntryError, match=words):
            report(copied)
    (copied.parent / "text.txt").write_text(TEXT)
    for stride in (-1, 0, CONTEXT + 1):
        with pytest.raises(check_entry.EntryError, match="is not between 1 and the context of 16"):
            report(copied, stride=stride)
