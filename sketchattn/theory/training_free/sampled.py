"""Formulas: keys that collide together, what a floor costs, merged repeats, budgets."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ...base.floating import without_floating_errors
from ...problem import AttentionProblem
from ...zoo.magicpig import Choices, code_probability, collision_probability, hashed
from ...zoo.vattention import clt_budget as clt_budget
from ...zoo.vattention import hoeffding_serfling_budget as hoeffding_serfling_budget
from ..engine.arguments import Array, Float, floats, real, whole

MAGICPIG = "Chen et al., arXiv 2410.16179"
VATTENTION = "Desai et al., arXiv 2510.05688"
DERIVED = "derived: see the chapter on training-free methods"


def _angles(q: Array, k: Array) -> Array:
    return np.asarray(np.arccos(np.clip(q @ k.T, -1.0, 1.0)))


@without_floating_errors
def joint_probability(
    problem: AttentionProblem, row: int, *, bits: int, tables: int, least: int = 2
) -> Array:
    """Return the probability that a row keeps both of two keys, (n_k, n_k), for ``least`` 1 or 2.

    Of three vectors all lie on one side of a random plane with probability ``1 - (theta_ij +
    theta_il + theta_jl)/(2 pi)``; ``p_jl`` is its power ``bits``.  With ``e = 1 - p_j - p_l +
    p_jl`` and L tables, one of which is enough,
    ``u_jl = 1 - (1 - p_j)^L - (1 - p_l)^L + e^L``; where two must agree, and ``F(p) = (1 - p)^L +
    L p (1 - p)^(L-1)``, ``u_jl = 1 - F(p_j) - F(p_l) + e^L + L e^(L-1) (p_j + p_l - p_jl) +
    L (L - 1) e^(L-2) (p_j - p_jl)(p_l - p_jl)``.

    Parameters
    ----------
    problem : AttentionProblem
        Neither the query nor a centred key may be zero.
    row : int
    bits, tables, least : int
        As of `MagicPIG`.

    Returns
    -------
    ndarray
        On the diagonal the probability that the key is kept.

    Examples
    --------
    >>> import sketchattn as sa
    >>> problem = sa.make_heads("gaussian", n=8, d=4, rng=0)[0].astype(np.float64)
    >>> joint = joint_probability(problem, 0, bits=4, tables=16, least=1)
    >>> alone = np.sqrt(np.outer(joint.diagonal(), joint.diagonal()))
    >>> bool((joint <= alone + 1e-12).all())
    True
    """
    if least not in (1, 2):
        raise ValueError(f"least must be 1 or 2, got {least}; no formula is known for others")
    count = int(whole(tables, "tables", least))
    q, k = hashed(problem, Choices())
    to_query = _angles(q[row : row + 1], k)[0]
    between = _angles(k, k)
    np.fill_diagonal(between, 0.0)
    p = (1 - to_query / math.pi) ** bits
    half = (to_query[:, None] + to_query[None, :] + between) / (2 * math.pi)
    both = np.minimum(np.maximum(1 - half, 0.0) ** bits, np.minimum(p[:, None], p[None, :]))
    pj, pl = p[:, None], p[None, :]
    neither = np.maximum(1 - pj - pl + both, 0.0)
    u = collision_probability(p, count, least)
    joint = u[:, None] + u[None, :] - 1 + neither**count
    if least == 2:
        joint += count * neither ** (count - 1) * (pj + pl - both)
        joint += count * (count - 1) * neither ** (count - 2) * (pj - both) * (pl - both)
    np.fill_diagonal(joint, u)
    return np.asarray(np.maximum(joint, 0.0))


@without_floating_errors
def magicpig_variance(
    problem: AttentionProblem, row: int, *, bits: int, tables: int, least: int = 1
) -> tuple[float, float]:
    """Return the variance of ``Dhat_i/D_i``, and the part of it that pairs of keys do not add.

    ``Var Dhat_i/D_i = sum_jl A_ij A_il (u_jl/(u_j u_l) - 1)``; the part is that of ``j = l``,
    ``sum_j A_ij^2 (1/u_j - 1)``.

    Parameters
    ----------
    problem, row, bits, tables, least
        As of `joint_probability`.

    Examples
    --------
    >>> import sketchattn as sa
    >>> problem = sa.make_heads("gaussian", n=8, d=4, rng=0)[0].astype(np.float64)
    >>> whole, part = magicpig_variance(problem, 0, bits=4, tables=16)
    >>> bool(0 < part < whole)
    True
    """
    joint = joint_probability(problem, row, bits=bits, tables=tables, least=least)
    a = problem.exact.rows([row])[0].astype(np.float64)
    u = joint.diagonal()
    total = float(a @ (joint / np.outer(u, u) - 1) @ a)
    return total, float(np.sum(a**2 * (1 / u - 1)))


@without_floating_errors
def floor_mean(
    problem: AttentionProblem, *, bits: int, tables: int, least: int = 2, floor: float = 1e-4
) -> Array:
    """Return ``E Dhat_i/D_i = sum_j A_ij u_ij/(u_ij + floor)`` of all rows, (n_q,).

    Parameters
    ----------
    problem, bits, tables, least
        As of `joint_probability`.
    floor : float

    Examples
    --------
    >>> import sketchattn as sa
    >>> problem = sa.make_heads("gaussian", n=8, d=4, rng=0)[0]
    >>> mean = floor_mean(problem, bits=4, tables=16)
    >>> bool(((0 < mean) & (mean < 1)).all())
    True
    """
    added = float(np.asarray(real(floor, "floor", 0, low_open=False)))
    q, k = hashed(problem, Choices())
    u = collision_probability(code_probability(q, k, bits), tables, least)
    a = problem.exact.to_dense().astype(np.float64)
    shrunk = np.divide(u, u + added, out=np.zeros_like(u), where=u + added > 0)
    return np.asarray((a * shrunk).sum(axis=1))


@without_floating_errors
def merged_mean(n: ArrayLike, b: ArrayLike) -> Float:
    """Return ``(n/b)(1 - (1 - 1/n)^b)``: the mean of a sum whose repeated draws are merged.

    b draws with replacement of n numbers, each distinct one of them weighed by n/b, over their sum:
    ``1 - 1/e = .632`` at ``b = n``.

    Parameters
    ----------
    n, b : int or array

    Examples
    --------
    >>> round(merged_mean(256, 256), 3), round(merged_mean(256, 1), 9)
    (0.633, 1.0)
    """
    sizes, draws = (np.asarray(whole(x, name), np.float64) for x, name in ((n, "n"), (b, "b")))
    return floats(-sizes / draws * np.expm1(draws * np.log1p(-1 / np.maximum(sizes, 1))))


@without_floating_errors
def composed_error(numerator: ArrayLike, denominator: ArrayLike) -> Float:
    """Return ``(e1 + e2)/(1 - e2)``: the relative error of a ratio with errors e1 and e2.

    ``|N' - N| <= e1 |N|`` and ``|D' - D| <= e2 D`` with ``e2 < 1`` imply ``|N'/D' - N/D| <=
    (e1 + e2)/(1 - e2) |N/D|``, in any norm of vectors N.

    Parameters
    ----------
    numerator, denominator : float or array
        e1, and e2 in [0, 1).

    Examples
    --------
    >>> round(composed_error(0.1, 0.1), 4)
    0.2222
    """
    first = np.asarray(real(numerator, "numerator", 0, low_open=False))
    second = np.asarray(real(denominator, "denominator", 0, 1, low_open=False))
    return floats((first + second) / (1 - second))


@without_floating_errors
def row_statistics(problem: AttentionProblem, top: int) -> dict[str, Any]:
    """Return of every row what budgets are made of, with ``e^{L_ij}`` in units of D_i.

    Parameters
    ----------
    problem : AttentionProblem
        Not causal.
    top : int
        Largest weights in F, at least 1.

    Returns
    -------
    dict
        ``size`` n_s, ``deviation`` sigma of the others, ``known`` D_f/D and ``reach`` R, (n_q,).

    Examples
    --------
    >>> import sketchattn as sa
    >>> problem = sa.make_heads("gaussian", n=8, d=4, rng=0)[0]
    >>> row_statistics(problem, 2)["size"].tolist() == [6] * 8
    True
    """
    count = int(whole(top, "top", 1))
    a = -np.sort(-problem.exact.to_dense().astype(np.float64)[:, problem.kept_keys], axis=1)
    rest = a[:, count:]
    return {
        "size": np.full(len(a), rest.shape[1]),
        "deviation": rest.std(axis=1) if rest.shape[1] else np.zeros(len(a)),
        "known": a[:, :count].sum(axis=1),
        "reach": a[:, min(count, a.shape[1]) - 1],
    }
