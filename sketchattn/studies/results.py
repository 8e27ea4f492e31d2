"""The rows of a study as frames, and the files that hold them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from .. import __version__
from ..base.files import write_text
from ..base.machine import machine
from ..errors.reports import FIELDS
from ..problem import AttentionProblem
from .columns import COLUMNS, FLOORS, SAMPLED_COLUMNS, SHARE, Key, Values, is_missing
from .folder import Found as FolderFound
from .folder import read_folder
from .grid import Variant, how_measured
from .pictures.words import some_of
from .plan import Plan
from .plots import PICTURES

Found = Mapping[str, Mapping[Key, Values]]


def tabulate(plan: Plan, found: Found) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the rows of the methods at all seeds, and of the references at one."""
    return (
        _frame(plan, plan.variants, plan.seeds, found),
        _frame(plan, plan.references, plan.seeds[:1], found, beside=True),
    )


def others_in(plan: Plan) -> FolderFound | None:
    """Return what the folder of a study holds of methods that are not in it; None for nothing.

    Raises
    ------
    ValueError
        Where that cannot stand beside the rows of this study: of other heads, ranks or seeds, or
        of another version of the library.
    """
    if plan.folder is None or (found := read_folder(plan.folder)) is None:
        return None
    own = {v.label for v in plan.variants}
    frame = found.frame[~found.frame["method"].isin(own)]
    if not len(frame):
        return None
    held = found.settings
    texts = {name: x for name, x in held.get("methods", {}).items() if name not in own}
    pairs = [
        ("version", __version__, held.get("version")),
        (
            "heads",
            [(p.name, p.digest) for p in plan.problems],
            [(x.get("name"), x.get("digest")) for x in held.get("heads", [])],
        ),
        ("ranks", plan.ranks, held.get("ranks")),
        ("seeds", plan.seeds, held.get("seeds")),
    ]
    for name, wanted, there in pairs:
        if str(wanted) != str(there):  # a share of 1.0 is another rank than 1
            what = "other heads" if name == "heads" else f"{name} {there}"
            raise ValueError(
                f"out must be a folder whose other methods have the same {name}, got "
                f"{str(plan.folder)!r} with {some_of(list(texts), 3)} ({what}); name another "
                f"folder, or run these methods too"
            )
    bounds = found.bounds[~found.bounds["method"].isin(own)]
    return found._replace(frame=frame, bounds=bounds, settings={"methods": texts})


def with_others(
    plan: Plan, frame: pd.DataFrame, others: FolderFound | None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the rows and the bounds of a study with those of other methods that are there."""
    if others is None:
        return frame, plan.bounds
    order = {str(p.name): i for i, p in enumerate(plan.problems)}
    both = pd.concat([others.frame, frame], ignore_index=True)
    both = both.sort_values("head", key=lambda x: x.map(order), kind="stable", ignore_index=True)
    bounds = [x for x in (others.bounds, plan.bounds) if len(x)]
    return both, pd.concat(bounds, ignore_index=True) if bounds else plan.bounds


def write_results(
    plan: Plan,
    folder: Path,
    frame: pd.DataFrame,
    beside: pd.DataFrame,
    bounds: pd.DataFrame,
    others: FolderFound | None,
) -> None:
    """Write the rows, the bounds and the settings of a study into its folder.

    Pictures that are there stay if they are those of the same rows.
    """
    tables = {"results.csv": _csv(frame), "references.csv": _csv(beside)}
    if len(bounds):
        tables["bounds.csv"] = _csv(bounds)
    wanted = {**dict.fromkeys(("bounds.csv",)), **tables}
    if any(_read(folder / name) != text for name, text in wanted.items()):
        for name in ("study.json", "bounds.csv", "report.html", *PICTURES):
            (folder / name).unlink(missing_ok=True)
    for name, text in tables.items():
        write_text(folder / name, text)
    kept = {} if others is None else others.settings["methods"]
    settings = {
        "version": __version__,
        "call": plan.call,
        "heads": [
            _describe_head(p) | {"rows": plan.here[str(p.name)].rows or p.n_q}
            for p in plan.problems
        ],
        "methods": {**kept, **{v.label: v.text for v in plan.variants}},
        "left_out": plan.left_out,
        "ranks": plan.ranks,
        "seeds": plan.seeds,
        "floors": [v.label for v in plan.references if v.label in FLOORS],
        "spectral": plan.spectral,
        "notes": plan.notes,
        "bounds": list(dict.fromkeys(bounds["claim"])),
        "jobs": plan.jobs,
        "machine": machine(),
    }
    write_text(folder / "study.json", json.dumps(settings, indent=2) + "\n")


def _read(path: Path) -> str | None:
    """Return the text of a file as it stands, None if there is none."""
    return path.read_bytes().decode(errors="replace") if path.is_file() else None


def _frame(
    plan: Plan,
    variants: Sequence[Variant],
    seeds: Sequence[int],
    found: Found,
    beside: bool = False,
) -> pd.DataFrame:
    """Return the full grid in order: head, method, rank, seed; references that a head has."""
    rows: list[list[Any]] = []
    for problem in plan.problems:
        done, here = found[str(problem.name)], plan.here[str(problem.name)]
        how = how_measured(here.rows, plan.spectral)
        for variant in variants:
            if beside and variant.label in here.without:
                continue
            for rank, share in here.asked:
                for seed in seeds:
                    own = seed if variant.randomized else None
                    values = done[variant.text_at(rank) + how, own]
                    rows.append(
                        [problem.name, variant.label, rank, seed]
                        + [values[name] for name in COLUMNS[4:]]
                        + [share]
                    )
    frame = pd.DataFrame(rows, columns=[*COLUMNS, SHARE])
    if not plan.shares:
        frame = frame.drop(columns=SHARE)
    kinds: dict[str, Any] = dict.fromkeys((*FIELDS, *SAMPLED_COLUMNS[:2]), np.float64)
    kinds |= dict.fromkeys(("rank", "seed", "rows"), np.int64)  # also where there is no row
    kinds["effective_rank"] = "Int64"
    if frame["bytes"].isna().any():
        kinds["bytes"] = "Int64"
    return frame.astype(kinds)


def _csv(frame: pd.DataFrame) -> str:
    """Return a frame so that reading gives the same numbers: "inf", "nan", or empty for no rank."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(frame.columns)
    for row in frame.itertuples(index=False):
        writer.writerow("" if is_missing(x) else x for x in row)
    return buffer.getvalue()


def _describe_head(problem: AttentionProblem) -> dict[str, Any]:
    return {
        "name": problem.name,
        "n_q": problem.n_q,
        "n_k": problem.n_k,
        "d": problem.d,
        "d_v": problem.d_v,
        "dtype": problem.dtype.name,
        "scale": problem.scale,
        "causal": problem.causal,
        "kept_keys": len(problem.kept_keys),
        "digest": problem.digest,
    }
