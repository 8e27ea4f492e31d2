"""Threads: how many, and the one place that limits nested threading.

Kernels split their work over Numba threads and call BLAS on one tile a thread, so BLAS must not
start threads of its own inside them.  The limit is process-wide; it is entered once, however
many Python threads run kernels at the same time, and restored when the last one leaves.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")

_lock = threading.Lock()
_serial = threading.RLock()
_requests: list[int] = []  # of all Python threads that are inside; the smallest one holds
_before: list[int] = []  # threads of each BLAS library before the first of them
_controller: Any = None


def thread_count() -> int:
    """Return the number of threads that kernels use (``NUMBA_NUM_THREADS`` sets the maximum)."""
    import numba

    return int(numba.get_num_threads())


def load_blas() -> None:
    """Load SciPy's table of BLAS addresses, which is all that Numba's products take from SciPy.

    Importing it by name runs ``scipy.linalg`` first, a quarter of the time of a first kernel call;
    the extension module needs nothing from there, so it is loaded from its file.  Where it cannot
    be found like this (an editable SciPy, say), it is imported by name.
    """
    name = "scipy.linalg.cython_blas"
    if name in sys.modules:
        return
    if "scipy.linalg" not in sys.modules:
        import scipy

        folder = os.path.join(os.path.dirname(scipy.__file__), "linalg")
        spec = importlib.machinery.PathFinder.find_spec(name, [folder])
        if spec is not None and spec.loader is not None:
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            sys.modules.setdefault(name, module)
            return
    importlib.import_module(name)


def _blas() -> list[Any]:
    """Return threadpoolctl's controllers of the BLAS libraries that are loaded."""
    global _controller
    if _controller is None:
        # A controller knows the libraries that are loaded when it is built: SciPy's BLAS, which
        # Numba calls, has to be loaded before.
        load_blas()
        from threadpoolctl import ThreadpoolController

        _controller = ThreadpoolController()
    return [x for x in _controller.lib_controllers if x.user_api == "blas"]


def _set(library: Any, count: int) -> None:
    # Recent releases of threadpoolctl obey only the first Python thread that limits OpenBLAS.
    # Limits are counted here for all threads, so the setter below that guard is the right one.
    getattr(library, "_real_set_num_threads", library.set_num_threads)(count)


def _enter(count: int) -> None:
    with _lock:
        libraries = _blas()
        if not _requests:
            _before[:] = [library.num_threads for library in libraries]
        if not _requests or count < min(_requests):
            for library in libraries:
                _set(library, count)
        _requests.append(count)


def _leave(count: int) -> None:
    with _lock:
        _requests.remove(count)
        for library, before in zip(_blas(), _before, strict=True):
            _set(library, min(_requests) if _requests else before)


@contextmanager
def blas_single_thread() -> Iterator[None]:
    """Limit BLAS to one thread while inside; re-entrant, and safe from several Python threads."""
    _enter(1)
    try:
        yield
    finally:
        _leave(1)


def threading_layer() -> str | None:
    """Return the name of Numba's threading layer; None before the first parallel kernel."""
    import numba

    try:
        return str(numba.threading_layer())  # type: ignore[attr-defined,unused-ignore]  # no stub
    except ValueError:
        return None


@contextmanager
def kernel_threads() -> Iterator[int]:
    """Enter the state that parallel kernels need and yield their number of threads.

    BLAS runs on one thread.  Numba's ``workqueue`` layer aborts the process when two Python
    threads run parallel kernels at the same time, so they take turns where it is in use.
    """
    # Not known yet is as unsafe as the layer that it may turn out to be.
    serial = threading_layer() in (None, "workqueue")
    if serial:
        _serial.acquire()
    try:
        with blas_single_thread():
            yield thread_count()
    finally:
        if serial:
            _serial.release()


def map_pieces(work: Callable[[slice], T], pieces: Sequence[slice]) -> Iterator[T]:
    """Yield ``work`` of all pieces, in order, on as many Python threads as kernels use.

    For products in BLAS that must not depend on the number of threads: each piece is done with
    one thread of BLAS, and pieces follow from the shapes alone.  BLAS starts no threads either,
    which would keep a core busy for milliseconds after their work, beside the next kernel.
    """
    from concurrent.futures import ThreadPoolExecutor

    with blas_single_thread():
        workers = min(thread_count(), len(pieces))
        if workers <= 1:
            yield from map(work, pieces)
        else:
            with ThreadPoolExecutor(workers) as pool:
                yield from pool.map(work, pieces)


@contextmanager
def limit_threads(count: int) -> Iterator[None]:
    """Run kernels and BLAS on at most ``count`` threads while inside, and restore both after.

    Parameters
    ----------
    count : int
        At least 1; more than Numba's maximum is the maximum.
    """
    import numba

    before = numba.get_num_threads()
    maximum = int(getattr(numba.config, "NUMBA_NUM_THREADS"))  # noqa: B009  (set at run time)
    numba.set_num_threads(min(count, maximum))
    try:
        _enter(count)
        try:
            yield
        finally:
            _leave(count)
    finally:
        numba.set_num_threads(before)


def cpu_count() -> int:
    """Return the number of CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
