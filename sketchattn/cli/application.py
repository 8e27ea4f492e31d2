"""The application that verbs register with, and what they print."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Annotated, Any

import typer

from ..base.words import table as table

JSON_HELP = "Print JSON instead of a table; numbers that are not finite become strings."

# Exit codes: 0 done, 1 done but not as recorded, 2 refused or failed, 130 interrupted (128 + 2).
DIFFERS = 1
FAILED = 2
INTERRUPTED = 130

app = typer.Typer(
    name="sketchattn",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@contextmanager
def printable() -> Iterator[None]:
    """Make whatever is printed cost nothing but the printing.

    Characters that the console does not know are written as escapes, a closed stream takes what is
    written, and warnings are one line each.
    """
    before: list[tuple[Any, str]] = []
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started this
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
            before.append((stream, stream.errors))
            stream.reconfigure(errors="backslashreplace")

    def show(message: Warning | str, *_: object, **__: object) -> None:
        print(f"sketchattn: warning: {' '.join(str(message).split())}", file=sys.stderr)

    try:
        with warnings.catch_warnings():
            warnings.showwarning = show
            # Whoever wants errors in place of warnings does not want to lose results.
            warnings.filterwarnings("always", message="(pictures are|report is) missing")
            yield
    finally:
        for stream, errors in before:
            with suppress(ValueError):  # closed meanwhile
                stream.reconfigure(errors=errors)


def one_line(error: Exception) -> str:
    """Return what an error says, on one line."""
    if hasattr(error, "format_message"):  # a usage error of Typer, whichever parser it uses
        text = f"{error.format_message().rstrip('.')}; see sketchattn --help"
    elif isinstance(error, ValueError | TypeError | OSError | ImportError | RuntimeError):
        text = str(error) or type(error).__name__
    else:
        text = f"{type(error).__name__}: {error}; SKETCHATTN_TRACEBACK=1 shows where"
    return " ".join(text.split())


def print_json(value: object) -> None:
    """Print a value as JSON; numbers that are not finite become strings."""
    typer.echo(json.dumps(_plain(value), indent=2, allow_nan=False))


def _plain(value: Any) -> Any:
    """Return a value as JSON can hold it."""
    from ..base.files import encode

    if isinstance(value, dict):
        return {str(key): _plain(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    if hasattr(value, "item"):  # a NumPy number
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return encode(value)
    return str(value)


def _show_version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        typer.echo(f"sketchattn {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _main(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Softmax attention as matrix approximation: study, certify, and compare with exact attention.

    The main job is "sketchattn study": error against rank on real attention heads.
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
