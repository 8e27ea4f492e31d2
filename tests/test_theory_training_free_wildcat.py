"""Claims about WildCat: worked numbers, recorded verdicts, and broken versions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from claim_cases import (
    Factory,
    check_not_reported,
    check_odd,
    check_recorded,
    check_repeats,
    check_reported,
    check_statuses,
    on_heads,
    problem_on,
    recorded_pairs,
)
from numpy.typing import NDArray

import sketchattn as sa
from sketchattn import theory
from sketchattn.theory.training_free import trace_bound, trace_share
from sketchattn.theory.training_free.wildcat import keys_of, projected
from sketchattn.zoo.wildcat import Coreset, WildCat

Array = NDArray[Any]

CLAIMS = {x: c for x, c in theory.claims().items() if x.startswith("training_free.wildcat_")}
RECORDED = recorded_pairs(CLAIMS)

pytestmark = pytest.mark.usefixtures("one_thread")


# --- worked numbers -------------------------------------------------------------------------------


def test_trace_bound_is_the_best_over_a_grid() -> None:
    for decay, r in ((0.5, 16), (0.8, 40), (0.97, 20), (0.9, 3)):
        eigenvalues = decay ** np.arange(200)
        best, total = 1.0, float(eigenvalues.sum())
        for k in range(1, 200):
            eta = float(eigenvalues[k:].sum()) / total
            for eps in np.geomspace(1e-4, 1e4, 4001):
                if r >= k / eps + k * math.log(1 / (eps * eta)):
                    best = min(best, (1 + eps) * eta)
                    break
        found = trace_bound(eigenvalues, r)
        assert found <= best
        assert found == pytest.approx(best, rel=5e-3)  # steps of the grid are 0.46 %


def test_trace_shares_of_bundled_heads_are_the_published_ones() -> None:
    heads = sa.load_heads("minilm")
    shares = {0: (0.340, 0.619, 0.192), 5: (0.286, 0.522, 0.157), 8: (0.322, 0.558, 0.187)}
    for h, (share, bound, least) in shares.items():
        keys = keys_of(heads[h].astype(np.float64))
        kernel = np.exp(keys.z @ keys.z.T - 2 * keys.half.max())
        eigenvalues = np.maximum(np.linalg.eigvalsh(kernel), 0)
        found = trace_bound(eigenvalues, 64)
        # The page looks over a grid of k and eps, which is a little worse.
        assert bound - 0.006 <= found <= bound
        floor = float(np.sort(eigenvalues)[:-64].sum() / eigenvalues.sum())
        assert floor == pytest.approx(least, abs=6e-4)
        drawn = [
            trace_share(keys, WildCat(64).draw(heads[h], seed)["pivots"]) for seed in range(20)
        ]
        assert np.mean(drawn) == pytest.approx(share, abs=0.01)
        assert floor < min(drawn)
        assert max(drawn) < found


def test_two_ways_to_what_pivots_leave() -> None:
    problem = problem_on("wildcat-golden")
    keys = keys_of(problem)
    pivots = np.random.default_rng(0).permutation(64)[:20]
    left = projected(keys, keys.z, pivots)[1]
    assert np.abs(Coreset.of(keys, pivots).residuals() - left).max() <= 1e-10
    weight = np.exp(2 * keys.half)
    assert trace_share(keys, pivots) == pytest.approx(weight @ left / weight.sum(), rel=1e-9)


# --- verdicts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "on"), RECORDED)
def test_recorded_verdicts(name: str, on: str, global_random_seed: int) -> None:
    check_recorded(CLAIMS, name, on, rng=global_random_seed, trials=60)


@pytest.mark.parametrize("name", on_heads(CLAIMS))
def test_recorded_verdicts_on_bundled_heads(name: str, global_random_seed: int) -> None:
    heads = sa.load_heads("minilm")
    for head in (heads[0], heads[5], heads[8]):
        verdict = theory.check(name, head, rng=global_random_seed, trials=60)
        assert verdict.status == CLAIMS[name].recorded["heads"], str(verdict)


def test_statuses() -> None:
    check_statuses(CLAIMS)
    assert set(WildCat(4).traits.claims) == set(CLAIMS)
    assert "training_free.wildcat_trace" not in WildCat(4, "uniform").traits.claims


def method_of(
    kind: str, r: int, rng: np.random.Generator, problem: sa.AttentionProblem, **given: Any
) -> Array:
    """Return what the method does, as an implementation that is handed in."""
    if kind == "pivots":
        return np.asarray(WildCat(r).draw(problem, rng)["pivots"])
    if kind == "weights":
        return Coreset.of(keys_of(problem), given["pivots"]).weights()
    return WildCat(r).approximate(problem, draw=given).to_dense()


def honest(kind: str, r: int, n: int, rng: np.random.Generator, **given: Any) -> Array:
    return method_of(kind, r, rng, **given)


def but(wanted: str, change: Callable[..., Array]) -> Factory:
    """Return the method with one of its parts broken."""

    def sketch(kind: str, r: int, n: int, rng: np.random.Generator, **given: Any) -> Array:
        made = method_of(kind, r, rng, **given)
        return change(made, rng=rng, **given) if kind == wanted else made

    return sketch


def not_divided(ahat: Array, *, problem: sa.AttentionProblem, pivots: Array, **_: Any) -> Array:
    weights = Coreset.of(keys_of(problem), pivots).weights()
    left = np.exp(problem.scale * (problem.q @ problem.k[pivots].T))
    return np.asarray(left / left.sum(axis=1, keepdims=True) @ weights)


def uniform_pivots(pivots: Array, *, rng: Any, problem: sa.AttentionProblem, **_: Any) -> Array:
    return np.asarray(rng.permutation(problem.n_k)[: len(pivots)])


def nearest_pivot(
    weights: Array, *, problem: sa.AttentionProblem, pivots: Array, **_: Any
) -> Array:
    gap = np.linalg.norm(problem.k[pivots][:, None] - problem.k[None], axis=2)
    return np.asarray(gap == gap.min(axis=0)).astype(float)


def without_norms(
    weights: Array, *, problem: sa.AttentionProblem, pivots: Array, **_: Any
) -> Array:
    half = keys_of(problem).half
    return np.asarray(weights * np.exp(half[pivots][:, None] - half))


BROKEN: list[tuple[str, str, str, Factory]] = [
    ("row_sums", "wildcat-golden", "not divided", but("wildcat", not_divided)),
    ("row_sums", "wildcat-golden", "zero", but("wildcat", lambda x, **_: 0 * x)),
    ("exact", "wildcat-golden", "mean of V", but("wildcat", lambda x, **_: 0 * x + 1 / x.shape[1])),
    ("exact", "wildcat-golden", "7 of 8", but("pivots", lambda x, **_: x[:7])),
    ("exact", "large-keys", "not divided", but("wildcat", not_divided)),
    ("certificate", "wildcat-golden", "1.01 W", but("weights", lambda x, **_: 1.01 * x)),
    ("certificate", "wildcat-golden", "nearest", but("weights", nearest_pivot)),
    ("certificate", "wildcat-golden", "G in place of exp", but("weights", without_norms)),
    ("certificate", "large-keys", "zero", but("weights", lambda x, **_: 0 * x)),
    ("trace", "large-keys", "uniform", but("pivots", uniform_pivots)),
    ("trace", "clusters", "an eighth", but("pivots", lambda x, **_: x[: len(x) // 16])),
]


@pytest.mark.parametrize(
    ("name", "on", "what", "broken"), BROKEN, ids=[" ".join(x[:3]) for x in BROKEN]
)
def test_broken_versions_are_reported(name: str, on: str, what: str, broken: Factory) -> None:
    check_reported(f"training_free.wildcat_{name}", on, broken, trials=60)


@pytest.mark.parametrize("name", ["row_sums", "exact", "certificate", "trace"])
@pytest.mark.parametrize("on", ["wildcat-golden", "large-keys"])
def test_the_method_handed_in_is_not_reported(name: str, on: str) -> None:
    check_not_reported(f"training_free.wildcat_{name}", on, honest, trials=60)


@pytest.mark.parametrize("name", [x for x in CLAIMS if not x.endswith("rate")])
def test_a_seed_gives_one_verdict(name: str) -> None:
    check_repeats(CLAIMS, name, trials=5)


def test_odd_problems() -> None:
    rng = np.random.default_rng(0)
    one = rng.standard_normal((1, 3))
    q, k, v = (rng.standard_normal((n, 3)) for n in (7, 20, 20))
    problems = [
        sa.AttentionProblem(one, one, one, name="one key"),
        sa.AttentionProblem(q, np.zeros((20, 3)), v, name="equal keys"),
        sa.AttentionProblem(q, k, v, scale=0.0, name="no logits"),
        sa.AttentionProblem(q, k, v, scale=-0.7, name="negative scale"),
        sa.AttentionProblem(q, k, v, key_mask=np.arange(20) > 4, name="masked"),
        sa.AttentionProblem(q, 40 * k, v, name="large keys"),
        sa.AttentionProblem(q, k[:7], v[:7], causal=True, name="causal"),
    ]
    check_odd(CLAIMS, problems, trials=60)
