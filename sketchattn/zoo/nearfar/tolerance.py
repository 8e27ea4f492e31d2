"""A tolerance in place of near and tau: settings are tried on a few rows, outputs are certified.

A row of the output depends on its own query and on what is made of all keys and values.  So
settings that share their clusters can be compared on a few rows, for the price of these rows:

1. **Trial.**  m rows are drawn at random and computed exactly, then with each of K settings, the
   cheapest first, until the upper end of an interval for the error of all rows is below the
   tolerance.  These are the asymptotic intervals of ``errors.intervals`` for a uniform sample, each
   at the level ``(1 - confidence) / K``: by the union bound none of the K upper ends is too low
   but with probability ``1 - confidence``, asymptotically, whichever was taken and why.
2. **Output.**  The setting that was taken is run on all rows.
3. **Certificate.**  The output is certified from rows that are drawn for this purpose alone.
   Given everything before, trial included, it is a fixed array: the certificate knows of no
   selection, and owes none of its validity to that of the trial.
4. If the upper end is above the tolerance, there is another attempt, with one of the next settings
   and rows of its own; after the last attempt the answer is exact attention.

**What holds.**  There are A attempts at most, each certified at the level ``(1 - confidence) / A``
given what was before it.  That any of these intervals misses its error has the probability
``1 - confidence`` at most; so that the one which is delivered, chosen by its upper end, holds with
the probability ``confidence``.  It is as true as the kind of the certificate: see
``certify`` for what "approximate" leaves open.

Which settings are worth a trial is decided by the numbers of rows and keys alone, and by what rows
read: never by a clock, so that a draw has one result.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from ...base.draws import Draw, check_draw
from ...errors.certificates import (
    LARGEST_OUTPUT,
    ErrorCertificate,
    certify_known,
    know,
    scale_of,
)
from ...errors.certificates import exact_rows as wide_rows
from ...errors.intervals import Sample, expansion, highest, quotient
from ...errors.pilots import Guess
from ...operators.nearfar import (
    Clusters,
    Moments,
    NearFarAttention,
    Rows,
    Solved,
    kept_rows,
    log_sums,
    rows_in_tiles,
    solve,
)
from ...operators.softmax import SoftmaxAttention
from ...operators.solve import solve_rows
from ...operators.steep import is_steep
from ...problem import AttentionProblem
from .regions import Regions

Array = NDArray[Any]


class Rung(NamedTuple):
    """Name what the settings of the ladder differ in."""

    near: int
    tau: float


# The cheapest first; each reads about twice the keys of the one before, for half of its error.
# More clusters or fewer, with as many near keys, cost and err alike on real heads.
LADDER = (Rung(4, 0.1), Rung(8, 0.03), Rung(16, 0.01), Rung(32, 0.003), Rung(64, 0.001))
ATTEMPTS = 2
# Exact rows of a trial, and of an approximate certificate; of a first look at what a finite-sample
# certificate would need.
ROWS, LOOK = 256, 32
# A finite-sample certificate without any error has an upper end of about this share of the
# tolerance, with so many times the rows of a rule of thumb: what is left is for the error.
SPARE, MORE = 0.8, 5.0
# An approximate certificate takes one of so many rows, where these are more.
SHARE = 32
# A trial may come to nothing: it is made where cheap settings take at most this share of exact
# attention, trial and certificate included.
WORTH = 0.45
# Costs in units of a key that exact attention reads, measured on real heads: of an own key, a far
# cluster and a near key; of clusters and of what a certificate has to know of every row, a row; and
# of an exact row, where rows see the same keys and where they do not, in units of one.
OWN_KEY, FAR_CLUSTER, NEAR_KEY, SET_UP, KNOW = 1.3, 2.6, 1.2, 200.0, 300.0
EXACT_ROW = {False: 1.3, True: 2.2}
# And of the tests of a finite-sample certificate, in pairs of a row and a key.
TESTS = 1.5e7
# Keys up to which rows that see different ones are computed by the kernel of this method.
MOST_KEYS = 1 << 16


class Certified:
    """Hold what is known of an operator that was found by a tolerance.

    Attributes
    ----------
    certificate : ErrorCertificate
        Of ``Ahat V``; its kind is "exact", and the error 0 to rounding, for exact attention.
    setting : dict or None
        Parameters of `NearFar` that make the same operator without a tolerance; None for exact
        attention.
    refused : tuple of ErrorCertificate
        Of earlier attempts, whose upper ends were above the tolerance.
    tried : dict from (near, tau) to float
        Upper ends of the trial, in the order of the ladder.
    seconds : dict from str to float
        Wall time of the "trial", the "output" and the "certificate".
    """

    certificate: ErrorCertificate
    setting: dict[str, Any] | None
    refused: tuple[ErrorCertificate, ...]
    tried: dict[tuple[int, float], float]
    seconds: dict[str, float]


class CertifiedNearFar(Certified, NearFarAttention):
    """Represent what `NearFar` found by a tolerance, with its certificate."""


class CertifiedExact(Certified, SoftmaxAttention):
    """Represent exact attention, the last answer to a tolerance."""


class Found(NamedTuple):
    """Hold what answers a tolerance; without a rung it is exact attention."""

    rung: Rung | None
    regions: Regions | None
    certificate: ErrorCertificate
    refused: tuple[ErrorCertificate, ...]
    tried: dict[tuple[int, float], float]
    seconds: dict[str, float]
    out: Array | None = None
    lse: Array | None = None


C = TypeVar("C", CertifiedNearFar, CertifiedExact)


def marked(made: C, found: Found, setting: dict[str, Any] | None) -> C:
    """Return an operator with what is known of it."""
    made.certificate, made.setting = found.certificate, setting
    made.refused, made.tried, made.seconds = found.refused, found.tried, found.seconds
    return made


# --- the draw -----------------------------------------------------------------------------------

NAMES = ("rows", "times")


def draw_rows(problem: AttentionProblem, rng: np.random.Generator) -> Draw:
    """Draw the rows of the trial (m,), and exponential times (A, n_q) that rank rows afterwards."""
    rows = rng.permutation(np.flatnonzero(problem.visible_counts() > 0))[:ROWS]
    return Draw(rows=rows.astype(np.int64), times=rng.exponential(size=(ATTEMPTS, problem.n_q)))


def check_rows(problem: AttentionProblem, draw: Mapping[str, Any]) -> Draw:
    """Return a draw that was handed in, checked."""
    made = check_draw(draw, NAMES)
    rows, times = made["rows"], made["times"]
    seen = problem.visible_counts() > 0
    if rows.ndim != 1 or not np.issubdtype(rows.dtype, np.integer):
        raise TypeError(
            f"rows must be a one-dimensional integer array, got {rows.dtype} of shape "
            f"{rows.shape}; give indices of queries"
        )
    wanted = min(ROWS, int(seen.sum()))
    inside = ((rows >= 0) & (rows < problem.n_q)).all()
    if len(rows) != wanted or not inside or len(np.unique(rows)) != wanted or not seen[rows].all():
        raise ValueError(
            f"rows must be {wanted} different queries that see a key, got {len(rows)}; use "
            f"method.draw(problem, rng)"
        )
    shape = (ATTEMPTS, problem.n_q)
    usable = times.dtype.kind == "f" and bool(((times > 0) & np.isfinite(times)).all())
    if not usable or times.shape != shape:
        raise ValueError(
            f"times must be positive, finite numbers of shape {shape}, got {times.dtype} of shape "
            f"{times.shape}; use method.draw(problem, rng)"
        )
    return Draw(rows=rows.astype(np.int64), times=times.astype(np.float64))


# --- exact rows ---------------------------------------------------------------------------------


def exact_rows(problem: AttentionProblem, index: Array) -> Array:
    """Return rows of the exact output, in the precision of the problem."""
    if not problem.causal:
        return solve_rows(problem, index, problem.arrays.v)[0]
    if problem.n_k > MOST_KEYS:
        return wide_rows(problem, index)
    # Rows that see different keys: own keys alone, with a cluster that nobody sees.
    k, v = (kept_rows(problem, x) for x in (problem.arrays.k, _values(problem)))
    order = np.sort(index)
    stops = problem.visible_counts()[order]
    nothing = np.zeros_like(stops)
    nobody = Clusters(np.zeros(len(k), np.int64), 1, None, 0, True).moments(k)
    rows = rows_in_tiles(stops, nothing, nothing, None)
    out = solve(_some(problem, order), k, v, nobody, rows, 0, 0.0).out
    found = np.empty_like(out)
    found[np.argsort(index, kind="stable")] = out
    return found


def _values(problem: AttentionProblem) -> Array:
    return problem.values if problem.arrays.v is None else problem.arrays.v


def _some(problem: AttentionProblem, index: Array) -> AttentionProblem:
    """Return the problem with some of its queries; what they see is said elsewhere."""
    q, k, _ = problem.arrays
    return AttentionProblem.adopt(q[index], k, scale=problem.scale)


def squares(x: Array) -> Array:
    """Return the squared norms of rows."""
    found: Array = np.einsum("ij,ij->i", x, x)
    return found


# --- what is worth its time -----------------------------------------------------------------------


class Costs(NamedTuple):
    """Say what parts of the work cost, as shares of exact attention."""

    keys: float
    rows: int
    row: float

    def exact(self, count: float) -> float:
        """Of ``count`` exact rows."""
        return self.row * count / self.rows

    def finite_sample(self, count: float) -> float:
        """Of a certificate of this kind."""
        return self.exact(count) + TESTS / (self.keys * self.rows)

    def rung(self, own: float, far: float, near: float) -> float:
        """Of a setting whose rows read so much, and of what is known of its rows."""
        read = OWN_KEY * own + FAR_CLUSTER * far + NEAR_KEY * near
        return (read + SET_UP + KNOW) / self.keys


def needed_rows(most: float, size: float, tolerance: float, level: float) -> float:
    """Return how many rows a finite-sample certificate needs: `MORE` times a rule of thumb.

    Without any error the upper end is about ``sqrt(log(2 / level) b / (n |o|^2))``, b the mean of
    the most that the squared error of a row can be in the hull, and ``|o|^2`` of those of rows.
    """
    least = MORE * math.log(2.0 / level) * quotient(most, size) / (SPARE * tolerance) ** 2
    return max(float(ROWS), least)


def hull_errors(problem: AttentionProblem, o: Array, index: Array, factor: float) -> float:
    """Return the sum of the most that squared errors of rows can be, whose outputs are known."""
    counts = problem.visible_counts()
    v = factor * kept_rows(problem, problem.values)[: counts.max()].astype(np.float64)
    centre = v.mean(axis=0)
    radius = np.maximum.accumulate(np.sqrt(squares(v - centre)))[counts[index] - 1]
    return float(((np.sqrt(squares(o - centre)) + radius) ** 2).sum())


# --- the search -----------------------------------------------------------------------------------


class Search:
    """The state of a search on one head."""

    def __init__(
        self,
        problem: AttentionProblem,
        tolerance: float,
        confidence: float,
        kind: str,
        draw: Draw,
    ) -> None:
        self.problem, self.draw = problem, draw
        self.tolerance, self.confidence, self.kind = tolerance, confidence, kind
        self.level = (1.0 - confidence) / ATTEMPTS
        self.counts = problem.visible_counts()
        seen = self.counts > 0
        self.seen = int(seen.sum())
        keys = float(self.counts[seen].mean()) if self.seen else 0.0
        row = EXACT_ROW[bool(problem.causal)]
        self.costs = Costs(max(keys, 1.0), max(self.seen, 1), row)
        self.refused: list[ErrorCertificate] = []
        self.tried: dict[tuple[int, float], float] = {}
        self.seconds = {"trial": 0.0, "output": 0.0, "certificate": 0.0}
        self.least = 0.0

    def exact(self) -> Found:
        """Return the answer that needs no certificate."""
        sure = ErrorCertificate(0.0, 0.0, 0.0, self.problem.n_q, self.confidence, "exact")
        return Found(None, None, sure, tuple(self.refused), self.tried, self.seconds)

    @property
    def rows(self) -> int:
        """Rows of an approximate certificate."""
        return max(ROWS, self.seen // SHARE)

    def worth(self, block: int, clusters: int, blocks: bool) -> bool:
        """Say whether cheap settings save enough to look for one, by shapes alone.

        Of the eight clusters that the second one may read in a row, half are read.
        """
        own = (block / 2 if self.problem.causal else block) if blocks else 0.0
        far = self.costs.keys * clusters / block
        self.least = self.costs.rung(own, far, 4.0 * block / clusters)
        tests = self.costs.finite_sample(0) if self.kind == "finite-sample" else 0.0
        both = self.costs.exact(ROWS + self.rows) + self.least + tests
        return self.seen > 2 * ROWS and both < WORTH

    def answer(self, regions_of: Callable[[], Regions]) -> Found:
        """Try, run and certify; ``regions_of()`` makes the clusters."""
        problem, start = self.problem, time.perf_counter()
        try:
            _, factor = scale_of(problem)
        except ValueError:  # all that is visible is zero: so is every output
            return self.exact()
        if is_steep(problem):
            return self.exact()
        rows = np.sort(self.draw["rows"])
        wanted, room = float(self.rows), self.tolerance**2
        if self.kind == "finite-sample":
            look = np.sort(self.draw["rows"][:LOOK])
            o = factor * exact_rows(problem, look).astype(np.float64)
            most = hull_errors(problem, o, look, factor)
            wanted = needed_rows(most, float(squares(o).sum()), self.tolerance, self.level)
            room *= 1.0 - SPARE**2
            if self.least + self.costs.finite_sample(wanted) >= 1.0:
                self.seconds["trial"] += time.perf_counter() - start
                return self.exact()
        o = factor * exact_rows(problem, rows).astype(np.float64)
        regions = regions_of()
        k = kept_rows(problem, problem.arrays.k)
        trial = Trial(self, regions, k, regions.clusters.moments(k), rows, o, factor)
        limit, after = math.sqrt(room), -1
        self.seconds["trial"] += time.perf_counter() - start
        for attempt in range(ATTEMPTS):
            start = time.perf_counter()
            after = trial.next(after, limit, wanted)
            self.seconds["trial"] += time.perf_counter() - start
            if after < 0:
                break
            made = trial.run(after)
            start = time.perf_counter()
            certificate = trial.certify(made, attempt, int(wanted))
            self.seconds["certificate"] += time.perf_counter() - start
            if certificate is None:
                break
            if certificate.high <= self.tolerance:
                return Found(
                    Rung(*trial.at(LADDER[after])),
                    regions,
                    certificate,
                    tuple(self.refused),
                    self.tried,
                    self.seconds,
                    made.out,
                    log_sums(made.top, made.total),
                )
            self.refused.append(certificate)
            limit *= self.tolerance / certificate.high
        return self.exact()


class Trial:
    """Settings that share their clusters, on the rows of a trial and on all rows."""

    def __init__(
        self,
        search: Search,
        regions: Regions,
        k: Array,
        moments: Moments,
        rows: Array,
        o: Array,
        factor: float,
    ) -> None:
        self.search, self.problem = search, search.problem
        self.regions, self.k, self.moments = regions, k, moments
        self.v = kept_rows(self.problem, _values(self.problem))
        self.rows, self.o, self.factor = rows, o, factor
        self.y = squares(o)
        self.few = _some(self.problem, rows)
        self.layout: Rows = regions.rows.some(rows)

    def at(self, rung: Rung) -> tuple[int, float]:
        """Return near and tau of a setting, near at most all clusters."""
        return min(rung.near, self.regions.clusters.count), rung.tau

    def next(self, after: int, limit: float, certified: float) -> int:
        """Return the first setting beyond one whose upper end is below a limit, -1 for none."""
        for i in range(after + 1, len(LADDER)):
            rung = LADDER[i]
            near, tau = self.at(rung)
            if rung not in self.search.tried:
                made = solve(self.few, self.k, self.v, self.moments, self.layout, near, tau)
                self.search.tried[rung] = self._high(made.out)
                if self.cost(made.near) + self.search.costs.exact(certified) >= 1.0:
                    return -1
            if self.search.tried[rung] <= limit:
                return i
        return -1

    def cost(self, near: Array) -> float:
        """Return the cost of a setting on all rows, by what those of the trial read."""
        own, far, keys = self.layout.reads(near, self.moments.starts)
        return self.search.costs.rung(float(own.mean()), float(far.mean()), float(keys.mean()))

    def _high(self, out: Array) -> float:
        """Return the upper end for the error of all rows."""
        m, search = len(self.rows), self.search
        x = squares(self.factor * out.astype(np.float64) - self.o)
        if not np.isfinite(x).all():
            return math.inf
        t = quotient(float(x.sum()), float(self.y.sum()))
        if t == 0.0:
            return math.inf  # nothing can be estimated
        inclusion = np.full(m, m / search.seen)
        sample = Sample(np.arange(m), np.zeros(m), inclusion, x, self.y)
        confidence = 1.0 - 2.0 * (1.0 - search.confidence) / len(LADDER)
        ends = expansion(sample, t, search.seen, confidence)
        return math.inf if ends is None else math.sqrt(ends[1])

    def run(self, i: int) -> Solved:
        """Return a setting on all rows."""
        start = time.perf_counter()
        near, tau = self.at(LADDER[i])
        made = solve(self.problem, self.k, self.v, self.moments, self.regions.rows, near, tau)
        self.search.seconds["output"] += time.perf_counter() - start
        return made

    def certify(self, made: Solved, attempt: int, rows: int) -> ErrorCertificate | None:
        """Return the certificate of an output from rows of its own, None where there is none."""
        search, problem, out = self.search, self.problem, made.out
        peak = float(np.abs(out).max(initial=0.0))
        if not self.factor * peak <= LARGEST_OUTPUT:  # NaN too
            return None
        known = know(problem, out, self.factor, guess=False)
        confidence = 1.0 - search.level
        if search.kind == "approximate":
            # No second look: where far clusters hide a key their own estimate says nothing either.
            nothing = np.zeros_like(known.square)
            known = known._replace(guess=Guess(nothing, known.square, nothing))
        else:
            most, size = float(highest(known, 0.0).sum()), float(known.square.sum())
            needed = needed_rows(most, size, search.tolerance, search.level)
            if search.costs.finite_sample(needed) >= 1.0:
                return None
            rows = int(needed)
        certificate = certify_known(
            known,
            lambda index: self.factor * exact_rows(problem, index).astype(np.float64),
            rows,
            confidence,
            search.draw["times"][attempt][known.rows],
            search.kind,
        )
        return replace(certificate, confidence=search.confidence)
