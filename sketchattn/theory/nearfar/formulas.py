"""Near keys and far moments from their formulas: dense, on small problems, and what bounds them.

A `Case` is one problem with one choice of clusters and of near keys.  Everything in it but ``ahat``
and ``log_normalizer`` is written from the definitions; these two are what is observed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ...base.floating import without_floating_errors
from ...operators.nearfar import NearFarAttention, expected_maximum
from ...problem import AttentionProblem
from ...zoo.nearfar.method import NearFar
from ..combiner.formulas import log_sum
from ..engine.arguments import Array, Float, floats, real, whole
from ..engine.observers import logit_rounding, weight_rounding

# Weights below have no digits.
UNDERFLOW = 1e-290

# --- the second-order term ------------------------------------------------------------------------


@without_floating_errors
def normal_maximum(m: ArrayLike) -> Float:
    """Return the mean of the largest of m standard normal numbers.

    ``mu_m = int_0^inf (1 - Phi(x)^m - Phi(-x)^m) dx``, by quadrature.

    Parameters
    ----------
    m : int or array of int
        At least 1.

    Examples
    --------
    >>> [round(normal_maximum(m), 4) for m in (1, 2, 8, 32, 64)]
    [0.0, 0.5642, 1.4236, 2.0697, 2.3437]
    """
    from scipy.special import log_ndtr

    counts = whole(m, "m").astype(np.float64)
    # Beyond sqrt(2 ln m) + 9 less than 1e-17 is left; 400 points of Gauss have all digits.
    end = math.sqrt(2 * math.log(float(counts.max(initial=1.0)))) + 9
    points, weights = np.polynomial.legendre.leggauss(400)
    x = end * (points + 1) / 2
    above = -np.expm1(np.multiply.outer(counts, log_ndtr(x)))
    below = np.exp(np.maximum(np.multiply.outer(counts, log_ndtr(-x)), -700.0))
    return floats(np.asarray((above - below) @ weights * end / 2))


@without_floating_errors
def frozen_second_order(sigma: ArrayLike, m: ArrayLike) -> Float:
    """Return phi, what the log-mean-exp of m logits of standard deviation sigma is taken for.

    ``sigma^2/2`` up to ``s_m``, Blom's value of the expected maximum of m standard normal numbers,
    and ``s_m sigma - s_m^2/2`` beyond.

    Parameters
    ----------
    sigma : float or array
        At least 0.
    m : int or array of int
        At least 1.

    Examples
    --------
    >>> [round(frozen_second_order(x, 32), 2) for x in (1.0, 2.0, 4.0, 10.0)]
    [0.5, 2.0, 6.13, 18.53]
    >>> frozen_second_order(5.0, 1)
    0.0
    """
    x = real(sigma, "sigma", 0, low_open=False)
    s = expected_maximum(whole(m, "m"))
    least = np.minimum(x, s)
    return floats(np.asarray(least * (x - least / 2)))


@without_floating_errors
def frozen_window(sigma: float, m: int) -> tuple[float, float]:
    """Return how far phi may be below and above the mean log-mean-exp of m normal logits.

    ``-(mu_m - s_m)_+ sigma <= phi - E ln mean_j e^(sigma g_j) <= ln m - mu_m^2/2 +
    (s_m - mu_m)_+ sigma`` for independent standard normal g and the mean mu_m of the largest.

    Parameters
    ----------
    sigma : float
        At least 0.
    m : int
        At least 1.

    Examples
    --------
    >>> [round(x, 3) for x in frozen_window(10.0, 32)]
    [-0.029, 1.324]
    """
    x = float(real(sigma, "sigma", 0, low_open=False))
    count = int(whole(m, "m"))
    mu, s = float(np.asarray(normal_maximum(count))), float(expected_maximum(np.array(count)))
    return -max(mu - s, 0.0) * x, math.log(count) - mu**2 / 2 + max(s - mu, 0.0) * x


@without_floating_errors
def tilted_remainder(reach: ArrayLike) -> Float:
    """Return how far tilted weights are from their second-order polynomial.

    For centred numbers with ``|a_j| <= r`` and ``s^2`` the mean of their squares::

        |e^(a_j)/mean(e^a) - 1 - a_j - (a_j^2 - s^2)/2| <= kappa (2 + r + r^2/2) + r^3/2 + r^4/4,

    ``kappa = r^3 e^r/6``.

    Parameters
    ----------
    reach : float or array
        r, in [0, 1].

    Examples
    --------
    >>> a = np.array([-0.5, 0.2, 0.3])
    >>> weights = np.exp(a) / np.exp(a).mean()
    >>> off = abs(weights - 1 - a - (a**2 - (a**2).mean()) / 2).max()
    >>> bool(0.01 < off <= tilted_remainder(0.5) < 0.2)
    True
    """
    r = real(reach, "reach", 0, 1, low_open=False, high_open=False)
    kappa = r**3 * np.exp(r) / 6
    return floats(np.asarray(kappa * (2 + r + r * r / 2) + r**3 / 2 + r**4 / 4))


# --- moments that merge ---------------------------------------------------------------------------


class ClusterMoments(NamedTuple):
    """Hold what is kept of the keys and values of a cluster.

    Attributes
    ----------
    size : int
    key, variance : ndarray (d,)
        Mean of the keys, and variances of their coordinates.
    value : ndarray (d_v,)
        Mean of the values.
    radius : float
        At least the distance of each key from their mean.
    """

    size: int
    key: Array
    variance: Array
    value: Array
    radius: float


@without_floating_errors
def cluster_moments(keys: ArrayLike, values: ArrayLike) -> ClusterMoments:
    """Return the moments of keys (m, d) and values (m, d_v), m at least 1.

    Examples
    --------
    >>> cluster_moments([[0.0], [2.0]], [[1.0], [3.0]]).variance.tolist()
    [1.0]
    """
    k, v = np.asarray(keys, np.float64), np.asarray(values, np.float64)
    if k.ndim != 2 or v.ndim != 2 or len(k) != len(v) or len(k) == 0:
        raise ValueError(
            f"keys and values must be matrices with as many rows, at least 1, got shapes "
            f"{k.shape} and {v.shape}; pass those of one cluster"
        )
    key = k.mean(axis=0)
    away = k - key
    radius = float(np.linalg.norm(away, axis=1).max())
    return ClusterMoments(len(k), key, (away**2).mean(axis=0), v.mean(axis=0), radius)


@without_floating_errors
def merged_moments(parts: Iterable[ClusterMoments]) -> ClusterMoments:
    """Return the moments of a union of disjoint clusters: exact, but for the radius.

    ``kappa = sum_c m_c kappa_c/m``, ``D = sum_c m_c (D_c + (kappa_c - kappa)^2)/m``, the radius
    ``max_c (rho_c + |kappa_c - kappa|)``, which no distance exceeds.

    Examples
    --------
    >>> k = np.array([[0.0], [2.0], [7.0]])
    >>> merged = merged_moments([cluster_moments(x, x) for x in (k[:2], k[2:])])
    >>> merged.size, merged.key.round(6).tolist(), round(float(merged.radius), 6)
    (3, [3.0], 4.0)
    """
    found = list(parts)
    if not found:
        raise ValueError("parts must hold at least 1 cluster, got 0; pass moments of clusters")
    m = np.array([x.size for x in found], np.float64)
    share = m / m.sum()
    keys = np.array([x.key for x in found])
    key = share @ keys
    away = keys - key
    variance = share @ (np.array([x.variance for x in found]) + away**2)
    value = share @ np.array([x.value for x in found])
    distances = np.linalg.norm(away, axis=1) + np.array([x.radius for x in found])
    return ClusterMoments(int(m.sum()), key, variance, value, float(distances.max()))


# --- one problem, one choice ----------------------------------------------------------------------


class Form(NamedTuple):
    """Name the arguments of `NearFar`."""

    name: str
    block: int
    clusters: int
    near: int = 0
    tau: float = 0.0
    first_order: int = 0
    regions: str = "blocks"
    metric: str = "auto"
    second_order: str = "frozen"

    def method(self) -> NearFar:
        """Return the method."""
        given = self._asdict()
        del given["name"]
        return NearFar(**given)


class Structure(NamedTuple):
    """Say which keys rows read one by one, and which clusters they see from far.

    Attributes
    ----------
    labels : int64 ndarray (n_k,)
        Cluster of each key, -1 for none.
    direct : bool ndarray (n_q, n_k)
        Own keys, and those of near clusters.
    far : bool ndarray (n_q, R)
        Clusters of which moments are read.
    scores : ndarray (h, n_k)
        Of the keys along the directions of the first order.
    """

    labels: Array
    direct: Array
    far: Array
    scores: Array


def structure_of(ahat: NearFarAttention) -> Structure:
    """Return the structure of an operator, in numbers of all keys."""
    problem, rows, m = ahat.problem, ahat.layout, ahat.moments
    n_q, r, kept = problem.n_q, ahat.clusters.count, ahat.kept
    labels = np.full(problem.n_k, -1, np.int64)
    labels[kept] = ahat.clusters.labels
    tile = np.repeat(rows.tiles, rows.tiles[:, 1] - rows.tiles[:, 0], axis=0)
    own = (np.arange(len(kept)) >= tile[:, 2:3]) & (np.arange(len(kept)) < rows.stops[:, None])
    own &= (tile[:, 3] > tile[:, 2])[:, None]
    near = np.zeros((n_q, r + 1), bool)
    if ahat.near.shape[1]:
        np.put_along_axis(near, ahat.near.astype(np.int64), True, axis=1)
    near[:, -1] = False
    c = np.arange(r)
    far = (c < tile[:, 4:5]) & ~((c >= tile[:, 5:6]) & (c < tile[:, 6:7]))
    far &= (np.diff(m.starts) > 0) & ~near[:, :-1]
    direct = np.zeros((n_q, problem.n_k), bool)
    direct[:, kept] = own
    # Label -1 is the last column, which is nobody's.
    direct |= near[:, labels]
    scores = np.zeros((len(m.z), problem.n_k))
    scores[:, kept[m.members]] = m.z
    return Structure(labels, direct, far, scores)


class Case:
    """Hold the exact rows, the formulas of moments, and what is observed of an approximation.

    Everything is computed when it is asked for.

    Parameters
    ----------
    form : Form
    operator : NearFarAttention
        In float64, of an `AttentionProblem`.
    observe : callable, optional
        ``observe(kind, case)`` returns what another implementation makes of "nearfar" and
        "log_normalizer".
    """

    def __init__(
        self,
        form: Form,
        operator: NearFarAttention,
        observe: Callable[[str, Case], Array] | None = None,
    ) -> None:
        self.form, self.operator, self._observe = form, operator, observe
        problem = operator.problem
        assert isinstance(problem, AttentionProblem)
        self.problem = problem

    # --- what is exact ---

    @cached_property
    def structure(self) -> Structure:
        """Clusters, direct keys and far clusters."""
        return structure_of(self.operator)

    @cached_property
    def logits(self) -> Array:
        """``L`` (n_q, n_k), -inf where a row does not see a key."""
        problem = self.problem
        full = float(problem.scale) * problem.q @ problem.k.T
        return np.where(problem.visible(), full, -np.inf)

    @cached_property
    def log_z(self) -> Array:
        """``ln Z_i`` (n_q,)."""
        return log_sum(self.logits)

    @cached_property
    def a(self) -> Array:
        """A (n_q, n_k)."""
        return np.asarray(np.exp(self.logits - self.log_z[:, None]))

    # --- moments ---

    @cached_property
    def moments(self) -> tuple[Array, Array, Array, Array]:
        """Counts (R,), mean keys and variances (R, d), radii (R,)."""
        labels, k = self.structure.labels, self.problem.k
        r = self.structure.far.shape[1]
        counts = np.bincount(labels[labels >= 0], minlength=r)[:r]
        kappa, variance = np.zeros((2, r, k.shape[1]))
        rho = np.zeros(r)
        for c in np.flatnonzero(counts):
            inside = k[labels == c]
            kappa[c] = inside.mean(axis=0)
            away = inside - kappa[c]
            variance[c] = (away**2).mean(axis=0)
            rho[c] = np.linalg.norm(away, axis=1).max()
        return counts, kappa, variance, rho

    @property
    def counts(self) -> Array:
        """Keys of the clusters (R,)."""
        return self.moments[0]

    @cached_property
    def mass(self) -> Array:
        """``ln sum_{j in c} e^L_ij`` (n_q, R) of the far clusters, -inf elsewhere."""
        labels, _, far, _ = self.structure
        found = np.full(far.shape, -np.inf)
        for c in np.flatnonzero(self.counts):
            rows = far[:, c]
            found[rows, c] = log_sum(self.logits[np.ix_(rows, labels == c)])
        return found

    @cached_property
    def lower(self) -> Array:
        """``ln m_c + scale q_i . kappa_c`` (n_q, R) of the far clusters, -inf elsewhere."""
        counts, kappa, _, _ = self.moments
        with np.errstate(divide="ignore"):
            logs = np.log(counts)
        full = logs + float(self.problem.scale) * self.problem.q @ kappa.T
        return np.where(self.structure.far, full, -np.inf)

    @cached_property
    def sigma(self) -> Array:
        """``sigma_ic`` (n_q, R) of the far clusters, 0 elsewhere."""
        square = self.problem.q**2 @ self.moments[2].T
        return np.where(self.structure.far, abs(float(self.problem.scale)) * np.sqrt(square), 0.0)

    @cached_property
    def width(self) -> Array:
        """``w_ic = scale |q_i| rho_c`` (n_q, R) of the far clusters, 0 elsewhere."""
        lengths = abs(float(self.problem.scale)) * np.linalg.norm(self.problem.q, axis=1)
        return np.where(self.structure.far, np.outer(lengths, self.moments[3]), 0.0)

    # --- what is observed ---

    @cached_property
    def ahat(self) -> Array:
        """Ahat (n_q, n_k)."""
        if self._observe is not None:
            return self._observe("nearfar", self)
        return np.asarray(self.operator.to_dense(), np.float64)

    @cached_property
    def log_normalizer(self) -> Array:
        """``ln Zhat_i`` (n_q,)."""
        if self._observe is not None:
            return self._observe("log_normalizer", self)
        return np.asarray(self.operator.log_normalizer, np.float64)

    @cached_property
    def nothing(self) -> float:
        """What is rounding of logarithms of masses, four of them in a difference."""
        return 4 * logit_rounding(self.problem)

    @cached_property
    def weight_nothing(self) -> float:
        """What is rounding of a row of weights."""
        return weight_rounding(self.problem)

    @cached_property
    def member(self) -> Array:
        """Whether a key is in a cluster, as numbers (n_k, R)."""
        return np.asarray(self.structure.labels[:, None] == np.arange(len(self.counts)), np.float64)

    @cached_property
    def shares(self) -> Array:
        """Weights of the far clusters (n_q, R), 0 elsewhere."""
        return np.where(self.structure.far, self.ahat @ self.member, 0.0)

    @cached_property
    def seen(self) -> Array:
        """Far clusters whose weight does not underflow."""
        return np.asarray(self.structure.far & (self.shares > UNDERFLOW))

    @cached_property
    def g(self) -> Array:
        """``g_ic``, from weights and normaliser, where they do not underflow."""
        logs = np.log(np.where(self.seen, self.shares, 1.0)) + self.log_normalizer[:, None]
        return np.where(self.seen, logs, 0.0)

    @cached_property
    def _divergences(self) -> Array:
        """``Ahat_ij ln(Ahat_ij/A_ij)``, with logarithms of A that do not underflow."""
        some = (self.ahat > 0) & np.isfinite(self.logits)
        logs = np.log(np.where(some, self.ahat, 1.0))
        exact = np.where(some, self.logits, 0.0) - self.log_z[:, None]
        return np.where(some, self.ahat * (logs - exact), 0.0)

    @property
    def kl(self) -> Array:
        """``KL(Ahat_i|A_i)``."""
        return np.asarray(self._divergences.sum(axis=1))

    @property
    def kl_nothing(self) -> Array:
        """What is rounding of it: of logarithms, and of the weights that multiply them."""
        return np.asarray(self.nothing * (1 + np.abs(self._divergences).sum(axis=1)))

    @cached_property
    def tv(self) -> Array:
        """``(1/2)|Ahat_i - A_i|_1``."""
        return np.asarray(np.abs(self.ahat - self.a).sum(axis=1) / 2)

    @cached_property
    def share_tv(self) -> Array:
        """The same of direct keys and of the sums over far clusters."""
        direct = np.where(self.structure.direct, np.abs(self.ahat - self.a), 0.0).sum(axis=1)
        exact = np.where(self.structure.far, self.a @ self.member, 0.0)
        return np.asarray((direct + np.abs(self.shares - exact).sum(axis=1)) / 2)

    @cached_property
    def direct_mass(self) -> Array:
        """``ln`` of the sum of the direct keys (n_q,), -inf for none."""
        return log_sum(np.where(self.structure.direct, self.logits, -np.inf))


def others(logs: Array, rest: Array) -> Array:
    """Return ``ln(e^rest_i + sum_{c' != c} e^logs_ic')`` for each c, without a difference."""
    n, r = logs.shape
    before, after = np.empty((n, r)), np.empty((n, r))
    total = np.asarray(rest, np.float64)
    for c in range(r):
        before[:, c] = total
        total = np.logaddexp(total, logs[:, c])
    total = np.full(n, -np.inf)
    for c in range(r - 1, -1, -1):
        after[:, c] = total
        total = np.logaddexp(total, logs[:, c])
    return np.asarray(np.logaddexp(before, after))


# --- which choices are looked at ------------------------------------------------------------------


def forms(problem: AttentionProblem) -> list[Form]:
    """Return the forms on which claims look at a problem: clusters of about eight keys."""
    n = len(problem.kept_keys)
    block = 1 << (max(n // 4, 1).bit_length() - 1)
    clusters = max(block // 8, 1)
    made = [Form("blocks", block, clusters, 2, 0.02)]
    if not problem.causal:
        made.append(Form("all", block, clusters, 2, 0.0, regions="all"))
    return made


def one_cluster(problem: AttentionProblem) -> Form:
    """Return the form with all keys in one far cluster."""
    return Form("one cluster", max(len(problem.kept_keys), 1), 1, regions="all")
