"""The sections of params.yaml, for the commands that check all of them."""


def param_sections() -> dict[str, type]:
    """The dataclass of each section. Imports PyTorch."""
    from folio.corpus.params import PrepareParams
    from folio.gpt.model import ModelParams
    from folio.inference.evaluation import EvaluateParams
    from folio.runtime import RuntimeParams
    from folio.training.params import TrainParams

    return {
        "prepare": PrepareParams,
        "model": ModelParams,
        "train": TrainParams,
        "evaluate": EvaluateParams,
        "runtime": RuntimeParams,
    }
