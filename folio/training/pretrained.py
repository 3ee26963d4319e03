"""What a training starts from, where not from random weights: a GPT-2 folder in data/pretrained."""

import difflib
import reprlib
from dataclasses import dataclass
from pathlib import Path

import torch

from folio import files
from folio.errors import UserError
from folio.gpt import huggingface
from folio.gpt.model import ModelParams

# In dvc.yaml the train stage depends on the entry of this folder that train.init_from names, and on
# no other. So there has to be one for random weights, too: a file, of which nothing is read.
FOLDER = Path("data", "pretrained")
RANDOM = "random"


@dataclass(frozen=True)
class PretrainedWeights:
    path: Path
    sha256: str  # of its model.safetensors; a model of Folio's own has it as the tag weights_sha256

    def weights(self, model: ModelParams, vocabulary: int) -> dict[str, torch.Tensor]:
        """The state of a model.GPT of that size; of its positions, the first block_size.

        Raises UserError if the folder is damaged, or its model is of another size.
        """
        opened = huggingface.load(self.path)
        self._check(opened.params, opened.transformer.wte.num_embeddings, model, vocabulary)
        weights, positions = opened.state_dict(), "transformer.wpe.weight"
        return weights | {positions: weights[positions][: model.block_size]}

    def _check(self, theirs: ModelParams, tokens: int, ours: ModelParams, vocabulary: int) -> None:
        where = FOLDER / self.path.name
        if tokens != vocabulary:
            raise UserError(
                f"{where} has {tokens:,} tokens, and the text is in GPT-2's {vocabulary:,}:"
                f" take a folder whose vocab_size is {vocabulary}"
            )
        apart = [
            f"model.{key} to {getattr(theirs, key)}"
            for key in ("n_layer", "n_head", "n_embd")
            if getattr(theirs, key) != getattr(ours, key)
        ]
        if ours.block_size > theirs.block_size:
            apart.append(f"model.block_size to at most {theirs.block_size}")
        if apart:
            raise UserError(f"{where} holds a model of another size: set {', '.join(apart)}")


def find(name: str, root: Path) -> PretrainedWeights | None:
    """The folder of that name in root/data/pretrained; None for random weights.

    Raises UserError if it is not there: DVC would not see it change elsewhere.
    """
    if name == RANDOM:
        return None
    names = sorted(path.parent.name for path in (root / FOLDER).glob("*/config.json"))
    if name not in names:
        near = difflib.get_close_matches(Path(name).name[:100], names, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(
            f"train.init_from: {reprlib.repr(name)} is no GPT-2 folder in {FOLDER}{hint};"
            f" put one there (docs/fine-tuning.md) and give its name, or take {RANDOM}"
        )
    path = root / FOLDER / name
    weights = path / "model.safetensors"
    return PretrainedWeights(path, files.sha256(weights) if weights.is_file() else "")
