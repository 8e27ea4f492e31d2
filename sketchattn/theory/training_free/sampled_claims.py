"""Claims: keys drawn with known probabilities, by hashing (MagicPIG) or to a budget (vAttention).

To check another implementation, hand it in as ``sketch``.  It is called as
``sketch("magicpig", L, n_k, rng, problem=problem, bits=bits, least=least, floor=floor)`` and
``sketch("vattention", r, n_k, rng, problem=problem, **parameters)`` with the parameters of
`VAttention`, and returns what a row keeps over the exact denominator, (n_q, n_k):
``e^{L_ij} w_ij/D_i`` with the weight w_ij, zero for keys that are not kept, so that its mean is A
where it is unbiased.

``sketch("part", t, n_k, rng, problem=problem, row=i, bits=bits, tables=L)`` returns ``sum_j A_ij^2
(1/u_ij - 1)`` where t tables must agree, ``sketch("draws", b, n, rng)`` b of n keys with
replacement,
``sketch("budget", 0, n, rng, deviation=sigma, total=D, eps=eps, delta=delta, replace=replace)``
returns a number of draws, and ``sketch("ratio", 0, n, rng, numerator=N, denominator=D)`` N/D.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ...operators.filled import SparseOrMean
from ...problem import AttentionProblem
from ...zoo.magicpig import Choices, MagicPIG, code_probability, collision_probability, hashed
from ...zoo.vattention import VAttention, clt_budget
from ..engine.arguments import Array
from ..engine.assumptions import DENSE, KEYS, VALUES
from ..engine.instances import instance
from ..engine.observers import ROUNDING, few, implemented, is_default, problem_of
from ..engine.records import Observations, Series
from ..engine.registry import Context, claim
from .sampled import (
    DERIVED,
    MAGICPIG,
    VATTENTION,
    composed_error,
    floor_mean,
    joint_probability,
    magicpig_variance,
    merged_mean,
    row_statistics,
)

ON = (DENSE, KEYS)
WITH_VALUES = (DENSE, VALUES, KEYS)
HELD = {"gaussian-64": "holds", "heads": "holds"}
EVERYWHERE = {**HELD, "clusters": "holds"}


@instance("gaussian-64", "64 Gaussian queries and keys, d = 4, d_v = 3, scale 1/2")
def _gaussian_64() -> AttentionProblem:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((64, m)) for m in (4, 4, 3))
    return AttentionProblem(q, k, v)


# --- what observers share ------------------------------------------------------------------------


def _few_rows(context: Context, most: int) -> AttentionProblem:
    """Return the problem with evenly spaced queries only: a row knows nothing of the others."""
    seen = context.instance

    def make() -> AttentionProblem:
        problem = problem_of(seen)
        rows = np.arange(min(problem.n_q, most)) * problem.n_q // min(problem.n_q, most)
        q = np.asarray(problem.q)[rows]
        return AttentionProblem(q, problem.k, problem.v, scale=problem.scale)

    return seen.cached(("few rows", most), make)


def _random_kept(context: Context, bits: int) -> None:
    """End where a vector that is hashed is zero, where a key is never kept, and where all are."""
    q, k = hashed(_few_rows(context, 16), Choices())
    context.require(
        bool((np.abs(q).max(axis=1) > 0).all() and (np.abs(k).max(axis=1) > 0).all()),
        "a query, or a centred key, is zero",
    )
    p = code_probability(q, k, bits)
    context.require(float(p.min()) > 1e-12, "a key is opposite to a query, and never kept")
    context.require(float(p.min()) < 1 - 1e-6, "all keys are parallel to the queries")


def _spread(problem: AttentionProblem, bits: int, tables: int, least: int, floor: float) -> float:
    """Return the deviation of the mean of Dhat_i/D_i if keys and rows were independent.

    Few trials may see no change at all, where a key that matters is nearly always kept.
    """
    u = collision_probability(code_probability(*hashed(problem, Choices()), bits), tables, least)
    parts = (problem.exact.to_dense() / (u + floor)) ** 2 * u * (1 - u)
    return math.sqrt(float(parts.sum())) / problem.n_q


def _kept(
    context: Context,
    kind: str,
    r: int,
    problem: AttentionProblem,
    rng: np.random.Generator,
    **parameters: Any,
) -> Array:
    """Return ``e^{L_ij} w_ij/D_i`` (n_q, n_k) of one draw; which keys are kept tells draws apart.

    A weight that underflows, or is sure to be kept, tells nothing.
    """
    if not is_default(context):
        found = implemented(context, kind, r, rng, problem=problem, **parameters)
    else:
        found = library(kind, r, problem.n_k, rng, problem=problem, **parameters)
    kept = np.flatnonzero(found)
    if kind == "magicpig":
        chance = _alike(problem, r, **parameters)
    else:
        chance = _subset_chance(problem.exact.to_dense(), found)
    context.fingerprint(float(np.sum(np.sqrt(kept + 1.0))), chance)
    return found


def _alike(
    problem: AttentionProblem, tables: int, *, bits: int, least: int, floor: float
) -> float:
    """Return with which chance at most two draws keep the same keys: not even one differs."""
    u = collision_probability(code_probability(*hashed(problem, Choices()), bits), tables, least)
    seen = u[problem.exact.to_dense() / (u + floor) > 0]
    return float((seen**2 + (1 - seen) ** 2).min(initial=1.0))


def _subset_chance(weights: Array, found: Array) -> float:
    """Return the chance of the keys that a row has drawn, all subsets of one size being alike.

    Keys that are sure to be kept have their own weight, and drawn ones a larger one.
    """
    from scipy.special import gammaln

    drawn = found > weights * (1 + 1e-6)
    sure = (found > 0) & ~drawn
    n = np.count_nonzero((weights > 0) & ~sure, axis=1)
    k = np.count_nonzero(drawn & (weights > 0), axis=1)
    return float(np.exp(gammaln(k + 1) + gammaln(n - k + 1) - gammaln(n + 1)).min())


def library(
    kind: str,
    r: int,
    n: int,
    rng: np.random.Generator,
    *,
    problem: AttentionProblem,
    **options: Any,
) -> Array:
    """Return what the library keeps, as it is asked of an implementation that is handed in."""
    # The output of values that are an identity is Ahat.
    unit = AttentionProblem(problem.q, problem.k, np.eye(n), scale=problem.scale)
    method = VAttention(r, **options) if kind == "vattention" else MagicPIG(1, tables=r, **options)
    draw = method.draw(unit, rng)
    dense, lse = method.attend_with_lse(unit, draw=draw)
    made = np.asarray(dense * np.exp(lse - problem.logsumexp)[:, None])
    if isinstance(method, MagicPIG):
        ahat = method.approximate(unit, draw=draw)
        assert isinstance(ahat, SparseOrMean)  # of this method
        made[ahat.empty] = 0.0  # their mean of V stands for no key
    return made


def _unbiased(
    problem: AttentionProblem, made: list[Array], r: int, spread: float = 0.0
) -> Observations:
    """Return that means of Dhat/D, and of the numerator along the output, are one."""
    values = problem.values
    values = np.concatenate([values, np.ones((problem.n_k, 1))], axis=1)
    exact = problem.exact @ values
    along = [float(np.sum(exact * (x @ values))) for x in made]
    size = float(np.sum(exact * exact))
    sums = [float(x.sum(axis=1).mean()) for x in made]
    return Observations(
        sums,
        1.0,
        rank=r,
        spread=spread,
        rounding=ROUNDING * (1 + float(np.abs(problem.logsumexp).max())),
        series=(
            Series("numerator and denominator along the exact ones", along, size, spread * size),
        ),
    )


# --- MagicPIG -------------------------------------------------------------------------------------


@claim(
    "training_free.magicpig_unbiased",
    title="Weighed by the exact chance of a collision, numerator and denominator are unbiased",
    statement="""Keys are kept where at least t of L codes agree, which happens with probability
        u_ij, and weigh e^{L_ij}/u_ij: E Dhat_i = D_i and E Nhat_i = N_i for every row in which all
        u_ij > 0.""",
    source=f"{MAGICPIG}; {DERIVED}",
    status="derived",
    kind="equality",
    observes="mean over rows of Dhat_i/D_i, and the numerator along the exact one; one is enough",
    assumptions=WITH_VALUES,
    recorded=HELD,
)
def _magicpig_unbiased(
    context: Context, *, bits: int = 4, tables: int = 16, least: int = 1
) -> Observations:
    _random_kept(context, bits)
    problem = _few_rows(context, 16)
    made = [
        _kept(context, "magicpig", tables, problem, rng, bits=bits, least=least, floor=0.0)
        for rng in context.generators()
    ]
    return _unbiased(problem, made, tables, _spread(problem, bits, tables, least, 0.0))


@claim(
    "training_free.magicpig_joint",
    title="How often two keys are kept together",
    statement="""Row i keeps the keys j and l both with probability u_jl, which follows from the
        three angles between them: of three vectors all lie on one side of a random plane with
        probability 1 - (theta_ij + theta_il + theta_jl)/(2 pi).""",
    source=DERIVED,
    status="derived",
    kind="equality",
    observes="share of the keys that two rows keep together with the key of nearest direction",
    assumptions=ON,
    recorded=HELD,
)
def _magicpig_joint(
    context: Context, *, bits: int = 4, tables: int = 16, least: int = 2
) -> Observations:
    _random_kept(context, bits)
    problem = _few_rows(context, 2)
    others, target = context.instance.cached(
        ("joint", bits, tables, least), lambda: _neighbours(problem, bits, tables, least)
    )
    values = []
    for rng in context.generators():
        found = _kept(context, "magicpig", tables, problem, rng, bits=bits, least=least, floor=0.0)
        kept = found > 0
        values.append(float(np.mean(kept & kept[:, others])))
    return Observations(values, target, rank=tables, rounding=ROUNDING)


def _neighbours(
    problem: AttentionProblem, bits: int, tables: int, least: int
) -> tuple[Array, float]:
    """Return the key nearest to each, and how likely a row keeps both, mean over keys and rows."""
    _, k = hashed(problem, Choices())
    near = k @ k.T
    np.fill_diagonal(near, -np.inf)
    others = near.argmax(axis=1)
    places = np.arange(len(k))
    joint = [
        joint_probability(problem, i, bits=bits, tables=tables, least=least)[places, others]
        for i in range(problem.n_q)
    ]
    return others, float(np.mean(joint))


@claim(
    "training_free.magicpig_variance",
    title="The exact variance of the denominator",
    statement="""Var Dhat_i = sum_jl e^{L_ij + L_il} (u_jl/(u_j u_l) - 1), with the joint
        probability u_jl of keeping the keys j and l; one table is enough to keep a key.""",
    source=DERIVED,
    status="derived",
    kind="equality",
    observes="(Dhat_i - D_i)^2 over its exact mean, averaged over four rows",
    assumptions=ON,
    recorded={"gaussian-64": "holds", "clusters": "not applicable"},
)
def _magicpig_variance(context: Context, *, bits: int = 2, tables: int = 4) -> Observations:
    _random_kept(context, bits)
    problem = _few_rows(context, 4)
    exact, rare = context.instance.cached(
        ("variance", bits, tables), lambda: _variances(problem, bits, tables)
    )
    context.require(
        rare <= 0.2, f"{rare:.2g} of the variance is of keys that few draws keep, or few drop"
    )
    values = []
    for rng in context.generators():
        found = _kept(context, "magicpig", tables, problem, rng, bits=bits, least=1, floor=0.0)
        values.append(float(np.mean((found.sum(axis=1) - 1) ** 2 / exact)))
    return Observations(values, 1.0, rank=tables, rounding=ROUNDING)


def _variances(problem: AttentionProblem, bits: int, tables: int) -> tuple[Array, float]:
    """Return the variance of each row, and the largest share of it that rare keys have."""
    q, k = hashed(problem, Choices())
    u = collision_probability(code_probability(q, k, bits), tables, 1)
    a = problem.exact.to_dense()
    exact = np.array(
        [magicpig_variance(problem, i, bits=bits, tables=tables)[0] for i in range(problem.n_q)]
    )
    parts = a**2 * (1 / u - 1)
    rare = np.where((u < 0.02) | (u > 0.98), parts, 0).sum(axis=1)
    return exact, float((rare / np.maximum(parts.sum(axis=1), 1e-300)).max())


@claim(
    "training_free.magicpig_floor_bias",
    title="What a constant in the weights costs",
    statement="""With weights e^{L_ij}/(u_ij + f): E Dhat_i/D_i = sum_j A_ij u_ij/(u_ij + f), less
        than one for f > 0.""",
    source=DERIVED,
    status="derived",
    kind="equality",
    observes="mean over rows of Dhat_i/D_i, over what the formula says; one is enough, f = .05",
    assumptions=ON,
    recorded=HELD,
)
def _magicpig_floor_bias(
    context: Context, *, bits: int = 4, tables: int = 16, floor: float = 0.05
) -> Observations:
    _random_kept(context, bits)
    problem = _few_rows(context, 16)
    mean = floor_mean(problem, bits=bits, tables=tables, least=1, floor=floor)
    target = float(mean.mean())
    context.require(target > ROUNDING, "nothing is kept")
    values = []
    for rng in context.generators():
        found = _kept(context, "magicpig", tables, problem, rng, bits=bits, least=1, floor=floor)
        values.append(float(found.sum(axis=1).mean()) / target)
    spread = _spread(problem, bits, tables, 1, floor) / target
    return Observations(values, 1.0, rank=tables, rounding=ROUNDING, spread=spread)


@claim(
    "training_free.magicpig_floor_unbiased",
    title="The released weights are unbiased",
    statement="""With two tables to agree and weights e^{L_ij}/(u_ij + 1e-4), as the public code has
        them, E Dhat_i = D_i.""",
    source=(
        "Infini-AI-Lab/MagicPIG @ac9aa36, whose estimator is called unbiased; refuted: the mean of "
        "Dhat_i/D_i is sum_j A_ij u_ij/(u_ij + 1e-4)"
    ),
    status="refuted",
    kind="inequality",
    observes="max_i of 1 - E Dhat_i/D_i by the exact formula, ten bits, 150 tables; must be zero",
    assumptions=ON,
    recorded={"gaussian-64": "violated", "clusters": "violated", "heads": "violated"},
)
def _magicpig_floor_unbiased(
    context: Context, *, bits: int = 10, tables: int = 150, floor: float = 1e-4
) -> Observations:
    problem = _few_rows(context, 64)
    mean = floor_mean(problem, bits=bits, tables=tables, floor=floor)
    note = f"E Dhat/D is {mean.mean():.4g} on average over rows, {mean.min():.4g} at least"
    return Observations([float((1 - mean).max())], 0.0, rank=tables, rounding=1e-6, notes=note)


@claim(
    "training_free.magicpig_ratio_unbiased",
    title="The output is unbiased",
    statement="""Nhat_i and Dhat_i being unbiased, so is Ohat_i = Nhat_i/Dhat_i: E Ohat = A V.""",
    source=(
        "what importance sampling is called in the literature of these methods; refuted: a ratio "
        "of unbiased numbers is not unbiased, it is consistent"
    ),
    status="refuted",
    kind="equality",
    observes="<A V, Ohat> over |A V|_F^2, eight tables, two must agree; must have the mean one",
    assumptions=WITH_VALUES,
    recorded={"gaussian-64": "violated", "clusters": "holds"},
    effects={"gaussian-64": 0.647},
)
def _magicpig_ratio_unbiased(
    context: Context, *, bits: int = 4, tables: int = 8, least: int = 2
) -> Observations:
    problem = _few_rows(context, 64)
    exact = problem.exact @ problem.values
    size = float(np.sum(exact * exact))
    context.require(size > ROUNDING, "the output is zero")
    method = MagicPIG(1, bits=bits, tables=tables, least=least)
    values = [
        float(np.sum(exact * method.attend(problem, rng))) / size for rng in context.generators()
    ]
    return Observations(values, 1.0, rank=tables, rounding=ROUNDING)


@claim(
    "training_free.magicpig_two_tables",
    title="Two tables that must agree make the variance larger",
    statement="""At the same tables: the part sum_j e^{2 L_ij} (1/u_ij - 1) of the variance is
        larger where two tables must agree, since u_ij is smaller.""",
    source=DERIVED,
    status="derived",
    kind="inequality",
    observes="the part of one table over that of two, at most one",
    assumptions=ON,
    recorded=HELD,
)
def _magicpig_two_tables(context: Context, *, bits: int = 4, tables: int = 16) -> Observations:
    _random_kept(context, bits)
    problem = _few_rows(context, 4)
    given = {"bits": bits, "tables": tables}
    values, notes = [], []
    for i in range(problem.n_q):
        made = [magicpig_variance(problem, i, **given, least=least) for least in (1, 2)]
        parts = [part for _, part in made]
        if not is_default(context):
            rng = np.random.default_rng(context.entropy)
            asked = {"problem": problem, "row": i, **given}
            parts = [float(implemented(context, "part", x, rng, **asked)) for x in (1, 2)]
        values.append(parts[0] / parts[1] if parts[1] > 0 else 0.0)
        notes.append("/".join(f"{math.sqrt(max(x, 0)):.3g}" for x, _ in made))
    return Observations(
        values, 1.0, rank=tables, rounding=ROUNDING, notes=f"deviations {', '.join(notes)}"
    )


# --- vAttention -----------------------------------------------------------------------------------


def _top(problem: AttentionProblem) -> int:
    """Return a twentieth of the keys."""
    return max(1, math.ceil(0.05 * problem.n_k))


@claim(
    "training_free.vattention_unbiased",
    title="The largest weights and a weighed sample of the others are unbiased",
    statement="""A fixed set F of keys, and b of the n_s others, drawn without replacement, or with
        it and repeats counted, weighed by n_s/b: E Dhat_i = D_i and E Nhat_i = N_i.""",
    source=f"{VATTENTION}; {DERIVED}",
    status="derived",
    kind="equality",
    observes="mean over rows of Dhat_i/D_i, and the numerator along the exact one",
    assumptions=WITH_VALUES,
    recorded=HELD,
)
def _vattention_unbiased(context: Context, *, replace: bool = False) -> Observations:
    problem = _few_rows(context, 16)
    r = max(2, problem.n_k // 8)
    context.require(problem.n_k >= 2, "needs two keys")
    made = [
        _kept(context, "vattention", r, problem, rng, replace=replace)
        for rng in context.generators()
    ]
    return _unbiased(problem, made, r)


def _reads(shares: list[float]) -> str:
    return f"reads {np.mean(shares):.3g} of the keys" if shares else ""


def _misses(
    context: Context, problem: AttentionProblem, **parameters: Any
) -> tuple[Array, list[float]]:
    """Return which rows miss eps, (trials, n_q), and the share of keys that each trial reads."""
    found, read = [], []
    eps = parameters["eps"]
    for rng in context.generators():
        kept = _kept(context, "vattention", 1, problem, rng, top=_top(problem), **parameters)
        found.append(~(np.abs(kept.sum(axis=1) - 1) <= eps * (1 + ROUNDING)))
        read.append(float((kept > 0).mean()))
    return np.array(found).reshape(len(found), problem.n_q), read


@claim(
    "training_free.vattention_known_coverage",
    title="With the true deviation the budget of the central limit theorem is honest",
    statement="""b = 1/(1/n_s + (eps D/(z n_s S))^2) draws without replacement, z = Phi^-1(1 -
        delta/2), S^2 = n_s sigma^2/(n_s - 1) of the true weights outside of F, the largest 5 %:
        |Dhat_i/D_i - 1| > eps on a share delta of the rows at most.""",
    source=f"{VATTENTION}, for draws with replacement; without: {DERIVED}, for normal sums",
    status="published",
    kind="expectation",
    observes="share of the rows with |Dhat_i/D_i - 1| > eps, mean over draws",
    assumptions=ON,
    recorded=HELD,
)
def _known_coverage(context: Context, *, eps: float = 0.1, delta: float = 0.1) -> Observations:
    problem = _few_rows(context, 32)
    missed, read = _misses(context, problem, budget="known", eps=eps, delta=delta)
    return Observations(missed.mean(axis=1), delta, notes=_reads(read))


@claim(
    "training_free.vattention_pilot_coverage",
    title="A pilot sample of 5 % tells the budget",
    statement="""With sigma and D estimated by a pilot sample of 5 % of the n_s keys, and a fresh
        final sample without replacement, |Dhat_i/D_i - 1| > eps on a share delta of the rows at
        most.""",
    source=(
        f"{VATTENTION}, whose deviation is estimated by a pilot; refuted at lengths of hundreds: "
        "a pilot of 24 keys underestimates heavy tails"
    ),
    status="refuted",
    kind="expectation",
    observes="share of the rows with |Dhat_i/D_i - 1| > eps, mean over draws",
    assumptions=ON,
    recorded={"gaussian-64": "violated"},
)
def _pilot_coverage(context: Context, *, eps: float = 0.1, delta: float = 0.1) -> Observations:
    problem = _few_rows(context, 32)
    missed, read = _misses(context, problem, budget="clt", eps=eps, delta=delta)
    return Observations(missed.mean(axis=1), delta, notes=_reads(read))


@claim(
    "training_free.vattention_hoeffding_coverage",
    title="A budget without unknown quantities is valid, and nearly exact attention",
    statement="""b = a (1 + 1/n_s)/(1 + a/n_s) draws without replacement, a = ln(2/delta) (n_s R)^2
        /(2 (eps D_f)^2), R the smallest weight in F: P(|Dhat_i/D_i - 1| > eps) <= delta for every
        row.""",
    source=f"{DERIVED}: the inequality of Hoeffding and Serfling, D >= D_f",
    status="derived",
    kind="tail",
    observes="|Dhat_i/D_i - 1| of one random row",
    assumptions=ON,
    recorded=HELD,
)
def _hoeffding_coverage(context: Context, *, eps: float = 0.1, delta: float = 0.1) -> Observations:
    return _coverage(context, eps, delta, budget="hoeffding-serfling")


def _coverage(context: Context, eps: float, delta: float, **parameters: Any) -> Observations:
    """Return the error of one row a trial, which are independent, against eps."""
    problem = _few_rows(context, 64)
    values, read = [], []
    for rng in context.generators():
        row = int(rng.integers(problem.n_q))
        alone = AttentionProblem(
            np.asarray(problem.q)[row : row + 1], problem.k, problem.v, scale=problem.scale
        )
        kept = _kept(
            context,
            "vattention",
            1,
            alone,
            rng,
            top=_top(problem),
            eps=eps,
            delta=delta,
            **parameters,
        )
        values.append(abs(float(kept.sum()) - 1))
        read.append(float((kept > 0).mean()))
    return Observations(values, eps, delta=delta, rounding=ROUNDING, notes=_reads(read))


@claim(
    "training_free.vattention_released_coverage",
    title="The released budget keeps its error",
    statement="""What the public code keeps, with the largest 5 % of the weights and a base rate of
        1 %, satisfies P(|Dhat_i/D_i - 1| > eps) <= delta.""",
    source=(
        "xAlg-ai/sparse-attention-hub @1a048c9; refuted: repeats are merged, the quantile is "
        "one-sided, and few pilots underestimate the deviation"
    ),
    status="refuted",
    kind="tail",
    observes="|Dhat_i/D_i - 1| of one random row",
    assumptions=ON,
    recorded={"gaussian-64": "violated"},
)
def _released_coverage(context: Context, *, eps: float = 0.1, delta: float = 0.1) -> Observations:
    return _coverage(context, eps, delta, preset="released")


@claim(
    "training_free.vattention_merged_mean",
    title="Merged repeats make a sum too small",
    statement="""b draws of n keys with replacement, repeats merged, each key weighed by n/b: the
        mean of the sum over the exact one is (n/b)(1 - (1 - 1/n)^b), 1 - 1/e for b = n.""",
    source=DERIVED,
    status="derived",
    kind="equality",
    observes="the sum over the exact one, mean over rows of A; b = n",
    assumptions=ON,
    recorded=EVERYWHERE,
)
def _merged_mean(context: Context) -> Observations:
    a = _few_rows(context, 16).exact.to_dense()
    n = a.shape[1]
    values = []
    for rng in context.generators():
        if is_default(context):
            drawn = np.asarray(rng.integers(0, n, n))
        else:
            drawn = implemented(context, "draws", n, rng).astype(np.int64)
        context.fingerprint(float(drawn @ np.arange(1, n + 1)) if n > 1 else float(rng.random()))
        values.append(float(a[:, np.unique(drawn)].sum(axis=1).mean()))
    return Observations(values, float(merged_mean(n, n)), rank=n, rounding=ROUNDING)


@claim(
    "training_free.vattention_budget_order",
    title="Without replacement fewer draws give the same variance",
    statement="""The budgets b_1 = (z n sigma/(eps D))^2 with replacement and b_0 = n b_1/(b_1 + n -
        1) without give a sum the same variance (eps D/z)^2: n^2 sigma^2/b_1 = n^2 (1 - b_0/n)
        S^2/b_0; and b_0 < n, b_0 <= max(b_1, 1).""",
    source=DERIVED,
    status="derived",
    kind="inequality",
    observes="largest relative difference of the variances, and excess over n or b_1; must be zero",
    assumptions=ON,
    recorded=EVERYWHERE,
)
def _budget_order(context: Context, *, eps: float = 0.1, delta: float = 0.1) -> Observations:
    from scipy.stats import norm

    problem = _few_rows(context, 64)
    context.require(problem.n_k >= 3, "needs three keys")
    found = row_statistics(problem, min(_top(problem), problem.n_k - 2))
    varied = found["deviation"] > 1e-12
    context.require(bool(varied.any()), "all weights outside of F are equal")
    n, sigma = found["size"][varied].astype(np.float64), found["deviation"][varied]
    rng = np.random.default_rng(context.entropy)
    asked = {"eps": eps, "delta": delta}

    def budget(replace: bool) -> Array:
        if is_default(context):
            return np.asarray(clt_budget(n, sigma, 1.0, **asked, replace=replace))
        return implemented(
            context, "budget", 0, rng, size=n, deviation=sigma, total=1.0, replace=replace, **asked
        )

    with_, without = budget(True), budget(False)
    wanted = (eps / float(norm.isf(delta / 2))) ** 2
    square = n * sigma**2 / (n - 1)
    gaps = [
        np.abs(n**2 * sigma**2 / with_ / wanted - 1),
        np.abs(n**2 * (1 - without / n) * square / without / wanted - 1) * (without < 0.99 * n),
        np.maximum(without / n - 1, 0),
        np.maximum(without / np.maximum(with_, 1) - 1, 0),
    ]
    return Observations([float(x.max()) for x in gaps], 0.0, rounding=ROUNDING)


@claim(
    "training_free.composition",
    title="Errors of numerator and denominator make that of the output",
    statement="""|N' - N| <= e_1 |N| and |D' - D| <= e_2 D with e_2 < 1 imply |N'/D' - N/D| <=
        (e_1 + e_2)/(1 - e_2) |N/D|.""",
    source=f"{DERIVED}; {VATTENTION} has 2 (e_1 + e_2) for e_2 < 1/2",
    status="derived",
    kind="inequality",
    observes="the error of the ratio over the bound, of perturbed rows; at most one",
    assumptions=WITH_VALUES,
    recorded=EVERYWHERE,
)
def _composition(context: Context) -> Observations:
    problem = _few_rows(context, 16)
    numerator = np.asarray(problem.exact @ problem.values, np.float64)
    numerator = numerator[np.linalg.norm(numerator, axis=1) > 1e-100]
    context.require(len(numerator) > 0, "the output is zero")
    sizes = np.linalg.norm(numerator, axis=1)
    values, bounds = [], []
    for i, rng in enumerate(few(context)):
        first, second = rng.uniform(0, 0.9, 2)
        # Every other one is the worst case: the numerator grows while the denominator shrinks.
        step = rng.standard_normal(numerator.shape) if i % 2 else numerator
        step = first * sizes[:, None] * step / np.linalg.norm(step, axis=1, keepdims=True)
        shrunk = np.full(len(sizes), 1 - second) if i % 2 == 0 else 1 + second * rng.uniform(-1, 1)
        given = {"numerator": numerator + step, "denominator": np.broadcast_to(shrunk, sizes.shape)}
        if is_default(context):
            ratio = given["numerator"] / given["denominator"][:, None]
        else:
            ratio = implemented(context, "ratio", 0, rng, **given)
        values.append(float((np.linalg.norm(ratio - numerator, axis=1) / sizes).max()))
        bounds.append(float(composed_error(first, second)))
    return Observations(values, bounds, rounding=ROUNDING)
