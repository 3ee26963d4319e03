"""All sections of params.yaml, checked together, and whether the inputs that they name exist.

Does not import PyTorch, so checks are fast.
"""

from pathlib import Path
from typing import Any

from folio import params
from folio.corpus import corpus
from folio.corpus.params import PrepareParams
from folio.errors import UserError
from folio.gpt.params import ModelParams
from folio.inference.params import EvaluateParams
from folio.runtime import RuntimeParams
from folio.training import init_from
from folio.training.params import TrainParams

SECTIONS: dict[str, type] = {
    "prepare": PrepareParams,
    "model": ModelParams,
    "train": TrainParams,
    "evaluate": EvaluateParams,
    "runtime": RuntimeParams,
}


def check(tree: dict[Any, Any], source: str) -> dict[str, Any]:
    """Load the sections in a mapping {section: {key: value}}; errors begin with `source`.

    Raises UserError like params.check, and if values in two sections contradict each other.
    """
    loaded = dict(zip(SECTIONS, params.check(tree, source, **SECTIONS), strict=True))
    stride, context = loaded["evaluate"].stride, loaded["model"].block_size
    if stride > context:
        raise UserError(
            f"{source}: evaluate.stride {stride} is longer than model.block_size {context}"
        )
    if (processes := loaded["runtime"].processes) != "auto":
        try:
            loaded["train"].check_processes(processes)
        except UserError as error:
            raise UserError(f"{source}: runtime.processes: {error}") from None
    return loaded


def check_inputs(loaded: dict[str, Any]) -> None:
    """Raise UserError if the corpus or a folder in data/pretrained that params name does not exist
    in the working folder, and DVC cannot pull it either."""
    text, train = loaded["prepare"].corpus, loaded["train"]
    for check, name, path in (
        (corpus.check_exists, text, Path(text)),
        (init_from.check_exists, train.init_from, init_from.FOLDER / train.init_from),
        (init_from.check_teachers_exist, train.distill_from, init_from.FOLDER / train.distill_from),
    ):
        try:
            check(name, Path())
        except UserError:
            if not _may_be_pulled(path):
                raise


def _may_be_pulled(path: Path) -> bool:
    """Whether a path is missing because DVC has not pulled it yet: `dvc repro --pull` does so after
    the stage check."""
    tracked = [file.with_suffix("") for file in Path("data").rglob("*.dvc")]
    return any(path.is_relative_to(each) and not each.exists() for each in tracked)
