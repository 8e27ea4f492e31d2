"""Claims about keys drawn with known probabilities: record, broken versions, odd problems."""

from __future__ import annotations

import math
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
    claims_of,
    on_heads,
    recorded_pairs,
    refuted,
)
from numpy.typing import NDArray
from scipy.stats import binom, norm

import sketchattn as sa
from sketchattn.theory import Claim
from sketchattn.theory.engine.checking import check
from sketchattn.theory.training_free.sampled import (
    composed_error,
    floor_mean,
    joint_probability,
    merged_mean,
    row_statistics,
)
from sketchattn.zoo import magicpig, vattention

Array = NDArray[Any]

MINE = set(magicpig.CLAIMS) | set(vattention.CLAIMS)
CLAIMS: dict[str, Claim] = {x: c for x, c in claims_of("training_free").items() if x in MINE}
REFUTED = refuted(CLAIMS)

# --- the record -----------------------------------------------------------------------------------


@pytest.mark.statistical
@pytest.mark.parametrize(("name", "on"), recorded_pairs(CLAIMS))
def test_recorded_verdicts(name: str, on: str, global_random_seed: int) -> None:
    # Means alarm at |z| > 5; rates are 0, or above the lower limit by five deviations.
    check_recorded(CLAIMS, name, on, rng=global_random_seed)


@pytest.mark.statistical
@pytest.mark.parametrize("name", on_heads(CLAIMS))
def test_recorded_verdicts_on_bundled_heads(name: str, global_random_seed: int) -> None:
    head = sa.load_heads()[global_random_seed % 12]
    verdict = check(name, head, trials=60, rng=global_random_seed)
    assert verdict.status == CLAIMS[name].recorded["heads"], str(verdict)


def test_statuses() -> None:
    assert set(CLAIMS) == MINE
    assert {c.status for c in CLAIMS.values()} == {"published", "derived", "refuted"}
    check_statuses(CLAIMS)


# --- negative controls ----------------------------------------------------------------------------


def units(x: Array) -> Array:
    return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True))


def chances(problem: Any, bits: int, tables: int, least: int) -> Array:
    y = problem.k - problem.k.mean(axis=0)
    angles = np.arccos(np.clip(units(problem.q) @ units(y).T, -1, 1))
    return np.asarray(binom.sf(least - 1, tables, (1 - angles / math.pi) ** bits))


def honest(kind: str, r: int, n: int, rng: np.random.Generator, **given: Any) -> Any:
    """Write everything from its definition."""
    if kind == "draws":
        return rng.integers(0, n, r)
    if kind == "ratio":
        return given["numerator"] / given["denominator"][:, None]
    if kind == "budget":
        z = norm.ppf(1 - given["delta"] / 2)
        size, allowed = given["size"], given["eps"] * given["total"] / z
        if given["replace"]:
            return (size * given["deviation"] / allowed) ** 2
        square = size * given["deviation"] ** 2 / (size - 1)
        return 1 / (1 / size + allowed**2 / (size**2 * square))
    problem = given["problem"]
    a = problem.exact.to_dense()
    if kind == "part":
        u = chances(problem, given["bits"], given["tables"], r)[given["row"]]
        return np.sum(a[given["row"]] ** 2 * (1 / u - 1))
    if kind == "magicpig":
        bits, least = given["bits"], given["least"]
        u = chances(problem, bits, r, least)
        planes = rng.standard_normal((problem.d, r, bits))
        y = problem.k - problem.k.mean(axis=0)
        q, k = (np.tensordot(x, planes, 1) > 0 for x in (problem.q, y))
        agree = np.array([(row == k).all(axis=2).sum(axis=1) for row in q])
        return np.where(agree >= least, a / (u + given["floor"]), 0)
    assert kind == "vattention"
    out = np.zeros(a.shape)
    top = given.get("top", r // 2)
    for i, row in enumerate(a):
        order = np.argsort(-row, kind="stable")
        rest = order[top:]
        out[i, order[:top]] = row[order[:top]]
        if not len(rest):
            continue
        b = budget_of(row, rest, top, order, r, given)
        b = min(max(1, math.ceil(b)), len(rest))
        if given.get("replace"):
            counts = np.bincount(rng.choice(rest, b), minlength=len(row))
            out[i] += counts * row * len(rest) / b
        else:
            drawn = rng.permutation(rest)[:b]
            out[i, drawn] = row[drawn] * len(rest) / b
    return out


def budget_of(row: Array, rest: Array, top: int, order: Array, r: int, given: Any) -> float:
    """Return the draws of a row, not rounded."""
    name, size = given.get("budget", "fixed"), len(rest)
    if name == "fixed":
        return r - top
    eps, delta = given["eps"], given["delta"]
    if name == "known":
        spread = row[rest].std(ddof=1) if size > 1 else 0.0
        z = norm.ppf(1 - delta / 2)
        return 0.0 if spread == 0 else 1 / (1 / size + (eps / (z * size * spread)) ** 2)
    assert name == "hoeffding-serfling"
    share = size * row[order[top - 1]] / (eps * row[order[:top]].sum())
    x = math.log(2 / delta) * share**2 / 2
    return float(x * (1 + 1 / size) / (1 + x / size))


def changed(**changes: Any) -> Factory:
    """Return an implementation that takes other parameters than it is given."""

    def broken(kind: str, r: int, n: int, rng: np.random.Generator, **given: Any) -> Any:
        return honest(kind, r, n, rng, **{**given, **changes})

    return broken


def fewer_tables(kind: str, r: int, n: int, rng: np.random.Generator, **given: Any) -> Any:
    return honest(kind, r // 2, n, rng, **given)


def independent(kind: str, r: int, n: int, rng: np.random.Generator, **given: Any) -> Any:
    """Keep keys independently of each other, each with its probability."""
    problem = given["problem"]
    u = chances(problem, given["bits"], r, given["least"])
    return np.where(rng.random(u.shape) < u, problem.exact.to_dense() / u, 0)


def swapped(kind: str, r: int, n: int, rng: np.random.Generator, **given: Any) -> Any:
    return honest(kind, 3 - r, n, rng, **given)


def unweighted(kind: str, r: int, n: int, rng: np.random.Generator, **given: Any) -> Any:
    """Give the sampled keys the weight of one key each."""
    found = honest(kind, r, n, rng, **given)
    return np.minimum(found, given["problem"].exact.to_dense())


def distinct(kind: str, r: int, n: int, rng: np.random.Generator, **given: Any) -> Any:
    return rng.permutation(n)[:r]


def one_sided(kind: str, r: int, n: int, rng: np.random.Generator, **given: Any) -> Any:
    return honest(kind, r, n, rng, **{**given, "delta": 2 * given["delta"]})


def longer(kind: str, r: int, n: int, rng: np.random.Generator, **given: Any) -> Any:
    return 1.1 * honest(kind, r, n, rng, **given)


CONTROLS: list[tuple[str, str, Factory]] = [
    ("magicpig_unbiased", "gaussian-64", changed(floor=0.1)),
    ("magicpig_unbiased", "gaussian-64", unweighted),
    ("magicpig_joint", "gaussian-64", fewer_tables),
    ("magicpig_joint", "gaussian-64", independent),
    ("magicpig_variance", "gaussian-64", independent),
    ("magicpig_floor_bias", "gaussian-64", changed(floor=0.0)),
    ("magicpig_two_tables", "gaussian-64", swapped),
    ("vattention_unbiased", "gaussian-64", unweighted),
    ("vattention_unbiased", "gaussian-64", longer),
    ("vattention_known_coverage", "gaussian-64", changed(eps=0.3)),
    ("vattention_hoeffding_coverage", "gaussian-64", changed(budget="known", eps=1.0)),
    ("vattention_merged_mean", "gaussian-64", distinct),
    ("vattention_budget_order", "gaussian-64", one_sided),
    ("composition", "gaussian-64", longer),
]


@pytest.mark.parametrize(("name", "on", "broken"), CONTROLS)
def test_broken_implementations_are_reported(name: str, on: str, broken: Factory) -> None:
    check_reported(f"training_free.{name}", on, broken)


@pytest.mark.parametrize(("name", "on"), sorted({(name, on) for name, on, _ in CONTROLS}))
def test_an_implementation_from_the_definition_is_not_reported(name: str, on: str) -> None:
    check_not_reported(f"training_free.{name}", on, honest)


def test_every_theorem_has_a_control() -> None:
    assert {f"training_free.{name}" for name, _, _ in CONTROLS} == set(CLAIMS) - REFUTED


# --- odd problems ---------------------------------------------------------------------------------


def test_odd_problems_get_a_verdict() -> None:
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((5, 3)), rng.standard_normal((9, 3)), rng.standard_normal((9, 2))
    mask = np.arange(9) % 3 > 0
    odd = [
        sa.AttentionProblem(q[:1], k[:1], v[:1], name="one"),
        sa.AttentionProblem(q, k[:2], v[:2], name="two"),
        sa.AttentionProblem(q, k, v, key_mask=mask, name="masked"),
        sa.AttentionProblem(q, k, np.zeros((9, 2)), name="zero values"),
        sa.AttentionProblem(q, k, name="no values"),
        sa.AttentionProblem(k, k, v, causal=True, name="causal"),
        sa.AttentionProblem(1e3 * q, k, v, name="large logits"),
        sa.AttentionProblem(0 * q, k, v, name="uniform"),
        sa.AttentionProblem(q, np.repeat(k[:1], 9, axis=0), v, name="equal keys"),
        sa.AttentionProblem(q, k, v, key_mask=np.zeros(9, bool), name="no keys"),
    ]
    check_odd(CLAIMS, odd, trials=60)


@pytest.mark.parametrize("name", sorted(CLAIMS))
def test_verdicts_repeat_and_bounds_need_no_draw(name: str) -> None:
    check_repeats(CLAIMS, name, trials=20)


def test_refusals() -> None:
    problem = sa.make_heads("gaussian", n=8, d=4, rng=0)[0]
    for call in (
        lambda: joint_probability(problem, 0, bits=4, tables=16, least=3),
        lambda: joint_probability(problem, 0, bits=4, tables=1, least=2),
        lambda: floor_mean(problem, bits=4, tables=16, floor=-1.0),
        lambda: merged_mean(0, 3),
        lambda: composed_error(0.1, 1.0),
        lambda: row_statistics(problem, 0),
    ):
        with pytest.raises(ValueError, match=r"^(least|tables|floor|n|denominator|top) must"):
            call()
