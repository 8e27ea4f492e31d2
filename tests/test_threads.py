"""Threads: limits are restored whatever happens, and no result depends on them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import scipy.linalg.cython_blas  # noqa: F401  (the BLAS that kernels call is loaded)
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController, threadpool_info

import sketchattn as sa
from sketchattn.kernels import _jit, _threads
from sketchattn.kernels._threads import (
    blas_single_thread,
    cpu_count,
    deal,
    limit_threads,
    thread_count,
)

Array = NDArray[Any]
ROOT = Path(sa.__file__).parent

pytestmark = pytest.mark.threads


def blas_threads() -> list[int]:
    """Return the limit of each BLAS library of the process."""
    return [int(x["num_threads"]) for x in threadpool_info() if x["user_api"] == "blas"]


@pytest.fixture
def two_blas_threads() -> Any:
    """Start with two threads a library, so that a limit of one differs on every machine."""
    with ThreadpoolController().limit(limits=2, user_api="blas"):
        assert set(blas_threads()) == {2}
        yield


def problem(n: int = 8) -> sa.AttentionProblem:
    rng = np.random.default_rng(0)
    return sa.AttentionProblem(*(rng.standard_normal((n, 4)) for _ in range(3)))


# --- limits -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("two_blas_threads")
@pytest.mark.parametrize("enter", [blas_single_thread, lambda: limit_threads(1)])
def test_limits_hold_inside_and_are_restored(enter: Callable[[], Any]) -> None:
    threads = thread_count()
    with enter():
        assert set(blas_threads()) == {1}
    assert set(blas_threads()) == {2}
    with pytest.raises(ZeroDivisionError), enter():
        raise ZeroDivisionError
    assert set(blas_threads()) == {2}
    with enter(), enter():
        assert set(blas_threads()) == {1}
        with pytest.raises(ZeroDivisionError), enter():
            raise ZeroDivisionError
        assert set(blas_threads()) == {1}
    assert set(blas_threads()) == {2}
    assert thread_count() == threads


@pytest.mark.usefixtures("two_blas_threads")
def test_kernels_restore_limits() -> None:
    head = problem()
    _ = head.output
    head.exact.column_sums()
    sa.error_report(head, sa.VMean().approximate(head), path="streaming")
    assert set(blas_threads()) == {2}


@pytest.mark.usefixtures("two_blas_threads")
def test_limit_threads_limits_kernels_too() -> None:
    before = thread_count()
    with limit_threads(1):
        assert thread_count() == 1
        with limit_threads(10**6):
            assert thread_count() == numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]  # set at run time
            assert set(blas_threads()) == {1}  # the outer limit still holds
        assert thread_count() == 1
    assert thread_count() == before
    with pytest.raises(ValueError, match="number of threads"), limit_threads(0):
        pytest.fail("not entered")
    assert (thread_count(), set(blas_threads())) == (before, {2})


@pytest.mark.usefixtures("two_blas_threads")
def test_limits_that_overlap_in_any_order_are_restored() -> None:
    # As two Python threads do it: neither is inside the other.
    orders: list[tuple[Callable[[], Any], Callable[[], Any]]] = [
        (blas_single_thread, lambda: limit_threads(2)),
        (lambda: limit_threads(2), blas_single_thread),
        (blas_single_thread, blas_single_thread),
    ]
    for first, second in orders:
        a, b = ExitStack(), ExitStack()
        a.enter_context(first())
        b.enter_context(second())
        assert set(blas_threads()) == {1}
        a.close()
        b.close()
        assert set(blas_threads()) == {2}


@pytest.mark.usefixtures("two_blas_threads")
def test_concurrent_python_threads_leave_the_limits_as_they_were() -> None:
    workers = 4
    barrier = threading.Barrier(workers)
    head = problem(40)
    expected = np.asarray(head.exact @ head.values)

    def work(worker: int) -> bool:
        barrier.wait()
        good = True
        for step in range(20):
            with limit_threads(1 + (worker + step) % 2):
                good &= np.array_equal(head.exact @ head.values, expected)
            try:
                with blas_single_thread():
                    good &= set(blas_threads()) == {1}
                    if step % 3 == 0:
                        raise KeyError(step)
            except KeyError:
                pass
        return good

    with ThreadPoolExecutor(workers) as pool:
        assert all(pool.map(work, range(workers)))
    assert set(blas_threads()) == {2}


def test_counts_are_known() -> None:
    _ = problem().output
    assert 1 <= thread_count() <= numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]  # set at run time
    assert 1 <= cpu_count() <= (os.cpu_count() or 1)
    before = thread_count()
    numba.set_num_threads(1)
    try:
        assert thread_count() == 1
    finally:
        numba.set_num_threads(before)
    assert thread_count() == before


# --- items are dealt ------------------------------------------------------------------------------

COUNT = """
def count(turn, items, steps, out):
    for _ in range(items):
        item = take(turn)
        if item >= items:
            break
        x = 0.0
        for i in range(steps):
            x += np.sqrt(np.float64(i + item))
        out[item] += 1 + 0 * x
"""


@pytest.fixture(scope="module")
def count() -> Any:
    """Give a kernel that adds one to each of its items, after some work."""
    space: dict[str, Any] = {"take": _jit.take, "np": np}
    exec(COUNT, space)
    return _jit.kernel(dealt=True)(space["count"])


def test_every_item_is_done_once(count: Any) -> None:
    for threads in (1, 2, 4, 8):
        with limit_threads(threads):
            for _ in range(50):
                out = np.zeros(997)
                deal(count, 997, 20, out, work=1e9)
                assert (out == 1).all()


def seen_threads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that takes the number of threads of every kernel from now on."""
    seen: list[int] = []
    shared = _threads._shared

    def watched(work: Any, arguments: Any, threads: int) -> None:
        seen.append(threads)
        shared(work, arguments, threads)

    monkeypatch.setattr(_threads, "_shared", watched)
    return seen


def test_threads_follow_work(count: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the share that a thread must have is the real one
    seen = seen_threads(monkeypatch)
    with limit_threads(2):
        for work in (0, 1000, 1.9 * _threads.PAYS, 2.1 * _threads.PAYS, 1e12):
            deal(count, 3, 1, np.zeros(3), work=work)
    most = 1 if numba.config.DISABLE_JIT else 2  # type: ignore[attr-defined]  # set at run time
    assert seen == [0, 0, 1, most, most]


def test_passes_of_small_problems_wake_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    seen = seen_threads(monkeypatch)
    head = problem(64)
    for name, cls in sa.methods().items():
        rank = {"rank": 4} if "rank" in cls._get_param_names() else {}
        method = cls(**rank)
        if name not in ("svd", "topk") and not method.traits.causal:
            method.attend(head, 0)
    assert head.output.shape == (64, 4)
    assert seen
    assert max(seen) <= 1


def test_a_large_attend_opens_few_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    seen = seen_threads(monkeypatch)
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((4096, 32)).astype(np.float32) for _ in range(3))
    with limit_threads(2):
        for name in ("skeinformer", "uniform", "performer", "informer", "jl", "linformer"):
            seen.clear()
            sa.attention(q, k, v, name, rank=256, rng=0)
            assert sum(threads > 1 for threads in seen) <= 3, name


def test_a_thread_that_does_not_begin_is_not_waited_for(count: Any) -> None:
    # All threads of the pool are held up, as on a machine with nothing free.
    started, free = threading.Barrier(_threads._most() + 1), threading.Event()

    def hold() -> None:
        started.wait()
        free.wait()

    with limit_threads(2):
        deal(count, 3, 1, np.zeros(3), work=1e9)
        pool = _threads._pool
        if pool is None:
            pytest.skip("one thread is all there is")
        held = [pool.submit(hold) for _ in range(_threads._most())]
        try:
            started.wait()
            out = np.zeros(40)
            deal(count, 40, 10, out, work=1e9)
            assert (out == 1).all()
        finally:
            free.set()
            for one in held:
                one.result()


def test_an_error_ends_all_threads_and_is_raised() -> None:
    def broken(turn: Array, out: Array) -> None:
        if threading.current_thread() is threading.main_thread():
            raise MemoryError("in the middle")
        while turn[0] < 1 << 62:  # items without end, until the caller says stop
            out[0] += 1

    with limit_threads(2), pytest.raises(MemoryError, match="in the middle"):
        deal(broken, np.zeros(1), work=1e9)


# --- the number of threads changes no bit -------------------------------------------------------

INVARIANCE = """
import hashlib
import numba
import numpy as np
import sketchattn as sa
from sketchattn.kernels import _threads
from sketchattn.kernels._threads import thread_count

_threads.PAYS = 1
rng = np.random.default_rng(0)

def bits(threads):
    numba.set_num_threads(threads)
    assert thread_count() == threads
    found = {}
    for dtype in (np.float32, np.float64):
        arrays = rng_arrays[dtype]
        for causal in (False, True):
            problem = sa.AttentionProblem(*arrays, causal=causal, key_mask=mask)
            a = problem.exact
            results = [problem.output, problem.logsumexp, a.T @ problem.values, a.row_norms()]
            results += [a.column_norms(), a.column_sums()]
            for method in (sa.UniformColumns(40), sa.TopK(40), sa.SVDFloor(40), sa.VMean()):
                results += list(method.draw(problem, rng=3).values())
                ahat = method.approximate(problem, rng=3)
                results.append(ahat @ problem.values)
                report = sa.error_report(problem, ahat, path="streaming", spectral=False)
                results.append(np.array(list(report.as_dict().values())))
            for i, x in enumerate(results):
                digest = hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest()
                found[f"{np.dtype(dtype)} {causal} {i}"] = digest
    return found

mask = rng.random(700) < 0.9
drawn = rng.standard_normal((3, 700, 16))
rng_arrays = {dtype: drawn.astype(dtype) for dtype in (np.float32, np.float64)}
one = bits(1)
assert len(set(one.values())) > 20
for threads in (2, 3, 4):
    assert bits(threads) == one, threads
"""


def run(script: str, folder: Path, *arguments: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT.parent), **environment},
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_no_result_depends_on_the_number_of_threads(tmp_path: Path) -> None:
    run(INVARIANCE, tmp_path, NUMBA_NUM_THREADS="4")


# --- the table of BLAS addresses ------------------------------------------------------------------

TABLE = """
import importlib.machinery
import sys
import numba
import numpy as np
from sketchattn.kernels._threads import load_blas

if len(sys.argv) > 1:
    class NotFound:
        find_spec = staticmethod(lambda *arguments: None)
    importlib.machinery.PathFinder = NotFound  # the import system keeps its own
load_blas()
name = "scipy.linalg.cython_blas"
table = sys.modules[name]
assert ("scipy.linalg" in sys.modules) == (len(sys.argv) > 1)
load_blas()
assert sys.modules[name] is table

@numba.njit
def product(a, b):
    return a @ b

a = np.arange(6.0).reshape(2, 3)
assert np.array_equal(product(a, np.ascontiguousarray(a.T)), [[5.0, 14.0], [14.0, 50.0]])
# Whoever imports SciPy later gets it whole, the parts that read the same table included.
import scipy.linalg
from scipy.linalg import cython_blas
assert cython_blas is table
q, r = scipy.linalg.qr(np.eye(3))
q, r = scipy.linalg.qr_update(q, r, np.ones(3), np.ones(3))
assert np.allclose(q @ r, np.eye(3) + 1.0, rtol=0, atol=1e-14)
"""


@pytest.mark.parametrize("by_name", [False, True])
def test_the_blas_table_is_loaded_with_and_without_the_rest(by_name: bool, tmp_path: Path) -> None:
    run(TABLE, tmp_path, *(["by name"] if by_name else []))


# --- compilation without a cache ----------------------------------------------------------------


def test_a_kernel_without_a_source_file_is_compiled_uncached() -> None:
    # Numba finds no location for its cache and raises where the decorator is applied.
    space: dict[str, Any] = {}
    exec("def double(x):\n    return 2 * x\n", space)
    if not numba.config.DISABLE_JIT:  # type: ignore[attr-defined]  # set at run time
        with pytest.raises(RuntimeError, match="no locator available"):
            numba.njit(cache=True)(space["double"])
    assert _jit.kernel()(space["double"])(21) == 42


def test_a_cache_that_cannot_be_made_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def njit(**options: Any) -> Callable[[Any], Any]:
        asked.append(options)
        if options["cache"]:
            raise RuntimeError("cannot cache function 'f': no locator available")
        return lambda function: function

    monkeypatch.setattr(_jit, "CACHE", True)
    monkeypatch.setattr(numba, "njit", njit)
    decorated: Any = _jit.kernel(dealt=True)(lambda x: x + 1)
    assert decorated(1) == 2
    assert [options.pop("cache") for options in asked] == [True, False]
    assert asked[0] == asked[1]
    assert asked[0]["fastmath"] == set(_jit.FASTMATH)
    assert not asked[0]["forceinline"]


UNWRITABLE = """
import numpy as np
import sketchattn
from sketchattn.kernels import softmax
assert ".zip" in sketchattn.__file__, sketchattn.__file__
assert callable(sketchattn.theory.claims)
keys = np.array([[False, True]])
assert softmax._any_key(keys, 0, 0, 2) and not softmax._any_key(keys, 0, 0, 1)
assert type(softmax._any_key._cache).__name__ == "NullCache"
"""


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder nobody can write to")
def test_the_package_computes_where_nothing_can_be_written(tmp_path: Path) -> None:
    # Not even root writes to /proc, nor beside modules that are inside a zip file.
    package = Path(sa.__file__).parent
    with zipfile.ZipFile(tmp_path / "package.zip", "w") as archive:
        for path in package.rglob("*"):
            if path.is_file() and path.suffix != ".pyc":
                archive.write(path, path.relative_to(package.parent))
    nowhere = "/proc/self/nowhere"
    run(
        UNWRITABLE,
        tmp_path,
        PYTHONPATH=str(tmp_path / "package.zip"),
        NUMBA_CACHE_DIR=nowhere,
        HOME=nowhere,
        XDG_CACHE_HOME=nowhere,
        NUMBA_DISABLE_JIT="0",
    )
