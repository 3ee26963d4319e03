"""The folders in data/pretrained that params can name. Does not import PyTorch."""

import difflib
import reprlib
from pathlib import Path

from folio.errors import UserError
from folio.training.params import NONE, RANDOM

# In dvc.yaml the train stage depends on data/pretrained/${train.init_from} and on no other folder
# there, and on data/pretrained/${train.distill_from}. So random weights and no teachers need an
# entry too: files called `random` and `none`.
FOLDER = Path("data", "pretrained")


def check_exists(name: str, root: Path) -> None:
    """Raise UserError unless `name` is "random" or a GPT-2 folder in root/data/pretrained."""
    names = sorted(path.parent.name for path in (root / FOLDER).glob("*/config.json"))
    if name not in (RANDOM, *names):
        near = difflib.get_close_matches(Path(name).name[:100], names, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(
            f"train.init_from: {reprlib.repr(name)} is not a GPT-2 folder in {FOLDER}:"
            f" put one there (docs/fine-tuning.md) and use its name, or use {RANDOM}{hint}"
        )


def check_teachers_exist(name: str, root: Path) -> None:
    """Raise UserError unless `name` is "none" or a folder of teachers in root/data/pretrained."""
    if name != NONE:
        teacher_folders(name, root)


def teacher_folders(name: str, root: Path) -> list[Path]:
    """Return the GPT-2 folders in root/data/pretrained/NAME, in the order of their names.

    Raises UserError if there are none.
    """
    found = sorted(path.parent for path in (root / FOLDER).glob("*/*/config.json"))
    folders = [path for path in found if path.parent.name == name]
    if not folders:
        names = sorted({path.parent.name for path in found})
        near = difflib.get_close_matches(name[:100], names, n=1)
        raise UserError(
            f"train.distill_from: {reprlib.repr(name)} is not a folder of GPT-2 folders in"
            f" {FOLDER}: put one there (docs/small-texts.md) and use its name, or use {NONE}"
            + (f"; did you mean {near[0]}?" if near else "")
        )
    return folders
