"""Claims: what a row of Combiner loses, when it loses nothing, and what bounds it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ...operators.partitioned.summaries import Reference, Rule
from ...partitions.plans import Plan
from ...problem import AttentionProblem
from ..engine.arguments import Array
from ..engine.observers import few, on_heads, problem_of
from ..engine.records import Observations
from ..engine.registry import Context, claim
from ..softmax.formulas import diameter
from .cases import (
    DERIVED,
    EVERYWHERE,
    ON,
    PAPER,
    cases,
    largest_ratio,
    make_cases,
    names_of,
    observed,
    other_cases,
    over_cases,
    query_distances,
    ranges,
    ratios,
    settings_of,
)
from .formulas import Case, Setting, blocks, pair_span, row_bounds, specht_log, zero

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
    def quotients(case: Case) -> Iterator[float]:
        l1 = 2 * case.tv
        yield largest_ratio(case.mass, l1, case.nothing)
        yield largest_ratio(l1, case.mass + case.local.sum(axis=1), case.nothing)

    return over_cases([*cases(context), *other_cases(context)], constant, quotients)


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
            kept = ((case.a[place] > 1e-290) & (case.ahat[place] > 1e-290)).all(axis=1)
            if not kept.any():
                continue
            u = case.log_ratio[place][kept]
            span = pair_span(case.logits[place][kept])
            wide = 2 * float((u.max(axis=1) - u.min(axis=1)).max())
            worst = max(worst, largest_ratio(np.array([span]), np.array([wide]), case.nothing))
        values.append(worst)
    return ratios(values, constant, names_of(some))


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
    def quotients(case: Case) -> Iterator[float]:
        # The identity loses the digits of a small divergence to the size of the normalisers.
        kl = np.maximum(case.log_z - case.log_zhat, 0.0) + case.nothing
        yield largest_ratio(case.tv, np.sqrt(np.minimum(kl / 2, -np.expm1(-kl))), case.nothing)

    return over_cases(cases(context), constant, quotients)


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

    def quotients(case: Case) -> Iterator[float]:
        direct = case.region == -1
        yield largest_ratio(case.a[direct], case.ahat[direct], case.nothing)

    return over_cases(some, constant, quotients)


# --- T4, T5: the sharp bounds ---------------------------------------------------------------------


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
    def quotients(case: Case) -> Iterator[float]:
        yield largest_ratio(case.tv, row_bounds(case)["tanh"], case.nothing)

    return over_cases([*cases(context), *other_cases(context)], constant, quotients)


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
    def quotients(case: Case) -> Iterator[float]:
        bounds = row_bounds(case)
        for name in ("mass-aware", "mass-aware, a posteriori"):
            yield largest_ratio(case.tv, bounds[name], case.nothing)
            yield constant * largest_ratio(bounds[name], bounds["tanh"], case.nothing)

    return over_cases([*cases(context), *other_cases(context)], constant, quotients)


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
    def quotients(case: Case) -> Iterator[float]:
        away = np.abs(case.log_ratio).max(axis=1)
        yield largest_ratio(away, case.width, case.nothing)
        with np.errstate(over="ignore"):
            limit = np.expm1(np.array([case.width.max()])) * np.linalg.norm(case.a)
        error = np.array([np.linalg.norm(case.ahat - case.a)])
        yield largest_ratio(error, limit, case.nothing)

    return over_cases([*cases(context), *other_cases(context)], constant, quotients)


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
    def quotients(case: Case) -> Iterator[float]:
        keys = zip(case.plan.regions, case.kappa, strict=True)
        radius = np.array([np.linalg.norm(case.problem.k[x] - y, axis=1).max() for x, y in keys])
        reach = query_distances(case) * radius
        dist = np.where(np.isfinite(case.g), reach, 0.0).max(axis=1, initial=0.0)
        yield largest_ratio(case.tv, np.tanh(dist / 2), case.nothing)

    return over_cases(cases(context), constant, quotients)


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

    def quotients(case: Case) -> Iterator[float]:
        wide = ranges(case)
        top = np.asarray(specht_log(wide))
        # A gap is a difference of normalisers, and known up to their rounding.
        yield largest_ratio(case.gap, top, case.nothing)
        yield constant * largest_ratio(top, wide**2 / 8, case.nothing)

    return over_cases(some, constant, quotients)


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
    def quotients(case: Case) -> Iterator[float]:
        sizes = np.array([diameter(case.problem.k[keys]) for keys in case.plan.regions])
        limit = (query_distances(case) * sizes) ** 2 / 8
        yield largest_ratio(case.gap, limit, case.nothing)

    return over_cases(cases(context), constant, quotients)
