"""The command line, `python -m folio`. Each command imports what it needs: to list them all takes
no second, and PyTorch and MLflow take several."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Annotated, Literal

import typer

from folio.errors import UserError, one_line_errors

app = typer.Typer(
    name="python -m folio",
    help="Folio trains, compares and keeps GPT-2-style models. Run it in the project's root.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

MODEL = "A folder, an MLflow run's name or id, or models:/folio@champion."


@app.command()
def sample(
    prompt: Annotated[str, typer.Argument(help="What the text begins with; - reads it.")] = "\n",
    model: Annotated[str, typer.Option(help=MODEL)] = "models/gpt2",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to write.")] = 200,
    temperature: Annotated[float, typer.Option(min=0, help="0: the likeliest each time.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, help="Among the k likeliest.")] = None,
    top_p: Annotated[float, typer.Option(min=0.001, max=1, help="... that make up p.")] = 0.95,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**63 - 1, help="The same seed, the same text.")
    ] = None,
    device: Annotated[
        Literal["auto", "cuda", "mps", "cpu"], typer.Option(help="auto: the first there is.")
    ] = "auto",
) -> None:
    """Write text with a model, as it comes.

    Example: python -m folio sample $'ROMEO:\\n' --temperature 0.7

    Example: python -m folio sample "My lord" --model models:/folio@champion
    """
    from folio.cli.sample import write

    text = sys.stdin.read() if prompt == "-" else prompt
    write(text, model, _address(), tokens, temperature, top_k, top_p, seed, device)


@app.command()
def compare(
    runs: Annotated[list[str] | None, typer.Argument(help="Names or ids; none: all.")] = None,
    best: Annotated[int, typer.Option(min=1, help="Of all, how many to show.")] = 20,
) -> None:
    """Show MLflow's runs side by side: held-out loss first, and the params that differ.

    Example: python -m folio compare

    Example: python -m folio compare 2x4x128-9e1c07 seed-30m
    """
    from folio.cli.compare import table

    table(_store(), runs or [], best)


@app.command()
def promote(
    run: Annotated[str | None, typer.Argument(help="Its name or id; none: models/gpt2's.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Whatever the losses say.")] = False,
) -> None:
    """Register a run's model, and make it the champion if its held-out loss is lower.

    The champion is the version with the alias `champion`: models:/folio@champion, what
    `make serve` serves.

    Example: python -m folio promote
    """
    from folio.cli.promote import promote
    from folio.run import RECORD, TRAINING, read_record
    from folio.tracking import queries

    store, name = _store(), run or read_record(TRAINING / RECORD).id
    if not run and queries.statuses(store).get(name, "DELETED") == "DELETED":
        raise UserError(
            "MLflow lacks the run of models/gpt2, or it was deleted there; give another"
        )
    print(promote(store, name, force))


@app.command()
def serve(
    model: Annotated[str, typer.Option(help="As models:/NAME@ALIAS.")] = "models:/folio@champion",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 5001,
) -> None:
    """Serve a registered model on 127.0.0.1, for this machine alone.

    Example: python -m folio serve
    """
    from folio.cli.serve import serve

    serve(_address(), model, port)


@app.command()
def doctor() -> None:
    """Check what Folio needs, and say what is off and how to mend it.

    Python and packages, PyTorch and its GPU, git, DVC and its cache, MLflow's store, params.yaml,
    the disk, trainings that were cut short. Ends with 1 where something is off.

    Example: python -m folio doctor
    """
    from folio.cli.doctor import examine

    try:
        sections = _sections()
    except ImportError:  # it says itself what is missing
        sections = {}
    raise typer.Exit(0 if examine(sections) else 1)


@app.command()
def sync() -> None:
    """Write to MLflow every run that it lacks, from the files that DVC keeps.

    Sends every training and evaluation here, in commits, experiments and DVC's cache, then what
    there is of trainings that were cut short, and mends the addresses of a local store whose
    project was moved. Run twice, it changes nothing the second time.

    Example: python -m folio sync
    """
    # A training gives up on an answer of MLflow's after ten seconds; whoever runs this has time.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "120")
    from folio.run import project_root
    from folio.tracking.sync import run

    told = run(_address(), project_root())
    print("\n".join(told or ["MLflow has every run"]))


@app.command()
def variant(
    name: Annotated[str, typer.Argument(help="One of the files in variants/, without .yaml.")],
    queue: Annotated[bool, typer.Option("--queue", help="Queue it for `dvc queue start`.")] = False,
) -> None:
    """Train a named variant as a DVC experiment.

    Example: python -m folio variant seed-30m
    """
    from folio.sweeps.variants import train

    train(name, queue)


@app.command("sweep")
def sweep_params(
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="PARAM=VALUES...", help="a,b,c or, with --random, low..high"),
    ] = None,
    random: Annotated[
        int | None, typer.Option(metavar="N", help="N points at random, not every combination.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of --random.")] = 1,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Trainings at a time.")] = 1,
    variant: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of variants/, to start from.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of the sweep; else made of its points.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the points, run none.")] = False,
    report: Annotated[
        str | None, typer.Option(metavar="NAME", help="Only the report of a former sweep.")
    ] = None,
) -> None:
    """Train at many settings on DVC's queue, and report which was best.

    Every combination of the values (a grid), or N points at random, where a range may stand for
    values: 1e-4..1e-2, by its logarithm if it spans ten times or more (log: or lin: before it
    decides). Each point is checked, then queued as a DVC experiment. Ctrl-C stops the sweep, and
    the same command goes on. The report is in sweeps/NAME.

    Example: python -m folio sweep train.learning_rate=1e-3,2e-3,4e-3 model.n_layer=2,3 --jobs 2

    Example: python -m folio sweep --random 20 train.learning_rate=1e-4..1e-2 model.dropout=0..0.3
    """
    from folio import device, params
    from folio.sweeps import report, sweep, variants

    sections = _sections()
    (runtime,) = params.load(runtime=sections["runtime"])
    failed = []
    if report:
        plan = sweep.read(report)
    else:
        points = sweep.points(settings or [], random, seed, sections)
        base = variants.read(variant) if variant else {}
        sweep.check(points, base, sections)
        plan = sweep.plan(points, base, name)
        print(sweep.listing(plan), flush=True)
        if dry_run:
            return
        threads = sweep.threads(jobs, device.resolve_device(runtime.device))
        failed = sweep.run(plan, jobs, threads)
    path = report.write(plan, runtime.tracking_uri)
    print(f"\n{path.read_text()}\n{path} has this, with its picture beside it")
    if failed:
        raise UserError(sweep.failure(plan, failed))


def _sections() -> dict[str, type]:
    """Those of params.yaml, each with its dataclass."""
    from folio.gpt.model import ModelParams
    from folio.runtime import RuntimeParams
    from stages.evaluate import EvaluateParams
    from stages.prepare import PrepareParams
    from stages.train import TrainParams

    return {
        "prepare": PrepareParams,
        "model": ModelParams,
        "train": TrainParams,
        "evaluate": EvaluateParams,
        "runtime": RuntimeParams,
    }


def _address() -> str | None:
    """MLflow's store as params.yaml has it."""
    from folio import params
    from folio.runtime import RuntimeParams

    (runtime,) = params.load(runtime=RuntimeParams)
    return runtime.tracking_uri


def _store():
    """The store, to read what is there."""
    from folio.tracking.store import Store

    return Store.existing(_address())


@contextlib.contextmanager
def _mlflow_in_a_line() -> Iterator[None]:
    """What MLflow refuses is no bug of ours, and not the user's to read as a traceback."""
    try:
        yield
    except Exception as problem:
        tracking = sys.modules.get("folio.tracking.store")  # not imported for this alone
        if tracking is None or not isinstance(problem, tracking.STORE_ERRORS):
            raise
        if isinstance(problem, OSError):  # a full disk, say
            raise
        raise UserError(f"MLflow refused: {tracking.first_line(problem)}") from None


if __name__ == "__main__":
    with one_line_errors(), _mlflow_in_a_line():
        app()
