"""The identity of a training run: a hash of everything that its weights depend on."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from folio.gpt.model import ModelParams
from folio.training.params import TrainParams
from folio.training.pretrained import PretrainedWeights
from folio.training.teachers import TeacherFolders

# The sources that can affect the results of training: the train stage's deps in dvc.yaml. When one
# of them changes, training starts over, rather than resuming what different code has computed.
FINGERPRINTED = (
    "folio/device.py",
    "folio/distributed.py",
    "folio/files.py",
    "folio/gpt",
    "folio/params.py",
    "folio/run.py",
    "folio/strict_yaml.py",
    "folio/tokens",
    "folio/training",
    "stages/train.py",
)
ROOT = Path(__file__).parent.parent.parent


def train_key(
    model: ModelParams,
    train: TrainParams,
    data_digest: str,
    pretrained: PretrainedWeights | None = None,
    teachers: TeacherFolders | None = None,
) -> str:
    """The first 16 hex digits of the sha256 of params, data, other weights and sources.

    Equal keys mean the same training run: the same MLflow run and the same checkpoints.
    """
    weights = [each.sha256 if each else None for each in (pretrained, teachers)]
    content = json.dumps(
        [asdict(model), asdict(train), data_digest, weights, _source_hashes()], sort_keys=True
    )
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _source_hashes() -> dict[str, str]:
    """The sha256 of each fingerprinted source file, by its path."""
    sources = [
        file
        for path in (ROOT / name for name in FINGERPRINTED)
        for file in (path.rglob("*.py") if path.is_dir() else [path])
    ]
    return {
        file.relative_to(ROOT).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sources
    }
