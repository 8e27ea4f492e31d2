"""Check claims."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .application import DIFFERS, JSON_HELP, app, print_json
from .inputs import (
    HeadsArgument,
    HeadsOption,
    ImportOption,
    ProgressOption,
    given_heads,
    import_files,
    parse_settings,
    split_words,
)


@app.command("validate")
def _validate(
    heads: HeadsArgument = None,
    heads_option: HeadsOption = None,
    claims: Annotated[
        str | None,
        typer.Option(
            help="Ids, topics (what stands before the point) or patterns such as "
            "'sketching.amm_*', separated by commas; all by default.",
            metavar="A,B",
        ),
    ] = None,
    trials: Annotated[int, typer.Option(help="Independent draws for each check.")] = 200,
    confidence: Annotated[
        float, typer.Option(help="Of the limits of rates of failure, each one-sided.")
    ] = 0.95,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    jobs: Annotated[
        int | None,
        typer.Option(
            help="Problems checked at the same time, -1 for one a CPU; by default 1, and -1 "
            "where there is much to do.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for verdicts.json, verdicts.csv, verdicts.html and a picture a claim.",
            show_default=False,
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="A parameter of claims, as eps=0.9; may be repeated.",
            metavar="NAME=VALUE",
            show_default=False,
        ),
    ] = None,
    imports: ImportOption = None,
    every: Annotated[bool, typer.Option("--all", help="Print every check.")] = False,
    progress: ProgressOption = None,
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Check published and derived claims, constants and all.

    Each claim is checked on its built-in instances, counterexamples among them, and on HEADS.  The
    exit code is 1 where a verdict is not the recorded one, which for heads without a record is
    anything but violated; where a claim of --import without a record is violated; and where
    nothing was checked.
    """
    from ..base.files import as_folder, make_folder, write_text
    from ..theory.engine.validation import validate

    folder = as_folder(out)
    import_files(imports)
    result = validate(
        split_words(claims),
        given_heads(heads, heads_option),
        trials,
        confidence,
        seed,
        jobs,
        progress=progress,
        parameters=parse_settings(settings),
    )
    pictures: list[Path] = []
    page: Path | None = None
    if folder is not None:
        verdicts = json.dumps(result.as_dict(), indent=2) + "\n"
        write_text(make_folder(folder) / "verdicts.json", verdicts)
        write_text(folder / "verdicts.csv", result.frame.to_csv(index=False))
        pictures = result.plot(folder, jobs, progress=progress)
        page = result.report(folder / "verdicts.html")
    if as_json:
        print_json(result.as_dict() | {"out": folder, "pictures": pictures, "report": page})
    else:
        typer.echo(result.render(every=every))
        if folder is not None:
            files = ", ".join(str(folder / f"verdicts.{kind}") for kind in ("json", "csv"))
            typer.echo(f"\nverdicts: {files}\npictures:")
        for path in pictures:
            typer.echo(f"  {path}")
        if page is not None:
            typer.echo(f"report: {page}")
    if not result.passed:
        raise typer.Exit(DIFFERS)
