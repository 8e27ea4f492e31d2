"""Draws of columns: with replacement, and three ways without, each with its exact weights.

A draw is the diagonal matrix ``S^T S = sum_t w_t e_{j_t} e_{j_t}^T`` with ``E[S^T S] = I``: for any
A (m, n) and V (n, d_v) the product ``A S^T S V`` is an unbiased estimate of ``A V`` that reads the
drawn columns of A and rows of V only.  A weight is one over the probability *with which its column
was drawn by the sampler in use*; weights of one sampler with the indices of another are biased.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..base.arguments import as_array, as_integer, as_real, check_finite, check_flag
from ..base.draws import Rng, as_generator
from ..base.floating import without_floating_errors

Array = NDArray[Any]

# Probabilities below zero by no more than this are rounding and count as zero.
NEGATIVE_ROUNDING = 1e-12
# A law may have been computed or stored in float32.
SUM_TOLERANCE = 1e-5


@dataclass(frozen=True, eq=False)
class ColumnDraw:
    """Hold drawn columns with their weights: the sampling sketch ``S`` of shape (len(columns), n).

    Row t of S is ``sqrt(w_t) e_{j_t}^T``.

    Attributes
    ----------
    columns : int64 array (t,)
        Drawn indices j in drawing order, repeats kept.
    weights : float64 array (t,)
        Factor w of each drawn column, such that ``E[S^T S] = I`` on the columns that can be drawn.
    probabilities : float64 array (t,)
        What the weights are made of: with replacement the probability p_j of one draw, and
        ``w = 1/(rank p_j)``; without, the (conditional) probability of being kept, and ``w = 1/p``.
    n : int
        Number of columns to draw from.
    rank : int
        Number of columns asked for.
    replace : bool
        Whether a column can be drawn again.

    Examples
    --------
    >>> import numpy as np
    >>> draw = sample_with_replacement(np.full(4, 0.25), 2, rng=0)
    >>> draw.columns.tolist(), draw.weights.tolist(), draw.effective_rank
    ([2, 1], [2.0, 2.0], 2)
    """

    columns: Array
    weights: Array
    probabilities: Array
    n: int
    rank: int
    replace: bool

    def __post_init__(self) -> None:
        for x in (self.columns, self.weights, self.probabilities):
            x.flags.writeable = False

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (len(columns), n) of S."""
        return len(self.columns), self.n

    @property
    def effective_rank(self) -> int:
        """Number of distinct columns; smaller than ``rank`` after repeats or a lack of columns."""
        return len(np.unique(self.columns))

    def merged(self) -> tuple[Array, Array]:
        """Return the distinct columns in ascending order, and the sum of the weights of each."""
        distinct, where = np.unique(self.columns, return_inverse=True)
        return distinct, np.bincount(where, self.weights, minlength=len(distinct))

    def diagonal(self) -> Array:
        """Return the diagonal of ``S^T S``, float64 (n,)."""
        return np.bincount(self.columns, self.weights, minlength=self.n)

    def apply(self, x: Array) -> Array:
        """Return ``S X`` for X of shape (n,) or (n, m)."""
        x = self._checked(x, "x", self.n)
        root = np.sqrt(self.weights).astype(np.result_type(x, np.float32))
        return root.reshape(-1, *[1] * (x.ndim - 1)) * x[self.columns]

    def apply_transpose(self, y: Array) -> Array:
        """Return ``S^T Y`` for Y of shape (len(columns),) or (len(columns), m)."""
        y = self._checked(y, "y", len(self.columns))
        root = np.sqrt(self.weights).astype(np.result_type(y, np.float32))
        scaled = root.reshape(-1, *[1] * (y.ndim - 1)) * y
        out = np.zeros((self.n, *y.shape[1:]), scaled.dtype)
        np.add.at(out, self.columns, scaled)
        return out

    def to_dense(self) -> Array:
        """Return S as a dense float64 array (len(columns), n)."""
        dense = np.zeros(self.shape)
        dense[np.arange(len(self.columns)), self.columns] = np.sqrt(self.weights)
        return dense

    def _checked(self, x: Array, name: str, length: int) -> Array:
        x = as_array(x, name)
        if x.ndim not in (1, 2) or x.shape[0] != length:
            raise ValueError(
                f"{name} must have shape ({length},) or ({length}, m), got {x.shape}; "
                f"S has the shape {self.shape}"
            )
        return x


def check_size(rank: object) -> int:
    """Return the number of draws as an integer of at least 1."""
    count = as_integer(rank, "rank", "give one >= 1")
    if count < 1:
        raise ValueError(f"rank must be at least 1, got {count}; draw one column or more")
    return count


@without_floating_errors
def check_probabilities(p: ArrayLike, n: int | None = None, name: str = "p") -> Array:
    """Return a law as a new float64 array that sums to one.

    Parameters
    ----------
    p : array (n,)
        Not negative (rounding down to -1e-12 is taken as zero), with sum 1 up to 1e-5; or zeros
        throughout, which means that nothing can be drawn.
    n : int, optional
        Length that it must have.
    name : str
        What an error calls it.

    Raises
    ------
    TypeError, ValueError
        If it is not such a law.

    Examples
    --------
    >>> check_probabilities([0.5, 0.5, -1e-17]).tolist()
    [0.5, 0.5, 0.0]
    """
    raw = as_array(p, name)
    if raw.dtype.kind not in "fiu":
        raise TypeError(f"{name} must hold real numbers, got {raw.dtype}; give probabilities")
    law = raw.astype(np.float64)
    if law.ndim != 1 or (n is not None and len(law) != n):
        wanted = "(n,)" if n is None else f"({n},)"
        raise ValueError(
            f"{name} must have shape {wanted}, got {law.shape}; give one probability a column"
        )
    check_finite(law, name)
    if len(law) and law.min() < -NEGATIVE_ROUNDING:
        raise ValueError(
            f"{name} must not be negative, got {law.min():.6g} at index {int(law.argmin())}; "
            f"give probabilities"
        )
    law = np.maximum(law, 0.0)
    total = float(law.sum())
    if total != 0.0 and abs(total - 1.0) > SUM_TOLERANCE:
        raise ValueError(f"{name} must sum to 1, got {total:.9g}; divide it by its sum")
    return law / total if total else law


def _draw(
    columns: Array, weights: Array, probabilities: Array, n: int, rank: int, replace: bool
) -> ColumnDraw:
    return ColumnDraw(columns.astype(np.int64), weights, probabilities, n, rank, replace)


@without_floating_errors
def sample_with_replacement(p: ArrayLike, rank: int, rng: Rng = None) -> ColumnDraw:
    """Draw ``rank`` columns independently from p, with weights ``1/(rank p_j)``.

    ``E |A S^T S V - A V|_F^2 = (sum_j |A_:j|^2 |V_j|^2 / p_j - |A V|_F^2) / rank``, smallest for
    ``p_j`` proportional to ``|A_:j| |V_j|``.

    Parameters
    ----------
    p : array (n,)
        Probabilities with sum 1.  Zeros are never drawn, and the estimate of ``A V`` is unbiased
        only if ``|A_:j| |V_j| = 0`` there.
    rank : int
        Number of draws, at least 1; more than n is legal.
    rng : None, int or numpy.random.Generator
        The same seed with a larger rank extends the columns of the smaller draw.

    Returns
    -------
    ColumnDraw
        Empty if p is zero throughout.

    Notes
    -----
    Drineas, Kannan and Mahoney, "Fast Monte Carlo algorithms for matrices I" (2006), the
    algorithm BasicMatrixMultiplication.  Inversion of the distribution function.

    Examples
    --------
    >>> sample_with_replacement([0.0, 1.0], 3, rng=0).columns.tolist()
    [1, 1, 1]
    """
    law, r, generator = check_probabilities(p), check_size(rank), as_generator(rng)
    support = np.flatnonzero(law)
    if len(support) == 0:
        return _draw(support, np.empty(0), np.empty(0), len(law), r, True)
    cumulative = np.cumsum(law[support])
    # u < 1 and a last entry of exactly 1: the search ends inside, on an index that has p > 0.
    cumulative /= cumulative[-1]
    columns = support[np.searchsorted(cumulative, generator.random(r), side="right")]
    return _draw(columns, 1.0 / (r * law[columns]), law[columns], len(law), r, True)


@without_floating_errors
def sample_uniform(
    n: int, rank: int, rng: Rng = None, *, keep: ArrayLike | None = None
) -> ColumnDraw:
    """Draw ``rank`` distinct columns uniformly, with weights ``m/rank``, m the number to draw from.

    ``E |A S^T S V - A V|_F^2 = ((m-r)/(m-1)) (m sum_j |A_:j|^2 |V_j|^2 - |A V|_F^2)/r``.

    Parameters
    ----------
    n : int
        Number of columns.
    rank : int
        Number of columns to draw, at least 1; where fewer are there, all of them are drawn.
    rng : None, int or numpy.random.Generator
        The same seed with a larger rank extends the columns of the smaller draw.
    keep : bool array (n,), optional
        True for the columns that may be drawn; None is all.

    Returns
    -------
    ColumnDraw

    Examples
    --------
    >>> draw = sample_uniform(3, 5, rng=0)
    >>> sorted(draw.columns.tolist()), draw.weights.tolist(), draw.effective_rank
    ([0, 1, 2], [1.0, 1.0, 1.0], 3)
    """
    r, generator = check_size(rank), as_generator(rng)
    n = as_integer(n, "n", "give the columns' number")
    if n < 0:
        raise ValueError(f"n must not be negative, got {n}; give the columns' number")
    allowed = np.arange(n)
    if keep is not None:
        mask = as_array(keep, "keep")
        if mask.dtype != np.bool_:
            raise TypeError(f"keep must be boolean, got {mask.dtype}; convert it with astype(bool)")
        if mask.shape != (int(n),):
            raise ValueError(
                f"keep must have shape ({int(n)},), got {mask.shape}; give one entry a column"
            )
        allowed = np.flatnonzero(mask)
    columns = generator.permutation(allowed)[:r]
    kept = len(columns) / max(len(allowed), 1)
    probabilities = np.full(len(columns), kept)
    return _draw(columns, 1.0 / probabilities, probabilities, int(n), r, False)


def gumbel_top(log_p: Array, count: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """Return the columns of the ``count`` largest ``g_j = log_p_j + Gumbel_j``, and these g.

    In descending order, and fewer where fewer are not -inf.  The first t of them are t draws one
    after another without replacement from ``exp(log_p)``, whatever its sum; probabilities that are
    zero in floating point are none in the logarithm.

    Parameters
    ----------
    log_p : float64 array (n,)
        Natural logarithms, -inf for columns that are never drawn.
    count : int
        At least 0.
    rng : numpy.random.Generator
        Moves on by one number a column that is not -inf.

    Examples
    --------
    >>> log_p = np.array([-1e4, -np.inf, -2e4])
    >>> gumbel_top(log_p, 3, np.random.default_rng(0))[0].tolist()
    [0, 2]
    """
    support = np.flatnonzero(log_p > -np.inf)
    priority = log_p[support] + rng.gumbel(size=len(support))
    top = np.arange(len(support))
    if count < len(support):
        top = np.sort(np.argpartition(-priority, count)[:count])
    order = top[np.argsort(-priority[top], kind="stable")]
    return support[order], priority[order]


@without_floating_errors
def sample_gumbel(p: ArrayLike, rank: int, rng: Rng = None) -> ColumnDraw:
    """Draw ``rank`` distinct columns one after another from p, with unbiased priority weights.

    With ``g_j = ln p_j + Gumbel_j`` the columns are those of the r largest g, in descending order,
    and with tau the (r+1)-th largest ``w_j = 1/(1 - exp(-exp(ln p_j - tau)))``.

    Parameters
    ----------
    p : array (n,)
        Probabilities with sum 1; zeros are never drawn.
    rank : int
        Number of columns, at least 1.  With no more than ``rank`` columns of positive p all of
        them are drawn and weigh 1.
    rng : None, int or numpy.random.Generator
        The same seed with a larger rank extends the columns of the smaller draw (the weights
        change).

    Returns
    -------
    ColumnDraw
        Its ``probabilities`` are ``P(g_j > tau)`` for the tau that occurred.

    Notes
    -----
    The law of ``Generator.choice(replace=False, p=p)`` (sequential or Plackett-Luce sampling).
    Unbiased: given the other g's, j is kept iff ``g_j > tau_j``, their r-th largest, and then
    ``tau = tau_j``; so ``E[1{kept}/P(g_j > tau_j)] = 1``.  Inclusion probabilities of this sampler
    are not ``r p_j``: weights ``1/(r p_j)`` or ``n/r`` are biased.  The threshold estimator of
    Duffield, Lund and Thorup, "Priority sampling" (2007), with Gumbel priorities.

    Examples
    --------
    >>> draw = sample_gumbel([0.7, 0.3, 0.0], 2, rng=0)
    >>> sorted(draw.columns.tolist()), draw.weights.tolist()
    ([0, 1], [1.0, 1.0])
    """
    law, r, generator = check_probabilities(p), check_size(rank), as_generator(rng)
    with np.errstate(divide="ignore"):
        log_p = np.log(law)
    first, priority = gumbel_top(log_p, r + 1, generator)
    chosen = first[:r]
    if r < len(first):
        # -expm1 keeps the digits of small probabilities; exp(700) is as good as infinity.
        excess = np.minimum(log_p[chosen] - priority[r], 700.0)
        kept = -np.expm1(-np.exp(excess))
    else:
        kept = np.ones(len(chosen))
    return _draw(chosen, 1.0 / kept, kept, len(law), r, False)


@without_floating_errors
def inclusion_probabilities(p: ArrayLike, rank: float) -> Array:
    """Return ``pi_j = min(1, tau p_j)`` with tau such that the sum is ``rank`` (water-filling).

    Parameters
    ----------
    p : array (n,)
        Probabilities with sum 1.
    rank : float
        Expected number of columns, > 0.  With no more than ``rank`` columns of positive p, each
        of them gets 1.

    Returns
    -------
    ndarray, float64 (n,)
        Grows with ``rank`` in every entry.

    Notes
    -----
    The k largest p are clamped for the smallest k with ``(rank - k) p_(k+1) <= sum_{j>k} p_(j)``.

    Examples
    --------
    >>> inclusion_probabilities([0.6, 0.2, 0.2], 2).tolist()
    [1.0, 0.5, 0.5]
    """
    law = check_probabilities(p)
    target = as_real(rank, "rank", "give one > 0")
    if not (math.isfinite(target) and target > 0):
        raise ValueError(f"rank must be finite and positive, got {target}; give one > 0")
    support = np.flatnonzero(law)
    pi = np.zeros(len(law))
    if target >= len(support):
        pi[support] = 1.0
        return pi
    order = support[np.argsort(-law[support], kind="stable")]
    ranked = law[order]
    tails = np.cumsum(ranked[::-1])[::-1]
    clamped = np.arange(len(order))
    # target < len(support), so it holds for the last clamped < target at the latest.
    first = int(np.argmax((target - clamped) * ranked <= tails))
    pi[order[:first]] = 1.0
    pi[order[first:]] = np.minimum(1.0, (target - first) / tails[first] * ranked[first:])
    return pi


@without_floating_errors
def sample_poisson(p: ArrayLike, rank: float, rng: Rng = None) -> ColumnDraw:
    """Keep every column independently with probability ``pi_j = min(1, tau p_j)``, ``sum = rank``.

    The weights are ``1/pi_j``, and
    ``E |A S^T S V - A V|_F^2 = sum_j (1/pi_j - 1) |A_:j|^2 |V_j|^2``.

    Parameters
    ----------
    p : array (n,)
        Probabilities with sum 1; zeros are never drawn.
    rank : float
        Expected number of columns, > 0; the number drawn is random.
    rng : None, int or numpy.random.Generator
        The same seed with a larger rank keeps at least the columns of the smaller draw.

    Returns
    -------
    ColumnDraw
        Columns in ascending order.

    Examples
    --------
    >>> sample_poisson([0.5, 0.5, 0.0], 2, rng=0).columns.tolist()
    [0, 1]
    """
    generator = as_generator(rng)
    pi = inclusion_probabilities(p, rank)
    # random() < 1, so certain columns stay and impossible ones do not.
    columns = np.flatnonzero(generator.random(len(pi)) < pi)
    return _draw(columns, 1.0 / pi[columns], pi[columns], len(pi), math.ceil(rank), False)


@without_floating_errors
def sample_columns(p: ArrayLike, rank: int, rng: Rng = None, *, replace: bool = True) -> ColumnDraw:
    """Draw ``rank`` columns from a law, with replacement or without, with unbiased weights.

    Parameters
    ----------
    p : array (n,)
        Probabilities with sum 1; zeros are never drawn.
    rank : int
        Number of columns, at least 1.
    rng : None, int or numpy.random.Generator
    replace : bool, default True
        True is ``sample_with_replacement``; False is ``sample_uniform`` where all positive p are
        equal, otherwise ``sample_gumbel``.

    Returns
    -------
    ColumnDraw

    Examples
    --------
    >>> sample_columns([0.5, 0.0, 0.5], 1, rng=0, replace=False).weights.tolist()
    [2.0]
    """
    check_flag(replace, "replace")
    law = check_probabilities(p)
    if replace:
        return sample_with_replacement(law, rank, rng)
    positive = law > 0
    if not positive.any() or np.ptp(law[positive]) == 0.0:
        return sample_uniform(len(law), rank, rng, keep=positive)
    return sample_gumbel(law, rank, rng)


@without_floating_errors
def self_normalize(entries: Array, weights: Array) -> Array:
    """Return ``w_j A_ij / sum_l w_l A_il``: the self-normalised (Hajek) form of a draw.

    Rows sum to one, and the estimate is biased: no moment formula of a draw applies to it.  The
    normaliser of A cancels, so that entries may come without it.

    Parameters
    ----------
    entries : ndarray (m, t)
        Not negative: the drawn columns of A, each once, or of ``exp(L)``.
    weights : ndarray (t,)
        Positive: the weight of each drawn column.

    Returns
    -------
    ndarray (m, t)
        Rows without a positive entry are zero.

    Examples
    --------
    >>> import numpy as np
    >>> self_normalize(np.array([[1.0, 3.0], [0.0, 0.0]]), np.array([3.0, 1.0])).tolist()
    [[0.5, 0.5], [0.0, 0.0]]
    """
    if entries.ndim != 2 or weights.shape != entries.shape[1:]:
        raise ValueError(
            f"entries and weights must have shapes (m, t) and (t,), got {entries.shape} and "
            f"{weights.shape}; give one weight for each column"
        )
    weighted: Array = entries * weights.astype(entries.dtype)
    total = weighted.sum(axis=1, keepdims=True)
    np.divide(weighted, total, out=weighted, where=total > 0)
    return weighted
