"""Studies: error against rank, for many heads and methods, in parallel and resumable.

A study is a grid heads x methods x ranks x seeds.  One worker handles one head, so that the exact
side is computed once a head; every finished cell is appended at once to the journal of its head,
and a study that is started again with the same folder takes what it finds there.
"""

from __future__ import annotations

import sys
import tempfile
import uuid
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base.files import UNFINISHED, make_folder
from ..base.floating import without_floating_errors
from ..base.parallel import in_parallel
from ..heads.inputs import renamed
from .columns import Key, Values
from .distributed import connected, run_on
from .journal import journal_name, lock_folder, named_holder, read_journal
from .measure import HeadTask, now_path, run_head
from .plan import HeadsLike, MethodsLike, Plan, make_plan
from .plots import plot_study
from .progress import Progress
from .report.hardness import measure_hardness
from .report.page import REPORT, write_report
from .results import others_in, tabulate, with_others, write_results
from .summary import StudyResult

if TYPE_CHECKING:
    import pandas as pd


@without_floating_errors
def study(
    heads: HeadsLike,
    methods: MethodsLike = None,
    ranks: float | Sequence[float] | None = None,
    seeds: int | Sequence[int] = 4,
    jobs: int | None = None,
    out: str | PathLike[str] | None = None,
    *,
    resume: bool = True,
    pictures: bool = True,
    progress: bool | None = None,
    bounds: str | Sequence[str] | None = None,
    report: bool = True,
    dask: Any = None,
    floors: bool | Sequence[str] = True,
    spectral: bool = True,
    rows: int | None = None,
) -> StudyResult:
    """Measure error against rank: every method on every head, at every rank, for every seed.

    Each cell is ``error_report(problem, method.approximate(problem, rng=seed))``.  The floors
    ``svd`` and ``topk``, the predictors ``zero`` and ``vmean``, and ``exact`` attention are always
    computed beside.

    Parameters
    ----------
    heads : Heads, AttentionProblem, sequence of AttentionProblem, path, name, or list of these
        Files (``.safetensors`` or ``.npz``), a folder of them or a pattern, as for `read_heads`,
        or the name of a bundled set such as "minilm".  Problems in a list, and heads of several
        files, may differ in length, width and causality.
    methods : names, method objects, pairs (label, method), or mapping from labels, optional
        Parameters other than ``rank`` are those of the object.  By default all registered methods
        but ``exact``, floors, predictors and ``compressed`` (exact from rank d on); those that
        cannot honour all heads are left out.  The result says which, and why.
    ranks : sequence of int or float, optional
        Integers in 1..n_k of every head, or shares of n_k: a float x in (0, 1] is the rank
        ``max(1, floor(x n_k + 1/2))`` of each head.  The column ``rank`` holds that rank, and a
        column ``share`` holds x (NaN for an integer; there is none where all are integers).
        Whatever goes over heads goes by the share, so that heads of other lengths stand side by
        side.  Ranks that agree on all heads are one.  By default powers of two from 8 to n_k / 2 of
        the shortest head, from 64 to 1024 where that is 65536 or longer.
    seeds : int or sequence of int, default 4
        A number s stands for the seeds 0..s-1.
    jobs : int, optional
        Heads that are computed at the same time, -1 for as many as there are CPUs; by default 1,
        and -1 where there are 2^29 entries of A and more over all cells.  Each takes its share of
        the threads.  The numbers do not depend on it, ``seconds`` does: with 1 it is that
        of a head alone.
    out : path, optional
        Folder for ``results.csv``, ``references.csv``, ``study.json``, the pictures, and the
        journals in ``cells``.  Rows and bounds of other methods that are there stay, and stand in
        the tables and pictures beside these, if they are of the same heads, ranks and seeds;
        otherwise the folder is refused.  Without it the rows are in the result alone, and no disk
        is needed.
    resume : bool, default True
        Take the cells that the folder holds from an earlier study, finished or killed, of the
        same heads, methods with parameters of the same content, seeds and library version;
        ``False`` computes all of them again.  Code that you changed without its version is not
        noticed.
    pictures : bool, default True
        Draw the pictures into ``out``.
    progress : bool, optional
        Show a bar with the time left on stderr; by default where stderr is a terminal.
    bounds : id or sequence of ids, optional
        Claims of ``sketchattn.theory.error_bounds()`` whose bounds are drawn over the measured
        curves, each on the error measure that it is about and in the colour of its method.
    report : bool, default True
        Write ``report.html`` into ``out``, one page with everything, as ``result.report()`` does,
        and measure the hardness of the heads for it, which ``hardness.json`` keeps.
    dask : distributed.Client or str, optional
        Compute the cells on this cluster of ``dask.distributed``, given by a client or by the
        address of its scheduler; ``jobs`` has no influence then.  The rows are those of a local
        study, bit for bit where workers have the same processor and BLAS, and the folder stays
        here.  Cells of workers that are lost are computed by others.
    floors : bool or sequence of {"svd", "topk"}, default True
        Which floors to compute; True is both.  Above n = 4096 they take longest.
    spectral : bool, default True
        Compute the errors in spectral norms; otherwise they are NaN.
    rows : int, optional
        Measure errors on so many exact rows, a random sample that all methods on a head share, in
        place of all; heads with no more rows are measured whole.  By default 512 for heads of
        65536 queries or keys and more, and all for others.  See Notes.

    Returns
    -------
    StudyResult
        ``frame``, ``references``, ``summary()``; prints as a table.

    Raises
    ------
    TypeError, ValueError
        Before any work, for a method that cannot honour a head, ranks above n_k, repeated names,
        empty heads, heads without values, unknown names, a parameter whose content cannot be read
        (as that of a lambda), a bound that is about no error measure or about none of the
        methods, a folder that another study holds, or one with other methods whose rows cannot
        stand beside these, a client that is asynchronous or closed, or a worker with other
        versions of Python, sketchattn, NumPy, SciPy or Numba.
    ImportError
        If ``dask`` is given without the package.
    OSError
        If a file cannot be written: its name and what to do.  Finished cells stay in the folder.
        If there is no scheduler at the address.
    RuntimeError
        If a method fails on a head, or a cluster is lost.  Finished cells stay in the folder.

    Warns
    -----
    RuntimeWarning
        If pictures or the report could not be made; the results are there.  If a cluster has no
        workers yet, or workers with other processors, whose rows may differ in their last digits.

    Notes
    -----
    A method without a matrix (``traits.matrix`` is False) is measured by its output: errors of the
    matrix are NaN, ``bytes`` and ``effective_rank`` are missing.

    On a sample of rows errors are estimates; ``output_fro_rel_low`` and ``output_fro_rel_high``
    hold the error with probability 0.95 over the draw of the rows, each interval by itself, for
    every n and every distribution of the errors (see `certify`).  Spectral norms and the worst row
    are NaN, ``topk`` is exact on the sampled rows, and ``svd`` is left out: no sample tells them.

    A deterministic method is computed once and its row repeated for every seed; one without a rank
    once for every rank.  ``seconds`` is the median time of ``approximate`` and one product with V
    after a first untimed run, with other heads running beside it where ``jobs > 1``; for floors
    the exact matrix is already decomposed, so that theirs mean nothing.  BLAS runs on one thread.

    Without ``dask`` heads are distributed by ``joblib.Parallel`` on its current backend.

    Examples
    --------
    >>> import sketchattn as sa
    >>> heads = sa.make_heads("clustered", n=64, d=8, heads=2, rng=0)
    >>> result = sa.study(heads, methods=["uniform"], ranks=[8, 16], seeds=3)
    >>> result.frame.shape
    (12, 21)
    >>> float(result.frame["output_fro_rel"].median()) < 1
    True
    """
    plan = make_plan(
        heads,
        methods=methods,
        ranks=ranks,
        seeds=seeds,
        jobs=jobs,
        out=out,
        resume=resume,
        pictures=pictures,
        progress=progress,
        bounds=bounds,
        report=report,
        dask=dask,
        floors=floors,
        spectral=spectral,
        rows=rows,
    )
    if plan.progress:
        for warning in plan.warnings:
            print(f"study: {warning}", file=sys.stderr)
    with connected(plan.cluster) as client, _journals(plan.folder) as (journals, token):
        others = others_in(plan)
        found, computed = _compute(plan, journals, token, client)
        frame, beside = tabulate(plan, found)
        drawn: list[Path] = []
        if plan.folder is not None:
            every, bounds_there = with_others(plan, frame, others)
            write_results(plan, plan.folder, every, beside, bounds_there, others)
            if plan.pictures:
                drawn = plot_study(every, beside, plan.folder, bounds_there)
            if plan.report:
                _add_report(plan, plan.folder, every, beside, bounds_there)
    return StudyResult(
        frame,
        beside,
        plan.left_out,
        plan.folder,
        tuple(drawn),
        computed,
        plan.total - computed,
        plan.bounds,
        plan.notes,
    )


def _add_report(
    plan: Plan,
    folder: Path,
    frame: pd.DataFrame,
    references: pd.DataFrame,
    bounds: pd.DataFrame,
) -> None:
    """Write the report of a study into its folder; whatever goes wrong costs one warning."""
    target = folder / REPORT
    try:
        measure_hardness(plan.problems, folder, plan.jobs)
        write_report(target, frame, references, bounds, plan.left_out, folder)
    except Exception as error:  # of a package, of the file system, of rows that nobody foresaw
        with suppress(OSError):
            target.unlink(missing_ok=True)  # that of an earlier study
        warnings.warn(
            f"report is missing: {type(error).__name__}: {error}", RuntimeWarning, stacklevel=4
        )


@contextmanager
def _journals(folder: Path | None) -> Iterator[tuple[Path, str]]:
    """Hold the folder of a study, a temporary one without any; yield that of the journals."""
    if folder is None:  # nobody else knows this one: there is nothing to lock
        with ExitStack() as stack:
            try:
                made = tempfile.TemporaryDirectory(prefix="sketchattn-", ignore_cleanup_errors=True)
                journals = Path(stack.enter_context(made))
                token = stack.enter_context(named_holder(journals / ".lock"))
            except OSError:  # these journals only move the bar: without them it moves by heads
                journals, token = Path(f".sketchattn-{uuid.uuid4().hex}"), ""
            yield journals, token
        return
    journals = make_folder(folder / "cells")
    with lock_folder(journals / ".lock", folder) as token:
        for left in journals.glob(f"{UNFINISHED}*"):  # of a study that was killed
            left.unlink(missing_ok=True)
        yield journals, token


def _compute(
    plan: Plan, journals: Path, token: str, client: Any
) -> tuple[dict[str, dict[Key, Values]], int]:
    """Return all cells of each head, by its name, and how many had to be computed."""
    paths = {str(p.name): journals / journal_name(p) for p in plan.problems}
    if not plan.resume:
        for path in paths.values():
            path.unlink(missing_ok=True)
    found = {str(p.name): read_journal(paths[str(p.name)], p.digest) for p in plan.problems}
    pending = {
        name: [cell for cell in plan.here[name].cells if cell.key not in done]
        for name, done in found.items()
    }
    total, computed = plan.total, sum(map(len, pending.values()))
    for path in paths.values():
        with suppress(OSError):
            now_path(path).unlink()  # of a study that was killed
    busy = [p for p in plan.problems if pending[str(p.name)]]
    workers = min(plan.jobs, max(1, len(busy)))
    tasks = (
        HeadTask(
            # A copy leaves the exact quantities of one head behind when its cells are done.
            renamed(p, str(p.name)),
            pending[str(p.name)],
            paths[str(p.name)],
            journals / ".lock",
            token,
            workers,
            plan.folder is not None,
            plan.progress,
        )
        for p in busy
    )
    if client is None:
        results = in_parallel(run_head, tasks, workers)
    else:
        results = run_on(client, tasks, len(busy))
    shown = Progress(list(paths.values()), total, total - computed, plan.progress)
    with shown as bar, closing(results):  # an interruption takes back what has not begun
        for name, fresh in results:
            found[name].update(fresh)
            bar.returned(len(fresh))
    return found, computed
