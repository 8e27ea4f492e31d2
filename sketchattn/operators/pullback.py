"""Vector-Jacobian products of softmax attention and its parts, in float64, never n_q x n_k.

With ``A = rowsoftmax(L)``, ``L = scale Q K^T + 1 b^T``, ``O = A X`` and ``l = logsumexp(L)``, a
cotangent G of O and c of l give

    dX = A^T G,   dA = G X^T,   dL = A o (dA - (delta - c) 1^T),   delta_i = G_i . O_i,
    dQ = scale dL K,   dK = scale dL^T Q,   db = dL^T 1,

and everything that methods make of softmax attention is a chain of such products.  Rows are
computed in tiles that follow from the shapes alone, each by one thread, and added in their order:
the bits do not depend on the number of threads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..base.head import Head
from ..kernels._threads import map_pieces
from .solve import row_softmax

Array = NDArray[Any]

# Entries of one array of a tile, and rows of it at least: a tile adds to arrays as long as the
# keys, which so many rows outweigh.
TILE_ENTRIES, LEAST_ROWS = 1 << 19, 32
# Numbers that are gathered at a time for products of chosen pairs of rows.
PAIR_ENTRIES = 1 << 17


class Gradient(NamedTuple):
    """Hold what a cotangent of the output is at the queries, keys and values."""

    q: Array
    k: Array
    v: Array


def zero_gradient(problem: Head) -> Gradient:
    """Return the gradient of a constant output."""
    return Gradient(*(np.zeros(x.shape) for x in (problem.q, problem.k, problem.values)))


class Pullback(NamedTuple):
    """Hold what cotangents of ``O = rowsoftmax(scale Q K^T + 1 b^T) X`` are at Q, K, X and b."""

    q: Array
    k: Array
    x: Array
    bias: Array


class Sight(NamedTuple):
    """Say what rows see: row i the keys whose ``positions`` are at most ``last[i]``."""

    positions: Array
    last: Array


def row_tiles(rows: int, width: int) -> list[slice]:
    """Return the tiles of an array of that many rows and columns."""
    step = max(LEAST_ROWS, TILE_ENTRIES // max(width, 1))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def softmax_pullback(
    q: Array,
    k: Array,
    x: Array,
    g: Array,
    scale: float,
    *,
    bias: Array | None = None,
    sight: Sight | None = None,
    lse: Array | None = None,
) -> Pullback:
    """Return what cotangents of a softmax attention are at its arguments.

    Parameters
    ----------
    q, k, x : float64 arrays (n_q, d), (n_k, d), (n_k, m)
    g : float64 array (n_q, m)
        Cotangent of the output.
    scale : float
    bias : array (n_k,), optional
        b; zero by default.
    sight : Sight, optional
        All rows see all keys by default.  A row that sees no key has a constant output, zero.
    lse : array (n_q,), optional
        Cotangent of the logsumexp of the rows; zero by default.

    Examples
    --------
    >>> one = np.ones((1, 1))
    >>> made = softmax_pullback(one, np.zeros((2, 1)), np.array([[1.0], [3.0]]), one, 1.0)
    >>> made.k.tolist(), made.x.tolist(), made.q.tolist()
    ([[-0.5], [0.5]], [[0.5], [0.5]], [[0.0]])
    """
    dq = np.zeros(q.shape)
    dk, dx, db = np.zeros(k.shape), np.zeros(x.shape), np.zeros(len(k))
    if not len(k):
        return Pullback(dq, dk, dx, db)
    k_across, x_across = np.ascontiguousarray(k.T), np.ascontiguousarray(x.T)

    def work(tile: slice) -> tuple[Array, Array, Array]:
        weights = (scale * q[tile]) @ k_across
        if bias is not None:
            weights += bias
        if sight is not None:
            weights[sight.positions > sight.last[tile, None]] = -np.inf
        row_softmax(weights)
        dx_part = weights.T @ g[tile]
        change = g[tile] @ x_across
        shift = np.einsum("ij,ij->i", weights, change)
        if lse is not None:
            shift -= lse[tile]
        change -= shift[:, None]
        change *= weights
        dq[tile] = scale * (change @ k)
        return scale * (change.T @ q[tile]), dx_part, change.sum(axis=0)

    for dk_part, dx_part, db_part in map_pieces(work, row_tiles(len(q), len(k))):
        dk += dk_part
        dx += dx_part
        db += db_part
    return Pullback(dq, dk, dx, db)


def rows_pullback(problem: Head, rows: Array | None, x: Array, g: Array) -> Gradient:
    """Return the same for rows I of the exact matrix of a problem: ``O = A_I X``.

    ``rows`` int (s,), None for all; ``x (n_k, m)``, not read at masked keys; ``g (s, m)``.
    The gradients have the shapes of Q, K and X, with zeros for other rows and masked keys.
    """
    kept, (q, k, _) = problem.kept_keys, problem.arrays
    index = np.arange(problem.n_q) if rows is None else rows
    sight = Sight(kept, index + problem.offset) if problem.causal else None
    made = softmax_pullback(q[index], k[kept], x[kept], g, problem.scale, sight=sight)
    dq, dk, dx = np.zeros(q.shape), np.zeros(k.shape), np.zeros(x.shape)
    dq[index], dk[kept], dx[kept] = made.q, made.k, made.x
    return Gradient(dq, dk, dx)


def columns_pullback(
    problem: Head, columns: Array, g: Array, weights: Array | None = None
) -> Gradient:
    """Return the same for ``O = rowsoftmax(L_J + 1 ln w^T) V_J`` over distinct columns J (t,).

    What `operators.solve.softmax_over` is the matrix of.
    """
    q, k, _ = problem.arrays
    sight = None
    if problem.causal:
        sight = Sight(columns, np.arange(problem.n_q) + problem.offset)
    made = softmax_pullback(
        q,
        k[columns],
        problem.values[columns],
        g,
        problem.scale,
        bias=None if weights is None else np.log(weights),
        sight=sight,
    )
    dk, dv = np.zeros(k.shape), np.zeros(problem.values.shape)
    dk[columns], dv[columns] = made.k, made.x
    return Gradient(made.q, dk, dv)


def chosen_pullback(problem: Head, columns: Array, weights: Array, g: Array) -> Gradient:
    """Return the same for ``O = A_J diag(w) V_J``: chosen columns of the exact matrix, weighted."""
    x = np.zeros(problem.values.shape)
    x[columns] = weights[:, None] * problem.values[columns]
    made = rows_pullback(problem, None, x, g)
    dv = np.zeros(x.shape)
    dv[columns] = weights[:, None] * made.v[columns]
    return Gradient(made.q, made.k, dv)


def means_pullback(labels: Array, g: Array) -> Array:
    """Return what a cotangent G (m, d) of the means of m groups of rows is at these rows.

    ``labels`` int (n,) are the group of each row; every group has one.

    Examples
    --------
    >>> means_pullback(np.array([0, 1, 0]), np.array([[2.0], [3.0]])).ravel().tolist()
    [1.0, 3.0, 1.0]
    """
    counts = np.bincount(labels, minlength=len(g))
    spread: Array = (g / counts[:, None])[labels]
    return spread


def pair_dots(a: Array, b: Array, i: Array, j: Array) -> Array:
    """Return ``a_i . b_j`` for pairs of rows i and j, (t,).

    Examples
    --------
    >>> one = np.array([[1.0, 2.0], [3.0, 4.0]])
    >>> pair_dots(one, one, np.array([0, 1]), np.array([1, 1])).tolist()
    [11.0, 25.0]
    """
    out = np.empty(len(i))
    step = max(1, PAIR_ENTRIES // max(a.shape[1], 1))
    pieces = [slice(start, start + step) for start in range(0, len(i), step)]

    def work(piece: slice) -> None:
        out[piece] = np.einsum("tm,tm->t", a[i[piece]], b[j[piece]])

    for _ in map_pieces(work, pieces):
        pass
    return out
