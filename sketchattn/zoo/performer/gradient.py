"""The gradient of Performer at fixed directions omega, with respect to x, y and V.

Without a constant both factors are softmax attention, of queries to features with the bias a and
of features to keys, whose logsumexp a is; the chain goes through both.  Causal problems have these
factors for each row: a weight is ``W_ijl = U_il exp(N_jl - a_(e_i)l)``, a softmax over pairs (j, l)
of the logits ``T_il + N_jl``, so that with ``delta_i = G_i . Ohat_i``

    dT_il = U_il (G_i . C_il - delta_i),   dN_jl = sum_i W_ijl (G_i . v_j - delta_i),

C_il the mean of the values that row i sees, weighted by feature l.  Features that are held,
``Ohat = F (B V) / (F (B 1))``, are differentiated as they are, maxima included.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...kernels._threads import map_pieces, product
from ...operators.pullback import Gradient, row_tiles, softmax_pullback
from ...operators.solve import solution
from ...problem import AttentionProblem

Array = NDArray[Any]


def softmax_gradient(
    problem: AttentionProblem, x: Array, y: Array, omega: Array, g: Array
) -> Gradient:
    """Return the gradient at x, y and V where all rows see all keys."""
    kept = problem.kept_keys
    rows, values = y[kept], problem.values[kept]
    half = -0.5 * np.einsum("ij,ij->i", rows, rows)
    # [omega, 1] . [y, -|y|^2/2], with what it makes of the values and its logsumexp.
    asked = np.concatenate([omega, np.ones((len(omega), 1))], axis=1)
    keys = np.concatenate([rows, half[:, None]], axis=1)
    means, a = solution(AttentionProblem.adopt(asked, keys, values, scale=1.0))
    outer = softmax_pullback(x, omega, means, g, 1.0, bias=a)
    inner = softmax_pullback(omega, rows, values, outer.x, 1.0, bias=half, lse=outer.bias)
    dy, dv = np.zeros(y.shape), np.zeros(problem.values.shape)
    dy[kept] = inner.k - rows * inner.bias[:, None]
    dv[kept] = inner.x
    return Gradient(outer.q, dy, dv)


def causal_gradient(
    problem: AttentionProblem, u: Array, beta: Array, y: Array, omega: Array, g: Array
) -> Gradient:
    """Return the gradient at x, y and V of the factors U and beta of prefix sums."""
    from ...kernels.features import prefix_dots, prefix_transposed, suffix_dots

    v, offset = problem.arrays.v, problem.offset
    assert v is not None
    dt = prefix_dots(beta, offset, v, g)
    delta = np.einsum("ij,ij->i", u, dt)
    dt -= delta[:, None]
    dt *= u
    left = np.concatenate([g, delta[:, None]], axis=1)
    right = np.concatenate([v, np.full((len(v), 1), -1.0)], axis=1)
    dn = suffix_dots(u, beta, offset, left, right)
    dy = product(dn, omega)
    dy -= y * dn.sum(axis=1, keepdims=True)
    return Gradient(product(dt, omega), dy, prefix_transposed(u, beta, offset, g))


class _Positive:
    """``exp(T - |z|^2/2 - m) + eps``, m the largest T of all rows or of each row."""

    def __init__(self, omega: Array, eps: float, top: float | None) -> None:
        self.omega, self.eps, self.top = omega, eps, top

    def of(self, z: Array) -> tuple[Array, Array]:
        """Return the features of rows, and T."""
        t = z @ self.omega.T
        top = t.max(axis=1, keepdims=True) if self.top is None else self.top
        made = t - top
        made -= 0.5 * np.einsum("ij,ij->i", z, z)[:, None]
        return np.exp(made, out=made) + self.eps, t

    def back(self, z: Array, features: Array, t: Array, g: Array) -> tuple[Array, float]:
        """Return what a cotangent of the features is at z, and at m where all rows share it."""
        dt = g * (features - self.eps)
        total = dt.sum(axis=1)
        if self.top is None:
            dt[np.arange(len(t)), t.argmax(axis=1)] -= total
        return dt @ self.omega - total[:, None] * z, -float(total.sum())


class _Trigonometric:
    """``(cos T, sin T)``, for keys times ``exp(|z|^2/2 - m)``, which m no output depends on."""

    def __init__(self, omega: Array, top: float | None) -> None:
        self.omega, self.top = omega, top

    def of(self, z: Array) -> tuple[Array, Array]:
        """Return the features of rows, and T."""
        t = z @ self.omega.T
        made = np.concatenate([np.cos(t), np.sin(t)], axis=1)
        if self.top is not None:
            made *= np.exp(0.5 * np.einsum("ij,ij->i", z, z) - self.top)[:, None]
        return made, t

    def back(self, z: Array, features: Array, t: Array, g: Array) -> tuple[Array, float]:
        """Return what a cotangent of the features is at z, and at m: nothing."""
        width = t.shape[1]
        cosine, sine = features[:, :width], features[:, width:]
        dz = (cosine * g[:, width:] - sine * g[:, :width]) @ self.omega
        if self.top is not None:
            dz += np.einsum("ij,ij->i", features, g)[:, None] * z
        return dz, 0.0


def dense_gradient(
    problem: AttentionProblem,
    x: Array,
    y: Array,
    omega: Array,
    g: Array,
    eps: float,
    signed: bool,
) -> Gradient:
    """Return the gradient at x, y and V of features with a constant, or with signs."""
    kept, width = problem.kept_keys, len(omega) * (2 if signed else 1)
    rows, values = y[kept], problem.values[kept]
    of_keys: _Positive | _Trigonometric
    of_queries: _Positive | _Trigonometric
    place, across = (0, 0), np.ascontiguousarray(omega.T)
    key_tiles, query_tiles = row_tiles(len(rows), width), row_tiles(len(x), width)
    if signed:
        half = 0.5 * np.einsum("ij,ij->i", rows, rows)
        of_keys, of_queries = _Trigonometric(omega, float(half.max())), _Trigonometric(omega, None)
    else:

        def largest(tile: slice) -> tuple[float, int, int]:
            t = rows[tile] @ across
            j, feature = np.unravel_index(t.argmax(), t.shape)
            return float(t[j, feature]), tile.start + int(j), int(feature)

        top, *found = max(map_pieces(largest, key_tiles), key=lambda one: one[0])
        place = found[0], found[1]
        of_keys, of_queries = _Positive(omega, eps, top), _Positive(omega, eps, None)

    # B [V, 1], then F and its cotangent, then that of B.
    more = np.concatenate([values, np.ones((len(values), 1))], axis=1)
    sums = np.zeros((width, more.shape[1]))
    for part in map_pieces(lambda tile: of_keys.of(rows[tile])[0].T @ more[tile], key_tiles):
        sums += part
    dx, dsums = np.zeros(x.shape), np.zeros(sums.shape)

    def queries(tile: slice) -> Array:
        features, t = of_queries.of(x[tile])
        made = features @ sums
        total = made[:, -1:]
        inverse = np.divide(1.0, total, out=np.zeros_like(total), where=total != 0)
        inverse[~np.isfinite(inverse)] = 0.0
        out = made[:, :-1] * inverse
        delta = np.einsum("ij,ij->i", g[tile], out)[:, None]
        change = np.concatenate([g[tile], -delta], axis=1) * inverse
        dx[tile] = of_queries.back(x[tile], features, t, change @ sums.T)[0]
        found: Array = features.T @ change
        return found

    for part in map_pieces(queries, query_tiles):
        dsums += part
    dy, dv = np.zeros(y.shape), np.zeros(problem.values.shape)

    def keys(tile: slice) -> float:
        features, t = of_keys.of(rows[tile])
        dv[kept[tile]] = features @ dsums[:, :-1]
        dy[kept[tile]], shift = of_keys.back(rows[tile], features, t, more[tile] @ dsums.T)
        return shift

    shift = sum(map_pieces(keys, key_tiles))
    if not signed:
        dy[kept[place[0]]] += shift * omega[place[1]]
    return Gradient(dx, dy, dv)
