"""The cells of one head, measured: what the error reports say, and what they cost."""

from __future__ import annotations

import statistics
import time
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

from ..base.files import append_bytes
from ..errors.reports import error_report
from ..kernels._threads import blas_single_thread, cpu_count, limit_threads
from ..problem import AttentionProblem
from ..zoo.base import Method
from .grid import Cell
from .journal import format_line, holder_of, is_held
from .summary import Key, Values

# A cell is timed again while all its runs took less than this, three times at most: what disturbs
# a run is short against more.
TIMED_SECONDS = 0.01


def measure(problem: AttentionProblem, cell: Cell, *, warm: bool) -> Values:
    """Return the values of one cell: what the error report says, and what it cost."""
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
    report = error_report(problem, found) if linear else error_report(problem, output=found)
    rank = found.effective_rank if linear else None
    return {
        **report.as_dict(),
        "seconds": statistics.median(times),
        "bytes": int(found.nbytes) if linear else None,
        "effective_rank": None if rank is None else int(rank),
    }


class HeadTask(NamedTuple):
    """Hold what the worker of one head is given.

    ``token`` proves that the study still holds the folder of ``lock``, and ``jobs`` is the number
    of heads that are computed beside this one.  ``kept`` says whether the journal is: one that is
    temporary moves the bar, and may be missing.
    """

    problem: AttentionProblem
    cells: list[Cell]
    journal: Path
    lock: Path
    token: str
    jobs: int
    kept: bool = True


def run_head(task: HeadTask) -> tuple[str, dict[Key, Values]]:
    """Compute the cells of one head, append each to its journal, and return them."""
    problem = task.problem
    found: dict[Key, Values] = {}
    warmed: set[str] = set()
    shared = holder_of(task.lock).exists()  # a worker on another machine may not see the folder
    with ExitStack() as stack:
        if task.jobs > 1:
            stack.enter_context(limit_threads(max(1, cpu_count() // task.jobs)))
        # Decompositions round differently with another number of BLAS threads, and results must
        # not depend on ``jobs``.
        stack.enter_context(blas_single_thread())
        for cell in task.cells:
            if task.kept and shared and not is_held(task.lock, task.token):
                raise RuntimeError(
                    f"study must hold its folder {str(task.lock.parent.parent)!r} while it runs, "
                    f"got a lock that is lost; start it again to continue"
                )
            try:
                values = measure(problem, cell, warm=cell.label in warmed)
            except Exception as error:
                at = "" if cell.rank is None else f", rank {cell.rank}"
                raise RuntimeError(
                    f"method {cell.label!r} failed on head {problem.name!r}{at}, seed "
                    f"{cell.seed}: {type(error).__name__}: {error}"
                ) from error
            warmed.add(cell.label)
            found[cell.key] = values
            if shared:
                with nullcontext() if task.kept else suppress(OSError):
                    append_bytes(task.journal, format_line(problem.digest, cell, values))
    return str(problem.name), found
