"""Claims: certificates, outputs, floors, oracles and the algebra of plans."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np

from ...errors.rows import certify_rows
from ...operators.partitioned.operator import MixtureAttention, PartitionedAttention
from ...operators.partitioned.records import Record
from ...operators.partitioned.summaries import Reference, Rule
from ...partitions.patterns import label_plan
from ...partitions.plans import Plan
from ...problem import AttentionProblem
from ...zoo.combiner.method import Combiner
from ..engine.arguments import Array
from ..engine.assumptions import VALUES
from ..engine.observers import (
    few,
    implemented,
    is_default,
    largest,
    logit_rounding,
    problem_of,
)
from ..engine.records import Curve, Observations
from ..engine.registry import Context, claim
from ..softmax.formulas import diameter
from .cases import DERIVED, EVERYWHERE, ON, cases, largest_ratio, names_of, over_cases, ratios
from .formulas import Case, blocks, divergence, log_sum, structural_floor

# --- T7: certificates -----------------------------------------------------------------------------


def _certified(context: Context, operator: PartitionedAttention) -> Mapping[str, Array]:
    """Return the bounds of rows, by the implementation that was handed in if any."""
    if is_default(context):
        found = certify_rows(operator)
        out = {**found.bounds, "tv": found.tv, "kl": found.kl}
        return out if found.output is None else {**out, "output": found.output}
    made = context.operator(
        "certificate",
        len(operator.plan.regions),
        operator.shape[1],
        np.random.default_rng(context.entropy),
        operator=operator,
    )
    return {name: np.asarray(x, np.float64) for name, x in made.items()}


def _bounds(context: Context, case: Case) -> Mapping[str, Array]:
    """Return the certificates of a case, computed once for the library's own."""
    if not is_default(context):
        return _certified(context, case.operator)
    return context.instance.cached(
        ("combiner certificates", case.setting.name), lambda: _certified(context, case.operator)
    )


def _certificate(name: str, title: str, statement: str, source: str) -> None:
    """Register the claim that one certificate bounds every row."""

    @claim(
        f"combiner.certificate_{name}",
        title=title,
        statement=statement,
        source=source,
        status="derived",
        kind="inequality",
        observes="max_i |Ahat_i - A_i|_1 over twice its certificate, plan by plan",
        assumptions=ON,
        recorded={**EVERYWHERE, "near-pair": "holds", "one-part": "holds"},
    )
    def observe(context: Context, *, constant: float = 1.0) -> Observations:
        def quotients(case: Case) -> Iterator[float]:
            limit = np.asarray(_bounds(context, case)[name])
            # A certificate is a root of a divergence, which is known up to rounding.
            yield largest_ratio(case.tv, limit, 1e3 * case.nothing)

        return over_cases(cases(context), constant, quotients)


_certificate(
    "range",
    "Rows certified by the box and the ball of the keys",
    """x = scale (q_i - q0_t), u and l the expected key less the coordinate-wise minimum and maximum
    of the keys: eta_ij lies between sum_c min(x_c u_c, x_c l_c) and sum_c max(x_c u_c, x_c l_c),
    and |eta_ij| <= |x| rad_t; likewise in principal directions of the keys, with a ball for the
    rest.  With lo_i, hi_i the least of these, |Ahat_i - A_i|_1 <= 2 B(what_i; hi_i, lo_i).""",
    "derived: combiner.bilinear and combiner.mass_aware",
)
_certificate(
    "hoeffding",
    "Rows certified by Hoeffding's lemma",
    """R_i(t) >= max_j eta_ij - min_j eta_ij as in combiner.certificate_range:
    KL(Ahat_i|A_i) <= ln(1 + sum_t rho_i(t) (exp(R_i(t)^2/8) - 1)), then combiner.kl_row_bound.""",
    "derived: Hoeffding's lemma",
)
_certificate(
    "bennett",
    "Rows certified by Bennett's inequality",
    """eta >= -b on region t and v at least its variance under lam_t: KL(Ahat_i|A_i) <= ln(1 + sum_t
    rho_i(t) (v/b^2)(exp(b) - 1 - b)), then combiner.kl_row_bound; b by box and ball, v the least
    of (sum_c |x_c| sd_c)^2, |x|^2 sum_c sd_c^2, lo hi and x^T Cov x with its smallest eigenvalues
    replaced by the largest of them.""",
    "derived: Bennett's inequality",
)
_certificate(
    "gap",
    "Rows certified by the largest gap of a range and a variance",
    """As combiner.certificate_bennett with (b^2 exp(-v/b) + v exp(b))/(b^2 + v) in place of
    1 + (v/b^2)(exp(b) - 1 - b); it is at most Bennett's and Hoeffding's.""",
    "derived: Bennett's extremal law of two points",
)
_certificate(
    "split",
    "Rows certified by mass and local error apart",
    """With the bound KL of combiner.certificate_gap and its gaps G_t: |Ahat_i - A_i|_1 <=
    2 (1 - exp(-KL)) + 2 sum_t rho_i(t) min(tanh(R_i(t)/4), sqrt(G_t/2), sqrt(1 - exp(-G_t))).""",
    "derived: the triangle inequality with rho on the local part; TV(rho, pi) <= 1 - Zhat/Z",
)


@claim(
    "combiner.certificate_order",
    title="The sharp gap is below Hoeffding and Bennett",
    statement="""The certificate by the gap is at most those by Hoeffding's and by Bennett's
        inequality, and at least the true divergence.""",
    source=DERIVED,
    status="derived",
    kind="inequality",
    observes="max_i gap/hoeffding, gap/bennett and KL(Ahat_i|A_i) over its certificate",
    assumptions=ON,
    recorded={**EVERYWHERE, "near-pair": "holds"},
)
def _certificate_order(context: Context, *, constant: float = 1.0) -> Observations:
    def quotients(case: Case) -> Iterator[float]:
        found = _bounds(context, case)
        for name in ("hoeffding", "bennett"):
            yield largest_ratio(found["gap"], found[name], 1e3 * case.nothing)
        yield largest_ratio(case.kl, found["kl"], case.nothing)

    return over_cases(cases(context), constant, quotients)


@claim(
    "combiner.certificate_output",
    title="Certified outputs",
    statement="""|ohat_i - o_i|_2 <= min(TV_i D, (1 - exp(-KL_i)) D + sum_t pi_i(t) c_t) with
        certificates in place of TV_i and KL_i, D the diameter of all values, c_t the local bound of
        combiner.certificate_split times the spread of V in region t and pi_i(t) <=
        rho_i(t) exp(G_t).""",
    source=DERIVED,
    status="derived",
    kind="inequality",
    observes="max_i |ohat_i - o_i|_2 over its certificate, plan by plan",
    assumptions=(*ON, VALUES),
    recorded={**EVERYWHERE, "near-pair": "holds"},
)
def _certificate_output(context: Context, *, constant: float = 1.0) -> Observations:
    def quotients(case: Case) -> Iterator[float]:
        v = case.problem.values
        error = np.linalg.norm(case.ahat @ v - case.a @ v, axis=1)
        nothing = 1e3 * case.nothing * (1 + largest(v))
        yield largest_ratio(error, _bounds(context, case)["output"], nothing)

    return over_cases(cases(context), constant, quotients)


@claim(
    "combiner.certificate",
    title="The certificate of all rows against the truth",
    statement="""With pattern fixed of r spans and its defaults, the mean over rows of the smallest
        certificate is at least the mean total variation of the rows.""",
    source="derived: the least of combiner.certificate_range, _gap and _split, row by row",
    status="derived",
    kind="inequality",
    observes="mean_i (1/2)|Ahat_i - A_i|_1 against the mean certificate; r spans",
    assumptions=ON,
    recorded={
        "separable": "holds",
        "tight-spans": "holds",
        "causal": "vacuous",
        "clusters": "not applicable",
        "heads": "vacuous",
    },
    ladder=tuple({"rank": r} for r in (8, 16, 32, 64)),
    # Certificates of rows, which are computed from the matrix of the method itself.
    curve=Curve("combiner", field="row_tv_mean"),
)
def _mean_certificate(context: Context, *, rank: int | None = None) -> Observations:
    problem = problem_of(context.instance)
    n = problem.n_k
    context.require(problem.n_q == n, "has other positions for queries than for keys")
    r = max(1, round(math.sqrt(n / 2))) if rank is None else rank
    context.require(1 <= r <= n, f"r = {r} spans of {n} keys")
    operator = Combiner("fixed", rank=r).approximate(problem)
    if not isinstance(operator, PartitionedAttention):
        return Observations([0.0], 0.0, rank=r)  # no key is seen
    bound = float(np.mean(_certified(context, operator)["tv"]))
    a = problem.exact.to_dense()
    seen = np.tri(n) if problem.causal else np.ones((n, n))
    if problem.key_mask is not None:
        seen = seen * problem.key_mask
    flat = seen / seen.sum(axis=1, keepdims=True)
    trivial = float(np.abs(a - flat).sum(axis=1).mean()) / 2
    found = float(np.abs(operator.to_dense() - a).sum(axis=1).mean()) / 2
    return Observations(
        [found], bound, rank=r, predictor="the mean of V", trivial=trivial, rounding=1e-9
    )


# --- T8: outputs ----------------------------------------------------------------------------------


@claim(
    "combiner.output",
    title="What an error of a row costs the output",
    statement="""|ohat_i - o_i|_2 <= TV_i diam(V), and <= TV(rho, pi) diam({v_j: j direct} and the
        region values) + sum_t pi_i(t) TV(cond_i(.|t), lam_t) diam(V in region t).""",
    source="derived: a difference of distributions loses at most TV times the diameter; T1",
    status="derived",
    kind="inequality",
    observes="max_i |ohat_i - o_i|_2 over both bounds, plan by plan",
    assumptions=(*ON, VALUES),
    recorded={**EVERYWHERE, "tilted-pair": "holds"},
)
def _output(context: Context, *, constant: float = 1.0) -> Observations:
    def quotients(case: Case) -> Iterator[float]:
        error, first, second = output_bounds(case)
        nothing = case.nothing * (1 + largest(case.problem.values))
        for bound in (first, second):
            yield largest_ratio(error, bound, nothing)

    return over_cases(cases(context), constant, quotients)


def output_bounds(case: Case) -> tuple[Array, Array, Array]:
    """Return ``|ohat_i - o_i|_2`` and its two bounds, each (n_q,)."""
    v, plan = case.problem.values, case.plan
    error = np.linalg.norm(case.ahat @ v - case.a @ v, axis=1)
    inner = np.array([diameter(v[keys]) for keys in plan.regions])
    means = case.lam @ v
    atoms = np.empty(len(error))
    for i in range(len(error)):
        points = np.concatenate([v[plan.direct[i]], means[plan.row_regions[i]]])
        atoms[i] = diameter(points) if len(points) else 0.0
    second = case.mass / 2 * atoms + case.local / 2 @ inner
    whole = diameter(v) if len(v) else 0.0
    return np.asarray(error), case.tv * whole, np.asarray(second)


# --- T9: the floor of a plan ----------------------------------------------------------------------


@claim(
    "combiner.structural_floor",
    title="What no summaries can undercut",
    statement="""For every structured attention with a given plan, trained or not: |Ahat - A|_F^2 >=
        sum_t sum_{k>=2} sigma_k(A[I_t, Omega_t])^2, I_t the rows that use region t.""",
    source="derived: disjoint blocks of rank 1; Eckart and Young",
    status="derived",
    kind="inequality",
    observes="the floor over |Ahat - A|_F, plan by plan",
    assumptions=ON,
    recorded={**EVERYWHERE, "spiked": "holds", "separable": "holds"},
)
def _structural_floor(context: Context, *, constant: float = 1.0) -> Observations:
    some = cases(context)
    values, ends = [], []
    for case in some:
        floor = structural_floor(case.problem, case.plan)
        error = float(np.linalg.norm(case.ahat - case.a))
        nothing = case.nothing * math.sqrt(len(case.a))
        values.append(largest_ratio(np.array([floor]), np.array([error]), nothing))
        ends.append(f"{case.setting.name} {error:.3g} (floor {floor:.3g})")
    return Observations(values, float(constant), notes="; ".join(ends))


# --- T10: oracles ---------------------------------------------------------------------------------


@claim(
    "combiner.alternating",
    title="Refining reference queries never hurts",
    statement="""q0_t <- sum_i rho_i(t) q_i/sum_i rho_i(t), then lam, kappa, H(lam) and rho anew:
        sum_i KL(Ahat_i|A_i) does not increase.""",
    source="derived: alternating minimisation, each step by combiner.oracles",
    status="derived",
    kind="inequality",
    observes="each sum over the one before, from the first plan; sum of ln Z_i - ln Zhat_i",
    assumptions=ON,
    recorded={**EVERYWHERE, "one-part": "holds"},
)
def _alternating(context: Context, *, steps: int = 4, constant: float = 1.0) -> Observations:
    case = cases(context)[0]
    problem, plan = case.problem, case.plan
    sums = [float(np.sum(case.log_z - case.log_normalizer))]
    operator, q0 = case.operator, case.q0
    for _ in range(steps):
        y = np.concatenate([problem.q, np.ones((problem.n_q, 1))], axis=1)
        total = operator.far_sums(y)
        weight = total[:, -1:]
        refined = total[:, :-1] / np.where(weight >= 1e-300, weight, 1.0)
        q0 = np.where(weight >= 1e-300, refined, q0)
        if is_default(context):
            operator = PartitionedAttention(problem, plan, Reference("given", q0))
            lse = np.asarray(operator.log_normalizer)
        else:
            rng = np.random.default_rng(context.entropy)
            given = {"problem": problem, "plan": plan, "q0": q0, "rule": case.setting.rule}
            lse = implemented(context, "log_normalizer", len(plan.regions), rng, **given)
        sums.append(float(np.sum(case.log_z - lse)))
    nothing = case.nothing * len(case.a)
    values = [
        largest_ratio(np.array([max(b, 0.0)]), np.array([max(a, 0.0)]), nothing)
        for a, b in zip(sums, sums[1:], strict=False)
    ]
    listed = ", ".join(f"{x:.6g}" for x in sums)
    return Observations(values, float(constant), notes=f"{case.setting.name}: {listed}")


def with_parts(case: Case, lam: Array, masses: Array, direct: Array) -> Array:
    """Return ``ln Ahat`` (n_q, n_k) from local weights, log masses and log direct weights."""
    i, j, t = case.pairs
    out = np.where(case.region == -1, direct, -np.inf)
    with np.errstate(divide="ignore"):
        out[i, j] = masses[i, t] + np.log(lam[t, j])
    return np.asarray(out)


def total_divergence(p: Array, log_p: Array, log_q: Array) -> float:
    """Return ``sum_i KL(p_i | q_i)``, with ``sum p (e^u - 1 - u)``, ``u = ln(q/p)``.

    Where p underflows the term is q.
    """
    some = p > 1e-290
    u = np.where(some, log_q - np.where(some, log_p, 0.0), 0.0)
    with np.errstate(over="ignore", invalid="ignore"):
        near = np.abs(u) < 1e-3
        terms = np.where(near, u**2 / 2 + u**3 / 6 + u**4 / 24, np.expm1(u) - u)
        found = np.where(some, p * terms, np.exp(log_q))
    return float(np.sum(found))


@claim(
    "combiner.oracles",
    title="The best masses and the best local weights",
    statement="""sum_i KL(A_i|Ahat_i) is least for rho = pi and lam_t(j) ~ sum_{i in I_t} A_ij.
        sum_i KL(Ahat_i|A_i) is least, for given rho, for lam_t = softmax(scale qbar_t.k), qbar_t
        the mean of q_i with weights rho_i(t), and, for given lam, for g_i(t) = sum_j lam_t(j) L_ij
        + H(lam_t).""",
    source="derived: the chain rules, minimised term by term",
    status="derived",
    kind="inequality",
    observes="each least sum over that of a random change of masses or local weights, in turn",
    assumptions=ON,
    recorded=EVERYWHERE,
)
def _oracles(context: Context, *, size: float = 0.01, constant: float = 1.0) -> Observations:
    case = cases(context)[0]
    log_a = np.where(case.a > 0, case.logits - case.log_z[:, None], -np.inf)
    values = []
    nothing = case.nothing * len(case.a)
    member = case.lam > 0
    used = np.isfinite(case.g)
    with np.errstate(divide="ignore"):
        log_pi = np.where(used, np.log(case.pi), -np.inf)
    best = np.zeros_like(case.lam)
    for t, (rows, keys) in enumerate(blocks(case.plan)):
        best[t, keys] = case.a[np.ix_(rows, keys)].sum(axis=0)
    best /= np.maximum(best.sum(axis=1, keepdims=True), 1e-300)
    least = total_divergence(case.a, log_a, with_parts(case, best, log_pi, log_a))
    qbar = refined_queries(case)
    gibbs = _gibbs(case, qbar)
    by_lam = _reverse(case, log_a, gibbs, case.g, fixed=True)
    by_g = _reverse(case, log_a, case.lam, case.g)
    large = context.instance.m * context.instance.n > 10**4
    for rng in few(context, 1 if large else 3):
        lam = best * np.exp(size * rng.standard_normal(best.shape))
        lam /= np.maximum(lam.sum(axis=1, keepdims=True), 1e-300)
        move = np.where(used, size * rng.standard_normal(used.shape), 0.0)
        pi = log_pi + move
        direct = np.where(case.region == -1, log_a, -np.inf)
        norm = np.logaddexp(log_sum(direct), log_sum(pi))[:, None]
        other = with_parts(case, lam, pi - norm, direct - norm)
        values.append(_quotient(least, total_divergence(case.a, log_a, other), nothing))
        lam = np.where(member, gibbs * np.exp(size * rng.standard_normal(gibbs.shape)), 0.0)
        lam /= np.maximum(lam.sum(axis=1, keepdims=True), 1e-300)
        values.append(_quotient(by_lam, _reverse(case, log_a, lam, case.g, fixed=True), nothing))
        values.append(_quotient(by_g, _reverse(case, log_a, case.lam, case.g + move), nothing))
    return ratios(values, constant, [case.setting.name])


def _quotient(least: float, other: float, nothing: float) -> float:
    return largest_ratio(np.array([max(least, 0.0)]), np.array([other]), nothing)


def refined_queries(case: Case) -> Array:
    """Return the means of the queries weighted by rho, (r, d)."""
    mass = case.rho.sum(axis=0)[:, None]
    return np.asarray(
        np.where(mass > 1e-300, case.rho.T @ case.problem.q / np.maximum(mass, 1e-300), case.q0)
    )


def _gibbs(case: Case, q0: Array) -> Array:
    """Return the local weights of reference queries."""
    e = float(case.problem.scale) * q0 @ case.problem.k.T
    inside = np.zeros(case.lam.shape, bool)
    keys = case.plan.regions
    inside[keys.owner, keys.items] = True
    e = np.where(inside, e, -np.inf)
    w = np.exp(e - e.max(axis=1, keepdims=True, initial=-1e300))
    return np.asarray(w / w.sum(axis=1, keepdims=True)) if len(w) else w


def _reverse(case: Case, log_a: Array, lam: Array, g: Array, *, fixed: bool = False) -> float:
    """Return ``sum_i KL(Ahat_i|A_i)`` for local weights and region logits; masses as they are."""
    direct = np.where(case.region == -1, case.logits, -np.inf)
    norm = case.log_zhat if fixed else np.logaddexp(log_sum(direct), log_sum(g))
    log_hat = with_parts(case, lam, g - norm[:, None], direct - norm[:, None])
    hat = np.exp(log_hat)
    return total_divergence(hat, log_hat, log_a)


# --- T11: algebra ---------------------------------------------------------------------------------


@claim(
    "combiner.mixture",
    title="An average is no worse than the average",
    statement="""Ahat = sum_c w_c Ahat^(c): |Ahat_i - A_i|_1, KL(A_i|Ahat_i) and KL(Ahat_i|A_i) are
        at most the means of those of the components with weights w.""",
    source="derived: they are convex",
    status="derived",
    kind="inequality",
    observes="max_i of the three quotients, for the first two plans with weights (.3, .7)",
    assumptions=ON,
    recorded={**EVERYWHERE, "tilted-pair": "holds"},
)
def _mixture(context: Context, *, constant: float = 1.0) -> Observations:
    every = cases(context)
    pair = (every[0], every[min(1, len(every) - 1)])
    weights = np.array([0.3, 0.7])
    if is_default(context):
        mixed = MixtureAttention([x.operator for x in pair], weights).to_dense()
    else:
        rng = np.random.default_rng(context.entropy)
        parts = [x.ahat for x in pair]
        mixed = implemented(context, "mixture", 2, rng, parts=parts, weights=weights)
    a = every[0].a
    some = (a > 1e-290) & (mixed > 1e-290)
    u = np.log(np.where(some, mixed, 1.0)) - np.log(np.where(some, a, 1.0))
    nothing = every[0].nothing
    kept = pair[0].has_digits & pair[1].has_digits
    found = (np.abs(mixed - a).sum(axis=1) / 2, divergence(a, u)[kept], divergence(mixed, -u)[kept])
    parts_of = [(x.tv, x.kl[kept], x.kl_forward[kept]) for x in pair]
    values = [
        largest_ratio(got, weights @ np.array([x[c] for x in parts_of]), nothing)
        for c, got in enumerate(found)
    ]
    return ratios(values, constant, names_of(pair))


@claim(
    "combiner.merge",
    title="Summaries merge exactly",
    statement="""A set of keys with one reference query has the record (max e, sum w, sum w k, sum w
        (e - max e)), e_j = scale q0.k_j, w_j = exp(e_j - max e).  Records of disjoint sets, merged
        in any order, give the expected key and the entropy of the union.""",
    source=DERIVED,
    status="derived",
    kind="inequality",
    observes="the largest difference of key, value mean and entropy over their size, must be 0",
    assumptions=ON,
    recorded={"causal": "holds", "clusters": "holds", "reference": "holds", "heads": "holds"},
)
def _merge(context: Context) -> Observations:
    problem = problem_of(context.instance)
    values = []
    for rng in few(context):
        k = problem.k[rng.permutation(problem.n_k)]
        q0 = problem.q[rng.integers(problem.n_q)]
        e = float(problem.scale) * k @ q0
        cuts = np.sort(rng.integers(0, len(k) + 1, int(rng.integers(0, 6))))
        parts = [x for x in np.split(np.arange(len(k)), cuts) if len(x)]
        parts = [parts[i] for i in rng.permutation(len(parts))]
        w = np.exp(e - e.max())
        lam = w / w.sum()
        inside = np.where(lam > 0, lam, 1.0)
        want = np.append(lam @ k, -float(np.sum(inside * np.log(inside) * (lam > 0))))
        if is_default(context):
            record = Record.of(e[:0], k[:0], k[:0])
            for part in parts:
                record = record.merge(Record.of(e[part], k[part], k[part]))
            kappa, xhat, entropy = record.read(len(k))
            got = np.append(kappa, entropy)
            off = largest(xhat - want[:-1])
        else:
            got = implemented(context, "merge", 1, rng, e=e, keys=k, parts=parts)
            off = 0.0
        values.append(max(off, largest(got - want)) / (1 + largest(k)))
    return Observations(values, 0.0, rounding=1e-11)


def spans(problem: AttentionProblem, block: int) -> Plan:
    """Return spans of ``block`` keys without direct keys, their prefixes in causal problems."""
    labels = np.arange(problem.n_k) // block
    plan = label_plan(labels, n_q=problem.n_q, own=False, causal=bool(problem.causal))
    return plan.keep(problem.key_mask)[0]


@claim(
    "combiner.refinement",
    title="Finer regions have more mass, single keys all of it",
    statement="""One reference query for all regions: Zhat_i does not decrease where regions are
        split, and equals Z_i where they are single keys.""",
    source="derived: scale q.kappa + b of a union is at most ln sum_c exp(g_c)",
    status="derived",
    kind="inequality",
    observes="max_i Zhat_i/the next finer Zhat_i over blocks n, ..., 4, 2, 1, and Z_i/Zhat_i at 1",
    assumptions=ON,
    recorded={**EVERYWHERE, "equal-keys": "holds"},
)
def _refinement(context: Context, *, constant: float = 1.0) -> Observations:
    problem = problem_of(context.instance)
    few_sizes = problem.n_q * problem.n_k > 10**4
    sizes = [1]
    while sizes[-1] < problem.n_k:
        sizes.append(sizes[-1] * (8 if few_sizes else 2))
    mean = problem.q.mean(axis=0)
    values = []
    before: Array | None = None
    for size in sizes:
        plan = spans(problem, size)
        if is_default(context):
            made = PartitionedAttention(problem, plan, Reference("given", mean[None]))
            lse = np.asarray(made.log_normalizer)
        else:
            rng = np.random.default_rng(context.entropy)
            q0 = np.broadcast_to(mean, (len(plan.regions), problem.d))
            given = {"problem": problem, "plan": plan, "q0": q0, "rule": Rule()}
            lse = implemented(context, "log_normalizer", len(plan.regions), rng, **given)
        if before is None:
            before = np.asarray(problem.logsumexp)
            values.append(float(np.exp(np.max(before - lse))))
        values.append(float(np.exp(np.max(lse - before))))
        before = lse
    return Observations(values, float(constant), rounding=2 * logit_rounding(problem))


@claim(
    "combiner.promotion",
    title="Direct keys in place of a region never hurt",
    statement="""Where some rows take the keys of a region one by one, ln Zhat_i does not decrease
        and KL(Ahat_i|A_i) does not increase.""",
    source="derived: g_i(t) <= ln Z_i(Omega_t); not so of |Ahat_i - A_i|_1",
    status="derived",
    kind="inequality",
    observes="max_i of Zhat_i before over after and KL after over before; random regions a trial",
    assumptions=ON,
    recorded={
        "golden-spans": "holds",
        "causal": "holds",
        "separable": "holds",
        "clusters": "holds",
        "heads": "holds",
    },
)
def _promotion(context: Context, *, constant: float = 1.0) -> Observations:
    case = cases(context)[0]
    problem, plan = case.problem, case.plan
    context.require(len(plan.row_regions.items) > 0, "has no regions")
    values = []
    for rng in few(context, 5):
        more, kept = plan.promote(rng.random(len(plan.row_regions.items)) < 0.3)
        if is_default(context):
            made = PartitionedAttention(problem, more, Reference("given", case.q0[kept]))
            lse = np.asarray(made.log_normalizer) if len(kept) else case.log_z
        else:
            given = {
                "problem": problem, "plan": more, "q0": case.q0[kept], "rule": case.setting.rule,
            }  # fmt: skip
            lse = implemented(context, "log_normalizer", len(kept), rng, **given)
        values.append(float(np.exp(np.max(case.log_normalizer - lse))))
        before = np.maximum(case.log_z - case.log_normalizer, 0.0)
        after = np.maximum(case.log_z - lse, 0.0)
        values.append(largest_ratio(after, before, case.nothing))
    return Observations(values, float(constant), rounding=2 * logit_rounding(problem))
