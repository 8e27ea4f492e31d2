"""Claims: the theorems of Linformer, why they fail, and what holds of reduced forms."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from ...operators.solve import row_softmax
from ...problem import AttentionProblem
from ...zoo.linformer.method import Linformer
from ..engine.arguments import Array, real
from ..engine.assumptions import DENSE, PRODUCT
from ..engine.audited import errors, sketched
from ..engine.instances import Instance, instance
from ..engine.observers import (
    RANKS,
    ROUNDING,
    default_rank,
    output_rounding,
    problem_of,
    quotient,
    square,
    weight_rounding,
)
from ..engine.records import Curve, Observations, root
from ..engine.registry import Assumption, Context, claim
from ..sketching.lowrank import eckart_young_floor
from ..sketching.moments import amm_stats
from ..sketching.products import amm_entrywise_min_dim
from ..softmax.formulas import perturbation_bound
from .formulas import (
    DERIVED,
    PAPER,
    failure_of,
    linformer_thm1_failure,
    linformer_thm1_k,
    pooling_bound,
    rate_of,
)

EPS = tuple({"eps": e} for e in (0.66, 0.5, 0.4, 0.3))


# --- counterexamples -----------------------------------------------------------------------------


def _uniform(v: Array) -> AttentionProblem:
    n = len(v)
    return AttentionProblem(np.zeros((n, 2)), np.zeros((n, 2)), v)


@instance("uniform-difference", "Q = 0, n = 512, V = e_1 - e_2: A V is zero, no error may be made")
def _uniform_difference() -> AttentionProblem:
    v = np.zeros((512, 1))
    v[:2, 0] = 1, -1
    return _uniform(v)


@instance("uniform-spike", "Q = 0, n = 512, V = e_1: |A V| is far below |A| |V|")
def _uniform_spike() -> AttentionProblem:
    return _uniform(np.eye(512, 1))


@instance("uniform-ones", "Q = 0, n = 512, V = 1: the output is 1 whatever A is")
def _uniform_ones() -> AttentionProblem:
    return _uniform(np.ones((512, 1)))


@instance("identity", "A = I, n = 512, V = e_1: attention without any low rank")
def _identity() -> tuple[Array, Array]:
    return np.eye(512), np.eye(512, 1)


@instance("blocks", "keys that are nearly constant in 8 blocks of 4, n_q = 20, d = 6, d_v = 5")
def _blocks() -> AttentionProblem:
    rng = np.random.default_rng(8)
    k = np.repeat(rng.standard_normal((8, 6)), 4, axis=0) + 0.05 * rng.standard_normal((32, 6))
    return AttentionProblem(rng.standard_normal((20, 6)), k, rng.standard_normal((32, 5)))


# --- claims ------------------------------------------------------------------------------------


def _test_problem(seen: Instance) -> str | None:
    if seen.problem is None:
        return "needs queries and keys, not only their matrix"
    return "is causal, which a reduced form cannot be" if seen.problem.causal else None


REDUCED = Assumption("queries and keys are known, attention is not causal", _test_problem)


def _weights(problem: AttentionProblem, e: Array, row: slice = slice(None)) -> Array:
    """Return ``rowsoftmax(scale Q (E K)^T)``."""
    return row_softmax(problem.scale * problem.q[row] @ (e @ problem.k).T)


def _matrices(context: Context, r: int) -> Iterator[Array]:
    """Yield one dense R (r, n) of N(0, 1/r) a trial, audited."""
    n = context.instance.n
    yield from sketched(context, "gaussian", r, np.eye(n), "identity")


def _smallest_column(seen: Instance) -> int:
    """Return the column w of V with the least ``|A w|/|w|``."""
    size = np.linalg.norm(seen.v, axis=0)
    ratio = np.linalg.norm(seen.product, axis=0) / np.where(size > 0, size, 1)
    return int(np.argmin(np.where(size > 0, ratio, np.inf)))


@claim(
    "linformer.lemma1",
    title="Inner products of projected vectors, the reading that is true",
    statement="""R (r, n) with independent N(0, 1/r), 0 < eps < 1, x and y fixed:
        P(|<R x, R y> - <x, y>| > eps |x| |y|) <= 2 exp(-(eps^2 - eps^3) r/4).""",
    source=f"{PAPER}, Lemma 1 (12), credited to Arriaga and Vempala (2006)",
    status="published",
    kind="tail",
    observes="|<R x, R y> - <x, y>|/(|x| |y|) for x the first row of A, y the first column of V",
    assumptions=PRODUCT,
    recorded={"uniform-ones": "holds", "identity": "holds", "uniform-spike": "vacuous"},
)
def _lemma1(context: Context, *, eps: float = 0.5, rank: int = 128) -> Observations:
    return _inner_products(context, eps, rank, relative=False)


@claim(
    "linformer.lemma1_relative",
    title="Inner products of projected vectors, relative to the product itself",
    statement="""As linformer.lemma1 with |x y| read as |<x, y>|:
        P(|<R x, R y> - <x, y>| > eps |<x, y>|) <= 2 exp(-(eps^2 - eps^3) r/4).""",
    source=f"{PAPER}, Lemma 1 (12), as it is used in (19)",
    status="refuted",
    kind="tail",
    observes="|<R x, R y> - <x, y>|/|<x, y>| for x the first row of A, y the first column of V",
    assumptions=PRODUCT,
    recorded={"uniform-spike": "violated", "uniform-difference": "violated", "heads": "violated"},
)
def _lemma1_relative(context: Context, *, eps: float = 0.5, rank: int = 128) -> Observations:
    return _inner_products(context, eps, rank, relative=True)


def _inner_products(context: Context, eps: float, rank: int, relative: bool) -> Observations:
    seen = context.instance
    x, y = seen.a[0], seen.v[:, 0]
    size = float(np.linalg.norm(x) * np.linalg.norm(y))
    context.require(size > 0, "needs a first row and a first column that are not zero")
    exact = float(x @ y)
    scale = abs(exact) if relative else size
    pair = np.stack([x, y], axis=1)
    values = [
        _over(abs(float(image[:, 0] @ image[:, 1]) - exact), scale)
        for image in sketched(context, "gaussian", rank, pair, "inner-pair")
    ]
    delta = 2 * math.exp(-float(rate_of(real(eps, "eps", 0, 1))) * rank)
    return Observations(
        values,
        eps,
        delta=delta,
        rank=rank,
        predictor="zero",
        trivial=None if relative else abs(exact) / size,
    )


def _over(error: float, size: float) -> float:
    """Return a relative error; any error where nothing is right is infinite."""
    if error == 0:
        return 0.0
    return error / size if size > 0 else math.inf


@claim(
    "linformer.thm1",
    title="Self-attention is low rank (Theorem 1)",
    statement="""For all Q, K, V and any column w of V there is a low-rank P~ = A R^T R,
        R (r, n) of N(0, 1/r), with P(|P~ w - A w| >= eps |A w|) <= 2 n exp(-(eps^2 - eps^3) r/4)
        and r = 5 ln n/(eps^2 - eps^3), so that the rate is 2 n^(-1/4).""",
    source=f"{PAPER}, Theorem 1 with the constants of its proof",
    status="refuted",
    kind="tail",
    observes="|A R^T R w - A w|/|A w| for the column w of V with the least |A w|/|w|",
    assumptions=PRODUCT,
    recorded={
        "uniform-spike": "violated",
        "uniform-difference": "violated",
        "identity": "violated",
        "heads": "violated",
    },
    ladder=EPS,
)
def _thm1(context: Context, *, eps: float = 0.5) -> Observations:
    seen = context.instance
    context.require(seen.n >= 2, "needs two keys")
    r = int(linformer_thm1_k(seen.n, eps))
    delta = float(linformer_thm1_failure(seen.n, eps, r))
    context.below(r, seen.n, eps, delta)
    w = _smallest_column(seen)
    x = np.concatenate([seen.a.T, seen.v[:, [w]]], axis=1)
    target = seen.product[:, w]
    size = float(np.linalg.norm(target))
    values = [
        _over(float(np.linalg.norm(image[:, :-1].T @ image[:, -1] - target)), size)
        for image in sketched(context, "gaussian", r, x, ("thm1", w))
    ]
    return Observations(values, eps, delta=delta, rank=r)


@claim(
    "linformer.thm1_fixed",
    title="One low-rank matrix for all vectors",
    statement="""There is one P~ of rank at most r < rank(A) with |P~ w - A w| < eps |A w| for all
        w; here the best one, the truncated decomposition, against w = the (r+1)-th right singular
        vector.""",
    source=f"{PAPER}, Theorem 1, with the quantifiers exchanged",
    status="refuted",
    kind="existence",
    observes="|P~ w - A w|/|A w|, which is exactly 1",
    assumptions=(DENSE,),
    recorded={"identity": "violated", "reference": "violated", "heads": "violated"},
)
def _thm1_fixed(context: Context, *, eps: float = 0.5, rank: int = 4) -> Observations:
    u, sigma, vt = context.instance.svd
    context.require(
        rank < len(sigma) and sigma[rank] > 1e-9 * sigma[0], f"needs rank(A) > r = {rank}"
    )
    w = vt[rank]
    exact = context.instance.a @ w
    error = (u[:, :rank] * sigma[:rank]) @ (vt[:rank] @ w) - exact
    return Observations([float(np.linalg.norm(error) / np.linalg.norm(exact))], eps, rank=rank)


@claim(
    "linformer.thm2",
    title="Linear self-attention (Theorem 2)",
    statement="""With r = 5 ln n/(eps^2 - eps^3), R (r, n) of N(0, 1/r), E = delta R and
        F = e^-delta R, for any row w of the logits, P(|softmax(w E^T) F V - softmax(w) V| >
        eps |softmax(w)| |V|_F) = o(1), with the rate 2 n^(-1/4) of Theorem 1.""",
    source=f"{PAPER}, Theorem 2 with the construction and the constants of its proof",
    status="refuted",
    kind="tail",
    observes="|softmax(w E^T) F V - softmax(w) V|/(|softmax(w)| |V|_F), w the first row",
    assumptions=(*PRODUCT, REDUCED),
    recorded={"uniform-ones": "violated"},
    ladder=EPS,
)
def _thm2(context: Context, *, eps: float = 0.5, delta_mode: str | float = "1/n") -> Observations:
    seen, problem = context.instance, problem_of(context.instance)
    context.require(seen.n >= 2, "needs two keys")
    small = failure_of(delta_mode, seen.n)
    r = int(linformer_thm1_k(seen.n, eps))
    rate = float(linformer_thm1_failure(seen.n, eps, r))
    context.below(r, seen.n, eps, rate)
    size = float(np.linalg.norm(seen.a[0]) * np.linalg.norm(seen.v))
    values = []
    for matrix in _matrices(context, r):
        weights = _weights(problem, small * matrix, slice(0, 1))
        out = weights @ (math.exp(-small) * matrix @ seen.v)
        values.append(float(np.linalg.norm(out[0] - seen.product[0])) / size)
    trivial = float(np.linalg.norm(seen.product[0])) / size
    return Observations(values, eps, delta=rate, rank=r, predictor="zero", trivial=trivial)


@claim(
    "linformer.thm2_collapse",
    title="The construction of Theorem 2 gives every query the same output",
    statement="""With E = delta R, F = e^-delta R and D_i the range of the entries of
        scale R K Q_i: |Ohat_i - mean_b (F V)_b| <= 2 tanh(delta D_i/4)
        max_b |(F V)_b - mean|, which tends to 0 with delta for every i.""",
    source=DERIVED,
    status="derived",
    kind="inequality",
    observes="max over rows of |Ohat_i - mean_b (F V)_b| over its bound",
    assumptions=(*PRODUCT, REDUCED),
    recorded={"blocks": "holds", "clusters": "holds", "heads": "holds"},
)
def _thm2_collapse(context: Context, *, rank: int = 16, step: float = 1e-3) -> Observations:
    problem = problem_of(context.instance)
    values = []
    for matrix in _matrices(context, rank):
        projected = math.exp(-step) * matrix @ problem.values
        mean = projected.mean(axis=0)
        logits = problem.scale * problem.q @ (matrix @ problem.k).T
        bounds = np.asarray(perturbation_bound(step * np.ptp(logits, axis=1)))
        bounds = bounds * float(np.linalg.norm(projected - mean, axis=1).max())
        out = _weights(problem, step * matrix) @ projected
        # Weights are rounded at 1e-16: differences of that size are none.
        noise = 1e-13 * float(np.abs(projected).max())
        errors = np.maximum(np.linalg.norm(out - mean, axis=1) - noise, 0)
        values.append(float((errors / np.maximum(bounds, noise)).max()))
    return Observations(values, 1.0, rank=rank)


@claim(
    "linformer.additive",
    title="What random projection does give, for every row (in place of Theorems 1 and 2)",
    statement="""S gaussian, the unreduced Ohat = A S^T S V: with probability at least 1 - delta
        all |Ohat_i - O_i| <= eps |A_i| |V|_F once
        r >= 2 ln(2 n_q d_v/delta)/(eps - ln(1+eps)).""",
    source=DERIVED,
    status="derived",
    kind="tail",
    observes="max_i |Ohat_i - O_i|/(|A_i| |V|_F)",
    assumptions=PRODUCT,
    recorded={"clusters": "holds", "uniform-ones": "holds", "uniform-spike": "vacuous"},
)
def _additive(context: Context, *, eps: float = 0.5, delta: float = 0.05) -> Observations:
    seen = context.instance
    r = int(amm_entrywise_min_dim(seen.m, seen.v.shape[1], eps, delta))
    context.below(r, seen.n, eps, delta)
    norms = np.linalg.norm(seen.a, axis=1) * float(np.linalg.norm(seen.v))
    scale = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
    values = [
        float((np.linalg.norm(err, axis=1) * scale).max()) for err in errors(context, "gaussian", r)
    ]
    trivial = float((np.linalg.norm(seen.product, axis=1) * scale).max())
    return Observations(values, eps, delta=delta, rank=r, predictor="zero", trivial=trivial)


@claim(
    "linformer.mean_square",
    title="Mean square error of the unreduced form, without n and d",
    statement="""S gaussian: E|A S^T S V - A V|_F^2 = ((1 + rho)/r) |A|_F^2 |V|_F^2 with
        rho = |A V|_F^2/(|A|_F^2 |V|_F^2).  Hence a root mean square of eps |A|_F |V|_F if and only
        if r >= (1 + rho)/eps^2, and relative to |A V|_F one of sqrt((1 + rho)/(rho r)).""",
    source=DERIVED,
    status="derived",
    kind="equality",
    observes="|A S^T S V - A V|_F^2/(|A|_F^2 |V|_F^2); mean over draws",
    assumptions=PRODUCT,
    recorded={"reference": "vacuous", "uniform-spike": "vacuous", "uniform-ones": "vacuous"},
    ladder=RANKS,
    curve=Curve("jl", {"sketch": "gaussian"}, convert=root),
)
def _mean_square(context: Context, *, rank: int | None = None) -> Observations:
    seen = context.instance
    r = default_rank(context, rank)
    rho = amm_stats(seen.a, seen.v).rho
    values = [square(err) / seen.fro**2 for err in errors(context, "gaussian", r)]
    return Observations(
        values,
        (1 + rho) / r,
        rank=r,
        predictor=seen.predictor,
        trivial=(seen.trivial / seen.fro) ** 2,
        rounding=1e-12,
    )


@claim(
    "linformer.perturbation",
    title="How far a softmax can move",
    statement="""Logits that differ by delta_j, W = max_j delta_j - min_j delta_j:
        |softmax - softmax'|_1 <= 2 tanh(W/4).""",
    source=DERIVED,
    status="derived",
    kind="inequality",
    observes="the 1-norm over 2 tanh(W/4), rows of A against random changes of their logits",
    assumptions=(DENSE,),
    recorded={"reference": "holds", "clusters": "holds", "heads": "holds"},
)
def _perturbation(context: Context, *, size: float = 1.0) -> Observations:
    a = context.instance.a
    context.require(bool((a >= 0).all() and a.any(axis=1).all()), "needs rows that are weights")
    values = []
    for i, rng in enumerate(context.generators()):
        p = a[i % len(a)] / a[i % len(a)].sum()
        change = size * rng.standard_normal(len(p))
        other = p * np.exp(change - change.max())
        other /= other.sum()
        support = change[p > 0]
        limit = float(np.asarray(perturbation_bound(float(np.ptp(support)))))
        values.append(_over(max(float(np.abs(p - other).sum()) - 1e-13, 0.0), limit))
    return Observations(values, 1.0)


@claim(
    "linformer.pooling",
    title="Means of blocks of keys",
    statement="""E = F the mean over r blocks, logits with ln of the block sizes where these
        differ: |O_i - Ohat_i| <= 2 tanh(W_i/4) max_j |V_j - c| for every c, W_i the range over j
        of L_ij - mean of L_i over the block of j.  Exact for keys constant in blocks.""",
    source=DERIVED,
    status="derived",
    kind="inequality",
    observes="|O_i - Ohat_i| for every row i, c the centre of the box of V",
    assumptions=(*PRODUCT, REDUCED),
    recorded={"blocks": "holds", "clusters": "vacuous", "heads": "vacuous"},
)
def _pooling(context: Context, *, rank: int = 8) -> Observations:
    problem = problem_of(context.instance)
    context.require(rank <= problem.n_k, f"r = {rank} blocks of {problem.n_k} keys")
    bounds = pooling_bound(problem, rank)[1]
    out = Linformer(rank, "mean_pool").attend(problem)
    errors = np.linalg.norm(out - problem.output, axis=1)
    # The bound says something where it is below the error of the mean of V.
    mean = np.linalg.norm(problem.output - problem.values.mean(axis=0), axis=1)
    useful = int(np.count_nonzero(bounds < mean))
    return Observations(
        errors,
        bounds,
        rank=rank,
        rounding=output_rounding(context.instance),
        predictor="the exact output, and in no row below that of the mean of V",
        trivial=None if useful else 0.0,
        notes=f"the bound is below the error of the mean of V in {useful} of {len(mean)} rows",
    )


@claim(
    "linformer.constant_values",
    title="Constant values come out unchanged where rows of F sum to one",
    statement="""For V = 1 g^T: Ohat = W (F 1) g^T, so that means of blocks leave it unchanged.""",
    source=DERIVED,
    status="derived",
    kind="existence",
    observes="max_i |(Ahat 1)_i - 1| for means of blocks",
    assumptions=(*PRODUCT, REDUCED),
    recorded={"blocks": "holds", "clusters": "holds", "heads": "holds"},
)
def _constant_values(context: Context, *, rank: int = 8) -> Observations:
    problem = problem_of(context.instance)
    context.require(rank <= problem.n_k, f"r = {rank} blocks of {problem.n_k} keys")
    ahat = Linformer(rank, "mean_pool").approximate(problem)
    off = float(np.abs(ahat.row_sums() - 1).max())
    return Observations([off], 0.0, rank=rank, rounding=weight_rounding(problem))


@claim(
    "linformer.oracle",
    title="The best F for a given E",
    statement="""V of full column rank: the least |W F V - O|_F over all F is
        |(I - W W^+) O|_F, attained by F = W^+ O V^+.""",
    source=DERIVED,
    status="derived",
    kind="existence",
    observes="| |W F V - O|_F - floor |/|O|_F for F = W^+ O V^+, E gaussian",
    assumptions=(*PRODUCT, REDUCED),
    recorded={"blocks": "holds", "clusters": "holds", "heads": "holds"},
)
def _oracle(context: Context, *, rank: int = 8) -> Observations:
    seen, problem = context.instance, problem_of(context.instance)
    basis = seen.value_basis.shape[1]
    context.require(basis == seen.v.shape[1], f"V has {seen.v.shape[1]} columns of rank {basis}")
    size = float(np.linalg.norm(seen.product))
    context.require(size > 0, "needs an output that is not zero")
    inverse = np.linalg.pinv(seen.v)
    values, worst = [], 1.0
    for matrix in _matrices(context, rank):
        weights = _weights(problem, matrix)
        # One numerical rank for both sides: smaller singular values are rounding of the softmax,
        # and W^+ would blow up what it rounds.
        u, sigma, vt = np.linalg.svd(weights, full_matrices=False)
        kept = sigma > 1e-8 * sigma[0]
        left = u[:, kept].T @ seen.product
        f = vt[kept].T @ (left / sigma[kept, None]) @ inverse
        error = float(np.linalg.norm(weights @ (f @ seen.v) - seen.product))
        best = float(np.linalg.norm(seen.product - u[:, kept] @ left))
        values.append(abs(error - best) / size)
        worst = max(worst, float(sigma[0] / sigma[kept][-1]))
    # Both inverses multiply rounding by a condition number.
    rounding = 4 * max(seen.a.shape) * np.spacing(1.0) * worst * float(np.linalg.cond(seen.v))
    return Observations(values, 0.0, rank=rank, rounding=rounding)


@claim(
    "linformer.eckart_young",
    title="No reduced form beats the truncated decomposition of A",
    statement="""rank(W F) <= r, hence |A - W F|_F >= (sum_{j>r} sigma_j^2)^(1/2).  Of the output
        there is no such floor: A V V^+ has rank d_v and is exact.""",
    source="Eckart and Young, Psychometrika 1 (1936), for M = W F",
    status="derived",
    kind="inequality",
    observes="floor over |A - W F|_F, E gaussian and F = W^+ A, the best for this E",
    assumptions=(*PRODUCT, REDUCED),
    recorded={"blocks": "holds", "clusters": "holds", "heads": "holds"},
)
def _eckart_young(context: Context, *, rank: int = 4) -> Observations:
    seen, problem = context.instance, problem_of(context.instance)
    sigma = seen.svd[1]
    context.require(rank < len(sigma), f"r = {rank} of at most {len(sigma)} - 1")
    floor = float(np.asarray(eckart_young_floor(sigma, rank)))
    values = []
    for matrix in _matrices(context, rank):
        left = np.linalg.qr(_weights(problem, matrix))[0]
        error = float(np.linalg.norm(seen.a - left @ (left.T @ seen.a)))
        # Both are rounded in the size of the largest singular value.
        values.append(quotient(floor, error, ROUNDING * float(sigma[0])))
    return Observations(values, 1.0, rank=rank)
