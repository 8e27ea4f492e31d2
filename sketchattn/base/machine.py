"""What a number depends on beside the code: processor, threads, versions; and what asked for it."""

from __future__ import annotations

import platform
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any


def machine() -> dict[str, Any]:
    """Return what a number depends on: CPU, threads, BLAS, versions."""
    import numba
    import numpy as np
    import scipy
    from threadpoolctl import threadpool_info

    from ..kernels._threads import cpu_count, load_blas, thread_count

    load_blas()  # or it would be missing from the list below
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line[:10] == "model name"]
        model = names[0] if names else model
    except OSError:
        pass
    torch = sys.modules.get("torch")
    return {
        "cpu": model,
        "cpus": cpu_count(),
        "threads": thread_count(),
        "blas": sorted(
            {f"{x['internal_api']} {x['version']} ({x.get('architecture', '?')})"
             for x in threadpool_info() if x["user_api"] == "blas"}
        ),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "numba": numba.__version__,
        "torch": None if torch is None else str(torch.__version__),
    }  # fmt: skip


_TYPED: ContextVar[str] = ContextVar("typed", default="")


@contextmanager
def typed_as(words: Sequence[str]) -> Iterator[None]:
    """Let `command` return these words of the command line meanwhile."""
    token = _TYPED.set(shlex.join(["sketchattn", *words]))
    try:
        yield
    finally:
        _TYPED.reset(token)


def command() -> str:
    """Return the command that is being run, nothing where Python was called."""
    return _TYPED.get()
