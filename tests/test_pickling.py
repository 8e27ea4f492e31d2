"""What users hold can be pickled and copied, and comes back equal."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import pytest
from method_cases import CASES, IDS, MethodCase, make_problem, supports
from scipy.sparse import issparse

import sketchattn as sa
from sketchattn.partitions import make_plan
from sketchattn.sampling import kmeans, sample_columns
from sketchattn.sketches import make_sketch, sketches

PRECISIONS = [np.float32, np.float64]
WAYS: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "old pickle": lambda x: pickle.loads(pickle.dumps(x, protocol=2)),
    "deepcopy": copy.deepcopy,
}
every_way = pytest.mark.parametrize("through", WAYS.values(), ids=WAYS)

pytestmark = pytest.mark.usefixtures("one_thread")


def equal(x: Any, y: Any) -> bool:
    """Say whether two values are of one type and hold the same, down to the bits of arrays."""
    if type(x) is not type(y):
        return False
    if isinstance(x, np.ndarray):
        return x.dtype == y.dtype and np.array_equal(x, y, equal_nan=x.dtype.kind == "f")
    if issparse(x):
        return bool(abs(x - y).nnz == 0)
    if isinstance(x, sa.AttentionOperator):
        return equal(x.to_dense(), y.to_dense())
    if isinstance(x, sa.AttentionProblem):
        return bool(x.digest == y.digest)
    if isinstance(x, sa.theory.Instance):
        return equal((x.name, x.a, x.v), (y.name, y.a, y.v))
    if isinstance(x, sa.Method):
        return equal(x.get_params(), y.get_params())
    if isinstance(x, Mapping):
        return list(x) == list(y) and all(equal(x[name], y[name]) for name in x)
    if isinstance(x, tuple | list):
        return len(x) == len(y) and all(map(equal, x, y))
    if dataclasses.is_dataclass(x):
        return all(equal(getattr(x, f.name), getattr(y, f.name)) for f in dataclasses.fields(x))
    if isinstance(x, pd.DataFrame):
        return bool(x.equals(y))
    if isinstance(x, float) and np.isnan(x):
        return bool(np.isnan(y))
    return bool(x == y)


@every_way
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_methods_draws_and_approximations(
    case: MethodCase, dtype: Any, through: Callable[[Any], Any]
) -> None:
    options: list[dict[str, Any]] = [{}, {"causal": True}, {"key_mask": np.arange(8) != 2}]
    problems = [make_problem(8, 8, dtype, **x) for x in options]
    method = case(3)
    assert equal(through(method), method)
    for problem in problems:
        if not supports(case, problem):
            continue
        draw = method.draw(problem, rng=0)
        assert equal(through(draw), draw)
        ahat = method.approximate(problem, draw=draw)
        ahat.row_sums()
        sa.error_report(problem, ahat, path="streaming", spectral=False)  # what it keeps is there
        assert equal(through(problem), problem)
        assert equal(through(problem.exact), problem.exact)
        again = through(ahat)
        x, y = problem.values, np.ones((problem.n_q, 2), dtype)
        assert equal(again, ahat)
        assert np.array_equal(again @ x, ahat @ x)
        assert np.array_equal(again.T @ y, ahat.T @ y)
        assert equal(through(again.wide()), ahat.wide())  # the copy can still be widened
        assert (again.dtype, again.shape, again.path) == (ahat.dtype, ahat.shape, ahat.path)
        assert (again.effective_rank, again.rank_bound) == (ahat.effective_rank, ahat.rank_bound)


def problem() -> sa.AttentionProblem:
    return make_problem(12, 12)


def combined() -> Any:
    return sa.Combiner(rank=3).approximate(problem(), rng=0)


SMALL = [make_problem(8, 8, seed=seed, name=f"head{seed}") for seed in (0, 1)]
RECORDS: dict[str, Callable[[], Any]] = {
    "traits": lambda: sa.TopK(rank=2).traits,
    "plan": lambda: make_plan("fixed", 12, block=4),
    "plan of an operator": lambda: combined().plan,
    "describe": lambda: sa.describe(problem()),
    "error_report": lambda: sa.error_report(
        problem(), sa.TopK(rank=4).approximate(problem()), spectral=True
    ),
    "certify": lambda: sa.certify(problem(), problem().output, rng=0),
    "certify_rows": lambda: sa.certify_rows(combined()),
    "sample_columns": lambda: sample_columns(
        np.full(12, 1 / 12), 4, np.random.default_rng(0), replace=True
    ),
    "kmeans": lambda: kmeans(problem().k, 3, 0),
    "Skeinformer.details": lambda: sa.Skeinformer(rank=4).details(problem(), rng=0),
    "error_terms": lambda: sa.Skeinformer(rank=4, pilot_reuse=False).error_terms(problem(), rng=0),
    "selection_regret": lambda: sa.selection_regret(problem(), np.arange(3)),
    "Performer.details": lambda: sa.Performer(rank=4).details(problem(), rng=0),
    "Nystromformer.details": lambda: sa.Nystromformer(rank=4).details(problem(), rng=0),
    "fit_compression": lambda: sa.compression.fit_compression(problem(), 2, "svd"),
    "fit_linformer": lambda: sa.fit_linformer(SMALL, rank=3),
    "recommend": lambda: sa.recommend(SMALL, 0.5, methods=["uniform"], progress=False),
    "study": lambda: sa.study(SMALL, methods=["topk"], ranks=[2, 4], seeds=1, progress=False),
    "claim": lambda: sa.theory.claims()["softmax.hull"],
    "claims": lambda: dict(sa.theory.claims()),
    "verdict": lambda: sa.theory.check("softmax.hull", trials=10),
    "instance": lambda: sa.theory.instances()["enumeration"],
    "error_bounds": lambda: sa.theory.error_bounds(),
}


@every_way
@pytest.mark.parametrize("name", RECORDS)
def test_records(name: str, through: Callable[[Any], Any]) -> None:
    made = RECORDS[name]()
    assert equal(through(made), made)


@every_way
@pytest.mark.parametrize("kind", sketches())
def test_sketches(kind: str, through: Callable[[Any], Any]) -> None:
    sketch = make_sketch(kind, 4, 12, rng=0)
    x = np.arange(24.0).reshape(12, 2)
    again = through(sketch)
    assert np.array_equal(again @ x, sketch @ x)
    assert np.array_equal(again.T @ x[:4], sketch.T @ x[:4])
    product = sa.ProductSketch(problem(), sketch)
    assert np.array_equal(through(product) @ x, product @ x)


@every_way
def test_heads(through: Callable[[Any], Any]) -> None:
    heads = sa.make_heads("gaussian", n=12, d=4, rng=0)
    again = through(heads)
    assert [x.digest for x in again] == [x.digest for x in heads]
    assert [x.name for x in again] == [x.name for x in heads]
