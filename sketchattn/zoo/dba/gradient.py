"""The gradient of DBA at fixed assignments: through the unpack, the core and the pack."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...kernels._threads import product
from ...operators.base import AttentionOperator
from ...operators.factored import Assignment
from ...operators.pullback import (
    Gradient,
    means_pullback,
    rows_pullback,
    softmax_pullback,
    zero_gradient,
)
from ...problem import AttentionProblem
from ..nystromformer.gradient import core_pullback, inverse_pullback
from ..nystromformer.inverse import pseudo_inverse_of
from .choices import Choices

Array = NDArray[Any]


class Side(NamedTuple):
    """Landmarks of queries or keys, float64 (m, d), and the landmark of each row, or None."""

    marks: Array
    labels: Array | None


class Parts(NamedTuple):
    """Hold what `DBA._build` makes the factors of.

    Attributes
    ----------
    small : AttentionProblem
        The compressed one.
    queries, keys : Side or None
    counts : ndarray or None
        Keys of each landmark key, where P takes means.
    pack : AttentionOperator
    core : ndarray or None
    """

    small: AttentionProblem
    queries: Side | None
    keys: Side | None
    counts: Array | None
    pack: AttentionOperator
    core: Array | None


class Numbers(NamedTuple):
    """Hold the numbers that the factors depend on beside these.

    Attributes
    ----------
    tau : float
    iterations : int or None
    ridge, cut : float
        Of the core.
    columns : ndarray or None
        Columns that "lsq" looks at, with its own ridge and cut.
    lsq : (float, float)
    """

    tau: float
    iterations: int | None
    ridge: float
    cut: float
    columns: Array | None
    lsq: tuple[float, float]


def gradient(
    choice: Choices, problem: AttentionProblem, parts: Parts, numbers: Numbers, g: Array
) -> tuple[Gradient, Gradient]:
    """Return what a cotangent of ``U S P V`` is at the problem, and at the compressed Q and K.

    The second has no part for V; where nothing is compressed the two are to be added.
    """
    small, queries, keys, counts, pack, core = parts
    scale, kept, q = small.scale, small.kept_keys, small.arrays.q
    k, v = small.k[kept], problem.values[kept]
    own, inside = zero_gradient(problem), zero_gradient(small)
    dmarks = [
        np.zeros((0, 0)) if side is None else np.zeros(side.marks.shape) for side in parts[1:3]
    ]

    packed = np.asarray(pack @ problem.values)
    inner = packed if core is None else product(core, packed)
    logs = None if counts is None else np.log(counts)
    dcolumns = None  # cotangent of the columns of P that "lsq" looks at
    if choice.unpack == "onehot":
        assert queries is not None
        assert queries.labels is not None
        dinner = np.asarray(Assignment(queries.labels, len(queries.marks)).T @ g)
    elif choice.unpack == "lsq":
        assert numbers.columns is not None
        dinner, dcolumns = _fitted(problem, pack, inner, numbers, g, own)
    else:
        by_keys = choice.unpack == "softmax_keys"
        side = keys if by_keys else queries
        assert side is not None
        factor = scale if by_keys else numbers.tau * scale
        made = softmax_pullback(q, side.marks, inner, g, factor, bias=logs if by_keys else None)
        inside.q[:] += made.q
        dmarks[int(by_keys)] += made.k
        dinner = made.x

    dpacked = dinner
    if core is not None:
        assert queries is not None
        assert keys is not None
        if choice.core == "pinv":
            dpacked = product(np.ascontiguousarray(core.T), dinner)
            dcore = product(dinner, np.ascontiguousarray(packed.T))
            both = core_pullback(
                queries.marks, keys.marks, scale, numbers.iterations, numbers.ridge, numbers.cut,
                dcore,
            )  # fmt: skip
        else:
            bias = logs if choice.core == "softmax_logcount" else None
            made = softmax_pullback(queries.marks, keys.marks, packed, dinner, scale, bias=bias)
            dpacked, both = made.x, (made.q, made.k)
        for total, part in zip(dmarks, both, strict=True):
            total += part

    if choice.pack == "mean":
        assert keys is not None
        assert keys.labels is not None
        own.v[kept] += means_pullback(keys.labels, dpacked)
    else:
        assert queries is not None
        asked, shift = queries.marks, None
        if dcolumns is not None and numbers.columns is not None:
            # Of P_J o (C - (P_J . C) 1^T) the second part is a cotangent of the normaliser.
            chosen = small.k[numbers.columns]
            change = np.asarray(pack.columns(numbers.columns)) * dcolumns
            shift = -change.sum(axis=1)
            dmarks[0] += scale * product(change, chosen)
            inside.k[numbers.columns] += scale * product(np.ascontiguousarray(change.T), asked)
        made = softmax_pullback(asked, k, v, dpacked, scale, lse=shift)
        dmarks[0] += made.q
        inside.k[kept] += made.k
        own.v[kept] += made.x
    if choice.landmarks == "segment_means":
        if queries is not None and queries.labels is not None:
            inside.q[:] += means_pullback(queries.labels, dmarks[0])
        if keys is not None and keys.labels is not None:
            inside.k[kept] += means_pullback(keys.labels, dmarks[1])
    return own, inside


def _fitted(
    problem: AttentionProblem,
    pack: AttentionOperator,
    inner: Array,
    numbers: Numbers,
    g: Array,
    own: Gradient,
) -> tuple[Array, Array]:
    """Return the cotangents of ``P V`` and ``P_J`` where ``U = A_J R``, R the inverse of P_J.

    Adds that of the problem, whose exact columns are fitted, to ``own``.
    """
    columns, (ridge, cut) = numbers.columns, numbers.lsq
    assert columns is not None
    p = np.asarray(pack.columns(columns), np.float64)
    inverse = pseudo_inverse_of(p, ridge, cut)
    # U P V = A X with X = R P V at the columns and zero elsewhere.
    x = np.zeros((problem.n_k, inner.shape[1]))
    x[columns] = product(inverse, inner)
    made = rows_pullback(problem, None, x, g)
    dx = made.v[columns]
    own.q[:] += made.q
    own.k[:] += made.k
    dinverse = product(dx, np.ascontiguousarray(inner.T))
    return (
        product(np.ascontiguousarray(inverse.T), dx),
        inverse_pullback(p, ridge, cut, dinverse),
    )
