"""Formulas: the ranks of both theorems, pooling, spectra, and the gap of the two estimators."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ...base.draws import Rng, as_generator
from ...base.floating import without_floating_errors
from ...problem import AttentionProblem
from ...zoo.linformer.fit import oracle_floor
from ...zoo.linformer.method import Linformer
from ...zoo.linformer.projections import ReducedAttention, pool_starts
from ..engine.arguments import Array, Float, Int, ceil, floats, matrix_of, real, whole
from ..engine.instances import Instance
from ..sketching.moments import amm_stats
from ..softmax.formulas import perturbation_bound

PAPER = "Wang, Li, Khabsa, Fang and Ma, arXiv 2006.04768v3"
DERIVED = "derived: see the chapter on Linformer"


@without_floating_errors
def rate_of(eps: Array) -> Array:
    """Return ``(eps^2 - eps^3)/4``, the rate of the tails of Theorem 1 for each row of R."""
    rate: Array = (eps**2 - eps**3) / 4
    return rate


@without_floating_errors
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


@without_floating_errors
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
    return floats(2 * length * np.exp(-rate_of(e) * rows))


@without_floating_errors
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


@without_floating_errors
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


@without_floating_errors
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
    delta = failure_of(delta_mode, n)
    matrix = as_generator(rng).standard_normal((r, n)) / math.sqrt(r)
    method = Linformer(r, "given", E=delta * matrix, F=math.exp(-delta) * matrix)
    ahat = method.approximate(problem)
    if not isinstance(ahat, ReducedAttention):
        raise ValueError(f"problem must have a key that is not masked, got {problem!r}; unmask one")
    return ahat


@without_floating_errors
def failure_of(mode: str | float, n: int) -> float:
    """Return the delta of Theorem 2: ``1/n``, ``2^-n`` or the number that is given."""
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


@without_floating_errors
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


@without_floating_errors
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


@without_floating_errors
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


@without_floating_errors
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
