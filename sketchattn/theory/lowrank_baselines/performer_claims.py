"""Claims: Performer, the method made of random features: factors, row sums, added constants."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from ...base.draws import Draw
from ...problem import AttentionProblem
from ...zoo.performer import FEATURES, Performer, gaussian_directions
from ..engine.arguments import Array
from ..engine.assumptions import VALUES
from ..engine.observers import (
    EPS,
    default_rank,
    few,
    implemented,
    is_default,
    largest,
    problem_of,
)
from ..engine.records import Observations
from ..engine.registry import Context, claim
from .shared import DERIVED, PAIRS, scaled


class _Case(NamedTuple):
    """Hold one draw of the method."""

    rng: np.random.Generator
    problem: AttentionProblem
    omega: Array


def _cases(context: Context, rank: int | None, most: int = 12) -> Iterator[_Case]:
    problem = problem_of(context.instance)
    r = default_rank(context, rank, 16)
    context.require(r <= problem.n_k, f"r = {r} directions of {problem.n_k} keys")
    for rng in few(context, most):
        yield _Case(rng, problem, gaussian_directions(r, problem.d, rng))


def _performer(context: Context, case: _Case, features: str = "positive", **form: Any) -> Array:
    if is_default(context):
        method = Performer(len(case.omega), features, **form)
        return method.approximate(case.problem, draw=Draw(features=case.omega)).to_dense()
    given = {"problem": case.problem, "omega": case.omega, "features": features, **form}
    return implemented(context, "performer", len(case.omega), case.rng, **given)


def _log_features(case: _Case, features: str) -> tuple[Array, Array]:
    """Return the logarithms of the features of queries and keys, without -|x_i|^2/2."""
    x, y = scaled(case.problem)
    omega = case.omega
    if features == "hyperbolic":
        omega = np.concatenate([omega, -omega])
    return x @ omega.T, y @ omega.T - 0.5 * np.einsum("ij,ij->i", y, y)[:, None]


def _exponents(case: _Case) -> float:
    """Return a bound of the logarithms of features, in whose size they are rounded."""
    x, y, omega = (np.linalg.norm(z, axis=1).max() for z in (*scaled(case.problem), case.omega))
    return float(omega * (x + y) + 0.5 * y**2)


def _quotient(queries: Array, keys: Array) -> Array:
    """Return ``phi(x_i).phi(y_j)/sum_j``, summed in logarithms, from logarithms."""
    from scipy.special import logsumexp

    logs = logsumexp(queries[:, None, :] + keys[None], axis=2)
    return np.asarray(np.exp(logs - logsumexp(logs, axis=1, keepdims=True)))


@claim(
    "lowrank_baselines.favor_factors",
    title="Positive features are pack and unpack",
    statement="""N_jl = omega_l.y_j - |y_j|^2/2, a_l = logsumexp_j N_jl: the quotient
        phi(x_i).phi(y_j)/sum_j phi(x_i).phi(y_j) is (U P)_ij with U = rowsoftmax_l(omega_l.x_i +
        a_l) and P_lj = exp(N_jl - a_l): no constant has to be added to the normaliser.""",
    source=DERIVED,
    status="derived",
    kind="inequality",
    observes="max |U P - quotient| over some rows, positive and hyperbolic in turn; must be zero",
    assumptions=PAIRS,
    recorded={"faint": "holds", "clusters": "holds", "blocks": "holds", "heads": "holds"},
)
def _favor_factors(context: Context, *, rank: int | None = None) -> Observations:
    values, reach = [], 0.0
    for i, case in enumerate(_cases(context, rank)):
        features = FEATURES[i % 2]
        t, n = _log_features(case, features)
        reach = max(reach, _exponents(case))
        some = case.rng.permutation(len(t))[:8]
        ahat = _performer(context, case, features)[some]
        values.append(largest(ahat - _quotient(t[some], n)))
    # Logarithms of features are sums of d products, and of up to n_k features in a normaliser.
    problem = problem_of(context.instance)
    rounding = 8 * (problem.d + problem.n_k + 16) * EPS * (1 + reach)
    return Observations(values, 0.0, rounding=rounding)


@claim(
    "lowrank_baselines.favor_stochastic",
    title="Rows of the estimate are distributions, whatever the size of the logits",
    statement="""Positive and hyperbolic features, eps = 0: Ahat >= 0 and Ahat 1 = 1, also with Q
        and K multiplied by 30; outputs are in the hull of V: |Ohat_i - middle|_inf is at most half
        the range of V.""",
    source="derived: both factors are row-stochastic",
    status="derived",
    kind="inequality",
    observes="the largest of max_i |sum_j Ahat_ij - 1|, -min Ahat and the excess beyond the hull",
    assumptions=(*PAIRS, VALUES),
    recorded={"faint": "holds", "clusters": "holds", "blocks": "holds", "heads": "holds"},
)
def _favor_stochastic(context: Context, *, rank: int | None = None) -> Observations:
    values = []
    for i, case in enumerate(_cases(context, rank)):
        p = case.problem
        if i % 2:
            p = AttentionProblem(30 * p.q, 30 * p.k, p.values, scale=p.scale)
        ahat = _performer(context, case._replace(problem=p), FEATURES[i % 2])
        low, high = p.values.min(axis=0), p.values.max(axis=0)
        out = ahat @ p.values
        beyond = float(np.maximum(out - high, low - out).max()) / max(largest(p.values), 1e-300)
        values.append(max(largest(ahat.sum(axis=1) - 1), float(-ahat.min()), beyond, 0.0))
    return Observations(values, 0.0, rounding=1e-9)


@claim(
    "lowrank_baselines.eps_mixture",
    title="What a constant added to features mixes in",
    statement="""Features phi + eps, e_l the mean of key feature l before eps is added and u_il the
        weight of row i on feature l: Ahat_i is a mixture of the uniform row with weight
        sum_l u_il eps/(e_l + eps) and another distribution; its total variation from uniform is at
        most sum_l u_il e_l/(e_l + eps).""",
    source=DERIVED,
    status="derived",
    kind="inequality",
    observes="max_i of the total variation over its bound, eps = 1e-4 as released",
    assumptions=PAIRS,
    recorded={
        "faint": "holds",
        "clusters": "holds",
        "unit-gaussian": "holds",
        "heads": "holds",
    },
)
def _eps_mixture(context: Context, *, rank: int | None = None, eps: float = 1e-4) -> Observations:
    values, least = [], 1.0
    for case in _cases(context, rank, 3):
        t, n = _log_features(case, "positive")
        x, y = scaled(case.problem)
        # Released codes leave -|y_j|^2/2 out of the maximum over keys and features.
        top = float((n + 0.5 * np.sum(y**2, axis=1)[:, None]).max())
        keys = np.exp(n - top)
        half = 0.5 * np.einsum("ij,ij->i", x, x)[:, None]
        queries = np.exp(t - half - t.max(axis=1, keepdims=True)) + eps
        mean = keys.mean(axis=0)
        weights = queries * (mean + eps)
        weights /= weights.sum(axis=1, keepdims=True)
        bound = weights @ (mean / (mean + eps))
        ahat = _performer(context, case, eps=eps)
        off = np.abs(ahat - 1 / ahat.shape[1]).sum(axis=1) / 2
        values.append(float((off / np.maximum(bound, 1e-12)).max()))
        least = min(least, float(bound.min()))
    return Observations(values, 1.0, rounding=1e-8, notes=f"least bound of a row {least:.3g}")


@claim(
    "lowrank_baselines.eps_released",
    title="With the released constant more features do not help",
    statement="""With eps = 1e-4 added to positive features as released and as many directions as
        keys, the output error is at most nine tenths of that of the mean of V.""",
    source=(
        "use of released code (performer-pytorch 1.1.4), nine tenths added; refuted: at unit "
        "Gaussian queries and keys of width 64 the output is the mean of V"
    ),
    status="refuted",
    kind="inequality",
    observes="|Ohat - O|_F over |mean - O|_F, one set of n_k directions",
    assumptions=(*PAIRS, VALUES),
    recorded={"unit-gaussian": "violated"},
)
def _eps_released(context: Context, *, eps: float = 1e-4, share: float = 0.9) -> Observations:
    problem = problem_of(context.instance)
    context.require(problem.n_k <= 1024, f"{problem.n_k} directions are too many for a check")
    out = context.instance.product
    trivial = float(np.linalg.norm(problem.values.mean(axis=0) - out))
    context.require(trivial > 0, "the mean of the values is exact")
    values = []
    for case in _cases(context, problem.n_k, 1):
        ahat = _performer(context, case, eps=eps)
        values.append(float(np.linalg.norm(ahat @ problem.values - out)) / trivial)
    return Observations(values, share, rank=problem.n_k)
