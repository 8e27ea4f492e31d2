"""Claims: the lemmas and the proposition of Informer, and what a choice of rows costs."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from ...base.draws import Draw
from ...errors.perturbation import value_diameter
from ...problem import AttentionProblem
from ...zoo.informer.method import Informer, published_count
from ...zoo.informer.statistics import row_statistic
from ..engine.arguments import Array
from ..engine.assumptions import DENSE, NOT_CAUSAL, ROWS, VALUES
from ..engine.instances import Instance, instance
from ..engine.observers import (
    RANKS,
    ROUNDING,
    few,
    implemented,
    is_default,
    largest,
    logit_reach,
    logit_rounding,
    output_rounding,
    problem_of,
    quotient,
    square,
    weight_rounding,
)
from ..engine.records import Observations
from ..engine.registry import Context, claim
from .formulas import (
    DERIVED,
    PAPER,
    miss_probability,
    rank_agreement,
    selection_bound,
    variation_bound,
)

# --- instances -----------------------------------------------------------------------------------


@instance("shifted-keys", "64 queries, 256 Gaussian keys with one vector of norm 20 sqrt(16) added")
def _shifted_keys() -> AttentionProblem:
    rng = np.random.default_rng(21)
    q, k, v = rng.standard_normal((64, 16)), rng.standard_normal((256, 16)), rng.random((256, 3))
    return AttentionProblem(q, k + 20 * rng.standard_normal(16), v)


@instance("causal", "causal, 40 queries and keys, d = 5, d_v = 3: rows that see different keys")
def _causal() -> AttentionProblem:
    rng = np.random.default_rng(22)
    q, k, v = rng.standard_normal((40, 5)), rng.standard_normal((40, 5)), rng.random((40, 3))
    return AttentionProblem(2 * q, k, v, causal=True)


@instance(
    "two-values", "two keys of value 0 and 1, 24 queries: where bounds by divergence are near"
)
def _two_values() -> AttentionProblem:
    q = np.linspace(-2.0, 2.0, 24)[:, None]
    return AttentionProblem(q, np.array([[0.0], [1.0]]), np.array([[0.0], [1.0]]), scale=1.0)


@instance("lazy-queries", "two keys of value 0 and 1; 4 of 24 queries choose, 20 hardly do")
def _lazy_queries() -> AttentionProblem:
    q = np.concatenate([[-6.0, -5.0, 5.0, 6.0], np.linspace(-0.1, 0.1, 20)])[:, None]
    return AttentionProblem(q, np.array([[0.0], [1.0]]), np.array([[0.0], [1.0]]), scale=1.0)


@instance("two-rows", "weights (1, 1, 1, 1e-6) and (10, 1, 1, 1): a flat row with a hole, a peak")
def _two_rows() -> tuple[Array, Array]:
    weights = np.array([[1.0, 1.0, 1.0, 1e-6], [10.0, 1.0, 1.0, 1.0]])
    return weights / weights.sum(axis=1, keepdims=True), np.eye(4)


@instance(
    "skewed-rows", "ten logits: five of 1 and five of -1; one of 1.01, one of -3.3, eight between"
)
def _skewed_rows() -> tuple[Array, Array]:
    logits = np.ones((2, 10))
    logits[0, 5:] = -1.0
    logits[1] = [1.01, *(8 * [(3.3 - 1.01) / 8]), -3.3]
    weights = np.exp(logits)
    return weights / weights.sum(axis=1, keepdims=True), np.eye(10)


# --- what observers share ------------------------------------------------------------------------

ON = (DENSE, ROWS)
WITH_VALUES = (DENSE, VALUES, ROWS)
EVERYWHERE = {
    "clusters": "holds",
    "reference": "holds",
    "worked": "holds",
    "causal": "holds",
    "heads": "holds",
}


def _statistic(context: Context, problem: AttentionProblem, name: str, **parameters: Any) -> Array:
    """Return a statistic of the rows, by the implementation that was handed in if any."""
    if is_default(context):
        return row_statistic(problem, name, **parameters)
    rng = np.random.default_rng(context.entropy)
    return implemented(
        context, "statistic", problem.n_q, rng, problem=problem, statistic=name, **parameters
    )


def _output(
    context: Context, problem: AttentionProblem, rows: Array, rng: np.random.Generator
) -> Array:
    """Return Ohat with the exact rows I."""
    if is_default(context):
        fill = "cummean" if problem.causal else "mean"
        method = Informer(max(len(rows), 1), fill=fill)
        return method.attend(problem, draw=Draw(pilot_rows=rows))
    out: Array = implemented(context, "informer", len(rows), rng, problem=problem, rows=rows)
    return np.asarray(out @ problem.values)


class _Rows(NamedTuple):
    """Hold A, its uniform rows, and e_i, written from the definitions."""

    a: Array
    flat: Array
    counts: Array
    errors: Array


def _rows(seen: Instance) -> _Rows:
    """Return what rows are compared with, over the keys that each of them sees."""

    def compute() -> _Rows:
        problem = problem_of(seen)
        keep = np.ones(problem.n_k, bool) if problem.key_mask is None else problem.key_mask
        visible = np.broadcast_to(keep, (problem.n_q, problem.n_k))
        if problem.causal:
            ends = np.arange(problem.n_q)[:, None] + problem.offset
            visible = visible & (np.arange(problem.n_k) <= ends)
        counts = visible.sum(axis=1)
        flat = visible / counts[:, None]
        a = problem.exact.to_dense()
        errors = np.zeros(problem.n_q)
        if problem.v is not None:
            errors = np.sum(((a - flat) @ problem.values) ** 2, axis=1)
        return _Rows(a, flat, counts, errors)

    return seen.cached("informer rows", compute)


def _total(errors: Array, seen: Instance) -> float:
    """Return ``sum_i e_i``, zero where it is the rounding of zero."""
    total = float(errors.sum())
    return total if total > seen.m * output_rounding(seen) ** 2 else 0.0


def _rounded(total: float, seen: Instance) -> float:
    """Return the rounding of sums of e_i over their total, each a square of a rounded row."""
    off = math.sqrt(seen.m / total) * output_rounding(seen)
    return 2 * (2 + off) * off + ROUNDING


def _count(context: Context, rank: int | None) -> int:
    """Return the number of exact rows: a quarter of the queries, at most 64, by default."""
    m = context.instance.m
    r = max(1, min(64, m // 4)) if rank is None else rank
    context.require(r <= m, f"r = {r} rows of {m}")
    return r


def _top(found: Array, r: int) -> Array:
    """Return the r rows of largest statistic, ties by index."""
    return np.argsort(-found, kind="stable")[:r]


class _Selection(NamedTuple):
    """Hold how many rows are exact, and what the mean of V leaves of every row."""

    problem: AttentionProblem
    errors: Array
    total: float
    rank: int
    rounding: float

    @property
    def least(self) -> float:
        """What the best choice of rows leaves."""
        return float(np.sort(self.errors)[: self.problem.n_q - self.rank].sum())

    def left(self, context: Context, rows: Array, rng: np.random.Generator) -> float:
        """Return ``|A V - Ohat|_F^2`` with the exact rows I."""
        return square(self.problem.output - _output(context, self.problem, rows, rng))


def _selection(context: Context, rank: int | None) -> _Selection:
    """Return what a choice of rows is about, or end where there is nothing to choose."""
    problem, errors = problem_of(context.instance), _rows(context.instance).errors
    r = _count(context, rank)
    total = _total(errors, context.instance)
    context.require(total > 0, "the mean of the values is exact")
    return _Selection(problem, errors, total, r, _rounded(total, context.instance))


# --- statistics of rows --------------------------------------------------------------------------


@claim(
    "informer.lemma1",
    title="The measure of a row lies between two others",
    statement="""Row i sees n_i keys: M_i = logsumexp_j L_ij - mean_j L_ij and
        Mbar_i = max_j L_ij - mean_j L_ij satisfy ln n_i <= M_i <= Mbar_i + ln n_i, for every
        row.""",
    source=f"{PAPER}, Lemma 1; for rows that see different keys derived",
    status="published",
    kind="inequality",
    observes="the larger of ln n_i - M_i and M_i - Mbar_i - ln n_i, which must not be positive",
    assumptions=ON,
    recorded={**EVERYWHERE, "two-values": "holds", "shifted-keys": "holds"},
)
def _lemma1(context: Context) -> Observations:
    problem = problem_of(context.instance)
    logs = np.log(_rows(context.instance).counts)
    exact, surrogate = (_statistic(context, problem, name) for name in ("m", "max_mean"))
    return _not_positive(problem, [logs - exact, exact - surrogate - logs])


def _not_positive(problem: AttentionProblem, gaps: list[Array]) -> Observations:
    values = [max(float(x.max()), 0.0) if not np.isnan(x).any() else math.nan for x in gaps]
    # At most three logits, means or log-sum-exps in a difference.
    return Observations(values, 0.0, rounding=3 * logit_rounding(problem))


@claim(
    "informer.sandwich",
    title="The divergence of a row from uniform, and its surrogate",
    statement="""KL_i = KL(uniform | A_i) = M_i - ln n_i: max(ln n_i, Mbar_i) <= M_i, hence
        Mbar_i - ln n_i <= KL_i <= Mbar_i and KL_i >= 0, for every row: Mbar orders rows up to
        ln n_i.""",
    source="derived: a log-sum-exp is at least the maximum; KL >= 0",
    status="derived",
    kind="inequality",
    observes="the largest violation of the five inequalities and of the identity, which must be 0",
    assumptions=ON,
    recorded={**EVERYWHERE, "two-values": "holds", "shifted-keys": "holds"},
)
def _sandwich(context: Context) -> Observations:
    problem = problem_of(context.instance)
    logs = np.log(_rows(context.instance).counts)
    exact, surrogate, kl = (_statistic(context, problem, x) for x in ("m", "max_mean", "kl"))
    return _not_positive(
        problem,
        [
            np.maximum(logs, surrogate) - exact,
            -kl,
            kl - surrogate,
            surrogate - logs - kl,
            np.abs(exact - logs - kl),
        ],
    )


@claim(
    "informer.key_shift",
    title="A shift of all keys, and what the divisor makes of it",
    statement="""Given the sampled keys: K + 1 c^T changes neither A nor M, Mbar and the sampled
        max-mean with divisor U, the number of samples.  With divisor n_k the statistic of row i
        moves by scale q_i.c (1 - U/n_k), so that for large c it orders rows by q_i.c.""",
    source=DERIVED,
    status="derived",
    kind="inequality",
    observes="max_i of the four differences over the size of the logits, which must be zero",
    assumptions=(*ON, NOT_CAUSAL),
    recorded={"worked": "holds", "clusters": "holds", "shifted-keys": "holds", "heads": "holds"},
)
def _key_shift(context: Context) -> Observations:
    problem = problem_of(context.instance)
    size = max(largest(problem.k), 1e-300)
    values = []
    for rng in few(context):
        c = size * rng.standard_normal(problem.d)
        moved = AttentionProblem(problem.q, problem.k + c, scale=problem.scale)
        keys = rng.integers(0, problem.n_k, (problem.n_q, published_count(problem.n_k)))
        reach = 1 + max(logit_reach(problem), logit_reach(moved))
        away = problem.scale * (problem.q @ c)
        want: tuple[tuple[str, dict[str, Any], Array], ...] = (
            ("m", {}, 0 * away),
            ("max_mean", {}, 0 * away),
            ("max_mean", {"key_samples": keys}, 0 * away),
            (
                "max_mean",
                {"key_samples": keys, "mean_divisor": "n_keys"},
                away * (1 - keys.shape[1] / problem.n_k),
            ),
        )
        for name, parameters, difference in want:
            before, after = (_statistic(context, x, name, **parameters) for x in (problem, moved))
            values.append(largest(after - before - difference) / reach)
    return Observations(values, 0.0, rounding=ROUNDING)


@claim(
    "informer.proposition1",
    title="The surrogate and the variance do not order rows as the measure does",
    statement="""Of two rows with different Mbar_i and different variances of their logits, the one
        in which both are larger has the larger M.""",
    source=(
        f"{PAPER}, Proposition 1 [recalled], which says so of Gaussian keys and rows whose "
        "measures are within kappa of the largest, with high probability; neither kappa nor the "
        "probability is quantified.  Refuted without these: many large logits give a larger M "
        "than one that is larger still beside one that is very small"
    ),
    status="refuted",
    kind="inequality",
    observes="max of M_l - M_i over pairs with Mbar_i and variance larger, at most 0",
    assumptions=(*ON, NOT_CAUSAL),
    recorded={"skewed-rows": "violated", "worked": "holds", "heads": "violated"},
)
def _proposition1(context: Context, *, rank: int | None = None) -> Observations:
    problem = problem_of(context.instance)
    context.require(problem.n_q >= 2, "needs two queries")
    exact, surrogate = (_statistic(context, problem, name) for name in ("m", "max_mean"))
    variance = np.var(problem.scale * problem.q @ problem.k.T, axis=1)
    allowed = ROUNDING * (1 + logit_reach(problem))
    largest_gap = 0.0
    for i in range(problem.n_q):
        below = (surrogate < surrogate[i] - allowed) & (variance < variance[i] - allowed)
        largest_gap = max(largest_gap, float((exact[below] - exact[i]).max(initial=0.0)))
    found = rank_agreement(problem, _count(context, rank))
    note = (
        f"Mbar against M over all keys: Spearman {found.spearman:.3f}, {found.recall:.3f} of the "
        f"{found.rows} rows of largest M are among those of largest Mbar"
    )
    return Observations([largest_gap], 0.0, rounding=allowed, notes=note)


# --- what a choice of rows leaves ----------------------------------------------------------------


@claim(
    "informer.row_selection",
    title="The error is that of the rows that are not exact",
    statement="""For every set I of exact rows: |A V - Ohat|_F^2 = sum_{i not in I} e_i,
        e_i = |A_i V - fill_i|^2, the fill being the mean of the values that row i sees.""",
    source=DERIVED,
    status="derived",
    kind="inequality",
    observes="|difference of the two sides|/sum_i e_i for random I, which must be zero",
    assumptions=WITH_VALUES,
    recorded=EVERYWHERE,
    ladder=RANKS,
)
def _row_selection(context: Context, *, rank: int | None = None) -> Observations:
    seen = _selection(context, rank)
    values = []
    for rng in few(context):
        chosen = rng.permutation(seen.problem.n_q)[: seen.rank]
        known = float(np.delete(seen.errors, chosen).sum())
        values.append(abs(seen.left(context, chosen, rng) - known) / seen.total)
    return Observations(values, 0.0, rank=seen.rank, rounding=seen.rounding)


@claim(
    "informer.regret",
    title="No choice of rows beats the rows of largest error",
    statement="""The r rows of largest e_i leave the least |A V - Ohat|_F; for every statistic
        R(I) = sum_{i not in I} e_i - that least sum >= 0.""",
    source=DERIVED,
    status="derived",
    kind="inequality",
    observes="the least sum over what each statistic's rows leave; notes: R(I)/sum_i e_i",
    assumptions=WITH_VALUES,
    recorded=EVERYWHERE,
    ladder=RANKS,
)
def _regret(context: Context, *, rank: int | None = None) -> Observations:
    seen = _selection(context, rank)
    rng = np.random.default_rng(context.entropy)
    values, notes = [], []
    for name in ("m", "kl", "max_mean", "row_norm"):
        chosen = _top(_statistic(context, seen.problem, name), seen.rank)
        left = seen.left(context, chosen, rng)
        values.append(quotient(seen.least, left, seen.rounding * seen.total))
        notes.append(f"{name} {(left - seen.least) / seen.total:.3g}")
    note = "regret " + ", ".join(notes)
    return Observations(values, 1.0, rank=seen.rank, notes=note)


@claim(
    "informer.oracle",
    title="The oracle's rows have no regret",
    statement="I the r rows of largest e_i: |A V - Ohat|_F^2 = sum of the n_q - r smallest e_i.",
    source=DERIVED,
    status="derived",
    kind="existence",
    observes="R(I)/sum_i e_i of the statistic that looks at V",
    assumptions=WITH_VALUES,
    recorded=EVERYWHERE,
    ladder=RANKS,
)
def _oracle(context: Context, *, rank: int | None = None) -> Observations:
    seen = _selection(context, rank)
    chosen = _top(_statistic(context, seen.problem, "oracle"), seen.rank)
    left = seen.left(context, chosen, np.random.default_rng(context.entropy))
    off = abs(left - seen.least) / seen.total
    return Observations([off], 0.0, rank=seen.rank, rounding=seen.rounding)


@claim(
    "informer.random_rows",
    title="What random rows leave",
    statement="""I drawn uniformly without replacement: E|A V - Ohat|_F^2 = (1 - r/n_q) sum_i e_i,
        what the mean of V leaves times 1 - r/n_q.""",
    source=DERIVED,
    status="derived",
    kind="equality",
    observes="|A V - Ohat|_F^2/sum_i e_i, mean over I",
    assumptions=WITH_VALUES,
    recorded=EVERYWHERE,
    ladder=RANKS,
)
def _random_rows(context: Context, *, rank: int | None = None) -> Observations:
    seen = _selection(context, rank)
    problem, r = seen.problem, seen.rank
    fill = "cummean" if problem.causal else "mean"
    method = Informer(r, statistic="random", fill=fill)
    values = []
    for rng in context.generators():
        if is_default(context):
            chosen = method.draw(problem, rng)["pilot_rows"]
        else:
            chosen = implemented(context, "random_rows", r, rng, problem=problem).astype(np.int64)
        values.append(float(np.delete(seen.errors, chosen).sum()) / seen.total)
    return Observations(values, 1 - r / problem.n_q, rank=r, rounding=1e-12)


# --- bounds by divergence ------------------------------------------------------------------------


@claim(
    "informer.variation",
    title="The error of a row by its distance from uniform",
    statement="""TV_i = (1/2)|A_i - uniform|_1: sqrt(e_i) <= TV_i max_{j,l} |V_j - V_l| and
        TV_i <= min(sqrt(KL_i/2), sqrt(1 - exp(-KL_i))), for every row.""",
    source="derived: A_i - uniform sums to zero; Pinsker, and Bretagnolle and Huber",
    status="derived",
    kind="inequality",
    observes="the largest quotient over rows, of each of the two",
    assumptions=WITH_VALUES,
    recorded={**EVERYWHERE, "two-values": "holds"},
)
def _variation(context: Context) -> Observations:
    problem, rows = problem_of(context.instance), _rows(context.instance)
    context.require(problem.n_k <= 4096, f"{problem.n_k} values have too many pairs")
    diameter = value_diameter(problem.values[problem.kept_keys])
    context.require(diameter > 0, "needs values that are not all equal")
    variation = np.abs(rows.a - rows.flat).sum(axis=1) / 2
    kl = np.maximum(_statistic(context, problem, "kl"), 0.0)
    limit = np.asarray(variation_bound(kl))
    # Rows that are uniform up to rounding: KL is rounded as logits are, its root is larger.
    noise = math.sqrt(3 * logit_rounding(problem)) + weight_rounding(context.instance)
    nothing = output_rounding(context.instance)
    values = [
        float((np.sqrt(rows.errors) / (variation * diameter + nothing)).max()),
        float((variation / np.maximum(limit, noise)).max()),
    ]
    return Observations(values, 1.0, rounding=1e-9)


def _register_total(name: str, measure: str, words: str, source: str, close: str) -> None:
    @claim(
        f"informer.{name}",
        title=f"A bound of the error by {words}",
        statement=f"""For every I: |A V - Ohat|_F^2 <= diam(V)^2 sum_{{i not in I}}
            min(x_i/2, 1 - exp(-x_i)), x_i = {words} over all keys that the row sees; the rows of
            largest x_i minimise the right side.""",
        source=source,
        status="derived",
        kind="inequality",
        observes="|A V - Ohat|_F^2 for the r rows of largest x_i, against its bound",
        assumptions=WITH_VALUES,
        recorded={
            "lazy-queries": "holds",
            "two-values": close,
            "worked": close,
            "causal": "vacuous",
            "heads": "vacuous",
        },
        ladder=RANKS,
    )
    def observe(context: Context, *, rank: int | None = None) -> Observations:
        problem, rows = problem_of(context.instance), _rows(context.instance)
        r = _count(context, rank)
        context.require(problem.n_k <= 4096, f"{problem.n_k} values have too many pairs")
        found = _statistic(context, problem, measure)
        chosen = _top(found, r)
        rng = np.random.default_rng(context.entropy)
        left = square(problem.output - _output(context, problem, chosen, rng))
        diameter = value_diameter(problem.values[problem.kept_keys])
        if is_default(context):
            bound = selection_bound(problem, chosen, measure=measure)
        else:
            kept = np.delete(np.maximum(found, 0.0), chosen)
            bound = diameter**2 * float(np.sum(np.asarray(variation_bound(kept)) ** 2))
        total = _total(rows.errors, context.instance)
        context.require(total > 0, "the mean of the values is exact")
        # The divergences, rounded as logits are, and the rows.
        off = diameter**2 * problem.n_q * 3 * logit_rounding(problem)
        rounding = total * _rounded(total, context.instance) + off
        return Observations(
            [left], bound, rank=r, predictor="the mean of V", trivial=total, rounding=rounding
        )


_register_total(
    "total_bound",
    "kl",
    "KL_i",
    "derived: the identity of row selection and informer.variation",
    "holds",
)
_register_total(
    "total_bound_surrogate",
    "max_mean",
    "Mbar_i",
    "derived: KL_i <= Mbar_i in the bound by KL_i",
    "vacuous",
)


# --- what is not so ------------------------------------------------------------------------------


@claim(
    "informer.measure_orders_rows",
    title="The measure does not order rows by their distance from uniform",
    statement="""M_i increases with the norm |A_i|, the probability that row sampling gives the
        row: |A_i| > |A_l| implies M_i >= M_l.""",
    source=(
        "Chen et al., arXiv 2112.05359, on Informer as row sampling; refuted: one very small "
        "weight makes M large in a row that is nearly uniform, by norm and by total variation"
    ),
    status="refuted",
    kind="inequality",
    observes="max of M_l - M_i over pairs with |A_i| > |A_l|, which must not be positive",
    assumptions=(*ON, NOT_CAUSAL),
    recorded={"two-rows": "violated", "heads": "violated"},
)
def _measure_orders_rows(context: Context) -> Observations:
    problem = problem_of(context.instance)
    context.require(problem.n_q >= 2, "needs two queries")
    exact, norms = (_statistic(context, problem, name) for name in ("m", "row_norm"))
    order = np.argsort(norms, kind="stable")
    before = np.maximum.accumulate(exact[order])[:-1]
    value = max(float((before - exact[order][1:]).max()), 0.0)
    return Observations([value], 0.0, rounding=1e-9 * (1 + logit_reach(problem)))


@claim(
    "informer.divisor",
    title="The divisor of the mean is not without influence",
    statement="""Dividing the sum over U sampled logits by n_k in place of U has no big influence:
        at least nine tenths of the r rows of largest statistic are the same.""",
    source=(
        "the maintainers' remark on the public code (Informer2020, issue 211), nine tenths added; "
        "refuted: with a vector added to all keys rows are chosen by q_i.c"
    ),
    status="refuted",
    kind="inequality",
    observes="share of the r rows that differ, one sample of keys a trial",
    assumptions=(*ON, NOT_CAUSAL),
    recorded={"shifted-keys": "violated", "heads": "violated"},
)
def _divisor(context: Context, *, rank: int | None = None, share: float = 0.1) -> Observations:
    problem = problem_of(context.instance)
    r = _count(context, rank)
    values = []
    for rng in few(context):
        keys = rng.integers(0, problem.n_k, (problem.n_q, published_count(problem.n_k)))
        top = []
        for divisor in ("n_samples", "n_keys"):
            found = _statistic(context, problem, "max_mean", key_samples=keys, mean_divisor=divisor)
            top.append(_top(found, r))
        values.append(1 - len(np.intersect1d(top[0], top[1])) / r)
    return Observations(values, share, rank=r)


def _missed(context: Context, samples: int | None) -> tuple[int, int, list[float]]:
    """Return n_k, U, and for each trial the share of rows whose largest key is not sampled."""
    problem = problem_of(context.instance)
    drawn = min(problem.n_k, published_count(problem.n_k) if samples is None else samples)
    best = np.argmax(_rows(context.instance).a, axis=1)[:, None]
    method = Informer(1, samples=drawn)
    values = []
    for rng in context.generators():
        if is_default(context):
            keys = method.draw(problem, rng)["key_samples"]
        else:
            keys = implemented(context, "key_samples", drawn, rng, problem=problem)
        values.append(float(np.mean((keys != best).all(axis=1))))
    return problem.n_k, drawn, values


@claim(
    "informer.miss_rate",
    title="How often a sample misses the largest logit",
    statement="""U keys drawn with replacement for each row: the largest logit of a row is not among
        them with probability (1 - 1/n_k)^U.""",
    source=DERIVED,
    status="derived",
    kind="equality",
    observes="share of the rows whose largest logit is not sampled, mean over samples",
    assumptions=(*ON, NOT_CAUSAL),
    recorded={"worked": "holds", "reference": "holds", "clusters": "holds", "heads": "holds"},
)
def _miss_rate(context: Context, *, samples: int | None = None) -> Observations:
    n, drawn, values = _missed(context, samples)
    theory = float(miss_probability(n, drawn))
    return Observations(
        values,
        theory,
        rank=drawn,
        spread=math.sqrt(theory * (1 - theory) / context.instance.m),
        rounding=1e-12,
    )


@claim(
    "informer.sampled_maximum",
    title="A sampled maximum is not the maximum of the row",
    statement="""U = 5 ceil(ln n_k) sampled keys have the largest logit of a row among them with
        probability at least 1/2, so that the sampled max-mean estimates Mbar.""",
    source=(
        f"{PAPER}, the sampled measure taken for Mbar, one half added; refuted: a sample misses "
        "the largest logit with probability (1 - 1/n_k)^U, .966 for n_k = 1024"
    ),
    status="refuted",
    kind="expectation",
    observes="share of the rows whose largest logit is not sampled, mean over samples",
    assumptions=(*ON, NOT_CAUSAL),
    recorded={"shifted-keys": "violated", "clusters": "violated", "heads": "violated"},
)
def _sampled_maximum(context: Context, *, most: float = 0.5) -> Observations:
    _, drawn, values = _missed(context, None)
    return Observations(values, most, rank=drawn)
