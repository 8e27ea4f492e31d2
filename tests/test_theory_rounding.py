"""No claim takes rounding for a violation, however ill-conditioned a head is; small errors show."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import sketchattn as sa
from sketchattn import theory
from sketchattn.theory.engine.checking import default_factory, run
from sketchattn.theory.engine.instances import Instance, get_instance
from sketchattn.theory.engine.records import Observations
from sketchattn.theory.engine.registry import get_entry
from sketchattn.theory.lowrank_baselines import nystrom_claims
from sketchattn.theory.lowrank_baselines.residuals import inverted_after
from sketchattn.zoo.nystromformer import iterate_inverse

Array = NDArray[Any]

pytestmark = pytest.mark.usefixtures("one_thread")

# Families at the temperatures where cores are ill-conditioned, weights underflow or rows are equal.
HARD: tuple[tuple[str, dict[str, float]], ...] = (
    ("ar1", {"logit_std": 20.0}),
    ("gaussian", {"logit_std": 30.0}),
    ("near_permutation", {"sharpness": 60.0}),
    ("low_rank", {"logit_std": 10.0}),
    ("duplicates", {}),
)
OTHERS: tuple[tuple[str, dict[str, float]], ...] = (
    ("gaussian", {}),
    ("gaussian", {"logit_std": 0.05}),
    ("gaussian", {"logit_std": 1e-6}),
    ("gaussian", {"logit_std": 1000.0}),
    ("peaked", {}),
    ("clustered", {}),
    ("clustered", {"spread": 4.0}),
    ("ar1", {}),
    ("near_permutation", {}),
    ("low_rank", {}),
    ("attention_sink", {}),
)


def made(n: int, d: int, families: Any) -> Iterator[tuple[str, sa.AttentionProblem]]:
    for i, (family, parameters) in enumerate(families):
        dtype = (np.float32, np.float64)[i % 2]
        heads = sa.make_heads(family, n=n, d=d, rng=8 + 10 * i, dtype=dtype, **parameters)
        yield f"{family} {parameters} n={n} {np.dtype(dtype)}", heads[0]


def cut(n: int, which: range) -> Iterator[tuple[str, sa.AttentionProblem]]:
    """Yield the first tokens of bundled heads."""
    for head in (sa.load_heads()[i] for i in which):
        q, k, v = (np.asarray(x, np.float32)[:n] for x in head.arrays)
        yield f"{head.name}, {n} tokens", sa.AttentionProblem(q, k, v, scale=head.scale)


def violations(name: str, problem: sa.AttentionProblem) -> list[str]:
    """Return theorems that are reported as violated on a head, of a few trials."""
    seen = Instance(name, problem)
    found = []
    for claim, record in theory.claims().items():
        if record.status == "refuted":
            continue
        entry = get_entry(claim)
        verdict = run(entry, seen, 4, 0.95, 0, entry.parameters)
        if verdict.status == "violated":
            found.append(str(verdict))
    return found


SMALL = [*made(48, 8, HARD), *cut(32, range(0, 12, 6))]
MANY = [*made(32, 4, OTHERS), *made(64, 16, HARD), *made(48, 8, OTHERS), *cut(96, range(12))]


@pytest.mark.parametrize(("name", "problem"), SMALL, ids=[name for name, _ in SMALL])
def test_rounding_violates_no_theorem(name: str, problem: sa.AttentionProblem) -> None:
    assert not violations(name, problem)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "problem"), MANY, ids=[name for name, _ in MANY])
def test_rounding_violates_no_theorem_on_many_heads(
    name: str, problem: sa.AttentionProblem
) -> None:
    assert not violations(name, problem)


# --- what is computed of ill-conditioned cores ------------------------------------------------


def test_the_filter_keeps_its_digits_where_singular_values_are_small() -> None:
    # 1 - f(1 - t) by exact fractions: for t of 1e-14 all digits of the difference would be lost.
    from fractions import Fraction

    for start in (1e-30, 1e-14, 1e-6, 0.3, 1.0):
        t = Fraction(start)
        for j in range(4):
            found = float(inverted_after(np.array(start), j))
            assert found == pytest.approx(float(t), rel=1e-14)
            e = 1 - t
            t = 1 - (3 * e**3 + e**4) / 4


def test_of_violations_one_beyond_rounding_is_named() -> None:
    entry = get_entry("lowrank_baselines.iteration_filter")
    seen = Observations([1e-11, 3e-6, 1e-6], 0.0, rounding=1e-8)
    broken = entry._replace(observe=lambda context: seen)
    verdict = run(broken, get_instance("worked"), 4, 0.95, 0, {})
    assert (verdict.status, verdict.failures, verdict.observed) == ("violated", 2, 3e-6)


# --- small errors are still seen ----------------------------------------------------------------


def planted(change: Callable[[Array], Array]) -> Callable[..., Any]:
    """Return an implementation of the kinds that claims on A, Z and Ahat hand out, off by a bit."""

    def factory(kind: str, r: int, n: int, rng: np.random.Generator, **given: Any) -> Any:
        if kind == "inverse":
            return change(iterate_inverse(given["m"], given["iterations"]))
        if kind == "nystromformer":
            both = given["landmarks"]
            method = sa.Nystromformer(r, landmarks=both, iterations=given["iterations"])
            return change(method.approximate(given["problem"]).to_dense())
        if kind == "softmax":
            logits = given["logits"] - given["logits"].max(axis=1, keepdims=True)
            weights = np.exp(logits)
            return change(np.asarray(weights / weights.sum(axis=1, keepdims=True)))
        if kind == "clustered":
            found = clustered(given["problem"], given["labels"], given["top_keys"])
            return change(found)
        return default_factory(kind, r, n, rng, **given)

    return factory


def clustered(problem: sa.AttentionProblem, labels: Array, top: int | None) -> Array:
    """Write clustered attention from its definition."""
    logits = problem.scale * problem.q @ problem.k.T
    exact = np.exp(logits - logits.max(axis=1, keepdims=True))
    exact /= exact.sum(axis=1, keepdims=True)
    out: Array = np.empty_like(exact)
    for c in np.unique(labels):
        mine = labels == c
        row = problem.scale * problem.q[mine].mean(axis=0) @ problem.k.T
        weights = np.exp(row - row.max())
        weights /= weights.sum()
        out[mine] = weights
        if top is not None:
            keys = np.argsort(-weights, kind="stable")[:top]
            shares = np.exp(logits[mine][:, keys] - logits[mine][:, keys].max(axis=1)[:, None])
            shares *= weights[keys].sum() / shares.sum(axis=1, keepdims=True)
            out[np.ix_(mine, keys)] = shares
    return out


def larger(x: Array) -> Array:
    out: Array = x * (1 + 1e-6)
    return out


PLANTED = [
    "lowrank_baselines.iteration_filter",
    "lowrank_baselines.residual_norm",
    "lowrank_baselines.residual_recursion",
    "lowrank_baselines.every_token",
    "lowrank_baselines.queries_suffice",
    "lowrank_baselines.row_sums",
    "lowrank_baselines.clustered_geometric",
    "lowrank_baselines.clustered_full",
    "softmax.stochastic",
]


@pytest.mark.parametrize("name", PLANTED)
def test_an_error_of_one_in_a_million_is_seen(name: str) -> None:
    problem = sa.make_heads("gaussian", n=32, d=8, rng=1, dtype=np.float64)[0]
    assert theory.check(name, problem, trials=4).status == "holds"
    assert theory.check(name, problem, trials=4, sketch=planted(lambda x: x)).status == "holds"
    broken = theory.check(name, problem, trials=4, sketch=planted(larger))
    assert broken.status == "violated", str(broken)


def test_the_tolerance_of_the_filter_does_not_grow_with_the_condition() -> None:
    hard = next(made(48, 8, HARD))[1]
    name = "lowrank_baselines.iteration_filter"
    core = nystrom_claims._core(_context_of(name, hard), None)
    assert np.linalg.cond(core) > 1e10
    assert theory.check(name, hard).status == "holds"
    assert theory.check(name, hard, sketch=planted(larger)).status == "violated"


def _context_of(name: str, problem: sa.AttentionProblem) -> Any:
    from sketchattn.theory.engine.checking import _context

    return _context(get_entry(name), Instance("hard", problem), 1, 0, None)
