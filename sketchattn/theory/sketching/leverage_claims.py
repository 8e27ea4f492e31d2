"""Claims: leverage scores, and columns drawn by them."""

from __future__ import annotations

import math

import numpy as np

from ..engine.arguments import Array, log_quotient
from ..engine.assumptions import DENSE, PRODUCT
from ..engine.audited import (
    distortion,
    fro_errors,
    relative_trivial,
    sampled,
    sketched,
    subspace_dimension,
)
from ..engine.observers import TAIL_RANKS, default_rank, on_heads, spectral, square
from ..engine.records import Curve, Observations, root
from ..engine.registry import Context, claim
from .shared import AMM_RECORD, range_basis, residual_norms


def _fast_scores(context: Context, rank: int | None) -> tuple[int, list[tuple[float, Array]]]:
    """Return r, and gam with ``l~/l`` for one sketch of V a trial.

    gam is the distortion of range(V) by Pi, and ``l~_i = |(V R^-1)_i|^2`` with R of ``Pi V``.
    In an orthonormal basis U of range(V) these are ``|(U R^-1)_i|^2`` with R of ``Pi U``.
    """
    instance = context.instance
    basis = instance.value_basis
    q = basis.shape[1]
    r = min(8 * q, instance.n) if rank is None else rank
    context.require(r >= q, f"r = {r} rows for a subspace of dimension q = {q}")
    scores = np.einsum("ij,ij->i", basis, basis)
    kept = scores > 1e-14
    found = []
    for image in sketched(context, "gaussian", r, basis, "basis"):
        upper = np.linalg.qr(image)[1]
        fast = np.linalg.solve(upper.T, basis[kept].T)
        found.append((distortion(image), np.einsum("ij,ij->j", fast, fast) / scores[kept]))
    return r, found


LEVERAGE_RANKS = tuple({"rank": r} for r in (64, 128, 256, 448))


@claim(
    "sketching.leverage_fast",
    title="Leverage scores from a sketch",
    statement="""If Pi is a gam-embedding of range(X), Z = Pi X = Q R, then
        l_i/(1+gam) <= |(X R^-1)_i|^2 <= l_i/(1-gam) for all rows i.""",
    source=(
        "derived; the algorithm is of Drineas, Magdon-Ismail, Mahoney and Woodruff, JMLR 13 (2012)"
    ),
    status="derived",
    kind="inequality",
    observes="max_i of l~_i (1-gam)/l_i and l_i/(l~_i (1+gam)), X = V, Pi gaussian",
    assumptions=PRODUCT,
    recorded={"reference": "holds", "subspace-512": "holds", "heads": "holds"},
    ladder=LEVERAGE_RANKS,
)
def _leverage_fast(context: Context, *, rank: int | None = None) -> Observations:
    r, found = _fast_scores(context, rank)
    values = [
        max(float(ratio.max()) * max(1 - gam, 0.0), 1 / (float(ratio.min()) * (1 + gam)))
        for gam, ratio in found
    ]
    return Observations(values, 1.0, rank=r)


@claim(
    "sketching.leverage_beta",
    title="Realised quality of fast leverage scores as probabilities",
    statement="""With scores l~_i from a gam-embedding and p_i = l~_i / sum l~: p_i >= beta l_i/q
        with beta = (1-gam)/(1+gam).""",
    source="derived: the two sides of the fast scores",
    status="derived",
    kind="inequality",
    observes="(1-gam)/(1+gam) over the realised beta = min_i p_i q/l_i, X = V, Pi gaussian",
    assumptions=PRODUCT,
    recorded={"reference": "holds", "subspace-512": "holds", "heads": "holds"},
    ladder=LEVERAGE_RANKS,
)
def _leverage_beta(context: Context, *, rank: int | None = None) -> Observations:
    from ...sampling.leverage import leverage_quality

    r, found = _fast_scores(context, rank)
    basis = context.instance.value_basis
    scores = np.einsum("ij,ij->i", basis, basis)
    scores = scores[scores > 1e-14]
    values = []
    for gam, ratio in found:
        fast = ratio * scores
        beta = leverage_quality(fast / fast.sum(), scores * (basis.shape[1] / scores.sum()))
        values.append(max(1 - gam, 0.0) / (1 + gam) / beta)
    return Observations(values, 1.0, rank=r)


@claim(
    "sketching.leverage_sampling",
    title="Mean square error of leverage sampling",
    statement="""Columns drawn with replacement by p_j = l_j(V)/q, weighted by 1/(r p_j):
        E |A S^T S V - A V|_F^2 <= (q |A|_F^2 |V|_2^2 - |A V|_F^2)/r.""",
    source="derived: |V_j|^2 <= l_j |V|_2^2 in the exact moment",
    status="derived",
    kind="expectation",
    observes="|A S^T S V - A V|_F^2 / (|A|_F^2 |V|_F^2), mean over draws",
    assumptions=PRODUCT,
    recorded=AMM_RECORD,
    ladder=TAIL_RANKS,
    curve=Curve("column_sampling", {"law": "leverage"}, convert=root),
)
def _leverage_sampling(context: Context, *, rank: int | None = None) -> Observations:
    instance = context.instance
    r = default_rank(context, rank, most=256)
    size = square(instance.a) * spectral(instance.v) ** 2
    bound = (subspace_dimension(instance) * size - square(instance.product)) / (r * instance.fro**2)
    values = [x**2 for x in fro_errors(context, "sample_wr", r, law="leverage")]
    return Observations(
        values, bound, rank=r, predictor=instance.predictor, trivial=relative_trivial(instance) ** 2
    )


@claim(
    "sketching.ridge_columns",
    title="Columns drawn by ridge leverage scores",
    statement="""K positive semidefinite (n, n), l_i = (K (K + lam I)^-1)_ii, d_eff = sum l_i;
        columns J drawn with replacement by p_i = l_i/d_eff, Kt = K_:J (K_JJ)^+ K_J::
        0 <= K - Kt always, and K - Kt <= 2 lam I with probability at least 1 - delta once
        r >= 8 d_eff ln(n/delta).  Here K = A^T A, where K - Kt = A^T (I - C C^+) A for the
        drawn columns C of A.""",
    source="derived: matrix Chernoff; compare Musco and Musco, NeurIPS 2017",
    status="derived",
    kind="tail",
    observes="|A - C C^+ A|_2^2 / lam, lam such that d_eff = size",
    assumptions=(DENSE,),
    recorded={"clusters": "holds", **on_heads("holds", vacuous="1.3 1.9")},
    ladder=tuple({"size": d} for d in (1.5, 2.0, 3.0, 4.0)),
)
def _ridge_columns(context: Context, *, size: float = 4.0, delta: float = 0.05) -> Observations:
    instance = context.instance
    _, sigma, vt = instance.svd
    squares = sigma[sigma > 1e-12 * sigma[0]] ** 2
    context.require(0 < size < len(squares), f"d_eff = {size:g} of a matrix of rank {len(squares)}")
    lam = _ridge_of_size(squares, size)
    law = (vt[: len(squares)] ** 2).T @ (squares / (squares + lam))
    law /= law.sum()
    r = math.ceil(8 * size * float(log_quotient(instance.n, delta)))
    context.below(r, instance.n, 2.0, delta)
    # Columns of A in the coordinates of its left singular vectors.
    columns = np.ascontiguousarray(vt.T * sigma)
    values = []
    for image in sampled(context, "sample_wr", r, columns, law):
        distinct = np.unique(image, axis=0).T
        values.append(residual_norms(sigma, range_basis(distinct))[1] ** 2 / lam)
    return Observations(
        values, 2.0, delta=delta, rank=r, predictor="zero", trivial=float(squares[0]) / lam
    )


def _ridge_of_size(squares: Array, size: float) -> float:
    """Return lam with ``sum_i s_i/(s_i + lam) = size``, ``0 < size < len(squares)``."""
    from scipy.optimize import brentq

    top = math.log(float(squares[0]))

    def excess(log: float) -> float:
        return float(np.sum(squares / (squares + math.exp(log)))) - size

    low, high = top - 60, top + math.log(len(squares)) + 10
    while excess(low) < 0:  # size is next to the rank of a spectrum that falls far
        low -= 60
    while excess(high) > 0:
        high += 60
    return math.exp(float(brentq(excess, low, high)))
