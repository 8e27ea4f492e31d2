"""Measure error against rank on many heads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .application import JSON_HELP, app, print_json
from .inputs import (
    HeadsArgument,
    HeadsOption,
    ImportOption,
    ProgressOption,
    given_heads,
    import_files,
    split_methods,
    split_ranks,
    split_words,
)

if TYPE_CHECKING:
    import pandas as pd


# The measure that --target is about.
TARGETED = "output_fro_rel"


def as_records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return rows for JSON; ranks and shares that are missing are None."""
    counts = [name for name in ("rank", "share", "rank_all", "share_all") if name in table]
    return [
        {str(key): None if key in counts and x != x else x for key, x in record.items()}
        for record in table.astype(dict.fromkeys(counts, object)).to_dict("records")
    ]


@app.command("study")
def _study(
    heads: HeadsArgument = None,
    heads_option: HeadsOption = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Names separated by commas, with parameters in brackets: "
            "'skeinformer(mix=0.5),jl'; all that apply by default.",
            metavar="A,B",
        ),
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
        typer.Option(
            help="Heads computed at the same time, -1 for one a CPU; by default 1, and -1 "
            "where there is much to do.",
            show_default=False,
        ),
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
    imports: ImportOption = None,
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
    report: Annotated[
        bool, typer.Option("--report/--no-report", help="Write report.html, one page with all.")
    ] = True,
    progress: ProgressOption = None,
    target: Annotated[
        float | None,
        typer.Option(
            help="Print the smallest rank of each method with output_fro_rel at most this.",
            metavar="ERROR",
        ),
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Print a line for each method and rank, with quartiles.")
    ] = False,
    dask: Annotated[
        str | None,
        typer.Option(
            help="Compute the cells on a cluster of dask.distributed, in place of --jobs.",
            metavar="ADDRESS",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Measure error against rank on many heads; pictures, a report.

    Pictures of error against time and work, of each method, each head and each measure.  Every
    method runs on every head, at every rank, for every seed, beside the floors that nobody can beat
    and the predictors that everybody must beat.  Killed and started again with the same folder, it
    continues.
    """
    from ..studies.report.page import REPORT
    from ..studies.run import study
    from ..studies.summary import rank_lines

    import_files(imports)
    result = study(
        given_heads(heads, heads_option),
        methods=split_methods(methods),
        ranks=split_ranks(ranks),
        seeds=seeds,
        jobs=jobs,
        out=out,
        resume=not fresh,
        pictures=pictures,
        progress=progress,
        bounds=split_words(bounds),
        report=report,
        dask=dask,
        floors=floors,
        spectral=spectral,
        rows=rows,
    )
    folder = result.out or out
    page = folder / REPORT
    written = page if report and page.is_file() else None
    reached = None if target is None else result.rank_at(TARGETED, target)
    if as_json:
        summary = result.summary()
        print_json(
            {
                "out": folder,
                "results": folder / "results.csv",
                "references": folder / "references.csv",
                "bounds": folder / "bounds.csv" if len(result.bounds) else None,
                "pictures": result.pictures,
                "report": written,
                "left_out": result.left_out,
                "target": None if reached is None else as_records(reached),
                "notes": result.notes,
                "computed": result.computed,
                "reused": result.reused,
                "summary": as_records(summary),
            }
        )
        return
    typer.echo(result.render(every=every))
    if reached is not None and target is not None:
        count = result.frame["head"].nunique()
        typer.echo("\n" + "\n".join(rank_lines(reached, TARGETED, target, count)))
    # The last lines are the paths.
    files = ["results.csv", "references.csv", *(["bounds.csv"] if len(result.bounds) else [])]
    typer.echo(f"\nrows: {', '.join(str(folder / name) for name in files)}")
    for i, path in enumerate(result.pictures):
        typer.echo(f"{'pictures: ' if i == 0 else '          '}{path}")
    if written is not None:
        typer.echo(f"report: {written}")
