"""Linformer: its two theorems as published, what refutes them, and what is true instead.

Two estimators must not be confused.  The *unreduced* ``A S^T S V`` is what random projections say
something about; the *reduced* ``rowsoftmax(L E^T) F V`` is what Linformer computes.  E and F are
(r, n) throughout; tails refer to a fixed matrix and a random projection.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ..draws import Rng, as_generator
from ..methods.linformer import Linformer, ReducedAttention, pool_starts
from ..methods.linformer import OracleFloor as OracleFloor
from ..methods.linformer import oracle_floor as oracle_floor
from ..perturbation import tv_bound
from ..problem import AttentionProblem
from ._arguments import Array, Float, Int, ceil, floats, matrix_of, real, whole
from ._engine import Assumption, Context, Observations, claim
from ._instances import Instance, instance
from ._lowrank import eckart_young_floor as eckart_young_floor
from ._moments import amm_stats
from ._observe import DENSE, PRODUCT, RANKS, default_rank, errors, sketched, square
from ._products import amm_entrywise_min_dim

PAPER = "Wang, Li, Khabsa, Fang and Ma, arXiv 2006.04768v3"
DERIVED = "derived: see the chapter on Linformer"
EPS = tuple({"eps": e} for e in (0.66, 0.5, 0.4, 0.3))

# --- the formulas -----------------------------------------------------------------------------


def _rate(eps: Array) -> Array:
    rate: Array = (eps**2 - eps**3) / 4
    return rate


def linformer_thm1_k(n: ArrayLike, eps: ArrayLike) -> Int:
    """Return the rank of Theorem 1: ``ceil(5 ln n/(eps^2 - eps^3))``.

    Parameters
    ----------
    n : int or array
        Length, at least 2.
    eps : float or array
        In (0, 1).

    Notes
    -----
    Wang et al. (2020), proof of Theorem 1.  The theorem is refuted; the number is what it asks.

    Examples
    --------
    >>> linformer_thm1_k([512, 4096], 0.5).tolist(), linformer_thm1_k(512, 0.1)
    ([250, 333], 3466)
    """
    length, e = whole(n, "n", 2).astype(np.float64), real(eps, "eps", 0, 1)
    return ceil(5 * np.log(length) / (e**2 - e**3))


def linformer_thm1_failure(n: ArrayLike, eps: ArrayLike, r: ArrayLike) -> Float:
    """Return the rate of failure that Theorem 1 claims: ``2 n exp(-(eps^2 - eps^3) r/4)``.

    Parameters
    ----------
    n : int or array
    eps : float or array
        In (0, 1).
    r : int or array

    Returns
    -------
    float or ndarray
        Not cut off at 1; ``2 n^(-1/4)`` at the rank of the theorem.

    Examples
    --------
    >>> round(linformer_thm1_failure(512, 0.5, 250), 4)
    0.4144
    """
    length, e = whole(n, "n", 1).astype(np.float64), real(eps, "eps", 0, 1)
    rows = whole(r, "r").astype(np.float64)
    return floats(2 * length * np.exp(-_rate(e) * rows))


def linformer_thm2_k(n: ArrayLike, d: ArrayLike, eps: ArrayLike) -> Int:
    """Return ``ceil(min(9 d ln d, 5 ln n)/eps^2)``, Theorem 2 with its Theta taken as 1.

    Parameters
    ----------
    n : int or array
        At least 2.
    d : int or array
        Head width, at least 2: for 1 the formula gives no rank.
    eps : float or array
        In (0, 1).

    Notes
    -----
    A heuristic of the paper, whose constants are inside a Theta.

    Examples
    --------
    >>> linformer_thm2_k([512, 4096], 64, 0.5).tolist()
    [125, 167]
    """
    length, width = whole(n, "n", 2).astype(np.float64), whole(d, "d", 2).astype(np.float64)
    e = real(eps, "eps", 0, 1)
    return ceil(np.minimum(9 * width * np.log(width), 5 * np.log(length)) / e**2)


def perturbation_bound(width: ArrayLike) -> Float:
    """Return ``2 tanh(width/4)``, the most that a softmax can move in the 1-norm.

    Parameters
    ----------
    width : float or array
        ``max_j delta_j - min_j delta_j`` of the change of the logits, at least 0.

    Notes
    -----
    The ratio of the two distributions lies in an interval ``[x, x e^W]``; the total variation is
    at most ``(e^(W/2) - 1)/(e^(W/2) + 1)``.  Attained by two outcomes with probability
    ``1/(1 + e^(W/2))``.

    Examples
    --------
    >>> round(perturbation_bound(1.0), 6)
    0.489837
    """
    return floats(2 * np.asarray(tv_bound(real(width, "width", 0, low_open=False) / 2)))


def pooling_bound(problem: AttentionProblem, rank: int) -> tuple[Array, Array]:
    """Bound the error of every row of mean-pooled Linformer, before computing it.

    ``|A_i - Ahat_i|_1 <= 2 tanh(W_i/4)`` with ``W_i`` the range over j of
    ``L_ij - mean of L_i over the block of j``, and ``|O_i - Ohat_i|`` at most this times
    ``max_j |V_j - c|``, c the centre of the box of the values.

    Parameters
    ----------
    problem : AttentionProblem
        Not causal and not masked.
    rank : int
        Number of blocks.

    Returns
    -------
    matrix : ndarray (n_q,)
        Bounds of the 1-norm of rows.
    output : ndarray (n_q,)
        Bounds of the Euclidean norm of rows of the output; NaN without values.

    Notes
    -----
    The only guarantee of a reduced form in the library.  Derived.

    Examples
    --------
    >>> import sketchattn as sa
    >>> problem = sa.AttentionProblem(np.eye(2), np.ones((4, 2)), np.eye(4))
    >>> pooling_bound(problem, 2)[0].tolist()
    [0.0, 0.0]
    """
    if problem.causal or problem.key_mask is not None:
        raise ValueError(f"problem must be neither causal nor masked, got {problem!r}; delete keys")
    wide = problem.astype(np.float64)
    starts = pool_starts(wide.n_k, rank)
    counts = np.diff(starts)
    means = np.add.reduceat(wide.k, starts[:-1], axis=0) / counts[:, None]
    logits = wide.scale * wide.q @ (wide.k - np.repeat(means, counts, axis=0)).T
    rows = np.asarray(perturbation_bound(np.ptp(logits, axis=1)))
    if wide.v is None:
        return rows, np.full(len(rows), np.nan)
    centre = (wide.v.min(axis=0) + wide.v.max(axis=0)) / 2
    return rows, rows * float(np.linalg.norm(wide.v - centre, axis=1).max())


def linformer_thm2_construction(
    problem: AttentionProblem, r: int, delta_mode: str | float = "1/n", rng: Rng = None
) -> ReducedAttention:
    """Return the approximation in the proof of Theorem 2: ``E = delta R``, ``F = e^-delta R``.

    Parameters
    ----------
    problem : AttentionProblem
    r : int
        Rows of R, whose entries are independent N(0, 1/r).
    delta_mode : {"1/n", "2^-n"} or float
        The paper has "a small constant", 1/2^n and Theta(1/n).
    rng : None, int or numpy.random.Generator

    Examples
    --------
    >>> import sketchattn as sa
    >>> problem = sa.make_heads("gaussian", n=16, d=4, rng=0)[0]
    >>> linformer_thm2_construction(problem, 8, rng=0).shape
    (16, 16)
    """
    n = problem.n_k
    delta = _delta(delta_mode, n)
    matrix = as_generator(rng).standard_normal((r, n)) / math.sqrt(r)
    method = Linformer(r, "given", E=delta * matrix, F=math.exp(-delta) * matrix)
    ahat = method.approximate(problem)
    if not isinstance(ahat, ReducedAttention):
        raise ValueError(f"problem must have a key that is not masked, got {problem!r}; unmask one")
    return ahat


def _delta(mode: str | float, n: int) -> float:
    if isinstance(mode, str):
        if mode not in ("1/n", "2^-n"):
            raise ValueError(f"delta_mode must be '1/n', '2^-n' or a number, got {mode!r}")
        return 1 / n if mode == "1/n" else math.ldexp(1.0, -min(n, 1000))
    return float(real(mode, "delta_mode", 0))


class Spectrum(NamedTuple):
    """Hold singular values and both cumulative curves of them.

    Attributes
    ----------
    sigma : ndarray
        Descending.
    values : ndarray
        ``sum_{j<=r} sigma_j / sum_j sigma_j``, what the paper draws.
    energy : ndarray
        ``sum_{j<=r} sigma_j^2 / sum_j sigma_j^2``, what errors in the Frobenius norm follow.
    """

    sigma: Array
    values: Array
    energy: Array


def spectrum(A: object) -> Spectrum:  # noqa: N803  (the letter of the spec)
    """Return the singular values of a matrix with both cumulative curves.

    Parameters
    ----------
    A : array (m, n)
        Not zero.

    Examples
    --------
    >>> spectrum(np.diag([3.0, 1.0])).energy.tolist()
    [0.9, 1.0]
    """
    sigma = np.linalg.svd(matrix_of(A, "A"), compute_uv=False)
    if not sigma.any():
        raise ValueError("A must not be zero, got a matrix of zeros; its curves are undefined")
    square = sigma**2
    return Spectrum(sigma, np.cumsum(sigma) / sigma.sum(), np.cumsum(square) / square.sum())


class RegimeFlags(NamedTuple):
    """Hold numbers that tell whether fast attention can be accurate on a problem.

    Attributes
    ----------
    hardness : float
        ``B/sqrt(ln n)`` with ``B = sqrt(|scale| d) max(|Q|, |K|)``, entrywise maxima.
    hard : bool
        Whether it is at least 1, where sub-quadratic time is not to be had in general (under the
        strong exponential time hypothesis, for d = O(log n)).
    stable_rank : float
        ``|A|_F^2/|A|_2^2``.
    rho : float
        ``|A V|_F^2/(|A|_F^2 |V|_F^2)``; NaN without values.
    """

    hardness: float
    hard: bool
    stable_rank: float
    rho: float


def regime_flags(problem: AttentionProblem) -> RegimeFlags:
    """Return the regime of a problem.

    Parameters
    ----------
    problem : AttentionProblem
        With at least two keys that are not masked.

    Notes
    -----
    Alman and Song, arXiv 2302.13214 (scale 1/d there; for a general scale derived).

    Examples
    --------
    >>> import sketchattn as sa
    >>> regime_flags(sa.make_heads("gaussian", n=64, d=8, rng=0)[0]).hard
    True
    """
    seen = Instance("problem", problem)
    if seen.n < 2 or seen.m < 1:
        raise ValueError(f"problem must have a query and two keys, got {problem!r}; add some")
    keys = problem.k[problem.kept_keys]
    largest = max(float(np.abs(problem.q).max()), float(np.abs(keys).max()))
    hardness = math.sqrt(abs(problem.scale) * problem.d) * largest / math.sqrt(math.log(seen.n))
    sigma = seen.svd[1]
    rho = amm_stats(seen.a, seen.v).rho if seen.has_values else math.nan
    return RegimeFlags(hardness, hardness >= 1, float(np.sum(sigma**2) / sigma[0] ** 2), rho)


class Gap(NamedTuple):
    """Hold relative output errors ``|Ohat - O|_F/|O|_F`` of forms with one Gaussian projection.

    Attributes
    ----------
    unreduced : float
        Of ``A S^T S V``.
    predicted : float
        Its root mean square, ``sqrt((1 + rho)/(rho r))``.
    reduced : float
        Of ``rowsoftmax(L S^T) S V``.
    oracle : float
        Of the same E with the best F.
    mean : float
        Of the mean of V, the predictor to beat.
    """

    unreduced: float
    predicted: float
    reduced: float
    oracle: float
    mean: float


def unreduced_vs_reduced_gap(problem: AttentionProblem, r: int, rng: Rng = None) -> Gap:
    """Compare what the theory is about with what Linformer computes, for one Gaussian projection.

    Parameters
    ----------
    problem : AttentionProblem
        With values, not causal and not masked.
    r : int
    rng : None, int or numpy.random.Generator

    Examples
    --------
    >>> import sketchattn as sa
    >>> gap = unreduced_vs_reduced_gap(sa.make_heads("gaussian", n=64, d=8, rng=0)[0], 16, rng=0)
    >>> gap.oracle < gap.reduced
    True
    """
    wide = problem.astype(np.float64)
    n = wide.n_k
    s = as_generator(rng).standard_normal((r, n)) / math.sqrt(r)
    ahat = Linformer(r, "given", E=s).approximate(wide)
    seen = Instance("problem", wide)
    size = float(np.linalg.norm(seen.product))
    if size == 0 or not isinstance(ahat, ReducedAttention):
        raise ValueError("problem must have an output that is not zero, got zeros; change V")
    rho = amm_stats(seen.a, seen.v).rho

    def relative(out: Array) -> float:
        return float(np.linalg.norm(out - seen.product)) / size

    return Gap(
        relative(seen.a @ s.T @ (s @ seen.v)),
        math.sqrt((1 + rho) / (rho * r)),
        relative(ahat @ seen.v),
        oracle_floor(ahat.weights, seen.product).relative,
        relative(np.broadcast_to(seen.v.mean(axis=0), seen.product.shape)),
    )


def constant_value_invariance(F: ArrayLike) -> float:  # noqa: N803  (the letter of the paper)
    """Return ``max_b |(F 1)_b - 1|``: 0 if and only if constant values come out unchanged.

    Parameters
    ----------
    F : array (r, n)

    Notes
    -----
    For ``V = 1 g^T`` the output is ``W (F 1) g^T``.

    Examples
    --------
    >>> constant_value_invariance(np.full((2, 4), 0.25)), constant_value_invariance(np.eye(2))
    (0.0, 0.0)
    """
    return float(np.abs(matrix_of(F, "F").sum(axis=1) - 1).max())


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


def _unmasked(context: Context) -> AttentionProblem:
    """Return the problem in float64 without its masked keys."""
    problem = context.instance.problem
    assert problem is not None  # an assumption of every claim that asks

    def make() -> AttentionProblem:
        kept = problem.kept_keys
        q, k, v = (np.asarray(x, np.float64) for x in (problem.q, problem.k, problem.values))
        return AttentionProblem(q, k[kept], v[kept], scale=problem.scale)

    return context.instance.cached("unmasked", make)


def _weights(problem: AttentionProblem, e: Array, row: slice = slice(None)) -> Array:
    """Return ``rowsoftmax(scale Q (E K)^T)``."""
    logits = problem.scale * problem.q[row] @ (e @ problem.k).T
    weights: Array = np.exp(logits - logits.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    return weights


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
    delta = 2 * math.exp(-float(_rate(real(eps, "eps", 0, 1))) * rank)
    return Observations(
        values, eps, delta=delta, rank=rank, trivial=None if relative else abs(exact) / size
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
    seen, problem = context.instance, _unmasked(context)
    context.require(seen.n >= 2, "needs two keys")
    small = _delta(delta_mode, seen.n)
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
    return Observations(values, eps, delta=rate, rank=r, trivial=trivial)


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
    problem = _unmasked(context)
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
    return Observations(values, eps, delta=delta, rank=r, trivial=trivial)


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
)
def _mean_square(context: Context, *, rank: int | None = None) -> Observations:
    seen = context.instance
    r = default_rank(context, rank)
    rho = amm_stats(seen.a, seen.v).rho
    values = [square(err) / seen.fro**2 for err in errors(context, "gaussian", r)]
    return Observations(
        values, (1 + rho) / r, rank=r, trivial=(seen.trivial / seen.fro) ** 2, rounding=1e-12
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
    problem = _unmasked(context)
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
        rounding=1e-12 * float(np.abs(problem.values).max()),
        trivial=None if useful else 0.0,
        notes=f"the bound is below the error of the mean of V in {useful} of {len(mean)} rows",
    )


@claim(
    "linformer.constant_values",
    title="Constant values come out unchanged if and only if rows of F sum to one",
    statement="""For V = 1 g^T: Ohat = W (F 1) g^T, so that means of blocks leave it unchanged.""",
    source=DERIVED,
    status="derived",
    kind="existence",
    observes="max_i |(Ahat 1)_i - 1| for means of blocks",
    assumptions=(*PRODUCT, REDUCED),
    recorded={"blocks": "holds", "clusters": "holds", "heads": "holds"},
)
def _constant_values(context: Context, *, rank: int = 8) -> Observations:
    problem = _unmasked(context)
    context.require(rank <= problem.n_k, f"r = {rank} blocks of {problem.n_k} keys")
    ahat = Linformer(rank, "mean_pool").approximate(problem)
    return Observations([float(np.abs(ahat.row_sums() - 1).max())], 0.0, rank=rank, rounding=1e-12)


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
    seen, problem = context.instance, _unmasked(context)
    basis = seen.value_basis.shape[1]
    context.require(basis == seen.v.shape[1], f"V has {seen.v.shape[1]} columns of rank {basis}")
    size = float(np.linalg.norm(seen.product))
    context.require(size > 0, "needs an output that is not zero")
    inverse = np.linalg.pinv(seen.v)
    values = []
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
    return Observations(values, 0.0, rank=rank, rounding=1e-6)


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
    seen, problem = context.instance, _unmasked(context)
    sigma = seen.svd[1]
    context.require(rank < len(sigma), f"r = {rank} of at most {len(sigma)} - 1")
    floor = float(np.asarray(eckart_young_floor(sigma, rank)))
    values = []
    for matrix in _matrices(context, rank):
        left = np.linalg.qr(_weights(problem, matrix))[0]
        error = float(np.linalg.norm(seen.a - left @ (left.T @ seen.a)))
        # A floor of this size is the rounding of an error of zero.
        values.append(floor / error if floor > 1e-7 * float(sigma[0]) else 0.0)
    return Observations(values, 1.0, rank=rank, rounding=1e-6)
