"""Certificates of rows: how wrong structured attention is at most, without knowing A.

`sketchattn.PartitionedAttention` replaces what a row sees of a region by one weight.  With local
weights ``lam_t = softmax_j(scale q0_t . k_j)``, the expected key ``kappa_t`` and the entropy as
bias the log-ratio of ``Ahat_ij`` and ``A_ij`` is, up to a constant of the row,

    eta_ij = scale (q_i - q0_t) . (kappa_t - k_j),    E_lam[eta_i] = 0,

and 0 on direct keys.  So what is known of the keys of a region, its box, its radius, its
variances and principal directions, bounds eta and with it the row, at ``O(d)`` a pair of row and
region and direction:

- the range: with ``-lo_t <= eta_ij <= hi_t`` and the largest of these over regions,
  ``TV_i <= B(what_i; hi_i, lo_i)``, `mass_aware_bound`, what_i the mass of the row on regions;
- the gap of a region, ``ln Z_i(Omega_t) - g_i(t) = ln E_lam[exp(-eta)] >= 0``, is at most G_t by
  Hoeffding's lemma, Bennett's inequality or the sharper `gap_bound`; then
  ``KL(Ahat_i|A_i) <= ln(1 + sum_t rho_i(t) (exp(G_t) - 1))`` and
  ``TV_i <= min(sqrt(KL_i/2), sqrt(1 - exp(-KL_i)))``;
- mass and local error apart: ``TV_i <= (1 - exp(-KL_i)) + sum_t rho_i(t) TV(lam_t, cond_i(.|t))``.

All are true upper bounds of the row as exact arithmetic would give it, whatever A is; none of them
is small unless the logits vary little within regions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..base.arguments import as_array
from ..base.floating import without_floating_errors
from ..base.words import Phrase, Worded, counted, number
from ..operators.base import AttentionOperator
from ..operators.partitioned.operator import MixtureAttention, PartitionedAttention
from ..operators.partitioned.passes import LOG2E, Data, slot_logits
from ..partitions.ragged import Ragged

Array = NDArray[Any]
Float = float | NDArray[np.float64]

# The bounds of a row; see `RowCertificates`.
KINDS = ("range", "hoeffding", "bennett", "gap", "split")
# Numbers of a temporary array: 16 MB in float64.
CHUNK = 1 << 21
# Ranges and gaps below which limits are used in place of formulas that cancel.
SMALL = 1e-6
EPS = float(np.finfo(np.float64).eps)
# Local weights count for at least this much in variances, which stay upper bounds.
TINY = 1e-290


# --- formulas -----------------------------------------------------------------------------------


def _at_least_zero(x: ArrayLike, name: str, high: float = np.inf) -> Array:
    value = as_array(x, name)
    if value.dtype.kind not in "iuf":
        raise TypeError(f"{name} must be real, got dtype {value.dtype}; give a number")
    value = value.astype(np.float64)
    bad = ~((value >= 0) & (value <= high))
    if bad.any():
        raise ValueError(
            f"{name} must be in [0, {high:g}], got {float(value[bad].flat[0]):g}; change {name}"
        )
    return value


def _result(x: Array) -> Float:
    out: Float = x.item() if x.ndim == 0 else x
    return out


@without_floating_errors
def mass_aware_bound(
    mass: ArrayLike, low: ArrayLike, high: ArrayLike, *, log: bool = False
) -> Float:
    """Return ``B(w; lo, hi)``, the most that a row can move where only a part of it is tilted.

    p is a distribution, ``p'_j`` proportional to ``p_j exp(eta_j)``, eta in [-lo, hi] on a set of
    mass w (under p) and 0 elsewhere: ``TV(p, p') <= B(w; lo, hi)``, and no less will do.

    Parameters
    ----------
    mass : float or array
        w, in [0, 1].
    low, high : float or array
        lo and hi, at least 0; infinity is allowed.
    log : bool
        Whether ``mass`` is ln w, at most 0: a mass that underflows can be tilted to one.

    Returns
    -------
    float or ndarray of float64
        At most ``tanh((lo + hi)/4)``, which it is where w is large enough.

    Raises
    ------
    TypeError, ValueError
        For values that are not real or out of range.

    Notes
    -----
    On the event {p' > p} eta is pushed to hi inside of the set and to -lo outside; what is not
    tilted is wholly inside or wholly outside.  With ``a = exp(-(lo + hi))``, ``g = 1 - a`` and

        c = (1 - w) exp(-hi) + w,      w1 = (c - sqrt(a c))/g,   B1 = w1 - w1 a/(c - w1 g),
        c' = (1 - w) exp(-hi) + w a,   w2 = (sqrt(c') - c')/g,   B2 = w2/(c' + w2 g) - w2,

    w1 and w2 clipped to [0, w] and B the larger: masses of the set outside of the event with the
    rest inside, and inside with the rest outside.  Nothing overflows.  Derived.

    Examples
    --------
    >>> round(mass_aware_bound(0.3, 1.0, 0.0), 6), round(mass_aware_bound(1.0, 0.4, 0.6), 6)
    (0.16381, 0.244919)
    """
    lo, hi = _at_least_zero(low, "low"), _at_least_zero(high, "high")
    if log:
        log_w = -_at_least_zero(-np.asarray(mass, np.float64), "-ln w")
    else:
        with np.errstate(divide="ignore"):
            log_w = np.log(_at_least_zero(mass, "mass", 1.0))
    return _result(_mass_aware(log_w, lo, hi))


def _mass_aware(log_w: Array, lo: Array, hi: Array) -> Array:
    """Return the bound from ``ln w``."""
    log_w, lo, hi = np.broadcast_arrays(log_w, lo, hi)
    with np.errstate(over="ignore"):
        width = lo + hi
    w, others = np.exp(log_w), -np.expm1(log_w)
    a, gain = np.exp(-width), -np.expm1(-width)
    fixed = np.where(gain > 0, gain, 1.0)
    # c - sqrt(a c) = sqrt(c) (c - a)/(sqrt(c) + sqrt(a)), and likewise below: no near numbers are
    # subtracted.
    rest = others * np.exp(-hi)
    c = rest + w
    root = np.sqrt(c)
    above = rest * -np.expm1(-lo) + w * gain
    w1 = np.clip(_over(root * above, (root + np.sqrt(a)) * fixed), 0.0, w)
    outside = w1 - _over(w1 * a, c - w1 * gain)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        log_c = np.logaddexp(np.log(others) - hi, log_w - width)
        root = np.exp(log_c / 2)
        below = (others * -np.expm1(-hi) + w * gain) / ((1 + root) * fixed)
        log_w2 = np.minimum(log_c / 2 + np.log(below), log_w)
        # w2/(c + w2 g) - w2; where both are zero all of the mass is at infinity.
        share = np.exp(log_c - log_w2)
        inside = np.where(log_c > -np.inf, 1 / (share + gain) - np.exp(log_w2), 1.0)
    inside = np.where((log_w > -np.inf) & (hi > 0), inside, 0.0)
    small = np.where(w > 0, np.minimum(width, 1.0) / 4, 0.0)
    return np.asarray(np.where(width < 1e-12, small, np.maximum(outside, inside)))


def _over(x: Array, y: Array) -> Array:
    """Return x/y, 0 where y is 0."""
    return np.where(y > 0, x / np.where(y > 0, y, 1.0), 0.0)


@without_floating_errors
def gap_bound(low: ArrayLike, high: ArrayLike, variance: ArrayLike | None = None) -> Float:
    """Return the most that ``ln E[exp(-eta)]`` can be for a mean of 0, a range and a variance.

    ``G = ln((b^2 exp(-v/b) + v exp(b))/(b^2 + v))`` with ``b = lo``, ``eta >= -b``, and
    ``v = min(variance, lo hi)``.

    Parameters
    ----------
    low, high : float or array
        ``-lo <= eta <= hi``, at least 0; infinity is allowed.
    variance : float or array, optional
        An upper bound of the variance of eta.

    Returns
    -------
    float or ndarray of float64
        At most ``(lo + hi)^2/8``, Hoeffding's lemma, at most
        ``ln(1 + (v/b^2)(exp(b) - 1 - b))``, Bennett's inequality, and at most lo.

    Raises
    ------
    TypeError, ValueError
        For values that are not real or negative.

    Notes
    -----
    Bennett (1962): among variables at most b of mean 0 and variance v the exponential moment is
    largest for two points, b and -v/b.  Bhatia and Davis: a mean of 0 leaves ``v <= lo hi``.

    Examples
    --------
    >>> round(gap_bound(1.0, 1.0), 6)  # ln cosh 1
    0.433781
    >>> round(gap_bound(1.0, 1.0, 0.25), 6) < 1 / 2
    True
    """
    b, top = _at_least_zero(low, "low"), _at_least_zero(high, "high")
    with np.errstate(over="ignore", invalid="ignore"):
        v = b * top
    v = np.where(np.isnan(v), 0.0, v)  # 0 times infinity: a mean of 0 leaves no variance
    if variance is not None:
        v = np.minimum(v, _at_least_zero(variance, "variance"))
    b, v = np.broadcast_arrays(b, v)
    usual = (b > SMALL) & (v > 0)
    b1, v1 = np.where(usual, b, 1.0), np.where(usual, v, 1.0)
    # p exp(b) + (1 - p) exp(-v/b) with p = v/(b^2 + v); p (b + v/b) = v/b.
    ratio = v1 / b1
    p = ratio / (b1 + ratio)
    width = b1 + ratio
    near = width < 1
    small = np.log1p(p * np.expm1(np.where(near, width, 0.0))) - ratio
    # b + ln(p + (1 - p) exp(-width)), with 1 - p = b/width.
    large = b1 + np.log(p + (b1 / width) * np.exp(-width))
    # Rounding aside G lies between 0 and v/2 exp(b), and below b.
    found = np.clip(np.where(near, small, large), 0.0, b1)
    # Without a bound of the other side, or of this one, all mass is at -lo in the limit.
    found = np.where(np.isinf(b1) | np.isinf(v1), b1, found)
    limit = v / 2 * (1 + b)  # b below 1e-6: ln E exp(-eta) <= v/2 (1 + b/3 + ...)
    return _result(np.where(usual, found, np.where(v > 0, limit, 0.0)))


def _bennett(b: Array, v: Array) -> Array:
    """Return ``ln(1 + (v/b^2)(exp(b) - 1 - b))``, by logarithms where b is large."""
    safe = np.maximum(b, SMALL)
    near = safe < 30.0
    small = np.where(near, safe, 1.0)
    # exp(b) - 1 - b, by its series where it would cancel.
    series = small**2 / 2 * (1 + small / 3 * (1 + small / 4 * (1 + small / 5 * (1 + small / 6))))
    rest = np.where(small < 0.02, series, np.expm1(small) - small)
    inner = np.where(b <= SMALL, v / 2 * (1 + b), v / small**2 * rest)
    with np.errstate(divide="ignore"):
        far = np.log(v) - 2 * np.log(safe) + safe + np.log1p(-(1 + safe) * np.exp(-safe))
    return np.asarray(np.where(near, np.log1p(inner), np.logaddexp(0.0, far)))


def _variation(kl: Array) -> Array:
    """Return the most that the total variation can be for a divergence."""
    return np.asarray(np.sqrt(np.minimum(kl / 2, -np.expm1(-kl))))


# --- regions ------------------------------------------------------------------------------------


class _Regions(NamedTuple):
    """Hold what is known of the keys of each region, in float64."""

    q0: Array
    kappa: Array
    bias: Array
    middle: Array  # kappa less the middle of the box of the keys
    half: Array  # half of the sides of the box
    radius: Array
    deviation: Array  # of the coordinates of k under lam
    trace: Array  # square root of the sum of their squares
    spread: Array  # a bound of the diameter of the values, 0 without values
    fuzz: Array  # rounding of kappa - k
    # Principal directions u_c of k under lam, (r, k, d); of u_c.(kappa - k_j) the middle and half
    # of the range, and the variance, (r, k); of the rest radius and bound of the variance, (r,).
    axes: Array
    axis_middle: Array
    axis_half: Array
    axis_variance: Array
    rest_radius: Array
    rest_variance: Array


def _pieces(sizes: Array, width: int) -> Iterator[slice]:
    """Yield runs of regions with so few keys together that their rows fit a temporary array."""
    most = max(1, CHUNK // max(width, 1))
    ends = np.cumsum(sizes)
    start = 0
    while start < len(sizes):
        before = ends[start] - sizes[start]
        stop = max(start + 1, int(np.searchsorted(ends, before + most, side="right")))
        yield slice(start, stop)
        start = stop


def _regions(ahat: PartitionedAttention, directions: int) -> _Regions:
    """Compute the statistics of all regions: one look at every key of each."""
    problem, layout = ahat.problem, ahat.layout
    r, d = len(layout.lo), problem.d
    q0 = np.asarray(ahat.q0, np.float64)
    kappa, middle, half, deviation = (np.zeros((r, d)) for _ in range(4))
    radius, trace, spread, fuzz = (np.zeros(r) for _ in range(4))
    bias = np.full(r, -np.inf)
    count = min(directions, d)
    axes = np.zeros((r, count, d))
    axis_middle, axis_half, axis_variance = (np.zeros((r, count)) for _ in range(3))
    rest_radius, rest_variance = np.zeros(r), np.zeros(r)
    found = _Regions(
        q0, kappa, bias, middle, half, radius, deviation, trace, spread, fuzz,
        axes, axis_middle, axis_half, axis_variance, rest_radius, rest_variance,
    )  # fmt: skip
    v = problem.v
    filled = np.flatnonzero(layout.nonempty)
    width = max(d, 0 if v is None else v.shape[1])
    for piece in _pieces(layout.sizes[filled], width):
        t = filled[piece]
        keys = layout.region_keys(t)
        starts, owner = keys.starts[:-1], keys.owner
        k = problem.k[keys.items].astype(np.float64)
        e = problem.scale * np.einsum("ij,ij->i", k, q0[t][owner])
        e -= np.maximum.reduceat(e, starts)[owner]
        w = np.exp(e)
        weight = np.add.reduceat(w, starts)
        lam = w / weight[owner]
        kappa = np.add.reduceat(lam[:, None] * k, starts)
        low, high = np.minimum.reduceat(k, starts), np.maximum.reduceat(k, starts)
        away = k - kappa[owner]
        found.kappa[t] = kappa
        entropy = np.log(weight) - np.add.reduceat(w * e, starts) / weight
        found.bias[t] = np.clip(entropy, 0.0, np.log(keys.sizes))
        found.middle[t] = kappa - (low + high) / 2
        found.half[t] = (high - low) / 2
        squares = away * away
        found.radius[t] = np.sqrt(np.maximum.reduceat(squares.sum(axis=1), starts))
        # Weights that underflow may meet an exponential that makes up for them.
        floored = np.maximum(lam, TINY)[:, None]
        variance = np.add.reduceat(floored * squares, starts)
        found.deviation[t] = np.sqrt(variance)
        found.trace[t] = np.sqrt(variance.sum(axis=1))
        # Sums of m and products of d terms, and weights that are off by the rounding of e; one key
        # is its own mean.
        reach = np.sqrt(np.maximum.reduceat(np.einsum("ij,ij->i", k, k), starts))
        size = 1 + abs(problem.scale) * np.linalg.norm(q0[t], axis=1) * reach
        found.fuzz[t] = np.where(keys.sizes > 1, 4 * EPS * (d + keys.sizes) * size * reach, 0.0)
        if count:
            _directions(found, t, keys.sizes, starts, np.sqrt(floored) * away, away)
        if v is not None:
            found.spread[t] = _spread(v[keys.items].astype(np.float64), starts)
    return found


def _directions(
    found: _Regions, t: Array, sizes: Array, starts: Array, weighted: Array, away: Array
) -> None:
    """Compute the principal directions of regions t, all of one size at a time.

    ``weighted`` holds ``sqrt(lam_j) (k_j - kappa)`` and ``away`` the same without weights.
    """
    d = away.shape[1]
    for m in np.unique(sizes[sizes > 1]):
        some = np.flatnonzero(sizes == m)
        place = starts[some][:, None] + np.arange(m)
        _, sigma, axes = np.linalg.svd(weighted[place], full_matrices=False)
        k = min(found.axes.shape[1], axes.shape[1])
        axes, squares = axes[:, :k], sigma**2
        points = np.einsum("tjd,tcd->tjc", -away[place], axes)
        low, high = points.min(axis=1), points.max(axis=1)
        where = t[some]
        found.axes[where, :k] = axes
        found.axis_middle[where, :k], found.axis_half[where, :k] = (
            (low + high) / 2,
            (high - low) / 2,
        )
        # Singular values are off by the rounding of the largest one.
        slack = 4 * EPS * (d + m) * squares.sum(axis=1)
        found.axis_variance[where, :k] = squares[:, :k] + slack[:, None]
        found.rest_variance[where] = slack + (squares[:, k] if squares.shape[1] > k else 0.0)
        rest = away[place] + np.einsum("tjc,tcd->tjd", points, axes)
        found.rest_radius[where] = np.sqrt(np.einsum("tjd,tjd->tj", rest, rest).max(axis=1))


def _spread(v: Array, starts: Array) -> Array:
    """Return for each run of rows a bound of the distance of any two of them.

    The smaller of the diagonal of their box and of twice the radius about its middle.
    """
    low, high = np.minimum.reduceat(v, starts), np.maximum.reduceat(v, starts)
    sizes = np.diff(np.append(starts, len(v)))
    away = v - np.repeat((low + high) / 2, sizes, axis=0)
    radius = np.sqrt(np.maximum.reduceat(np.einsum("ij,ij->i", away, away), starts))
    return np.asarray(np.minimum(2 * radius, np.linalg.norm(high - low, axis=1)))


# --- certificates -------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class RowCertificates(Worded):
    """Hold upper bounds of the errors of rows.

    Attributes
    ----------
    tv : ndarray (n_q,)
        At least ``(1/2)|Ahat_i - A_i|_1``, in [0, 1]: the smallest of ``bounds``.
    kind : ndarray of str (n_q,)
        Which of them it is, a key of ``bounds``; "mixture" where Ahat is an average.
    bounds : dict from str to ndarray (n_q,)
        "range" (box and ball of the keys, mass on regions), "hoeffding" and "bennett" (divergence),
        "gap" (divergence by the sharp gap), "split" (mass and local error apart).
    kl : ndarray (n_q,)
        At least ``KL(Ahat_i | A_i)``; may be infinite.
    output : ndarray (n_q,) or None
        At least ``|ohat_i - o_i|_2``; None without values.
    """

    tv: Array
    kind: Array
    bounds: dict[str, Array]
    kl: Array
    output: Array | None

    _brief = ("tv", "output")

    def _title(self) -> str:
        names, counts = np.unique(self.kind, return_counts=True)
        best = ", ".join(f"{name} {count}" for name, count in zip(names, counts, strict=True))
        return f"upper bounds of {counted(len(self.tv), 'row')}; the smallest is: {best}"

    def _phrases(self) -> list[Phrase]:
        about = {
            "tv": "total variation (1/2)|Ahat_i - A_i|_1: median and largest over rows",
            "kl": "divergence KL(Ahat_i | A_i): the same",
            "output": "|ohat_i - o_i|_2: the same",
        }
        arrays = ((name, getattr(self, name)) for name in about)
        return [
            Phrase(name, f"{number(float(np.median(x)))}..{number(float(x.max()))}", about[name])
            for name, x in arrays
            if x is not None and len(x)
        ]


@without_floating_errors
def certify_rows(ahat: AttentionOperator, *, directions: int = 16) -> RowCertificates:
    """Bound the error of every row of structured attention, deterministically and without A.

    ``TV_i = (1/2)|Ahat_i - A_i|_1`` and ``|ohat_i - o_i|_2`` from statistics of regions only: box,
    radius and variances of the keys, range of the values.

    Parameters
    ----------
    ahat : PartitionedAttention or MixtureAttention
        Of a rule whose log-ratio error is bilinear (``ahat.bilinear``): expected key and entropy
        bias of the same reference query, no second-order term.  Of a mixture all parts.
    directions : int
        How many principal directions of the keys of each region are used beside box and ball, at
        least 0; d and more are all of them, and variances are then exact.

    Returns
    -------
    RowCertificates
        ``tv`` and ``kind`` (n_q,), and what else was found.

    Raises
    ------
    TypeError
        For other operators, and ``directions`` that is no integer.
    ValueError
        For rules for which no such bound is known, and negative ``directions``.

    Notes
    -----
    ``O(n_q r d (1 + directions))`` operations for r regions a row, beside the direct logits, and a
    singular value decomposition of the keys of each region; never n_q x n_k.  What is bounded is
    the matrix in exact arithmetic, from the inputs as they are: ranges are widened by the rounding
    of this computation in float64; what a float32 operator rounds comes on top.

    By the box and the ball ``eta`` lies between ``x.m - |x|.h`` and ``x.m + |x|.h``, and between
    ``-|x| rad`` and ``|x| rad``, with ``x = scale (q_i - q0_t)``, m and h the middle of the box of
    ``kappa - k_j`` and half of its sides.  Its variance is at most ``(|x|.sd)^2`` and
    ``|x|^2 sum sd^2`` with the deviations sd of the coordinates, and at most ``lo hi``.  The same
    along principal directions, with a ball and the next eigenvalue for what is orthogonal to them:
    ``x^T Cov x <= sum_c s_c^2 (u_c.x)^2 + s^2 |x_rest|^2``.  The least of all counts.

    For outputs, with mass error ``m_i = 1 - exp(-KL_i)`` and local errors ``c_t`` times the spread
    of values, ``|ohat_i - o_i| <= min(TV_i D, m_i D + sum_t pi_i(t) c_t)``, D the diameter of all
    values and ``pi_i(t) <= rho_i(t) exp(G_t)``.  Mixtures: all errors are convex.  Derived; see the
    chapter on Combiner, which also says how loose they are.

    Examples
    --------
    >>> import numpy as np, sketchattn as sa
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 64, 8))
    >>> problem = sa.AttentionProblem(0.1 * q, k, v)
    >>> ahat = sa.Combiner("fixed", block=8).approximate(problem)
    >>> found = certify_rows(ahat)
    >>> truth = abs(ahat.to_dense() - problem.exact.to_dense()).sum(axis=1) / 2
    >>> bool((truth <= found.tv).all()), bool(found.tv.max() < 0.5)
    (True, True)
    """
    if isinstance(directions, bool | np.bool_) or not isinstance(directions, int | np.integer):
        raise TypeError(
            f"directions must be an integer, got {type(directions).__name__}; 16 is usual"
        )
    if directions < 0:
        raise ValueError(f"directions must be at least 0, got {directions}; 16 is usual")
    if isinstance(ahat, MixtureAttention):
        return _mixture(ahat, int(directions))
    if not isinstance(ahat, PartitionedAttention):
        raise TypeError(
            f"ahat must be a PartitionedAttention, got {type(ahat).__name__}; make one with "
            f"sketchattn.Combiner, or use sketchattn.certify on outputs of any method"
        )
    if not (ahat.bilinear and ahat.lower_bound):
        raise ValueError(
            f"ahat must have a bilinear error and Zhat <= Z for certificates, got {_why(ahat)}; "
            f"use key='expected', bias='entropy' and second_order='none'"
        )
    from ..kernels._threads import blas_single_thread

    with blas_single_thread():  # the same bits for any number of threads
        return _certify(ahat, int(directions))


def _why(ahat: PartitionedAttention) -> str:
    rule = ahat.rule
    if rule.second_order != "none":
        return f"second_order={rule.second_order!r}, which gives up the bound of Zhat"
    if rule.key != "expected" or rule.bias != "entropy":
        return f"key={rule.key!r} and bias={rule.bias!r}, which do not belong to one lam"
    return "a plan that covers some keys twice"


def _mixture(ahat: MixtureAttention, directions: int) -> RowCertificates:
    parts = [certify_rows(part, directions=directions) for part in ahat.parts]
    weights = [float(w) for w in ahat.weights]

    def mean(arrays: list[Array]) -> Array:
        return np.asarray(sum(w * x for w, x in zip(weights, arrays, strict=True)))

    outputs = [part.output for part in parts if part.output is not None]
    return RowCertificates(
        mean([part.tv for part in parts]),
        np.full(ahat.shape[0], "mixture"),
        {name: mean([part.bounds[name] for part in parts]) for name in KINDS},
        mean([part.kl for part in parts]),
        mean(outputs) if len(outputs) == len(parts) else None,
    )


class _Slots(NamedTuple):
    """Hold what is known of pairs of a row and a region: range, variance, log mass."""

    region: Array
    low: Array
    high: Array
    variance: Array
    log_mass: Array


def _slots(
    rows: Array, regions: Ragged, known: _Regions, q: Array, scale: float, log_mass: Array
) -> _Slots:
    """Bound eta of the regions of some rows."""
    t = regions.items
    x = scale * (q[rows[regions.owner]] - known.q0[t])
    size = np.abs(x)
    middle = np.einsum("ij,ij->i", x, known.middle[t])
    half = np.einsum("ij,ij->i", size, known.half[t])
    length = np.sqrt(np.einsum("ij,ij->i", x, x))
    ball = length * known.radius[t]
    low, high = np.minimum(half - middle, ball), np.minimum(half + middle, ball)
    deviation = np.einsum("ij,ij->i", size, known.deviation[t])
    variance = np.minimum(deviation, length * known.trace[t]) ** 2
    if known.axes.shape[1]:
        along = _along(x, t, known.axes)
        size, squares = np.abs(along), along * along
        rest = np.maximum(length**2 - squares.sum(axis=1), 0.0)
        middle = np.einsum("ij,ij->i", along, known.axis_middle[t])
        half = (
            np.einsum("ij,ij->i", size, known.axis_half[t]) + np.sqrt(rest) * known.rest_radius[t]
        )
        low, high = np.minimum(low, half - middle), np.minimum(high, half + middle)
        exact = np.einsum("ij,ij->i", squares, known.axis_variance[t])
        variance = np.minimum(variance, exact + rest * known.rest_variance[t])
    fuzz = length * known.fuzz[t]
    low, high = np.maximum(low, 0.0) + fuzz, np.maximum(high, 0.0) + fuzz
    return _Slots(t, low, high, np.minimum(variance, low * high), log_mass)


def _along(x: Array, t: Array, axes: Array) -> Array:
    """Return ``u_c . x_s`` for the directions of region ``t[s]``, (s, k)."""
    order = np.argsort(t, kind="stable")
    names, starts = np.unique(t[order], return_index=True)
    ordered, out = x[order], np.empty((len(t), axes.shape[1]))
    for name, start, end in zip(names, starts, [*starts[1:], len(t)], strict=True):
        out[start:end] = ordered[start:end] @ axes[name].T
    back = np.empty_like(out)
    back[order] = out
    return back


def _certify(ahat: PartitionedAttention, directions: int) -> RowCertificates:
    problem, layout = ahat.problem, ahat.layout
    q, k = (np.ascontiguousarray(x, np.float64) for x in (problem.q, problem.k))
    known = _regions(ahat, directions)
    data = Data(q, k, q, known.kappa, known.bias * LOG2E, problem.scale)
    n_q, reach = problem.n_q, 0.0
    if problem.v is not None and len(problem.kept_keys):
        values = problem.v[problem.kept_keys].astype(np.float64)
        reach = float(_spread(values, np.zeros(1, np.int64))[0])
    bounds = {name: np.zeros(n_q) for name in KINDS}
    kl, output = np.zeros(n_q), np.zeros(n_q)
    step = max(1, CHUNK // max(layout.slot_bound * max(problem.d, 1), 1))
    for first in range(0, n_q, step):
        rows = np.arange(first, min(first + step, n_q))
        direct, regions = layout.slots(rows)
        if not len(regions.items):
            continue
        logits = slot_logits(data, rows, direct, regions)[:2]
        log_mass = _log_mass(direct, regions, *logits)
        seen = _slots(rows, regions, known, q, problem.scale, log_mass)
        for name, found in _of_rows(seen, regions, known, reach).items():
            target = {"kl": kl, "output": output}.get(name, bounds.get(name))
            assert target is not None  # names of both are those of the mapping
            target[rows] = found
    stacked = np.stack([np.minimum(bounds[name], 1.0) for name in KINDS])
    best = np.argmin(stacked, axis=0)
    tv = stacked[best, np.arange(n_q)]
    return RowCertificates(
        tv,
        np.asarray(KINDS)[best],
        dict(zip(KINDS, stacked, strict=True)),
        kl,
        None if problem.v is None else np.minimum(output, tv * reach),
    )


def _log_mass(direct: Ragged, regions: Ragged, d_logits: Array, r_logits: Array) -> Array:
    """Return the log share of regions (s,) in their rows, from base-2 logits of all slots.

    From differences of logits: the normaliser of a row, rounded, is off by far more where logits
    are large.
    """
    top = np.full(len(regions), -np.inf)
    np.maximum.at(top, direct.owner, d_logits)
    np.maximum.at(top, regions.owner, r_logits)
    total = np.zeros(len(regions))
    np.add.at(total, direct.owner, np.exp2(d_logits - top[direct.owner]))
    away = r_logits - top[regions.owner]
    np.add.at(total, regions.owner, np.exp2(away))
    out: Array = away / LOG2E - np.log(total)[regions.owner]
    return out


def _of_rows(seen: _Slots, regions: Ragged, known: _Regions, reach: float) -> dict[str, Array]:
    """Return the bounds of rows from those of their regions."""
    some = np.flatnonzero(regions.sizes)
    starts = regions.starts[:-1][some]
    count = len(regions)

    def spread_out(x: Array) -> Array:
        out = np.zeros(count)
        out[some] = x
        return out

    def total(x: Array) -> Array:
        return np.add.reduceat(x, starts)

    def largest(x: Array) -> Array:
        return np.maximum.reduceat(x, starts)

    owner = np.repeat(np.arange(len(some)), regions.sizes[some])
    mass = np.exp(seen.log_mass)
    width = seen.low + seen.high

    def divergence(gap: Array) -> Array:
        """Return ``ln(1 + sum rho (exp(G) - 1))``, without overflow and without a cap."""
        top = largest(seen.log_mass + gap)
        shift = np.where(top > 100.0, top, 0.0)
        small = np.where(gap < 30, mass * np.expm1(np.minimum(gap, 30.0)), 0.0)
        away = shift[owner]
        large = np.exp(seen.log_mass + gap - away) - np.exp(seen.log_mass - away)
        inner = total(np.where(away == 0.0, np.where(gap < 30, small, large), large))
        return np.where(shift == 0.0, np.log1p(inner), shift + np.log(np.exp(-shift) + inner))

    gap = np.asarray(gap_bound(seen.low, seen.high, seen.variance))
    by_gap = divergence(gap)
    # Regions without a range are as good as direct keys.
    with np.errstate(invalid="ignore"):
        log_tilted = np.where(width > 0, seen.log_mass, -np.inf)
        peak = largest(log_tilted)
        tilted = peak + np.log(total(np.exp(log_tilted - peak[owner])))
    tilted = np.where(peak > -np.inf, np.minimum(tilted, 0.0), -np.inf)
    local = np.minimum(np.tanh(width / 4), _variation(gap))
    moved = -np.expm1(-by_gap)
    found = {
        "range": _mass_aware(tilted, largest(seen.high), largest(seen.low)),
        "hoeffding": _variation(divergence(width**2 / 8)),
        "bennett": _variation(divergence(_bennett(seen.low, seen.variance))),
        "gap": _variation(by_gap),
        "split": moved + total(mass * local),
        "kl": by_gap,
    }
    cost = local * known.spread[seen.region]
    with np.errstate(over="ignore"):
        most = np.minimum(np.exp(seen.log_mass + gap), 1.0)
    inside = np.minimum(total(most * cost), total(mass * cost) + moved * largest(cost))
    found["output"] = moved * reach + inside
    return {name: spread_out(x) for name, x in found.items()}
