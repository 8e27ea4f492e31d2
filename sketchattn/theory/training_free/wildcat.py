"""Formulas of WildCat: what pivots leave of a kernel, and what is promised of random ones."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from ...base.floating import without_floating_errors
from ...problem import AttentionProblem
from ...zoo.wildcat import KernelKeys, kernel_keys
from ..engine.arguments import Array, real, whole

PAPER = "Schroder and Mackey, arXiv 2602.10056"
PIVOTING = "Chen, Epperly, Tropp and Webber, arXiv 2207.06503"
DERIVED = "derived: see the chapter on training-free competitors"

# Steps of a bisection of the logarithm of eps.
STEPS = 60


def keys_of(problem: AttentionProblem) -> KernelKeys:
    """Return the keys of a problem as points of the default kernel."""
    return kernel_keys(problem.k[problem.kept_keys], problem.scale, "constant", None, True)


def queries_of(problem: AttentionProblem, keys: KernelKeys) -> Array:
    """Return ``x_i`` with ``x_i . z_j = L_ij`` for the centred keys."""
    root = np.sqrt(abs(problem.scale) * keys.tau2)
    return np.asarray(np.copysign(root, problem.scale) * problem.q)


@without_floating_errors
def trace_bound(eigenvalues: ArrayLike, rank: int) -> float:
    """Bound the expected trace of what r pivots leave of a kernel, over its trace.

    The smallest ``(1 + eps) tail_k / tr`` with ``r >= k/eps + k ln(1/(eps eta))``,
    ``tail_k = sum_{i > k} lambda_i`` and ``eta = tail_k / tr``, over k and eps; at most 1.

    Parameters
    ----------
    eigenvalues : array (n,)
        Of the kernel, not negative, in any order.
    rank : int
        r, the number of pivots drawn by the diagonal of the residual.

    Notes
    -----
    Chen, Epperly, Tropp and Webber, arXiv 2207.06503, Theorem 5.1.

    Examples
    --------
    >>> round(trace_bound([0.5, 0.3, 0.1, 0.1], 3), 3), trace_bound([0.5, 0.3, 0.2], 3)
    (0.558, 0.0)
    >>> round(trace_bound(0.5 ** np.arange(32), 16), 3)
    0.097
    """
    r = int(whole(rank, "rank", 1))
    found = np.sort(np.atleast_1d(real(eigenvalues, "eigenvalues", 0, low_open=False)))[::-1]
    total = float(found.sum())
    if total == 0:
        return 0.0
    best = 1.0
    tails = np.maximum(total - np.cumsum(found), 0.0)
    for k in range(1, len(found) + 1):
        eta = float(tails[k - 1]) / total
        if eta <= 0:
            return 0.0 if k <= r else best  # as many pivots as the rank leave nothing
        low, high = -40.0, -np.log(eta)
        for _ in range(STEPS):
            middle = (low + high) / 2
            eps = np.exp(middle)
            if k / eps - k * (middle + np.log(eta)) <= r:
                high = middle
            else:
                low = middle
        eps = float(np.exp(high))
        if k / eps - k * (high + np.log(eta)) <= r:
            best = min(best, (1 + eps) * eta)
    return best


@without_floating_errors
def trace_share(keys: KernelKeys, pivots: ArrayLike) -> float:
    """Return the share of the trace of the exponential kernel that pivots leave.

    ``sum_j res_j e^{2 h_j} / sum_j e^{2 h_j}``.

    Parameters
    ----------
    keys : KernelKeys
    pivots : int array (r,)

    Examples
    --------
    >>> keys = kernel_keys(np.eye(4), 1.0, 1.0, None, False)
    >>> round(trace_share(keys, [0, 1, 2, 3]), 9), trace_share(keys, [])
    (0.0, 1.0)
    """
    chosen = np.asarray(pivots, np.int64)
    weight = np.exp(2 * (keys.half - keys.half.max()))
    left = projected(keys, keys.z, chosen)[1]
    return float(weight @ left / weight.sum())


@without_floating_errors
def projected(keys: KernelKeys, points: Array, pivots: Array) -> tuple[Array, Array]:
    """Return coordinates of points in an orthonormal basis of the pivots, and what is left.

    With the Gaussian kernel G: columns ``C_i`` (r,) with ``C_i . C_j = G_iJ G_JJ^-1 G_Jj``, from an
    eigendecomposition, and ``1 - |C_i|^2``.
    """
    half = 0.5 * np.einsum("ij,ij->i", points, points)
    z, own = keys.z[pivots], keys.half[pivots]
    cross = np.exp(np.minimum(z @ points.T - own[:, None] - half, 0.0))
    core = np.exp(np.minimum(z @ z.T - own[:, None] - own, 0.0))
    size, vectors = np.linalg.eigh(core) if len(core) else (np.zeros(0), core)
    kept = size > 1e-13 * size.max(initial=0.0)
    basis = vectors[:, kept] / np.sqrt(size[kept])
    coordinates = basis.T @ cross
    return coordinates, np.maximum(1 - np.sum(coordinates**2, axis=0), 0.0)
