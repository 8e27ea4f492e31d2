"""Work in several processes, and the checks of how much of it and of what is shown meanwhile."""

from __future__ import annotations

import numbers
import sys
from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

import numpy as np

T = TypeVar("T")
R = TypeVar("R")


def check_integer(value: object, name: str, least: int, remedy: str) -> int:
    """Return an integer of at least ``least``; ``remedy`` ends the message otherwise."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}; {remedy}")
    if int(value) < least:
        raise ValueError(f"{name} must be at least {least}, got {int(value)}; {remedy}")
    return int(value)


def check_flag(value: object, name: str) -> bool:
    """Return True or False; refuse what only behaves like one."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}; give True or False")
    return bool(value)


def check_jobs(jobs: object, unit: str) -> int:
    """Return how many units of work, such as heads, may be done at the same time."""
    return check_integer(jobs, "jobs", 1, f"jobs=1 computes one {unit} after the other")


def check_progress(progress: object) -> bool:
    """Return whether to show a bar: by default where stderr is a terminal."""
    if progress is None:
        return sys.stderr is not None and sys.stderr.isatty()
    return check_flag(progress, "progress")


def in_parallel(work: Callable[[T], R], tasks: Iterable[T], jobs: int) -> Generator[R, None, None]:
    """Yield the results of tasks as they are finished, on the current backend of joblib."""
    from joblib import Parallel, delayed

    # Arrays travel whole: memory-mapped files of the parent would not reach other machines.
    parallel = Parallel(n_jobs=jobs, return_as="generator_unordered", max_nbytes=None)
    results = parallel(delayed(work)(task) for task in tasks)
    try:
        yield from results
    finally:
        results.close()  # an interruption ends the workers too
