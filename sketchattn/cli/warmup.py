"""Kernels compiled beforehand."""

from __future__ import annotations

from typing import Annotated

import typer

from .application import JSON_HELP, app, print_json


@app.command("warmup")
def _warmup(as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False) -> None:
    """Compile all kernels once, so that later calls are quick."""
    from ..bench import startup

    seconds = startup.warmup()
    folder = _cache_folder()
    if as_json:
        print_json({"seconds": seconds, "cache": folder})
        return
    where = f"cached in {folder}" if folder else "not cached: no folder can be written"
    typer.echo(f"kernels ready in {seconds:.2f} s, {where}")


def _cache_folder() -> str | None:
    """Return where compiled kernels are kept, None where they are not."""
    from ..kernels import _jit, softmax

    if _jit.failure:
        return None
    for kernel in vars(softmax).values():
        path = getattr(getattr(kernel, "stats", None), "cache_path", None)
        if path:
            return str(path)
    return None
