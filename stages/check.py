"""The check stage: checks params.yaml before DVC removes the outs of a stage that depends on it."""

import os
from pathlib import Path

from folio import files, inputs, params, sections
from folio.corpus import corpus
from folio.errors import UserError, one_line_errors
from folio.training import init_from

OUT = Path("data/params.ok")  # its content never changes, so it does not trigger other stages


def main() -> None:
    try:
        _check()
    except UserError as error:
        files.touch(params.FILE)
        raise UserError(f"{error}{_way_back()}") from None
    files.write_text(OUT, "every section of params.yaml is valid\n")
    inputs.check()


def _check() -> None:
    loaded = sections.check(params.read(params.FILE), str(params.FILE))
    text, pretrained = loaded["prepare"].corpus, loaded["train"].init_from
    teachers = loaded["train"].distill_from
    if not _may_be_pulled(Path(text)):
        corpus.check_exists(text, Path())
    if not _may_be_pulled(init_from.FOLDER / pretrained):
        init_from.check_exists(pretrained, Path())
    if not _may_be_pulled(init_from.FOLDER / teachers):
        init_from.check_teachers_exist(teachers, Path())
    runtime = loaded["runtime"]
    if runtime.processes not in ("auto", 1) and runtime.device != "cpu":
        from folio import launch  # importing PyTorch takes two seconds

        launch.check_gpus(runtime.processes)


def _way_back() -> str:
    """A hint on how to undo `dvc exp run -S`, which leaves its values in params.yaml."""
    in_workspace = Path(os.environ.get("DVC_ROOT", "")).resolve() == Path.cwd()
    if "DVC_EXP_NAME" not in os.environ or not in_workspace:
        return ""
    return "; `git checkout HEAD -- params.yaml` restores the params of the last commit"


def _may_be_pulled(path: Path) -> bool:
    """Whether a path is missing because DVC has not pulled it yet: `dvc repro --pull` does so after
    this stage."""
    tracked = [file.with_suffix("") for file in Path("data").rglob("*.dvc")]
    return any(path.is_relative_to(each) and not each.exists() for each in tracked)


if __name__ == "__main__":
    with one_line_errors():
        main()
