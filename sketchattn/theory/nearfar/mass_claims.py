"""Claims: the masses of far clusters, what bounds them, and the frozen second order."""

from __future__ import annotations

import math

import numpy as np

from ...problem import AttentionProblem
from ..combiner.cases import largest_ratio
from ..engine.arguments import Array
from ..engine.observers import few, logit_rounding, problem_of
from ..engine.records import Observations
from ..engine.registry import Context, claim
from .cases import EVERYWHERE, ON, cases, make_case, matrix_of, names_of
from .formulas import (
    Case,
    frozen_second_order,
    frozen_window,
    one_cluster,
    others,
)

# Lengths of queries, and the largest standard deviation of logits, of one cluster.
STEPS, WIDEST = 33, 8.0
# Multiples of a query beyond this are no longer taken, where its logits hardly differ.
LONGEST = 1e6


def _from(start: Array, log: Array) -> Array:
    """Return differences of logarithms, 0 where the first is -inf."""
    some = np.isfinite(start) & np.isfinite(log)
    return np.where(some, np.where(some, start, 0.0) - np.where(some, log, 0.0), 0.0)


def _growth(x: Array) -> float:
    """Return ``e^max x``, which must be at most 1; of none 0."""
    return float(np.exp(x.max())) if x.size else 0.0


# --- without a second order: a lower bound --------------------------------------------------------


@claim(
    "nearfar.jensen",
    title="Without a second order every mass is a lower bound",
    statement="""With phi = 0 and no first order, g_ic = ln m_c + scale q_i.kappa_c <=
        ln sum_{j in c} e^L_ij for every far cluster, hence Zhat_i <= Z_i, and KL(Ahat_i|A_i) =
        ln Z_i - ln Zhat_i.""",
    source="derived: Jensen's inequality, and the Gibbs variational principle for equal weights",
    status="derived",
    kind="inequality",
    observes="max of g - ln mass, ln Zhat - ln Z and |KL - ln Z + ln Zhat|, which must be 0",
    assumptions=ON,
    recorded={**EVERYWHERE, "near-pair": "holds", "far-shares": "holds"},
)
def _jensen(context: Context) -> Observations:
    values, some = [], cases(context, second_order="none")
    for case in some:
        above = np.where(case.seen, case.g - np.where(case.seen, case.mass, 0.0), 0.0)
        gap = case.log_z - case.log_normalizer
        values += [
            max(float(above.max(initial=0.0)), 0.0),
            max(float(-gap.min(initial=0.0)), 0.0),
            # In units in which what is rounding is the same for all rows.
            float((np.abs(case.kl - gap) * case.nothing / case.kl_nothing).max(initial=0.0)),
        ]
    rounding = max(x.nothing for x in some)
    return Observations(values, 0.0, rounding=rounding, notes=names_of(some))


@claim(
    "nearfar.promotion",
    title="Without a second order more near clusters never hurt the divergence",
    statement="""With phi = 0, no first order and tau = 0, ln Zhat_i does not decrease and
        KL(Ahat_i|A_i) does not increase with the number p of near clusters; Zhat_i = Z_i where all
        visible clusters are near.""",
    source="derived: clusters are chosen in an order that p does not change; nearfar.jensen",
    status="derived",
    kind="inequality",
    observes="max_i Zhat_i(p)/Zhat_i(p') for p < p' = 0, 1, 4, 16, ..., all; Z_i/Zhat_i(all)",
    assumptions=ON,
    recorded={**EVERYWHERE, "far-shares": "holds"},
)
def _promotion(context: Context, *, constant: float = 1.0) -> Observations:
    problem, values = problem_of(context.instance), []
    first = cases(context, second_order="none")[0]
    count, before = len(first.counts), first.log_normalizer
    steps = [p for p in (0, 1, 4, 16, 64) if p < count] + [count]
    for i, p in enumerate(steps):
        form = first.form._replace(near=p, tau=0.0)
        lse = make_case(context, form, matrix_of(problem, form)).log_normalizer
        if i:
            values.append(_growth(before - lse))
        before = lse
    values.append(_growth(first.log_z - before))
    return Observations(values, float(constant), rounding=2 * logit_rounding(problem))


# --- intervals ------------------------------------------------------------------------------------


def _intervals(case: Case) -> tuple[Array, Array]:
    """Return lower and upper logarithms of the shares of far clusters, by lower masses and w."""
    far = case.structure.far
    low = np.where(far & case.seen, case.g, case.lower)
    high = np.where(far, low + case.width, -np.inf)
    least = low - np.logaddexp(low, others(high, case.direct_mass))
    most = high - np.logaddexp(high, others(low, case.direct_mass))
    return least, most


@claim(
    "nearfar.interval",
    title="The mass of a cluster from its mean key and radius",
    statement="""With w_ic = scale |q_i| rho_c: g_ic <= ln sum_{j in c} e^L_ij <= g_ic + w_ic for
        phi = 0, and |ln sum_{j in c} e^L_ij - g_ic| <= w_ic for the frozen phi. Hence, for phi = 0,
        the share of a cluster in a row lies between e^g/(e^g + sum of the others at their upper
        ends) and e^(g + w)/(e^(g + w) + sum of the others at their lower ends).""",
    source="derived: a mean of exponentials lies between that of the mean and the largest",
    status="derived",
    kind="inequality",
    observes="max (ln mass - g)/w, |ln mass - g|/w, lower end/share and share/upper end",
    assumptions=ON,
    recorded={**EVERYWHERE, "far-shares": "holds"},
)
def _interval(context: Context, *, constant: float = 1.0) -> Observations:
    values = []
    plain, frozen = (cases(context, second_order=x) for x in ("none", "frozen"))
    for case in plain:
        away = _from(np.where(case.seen, case.mass, -np.inf), case.g)
        values.append(largest_ratio(away, case.width, case.nothing))
        least, most = _intervals(case)
        share = np.where(case.structure.far, case.mass - case.log_z[:, None], -np.inf)
        # Logarithms that differ by no more than rounding are the same.
        values.append(_growth(_from(least, share) - case.nothing))
        values.append(_growth(_from(share, most) - case.nothing))
    for case in frozen:
        away = np.abs(_from(np.where(case.seen, case.mass, -np.inf), case.g))
        values.append(largest_ratio(away, case.width, case.nothing))
    return Observations(values, float(constant), notes=names_of(plain))


@claim(
    "nearfar.tanh",
    title="Rows by the radii of their far clusters",
    statement="""With W_i = max_c scale |q_i| rho_c over the far clusters of row i and no first
        order, the total variation of the shares of direct keys and far clusters is at most
        tanh(W_i/4), and (1/2)|Ahat_i - A_i|_1 <= tanh(W_i/2), for phi = 0; with the frozen phi
        tanh(W_i/2) and tanh(3 W_i/4).""",
    source="derived: combiner.tanh_bound; log-ratios lie in [-w, 0], [-w, w], [-w, w], [-w, 2 w]",
    status="derived",
    kind="inequality",
    observes="max_i of the four quotients",
    assumptions=ON,
    recorded={**EVERYWHERE, "near-pair": "holds", "far-shares": "holds"},
)
def _tanh(context: Context, *, constant: float = 1.0) -> Observations:
    values = []
    for second_order, factors in (("none", (0.25, 0.5)), ("frozen", (0.5, 0.75))):
        for case in cases(context, second_order=second_order):
            widest = case.width.max(axis=1, initial=0.0)
            for found, factor in zip((case.share_tv, case.tv), factors, strict=True):
                bound = np.tanh(factor * widest)
                values.append(largest_ratio(found, bound, case.weight_nothing))
    return Observations(values, float(constant))


# --- the frozen second order ----------------------------------------------------------------------


@claim(
    "nearfar.frozen",
    title="The second order is frozen continuously, and never above three bounds",
    statement="""phi_ic = g_ic - ln m_c - scale q_i.kappa_c satisfies 0 <= phi <=
        min(sigma^2/2, s_m sigma, scale |q_i| rho_c), 0 for m = 1. Along a query of length t it
        does not decrease, and from t to t' it grows by at most the larger of
        min(sigma', s_m) (sigma' - sigma) and w' - w.""",
    source="derived: sigma^2/2 continued by its tangent, and the smaller of two that grow",
    status="derived",
    kind="inequality",
    observes="max phi over its bound; how far it falls, or grows by more, which must be 0",
    assumptions=ON,
    recorded={**EVERYWHERE, "near-pair": "holds"},
)
def _frozen(context: Context, *, constant: float = 1.0) -> Observations:
    problem, values, bounds = problem_of(context.instance), [], []
    kept = problem.kept_keys
    for rng in few(context, 5):
        for m in (1, 8, 32, len(kept)):
            k = problem.k[rng.permutation(kept)[: min(m, len(kept))]]
            q = problem.q[rng.integers(problem.n_q)]
            spread = abs(float(problem.scale)) * float(np.sqrt(q**2 @ k.var(axis=0)))
            top = min(WIDEST / spread, LONGEST) if spread > 0 else 1.0
            lengths = np.linspace(0.0, top, STEPS)
            made = AttentionProblem(lengths[:, None] * q, k, scale=problem.scale)
            form = one_cluster(made)
            case = make_case(context, form, matrix_of(made, form))
            phi = case.log_normalizer - case.lower[:, 0]
            sigma, width = case.sigma[:, 0], case.width[:, 0]
            s = float(_slope(len(k)))
            limit = np.minimum(np.minimum(sigma**2 / 2, s * sigma), width)
            nothing = case.nothing
            values.append(largest_ratio(phi, limit, nothing))
            steps = np.diff(phi)
            most = np.maximum(np.minimum(sigma[1:], s) * np.diff(sigma), np.diff(width))
            off = np.maximum(np.maximum(-steps, steps - most), -phi[1:])
            values.append(max(float(off.max()) - 2 * nothing, 0.0))
            bounds += [float(constant), 0.0]
    return Observations(values, bounds)


def _slope(m: int) -> float:
    """Return s_m, the slope of phi far out."""
    far = np.asarray(frozen_second_order(np.array([1e3, 1e3 + 1]), m))
    return float(far[1] - far[0])


def _observed_phi(context: Context, sigma: float, m: int) -> float:
    """Return phi of a cluster of m keys whose logits have the standard deviation sigma."""
    # Two keys are so far out that the radius does not bound phi.
    k = np.zeros((m, 1))
    if m > 1:
        k[:2, 0] = math.sqrt(m / 2), -math.sqrt(m / 2)
    made = AttentionProblem(np.array([[sigma]]), k, scale=1.0)
    form = one_cluster(made)
    case = make_case(context, form, matrix_of(made, form))
    return float(case.log_normalizer[0]) - math.log(m)


def _normal_logits(context: Context, sigma: float, m: int, draws: int) -> list[float]:
    """Return for each trial the mean log-mean-exp of ``draws`` sets of m normal logits."""
    found = []
    for rng in context.generators():
        x = sigma * rng.standard_normal((draws, m))
        top = x.max(axis=1)
        found.append(float((top + np.log(np.exp(x - top[:, None]).mean(axis=1))).mean()))
    return found


NORMAL = {"reference": "holds"}


@claim(
    "nearfar.frozen_above",
    title="The frozen second order is not below that of normal logits",
    statement="""For m independent normal logits of standard deviation sigma, E ln mean_j
        e^(sigma g_j) <= integral_0^sigma min(x, mu_m) dx, mu_m the mean of the largest of m
        standard normal numbers: at most phi(sigma, m) + (mu_m - s_m)_+ sigma.""",
    source="derived: its derivative in sigma is at most mu_m, and sigma by Gaussian integration by"
    " parts",
    status="derived",
    kind="expectation",
    observes="log-mean-exp of m normal logits, mean of 64 draws a trial",
    recorded=NORMAL,
)
def _frozen_above(
    context: Context, *, sigma: float = 4.0, m: int = 32, draws: int = 64
) -> Observations:
    low, _ = frozen_window(sigma, m)
    bound = _observed_phi(context, sigma, m) - low
    values = _normal_logits(context, sigma, m, draws)
    return Observations(values, bound, rounding=1e-12 * (1 + sigma) ** 2)


@claim(
    "nearfar.frozen_gap",
    title="And it is above by less than 1.5 nats",
    statement="""phi(sigma, m) - E ln mean_j e^(sigma g_j) <= ln m - mu_m^2/2 + (s_m - mu_m)_+
        sigma: 1.07, 1.32 and 1.41 for m = 8, 32 and 64. The difference to phi with mu_m in place
        of s_m does not decrease with sigma and tends to ln m - mu_m^2/2.""",
    source="derived: nearfar.frozen_above, and for large sigma the largest logit alone",
    status="derived",
    kind="expectation",
    observes="phi less log-mean-exp of m normal logits, mean of 64 draws a trial",
    recorded=NORMAL,
)
def _frozen_gap(
    context: Context, *, sigma: float = 10.0, m: int = 32, draws: int = 64
) -> Observations:
    phi = _observed_phi(context, sigma, m)
    values = [phi - x for x in _normal_logits(context, sigma, m, draws)]
    return Observations(values, frozen_window(sigma, m)[1], rounding=1e-12 * (1 + sigma) ** 2)
