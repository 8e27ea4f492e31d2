"""Claims: when ``U S P`` is A, what no such matrix can do, and what an error of logits costs."""

from __future__ import annotations

import math
import warnings

import numpy as np

from ...base.draws import Draw
from ...errors.perturbation import (
    cluster_eta_apriori,
    compression_eta,
    kl_bound,
    lipschitz_bound,
    log_ratio_bound,
    logit_eta,
    output_bound,
    quantization_eta,
    quantize,
    tv_bound,
)
from ...problem import AttentionProblem
from ...sampling.clustering import Clusters, kmeans
from ...zoo.base import methods
from ...zoo.compressed import Compressed
from ...zoo.dba.method import DBA
from ..engine.arguments import Array, real, whole
from ..engine.assumptions import DENSE, KEYS, STOCHASTIC, VALUES
from ..engine.instances import Instance, instance
from ..engine.observers import (
    EPS,
    RANKS,
    ROUNDING,
    few,
    implemented,
    is_default,
    largest,
    on_heads,
    problem_of,
    quotient,
    softmax_of,
    weight_rounding,
)
from ..engine.records import Observations
from ..engine.registry import Assumption, Context, claim
from ..sketching.lowrank import eckart_young_floor
from .formulas import output_factors
from .shared import DERIVED, ON, width_of

# Methods of rank r whose matrices are compared with floors.
FACTORED = ("clustered", "dba", "linformer", "nystromformer", "performer")

# Errors up to this, relative to what is approximated, count as none beside a floor.
ROUNDED = 1e-12

# --- instances -----------------------------------------------------------------------------------


@instance("three-to-one", "Q = I_2, keys e_1 three times and e_2 once: means without counts fail")
def _three_to_one() -> AttentionProblem:
    return AttentionProblem(np.eye(2), np.eye(2)[[0, 0, 0, 1]], np.eye(4), scale=1 / math.sqrt(2))


@instance("duplicates", "30 queries of 9 distinct ones, 35 keys of 12 distinct ones, d = 5")
def _duplicates() -> AttentionProblem:
    rng = np.random.default_rng(25)
    q, k = rng.standard_normal((9, 5)), rng.standard_normal((12, 5))
    rows = np.r_[np.arange(9), rng.integers(0, 9, 21)]
    columns = np.r_[np.arange(12), rng.integers(0, 12, 23)]
    return AttentionProblem(2 * q[rows], k[columns], rng.standard_normal((35, 3)))


@instance("twice", "every one of 8 keys twice: where counts do not matter")
def _twice() -> AttentionProblem:
    rng = np.random.default_rng(26)
    q, k = rng.standard_normal((6, 4)), rng.standard_normal((8, 4))
    return AttentionProblem(q, np.tile(k, (2, 1)), rng.standard_normal((16, 2)))


@instance("odds", "one query, two keys of weights 1/(1 + e) and e/(1 + e), values 0 and 1")
def _odds() -> AttentionProblem:
    return AttentionProblem(np.eye(1), np.array([[0.0], [1.0]]), np.array([[0.0], [1.0]]), scale=1)


@instance("ten-clusters", "200 queries and keys in 10 tight clusters each, d = 16, d_v = 4")
def _ten_clusters() -> AttentionProblem:
    rng = np.random.default_rng(27)
    q, k = (
        rng.standard_normal((10, 16))[np.arange(200) % 10] + 0.02 * rng.standard_normal((200, 16))
        for _ in range(2)
    )
    return AttentionProblem(2 * q, k, rng.standard_normal((200, 4)))


@instance("gauss", "128 Gaussian queries and keys, d = 32: attention that no low rank is near to")
def _gauss() -> AttentionProblem:
    rng = np.random.default_rng(28)
    q, k, v = (rng.standard_normal((128, 32)) for _ in range(3))
    return AttentionProblem(q, k, v)


# --- what observers share ------------------------------------------------------------------------


def _test_full_values(seen: Instance) -> str | None:
    if seen.has_values and seen.value_basis.shape[1] == seen.v.shape[1]:
        return None
    return "needs values of full column rank"


FULL_VALUES = Assumption("V has full column rank", _test_full_values)


def _variation(a: Array, b: Array) -> Array:
    """Return the total variation of the rows."""
    return np.asarray(np.abs(a - b).sum(axis=1) / 2)


def _approximations(context: Context, r: int) -> list[tuple[str, Array, int]]:
    """Return name, matrix and bound of the rank of what has rank r, one draw of each method."""
    problem = problem_of(context.instance)
    rng = np.random.default_rng(context.entropy)
    if not is_default(context):
        return [("handed in", implemented(context, "approximation", r, rng, problem=problem), r)]
    found = []
    for name in FACTORED:
        if name not in methods():
            continue
        ahat = methods()[name](rank=min(r, problem.n_k)).approximate(problem, rng=rng)
        found.append((name, ahat.to_dense(), int(ahat.rank_bound)))
    return found


def _least_rank(context: Context, rank: int | None) -> int:
    seen = context.instance
    r = max(1, min(64, seen.m // 4, seen.n // 4)) if rank is None else int(whole(rank, "rank"))
    context.require(r < min(seen.m, seen.n), f"r = {r} of {min(seen.m, seen.n)}")
    return r


def _distinct(x: Array) -> Clusters:
    centers, labels, counts = np.unique(x, axis=0, return_inverse=True, return_counts=True)
    return Clusters(centers, np.asarray(labels).ravel(), counts)


def _means(
    context: Context, queries: Clusters, keys: Clusters, *, counts: bool = True
) -> tuple[Array, int]:
    """Return Ahat of means over clusters, by the implementation that was handed in if any."""
    problem = problem_of(context.instance)
    rng = np.random.default_rng(context.entropy)
    r = max(len(queries.counts), len(keys.counts))
    if not is_default(context):
        given = {"problem": problem, "queries": queries, "keys": keys}
        return implemented(context, "means", r, rng, **given), r
    context.require(len(queries.counts) <= problem.n_k, "has more distinct queries than keys")
    core = "softmax_logcount" if counts else "softmax_nocount"
    draw = Draw(
        landmarks=np.concatenate([queries.centers, keys.centers]),
        labels=np.concatenate([queries.labels, len(queries.counts) + keys.labels]),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the wrong core says that it is wrong
        method = DBA(r, pack="mean", core=core)
        return method.approximate(problem, draw=draw).to_dense(), r


# --- T3: when it is exact ------------------------------------------------------------------------


@claim(
    "dba.multiplicity",
    title="Means of equal keys are exact with the logarithm of their counts",
    statement="""Q with m_q distinct rows, K with m_k distinct rows of counts c: U = one-hot,
        P = means over equal keys, S = rowsoftmax(scale Qc Kc^T + 1 log(c)^T) give A = U S P,
        whatever V.""",
    source=DERIVED,
    status="derived",
    kind="inequality",
    observes="max_i total variation of A_i and Ahat_i, which must be zero; rank = max(m_q, m_k)",
    assumptions=(DENSE, KEYS),
    recorded={
        "three-to-one": "holds",
        "duplicates": "holds",
        "twice": "holds",
        "ten-clusters": "holds",
        "heads": "holds",
    },
)
def _multiplicity(context: Context) -> Observations:
    problem = problem_of(context.instance)
    ahat, r = _means(context, _distinct(problem.q), _distinct(problem.k))
    off = float(_variation(context.instance.a, ahat).max(initial=0.0))
    return Observations([off], 0.0, rank=r, rounding=weight_rounding(context.instance))


@claim(
    "dba.no_log_count",
    title="Means of equal keys without counts",
    statement="""As dba.multiplicity with S = rowsoftmax(scale Qc Kc^T): the mean of equal keys
        stands for them.""",
    source=(
        "averaged keys used as keys; refuted: a mean of c keys has c times the weight of one, and "
        "a softmax ignores constant shifts alone, so it is exact only if all counts are equal"
    ),
    status="refuted",
    kind="inequality",
    observes="max_i total variation of A_i and Ahat_i, which must be zero",
    assumptions=(DENSE, KEYS),
    recorded={"three-to-one": "violated", "duplicates": "violated", "heads": "not applicable"},
)
def _no_log_count(context: Context) -> Observations:
    problem = problem_of(context.instance)
    keys = _distinct(problem.k)
    context.require(len(keys.counts) < problem.n_k, "all keys are distinct")
    ahat, r = _means(context, _distinct(problem.q), keys, counts=False)
    off = float(_variation(context.instance.a, ahat).max(initial=0.0))
    return Observations([off], 0.0, rank=r, rounding=ROUNDING)


# --- T4: floors ----------------------------------------------------------------------------------


@claim(
    "dba.matrix_floor",
    title="No product of rank r is nearer to A than its truncated SVD",
    statement="""Every Ahat = U S P of rank at most r has
        |A - Ahat|_F >= (sum_{j>r} sigma_j^2)^(1/2) and |A - Ahat|_2 >= sigma_{r+1}.""",
    source="derived: Eckart, Young and Mirsky",
    status="derived",
    kind="inequality",
    observes="floor at the rank bound over the error, of one draw of each factored method",
    assumptions=(DENSE, KEYS, STOCHASTIC),
    recorded={"gauss": "holds", "ten-clusters": "holds", "circle": "holds", "heads": "holds"},
    ladder=RANKS,
)
def _matrix_floor(context: Context, *, rank: int | None = None) -> Observations:
    r = _least_rank(context, rank)
    a, sigma = context.instance.a, context.instance.svd[1]
    values: list[float] = []
    size, nearest = float(np.linalg.norm(sigma)), ""
    for name, ahat, bound in _approximations(context, r):
        left = a - ahat
        pairs = [("fro", float(np.linalg.norm(left)))]
        if a.size <= 1 << 16:
            pairs.append(("spectral", float(np.linalg.norm(left, 2))))
        for norm, found in pairs:
            value = quotient(
                float(np.asarray(eckart_young_floor(sigma, bound, norm))), found, ROUNDED * size
            )
            nearest = name if not values or value > max(values) else nearest
            values.append(value)
    return Observations(values, 1.0, rank=r, rounding=1e-9, notes=f"nearest: {nearest}")


def _output_rank(context: Context, rank: int | None) -> int:
    d_v = context.instance.v.shape[1]
    r = max(1, d_v // 2) if rank is None else int(whole(rank, "rank"))
    context.require(r <= min(d_v, context.instance.m), f"r = {r} of d_v = {d_v}")
    return r


@claim(
    "dba.output_floor",
    title="The floor of outputs is that of O, not of A",
    statement="""Every Ahat of rank at most r has
        |A V - Ahat V|_F >= (sum_{j>r} sigma_j(O)^2)^(1/2), which is 0 from r = d_v on.""",
    source="derived: Eckart, Young and Mirsky, for O = A V",
    status="derived",
    kind="inequality",
    observes="floor at the rank bound over the output error, of one draw of each factored method",
    assumptions=(DENSE, VALUES, KEYS, STOCHASTIC),
    recorded={"gauss": "holds", "ten-clusters": "holds", "heads": "holds"},
)
def _output_floor(context: Context, *, rank: int | None = None) -> Observations:
    seen, r = context.instance, _output_rank(context, rank)
    sigma = np.linalg.svd(seen.product, compute_uv=False)
    values: list[float] = []
    size, nearest = float(np.linalg.norm(sigma)), ""
    for name, ahat, bound in _approximations(context, r):
        found = float(np.linalg.norm(seen.product - ahat @ seen.v))
        value = quotient(float(np.asarray(eckart_young_floor(sigma, bound))), found, ROUNDED * size)
        nearest = name if not values or value > max(values) else nearest
        values.append(value)
    return Observations(values, 1.0, rank=r, rounding=1e-9, notes=f"nearest: {nearest}")


@claim(
    "dba.output_floor_attained",
    title="The floor of outputs is attained",
    statement="""If V has full column rank, Ahat = O_r V^+ has rank r and
        |A V - Ahat V|_F = (sum_{j>r} sigma_j(O)^2)^(1/2); Ahat = O V^+ of rank d_v has the exact
        output, whatever its distance from A.""",
    source=DERIVED,
    status="derived",
    kind="inequality",
    observes="|error - floor|/|O|_F at r = d_v/2 and r = d_v, which must be zero",
    assumptions=(DENSE, VALUES, FULL_VALUES),
    recorded={"gauss": "holds", "ten-clusters": "holds", "clusters": "holds", "heads": "holds"},
)
def _output_floor_attained(context: Context) -> Observations:
    seen = context.instance
    sigma = np.linalg.svd(seen.product, compute_uv=False)
    size = max(float(np.linalg.norm(sigma)), 1e-300)
    rng = np.random.default_rng(context.entropy)
    values, d_v, ahat = [], seen.v.shape[1], np.zeros_like(seen.a)
    # V^+ multiplies rounding by the condition number of V.
    rounding = 16 * max(seen.v.shape) * EPS * float(np.linalg.cond(seen.v))
    for r in sorted({max(1, d_v // 2), d_v}):
        if is_default(context):
            found = output_factors(seen.product, seen.v, r)
            ahat = found.unpack @ found.pack
        else:
            ahat = implemented(context, "best_output", r, rng, output=seen.product, values=seen.v)
        error = float(np.linalg.norm(seen.product - ahat @ seen.v))
        values.append(abs(error - float(np.asarray(eckart_young_floor(sigma, r)))) / size)
    away = float(np.linalg.norm(seen.a - ahat) / np.linalg.norm(seen.a))
    return Observations(
        values, 0.0, rank=d_v, rounding=rounding, notes=f"distance from A over |A|_F {away:.3g}"
    )


@claim(
    "dba.svd_output_floor",
    title="The output of the truncated SVD is no floor",
    statement="""No Ahat of rank r has a smaller output error than the truncated SVD A_r:
        |A V - Ahat V|_F >= |A V - A_r V|_F.""",
    source="the floor of the matrix taken for one of outputs; refuted: Ahat = O_r V^+",
    status="refuted",
    kind="inequality",
    observes="output error of A_r over that of O_r V^+, r = d_v/2",
    assumptions=(DENSE, VALUES, FULL_VALUES),
    recorded={"gauss": "violated", "clusters": "violated", "heads": "violated"},
)
def _svd_output_floor(context: Context, *, rank: int | None = None) -> Observations:
    seen, r = context.instance, _output_rank(context, rank)
    u, sigma, vt = seen.svd
    output = np.linalg.norm(seen.product)
    truncated = float(np.linalg.norm(seen.product - (u[:, :r] * sigma[:r]) @ (vt[:r] @ seen.v)))
    best = output_factors(seen.product, seen.v, r)
    found = float(np.linalg.norm(seen.product - best.unpack @ (best.pack @ seen.v)))
    return Observations(
        [quotient(truncated, found, ROUNDED * float(output))], 1.0, rank=r, rounding=1e-9
    )


@claim(
    "dba.compressed_floor",
    title="Compressed logits are not bound by a floor",
    statement="""Logits of rank r give no better matrix than rank r does:
        |A - rowsoftmax(scale Qh Kh^T)|_F >= (sum_{j>r} sigma_j(A)^2)^(1/2), Qh and Kh of width
        r.""",
    source=(
        "the floor of products U S P used for a softmax that comes last; refuted: the softmax "
        "makes the rank again"
    ),
    status="refuted",
    kind="inequality",
    observes="floor of rank r over the error of the best logits of rank r, r = d/2",
    assumptions=(*ON, STOCHASTIC),
    recorded={
        "gauss": "violated",
        "line-4": "not applicable",
        **on_heads("violated", holds="0.0 2.6 3.4 4.1 4.8 5.4 5.11"),
    },
)
def _compressed_floor(context: Context, *, rank: int | None = None) -> Observations:
    problem, r = problem_of(context.instance), width_of(context, rank)
    context.require(r < min(problem.d, problem.n_k + 1), f"d_in = {r} is all of d")
    a, sigma = context.instance.a, context.instance.svd[1]
    ahat = Compressed(r).approximate(problem, rng=0).to_dense()
    floor, error = float(np.asarray(eckart_young_floor(sigma, r))), float(np.linalg.norm(a - ahat))
    return Observations(
        [quotient(floor, error, ROUNDED * float(np.linalg.norm(sigma)))], 1.0, rank=r, rounding=1e-9
    )


# --- T5: from an error of logits to one of attention ---------------------------------------------


def _changes(a: Array, eta: float, rng: np.random.Generator) -> list[Array]:
    """Return changes of half-range eta: Gaussian, and two values where a softmax moves most."""
    noise = rng.standard_normal(a.shape)
    width = np.ptp(noise, axis=1, keepdims=True)
    noise *= 2 * eta / np.where(width > 0, width, 1.0)
    order = rng.permuted(np.tile(np.arange(a.shape[1]), (len(a), 1)), axis=1)
    sums = np.cumsum(np.take_along_axis(a, order, axis=1), axis=1)
    last = np.argmin(np.abs(sums - 1 / (1 + math.exp(min(eta, 700.0)))), axis=1)
    raised = np.arange(a.shape[1]) <= last[:, None]
    split = np.empty_like(a)
    np.put_along_axis(split, order, np.where(raised, eta, -eta), axis=1)
    return [noise, split]


@claim(
    "dba.logit_error",
    title="From the half-range of a logit error to attention and outputs",
    statement="""Lhat = L + D, eta_i = (max_j D_ij - min_j D_ij)/2: the total variation of A_i and
        Ahat_i is at most tanh(eta_i/2), both divergences at most eta_i^2/2,
        |ln(Ahat_ij/A_ij)| <= 2 eta_i, |O_ic - Ohat_ic| <= TV_i (max_j V_jc - min_j V_jc) and
        |O_i - Ohat_i|_2 <= TV_i max_{j,l} |V_j - V_l|_2.  The first is attained by two keys of
        weights 1/(1 + e^eta) and e^eta/(1 + e^eta), with D = (eta, -eta).""",
    source=DERIVED,
    status="derived",
    kind="inequality",
    observes="the largest of these over its bound, Gaussian D and two-valued D",
    assumptions=(DENSE, STOCHASTIC, VALUES),
    recorded={"odds": "holds", "reference": "holds", "clusters": "holds", "heads": "holds"},
)
def _logit_error(context: Context, *, eta: float = 1.0) -> Observations:
    half = float(real(eta, "eta", 0))
    seen = context.instance
    context.require(seen.n <= 4096, f"{seen.n} values have too many pairs")
    reach = seen.cached("output bound", lambda: output_bound(1.0, seen.v))
    values = []
    for trial, rng in enumerate(few(context)):
        picked = (8 * trial + np.arange(min(8, seen.m))) % seen.m
        with np.errstate(divide="ignore"):
            logits = np.log(seen.a[picked])
        a = softmax_of(context, logits, rng)
        for change in _changes(seen.a[picked], half, rng):
            b = softmax_of(context, logits + change, rng)
            most = logit_eta(change, keep=seen.a[picked] > 0)
            tv = _variation(a, b)
            kept = (a > 1e-290) & (b > 1e-290)  # subnormal weights have few digits
            log = np.zeros_like(a)
            log[kept] = np.log(b[kept] / a[kept])
            kl = np.maximum(-(a * log).sum(axis=1), (b * log).sum(axis=1))
            out = np.abs((a - b) @ seen.v)
            # Rounding of the sums, over bounds of nearly nothing.
            tiny, room = 1e-13, 1e-13 * (1 + largest(seen.v))
            bounds = (
                (tv - tiny, tv_bound(most)),
                (kl - tiny, kl_bound(most)),
                (np.abs(log).max(axis=1) - tiny, log_ratio_bound(most)),
                (out - room, tv[:, None] * reach.entries),
                (np.linalg.norm(out, axis=1) - room, tv * reach.norms),
            )
            values += [_largest_ratio(x, np.asarray(y)) for x, y in bounds]
    return Observations(values, 1.0, rounding=ROUNDING)


def _largest_ratio(found: Array, bound: Array) -> float:
    """Return the largest quotient of what is found over its bound."""
    positive = np.maximum(found, 0.0)
    ratio = np.divide(positive, bound, out=np.zeros_like(positive), where=bound > 0)
    ratio[(bound <= 0) & (positive > 0)] = np.inf
    return float(ratio.max(initial=0.0))


def _mean_variation(
    context: Context,
    ahat: Array,
    bound: Array,
    notes: str = "",
    rank: int | None = None,
    *,
    wrong: bool = False,
) -> Observations:
    """Compare the mean total variation of rows with that of its bounds, and each row with its own.

    The trivial predictor is the mean of V, whose rows are uniform.  ``wrong`` says that a step of
    the statement is violated already.
    """
    a = context.instance.a
    found = _variation(a, ahat)
    ratio = _largest_ratio(np.maximum(found - 1e-11, 0.0), bound)
    most = float(bound.mean())
    # A single row beyond its own bound counts like a mean beyond the mean of the bounds.
    value = float(found.mean()) if ratio <= 1 else max(float(found.mean()), most * ratio)
    value = math.inf if wrong else value
    trivial = float(_variation(a, np.full_like(a, 1 / a.shape[1])).mean())
    return Observations(
        [value],
        most,
        rank=rank,
        rounding=1e-11,
        predictor="the mean of V",
        trivial=trivial,
        notes=notes,
    )


def _clusters(context: Context, rank: int | None) -> tuple[Clusters, Clusters]:
    problem = problem_of(context.instance)
    r = max(1, min(32, problem.n_q // 4, problem.n_k // 4)) if rank is None else rank
    r = int(whole(r, "rank"))
    context.require(r <= min(problem.n_q, problem.n_k), f"r = {r} clusters")

    def make() -> tuple[Clusters, Clusters]:
        return kmeans(problem.q, r, seed=0), kmeans(problem.k, r, seed=1)

    return context.instance.cached(("clusters", r), make)


@claim(
    "dba.block_form",
    title="Means of clusters are a softmax of block-constant logits",
    statement="""With centres qc, kc and labels a, b, the product U S P of dba.multiplicity is
        rowsoftmax(Ltilde), Ltilde_ij = scale qc_{a(i)}.kc_{b(j)}, for any clusters.""",
    source=DERIVED,
    status="derived",
    kind="inequality",
    observes="max_i total variation of Ahat_i and that softmax, which must be zero; k-means",
    assumptions=(DENSE, KEYS),
    recorded={"ten-clusters": "holds", "duplicates": "holds", "heads": "holds"},
)
def _block_form(context: Context, *, rank: int | None = None) -> Observations:
    problem = problem_of(context.instance)
    queries, keys = _clusters(context, rank)
    ahat, r = _means(context, queries, keys)
    logits = problem.scale * queries.centers[queries.labels] @ keys.centers[keys.labels].T
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    off = float(_variation(weights, ahat).max(initial=0.0))
    return Observations([off], 0.0, rank=r, rounding=weight_rounding(context.instance))


@claim(
    "dba.cluster_apriori",
    title="What clusters cost, before any logit is computed",
    statement="""As dba.block_form, with radii rho: eta_i <= |scale| (rho_i max_j |k_j - c| +
        |qc_{a(i)}| max_j rho_j) for every c, and the total variation of A_i and Ahat_i is at most
        tanh(eta_i/2).""",
    source=DERIVED,
    status="derived",
    kind="inequality",
    observes="mean total variation of rows against the mean of their bounds, each row too; k-means",
    assumptions=(DENSE, KEYS, STOCHASTIC),
    recorded={"ten-clusters": "holds", "clusters": "vacuous", "heads": "vacuous"},
    ladder=RANKS,
)
def _cluster_apriori(context: Context, *, rank: int | None = None) -> Observations:
    problem = problem_of(context.instance)
    queries, keys = _clusters(context, rank)
    ahat, r = _means(context, queries, keys)
    before = cluster_eta_apriori(problem.q, problem.k, queries, keys, scale=problem.scale)
    after = compression_eta(
        problem.q,
        problem.k,
        queries.centers[queries.labels],
        keys.centers[keys.labels],
        scale=problem.scale,
    )
    note = f"mean tanh(eta/2) {float(np.mean(tv_bound(after))):.3g} afterwards"
    wrong = bool((after > before * (1 + 1e-9) + 1e-12).any())
    return _mean_variation(context, ahat, np.asarray(tv_bound(before)), note, r, wrong=wrong)


@claim(
    "dba.compressed_logits",
    title="What fewer hidden dimensions cost",
    statement="""Ahat = rowsoftmax(scale Qh Kh^T), eta_i the half-range of the rows of
        scale (Qh Kh^T - Q K^T): the total variation of A_i and Ahat_i is at most tanh(eta_i/2).""",
    source=DERIVED,
    status="derived",
    kind="inequality",
    observes="mean total variation of rows against the mean of their bounds; rows too; r = d_in",
    assumptions=(*ON, STOCHASTIC),
    recorded={
        "ten-clusters": "holds",
        "gauss": "vacuous",
        **on_heads("holds", vacuous="0.0"),
    },
)
def _compressed_logits(context: Context, *, rank: int | None = None) -> Observations:
    problem, r = problem_of(context.instance), width_of(context, rank)
    ahat, small = _by_width(context, problem, r)
    eta = compression_eta(problem.q, problem.k, small.q, small.k, scale=problem.scale)
    return _mean_variation(context, ahat, np.asarray(tv_bound(eta)), rank=r)


def _by_width(
    context: Context, problem: AttentionProblem, r: int
) -> tuple[Array, AttentionProblem]:
    """Return Ahat of the best logits of width r, and the compressed problem."""
    from ...sketches.compression import compress_problem

    context.require(r <= problem.n_k, f"d_in = {r} for {problem.n_k} keys")
    small = compress_problem(problem, r)
    if not is_default(context):
        rng = np.random.default_rng(context.entropy)
        return implemented(context, "compressed", r, rng, problem=problem), small
    return Compressed(r).approximate(problem, rng=0).to_dense(), small


@claim(
    "dba.quantized_inputs",
    title="What rounded queries and keys cost",
    statement="""Q and K rounded to nearest, by at most e and e' an entry: eta_i <= |scale| sum_c
        (e_ic h_c + (|q_ic| + e_ic) max_j e'_jc), h_c the half-range of column c of K, and the total
        variation of A_i and Ahat_i is at most tanh(eta_i/2).""",
    source=DERIVED,
    status="derived",
    kind="inequality",
    observes="mean total variation of rows against the mean of their bounds, each row too",
    assumptions=(DENSE, KEYS, STOCHASTIC),
    recorded={"ten-clusters": "holds", "gauss": "holds", "clusters": "holds", "heads": "holds"},
)
def _quantized_inputs(context: Context, *, dtype: str = "bfloat16") -> Observations:
    problem = problem_of(context.instance)
    eta = quantization_eta(problem.q, problem.k, dtype, scale=problem.scale)
    rng = np.random.default_rng(context.entropy)
    rounded = []
    for x in (problem.q, problem.k):
        if is_default(context):
            rounded.append(quantize(x, dtype))
        else:
            rounded.append(implemented(context, "rounded", len(x), rng, x=x, dtype=dtype))
    small = AttentionProblem(rounded[0], rounded[1], scale=problem.scale)
    return _mean_variation(
        context, small.exact.to_dense(), np.asarray(tv_bound(eta)), f"inputs in {dtype}"
    )


# --- T6 ------------------------------------------------------------------------------------------


@claim(
    "dba.lipschitz",
    title="The Lipschitz form, valid and loose",
    statement="""|A - Ahat|_F <= (1/2) |D (I - 1 1^T/n_k)|_F, since |diag p - p p^T|_2 <= 1/2.""",
    source=DERIVED,
    status="derived",
    kind="inequality",
    observes="|A - Ahat|_F against its bound, logits compressed to half of the width",
    assumptions=(*ON, STOCHASTIC),
    recorded={"worked": "holds", "ten-clusters": "vacuous", "heads": "vacuous"},
)
def _lipschitz(context: Context, *, rank: int | None = None) -> Observations:
    problem, r = problem_of(context.instance), width_of(context, rank)
    context.require(r < problem.d, f"d_in = {r} is all of d")
    a = context.instance.a
    ahat, small = _by_width(context, problem, r)
    change = problem.scale * (small.q @ small.k.T - problem.q @ problem.k.T)
    bound = float(np.linalg.norm(lipschitz_bound(change)))
    trivial = float(np.linalg.norm(a - 1 / a.shape[1]))
    found = float(np.linalg.norm(a - ahat))
    return Observations(
        [found], bound, rank=r, rounding=1e-11, predictor="the mean of V", trivial=trivial
    )
