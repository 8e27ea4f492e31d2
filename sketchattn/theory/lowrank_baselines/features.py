"""Random features: moments, tails and ratios of the estimates of one kernel entry."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from ...base.arguments import as_array
from ...base.floating import without_floating_errors
from ...zoo.performer import FEATURES
from ..engine.arguments import Array, Float, choice, floats, real, whole

PAPER = "Choromanski et al., arXiv 2009.14794"

# Pairs are shrunk until |x + y|^2 and |x - y|^2 are below: squares of estimates have a kurtosis
# that grows like exp(4 |x + y|^2), and no number of draws that is affordable shows their mean.
SMALL = 0.6
# More features than this are no number that a verdict can hold.
MOST_FEATURES = 2**62


def _vector_pair(x: ArrayLike, y: ArrayLike) -> tuple[Array, Array]:
    a, b = (np.asarray(as_array(z, label), np.float64) for z, label in ((x, "x"), (y, "y")))
    if a.ndim != 1 or a.shape != b.shape or not len(a):
        raise ValueError(
            f"x and y must have one shape (d,), got {a.shape} and {b.shape}; pass rows"
        )
    return a, b


def _exp(x: float) -> float:
    return math.exp(x) if x < 709 else math.inf


@without_floating_errors
def feature_kurtosis(x: ArrayLike, y: ArrayLike, features: str = "positive") -> float:
    """Return the kurtosis of the estimate of ``exp(x . y)`` by one direction.

    With r independent directions a mean square of T draws has the relative standard error
    ``sqrt(((kurtosis - 3)/r + 2)/T)``.  Positive features, ``s = |x + y|^2``:
    ``e^(4s) + 2 e^(3s) + 3 e^(2s) - 3``.

    Parameters
    ----------
    x, y : array (d,)
    features : {"positive", "hyperbolic", "trigonometric"}

    Notes
    -----
    Derived.  Moments of cosh u and cos u of a centred normal u are sums of exponentials of its
    variance.

    Examples
    --------
    >>> x, y = [0.5, -0.2, 0.1, 0.3], [0.1, 0.2, -0.2, 0.15]
    >>> [round(feature_kurtosis(x, y, name), 1) for name in FEATURES]
    [27.4, 43.9, 8.1]
    """
    a, b = _vector_pair(x, y)
    choice(features, "features", FEATURES)
    s, t = float((a + b) @ (a + b)), float((a - b) @ (a - b))
    if features == "positive":
        return _exp(4 * s) + 2 * _exp(3 * s) + 3 * _exp(2 * s) - 3
    variance = s if features == "hyperbolic" else -t
    if variance > 40:  # the other terms are below the rounding of e^(8 s)/8 over (e^(2 s)/2)^2
        return _exp(4 * variance) / 2

    def moment(k: int) -> float:
        terms = [math.comb(k, i) * math.exp((k - 2 * i) ** 2 * variance / 2) for i in range(k + 1)]
        return math.fsum(terms) / 2.0**k

    m = [moment(k) for k in range(5)]
    second = m[2] - m[1] ** 2
    fourth = m[4] - 4 * m[1] * m[3] + 6 * m[1] ** 2 * m[2] - 3 * m[1] ** 4
    return fourth / second**2 if second > 0 else math.nan


@without_floating_errors
def chebyshev_features(s: ArrayLike, eps: ArrayLike, delta: ArrayLike) -> Float:
    """Return ``(e^s - 1)/(eps^2 delta)``: independent positive features that Chebyshev asks for.

    With so many, ``P(|estimate/exp(x . y) - 1| > eps) <= delta`` for one entry.

    Parameters
    ----------
    s : float or array
        ``|x + y|^2``, at least 0.
    eps : float or array
        Relative accuracy, above 0.
    delta : float or array
        In (0, 1).

    Returns
    -------
    float or ndarray
        Not rounded up; infinite where e^s is.

    Examples
    --------
    >>> f"{chebyshev_features(16.0, 0.5, 0.1):.3g}"
    '3.55e+08'
    """
    size, accuracy = real(s, "s", 0, low_open=False), real(eps, "eps", 0)
    rate = real(delta, "delta", 0, 1)
    needed = np.expm1(size) / (accuracy**2 * rate)
    return floats(np.where(size > 0, needed, 0.0))


@without_floating_errors
def smreg_ratio(d: ArrayLike, s: ArrayLike) -> Float:
    """Return ``0F1(; d/2; d s/4) e^(-s/2)``: the regularised kernel over ``exp(x . y)``.

    All directions on the sphere of radius sqrt(d) in place of Gaussian ones: the mean of the
    estimate is this times ``exp(x . y)``, at most 1.

    Parameters
    ----------
    d : int or array
        At least 1.
    s : float or array
        ``|x + y|^2``, at least 0.

    Notes
    -----
    ``0F1(; d/2; d s/4) = sum_k (d/2)^k/(d/2)_k (s/2)^k/k!``, and ``(d/2)^k <= (d/2)_k``.  The
    inequality is published, the formula derived.

    Examples
    --------
    >>> [round(smreg_ratio(4, s), 4) for s in (1.0, 4.0, 16.0)]
    [0.9648, 0.6604, 0.0335]
    """
    from scipy.special import hyp0f1

    width = whole(d, "d").astype(np.float64)
    size = real(s, "s", 0, 2000.0, low_open=False)
    return floats(np.asarray(hyp0f1(width / 2, width * size / 4)) * np.exp(-size / 2))


@without_floating_errors
def theorem2_gain(x: ArrayLike, y: ArrayLike, r: int) -> float:
    """Return ``2(r-1)/(r(d+2)) (SM - e^(-n2/2))^2``: what orthogonal directions save at least.

    ``MSE_ort <= MSE_pos - theorem2_gain`` for positive features and r <= d directions,
    ``SM = exp(x . y)``, ``n2 = |x|^2 + |y|^2``.

    Parameters
    ----------
    x, y : array (d,)
    r : int
        In 1..d.

    Notes
    -----
    Choromanski et al. (2021), Theorem 2 as corrected in later versions.  The version of the
    proceedings has ``SM^2`` in place of the square of the difference, which is false: at
    ``x = -y`` the estimator is constant.

    Examples
    --------
    >>> from sketchattn.zoo.performer.features import feature_mse
    >>> x, y = [0.5, -0.2, 0.1, 0.3], [0.1, 0.2, -0.2, 0.15]
    >>> bound = feature_mse(x, y, 4, orthogonal=False) - theorem2_gain(x, y, 4)
    >>> round(bound, 8), round(feature_mse(x, y, 4), 8)
    (0.1905658, 0.18813789)
    """
    a, b = _vector_pair(x, y)
    d = len(a)
    count = int(whole(r, "r", 1, d))
    # SM - e^(-n2/2) = e^(-n2/2) (e^(s/2) - 1)
    s, n2 = float((a + b) @ (a + b)), float(a @ a + b @ b)
    if s > 600:  # 1 is below the rounding of e^(s/2)
        return 2 * (count - 1) / (count * (d + 2)) * _exp(s - n2)
    return 2 * (count - 1) / (count * (d + 2)) * math.exp(-n2) * math.expm1(s / 2) ** 2


@without_floating_errors
def uniform_convergence_scale(d: ArrayLike, radius: ArrayLike, eps: ArrayLike) -> Float:
    """Return ``(d/delta^2) ln(4 d^(3/4) R/delta)``: how features grow for uniform accuracy.

    ``delta = eps/h^2``, ``h = e^(l^2/2)``, ``l = R d^(-1/4)``.  The theorem says that a constant
    times this suffices, and not which one: a formula for growth, no count.

    Parameters
    ----------
    d : int or array
    radius : float or array
        R, at least all norms of queries and keys.
    eps : float or array
        Absolute accuracy of all unnormalised weights.

    Returns
    -------
    float or ndarray

    Examples
    --------
    >>> few, many = uniform_convergence_scale(64, [4.0, 8.0], 0.1)
    >>> f"{many / few:.0e}"
    '3e+05'
    """
    width = whole(d, "d").astype(np.float64)
    size, accuracy = real(radius, "radius", 0), real(eps, "eps", 0)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        delta = accuracy * np.exp(-(size**2) / np.sqrt(width))
        inside = np.log(4 * width**0.75 * size) - np.log(accuracy) + size**2 / np.sqrt(width)
        return floats(np.where(delta > 0, width / delta**2 * inside, np.inf))
