"""Bounds of the error of approximate matrix multiplication."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ...base.floating import without_floating_errors
from ..engine.arguments import (
    Array,
    Float,
    Int,
    ceil,
    floats,
    log_quotient,
    product_of,
    real,
    whole,
)
from .embeddings import pairs_min_dim
from .moments import amm_expected_sqerr, amm_stats


@without_floating_errors
def amm_fro_markov(
    kind: str, A: object, V: object, r: ArrayLike, eps: ArrayLike, **parameters: Any
) -> Float:
    """Bound ``P(|A S^T S V - A V|_F > eps |A|_F |V|_F)`` by ``M/(eps^2 a)``.

    Parameters
    ----------
    kind : str
        As for `amm_expected_sqerr`, which gives M.
    A : array (m, n)
    V : array (n, d_v)
    r : int or array
    eps : float or array
        Positive.
    **parameters
        Those of the kind.

    Returns
    -------
    float or ndarray
        At most 1; 0 for a zero factor.

    Examples
    --------
    >>> round(amm_fro_markov("gaussian", [[1.0, 0.0]], [[0.0], [1.0]], 100, 0.5), 12)
    0.04
    """
    e = real(eps, "eps", 0)
    a = amm_stats(A, V).a
    moment = np.asarray(amm_expected_sqerr(kind, A, V, r, **parameters))
    if a == 0:
        return floats(np.zeros(np.broadcast_shapes(moment.shape, e.shape)))
    return floats(np.minimum(moment / (e**2 * a), 1.0))


@without_floating_errors
def amm_fro_sampling_tail(
    beta: ArrayLike, r: ArrayLike, delta: ArrayLike, *, sharp: bool = False
) -> Float:
    """Return the factor of the Frobenius error of columns drawn with replacement.

    With probability at least 1 - delta ``|A S^T S V - A V|_F <= factor X`` for probabilities
    ``p_j >= beta |A_:j| |V_j| / T``, ``T = sum_j |A_:j| |V_j|``:

    - published: ``factor = (1 + sqrt((8/beta) ln(1/delta))) / sqrt(beta r)``, ``X = |A|_F |V|_F``;
    - sharp: ``factor = (1 + sqrt((2/beta) ln(1/delta))) / sqrt(beta r)``, ``X = T``, which is less.

    Parameters
    ----------
    beta : float or array
        In (0, 1].
    r : int or array
    delta : float or array
        In (0, 1).
    sharp : bool, default False

    Notes
    -----
    Drineas, Kannan and Mahoney, SIAM J. Comput. 36 (2006), as quoted in arXiv 2112.05359,
    Proposition 1.  The sharp form is derived from McDiarmid's inequality with differences
    bounded by 2T/(beta r).  Neither covers sampling without replacement.

    Examples
    --------
    >>> round(amm_fro_sampling_tail(1.0, 1, 0.1), 4)
    5.2919
    >>> round(amm_fro_sampling_tail(1.0, 1, 0.1, sharp=True), 4)
    3.146
    """
    quality = real(beta, "beta", 0, 1, high_open=False)
    rows, d = whole(r, "r").astype(np.float64), real(delta, "delta", 0, 1)
    eta = 1 + np.sqrt((2 if sharp else 8) / quality * log_quotient(1, d))
    return floats(eta / np.sqrt(quality * rows))


@without_floating_errors
def amm_entrywise_min_dim(m: ArrayLike, d_v: ArrayLike, eps: ArrayLike, delta: ArrayLike) -> Int:
    """Return Gaussian rows with which all entries of A V are kept to ``eps |A_i| |V_:j|``.

    ``ceil(2 ln(2 m d_v / delta) / (eps - ln(1+eps)))``: `inner_product_min_dim` for the m d_v
    pairs of a row of A and a column of V.

    Parameters
    ----------
    m, d_v : int or array
        Rows of A and columns of V.
    eps : float or array
        Positive, additive.
    delta : float or array
        In (0, 1): the probability that some entry fails.

    Notes
    -----
    It follows that rows are kept to ``eps |A_i| |V|_F`` and the product to
    ``eps |A|_F |V|_F``.

    Examples
    --------
    >>> amm_entrywise_min_dim(512, 64, 0.5, 0.05), amm_entrywise_min_dim(512, 64, 0.1, 0.05)
    (299, 6008)
    """
    pairs = whole(m, "m").astype(np.float64) * whole(d_v, "d_v")
    return pairs_min_dim(pairs, real(eps, "eps", 0), real(delta, "delta", 0, 1))


@without_floating_errors
def amm_gaussian_tail(A: object, V: object, r: int, delta: float) -> Array:
    """Return bounds of the error of every column of A V for a Gaussian sketch.

    With probability at least 1 - delta, for every column w of V at once (each with
    ``delta' = delta/d_v``):
    ``|err| <= t |A w| + sqrt((1+t)/r) |w| (|A|_F + |A|_2 sqrt(2 ln(2/delta')))``, where t solves
    ``2 exp(-(r/2)(t - ln(1+t))) = delta'/2``.  No dimension appears.

    Parameters
    ----------
    A : array (m, n)
    V : array (n, d_v)
    r : int
    delta : float
        In (0, 1).

    Returns
    -------
    ndarray (d_v,)
        The norm of these bounds is one of the Frobenius error.

    Notes
    -----
    Derived from the law of the error:
    ``(u-1) A w + |w| sqrt(u/r) A (I - w w^T/|w|^2) g`` with ``u ~ chi^2_r/r`` and an independent
    standard normal g.

    Examples
    --------
    >>> amm_gaussian_tail([[1.0, 0.0]], [[0.0], [1.0]], 100, 0.05).round(4).tolist()
    [0.4519]
    """
    from scipy.optimize import brentq

    a, v = product_of(A, V)
    rows = int(whole(r, "r"))
    d = float(real(delta, "delta", 0, 1)) / v.shape[1]

    def log(count: int) -> float:
        """Return ``ln(count/delta')``."""
        return float(log_quotient(count, d) if d > 0 else log_quotient(count * v.shape[1], delta))

    goal = 2 / rows * log(4)
    reach = math.sqrt(2 * log(2))
    high = 1.0
    while high - math.log1p(high) < goal:
        high *= 2
    t = float(brentq(lambda x: x - math.log1p(x) - goal, 0.0, high, xtol=1e-13))
    size = float(np.linalg.norm(a)) + float(np.linalg.norm(a, 2)) * reach
    bound: Array = t * np.linalg.norm(a @ v, axis=0) + math.sqrt((1 + t) / rows) * size * (
        np.linalg.norm(v, axis=0)
    )
    return bound


@without_floating_errors
def amm_spectral_bernstein(
    asr: ArrayLike, m: ArrayLike, d_v: ArrayLike, r: ArrayLike, t: ArrayLike
) -> Float:
    """Bound ``P(|A S^T S V - A V|_2 >= t |A|_2 |V|_2)`` for columns drawn by joint norms.

    ``(m + d_v) exp(-r t^2 / (4 asr (1 + t/3)))`` with
    ``asr = (|A|_F^2/|A|_2^2 + |V|_F^2/|V|_2^2)/2`` and, for A and V of spectral norm 1,
    ``p_j = (|A_:j|^2 + |V_j|^2)/(2 asr)``, drawn with replacement.

    Parameters
    ----------
    asr : float or array
        Mean of the two stable ranks, at least 1.
    m, d_v : int or array
    r : int or array
    t : float or array
        Positive.

    Returns
    -------
    float or ndarray
        At most 1.

    Notes
    -----
    Derived: matrix Bernstein with summands of norm at most asr and second moments at most 2 asr.

    Examples
    --------
    >>> round(amm_spectral_bernstein(2.0, 6, 5, 1000, 0.3), 6)
    0.000398
    """
    stable = real(asr, "asr", 1 - 1e-9, low_open=False)
    sides = whole(m, "m").astype(np.float64) + whole(d_v, "d_v")
    rows, size = whole(r, "r").astype(np.float64), real(t, "t", 0)
    bound = sides * np.exp(-rows * size**2 / (4 * stable * (1 + size / 3)))
    return floats(np.minimum(bound, 1.0))


@without_floating_errors
def amm_spectral_expected(asr: ArrayLike, m: ArrayLike, d_v: ArrayLike, r: ArrayLike) -> Float:
    """Bound ``E |A S^T S V - A V|_2 / (|A|_2 |V|_2)`` for the law of `amm_spectral_bernstein`.

    ``sqrt(4 asr ln(m+d_v)/r) + 2 asr ln(m+d_v)/(3r)``.

    Parameters
    ----------
    asr : float or array
    m, d_v : int or array
    r : int or array

    Examples
    --------
    >>> round(amm_spectral_expected(2.0, 6, 5, 1000), 6)
    0.1417
    """
    stable = real(asr, "asr", 1 - 1e-9, low_open=False)
    log = np.log(whole(m, "m").astype(np.float64) + whole(d_v, "d_v"))
    rows = whole(r, "r").astype(np.float64)
    return floats(np.sqrt(4 * stable * log / rows) + 2 * stable * log / (3 * rows))


@without_floating_errors
def amm_spectral_min_dim(
    asr: ArrayLike, m: ArrayLike, d_v: ArrayLike, t: ArrayLike, delta: ArrayLike
) -> Int:
    """Return the rows with which `amm_spectral_bernstein` is at most delta.

    ``ceil(4 asr (1 + t/3) ln((m+d_v)/delta) / t^2)``.

    Parameters
    ----------
    asr : float or array
    m, d_v : int or array
    t : float or array
        Positive.
    delta : float or array
        In (0, 1).

    Examples
    --------
    >>> amm_spectral_min_dim(2.0, 6, 5, 0.3, 0.05)
    528
    """
    stable = real(asr, "asr", 1 - 1e-9, low_open=False)
    sides = whole(m, "m").astype(np.float64) + whole(d_v, "d_v")
    size, d = real(t, "t", 0), real(delta, "delta", 0, 1)
    return ceil(4 * stable * ((1 + size / 3) / size / size) * log_quotient(sides, d))
