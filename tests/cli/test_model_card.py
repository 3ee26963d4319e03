"""Model cards: what they claim, and what they leave to the person who publishes the model."""

import dataclasses

import pytest
import torch
from huggingface_hub import ModelCard

from folio.cli import model_card, training_texts
from folio.corpus.corpus import NAMED
from folio.gpt.model import GPT, ModelParams
from folio.tokens.tokenizer import VOCAB_SIZE
from folio.tracking.origin import Origin

ORIGIN = Origin(
    params={
        "model.n_layer": "1",
        "train.init_from": "random",
        "train.learning_rate": "0.004",
        "data.corpus": "tinyshakespeare",
        "data.characters": "1115394",
        "data.train_tokens": "301966",
        "data.val_tokens": "36059",
        "data.sha256": "5" * 64,
        "evaluate.stride": "32",
    },
    metrics={
        "best_val_loss": 4.7062,
        "steps": 3000.0,
        "epochs": 5.09,
        "best_step": 2700.0,
        "evaluate/val_loss": 4.70617,
        "evaluate/val_loss_per_character": 1.52149,
        "evaluate/val_bits_per_byte": 2.19504,
        "evaluate/val_perplexity": 110.62816,
        "evaluate/val_loss_sliding": 4.65,
        "evaluate/train_loss": 3.9,
    },
    tags={
        "mlflow.user": "jane.doe",
        "mlflow.source.git.commit": "c" * 40,
        "device": "cpu, 2 threads",
        "precision": "fp32",
        "dvc_experiment": "secret-plan",
    },
    started=1_795_684_529_804,
    ended=1_795_684_700_000,
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    size = ModelParams(n_layer=1, n_head=1, n_embd=8, block_size=48, dropout=0.0)
    return GPT(size, VOCAB_SIZE).eval()


@pytest.fixture(scope="module")
def sample():
    """Like generate, but samples only once after each prompt."""
    samples = {}

    def generate(model, prompt, count, *args, **options):
        key = (*prompt, count)
        if key not in samples:
            samples[key] = [*model_card_generate(model, prompt, count, *args, **options)]
        return iter(samples[key])

    model_card_generate = model_card.generate
    return generate


@pytest.fixture
def card(model, sample, tmp_path, monkeypatch):
    """card(origin, name) writes a card, reads it as the Hub's library does, and returns it."""
    monkeypatch.setattr(model_card, "generate", sample)

    def read(origin, name="my-model"):
        path = tmp_path / "README.md"
        path.write_text(model_card.write(model, origin, name, "d" * 64), encoding="utf-8")
        return ModelCard.load(path)  # raises ValueError if the metadata is invalid

    return read


def changed(params=(), tags=(), metrics=None):
    return dataclasses.replace(
        ORIGIN,
        params=ORIGIN.params | dict(params),
        tags=ORIGIN.tags | dict(tags),
        metrics=ORIGIN.metrics if metrics is None else metrics,
    )


def test_known_corpora_are_those_of_the_pipeline():
    assert training_texts.CORPORA.keys() == NAMED.keys()


@pytest.mark.parametrize("corpus", NAMED)
def test_card_of_a_named_corpus_is_complete(card, corpus):
    found = card(changed({"data.corpus": corpus}))
    data = found.data
    assert (data.license, data.language, data.library_name) == ("mit", "en", "transformers")
    assert data.datasets == ["karpathy/tiny_shakespeare"]
    assert data.pipeline_tag == "text-generation" and data.metrics == ["perplexity"]
    assert "FILL IN" not in found.content
    for fact in ("1,115,394 characters", "c" * 40, "d" * 64, "5" * 64, "48 tokens", "0.004"):
        assert fact in found.text
    assert "public domain" in found.text and "NOTICE" in found.text


def test_metrics_in_the_metadata_are_those_of_the_run(card):
    data = card(ORIGIN).data
    values = {(r.metric_type, r.metric_name): r.metric_value for r in data.eval_results}
    assert values == {
        ("loss", "validation loss, nats/token"): 4.7062,
        ("loss", "validation loss, nats/character"): 1.5215,
        ("bits_per_byte", "validation loss, bits/byte"): 2.195,
        ("perplexity", "validation perplexity per token"): 110.6282,
    }
    assert data.model_name == "my-model"
    assert {r.dataset_name for r in data.eval_results} == {"the last tenth of tinyshakespeare"}


def test_model_that_was_not_evaluated_has_the_loss_of_its_training(card):
    [result] = card(changed(metrics={"best_val_loss": 4.5})).data.eval_results
    assert (result.metric_type, result.metric_value) == ("loss", 4.5)


def test_card_tells_how_the_weights_were_selected(card):
    assert "The weights with the lowest loss on this text were kept." in card(ORIGIN).content
    metrics = {"kept_val_loss": 4.75, "best_val_loss": 4.5}
    last = card(changed({"train.keep": "last"}, metrics=metrics))
    assert "those of the last step, not selected by their loss on this text" in last.content
    assert [result.metric_value for result in last.data.eval_results] == [4.75]


def test_card_names_the_step_of_the_weights(card):
    assert "these weights are from step 2,700" in card(ORIGIN).content
    metrics = ORIGIN.metrics | {"kept_step": 3000.0}
    last = card(changed({"train.keep": "last"}, metrics=metrics))
    assert "these weights are from step 3,000" in last.content


def test_card_of_a_model_with_teachers_leaves_their_names_and_the_license_open(card):
    found = card(changed(tags=ORIGIN.tags | {"teachers_sha256": "7" * 64}))
    assert "license" not in found.data.to_dict() and "from scratch" in found.text
    assert "7" * 64 in found.text and found.text.count("FILL IN") == 2


def test_card_of_a_text_of_ones_own_claims_no_license_and_keeps_its_path_to_itself(card):
    found = card(changed({"data.corpus": "data/raw/letters-to-anna.txt"}))
    data = found.data.to_dict()
    assert not {"license", "language", "datasets"} & data.keys()
    assert found.text.count("FILL IN") == 3
    assert "anna" not in found.content
    assert found.data.eval_results[0].dataset_type == "private"


def test_card_names_neither_the_user_nor_the_experiment(card):
    content = card(ORIGIN).content
    assert "jane" not in content and "secret" not in content


def test_card_of_a_fine_tuned_model_asks_for_the_license_and_the_base_model(card):
    found = card(changed({"train.init_from": "gpt2"}, {"init_sha256": "b" * 64}))
    assert found.data.license is None
    assert "fine-tuned" in found.text and "trained from scratch" not in found.text
    assert f"{'b' * 64} (FILL IN: which model" in found.text


def test_run_from_before_init_from_was_trained_from_scratch(card):
    params = {key: value for key, value in ORIGIN.params.items() if key != "train.init_from"}
    assert "trained from scratch" in card(dataclasses.replace(ORIGIN, params=params)).text


def test_card_without_a_record_says_what_is_unknown(card):
    found = card(None)
    assert not {"license", "language", "datasets", "model-index"} & found.data.to_dict().keys()
    assert "trained from scratch" not in found.text
    assert found.text.count("FILL IN") >= 4
    assert "not recorded" in found.text and "d" * 64 in found.text


@pytest.mark.parametrize("name", ["a: #b", "`x` *y*", "a\nb", "---", "\u4e2d \U0001f642", "'"])
def test_any_name_makes_a_valid_card(card, name):
    found = card(ORIGIN, name)
    assert found.data.model_name == name
    [title] = [line for line in found.text.split("\n") if line.startswith("# ")]
    assert title.startswith("# ") and len(found.data.eval_results) == 4
