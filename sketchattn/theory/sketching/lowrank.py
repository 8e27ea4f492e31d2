"""Low rank: floors, randomized SVD, norms estimated after the fact, known spectra."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ...base.draws import Rng, as_generator
from ...base.floating import without_floating_errors
from ..engine.arguments import Array, Float, Int, choice, floats, real, spectrum_of, whole
from .embeddings import inner_product_min_dim, lower_rate, upper_rate

NORMS = ("fro", "spectral")


@without_floating_errors
def eckart_young_floor(sigma: ArrayLike, r: ArrayLike, norm: str = "fro") -> Float:
    """Return the error of the best matrix of rank r.

    Frobenius: ``(sum_{j>r} sigma_j^2)^(1/2)``; spectral: ``sigma_{r+1}``.

    Parameters
    ----------
    sigma : array (k,)
        All singular values, descending.
    r : int or array
        At least 0.
    norm : {"fro", "spectral"}

    Examples
    --------
    >>> eckart_young_floor([5.0, 4.0, 3.0], 1), eckart_young_floor([5.0, 4.0, 3.0], 1, "spectral")
    (5.0, 4.0)
    >>> eckart_young_floor([5.0, 4.0, 3.0], [0, 2, 3]).round(4).tolist()
    [7.0711, 3.0, 0.0]
    """
    s = spectrum_of(sigma)
    rank = np.minimum(whole(r, "r", 0), len(s))
    choice(norm, "norm", NORMS)
    if norm == "spectral":
        return floats(np.append(s, 0.0)[rank])
    tails = np.append(np.cumsum((s * s)[::-1])[::-1], 0.0)
    return floats(np.sqrt(tails[rank]))


def _target(sigma: ArrayLike, k: int, o: int, least: int) -> tuple[Array, int, int]:
    s = spectrum_of(sigma)
    rank, over = int(whole(k, "k")), int(whole(o, "o", least))
    if rank + over > len(s):
        raise ValueError(
            f"k + o must be at most the {len(s)} singular values, got {rank + over}; lower one"
        )
    return s, rank, over


@without_floating_errors
def rsvd_expected(sigma: ArrayLike, k: int, o: int, norm: str = "fro", *, power: int = 0) -> float:
    """Bound the mean error of a randomized range finder with k + o Gaussian columns.

    ``E = A - Q Q^T A``, ``tau^2 = sum_{j>k} sigma_j^2``.

    - Frobenius: ``(E |E|_F^2)^(1/2) <= (1 + k/(o-1))^(1/2) tau``;
    - spectral, with ``q = 2 power + 1``: ``E |E|_2 <= [ (1 + sqrt(k/(o-1))) sigma_{k+1}^q
      + (e sqrt(k+o)/o) (sum_{j>k} sigma_j^(2q))^(1/2) ]^(1/q)``.

    Parameters
    ----------
    sigma : array
        All singular values, descending.
    k : int
        Target rank.
    o : int
        Oversampling, at least 2.
    norm : {"fro", "spectral"}
    power : int, default 0
        Power steps; for the spectral norm.

    Returns
    -------
    float

    Notes
    -----
    Halko, Martinsson and Tropp, SIAM Review 53 (2011), Theorems 10.5 and 10.6 and Corollary
    10.10.  No range of dimension l = k + o is below ``eckart_young_floor(sigma, l)``.

    Examples
    --------
    >>> sigma = 0.85 ** np.arange(60)
    >>> round(rsvd_expected(sigma, 8, 4), 4), round(rsvd_expected(sigma, 8, 4, "spectral"), 4)
    (0.9905, 1.9352)
    """
    s, rank, over = _target(sigma, k, o, 2)
    choice(norm, "norm", NORMS)
    steps = int(whole(power, "power", 0))
    tail = s[rank:]
    top = float(tail[0]) if len(tail) else 0.0
    if norm == "fro":
        if steps:
            raise ValueError(
                f"power must be 0 for the Frobenius norm, got {steps}; use norm='spectral'"
            )
        return math.sqrt(1 + rank / (over - 1)) * float(np.linalg.norm(tail))
    if top == 0.0:
        return 0.0
    q = 2 * steps + 1
    # relative to sigma_{k+1}: no underflow of high powers
    rest = math.sqrt(float(np.sum((tail / top) ** (2 * q))))
    inside = 1 + math.sqrt(rank / (over - 1)) + math.e * math.sqrt(rank + over) / over * rest
    return top * float(inside ** (1 / q))


class Tail(NamedTuple):
    """Hold a bound and the probability with which it fails at most."""

    bound: float
    failure: float


@without_floating_errors
def rsvd_tail(sigma: ArrayLike, k: int, o: int, t: float, u: float, norm: str = "fro") -> Tail:
    """Bound the error of a randomized range finder with high probability.

    - Frobenius: ``(1 + t sqrt(3k/(o+1))) tau + u t e sqrt(k+o)/(o+1) sigma_{k+1}``;
    - spectral: ``(1 + t sqrt(3k/(o+1))) sigma_{k+1} + t e sqrt(k+o)/(o+1) tau
      + u t e sqrt(k+o)/(o+1) sigma_{k+1}``;

    each failing with at most ``2 t^-o + exp(-u^2/2)``.

    Parameters
    ----------
    sigma : array
        All singular values, descending.
    k : int
        Target rank.
    o : int
        Oversampling, at least 4.
    t, u : float
        At least 1.
    norm : {"fro", "spectral"}

    Returns
    -------
    Tail
        ``bound`` and ``failure`` (at most 1).

    Notes
    -----
    Halko, Martinsson and Tropp (2011), Theorems 10.7 and 10.8.

    Examples
    --------
    >>> round(rsvd_tail([1.0] * 10 + [0.1] * 90, 10, 10, t=2.0, u=3.0).failure, 6)
    0.013062
    """
    s, rank, over = _target(sigma, k, o, 4)
    choice(norm, "norm", NORMS)
    stretch, spread = (float(real(x, name, 1, low_open=False)) for x, name in ((t, "t"), (u, "u")))
    tail = s[rank:]
    tau, top = float(np.linalg.norm(tail)), float(tail[0]) if len(tail) else 0.0
    first = 1 + stretch * math.sqrt(3 * rank / (over + 1))
    second = stretch * math.e * math.sqrt(rank + over) / (over + 1)
    bound = first * tau if norm == "fro" else first * top + second * tau
    failure = 2 * stretch**-over + math.exp(-spread * spread / 2)
    return Tail(bound + spread * second * top, min(failure, 1.0))


# --- norms after the fact ----------------------------------------------------------------

FORMS = ("exact", "hmt")


def _columns(operator: Any) -> int:
    shape = getattr(operator, "shape", None)
    if shape is None or len(shape) != 2:
        raise TypeError(
            f"operator must be a matrix or a LinearOperator, got {type(operator).__name__}; "
            f"wrap its product with scipy.sparse.linalg.LinearOperator"
        )
    return int(shape[1])


@without_floating_errors
def posterior_factor(r: ArrayLike, delta: ArrayLike, *, form: str = "exact") -> Float:
    """Return the factor that turns ``max_i |B w_i|`` into an upper bound of ``|B|_2``.

    "exact": ``1/(sqrt(2) erfinv(delta^(1/r)))``; "hmt": ``alpha sqrt(2/pi)`` with
    ``alpha = delta^(-1/r)``.

    Parameters
    ----------
    r : int or array
        Number of standard normal vectors w_i.
    delta : float or array
        In (0, 1): the probability that the bound is below the norm.
    form : {"exact", "hmt"}

    Notes
    -----
    ``|B w| >= sigma_1 |g|`` with a standard normal g, and all r of them are below u with
    probability ``erf(u/sqrt(2))^r``: derived, and exact for B of rank 1.  "hmt" is Lemma 4.1 of
    Halko, Martinsson and Tropp (2011), which is never less.

    Examples
    --------
    >>> round(posterior_factor(10, 0.1, form="hmt"), 4), round(posterior_factor(10, 0.1), 4)
    (1.0045, 0.7902)
    """
    from scipy.special import erfinv

    rows, d = whole(r, "r").astype(np.float64), real(delta, "delta", 0, 1)
    choice(form, "form", FORMS)
    root = d ** (1 / rows)
    if form == "hmt":
        return floats(np.asarray(math.sqrt(2 / math.pi) / root))
    return floats(np.asarray(1 / (math.sqrt(2) * erfinv(root))))


@without_floating_errors
def posterior_spectral_bound(
    operator: Any, r: int, delta: float, rng: Rng = None, *, form: str = "exact"
) -> float:
    """Return an upper bound of ``|B|_2`` from r products, which fails with at most delta.

    ``factor max_i |B w_i|`` with standard normal w_i and the factor of `posterior_factor`.

    Parameters
    ----------
    operator : array or LinearOperator (m, n)
        B, used only as ``B @ W``; for instance the difference of a matrix and its
        approximation.
    r : int
        Number of products.
    delta : float
        In (0, 1).
    rng : None, int or numpy.random.Generator
    form : {"exact", "hmt"}

    Returns
    -------
    float

    Examples
    --------
    >>> posterior_spectral_bound(np.diag([3.0, 1.0]), 10, 0.01, rng=0) >= 3.0
    True
    """
    n = _columns(operator)
    factor = float(posterior_factor(r, delta, form=form))
    probes = as_generator(rng).standard_normal((n, int(r)))
    images = np.asarray(operator @ probes, np.float64)
    return factor * float(np.max(np.linalg.norm(images, axis=0), initial=0.0))


@without_floating_errors
def power_lower_bound(operator: Any, iterations: int = 8, rng: Rng = None) -> float:
    """Return a lower bound of ``|B|_2`` by power iteration; it always holds.

    ``|B x| / |x|`` for ``x = (B^T B)^(iterations - 1) w`` with a standard normal w.

    Parameters
    ----------
    operator : array or LinearOperator (m, n)
        B, used as ``B @ x`` and ``B.T @ y``.
    iterations : int, default 8
        Products with B.
    rng : None, int or numpy.random.Generator

    Returns
    -------
    float
        At most ``|B|_2`` up to rounding: one end of an interval, not the norm.

    Examples
    --------
    >>> round(power_lower_bound(np.diag([3.0, 1.0]), 20, rng=0), 9)
    3.0
    """
    n = _columns(operator)
    steps = int(whole(iterations, "iterations"))
    x = as_generator(rng).standard_normal(n)
    best = 0.0
    for step in range(steps):
        size = float(np.linalg.norm(x))
        if size == 0.0:
            return best
        image = np.asarray(operator @ (x / size), np.float64)
        best = max(best, float(np.linalg.norm(image)))
        if step < steps - 1:
            x = np.asarray(operator.T @ image, np.float64)
    return best


@without_floating_errors
def hutchinson_fro(operator: Any, r: int, rng: Rng = None) -> float:
    """Estimate ``|B|_F^2`` without bias from r products: ``mean_i |B w_i|^2``.

    Parameters
    ----------
    operator : array or LinearOperator (m, n)
    r : int
        Number of standard normal vectors w_i.
    rng : None, int or numpy.random.Generator

    Returns
    -------
    float

    See Also
    --------
    hutchinson_tail : how far it can be from ``|B|_F^2``.

    Examples
    --------
    >>> round(hutchinson_fro(np.eye(100), 400, rng=0), 1)
    100.4
    """
    n = _columns(operator)
    count = int(whole(r, "r"))
    images = np.asarray(operator @ as_generator(rng).standard_normal((n, count)), np.float64)
    return float(np.sum(images * images)) / count


@without_floating_errors
def hutchinson_tail(r: ArrayLike, eps: ArrayLike, side: str = "upper") -> Float:
    """Bound the probability that `hutchinson_fro` is off by a factor, for ANY matrix B.

    "upper": ``P(F >= (1+eps) |B|_F^2) <= exp(-(r/2)(eps - ln(1+eps)))``; "lower":
    ``P(F <= (1-eps) |B|_F^2) <= exp(-(r/2)(-eps - ln(1-eps)))``.

    Parameters
    ----------
    r : int or array
    eps : float or array
        Positive; for "lower" at most 1.
    side : {"upper", "lower"}

    Notes
    -----
    Derived: ``prod_i (1 - 2h l_i) >= 1 - 2h`` and ``prod_i (1 + 2h l_i) >= 1 + 2h`` for
    ``sum_i l_i = 1``, so that a matrix of rank 1 is the worst.

    Examples
    --------
    >>> round(2 * hutchinson_tail(79, 0.5), 4)
    0.0478
    """
    rows = whole(r, "r").astype(np.float64)
    choice(side, "side", ("upper", "lower"))
    if side == "upper":
        return floats(np.exp(-rows / 2 * upper_rate(real(eps, "eps", 0))))
    e = real(eps, "eps", 0, 1, high_open=False)
    return floats(np.exp(-rows / 2 * lower_rate(e)))


@without_floating_errors
def hutchinson_min_dim(eps: ArrayLike, delta: ArrayLike) -> Int:
    """Return the products with which `hutchinson_fro` is within a factor 1 +- eps.

    ``ceil(2 ln(2/delta) / (eps - ln(1+eps)))``, twice the larger of the two tails.

    Parameters
    ----------
    eps : float or array
        In (0, 1].
    delta : float or array
        In (0, 1).

    Examples
    --------
    >>> hutchinson_min_dim(0.5, 0.05)
    79
    """
    real(eps, "eps", 0, 1, high_open=False)
    return inner_product_min_dim(1, eps, delta)


# --- matrices with a known spectrum ------------------------------------------------------

SPECTRA = ("polynomial", "exponential", "step", "spiked", "flat-tail", "exact-rank", "kahan")


@without_floating_errors
def known_spectrum(name: str, m: int = 80, n: int = 60, rng: Rng = 0) -> tuple[Array, Array]:
    """Return a matrix (m, n) and its singular values, for tests of low-rank methods.

    Parameters
    ----------
    name : str
        "polynomial" ``sigma_j = j^-1.5``; "exponential" ``.85^(j-1)``; "step" ten times 1, then
        1e-3; "spiked" 10, then 1; "flat-tail" ``1 - .3 (j-1)/k``, which leaves nothing to find;
        "exact-rank" ten times 1, then 0; "kahan": Kahan's upper triangular matrix with
        ``sin = .95`` (n, n), whose pivoted QR is misleading, padded with zero rows.
    m, n : int
        With m >= n.
    rng : None, int or numpy.random.Generator
        For the singular vectors.

    Returns
    -------
    matrix : ndarray (m, n)
    sigma : ndarray (n,)
        Descending.

    Examples
    --------
    >>> matrix, sigma = known_spectrum("exponential", rng=0)
    >>> bool(np.allclose(np.linalg.svd(matrix, compute_uv=False), sigma))
    True
    """
    choice(name, "name", SPECTRA)
    rows, columns = int(whole(m, "m")), int(whole(n, "n"))
    if rows < columns:
        raise ValueError(f"m must be at least n = {columns}, got {rows}; transpose the result")
    if name == "kahan":
        sine = 0.95
        cosine = math.sqrt(1 - sine**2)
        upper = np.eye(columns) - cosine * np.triu(np.ones((columns, columns)), 1)
        square = (sine ** np.arange(columns))[:, None] * upper
        matrix = np.concatenate([square, np.zeros((rows - columns, columns))])
        return matrix, np.linalg.svd(square, compute_uv=False)
    j = np.arange(columns, dtype=np.float64)
    sigma: Array = {
        "polynomial": (j + 1) ** -1.5,
        "exponential": 0.85**j,
        "step": np.where(j < 10, 1.0, 1e-3),
        "spiked": np.where(j < 1, 10.0, 1.0),
        "flat-tail": 1 - 0.3 * j / columns,
        "exact-rank": np.where(j < 10, 1.0, 0.0),
    }[name]
    generator = as_generator(rng)
    left = np.linalg.qr(generator.standard_normal((rows, columns)))[0]
    right = np.linalg.qr(generator.standard_normal((columns, columns)))[0]
    return (left * sigma) @ right.T, sigma
