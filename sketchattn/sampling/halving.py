"""Halvings of weighted keys: every second one stays, with the weight of both."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

RULES = ("simple", "kt")


class Kernel(NamedTuple):
    """Hold what points are compared by, and how a halving decides.

    ``kappa(x, y) = exp(|scale| k_x . k_y - shift) (v_x . v_y + b^2)``, ``b = max |v_jl|``; the last
    factor is left out where ``values`` are None.

    Attributes
    ----------
    keys, values : ndarray (n_k, d), (n_k, d_v) or None
    scale : float
    rule : {"simple", "kt"}
    delta : float
        Failure probability of a bucket.
    bound : float, optional
        b; None is that of the points of each halving.
    """

    keys: Array
    values: Array | None
    scale: float
    rule: str = "simple"
    delta: float = 0.5
    bound: float | None = None


class Weighted(NamedTuple):
    """Hold positions of keys, ascending, and how many keys each stands for."""

    positions: Array
    weights: Array


def halve(
    points: Weighted,
    kernel: Kernel,
    bucket: int,
    rng: np.random.Generator,
    *,
    one_flip: bool = False,
) -> Weighted:
    """Keep one point of each pair of neighbours, with the sum of both weights.

    Buckets of ``bucket`` points, an even number, are halved on their own.  A fair bit a bucket
    exchanges what is kept and what is dropped, so that each point of a pair stays with probability
    1/2.  Of a pair with different weights each stays with probability proportional to its own: the
    sum of weights never changes, and the mean weight of a point is the one that it had.  A point
    without a partner stays as it is.

    Parameters
    ----------
    points : Weighted
    kernel : Kernel
    bucket : int
    rng : numpy.random.Generator
        Gives uniforms (buckets, bucket/2), then bits (buckets,).
    one_flip : bool
        The first bit holds for all buckets.
    """
    from ..kernels.halving import halved

    positions, weights = points
    n = len(positions)
    if n < 2:
        return points
    bucket = min(bucket, n + n % 2)
    count = -(-n // bucket)
    uniforms = rng.random((count, bucket // 2)).ravel()[: n // 2]
    flips = rng.integers(0, 2, count).astype(bool)
    starts = np.minimum(np.arange(count + 1) * bucket, n)
    even, odd = (positions[i : 2 * (n // 2) : 2] for i in (0, 1))
    light, heavy = (weights[i : 2 * (n // 2) : 2] for i in (0, 1))
    equal = light == heavy
    values = None
    if kernel.values is not None:
        values = kernel.values[positions]
        most = float(np.abs(values).max(initial=0.0)) if kernel.bound is None else kernel.bound
        values = values / values.dtype.type(most if most > 0 else 1)
    second = halved(
        np.ascontiguousarray(kernel.keys[positions]),
        values,
        starts,
        equal,
        uniforms,
        scale=kernel.scale,
        delta=kernel.delta,
        rule=kernel.rule,
    )
    of_pair = np.arange(n // 2) // (bucket // 2)
    second ^= flips[0 if one_flip else of_pair]
    second = np.where(equal, second, uniforms >= light / (light + heavy))
    left = slice(2 * (n // 2), n)
    return Weighted(
        np.concatenate([np.where(second, odd, even), positions[left]]),
        np.concatenate([light + heavy, weights[left]]),
    )
