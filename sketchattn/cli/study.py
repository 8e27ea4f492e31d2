"""Measure error against rank on many heads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .application import JSON_HELP, app, print_json
from .inputs import HeadsArgument, HeadsOption, given_heads, split_ranks, split_words


@app.command("study")
def _study(
    heads: HeadsArgument = None,
    heads_option: HeadsOption = None,
    methods: Annotated[
        str | None,
        typer.Option(help="Names separated by commas; all that apply by default.", metavar="A,B"),
    ] = None,
    ranks: Annotated[
        str | None,
        typer.Option(
            help="Ranks separated by commas, 0.25 for a quarter of the keys of each head; powers "
            "of two from 8 to n/2 by default.",
            metavar="R,R",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Number of seeds for random methods.")] = 4,
    jobs: Annotated[
        int | None,
        typer.Option(help="Heads computed at the same time; all CPUs by default."),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for tables, pictures and finished cells.")
    ] = Path("sketchattn-study"),
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Compute again what the folder holds already.")
    ] = False,
    bounds: Annotated[
        str | None,
        typer.Option(
            help="Ids of claims, separated by commas, whose bounds are drawn over the curves.",
            metavar="CLAIM,CLAIM",
        ),
    ] = None,
    floors: Annotated[
        bool,
        typer.Option("--floors/--no-floors", help="Compute the floors: slow for long heads."),
    ] = True,
    spectral: Annotated[
        bool,
        typer.Option(
            "--spectral/--no-spectral", help="Compute spectral norms: slow for long heads."
        ),
    ] = True,
    rows: Annotated[
        int | None,
        typer.Option(
            help="Measure errors on a random sample of so many rows; all by default, and 512 from "
            "n = 65536 on.",
            show_default=False,
        ),
    ] = None,
    pictures: Annotated[
        bool, typer.Option("--pictures/--no-pictures", help="Draw the pictures.")
    ] = True,
    progress: Annotated[
        bool | None,
        typer.Option(
            "--progress/--no-progress",
            help="Show a progress bar; by default on terminals.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Measure error against rank on many heads, with pictures.

    One picture for each error measure.  Every method runs on every head, at every rank, for every
    seed, beside the floors that nobody can beat and the predictors that everybody must beat.
    Killed and started again with the same folder, it continues.
    """
    from ..kernels._threads import cpu_count
    from ..studies.run import study

    result = study(
        given_heads(heads, heads_option),
        methods=split_words(methods),
        ranks=split_ranks(ranks),
        seeds=seeds,
        jobs=cpu_count() if jobs is None else jobs,
        out=out,
        resume=not fresh,
        pictures=pictures,
        progress=progress,
        bounds=split_words(bounds),
        floors=floors,
        spectral=spectral,
        rows=rows,
    )
    folder = result.out or out
    if as_json:
        summary = result.summary()
        print_json(
            {
                "out": folder,
                "results": folder / "results.csv",
                "references": folder / "references.csv",
                "bounds": folder / "bounds.csv" if len(result.bounds) else None,
                "pictures": result.pictures,
                "left_out": result.left_out,
                "notes": result.notes,
                "computed": result.computed,
                "reused": result.reused,
                "summary": [
                    {key: None if key == "rank" and x != x else x for key, x in record.items()}
                    for record in summary.astype({"rank": object}).to_dict("records")
                ],
            }
        )
        return
    typer.echo(result.render())
    files = ["results.csv", "references.csv", *(["bounds.csv"] if len(result.bounds) else [])]
    typer.echo(f"\nrows: {', '.join(str(folder / name) for name in files)}")
    if result.pictures:
        typer.echo("pictures:")
    for path in result.pictures:
        typer.echo(f"  {path}")
