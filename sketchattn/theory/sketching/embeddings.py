"""Johnson-Lindenstrauss: dimensions and tails, for vectors and for subspaces."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ...base.floating import without_floating_errors
from ..engine.arguments import (
    Array,
    Float,
    Int,
    ceil,
    choice,
    each,
    floats,
    log_quotient,
    real,
    smallest,
    whole,
)

# --- vectors ---------------------------------------------------------------------------------


def upper_rate(eps: Array) -> Array:
    """``eps - ln(1 + eps)``, twice the rate of the upper tail of a mean of r squares."""
    rate: Array = np.where(np.abs(eps) < _SERIES, _small_rate(eps), eps - np.log1p(eps))
    return rate


def lower_rate(eps: Array) -> Array:
    """``-eps - ln(1 - eps)`` for eps in (0, 1], twice the rate of the lower tail."""
    with np.errstate(divide="ignore"):
        rate: Array = np.where(eps < _SERIES, _small_rate(-eps), -eps - np.log1p(-eps))
    return rate


# Below this the difference of eps and its logarithm would have lost digits; the first term that
# the series leaves out is eps^6 / 4 of the first.
_SERIES = 1e-3


def _small_rate(eps: Array) -> Array:
    """Return ``eps - ln(1 + eps)`` by its series, for small eps of either sign."""
    e = np.where(np.abs(eps) < _SERIES, eps, 0.0)
    series: Array = e**2 * (1 / 2 - e * (1 / 3 - e * (1 / 4 - e * (1 / 5 - e * (1 / 6 - e / 7)))))
    return series


def _cubic_rate(eps: Array) -> Array:
    rate: Array = eps**2 / 4 - eps**3 / 6
    return rate


TAIL_FORMS = ("both", "larger", "closed")


@without_floating_errors
def jl_tail_gaussian(r: ArrayLike, eps: ArrayLike, *, form: str = "both") -> Float:
    r"""Bound ``P(| |Sx|^2 - |x|^2 | > eps |x|^2)`` for a Gaussian S and a fixed vector x.

    - "both": ``exp(-(r/2)(eps - ln(1+eps))) + exp(-(r/2)(-eps - ln(1-eps)))``;
    - "larger": ``2 exp(-(r/2)(eps - ln(1+eps)))``;
    - "closed": ``2 exp(-r (eps^2/4 - eps^3/6))``.

    Each is at least the one before.

    Parameters
    ----------
    r : int or int array
        Rows of S.
    eps : float or array
        In (0, 1], relative to the squared norm.
    form : {"both", "larger", "closed"}

    Returns
    -------
    float or ndarray
        At most 1.

    Notes
    -----
    Chernoff's bound for chi^2 with r degrees of freedom.  "closed" holds as well for independent
    symmetric entries with ``E s^2 = 1`` and ``E exp(ts) <= exp(t^2/2)``: rademacher, uniform,
    and sparse with 1 <= s <= 3.  It is machine-checked for Gaussian S in the Lean library
    NLAlib (``JL.lean``).

    Examples
    --------
    >>> round(jl_tail_gaussian(100, 0.5, form="closed"), 4)
    0.031
    >>> jl_tail_gaussian([100, 400], 0.3).round(5).tolist()
    [0.21111, 0.00055]
    """
    rows = whole(r, "r").astype(np.float64)
    e = real(eps, "eps", 0, 1, high_open=False)
    choice(form, "form", TAIL_FORMS)
    if form == "closed":
        bound = 2 * np.exp(-rows * _cubic_rate(e))
    else:
        upper, lower = np.exp(-rows / 2 * upper_rate(e)), np.exp(-rows / 2 * lower_rate(e))
        bound = 2 * upper if form == "larger" else upper + lower
    return floats(np.minimum(bound, 1.0))


@without_floating_errors
def jl_sparse_chebyshev(x: ArrayLike, s: float, eps: ArrayLike, delta: ArrayLike) -> Int:
    """Return rows that keep ``|x|^2`` to a factor 1 +- eps for a sparse sketch, by Chebyshev.

    ``r = ceil((2 + (s-3) |x|_4^4 / |x|^4) / (eps^2 delta))``.

    Parameters
    ----------
    x : array (n,)
        The vector, not zero.
    s : float
        Inverse density, at least 1.
    eps, delta : float or array
        In (0, 1): relative error of the squared norm, and probability of failure.

    Notes
    -----
    Derived from ``Var |Sx|^2 = (2 + (s-3) |x|_4^4/|x|^4) |x|^4 / r``.  For s > 3 no tail bound
    is free of the dimension: for ``x = e_1`` almost all rows miss the only entry.

    Examples
    --------
    >>> jl_sparse_chebyshev([1.0, 0.0], s=64, eps=0.5, delta=0.05)
    5040
    >>> jl_sparse_chebyshev([1.0, 1.0], s=3, eps=0.5, delta=0.05)
    160
    """
    vector = real(x, "x", -math.inf).ravel()
    top = float(np.abs(vector).max(initial=0.0))
    vector = np.ldexp(vector, -math.frexp(top)[1])  # its fourth powers neither over- nor underflow
    square = float(vector @ vector)
    if square == 0:
        raise ValueError("x must not be zero, got |x| = 0; its norm is kept by every sketch")
    inverse = float(real(s, "s", 1, low_open=False))
    e, d = real(eps, "eps", 0, 1), real(delta, "delta", 0, 1)
    spike = float(np.sum(vector**4)) / square**2
    return ceil((2 + (inverse - 3) * spike) / d / e / e)  # 0 where all draws are exact


@without_floating_errors
def jl_min_dim(N: ArrayLike, eps: ArrayLike, delta: ArrayLike, *, form: str = "closed") -> Int:
    """Return rows that keep all distances of N points to a factor 1 +- eps (squared).

    "closed": ``ceil(ln(N(N-1)/delta) / (eps^2/4 - eps^3/6))``; the forms "larger" and "both" of
    `jl_tail_gaussian` over N(N-1)/2 differences give fewer rows.

    Parameters
    ----------
    N : int or array
        Number of points, at least 2.
    eps : float or array
        In (0, 1].
    delta : float or array
        In (0, 1): the probability that some distance fails.
    form : {"closed", "larger", "both"}

    Notes
    -----
    A union bound.  "closed" holds for gaussian, rademacher, uniform, and sparse with s <= 3;
    the others for gaussian only.

    Examples
    --------
    >>> jl_min_dim(512, [0.1, 0.3, 0.5], 0.05).tolist()
    [6631, 860, 372]
    >>> jl_min_dim(512, 0.5, 0.05, form="larger"), jl_min_dim(512, 0.5, 0.05, form="both")
    (328, 313)
    """
    count = whole(N, "N", 2).astype(np.float64)
    e, d = real(eps, "eps", 0, 1, high_open=False), real(delta, "delta", 0, 1)
    choice(form, "form", TAIL_FORMS)
    twice = count * (count - 1)  # twice the number of pairs
    if form == "closed":
        return ceil(log_quotient(twice, d) / _cubic_rate(e))
    if form == "larger":
        return ceil(2 * log_quotient(twice, d) / upper_rate(e))

    def both(log: float, upper: float, lower: float) -> int | float:
        return smallest(
            lambda r: -r / 2 * upper + math.log1p(math.exp(-r / 2 * (lower - upper))) <= -log
        )

    return each(both, log_quotient(twice / 2, d), upper_rate(e), lower_rate(e))


@without_floating_errors
def jl_min_dim_dg(N: ArrayLike, eps: ArrayLike) -> Int:
    """Return the rows of Dasgupta and Gupta's lemma, which promises success only with 1/N.

    ``ceil(4 ln N / (eps^2/2 - eps^3/3))``.

    Parameters
    ----------
    N : int or array
        Number of points, at least 1.
    eps : float or array
        In (0, 1).

    Notes
    -----
    The rule of ``sklearn.random_projection.johnson_lindenstrauss_min_dim``, which truncates
    where this rounds up.  The union bound gives a probability of failure of at most 1 - 1/N, so
    that it shows existence, not that a draw succeeds; `jl_min_dim` has a delta.

    Examples
    --------
    >>> jl_min_dim_dg([512, 4096], 0.1).tolist()
    [5348, 7130]
    """
    count = whole(N, "N").astype(np.float64)
    e = real(eps, "eps", 0, 1)
    return ceil(4 * np.log(count) / (e**2 / 2 - e**3 / 3))


# See the notes of `jl_min_dim_exact_gaussian`.
_TAILS = 1e-5


@without_floating_errors
def jl_min_dim_exact_gaussian(M: ArrayLike, eps: ArrayLike, delta: ArrayLike) -> Int:
    """Return the fewest Gaussian rows for M vectors, from the exact law of ``|Sx|^2``.

    The smallest r with ``M (P(chi2_r > r(1+eps)) + P(chi2_r < r(1-eps))) <= delta``.

    Parameters
    ----------
    M : int or array
        Number of vectors; for distances of N points N(N-1)/2.
    eps : float or array
        In (0, 1].
    delta : float or array
        In (0, 1).

    Notes
    -----
    Below eps = 1e-5, where ``r (1 +- eps)`` would be rounded, both tails are taken from Temme's
    uniform expansion ``erfc(sqrt(r (+-eps - ln(1 +- eps))/2))/2``, whose error in their sum is of
    order 1/r.

    Examples
    --------
    >>> jl_min_dim_exact_gaussian(512 * 511 // 2, 0.5, 0.05)
    256
    """
    from scipy.special import erfc
    from scipy.stats import chi2

    count = whole(M, "M").astype(np.float64)
    e, d = real(eps, "eps", 0, 1, high_open=False), real(delta, "delta", 0, 1)
    if (d / count < 1e-300).any():
        raise ValueError(
            f"delta must be at least 1e-300 M, where the law has digits, got {d.min():g} for "
            f"{count.max():g} vectors; use jl_min_dim"
        )

    def tails(r: int, eps: float) -> float:
        if eps >= _TAILS:
            return float(chi2.sf(r * (1 + eps), r) + chi2.cdf(r * (1 - eps), r))
        rates = float(upper_rate(np.array(eps))), float(lower_rate(np.array(eps)))
        return float(sum(erfc(math.sqrt(r / 2 * rate)) for rate in rates)) / 2

    def one(vectors: float, eps: float, delta: float) -> int | float:
        return smallest(lambda r: vectors * tails(r, eps) <= delta)

    return each(one, count, e, d)


@without_floating_errors
def jl_min_dim_achlioptas(N: ArrayLike, eps: ArrayLike, beta: ArrayLike = 1.0) -> Int:
    """Return the rows of Achlioptas' theorem: all distances kept with probability 1 - N^-beta.

    ``ceil((4 + 2 beta) ln N / (eps^2/2 - eps^3/3))``.

    Parameters
    ----------
    N : int or array
        Number of points, at least 1.
    eps : float or array
        In (0, 1).
    beta : float or array
        Positive.

    Notes
    -----
    Achlioptas, Database-friendly random projections, JCSS 66 (2003), Theorem 1.1; for gaussian,
    rademacher, uniform, and sparse with s <= 3.

    Examples
    --------
    >>> jl_min_dim_achlioptas(512, 0.5), jl_min_dim_achlioptas(4096, 0.3)
    (450, 1387)
    """
    count = whole(N, "N").astype(np.float64)
    e, power = real(eps, "eps", 0, 1), real(beta, "beta", 0)
    return ceil((4 + 2 * power) * np.log(count) / (e**2 / 2 - e**3 / 3))


@without_floating_errors
def jl_min_dim_chebyshev(eps: ArrayLike, delta: ArrayLike) -> Int:
    """Return rows that keep the norm of one vector, by Chebyshev: ``ceil(2/(eps^2 delta))``.

    Parameters
    ----------
    eps : float or array
        Positive.
    delta : float or array
        In (0, 1).

    Notes
    -----
    For every kind with ``Var |Sx|^2 <= 2 |x|^4 / r``: countsketch, sjlt, osnap, srht, haar, and
    the kinds of `jl_tail_gaussian`.

    Examples
    --------
    >>> jl_min_dim_chebyshev(0.5, 0.05)
    160
    """
    e, d = real(eps, "eps", 0), real(delta, "delta", 0, 1)
    return ceil(2 / (e**2 * d))


@without_floating_errors
def inner_product_tail(r: ArrayLike, eps: ArrayLike) -> Float:
    """Bound ``P(|<Sx, Sy> - <x, y>| > eps |x| |y|)`` for a Gaussian S.

    ``2 exp(-(r/2)(eps - ln(1+eps)))`` for any eps > 0.

    Parameters
    ----------
    r : int or array
    eps : float or array
        Positive; ADDITIVE, relative to ``|x| |y|``.  No bound relative to ``|<x, y>|`` exists.

    Notes
    -----
    Derived: with ``c = cos(x, y)`` the moment generating function of the product of two
    correlated normal numbers is ``(1 - 2 l c - l^2 (1 - c^2))^(-1/2)``; centred, it is largest
    at c = 1, where it is that of a squared normal number.

    Examples
    --------
    >>> round(inner_product_tail(100, 0.5), 5)
    0.01771
    """
    rows, e = whole(r, "r").astype(np.float64), real(eps, "eps", 0)
    return floats(np.minimum(2 * np.exp(-rows / 2 * upper_rate(e)), 1.0))


@without_floating_errors
def inner_product_min_dim(pairs: ArrayLike, eps: ArrayLike, delta: ArrayLike) -> Int:
    """Return Gaussian rows that keep some inner products to ``eps |x| |y|``.

    ``ceil(2 ln(2 pairs / delta) / (eps - ln(1+eps)))``.

    Parameters
    ----------
    pairs : int or array
        How many pairs (x, y).
    eps : float or array
        Positive, additive.
    delta : float or array
        In (0, 1): the probability that some pair fails.

    Examples
    --------
    >>> inner_product_min_dim([1, 512, 32768], 0.5, 0.05).tolist()
    [79, 211, 299]
    """
    count = whole(pairs, "pairs").astype(np.float64)
    e, d = real(eps, "eps", 0), real(delta, "delta", 0, 1)
    return pairs_min_dim(count, e, d)


def pairs_min_dim(pairs: Array, eps: Array, delta: Array) -> Int:
    """Return `inner_product_min_dim` of checked arguments; there may be more pairs than 2^63."""
    return ceil(2 * log_quotient(2 * pairs, delta) / upper_rate(eps))


# --- subspace embeddings: | U^T S^T S U - I |_2 <= eps, U (n, q) orthonormal ---------------


@without_floating_errors
def ose_gaussian(q: ArrayLike, eps: ArrayLike, delta: ArrayLike, *, sharp: bool = True) -> Int:
    """Return Gaussian rows that embed a q-dimensional subspace.

    Sharp: ``ceil((sqrt(q) + sqrt(2 ln(2/delta)))^2 / (sqrt(1+eps) - 1)^2)``; otherwise
    ``ceil(18 (q + 2 ln(2/delta)) / eps^2)``.

    Parameters
    ----------
    q : int or array
        Dimension of the subspace.
    eps : float or array
        In (0, 1].
    delta : float or array
        In (0, 1).
    sharp : bool, default True

    Notes
    -----
    From ``sigma_max <= sqrt(r) + sqrt(q) + t`` and ``sigma_min >= sqrt(r) - sqrt(q) - t``, each
    failing with at most ``exp(-t^2/2)``.  The other form is NLAlib's ``GaussianEmbedding`` and
    follows from ``(x+y)^2 <= 2x^2 + 2y^2`` and ``sqrt(1+eps) - 1 >= eps/3``.

    Examples
    --------
    >>> ose_gaussian([5, 16, 64], 0.5, 0.05).tolist()
    [486, 894, 2274]
    >>> ose_gaussian(5, 0.5, 0.05, sharp=False)
    892
    """
    size = whole(q, "q").astype(np.float64)
    e, d = real(eps, "eps", 0, 1, high_open=False), real(delta, "delta", 0, 1)
    log = 2 * log_quotient(2, d)
    if sharp:  # sqrt(1 + eps) - 1 without cancellation
        return ceil((np.sqrt(size) + np.sqrt(log)) ** 2 / (e / (np.sqrt(1 + e) + 1)) ** 2)
    return ceil(18 * (size + log) / e**2)


@without_floating_errors
def ose_gaussian_sv(q: ArrayLike, eps: ArrayLike, delta: ArrayLike) -> Int:
    """Return Gaussian rows that put the singular values of S U into [1-eps, 1+eps].

    ``ceil((sqrt(q) + sqrt(2 ln(2/delta)))^2 / eps^2)``.

    Parameters
    ----------
    q : int or array
    eps : float or array
        In (0, 1), about norms, not their squares.
    delta : float or array
        In (0, 1).

    Examples
    --------
    >>> ose_gaussian_sv(5, 0.5, 0.05)
    99
    """
    size = whole(q, "q").astype(np.float64)
    e, d = real(eps, "eps", 0, 1), real(delta, "delta", 0, 1)
    return ceil((np.sqrt(size) + np.sqrt(2 * log_quotient(2, d))) ** 2 / e**2)


@without_floating_errors
def ose_countsketch(
    q: ArrayLike, eps: ArrayLike, delta: ArrayLike, *, leverage_squares: ArrayLike = 0.0
) -> Int:
    """Return rows that embed a q-dimensional subspace, by Markov on the second moment.

    ``ceil((q^2 + q - 2 sum_j l_j^2) / (delta eps^2))``; without the leverage scores l_j of the
    subspace ``ceil((q^2 + q) / (delta eps^2))``.

    Parameters
    ----------
    q : int or array
    eps : float or array
        Positive.
    delta : float or array
        In (0, 1).
    leverage_squares : float or array, default 0
        ``sum_j l_j^2`` of the subspace, at most q; not for gaussian.

    Notes
    -----
    `amm_expected_sqerr` with ``A = U^T``, ``V = U``: a = q^2, b = q, c = sum_j l_j^2.  For
    countsketch, sjlt, osnap, rademacher and srht, and without the refinement for gaussian;
    published for countsketch (NLAlib, ``CountSketchTail``).

    Examples
    --------
    >>> ose_countsketch([5, 16, 64], 0.5, 0.05).tolist()
    [2400, 21760, 332800]
    """
    size = whole(q, "q").astype(np.float64)
    e, d = real(eps, "eps", 0), real(delta, "delta", 0, 1)
    squares = real(
        leverage_squares,
        "leverage_squares",
        0,
        float(size.max()) + 1e-9,
        low_open=False,
        high_open=False,
    )
    return ceil((size**2 + size - 2 * squares) / d / e / e)  # 0 where all draws are exact


@without_floating_errors
def ose_srht(
    n: ArrayLike, q: ArrayLike, eps: ArrayLike, delta: ArrayLike, *, cap: bool = True
) -> Int:
    """Return rows of a subsampled randomized Hadamard transform that embed a subspace.

    ``Lam = (sqrt(q) + sqrt(8 ln(2n/delta)))^2``, ``r = ceil((3 Lam / eps^2) ln(4q/delta))``,
    and n where that is less: all rows are exact.

    Parameters
    ----------
    n : int or array
        Length of the vectors, a power of two (or padded to one).
    q : int or array
    eps : float or array
        In (0, 1].
    delta : float or array
        In (0, 1).
    cap : bool, default True
        Return at most n.

    Notes
    -----
    Rows without replacement; NLAlib, ``SRHT``.

    Examples
    --------
    >>> ose_srht(4096, [5, 16, 64], 0.5, 0.05, cap=False).tolist()
    [10417, 16352, 32476]
    >>> ose_srht(4096, 5, 0.5, 0.05)
    4096
    """
    length, size = whole(n, "n").astype(np.float64), whole(q, "q").astype(np.float64)
    e, d = real(eps, "eps", 0, 1, high_open=False), real(delta, "delta", 0, 1)
    spread = (np.sqrt(size) + np.sqrt(8 * log_quotient(2 * length, d))) ** 2
    rows = 3 * spread / e**2 * log_quotient(4 * size, d)
    return ceil(np.minimum(rows, length) if cap else rows)


@without_floating_errors
def ose_leverage(q: ArrayLike, beta: ArrayLike, eps: ArrayLike, delta: ArrayLike) -> Int:
    """Return rows drawn with replacement by ``p_j >= beta l_j / q`` that embed a subspace.

    ``ceil((3q/(beta eps^2)) ln(2q/delta))``; the failure is ``2q exp(-beta r eps^2/(3q))``.

    Parameters
    ----------
    q : int or array
    beta : float or array
        In (0, 1]: how well the law follows the leverage scores l_j.
    eps : float or array
        In (0, 1].
    delta : float or array
        In (0, 1).

    Notes
    -----
    Matrix Chernoff with summands of norm at most q/(beta r); NLAlib.

    Examples
    --------
    >>> ose_leverage([5, 16, 64], 1.0, 0.5, 0.05).tolist()
    [318, 1241, 6028]
    """
    size = whole(q, "q").astype(np.float64)
    quality = real(beta, "beta", 0, 1, high_open=False)
    e, d = real(eps, "eps", 0, 1, high_open=False), real(delta, "delta", 0, 1)
    return ceil(3 * size / (quality * e**2) * log_quotient(2 * size, d))


@without_floating_errors
def ose_uniform(
    n: ArrayLike, maxlev: ArrayLike, q: ArrayLike, eps: ArrayLike, delta: ArrayLike
) -> Int:
    """Return rows drawn uniformly with replacement that embed a subspace.

    ``ceil(3 n max_j l_j ln(2q/delta) / eps^2)``: `ose_leverage` with
    ``beta = q/(n max_j l_j)``.

    Parameters
    ----------
    n : int or array
    maxlev : float or array
        The largest leverage score, in [q/n, 1].
    q : int or array
    eps : float or array
        In (0, 1].
    delta : float or array
        In (0, 1).

    Examples
    --------
    >>> ose_uniform(512, 5 / 512, 5, 0.5, 0.05) == ose_leverage(5, 1.0, 0.5, 0.05)
    True
    """
    length, size = whole(n, "n").astype(np.float64), whole(q, "q").astype(np.float64)
    top = real(maxlev, "maxlev", 0, 1 + 1e-9)
    if (top * length < size * (1 - 1e-9)).any():
        raise ValueError(
            f"maxlev must be at least q/n, the mean of the scores, got {float(top.min()):g}; "
            f"pass the largest leverage score"
        )
    return ose_leverage(whole(q, "q"), np.minimum(size / (length * top), 1.0), eps, delta)


class SparseEmbedding(NamedTuple):
    """Hold the size of a sparse embedding: nonzeros a column, and rows."""

    s: Int
    r: Int


@without_floating_errors
def ose_sjlt(q: ArrayLike, eps: ArrayLike, delta: ArrayLike) -> SparseEmbedding:
    """Return nonzeros a column and rows with which a sparse embedding is machine-checked.

    ``Q = max(1, ceil(log2(q/delta)))``, ``s = ceil(1356 Q/eps)``,
    ``r = ceil(306456 (q + Q)/eps^2)``: constants for theory only.

    Parameters
    ----------
    q : int or array
    eps : float or array
        In (0, 1].
    delta : float or array
        In (0, 1).

    Notes
    -----
    NLAlib, ``SparseEmbedding``.  The orders are r = O(q log(q/delta)/eps^2) and
    s = O(log(q/delta)/eps) (Cohen, SODA 2016).

    Examples
    --------
    >>> ose_sjlt(5, 0.5, 0.05)
    SparseEmbedding(s=18984, r=14709888)
    """
    size = whole(q, "q").astype(np.float64)
    e, d = real(eps, "eps", 0, 1, high_open=False), real(delta, "delta", 0, 1)
    log = np.maximum(1.0, np.ceil(np.log2(size) - np.log2(d)))
    return SparseEmbedding(ceil(1356 * log / e), ceil(306456 * (size + log) / e**2))
