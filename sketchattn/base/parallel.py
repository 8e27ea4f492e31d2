"""Work in several processes, and the checks of how much of it and of what is shown meanwhile."""

from __future__ import annotations

import multiprocessing
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

from .arguments import check_count, check_flag

T = TypeVar("T")
R = TypeVar("R")


def check_jobs(jobs: object, unit: str, *, long: bool = False) -> int:
    """Return how many units of work, such as heads, may be done at the same time.

    As in scikit-learn -1 means as many as there are CPUs, and None means 1 unless the work is
    ``long`` enough to pay for processes.
    """
    if jobs is None:
        jobs = -1 if long else 1
    if isinstance(jobs, int) and jobs == -1:
        from ..kernels._threads import cpu_count

        return cpu_count()
    return check_count(jobs, "jobs", f"jobs=1 computes one {unit} after the other")


def check_progress(progress: object) -> bool:
    """Return whether to show a bar: by default where stderr is a terminal."""
    if progress is None:
        return sys.stderr is not None and sys.stderr.isatty()
    return check_flag(progress, "progress", "give True or False")


def in_parallel(work: Callable[[T], R], tasks: Iterable[T], jobs: int) -> Generator[R, None, None]:
    """Yield the results of tasks as they are finished, on the current backend of joblib.

    Processes that were started for the tasks end with this one, however it ends.
    """
    from joblib import Parallel, delayed
    from joblib.parallel import get_active_backend

    here = (platform.node(), os.getpid())
    # Some backends return everything at the end.
    lazy = bool(getattr(get_active_backend()[0], "supports_return_generator", False))
    # Arrays travel whole: memory-mapped files of the parent would not reach other machines.
    options = {"n_jobs": jobs, "max_nbytes": None}
    calls = (delayed(_tethered)(work, here, task) for task in tasks)
    if jobs == 1 and not lazy:
        yield from map(work, tasks)
    elif not lazy:
        yield from Parallel(**options)(calls)
    else:
        results = Parallel(return_as="generator_unordered", **options)(calls)
        try:
            yield from results
        finally:
            results.close()  # an interruption ends the workers too


def is_alive(process: int) -> bool:
    """Say whether a process of this machine lives; where that cannot be found out it does."""
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


_tethers: set[int] = set()  # parents that are watched


def _tethered(work: Callable[[T], R], parent: tuple[str, int], task: T) -> R:
    """Return what the work returns, in a process that does not outlive the one that asked."""
    host, process = parent
    if os.name == "posix" and process != os.getpid() and host == platform.node():
        if process == os.getppid():
            if process not in _tethers:
                _tethers.add(process)
                threading.Thread(target=_follow, args=(process,), daemon=True).start()
        elif multiprocessing.current_process().name.startswith("Loky") and not is_alive(process):
            os._exit(1)
    return work(task)


def _follow(parent: int) -> None:
    """End this process when it has lost its parent: nobody waits for its results."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
