"""How hard the heads of a study are, measured once and kept in its folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ... import __version__
from ...base.files import decode, encode, write_text
from ...base.parallel import in_parallel
from ...heads.hardness import describe
from ...kernels._threads import blas_single_thread, cpu_count, limit_threads
from ...problem import AttentionProblem

# Entries up to which a head is described: 8192 x 8192 takes seconds, and grows with the square.
MOST_ENTRIES = 1 << 26
FILE = "hardness.json"


def measure_hardness(
    problems: Sequence[AttentionProblem], folder: Path, jobs: int
) -> dict[str, dict[str, Any]]:
    """Return the hardness of heads by name, and keep it in ``hardness.json``.

    Heads that are too large, or in which no query sees a key, have none.  What the file holds of
    the same heads and the same version is taken from it.

    Parameters
    ----------
    problems : sequence of AttentionProblem
        With distinct names.
    folder : Path
        Of the study.
    jobs : int
        Heads that are described at the same time.
    """
    known = read_hardness(folder)
    small = [p for p in problems if p.n_q * p.n_k <= MOST_ENTRIES]
    missing = [p for p in small if known.get(str(p.name), {}).get("digest") != p.digest]
    workers = min(jobs, max(1, len(missing)))
    tasks = ((p, max(1, cpu_count() // workers)) for p in missing)
    found = {name: report for name, report in in_parallel(_described, tasks, workers) if report}
    kept = {**known, **found}
    every = {str(p.name): kept[str(p.name)] for p in small if str(p.name) in kept}
    if found or every.keys() != known.keys():
        text = json.dumps({"version": __version__, "heads": every}, allow_nan=False)
        write_text(folder / FILE, text + "\n")
    return every


def read_hardness(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what a folder holds about the hardness of heads, nothing of another version."""
    try:
        kept = json.loads((folder / FILE).read_text(encoding="utf-8"))
        if kept["version"] != __version__:
            return {}
        return {str(name): dict(report) for name, report in kept["heads"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _described(task: tuple[AttentionProblem, int]) -> tuple[str, dict[str, Any] | None]:
    problem, threads = task
    with limit_threads(threads), blas_single_thread():
        try:
            report = describe(problem).as_dict()
        except ValueError:  # no query sees a key
            return str(problem.name), None
    plain = {name: encode(x) for name, x in report.items() if name != "singular_values"}
    return str(problem.name), {**plain, "digest": problem.digest}


def number_of(report: dict[str, Any], name: str) -> int | float | None:
    """Return a number of a report, None where it has none."""
    value = decode(report.get(name))
    return value if isinstance(value, int | float) else None
