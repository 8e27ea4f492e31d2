"""Errors of long heads, from exact rows at a random sample that all approximations share.

Rows are drawn in turn without replacement, half alike and half by one over the number of keys that
a row sees: where there is a causal mask the first rows are the largest, and few.  The draw knows
nothing of any output, so that one sample serves all of them; the interval of ``output_fro_rel`` is
the finite-sample one of ``sketchattn.errors.intervals``, which holds for any such weights.

Other fields are quotients of sums over the sample, each row divided by the probability that it is
drawn.  Spectral norms and the worst row cannot be had from a sample of rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..base.draws import as_generator
from ..base.floating import without_floating_errors
from ..kernels._threads import blas_single_thread, product
from ..operators.wrapped import as_operator
from ..problem import AttentionProblem
from .certificates import check_output, exact_rows, know
from .intervals import Sample, finite_sample, point_estimate, quotient, race
from .reports import FIELDS, ErrorReport, row_sums

Array = NDArray[Any]

# What a sample of rows does not tell.
UNKNOWN = ("output_spec_rel", "output_spec_amm", "matrix_spec_rel", "row_tv_max")
CONFIDENCE = 0.95
# Entries of the block of rows of A that is compared in one piece.
BLOCK_ENTRIES = 1 << 22
# Entries of sampled rows of A that are kept for the next approximation: 512 MB.
KEPT_ENTRIES = 1 << 26


@dataclass(frozen=True)
class RowSample:
    """Hold some rows of a head in the order of their draw, and what is exact there.

    Attributes
    ----------
    problem : AttentionProblem
    index : ndarray (n,)
        The rows.
    leverage, inclusion : ndarray (n,)
        As in `Sample`.
    output : ndarray (n, d_v)
        Exact rows of O, float64.
    mean : ndarray (n, d_v)
        The mean of the values that each row sees.
    """

    problem: AttentionProblem
    index: Array
    leverage: Array
    inclusion: Array
    output: Array
    mean: Array

    def blocks(self) -> Iterator[tuple[slice, Array]]:
        """Yield positions in the sample with the exact rows of A there, float64 (b, n_k)."""
        step = max(1, BLOCK_ENTRIES // self.problem.n_k)
        keep = len(self.index) * self.problem.n_k <= KEPT_ENTRIES
        for start in range(0, len(self.index), step):
            part = slice(start, start + step)
            rows = self.index[part]
            if keep:
                key = ("sampled rows", len(self.index), start)
                yield part, self.problem.cached(key, partial(exact_weights, self.problem, rows))
            else:
                yield part, exact_weights(self.problem, rows)

    def total(self, x: Array) -> float:
        """Return the estimate of a sum over all rows from values (n,) of the sampled ones."""
        return float((x / self.inclusion).sum())


class SampledReport(NamedTuple):
    """An error report from a sample of rows, with the interval of ``output_fro_rel``."""

    report: ErrorReport
    low: float
    high: float
    rows: int


def draw_rows(problem: AttentionProblem, rows: int, seed: int = 0) -> RowSample:
    """Return the sample of ``rows`` rows of a head, computed once for each size and seed.

    Of fewer rows than see a key.
    """

    def compute() -> RowSample:
        counts = problem.visible_counts()
        seen = np.flatnonzero(counts > 0)
        few = 1.0 / counts[seen]
        weights = 1.0 + few / few.mean()
        position, leverage, inclusion = race(weights, rows, 0, as_generator(seed))
        index = seen[position]
        output = exact_rows(problem, index)
        return RowSample(problem, index, leverage, inclusion, output, _means(problem, index))

    return problem.cached(("row sample", rows, seed), compute)


def seeing_rows(problem: AttentionProblem) -> int:
    """Return how many rows see a key."""
    return int((problem.visible_counts() > 0).sum())


@blas_single_thread()
def exact_weights(problem: AttentionProblem, index: Array) -> Array:
    """Return rows ``index`` of A, float64 (len(index), n_k), each divided by its own sum."""
    q = problem.scale * problem.q[index].astype(np.float64)
    keys = problem.cached("wide keys", lambda: problem.k.astype(np.float64))
    logits: Array = product(q, keys.T)
    if problem.causal or problem.key_mask is not None:
        np.copyto(logits, -np.inf, where=~problem.visible(index))
    logits -= logits.max(axis=1, keepdims=True)
    np.exp(logits, out=logits)
    logits /= logits.sum(axis=1, keepdims=True)
    return np.asarray(logits)


def _means(problem: AttentionProblem, index: Array) -> Array:
    """Return the mean of the values that each row sees, float64 (len(index), d_v)."""
    counts = problem.visible_counts()[index]
    out = np.zeros((len(index), problem.values.shape[1]))
    kept = problem.kept_keys
    order = np.argsort(counts, kind="stable")
    total, done = np.zeros(out.shape[1]), 0
    for i in order:  # each key is added once
        total += problem.values[kept[done : counts[i]]].sum(axis=0, dtype=np.float64)
        done = int(counts[i])
        out[i] = total / max(done, 1)
    return out


def _squares(x: Array) -> Array:
    square: Array = np.einsum("ij,ij->i", x, x)
    return square


@without_floating_errors
@blas_single_thread()
def sampled_report(
    problem: AttentionProblem,
    rows: int,
    ahat: object = None,
    *,
    output: ArrayLike | None = None,
    confidence: float = CONFIDENCE,
) -> SampledReport:
    """Measure an approximation on a sample of rows; the head may be of any length.

    Parameters
    ----------
    problem : AttentionProblem
        With values.
    rows : int
        Rows to compute, fewer than see a key; the same ones each time.
    ahat : AttentionOperator, LinearOperator or array (n_q, n_k), optional
        The approximation.
    output : array (n_q, d_v), optional
        In place of ``ahat``; fields of the matrix are NaN.
    confidence : float, default 0.95
        Of the interval, for this approximation alone.

    Returns
    -------
    SampledReport
        Estimates; ``low <= output_fro_rel <= high`` with the finite-sample interval.  The fields
        ``UNKNOWN`` are NaN.

    Examples
    --------
    >>> import sketchattn as sa
    >>> problem = sa.make_heads("clustered", n=256, d=8, rng=0)[0]
    >>> ahat = sa.UniformColumns(rank=64).approximate(problem, rng=0)
    >>> found = sampled_report(problem, 64, ahat)
    >>> found.low <= sa.error_report(problem, ahat).output_fro_rel <= found.high
    True
    """
    operator = None if ahat is None else as_operator(ahat, problem)
    given = operator @ problem.values if operator is not None else output
    array, factor = check_output(problem, given)
    drawn = draw_rows(problem, rows)
    known = know(problem, array, factor, guess=False)
    exact = factor * drawn.output
    error = factor * array[drawn.index].astype(np.float64, order="C") - exact
    sample = Sample(
        np.searchsorted(known.rows, drawn.index),
        drawn.leverage,
        drawn.inclusion,
        _squares(error),
        _squares(exact),
    )
    if not sample.y.any():
        raise ValueError(
            f"the exact output must not be zero at all {rows} sampled rows, got |O|_F = 0 there; "
            f"measure more rows"
        )
    t = point_estimate(known, sample)
    low, high = finite_sample(known, sample, 0.5 * (1.0 - confidence))
    wide = None if operator is None else operator.wide()
    size = math.sqrt(drawn.total(sample.x) + known.fixed) / factor
    rows_of = None if wide is None else lambda part, _: wide.rows(drawn.index[part])
    report = _report(drawn, math.sqrt(t), size, _matrix(drawn, rows_of))
    return SampledReport(report, math.sqrt(min(low, t)), math.sqrt(max(high, t)), rows)


@without_floating_errors
@blas_single_thread()
def sampled_topk(
    problem: AttentionProblem, rows: int, rank: int, *, renormalize: bool = True
) -> SampledReport:
    """Measure the floor `TopK` on a sample of rows, where it is exact.

    Nothing is known of its other rows, so that there is no interval: its ends are NaN.
    """
    drawn = draw_rows(problem, rows)
    error = np.zeros(len(drawn.index))

    def keep(part: slice, exact: Array) -> Array:
        kept = np.zeros_like(exact)
        chosen = np.argpartition(exact, problem.n_k - rank, axis=1)[:, problem.n_k - rank :]
        weights = np.take_along_axis(exact, chosen, axis=1)
        if renormalize:
            weights /= weights.sum(axis=1, keepdims=True)
        np.put_along_axis(kept, chosen, weights, axis=1)
        for i, row in enumerate(range(part.start, min(part.stop, len(error)))):
            found = weights[i] @ problem.values[chosen[i]].astype(np.float64)
            error[row] = float(((found - drawn.output[row]) ** 2).sum())
        return kept

    matrix = _matrix(drawn, keep)
    size = math.sqrt(drawn.total(error))
    relative = quotient(size, math.sqrt(drawn.total(_squares(drawn.output))))
    return SampledReport(_report(drawn, relative, size, matrix), math.nan, math.nan, rows)


def _matrix(
    drawn: RowSample, rows_of: Callable[[slice, Array], Array] | None
) -> tuple[float, dict[str, float]]:
    """Return ``|A|_F`` and the fields of the matrix, of which ``rows_of`` gives sampled rows."""
    square, off, variation, divergence = np.zeros((4, len(drawn.index)))
    for part, exact in drawn.blocks():
        if rows_of is None:
            square[part] = _squares(exact)
            continue
        found = row_sums(exact, np.asarray(rows_of(part, exact), np.float64))
        square[part], off[part] = found.exact_square, found.square
        variation[part], divergence[part] = found.variation, found.divergence
    if not np.isfinite(variation).all():
        row = int(drawn.index[~np.isfinite(variation)][0])
        raise ValueError(
            f"ahat must be finite, got NaN or infinity in row {row}; correct the approximation"
        )
    fro, weight = math.sqrt(drawn.total(square)), drawn.total(np.ones(len(drawn.index)))
    if rows_of is None:
        return fro, {}
    return fro, {
        "matrix_fro_rel": quotient(math.sqrt(drawn.total(off)), fro),
        "row_tv_mean": drawn.total(variation) / weight,
        "row_kl_mean": drawn.total(divergence) / weight,
    }


def _report(
    drawn: RowSample, relative: float, size: float, matrix: tuple[float, dict[str, float]]
) -> ErrorReport:
    """Return all fields from ``|Ohat - O|_F``, relative and as it is, and those of the matrix."""
    base = math.sqrt(drawn.total(_squares(drawn.mean - drawn.output)))
    fro, fields = matrix
    return ErrorReport(
        **dict.fromkeys(FIELDS, math.nan)
        | fields
        | {
            "output_fro_rel": relative,
            "output_fro_amm": quotient(size, fro * _value_norm(drawn.problem)),
            "skill": 0.0 if size == base == 0.0 else 1.0 - quotient(size, base),
        }
    )


def _value_norm(problem: AttentionProblem) -> float:
    """Return ``|V|_F`` over the keys that are not masked."""

    def compute() -> float:
        kept = problem.kept_keys
        parts = range(0, len(kept), 1 << 16)
        return math.sqrt(
            sum(
                float(_squares(problem.values[kept[i : i + (1 << 16)]].astype(np.float64)).sum())
                for i in parts
            )
        )

    return problem.cached("value norm", compute)
