"""Knowledge distillation (Hinton et al. 2015): the targets are partly what other models predict.

Several teachers count as one, whose probabilities are their mean.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from folio import files
from folio.device import DTYPES
from folio.errors import UserError
from folio.gpt import huggingface
from folio.gpt.model import GPT, ModelParams
from folio.tokens.tokenizer import VOCAB_SIZE
from folio.tokens.vocabulary import Vocabulary
from folio.training.init_from import FOLDER, teacher_folders
from folio.training.params import NONE

_EMBEDDING = "transformer.wte.weight"


@dataclass(frozen=True)
class TeacherFolders:
    paths: list[Path]  # GPT-2 folders
    sha256: str  # of their weights and config.json

    def load(
        self, vocabulary: Vocabulary, context: int, where: torch.device, precision: str
    ) -> "Teachers":
        """Return the teachers in evaluation mode, with the rows of the vocabulary.

        Raises UserError if a folder is damaged or its model does not fit, or if the weights have
        changed since `find`.
        """
        models = [_fit(path, vocabulary, context) for path in self.paths]
        if _sha256(self.paths) != self.sha256:
            raise UserError(
                f"{self.paths[0].parent} changed while it was being read: run the command again"
            )
        for model in models:
            model.to(where).eval()
            for p in model.parameters():  # not the constants, which stay in fp32
                p.data = p.data.to(DTYPES[precision])
        return Teachers(models)


class Teachers:
    """`teachers(x)` returns the mean of their probabilities, [B * T, rows], for x [B, T]."""

    def __init__(self, models: list[GPT]):
        self.models = models

    @torch.no_grad()
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        first, *others = self.models
        probabilities = first.row_probabilities(x)
        total = probabilities.float()
        for model in others:  # one after the other: those of all would take much memory
            total += model.row_probabilities(x)
        return (total / len(self.models)).to(probabilities.dtype)


def find(name: str, root: Path) -> TeacherFolders | None:
    """Find the teachers in root/data/pretrained/NAME. Returns None for "none"."""
    if name == NONE:
        return None
    paths = teacher_folders(name, root)
    return TeacherFolders(paths, _sha256(paths))


def check(name: str, root: Path, context: int) -> None:
    """Raise UserError if `find` or `load` would, as far as can be seen without reading the weights:
    if a folder is missing or damaged, or if its model does not fit."""
    for path in teacher_folders(name, root) if name != NONE else []:
        params, tokens = huggingface.read_sizes(path)
        _check_sizes(path, params, tokens, VOCAB_SIZE, context)


def _check_sizes(path: Path, params: ModelParams, tokens: int, size: int, context: int) -> None:
    if tokens != size:
        raise UserError(
            f"{_name(path)} has {tokens:,} tokens, but the text is encoded with {size:,}"
        )
    if params.block_size < context:
        raise UserError(
            f"{_name(path)} has a context of {params.block_size} tokens: set model.block_size to at"
            " most that"
        )


def _name(path: Path) -> Path:
    return FOLDER / path.parent.name / path.name


def _sha256(paths: list[Path]) -> str:
    """config.json counts because weights of the same shapes can have another number of heads."""
    hashes = [(huggingface.weights_sha256(p), files.sha256(p / "config.json")) for p in paths]
    return hashlib.sha256("".join(map("".join, hashes)).encode()).hexdigest()


def _fit(path: Path, vocabulary: Vocabulary, context: int) -> GPT:
    """Load a teacher, with one row for all tokens that share one in the vocabulary."""
    loaded = huggingface.load(path)
    weights = loaded.state_dict()
    _check_sizes(path, loaded.params, len(weights[_EMBEDDING]), len(vocabulary.row), context)
    if vocabulary.multiplicity is not None:
        row = torch.from_numpy(vocabulary.row.astype(np.int64))
        first = torch.from_numpy(np.unique(vocabulary.row, return_index=True)[1])
        reduced = weights[_EMBEDDING][first]
        if not torch.equal(reduced[row], weights[_EMBEDDING]):
            raise UserError(
                f"{_name(path)} was not trained with one embedding row for the tokens that do not"
                " occur in this text: choose a train.distill_from that was trained on the same"
                " text with train.tie_unseen_tokens, or set that to false"
            )
        weights[_EMBEDDING] = reduced
    model = GPT(loaded.params, vocabulary.rows, vocabulary.multiplicity)
    model.load_state_dict(weights)
    return model
