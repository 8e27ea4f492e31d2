"""The gradient of Combiner at fixed regions: of its rows, of summaries, and of reference queries.

Which regions are direct since they are heavy is decided by jumps, and stays as it is.  Reference
queries that are means weighted by attention come from a matrix of the same regions with other
reference queries, which has a gradient of the same kind.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...operators.partitioned.operator import PartitionedAttention
from ...operators.partitioned.pullback import OfRegions, slots_pullback, summaries_pullback
from ...operators.pullback import Gradient, zero_gradient
from ...problem import AttentionProblem
from .choices import is_named
from .pieces import LEAST_MASS, column_positions, reference_sums

Array = NDArray[Any]


class Made(NamedTuple):
    """Hold the matrix of one pattern, and how it came about.

    Attributes
    ----------
    ahat : PartitionedAttention
    before : tuple of PartitionedAttention
        Each gave the reference queries of the next one, the last of them those of ``ahat``.
    start : str or array
        The reference of the first.
    old : ndarray or None
        Numbers of regions before empty ones were dropped.
    kept : ndarray or None
        Regions of the matrix before that ``ahat`` still has, where their numbers moved.
    regions : int
        How many regions that one has.
    """

    ahat: PartitionedAttention
    before: tuple[PartitionedAttention, ...]
    start: Any
    old: Array | None
    kept: Array | None
    regions: int


def gradient(problem: AttentionProblem, made: Made, pilots: Array | None, g: Array) -> Gradient:
    """Return what a cotangent G (n_q, d_v) of ``Ahat V`` is at Q, K and V, in float64."""
    out, ahat = zero_gradient(problem), made.ahat
    v = np.array(problem.values)
    if problem.key_mask is not None:
        v[~problem.key_mask] = 0
    every = np.arange(problem.n_q)
    of = slots_pullback(ahat, every, g, v, np.asarray(ahat.region_values(v)), out)
    dq0 = summaries_pullback(ahat, of, v, out)
    if made.kept is not None and dq0 is not None and not ahat.reference.shared:
        spread = np.zeros((made.regions, problem.d))
        spread[made.kept] = dq0
        dq0 = spread
    for earlier in reversed(made.before):
        assert dq0 is not None
        dq0 = _through_masses(problem, earlier, pilots, dq0, out)
    if dq0 is not None:
        _at_start(problem, made, dq0, out)
    return out


def _through_masses(
    problem: AttentionProblem,
    ahat: PartitionedAttention,
    pilots: Array | None,
    dq0: Array,
    out: Gradient,
) -> Array | None:
    """Return what a cotangent of weighted means of queries is at the references of the weights."""
    # The layout keeps the local weights of the last matrix that was made of it.
    ahat.layout.summarize(problem, ahat.reference, ahat.rule)
    sums, mass, extra = reference_sums(ahat, problem, pilots)
    some = mass >= LEAST_MASS
    divisor = np.where(some, mass, 1.0)[:, None]
    dsums = np.where(some[:, None], dq0, 0.0) / divisor
    dmass = -np.sum(dsums * sums, axis=1) / divisor[:, 0]
    if pilots is not None:
        regions = max(int(np.count_nonzero(ahat.layout.nonempty)), 1)
        mean = problem.q.mean(axis=0)
        dextra = float(np.sum(dsums @ mean) + dmass.sum())
        out.q[:] += extra * dsums.sum(axis=0) / problem.n_q
        dmass += dextra / regions
    rows = np.arange(problem.n_q) if pilots is None else pilots
    asked = np.concatenate([problem.q[rows], np.ones((len(rows), 1))], axis=1)
    xhat = np.concatenate([dsums, dmass[:, None]], axis=1)
    of = slots_pullback(ahat, rows, asked, None, xhat, out)
    # Queries are weighed, too.
    np.add.at(out.q, rows, ahat.region_masses(rows) @ dsums)
    none = np.zeros((len(of.bias), 0))
    found = summaries_pullback(ahat, OfRegions(of.keys, of.bias, none), None, out)
    if found is not None:
        # A region without mass has the reference query that it had.
        rest = np.where(some[:, None], 0.0, dq0)
        found += rest.sum(axis=0) if ahat.reference.shared else rest
    return found


def _at_start(problem: AttentionProblem, made: Made, dq0: Array, out: Gradient) -> None:
    """Add what a cotangent of given reference queries is at the queries that they are made of."""
    if is_named(made.start, "global_mean"):
        out.q[:] += dq0.sum(axis=0) / problem.n_q
    elif is_named(made.start, "column") and made.old is not None:
        np.add.at(out.q, column_positions(problem, made.old), dq0)
