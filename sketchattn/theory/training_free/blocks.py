"""Formulas of sorted blocks beside a sample: variance, assumptions, and the tail of a product."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...base.floating import without_floating_errors
from ...problem import AttentionProblem
from ..engine.arguments import real, whole

Array = NDArray[Any]


class AlphaKappa(NamedTuple):
    """Hold what HyperAttention's theorem assumes to be ``n^o(1)``."""

    alpha: float
    kappa: float


@without_floating_errors
def alpha_kappa(
    problem: AttentionProblem, query_blocks: Array | None = None, key_blocks: Array | None = None
) -> AlphaKappa:
    """Return ``n_k max_j |A e_j|^2`` and the spread of the row sums of ``e^L`` off the blocks.

    Parameters
    ----------
    problem : AttentionProblem
        Small enough for a dense matrix.
    query_blocks, key_blocks : int arrays (n_q,), (n_k,), optional
        kappa is the quotient of the largest and the smallest sum over the keys of other blocks;
        None: over all keys.

    Examples
    --------
    >>> import numpy as np, sketchattn as sa
    >>> problem = sa.AttentionProblem(np.zeros((4, 2)), np.ones((4, 2)))
    >>> [float(x) for x in alpha_kappa(problem)]
    [1.0, 1.0]
    """
    a = problem.exact.to_dense().astype(np.float64)
    alpha = problem.n_k * float(np.sum(a * a, axis=0).max())
    lse = problem.logsumexp.astype(np.float64)
    if query_blocks is not None and key_blocks is not None:
        rest = np.where(query_blocks[:, None] == key_blocks, 0.0, a).sum(axis=1)
        with np.errstate(divide="ignore"):
            lse = lse + np.log(rest)
    spread = float(lse.max() - lse.min())
    return AlphaKappa(alpha, math.exp(spread) if spread < 709 else math.inf)


def published_samples(found: AlphaKappa, n: int, eps: float) -> float:
    """Return ``log10 m`` of ``m = kappa^7 alpha^2 ln n/eps^6``, the published order with factor 1.

    Examples
    --------
    >>> round(published_samples(AlphaKappa(1.0, 1.0), 1024, 0.5), 3)
    2.647
    """
    logs = 7 * math.log10(found.kappa) + 2 * math.log10(found.alpha)
    return logs + math.log10(math.log(max(n, 2))) - 6 * math.log10(eps)


@without_floating_errors
def normalizer_variance(a: Array, outside: Array, p: Array, samples: int) -> Array:
    """Return ``Var Dhat_i / D_i^2`` (n_q,) of blocks beside a sample.

    ``(sum_j (1 - M_ij) A_ij^2/p_j - (sum_j (1 - M_ij) A_ij)^2)/s``.

    Parameters
    ----------
    a : array (n_q, n_k)
        The exact matrix.
    outside : bool array (n_q, n_k)
        ``1 - M``.
    p : array (n_k,)
        Positive wherever an entry outside of a block is.
    samples : int
        s, at least 1.

    Examples
    --------
    >>> a = np.array([[0.5, 0.5]])
    >>> normalizer_variance(a, np.array([[True, True]]), np.array([0.5, 0.5]), 3).tolist()
    [0.0]
    """
    whole(samples, "samples")
    rest = np.where(outside, a, 0.0)
    squares = np.divide(rest * rest, p, out=np.zeros_like(rest), where=rest > 0)
    found: Array = np.maximum(squares.sum(axis=1) - rest.sum(axis=1) ** 2, 0.0) / samples
    return found


@without_floating_errors
def mixed_law(a: Array, v: Array) -> Array:
    """Return ``p_j = |A e_j|^2/(2 |A|_F^2) + |v_j|^2/(2 |V|_F^2)`` (n,).

    Examples
    --------
    >>> mixed_law(np.eye(2), np.array([[1.0], [0.0]])).tolist()
    [0.75, 0.25]
    """
    columns, rows = np.sum(a * a, axis=0), np.sum(v * v, axis=1)
    found: Array = 0.5 * columns / columns.sum() + 0.5 * rows / rows.sum()
    return found


@without_floating_errors
def product_error(a: Array, v: Array, p: Array, samples: int) -> float:
    """Return ``E |A S^T S V - A V|_F^2`` for s keys drawn from p with replacement.

    ``(sum_j |A e_j|^2 |v_j|^2/p_j - |A V|_F^2)/s``.

    Examples
    --------
    >>> product_error(np.eye(2), np.eye(2), np.array([0.5, 0.5]), 2)
    1.0
    """
    terms = np.sum(a * a, axis=0) * np.sum(v * v, axis=1)
    total = float(np.divide(terms, p, out=np.zeros_like(p), where=terms > 0).sum())
    return (total - float(np.sum((a @ v) ** 2))) / samples


@without_floating_errors
def mixed_bernstein(a: Array, v: Array, samples: int, delta: float) -> float:
    """Return t with ``P(|A S^T S V - A V|_2 >= t |A|_2 |V|_2) <= delta`` for the law `mixed_law`.

    With the stable ranks ``sA = |A|_F^2/|A|_2^2``, ``sV`` likewise, and ``c = ln((m + d_v)/delta)``
    the t of ``s t^2 = c (4 max(sA, sV) + (2/3) t (sqrt(sA sV) + 1))``.

    Parameters
    ----------
    a, v : arrays (m, n), (n, d_v)
    samples : int
        s, at least 1.
    delta : float
        In (0, 1).

    Examples
    --------
    >>> round(mixed_bernstein(np.ones((1, 4)), np.ones((4, 1)), 100, 0.05), 3)
    0.41
    """
    whole(samples, "samples")
    real(delta, "delta", 0, 1)
    stable = [float(np.sum(x * x) / np.linalg.norm(x, 2) ** 2) for x in (a, v)]
    c = math.log((len(a) + v.shape[1]) / delta)
    linear = (2 / 3) * c * (math.sqrt(stable[0] * stable[1]) + 1)
    return (linear + math.sqrt(linear**2 + 16 * samples * c * max(stable))) / (2 * samples)
