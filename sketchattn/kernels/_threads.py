"""Threads: how many, and the one place that limits nested threading.

Kernels split their work over Numba threads and call BLAS on one tile a thread, so BLAS must not
start threads of its own inside them.  The limit is process-wide; it is entered once, however
many Python threads run kernels at the same time, and restored when the last one leaves.

A forked child has none of its parent's threads.  Numba's layers know nothing of that (the GNU
OpenMP one ends the process), so a child runs the same machine code of its parent's kernels on the
thread that calls them.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import os
import platform
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")

_lock = threading.Lock()
_serial = threading.RLock()
# Python thread and number, of all that are inside; the smallest number holds.
_requests: list[tuple[int, int]] = []
_before: list[int] = []  # threads of each BLAS library before the first of them
_controller: Any = None
_forked = False  # this process is a forked child, and its parent had started Numba's threads
_stale = False  # BLAS is as threads of the parent left it
_started = False
_engine: Any = None  # keeps the machine code below
_switch: Any = None  # a number beside it: not 0 in such a child

# What parallel kernels call instead of Numba's ``numba_parallel_for``: the same, with whatever
# arguments, until the switch is set; then the whole range of the loop, on the calling thread.
SCHEDULER = """
@sketchattn_forked = global i32 0

define void @sketchattn_parallel_for(
  PTR %body, PTR %arrays, PTR %sizes, PTR %steps, PTR %data, ...) {
entry:
  %forked = load i32, I32PTR @sketchattn_forked
  %threads = icmp eq i32 %forked, 0
  br i1 %threads, label %parallel, label %serial
parallel:
  %layer = inttoptr i64 ADDRESS to LAYER
  musttail call void (PTR, PTR, PTR, PTR, PTR, ...) %layer(
    PTR %body, PTR %arrays, PTR %sizes, PTR %steps, PTR %data, ...)
  ret void
serial:
  %loop = BODY
  call void %loop(PTR %arrays, PTR %sizes, PTR %steps, PTR %data)
  ret void
}
"""
# LLVM spells pointers without their types, and did with them up to 16.
SPELLINGS = (
    {"BODY": "bitcast ptr %body to ptr", "LAYER": "ptr", "I32PTR": "ptr", "PTR": "ptr"},
    {
        "BODY": "bitcast i8* %body to void (i8*, i8*, i8*, i8*)*",
        "LAYER": "void (i8*, i8*, i8*, i8*, i8*, ...)*",
        "I32PTR": "i32*",
        "PTR": "i8*",
    },
)


def _install_scheduler() -> None:
    """Start Numba's threads and let kernels that are loaded from now on survive a fork.

    Where this cannot be had (no fork, another kind of processor, a Numba that is built otherwise),
    nothing is changed, and ``kernel_threads`` refuses in a forked child.
    """
    global _engine, _switch
    import ctypes

    llvm: Any = importlib.import_module("llvmlite.binding")
    layers: Any = importlib.import_module("numba.np.ufunc.parallel")
    layers._launch_threads()
    address = llvm.address_of_symbol("numba_parallel_for")
    known = platform.machine().lower() in ("x86_64", "amd64", "aarch64", "arm64")
    if not (address and known and hasattr(os, "register_at_fork")):
        return
    for spelling in SPELLINGS:
        text = SCHEDULER.replace("ADDRESS", str(address))
        for name, spelled in spelling.items():
            text = text.replace(name, spelled)
        try:
            module = llvm.parse_assembly(text)
        except RuntimeError:
            continue
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        machine = llvm.Target.from_default_triple().create_target_machine(jit=True)
        _engine = llvm.create_mcjit_compiler(module, machine)
        _engine.finalize_object()
        _switch = ctypes.c_int32.from_address(_engine.get_global_value_address("sketchattn_forked"))
        _switch.value = int(_forked)
        llvm.add_symbol(
            "numba_parallel_for", _engine.get_function_address("sketchattn_parallel_for")
        )
        return


def _start_threads() -> None:
    """Start Numba's threads, once a process."""
    global _started
    if not _started:
        with _lock:
            if not _started:
                _install_scheduler()
                _started = True
    if _forked and _switch is None:
        raise RuntimeError(
            "Kernels cannot run in a forked process whose parent has run some, on this platform; "
            "start workers with the method 'spawn': multiprocessing.get_context('spawn')"
        )


def _after_fork() -> None:
    """Put a forked child in order: no thread but the one that forked is there."""
    global _forked, _lock, _serial, _stale
    _lock = threading.Lock()
    _serial = threading.RLock()
    # Limits of threads that are gone hold no longer.
    kept = [request for request in _requests if request[0] == threading.get_ident()]
    _stale = _stale or len(kept) < len(_requests)
    _requests[:] = kept
    parallel = sys.modules.get("numba.np.ufunc.parallel")
    if _started or getattr(parallel, "_is_initialized", False):
        _forked = True
        if _switch is not None:
            _switch.value = 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def thread_count() -> int:
    """Return the number of threads that kernels use (``NUMBA_NUM_THREADS`` sets the maximum)."""
    import numba

    if _forked:
        return 1
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


def _enter(count: int) -> tuple[int, int]:
    global _stale
    with _lock:
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
    In a forked child the number is 1.

    Raises
    ------
    RuntimeError
        In a forked child, where kernels cannot be made to run in one.
    """
    _start_threads()
    # Not known yet is as unsafe as the layer that it may turn out to be.
    serial = threading_layer() in (None, "workqueue")
    lock = _serial
    if serial:
        lock.acquire()
    try:
        with blas_single_thread():
            yield thread_count()
    finally:
        if serial:
            lock.release()


def map_pieces(work: Callable[[slice], T], pieces: Sequence[slice]) -> Iterator[T]:
    """Yield ``work`` of all pieces, in order, on as many Python threads as kernels use.

    For products in BLAS that must not depend on the number of threads: each piece is done with
    one thread of BLAS, and pieces follow from the shapes alone.  BLAS starts no threads either,
    which would keep a core busy for milliseconds after their work, beside the next kernel.
    Floating-point exceptions are ignored: threads do not inherit the settings of their caller.
    """
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np

    def quiet(piece: slice) -> T:
        with np.errstate(all="ignore"):
            return work(piece)

    with blas_single_thread():
        workers = min(thread_count(), len(pieces))
        if workers <= 1:
            yield from map(quiet, pieces)
        else:
            with ThreadPoolExecutor(workers) as pool:
                yield from pool.map(quiet, pieces)


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
        request = _enter(count)
        try:
            yield
        finally:
            _leave(request)
    finally:
        numba.set_num_threads(before)


def cpu_count() -> int:
    """Return the number of CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
