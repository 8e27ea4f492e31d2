"""Record heads of a model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from .application import JSON_HELP, app, print_json, table
from .inputs import split_integers, split_words


@app.command("capture")
def _capture(
    model: Annotated[
        Path,
        typer.Argument(
            help="Folder of a model and its tokenizer, as save_pretrained of transformers writes "
            "them; nothing is fetched.",
            metavar="MODEL_DIR",
        ),
    ],
    text: Annotated[Path, typer.Option(help="Text to run the model on, UTF-8.", metavar="FILE")],
    layers: Annotated[
        str | None,
        typer.Option(help="Numbers separated by commas, from 0; all by default.", metavar="L,L"),
    ] = None,
    heads: Annotated[
        str | None,
        typer.Option(help="Query heads of each layer, as the layers.", metavar="H,H"),
    ] = None,
    max_length: Annotated[int, typer.Option(help="Tokens of the text to keep.")] = 512,
    leave_out: Annotated[
        str | None,
        typer.Option(
            help="Of softcap, sink, bias: what the model adds and heads do not hold.",
            metavar="A,B",
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="File to write, .safetensors or .npz.", metavar="FILE")
    ] = Path("heads.safetensors"),
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Record the heads of a model while it reads a text.

    They are written for study and certify.  Queries, keys and values are those that attention is
    asked with, after rotary embedding.
    """
    from ..heads.files import check_target, write_heads
    from ..integrations.transformers import capture_text

    target = check_target(out)  # before the model runs
    source = Path(os.path.expanduser(text))
    if not source.is_file():
        raise ValueError(f"text must be an existing file, got {str(source)!r}; check its name")
    made = capture_text(
        model,
        source.read_text(encoding="utf-8"),
        split_integers(layers, "layers"),
        split_integers(heads, "heads"),
        max_length=max_length,
        leave_out=split_words(leave_out) or (),
    )
    write_heads(target, made)
    record = {"out": target, "heads": len(made), "n": made.n_k, "d": made.d, "d_v": made.d_v}
    record |= {"dtype": str(made.dtype), "scale": made.scale, "causal": made.causal}
    if as_json:
        print_json(record | {"names": list(made.names), "metadata": dict(made.metadata)})
        return
    cells = [f"{x:.6g}" if isinstance(x, float) else str(x) for x in record.values()]
    typer.echo(table(list(record), [cells], left=1))
