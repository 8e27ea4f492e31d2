"""No result depends on the number of threads of BLAS, nor of the kernels."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import numba
import numpy as np
import pytest
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

import sketchattn as sa
from sketchattn.kernels._threads import thread_count

Array = NDArray[Any]
# BLAS splits sums and factorisations of this size over its threads.
N, D = 600, 40


def digest(x: Any) -> str:
    """Return a digest of an array, a number, a tuple or an object of them."""
    if hasattr(x, "__dict__"):
        x = [y for y in vars(x).values() if isinstance(y, float | tuple | np.ndarray)]
    parts = x if isinstance(x, list | tuple) else [x]
    assert parts
    found = hashlib.sha256()
    for part in parts:
        found.update(np.ascontiguousarray(part).tobytes())
    return found.hexdigest()


@pytest.fixture(scope="module")
def arrays() -> Array:
    return np.random.default_rng(0).standard_normal((3, N, D))


@pytest.fixture
def each_number_of_threads() -> Iterator[Callable[[Callable[[], Any]], list[str]]]:
    """Give a function that computes with every number of threads and returns the digests."""
    before = thread_count()
    most = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]  # set at run time
    controller = ThreadpoolController()

    def each(compute: Callable[[], Any]) -> list[str]:
        found = []
        for blas, kernels in ((1, 1), (2, 2), (4, 1), (4, 2)):
            numba.set_num_threads(min(kernels, most))
            with controller.limit(limits=blas, user_api="blas"):
                found.append(digest(compute()))
        return found

    yield each
    numba.set_num_threads(before)


def made(name: str) -> Any:
    """Return a method of rank 60, or as it is made without one."""
    cls: Any = sa.methods()[name]
    try:
        return cls(rank=60)
    except TypeError:
        return cls()


@pytest.mark.threads
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", sorted(sa.methods()))
def test_methods(name: str, causal: bool, arrays: Array, each_number_of_threads: Any) -> None:
    method = made(name)
    if causal and not method.traits.causal:
        pytest.skip("causal heads are not offered")

    def compute() -> list[Any]:
        problem = sa.AttentionProblem(*arrays, causal=causal)
        found = [method.attend(problem, rng=0)]
        if method.traits.matrix:
            ahat = method.approximate(problem, rng=0)
            found += [ahat @ problem.values, ahat.T @ problem.values, ahat.to_dense()]
        return found

    assert len(set(each_number_of_threads(compute))) == 1


def kernel_of(problem: Any) -> Any:
    """Return a positive definite matrix (n, n)."""
    return sa.sampling.ExponentialKernel(problem.k / 8, 1.0).to_dense()


MEASURES: dict[str, Callable[[Any], Any]] = {
    "report": lambda p: sa.error_report(p, sa.UniformColumns(24).approximate(p, rng=0)),
    "streamed": lambda p: sa.error_report(
        p, sa.UniformColumns(24).approximate(p, rng=0), path="streaming"
    ),
    "output": lambda p: sa.error_report(p, output=sa.VMean().attend(p)),
    "certify": lambda p: sa.certify(p, sa.VMean().attend(p), rows=64),
    "certify_rows": lambda p: sa.certify_rows(sa.Combiner(block=8).approximate(p)),
    "describe": sa.describe,
    "leverage": lambda p: sa.sampling.leverage_scores(p.v),
    "leverage_fast": lambda p: sa.sampling.leverage_scores_fast(p.v, rng=0),
    "landmarks": lambda p: sa.sampling.segment_means(p.k, 16),
    "frobenius": lambda p: [p.exact.frobenius_norm(), p.exact.column_norms()],
    "regret": lambda p: sa.selection_regret(p, np.arange(16)),
    "linformer": lambda p: sa.fit_linformer(p, 16),
    "ridge": lambda p: sa.sampling.ridge_leverage(kernel_of(p), 1.0),
    "nystrom": lambda p: sa.sampling.nystrom_factor(kernel_of(p), np.arange(0, N, 4)),
    "kmeans": lambda p: sa.sampling.kmeans(p.k, 16, seed=0).centers,
    "columns": lambda p: sa.sampling.css_relative_error(p.v, np.arange(8), 8),
    "compression": lambda p: sa.compression.compress(p.q, p.k, 12),
}


@pytest.mark.threads
@pytest.mark.parametrize("name", sorted(MEASURES))
def test_measures(name: str, arrays: Array, each_number_of_threads: Any) -> None:
    found = each_number_of_threads(lambda: MEASURES[name](sa.AttentionProblem(*arrays)))
    assert len(set(found)) == 1
