"""Operators: products, adjoints, rows and columns against dense matrices; refusals."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from method_cases import (
    CASES,
    IDS,
    MethodCase,
    dense_attention,
    make_problem,
    rounding,
    unit_roundoff,
)
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, aslinearoperator

import sketchattn as sa
from sketchattn.kernels._threads import limit_threads
from sketchattn.operators.base import pick
from sketchattn.operators.factored import Assignment
from sketchattn.operators.visible_mean import VisibleMean
from sketchattn.operators.wrapped import DenseAttention, WrappedAttention, as_operator

Array = NDArray[Any]
PRECISIONS = [np.float32, np.float64]


@dataclass(frozen=True)
class Made:
    """An operator, its matrix in float64, what its entries' errors are relative to, and how far."""

    a: sa.AttentionOperator
    dense: Array
    size: Array
    tolerance: float


Make = Callable[[Any], Made]

pytestmark = pytest.mark.usefixtures("one_thread")


def message(text: str) -> str:
    """Return a pattern for a whole message."""
    return f"^{re.escape(text)}$"


MASK = np.array([True, False, True, True, False, True, True, True, True])
PROBLEMS: dict[str, dict[str, Any]] = {
    "square": {"n_q": 9, "n_k": 9},
    "tall": {"n_q": 40, "n_k": 9},
    "wide": {"n_q": 5, "n_k": 9},
    "one": {"n_q": 1, "n_k": 1},
    "causal": {"n_q": 9, "n_k": 9, "causal": True},
    "top-left": {"n_q": 6, "n_k": 9, "causal": "top-left"},
    "bottom-right": {"n_q": 6, "n_k": 9, "causal": "bottom-right"},
    "negative": {"n_q": 12, "n_k": 9, "causal": "bottom-right"},  # three rows see nothing
    "masked": {"n_q": 9, "n_k": 9, "key_mask": MASK},
    "masked causal": {"n_q": 9, "n_k": 9, "key_mask": MASK[::-1], "causal": True},
    "all masked": {"n_q": 4, "n_k": 9, "key_mask": np.zeros(9, bool)},
}


def exact(name: str) -> Make:
    def make(dtype: Any) -> Made:
        problem = make_problem(dtype=dtype, **PROBLEMS[name])
        dense = dense_attention(problem)
        return Made(problem.exact, dense, dense, rounding(problem))

    return make


def mean(name: str) -> Make:
    def make(dtype: Any) -> Made:
        problem = make_problem(dtype=dtype, **PROBLEMS[name])
        seen = dense_attention(problem) > 0
        counts = seen.sum(axis=1, keepdims=True)
        dense = np.divide(seen, counts, out=np.zeros(seen.shape), where=counts > 0)
        return Made(VisibleMean(problem), dense, dense, rounding(problem))

    return make


def product(a: sa.AttentionOperator, *factors: Array) -> Made:
    u, s, p = (x.astype(np.float64) for x in factors)
    size = np.abs(u) @ np.abs(s) @ np.abs(p)
    return Made(a, u @ s @ p, size, 100 * unit_roundoff(a.dtype))


def factored(core: str) -> Make:
    def make(dtype: Any) -> Made:
        rng = np.random.default_rng(0)
        u, p = rng.standard_normal((7, 3)).astype(dtype), rng.standard_normal((3, 9)).astype(dtype)
        s = {
            "none": None,
            "diagonal": rng.standard_normal(3).astype(dtype),
            "full": rng.standard_normal((3, 3)).astype(dtype),
        }[core]
        wide = np.eye(3) if s is None else np.diag(s) if s.ndim == 1 else s
        return product(sa.FactoredAttention(u, s, p), u, wide, p)

    return make


def rectangular_core(dtype: Any) -> Made:
    rng = np.random.default_rng(0)
    u, s, p = (rng.standard_normal(x).astype(dtype) for x in ((7, 2), (2, 3), (3, 9)))
    return product(sa.FactoredAttention(u, s, p), u, s, p)


LABELS = np.array([2, 0, 2, 4, 2, 0, 4])  # of five labels two are not used


def one_hot(dtype: Any, weighted: bool = False) -> Array:
    """Return the matrix of ``LABELS`` (7, 5); one weight is zero."""
    made = np.zeros((7, 5), dtype)
    for i, label in enumerate(LABELS):
        made[i, label] = (0.0, -0.5, 0.3)[i % 3] if weighted else 1.0
    return made


def assigned(weighted: bool, transpose: bool) -> Make:
    def make(dtype: Any) -> Made:
        narrow = one_hot(dtype, weighted)
        weights = narrow[np.arange(7), LABELS] if weighted else None
        made = Assignment(LABELS, 5, weights, transpose=transpose, dtype=dtype)
        dense = (narrow.T if transpose else narrow).astype(np.float64)
        return Made(made, dense, np.abs(dense), 100 * unit_roundoff(dtype))

    return make


def factored_assignments(dtype: Any) -> Made:
    """Return U S P with one-hot U and P."""
    s = np.random.default_rng(0).standard_normal((5, 5)).astype(dtype)
    u, p = assigned(False, False)(dtype), assigned(True, True)(dtype)
    return product(sa.FactoredAttention(u.a, s, p.a), u.dense, s, p.dense)


def sampled(own: bool) -> Make:
    def make(dtype: Any) -> Made:
        rng = np.random.default_rng(0)
        weights = rng.standard_normal((7, 3)).astype(dtype)
        columns = np.array([rng.permutation(9)[:3] for _ in range(7)]) if own else [5, 0, 8]
        dense = np.zeros((7, 9))
        for i in range(7):
            dense[i, columns[i] if own else columns] = weights[i]
        made = sa.SampledAttention(np.array(columns), weights, 9)
        return Made(made, dense, np.abs(dense), 100 * unit_roundoff(dtype))

    return make


def ragged(dtype: Any) -> Made:
    rng = np.random.default_rng(0)
    lengths = np.array([3, 0, 9, 1, 2])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    columns = np.concatenate([rng.permutation(9)[:length] for length in lengths])
    weights = rng.standard_normal(len(columns)).astype(dtype)
    dense = np.zeros((5, 9))
    dense[np.repeat(np.arange(5), lengths), columns] = weights
    made = sa.SparseAttention(starts, columns, weights, 9)
    return Made(made, dense, np.abs(dense), 100 * unit_roundoff(dtype))


def nothing_sampled(dtype: Any) -> Made:
    made = sa.SampledAttention(np.zeros(0, np.int64), np.zeros((7, 0), dtype), 9)
    return Made(made, np.zeros((7, 9)), np.zeros((7, 9)), 0.0)


def filled(own: bool, n_q: int, n_k: int, r: int, **options: Any) -> Make:
    """Return an operator with a fill: ``offset``, ``masked`` keys, ``replaced`` rows."""

    def make(dtype: Any) -> Made:
        rng = np.random.default_rng(0)
        weights, fill = (rng.standard_normal(x).astype(dtype) for x in ((n_q, r), n_q))
        columns = np.array([rng.permutation(n_k)[:r] for _ in range(n_q if own else 1)])
        offset = options.get("offset")
        keys = rng.random(n_k) < 0.6 if options.get("masked") else None
        rows = rng.permutation(n_q)[: options.get("replaced", 0)]
        row_weights = rng.standard_normal((len(rows), n_k)).astype(dtype)
        dense = np.zeros((n_q, n_k))
        for i in range(n_q):
            for j in range(n_k):
                if (keys is None or keys[j]) and (offset is None or j <= i + offset):
                    dense[i, j] = fill[i]
            dense[i, columns[i if own else 0]] = weights[i]
        dense[rows] = row_weights
        made = sa.SampledAttention(
            columns if own else columns[0],
            weights,
            n_k,
            fill=fill,
            keys=keys,
            offset=offset,
            rows=rows if len(rows) else None,
            row_weights=row_weights if len(rows) else None,
        )
        return Made(made, dense, np.abs(dense), 100 * unit_roundoff(dtype))

    return make


FILLED: dict[str, Make] = {
    f"{'own' if own else 'shared'} {name}": filled(own, **options)
    for own in (False, True)
    for name, options in {
        "filled": {"n_q": 7, "n_k": 9, "r": 3},
        "filled masked": {"n_q": 12, "n_k": 16, "r": 2, "masked": True},
        "filled replaced": {"n_q": 7, "n_k": 9, "r": 3, "masked": True, "replaced": 2},
        "filled causal": {"n_q": 9, "n_k": 9, "r": 3, "offset": 0, "replaced": 2},
        "filled late": {"n_q": 5, "n_k": 9, "r": 2, "offset": 4, "masked": True},
        "filled early": {"n_q": 12, "n_k": 8, "r": 2, "offset": -4},
        "filled without columns": {"n_q": 6, "n_k": 5, "r": 0, "offset": 0, "replaced": 6},
        "filled whole": {"n_q": 4, "n_k": 3, "r": 3},
        "filled one": {"n_q": 1, "n_k": 1, "r": 0},
    }.items()
}


def replaced_only(dtype: Any) -> Made:
    rng = np.random.default_rng(0)
    weights, row_weights = (rng.standard_normal(x).astype(dtype) for x in ((7, 2), (3, 9)))
    dense = np.zeros((7, 9))
    dense[:, [4, 1]] = weights
    dense[[6, 0, 3]] = row_weights
    made = sa.SampledAttention(
        np.array([4, 1]), weights, 9, rows=np.array([6, 0, 3]), row_weights=row_weights
    )
    return Made(made, dense, np.abs(dense), 100 * unit_roundoff(dtype))


def held(wrap: bool) -> Make:
    def make(dtype: Any) -> Made:
        dense = np.random.default_rng(0).standard_normal((7, 9)).astype(dtype)
        made = WrappedAttention(aslinearoperator(dense)) if wrap else DenseAttention(dense)
        wide = dense.astype(np.float64)
        return Made(made, wide, np.abs(wide), 100 * unit_roundoff(dtype))

    return make


OPERATORS: dict[str, Make] = {
    **{f"exact {name}": exact(name) for name in PROBLEMS},
    **{f"mean {name}": mean(name) for name in PROBLEMS},
    **{f"factored {core}": factored(core) for core in ("none", "diagonal", "full")},
    "factored rectangular": rectangular_core,
    "factored assignments": factored_assignments,
    "assignment": assigned(False, False),
    "assignment transposed": assigned(False, True),
    "assignment weighted": assigned(True, False),
    "assignment weighted transposed": assigned(True, True),
    "sampled": sampled(False),
    "sampled own": sampled(True),
    "sampled nothing": nothing_sampled,
    "sparse": ragged,
    "sampled replaced": replaced_only,
    **FILLED,
    "dense": held(False),
    "wrapped": held(True),
}


@pytest.fixture(params=OPERATORS, scope="module")
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=PRECISIONS, scope="module")
def dtype(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope="module")
def made(name: str, dtype: Any) -> Made:
    return OPERATORS[name](dtype)


def blocks(length: int, dtype: Any) -> list[Array]:
    """Return what people multiply with: vectors and blocks of several layouts."""
    x = np.random.default_rng(1).standard_normal((length, 4)).astype(dtype)
    frozen = x.copy()
    frozen.flags.writeable = False
    return [x, x[:, 0], x[:, :1], np.asfortranarray(x), x[:, ::-1], frozen, x[:, :0]]


def close(actual: Array, expected: Array, size: Array | float, tolerance: float) -> bool:
    """Say whether an array is what was expected up to a relative error of ``size``; NaN is not."""
    return actual.shape == expected.shape and bool(
        np.all(np.abs(actual - expected) <= tolerance * np.asarray(size))
    )


def test_products_are_those_of_the_dense_matrix(made: Made, dtype: Any) -> None:
    a, dense, size, tolerance = made.a, made.dense, made.size, made.tolerance
    assert a.shape == dense.shape
    assert a.dtype == dtype
    for x in blocks(dense.shape[1], dtype):
        before = x.copy()
        assert close(a @ x, dense @ x, size @ np.abs(x), tolerance)
        assert (a @ x).dtype == dtype
        assert np.array_equal(x, before)
    for y in blocks(dense.shape[0], dtype):
        assert close(a.T @ y, dense.T @ y, size.T @ np.abs(y), tolerance)
        assert (a.T @ y).dtype == dtype
    ones = np.ones(dense.shape[1])
    assert close(a.row_sums(), dense @ ones, size @ ones, tolerance)


def test_flags_of_the_processor_are_no_errors(name: str, dtype: Any) -> None:
    # BLAS may raise flags for finite numbers on some machines; here an infinity raises them
    # everywhere: infinity times zero, or minus infinity, is invalid.
    made = OPERATORS[name](dtype)
    a = made.a
    with np.errstate(all="raise"):
        for product, length in ((a, a.shape[1]), (a.T, a.shape[0])):
            x = np.ones((length, 2), dtype)
            x[::2] = np.inf
            x[1::2] = -np.inf
            for given in (x, x[:, 0]):
                assert (product @ given).shape == (product.shape[0], *given.shape[1:])
        assert close(a.to_dense(), made.dense, made.size, made.tolerance)
        assert close(a.columns(slice(None)), made.dense, made.size, made.tolerance)


@pytest.mark.parametrize("matrix", [np.eye(2, dtype=np.float32), np.zeros((2, 2))])
def test_a_product_that_raises_flags_does_so_outside_of_an_operator(matrix: Array) -> None:
    # The control of the test above.
    x = np.array([np.inf, 1.0], matrix.dtype)

    class Plain(sa.AttentionOperator):
        def _matmat(self, x: Array) -> Array:
            product: Array = matrix @ x
            return product

    with np.errstate(all="raise"), pytest.raises(FloatingPointError, match="invalid value"):
        _ = matrix @ x
    with np.errstate(all="raise"):
        assert np.isnan((Plain((2, 2), matrix.dtype) @ x)[1])


def dottest(a: LinearOperator[Any], size: Array, tolerance: float) -> bool:
    """Say whether ``<A x, y> = <x, A^T y>`` on random vectors, up to rounding."""
    rng = np.random.default_rng(2)
    for _ in range(5):
        x, y = (rng.standard_normal(n).astype(a.dtype) for n in (a.shape[1], a.shape[0]))
        left, right = np.vdot(a @ x, y), np.vdot(x, a.T @ y)
        if not abs(float(left) - float(right)) <= 2 * tolerance * (np.abs(y) @ size @ np.abs(x)):
            return False
    return True


def test_adjoint(made: Made) -> None:
    a, dense, size, tolerance = made.a, made.dense, made.size, made.tolerance
    assert dottest(a, size, tolerance)
    twice = a.T.T
    x = np.ones(dense.shape[1], a.dtype)
    assert np.array_equal(twice @ x, a @ x)
    if dense.any():
        spoilt = dense.astype(a.dtype)
        spoilt[np.argmax(np.abs(dense).sum(axis=1))] *= 1.5
        broken = LinearOperator(
            dense.shape, matvec=lambda x: a @ x, rmatvec=lambda y: spoilt.T @ y, dtype=a.dtype
        )
        assert not dottest(broken, size, tolerance)


def test_rows_and_columns_are_those_of_the_dense_matrix(made: Made, dtype: Any) -> None:
    a, dense, size, tolerance = made.a, made.dense, made.size, made.tolerance
    assert close(a.to_dense(), dense, size, tolerance)
    assert a.to_dense().dtype == dtype
    for length, take, axis in ((dense.shape[0], a.rows, 0), (dense.shape[1], a.columns, 1)):
        last = length - 1
        third = np.arange(length) % 3 == 0
        cases: list[tuple[Any, list[int]]] = [
            (0, [0]),
            (-1, [last]),
            ((last, 0, 0), [last, 0, 0]),
            ([], []),
            (slice(None), list(range(length))),
            (slice(1, None, 3), list(range(1, length, 3))),
            (third, np.flatnonzero(third).tolist()),
        ]
        for index, at in cases:
            expected, scale = (np.take(x, np.array(at, np.int64), axis) for x in (dense, size))
            assert close(take(index), expected, scale, tolerance)
    rows = a.rows(slice(None))
    rows[:] = 7  # not the operator's own memory
    assert close(a.to_dense(), dense, size, tolerance)


def test_bounds_and_bytes_are_true(made: Made) -> None:
    a, dense = made.a, made.dense
    assert np.linalg.matrix_rank(dense) <= a.rank_bound <= min(dense.shape)
    arrays = [x for x in vars(a).values() if isinstance(x, np.ndarray)]
    assert a.nbytes >= sum(x.nbytes for x in arrays)
    assert a.path == ("exact" if isinstance(a, sa.SoftmaxAttention) else "sketch")


def test_wide_is_the_same_matrix_in_float64(made: Made, dtype: Any) -> None:
    a, dense, size, tolerance = made.a, made.dense, made.size, made.tolerance
    wide = a.wide()
    if dtype == np.float64 or isinstance(a, sa.SoftmaxAttention | WrappedAttention):
        assert wide is a
        return
    assert wide.dtype == np.float64
    assert a.dtype == np.float32
    narrow = a.to_dense()
    assert narrow.dtype == np.float32
    # What it holds is float32 still, its products are not.
    x = np.array(np.random.default_rng(3).standard_normal(dense.shape[1]))
    fine = 1e3 * unit_roundoff(np.float64)
    assert close(wide @ x, wide.to_dense() @ x, size @ np.abs(x), fine)
    assert close(wide.to_dense(), dense, size, tolerance)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_every_method_gives_a_consistent_operator(case: MethodCase, dtype: Any) -> None:
    kinds: list[dict[str, Any]] = [{}, {"key_mask": MASK}, {"causal": "bottom-right"}]
    for shape, options in itertools.product([(9, 9), (5, 9), (12, 9)], kinds):
        n_q, n_k = shape
        problem = make_problem(n_q, n_k, dtype, **options)
        method = case(4)
        traits = method.traits
        if problem.causal and not (traits.causal or traits.oracle):
            continue
        if shape[0] != shape[1] and not traits.rectangular:
            continue
        a = method.approximate(problem, rng=0)
        # The estimator's own size, not that of A: weights may be large.
        dense = np.asarray(a.wide().to_dense(), np.float64)
        size = np.abs(dense) + np.abs(dense).max(initial=0.0)
        tolerance = rounding(problem)
        assert a.shape == shape
        assert dottest(a, size, tolerance)
        for x in blocks(shape[1], dtype)[:3]:
            assert close(a @ x, dense @ x, size @ np.abs(x), tolerance)
        for y in blocks(shape[0], dtype)[:3]:
            assert close(a.T @ y, dense.T @ y, size.T @ np.abs(y), tolerance)
        assert close(a.rows([1, -1]), dense[[1, -1]], size[[1, -1]], tolerance)
        assert close(a.columns([1, -1]), dense[:, [1, -1]], size[:, [1, -1]], tolerance)
        assert close(a.row_sums(), dense.sum(axis=1), size.sum(axis=1), tolerance)
        assert np.linalg.matrix_rank(dense) <= a.rank_bound
        assert a.effective_rank is None or 0 <= a.effective_rank <= problem.n_k


# --- norms of the exact matrix ------------------------------------------------------------------


@pytest.mark.parametrize("kind", PROBLEMS)
def test_norms_of_rows_columns_and_all(kind: str, dtype: Any) -> None:
    problem = make_problem(dtype=dtype, **PROBLEMS[kind])
    a, dense = problem.exact, dense_attention(problem)
    tolerance = rounding(problem.astype(np.float64))
    for actual, expected in (
        (a.row_norms(), np.linalg.norm(dense, axis=1)),
        (a.column_norms(), np.linalg.norm(dense, axis=0)),
        (np.array([a.frobenius_norm()]), np.array([np.linalg.norm(dense)])),
    ):
        assert actual.dtype == np.float64
        assert close(actual, expected, expected, tolerance)
    assert close(a.column_sums(), dense.sum(axis=0), dense.sum(axis=0), rounding(problem))


def test_large_logits_that_are_hidden_do_not_overflow(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    q, k = (40 * rng.standard_normal((12, 4)).astype(dtype) for _ in range(2))
    mask = rng.random(12) < 0.7
    for options in ({"causal": True}, {"key_mask": mask}, {"causal": True, "key_mask": mask}):
        problem = sa.AttentionProblem(q, k, **options)
        with np.errstate(over="raise", invalid="raise"):
            columns = problem.exact.columns(slice(None))
            rows = problem.exact.rows(slice(None))
        expected = dense_attention(problem)
        # A logit of 1e4 carries an absolute error of d + 4 roundings, and so do weights.
        assert close(columns, expected, 1.0, rounding(problem))
        assert close(rows, expected, 1.0, rounding(problem))
        hidden = expected == 0
        assert not columns[hidden & ~problem.visible()].any()


# --- indices ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        (2, [2]),
        (-1, [4]),
        (np.int8(3), [3]),
        ([], []),
        ((), []),
        ([4, 0, 4], [4, 0, 4]),
        (np.array([-5], np.int16), [0]),
        (np.array([], np.int64), []),
        (slice(None, None, -2), [4, 2, 0]),
        (slice(7, 9), []),
        ([True, False, True, False, False], [0, 2]),
        (np.zeros(5, bool), []),
        (range(1, 3), [1, 2]),
    ],
)
def test_indices_pick_as_numpy_does(index: Any, expected: list[int]) -> None:
    assert pick(5, index).tolist() == expected


WRONG = "index must be an integer, a slice, or a one-dimensional array of integers or booleans, got"


@pytest.mark.parametrize(
    ("index", "error", "text"),
    [
        ([[0, 1]], ValueError, f"{WRONG} int64 of shape (1, 2); flatten it"),
        (np.zeros((5, 5), bool), ValueError, f"{WRONG} bool of shape (5, 5); flatten it"),
        (True, ValueError, f"{WRONG} bool of shape (); flatten it"),
        (5, IndexError, "index 5 is out of bounds for axis 0 with size 5"),
        ([0, -6], IndexError, "index -6 is out of bounds for axis 0 with size 5"),
        (
            [1.0],
            IndexError,
            "arrays used as indices must be of integer (or boolean) type",
        ),
        (
            [True, False],
            IndexError,
            "boolean index did not match indexed array along axis 0; size of axis is 5 but size of "
            "corresponding boolean axis is 2",
        ),
    ],
)
def test_indices_that_are_refused(index: Any, error: type[Exception], text: str) -> None:
    problem = make_problem(5, 5)
    for a in (problem.exact, sa.VMean().approximate(problem)):
        with pytest.raises(error, match=message(text)):
            a.rows(index)
        with pytest.raises(error, match=message(text)):
            a.columns(index)


# --- construction -------------------------------------------------------------------------------


def test_factors_of_any_number_type_are_computed_in_floating_point() -> None:
    x = np.array([0.5, 0.25])
    for kind in (np.int64, np.int8, np.float16, np.bool_):
        u, p = np.ones((3, 1), kind), np.ones((1, 2), kind)
        for s in (None, np.ones(1, kind), np.ones((1, 1), kind)):
            a = sa.FactoredAttention(u, s, p)
            assert (a @ x).tolist() == [0.75] * 3
            assert a.dtype == (a @ x).dtype == np.float64
        sampled = sa.SampledAttention(np.array([1, 0]), np.ones((3, 2), kind), 2)
        assert (sampled @ x).tolist() == [0.75] * 3
    single = np.ones((3, 1), np.float32), np.ones((1, 2), np.float32)
    narrow = sa.FactoredAttention(single[0], np.ones(1), single[1])
    assert narrow.dtype == (narrow @ x).dtype == narrow.to_dense().dtype == np.float32
    assert sa.FactoredAttention(single[0], None, np.ones((1, 2))).dtype == np.float64


@pytest.mark.parametrize(
    ("shapes", "text"),
    [
        (
            [(3,), None, (1, 2)],
            "u and p must have shapes (n_q, r) and (r, n_k), got (3,) and (1, 2); pass matrices",
        ),
        ([(3, 2), None, (1, 2)], "u and p must share r, got 2 and 1; check s"),
        ([(3, 2), (2,), (1, 2)], "u and p must share r, got 2 and 1; check s"),
        ([(3, 2), (3,), (2, 2)], "s must have shape (2, 2) or (2,), got (3,); check u, p"),
        ([(3, 2), (2, 2), (1, 2)], "s must have shape (2, 1) or (2,), got (2, 2); check u, p"),
    ],
)
def test_factors_that_do_not_fit_are_refused(shapes: list[Any], text: str) -> None:
    u, s, p = (None if shape is None else np.ones(shape) for shape in shapes)
    assert u is not None
    assert p is not None
    with pytest.raises(ValueError, match=message(text)):
        sa.FactoredAttention(u, s, p)


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        (
            [0, 1, 2],
            "columns must have the shape (3, 2) of weights or (2,), got (3,); "
            "give a column for each weight",
        ),
        (
            [0, 4],
            "columns must be distinct in each row and in 0..n_k - 1 = 3, got indices from 0 to 4; "
            "add the weights of equal columns",
        ),
        (
            [-1, 1],
            "columns must be distinct in each row and in 0..n_k - 1 = 3, got indices from -1 to 1; "
            "add the weights of equal columns",
        ),
        (
            [[0, 1], [2, 2], [0, 1]],
            "columns must be distinct in each row and in 0..n_k - 1 = 3, got indices from 0 to 2; "
            "add the weights of equal columns",
        ),
    ],
)
def test_columns_that_do_not_fit_are_refused(columns: Any, text: str) -> None:
    with pytest.raises(ValueError, match=message(text)):
        sa.SampledAttention(np.array(columns), np.ones((3, 2)), 4)


@pytest.mark.parametrize(
    ("starts", "columns", "text"),
    [
        ([0, 1, 2], [0], "columns must have the shape (t,) of weights, got (1,) and (2,); give"),
        ([0, 1, 1], [0, 1], "starts must rise from 0 to len(columns) = 2, got [0 1 1]...; give"),
        ([1, 1, 2], [0, 1], "starts must rise from 0 to len(columns) = 2, got [1 1 2]...; give"),
        ([0, 3, 2], [0, 1], "starts must rise from 0 to len(columns) = 2, got [0 3 2]...; give"),
        ([0, 1, 2], [0, 4], "columns must be distinct in each row and in 0..n_k - 1 = 3, got keys"),
        ([0, 1, 2], [-1, 0], "columns must be distinct in each row and in 0..n_k - 1 = 3, got"),
        ([0, 0, 2], [1, 1], "columns must be distinct in each row and in 0..n_k - 1 = 3, got keys"),
    ],
)
def test_keys_of_rows_that_do_not_fit_are_refused(starts: Any, columns: Any, text: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(text)}"):
        sa.SparseAttention(np.array(starts), np.array(columns), np.ones(2), 4)


FILL_REFUSALS: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"fill": np.ones(4)},
        ValueError,
        "fill must have shape (n_q,) = (3,), got (4,); give one weight a row",
    ),
    (
        {"keys": np.ones(4, bool)},
        ValueError,
        "fill must be given where keys or offset say which keys get it, got None; drop keys and "
        "offset",
    ),
    (
        {"offset": 0},
        ValueError,
        "fill must be given where keys or offset say which keys get it, got None; drop keys and "
        "offset",
    ),
    (
        {"fill": np.ones(3), "keys": np.ones(4)},
        ValueError,
        "keys must be boolean of shape (n_k,) = (4,), got float64 of shape (4,); True for the keys "
        "that get the fill",
    ),
    (
        {"rows": np.array([0])},
        ValueError,
        "rows and row_weights must be given together, got one of them; say which rows are "
        "replaced, and by what",
    ),
    (
        {"rows": np.array([0, 0]), "row_weights": np.ones((2, 4))},
        ValueError,
        "rows must be distinct and in 0..n_q - 1 = 2, got 2 indices from 0 to 0; give each row "
        "once",
    ),
    (
        {"rows": np.array([3]), "row_weights": np.ones((1, 4))},
        ValueError,
        "rows must be distinct and in 0..n_q - 1 = 2, got 1 indices from 3 to 3; give each row "
        "once",
    ),
    (
        {"rows": np.array([0.0]), "row_weights": np.ones((1, 4))},
        TypeError,
        "rows must be a one-dimensional integer array, got float64 of shape (1,); give indices of "
        "queries",
    ),
    (
        {"rows": np.array([0, 1]), "row_weights": np.ones((2, 3))},
        ValueError,
        "row_weights must have shape (s, n_k) = (2, 4), got (2, 3); give one row of weights for "
        "each of rows",
    ),
]


@pytest.mark.parametrize(("options", "error", "text"), FILL_REFUSALS)
def test_fills_and_rows_that_do_not_fit_are_refused(
    options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=message(text)):
        sa.SampledAttention(np.array([0, 1]), np.ones((3, 2)), 4, **options)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("offset", [None, 0])
def test_the_fill_is_no_difference_of_large_sums(own: bool, offset: int | None) -> None:
    # A value of 1e20 at a column of weight zero: subtracted from a total it would leave nothing.
    n = 40
    columns = np.full((n, 1), 7) if own else np.array([7])
    a = sa.SampledAttention(columns, np.zeros((n, 1)), n, fill=np.ones(n), offset=offset)
    x = np.ones((n, 1))
    x[7] = 1e20
    expected = a.to_dense().sum(axis=1)
    assert np.array_equal((a @ x)[:, 0], expected)
    assert np.abs((x.sum() - x[7]) - (n - 1)) > 1


def test_ranks_of_fills() -> None:
    cases: dict[str, tuple[Array, dict[str, Any]]] = {
        "shared": (np.arange(3), {"fill": np.ones(20)}),
        "rows": (np.arange(3), {"rows": np.arange(2), "row_weights": np.ones((2, 20))}),
        "causal": (np.arange(3), {"fill": np.ones(20), "offset": 0}),
        "own": (np.zeros((20, 3), int) + np.arange(3), {"fill": np.ones(20)}),
    }
    for name, (columns, options) in cases.items():
        made = sa.SampledAttention(columns, np.ones((20, 3)), 20, **options)
        assert made.rank_bound == {"shared": 4, "rows": 5, "causal": 20, "own": 20}[name]
        assert made.effective_rank == 3


def test_a_product_of_factors_knows_what_its_factors_are() -> None:
    rng = np.random.default_rng(0)
    counts = np.bincount(LABELS, minlength=5)
    means = Assignment(LABELS, 5, 1.0 / counts[LABELS], transpose=True)
    spread = Assignment(LABELS, 5)
    core = rng.random((5, 5))
    core /= core.sum(axis=1, keepdims=True)
    softmax = make_problem(5, 7).exact
    shares = np.array([0.25, 0.5, 1.0, 1.0, 1.0, 0.75, 0.5])
    # Factor p, whether it is non-negative and whether row-stochastic.
    cases: list[tuple[Any, bool, bool]] = [
        (softmax, True, True),
        (softmax.to_dense(), True, True),
        (softmax.to_dense() * 1.001, True, False),
        (softmax.to_dense() - 0.2, False, False),
        (make_problem(5, 7, key_mask=np.zeros(7, bool)).exact, True, False),
        (means, True, False),  # two of its rows are empty
        (Assignment(LABELS, 5, transpose=True), True, False),  # sums in place of means
        (Assignment(np.arange(7) % 5, 5, shares, transpose=True), True, True),
        (Assignment(LABELS, 5, -np.ones(7), transpose=True), False, False),
    ]
    for p, nonnegative, stochastic in cases:
        for s in (None, core):
            a = sa.FactoredAttention(spread, s, p)
            assert (a.nonnegative, a.row_stochastic) == (nonnegative, stochastic)
            dense = a.to_dense()
            assert not nonnegative or (dense >= 0).all()
            assert not stochastic or np.abs(dense.sum(axis=1) - 1).max() <= 1e-14
    assert spread.row_stochastic
    assert not Assignment(LABELS, 5, np.full(7, 0.9)).row_stochastic
    # A core with a negative entry, one whose rows sum to 1/2, and a diagonal that is no identity.
    for s in (core - 0.3, 0.5 * core, np.arange(5) / 4):
        assert not sa.FactoredAttention(spread, s, softmax).row_stochastic
    assert not sa.FactoredAttention(spread, core - 0.3, softmax).nonnegative
    assert sa.FactoredAttention(spread, np.ones(5), softmax).row_stochastic
    # Three labels are used: no product of these has a larger rank.
    assert sa.FactoredAttention(spread, core, softmax).rank_bound == 3
    assert Assignment(LABELS, 5, np.zeros(7)).rank_bound == 0


def test_products_of_factors_never_form_the_matrix() -> None:
    """At this size the matrix would have 10^12 entries."""
    n, r = 1_000_000, 4
    labels = np.arange(n) % r
    means = Assignment(labels, r, np.full(n, r / n), transpose=True)
    a = sa.FactoredAttention(Assignment(labels, r), np.eye(r)[::-1], means)
    x = np.ones((n, 1))
    x[labels == 0] = 5
    out = a @ x
    assert np.abs(out[:r, 0] - [1, 1, 1, 5]).max() <= n * unit_roundoff(np.float64) * 5
    assert np.abs(a.T @ out).sum() > 0
    assert a.nbytes <= 64 * n


def test_rows_of_weight_zero_are_not_read() -> None:
    weights = np.array([1.0, 1.0, 0.0])
    x = np.array([[1.0], [2.0], [np.nan]])
    sums = Assignment(np.array([0, 1, 0]), 2, weights, transpose=True)
    assert (sums @ x).tolist() == [[1.0], [2.0]]
    assert (sums.T @ np.array([[np.inf], [3.0]])).tolist() == [[np.inf], [3.0], [0.0]]


def test_sums_do_not_depend_on_the_number_of_threads() -> None:
    rng = np.random.default_rng(0)
    labels, x = rng.integers(0, 30, 20_000), rng.standard_normal((20_000, 16), np.float32)
    sums = []
    for count in (1, 2):
        with limit_threads(count):
            sums.append(Assignment(labels, 30, transpose=True, dtype=np.float32) @ x)
    assert np.array_equal(sums[0], sums[1])


@pytest.mark.parametrize(
    ("labels", "options", "error", "text"),
    [
        (
            np.array([0, 3]),
            {},
            ValueError,
            "labels must be in 0..r - 1 = 2, got 0 to 3; raise r",
        ),
        (
            np.array([-1, 2]),
            {},
            ValueError,
            "labels must be in 0..r - 1 = 2, got -1 to 2; raise r",
        ),
        (
            np.array([0.0, 1.0]),
            {},
            TypeError,
            "labels must be a one-dimensional integer array, got float64 of shape (2,); give a "
            "column for each row",
        ),
        (
            np.array([0, 1]),
            {"weights": np.ones(3)},
            ValueError,
            "weights must have shape (n,) = (2,), got (3,); give one for each label",
        ),
    ],
)
def test_labels_that_do_not_fit_are_refused(
    labels: Array, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=message(text)):
        Assignment(labels, 3, **options)


def test_an_operator_without_products_says_so() -> None:
    class Bare(sa.AttentionOperator):
        pass

    bare = Bare((2, 3), np.float64)
    with pytest.raises(TypeError, match=message("Bare must define its product A X")):
        bare @ np.ones(3)
    with pytest.raises(TypeError, match=message("Bare must define its product A^T Y")):
        bare.rows(0)
    assert (bare.rank_bound, bare.nbytes, bare.effective_rank, bare.path) == (2, 0, None, "sketch")


def test_an_operator_needs_no_more_than_its_products() -> None:
    dense = np.random.default_rng(0).standard_normal((4, 6))

    class Minimal(sa.AttentionOperator):
        def _matmat(self, x: Array) -> Array:
            return dense @ x

        def _rmatmat(self, y: Array) -> Array:
            return dense.T @ y

    a = Minimal(dense.shape, np.float64, effective_rank=2)
    assert a.effective_rank == 2
    assert np.allclose(a.to_dense(), dense, rtol=1e-15)
    assert np.allclose(a.rows([3, 1]), dense[[3, 1]], rtol=1e-15)
    assert np.allclose(a.columns([5, -6]), dense[:, [5, 0]], rtol=1e-15)
    assert np.allclose(a @ np.ones(6), a.row_sums(), rtol=1e-15)


# --- what may stand for an approximation --------------------------------------------------------


class ByArray:
    def __array__(self, dtype: Any = None, copy: Any = None) -> Array:
        return np.full((3, 4), 0.25)


@pytest.mark.parametrize(
    "ahat",
    [
        np.full((3, 4), 0.25),
        np.full((3, 4), 0.25, np.float32),
        np.full((3, 4), 0.25, np.float16),
        [[0.25] * 4] * 3,
        ByArray(),
        aslinearoperator(np.full((3, 4), 0.25)),
        DenseAttention(np.full((3, 4), 0.25)),
        np.asfortranarray(np.full((3, 4), 0.25))[:, ::-1],
    ],
)
def test_what_is_accepted_as_an_approximation(ahat: Any) -> None:
    a = as_operator(ahat, make_problem(3, 4))
    assert isinstance(a, sa.AttentionOperator)
    assert a.to_dense().tolist() == [[0.25] * 4] * 3
    assert as_operator(a, make_problem(3, 4)) is a


def no_adjoint() -> LinearOperator[Any]:
    return LinearOperator((3, 4), matvec=lambda x: np.zeros(3), dtype=np.dtype(np.float64))


@pytest.mark.parametrize(
    ("ahat", "error", "text"),
    [
        (
            np.ones((4, 3)),
            ValueError,
            "ahat must have the shape (3, 4) of the problem, got (4, 3); "
            "approximate the same problem",
        ),
        (
            aslinearoperator(np.ones((3, 3))),
            ValueError,
            "ahat must have the shape (3, 4) of the problem, got (3, 3); "
            "approximate the same problem",
        ),
        (
            np.ones((1, 3, 4)),
            ValueError,
            "ahat must be a matrix of shape (3, 4), got shape (1, 3, 4); "
            "a report is about one head",
        ),
        (
            1.0,
            ValueError,
            "ahat must be a matrix of shape (3, 4), got shape (); a report is about one head",
        ),
        (
            np.ones((3, 4), int),
            TypeError,
            "ahat must be float16, bfloat16, float32 or float64, got int64; "
            "convert it with astype(np.float32)",
        ),
        (
            np.ones((3, 4)) * 1j,
            TypeError,
            "ahat must be float16, bfloat16, float32 or float64, got complex128; "
            "convert it with astype(np.float32)",
        ),
        (
            aslinearoperator(np.ones((3, 4)) * 1j),
            TypeError,
            "ahat must be real, got complex128; pass its real part",
        ),
        (
            np.where(np.arange(12).reshape(3, 4) == 6, np.nan, 1.0),
            ValueError,
            "ahat must be finite, got nan at index (1, 2); replace it, or hide its key with a mask",
        ),
        (
            np.ma.masked_array(np.ones((3, 4))),
            TypeError,
            "ahat must be a plain array, got a masked array; pass its data and use key_mask",
        ),
    ],
)
def test_what_is_refused_as_an_approximation(ahat: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=message(text)):
        as_operator(ahat, make_problem(3, 4))


def test_an_approximation_without_a_transposed_product_is_refused() -> None:
    with pytest.raises(TypeError) as caught:
        as_operator(no_adjoint(), make_problem(3, 4))
    begin = "ahat must have its transposed product, got _CustomLinearOperator whose rmatvec fails ("
    assert str(caught.value).startswith(begin)
    assert str(caught.value).endswith("); define rmatvec or pass an array")
