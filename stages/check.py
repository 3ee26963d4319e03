"""The check stage: checks params.yaml before DVC removes the outs of a stage that depends on it."""

from pathlib import Path

from folio import files, inputs, params, sections
from folio.corpus import corpus
from folio.errors import one_line_errors
from folio.training import init_from

OUT = Path("data/params.ok")  # its content never changes, so it does not trigger other stages


def main() -> None:
    with params.naming_way_back():
        _check()
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


def _may_be_pulled(path: Path) -> bool:
    """Whether a path is missing because DVC has not pulled it yet: `dvc repro --pull` does so after
    this stage."""
    tracked = [file.with_suffix("") for file in Path("data").rglob("*.dvc")]
    return any(path.is_relative_to(each) and not each.exists() for each in tracked)


if __name__ == "__main__":
    with one_line_errors():
        main()
