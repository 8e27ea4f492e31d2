"""The report of a study, written as one file of HTML."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ... import __version__
from ...base.files import write_text
from ...base.machine import machine
from ...base.pages import render_page, short
from ..columns import EXACT
from ..ranks import in_words
from .figures import charts
from .hardness import read_hardness
from .medians import MAIN, Medians
from .tables import all_table, bound_table, budget_table, head_table, work_table
from .words import findings, seconds, what_was_measured

if TYPE_CHECKING:
    import pandas as pd


REPORT = "report.html"


def write_report(
    path: str | PathLike[str],
    frame: pd.DataFrame,
    references: pd.DataFrame,
    bounds: pd.DataFrame,
    left_out: Mapping[str, str],
    folder: Path | None,
) -> Path:
    """Write the report of a study.

    Parameters
    ----------
    path : path
        Of the file, which is replaced in one step.
    frame, references, bounds, left_out
        As in `StudyResult`.
    folder : Path or None
        Of the study: its settings and the hardness of its heads are read there.

    Returns
    -------
    Path
    """
    target = Path(os.path.expanduser(path))
    page = report_page(
        frame, references, bounds, left_out, _settings_in(folder), _hardness_in(folder)
    )
    write_text(target, page)
    return target


def _settings_in(folder: Path | None) -> dict[str, Any]:
    """Return the settings of a study; of one without a folder what is known here."""
    if folder is None:
        return {"version": __version__, "machine": machine()}
    found = json.loads((folder / "study.json").read_text(encoding="utf-8"))
    return dict(found)


def _hardness_in(folder: Path | None) -> dict[str, dict[str, Any]]:
    return {} if folder is None else read_hardness(folder)


def report_page(
    frame: pd.DataFrame,
    references: pd.DataFrame,
    bounds: pd.DataFrame,
    left_out: Mapping[str, str],
    settings: Mapping[str, Any],
    hardness: Mapping[str, dict[str, Any]],
) -> str:
    """Return the report of a study as text.

    Parameters
    ----------
    frame, references, bounds, left_out
        As in `StudyResult`.
    settings : mapping
        As in ``study.json``; what is missing is left out.
    hardness : mapping
        As in ``hardness.json``, by name of head.
    """
    medians = Medians(frame, references)
    known = {head: hardness[head] for head in medians.heads if head in hardness}
    return render_page(
        __package__ or "",
        "report.html",
        charts(medians, bounds, known),
        title="sketchattn study",
        grid=what_was_measured(medians, settings),
        facts=_facts(medians),
        findings=findings(medians),
        budgets=budget_table(medians),
        work=work_table(medians),
        everything=all_table(medians),
        heads=head_table(medians, known),
        hard=bool(known),
        bounds=bound_table(medians, bounds),
        left_out=left_out,
        notes=settings.get("notes", ()),
        settings=_settings(settings),
        call=settings.get("call", ""),
        methods=settings.get("methods", {}),
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
            found.append((f"best at rank {in_words(each)}", name, beside))
    mean, floor = (medians.over(MAIN, x, rank).middle for x in ("vmean", "topk"))
    if not math.isnan(mean):
        found.append(("to beat: the mean of V", short(mean), "an output that ignores the queries"))
    if not math.isnan(floor):
        what = f"the {in_words(rank)} largest entries of each row"
        found.append((f"floor at rank {in_words(rank)}", short(floor), what))
    if EXACT in medians.beside:
        cost = medians.over("seconds", EXACT, rank).middle
        found.append(("exact attention", seconds(cost), "a head, on this machine"))
    return found


def _settings(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return versions, hardware and the grid."""
    machine = about.get("machine", {})
    names = {"cpu": "processor", "cpus": "processors", "blas": "BLAS"}
    found = [("sketchattn", str(about["version"]))] if "version" in about else []
    for name, value in machine.items():
        if value is not None:
            found.append((names.get(name, name), _listed(value)))
    found += [(name, _listed(about[name])) for name in ("jobs", "ranks", "seeds") if name in about]
    return found


def _listed(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
