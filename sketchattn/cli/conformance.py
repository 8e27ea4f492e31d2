"""Other projects' conformance cases."""

from __future__ import annotations

from typing import Annotated

import typer

from .application import DIFFERS, JSON_HELP, app, print_json


@app.command("conformance")
def _conformance(
    suite: Annotated[str, typer.Argument(help="The suite; onnx is the only one.", metavar="onnx")],
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Run another project's conformance cases for attention.

    "onnx": the cases of the operator Attention in the installed onnx package, in reference grade
    and by the fast path.  The exit code is 1 if a case in scope fails.
    """
    if suite != "onnx":
        raise ValueError(f"suite must be 'onnx', got {suite!r}; there is no other")
    from ..integrations.onnx import conformance

    report = conformance()
    if as_json:
        print_json(report.as_dict())
    else:
        typer.echo(report.render())
    if report.failed:
        raise typer.Exit(DIFFERS)
