"""Intervals for the error of an output from a weighted sample of exact rows.

The unknown is ``theta = |Ohat - O|_F / |O|_F``.  For a row i that sees a key let
``x_i = |ohat_i - o_i|^2`` and ``y_i = |o_i|^2``, so that ``theta^2 = sum_i x_i / sum_i y_i``.
Rows that see no key are known without computing: ``o_i = 0``.

**What is known of a row before it is computed.**  ``o_i`` is a convex combination of visible
values, hence ``o_i = c + e`` with ``|e| <= R_i``, where c is the mean of the values and R_i the
largest distance of a visible value from it.  For a candidate t put ``z_i(t) = x_i - t y_i``;
``sum_i z_i(t)`` is positive exactly for ``t < theta^2``.  With ``kappa = 1 - t``,

    z_i(t) = |ohat_i - c|^2 - t |c|^2 + 2 e . (kappa c - ohat_i) + kappa |e|^2,

whose extremes over the ball are ``l_i(t) <= z_i(t) <= u_i(t)`` in closed form (``lowest``,
``highest``).  For t <= 1 z_i is convex in o_i, and at most the larger of its values at the farthest
few values and of its maximum over the ball of the others: a few outliers do not widen the ball of
all.  For t < 1 the lower one is at least ``-t/(1-t) |ohat_i|^2``, with no hull at all.

**The sample of the finite-sample interval.**  Row after row is drawn without replacement, each
time with probabilities proportional to weights w among the rows that are left.  Let ``f_i >= 0``
have an unknown total over all rows, and let W_k be the weight left before draw k.  Then
``D_k = W_k f_{i_k} / w_{i_k}`` has the conditional mean ``sum of f over the rows that are left``.
If the total is at most M, this is at most ``mu_k = M - (sum of f seen before)``, and for
predictable bets ``0 <= b_k <= 1``

    C_k = prod_{j <= k} (1 - b_j + b_j D_j / mu_j)

is a nonnegative supermartingale that starts at 1.  By Ville's inequality it ever reaches
``1/delta`` with probability at most delta.  This is the betting test of Waudby-Smith and Ramdas
(2024, "Estimating means of bounded random variables by betting", section 5) with the weighted
draws of Shekhar, Xu, Lipton, Liang and Ramdas (2023, "Risk-limiting financial audits via weighted
sampling without replacement"); it needs one side of the range only.  A row that was taken for
certain is no draw: it is subtracted from the total, and nothing is bet on it (``b_k = 0``).

**The finite-sample interval.**  ``theta^2 >= t`` means ``sum (u_i - z_i) <= sum u_i``, and
``theta^2 <= t`` means ``sum (z_i - l_i) <= -sum l_i``: both have the form above with f >= 0.  They
are tested on the lattice ``theta = 2^(j/64)``, which no data chose, from above: first the octaves
``2^J``, each at the level delta/16, until one is not rejected; then all points below the last
octave that was, at 15 delta/16.  The upper end is the last point of this sequence of rejections.
If it lies below theta, then a true hypothesis was rejected that no data chose either: that of the
largest octave below theta if this was reached, else that of the largest lattice point below
theta.  The probability is at most delta, and no monotonicity is used.  The lower end is the mirror
image; each has ``delta = (1 - confidence) / 2``.

**The approximate interval.**  Rows whose share of the weight is one draw or more are taken for
certain, the rest in turn as above, and ``T = X / Y`` is the quotient of two estimated totals.  Its
error is that of ``E = sum_sample e_k``, ``e_k = (x_k - T y_k) / pi_k``, over Y.  Draws that are
taken as independent given pi have, in estimates from the same sample,

    V = sum (1 - pi) e^2,   M = sum (1 - pi)(1 - 2 pi) e^3,   C = sum (1 - pi)^2 e^3,

the variance and the third cumulant of E, and the covariance of E with the estimate V.  Three
corrections make the normal interval hold on samples of tens of rows:

- V is itself an estimate.  By Satterthwaite it has ``2 V^2 / Var V`` degrees of freedom, at most
  one less than the rows that were drawn; few where few rows make up V.  The quantile q is that of
  Student's law.
- ``E / sqrt(V)`` is skewed.  The Cornish-Fisher expansion moves both ends by
  ``(q^2 C/2 - (q^2 - 1) M/6) / V`` (for small pi the ``(1 + 2 q^2) gamma / 6`` of Johnson 1978,
  "Modified t tests and confidence intervals for asymmetrical populations", and Hall 1992).
- Rows farther off than all k that were drawn carry a share ``1/(k + 1)`` of the weight on average,
  by exchangeability, and more than twice that in one sample of seven.  Each end takes in two such
  rows, as far off as the farthest one seen.
- There may be rows much farther off.  Beyond the farthest row seen, z, the errors are taken to
  follow a Pareto law, ``P(error > u z) = u^(-1/gamma) / k``, up to the largest of ``N - n`` rows:
  with ``L = (N - n)/k`` unseen rows for each drawn one they add ``z g``, where
  ``g = (1 - L^(gamma - 1)) / (1 - gamma)``: about 1 for a light tail, L - 1 for gamma = 2.  gamma
  is the estimate of Hill (1975, "A simple general approach to inference about the tail of a
  distribution") from the 16 largest ``x_k / pi_k``, plus two of its standard errors.

Each end is moved outwards only, by the sum of the first three, relative to X: the upper one on the
scale of logarithms, the lower one on that of theta^2, which are the wider choices.  The fourth
adds ``z (g - 1)`` to the upper end.  Where that is more than twice the estimate of theta, the upper
end of the finite-sample interval of the same sample, at the same level, takes its place if it is
smaller.

**The weights of the approximate interval** favour rows that a pilot suspects; see
``sketchattn.errors.pilots``.  On the bundled heads the rows that hold most of an error are those
where the output is farthest from the pilot, although the pilot is as wrong as the output.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .pilots import Guess

Array = NDArray[Any]
# What a draw is made from: exponential times of all rows, or a generator of them.
Times = np.random.Generator | Array

EPS = float(np.finfo(np.float64).eps)
TINY = float(np.finfo(np.float64).tiny)
# The lattice of candidates, points an octave of theta; ends are rounded outwards to it.
POINTS = 64
# Lattice points between two candidates at which all rows are bounded.
CELL = 16
# Share of the error probability that is spent on the octaves, which only narrow the search.
COARSE = 1 / 16
OCTAVES = 4  # that are tested at once
FAR = 32  # values that are taken as they are where all of them are bounded
TAIL = 16  # largest errors of a sample from which the tail beyond them is guessed
# Entries of the arrays (candidates, rows) that are handled at once.
BLOCK_ENTRIES = 1 << 14
# Largest factor of a bet that is put at stake: a row at the very end of its range costs the
# capital all but a hundredth, and not all of it.
LARGEST_BET = 0.99
# Candidates are at most 2^240, so that their fourth powers are finite.
LARGEST_OCTAVE = 240
# Relative slack of the ball and of hypothesised totals.  It stands for the rounding of exact rows
# and of sums in float64, n 2^-53 relative at worst.
SLACK = 1e-10


# --- what is known of every row -------------------------------------------------------------


class Known(NamedTuple):
    """What is known of the rows that see a key before any is computed; arrays (m,), float64.

    ``output`` (n_q, d_v): as handed in; ``factor``: the power of two that it, values and exact
    rows are multiplied by; ``rows``: those that see a key; ``square``: ``|ohat_i|^2``; ``guess``:
    what a pilot says, for the weights of the approximate interval only; ``distance``:
    ``|ohat_i - c|``; ``near``: its square; ``along``: ``c . (ohat_i - c)``; ``radius``: ``R_i``;
    ``rest``: the same without the F values that are farthest from c, ``far`` (F,): their
    ``|v_j|^2``; ``dots`` (m, F): ``ohat_i . v_j``, infinite where row i does not see key j;
    ``centre``: ``|c|``; ``fixed``: the sum of ``|ohat_i|^2`` over the rows that see no key.
    """

    output: Array
    factor: float
    rows: Array
    square: Array
    guess: Guess
    distance: Array
    near: Array
    along: Array
    radius: Array
    rest: Array
    dots: Array
    far: Array
    centre: float
    fixed: float


def _reach(known: Known, t: float) -> tuple[Array, Array]:
    """Return ``|ohat_i - kappa c| = |(ohat_i - c) + t c|``, and its square rounded down."""
    square = known.near + (t * known.centre) ** 2
    noise = 16 * EPS * square
    square += 2 * t * known.along
    # Where the sum cancels its root is accurate to sqrt(eps) only; too long is on the safe side.
    return np.sqrt(np.maximum(square, 0.0) + noise), square - noise


def highest(known: Known, t: float) -> Array:
    """Return ``u_i(t) >= max z_i(t)`` over the hull, (m,).

    In a ball ``e`` of length r along ``kappa c - ohat_i``, at distance alpha, gives
    ``|ohat_i - c|^2 - t |c|^2 + 2 alpha r + kappa r^2``, ``0 <= r <= R_i``; at a value it is
    ``|ohat_i|^2 - 2 ohat_i . v_j + kappa |v_j|^2``.
    """
    kappa = 1.0 - t
    alpha, _ = _reach(known, t)
    r = known.rest if kappa >= 0 else np.minimum(known.radius, alpha / -kappa)
    bend = r * (2 * alpha + kappa * r)
    u: Array = (1 + SLACK) * (known.near + bend) - (1 - SLACK) * t * known.centre**2
    if kappa < 0 or not len(known.far):
        return u
    vertex = known.square + (kappa * known.far - 2 * known.dots).max(axis=1)
    # |ohat . v| is at most half of the sum of squares.
    slack = 2 * SLACK * (known.square + known.far.max())
    return np.asarray(np.maximum(u, vertex + slack))


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

    ``position`` int64 (n,); ``leverage``: ``W_k / w_{i_k}``, 0 for rows that were certain;
    ``inclusion``: the probability that a row is drawn, given the draws of the others; ``x``,
    ``y``: ``|ohat_i - o_i|^2``, ``|o_i|^2``.
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


def weigh_squares(known: Known) -> Array:
    """Return the weights of the approximate interval, (m,): five parts of the same mean.

    A residual ``x_i - t y_i`` may be large because of its x, which the width bounds, or of its y,
    and there is a guess of each.  The fifth part is one over the rank by the spread of logits,
    flat rows first: what a method keeps of few keys is worst there, and no output tells.
    """
    weights = weigh(known)
    error, square, spread = known.guess
    rank = 1 + np.searchsorted(np.sort(spread), spread)  # the same for equal rows
    for part in (error, square, 1.0 / rank):
        mean = float(part.mean())
        if mean > 0:
            weights += part / mean
    return weights


def draw(known: Known, rows: int, rng: Times) -> tuple[Array, Array, Array]:
    """Draw ``rows < m`` rows in turn without replacement; return position, leverage, inclusion."""
    return race(weigh(known), rows, 0, rng)


def draw_heavy(known: Known, rows: int, rng: Times) -> tuple[Array, Array, Array]:
    """Take heavy rows for certain and draw the others; return as `draw` does.

    From the heaviest on, a row is certain while its weight is at least the share of one draw in
    what is left.  At most half of the rows: the others have to show what the rest is like.
    """
    weights = weigh_squares(known)
    most = rows // 2
    if most == 0:
        return race(weights, rows, 0, rng)
    heavy = -np.sort(np.partition(-weights, most)[:most])
    left = weights.sum() - (np.cumsum(heavy) - heavy)
    return race(weights, rows, _run_length(heavy * (rows - np.arange(most)) >= left), rng)


def race(weights: Array, rows: int, sure: int, rng: Times) -> tuple[Array, Array, Array]:
    """Take the ``sure`` heaviest rows, then draw in turn; their leverage is 0, inclusion 1.

    ``rng`` draws exponential times of rate 1 for all rows, or has them, for one use.
    Independent exponential times of rate w_i, in ascending order, are such a sequence.  Given
    the times of the others, row i is among the first n if its time is below the (n + 1)-st, tau:
    its probability ``1 - exp(-w_i tau)`` makes ``sum_sample x_i / inclusion_i`` unbiased (Cohen
    and Kaplan 2007, "Summarizing data using bottom-k sketches", rank conditioning).
    """
    drawn = rng if isinstance(rng, np.ndarray) else rng.exponential(size=len(weights))
    times = drawn / weights
    certain = np.argsort(-weights, kind="stable")[:sure]
    times[certain] = -1.0  # before all others
    first = np.argpartition(times, rows)[: rows + 1]
    first = first[np.argsort(times[first], kind="stable")]
    position, tau = first[:rows], times[first[rows]]
    chosen = weights[position]
    left = weights.copy()
    left[position] = 0.0
    # Sums of positive numbers from the last draw backwards: nothing cancels.
    remaining = left.sum() + np.cumsum(chosen[::-1])[::-1]
    leverage, inclusion = remaining / chosen, -np.expm1(-chosen * tau)
    leverage[:sure], inclusion[:sure] = 0.0, 1.0
    return position, leverage, inclusion


def _run_length(true: Array) -> int:
    """Return how many entries are true before the first that is not."""
    return len(true) if true.all() else int(np.argmin(true))


def _error_range(known: Known) -> tuple[Array, Array]:
    """Return ``a_i <= x_i <= b_i``, both (m,)."""
    return np.maximum(known.distance - known.radius, 0.0) ** 2, highest(known, 0.0)


def _certain(known: Known, sample: Sample) -> tuple[float, float]:
    """Return bounds of ``theta^2`` that hold whatever the rows outside the sample are."""
    a, b = _error_range(known)
    g = np.maximum(known.centre - known.radius, 0.0) ** 2
    h = (known.centre + known.radius) ** 2
    for bound in (a, b, g, h):
        bound[sample.position] = 0.0
    x = known.fixed + float(sample.x.sum())
    y = float(sample.y.sum())
    low = quotient(x + float(a.sum()), y + float(h.sum()))
    return low, quotient(x + float(b.sum()), y + float(g.sum()))


def quotient(x: float, y: float) -> float:
    """Return ``x / y``, with 0 for 0/0 and inf for other divisions by zero."""
    if x == 0.0:
        return 0.0
    return x / y if y > 0.0 else math.inf


def point_estimate(known: Known, sample: Sample) -> float:
    """Return the ratio estimate of ``theta^2``."""
    x = known.fixed + float((sample.x / sample.inclusion).sum())
    return quotient(x, float((sample.y / sample.inclusion).sum()))


# --- the finite-sample interval -------------------------------------------------------------


def rejects(f: Array, leverage: Array, total: Array, delta: float) -> Array:
    """Say which of T hypotheses "the total of f is at most M" are rejected at level delta.

    Parameters
    ----------
    f : ndarray (T, n)
        Values ``f >= 0`` of the drawn rows in the order of the draw, one line a hypothesis.
    leverage : ndarray (n,)
        ``W_k / w_{i_k}``; 0 for rows that were taken for certain, on which nothing is bet.
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
    rho[:, leverage == 0.0] = 1.0
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

    The largest z_i over the hull is convex in t and the smallest concave, as extremes of functions
    that are linear in t: between two candidates at which all rows are bounded, the chord is a
    bound as well.
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
            return start + _run_length(rejected)
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
    """Return the approximate interval for ``theta^2``; see the text of this module.

    Without an error in the sample nothing is estimated, and the upper end is that of the
    finite-sample interval; from fewer than two draws the interval is what is certain.
    """
    t = point_estimate(known, sample)
    if t == 0.0:
        return finite_sample(known, sample, 0.5 * (1.0 - confidence))
    low, high = _certain(known, sample)
    ends = expansion(sample, t, len(known.rows), confidence)
    if ends is None:
        return low, high
    low, end = max(low, ends[0]), ends[1]
    if end > 4.0 * t:
        end = min(end, finite_sample(known, sample, 0.5 * (1.0 - confidence))[1])
    return low, min(high, end)


def expansion(
    sample: Sample, t: float, population: int, confidence: float
) -> tuple[float, float] | None:
    """Return the ends of the approximate interval about ``t > 0``, from the sample alone.

    None where fewer than two of the ``population`` rows were drawn, or t is infinite.
    """
    from scipy.special import stdtrit

    pi = sample.inclusion
    drawn = pi < 1.0
    count = int(drawn.sum())
    if count < 2 or math.isinf(t):
        return None
    pi = pi[drawn]
    total = t * float((sample.y / sample.inclusion).sum())
    e = (sample.x - t * sample.y)[drawn] / pi / total
    squares, rest = (1.0 - pi) * e**2, 1.0 - pi
    variance = float(squares.sum())
    up = down = SLACK  # where every row has the same relative error only rounding is left
    beyond = 0.0
    if variance > 0.0:
        noise = float((rest * (squares - squares.mean()) ** 2).sum())
        freedom = count - 1.0
        if 2.0 * variance**2 < freedom * noise:
            freedom = max(1.0, 2.0 * variance**2 / noise)
        level = 0.5 + 0.5 * confidence
        q = float(stdtrit(count - 1, level))
        skew = float(
            (rest * (0.5 * q**2 * rest - (q**2 - 1.0) / 6.0 * (1.0 - 2.0 * pi)) * e**3).sum()
        )
        skew /= variance
        width = float(stdtrit(freedom, level)) * math.sqrt(count / (count - 1) * variance)
        farthest = max(float((rest * e).max()), 0.0)
        up += width + max(skew, 0.0) + 2.0 * farthest
        down += width + max(-skew, 0.0) + 2.0 * max(-float((rest * e).min()), 0.0)
        unseen = (population - len(sample.x)) / count
        beyond = farthest * max(_tail(sample.x[drawn] / pi, unseen) - 1.0, 0.0)
    return t * max(1.0 - down, 0.0), t * (math.exp(min(up, 700.0)) + beyond)


def _tail(x: Array, unseen: float) -> float:
    """Return what rows beyond all of x (k,) add, for ``unseen`` rows a drawn one: g of the text.

    In units of the farthest row.
    """
    top = np.sort(x)[::-1][: TAIL + 1]
    count = len(top) - 1
    if top[0] <= 0.0:
        return 0.0
    top = np.maximum(top, TINY * top[0])
    gamma = float(np.log(top[:count] / top[count]).mean())
    less = gamma * (1.0 + 2.0 / math.sqrt(count)) - 1.0
    level = math.log(max(unseen, 1.0))
    if abs(less) * level < 1e-9:
        return level
    return math.expm1(min(less * level, 700.0)) / less
