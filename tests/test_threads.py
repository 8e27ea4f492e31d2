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
    kernel_threads,
    limit_threads,
    thread_count,
    threading_layer,
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
@pytest.mark.parametrize("enter", [blas_single_thread, kernel_threads, lambda: limit_threads(1)])
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
        with kernel_threads() as threads:
            assert threads == 1
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


def test_a_forked_child_that_cannot_run_kernels_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    _ = problem().output
    monkeypatch.setattr(_threads, "_forked", True)
    if _threads._switch is not None:
        with kernel_threads() as threads:
            assert (threads, thread_count()) == (1, 1)
    monkeypatch.setattr(_threads, "_switch", None)
    with pytest.raises(RuntimeError, match="forked process.*'spawn'"), kernel_threads():
        pytest.fail("not entered")


def test_counts_and_layer_are_known() -> None:
    _ = problem().output
    assert 1 <= thread_count() <= numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]  # set at run time
    assert 1 <= cpu_count() <= (os.cpu_count() or 1)
    if not numba.config.DISABLE_JIT:  # type: ignore[attr-defined]  # set at run time
        assert threading_layer() in ("omp", "tbb", "workqueue")


# --- the number of threads changes no bit -------------------------------------------------------

INVARIANCE = """
import hashlib
import numba
import numpy as np
import sketchattn as sa
from sketchattn.kernels._threads import thread_count

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
    decorated: Any = _jit.kernel(parallel=True)(lambda x: x + 1)
    assert decorated(1) == 2
    assert [options.pop("cache") for options in asked] == [True, False]
    assert asked[0] == asked[1]
    assert asked[0]["fastmath"] == set(_jit.FASTMATH)
    assert asked[0]["parallel"]


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
