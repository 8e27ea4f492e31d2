"""Certificates: how wrong an output is, whoever made it, from exact rows at a random sample.

The unknown is ``theta = |Ohat - O|_F / |O|_F``.  For a row i that sees a key let
``x_i = |ohat_i - o_i|^2`` and ``y_i = |o_i|^2``, so that ``theta^2 = sum_i x_i / sum_i y_i``.
Rows that see no key are known without computing: ``o_i = 0``.

**What is known of a row before it is computed.**  ``o_i`` is a convex combination of visible
values, hence ``o_i = c + e`` with ``|e| <= R_i``, where c is the mean of the values and R_i the
largest distance of a visible value from it.  For a candidate t put ``z_i(t) = x_i - t y_i``;
``sum_i z_i(t)`` is positive exactly for ``t < theta^2``.  With ``kappa = 1 - t``,

    z_i(t) = |ohat_i - c|^2 - t |c|^2 + 2 e . (kappa c - ohat_i) + kappa |e|^2,

whose extremes over the ball are ``l_i(t) <= z_i(t) <= u_i(t)`` in closed form (``lowest``,
``highest``).  For t < 1 the lower one is at least ``-t/(1-t) |ohat_i|^2``, with no hull at all.

**The sample.**  Row after row is drawn without replacement, each time with probabilities
proportional to weights w among the rows that are left.  Let ``f_i >= 0`` have an unknown total
over all rows, and let W_k be the weight left before draw k.  Then ``D_k = W_k f_{i_k} / w_{i_k}``
has the conditional mean ``sum of f over the rows that are left``.  If the total is at most M,
this is at most ``mu_k = M - (sum of f seen before)``, and for predictable bets ``0 <= b_k <= 1``

    C_k = prod_{j <= k} (1 - b_j + b_j D_j / mu_j)

is a nonnegative supermartingale that starts at 1.  By Ville's inequality it ever reaches
``1/delta`` with probability at most delta.  This is the betting test of Waudby-Smith and Ramdas
(2024, "Estimating means of bounded random variables by betting", section 5) with the weighted
draws of Shekhar, Xu, Lipton, Liang and Ramdas (2023, "Risk-limiting financial audits via weighted
sampling without replacement"); it needs one side of the range only.

**The interval.**  ``theta^2 >= t`` means ``sum (u_i - z_i) <= sum u_i``, and ``theta^2 <= t`` means
``sum (z_i - l_i) <= -sum l_i``: both have the form above with f >= 0.  They are tested on the
lattice ``theta = 2^(j/64)``, which no data chose, from above: first the octaves ``2^J``, each at
the level delta/16, until one is not rejected; then all points below the last octave that was, at
15 delta/16.  The upper end is the last point of this sequence of rejections.  If it lies below
theta, then a true hypothesis was rejected that no data chose either: that of the largest octave
below theta if this was reached, else that of the largest lattice point below theta.  The
probability is at most delta, and no monotonicity is used.  The lower end is the mirror image;
each has ``delta = (1 - confidence) / 2``.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .draws import Rng, as_generator
from .problem import AttentionProblem, as_array, closest, float_dtype

Array = NDArray[Any]

KINDS = ("finite-sample", "approximate")

EPS = float(np.finfo(np.float64).eps)
TINY = float(np.finfo(np.float64).tiny)

# Rows and keys of the tile of logits that one thread holds: 2 MB in float64.
ROW_TILE = 256
KEY_TILE = 1024
# The lattice of candidates, points an octave of theta; ends are rounded outwards to it.
POINTS = 64
# Lattice points between two candidates at which all rows are bounded.
CELL = 16
# Share of the error probability that is spent on the octaves, which only narrow the search.
COARSE = 1 / 16
OCTAVES = 4  # that are tested at once
# Entries of the arrays (candidates, rows) that are handled at once.
BLOCK_ENTRIES = 1 << 14
# Largest factor of a bet that is put at stake: a row at the very end of its range costs the
# capital all but a hundredth, and not all of it.
LARGEST_BET = 0.99
# Candidates are at most 2^240, so that their fourth powers are finite.
LARGEST_OCTAVE = 240
LARGEST_OUTPUT = 2.0**200
# Relative slack of the ball and of hypothesised totals.  It stands for the rounding of exact rows
# and of sums in float64, n 2^-53 relative at worst.
SLACK = 1e-10


@dataclass(frozen=True)
class ErrorCertificate:
    """Record an interval for ``theta = |Ohat - O|_F / |O|_F``.

    Attributes
    ----------
    estimate : float
        Ratio estimate of theta from the sampled rows.
    low, high : float
        Ends of the interval, ``low <= estimate <= high``; ``high`` may be infinite.
    rows : int
        Rows that were computed exactly; n_q where all of them are known.
    confidence : float
        Probability, over the draw of the rows, that the interval holds theta.
    kind : str
        ``"finite-sample"``, ``"approximate"``, or ``"exact"`` where nothing was left to chance.
    """

    estimate: float
    low: float
    high: float
    rows: int
    confidence: float
    kind: str

    def as_dict(self) -> dict[str, float | int | str]:
        """Return the fields by name, in order."""
        return asdict(self)


# --- exact rows -----------------------------------------------------------------------------


def exact_rows(problem: AttentionProblem, index: Array, factor: float = 1.0) -> Array:
    """Return rows ``index`` of ``factor`` times the exact output, float64 (len(index), d_v).

    ``o_i = sum_j exp(L_ij - m_i) v_j / sum_j exp(L_ij - m_i)`` over the visible keys.  Tiles
    of keys are split over threads and merged in order, each on one BLAS thread, so that no bit
    depends on the number of threads.  NumPy's BLAS and a merge of its own: of the kernels whose
    outputs may be the ones to certify only the exponential is shared.
    """
    from .kernels._threads import blas_single_thread, thread_count
    from .kernels.softmax import LOG2E, online_softmax

    masked = problem.key_mask is not None
    kept = problem.kept_keys
    k = problem.k[kept] if masked else problem.k
    v = problem.values[kept] if masked else problem.values
    out = np.zeros((len(index), v.shape[1]))

    def tile(q: Array, last: Array, start: int) -> tuple[Array, Array, Array]:
        """Return the row maxima, the masses and the weighted sums of values of one tile."""
        part = slice(start, start + KEY_TILE)
        with np.errstate(over="ignore", invalid="ignore"):  # each thread has its own
            logits = q @ k[part].astype(np.float64).T
            if problem.causal:
                np.copyto(logits, -np.inf, where=kept[part] > last[:, None])
            top, mass = np.full(len(q), -np.inf), np.zeros(len(q))
            online_softmax(logits, top, mass, np.empty((len(q), 0)))
            values = v[part].astype(np.float64)
            values *= factor
            return top, mass, logits @ values

    # Logits of float64 inputs may overflow; the caller refuses rows that are not finite.
    with (
        np.errstate(over="ignore", invalid="ignore"),
        blas_single_thread(),
        ThreadPoolExecutor(thread_count()) as pool,
    ):
        for first in range(0, len(index), ROW_TILE):
            rows = index[first : first + ROW_TILE]
            q = problem.scale * LOG2E * problem.q[rows].astype(np.float64)  # logits in base 2
            solve = partial(tile, q, rows + problem.offset)
            top = np.full(len(rows), -np.inf)
            total = np.zeros(len(rows))
            sums = np.zeros((len(rows), v.shape[1]))
            for high, mass, part in pool.map(solve, range(0, len(k), KEY_TILE)):
                both = np.maximum(top, high)
                level = np.where(both == -np.inf, 0.0, both)
                old, new = np.exp2(top - level), np.exp2(high - level)
                total = old * total + new * mass
                sums = old[:, None] * sums + new[:, None] * part
                top = both
            np.divide(
                sums, total[:, None], out=out[first : first + ROW_TILE], where=total[:, None] != 0
            )
    return out


# --- what is known of every row -------------------------------------------------------------


class Known(NamedTuple):
    """What is known of the rows that see a key before any is computed; arrays (m,), float64.

    ``output`` (n_q, d_v): as handed in; ``factor``: the power of two that it, values and exact
    rows are multiplied by; ``rows``: those that see a key; ``square``: ``|ohat_i|^2``;
    ``distance``: ``|ohat_i - c|``; ``near``: its square; ``along``: ``c . (ohat_i - c)``;
    ``radius``: ``R_i``; ``centre``: ``|c|``; ``fixed``: the sum of ``|ohat_i|^2`` over the rows
    that see no key.
    """

    output: Array
    factor: float
    rows: Array
    square: Array
    distance: Array
    near: Array
    along: Array
    radius: Array
    centre: float
    fixed: float


def _squares(x: Array) -> Array:
    square: Array = np.einsum("ij,ij->i", x, x)
    return square


def _around(x: Array, centre: Array, factor: float) -> tuple[Array, Array, Array]:
    """Return ``|x_i|^2``, ``|x_i - c|^2`` and ``c . (x_i - c)`` of rows times factor, (len(x),)."""
    square, near, along = np.empty((3, len(x)))
    for start in range(0, len(x), ROW_TILE):  # in cache, and no copy of the whole
        part = slice(start, start + ROW_TILE)
        block = x[part].astype(np.float64)
        block *= factor
        square[part] = _squares(block)
        block -= centre
        near[part] = _squares(block)
        along[part] = np.einsum("ij,j->i", block, centre)
    return square, near, along


def know(problem: AttentionProblem, output: Array, factor: float = 1.0) -> Known:
    """Return what is known of every row of ``output`` (n_q, d_v), which is finite."""
    counts = problem.visible_counts()
    values = problem.values if problem.key_mask is None else problem.values[problem.kept_keys]
    values = values[: counts.max()]  # keys that some row sees
    centre = (values if factor == 1.0 else factor * values).mean(axis=0, dtype=np.float64)
    size = math.sqrt(float(centre @ centre))
    # Row i sees the first counts_i of the keys that are kept.
    radius = np.maximum.accumulate(np.sqrt(_around(values, centre, factor)[1]))
    square, near, along = _around(output, centre, factor)
    seen = counts > 0
    radius = radius[counts[seen] - 1]
    return Known(
        output=output,
        factor=factor,
        rows=np.flatnonzero(seen),
        square=square[seen],
        distance=np.sqrt(near[seen]),
        near=near[seen],
        along=along[seen],
        radius=radius + SLACK * (radius + size),
        centre=size,
        fixed=float(square[~seen].sum()),
    )


def _reach(known: Known, t: float) -> tuple[Array, Array]:
    """Return ``|ohat_i - kappa c| = |(ohat_i - c) + t c|``, and its square rounded down."""
    square = known.near + (t * known.centre) ** 2
    noise = 16 * EPS * square
    square += 2 * t * known.along
    # Where the sum cancels its root is accurate to sqrt(eps) only; too long is on the safe side.
    return np.sqrt(np.maximum(square, 0.0) + noise), square - noise


def highest(known: Known, t: float) -> Array:
    """Return ``u_i(t) = max z_i(t)`` over the ball, (m,).

    ``e`` of length r along ``kappa c - ohat_i``, at distance alpha, gives
    ``|ohat_i - c|^2 - t |c|^2 + 2 alpha r + kappa r^2``, ``0 <= r <= R_i``.
    """
    kappa = 1.0 - t
    alpha, _ = _reach(known, t)
    r = known.radius if kappa >= 0 else np.minimum(known.radius, alpha / -kappa)
    bend = r * (2 * alpha + kappa * r)
    u: Array = (1 + SLACK) * (known.near + bend) - (1 - SLACK) * t * known.centre**2
    return u


def lowest(known: Known, t: float) -> Array:
    """Return ``l_i(t) <= min z_i(t)`` over the ball, (m,).

    The minimum is at least ``-t/(1 - t) |ohat_i|^2``, and if ``alpha >= kappa R_i`` it is at the
    surface: ``(|ohat_i - c| - R_i)^2 + 2 R_i (|ohat_i - c| - alpha) - t (|c|^2 + R_i^2)``.
    """
    kappa = 1.0 - t
    alpha, square = _reach(known, t)
    radius, distance, centre = known.radius, known.distance, known.centre
    outside = square >= (kappa * radius) ** 2 if kappa > 0 else None
    if outside is not None and not outside.any():
        return -(1 + SLACK) * t / kappa * known.square
    # distance - alpha without cancellation, so that small t keep their digits.
    less = -t * (2 * known.along + t * centre**2) / np.maximum(distance + alpha, TINY)
    near, bend, far = (distance - radius) ** 2, 2 * radius * less, t * (centre**2 + radius**2)
    surface: Array = near + bend - far - SLACK * (near + np.abs(bend) + far)
    if outside is None:
        return surface
    return np.where(outside, surface, -(1 + SLACK) * t / kappa * known.square)


# --- the sample -----------------------------------------------------------------------------


class Sample(NamedTuple):
    """Rows in the order of their draw: positions in ``Known`` and what is computed there.

    ``position`` int64 (n,); ``leverage``: ``W_k / w_{i_k}``; ``inclusion``: the probability that
    a row is drawn, given the draws of the others; ``x``, ``y``: ``|ohat_i - o_i|^2``, ``|o_i|^2``.
    """

    position: Array
    leverage: Array
    inclusion: Array
    x: Array
    y: Array


def weigh(known: Known) -> Array:
    """Return the weights of the draw, (m,): half by the width of the range of x_i, half alike.

    Rows that can be far off are worth more of the sample; the even half bounds by 2 what this
    may cost.
    """
    a, b = _error_range(known)
    width = b - a
    mean = float(width.mean())
    return 1.0 + width / mean if mean > 0 else np.ones(len(width))


def draw(known: Known, rows: int, rng: np.random.Generator) -> tuple[Array, Array, Array]:
    """Draw ``rows < m`` rows in turn without replacement; return position, leverage, inclusion.

    Independent exponential times of rate w_i, in ascending order, are such a sequence.  Given
    the times of the others, row i is among the first n if its time is below the (n + 1)-st, tau:
    its probability ``1 - exp(-w_i tau)`` makes ``sum_sample x_i / inclusion_i`` unbiased (Cohen
    and Kaplan 2007, "Summarizing data using bottom-k sketches", rank conditioning).
    """
    weights = weigh(known)
    times = rng.exponential(size=len(weights)) / weights
    first = np.argpartition(times, rows)[: rows + 1]
    first = first[np.argsort(times[first], kind="stable")]
    position, tau = first[:rows], times[first[rows]]
    drawn = weights[position]
    left = weights.copy()
    left[position] = 0.0
    # Sums of positive numbers from the last draw backwards: nothing cancels.
    remaining = left.sum() + np.cumsum(drawn[::-1])[::-1]
    return position, remaining / drawn, -np.expm1(-drawn * tau)


def _error_range(known: Known) -> tuple[Array, Array]:
    """Return ``a_i <= x_i <= b_i``, both (m,)."""
    return (
        np.maximum(known.distance - known.radius, 0.0) ** 2,
        (known.distance + known.radius) ** 2,
    )


def _certain(known: Known, sample: Sample) -> tuple[float, float]:
    """Return bounds of ``theta^2`` that hold whatever the rows outside the sample are."""
    a, b = _error_range(known)
    g = np.maximum(known.centre - known.radius, 0.0) ** 2
    h = (known.centre + known.radius) ** 2
    for bound in (a, b, g, h):
        bound[sample.position] = 0.0
    x = known.fixed + float(sample.x.sum())
    y = float(sample.y.sum())
    low = _quotient(x + float(a.sum()), y + float(h.sum()))
    return low, _quotient(x + float(b.sum()), y + float(g.sum()))


def _quotient(x: float, y: float) -> float:
    """Return ``x / y``, with 0 for 0/0 and inf for other divisions by zero."""
    if x == 0.0:
        return 0.0
    return x / y if y > 0.0 else math.inf


def _estimate(known: Known, sample: Sample) -> float:
    """Return the ratio estimate of ``theta^2``."""
    x = known.fixed + float((sample.x / sample.inclusion).sum())
    return _quotient(x, float((sample.y / sample.inclusion).sum()))


# --- the finite-sample interval -------------------------------------------------------------


def rejects(f: Array, leverage: Array, total: Array, delta: float) -> Array:
    """Say which of T hypotheses "the total of f is at most M" are rejected at level delta.

    Parameters
    ----------
    f : ndarray (T, n)
        Values ``f >= 0`` of the drawn rows in the order of the draw, one line a hypothesis.
    leverage : ndarray (n,)
        ``W_k / w_{i_k}``.
    total : ndarray (T,)
        M of each hypothesis.
    delta : float
        Probability of rejecting a true hypothesis, at most.

    Notes
    -----
    Bets are those of Waudby-Smith and Ramdas (2024) for a fixed number of draws, for the ratio
    ``rho_k = D_k / mu_k`` whose mean is at most 1: ``b_k = sqrt(2 log(1/delta) / (n v_{k-1}))``
    at most 0.99, with a variance of the past that starts from one value of 1/4.
    """
    n = f.shape[1]
    seen = np.cumsum(f, axis=1)
    # The total that the hypothesis leaves before draw k; below zero it is refuted outright.
    mu = (total[:, None] - seen) + f
    refuted = (mu <= 0).any(axis=1) | (total < seen[:, -1])
    rho = leverage * f
    rho /= np.where(mu > 0, mu, 1.0)
    count = np.arange(1.0, n + 1)
    spread = rho - (1.0 + np.cumsum(rho, axis=1) - rho) / count
    spread *= spread
    variance = (0.25 + np.cumsum(spread, axis=1) - spread) / count
    # No spread at all, or a negative one from rounding, is the largest bet.
    variance = np.maximum(variance, -2.0 * math.log(delta) / n)
    bet = np.minimum(np.sqrt(-2.0 * math.log(delta) / n / variance), LARGEST_BET)
    rho -= 1.0
    # Overflow is beyond every threshold; a capital that underflows to zero stays there.
    with np.errstate(over="ignore", under="ignore"):
        capital = np.cumprod(1.0 + bet * rho, axis=1)
    rejected: Array = refuted | (capital.max(axis=1) >= 1.0 / delta)
    return rejected


def _squared(j: Array) -> Array:
    """Return ``t = theta^2`` at lattice points."""
    t: Array = np.exp2(2.0 / POINTS * j)
    return t


def _lattice(t: float, up: bool) -> int:
    """Return the lattice point next to ``sqrt(t)`` on one side, within the range kept finite."""
    limit = LARGEST_OCTAVE * POINTS
    if t == 0.0 or math.isinf(t):
        return -limit if t == 0.0 else limit
    j = 0.5 * POINTS * math.log2(t)
    return max(-limit, min(limit, math.ceil(j) if up else math.floor(j)))


def _rejected(known: Known, sample: Sample, delta: float, upper: bool, points: Array) -> Array:
    """Say which lattice points (T,), in order, are rejected: ``theta >= 2^(j/64)`` or ``<=``.

    u_i is convex in t and l_i concave, as extremes of functions that are linear in t: between
    two candidates at which all rows are bounded, the chord is a bound as well.
    """
    bound, sign = (highest, 1.0) if upper else (lowest, -1.0)
    nodes = np.unique([points // CELL, -(-points // CELL)])
    at = _squared(CELL * nodes)
    drawn, totals = np.empty((len(nodes), len(sample.x))), np.empty(len(nodes))
    for g, t in enumerate(at):
        every = bound(known, float(t))
        drawn[g], totals[g] = every[sample.position], every.sum()
    before = np.searchsorted(nodes, points // CELL)
    after = np.searchsorted(nodes, -(-points // CELL))
    t = _squared(points)
    share = (t - at[before]) / np.where(after > before, at[after] - at[before], 1.0)
    total = totals[before] + share * (totals[after] - totals[before]) + known.fixed
    f = drawn[before] + share[:, None] * (drawn[after] - drawn[before])
    f -= sample.x - t[:, None] * sample.y
    # Rounding may leave a value at the end of its range slightly outside.
    f = np.maximum(sign * f, 0.0)
    total = sign * total + SLACK * np.abs(total)
    return rejects(f, sample.leverage, total, delta)


def _run(test: Callable[[Array], Array], points: Array, block: int) -> int:
    """Return how many points are rejected before the first that is not."""
    for start in range(0, len(points), block):
        rejected = test(points[start : start + block])
        if not rejected.all():
            return start + int(np.argmin(rejected))
    return len(points)


def _last_rejected(
    known: Known, sample: Sample, delta: float, upper: bool, start: int, stop: int
) -> int | None:
    """Return the last lattice point such that all from ``start`` to it are rejected."""
    step = -1 if upper else 1
    block = max(CELL, min(POINTS, BLOCK_ENTRIES // len(sample.x)))

    def run(points: Array, level: float, block: int) -> int | None:
        test = partial(_rejected, known, sample, level, upper)
        count = _run(test, points, block)
        return int(points[count - 1]) if count else None

    octaves = np.arange(start, stop + step, step)
    octaves = octaves[octaves % POINTS == 0]
    coarse = run(octaves, COARSE * delta, OCTAVES)
    begin = start if coarse is None else coarse + step
    fine = run(np.arange(begin, stop + step, step), (1.0 - COARSE) * delta, block)
    return coarse if fine is None else fine


def finite_sample(known: Known, sample: Sample, delta: float) -> tuple[float, float]:
    """Return an interval for ``theta^2`` whose ends each fail with probability at most delta."""
    low, high = _certain(known, sample)
    bottom, top = _lattice(low, up=False), _lattice(high, up=True)
    # No error and none that is certain: nothing above zero can be refuted.
    above = None if low == 0.0 else _last_rejected(known, sample, delta, False, bottom, top)
    below = _last_rejected(known, sample, delta, True, top, bottom)
    if above is not None:
        low = max(low, float(_squared(np.array(above))))
    if below is not None:
        high = min(high, float(_squared(np.array(below))))
    return low, high


# --- the approximate interval ---------------------------------------------------------------


def approximate(known: Known, sample: Sample, confidence: float) -> tuple[float, float]:
    """Return the interval of the delta method for ``theta^2``.

    The estimate ``T = X / Y`` has the residuals ``x_i - T y_i``; with inclusion probabilities
    pi_i, ``Var T ~ sum_sample (x_i - T y_i)^2 (1 - pi_i) / pi_i^2 / Y^2`` (for equal pi_i the ratio
    estimator with its finite-population correction), and ``log T`` is taken to be normal.
    """
    from scipy.special import stdtrit

    low, high = _certain(known, sample)
    t = _estimate(known, sample)
    n = len(sample.x)
    # One row has no spread, and no error at all, or an output that is zero, no logarithm.
    if n < 2 or not 0.0 < t < math.inf:
        return (low, high) if n < 2 or t > 0.0 else (0.0, 0.0)
    pi = sample.inclusion
    y = float((sample.y / pi).sum())
    residual = sample.x - t * sample.y
    variance = n / (n - 1) * float((residual**2 * (1.0 - pi) / pi**2).sum()) / y**2
    quantile = float(stdtrit(n - 1, 0.5 + 0.5 * confidence))
    # Where every row has the same relative error only rounding is left, and counts.
    width = quantile * math.sqrt(variance) / t + SLACK
    return max(low, t * math.exp(-width)), min(high, t * math.exp(min(width, 700.0)))


# --- the public function --------------------------------------------------------------------


def certify_known(
    known: Known,
    solve: Callable[[Array], Array],
    rows: int,
    confidence: float,
    rng: np.random.Generator,
    kind: str,
) -> ErrorCertificate:
    """Return the certificate of checked arguments; ``solve`` gives exact rows times ``factor``."""
    m = len(known.rows)
    exact = rows >= m
    position, leverage, inclusion = (
        (np.arange(m), np.ones(m), np.ones(m)) if exact else draw(known, rows, rng)
    )
    index = known.rows[position]
    o = solve(index)
    if not np.isfinite(o).all():
        row = int(index[~np.isfinite(o).all(axis=1)][0])
        raise ValueError(
            f"logits must be finite in float64, got an overflow in row {row}; scale q and k down"
        )
    ohat = known.factor * known.output[index].astype(np.float64)
    x, y = _squares(ohat - o), _squares(o)
    sample = Sample(position, leverage, inclusion, x, y)
    t = _estimate(known, sample)
    if exact:
        if not y.any():
            raise ValueError(
                "the exact output must not be zero, got |O|_F = 0; a relative error has no "
                "denominator there"
            )
        theta = math.sqrt(t)
        return ErrorCertificate(theta, theta, theta, len(known.output), confidence, "exact")
    if kind == "finite-sample":
        low, high = finite_sample(known, sample, 0.5 * (1.0 - confidence))
    else:
        low, high = approximate(known, sample, confidence)
    return ErrorCertificate(
        math.sqrt(t), math.sqrt(min(low, t)), math.sqrt(max(high, t)), rows, confidence, kind
    )


def _check_rows(rows: object) -> int:
    if isinstance(rows, bool | np.bool_) or not isinstance(rows, numbers.Integral):
        raise TypeError(
            f"rows must be an integer, got {type(rows).__name__}; give how many rows to compute"
        )
    if int(rows) < 1:
        raise ValueError(f"rows must be at least 1, got {int(rows)}; the default is 256")
    return int(rows)


def _check_confidence(confidence: object) -> float:
    if isinstance(confidence, bool | np.bool_) or not isinstance(confidence, numbers.Real):
        raise TypeError(
            f"confidence must be a number, got {type(confidence).__name__}; the default is 0.95"
        )
    if not 0.0 < float(confidence) < 1.0:
        raise ValueError(
            f"confidence must be between 0 and 1, both excluded, got {float(confidence)}; "
            f"the default is 0.95"
        )
    return float(confidence)


def certify(
    problem: AttentionProblem,
    output: object,
    rows: int = 256,
    confidence: float = 0.95,
    rng: Rng = 0,
    *,
    kind: str = "finite-sample",
) -> ErrorCertificate:
    """Return a confidence interval for the relative error of any output array.

    ``theta = |Ohat - O|_F / |O|_F``, from exact rows of O at a random sample: nothing has to be
    known of how ``output`` was made, and O is never computed as a whole.

    Parameters
    ----------
    problem : AttentionProblem
        The exact side; its rows are computed in float64 from the numbers that it holds.
    output : array of shape (n_q, d_v)
        Ohat: float16, bfloat16, float32 or float64, in anything with ``__array__`` or
        ``__dlpack__`` on the CPU.  It need not be an output of attention at all.
    rows : int, default 256
        Rows to compute, at least 1.  Where this is at least the number of rows that see a key,
        all are computed: the kind is ``"exact"``, the interval is a point, ``rows`` is n_q.
    confidence : float, default 0.95
        In (0, 1): the probability, over the draw of the rows, that the interval holds theta.
    rng : None, int or numpy.random.Generator, default 0
        Source of the draw.
    kind : {"finite-sample", "approximate"}
        ``finite-sample`` keeps its promise for every n_q, every number of rows and every
        distribution of the errors over the rows, a single wrong row included.  ``approximate``
        is tight and asymptotic; see Notes for where it fails.

    Returns
    -------
    ErrorCertificate

    Raises
    ------
    TypeError, ValueError
        For an empty problem or one without values, an exact output that is zero, an output of
        another shape, not finite or not floating point, rows below 1, a confidence outside
        (0, 1), or an unknown kind.

    Notes
    -----
    The construction, its proof and its sources are the text of this module.

    **Width of the finite-sample interval.**  Rows that were not seen may be as wrong as the hull
    of the values allows: a share ``log(2 / (1 - confidence)) / n`` of the N rows may be wholly
    wrong, and a sample of n exact ones show nothing of it.  Without any error the upper end is
    therefore of the size ``sqrt(s)``, ``s = log(2 / (1 - confidence)) b N / (n |O|_F^2)``, with b
    the mean of ``(|ohat_i - c| + R_i)^2``: with 256 of the 512 rows of the bundled heads it is
    0.3 to 0.8, within a factor of 1.7 of this rule.  It excludes gross errors; that errors are of
    the size of rounding everywhere cannot be certified from some of the rows.  The lower end has
    no such term.  Ends are rounded outwards to the lattice ``2^(j/64)``, by 1.1 % at most.

    **Where the approximate interval fails.**  It takes the rows that were seen for typical.  If
    the error sits on a few rows, most samples miss them and report next to no error with great
    confidence: one wrong row of 512 is missed by nine of ten samples of 48 rows, and those
    intervals do not hold theta.  The same happens, less often, where the errors of few rows
    outweigh all others.

    Errors below the rounding of float64, about 1e-15, are measured as that rounding.  The cost
    is that of ``rows`` exact rows, plus ``O((n_q + n_k) d)``.

    Examples
    --------
    >>> import sketchattn as sa
    >>> problem = sa.make_heads("gaussian", n=128, d=8, rng=0)[0]
    >>> output = problem.output + 0.5 * problem.output
    >>> certificate = sa.certify(problem, output, rows=32)
    >>> certificate.low <= 0.5 <= certificate.high
    True
    >>> sa.certify(problem, output, rows=128).kind
    'exact'
    """
    if not isinstance(problem, AttentionProblem):
        raise TypeError(
            f"problem must be an AttentionProblem, got {type(problem).__name__}; "
            f"make one with sketchattn.AttentionProblem(q, k, v)"
        )
    values = problem.values
    count = _check_rows(rows)
    level = _check_confidence(confidence)
    if kind not in KINDS:
        raise ValueError(
            f"kind must be 'finite-sample' or 'approximate', got {kind!r}"
            f"{closest(str(kind), KINDS)}"
        )
    generator = as_generator(rng)
    seen = problem.visible_counts()
    if not seen.any():
        raise ValueError(
            f"problem must have a query that sees a key, got n_q = {problem.n_q} and "
            f"{len(problem.kept_keys)} keys; there is nothing to certify"
        )
    # With a causal mask the first keys are seen by most rows and the last ones perhaps by none.
    kept = values if problem.key_mask is None else values[problem.kept_keys]
    largest = float(np.abs(kept[: seen.max()]).max(initial=0.0))
    if largest == 0.0:
        raise ValueError(
            "v must not be zero at every visible key, got an exact output that is zero; a relative "
            "error has no denominator there"
        )
    array = as_array(output, "output")
    if array.shape != (problem.n_q, problem.d_v):
        raise ValueError(
            f"output must have shape (n_q, d_v) = {(problem.n_q, problem.d_v)}, got {array.shape}; "
            f"pass the output of this one head"
        )
    float_dtype(array, "output")
    with np.errstate(invalid="ignore"):
        peak = max(float(array.max()), -float(array.min()))  # NaN and infinities survive
    if not math.isfinite(peak):
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise ValueError(
            f"output must be finite, got {array[where]} at index {where}; a wrong number has an "
            f"error, this has none"
        )
    # Squares of ordinary numbers are safe; others are brought there by a power of two.
    exponent = math.frexp(largest)[1]
    factor = 1.0 if abs(exponent) <= 100 else 2.0 ** min(-exponent, 1022)
    if factor * peak > LARGEST_OUTPUT:
        raise ValueError(
            f"output must be at most {LARGEST_OUTPUT / factor:.3g} where values are at most "
            f"{largest:.3g}, got {peak:.3g}; its square would overflow"
        )
    known = know(problem, array, factor)
    return certify_known(
        known,
        partial(exact_rows, problem, factor=factor),
        count,
        level,
        generator,
        str(kind),
    )
