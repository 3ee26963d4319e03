"""Initial weights loaded from a GPT-2 folder in data/pretrained, instead of random ones."""

from dataclasses import dataclass
from pathlib import Path

import torch

from folio.errors import UserError
from folio.gpt import huggingface
from folio.gpt.model import ModelParams
from folio.tokens.tokenizer import VOCAB_SIZE
from folio.training.init_from import FOLDER, check_exists
from folio.training.params import RANDOM


@dataclass(frozen=True)
class PretrainedWeights:
    path: Path  # of the folder
    sha256: str  # of its weights, by huggingface.weights_sha256; "" if they cannot be read

    def weights(self, model: ModelParams, vocabulary: int) -> dict[str, torch.Tensor]:
        """The state dict for a GPT of the given size.

        It contains only the first block_size position embeddings. Raises UserError if the folder is
        damaged, if its model has a different size, or if its weights have changed since `find`.
        """
        loaded = huggingface.load(self.path)
        if huggingface.weights_sha256(self.path) != self.sha256:
            raise UserError(
                f"{FOLDER / self.path.name} changed while it was being read: run the same command"
                " again"
            )
        tokens = loaded.transformer.wte.num_embeddings
        _check_sizes(self.path.name, loaded.params, tokens, model, vocabulary)
        weights, positions = loaded.state_dict(), "transformer.wpe.weight"
        return weights | {positions: weights[positions][: model.block_size]}


def find(name: str, root: Path) -> PretrainedWeights | None:
    """Find the folder `name` in root/data/pretrained. Returns None for random weights.

    Raises UserError if it is not there: DVC would not detect changes anywhere else.
    """
    if name == RANDOM:
        return None
    check_exists(name, root)
    path = root / FOLDER / name
    try:
        return PretrainedWeights(path, huggingface.weights_sha256(path))
    except UserError:
        return PretrainedWeights(path, "")  # `weights` reports the problem


def check(name: str, root: Path, model: ModelParams) -> None:
    """Raise UserError if `find` or `weights` would, as far as can be seen without reading the
    weights: if the folder is missing or damaged, or if its model has a different size."""
    if name != RANDOM:
        check_exists(name, root)
        theirs, tokens = huggingface.read_sizes(root / FOLDER / name)
        _check_sizes(name, theirs, tokens, model, VOCAB_SIZE)


def _check_sizes(
    name: str, theirs: ModelParams, tokens: int, ours: ModelParams, vocabulary: int
) -> None:
    where = FOLDER / name
    if tokens != vocabulary:
        raise UserError(
            f"{where} has {tokens:,} tokens, but the text is encoded with GPT-2's"
            f" {vocabulary:,}: choose a folder whose vocab_size is {vocabulary}"
        )
    changes = [
        f"model.{key} to {getattr(theirs, key)}"
        for key in ("n_layer", "n_head", "n_embd")
        if getattr(theirs, key) != getattr(ours, key)
    ]
    if ours.block_size > theirs.block_size:
        changes.append(f"model.block_size to at most {theirs.block_size}")
    if changes:
        raise UserError(f"{where} has a model of a different size: set {', '.join(changes)}")
