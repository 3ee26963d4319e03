"""The model card of an exported model: what it is, how good it is, and how it was trained."""

import json
import math
from datetime import UTC, datetime

import torch
from huggingface_hub import EvalResult, ModelCardData

from folio.cli.training_texts import GAP, OWN, corpus_of
from folio.gpt.model import GPT
from folio.gpt.weight_files import INDEX, WEIGHTS
from folio.inference.evaluation import code_block, plain_line
from folio.inference.generation import generate
from folio.inference.params import PARAMS
from folio.run import kept
from folio.tokens import tokenizer
from folio.tracking.origin import Origin

# Metrics of a run -> metric on the Hub, name.
_METRICS = {
    "evaluate/val_loss": ("loss", "validation loss, nats/token"),
    "evaluate/val_loss_per_character": ("loss", "validation loss, nats/character"),
    "evaluate/val_bits_per_byte": ("bits_per_byte", "validation loss, bits/byte"),
    "evaluate/val_perplexity": ("perplexity", "validation perplexity per token"),
}


def write(model: GPT, origin: Origin | None, name: str, digest: str, sharded: bool = False) -> str:
    """The content of README.md for a model.

    origin: None if nothing is known about the training run. name: of the model. digest: that of
    weight_files.sha256. sharded: whether the weights are in several files.
    """
    sections = [
        f"---\n{_metadata(origin, name).to_yaml()}\n---",
        f"# {plain_line(name)}\n\n{_summary(model, origin)}",
        f"## How to use it\n\n{_usage(model, origin)}",
        f"## Sample\n\n{_sample(model, origin)}",
        f"## Evaluation\n\n{_evaluation(origin)}",
        f"## Training\n\n{_training(origin, digest, sharded)}",
        f"## Limits\n\n{_limits(model)}",
        f"## License\n\n{_license(origin)}",
    ]
    return "\n\n".join(sections) + "\n"


def _is_from_scratch(origin: Origin | None) -> bool:
    return origin is not None and "init_sha256" not in origin.tags


def _depends_only_on_text(origin: Origin | None) -> bool:
    """Whether no other model's weights or predictions took part in the training."""
    return _is_from_scratch(origin) and origin is not None and "teachers_sha256" not in origin.tags


def _metadata(origin: Origin | None, name: str) -> ModelCardData:
    corpus, results = corpus_of(origin), _results(origin)
    return ModelCardData(
        language=corpus.language or None,
        license=corpus.license if corpus.license and _depends_only_on_text(origin) else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gpt2", "folio"],
        datasets=list(corpus.datasets) or None,
        metrics=sorted({result.metric_type for result in results} & {"perplexity"}) or None,
        model_name=name,
        eval_results=results or None,
        widget=[{"text": corpus.prompt}] if corpus != OWN else None,
    )


def _found(origin: Origin | None) -> list[tuple[str, str, float]]:
    """The metric on the Hub, the name and the value of each validation metric of a run."""
    metrics = dict(origin.metrics) if origin else {}
    if "evaluate/val_loss" not in metrics:
        loss, _ = kept(metrics)
        metrics = {"evaluate/val_loss": loss} if math.isfinite(loss) else {}
    return [(*_METRICS[key], round(metrics[key], 4)) for key in _METRICS if key in metrics]


def _results(origin: Origin | None) -> list[EvalResult]:
    corpus = corpus_of(origin)
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=corpus.datasets[0] if corpus.datasets else "private",
            dataset_name=corpus.validation if corpus.datasets else "held-out text",
            metric_type=metric,
            metric_name=name,
            metric_value=value,
        )
        for metric, name, value in _found(origin)
    ]


def _summary(model: GPT, origin: Origin | None) -> str:
    number = sum(p.numel() for p in model.parameters())
    start = f"A language model of GPT-2's architecture with {number:,} parameters"
    if origin is None:
        return (
            f"{start}. {GAP}: who trained it, on which text and from which weights; nothing is"
            " recorded about that."
        )
    how = "trained from scratch" if _is_from_scratch(origin) else "fine-tuned"
    return (
        f"{start}, {how} on {corpus_of(origin).text}. It continues a text in the style of its"
        " training text; it was not trained to answer questions or to follow instructions."
    )


def _usage(model: GPT, origin: Origin | None) -> str:
    context = model.params.block_size
    return f"""\
In the folder of this model, or with the name of its repository instead of `.`:

```python
from transformers import pipeline

generator = pipeline("text-generation", ".")
print(generator({json.dumps(corpus_of(origin).prompt)})[0]["generated_text"])
```

The model sees at most {context:,} tokens, including the prompt. By default, text ends when they are
used up. To continue the end of a longer prompt:

```python
generator(long_prompt, max_new_tokens={context // 2}, handle_long_generation="hole")
```

By default, tokens are sampled at temperature {PARAMS["temperature"]} with top-p\
 {PARAMS["top_p"]}. `<|endoftext|>` in a prompt is ordinary
text, as it was in training."""


def _sample(model: GPT, origin: Origin | None) -> str:
    prompt, tokens = corpus_of(origin).prompt, 100
    ids = generate(
        model,
        tokenizer.encode(prompt).tolist(),
        tokens,
        float(PARAMS["temperature"]),
        top_p=float(PARAMS["top_p"]),
        generator=torch.Generator().manual_seed(0),
    )
    text = code_block(prompt + tokenizer.decode(ids))
    return f"The first {tokens} tokens that were sampled, with seed 0, after {prompt!r}:\n\n{text}"


def _evaluation(origin: Origin | None) -> str:
    if not (found := _found(origin)):
        return f"{GAP}: no results are recorded."
    rows = "\n".join(f"| {name} | {value:.4f} |" for _, name, value in found)
    text = f"Measured on {corpus_of(origin).validation}, which the model was not trained on"
    tokens = origin.params.get("data.val_tokens") if origin else None
    text += f" ({int(tokens):,} tokens)" if tokens else ""
    text += f". {_selection(origin)}"
    if not _is_from_scratch(origin):
        text += " Whether the initial weights had been trained on it is not recorded."
    train_loss = origin.metrics.get("evaluate/train_loss") if origin else None
    if train_loss is not None:
        count = origin.metrics.get("evaluate/train_tokens") if origin else None
        on = f"{count:,.0f}" if count else "as many"
        text += f" The loss on {on} tokens of the training text is {train_loss:.4f} nats/token."
    return f"| metric | value |\n|---|---|\n{rows}\n\n{text}"


def _selection(origin: Origin | None) -> str:
    if origin and origin.params.get("train.keep") == "last":
        return "The weights are those of the last step, not selected by their loss on this text."
    return "The weights with the lowest loss on this text were kept."


def _training(origin: Origin | None, digest: str, sharded: bool) -> str:
    facts = _facts(origin) if origin else {}
    content = f"the output of `sha256sum model-*.safetensors {INDEX}`" if sharded else WEIGHTS
    facts[f"SHA-256 of {content}"] = digest
    listed = "\n".join(f"- {key}: {plain_line(value)}" for key, value in facts.items())
    if origin is None:
        return f"{GAP}: how the model was trained is not recorded.\n\n{listed}"
    rows = "\n".join(
        f"| {key} | {plain_line(value)} |"
        for key, value in origin.params.items()
        if key.startswith(("model.", "train."))
    )
    return (
        f"Trained with Folio, a pipeline for GPT-2 language models.\n\n{listed}\n\n"
        f"| param | value |\n|---|---|\n{rows}"
    )


def _facts(origin: Origin) -> dict[str, str]:
    """What is recorded about a training run, apart from its params."""
    params, metrics, tags = origin.params, origin.metrics, origin.tags
    facts = {"date": datetime.fromtimestamp(origin.started / 1000, UTC).date().isoformat()}
    if {"data.characters", "data.train_tokens"} <= params.keys():
        characters, tokens = int(params["data.characters"]), int(params["data.train_tokens"])
        facts["text"] = f"{characters:,} characters; {tokens:,} tokens for training"
    if "data.sha256" in params:
        facts["SHA-256 of the text"] = params["data.sha256"]
    kept = metrics.get("kept_step", metrics.get("best_step"))  # older runs kept the best
    if {"steps", "epochs"} <= metrics.keys() and kept is not None:
        facts["steps"] = f"{metrics['steps']:,.0f} ({metrics['epochs']:.1f} epochs)"
        facts["steps"] += f"; these weights are from step {kept:,.0f}"
    if {"device", "precision"} <= tags.keys():
        facts["device"] = f"{tags['device']}, {tags['precision']}"
    if "mlflow.source.git.commit" in tags:
        facts["git commit of the code"] = tags["mlflow.source.git.commit"]
    if not _is_from_scratch(origin):
        facts["initial weights"] = (
            f"SHA-256 {tags['init_sha256']} ({GAP}: which model this is, here and as base_model in"
            " the metadata)"
        )
    if "teachers_sha256" in tags:
        facts["teachers"] = (
            f"SHA-256 {tags['teachers_sha256']} ({GAP}: which models' predictions this one was also"
            " trained on)"
        )
    return facts


def _limits(model: GPT) -> str:
    return f"""\
- It imitates the style of its training text. What it writes is often meaningless, and never a
  source of facts.
- It can repeat passages of its training text word for word, offensive ones included. Nothing was
  filtered.
- Its context is {model.params.block_size:,} tokens: it does not see anything further back.
- Losses can only be compared between models that have the same vocabulary and were evaluated on the
  same text."""


def _license(origin: Origin | None) -> str:
    corpus = corpus_of(origin)
    ours = (
        f"The weights are published under the license `{corpus.license}` in the metadata above."
        if corpus.license and _depends_only_on_text(origin)
        else f"{GAP}: the license of the weights, here and as `license` in the metadata. It depends"
        " on the text, and on any other model that training started from or learned from."
    )
    return f"{ours}\n\n{corpus.terms}\n\nThe vocabulary is that of OpenAI's GPT-2: see NOTICE."
