"""`python -m folio trial`: train one trial of a planned sweep."""

from typing import Annotated

import typer


def trial(
    name: Annotated[str, typer.Argument(help="Name of a sweep, from `sweep --plan`.")],
    number: Annotated[int, typer.Argument(help="Number of the trial, counted from 1.")],
) -> None:
    """Train one trial of a planned sweep, in a clone of the project.

    Several trials can be trained at the same time, also on several machines that share the
    project's folder: docs/cluster.md does so with a job array.

    Example: python -m folio trial rates 2
    """
    from folio.sweeps import trial as trials
    from folio.sweeps.plan import read_plan

    trials.train(read_plan(name), number)
