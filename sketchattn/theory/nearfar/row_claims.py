"""Claims: what rows are, when they are exact, the first order, merging, and safety of decoders."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...kernels.softmax import LN2
from ...operators.nearfar import Clusters, NearFarAttention
from ...problem import AttentionProblem
from ..combiner.cases import largest_ratio
from ..engine.arguments import Array
from ..engine.assumptions import NONZERO, VALUES
from ..engine.observers import (
    EPS,
    few,
    implemented,
    is_default,
    largest,
    logit_rounding,
    on_heads,
    problem_of,
    weight_rounding,
)
from ..engine.records import Observations
from ..engine.registry import Context, claim
from .cases import (
    EVERYWHERE,
    ON,
    cases,
    forms_of,
    given_clusters,
    make_case,
    matrix_of,
    names_of,
)
from .formulas import (
    Case,
    ClusterMoments,
    Form,
    cluster_moments,
    forms,
    merged_moments,
    structure_of,
    tilted_remainder,
)

# Distinct keys of problems whose keys repeat.
DISTINCT = 8
# Logarithms of shares below which weights inside of a cluster have no digits.
FAINTEST = -600.0

# --- what rows are --------------------------------------------------------------------------------


@claim(
    "nearfar.rows",
    title="Rows are distributions, outputs lie between the values",
    statement="""For no, one and two directions of the first order Ahat_ij >= 0, Ahat 1 = 1, Ahat_ij
        = 0 where row i does not see key j, and every coordinate of the output lies between the
        least and the largest of the values that the row sees.""",
    source="derived: weights (1 + sum_a y_a z_a)/m with |y_a z_a| <= 1/h are not negative",
    status="derived",
    kind="inequality",
    observes="max |sum_j Ahat_ij - 1|, -Ahat_ij, unseen Ahat_ij, excess over the values/max|V|",
    assumptions=ON,
    recorded={**EVERYWHERE, "across": "holds"},
)
def _rows(context: Context) -> Observations:
    problem, values = problem_of(context.instance), []
    seen = problem.visible()
    v = problem.values if problem.d_v else np.zeros((problem.n_k, 0))
    size = largest(v)
    for order in range(min(2, problem.d) + 1):
        for case in cases(context, first_order=order):
            off = _score_rounding(case)
            values += [
                max(largest(case.ahat.sum(axis=1) - 1) - off, 0.0),
                max(-float(case.ahat.min()), 0.0),
                largest(case.ahat[~seen]),
            ]
            if size > 0:
                made = is_default(context)
                out = case.form.method().attend(problem) if made else case.ahat @ v
                values.append(max(_excess(out / size, v / size, seen) - off, 0.0))
    rounding = weight_rounding(problem) + 4 * (problem.n_k + 16) * EPS
    return Observations(values, 0.0, rounding=rounding)


def _score_rounding(case: Case) -> float:
    """Return how far a row may be from one because scores are centred up to rounding.

    Their mean is that of m rounded differences and products, of the size of the longest key in the
    metric; slopes are at most 1 over the largest score.  Where all that a direction has is rounding
    this is large.
    """
    labels, _, _, scores = case.structure
    root, k = case.operator.clusters.root, case.problem.k
    x = k if root is None or not len(scores) else k @ root
    worst = 0.0
    for c in np.flatnonzero(case.counts) if len(scores) else ():
        members = labels == c
        inside = x[members]
        unit = largest(inside - inside.mean(axis=0))
        length = float(np.linalg.norm(inside, axis=1).max())
        rounded = (len(inside) + inside.shape[1] + 8) * EPS * length
        for z in scores[:, members]:
            if largest(z) > 0:
                worst = max(worst, min(rounded / (unit * largest(z)), 1.0))
    return worst


def _excess(out: Array, v: Array, seen: Array) -> float:
    """Return by how much outputs leave the box of the values that they see."""
    worst = 0.0
    for t in range(v.shape[1]):
        low = np.where(seen, v[:, t], np.inf).min(axis=1)
        high = np.where(seen, v[:, t], -np.inf).max(axis=1)
        over = np.maximum(low - out[:, t], out[:, t] - high)
        worst = max(worst, float(over.max(initial=0.0)))
    return worst


# --- when they are exact --------------------------------------------------------------------------


@claim(
    "nearfar.exact_near",
    title="Exact where all visible clusters are near",
    statement="""Ahat = A if a row may choose as many clusters as it sees and tau = 0, and where
        its own block is all that it sees.""",
    source="derived: all keys are read one by one",
    status="derived",
    kind="inequality",
    observes="max_i |Ahat_i - A_i|_1, which must be zero",
    assumptions=ON,
    recorded=EVERYWHERE,
)
def _exact_near(context: Context) -> Observations:
    problem, values = problem_of(context.instance), []
    n = len(problem.kept_keys)
    some = [form._replace(near=n, tau=0.0) for form in forms_of(context)]
    if problem.causal:
        some.append(Form("one block", n, 1))
    for form in some:
        case = make_case(context, form, matrix_of(problem, form))
        values.append(2 * float(case.tv.max()))
    return Observations(values, 0.0, rounding=weight_rounding(problem))


@claim(
    "nearfar.exact_keys",
    title="Exact where the keys of every cluster are equal",
    statement="""Ahat = A, with no near cluster, for every second and first order, if the keys of
        each cluster are equal: in particular with one key a cluster, and where all keys are one, of
        which the output is the mean of the values.""",
    source="derived: sigma, rho and all scores are zero, and ln m_c + scale q_i.k_c is the mass",
    status="derived",
    kind="inequality",
    observes="max_i |Ahat_i - A_i|_1 for single keys, eight keys repeated at random, and one key",
    assumptions=ON,
    recorded=EVERYWHERE,
)
def _exact_keys(context: Context) -> Observations:
    problem, values, rounding = problem_of(context.instance), [], 0.0
    n = len(problem.kept_keys)
    block = forms(problem)[0].block
    for trial, rng in enumerate(few(context, 3)):
        # Single keys are no draw.
        for distinct in (DISTINCT, 1) if trial else (None, DISTINCT, 1):
            ids = np.arange(n) % block
            made = problem
            if distinct is not None:
                ids = rng.integers(0, distinct, n)
                k = problem.k.copy()
                chosen = problem.kept_keys[rng.integers(0, n, distinct)]
                k[problem.kept_keys] = problem.k[chosen][ids]
                made = _with(problem, k=k)
            count = block if distinct is None else distinct
            for second, order in (("frozen", 0), ("none", min(1, problem.d))):
                form = Form("given", block, count, first_order=order, second_order=second)
                case = make_case(context, form, given_clusters(made, ids, form))
                values.append(2 * float(case.tv.max()))
            rounding = max(rounding, weight_rounding(made))
    return Observations(values, 0.0, rounding=2 * rounding)


def _with(problem: AttentionProblem, **arrays: Any) -> AttentionProblem:
    """Return a problem with some of its arrays, or the causal mask, replaced."""
    v = problem.values if problem.d_v else None
    given = {"q": problem.q, "k": problem.k, "v": v, "causal": problem.causal, **arrays}
    return AttentionProblem(**given, scale=problem.scale, key_mask=problem.key_mask)


# --- the first order ------------------------------------------------------------------------------


@claim(
    "nearfar.first_order_divergence",
    title="One direction of the first order never raises the divergence",
    statement="""With the same clusters, masses and near keys, KL(Ahat_i|A_i) with one direction is
        at most that without, for every row, direction, clip and phi.""",
    source="derived: E[w ln w] <= E[w (w - 1)] = y^2 E z^2 <= y y0 E z^2 for w = 1 + y z",
    status="derived",
    kind="inequality",
    observes="max_i KL with one direction over KL without",
    assumptions=ON,
    recorded={**EVERYWHERE, "across": "holds"},
)
def _first_order_divergence(context: Context, *, constant: float = 1.0) -> Observations:
    values, some = [], cases(context)
    context.require(problem_of(context.instance).d > 0, "has keys without coordinates")
    for case, other in zip(some, cases(context, first_order=1), strict=True):
        zero, one = (np.maximum(x.kl, 0.0) for x in (case, other))
        nothing = np.maximum(case.kl_nothing, other.kl_nothing)
        values.append(largest_ratio(one - nothing, zero, float(nothing.min())))
    return Observations(values, float(constant), notes=names_of(some))


def _line(problem: AttentionProblem, labels: Array, reach: float) -> Array:
    """Return keys of every cluster on a line through their mean, logits within ``reach`` of it."""
    length = abs(float(problem.scale)) * float(np.linalg.norm(problem.q, axis=1).max(initial=0.0))
    k = problem.k.copy()
    for c in range(int(labels.max(initial=-1)) + 1):
        members = np.flatnonzero(labels == c)
        if not len(members):
            continue
        inside = k[members]
        kappa = inside.mean(axis=0)
        away = inside - kappa
        far = away[np.argmax(np.linalg.norm(away, axis=1))]
        norm = float(np.linalg.norm(far))
        if not norm > 0:
            continue
        s = away @ (far / norm)
        s -= s.mean()
        s /= max(largest(s), 1e-300) * length
        k[members] = kappa + reach * s[:, None] * (far / norm)
    return k


@claim(
    "nearfar.first_order_rate",
    title="The first order makes values right to second order where the scores follow the logits",
    statement="""If the logits of a row inside of a cluster are a function y z_j of the scores plus
        a number, as for keys on a line and for queries along the direction, and |y z_j| <= 1, then
        the weights inside of the cluster are off by E|a^2 - E a^2|/2 + O(r^3) with one direction
        and by E|a| + O(r^2) without, a = y z of size r: halving the cluster divides the first by
        four, the second by two.""",
    source="derived: the expansion of tilted weights with its remainder",
    status="derived",
    kind="inequality",
    observes="|rate - 4| and |rate - 2| for clusters on lines, with the tolerance of the remainder",
    assumptions=ON,
    recorded=EVERYWHERE,
)
def _first_order_rate(context: Context, *, reach: float = 2.0**-7) -> Observations:
    problem, values, bounds = problem_of(context.instance), [], []
    longest = float(np.linalg.norm(problem.q, axis=1).max(initial=0.0))
    context.require(problem.scale != 0 and longest > 0, "has no queries: all logits are equal")
    some = forms_of(context, near=0)
    large = problem.n_q * problem.n_k > 10**4
    for form in some[-1:] if large else some:
        base = matrix_of(problem, form)
        for order, rate in ((1, 4.0), (0, 2.0)):
            sums = []
            for size in (reach, reach / 2):
                case = _on_lines(context, base, form._replace(first_order=order), size)
                sums.append(_distances(case, order))
            (found, _, rest), (half, lead, less) = sums
            # found = rate lead +- rest and half = lead +- less.
            context.require(lead > 2 * less, "has no clusters whose logits have so many digits")
            values.append(abs(found / half - rate) if half > 0 else rate)
            bounds.append((rest + rate * less) / (lead - less))
    return Observations(values, bounds)


def _on_lines(context: Context, base: NearFarAttention, form: Form, size: float) -> Case:
    """Return the case with the clusters of ``base``, moved onto lines."""
    problem, (labels, *_) = problem_of(context.instance), structure_of(base)
    made = _with(problem, k=_line(problem, labels, size))
    old = base.clusters
    clusters = Clusters(old.labels, old.count, None, form.first_order, old.second_order)
    return make_case(context, form, NearFarAttention(made, clusters, base.layout, 0, 0.0))


def _distances(case: Case, order: int) -> tuple[float, float, float]:
    """Return the distance of weights inside of clusters, its leading term, and the rest of it.

    Sums over rows and far clusters of means over keys; clusters without digits are left out, by
    their exact masses, which hardly depend on the size of clusters.
    """
    problem, found, lead, rest = case.problem, 0.0, 0.0, 0.0
    rounded = 2 * logit_rounding(problem)
    for c in np.flatnonzero(case.counts > 1):
        members = case.structure.labels == c
        rows = case.seen[:, c] & (case.mass[:, c] - case.log_z > FAINTEST)
        a = float(problem.scale) * problem.q[rows] @ (problem.k[members] - case.moments[1][c]).T
        exact = np.exp(a)
        exact /= exact.mean(axis=1, keepdims=True)
        weights = case.ahat[np.ix_(rows, members)]
        weights = weights / weights.mean(axis=1, keepdims=True)
        found += float(np.abs(weights - exact).mean(axis=1).sum())
        square = a**2
        second = np.abs(square - square.mean(axis=1, keepdims=True)).mean(axis=1) / 2
        beyond = np.asarray(tilted_remainder(np.minimum(np.abs(a).max(axis=1), 1.0)))
        lead += float(second.sum() if order else np.abs(a).mean(axis=1).sum())
        rest += float(beyond.sum() + (0.0 if order else second.sum()))
        rest += len(a) * (rounded + 16 * (int(members.sum()) + 4) * EPS)
    return found, lead, rest


# --- moments merge --------------------------------------------------------------------------------


def _library_moments(k: Array, v: Array, parts: list[Array]) -> list[ClusterMoments]:
    """Return the moments of parts as the library keeps them; means of values are plain."""
    labels = np.full(len(k), -1, np.int64)
    for c, part in enumerate(parts):
        labels[part] = c
    made = Clusters(labels, len(parts), None, 0, True).moments(k)
    return [
        ClusterMoments(
            len(part),
            made.kappa[:, c],
            made.half[:, c] * 2 / LN2,
            v[part].mean(axis=0),
            float(made.rho[c]),
        )
        for c, part in enumerate(parts)
    ]


@claim(
    "nearfar.merge",
    title="Moments merge exactly, radii as bounds",
    statement="""Count, mean key, variances of coordinates and mean value of a union of clusters are
        sum m_c, sum m_c kappa_c/m, sum m_c (D_c + (kappa_c - kappa)^2)/m and sum m_c vbar_c/m; no
        key is farther from kappa than max_c (rho_c + |kappa_c - kappa|).""",
    source="derived: sums are additive; the triangle inequality",
    status="derived",
    kind="inequality",
    observes="the largest difference of the moments over sizes, and radius less bound, must be 0",
    assumptions=ON,
    recorded={**EVERYWHERE, "far-shares": "holds"},
)
def _merge(context: Context) -> Observations:
    problem, values = problem_of(context.instance), []
    k = np.ascontiguousarray(problem.k[problem.kept_keys])
    v = problem.values[problem.kept_keys] if problem.d_v else np.zeros((len(k), 0))
    sizes = max(largest(k), 1e-150), max(largest(v), 1e-150)
    for rng in few(context):
        cuts = np.sort(rng.integers(0, len(k) + 1, int(rng.integers(0, 6))))
        parts = [x for x in np.split(rng.permutation(len(k)), cuts) if len(x)]
        whole = cluster_moments(k, v)
        if is_default(context):
            merged = merged_moments(_library_moments(k, v, parts))
        else:
            d, given = problem.d, {"keys": k, "values": v, "parts": parts}
            flat = implemented(context, "merge", 1, rng, **given)
            merged = ClusterMoments(
                int(flat[0]), flat[1 : d + 1], flat[d + 1 : 2 * d + 1], flat[2 * d + 1 : -1],
                float(flat[-1]),
            )  # fmt: skip
        values += [
            float(abs(merged.size - whole.size)),
            largest(merged.key - whole.key) / sizes[0],
            largest((merged.variance - whole.variance) / sizes[0]) / sizes[0],
            largest(merged.value - whole.value) / sizes[1],
            max(whole.radius - merged.radius, 0.0) / sizes[0],
        ]
    rounding = 8 * (len(k) + problem.d + 16) * EPS
    return Observations(values, 0.0, rounding=rounding)


# --- a decoder ------------------------------------------------------------------------------------


@claim(
    "nearfar.causal",
    title="No causal row depends on later positions",
    statement="""Of a causal problem the outputs of the first t rows do not change with the queries,
        keys and values from position t on, for any number of directions and whatever metric is
        asked for.""",
    source="derived: blocks are clustered one by one, distances are of keys, rows choose alone",
    status="derived",
    kind="inequality",
    observes="max_{i < t} |ohat_i - ohat_i'|/max|v| for random t and later positions, must be 0",
    assumptions=(*ON, VALUES, NONZERO),
    recorded=EVERYWHERE,
)
def _causal(context: Context) -> Observations:
    problem, values = problem_of(context.instance), []
    context.require(problem.n_q == problem.n_k, "has other queries than keys")
    made = problem if problem.causal else _with(problem, causal=True)
    form = forms(made)[0]._replace(first_order=min(1, problem.d), metric="query")
    size = largest(problem.values)

    def attend(head: AttentionProblem) -> Array:
        if is_default(context):
            return np.asarray(form.method().attend(head), np.float64)
        rng = np.random.default_rng(context.entropy)
        return implemented(context, "output", form.clusters, rng, problem=head, form=form)

    before = attend(made)
    for rng in few(context, 10):
        t = int(rng.integers(1, problem.n_q)) if problem.n_q > 1 else 1
        later = {"q": made.q.copy(), "k": made.k.copy(), "v": made.values.copy()}
        for x in later.values():
            # Rows of the problem, enlarged along a random coordinate: another metric.
            x[t:] = x[rng.permutation(len(x))[: len(x) - t]]
            x[t:, int(rng.integers(x.shape[1]))] *= -2
        after = attend(_with(made, **later))
        values.append(largest(after[:t] - before[:t]) / size)
    return Observations(values, 0.0, rounding=2 * weight_rounding(made))


# --- the estimate ---------------------------------------------------------------------------------


@claim(
    "nearfar.estimate",
    title="The estimate of the error bounds it",
    statement="""|Ahat V - A V|_F <= |A V|_F e with the estimate e^2 = sum_i sum_c Pi_ic^2
        sigma_ic^2 V_c/|Ahat V|_F^2 over the far clusters.""",
    source=(
        "NearFarAttention.estimated_error taken for a bound; refuted: one key of large logit among "
        "others of small ones hardly moves a mean and a variance, and has all of the mass"
    ),
    status="refuted",
    kind="inequality",
    observes="the relative error of the output over the estimate",
    assumptions=(*ON, VALUES, NONZERO),
    recorded={"unseen-key": "violated", **on_heads("holds", violated="5.4")},
)
def _estimate(context: Context, *, constant: float = 1.0) -> Observations:
    problem, values = problem_of(context.instance), []
    for case in cases(context):
        out = case.ahat @ problem.values
        exact = case.a @ problem.values
        size = float(np.linalg.norm(exact))
        context.require(size > 0, "has outputs that are zero")
        error = float(np.linalg.norm(out - exact)) / size
        if is_default(context):
            estimate = case.operator.estimated_error(problem.values)
        else:
            rng = np.random.default_rng(context.entropy)
            given = {"problem": problem, "operator": case.operator}
            found = implemented(context, "estimate", len(case.counts), rng, **given)
            estimate = float(found)
        values.append(error / (estimate + case.weight_nothing))
    return Observations(values, float(constant))
