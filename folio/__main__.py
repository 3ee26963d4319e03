"""The command line, `python -m folio`. Each command imports what it needs: to list them all takes
no second, and PyTorch and MLflow take several."""

from typing import Annotated

import typer

from folio.errors import one_line_errors

app = typer.Typer(
    name="python -m folio",
    help="Folio trains, compares and keeps GPT-2-style models. Run it in the project's root.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def sync() -> None:
    """Write to MLflow every run that it lacks, from the files that DVC keeps.

    Sends every training and evaluation here, in commits, experiments and DVC's cache, then what
    there is of trainings that were cut short, and mends the addresses of a local store whose
    project was moved. Run twice, it changes nothing the second time.

    Example: python -m folio sync
    """
    from folio import params, tracking
    from folio.runtime import RuntimeParams
    from folio.sync import run

    (runtime,) = params.load(runtime=RuntimeParams)
    told = run(runtime.tracking_uri, tracking.project_root())
    print("\n".join(told or ["MLflow has every run"]))


@app.command()
def variant(
    name: Annotated[str, typer.Argument(help="One of the files in variants/, without .yaml.")],
    queue: Annotated[bool, typer.Option("--queue", help="Queue it for `dvc queue start`.")] = False,
) -> None:
    """Train a named variant as a DVC experiment.

    Example: python -m folio variant seed-30m
    """
    from folio.variants import train

    train(name, queue)


if __name__ == "__main__":
    with one_line_errors():
        app()
