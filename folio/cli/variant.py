"""`python -m folio variant`: train a named variant."""

from typing import Annotated

import typer


def variant(
    name: Annotated[str, typer.Argument(help="Name of a file in variants/, without .yaml.")],
    queue: Annotated[
        bool, typer.Option("--queue", help="Queue it for `dvc queue start` instead.")
    ] = False,
) -> None:
    """Train a named variant as a DVC experiment.

    Example: python -m folio variant seed-30m
    """
    from folio.sweeps import variants

    variants.train(name, queue)
