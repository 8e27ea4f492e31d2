"""Claims: what the weighted coreset of WildCat is, and how near it is to all keys."""

from __future__ import annotations

import numpy as np

from ...base.draws import Draw
from ...problem import AttentionProblem
from ...zoo.wildcat import Coreset, WildCat
from ..engine.arguments import Array
from ..engine.assumptions import DENSE, KEYS, NOT_CAUSAL, ROWS
from ..engine.instances import instance
from ..engine.observers import (
    EPS,
    default_rank,
    few,
    implemented,
    is_default,
    largest,
    problem_of,
    weight_rounding,
)
from ..engine.records import Observations
from ..engine.registry import Context, claim
from .wildcat import DERIVED, PAPER, PIVOTING, keys_of, projected, queries_of, trace_bound

ON = (DENSE, ROWS, NOT_CAUSAL)
PAIRS = (*ON, KEYS)
EVERYWHERE = {
    "clusters": "holds",
    "wildcat-golden": "holds",
    "large-keys": "holds",
    "heads": "holds",
}

# Kernels of pivots beyond this are not inverted to the digits that exactness is told by.
CONDITION = 1e8
# What a residual that is zero is computed as, at most: a few roundings times the pivots.
NOTHING = 1e-11
# Exponents beyond this have no exponential kernel in float64.
LARGEST = 300.0
# Weights of keys with short vectors carry roundings e^(h/2) times as large as those of others:
# beyond this nothing is left of digits.
LONGEST = 20.0
# Distinct keys of problems whose keys repeat.
DISTINCT = 8

# --- instances -----------------------------------------------------------------------------------


@instance(
    "wildcat-golden", "64 Gaussian queries and keys, d = 4, d_v = 3: where methods are compared"
)
def _golden() -> AttentionProblem:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((64, m)) for m in (4, 4, 3))
    return AttentionProblem(q, k, v)


@instance("large-keys", "4 keys of norm 4 on the axes beside 124 of norm 0.1, 32 queries, d = 4")
def _large_keys() -> AttentionProblem:
    rng = np.random.default_rng(41)
    small = 0.05 * rng.standard_normal((124, 4))
    k = np.concatenate([small, 4 * np.eye(4)])[rng.permutation(128)]
    return AttentionProblem(rng.standard_normal((32, 4)), k, rng.random((128, 3)), scale=1.0)


# --- what observers share ------------------------------------------------------------------------


def _pivots(context: Context, problem: AttentionProblem, r: int, rng: np.random.Generator) -> Array:
    """Return pivots, by the implementation that was handed in where one was."""
    if is_default(context):
        return np.asarray(WildCat(r).draw(problem, rng)["pivots"])
    found = implemented(context, "pivots", r, rng, problem=problem)
    return np.asarray(found, np.int64)


def _matrix(
    context: Context, problem: AttentionProblem, pivots: Array, rng: np.random.Generator
) -> Array:
    """Return Ahat of chosen pivots."""
    if is_default(context):
        method = WildCat(max(len(pivots), 1))
        return method.approximate(problem, draw=Draw(pivots=pivots)).to_dense()
    return implemented(context, "wildcat", len(pivots), rng, problem=problem, pivots=pivots)


def _rank(context: Context, rank: int | None) -> int:
    r = default_rank(context, rank)
    problem = problem_of(context.instance)
    context.require(r <= problem.n_k, f"r = {r} pivots of {problem.n_k} keys")
    return r


# --- rows, and when they are exact ---------------------------------------------------------------


@claim(
    "training_free.wildcat_row_sums",
    title="Rows of the weighted coreset sum to one",
    statement="""Ahat = diag(1/den) E W with E_is = exp(L_is), s in J, and den = E W 1 satisfies
        Ahat 1 = 1, for any pivots J and where no denominator is zero.""",
    source=DERIVED,
    status="derived",
    kind="inequality",
    observes="the largest |sum_j Ahat_ij - 1| / sum_j |Ahat_ij|, which must be zero",
    assumptions=ON,
    recorded=EVERYWHERE,
)
def _row_sums(context: Context, *, rank: int | None = None) -> Observations:
    problem, r, values = problem_of(context.instance), _rank(context, rank), []
    for rng in few(context, 10):
        ahat = _matrix(context, problem, _pivots(context, problem, r, rng), rng)
        size = np.maximum(np.abs(ahat).sum(axis=1), 1.0)
        values.append(largest((ahat.sum(axis=1) - 1) / size))
    rounding = 4 * (problem.n_k + r + 16) * EPS
    return Observations(values, 0.0, rank=r, rounding=rounding)


@claim(
    "training_free.wildcat_exact",
    title="The coreset is all keys once it holds every distinct one",
    statement="""Where the keys of a problem are m distinct ones, repeated, and the pivots are
        these, W is the membership of the keys and Ahat = A; r > m pivots are drawn as m.""",
    source=DERIVED,
    status="derived",
    kind="inequality",
    observes="max |Ahat - A| for eight keys of the instance, repeated at random, r = 16",
    assumptions=ON,
    recorded=EVERYWHERE,
)
def _exact(context: Context) -> Observations:
    problem, values, used, spoiled = problem_of(context.instance), [], 0, 0.0
    n = problem.n_k
    context.require(n >= 2 * DISTINCT, f"needs {2 * DISTINCT} keys, got {n}")
    for rng in few(context, 10):
        chosen = rng.permutation(n)[:DISTINCT]
        labels = np.concatenate([np.arange(DISTINCT), rng.integers(0, DISTINCT, n - DISTINCT)])
        k = problem.k[chosen][rng.permutation(labels)]
        made = AttentionProblem(problem.q, k, scale=problem.scale)
        core = keys_of(made)
        distinct = np.unique(k, axis=0, return_index=True)[1]
        gap = core.z[distinct] @ core.z[distinct].T
        gap -= core.half[distinct][:, None] + core.half[distinct]
        condition = float(np.linalg.cond(np.exp(np.minimum(gap, 0.0))))
        context.require(condition < CONDITION, f"the kernel has the condition {condition:.3g}")
        longest = float(core.half.max())
        context.require(longest <= LONGEST, f"needs |z|^2/2 <= {LONGEST:g}, got {longest:.3g}")
        pivots = _pivots(context, made, 2 * DISTINCT, rng)
        used = len(pivots)
        ahat = _matrix(context, made, pivots, rng)
        values.append(largest(ahat - made.exact.to_dense()))
        grown = (1 + condition) * float(np.exp(longest / 2))
        spoiled = max(spoiled, grown * weight_rounding(made))
    return Observations(values, 0.0, rank=used, rounding=spoiled)


# --- how near ------------------------------------------------------------------------------------


@claim(
    "training_free.wildcat_certificate",
    title="An error of every weight, known afterwards",
    statement="""With x_i . z_j = L_ij for the centred keys, h_j = |z_j|^2/2 and
        res_j what the pivots leave of the Gaussian kernel at z_j:
        |exp(L_ij) - (exp(L_iJ) W)_j| <= exp(|x_i|^2/2 + h_j) sqrt(res_j) sqrt(res(x_i)), where
        res(x_i) <= 1 is what they leave at x_i.""",
    source=f"{DERIVED}; W is the orthogonal projection of {PAPER}",
    status="derived",
    kind="inequality",
    observes="""the largest error over its bound, over all entries: with res(x_i) <= 1 in its
        place, and with it""",
    assumptions=PAIRS,
    recorded=EVERYWHERE,
)
def _certificate(context: Context, *, rank: int | None = None) -> Observations:
    problem, r, values = problem_of(context.instance), _rank(context, rank), []
    keys = keys_of(problem)
    most = float(keys.half.max(initial=0.0))
    context.require(most <= LARGEST, f"needs |z|^2/2 <= {LARGEST:g}, got {most:.3g}")
    x = queries_of(problem, keys)
    half = 0.5 * np.einsum("ij,ij->i", x, x)
    truth = np.exp(np.minimum(x @ keys.z.T - half[:, None] - keys.half, 0.0))
    for rng in few(context, 10):
        pivots = _pivots(context, problem, r, rng)
        if is_default(context):
            chosen, weights = (lambda y: (y.chosen, y.weights()))(Coreset.of(keys, pivots))
        else:
            chosen = pivots
            weights = implemented(
                context, "weights", len(pivots), rng, problem=problem, pivots=pivots
            )
        scaled = weights * np.exp(keys.half[chosen][:, None] - keys.half)
        error = np.abs(truth - truth[:, chosen] @ scaled)
        left, ahead = (projected(keys, y, chosen)[1] for y in (keys.z, x))
        for factor in (np.ones(len(x)), ahead):
            bound = np.sqrt(np.outer(factor + NOTHING, left + NOTHING))
            values.append(largest(error / bound))
    return Observations(values, 1.0, rank=r)


@claim(
    "training_free.wildcat_trace",
    title="What randomly drawn pivots leave of the trace, in the mean",
    statement="""r pivots drawn by the diagonal of what those before leave of a positive
        semidefinite kernel of trace tr, with tail_k = sum_{i > k} lambda_i and eta = tail_k/tr:
        r >= k/eps + k ln(1/(eps eta)) implies E tr(residual) <= (1 + eps) tail_k.  WildCat draws
        by the diagonal of the exponential kernel of the centred keys.""",
    source=f"{PIVOTING}, Theorem 5.1; recalled",
    status="published",
    kind="expectation",
    observes="the trace of what is left over the trace, against the least bound over k and eps",
    assumptions=PAIRS,
    recorded=EVERYWHERE,
)
def _trace(context: Context, *, rank: int | None = None) -> Observations:
    problem, r = problem_of(context.instance), _rank(context, rank)
    keys = keys_of(problem)
    most = float(keys.half.max(initial=0.0))
    context.require(most <= LARGEST, f"needs |z|^2/2 <= {LARGEST:g}, got {most:.3g}")

    def compute() -> float:
        scaled = np.exp(keys.z @ keys.z.T - 2 * most)
        return trace_bound(np.maximum(np.linalg.eigvalsh(scaled), 0.0), r)

    bound = context.instance.cached(("trace bound", r), compute)
    weight = np.exp(2 * (keys.half - most))
    values = []
    for rng in context.generators():
        pivots = _pivots(context, problem, r, rng)
        left = Coreset.of(keys, pivots).residuals()
        values.append(float(weight @ left / weight.sum()))
    return Observations(values, bound, rank=r, predictor="zero", trivial=1.0, rounding=NOTHING)


@claim(
    "training_free.wildcat_rate",
    title="An error that falls faster than any power of n, in nearly linear time",
    statement="""For queries, keys and values that are bounded, WildCat has an error of
        n^(-sqrt(ln ln n)) in time n^(1 + o(1)).""",
    source=f"{PAPER}, abstract; neither constants nor the o(1) are named there",
    status="published",
    kind="existence",
    observes="nothing: without constants no data can contradict it",
    recorded={"wildcat-golden": "not applicable", "heads": "not applicable"},
)
def _rate(context: Context) -> Observations:
    context.require(False, "the statement names no constants: no data could contradict it")
    return Observations([], 0.0)
