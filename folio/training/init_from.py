"""The folders in data/pretrained that params can name. Does not import PyTorch."""

import difflib
import reprlib
from pathlib import Path

from folio.errors import UserError
from folio.training.params import NONE, RANDOM

# In dvc.yaml check_pretrained and train depend on data/pretrained/${train.init_from}, on
# data/pretrained/${train.distill_from} and on no other folder there. So random weights and no
# teachers need an entry too: files called `random` and `none`.
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

    Raises UserError if there are none, or if another folder is among them. Hidden folders, which
    tools write, are ignored.
    """
    found = {path.name: _visible_folders(path) for path in _visible_folders(root / FOLDER)}
    teachers = {each: paths for each, paths in found.items() if any(map(_is_model, paths))}
    if not found.get(name) or (name not in teachers and _is_model(root / FOLDER / name)):
        near = difflib.get_close_matches(name[:100], sorted(teachers), n=1)
        raise UserError(
            f"train.distill_from: {reprlib.repr(name)} is not a folder of GPT-2 folders in"
            f" {FOLDER}: put one there (docs/small-texts.md) and use its name, or use {NONE}"
            + (f"; did you mean {near[0]}?" if near else "")
        )
    for path in found[name]:
        where = f"{FOLDER / name}/{reprlib.repr(path.name)[1:-1]}"
        if not _is_model(path):
            raise UserError(
                f"train.distill_from: {where} is not a GPT-2 folder, because it has no config.json:"
                " remove it, or copy a model there"
            )
        if nested := [each.name for each in _visible_folders(path) if _is_model(each)]:
            raise UserError(
                f"train.distill_from: {where} contains another GPT-2 folder,"
                f" {reprlib.repr(nested[0])}: move it to {FOLDER / name}, or remove it"
            )
    return found[name]


def _visible_folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("*") if p.is_dir() and not p.name.startswith("."))


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file()
