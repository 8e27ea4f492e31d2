"""Keys as points of a Gaussian kernel, and the weights by which few of them stand for all.

With ``z_j = sqrt(c) (k_j - kbar)`` and ``h_j = |z_j|^2 / 2`` the exponential kernel of the keys is
``e^{z_j . z_l} = e^{h_j} G_jl e^{h_l}``, ``G_jl = e^{-|z_j - z_l|^2 / 2}``.  The weights
``W = e^{-h_J} G_JJ^-1 G_J: e^h`` project every key on the span of the pivots J: ``e^{L_ij}`` is
close to ``sum_s e^{L_is} W_sj``.  Derived: with ``G_JJ = X X^T`` and ``D = diag(e^{h_J})``,

    W = (D^-1 X^T D)^-1 (D^-1 X D)^-1 P,    P_sj = e^{z_s . z_j - 2 h_s},

in which no exponent grows with the norms of the keys, and W itself is not needed for ``W V``.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...kernels._threads import map_pieces
from ...operators.steep import norms_of

Array = NDArray[Any]

# tau^2 qmax / kmax of the released code, whose derivation is not published.
CONSTANT = 3.94582
# 2 rho of the rule by Lambert's function, rho = sqrt(1 + exp(W_0(2 / e^2) + 2)).
TWICE_RHO = 6.383202050647408
# Residuals up to this are those of a key that the pivots hold already.
TOLERANCE = 1e-12
# Above it e^x is no weight that float64 could add up with others.
LARGEST_EXPONENT = 600.0
# Above it no key is like another one, and squares of distances stay finite; below it squares of
# coordinates underflow.
LARGEST_SQUARE, SMALLEST_SQUARE = 1e150, 1e-200
# Keys of a piece of the sums over all keys.
PIECE = 512
# Up to so many products W is formed: it is bounded, and its product with V has the digits that the
# solution of a system of condition 1e12 has not.
FORMED = 1 << 24


class KernelKeys(NamedTuple):
    """Hold keys as points of the Gaussian kernel.

    Attributes
    ----------
    z : float64 ndarray (n, d)
    half : float64 ndarray (n,)
        ``h_j = |z_j|^2 / 2``.
    tau2 : float
        Square of the temperature; infinite where queries are zero.
    """

    z: Array
    half: Array
    tau2: float

    @property
    def tolerance(self) -> float:
        """Residuals that are zero up to rounding, which grows with the norms."""
        size = float(self.half.max(initial=0.0))
        return min(max(TOLERANCE, 64 * float(np.finfo(float).eps) * size), 0.5)

    def part(self, index: Array | slice) -> KernelKeys:
        """Return some of the keys."""
        return KernelKeys(np.ascontiguousarray(self.z[index]), self.half[index], self.tau2)


def temperature(
    tau: str | float, count: int, size: float, kmax: float, qmax: float
) -> tuple[float, float]:
    """Return ``tau^2`` and ``c kmax^2 = size kmax^2 / tau^2``, for ``size = |scale|``."""
    if kmax == 0 or size == 0:
        return (float(tau) ** 2 if not isinstance(tau, str) else CONSTANT), 0.0
    if not isinstance(tau, str):
        tau2 = float(tau) ** 2
        return tau2, size * kmax * kmax / tau2
    ratio = CONSTANT
    if tau == "lambert":
        from scipy.special import lambertw

        b = math.log(count) / (size * qmax * kmax) + 2 if size * qmax * kmax else math.inf
        root = float(np.real(lambertw(b / TWICE_RHO))) if math.isfinite(b) else 1.0
        ratio = b / (2 * root)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        tau2 = float(np.float64(ratio) * np.float64(kmax) / np.float64(qmax))
    return tau2, size * kmax * (qmax / ratio)


def kernel_keys(
    keys: Array, scale: float, tau: str | float, qmax: float | None, center: bool
) -> KernelKeys:
    """Return keys as points of the kernel; ``qmax`` None is the largest norm of a key."""
    wide = np.asarray(keys, np.float64)
    if center and len(wide):
        wide = wide - wide.mean(axis=0)
    squares = np.einsum("ij,ij->i", wide, wide)
    top = float(squares.max(initial=0.0))
    safe = SMALLEST_SQUARE < top < LARGEST_SQUARE
    kmax = math.sqrt(top) if safe else float(norms_of(wide).max(initial=0.0))
    bound = kmax if qmax is None else qmax
    tau2, square = temperature(tau, max(len(wide), 1), abs(scale), kmax, bound)
    z = wide * (math.sqrt(min(square, LARGEST_SQUARE)) / kmax if kmax > 0 else 0.0)
    return KernelKeys(z, 0.5 * np.einsum("ij,ij->i", z, z), tau2)


class Coreset(NamedTuple):
    """Hold the keys that stand for all, with the factor that their weights are made by.

    Attributes
    ----------
    keys : KernelKeys
    chosen : int ndarray (r,)
        Positions of pivots that those before do not span already.
    factor : float64 ndarray (r, r)
        X, lower triangular, ``X X^T = G_JJ``; the squares of its diagonal are what was left of
        each pivot when it was taken.
    """

    keys: KernelKeys
    chosen: Array
    factor: Array

    @classmethod
    def of(cls, keys: KernelKeys, pivots: Array) -> Coreset:
        """Factor the kernel of the pivots, one after another; spanned ones are left out."""
        z, half = keys.z[pivots], keys.half[pivots]
        kernel = np.exp(np.minimum(z @ z.T - half[:, None] - half, 0.0))
        np.fill_diagonal(kernel, 1.0)
        factor, kept = _factor(kernel, keys.tolerance)
        return cls(keys, np.asarray(pivots)[kept], factor)

    def _solve(self, y: Array) -> Array:
        """Return ``(D^-1 X^T D)^-1 (D^-1 X D)^-1 Y``."""
        from scipy.linalg import solve_triangular

        half = self.keys.half[self.chosen]
        gap = half - half[:, None]
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            # e^{h_s - h_t} may overflow where the entry beside it is small.
            size = np.log(np.abs(self.factor))
            lower, upper = (
                np.sign(x) * np.exp(np.minimum(s + gap, LARGEST_EXPONENT))
                for x, s in ((self.factor, size), (self.factor.T, size.T))
            )
            a = solve_triangular(lower, y, lower=True, check_finite=False)
            made: Array = solve_triangular(upper, a, check_finite=False)
        # Weights that overflow belong to keys that lie far outside all others; they say nothing.
        return np.nan_to_num(made, copy=False, nan=0.0, posinf=0.0, neginf=0.0)

    def _ratios(self, piece: slice) -> Array:
        """Return ``P^T (b, r)`` of a piece of the keys, with zeros for the pivots.

        Columns of W at pivots are unit vectors: nothing has to be solved for them.
        """
        from ...kernels.pivoted import exponentials

        z, half = self.keys.z, self.keys.half[self.chosen]
        start, stop, _ = piece.indices(len(z))
        x: Array = z[start:stop] @ z[self.chosen].T
        exponentials(x, np.zeros(len(x)), 2 * half, LARGEST_EXPONENT)
        x[self.chosen[(self.chosen >= start) & (self.chosen < stop)] - start] = 0
        return x

    def sums(self, values: Array) -> Array:
        """Return ``[W V, W 1] (r, m + 1)``; W is not held where it is large."""
        n, m = values.shape
        if n * len(self.chosen) ** 2 <= FORMED:
            weights = self.weights()
            return np.concatenate([weights @ values, weights.sum(axis=1)[:, None]], axis=1)
        total = np.zeros((len(self.chosen), m + 1))

        def work(piece: slice) -> Array:
            ratios = self._ratios(piece)
            part = np.empty((len(self.chosen), m + 1))
            near = values[piece].astype(np.float64, copy=False)
            np.matmul(ratios.T, near, out=part[:, :m])
            part[:, m] = ratios.sum(axis=0)
            return part

        for part in map_pieces(work, [slice(i, i + PIECE) for i in range(0, n, PIECE)]):
            total += part
        made = self._solve(total)
        made[:, :m] += values[self.chosen]
        made[:, m] += 1
        return made

    def weights(self) -> Array:
        """Return ``W (r, n)``."""
        made = self._solve(self._ratios(slice(None)).T)
        made[:, self.chosen] = np.eye(len(self.chosen))
        return made

    def residuals(self) -> Array:
        """Return what the pivots leave of the diagonal of the Gaussian kernel, (n,)."""
        from scipy.linalg import solve_triangular

        z, half = self.keys.z, self.keys.half
        gap = z[self.chosen] @ z.T - half[self.chosen][:, None] - half
        columns = np.exp(np.minimum(gap, 0.0, out=gap), out=gap)
        f = solve_triangular(self.factor, columns, lower=True, check_finite=False)
        left = np.maximum(1.0 - np.einsum("rj,rj->j", f, f), 0.0)
        left[self.chosen] = 0.0
        return np.asarray(left)


def _factor(kernel: Array, tolerance: float) -> tuple[Array, Array]:
    """Return X with ``X X^T = G_JJ``, J the positions of pivots with a residual above, and J."""
    from scipy.linalg import LinAlgError, cholesky, solve_triangular

    try:
        whole: Array = cholesky(kernel, lower=True, check_finite=False)
        if (np.diag(whole) ** 2 > tolerance).all():
            return whole, np.arange(len(kernel))
    except LinAlgError:
        pass
    x = np.zeros_like(kernel)
    kept: list[int] = []
    for s in range(len(kernel)):
        t = len(kept)
        row = np.zeros(0)
        if t:
            row = solve_triangular(x[:t, :t], kernel[s, kept], lower=True, check_finite=False)
        left = 1.0 - float(row @ row)
        if left > tolerance:
            x[t, :t], x[t, t] = row, math.sqrt(left)
            kept.append(s)
    return x[: len(kept), : len(kept)].copy(), np.array(kept, np.int64)
