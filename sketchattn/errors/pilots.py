"""A cheap second look at every row, which says where the error of an output may sit.

Keys are put into at most G groups, each of which is looked at as one key: the mean of its keys and
values, as often as a row sees a key of it.  Groups are those of the farthest-first traversal of
Gonzalez (1985, "Clustering to minimize the maximum intercluster distance"): keys unlike all others
have a group of their own, so that a row which attends to one of them is seen to be unlike others.
``O((n_q + n_k) G d)`` operations, no randomness.

Nothing is promised: guesses decide how likely a row is to be drawn, and no interval depends on
their truth.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..problem import AttentionProblem

Array = NDArray[Any]

GROUPS = 32


class Guess(NamedTuple):
    """What is guessed of the rows that see a key, arrays (m,), float64.

    ``error``: of ``|ohat_i - o_i|^2``; ``square``: of ``|o_i|^2``; ``spread``: the variance of the
    logits of row i over all keys.
    """

    error: Array
    square: Array
    spread: Array


def farthest_first(keys: Array, groups: int) -> Array:
    """Return the group of each key, int64 (n_k,): that of the nearest of ``groups`` leaders.

    The first leader is the key farthest from the mean, each other one the key farthest from all
    leaders before; there are fewer groups where all keys are equal to leaders.
    """
    largest = float(np.abs(keys).max(initial=0.0))
    keys = keys / (largest or 1.0)  # squares are finite

    def away(point: Array) -> Array:
        difference = keys - point
        square: Array = np.einsum("ij,ij->i", difference, difference)
        return square

    label = np.zeros(len(keys), np.int64)
    leader = int(np.argmax(away(keys.mean(axis=0))))
    distance = np.full(len(keys), np.inf)
    for group in range(groups):
        new = away(keys[leader])
        nearer = new < distance
        label[nearer] = group
        distance[nearer] = new[nearer]
        leader = int(np.argmax(distance))
        if distance[leader] == 0.0:
            break
    return label


def guess_rows(problem: AttentionProblem, output: Array, rows: Array, factor: float) -> Guess:
    """Return guesses of ``rows`` (m,), each of which sees a key, of ``factor`` times the output."""
    from ..kernels._threads import blas_single_thread

    counts = problem.visible_counts()[rows]
    seen = problem.kept_keys[: counts.max()]  # keys that some row sees
    keys = problem.k[seen].astype(np.float64)
    values = factor * problem.values[seen].astype(np.float64)
    # Logits of float64 inputs may overflow; what is not finite guesses nothing.
    with np.errstate(all="ignore"), blas_single_thread():  # the same bits for any threads
        label = farthest_first(keys, GROUPS)
        member = np.eye(label.max() + 1)[label]
        size = member.sum(axis=0)
        q = problem.scale * problem.q[rows].astype(np.float64)
        logits = q @ (member.T @ keys / size[:, None]).T
        if counts.min() < len(keys):
            size = np.cumsum(member, axis=0)[counts - 1]
        logits += np.log(size)
        logits -= logits.max(axis=1, keepdims=True)
        weights = np.exp(logits)
        pilot = weights @ (member.T @ values / member.sum(axis=0)[:, None])
        pilot /= weights.sum(axis=1, keepdims=True)
        keys -= keys.mean(axis=0)
        spread = np.einsum("ij,ij->i", q @ (keys.T @ keys / len(keys)), q)
        # Even attention to random values has |o_i|^2 near their mean square over their number.
        square = np.einsum("ij,ij->i", pilot, pilot)
        even = np.einsum("ij,ij->i", values, values).mean() / counts
        pilot -= factor * output[rows].astype(np.float64)
        error = np.einsum("ij,ij->i", pilot, pilot)
    return Guess(
        np.where(np.isfinite(error), error, 0.0),
        np.where(np.isfinite(square), np.maximum(square, even), even),
        np.where(np.isfinite(spread), spread, 0.0),
    )
