"""Time this library beside others."""

from __future__ import annotations

from typing import Annotated

import typer

from .application import JSON_HELP, app, print_json, table


@app.command("bench")
def _bench(
    names: Annotated[
        list[str] | None, typer.Argument(help="Benchmarks; all by default.", metavar="[NAME]...")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small sizes: shows that it runs, measures nothing.")
    ] = False,
    rounds: Annotated[
        int | None, typer.Option(help="Interleaved repetitions; 7 by default, 3 if quick.")
    ] = None,
    only_list: Annotated[
        bool, typer.Option("--list", help="Name the benchmarks and exit.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Time this library beside what it competes with.

    Each line is measured on all threads and on one.

    What other programs use meanwhile is measured: rounds that they disturb are done again, and
    marked where that does not help.
    """
    from ..base.machine import machine
    from ..bench import runner

    if only_list:
        listed = [(name, item.description) for name, item in runner.BENCHMARKS.items()]
        if as_json:
            print_json([{"name": name, "description": text} for name, text in listed])
        else:
            typer.echo(table(("name", "description"), listed, left=1))
        return
    before = runner.measure_load()
    rows = runner.run(names or None, quick=quick, rounds=rounds)
    around = {"before": before, "after": runner.measure_load()}
    if as_json:
        print_json({"rows": rows, "load": around, "machine": machine()})
    else:
        typer.echo(runner.render(rows, around))
