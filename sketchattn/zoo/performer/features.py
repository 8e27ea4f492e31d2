"""Random directions, and what the features made of them are wrong by."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...base.arguments import as_array, as_integer, check_choice
from ...base.draws import Rng, as_generator

Array = NDArray[Any]

FEATURES = ("positive", "hyperbolic", "trigonometric")
# Mean squared errors are at most exp(3 (|x|^2 + |y|^2)), or exp(|x|^2 + |y|^2); float64 ends here.
LARGEST_EXPONENT = 700.0


def gaussian_directions(
    r: int, d: int, rng: Rng = None, *, orthogonal: bool = True, sign_fix: bool = True
) -> Array:
    """Draw omega (r, d): rows that are N(0, I), orthogonal within blocks of d rows.

    For each block ``G = Qm Rm`` with G (d, d) Gaussian, ``Qm <- Qm diag(sign Rm_ii)``, and row l of
    ``Qm^T`` is multiplied by the norm of a fresh Gaussian vector.

    Parameters
    ----------
    r, d : int
        At least 1.
    rng : None, int or numpy.random.Generator
    orthogonal : bool, default True
        False: independent rows.
    sign_fix : bool, default True
        Without it Qm is not Haar distributed (Householder QR makes its first entry negative or
        zero) and estimates are biased; released codes leave it out.

    Returns
    -------
    ndarray (r, d), float64
        A larger r with the same seed extends a smaller one.

    Examples
    --------
    >>> w = gaussian_directions(3, 4, rng=0)
    >>> bool(abs(w[0] @ w[1]) < 1e-12), w.shape
    (True, (3, 4))
    """
    from ...kernels._threads import blas_single_thread

    for label, value in (("r", r), ("d", d)):
        if as_integer(value, label, "at least 1") < 1:
            raise ValueError(f"{label} must be at least 1, got {value}; raise it")
    generator = as_generator(rng)
    if not orthogonal:
        return generator.standard_normal((r, d))
    # G and then the vectors whose norms are taken, block by block.
    drawn = generator.standard_normal((-(-r // d), 2, d, d))
    with blas_single_thread():  # the same bits for any number of threads
        basis, upper = np.linalg.qr(drawn[:, 0])
    if sign_fix:
        signs = np.where(np.diagonal(upper, axis1=1, axis2=2) < 0, -1.0, 1.0)
        basis = basis * signs[:, None, :]
    norms = np.linalg.norm(drawn[:, 1], axis=2)
    blocks = norms[:, :, None] * basis.transpose(0, 2, 1)
    return np.ascontiguousarray(blocks.reshape(-1, d)[:r])


def feature_mse(
    x: ArrayLike, y: ArrayLike, r: int, features: str = "positive", *, orthogonal: bool = True
) -> float:
    """Return the mean squared error of the estimate of ``SM = exp(x . y)`` from r directions.

    With ``s = |x + y|^2``, ``t = |x - y|^2``, ``n2 = |x|^2 + |y|^2``, for independent directions:
    positive ``SM^2 (e^s - 1)/r``, hyperbolic ``SM^2 (cosh s - 1)/r``, trigonometric
    ``e^n2 (1 - e^-t)^2 / (2r)``.  Orthogonal blocks of sizes r_b lower it by
    ``g sum_b r_b (r_b - 1) / r^2``, ``g = e^-n2 (e^s - 1F1(d; d/2; s/2))``, for trigonometric
    features ``e^n2 (e^-t - 1F1(d; d/2; -t/2))``.

    Parameters
    ----------
    x, y : array (d,)
        With the scale: ``x = sqrt(scale) q``.
    r : int
    features : {"positive", "hyperbolic", "trigonometric"}
    orthogonal : bool, default True

    Returns
    -------
    float
        Of one unnormalised entry; the normalised ``Ahat`` is a ratio and has no such formula.

    Raises
    ------
    ValueError
        For shapes that differ, unknown features, and ``|x|^2 + |y|^2`` so large that the error
        exceeds float64.

    Examples
    --------
    >>> round(feature_mse([0.5], [0.5], 4, orthogonal=False), 6)
    0.708242
    """
    from scipy.special import hyp1f1

    a, b = (np.asarray(as_array(z, label), np.float64) for z, label in ((x, "x"), (y, "y")))
    if a.ndim != 1 or a.shape != b.shape or not len(a):
        raise ValueError(
            f"x and y must have one shape (d,), got {a.shape} and {b.shape}; pass rows"
        )
    check_choice(features, "features", FEATURES)
    d = len(a)
    s, t, n2 = float((a + b) @ (a + b)), float((a - b) @ (a - b)), float(a @ a + b @ b)
    most = LARGEST_EXPONENT / (1 if features == "trigonometric" else 3)
    if not n2 < most:
        raise ValueError(
            f"x and y must have |x|^2 + |y|^2 below {most:g} for {features} features, got {n2:g}; "
            f"the error of larger ones exceeds float64"
        )
    sm2 = math.exp(2 * float(a @ b))
    if features == "trigonometric":
        mse = math.exp(n2) * math.expm1(-t) ** 2 / (2 * r)
        gain = math.exp(n2) * (math.exp(-t) - float(hyp1f1(d, d / 2, -t / 2)))
    else:
        # cosh s - 1 = 2 sinh(s/2)^2 keeps its digits where s is small.
        spread = math.expm1(s) if features == "positive" else 2 * math.sinh(s / 2) ** 2
        mse = sm2 * spread / r
        gain = math.exp(-n2) * (math.exp(s) - float(hyp1f1(d, d / 2, s / 2)))
    if not orthogonal:
        return mse
    whole, rest = divmod(r, d)
    pairs = whole * d * (d - 1) + rest * (rest - 1)
    return mse - gain * pairs / r**2
