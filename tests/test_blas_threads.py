"""No result depends on the number of threads of BLAS, nor of the kernels."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numba
import numpy as np
import pytest
import scipy.linalg.cython_blas  # noqa: F401  (the BLAS that kernels call is loaded)
from blas_watch import can_watch, watched
from method_cases import CASES, IDS, MethodCase
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

import sketchattn as sa
from sketchattn.kernels._threads import blas_single_thread, product, thread_count

Array = NDArray[Any]
Each = Callable[[Callable[[], Any]], list[str]]
# BLAS splits sums, products and factorisations of this size over its threads.
N, D = 600, 64
LARGE = 1024

pytestmark = pytest.mark.threads
watching = pytest.mark.skipif(not can_watch(), reason="a BLAS library that cannot be watched")


def digest(x: Any) -> str:
    """Return a digest of arrays and numbers, in whatever holds them."""
    found = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, Mapping):
            part = list(part.values())
        if isinstance(part, list | tuple):
            for piece in part:
                add(piece)
        elif isinstance(part, np.ndarray | np.generic | int | float):
            found.update(np.ascontiguousarray(part).tobytes())
        elif hasattr(part, "__dict__"):
            add(vars(part))
        else:
            assert part is None or isinstance(part, str), type(part)

    add(x)
    assert found.digest() != hashlib.sha256().digest()
    return found.hexdigest()


def arrays(n: int = N, dtype: Any = np.float64) -> Array:
    return np.random.default_rng(0).standard_normal((3, n, D)).astype(dtype)


def each_of(*numbers: tuple[int, int]) -> Iterator[Each]:
    """Give a function that computes with numbers of threads, of BLAS and of kernels.

    It returns the digests, and fails with the lines that let BLAS start threads.
    """
    before = thread_count()
    most = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]  # set at run time
    controller = ThreadpoolController()

    def each(compute: Callable[[], Any]) -> list[str]:
        found = []
        for blas, kernels in numbers:
            numba.set_num_threads(min(kernels, most))
            with controller.limit(limits=blas, user_api="blas"), watched() as lines:
                found.append(digest(compute()))
            assert not lines, f"BLAS starts threads at {sorted(set(lines))}"
        return found

    yield each
    numba.set_num_threads(before)


@pytest.fixture
def few_and_many() -> Iterator[Each]:
    yield from each_of((1, 1), (4, 2))


@pytest.fixture
def each_number_of_threads() -> Iterator[Each]:
    yield from each_of((1, 1), (2, 2), (4, 1), (4, 2))


# --- methods ------------------------------------------------------------------------------------


def results(method: sa.Method, problem: sa.AttentionProblem) -> list[Any]:
    """Return everything that a method gives."""
    found: list[Any] = [method.attend(problem, rng=0)]
    if method.traits.matrix:
        ahat = method.approximate(problem, rng=0)
        y = problem.values[: problem.n_q]
        some = np.arange(3, problem.n_q, 7)
        found += [ahat @ problem.values, ahat.T @ y, ahat @ y[:, 0], ahat.T @ y[:, 0]]
        found += [ahat.to_dense(), ahat.rows(some), ahat.columns(some), ahat.row_sums()]
        found += [ahat.wide() @ problem.values]
    if method.traits.differentiable:
        found += method.vjp(problem, problem.values[: problem.n_q], rng=0)
    return found


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", sorted(sa.methods()))
def test_methods(name: str, causal: bool, few_and_many: Each) -> None:
    method = MethodCase(name)(60)
    if causal and not method.traits.causal:
        pytest.skip("causal heads are not offered")
    found = few_and_many(lambda: results(method, sa.AttentionProblem(*arrays(), causal=causal)))
    assert len(set(found)) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "causal", "masked"), [(np.float32, False, False), (np.float64, True, True)]
)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_large_problems(
    case: MethodCase, dtype: Any, causal: bool, masked: bool, each_number_of_threads: Each
) -> None:
    method = case(60)
    causal, masked = causal and method.traits.causal, masked and method.traits.key_mask
    options: dict[str, Any] = {"key_mask": np.arange(LARGE) % 7 != 3} if masked else {}
    found = each_number_of_threads(
        lambda: results(
            method, sa.AttentionProblem(*arrays(LARGE, dtype), causal=causal, **options)
        )
    )
    assert len(set(found)) == 1


# --- what is measured and computed besides --------------------------------------------------------


def kernel_of(problem: Any) -> Any:
    """Return a positive definite matrix (n, n)."""
    return sa.sampling.ExponentialKernel(problem.k / 8, 1.0).to_dense()


def exact(problem: sa.AttentionProblem) -> list[Any]:
    """Return what the exact matrix gives."""
    a, some = problem.exact, np.arange(3, problem.n_q, 7)
    found: list[Any] = [a @ problem.values, a.T @ problem.values, a.rows(some), a.columns(some)]
    return [*found, problem.logsumexp, a.row_norms(), a.column_norms(), a.frobenius_norm()]


def steep() -> list[Any]:
    """Return what the exact matrix gives where rows are formed whole, a tile at a time."""
    q, k, v = arrays(LARGE)
    return exact(sa.AttentionProblem(1000 * q, k, v, causal=True))


def attended(problem: sa.AttentionProblem) -> list[Any]:
    """Return attention under masks, and where values or keys are not finite."""
    q, k, v = problem.q, problem.k, problem.values.copy()
    v[1::2, 2], v[50] = np.inf, np.nan
    mask = np.random.default_rng(1).standard_normal((len(q), len(k)))
    mask[:, 50], mask[7] = -np.inf, -np.inf
    found = [sa.attention(q, k, problem.values, causal=causal) for causal in (False, True)]
    found += [sa.attention(q, k, problem.values, attn_mask=mask)]
    return [*found, sa.attention(q, k, v, causal=True), sa.attention(q, k, v, attn_mask=mask > 0)]


def perturbed(problem: sa.AttentionProblem) -> list[Any]:
    """Return bounds of outputs under errors of logits."""
    bounds, q, k = sa.perturbation, problem.q, problem.k
    labels = np.arange(len(k)) % 16
    centers = np.stack([k[labels == c].mean(axis=0) for c in range(16)])
    return [
        bounds.output_bound(0.1, problem.values),
        bounds.compression_eta(q, k, q[:, :12], k[:, :12]),
        bounds.cluster_eta_apriori(q, k, keys=(centers, labels)),
        bounds.quantization_eta(q, k, "bfloat16"),
    ]


MEASURES: dict[str, Callable[[Any], Any]] = {
    "report": lambda p: sa.error_report(p, sa.UniformColumns(24).approximate(p, rng=0)),
    "streamed": lambda p: sa.error_report(
        p, sa.UniformColumns(24).approximate(p, rng=0), path="streaming"
    ),
    "output": lambda p: sa.error_report(p, output=sa.VMean().attend(p)),
    "certify": lambda p: sa.certify(p, sa.VMean().attend(p), rows=64),
    "certify_rows": lambda p: sa.certify_rows(sa.Combiner(block=8).approximate(p)),
    "certify_clusters": lambda p: sa.certify_rows(
        sa.Combiner(pattern="routing", metric="query").approximate(p, rng=0)
    ),
    "describe": sa.describe,
    "exact": exact,
    "steep": lambda p: steep(),
    "attention": attended,
    "perturbation": perturbed,
    "leverage": lambda p: sa.sampling.leverage_scores(p.v),
    "leverage_fast": lambda p: sa.sampling.leverage_scores_fast(p.v, rng=0, projection=8),
    "leverage_single": lambda p: sa.sampling.leverage_scores(p.v.astype(np.float32)),
    "landmarks": lambda p: sa.sampling.segment_means(p.k, 16),
    "pivots": lambda p: sa.sampling.pivoted_rows(p.k, 16, np.random.default_rng(0)),
    "frobenius": lambda p: [p.exact.frobenius_norm(), p.exact.column_norms()],
    "regret": lambda p: sa.selection_regret(p, np.arange(16)),
    "statistic": lambda p: sa.row_statistic(p, "kl"),
    "linformer": lambda p: sa.fit_linformer(p, 16),
    "ridge": lambda p: sa.sampling.ridge_leverage(kernel_of(p), 1.0),
    "nystrom": lambda p: sa.sampling.nystrom_factor(kernel_of(p), np.arange(0, N, 4)),
    "kmeans": lambda p: sa.sampling.kmeans(p.k, 16, seed=0).centers,
    "nearest": lambda p: sa.sampling.nearest(p.k, p.k[:300]),
    "columns": lambda p: sa.sampling.css_relative_error(p.v, np.arange(8), 8),
    "compression": lambda p: sa.compression.compress(p.q, p.k, 12),
}
# Seconds on one core; what they call is in others too.
LONG = {"streamed", "linformer", "ridge", "columns"}


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[pytest.mark.slow] * (x in LONG)) for x in sorted(MEASURES)]
)
def test_measures(name: str, few_and_many: Each) -> None:
    found = few_and_many(lambda: MEASURES[name](sa.AttentionProblem(*arrays())))
    assert len(set(found)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MEASURES))
def test_measures_of_large_problems(name: str, each_number_of_threads: Each) -> None:
    found = each_number_of_threads(lambda: MEASURES[name](sa.AttentionProblem(*arrays(LARGE))))
    assert len(set(found)) == 1


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", sorted(sa.sketches.sketches()))
def test_sketches(kind: str, dtype: Any, few_and_many: Each) -> None:
    x, y, _ = arrays(dtype=dtype)

    def compute() -> list[Any]:
        sketch = sa.sketches.make_sketch(kind, 128, N, rng=0, dtype=dtype)
        small = np.ascontiguousarray(y[:128])
        found = [dict(sketch.arrays), sketch @ x, sketch.T @ small, sketch @ x[:, 0]]
        again = type(sketch).from_arrays(
            sketch.arrays, sketch.shape, dtype=dtype, **sketch.parameters
        )
        return [*found, sketch.T @ small[:, 0], sketch.to_dense(), again @ x]

    assert len(set(few_and_many(compute))) == 1


FAMILIES = (
    "gaussian",
    "peaked",
    "clustered",
    "ar1",
    "near_permutation",
    "low_rank",
    "duplicates",
    "attention_sink",
)


def test_families(few_and_many: Each) -> None:
    def compute() -> list[Any]:
        return [list(sa.make_heads(name, n=N, d=D, rng=0)[0]) for name in FAMILIES]

    assert len(set(few_and_many(compute))) == 1


# --- what the tests see ---------------------------------------------------------------------------


@watching
def test_watching_sees_threads_of_blas() -> None:
    x = arrays()[0]
    wide = np.concatenate([x, x])
    calls: dict[str, Callable[[], Any]] = {
        "product": lambda: wide @ x.T,
        "gram": lambda: x.T @ x,
        "vector": lambda: x.ravel() @ x.ravel(),
        "norm": lambda: np.linalg.norm(x),
        "eigh": lambda: np.linalg.eigh(x[:D]),
        "numba": lambda: scipy.linalg.svd(x),
    }
    with ThreadpoolController().limit(limits=2, user_api="blas"):
        for name, call in calls.items():
            with watched() as lines:
                call()
            assert lines, name
            with watched() as lines, blas_single_thread():
                call()
            assert not lines, name
        with watched() as lines:
            product(wide, x.T)
        assert not lines
