"""List the claims."""

from __future__ import annotations

from typing import Annotated

import typer

from .application import JSON_HELP, app, print_json, table
from .inputs import ImportOption, import_files


@app.command("claims")
def _claims(
    pattern: Annotated[
        str | None,
        typer.Argument(
            help="Ids, topics, patterns such as 'sketching.amm_*', or words of ids, titles, "
            "statements and sources, separated by commas; all by default.",
            metavar="[PATTERN]",
        ),
    ] = None,
    imports: ImportOption = None,
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """List the claims, their status and parameters.

    validate checks them; study --bounds draws those that are bounds of an error of a method.
    """
    from ..base.words import shown
    from ..theory.engine.registry import get_entry
    from ..theory.engine.validation import find
    from .inputs import split_words

    import_files(imports)
    chosen = find(split_words(pattern))
    if as_json:
        given = {name: dict(get_entry(name).parameters) for name in chosen}
        print_json([x.as_dict() | {"parameters": given[name]} for name, x in chosen.items()])
        return
    rows = []
    for name, record in chosen.items():
        known = get_entry(name).parameters.items()
        given_ = ", ".join(p if x is None else f"{p}={shown(x)}" for p, x in known)
        rows.append([name, record.status, record.title, given_])
    typer.echo(table(["id", "status", "title", "parameters"], rows, left=3))
