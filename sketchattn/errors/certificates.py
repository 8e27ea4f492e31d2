"""Certificates: how wrong an output is, whoever made it, from exact rows at a random sample.

`certify` computes some rows of O in float64, in code that shares no product with the kernels
whose output it may be asked to judge, and states an interval for
``theta = |Ohat - O|_F / |O|_F``.  How rows are drawn, what the interval is and why it holds is the
text of ``sketchattn.errors.intervals``.

What a row sees is decided from its mask alone: a row that sees no key has the output zero,
whatever the logits of what is hidden.  A row that sees a key has logits that are finite in float64,
and the largest of them is subtracted first; so +-1e30 are logits like others.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from os import PathLike
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from ..base.arguments import as_array, closest, float_dtype
from ..base.draws import Rng, as_generator
from ..base.floating import without_floating_errors
from ..base.words import Phrase, Worded, number, shown
from ..problem import AttentionProblem
from .frames import by_head, is_many
from .intervals import (
    FAR,
    SLACK,
    Known,
    Sample,
    Times,
    approximate,
    draw,
    draw_heavy,
    finite_sample,
    point_estimate,
)
from .pilots import Guess, guess_rows

if TYPE_CHECKING:
    import pandas as pd

Array = NDArray[Any]

KINDS = ("finite-sample", "approximate")

# Rows and keys of the tile of logits that one thread holds: 2 MB in float64.
ROW_TILE = 256
KEY_TILE = 1024
LARGEST_OUTPUT = 2.0**200
NOTHING = Guess(*np.empty((3, 0)))  # is guessed


@dataclass(frozen=True, repr=False)
class ErrorCertificate(Worded):
    """Record an interval for ``theta = |Ohat - O|_F / |O|_F``.

    Its text names the interval; ``as_dict`` has the fields alone.

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

    @property
    def width(self) -> float:
        """How far the interval leaves theta open: ``high / low``.

        1 for a point, infinite where the lower end is zero and the upper one is not.
        """
        if self.low == self.high:
            return 1.0
        return self.high / self.low if self.low > 0.0 else math.inf

    def as_dict(self) -> dict[str, float | int | str]:
        """Return the fields by name, in order."""
        return asdict(self)

    def __str__(self) -> str:
        """Return the interval in one line.

        Examples
        --------
        >>> print(ErrorCertificate(0.12, 0.1, 0.15, 256, 0.95, "finite-sample"))
        error 0.12; 95 %: 0.1 to 0.15; from 256 rows, finite-sample
        >>> print(ErrorCertificate(0.12, 0.12, 0.12, 512, 0.95, "exact"))
        error 0.12; exact: all 512 rows
        """
        if self.kind == "exact":
            return f"error {number(self.estimate)}; exact: all {self.rows} rows"
        return (
            f"error {number(self.estimate)}; {100 * self.confidence:g} %: {number(self.low)} to "
            f"{number(self.high)}; from {self.rows} rows, {self.kind}"
        )

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self}>"

    def _title(self) -> str:
        return str(self)

    def _phrases(self) -> list[Phrase]:
        about = {
            "estimate": "of |Ohat - O|_F / |O|_F from the rows that were computed",
            "low": "the error is at least this, with the confidence below",
            "high": "and at most this",
            "rows": "computed exactly",
            "confidence": "probability that the interval holds the error",
            "kind": "finite-sample: always valid; approximate: tight; exact: all rows",
        }
        return [Phrase(name, shown(x), about[name]) for name, x in self.as_dict().items()]


# --- exact rows -----------------------------------------------------------------------------


def exact_rows(problem: AttentionProblem, index: Array, factor: float = 1.0) -> Array:
    """Return rows ``index`` of ``factor`` times the exact output, float64 (len(index), d_v).

    ``o_i = sum_j exp(L_ij - m_i) v_j / sum_j exp(L_ij - m_i)`` over the visible keys.  Tiles
    of keys are split over threads and merged in order, each on one BLAS thread, so that no bit
    depends on the number of threads.  NumPy's BLAS and a merge of its own: of the kernels whose
    outputs may be the ones to certify only the exponential is shared.
    """
    from ..kernels._threads import blas_single_thread, thread_count
    from ..kernels.softmax import LOG2E, online_softmax

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


def finite_rows(index: Array, o: Array) -> Array:
    """Return exact rows; refuse those in which a logit overflowed."""
    finite = np.isfinite(o).all(axis=1)
    if not finite.all():
        raise ValueError(
            f"logits must be finite in float64, got an overflow in row {int(index[~finite][0])}; "
            f"scale q and k down"
        )
    return o


class RememberedRows:
    """Exact rows of a problem, times a factor, each computed when it is first asked for.

    Outputs that are compared on the same head share them: what has been computed says nothing of
    which rows will be drawn, so that a sample of rows is as random as with rows computed anew.
    """

    def __init__(self, problem: AttentionProblem, factor: float) -> None:
        self._problem = problem
        self.factor = factor
        self._rows = np.empty((problem.n_q, problem.values.shape[1]))
        self._known = np.zeros(problem.n_q, bool)

    def __call__(self, index: Array) -> Array:
        """Return rows ``index`` of the exact output times the factor, float64."""
        missing = np.unique(index[~self._known[index]])
        if len(missing):
            found = exact_rows(self._problem, missing, self.factor)
            self._rows[missing] = finite_rows(missing, found)
            self._known[missing] = True
        return self._rows[index]

    @property
    def computed(self) -> int:
        """How many rows were computed."""
        return int(self._known.sum())


def _squares(x: Array) -> Array:
    square: Array = np.einsum("ij,ij->i", x, x)
    return square


def _around(x: Array, centre: Array, factor: float) -> tuple[Array, Array, Array]:
    """Return ``|x_i|^2``, ``|x_i - c|^2`` and ``c . (x_i - c)`` of rows times factor, (len(x),)."""
    square, near, along = np.empty((3, len(x)))
    for start in range(0, len(x), ROW_TILE):  # in cache, and no copy of the whole
        part = slice(start, start + ROW_TILE)
        block = x[part].astype(np.float64, order="C")  # sums in one order
        block *= factor
        square[part] = _squares(block)
        block -= centre
        near[part] = _squares(block)
        along[part] = np.einsum("ij,j->i", block, centre)
    return square, near, along


def know(
    problem: AttentionProblem, output: Array, factor: float = 1.0, *, guess: bool = True
) -> Known:
    """Return what is known of every row of ``output`` (n_q, d_v), which is finite.

    Only the approximate interval needs the guesses, which are left out without ``guess``.
    """
    from ..kernels._threads import blas_single_thread

    counts = problem.visible_counts()
    values = problem.values if problem.key_mask is None else problem.values[problem.kept_keys]
    values = values[: counts.max()]  # keys that some row sees
    centre = (values if factor == 1.0 else factor * values).mean(axis=0, dtype=np.float64)
    size = math.sqrt(float(centre @ centre))
    # Row i sees the first counts_i of the keys that are kept.
    away = np.sqrt(_around(values, centre, factor)[1])
    radius = np.maximum.accumulate(away)
    far = np.sort(np.argsort(-away, kind="stable")[: min(FAR, len(away) // 2)])
    away[far] = 0.0
    rest = np.maximum.accumulate(away)
    outer = factor * values[far].astype(np.float64)
    square, near, along = _around(output, centre, factor)
    seen = counts > 0
    radius, rest = radius[counts[seen] - 1], rest[counts[seen] - 1]
    rows = np.flatnonzero(seen)
    with blas_single_thread():  # the same bits for any number of threads
        dots = factor * output[rows].astype(np.float64, order="C") @ outer.T
    dots[far >= counts[rows][:, None]] = np.inf
    return Known(
        output=output,
        factor=factor,
        rows=rows,
        square=square[seen],
        guess=guess_rows(problem, output, rows, factor) if guess else NOTHING,
        distance=np.sqrt(near[seen]),
        near=near[seen],
        along=along[seen],
        radius=radius + SLACK * (radius + size),
        rest=rest + SLACK * (radius + size),
        dots=dots,
        far=_squares(outer),
        centre=size,
        fixed=float(square[~seen].sum()),
    )


# --- the public function --------------------------------------------------------------------


def certify_known(
    known: Known,
    solve: Callable[[Array], Array],
    rows: int,
    confidence: float,
    rng: Times,
    kind: str,
) -> ErrorCertificate:
    """Return the certificate of checked arguments; ``solve`` gives exact rows times ``factor``.

    ``rng`` may be exponential times of rate 1 for the rows that see a key, for one use.
    """
    m = len(known.rows)
    exact = rows >= m
    sampler = draw if kind == "finite-sample" else draw_heavy
    position, leverage, inclusion = (
        (np.arange(m), np.ones(m), np.ones(m)) if exact else sampler(known, rows, rng)
    )
    index = known.rows[position]
    o = finite_rows(index, solve(index))
    ohat = known.factor * known.output[index].astype(np.float64, order="C")
    x, y = _squares(ohat - o), _squares(o)
    sample = Sample(position, leverage, inclusion, x, y)
    t = point_estimate(known, sample)
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


def check_rows(rows: object) -> int:
    """Return how many exact rows to compute."""
    if isinstance(rows, bool | np.bool_) or not isinstance(rows, numbers.Integral):
        raise TypeError(
            f"rows must be an integer, got {type(rows).__name__}; give how many rows to compute"
        )
    if int(rows) < 1:
        raise ValueError(f"rows must be at least 1, got {int(rows)}; the default is 256")
    return int(rows)


def check_confidence(confidence: object) -> float:
    """Return a probability with which an interval holds."""
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


def check_kind(kind: object) -> str:
    """Return the kind of an interval."""
    if kind not in KINDS:
        raise ValueError(
            f"kind must be 'finite-sample' or 'approximate', got {kind!r}"
            f"{closest(str(kind), KINDS)}"
        )
    return str(kind)


def scale_of(problem: AttentionProblem) -> tuple[float, float]:
    """Return the largest visible value, and the factor that brings its square into range.

    Refuses a problem in which there is nothing to certify.
    """
    values = problem.values
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
    # Squares of ordinary numbers are safe; others are brought there by a power of two.
    exponent = math.frexp(largest)[1]
    return largest, 1.0 if abs(exponent) <= 100 else 2.0 ** min(-exponent, 1022)


def check_output(problem: AttentionProblem, output: object) -> tuple[Array, float]:
    """Return an output (n_q, d_v) that has an error, and the power of two that it is scaled by.

    Squares of the scaled output, and of values that are scaled alike, are finite.
    """
    largest, factor = scale_of(problem)
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
    if factor * peak > LARGEST_OUTPUT:
        raise ValueError(
            f"output must be at most {LARGEST_OUTPUT / factor:.3g} where values are at most "
            f"{largest:.3g}, got {peak:.3g}; its square would overflow"
        )
    return array, factor


@overload
def certify(
    problem: AttentionProblem,
    output: object,
    rows: int = 256,
    confidence: float = 0.95,
    rng: Rng = 0,
    *,
    kind: str = "finite-sample",
) -> ErrorCertificate: ...
@overload
def certify(
    problem: Sequence[AttentionProblem] | str | PathLike[str],
    output: object,
    rows: int = 256,
    confidence: float = 0.95,
    rng: Rng = 0,
    *,
    kind: str = "finite-sample",
) -> pd.DataFrame: ...
@without_floating_errors
def certify(
    problem: AttentionProblem | Sequence[AttentionProblem] | str | PathLike[str],
    output: object,
    rows: int = 256,
    confidence: float = 0.95,
    rng: Rng = 0,
    *,
    kind: str = "finite-sample",
) -> ErrorCertificate | pd.DataFrame:
    """Return a confidence interval for the relative error of any output array.

    ``theta = |Ohat - O|_F / |O|_F``, from exact rows of O at a random sample: nothing has to be
    known of how ``output`` was made, and O is never computed as a whole.

    Parameters
    ----------
    problem : AttentionProblem, or Heads, problems, files or the name of a set as for `study`
        The exact side; its rows are computed in float64 from the numbers that it holds.
    output : array of shape (n_q, d_v); of many heads (heads, n_q, d_v) or a list of such arrays
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
        is tight and asymptotic, with a sample of its own that favours suspect rows; see Notes for
        what it leaves open.

    Returns
    -------
    ErrorCertificate
        Of many heads a frame with a row for each: ``head``, the fields, and ``width``.  Each
        interval has the confidence by itself.

    Raises
    ------
    TypeError, ValueError
        For an empty problem or one without values, an exact output that is zero, an output of
        another shape, not finite or not floating point, rows below 1, a confidence outside
        (0, 1), or an unknown kind.

    Notes
    -----
    The construction, its proof and its sources are the text of ``sketchattn.errors.intervals``.

    **Width of the finite-sample interval.**  Rows that were not seen may be as wrong as the hull
    of the values allows: a share ``log(2 / (1 - confidence)) / n`` of the N rows may be wholly
    wrong, and a sample of n exact ones show nothing of it.  Without any error the upper end is
    therefore of the size ``sqrt(s)``, ``s = log(2 / (1 - confidence)) b N / (n |O|_F^2)``, with b
    the mean of the most that ``|ohat_i - o_i|^2`` can be in the hull: with 256 of the 512 rows of
    the bundled heads it is 0.3 to 0.8, within a factor of 1.7 of this rule.  It excludes gross
    errors; that errors are of the size of rounding everywhere cannot be certified from some of the
    rows.  The lower end has no such term.  Ends are rounded outwards to the lattice ``2^(j/64)``,
    by 1.1 % at most.

    **What the approximate interval leaves open.**  It takes the rows that were drawn for typical,
    and is wider where they differ much among themselves: as wide as the finite-sample one where
    their errors have a heavy tail, or where none of them has an error.  Rows are likely to be drawn
    where the output is far from a cheap approximation of its own, where O is large, where the hull
    leaves room, and where attention is flat.  If the error sits on few rows that nothing of this
    tells from others, among rows with small and even errors, samples that miss them report a small
    error with great confidence: one such row of 512 is missed by nine of ten samples of 48 rows,
    four by half of them or more, and those intervals do not hold theta.  The mirror image, few
    exact rows among wrong ones, moves the lower end in the same way.  Asked 0.95 from 48 rows it
    held in 0.92 or more of the samples with every bundled head and method, which
    ``examples/certificate_coverage.py`` tries, and in fewer with ``nearfar`` on two of 24 longer
    heads.  In general
    k such rows are all missed with a probability near ``(1 - rows/n_q)^k``: what fewer than about
    ``4 n_q / rows`` of them add to the error may go unseen.  No interval from a sample of rows can
    do better without a bound of what was not seen; the finite-sample kind has one.

    Errors below the rounding of float64, about 1e-15, are measured as that rounding.  The cost
    is that of ``rows`` exact rows, plus ``O((n_q + n_k) d)`` with a constant of about 32.

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
    if is_many(problem):

        def one(head: AttentionProblem, part: Any) -> dict[str, Any]:
            found = certify(head, part, rows, confidence, rng, kind=kind)
            return found.as_dict() | {"width": found.width}

        return by_head(problem, output, "output", one)
    if not isinstance(problem, AttentionProblem):
        raise TypeError(
            f"problem must be an AttentionProblem, got {type(problem).__name__}; "
            f"make one with sketchattn.AttentionProblem(q, k, v)"
        )
    _ = problem.values
    count = check_rows(rows)
    level = check_confidence(confidence)
    check_kind(kind)
    generator = as_generator(rng)
    array, factor = check_output(problem, output)
    known = know(problem, array, factor, guess=kind == "approximate")
    return certify_known(
        known,
        partial(exact_rows, problem, factor=factor),
        count,
        level,
        generator,
        str(kind),
    )
