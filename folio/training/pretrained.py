"""Initial weights from a GPT-2 folder in data/pretrained, instead of random ones."""

import difflib
import reprlib
from dataclasses import dataclass
from pathlib import Path

import torch

from folio import files
from folio.errors import UserError
from folio.gpt import huggingface
from folio.gpt.model import ModelParams

# In dvc.yaml the train stage depends on data/pretrained/${train.init_from} and on no other folder
# there. So random weights need an entry too: an empty file called `random`.
FOLDER = Path("data", "pretrained")
RANDOM = "random"


@dataclass(frozen=True)
class PretrainedWeights:
    path: Path  # of the folder
    sha256: str  # of its model.safetensors, like the tag weights_sha256 of a run

    def weights(self, model: ModelParams, vocabulary: int) -> dict[str, torch.Tensor]:
        """The state of a GPT of that size, with the first block_size position embeddings.

        Raises UserError if the folder is damaged, or its model has another size.
        """
        loaded = huggingface.load(self.path)
        self._check(loaded.params, loaded.transformer.wte.num_embeddings, model, vocabulary)
        weights, positions = loaded.state_dict(), "transformer.wpe.weight"
        return weights | {positions: weights[positions][: model.block_size]}

    def _check(self, theirs: ModelParams, tokens: int, ours: ModelParams, vocabulary: int) -> None:
        where = FOLDER / self.path.name
        if tokens != vocabulary:
            raise UserError(
                f"{where} has {tokens:,} tokens, and the text is encoded with GPT-2's"
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
            raise UserError(f"{where} has a model of another size: set {', '.join(changes)}")


def find(name: str, root: Path) -> PretrainedWeights | None:
    """The folder of that name in root/data/pretrained; None for random weights.

    Raises UserError if it is not there: DVC would not notice a change elsewhere.
    """
    if name == RANDOM:
        return None
    names = sorted(path.parent.name for path in (root / FOLDER).glob("*/config.json"))
    if name not in names:
        near = difflib.get_close_matches(Path(name).name[:100], names, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(
            f"train.init_from: {reprlib.repr(name)} is not a GPT-2 folder in {FOLDER}{hint};"
            f" put one there (docs/fine-tuning.md) and give its name, or set {RANDOM}"
        )
    path = root / FOLDER / name
    weights = path / "model.safetensors"
    return PretrainedWeights(path, files.sha256(weights) if weights.is_file() else "")
