"""Check claims."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .application import DIFFERS, JSON_HELP, app, print_json
from .inputs import HeadsArgument, HeadsOption, given_heads, split_words


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
        typer.Option(help="Problems checked at the same time; all CPUs by default."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for verdicts.json and a picture a claim.", show_default=False),
    ] = None,
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
    """Check published and derived claims, constants and all.

    Each claim is checked on its built-in instances, counterexamples among them, and on HEADS.  The
    exit code is 1 where a verdict is not the recorded one, which for heads without a record is
    anything but violated.
    """
    from ..base.files import as_folder, make_folder, write_text
    from ..kernels._threads import cpu_count
    from ..theory.engine.validation import validate

    folder = as_folder(out)
    workers = cpu_count() if jobs is None else jobs
    result = validate(
        split_words(claims),
        given_heads(heads, heads_option),
        trials,
        confidence,
        seed,
        workers,
        progress=progress,
    )
    pictures: list[Path] = []
    if folder is not None:
        verdicts = json.dumps(result.as_dict(), indent=2) + "\n"
        write_text(make_folder(folder) / "verdicts.json", verdicts)
        pictures = result.plot(folder, workers, progress=progress)
    if as_json:
        print_json(result.as_dict() | {"out": folder, "pictures": pictures})
    else:
        typer.echo(result.render())
        if folder is not None:
            typer.echo(f"\nverdicts: {folder / 'verdicts.json'}\npictures:")
        for path in pictures:
            typer.echo(f"  {path}")
    if result.unexpected:
        raise typer.Exit(DIFFERS)
