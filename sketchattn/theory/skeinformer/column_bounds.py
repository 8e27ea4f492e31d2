"""Bounds of column sampling: the exact error, Proposition 1 and its tighter forms, pilot sizes."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ...base.arguments import as_array
from ...base.floating import without_floating_errors
from ...sampling.draws import check_probabilities
from ..engine.arguments import Array, log_quotient, matrix_of, product_of, real, whole

# Contributions below this share of the largest are taken as none.
_NEGLIGIBLE = 1e-150


@without_floating_errors
def contributions(A: object, V: object) -> Array:
    """Return ``x_j = |A_:j| |V_j|``, the size of what column j contributes to the product.

    Parameters
    ----------
    A : array (m, n)
    V : array (n, d_v)

    Returns
    -------
    ndarray (n,)
        The law that minimises the expected error is x over its sum T.

    Examples
    --------
    >>> contributions([[1.0, 0.0], [0.0, 2.0]], [[1.0], [3.0]]).tolist()
    [1.0, 6.0]
    """
    a, v = product_of(A, V)
    x: Array = np.linalg.norm(a, axis=0) * np.linalg.norm(v, axis=1)
    return x


def _law(p: ArrayLike, n: int) -> Array:
    law = check_probabilities(p, n)
    if not law.any():
        raise ValueError("p must have a positive probability, got zeros; give a law to draw by")
    return law


@without_floating_errors
def sampled_sqerr(A: object, V: object, p: ArrayLike, r: int) -> float:
    """Return ``E |A S^T S V - A V|_F^2`` of r columns drawn with replacement by p.

    ``(sum_j x_j^2/p_j - |A V|_F^2)/r`` with x of `contributions`.  Where p is zero for columns
    that contribute, with ``A V_s`` the product over the columns of positive probability:
    ``(sum_s x_j^2/p_j - |A V_s|_F^2)/r + |A V - A V_s|_F^2``.

    Parameters
    ----------
    A : array (m, n)
    V : array (n, d_v)
    p : array (n,)
        Probabilities with sum 1.
    r : int

    Notes
    -----
    Drineas, Kannan and Mahoney, SIAM J. Comput. 36 (2006), Lemma 3, and (for zeros) derived: the
    bias is what cannot be drawn, and the rest has the variance of a mean of r matrices.

    Examples
    --------
    >>> sampled_sqerr([[1.0, 1.0]], [[1.0], [1.0]], [0.75, 0.25], 2)
    0.6666666666666665
    >>> sampled_sqerr([[1.0, 1.0]], [[1.0], [1.0]], [1.0, 0.0], 2)
    1.0
    """
    a, v = product_of(A, V)
    law, rows = _law(p, a.shape[1]), int(whole(r, "r"))
    seen = law > 0
    x = contributions(a, v)
    drawn = a[:, seen] @ v[seen]
    variance = float(np.sum(x[seen] ** 2 / law[seen])) - float(np.sum(drawn * drawn))
    return max(variance, 0.0) / rows + float(np.sum((a @ v - drawn) ** 2))


@without_floating_errors
def realised_beta(p: ArrayLike, A: object, V: object) -> float:
    """Return ``min_j p_j/p*_j`` over the columns that contribute, p* the optimal law.

    Parameters
    ----------
    p : array (n,)
        Probabilities with sum 1.
    A : array (m, n)
    V : array (n, d_v)

    Returns
    -------
    float
        At most 1; 0 where p misses a column that contributes.

    Notes
    -----
    The largest beta for which the hypothesis (3) of Chen et al., arXiv 2112.05359, holds.

    Examples
    --------
    >>> realised_beta([0.5, 0.5], np.eye(2), [[1.0], [3.0]])
    0.6666666666666666
    """
    return _quality(p, A, V)[0]


@without_floating_errors
def sampling_inflation(p: ArrayLike, A: object, V: object) -> float:
    """Return ``sum_j p*_j^2/p_j = 1 + chi^2(p*|p)``: what a law costs beside the optimal one.

    ``sum_j x_j^2/p_j`` is T^2 times this.  Never more than ``1/realised_beta``.

    Parameters
    ----------
    p : array (n,)
        Probabilities with sum 1.
    A : array (m, n)
    V : array (n, d_v)

    Returns
    -------
    float
        At least 1; infinite where p misses a column that contributes.

    Examples
    --------
    >>> sampling_inflation([0.5, 0.5], np.eye(2), [[1.0], [3.0]])
    1.25
    """
    return _quality(p, A, V)[1]


def _quality(p: ArrayLike, A: object, V: object) -> tuple[float, float]:  # noqa: N803  (the paper)
    x = contributions(A, V)
    law = _law(p, len(x))
    total = float(x.sum())
    if total == 0:
        return 1.0, 1.0
    best = x / total
    seen = best > _NEGLIGIBLE * float(best.max())
    ratio = law[seen] / best[seen]
    if not ratio.all():
        return 0.0, math.inf
    return float(ratio.min()), float(np.sum(best[seen] / ratio))


@without_floating_errors
def break_even_rank(A: object, V: object) -> float:
    """Return the rank from which weighted sampling beats the mean of V, in mean square.

    ``(T^2 - |A V|_F^2)/|A V - 1 vbar^T|_F^2``, columns drawn by the optimal law.

    Parameters
    ----------
    A : array (m, n)
    V : array (n, d_v)

    Returns
    -------
    float
        Infinite where the mean of V is exact.

    Examples
    --------
    >>> round(break_even_rank([[0.9, 0.1], [0.1, 0.9]], [[1.0], [-1.0]]), 4)
    1.5625
    """
    a, v = product_of(A, V)
    product = a @ v
    gap = float(np.sum((product - v.mean(axis=0)) ** 2))
    need = float(contributions(a, v).sum()) ** 2 - float(np.sum(product * product))
    # A gap of this size is the rounding of an output that is the mean of V.
    return need / gap if gap > 1e-28 * float(np.sum(product * product)) else math.inf


class ProductBounds(NamedTuple):
    """Hold bounds of ``|A V - A S^T S V|_F^2`` that fail with probability at most delta.

    With ``eta = 1 + sqrt((8/beta) ln(1/delta))``, ``eta' = 1 + sqrt((2/beta) ln(1/delta))``,
    ``T = sum_j |A_:j| |V_j|``, E1 the expected squared error, and
    ``D = max_{j,l} |A_:j V_j/p_j - A_:l V_l/p_l|_F``:

    Attributes
    ----------
    dkm : float
        ``eta^2/(beta r) |A|_F^2 |V|_F^2``: Proposition 1 as published (Azuma).
    dkm_T : float
        ``eta^2/(beta r) T^2``, since ``T <= |A|_F |V|_F``.
    mcdiarmid_T : float
        ``eta'^2/(beta r) T^2``: McDiarmid in place of Azuma.
    mcdiarmid_exact : float
        ``(sqrt(E1) + D sqrt(ln(1/delta)/(2 r)))^2``.
    markov : float
        ``E1/delta``.
    beta : float
        That of the first three.
    informative_rank : float
        ``eta^2 |A|_F^2 |V|_F^2/(beta |A V|_F^2)``: the rank from which dkm is below ``|A V|_F^2``.
    """

    dkm: float
    dkm_T: float  # noqa: N815  (T is the letter of the formula)
    mcdiarmid_T: float  # noqa: N815  (as above)
    mcdiarmid_exact: float
    markov: float
    beta: float
    informative_rank: float

    @property
    def best(self) -> float:
        """The smallest of the five."""
        return min(self[:5])


@without_floating_errors
def product_range(A: object, V: object, p: ArrayLike) -> float:
    """Return ``D = max_{j,l} |y_j - y_l|_F``, ``y_j = A_:j V_j/p_j``, over the support of p.

    Parameters
    ----------
    A : array (m, n)
    V : array (n, d_v)
    p : array (n,)
        Probabilities with sum 1.

    Notes
    -----
    Changing one of r drawn columns moves the Frobenius error by at most D/r.

    Examples
    --------
    >>> product_range(np.eye(2), [[1.0], [1.0]], [0.5, 0.5])
    2.8284271247461903
    """
    a, v = product_of(A, V)
    law = _law(p, a.shape[1])
    seen = law > 0
    columns, rows = a[:, seen] / law[seen], v[seen]
    gram = (columns.T @ columns) * (rows @ rows.T)
    size = np.diag(gram)
    return math.sqrt(max(float((size[:, None] + size - 2 * gram).max()), 0.0))


@without_floating_errors
def product_bounds(
    A: object, V: object, p: ArrayLike, r: int, delta: float = 0.1, *, beta: float | None = None
) -> ProductBounds:
    """Return Proposition 1 with its constants, and its tighter forms, for columns drawn by p.

    Parameters
    ----------
    A : array (m, n)
    V : array (n, d_v)
    p : array (n,)
        Probabilities with sum 1.
    r : int
        Columns, drawn independently with replacement and weighted by ``1/(r p_j)``.
    delta : float, default 0.1
        In (0, 1).
    beta : float, optional
        In (0, 1]; by default `realised_beta`.  Where that is 0 the first three are infinite.

    Returns
    -------
    ProductBounds

    Notes
    -----
    dkm: Drineas, Kannan and Mahoney, SIAM J. Comput. 36 (2006), Theorem 1, as Proposition 1 of
    Chen et al., arXiv 2112.05359.  The others are derived; always
    ``dkm >= dkm_T >= mcdiarmid_T >= mcdiarmid_exact``.  In norm form the factor of the first is
    ``eta/sqrt(beta r)``.  None of them covers draws without replacement, other weights or other
    normalisers: see `proposition1_scope`.

    Examples
    --------
    >>> bounds = product_bounds(np.eye(2), [[1.0], [1.0]], [0.5, 0.5], 100)
    >>> round(bounds.dkm, 4), round(bounds.mcdiarmid_exact, 4), round(bounds.markov, 4)
    (1.1202, 0.1979, 0.2)
    """
    a, v = product_of(A, V)
    law, rows = _law(p, a.shape[1]), int(whole(r, "r"))
    log = -math.log(float(real(delta, "delta", 0, 1)))
    if beta is None:
        quality = realised_beta(law, a, v)
    else:
        quality = float(real(beta, "beta", 0, 1, high_open=False))
    mean = sampled_sqerr(a, v, law, rows)
    spread = product_range(a, v, law) * math.sqrt(log / (2 * rows))
    exact, markov = (math.sqrt(mean) + spread) ** 2, mean / float(delta)
    if quality == 0:
        return ProductBounds(math.inf, math.inf, math.inf, exact, markov, 0.0, math.inf)
    sizes = float(np.sum(a * a)) * float(np.sum(v * v))
    total = float(contributions(a, v).sum()) ** 2
    azuma, mcdiarmid = ((1 + math.sqrt(c / quality * log)) ** 2 / quality for c in (8, 2))
    output = float(np.sum((a @ v) ** 2))
    return ProductBounds(
        azuma * sizes / rows,
        azuma * total / rows,
        mcdiarmid * total / rows,
        exact,
        markov,
        quality,
        azuma * sizes / output if output > 0 else math.inf,
    )


# --- how many pilot rows --------------------------------------------------------------------


def _attention(A: object) -> Array:  # noqa: N803  (the letter of the spec)
    a = matrix_of(A, "A")
    if 0 in a.shape:
        raise ValueError(f"A must not be empty, got shape {a.shape}; give a matrix with entries")
    return a


@without_floating_errors
def column_floor(A: object) -> float:
    """Return ``C = min_j |A_:j|^2/n_q``, the C of Lemma 1, at most ``1/n_k`` for attention.

    Parameters
    ----------
    A : array (n_q, n_k)

    Examples
    --------
    >>> column_floor(np.eye(4)), column_floor(np.full((4, 4), 0.25))
    (0.25, 0.0625)
    """
    a = _attention(A)
    return float(np.einsum("ij,ij->j", a, a).min()) / len(a)


@without_floating_errors
def column_coherence(A: object) -> float:
    """Return ``mu = max_j n_q max_i A_ij^2/|A_:j|^2``: whether a column is read by few rows.

    Parameters
    ----------
    A : array (n_q, n_k)

    Returns
    -------
    float
        In [1, n_q]; columns of zeros do not count, and a matrix of zeros has 1.

    Examples
    --------
    >>> column_coherence(np.eye(4)), column_coherence(np.full((4, 4), 0.25))
    (4.0, 1.0)
    """
    a = np.abs(_attention(A))
    top = a.max(axis=0)
    kept = top > 0
    if not kept.any():
        return 1.0
    scaled = a[:, kept] / top[kept]  # no square underflows
    return float(np.max(len(a) / np.einsum("ij,ij->j", scaled, scaled)))


@without_floating_errors
def lemma1_pilots(A: object, delta: float = 0.1) -> float:
    """Return the pilot rows that Lemma 1 asks for: ``(2/C^2) ln(2 n_k/delta)``, not rounded.

    Parameters
    ----------
    A : array (n_q, n_k)
    delta : float, default 0.1
        In (0, 1).

    Returns
    -------
    float
        Infinite where a column is zero.

    Notes
    -----
    Chen et al., arXiv 2112.05359, Lemma 1 with the constants of its proof.  Since C <= 1/n_k it
    is at least ``2 n_k^2 ln(2 n_k/delta)``: more than n for every square attention matrix.

    Examples
    --------
    >>> round(lemma1_pilots(np.eye(10)), 4)
    1059.6635
    """
    a = _attention(A)
    floor = column_floor(a)
    log = float(log_quotient(2 * a.shape[1], real(delta, "delta", 0, 1)))
    return 2 / floor**2 * log if floor**2 > 0 else math.inf


@without_floating_errors
def coherence_pilots(A: object, delta: float = 0.1) -> float:
    """Return ``12 mu ln(2 n_k/delta)``, not rounded: pilot rows that do give beta >= 1/sqrt(3).

    Parameters
    ----------
    A : array (n_q, n_k)
    delta : float, default 0.1
        In (0, 1).

    Notes
    -----
    Derived: with ``Y_j`` the mean of ``A_ij^2`` over the pilots, numbers in [0, M_j] whose mean is
    ``|A_:j|^2/n_q``, ``P(|Y_j/E Y_j - 1| > 1/2) <= 2 exp(-s/(12 mu))`` (Chernoff), for all n_k
    columns; within these limits beta is at least ``sqrt((1/2)/(3/2))``.

    Examples
    --------
    >>> round(coherence_pilots(np.full((10, 10), 0.1)), 3)
    63.58
    """
    a = _attention(A)
    log = float(log_quotient(2 * a.shape[1], real(delta, "delta", 0, 1)))
    return 12 * column_coherence(a) * log


@without_floating_errors
def pilot_probabilities(A: object, V: object, rows: ArrayLike) -> Array:
    """Return ``p_j`` proportional to ``(sum_{i in I} A_ij^2)^(1/2) |V_j|`` over pilot rows I.

    Parameters
    ----------
    A : array (m, n)
    V : array (n, d_v)
    rows : int array (s,)
        I, repeats counted.

    Notes
    -----
    Chen et al., arXiv 2112.05359, equation (5).  Written out, beside the law "pilot" of
    ``sketchattn.sampling``; uniform where it would be zero throughout.

    Examples
    --------
    >>> pilot_probabilities([[0.5, 0.5], [1.0, 0.0]], np.eye(2), [1, 1]).tolist()
    [1.0, 0.0]
    """
    a, v = product_of(A, V)
    chosen = whole(as_array(rows, "rows"), "rows", 0, len(a) - 1)
    sizes = np.linalg.norm(a[chosen], axis=0) * np.linalg.norm(v, axis=1)
    total = float(sizes.sum())
    found: Array = sizes / total if total > 0 else np.full(len(v), 1 / max(len(v), 1))
    return found
