"""Certify outputs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .application import DIFFERS, JSON_HELP, app, print_json
from .inputs import HEADS_HELP, only_array, parse_heads, pick, read_arrays, shapes_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..errors.certificates import ErrorCertificate
    from ..heads.container import Heads

AT_MOST, ABOVE, NOT_KNOWN = "at most", "above", "not known"


@app.command("certify")
def _certify(
    heads: Annotated[str, typer.Argument(help=HEADS_HELP, metavar="HEADS")],
    output: Annotated[
        Path,
        typer.Argument(
            help="Output of any implementation: .npy, .npz or .safetensors, shape (n_q, d_v) for "
            "one head or (heads, n_q, d_v); the array named output, or the only one, or one for "
            "each head, by its name.",
            metavar="OUTPUT",
        ),
    ],
    head: Annotated[
        str | None, typer.Option(help="Name or number (from 0) of one head.", metavar="NAME|INDEX")
    ] = None,
    rows: Annotated[int, typer.Option(help="Exact rows to compute.")] = 256,
    confidence: Annotated[
        float, typer.Option(help="Probability that the interval holds the error.")
    ] = 0.95,
    kind: Annotated[
        str, typer.Option(help="finite-sample (always valid) or approximate (tight).")
    ] = "finite-sample",
    max_error: Annotated[
        float | None,
        typer.Option(
            help="The largest error to accept: the exit code is 1 unless the whole interval is "
            "below, which may take more --rows.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sample of rows.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Bound the error of any output array from exact rows.

    The rows are a random sample; the error is |Ohat - O|_F / |O|_F of each head, with the exact
    output O of HEADS.  The width of an interval is high / low: 1 where all rows were computed.
    With --max-error each head is "at most" it, "above" it, or "not known": --json has these words
    as the verdict.  Of a right output too few rows leave the verdict not known, for any row that
    was not drawn may be wrong.
    """
    from ..errors.certificates import certify

    if max_error is not None and not max_error >= 0:
        raise ValueError(f"max-error must be at least 0, got {max_error}; 0.05 is 5 %")
    given = parse_heads(heads)
    chosen = pick(given, head)
    outputs = _per_head(output, given, chosen, head)
    records, lines = [], []
    for i, array in zip(chosen, outputs, strict=True):
        certificate = certify(given[i], array, rows, confidence, seed, kind=kind)
        names = ("estimate", "low", "high", "width", "rows", "confidence", "kind")
        verdict = None if max_error is None else _verdict(certificate, max_error)
        records.append(
            {"head": given.names[i]}
            | {name: getattr(certificate, name) for name in names}
            | {"max_error": max_error, "verdict": verdict}
        )
        said = str(certificate)
        if certificate.kind != "exact":
            said += f"; rows = {given[i].n_q} for exact"
        if max_error is not None:
            said += _judged(certificate, max_error)
        lines.append((given.names[i], said))
    if as_json:
        print_json(records)
    else:
        width = max(len(name) for name, _ in lines)
        for name, said in lines:
            typer.echo(f"{name.ljust(width)}  {said}")
    if any(record["verdict"] not in (None, AT_MOST) for record in records):
        raise typer.Exit(DIFFERS)


def _verdict(certificate: ErrorCertificate, most: float) -> str:
    """Return on which side of the largest error to accept an interval is."""
    if certificate.high <= most:
        return AT_MOST
    return ABOVE if certificate.low > most else NOT_KNOWN


def _judged(certificate: ErrorCertificate, most: float) -> str:
    """Return what a certificate says of the largest error to accept."""
    verdict = _verdict(certificate, most)
    if verdict != NOT_KNOWN:
        return f": {verdict if verdict == AT_MOST else verdict.upper()} {most:g}"
    if certificate.estimate <= most:
        return (
            f": NOT KNOWN to be at most {most:g}, though the estimate is: {certificate.rows} rows "
            f"leave the interval wide, more --rows narrow it"
        )
    return f": NOT KNOWN to be at most {most:g}, and the estimate is not; more --rows may tell"


def _per_head(
    path: Path, heads: Heads, chosen: list[int], head: str | None
) -> list[NDArray[np.generic]]:
    """Return the output of each chosen head."""
    shapes = list(shapes_of(heads))
    arrays = read_arrays(path)
    if all(heads.names[i] in arrays for i in chosen):  # an array a head, by its name
        return [arrays[heads.names[i]] for i in chosen]
    array = only_array(arrays)
    if len(set(shapes)) == 1 and array.shape == (len(heads), *shapes[0]):
        return [array[i] for i in chosen]
    if len(chosen) == 1 and array.shape == shapes[chosen[0]]:
        return [array]
    if array.shape in shapes and len(chosen) > 1:
        raise ValueError(
            f"head must be given for an output of one head, got {len(heads)} heads; "
            f"add --head NAME or --head NUMBER"
        )
    if len(set(shapes)) > 1 and head is None:
        raise ValueError(
            f"output must hold an array for each head, by its name, where heads differ in shape, "
            f"got one of shape {array.shape}; write an .npz or .safetensors file, or add --head"
        )
    one = shapes[chosen[0]]
    many = f" or {(len(heads), *one)} of all" if len(set(shapes)) == 1 else ""
    raise ValueError(
        f"output must have the shape {one} of one head{many}, got "
        f"{array.shape}; check that it belongs to these heads"
    )
