"""What the claims of this topic share: sources, steps of pictures, records, ranges of matrices."""

from __future__ import annotations

import math

import numpy as np

from ..engine.arguments import Array

NLALIB = "NLAlib (Lean library tchen-research/NLAlib)"
HMT = "Halko, Martinsson and Tropp, SIAM Review 53 (2011)"
DERIVED = "derived: see the chapter on sketching"

# Steps of the pictures of claims that are about an accuracy.
EPS_LADDER = tuple({"eps": e} for e in (0.9, 0.7, 0.5, 0.35))

# Bounds of products beside the trivial predictors: |A V| is small on attention.
AMM_RECORD = {"clusters": "holds", "reference": "vacuous", "heads": "vacuous"}


def range_basis(y: Array) -> Array:
    """Return an orthonormal basis of the range of Y, whose rank may be below its width."""
    from scipy.linalg import qr

    q, r, _ = qr(y, mode="economic", pivoting=True, check_finite=False)
    sizes = np.abs(np.diag(r))
    out: Array = q[:, : int(np.count_nonzero(sizes > 1e-13 * sizes.max(initial=0.0)))]
    return out


def residual_norms(sigma: Array, q: Array) -> tuple[float, float]:
    """Return Frobenius and spectral norm of ``(I - Q Q^T) diag(sigma)``.

    The first up to 1e-8 relative to ``|sigma|``.
    """
    leverage = np.einsum("ij,ij->i", q, q)
    fro = math.sqrt(float(np.sum(sigma**2 * np.maximum(1 - leverage, 0.0))))
    scaled = sigma[:, None] * q  # diag(sigma) (I - Q Q^T) diag(sigma) = diag(sigma^2) - S S^T
    k = len(sigma)
    if k <= 128:
        top = float(np.linalg.eigvalsh(np.diag(sigma**2) - scaled @ scaled.T)[-1])
        return fro, math.sqrt(max(top, 0.0))
    from scipy.sparse.linalg import LinearOperator, eigsh

    squares = sigma**2
    gram = LinearOperator(
        (k, k), matvec=lambda x: squares * x - scaled @ (scaled.T @ x), dtype=np.float64
    )
    # A start that depends on the problem only: the same norm for the same range.
    start = np.random.default_rng(k).standard_normal(k)
    top = float(eigsh(gram, 1, which="LA", v0=start, tol=1e-10, return_eigenvectors=False)[0])
    return fro, math.sqrt(max(top, 0.0))
