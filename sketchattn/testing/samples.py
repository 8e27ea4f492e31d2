"""Whether two samples of outputs have one law, where draws cannot be compared: permutation tests.

The level is exact whatever the outputs look like: under the hypothesis that both programs draw
from one law every assignment of the pooled outputs to the two is equally likely.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# Exceedances after which a p-value is settled (Besag and Clifford 1991), and assignments a block.
_ENOUGH = 10
_BLOCK = 1000

# Of pooled outputs (N, m): a function of indicators (P, N), 1 for the first program, of how
# different the two groups are.
Statistic = Callable[[Array], Array]


def p_value(statistic: Statistic, first: int, count: int, least: float, rng: Any) -> float:
    """Return the p-value of a statistic, settled as soon as it cannot be small.

    Parameters
    ----------
    statistic : callable (P, N) -> (P,)
    first, count : int
        The first ``first`` of ``count`` outputs are those of one program.
    least : float
        The smallest p-value that is told from smaller ones.
    rng : numpy.random.Generator
    """
    observed = np.arange(count) < first
    value = statistic(observed[None].astype(np.float64))[0]
    value -= 1e-9 * abs(value)  # ties count, whatever rounding makes of them
    most = int(np.ceil(1 / least))
    done = beyond = 0
    while done < most:
        block = np.broadcast_to(observed, (min(_BLOCK, most - done), count))
        found = statistic(rng.permuted(block, axis=1).astype(np.float64)) >= value
        if beyond + found.sum() >= _ENOUGH:
            place = int(np.flatnonzero(np.cumsum(found) + beyond >= _ENOUGH)[0])
            return _ENOUGH / (done + place + 1)
        beyond += int(found.sum())
        done += len(found)
    return (beyond + 1) / (done + 1)


def means(pooled: Array, slack: float) -> Statistic:
    """Compare means: the largest difference of an entry over its standard error.

    Differences up to ``slack``, which rounding explains, are none.
    """
    count = len(pooled)
    spread = pooled.std(axis=0) + 1e-30
    total = pooled.sum(axis=0)

    def statistic(groups: Array) -> Array:
        n = groups.sum(axis=1, keepdims=True)
        sums = groups @ pooled
        gap = np.abs(sums / n - (total - sums) / (count - n))
        return np.asarray((np.maximum(gap - slack, 0) / spread).max(axis=1))

    return statistic


def scores(x: Array) -> Statistic:
    """Compare the means of one number (N,) an output."""
    count, total = len(x), x.sum()

    def statistic(groups: Array) -> Array:
        n = groups.sum(axis=1)
        sums = groups @ x
        return np.asarray(np.abs(sums / n - (total - sums) / (count - n)))

    return statistic


def energy(pooled: Array) -> Statistic:
    """Compare laws: the energy distance, which is zero for equal laws only."""
    squares = (pooled**2).sum(axis=1)
    gaps = squares[:, None] + squares - 2 * pooled @ pooled.T
    distances = np.sqrt(np.maximum(gaps, 0))

    def statistic(groups: Array) -> Array:
        n = groups.sum(axis=1)
        m = len(pooled) - n
        others = 1 - groups
        to = groups @ distances
        within = (to * groups).sum(axis=1) / n**2
        between = (to * others).sum(axis=1) / (n * m)
        rest = ((others @ distances) * others).sum(axis=1) / m**2
        return np.asarray(2 * between - within - rest)

    return statistic


def ranks(x: Array) -> Array:
    """Return ranks, of equal numbers their mean."""
    _, place, count = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return np.asarray((last - (count - 1) / 2)[place])


def comparisons(
    theirs: Array, ours: Array, exact: Array, slack: float
) -> Iterator[tuple[str, Statistic]]:
    """Yield the tests of two samples of outputs (R, m), by what they compare; cheap ones first.

    Parameters
    ----------
    theirs, ours : array (R, m)
    exact : array (m,)
        The output of exact attention.
    slack : float
        What rounding changes an entry by.
    """
    pooled = np.concatenate([theirs, ours])
    centre = pooled.mean(axis=0)
    yield "size along the mean", scores(pooled @ centre / max(float(centre @ centre), 1e-30))
    yield (
        "distance from exact attention",
        scores(ranks(np.round(np.linalg.norm(pooled - exact, axis=1), 12))),
    )
    yield "law of the outputs", energy(pooled)
    yield "mean of each entry", means(pooled, slack)


TESTS = 4
