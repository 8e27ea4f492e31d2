"""What Proposition 1 covers, and what can be said of a method that it does not cover."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from ...base.floating import without_floating_errors
from ...problem import AttentionProblem
from ...zoo.base import Method
from ...zoo.column_sampling import ColumnSampling
from ...zoo.skeinformer.method import Skeinformer
from ..engine.observers import spectral


@without_floating_errors
def proposition1_scope(method: Method) -> str:
    """Return why Proposition 1 does not cover a method, empty where it does.

    It is about columns drawn independently *with* replacement, weighted by ``1/(r p_j)``, with
    the exact normalisers of the rows; pilot rows that are put back only lower the error.

    Parameters
    ----------
    method : Method

    Examples
    --------
    >>> import sketchattn as sa
    >>> proposition1_scope(sa.ColumnSampling(rank=8))
    ''
    >>> proposition1_scope(sa.Skeinformer(rank=8, preset="exact_normalizer"))
    'columns are drawn without replacement; columns are not weighted by 1/(r p_j)'
    """
    if not isinstance(method, Method):
        raise TypeError(
            f"method must be a method object, got {type(method).__name__}; "
            f"make one, as sketchattn.Skeinformer(rank=64)"
        )
    if isinstance(method, ColumnSampling):
        replaced, weighted, normalizer, centred = method.replace, True, method.normalizer, False
    elif isinstance(method, Skeinformer):
        c = method.components
        replaced, weighted, normalizer = c.replace, c.weights == "importance", c.normalizer
        centred = method.center_values
    else:
        return f"{method.name} does not draw columns with weights by a law"
    reasons = []
    if not replaced:
        reasons.append("columns are drawn without replacement")
    if not weighted:
        reasons.append("columns are not weighted by 1/(r p_j)")
    if normalizer == "adaptive":
        reasons.append("the normaliser D is estimated (adaptive, with a fill)")
    if normalizer == "sampled":
        reasons.append("the normaliser D is estimated (the sum over the sample)")
    if centred and not reasons:
        reasons.append("values are centred: the proposition is about A (V - 1 vbar^T) there")
    return "; ".join(reasons)


class StructuralFacts(NamedTuple):
    """Hold what is true of any ``Ahat``, whatever its draw: two facts after the fact.

    Attributes
    ----------
    error : float
        ``|A V - Ahat V|_2``.
    bound : float
        ``|A - Ahat|_2 |V - 1 vbar^T|_2``, at least ``error`` where rows of Ahat sum to one; NaN
        where they do not.
    distance : float
        ``|A - Ahat|_2``.
    floor : float
        ``sigma_{k+1}(A)`` for rank(Ahat) <= k, at most ``distance``.
    rank : int
        k, the columns, one for the fill, and the distinct rows that are exact.
    """

    error: float
    bound: float
    distance: float
    floor: float
    rank: int

    def __str__(self) -> str:
        bound = "none" if math.isnan(self.bound) else f"{self.bound:.4g}"
        return (
            f"|A V - Ahat V|_2 = {self.error:.4g}, its bound |A - Ahat|_2 |V - 1 vbar^T|_2 = "
            f"{bound}; |A - Ahat|_2 = {self.distance:.4g} >= sigma_{self.rank + 1}(A) = "
            f"{self.floor:.4g}"
        )


@without_floating_errors
def structural_facts(
    problem: AttentionProblem, method: Method, rng: int | np.random.Generator = 0
) -> StructuralFacts:
    """Return what can be said of a method that no theorem covers, for one draw.

    Parameters
    ----------
    problem : AttentionProblem
        With values; A is formed.
    method : Method
    rng : int or numpy.random.Generator

    Notes
    -----
    Derived: ``(A - Ahat) 1 = 0`` gives ``(A - Ahat) V = (A - Ahat)(V - 1 c^T)`` for every c, and
    no matrix of rank k is nearer than ``sigma_{k+1}``.

    Examples
    --------
    >>> import sketchattn as sa
    >>> problem = sa.make_heads("gaussian", n=32, d=4, rng=0)[0]
    >>> facts = structural_facts(problem, sa.Skeinformer(rank=4, pilot_reuse=False))
    >>> facts.error <= facts.bound, facts.floor <= facts.distance, facts.rank
    (True, True, 5)
    """
    wide = problem.astype(np.float64)
    ahat = method.approximate(wide, rng)
    dense = ahat.to_dense()
    difference = wide.exact.to_dense() - dense
    kept = wide.kept_keys
    values = wide.values[kept]
    distance = spectral(difference)
    stochastic = bool(np.all(np.abs(difference.sum(axis=1)) <= 1e-9))
    sigma = np.linalg.svd(wide.exact.to_dense(), compute_uv=False)
    rank = ahat.rank_bound
    return StructuralFacts(
        spectral(difference @ wide.values),
        distance * spectral(values - values.mean(axis=0)) if stochastic else math.nan,
        distance,
        float(sigma[rank]) if rank < len(sigma) else 0.0,
        rank,
    )
