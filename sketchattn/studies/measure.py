"""The cells of one head, measured: what the error reports say, and what they cost."""

from __future__ import annotations

import math
import statistics
import time
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..base.files import append_bytes
from ..errors.reports import ErrorReport, error_report
from ..errors.sampled import sampled_report, sampled_topk
from ..kernels._threads import blas_single_thread, cpu_count, limit_threads
from ..problem import AttentionProblem
from ..zoo.base import Method
from ..zoo.baselines import TopK
from .columns import Key, Values
from .grid import Cell
from .journal import check_held, format_line, holder_of

# A cell is timed again while all its runs took less than this, three times at most: what disturbs
# a run is short against more, and tables take medians over seeds and heads too.
TIMED_SECONDS = 0.004
# A power cut costs the cells of so many seconds, and one more.
SYNC_SECONDS = 1.0


def measure(problem: AttentionProblem, cell: Cell, *, warm: bool) -> Values:
    """Return the values of one cell: what the error report says, and what it cost."""
    if cell.rows is not None and isinstance(cell.method, TopK):
        return _measure_floor(problem, cell.method, cell.rows)
    values = problem.values
    linear = cell.method.traits.matrix

    def run(method: Method) -> Any:
        """Return what is measured, Ahat or the output itself, after the output was computed."""
        if not linear:
            return method.attend(problem, rng=cell.seed)
        ahat = method.approximate(problem, rng=cell.seed)
        _ = ahat @ values
        return ahat

    if not warm:  # the first run of a method may compile kernels or decompose the exact matrix
        run(cell.first)
    times: list[float] = []
    while not times or (len(times) < 3 and sum(times) < TIMED_SECONDS):
        start = time.perf_counter()
        found = run(cell.method)
        times.append(time.perf_counter() - start)
    rank = found.effective_rank if linear else None
    return {
        **_errors(problem, cell, found),
        "seconds": statistics.median(times),
        "bytes": int(found.nbytes) if linear else None,
        "effective_rank": None if rank is None else int(rank),
        "work": float(found.work(problem)) if linear else math.nan,
    }


def run_cell(problem: AttentionProblem, cell: Cell, warmed: set[str]) -> Values:
    """Return the values of one cell; name it if it fails.

    ``warmed`` holds the labels that have run on this head, and gets that of the cell.
    """
    try:
        values = measure(problem, cell, warm=cell.label in warmed)
    except Exception as error:
        at = "" if cell.rank is None else f", rank {cell.rank}"
        raise RuntimeError(
            f"method {cell.label!r} failed on head {problem.name!r}{at}, seed "
            f"{cell.seed}: {type(error).__name__}: {error}"
        ) from error
    warmed.add(cell.label)
    return values


def _errors(problem: AttentionProblem, cell: Cell, found: Any) -> Values:
    """Return the errors of Ahat or of an output, and the rows that they are from."""
    given = {"ahat": found} if cell.method.traits.matrix else {"output": found}
    if cell.rows is None:
        report = error_report(problem, **given, spectral=cell.spectral)
        low = high = report.output_fro_rel
        rows = problem.n_q
    else:
        report, low, high, rows = sampled_report(problem, cell.rows, **given)
    return _listed(report, low, high, rows)


def _listed(report: ErrorReport, low: float, high: float, rows: int) -> Values:
    return {
        **report.as_dict(),
        "output_fro_rel_low": low,
        "output_fro_rel_high": high,
        "rows": rows,
    }


def _measure_floor(problem: AttentionProblem, method: TopK, rows: int) -> Values:
    """Return the values of a floor that is computed on the sampled rows only."""
    start = time.perf_counter()
    found = sampled_topk(problem, rows, method.rank, renormalize=method.renormalize)
    kept, seen = min(method.rank, len(problem.kept_keys)), problem.visible_counts()
    return {
        **_listed(*found),
        "seconds": time.perf_counter() - start,
        "bytes": None,
        "effective_rank": int(kept),
        "work": float(np.minimum(seen, kept).sum() / max(int(seen.sum()), 1)),
    }


class HeadTask(NamedTuple):
    """Hold what the worker of one head is given.

    ``token`` proves that the study still holds the folder of ``lock``, and ``jobs`` is the number
    of heads that are computed beside this one.  ``kept`` says whether the journal is: one that is
    temporary moves the bar, and may be missing.  ``announce`` asks for a file that names the cell
    in work, for the bar.
    """

    problem: AttentionProblem
    cells: list[Cell]
    journal: Path
    lock: Path
    token: str
    jobs: int
    kept: bool = True
    announce: bool = False


def now_path(journal: Path) -> Path:
    """Return the file that names what a head works on."""
    return journal.with_suffix(".now")


def _announce(task: HeadTask, cell: Cell) -> None:
    at = "" if cell.rank is None else f" at rank {cell.rank}"
    with suppress(OSError):
        now_path(task.journal).write_text(f"{task.problem.name}: {cell.label}{at}")


def run_head(task: HeadTask) -> tuple[str, dict[Key, Values]]:
    """Compute the cells of one head, append each to its journal, and return them."""
    problem = task.problem
    found: dict[Key, Values] = {}
    warmed: set[str] = set()
    synced = time.monotonic()
    shared = holder_of(task.lock).exists()  # a worker on another machine may not see the folder
    with ExitStack() as stack:
        stack.callback(problem.forget)
        if task.jobs > 1:
            stack.enter_context(limit_threads(max(1, cpu_count() // task.jobs)))
        # Decompositions round differently with another number of BLAS threads, and results must
        # not depend on ``jobs``.
        stack.enter_context(blas_single_thread())
        for cell in task.cells:
            if task.kept and shared:
                check_held(task.lock, task.token)
            if task.announce and shared:
                _announce(task, cell)
            values = run_cell(problem, cell, warmed)
            found[cell.key] = values
            if shared:
                if task.kept:  # the study may have been killed, and continued, meanwhile
                    check_held(task.lock, task.token)
                sync = task.kept and time.monotonic() - synced > SYNC_SECONDS
                with nullcontext() if task.kept else suppress(OSError):
                    append_bytes(task.journal, format_line(problem.digest, cell, values), sync=sync)
                if sync:
                    synced = time.monotonic()
    if task.announce:
        with suppress(OSError):
            now_path(task.journal).unlink()
    return str(problem.name), found
