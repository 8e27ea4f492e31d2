"""Golden vectors: write them, check what other programs made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .application import DIFFERS, JSON_HELP, app, print_json
from .inputs import CASES_HELP, home


@app.command("golden")
def _golden(
    folder: Annotated[
        Path, typer.Argument(help="Folder to write, made if need be.", metavar="DIR")
    ],
    cases: Annotated[str | None, typer.Option(help=CASES_HELP, metavar="A,B")] = None,
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Write golden vectors: cases for other programs.

    Inputs, draws, float64 results and tolerances of exact attention with all its options and of
    every method; the same bytes on every x86 machine.
    """
    from ..testing.golden import read_manifest
    from ..testing.settling import write_golden

    path = write_golden(home(folder), cases=cases)
    manifest = read_manifest(path.parent)
    if as_json:
        print_json(manifest)
        return
    typer.echo(f"{len(manifest['cases'])} cases in {path.parent}, listed in {path.name}")
    for name, reason in manifest["left_out"].items():
        typer.echo(f"  left out: {name}: {reason}")


@app.command("check")
def _check(
    folder: Annotated[
        Path, typer.Argument(help="Golden vectors, of 'sketchattn golden'.", metavar="DIR")
    ],
    output: Annotated[
        Path,
        typer.Option(
            help="What another program computed: .safetensors or .npz, an array a case.",
            metavar="FILE",
            show_default=False,
        ),
    ],
    cases: Annotated[str | None, typer.Option(help=CASES_HELP, metavar="A,B")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Precision that it computed in; that of each array by default.",
            metavar="DTYPE",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Check what another program computed from golden vectors.

    The exit code is 1 where a case is wrong or missing.
    """
    from ..testing.golden import check_golden

    report = check_golden(home(folder), output, cases=cases, dtype=dtype)
    if as_json:
        print_json(report.as_dict())
    else:
        typer.echo(str(report))
    if not report.passed:
        raise typer.Exit(DIFFERS)
