"""The gradient of Nystromformer: through three softmaxes and the small inverse between them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...kernels._threads import blas_single_thread, product
from ...operators.pullback import Gradient, means_pullback, softmax_pullback, zero_gradient
from ...operators.solve import solution
from ...problem import AttentionProblem
from ...sampling.landmarks import segment_labels
from .inverse import small_softmax
from .renormalized import LEAST_ROW_SUM

if TYPE_CHECKING:
    from .choices import Core

Array = NDArray[Any]


def iteration_pullback(m: Array, iterations: int, g: Array) -> Array:
    """Return what a cotangent G (r, r) of `iterate_inverse` is at M, through all of its steps.

    `filter_inverse` is the same function of M.

    Examples
    --------
    >>> iteration_pullback(np.array([[0.5]]), 8, np.ones((1, 1))).round(9).tolist()
    [[-4.0]]
    """
    size = np.abs(m)
    columns, rows = size.sum(axis=0), size.sum(axis=1)
    norms = float(columns.max(initial=0.0)), float(rows.max(initial=0.0))
    scale = norms[0] * norms[1]
    flat = scale == 0
    scale = 1.0 if flat else scale
    z, unit, steps = np.ascontiguousarray(m.T) / scale, np.eye(len(m)), []
    with blas_single_thread():  # the same bits for any number of threads
        for _ in range(iterations):
            x = m @ z
            p = 13 * unit - x @ (15 * unit - x @ (7 * unit - x))
            steps.append((z, x, p))
            z = 0.25 * z @ p
        dm = np.zeros(m.shape)
        for before, x, p in reversed(steps):
            dp, xt = 0.25 * before.T @ g, x.T
            g = 0.25 * g @ p.T
            # p = 13 - 15 x + 7 x^2 - x^3
            once = dp @ xt + xt @ dp
            dx = 7 * once - 15 * dp - (once @ xt + xt @ (xt @ dp))
            dm += dx @ before.T
            g += m.T @ dx
    dm += g.T / scale
    if not flat:
        shrink = -float(np.sum(g * m.T)) / scale**2
        j, i = int(columns.argmax()), int(rows.argmax())
        dm[:, j] += shrink * norms[1] * np.sign(m[:, j])
        dm[i] += shrink * norms[0] * np.sign(m[i])
    return dm


def inverse_pullback(m: Array, ridge: float, cut: float, g: Array) -> Array:
    """Return what a cotangent G (b, a) of the inverse by singular values is at M (a, b).

    For ``M = P diag(s) W^T``, ``Z = W diag(phi) P^T``, ``phi = s / (s^2 + ridge s_1^2)`` above
    ``cut s_1`` and zero up to there, ``E = P^T dM W`` and ``P^T dZ^T W = D- o (E + E^T)/2 + D+ o
    (E - E^T)/2`` with ``D-+ = (phi_i -+ phi_j) / (s_i -+ s_j)``, but for the change of s_1.

    Parameters
    ----------
    m : float64 array (a, b)
    ridge, cut : float
        At least 0.
    g : float64 array (b, a)

    Examples
    --------
    >>> inverse_pullback(np.array([[0.5]]), 0.0, 0.0, np.ones((1, 1))).tolist()
    [[-4.0]]
    """
    with blas_single_thread():  # the same bits for any number of threads
        p, s, wt = np.linalg.svd(m, full_matrices=False)
        high = float(s.max(initial=0.0))
        beta = ridge * high**2
        kept = s > cut * high
        size = np.where(kept, s**2 + beta, 1.0)
        phi = np.where(kept, s / size, 0.0)
        k = p.T @ g.T @ wt.T
        both, one = np.outer(kept, kept), kept[:, None] != kept
        pairs, over = np.outer(s, s), np.outer(size, size)
        apart = np.where(one, s[:, None] - s, 1.0)
        beside = np.where(one, s[:, None] + s, 1.0)
        # Where one of two is cut off, the quotients are phi / (s_i -+ s_j) of the other one.
        less = np.where(one, (phi[:, None] - phi) / apart, np.where(both, (beta - pairs) / over, 0))
        more = np.where(
            one, (phi[:, None] + phi) / beside, np.where(both, (pairs + beta) / over, 0)
        )
        inner = 0.5 * (less * (k + k.T) + more * (k - k.T))
        if ridge > 0 and len(s):
            fall = np.where(kept, -s / size**2, 0.0)
            inner[0, 0] += 2 * ridge * high * float(np.diagonal(k) @ fall)
        dm = p @ inner @ wt
        # Directions beyond the smaller side have the singular value 0.
        ratio = np.where(kept, phi / np.where(kept, s, 1.0), 0.0)
        if m.shape[1] > len(s):
            rows = p.T @ g.T
            dm += (p * ratio) @ (rows - (rows @ wt.T) @ wt)
        if m.shape[0] > len(s):
            columns = g.T @ wt.T
            dm += ((columns - p @ (p.T @ columns)) * ratio) @ wt
    return np.asarray(dm)


def core_pullback(
    queries: Array, keys: Array, scale: float, iterations: int | None, ridge: float, cut: float,
    g: Array,
) -> tuple[Array, Array]:  # fmt: skip
    """Return what a cotangent of the inverse of the core M is at its landmark queries and keys."""
    m = small_softmax(queries, keys, scale)
    if iterations is None:
        dm = inverse_pullback(m, ridge, cut, g)
    else:
        dm = iteration_pullback(m, iterations, g)
    made = softmax_pullback(queries, keys, np.eye(len(keys)), dm, scale)
    return made.q, made.k


def gradient(
    core: Core,
    problem: AttentionProblem,
    landmarks: tuple[Array, Array],
    z: Array,
    cut: float,
    g: Array,
    renormalize: bool,
) -> Gradient:
    """Return what a cotangent G of ``F Z B V`` is at Q, K and V, landmarks that are means included.

    ``z`` is the inverse of the core, ``cut`` what it cuts off.
    """
    (queries, keys), kept, scale = landmarks, problem.kept_keys, problem.scale
    q, k, v = problem.arrays.q, problem.k[kept], problem.values[kept]
    right = AttentionProblem.adopt(np.require(queries, requirements=["C", "W"]), k, v, scale=scale)
    means = solution(right)[0]
    if renormalize:
        # One more column carries the row sums.
        means = np.concatenate([means, np.ones((len(means), 1))], axis=1)
    inner = product(z, means)
    if renormalize:
        left = AttentionProblem.adopt(q, np.require(keys, requirements=["C", "W"]), scale=scale)
        made = np.asarray(left.exact @ inner)
        divided = made[:, -1:] > LEAST_ROW_SUM
        divisor = np.where(divided, made[:, -1:], 1.0)
        sums = np.sum(g * made[:, :-1], axis=1, keepdims=True)
        g = np.concatenate([g / divisor, np.where(divided, -sums / divisor**2, 0.0)], axis=1)
    outer = softmax_pullback(q, keys, inner, g, scale)
    dmeans = product(np.ascontiguousarray(z.T), outer.x)
    if renormalize:
        dmeans = np.ascontiguousarray(dmeans[:, :-1])
    dz = product(outer.x, np.ascontiguousarray(means.T))
    dqueries, dkeys = core_pullback(queries, keys, scale, core.iterations, core.ridge, cut, dz)
    below = softmax_pullback(queries, k, v, dmeans, scale)
    dqueries += below.q
    dkeys += outer.k
    found = zero_gradient(problem)
    found.q[:] = outer.q
    found.k[kept], found.v[kept] = below.k, below.x
    if isinstance(core.landmarks, str) and core.landmarks == "segment_means":
        _spread_means(found, dqueries, dkeys, problem, core.masking == "zero")
    return found


def _spread_means(
    found: Gradient, dqueries: Array, dkeys: Array, problem: AttentionProblem, zero: bool
) -> None:
    """Add what reaches the means of segments to their rows."""
    keep, kept = problem.key_mask, problem.kept_keys
    dq = means_pullback(segment_labels(problem.n_q, len(dqueries)), dqueries)
    if zero and keep is not None:
        dk = means_pullback(segment_labels(problem.n_k, len(dkeys)), dkeys)
        found.k[kept] += dk[kept]
        if problem.n_q == problem.n_k:
            dq[~keep] = 0
    else:
        found.k[kept] += means_pullback(segment_labels(len(kept), len(dkeys)), dkeys)
    found.q[:] += dq


def convolution_pullback(weights: Array, g: Array, keep: Array | None) -> Array:
    """Return what a cotangent of the convolution of V is at V."""
    from scipy.ndimage import correlate1d

    spread = correlate1d(g, weights[::-1], axis=0, mode="constant")
    return np.asarray(spread if keep is None else np.where(keep[:, None], spread, 0.0))
