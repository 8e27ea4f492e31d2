"""Formulas: distance from uniform, what a choice of rows leaves, how often a sample misses."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ...base.arguments import as_array
from ...base.floating import without_floating_errors
from ...errors.perturbation import value_diameter
from ...problem import AttentionProblem
from ...zoo.informer.statistics import row_statistic
from ..engine.arguments import Float, floats, real, whole

PAPER = "Zhou et al., arXiv 2012.07436"
DERIVED = "derived: see the chapter on Informer"


@without_floating_errors
def variation_bound(kl: ArrayLike) -> Float:
    """Return ``min(sqrt(KL/2), sqrt(1 - exp(-KL)))``, at least the total variation.

    Parameters
    ----------
    kl : float or array
        A Kullback-Leibler divergence of two distributions, in either order, at least 0.

    Notes
    -----
    Pinsker's inequality, and Bretagnolle and Huber's, which is better for KL above 1.6.

    Examples
    --------
    >>> round(variation_bound(0.02), 4), round(variation_bound(4.0), 4)
    (0.1, 0.9908)
    """
    x = real(kl, "kl", 0, low_open=False)
    return floats(np.sqrt(np.minimum(x / 2, -np.expm1(-x))))


@without_floating_errors
def selection_bound(problem: AttentionProblem, rows: ArrayLike, *, measure: str = "kl") -> float:
    """Bound ``|A V - Ahat V|_F^2`` for the exact rows I, from the measure of the others alone.

    ``diam(V)^2 sum_{i not in I} min(M_i/2, 1 - exp(-M_i))``, M_i the divergence ``KL_i`` or the
    max-mean of all logits, ``Mbar_i >= KL_i``.

    Parameters
    ----------
    problem : AttentionProblem
        With values.
    rows : int array (r,)
        I.
    measure : {"kl", "max_mean"}

    Notes
    -----
    Derived.  The r rows of largest KL minimise it: the only justification of choosing rows
    without a look at V.  Over all keys; it is not true of sampled measures.

    Examples
    --------
    >>> import sketchattn as sa
    >>> problem = sa.make_heads("gaussian", n=32, d=4, rng=0)[0].astype(np.float64)
    >>> top = sa.Informer(rank=8, statistic="kl", key_sampling="full")
    >>> bound = selection_bound(problem, top.select(problem))
    >>> bool(np.sum((problem.output - top.attend(problem)) ** 2) <= bound)
    True
    """
    if measure not in ("kl", "max_mean"):
        raise ValueError(f"measure must be 'kl' or 'max_mean', got {measure!r}; choose one")
    chosen = whole(as_array(rows, "rows"), "rows", 0, problem.n_q - 1)
    wide = problem.astype(np.float64)
    left = np.ones(problem.n_q, bool)
    left[chosen] = False
    left &= wide.visible_counts() > 0
    found = np.maximum(row_statistic(wide, measure)[left], 0.0)
    total = float(np.sum(np.asarray(variation_bound(found)) ** 2))
    return value_diameter(wide.values[wide.kept_keys]) ** 2 * total


@without_floating_errors
def miss_probability(n_k: ArrayLike, samples: ArrayLike) -> Float:
    """Return ``(1 - 1/n_k)^U``: how likely U keys drawn with replacement miss a given one.

    Parameters
    ----------
    n_k : int or array
    samples : int or array
        U.

    Examples
    --------
    >>> round(miss_probability(1024, 35), 4)
    0.9664
    """
    keys, drawn = (whole(x, name) for x, name in ((n_k, "n_k"), (samples, "samples")))
    return floats((1 - 1 / keys.astype(np.float64)) ** drawn)


class RankAgreement(NamedTuple):
    """Hold how two measures order the rows of a problem.

    Attributes
    ----------
    spearman : float
        Rank correlation; NaN where one measure is the same for all rows.
    recall : float
        Share of the top rows by M that are among the top rows by Mbar.
    rows : int
        How many rows the recall is about.
    """

    spearman: float
    recall: float
    rows: int


@without_floating_errors
def rank_agreement(problem: AttentionProblem, rows: int) -> RankAgreement:
    """Compare the order of rows by the max-mean ``Mbar_i`` with that by ``M_i``, over all keys.

    Parameters
    ----------
    problem : AttentionProblem
    rows : int
        Of the recall.

    Notes
    -----
    What is left of Proposition 1 of Zhou et al. (2021), which names no constants.

    Examples
    --------
    >>> logits = np.log([[1.0, 2, 4], [1, 1, 1], [3, 1, 1]])
    >>> problem = AttentionProblem(logits, np.eye(3), scale=1)
    >>> rank_agreement(problem, 1)
    RankAgreement(spearman=0.5, recall=0.0, rows=1)
    """
    from scipy.stats import rankdata

    count = int(whole(rows, "rows", 1, max(problem.n_q, 1)))
    exact, surrogate = (row_statistic(problem, name) for name in ("m", "max_mean"))
    ranks = [rankdata(x) for x in (exact, surrogate)]
    moves = [x - x.mean() for x in ranks]
    size = math.sqrt(float(moves[0] @ moves[0]) * float(moves[1] @ moves[1]))
    top = [set(np.argsort(-x, kind="stable")[:count].tolist()) for x in (exact, surrogate)]
    return RankAgreement(
        float(moves[0] @ moves[1]) / size if size > 0 else math.nan,
        len(top[0] & top[1]) / count,
        count,
    )
