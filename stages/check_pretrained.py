"""The check_pretrained stage: checks the folders that train starts from or learns from, before DVC
removes models/gpt2.

It reads config.json and the headers of the weight files. What only the weights themselves show is
left to train: values that are not finite, and teachers trained with separate rows for tokens that
do not occur in the text.
"""

from pathlib import Path

from folio import files, inputs, params
from folio.errors import one_line_errors
from folio.gpt.params import ModelParams
from folio.training.params import NONE, RANDOM, TrainParams

OUT = Path("data/pretrained.ok")  # its content never changes, so it does not trigger train


def main() -> None:
    model, train = params.load(model=ModelParams, train=TrainParams)
    if (train.init_from, train.distill_from) != (RANDOM, NONE):
        with params.naming_way_back():
            _check(model, train)
    files.write_text(OUT, "the folders in data/pretrained fit params.yaml\n")
    inputs.check()


def _check(model: ModelParams, train: TrainParams) -> None:
    from folio.training import pretrained, teachers  # importing PyTorch takes two seconds

    pretrained.check(train.init_from, Path(), model)
    teachers.check(train.distill_from, Path(), model.block_size)


if __name__ == "__main__":
    with one_line_errors():
        main()
