"""Threads: how many, and the one place that starts them and limits nested threading.

Kernels take their items in turn (`_jit.take`) and call BLAS on one tile at a time, so a kernel
is run by as many Python threads as its work pays for, and BLAS must not start threads of its own
inside.  The limit is process-wide; it is entered once, however many Python threads run kernels at
the same time, and restored when the last one leaves.

The caller works too and waits for none that has not begun: on a machine with nothing free for the
others it does everything itself, and takes no longer than alone.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import itertools
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

P = TypeVar("P")
T = TypeVar("T")

_lock = threading.Lock()
# Python thread and number, of all that are inside; the smallest number holds.
_requests: list[tuple[int, int]] = []
_before: list[int] = []  # threads of each BLAS library before the first of them
_controller: Any = None
_stale = False  # BLAS is as threads of the parent left it
_local = threading.local()  # ``limit`` of this Python thread, if it has one
_pool: ThreadPoolExecutor | None = None

# Work is counted in nanoseconds of one core, roughly: a step of a loop each, and at least so many
# multiply-adds of a product in BLAS in the time of a step.
PRODUCT = 1 / 32
# A thread wakes in 50 to 100 microseconds; with less work than this each it is not worth it.
PAYS = 300_000


def _after_fork() -> None:
    """Put a forked child in order: no thread but the one that forked is there."""
    global _lock, _pool, _stale
    _lock = threading.Lock()
    _pool = None
    # Limits of threads that are gone hold no longer.
    kept = [request for request in _requests if request[0] == threading.get_ident()]
    _stale = _stale or len(kept) < len(_requests)
    _requests[:] = kept


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _most() -> int:
    """Return the largest number of threads (``NUMBA_NUM_THREADS``)."""
    import numba

    return int(getattr(numba.config, "NUMBA_NUM_THREADS"))  # noqa: B009  (set at run time)


def thread_count() -> int:
    """Return the number of threads that kernels may use (``NUMBA_NUM_THREADS`` is the maximum).

    `limit_threads` and ``numba.set_num_threads`` lower it for the Python thread that calls them.
    """
    count = int(getattr(_local, "limit", _most()))
    # Asking Numba starts its threads, which nothing here needs, unless somebody has already.
    if getattr(sys.modules.get("numba.np.ufunc.parallel"), "_is_initialized", False):
        import numba

        count = min(count, int(numba.get_num_threads()))
    return count


def _helper() -> None:
    """Mark a thread of the pool: what it runs starts no others."""
    _local.limit = 1


def _shared(work: Callable[..., object], arguments: tuple[Any, ...], threads: int) -> None:
    """Call ``work`` here and on ``threads - 1`` others that begin before it ends here."""
    global _pool
    others = []
    if threads > 1:
        with _lock:
            if _pool is None:
                _pool = ThreadPoolExecutor(_most(), "sketchattn", _helper)
        with suppress(RuntimeError):  # which says that the interpreter ends
            others = [_pool.submit(work, *arguments) for _ in range(threads - 1)]
    try:
        work(*arguments)
    finally:
        running = [other for other in others if not other.cancel()]
        for other in running:
            other.result()


def deal(kernel: Callable[..., object], *arguments: Any, work: float) -> None:
    """Run a kernel whose items are dealt on as many threads as pay for ``work``.

    Parameters
    ----------
    kernel : callable
        Made by ``kernel(dealt=True)``; called as ``kernel(turn, *arguments)``.
    work : float
        What it does in all, in steps (see ``PRODUCT``).
    """
    import numba
    import numpy as np

    threads = int(min(thread_count(), work // PAYS))
    if getattr(numba.config, "DISABLE_JIT"):  # noqa: B009  (set at run time)
        threads = 1  # the interpreter takes an item in several steps
    turn = np.array([0, int(threads <= 1)])
    with blas_single_thread():
        try:
            _shared(kernel, (turn, *arguments), threads)
        except BaseException:
            turn[0] = 1 << 62  # the others stop
            raise


def deal_without_blas(kernel: Callable[..., object], *arguments: Any, work: float) -> None:
    """Run a kernel that calls no BLAS, as `deal` does, but at once where one thread is enough.

    Limiting BLAS and sharing items take 30 microseconds, as long as a step of a decoder.
    """
    if work < 2 * PAYS:
        import numpy as np

        kernel(np.array([0, 1]), *arguments)
    else:
        deal(kernel, *arguments, work=work)


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


def _enter(count: int) -> tuple[int, int]:
    global _stale
    with _lock:
        if _requests and not _stale and min(_numbers()) <= count:
            request = threading.get_ident(), count  # what holds already is enough
            _requests.append(request)
            return request
        libraries = _blas()
        if _stale:
            for library, before in zip(libraries, _before, strict=True):
                _set(library, min([before, *_numbers()]))
            _stale = False
        if not _requests:
            _before[:] = [library.num_threads for library in libraries]
        if not _requests or count < min(_numbers()):
            for library in libraries:
                _set(library, count)
        request = threading.get_ident(), count
        _requests.append(request)
        return request


def _leave(request: tuple[int, int]) -> None:
    with _lock:
        if request not in _requests:
            return  # of a thread that a fork left behind
        _requests.remove(request)
        smallest = min(_numbers(), default=None)
        if smallest is not None and smallest <= request[1]:
            return  # what is left holds already
        for library, before in zip(_blas(), _before, strict=True):
            _set(library, before if smallest is None else smallest)


def _numbers() -> list[int]:
    return [count for _, count in _requests]


@contextmanager
def blas_single_thread() -> Iterator[None]:
    """Limit BLAS to one thread while inside; re-entrant, and safe from several Python threads."""
    request = _enter(1)
    try:
        yield
    finally:
        _leave(request)


def map_pieces(work: Callable[[P], T], pieces: Sequence[P]) -> Iterator[T]:
    """Yield ``work`` of all pieces, in order, on as many Python threads as kernels use.

    For products in BLAS that must not depend on the number of threads: each piece is done with
    one thread of BLAS, and pieces follow from the shapes alone.  BLAS starts no threads either,
    which would keep a core busy for milliseconds after their work, beside the next kernel.
    Floating-point exceptions are ignored: threads do not inherit the settings of their caller.
    """
    import numpy as np

    results: dict[int, T] = {}
    turn = itertools.count()

    def quiet(piece: P) -> T:
        with np.errstate(all="ignore"):
            return work(piece)

    def worker() -> None:
        with _own_limit(1):  # the pieces keep all threads busy: what they run starts no others
            while (i := next(turn)) < len(pieces):
                results[i] = quiet(pieces[i])

    with blas_single_thread():
        threads = min(thread_count(), len(pieces))
        if threads <= 1:
            yield from map(quiet, pieces)
        else:
            _shared(worker, (), threads)
            yield from (results.pop(i) for i in range(len(pieces)))


def product(a: Any, b: Any) -> Any:
    """Return the product ``a b``, as ``a @ b``, with the same bits for any number of threads.

    For two matrices pieces of rows, of at least 2^25 operations, are done with one thread of BLAS
    each.  Vectors and stacks of matrices multiply on one thread, and a factor that is no array
    multiplies as it does.
    """
    import numpy as np

    if not (isinstance(a, np.ndarray) and isinstance(b, np.ndarray)) or a.ndim != 2 or b.ndim != 2:
        with blas_single_thread():
            return a @ b
    rows = max(64, (1 << 24) // max(1, b.size))
    out = np.empty((a.shape[0], b.shape[1]), np.result_type(a, b))

    def piece(part: slice) -> None:
        np.matmul(a[part], b, out=out[part])

    for _ in map_pieces(piece, [slice(i, i + rows) for i in range(0, len(out), rows)]):
        pass
    return out


@contextmanager
def _own_limit(count: int) -> Iterator[None]:
    """Let this Python thread use ``count`` threads for kernels while inside."""
    before = getattr(_local, "limit", None)
    _local.limit = count
    try:
        yield
    finally:
        if before is None:
            del _local.limit
        else:
            _local.limit = before


@contextmanager
def limit_threads(count: int) -> Iterator[None]:
    """Run kernels and BLAS on at most ``count`` threads while inside, and restore both after.

    Parameters
    ----------
    count : int
        At least 1; more than Numba's maximum is the maximum.
    """
    if count < 1:
        raise ValueError(f"number of threads must be at least 1, got {count}; pass 1 for one")
    with _own_limit(min(count, _most())):
        request = _enter(count)
        try:
            yield
        finally:
            _leave(request)


def cpu_count() -> int:
    """Return the number of CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
