"""The report of a study, written as one file of HTML."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...base.files import write_text
from ...base.pages import render_page, short
from .figures import charts
from .medians import MAIN, Medians
from .tables import all_table, bound_table, budget_table, head_table, work_table
from .words import findings, seconds, what_was_measured

if TYPE_CHECKING:
    import pandas as pd


def write_report(
    path: str | PathLike[str],
    frame: pd.DataFrame,
    references: pd.DataFrame,
    bounds: pd.DataFrame,
    left_out: Mapping[str, str],
    about: Mapping[str, Any],
) -> Path:
    """Write the report of a study.

    Parameters
    ----------
    path : path
        Of the file, which is replaced in one step.
    frame, references, bounds, left_out
        As in `StudyResult`.
    about : mapping
        The settings of the study as in ``study.json``; what is missing is left out.

    Returns
    -------
    Path
    """
    target = Path(path)
    write_text(target, report_page(frame, references, bounds, left_out, about))
    return target


def report_page(
    frame: pd.DataFrame,
    references: pd.DataFrame,
    bounds: pd.DataFrame,
    left_out: Mapping[str, str],
    about: Mapping[str, Any],
) -> str:
    """Return the report of a study as text."""
    medians = Medians(frame, references)
    hardness = {x["name"]: x for x in about.get("hardness", ())}
    return render_page(
        __package__ or "",
        "report.html",
        charts(medians, bounds, hardness),
        title="sketchattn study",
        grid=what_was_measured(medians, about),
        facts=_facts(medians),
        findings=findings(medians),
        budgets=budget_table(medians),
        work=work_table(medians),
        everything=all_table(medians),
        heads=head_table(medians, hardness),
        hard=bool(hardness),
        bounds=bound_table(medians, bounds),
        left_out=left_out,
        settings=_settings(about),
        call=about.get("call", ""),
        methods=about.get("methods", {}),
    )


def _facts(medians: Medians) -> list[tuple[str, str, str]]:
    """Return the few numbers to see first: what, how much, and beside what."""
    rank = medians.ranks[-1]
    found = []
    for each in dict.fromkeys((medians.ranks[0], rank)):
        name, error = medians.best(each)
        if name:
            most = short(medians.over(MAIN, name, each).most)
            beside = f"relative output error {short(error)}, worst head {most}"
            found.append((f"best at rank {each}", name, beside))
    mean, floor = (medians.over(MAIN, x, rank).middle for x in ("vmean", "topk"))
    found.append(("to beat: the mean of V", short(mean), "an output that ignores the queries"))
    found.append(
        (f"floor at rank {rank}", short(floor), f"the {rank} largest entries of each row")
    )
    if "exact" in medians.beside:
        cost = medians.over("seconds", "exact", rank).middle
        found.append(("exact attention", seconds(cost), "a head, on this machine"))
    return found


def _settings(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return versions, hardware and the grid."""
    machine = about.get("machine", {})
    names = {"cpu": "processor", "cpus": "processors", "blas": "BLAS"}
    found = [("sketchattn", str(about["version"]))] if "version" in about else []
    for name, value in machine.items():
        if value is not None:
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            found.append((names.get(name, name), text))
    for name in ("jobs", "ranks", "seeds"):
        if name in about:
            value = about[name]
            found.append((name, ", ".join(map(str, value)) if isinstance(value, list) else value))
    return found
