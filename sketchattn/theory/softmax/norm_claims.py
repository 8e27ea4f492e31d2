"""Claims: norms of attention matrices, outputs as averages, and changes of the logits."""

from __future__ import annotations

import math

import numpy as np

from ...operators.reference import merge
from ...problem import AttentionProblem
from ..engine.arguments import Array, real
from ..engine.assumptions import DENSE, KEYS, STOCHASTIC, VALUES
from ..engine.instances import instance
from ..engine.observers import (
    EPS,
    is_default,
    largest,
    problem_of,
    quotient,
    softmax_of,
    weight_rounding,
)
from ..engine.records import Observations
from ..engine.registry import Context, claim
from .formulas import diameter, perturbation_bound

DERIVED = "derived: see the chapter on softmax and norms"
VYAS = "Vyas, Katharopoulos and Fleuret, arXiv 2007.04825, Proposition 1"

# Rows of A that one trial looks at.
ROWS = 8
# Identities are observed up to this: rounding of sums of up to 2048 numbers, with room.
ROUNDING = 1e-11

# --- instances ---------------------------------------------------------------------------------


@instance("flat", "uniform weights, 6 x 10: where the lower ends of norms are attained")
def _flat() -> tuple[Array, Array]:
    v: Array = np.cos(0.7 * np.outer(np.arange(1.0, 11), np.arange(1.0, 4)))
    return np.full((6, 10), 0.1), v


@instance("shared-key", "A = 1 e_1^T, 12 x 8: every query reads one key, the upper ends of norms")
def _shared_key() -> tuple[Array, Array]:
    a = np.zeros((12, 8))
    a[:, 0] = 1.0
    return a, np.eye(8)


@instance("two-keys", "one query, keys of weight 1/2: where a softmax moves most")
def _two_keys() -> AttentionProblem:
    return AttentionProblem(np.zeros((1, 1)), np.zeros((2, 1)), np.array([[0.0], [1.0]]))


@instance("two-queries", "K = (1, -1), Q = (t, -t) with t = .1: outputs as far apart as can be")
def _two_queries() -> AttentionProblem:
    q, k = np.array([[0.1], [-0.1]]), np.array([[1.0], [-1.0]])
    return AttentionProblem(q, k, k.copy(), scale=1.0)


@instance("two-by-two", "L = [[0, 0], [0, ln 3]]: rows and columns of exp(L) have different sums")
def _two_by_two() -> AttentionProblem:
    q, k = np.array([[0.0], [1.0]]), np.array([[0.0], [math.log(3.0)]])
    return AttentionProblem(q, k, np.eye(2), scale=1.0)


# --- what observers share ----------------------------------------------------------------------

MATRIX = (DENSE, STOCHASTIC)

# Where norms are compared: instances at both ends of their range among others.
ENDS = {
    "reference": "holds",
    "flat": "holds",
    "shared-key": "holds",
    "identity": "holds",
    "heads": "holds",
}
# Where logits are changed: an instance on which a softmax moves most among others.
CHANGED = {"two-keys": "holds", "reference": "holds", "clusters": "holds", "heads": "holds"}


def _logs(a: Array) -> Array:
    with np.errstate(divide="ignore"):
        logs: Array = np.log(a)
    return logs


def _matrix(context: Context) -> Array:
    """Return A, or what a softmax that was handed in makes of ``ln A``."""
    a = context.instance.a
    if is_default(context):
        return a
    return softmax_of(context, _logs(a), np.random.default_rng(context.entropy))


def _sums(context: Context) -> float:
    """Return the rounding of row sums: what the matrix itself, which is assumed, is off by."""
    return largest(context.instance.a.sum(axis=1) - 1) + ROUNDING


def _rows(context: Context, trial: int) -> Array:
    """Return some rows of ``ln A``, others in every trial."""
    m = context.instance.m
    picked = (trial * ROWS + np.arange(min(ROWS, m))) % m
    return _logs(context.instance.a[picked])


def _factors(context: Context) -> tuple[Array, Array, float]:
    """Return Q, K without masked keys, and the scale, in float64."""
    problem = context.instance.problem
    assert problem is not None  # an assumption of every claim that asks
    q, k = np.asarray(problem.q, np.float64), np.asarray(problem.k, np.float64)
    return q, k[problem.kept_keys], float(problem.scale)


def _diameter(context: Context) -> float:
    """Return ``max_{j,l} |V_j - V_l|``."""
    v = context.instance.v
    return context.instance.cached("diameter", lambda: diameter(v))


# --- rows and norms ----------------------------------------------------------------------------


@claim(
    "softmax.stochastic",
    title="Rows of A are distributions",
    statement="A >= 0 and A 1 = 1.",
    source="definition of the row softmax",
    status="derived",
    kind="inequality",
    observes="the larger of max_i |sum_j A_ij - 1| and -min_ij A_ij, which must be zero",
    assumptions=MATRIX,
    recorded={"reference": "holds", "shared-key": "holds", "heads": "holds"},
)
def _stochastic(context: Context) -> Observations:
    a = _matrix(context)
    off = max(float(np.abs(a.sum(axis=1) - 1).max()), float(-a.min()))
    return Observations([max(off, 0.0)], 0.0, rounding=_sums(context))


@claim(
    "softmax.spectral_norm",
    title="Spectral norm of an attention matrix",
    statement="""sqrt(n_q/n_k) <= |A|_2 <= sqrt(max_j sum_i A_ij) <= sqrt(n_q).  For n_q = n_k
        hence 1 <= |A|_2 <= sqrt(n).  Uniform weights attain the first, A = 1 e_1^T the others.""",
    source=DERIVED,
    status="derived",
    kind="inequality",
    observes="the largest of the three quotients of a smaller over the next larger side",
    assumptions=MATRIX,
    recorded=ENDS,
)
def _spectral_norm(context: Context) -> Observations:
    a = _matrix(context)
    m, n = a.shape
    whole = a is context.instance.a
    norm = float(context.instance.svd[1][0]) if whole else float(np.linalg.norm(a, 2))
    column = float(a.sum(axis=0).max())
    values = [
        quotient(math.sqrt(m / n), norm),
        quotient(norm, math.sqrt(max(column, 0.0))),
        column / m,
    ]
    return Observations(values, 1.0, rounding=2 * _sums(context))


@claim(
    "softmax.spectral_norm_one",
    title="The spectral norm is not the spectral radius",
    statement="|A|_2 <= 1 for every row-stochastic A.",
    source=(
        "the spectral radius, which is 1 for n_q = n_k, taken for the spectral norm; refuted: "
        "A = 1 e_1^T has |A|_2 = sqrt(n_q)"
    ),
    status="refuted",
    kind="inequality",
    observes="|A|_2",
    assumptions=MATRIX,
    recorded={"shared-key": "violated", "heads": "violated"},
)
def _spectral_norm_one(context: Context) -> Observations:
    return Observations([float(context.instance.svd[1][0])], 1.0, rounding=ROUNDING)


@claim(
    "softmax.frobenius_norm",
    title="Frobenius norm of an attention matrix",
    statement="n_q/n_k <= |A|_F^2 <= n_q, with equality for uniform rows and for rows e_j^T.",
    source=DERIVED,
    status="derived",
    kind="inequality",
    observes="the larger of (n_q/n_k)/|A|_F^2 and |A|_F^2/n_q",
    assumptions=MATRIX,
    recorded=ENDS,
)
def _frobenius_norm(context: Context) -> Observations:
    a = _matrix(context)
    m, n = a.shape
    size = float(np.sum(a * a))
    return Observations([quotient(m / n, size), size / m], 1.0, rounding=2 * _sums(context))


@claim(
    "softmax.mean_identity",
    title="Distance to the mean of the values",
    statement="|A - 1 1^T/n_k|_F^2 = |A|_F^2 - n_q/n_k.",
    source=DERIVED,
    status="derived",
    kind="inequality",
    observes="the difference of the two sides over n_q, which must be zero",
    assumptions=MATRIX,
    recorded=ENDS,
)
def _mean_identity(context: Context) -> Observations:
    a = _matrix(context)
    m, n = a.shape
    left = float(np.sum((a - 1 / n) ** 2))
    right = float(np.sum(a * a)) - m / n
    return Observations([abs(left - right) / m], 0.0, rounding=2 * _sums(context))


@claim(
    "softmax.printed_normalizer",
    title="A normaliser of the wrong axis",
    statement="""softmax(L) = exp(L) D^-1 with D diagonal and D_ii = sum_j exp(L_ji), so that its
        rows sum to one.""",
    source=(
        "Wang et al., arXiv 2006.04768v3, proof of Theorem 1, as printed; refuted: this is "
        "column-stochastic, the row softmax is D^-1 exp(L) with D_ii = sum_j exp(L_ij)"
    ),
    status="refuted",
    kind="inequality",
    observes="max_i |sum_j (exp(L) D^-1)_ij - 1|, which must be zero",
    assumptions=(DENSE, KEYS),
    recorded={"two-by-two": "violated", "heads": "violated"},
)
def _printed_normalizer(context: Context) -> Observations:
    q, k, scale = _factors(context)
    logits = scale * q @ k.T
    printed = np.exp(logits - logits.max(axis=0))
    printed /= printed.sum(axis=0)
    off = float(np.abs(printed.sum(axis=1) - 1).max())
    return Observations([off], 0.0, rounding=ROUNDING)


# --- outputs -----------------------------------------------------------------------------------


@claim(
    "softmax.shift_invariance",
    title="A shift of all keys changes nothing",
    statement="rowsoftmax(scale Q (K + 1 c^T)^T) = rowsoftmax(scale Q K^T) for every c.",
    source=DERIVED,
    status="derived",
    kind="inequality",
    observes="max_i |A_i - A'_i|_1 over some rows for one random c a trial, which must be zero",
    assumptions=(*MATRIX, KEYS),
    recorded={"blocks": "holds", "clusters": "holds", "heads": "holds"},
)
def _shift_invariance(context: Context, *, size: float = 1.0) -> Observations:
    q, k, scale = _factors(context)
    size = float(real(size, "size", 0))
    problem, values, rounding = problem_of(context.instance), [], 0.0
    for trial, rng in enumerate(context.generators()):
        some = q[(trial * ROWS + np.arange(min(ROWS, len(q)))) % len(q)]
        moved = k + size * rng.standard_normal(k.shape[1])
        rows = [softmax_of(context, scale * some @ x.T, rng) for x in (k, moved)]
        values.append(float(np.abs(rows[0] - rows[1]).sum(axis=1).max()))
        shifted = AttentionProblem(q, moved, scale=scale)
        rounding = max(rounding, weight_rounding(problem) + weight_rounding(shifted))
    return Observations(values, 0.0, rounding=rounding)


@claim(
    "softmax.merge",
    title="Attention over two sets of keys",
    statement="""For disjoint sets of keys with log-sum-exps l_1, l_2 and outputs O_1, O_2, over
        their union l = ln(e^l_1 + e^l_2) and O = e^(l_1 - l) O_1 + e^(l_2 - l) O_2.""",
    source=DERIVED,
    status="derived",
    kind="inequality",
    observes="max_i |O_i - merged|_inf/max |V| over some rows, one random split of keys a trial",
    assumptions=(*MATRIX, VALUES),
    recorded={"reference": "holds", "shared-key": "holds", "clusters": "holds", "heads": "holds"},
)
def _merge(context: Context) -> Observations:
    v = context.instance.v
    size = max(float(np.abs(v).max()), 1e-300)
    values = []
    for trial, rng in enumerate(context.generators()):
        logits = _rows(context, trial)
        logits = logits + rng.standard_normal((len(logits), 1))
        first = rng.random(logits.shape[1]) < 0.5
        parts = []
        for kept in (first, ~first):
            top = logits[:, kept].max(axis=1, initial=-np.inf)
            seen = np.isfinite(top)  # a block without weight drops out
            lse, out = np.full(len(logits), -np.inf), np.zeros((len(logits), v.shape[1]))
            if seen.any():
                some = logits[seen][:, kept]
                lse[seen] = top[seen] + np.log(np.exp(some - top[seen, None]).sum(axis=1))
                out[seen] = softmax_of(context, some, rng) @ v[kept]
            parts.append((out, lse))
        merged = merge(*parts[0], *parts[1])[0]
        direct = softmax_of(context, logits, rng) @ v
        values.append(float(np.abs(merged - direct).max()) / size)
    return Observations(values, 0.0, rounding=ROUNDING)


@claim(
    "softmax.hull",
    title="Outputs are averages of values",
    statement="""O_i is in the convex hull of the rows of V: for every u,
        min_j V_j.u <= O_i.u <= max_j V_j.u.  Hence |O_i| <= max_j |V_j|, and
        A(V + 1 c^T) = O + 1 c^T.""",
    source=DERIVED,
    status="derived",
    kind="inequality",
    observes="max_i |O_i.u - middle|/half the range of V u, over 8 random u a trial",
    assumptions=(*MATRIX, VALUES),
    recorded={"reference": "holds", "shared-key": "holds", "clusters": "holds", "heads": "holds"},
)
def _hull(context: Context) -> Observations:
    a, v = _matrix(context), context.instance.v
    out = a @ v
    values = []
    for rng in context.generators():
        u = rng.standard_normal((v.shape[1], 8))
        seen, got = v @ u, out @ u
        low, high = seen.min(axis=0), seen.max(axis=0)
        # Rounding of the products counts as range: constant values must not blow it up.
        half = (high - low) / 2 + _sums(context) * np.abs(seen).max(axis=0)
        away = np.abs(got - (low + high) / 2).max(axis=0)
        values.append(float(np.max(away / np.maximum(half, 1e-300))))
    return Observations(values, 1.0, rounding=ROUNDING)


@claim(
    "softmax.truncation",
    title="What the largest weights leave",
    statement="""T the largest weights of a row p, m their sum: renormalised to T the row moves by
        1 - m in total variation, and set to zero off T by 1 - m in the 1-norm.""",
    source=DERIVED,
    status="derived",
    kind="inequality",
    observes="max_i of the two differences from 1 - m, which must be zero; rank = |T|",
    assumptions=MATRIX,
    recorded={"reference": "holds", "clusters": "holds", "heads": "holds"},
)
def _truncation(context: Context, *, rank: int = 4) -> Observations:
    a = _matrix(context)
    context.require(rank <= a.shape[1], f"r = {rank} of {a.shape[1]} keys")
    largest = np.argpartition(-a, rank - 1, axis=1)[:, :rank]
    kept = np.zeros_like(a)
    np.put_along_axis(kept, largest, np.take_along_axis(a, largest, axis=1), axis=1)
    mass = kept.sum(axis=1)
    variation = np.abs(kept / mass[:, None] - a).sum(axis=1) / 2
    dropped = np.abs(kept - a).sum(axis=1)
    off = np.maximum(np.abs(variation - (1 - mass)), np.abs(dropped - (1 - mass)))
    return Observations([float(off.max())], 0.0, rank=rank, rounding=2 * _sums(context))


# --- changes of the logits ---------------------------------------------------------------------


def _worst_changes(context: Context, width: float) -> list[tuple[Array, Array, Array, float]]:
    """Return rows p, changed rows p', the changes of their logits, and V-errors, trial by trial.

    The change is ``width`` on a set of columns whose weight is as near to ``1/(1 + e^(W/2))`` as
    a random order allows, where a softmax moves most; 0 elsewhere.
    """
    goal = 1 / (1 + math.exp(min(width / 2, 700.0)))
    v = context.instance.v if context.instance.has_values else None
    found = []
    for trial, rng in enumerate(context.generators()):
        logits = _rows(context, trial)[:1]
        p = softmax_of(context, logits, rng)[0]
        order = rng.permutation(len(p))
        sums = np.cumsum(p[order])
        count = 1 + int(np.argmin(np.abs(sums - goal)))
        change = np.zeros(len(p))
        change[order[: min(count, max(1, len(p) - 1))]] = width
        q = softmax_of(context, logits + change, rng)[0]
        moved = 0.0 if v is None else float(np.linalg.norm((p - q) @ v))
        found.append((p, q, change, moved))
    return found


@claim(
    "softmax.perturbation",
    title="How far a softmax can move, against the worst changes",
    statement="""Logits that differ by delta_j, W = max_j delta_j - min_j delta_j: the total
        variation of the softmax is at most tanh(W/4), with equality for a change of W on a set of
        weight 1/(1 + e^(W/2)).""",
    source=DERIVED,
    status="derived",
    kind="inequality",
    observes="|p - p'|_1/(2 tanh(W/4)), rows p of A, W on a set of nearly that weight",
    assumptions=MATRIX,
    recorded=CHANGED,
)
def _perturbation(context: Context, *, width: float = 1.0) -> Observations:
    size = float(real(width, "width", 0))
    limit = float(np.asarray(perturbation_bound(size)))
    values = [float(np.abs(p - q).sum()) / limit for p, q, _, _ in _worst_changes(context, size)]
    return Observations(values, 1.0, rounding=ROUNDING / min(limit, 1.0))


@claim(
    "softmax.output_perturbation",
    title="How far an output can move",
    statement="""As softmax.perturbation: |O_i - O'_i| <= tanh(W/4) max_{j,l} |V_j - V_l|.""",
    source=DERIVED,
    status="derived",
    kind="inequality",
    observes="|O_i - O'_i| over its bound, changes as in softmax.perturbation",
    assumptions=(*MATRIX, VALUES),
    recorded=CHANGED,
)
def _output_perturbation(context: Context, *, width: float = 0.5) -> Observations:
    size = float(real(width, "width", 0))
    n = context.instance.n
    context.require(n <= 4096, f"{n} values have too many pairs")
    diameter = _diameter(context)
    context.require(diameter > 0, "needs values that are not all equal")
    limit = math.tanh(size / 4) * diameter
    values = [moved / limit for _, _, _, moved in _worst_changes(context, size)]
    # p - p' sums to zero up to rounding, which values far from zero multiply.
    far = float(np.linalg.norm(context.instance.v, axis=1).max())
    return Observations(values, 1.0, rounding=2 * (n + 16) * EPS * far / limit)


@claim(
    "softmax.divergence",
    title="Logarithms and divergences of a changed softmax",
    statement="""As softmax.perturbation: |ln(p'_j/p_j)| <= W for all j, and KL(p|p') and KL(p'|p)
        are at most W^2/8.""",
    source="derived: Hoeffding's lemma",
    status="derived",
    kind="inequality",
    observes="the largest of these over its bound, changes as in softmax.perturbation",
    assumptions=MATRIX,
    recorded=CHANGED,
)
def _divergence(context: Context, *, width: float = 0.5) -> Observations:
    size = float(real(width, "width", 0))
    values = []
    for p, q, _, _ in _worst_changes(context, size):
        kept = (p > 1e-290) & (q > 1e-290)  # subnormal weights have few digits
        log = np.log(q[kept] / p[kept])
        kl = max(float(-(p[kept] @ log)), float(q[kept] @ log))
        values.append(max(kl / (size**2 / 8), float(np.abs(log).max()) / size))
    return Observations(values, 1.0, rounding=ROUNDING / min(size**2, 1.0))


@claim(
    "softmax.lipschitz",
    title="The softmax is 1/2-Lipschitz",
    statement="""|softmax(l + delta) - softmax(l)|_2 <= (1/2) |delta - mean(delta) 1|_2, since
        |diag p - p p^T|_2 <= 1/2, with equality for p = (1/2, 1/2).""",
    source=DERIVED,
    status="derived",
    kind="inequality",
    observes="the 2-norm over its bound; delta = size (e_j - e_l) at the two largest weights",
    assumptions=MATRIX,
    recorded=CHANGED,
)
def _lipschitz(context: Context, *, size: float = 0.1) -> Observations:
    context.require(context.instance.n >= 2, "needs two keys")
    step = float(real(size, "size", 0))
    values = []
    for trial, rng in enumerate(context.generators()):
        logits = _rows(context, trial)
        change = np.zeros_like(logits)
        largest = np.argpartition(-logits, 1, axis=1)[:, :2]
        np.put_along_axis(change, largest, np.array([step, -step]), axis=1)
        before, after = (softmax_of(context, x, rng) for x in (logits, logits + change))
        moved = float(np.linalg.norm(after - before, axis=1).max())
        values.append(moved / (0.5 * math.sqrt(2) * step))
    return Observations(values, 1.0, rounding=ROUNDING / step)


def _pairs(context: Context, factor: float, keys: Array) -> list[float]:
    """Return ``|A_i - A_j|_2 / (factor |scale| |keys|_2 |q_i - q_j|)`` for random pairs."""
    q, k, scale = _factors(context)
    context.require(len(q) >= 2, "needs two queries")
    size = factor * abs(scale) * float(np.linalg.norm(keys, 2))
    values, room = [], weight_rounding(context.instance)
    for rng in context.generators():
        i, j = rng.choice(len(q), 2, replace=False)
        pair = q[[i, j]]
        rows = softmax_of(context, scale * pair @ k.T, rng)
        moved = float(np.linalg.norm(rows[0] - rows[1]))
        values.append(quotient(moved, size * float(np.linalg.norm(pair[0] - pair[1])), room))
    return values


@claim(
    "softmax.query_lipschitz",
    title="Near queries have near rows, the published constant",
    statement="|A_i - A_j|_2 <= |scale| |K|_2 |q_i - q_j|_2.",
    source=VYAS,
    status="published",
    kind="inequality",
    observes="|A_i - A_j|_2 over its bound for one random pair of queries a trial",
    assumptions=(*MATRIX, KEYS),
    recorded={"two-queries": "holds", "blocks": "holds", "clusters": "holds", "heads": "holds"},
    constants={"factor": 1.0},
)
def _query_lipschitz(context: Context) -> Observations:
    return Observations(_pairs(context, 1.0, _factors(context)[1]), 1.0, rounding=ROUNDING)


@claim(
    "softmax.query_lipschitz_half",
    title="Near queries have near rows, the sharp constant",
    statement="""|A_i - A_j|_2 <= (1/2) |scale| |K - 1 c^T|_2 |q_i - q_j|_2 for every c, here the
        mean of the keys; 1/2 cannot be lowered.""",
    source="derived: the softmax is 1/2-Lipschitz and does not see a shift of the keys",
    status="derived",
    kind="inequality",
    observes="|A_i - A_j|_2 over its bound for one random pair of queries a trial",
    assumptions=(*MATRIX, KEYS),
    recorded={"two-queries": "holds", "blocks": "holds", "clusters": "holds", "heads": "holds"},
    constants={"factor": 0.5},
)
def _query_lipschitz_half(context: Context) -> Observations:
    keys = _factors(context)[1]
    return Observations(_pairs(context, 0.5, keys - keys.mean(axis=0)), 1.0, rounding=ROUNDING)
