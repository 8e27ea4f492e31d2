"""List the methods."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .application import JSON_HELP, app, print_json, table
from .inputs import ImportOption, import_files

_TRAITS = {
    "causal": "causal",
    "key_mask": "mask",
    "rectangular": "rect",
    "randomized": "random",
    "row_stochastic": "rowsum",
    "nonnegative": "nonneg",
    "oracle": "oracle",
    "exact_at_full_rank": "exact",
    "differentiable": "grad",
}


@app.command("methods")
def _methods(
    imports: ImportOption = None,
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """List the methods, their traits and parameters."""
    import dataclasses
    import inspect

    from ..zoo.base import make_method, methods

    import_files(imports)
    records: list[dict[str, Any]] = []
    for name, cls in methods().items():
        known = inspect.signature(cls).parameters
        defaults = {
            p: None if value.default is inspect.Parameter.empty else value.default
            for p, value in known.items()
        }
        method = make_method(name, {"rank": 1} if "rank" in known else {})
        records.append(
            {
                "name": name,
                "class": cls.__name__,
                "traits": dataclasses.asdict(method.traits),
                "parameters": defaults,
            }
        )
    if as_json:
        print_json(records)
        return
    rows = [
        [
            r["name"],
            r["class"],
            *("yes" if r["traits"][trait] else "-" for trait in _TRAITS),
            ", ".join(p if x is None else f"{p}={x}" for p, x in r["parameters"].items()) or "-",
        ]
        for r in records
    ]
    typer.echo(table(["name", "class", *_TRAITS.values(), "parameters"], rows, left=2))
    typer.echo(
        "\n"
        "causal, mask, rect: honours causal problems, masked keys, n_q != n_k; random: seeded;\n"
        "rowsum: rows sum to one; nonneg: no negative entry; oracle: looks at the exact matrix;\n"
        "exact: equals the exact matrix at rank = n_k; grad: has a gradient at a fixed draw.\n"
        "Traits are those of the defaults."
    )
