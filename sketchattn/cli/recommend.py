"""Recommend the cheapest approximation of each head."""

from __future__ import annotations

from typing import Annotated

import typer

from .application import JSON_HELP, app, print_json
from .inputs import HeadsArgument, HeadsOption, ProgressOption, given_heads, split_methods


@app.command("recommend")
def _recommend(
    heads: HeadsArgument = None,
    heads_option: HeadsOption = None,
    tolerance: Annotated[float, typer.Option(help="Largest error |Ohat - O|_F / |O|_F.")] = 0.05,
    confidence: Annotated[
        float, typer.Option(help="Probability, for each head, that the error is below its bound.")
    ] = 0.95,
    methods: Annotated[
        str | None,
        typer.Option(help="Names separated by commas; all that apply by default.", metavar="A,B"),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(
            help="Exact rows of a certificate; as many as the tolerance needs by default."
        ),
    ] = None,
    kind: Annotated[
        str, typer.Option(help="finite-sample (always valid) or approximate (tight).")
    ] = "finite-sample",
    seed: Annotated[int, typer.Option(help="Seed of methods that draw; the calls name it.")] = 0,
    jobs: Annotated[
        int,
        typer.Option(help="Heads at the same time; each is timed with its share of the threads."),
    ] = 1,
    progress: ProgressOption = None,
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Find the cheapest method of certified error.

    For each head a method and a rank, with the Python call to use them and the time that it took
    here, or the statement that none is cheaper than exact attention.
    """
    from ..studies.recommend import recommend

    result = recommend(
        given_heads(heads, heads_option),
        tolerance,
        confidence,
        split_methods(methods),
        seed,
        rows=rows,
        kind=kind,
        jobs=jobs,
        progress=progress,
    )
    if as_json:
        print_json(result.as_dict())
        return
    typer.echo(result.render())
