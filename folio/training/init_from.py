"""The folders in data/pretrained that train.init_from can name. Does not import PyTorch."""

import difflib
import reprlib
from pathlib import Path

from folio.errors import UserError
from folio.training.params import RANDOM

# In dvc.yaml the train stage depends on data/pretrained/${train.init_from} and on no other folder
# there. So random weights need an entry too: an empty file called `random`.
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
