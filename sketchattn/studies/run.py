"""Studies: error against rank, for many heads and methods, in parallel and resumable.

A study is a grid heads x methods x ranks x seeds.  One worker handles one head, so that the exact
side is computed once a head; every finished cell is appended at once to the journal of its head,
and a study that is started again with the same folder takes what it finds there.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .. import __version__
from ..base.files import as_folder, write_text
from ..errors.reports import FIELDS, error_report
from ..heads.inputs import as_heads, renamed
from ..problem import AttentionProblem
from ..zoo.base import Method
from .grid import (
    Cell,
    MethodsLike,
    Variant,
    as_bounds,
    as_flag,
    as_integer,
    as_methods,
    as_ranks,
    as_seeds,
    by_name,
    describe_method,
    make_cells,
)
from .journal import (
    append_line,
    format_line,
    is_held,
    journal_name,
    lock_folder,
    read_journal,
)
from .summary import COLUMNS, REFERENCES, Key, StudyResult, Values, is_missing

if TYPE_CHECKING:
    import pandas as pd

    from ..heads.container import Heads

# A cell is timed again while all its runs took less than this, three times at most.
TIMED_SECONDS = 0.05


def _measure(problem: AttentionProblem, cell: Cell, *, warm: bool) -> Values:
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


# --- work ---------------------------------------------------------------------------------------


class _Task(NamedTuple):
    problem: AttentionProblem
    cells: list[Cell]
    journal: Path
    lock: Path
    token: str
    jobs: int


def _run_head(task: _Task) -> tuple[str, dict[Key, Values]]:
    """Compute the cells of one head, append each to its journal, and return them."""
    from ..kernels._threads import blas_single_thread, cpu_count, limit_threads

    problem = task.problem
    found: dict[Key, Values] = {}
    warmed: set[str] = set()
    shared = task.lock.exists()  # a worker on another machine may not see the folder
    with ExitStack() as stack:
        if task.jobs > 1:
            stack.enter_context(limit_threads(max(1, cpu_count() // task.jobs)))
        # Decompositions round differently with another number of BLAS threads, and results must
        # not depend on ``jobs``.
        stack.enter_context(blas_single_thread())
        for cell in task.cells:
            if shared and not is_held(task.lock, task.token):
                raise RuntimeError(
                    f"study must hold its folder {str(task.lock.parent.parent)!r} while it runs, "
                    f"got a lock that is lost; start it again to continue"
                )
            try:
                values = _measure(problem, cell, warm=cell.label in warmed)
            except Exception as error:
                at = "" if cell.rank is None else f", rank {cell.rank}"
                raise RuntimeError(
                    f"method {cell.label!r} failed on head {problem.name!r}{at}, seed "
                    f"{cell.seed}: {type(error).__name__}: {error}"
                ) from error
            warmed.add(cell.label)
            found[cell.key] = values
            if shared:
                append_line(task.journal, format_line(problem.digest, cell, values))
    return str(problem.name), found


class _Progress:
    """Show finished cells and the time left on stderr, by watching journals grow."""

    def __init__(self, journals: Sequence[Path], total: int, done: int, show: bool) -> None:
        self._sizes = {path: path.stat().st_size if path.exists() else 0 for path in journals}
        self._lines = 0
        self._returned = 0
        self._shown = 0
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._bar: Any = None
        self._thread: threading.Thread | None = None
        if show:
            from tqdm import tqdm

            self._bar = tqdm(
                total=total,
                initial=done,
                desc="study",
                unit="cell",
                file=sys.stderr,
                dynamic_ncols=True,
                smoothing=0.05,
            )
            self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _Progress:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self._bar is not None:
            self._show()
            self._bar.close()

    def returned(self, cells: int) -> None:
        """Count the cells of a finished head, whose journal may be on another machine."""
        with self._lock:
            self._returned += cells

    def _watch(self) -> None:
        while not self._stop.wait(0.2):
            self._show()

    def _show(self) -> None:
        for path, size in self._sizes.items():
            try:
                with path.open("rb") as file:
                    file.seek(size)
                    fresh = file.read()
            except FileNotFoundError:
                continue
            self._lines += fresh.count(b"\n")
            self._sizes[path] = size + len(fresh)
        with self._lock:
            done = max(self._lines, self._returned)
        self._bar.update(done - self._shown)
        self._shown = done


def study(
    heads: Heads | AttentionProblem | Sequence[AttentionProblem] | str | PathLike[str],
    methods: MethodsLike = None,
    ranks: Sequence[int] | None = None,
    seeds: int | Sequence[int] = 4,
    jobs: int = 1,
    out: str | PathLike[str] | None = None,
    *,
    resume: bool = True,
    pictures: bool = True,
    progress: bool | None = None,
    bounds: str | Sequence[str] | None = None,
) -> StudyResult:
    """Measure error against rank: every method on every head, at every rank, for every seed.

    Each cell is ``error_report(problem, method.approximate(problem, rng=seed))``.  The floors
    ``svd`` and ``topk`` and the predictors ``zero`` and ``vmean`` are always computed beside.

    Parameters
    ----------
    heads : Heads, AttentionProblem, sequence of AttentionProblem, path, or name
        A file (``.safetensors`` or ``.npz``), or the name of a bundled set such as "minilm".
    methods : names, method objects, pairs (label, method), or mapping from labels, optional
        Parameters other than ``rank`` are those of the object.  By default all registered methods
        but ``exact``, floors and predictors; those that cannot honour all heads are left out and
        named in the result.
    ranks : sequence of int, optional
        In 1..n_k of every head; by default powers of two from 8 to n_k / 2.
    seeds : int or sequence of int, default 4
        A number s stands for the seeds 0..s-1.
    jobs : int, default 1
        Heads that are computed at the same time.  Each takes its share of the threads.  The
        numbers do not depend on it, ``seconds`` does.
    out : path, optional
        Folder for ``results.csv``, ``references.csv``, ``study.json``, one PNG for each error
        measure, and the journals in ``cells``.
    resume : bool, default True
        Take the cells that the folder holds from an earlier study, finished or killed, of the
        same heads, methods with the same parameters, seeds and library version; ``False``
        computes all of them again.  Code that you changed without its version is not noticed.
    pictures : bool, default True
        Draw the pictures into ``out``.
    progress : bool, optional
        Show a bar with the time left on stderr; by default where stderr is a terminal.
    bounds : id or sequence of ids, optional
        Claims of ``sketchattn.theory.error_bounds()`` whose bounds are drawn over the measured
        curves, each on the error measure that it is about and in the colour of its method.

    Returns
    -------
    StudyResult
        ``frame``, ``references``, ``summary()``; prints as a table.

    Raises
    ------
    TypeError, ValueError
        Before any work, for a method that cannot honour a head, ranks above n_k, repeated names,
        empty heads, heads without values, unknown names, a bound that is about no error measure
        or about none of the methods, or a folder that another study holds.
    RuntimeError
        If a method fails on a head.  Finished cells stay in the folder.

    Notes
    -----
    A method without a matrix (``traits.matrix`` is False) is measured by its output: errors of the
    matrix are NaN, ``bytes`` and ``effective_rank`` are missing.

    A deterministic method is computed once and its row repeated for every seed; one without a rank
    once for every rank.  ``seconds`` is the median time of ``approximate`` and one product with V
    after a first untimed run, with other heads running beside it where ``jobs > 1``; for floors
    the exact matrix is already decomposed, so that theirs mean nothing.  BLAS runs on one thread.

    Heads are distributed by ``joblib.Parallel`` on its current backend:
    ``with joblib.parallel_config("dask"): study(...)`` runs on a cluster.

    Examples
    --------
    >>> import sketchattn as sa
    >>> heads = sa.make_heads("clustered", n=64, d=8, heads=2, rng=0)
    >>> result = sa.study(heads, methods=["uniform"], ranks=[8, 16], seeds=3)
    >>> result.frame.shape
    (12, 17)
    >>> float(result.frame["output_fro_rel"].median()) < 1
    True
    """
    problems = as_heads(heads)
    chosen_ranks = as_ranks(ranks, problems)
    chosen_seeds = as_seeds(seeds)
    workers = as_integer(jobs, "jobs", 1, "jobs=1 computes one head after the other")
    folder = as_folder(out)
    resume = as_flag(resume, "resume")
    pictures = as_flag(pictures, "pictures")
    show = (
        sys.stderr is not None and sys.stderr.isatty()
        if progress is None
        else as_flag(progress, "progress")
    )
    variants, left_out = as_methods(methods, problems, chosen_ranks)
    limits = as_bounds(bounds, problems, variants, chosen_ranks)
    references = [Variant.of(name, by_name(name, chosen_ranks[0])) for name in REFERENCES]
    cells = make_cells(references, chosen_ranks, chosen_seeds[:1])
    taken = {cell.key for cell in cells}
    cells += [c for c in make_cells(variants, chosen_ranks, chosen_seeds) if c.key not in taken]

    with ExitStack() as stack:
        if folder is None:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sketchattn-")))
        else:
            work = folder
        journals = work / "cells"
        journals.mkdir(parents=True, exist_ok=True)
        token = stack.enter_context(lock_folder(journals / ".lock", work))
        paths = {str(p.name): journals / journal_name(p) for p in problems}
        if not resume:
            for path in paths.values():
                path.unlink(missing_ok=True)
        found = {str(p.name): read_journal(paths[str(p.name)], p.digest) for p in problems}
        pending = {
            name: [cell for cell in cells if cell.key not in done] for name, done in found.items()
        }
        total = len(problems) * len(cells)
        computed = sum(map(len, pending.values()))
        busy = [p for p in problems if pending[str(p.name)]]
        workers = min(workers, max(1, len(busy)))
        tasks = (
            # A copy leaves the exact quantities of one head behind when its cells are done.
            _Task(
                renamed(p, str(p.name)),
                pending[str(p.name)],
                paths[str(p.name)],
                journals / ".lock",
                token,
                workers,
            )
            for p in busy
        )
        with _Progress(list(paths.values()), total, total - computed, show) as bar:
            for name, fresh in _in_parallel(tasks, workers):
                found[name].update(fresh)
                bar.returned(len(fresh))
        frame = _frame(problems, variants, chosen_ranks, chosen_seeds, found)
        beside = _frame(problems, references, chosen_ranks, chosen_seeds[:1], found)
        drawn: list[Path] = []
        if folder is not None:
            _write_csv(folder / "results.csv", frame)
            _write_csv(folder / "references.csv", beside)
            if len(limits):
                _write_csv(folder / "bounds.csv", limits)
            else:  # of an earlier study
                (folder / "bounds.csv").unlink(missing_ok=True)
            if pictures:
                from .plots import plot_study

                drawn = plot_study(frame, beside, folder, limits)
            settings = {
                "version": __version__,
                "heads": [_describe_head(p) for p in problems],
                "methods": {v.label: describe_method(v.method) for v in variants},
                "left_out": left_out,
                "ranks": chosen_ranks,
                "seeds": chosen_seeds,
                "bounds": list(dict.fromkeys(limits["claim"])),
                "jobs": int(jobs),
                "machine": _machine(),
            }
            write_text(folder / "study.json", json.dumps(settings, indent=2) + "\n")
        return StudyResult(
            frame, beside, left_out, folder, tuple(drawn), computed, total - computed, limits
        )


def _in_parallel(tasks: Iterator[_Task], workers: int) -> Iterator[tuple[str, dict[Key, Values]]]:
    """Yield the results of heads as they are finished."""
    from joblib import Parallel, delayed

    # Heads travel whole: memory-mapped files of the parent would not reach other machines.
    parallel = Parallel(n_jobs=workers, return_as="generator_unordered", max_nbytes=None)
    results = parallel(delayed(_run_head)(task) for task in tasks)
    try:
        yield from results
    finally:
        results.close()  # an interruption ends the workers too


def _frame(
    problems: Sequence[AttentionProblem],
    variants: Sequence[Variant],
    ranks: Sequence[int],
    seeds: Sequence[int],
    found: Mapping[str, Mapping[Key, Values]],
) -> pd.DataFrame:
    """Return the full grid in order: head, method, rank, seed."""
    import pandas as pd

    rows: list[list[Any]] = []
    keys = {(v.label, rank): describe_method(v.at(rank)) for v in variants for rank in ranks}
    for problem in problems:
        done = found[str(problem.name)]
        for variant in variants:
            for rank in ranks:
                for seed in seeds:
                    own = seed if variant.randomized else None
                    values = done[keys[variant.label, rank], own]
                    rows.append(
                        [problem.name, variant.label, rank, seed]
                        + [values[name] for name in COLUMNS[4:]]
                    )
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    kinds: dict[str, Any] = dict.fromkeys(FIELDS, np.float64)
    kinds["effective_rank"] = "Int64"
    if frame["bytes"].isna().any():
        kinds["bytes"] = "Int64"
    return frame.astype(kinds)


def _write_csv(path: Path, frame: pd.DataFrame) -> None:
    """Write a frame so that reading gives the same numbers: "inf", "nan", or empty for no rank."""
    import csv
    import io

    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(frame.columns)
    for row in frame.itertuples(index=False):
        writer.writerow("" if is_missing(x) else x for x in row)
    write_text(path, buffer.getvalue())


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


def _machine() -> dict[str, Any]:
    from ..base.machine import machine

    return machine()
