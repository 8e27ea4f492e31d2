"""Claims about the rows of structured attention: what an error is made of, and its sharp bounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from ..partitioned import Reference, Rule
from ..partitions import Plan, make_plan
from ..problem import AttentionProblem
from ._arguments import Array
from ._combiner_formulas import (
    Case,
    Setting,
    blocks,
    merged_spans,
    one_region,
    other_rules,
    pair_span,
    row_bounds,
    settings,
    specht_log,
    zero,
)
from ._engine import Context, Observations, claim
from ._instances import instance
from ._observe import DENSE, on_heads
from ._of_methods import ROWS, few, implemented, is_default, problem_of

PAPER = "Ren et al., arXiv 2107.05768"
DERIVED = "derived: see the chapter on Combiner"
ON = (DENSE, ROWS)

# --- instances ------------------------------------------------------------------------------------


def _from_logits(
    logits: object, v: Array | None = None, *, causal: bool = False
) -> AttentionProblem:
    """Return the problem of given logits: unit vectors as keys, so that lam can be anything."""
    x = np.asarray(logits, np.float64)
    return AttentionProblem(x, np.eye(x.shape[1]), v, scale=1.0, causal=causal)


@instance("golden-spans", "Q = (0, 1, 3, -1), K = (0, 1, -1, 2), d = 1, spans of 2: worked numbers")
def _golden_spans() -> AttentionProblem:
    q, k = np.array([[0.0], [1], [3], [-1]]), np.array([[0.0], [1], [-1], [2]])
    return AttentionProblem(q, k, np.eye(4), scale=1.0)


@instance("tilted-pair", "one query, two keys of weight .3775 and .6225, lam the other way round")
def _tilted_pair() -> AttentionProblem:
    k = np.array([[0.0], [1.0]])
    return AttentionProblem(np.array([[0.5]]), k, k.copy(), scale=1.0)


@instance("near-pair", "one query, two keys with logits -.001 and .001, lam uniform: second order")
def _near_pair() -> AttentionProblem:
    k = np.array([[-1.0], [1.0]])
    return AttentionProblem(np.array([[0.001]]), k, k.copy(), scale=1.0)


@instance("extreme-pair", "one query, two keys with logits 0 and 200, lam uniform: extreme weights")
def _far_pair() -> AttentionProblem:
    k = np.array([[0.0], [1.0]])
    return AttentionProblem(np.array([[200.0]]), k, k.copy(), scale=1.0)


@instance("three-logits", "logits (0, 0, 2), lam uniform: nearly the largest gap of a range of 2")
def _three_logits() -> AttentionProblem:
    return AttentionProblem(
        np.array([[2.0]]), np.array([[0.0], [0.0], [1.0]]), np.eye(3), scale=1.0
    )


@instance("one-part", "two rows, a direct key and a region of two that is tilted: B is attained")
def _one_part() -> AttentionProblem:
    return _from_logits([row.logits for row in _extremal_rows()])


@instance("separable", "24 keys, spans of 4 along a, queries with q.a constant: blocks of rank 1")
def _separable() -> AttentionProblem:
    rng = np.random.default_rng(25)
    a = np.array([1.0, 0.0, 0.0, 0.0])
    k = np.repeat(rng.standard_normal((6, 4)), 4, axis=0)
    k += rng.standard_normal((24, 1)) * a
    q = rng.standard_normal((24, 4))
    q[:, 0] = 1.5
    return AttentionProblem(q, k, rng.standard_normal((24, 3)), scale=1.0)


@instance(
    "equal-keys", "64 queries and keys, keys equal within spans of 8: what is called lossless"
)
def _equal_keys() -> AttentionProblem:
    rng = np.random.default_rng(26)
    q, v = rng.standard_normal((64, 8)), rng.standard_normal((64, 4))
    return AttentionProblem(q, np.repeat(rng.standard_normal((8, 8)), 8, axis=0), v)


@instance("no-queries", "Q = 0, 64 keys, spans of 8: uniform attention")
def _no_queries() -> AttentionProblem:
    rng = np.random.default_rng(27)
    k, v = rng.standard_normal((64, 8)), rng.standard_normal((64, 4))
    return AttentionProblem(np.zeros((64, 8)), k, v)


@instance("tight-spans", "32 queries, keys within .1 of the centres of spans of 8, d = 8, d_v = 4")
def _tight_spans() -> AttentionProblem:
    rng = np.random.default_rng(28)
    q, v = rng.standard_normal((32, 8)), rng.standard_normal((32, 4))
    k = np.repeat(rng.standard_normal((4, 8)), 8, axis=0) + 0.1 * rng.standard_normal((32, 8))
    return AttentionProblem(q, k, v)


class ExtremalRow(NamedTuple):
    """Hold a row that attains `mass_aware_bound`: one direct key, and a region of two.

    Attributes
    ----------
    logits, reference : ndarray (3,)
        Of the row, and of its reference query; key 0 is direct.
    mass, low, high : float
        Arguments of the bound.
    """

    logits: Array
    reference: Array
    mass: float
    low: float
    high: float


def extremal_row(
    width: float, share: float, *, with_direct: bool = False, posterior: bool = False
) -> ExtremalRow:
    """Return a row that attains `mass_aware_bound` for a range ``lo + hi = width``.

    In the region ``eta = hi`` on the first key, of weight ``share`` under lam, and ``-lo`` on
    the second, ``lo = share width``, so that its mean is 0.  The mass of the region is the one
    for which this event is the best.

    Parameters
    ----------
    width, share : float
    with_direct : bool
        Whether the direct key is in the event.
    posterior : bool
        Whether the bound is attained that uses the mass of the region under Ahat.

    Examples
    --------
    >>> row = extremal_row(1.0, 0.55, with_direct=True)
    >>> p = np.exp(row.logits)
    >>> moved = p * np.exp([0.0, row.high, -row.low])
    >>> tv = abs(p - moved / moved.sum()).sum() / 2
    >>> from sketchattn.row_certificates import mass_aware_bound
    >>> bool(abs(tv - mass_aware_bound(row.mass, row.low, row.high)) < 1e-12)
    True
    """
    from scipy.optimize import brentq

    lam = np.array([share, 1 - share])
    lo, hi = share * width, (1 - share) * width
    tilt = np.array([hi, -lo])
    # Where p is what is tilted, by eta or back by -eta.
    sign = -1.0 if posterior else 1.0
    p = lam if posterior else lam * np.exp(-tilt) / float(lam @ np.exp(-tilt))
    t, a = math.exp(float((sign * tilt).max())), math.exp(float((sign * tilt).min()))
    rises = int(np.argmax(sign * tilt))

    def off(w: float) -> float:
        """Return by how much the share of the event in the region is not the best one."""
        if with_direct:
            c = 1 - w + w * t
            return (c - math.sqrt(a * c)) / (t - a) - w * float(p[1 - rises])
        c = 1 - w + w * a
        return (math.sqrt(t * c) - c) / (t - a) - w * float(p[rises])

    w = float(brentq(off, 1e-9, 1.0, xtol=1e-15))
    row = np.array([1 - w, *(w * p)])
    if posterior:
        row = row * np.exp([0.0, *(-tilt)])
    low, high = (hi, lo) if posterior else (lo, hi)
    return ExtremalRow(np.log(row), np.array([0.0, *np.log(lam)]), w, low, high)


def _extremal_rows() -> list[ExtremalRow]:
    return [
        extremal_row(1.0, 0.55, with_direct=True),
        extremal_row(1.0, 0.5, posterior=True),
    ]


def _extremal(problem: AttentionProblem) -> list[Setting]:
    rows = _extremal_rows()
    plan = Plan.from_lists(3, [[0], [0]], [[1, 2], [1, 2]], [[0], [1]])
    given = Reference("given", np.array([row.reference for row in rows]))
    return [Setting("one part", plan, given)]


def _whole(problem: AttentionProblem) -> list[Setting]:
    return [Setting("one region", one_region(problem), zero(problem))]


def _opposite(problem: AttentionProblem) -> list[Setting]:
    return [Setting("opposite", one_region(problem), Reference("given", -problem.q[:1]))]


def _spans(block: int) -> Callable[[AttentionProblem], list[Setting]]:
    def make(problem: AttentionProblem) -> list[Setting]:
        plan = make_plan("fixed", problem.n_k, block=block)
        loose = merged_spans(problem.n_k, block, problem.n_q)
        mean = Reference("given", problem.q.mean(axis=0)[None])
        return [
            Setting("spans", plan, Reference("mean")),
            Setting("spans, global mean", plan, mean),
            Setting("spans, zero", plan, zero(problem)),
            Setting("spans, none direct", loose, mean),
        ]

    return make


# The plans of instances that are made for one.
SPECIAL: dict[str, Callable[[AttentionProblem], list[Setting]]] = {
    "golden-spans": _spans(2),
    "tilted-pair": _opposite,
    "near-pair": _whole,
    "extreme-pair": _whole,
    "three-logits": _whole,
    "one-part": _extremal,
    "separable": _spans(4),
    "equal-keys": _spans(8),
    "no-queries": _spans(8),
    "tight-spans": _spans(8),
}

# --- what observers share -------------------------------------------------------------------------


def settings_of(context: Context) -> list[Setting]:
    """Return the plans that are looked at."""
    problem = problem_of(context.instance)
    special = SPECIAL.get(context.instance.name)
    return settings(problem) if special is None else special(problem)


def observed(context: Context) -> Callable[[Case], tuple[Array, Array]] | None:
    """Return how Ahat and log Zhat are made, None for the library's own."""
    if is_default(context):
        return None

    def observe(case: Case) -> tuple[Array, Array]:
        given = {
            "problem": case.problem,
            "plan": case.plan,
            "q0": case.q0,
            "rule": case.setting.rule,
        }
        rng = np.random.default_rng(context.entropy)
        r = len(case.plan.regions)
        return (
            implemented(context, "combiner", r, rng, **given),
            implemented(context, "log_normalizer", r, rng, **given),
        )

    return observe


def make_cases(context: Context, found: Iterable[Setting]) -> list[Case]:
    """Return the cases of settings, with what the implementation that was handed in makes."""
    problem = problem_of(context.instance)
    return [Case(problem, setting, observed(context)) for setting in found]


def cases(context: Context) -> list[Case]:
    """Return the cases of the Gibbs rule, computed once for the library's own."""
    if not is_default(context):
        return make_cases(context, settings_of(context))
    return context.instance.cached(
        "combiner cases", lambda: make_cases(context, settings_of(context))
    )


def other_cases(context: Context) -> list[Case]:
    """Return cases of rules without a lower bound."""
    if context.instance.name in SPECIAL:
        return []

    def compute() -> list[Case]:
        return make_cases(context, other_rules(problem_of(context.instance)))

    if not is_default(context):
        return compute()
    return context.instance.cached("combiner cases of other rules", compute)


def largest_ratio(found: Array, bound: Array, nothing: float) -> float:
    """Return the largest quotient, where differences up to ``nothing`` are none."""
    if not np.size(found):
        return 0.0
    with np.errstate(invalid="ignore"):
        # An infinite bound says nothing.
        ratios = np.where(np.isinf(bound), 0.0, found / (bound + nothing))
    return float(np.max(ratios)) if not np.isnan(ratios).any() else math.nan


def ratios(found: Iterable[float], constant: float, names: Iterable[str] = ()) -> Observations:
    """Return quotients that must be at most 1, or a smaller constant."""
    listed = ", ".join(dict.fromkeys(names))
    return Observations(list(found), float(constant), notes=f"plans: {listed}" if listed else "")


def names_of(some: Iterable[Case]) -> list[str]:
    """Return the names of plans."""
    return [case.setting.name for case in some]


EVERYWHERE = {
    "golden-spans": "holds",
    "causal": "holds",
    "clusters": "holds",
    "heads": "holds",
}

# --- T1: mass and local error ---------------------------------------------------------------------


@claim(
    "combiner.sandwich",
    title="Mass error and local error",
    statement="""For any lam_t and any region masses rho_i(t), with the true masses pi_i(t) and
        cond_i(j|t) = A_ij/pi_i(t): mass_i = sum_{direct j} |Ahat_ij - A_ij| + sum_t |rho_i(t) -
        pi_i(t)| and local_i = sum_t pi_i(t) |cond_i(.|t) - lam_t|_1 satisfy mass_i <= |Ahat_i -
        A_i|_1 <= mass_i + local_i.""",
    source=DERIVED,
    status="derived",
    kind="inequality",
    observes="max_i mass_i/|Ahat_i - A_i|_1 and |Ahat_i - A_i|_1/(mass_i + local_i), plan by plan",
    assumptions=ON,
    recorded={**EVERYWHERE, "tilted-pair": "holds", "one-part": "holds"},
)
def _sandwich(context: Context, *, constant: float = 1.0) -> Observations:
    some = [*cases(context), *other_cases(context)]
    values = []
    for case in some:
        l1 = 2 * case.tv
        values.append(largest_ratio(case.mass, l1, case.nothing))
        values.append(largest_ratio(l1, case.mass + case.local.sum(axis=1), case.nothing))
    return ratios(values, constant, names_of(some))


def _kl(p: Array, q: Array) -> Array:
    """Return the terms ``p ln(p/q)``, 0 where p is."""
    some = (p > 1e-290) & (q > 1e-290)
    safe = np.where(some, q, 1.0)
    return np.where(some, p * np.log(np.where(some, p, 1.0) / safe), 0.0)


@claim(
    "combiner.chain_rules",
    title="Both divergences split into masses and regions",
    statement="""KL(A_i|Ahat_i) = KL(pi|rho) + sum_t pi_i(t) KL(cond_i(.|t)|lam_t) and
        KL(Ahat_i|A_i) = KL(rho|pi) + sum_t rho_i(t) KL(lam_t|cond_i(.|t)), where KL of masses is
        over direct keys and regions.""",
    source="derived: the chain rule of the divergence",
    status="derived",
    kind="inequality",
    observes="the largest difference of the two sides over 1 + the left one, which must be zero",
    assumptions=ON,
    recorded=EVERYWHERE,
)
def _chain_rules(context: Context) -> Observations:
    values = []
    for case in [*cases(context), *other_cases(context)[:1]]:
        i, j, t = case.pairs
        near = case.region == -1
        direct = np.where(near, case.a, 0.0)
        hat = np.where(near, np.exp(np.minimum(case.logits - case.log_zhat[:, None], 0.0)), 0.0)
        cond = case.a[i, j] / np.maximum(case.pi[i, t], 1e-300)
        lam = case.lam[t, j]
        kept = case.has_digits
        for p, q, p_r, q_r, inner, whole in (
            (direct, hat, case.pi, case.rho, _kl(cond, lam), _kl(case.a, case.ahat)),
            (hat, direct, case.rho, case.pi, _kl(lam, cond), _kl(case.ahat, case.a)),
        ):
            left = whole.sum(axis=1)
            right = _kl(p, q).sum(axis=1) + _kl(p_r, q_r).sum(axis=1)
            right += (p_r * case.by_region(inner)).sum(axis=1)
            scaled = np.abs(left - right) / (1 + np.abs(left)) / (1 + case.reach)
            values.append(float(scaled[kept].max(initial=0.0)))
    return Observations(values, 0.0, rounding=1e-10)


# --- T2: exactness --------------------------------------------------------------------------------


def _largest_span(problem: AttentionProblem, plan: Plan) -> tuple[float, float]:
    """Return the largest logit, and how far the blocks of a plan are from separable."""
    logits = float(problem.scale) * problem.q @ problem.k.T
    worst = max((pair_span(logits[np.ix_(*place)]) for place in blocks(plan)), default=0.0)
    return float(np.abs(logits).max(initial=0.0)), worst


@claim(
    "combiner.exactness",
    title="Separable blocks are exact",
    statement="""If (q_i - q_i').(k_j - k_j') = 0 for all rows i, i' that use a region and all keys
        j, j' of it, for every region, then Ahat = A with expected key and entropy, for every
        reference query in the affine hull of the queries that use the region.""",
    source=DERIVED,
    status="derived",
    kind="inequality",
    observes="max_i |Ahat_i - A_i|_1 for one random combination of queries a trial, must be zero",
    assumptions=ON,
    recorded={
        "separable": "holds",
        "equal-keys": "holds",
        "no-queries": "holds",
        "golden-spans": "not applicable",
        "heads": "not applicable",
    },
)
def _exactness(context: Context) -> Observations:
    problem = problem_of(context.instance)
    wanted = ("spans", "spans, none direct", "fixed")
    fixed = [x for x in settings_of(context) if x.name in wanted and len(x.plan.regions)]
    context.require(bool(fixed), "has no spans")
    reach, worst = _largest_span(problem, fixed[0].plan)
    context.require(
        worst <= 1e-12 * (1 + reach), f"has a block that is not separable, by {worst:.3g}"
    )
    values = []
    for rng in few(context):
        for setting in fixed:
            q0 = []
            for rows, _ in blocks(setting.plan):
                w = rng.standard_normal(len(rows))
                w += (1 - w.sum()) / len(w)
                q0.append(w @ problem.q[rows])
            given = setting._replace(reference=Reference("given", np.array(q0)))
            case = Case(problem, given, observed(context))
            values.append(2 * float(case.tv.max()))
            reach = max(reach, float(np.abs(case.q0 @ problem.k.T).max(initial=0.0)))
    return Observations(values, 0.0, rounding=1e-11 * (1 + reach))


@claim(
    "combiner.exactness_necessary",
    title="What is not separable is not exact",
    statement="""For every rule, trained or not: |scale (q_i - q_i').(k_j - k_j')| <= 2 max_i
        (max_j u_ij - min_j u_ij) over the rows i and keys j of a region, u = ln(Ahat/A).  So
        Ahat = A on these rows only if the left side is 0 for all of them.""",
    source="derived: ln Ahat is a sum of a function of i and one of j on a block",
    status="derived",
    kind="inequality",
    observes="the largest quotient of the two sides, plan by plan",
    assumptions=ON,
    recorded={**EVERYWHERE, "separable": "holds", "checkerboard": "holds"},
)
def _exactness_necessary(context: Context, *, constant: float = 1.0) -> Observations:
    some = [*cases(context), *other_cases(context)[:1]]
    if context.instance.m * context.instance.n > 10**4:
        some = some[:1]  # all pairs of keys of a region, for all rows that use it
    values = []
    for case in some:
        worst = 0.0
        for rows, keys in blocks(case.plan):
            place = np.ix_(rows, keys)
            kept = (case.a[place] > 1e-290).all(axis=1)
            if not kept.any():
                continue
            u = case.log_ratio[place][kept]
            span = pair_span(case.logits[place][kept])
            wide = 2 * float((u.max(axis=1) - u.min(axis=1)).max())
            worst = max(worst, largest_ratio(np.array([span]), np.array([wide]), case.nothing))
        values.append(worst)
    return ratios(values, constant, names_of(some))


@instance("checkerboard", "logits (1, -1) and (-1, 1), one region: as far from rank 1 as can be")
def _checkerboard() -> AttentionProblem:
    return AttentionProblem(np.array([[1.0], [-1.0]]), np.array([[1.0], [-1.0]]), scale=1.0)


SPECIAL["checkerboard"] = _whole


def _equal_in_regions(context: Context) -> Setting:
    """Return spans in which keys are equal, or end."""
    problem = problem_of(context.instance)
    setting = settings_of(context)[0]
    keys = setting.plan.regions
    first = problem.k[keys.items[keys.starts[:-1]]][keys.owner]
    same = np.array_equal(problem.k[keys.items], first) and len(keys) > 0
    context.require(same, "has regions whose keys are not equal")
    return setting


@claim(
    "combiner.lossless",
    title="Equal keys make the published rule lossless",
    statement="""If the keys of every region are equal, then Ahat = A with the published summaries:
        queries and keys pooled by their maximum, no bias.""",
    source=(
        f"{PAPER}, of its factorization: lossless where the keys of a region are equal; refuted "
        f"for its formulas: a region of m equal keys weighs as much as one of them"
    ),
    status="refuted",
    kind="inequality",
    observes="max_i |Ahat_i - A_i|_1, which must be zero",
    assumptions=ON,
    recorded={
        "equal-keys": "violated",
        "golden-spans": "not applicable",
        "heads": "not applicable",
    },
)
def _lossless(context: Context) -> Observations:
    setting = _equal_in_regions(context)
    published = setting._replace(reference=Reference("max"), rule=Rule("max", "none", "none"))
    case = make_cases(context, [published])[0]
    return Observations([2 * float(case.tv.max())], 0.0, rounding=case.nothing)


@claim(
    "combiner.lossless_bias",
    title="Equal keys and the entropy are lossless",
    statement="""If the keys of every region are equal, then Ahat = A with the expected key and the
        entropy, which is the logarithm of the number of keys, whatever the reference query.""",
    source="derived: what is true of the published sentence; a case of combiner.exactness",
    status="derived",
    kind="inequality",
    observes="max_i |Ahat_i - A_i|_1 for three references, which must be zero",
    assumptions=ON,
    recorded={"equal-keys": "holds", "golden-spans": "not applicable", "heads": "not applicable"},
)
def _lossless_bias(context: Context) -> Observations:
    _equal_in_regions(context)
    some = cases(context)[:3]
    return Observations(
        [2 * float(case.tv.max()) for case in some], 0.0, rounding=max(x.nothing for x in some)
    )


# --- T3: the Gibbs identity -----------------------------------------------------------------------


@claim(
    "combiner.gibbs_identity",
    title="The divergence is the difference of two normalisers",
    statement="""With expected key and entropy, for any lam: ln Z_i(Omega_t) - g_i(t) =
        KL(lam_t|cond_i(.|t)) >= 0, hence Zhat_i <= Z_i, and KL(Ahat_i|A_i) = ln Z_i -
        ln Zhat_i.""",
    source="derived: the Gibbs variational principle",
    status="derived",
    kind="inequality",
    observes="|KL - ln Z + ln Zhat|, ln Zhat - ln Z and -gap, over the size of logits, must be 0",
    assumptions=ON,
    recorded={**EVERYWHERE, "near-pair": "holds", "one-part": "holds"},
)
def _gibbs_identity(context: Context) -> Observations:
    values = []
    for case in cases(context):
        size = 1 + case.reach
        off = np.abs(case.kl - (case.log_z - case.log_normalizer))[case.has_digits]
        above = np.maximum(case.log_normalizer - case.log_z, 0.0)
        negative = float(np.maximum(-case.gap, 0.0).max(initial=0.0))
        values += [float(off.max(initial=0.0)) / size, float(above.max()) / size, negative / size]
    return Observations(values, 0.0, rounding=1e-11)


@claim(
    "combiner.lost_lower_bound",
    title="A second order correction keeps Zhat below Z",
    statement="Zhat_i <= Z_i with the expected key, the entropy and the diagonal correction.",
    source=(
        "the lower bound of the plain rule taken for that of the corrected one; refuted: the "
        "worked example with reference zero"
    ),
    status="refuted",
    kind="inequality",
    observes="max_i ln Zhat_i - ln Z_i",
    assumptions=ON,
    recorded={"golden-spans": "violated", **on_heads("violated", holds="5.4")},
)
def _lost_lower_bound(context: Context) -> Observations:
    problem = problem_of(context.instance)
    base = settings_of(context)[0]
    corrected = Setting("diagonal", base.plan, zero(problem), Rule("expected", "entropy", "diag"))
    case = make_cases(context, [corrected])[0]
    above = float(np.max(case.log_normalizer - case.log_z))
    return Observations([max(above, 0.0)], 0.0, rounding=case.nothing)


@claim(
    "combiner.kl_row_bound",
    title="A row by its normalisers",
    statement="""|Ahat_i - A_i|_1 <= min(sqrt(2 KL_i), 2 sqrt(1 - exp(-KL_i))), KL_i = ln Z_i -
        ln Zhat_i.""",
    source="derived: combiner.gibbs_identity with Pinsker, Bretagnolle and Huber",
    status="derived",
    kind="inequality",
    observes="max_i |Ahat_i - A_i|_1 over its bound, plan by plan",
    assumptions=ON,
    recorded={**EVERYWHERE, "near-pair": "holds"},
)
def _kl_row_bound(context: Context, *, constant: float = 1.0) -> Observations:
    some = cases(context)
    values = []
    for case in some:
        # The identity loses the digits of a small divergence to the size of the normalisers.
        kl = np.maximum(case.log_z - case.log_zhat, 0.0) + case.nothing
        bound = np.sqrt(np.minimum(kl / 2, -np.expm1(-kl)))
        values.append(largest_ratio(case.tv, bound, case.nothing))
    return ratios(values, constant, names_of(some))


@claim(
    "combiner.direct_weights",
    title="Direct keys are never under-estimated",
    statement="Ahat_ij >= A_ij for direct keys j, with expected key and entropy.",
    source="derived: Zhat_i <= Z_i",
    status="derived",
    kind="inequality",
    observes="max over direct keys of A_ij/Ahat_ij, plan by plan",
    assumptions=ON,
    recorded={
        "golden-spans": "holds",
        "causal": "holds",
        "separable": "holds",
        "heads": "holds",
    },
)
def _direct_weights(context: Context, *, constant: float = 1.0) -> Observations:
    some = [case for case in cases(context) if len(case.plan.direct.items)]
    context.require(bool(some), "no plan has direct keys")
    values = []
    for case in some:
        direct = case.region == -1
        values.append(largest_ratio(case.a[direct], case.ahat[direct], 1e-13))
    return ratios(values, constant, names_of(some))


# --- T4, T5: the sharp bounds ---------------------------------------------------------------------


def _row_claim(name: str, some: list[Case], constant: float) -> Observations:
    values = [largest_ratio(case.tv, row_bounds(case)[name], case.nothing) for case in some]
    return ratios(values, constant, names_of(some))


@claim(
    "combiner.tanh_bound",
    title="The central bound of a row",
    statement="""For every rule, lo_i = max(0, max_j -eta_ij), hi_i = max(0, max_j eta_ij),
        Delta_i = lo_i + hi_i: |Ahat_i - A_i|_1 <= 2 tanh(Delta_i/4) <= Delta_i/2.""",
    source=DERIVED,
    status="derived",
    kind="inequality",
    observes="max_i |Ahat_i - A_i|_1/(2 tanh(Delta_i/4)), plan by plan",
    assumptions=ON,
    recorded={**EVERYWHERE, "tilted-pair": "holds"},
)
def _tanh_bound(context: Context, *, constant: float = 1.0) -> Observations:
    return _row_claim("tanh", [*cases(context), *other_cases(context)], constant)


@claim(
    "combiner.mass_aware",
    title="The sharp bound of a row of which a part is direct",
    statement="""With w_i = sum_t pi_i(t): |Ahat_i - A_i|_1 <= 2 B(w_i; lo_i, hi_i) <=
        2 tanh(Delta_i/4), and with what_i = sum_t rho_i(t), |Ahat_i - A_i|_1 <= 2 B(what_i; hi_i,
        lo_i).""",
    source=DERIVED,
    status="derived",
    kind="inequality",
    observes="max_i |Ahat_i - A_i|_1 over both bounds, and 2 B over 2 tanh(Delta_i/4)",
    assumptions=ON,
    recorded={**EVERYWHERE, "one-part": "holds", "tilted-pair": "holds"},
)
def _mass_aware(context: Context, *, constant: float = 1.0) -> Observations:
    some = [*cases(context), *other_cases(context)]
    values = []
    for case in some:
        bounds = row_bounds(case)
        for name in ("mass-aware", "mass-aware, a posteriori"):
            values.append(largest_ratio(case.tv, bounds[name], case.nothing))
            values.append(constant * largest_ratio(bounds[name], bounds["tanh"], case.nothing))
    return ratios(values, constant, names_of(some))


@claim(
    "combiner.log_ratio",
    title="Every weight, and the Frobenius norm",
    statement="""exp(-Delta_i) <= Ahat_ij/A_ij <= exp(Delta_i), hence |Ahat - A|_F <=
        (exp(max_i Delta_i) - 1) |A|_F.""",
    source=DERIVED,
    status="derived",
    kind="inequality",
    observes="max_ij |ln(Ahat_ij/A_ij)|/Delta_i, and the norm over its bound, plan by plan",
    assumptions=ON,
    recorded={**EVERYWHERE, "extreme-pair": "holds"},
)
def _log_ratio(context: Context, *, constant: float = 1.0) -> Observations:
    some = [*cases(context), *other_cases(context)]
    values = []
    for case in some:
        away = np.abs(case.log_ratio).max(axis=1)
        values.append(largest_ratio(away, case.width, case.nothing))
        with np.errstate(over="ignore"):
            limit = np.expm1(np.array([case.width.max()])) * np.linalg.norm(case.a)
        error = np.array([np.linalg.norm(case.ahat - case.a)])
        values.append(largest_ratio(error, limit, case.nothing))
    return ratios(values, constant, names_of(some))


@claim(
    "combiner.bilinear",
    title="The error of logits is bilinear",
    statement="""With lam = softmax(scale q0.k), expected key and entropy: eta_ij = scale (q_i -
        q0_t).(kappa_t - k_j), and E_lam[eta_i] = 0.""",
    source=DERIVED,
    status="derived",
    kind="inequality",
    observes="the two differences over the size of the logits, which must be zero; from ln Ahat",
    assumptions=ON,
    recorded={**EVERYWHERE, "separable": "holds"},
)
def _bilinear(context: Context) -> Observations:
    values = []
    for case in cases(context):
        i, j, t = case.pairs
        q, k = case.problem.q, case.problem.k
        scale = float(case.problem.scale)
        towards, at = scale * q @ case.kappa.T, scale * case.q0 @ k.T
        inner = scale * np.einsum("ij,ij->i", case.q0, case.kappa)
        # (q_i - q0_t).(kappa_t - k_j), term by term.
        known = towards[i, t] - scale * (q @ k.T)[i, j] - inner[t] + at[t, j]
        # Observed: ln(Ahat/A) + ln Zhat - ln Z.
        seen = case.log_ratio[i, j] + case.log_normalizer[i] - case.log_z[i]
        kept = (case.a[i, j] > 1e-290) & (case.ahat[i, j] > 1e-290)
        size = 1 + case.reach + float(np.abs(at).max(initial=0.0))
        values.append(float(np.abs(seen - known)[kept].max(initial=0.0)) / size)
        mean = case.by_region(case.lam[t, j] * known)
        values.append(float(np.abs(mean).max(initial=0.0)) / size)
    return Observations(values, 0.0, rounding=1e-11)


@claim(
    "combiner.spread",
    title="Query spread times key spread",
    statement="""With rad_t = max_j |k_j - kappa_t| and dist_i = max_t scale |q_i - q0_t| rad_t over
        the regions of row i: |Ahat_i - A_i|_1 <= 2 tanh(dist_i/2) <= dist_i.""",
    source=DERIVED,
    status="derived",
    kind="inequality",
    observes="max_i |Ahat_i - A_i|_1/(2 tanh(dist_i/2)), plan by plan",
    assumptions=ON,
    recorded={**EVERYWHERE, "near-pair": "holds"},
)
def _spread(context: Context, *, constant: float = 1.0) -> Observations:
    some = cases(context)
    values = []
    for case in some:
        radius = np.array(
            [np.linalg.norm(case.problem.k[x] - y, axis=1).max() for x, y in
             zip(case.plan.regions, case.kappa, strict=True)]
        )  # fmt: skip
        reach = query_distances(case) * radius
        dist = np.where(np.isfinite(case.g), reach, 0.0).max(axis=1, initial=0.0)
        values.append(largest_ratio(case.tv, np.tanh(dist / 2), case.nothing))
    return ratios(values, constant, names_of(some))


def query_distances(case: Case) -> Array:
    """Return ``scale |q_i - q0_t|`` (n_q, r)."""
    q = case.problem.q
    found = np.empty(case.rho.shape)
    for t in range(found.shape[1]):
        found[:, t] = np.linalg.norm(q - case.q0[t], axis=1)
    return abs(float(case.problem.scale)) * found


# --- T6: the mass of a region ---------------------------------------------------------------------


@claim(
    "combiner.mass_gap",
    title="The mass of a region is right to second order",
    statement="""Reference zero, R_i(t) the range of L_ij over region t: 0 <= ln Z_i(Omega_t) -
        (scale q_i.kbar_t + ln m_t) <= ln S(e^R) <= R^2/8, S Specht's ratio.""",
    source="derived: Specht's ratio of arithmetic and geometric mean; Hoeffding's lemma",
    status="derived",
    kind="inequality",
    observes="max gap/ln S(e^R) and ln S(e^R)/(R^2/8), plan by plan",
    assumptions=ON,
    recorded={**EVERYWHERE, "three-logits": "holds", "near-pair": "holds"},
)
def _mass_gap(context: Context, *, constant: float = 1.0) -> Observations:
    some = [x for x in cases(context) if not x.q0.any()]
    context.require(bool(some), "no plan with the reference zero")
    values = []
    for case in some:
        wide = ranges(case)
        top = np.asarray(specht_log(wide))
        # A gap is a difference of normalisers, and known up to their rounding.
        values.append(largest_ratio(case.gap, top, case.nothing))
        values.append(constant * largest_ratio(top, wide**2 / 8, case.nothing))
    return ratios(values, constant, names_of(some))


def ranges(case: Case) -> Array:
    """Return ``max_j L_ij - min_j L_ij`` over the keys of a region, 0 where it is not used."""
    found = np.zeros(case.rho.shape)
    for t, keys in enumerate(case.plan.regions):
        rows = np.flatnonzero(np.isfinite(case.g[:, t]))
        block = case.logits[np.ix_(rows, keys)]
        found[rows, t] = block.max(axis=1) - block.min(axis=1)
    return found


@claim(
    "combiner.mass_gap_general",
    title="The mass of a region, any reference",
    statement="""0 <= ln Z_i(Omega_t) - g_i(t) <= scale^2 |q_i - q0_t|^2 diam(Omega_t)^2/8, the
        diameter that of the keys.""",
    source="derived: Hoeffding's lemma",
    status="derived",
    kind="inequality",
    observes="max gap over its bound, plan by plan",
    assumptions=ON,
    recorded={**EVERYWHERE, "near-pair": "holds"},
)
def _mass_gap_general(context: Context, *, constant: float = 1.0) -> Observations:
    from ._combiner_formulas import diameter

    some = cases(context)
    values = []
    for case in some:
        sizes = np.array([diameter(case.problem.k[keys]) for keys in case.plan.regions])
        limit = (query_distances(case) * sizes) ** 2 / 8
        values.append(largest_ratio(case.gap, limit, case.nothing))
    return ratios(values, constant, names_of(some))
