"""Exact mean square errors of ``A S^T S V``, for every operator that the library draws."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ...base.arguments import as_array, closest
from ...base.draws import Rng, as_generator
from ...base.floating import without_floating_errors
from ..engine.arguments import Array, Float, choice, floats, matrix_of, product_of, real, whole


class AmmStats(NamedTuple):
    """Hold the three numbers that the mean square errors are made of.

    Attributes
    ----------
    a : float
        ``|A|_F^2 |V|_F^2``.
    b : float
        ``|A V|_F^2``.
    c : float
        ``sum_j |A_:j|^2 |V_j|^2``.
    """

    a: float
    b: float
    c: float

    @property
    def rho(self) -> float:
        """``b / a`` in [0, 1]; 0 for a zero factor."""
        return self.b / self.a if self.a > 0 else 0.0


@without_floating_errors
def amm_stats(A: object, V: object) -> AmmStats:
    """Return ``a = |A|_F^2 |V|_F^2``, ``b = |A V|_F^2`` and ``c = sum_j |A_:j|^2 |V_j|^2``.

    Parameters
    ----------
    A : array (m, n)
    V : array (n, d_v)

    Returns
    -------
    AmmStats
        With ``.rho = b / a``.

    Notes
    -----
    Always ``b <= a`` and ``c <= a``.

    Examples
    --------
    >>> amm_stats([[1, 2, 0], [0.5, -1, 3]], [[1, -1], [2, 0], [-1, 1]])
    AmmStats(a=122.0, b=52.5, c=40.5)
    """
    a, v = product_of(A, V)
    columns, rows = square_norms(a, v)
    product = a @ v
    return AmmStats(
        float(columns.sum() * rows.sum()), float(np.sum(product * product)), float(columns @ rows)
    )


def square_norms(a: Array, v: Array) -> tuple[Array, Array]:
    """Return ``|A_:j|^2`` and ``|V_j|^2``."""
    return np.einsum("ij,ij->j", a, a), np.einsum("ij,ij->i", v, v)


def _probabilities(p: Any, a: Array, v: Array) -> Array:
    from ...sampling.laws import probabilities

    return probabilities(p, (a, v))


def _biased(p: Array, weights: Array) -> None:
    lost = (p == 0) & (weights > 0)
    if lost.any():
        raise ValueError(
            f"p must be positive where |A_:j| |V_j| > 0, got p[{int(np.argmax(lost))}] = 0; "
            f"a column that is never drawn biases the estimator"
        )


def _moment_iid(kurtosis: float) -> Callable[..., Array]:
    def moment(a: Array, v: Array, r: Array) -> Array:
        s = amm_stats(a, v)
        found: Array = (s.a + s.b + (kurtosis - 3) * s.c) / r
        return found

    return moment


def _moment_sparse(a: Array, v: Array, r: Array, s: float | str = 3.0) -> Array:
    n = a.shape[1]
    inverse = math.sqrt(n) if s == "sqrt" else float(real(s, "s", 1, low_open=False))
    return _moment_iid(inverse)(a, v, r)


def _moment_pairwise(a: Array, v: Array, r: Array) -> Array:
    s = amm_stats(a, v)
    moment: Array = (s.a + s.b - 2 * s.c) / r
    return moment


def _moment_blocks(a: Array, v: Array, r: Array, s: int = 4) -> Array:
    whole(s, "s", 1, int(np.min(r)))
    return _moment_pairwise(a, v, r)


def _moment_osnap(a: Array, v: Array, r: Array, s: int = 4) -> Array:
    if (r % int(whole(s, "s"))).any():
        raise ValueError(
            f"r must be divisible by s = {s} for osnap, got {int(r[r % s != 0].flat[0])}; "
            f"change r or s"
        )
    return _moment_pairwise(a, v, r)


def _without(r: Array, n: int, name: str = "n") -> Array:
    """Return ``(n - r)/(n - 1)``, what drawing without replacement leaves of a variance."""
    if (r > n).any():
        raise ValueError(
            f"r must be at most {name} = {n} without replacement, got {int(r.max())}; lower r"
        )
    factor: Array = (n - r) / max(n - 1, 1)
    return factor


def _moment_srht(a: Array, v: Array, r: Array, replace: bool = False) -> Array:
    padded = 1 << (a.shape[1] - 1).bit_length()
    base = _moment_pairwise(a, v, r)
    return _without(r, padded, "the padded length") * base if not replace else base


def _moment_orthogonal(
    a: Array, v: Array, r: Array, transform: object = None, replace: bool = False
) -> Array:
    n = a.shape[1]
    if transform is None:
        from scipy.fft import dct

        c = dct(np.eye(n), axis=0, norm="ortho")
    else:
        c = matrix_of(transform, "transform")
        if c.shape != (n, n) or not np.allclose(c @ c.T, np.eye(n), atol=1e-8):
            raise ValueError(
                f"transform must be an orthonormal matrix of shape ({n}, {n}), got shape "
                f"{c.shape}; orthonormalise it"
            )
    # w_ij = n C_ij^2;  sum_i alpha_i beta_i + 2 Gam_i - 2 gam_i, with Gam_i = w_i^T K w_i
    w = n * c * c
    columns, rows = square_norms(a, v)
    gram = (a.T @ a) * (v @ v.T)
    spread = np.einsum("ij,ij->i", w @ gram, w)
    pointwise = (w * w) @ (columns * rows)
    mean = float(np.mean((w @ columns) * (w @ rows) + 2 * spread - 2 * pointwise))
    base = (mean - amm_stats(a, v).b) / r
    return base if replace else _without(r, n) * base


def _moment_haar(a: Array, v: Array, r: Array) -> Array:
    n, s = a.shape[1], amm_stats(a, v)
    if n == 1:
        _without(r, n)
        return np.zeros(r.shape)
    moment: Array = _without(r, n) * (n * s.a + (n - 2) * s.b) / (r * (n + 2))
    return moment


def _moment_less_uniform(a: Array, v: Array, r: Array, t: int = 4) -> Array:
    n, s = a.shape[1], amm_stats(a, v)
    t = int(whole(t, "t", 1, n))
    theta = n * (t - 1) / (t * (n - 1)) if n > 1 else 0.0
    moment: Array = (theta * (s.a + 2 * s.b - 3 * s.c) + (n / t) * s.c - s.b) / r
    return moment


def _moment_sample_wr(a: Array, v: Array, r: Array, p: object = "uniform") -> Array:
    law = _probabilities(p, a, v)
    columns, rows = square_norms(a, v)
    weights = columns * rows
    _biased(law, weights)
    ratio = np.divide(weights, law, out=np.zeros_like(weights), where=law > 0)
    moment: Array = (float(ratio.sum()) - amm_stats(a, v).b) / r
    return moment


def _moment_sample_wor(a: Array, v: Array, r: Array) -> Array:
    n, s = a.shape[1], amm_stats(a, v)
    moment: Array = _without(r, n) * (n * s.c - s.b) / r
    return moment


def _moment_sample_poisson(
    a: Array, v: Array, r: Array, p: object = "optimal", pi: object = None
) -> Array:
    columns, rows = square_norms(a, v)
    weights = columns * rows

    def one(keep: Array) -> float:
        _biased(keep, weights)
        ratio = np.divide(weights, keep, out=np.zeros_like(weights), where=keep > 0)
        return float(ratio.sum() - weights.sum())

    if pi is None:
        from ...sampling.draws import inclusion_probabilities

        law = _probabilities(p, a, v)
        found = [one(inclusion_probabilities(law, int(size))) for size in r.ravel()]
        return np.array(found).reshape(r.shape)
    keep = as_array(pi, "pi")
    if keep.shape != weights.shape or not ((keep >= 0) & (keep <= 1)).all():
        raise ValueError(
            f"pi must hold n = {len(weights)} probabilities, got shape {keep.shape}; give the "
            f"probability that each column is kept"
        )
    return np.full(r.shape, one(keep.astype(np.float64)))


def _gumbel_weights(log_p: Array, r: int, rng: np.random.Generator) -> Array:
    """Return one sample of ``1/P(g_j > tau_j)`` given the perturbations of the other columns.

    ``g_j = ln p_j + Gumbel_j``, and tau_j is the r-th largest of the others: the (r+1)-th largest
    of all where j is among the r largest, otherwise the r-th.
    """
    g = log_p + rng.gumbel(size=len(log_p))
    order = np.argsort(g)[::-1]
    tau = np.full(len(g), g[order[r - 1]])
    tau[order[:r]] = g[order[r]]
    # P(g_j > tau) = 1 - exp(-exp(ln p_j - tau))
    weights: Array = -1.0 / np.expm1(-np.exp(log_p - tau))
    return weights


def _moment_sample_gumbel(
    a: Array,
    v: Array,
    r: Array,
    p: object = "optimal",
    simulations: int = 4096,
    rng: Rng = 0,
) -> Array:
    law = _probabilities(p, a, v)
    columns, rows = square_norms(a, v)
    weights = columns * rows
    _biased(law, weights)
    kept = law > 0
    if (r < 2).any() or (r >= kept.sum()).any():
        raise ValueError(
            f"r must be at least 2 and below the {int(kept.sum())} columns of positive "
            f"probability for sample_gumbel, got {r.tolist()}; change r"
        )
    found = [gumbel_moment(law, weights, int(size), simulations, rng)[0] for size in r.ravel()]
    return np.array(found).reshape(r.shape)


def gumbel_moment(
    law: Array, weights: Array, r: int, simulations: int, rng: Rng
) -> tuple[float, float]:
    """Return ``sum_j h_j (E[1/P(g_j > tau_j)] - 1)`` by simulation, and its standard error.

    Parameters
    ----------
    law, weights : ndarray (n,)
        p and ``h_j = |A_:j|^2 |V_j|^2``.
    r, simulations : int
    rng : None, int or numpy.random.Generator
    """
    generator = as_generator(rng)
    kept = law > 0
    log_p, h = np.log(law[kept]), weights[kept]
    count = int(whole(simulations, "simulations", 2))
    totals = np.array([float(h @ _gumbel_weights(log_p, r, generator)) for _ in range(count)])
    error = float(totals.std(ddof=1)) / math.sqrt(count)
    return float(totals.mean()) - float(h.sum()), error


_MOMENTS: dict[str, Callable[..., Array]] = {
    "gaussian": _moment_iid(3.0),
    "rademacher": _moment_iid(1.0),
    "uniform": _moment_iid(1.8),
    "sparse": _moment_sparse,
    "countsketch": _moment_pairwise,
    "sjlt": _moment_blocks,
    "osnap": _moment_osnap,
    "less_uniform": _moment_less_uniform,
    "srht": _moment_srht,
    "dct": _moment_orthogonal,
    "orthogonal": _moment_orthogonal,
    "haar": _moment_haar,
    "sample_wr": _moment_sample_wr,
    "sample_wor": _moment_sample_wor,
    "sample_poisson": _moment_sample_poisson,
    "sample_gumbel": _moment_sample_gumbel,
}
# What each formula may be given, beside the matrices and r; "dct" is "orthogonal" with its own C.
_PARAMETERS = {name: tuple(inspect.signature(f).parameters)[3:] for name, f in _MOMENTS.items()}
_PARAMETERS["dct"] = ("replace",)


@without_floating_errors
def amm_expected_sqerr(kind: str, A: object, V: object, r: ArrayLike, **parameters: Any) -> Float:
    r"""Return the exact mean square error ``M = E |A S^T S V - A V|_F^2``.

    With ``a, b, c`` of `amm_stats`:

    - ``gaussian`` ``(a+b)/r``; ``rademacher`` ``(a+b-2c)/r``; ``uniform`` entries
      ``(a+b-1.2c)/r``; ``sparse`` ``(a+b+(s-3)c)/r`` with ``s`` (3, or "sqrt");
    - ``countsketch``, ``sjlt``, ``osnap`` with any ``s`` (4): ``(a+b-2c)/r``;
    - ``less_uniform`` with ``t`` (4): ``(theta(a+2b-3c) + (n/t)c - b)/r``,
      ``theta = n(t-1)/(t(n-1))``;
    - ``srht`` ``((N-r)/(N-1)) (a+b-2c)/r``, N the next power of two; without the factor for
      ``replace=True``;
    - ``dct``, and ``orthogonal`` with any orthonormal ``transform`` C:
      ``((n-r)/(r(n-1))) ((1/n) sum_i [alpha_i beta_i + 2 Gam_i - 2 gam_i] - b)`` with
      ``w_ij = n C_ij^2``, ``alpha_i = sum_j w_ij |A_:j|^2``, ``beta_i = sum_j w_ij |V_j|^2``,
      ``Gam_i = |A diag(w_i) V|_F^2``, ``gam_i = sum_j w_ij^2 |A_:j|^2 |V_j|^2``; ``replace``;
    - ``haar`` ``(n-r)(na + (n-2)b) / (r(n-1)(n+2))``;
    - ``sample_wr`` with ``p``: ``(sum_j |A_:j|^2 |V_j|^2 / p_j - b)/r``;
    - ``sample_wor`` (uniform) ``((n-r)/(n-1)) (nc - b)/r``;
    - ``sample_poisson`` with ``p`` and expected size r, or with ``pi``:
      ``sum_j (1/pi_j - 1) |A_:j|^2 |V_j|^2``;
    - ``sample_gumbel`` with ``p``: ``sum_j |A_:j|^2 |V_j|^2 (E[1/P(g_j > tau_j)] - 1)``, the
      expectation by ``simulations`` (4096) draws from ``rng`` (0).

    Parameters
    ----------
    kind : str
        One of the names above.
    A : array (m, n)
    V : array (n, d_v)
    r : int or int array
        Rows of S, at least 1; at most n (N for ``srht``) without replacement.
    **parameters
        Those of the kind; ``p`` is an array (n,) or a name from ``sketchattn.sampling.LAWS``.

    Returns
    -------
    float or ndarray
        Of the shape of ``r``.

    Raises
    ------
    TypeError, ValueError
        For unknown kinds and parameters, r out of range, or a law that never draws a column
        that matters.

    Notes
    -----
    Equalities at every n and r.  All are derived: a fixed pair ``x^T S^T S y`` is a mean of r
    independent terms for entries drawn independently; for the kinds with exactly one unit
    column norm the off-diagonal entries of ``S^T S`` are uncorrelated with variance 1/r; rows
    drawn without replacement multiply the variance of the population by (n-r)/(n-1); for
    ``haar`` the fourth moments of a projection follow from its trace.

    Examples
    --------
    >>> A, V = [[1, 2, 0], [0.5, -1, 3]], [[1, -1], [2, 0], [-1, 1]]
    >>> amm_expected_sqerr("gaussian", A, V, 2), amm_expected_sqerr("countsketch", A, V, 2)
    (87.25, 46.75)
    >>> amm_expected_sqerr("sample_wr", A, V, [1, 2], p=[0.2, 0.5, 0.3]).round(9).tolist()
    [60.0, 30.0]
    """
    choice(kind, "kind", tuple(_MOMENTS))
    for name in parameters:
        known = _PARAMETERS[kind]
        if name not in known:
            hint = closest(name, known) if known else "; it takes none"
            raise TypeError(f"{name} must be a parameter of kind {kind!r}, got {name!r}{hint}")
    a, v = product_of(A, V)
    if a.shape[1] < 1:
        raise ValueError("A must have at least one column, got n = 0; there is nothing to sketch")
    found = np.asarray(_MOMENTS[kind](a, v, whole(r, "r"), **parameters), np.float64)
    # Differences of equal numbers: an exact operator must not get a negative square.
    return floats(np.maximum(found, 0.0))
