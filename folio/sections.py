"""All sections of params.yaml, checked together. Does not import PyTorch, so checks are fast."""

from typing import Any

from folio import params
from folio.corpus.params import PrepareParams
from folio.errors import UserError
from folio.gpt.params import ModelParams
from folio.inference.params import EvaluateParams
from folio.runtime import RuntimeParams
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
