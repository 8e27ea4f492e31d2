"""Claims: the iteration of Nystromformer, where it is exact, and what is not so."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ...problem import AttentionProblem
from ...sampling.landmarks import segment_means
from ...zoo.nystromformer import (
    Nystromformer,
    filter_inverse,
    iterate_inverse,
    small_softmax,
)
from ..engine.arguments import Array, real
from ..engine.instances import instance
from ..engine.observers import (
    EPS,
    few,
    implemented,
    is_default,
    largest,
    on_heads,
    problem_of,
    spectral,
    weight_rounding,
)
from ..engine.records import Observations
from ..engine.registry import Context, claim
from .residuals import inverted_after, residual_after
from .shared import DERIVED, ON

PAPER = "Xiong et al., arXiv 2102.03902"
RAZAVI = "Razavi, Kerayechian, Gachpazan and Shateyi, Abstract and Applied Analysis (2014)"

# The factor by which a small eigenvalue of M M^T/c grows in one step: f'(1) of the residual.
GROWTH = 13 / 4
# Landmark matrices beyond this are not inverted to the digits that exactness is told by.
CONDITION = 1e8

EVERYWHERE = {
    "clusters": "holds",
    "blocks": "holds",
    "nystrom-gaussian": "holds",
    "heads": "holds",
}

# --- instances -----------------------------------------------------------------------------------


@instance("nystrom-gaussian", "128 queries and keys, d = 16, iid Gaussian: M of 32 segment means")
def _nystrom_gaussian() -> AttentionProblem:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((128, 16)) for _ in range(3))
    return AttentionProblem(q, k, v)


@instance("blind-queries", "3 queries that do not see the second coordinate of 3 keys, one thrice")
def _blind_queries() -> AttentionProblem:
    q = np.array([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    k = np.array([[0.0, 0.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [1.0, -1.0]])
    return AttentionProblem(q, k, np.arange(5.0)[:, None], scale=1.0)


# --- what observers share ------------------------------------------------------------------------


def _count(context: Context, rank: int | None, most: int) -> int:
    """Return the number of landmarks, by default an eighth of the tokens, at most ``most``."""
    n = min(context.instance.m, context.instance.n)
    r = max(1, min(most, n // 8)) if rank is None else rank
    context.require(r <= n, f"r = {r} landmarks of {n} tokens")
    return r


def _means(context: Context, r: int) -> tuple[Array, Array]:
    problem = problem_of(context.instance)
    return segment_means(problem.q, r), segment_means(problem.k, r)


def _core(context: Context, rank: int | None, most: int = 32) -> Array:
    """Return ``M`` of segment means."""
    r = _count(context, rank, most)
    problem = problem_of(context.instance)
    return context.instance.cached(
        ("nystrom core", r), lambda: small_softmax(*_means(context, r), problem.scale)
    )


def _start(m: Array) -> float:
    """Return ``c = |M|_1 |M|_inf``."""
    return float(np.abs(m).sum(axis=0).max() * np.abs(m).sum(axis=1).max())


def _inverses(context: Context, m: Array, iterations: int) -> list[Array]:
    """Return Z after some steps, by both implementations or the one that was handed in."""
    if is_default(context):
        return [iterate_inverse(m, iterations), filter_inverse(m, iterations)]
    rng = np.random.default_rng(context.entropy)
    return [implemented(context, "inverse", len(m), rng, m=m, iterations=iterations)]


def _grown(m: Array, steps: int) -> float:
    """Return the rounding of ``M Z_j``: a step multiplies an error by at most GROWTH."""
    return 4 * GROWTH**steps * len(m) * EPS


def _residual(m: Array, z: Array) -> Array:
    return np.asarray(np.eye(len(m)) - m @ z)


def _nystrom(
    context: Context,
    problem: AttentionProblem,
    landmarks: tuple[Array, Array],
    iterations: int | None,
    rng: np.random.Generator,
) -> Array:
    """Return Ahat; ``iterations=None`` is the exact pseudo-inverse."""
    both = np.stack(landmarks)
    r = both.shape[1]
    if is_default(context):
        method = Nystromformer(r, landmarks=both, iterations=iterations)
        return method.approximate(problem).to_dense()
    return implemented(
        context, "nystromformer", r, rng, problem=problem, landmarks=both, iterations=iterations
    )


def _invertible(
    context: Context, problem: AttentionProblem, landmarks: tuple[Array, Array]
) -> float:
    """Return the condition number of M, or end where M is no matrix to invert."""
    condition = float(np.linalg.cond(small_softmax(*landmarks, problem.scale)))
    context.require(condition < CONDITION, f"M has the condition number {condition:.3g}")
    return condition


class _Tokens(NamedTuple):
    """Hold a problem whose tokens repeat a few landmarks."""

    rng: np.random.Generator
    problem: AttentionProblem
    landmarks: tuple[Array, Array]
    condition: float


def _tokens(context: Context, rank: int | None, queries: bool, keys: bool) -> Iterator[_Tokens]:
    """Yield problems of which every query, every key or both coincide with a landmark.

    Landmarks of the side that does not coincide are segment means of its own tokens.
    """
    problem = problem_of(context.instance)
    r = _count(context, rank, 8)
    for rng in few(context, 10):
        sides = []
        landmarks = []
        for rows, coincide in ((problem.q, queries), (problem.k, keys)):
            if coincide:
                chosen = rows[rng.permutation(len(rows))[:r]]
                labels = np.concatenate([np.arange(r), rng.integers(0, r, len(rows) - r)])
                sides.append(chosen[rng.permutation(labels)])
                landmarks.append(chosen)
            else:
                sides.append(rows)
                landmarks.append(segment_means(rows, r))
        made = AttentionProblem(sides[0], sides[1], scale=problem.scale)
        both = (landmarks[0], landmarks[1])
        yield _Tokens(rng, made, both, _invertible(context, made, both))


def _spoiled(problem: AttentionProblem, condition: float) -> float:
    """Return the rounding of ``F M^-1 B``: M^-1 multiplies that of weights by its condition."""
    return (1 + condition) * weight_rounding(problem)


def _repeated(context: Context, rank: int | None, *, keys: bool) -> Observations:
    """Observe ``max |Ahat - A|``, which must be zero, where queries repeat landmarks."""
    values, used, spoiled = [], None, 0.0
    for x in _tokens(context, rank, True, keys):
        ahat = _nystrom(context, x.problem, x.landmarks, None, x.rng)
        values.append(largest(ahat - x.problem.exact.to_dense()))
        used, spoiled = len(x.landmarks[0]), max(spoiled, _spoiled(x.problem, x.condition))
    return Observations(values, 0.0, rank=used, rounding=spoiled)


# --- the iteration -------------------------------------------------------------------------------


@claim(
    "lowrank_baselines.residual_recursion",
    title="What one step of the iteration does to the residual",
    statement="""Z_0 = M^T/c, c = |M|_1 |M|_inf, Z_(j+1) = Z_j (13 I - X (15 I - X (7 I - X)))/4,
        X = M Z_j: E_j = I - M Z_j satisfies E_(j+1) = (3/4) E_j^3 + (1/4) E_j^4.""",
    source=f"{DERIVED}; the iteration is that of {RAZAVI}, used by {PAPER}",
    status="derived",
    kind="inequality",
    observes="the largest entry of the difference for j < 8, by both implementations; must be 0",
    assumptions=ON,
    recorded={**EVERYWHERE, "worked": "holds"},
)
def _residual_recursion(context: Context, *, rank: int | None = None) -> Observations:
    m = _core(context, rank)
    values = []
    before = [_residual(m, z) for z in _inverses(context, m, 0)]
    for j in range(1, 9):
        after = [_residual(m, z) for z in _inverses(context, m, j)]
        for e, found in zip(before, after, strict=True):
            cube = e @ e @ e
            values.append(largest(found - 0.75 * cube - 0.25 * cube @ e))
        before = after
    return Observations(values, 0.0, rank=len(m), rounding=_grown(m, 8))


@claim(
    "lowrank_baselines.residual_norm",
    title="The residual in closed form",
    statement="""With s_min the smallest singular value of M and f(e) = (3 e^3 + e^4)/4:
        |I - M Z_j|_2 = f^(j)(1 - s_min^2/c).""",
    source=DERIVED,
    status="derived",
    kind="inequality",
    observes="|difference of the two sides| for j = 0, 3, 6, 9, 12, which must be zero",
    assumptions=ON,
    recorded={**EVERYWHERE, "worked": "holds"},
)
def _residual_norm(context: Context, *, rank: int | None = None) -> Observations:
    m = _core(context, rank)
    least = float(np.linalg.svd(m, compute_uv=False)[-1])
    first = min(max(1 - least**2 / _start(m), 0.0), 1.0)
    values = []
    for j in (0, 3, 6, 9, 12):
        want = float(np.asarray(residual_after(first, j)))
        values += [abs(spectral(_residual(m, z)) - want) for z in _inverses(context, m, j)]
    note = f"|I - M Z_6|_2 = {float(np.asarray(residual_after(first, 6))):.4g}"
    return Observations(values, 0.0, rank=len(m), rounding=_grown(m, 12), notes=note)


@claim(
    "lowrank_baselines.iteration_filter",
    title="The iteration is a spectral filter",
    statement="""M = P diag(s) W^T: Z_j = W diag(h_j(s)) P^T, h_j(s) = (1 - f^(j)(1 - s^2/c))/s and
        h_j(0) = 0.""",
    source=DERIVED,
    status="derived",
    kind="inequality",
    observes="|Z_j - filter|_F/|filter|_F for j = 0, 1, 6, 12, which must be zero",
    assumptions=ON,
    recorded={**EVERYWHERE, "worked": "holds"},
)
def _iteration_filter(context: Context, *, rank: int | None = None) -> Observations:
    m = _core(context, rank)
    p, s, wt = np.linalg.svd(m)
    values = []
    for j in (0, 1, 6, 12):
        found = inverted_after(np.clip(s**2 / _start(m), 0, 1), j)
        gain = np.divide(found, s, out=np.zeros_like(s), where=s > 0)
        want = (wt.T * gain) @ p.T
        values += [
            float(np.linalg.norm(z - want) / np.linalg.norm(want)) for z in _inverses(context, m, j)
        ]
    # h_j has slopes up to (13/4)^j/c, however small singular values are.
    return Observations(values, 0.0, rank=len(m), rounding=_grown(m, 12))


@claim(
    "lowrank_baselines.iteration_order",
    title="Third-order convergence of the iteration",
    statement="""If |M M^+ - M Z_0|_2 < 1, then Z_j tends to M^+ with |M M^+ - M Z_(j+1)|_2 <=
        |M M^+ - M Z_j|_2^3.  With Z_0 = M^T/c the premise holds for every M that is not 0; it says
        nothing about six steps.""",
    source=f"{PAPER}, Lemma 1, after {RAZAVI}",
    status="published",
    kind="inequality",
    observes="|M M^+ - M Z_(j+1)|_2 against the cube of the one before, j < 8",
    assumptions=ON,
    recorded={**EVERYWHERE, "worked": "holds"},
)
def _iteration_order(context: Context, *, rank: int | None = None) -> Observations:
    m = _core(context, rank)
    p, s, _ = np.linalg.svd(m)
    kept = p[:, s > len(m) * np.finfo(np.float64).eps * s[0]]
    onto = kept @ kept.T  # M M^+
    values, bounds = [], []
    before = [spectral(onto - m @ z) for z in _inverses(context, m, 0)]
    for j in range(1, 9):
        after = [spectral(onto - m @ z) for z in _inverses(context, m, j)]
        values += after
        bounds += [x**3 for x in before]
        before = after
    note = f"after 6 steps {values[5 * len(before)]:.4g} is left"
    return Observations(values, bounds, rank=len(m), rounding=_grown(m, 8), notes=note)


@claim(
    "lowrank_baselines.iteration_norm",
    title="Few steps are a regularised inverse",
    statement="""|Z_j|_2 <= (13/4)^(j/2)/sqrt(c): six steps have a norm of at most 34.4/sqrt(c),
        however small the singular values of M are.""",
    source=DERIVED,
    status="derived",
    kind="inequality",
    observes="|Z_j|_2 sqrt(c) over (13/4)^(j/2) for j = 0, 2, ..., 12",
    assumptions=ON,
    recorded={**EVERYWHERE, "worked": "holds"},
    constants={"growth": GROWTH},
)
def _iteration_norm(context: Context, *, rank: int | None = None) -> Observations:
    m = _core(context, rank)
    root = math.sqrt(_start(m))
    values = [
        spectral(z) * root / GROWTH ** (j / 2)
        for j in range(0, 13, 2)
        for z in _inverses(context, m, j)
    ]
    # Over (13/4)^(j/2) what is left of the growth of an error is its root.
    return Observations(values, 1.0, rank=len(m), rounding=_grown(m, 6))


# --- where it is exact ---------------------------------------------------------------------------


@claim(
    "lowrank_baselines.all_landmarks",
    title="Tokens that are landmarks",
    statement="""If every query and every key coincides with a landmark and M is invertible, then
        F M^-1 B = A.""",
    source=f"{PAPER}, Lemma 2 [recalled], which leaves out that M is invertible",
    status="published",
    kind="inequality",
    observes="max |Ahat - A|, tokens that repeat r of the problem's own; must be zero",
    assumptions=ON,
    recorded={"nystrom-gaussian": "holds", "blocks": "holds", "heads": "holds"},
)
def _all_landmarks(context: Context, *, rank: int | None = None) -> Observations:
    return _repeated(context, rank, keys=True)


@claim(
    "lowrank_baselines.all_landmarks_singular",
    title="Tokens that are landmarks, M singular",
    statement="If every query and every key coincides with a landmark, then F M^+ B = A.",
    source=(
        f"{PAPER}, Lemma 2 [recalled] as stated; refuted: the rows of B are those of M with other "
        "normalisers, and leave the range of M where M is singular"
    ),
    status="refuted",
    kind="inequality",
    observes="max |Ahat - A|, landmarks are the distinct queries and keys; must be zero",
    assumptions=ON,
    recorded={"blind-queries": "violated"},
)
def _all_landmarks_singular(context: Context) -> Observations:
    problem = problem_of(context.instance)
    queries, keys = (np.unique(x, axis=0) for x in (problem.q, problem.k))
    context.require(len(queries) == len(keys), "needs as many distinct queries as distinct keys")
    context.require(len(queries) <= 64, f"{len(queries)} landmarks are too many for a check")
    rng = np.random.default_rng(context.entropy)
    ahat = _nystrom(context, problem, (queries, keys), None, rng)
    off = largest(ahat - context.instance.a)
    return Observations([off], 0.0, rank=len(queries), rounding=1e-6)


@claim(
    "lowrank_baselines.queries_suffice",
    title="Half of the premise suffices",
    statement="""If every query coincides with a landmark query and M is invertible, then
        F M^-1 B = A, whatever the keys and the landmark keys are.""",
    source=DERIVED,
    status="derived",
    kind="inequality",
    observes="max |Ahat - A|, queries that repeat r of the problem's own, its keys; must be zero",
    assumptions=ON,
    recorded=EVERYWHERE,
)
def _queries_suffice(context: Context, *, rank: int | None = None) -> Observations:
    return _repeated(context, rank, keys=False)


@claim(
    "lowrank_baselines.keys_suffice",
    title="The other half does not suffice",
    statement="""If every key coincides with a landmark key and M is invertible, then
        F M^-1 B = A.""",
    source=(
        "the CUR decomposition that the factors resemble; refuted: F, M and B are normalised over "
        "different sets of keys"
    ),
    status="refuted",
    kind="inequality",
    observes="|Ahat - A|_F/|A|_F, keys that repeat r of the problem's own, its queries",
    assumptions=ON,
    recorded={
        "nystrom-gaussian": "violated",
        "blocks": "violated",
        "heads": "violated",
    },
    effects={"blocks": 0.7},
)
def _keys_suffice(
    context: Context, *, rank: int | None = None, accuracy: float = 1e-3
) -> Observations:
    values, used = [], 0
    for x in _tokens(context, rank, False, True):
        a = x.problem.exact.to_dense()
        ahat = _nystrom(context, x.problem, x.landmarks, None, x.rng)
        values.append(float(np.linalg.norm(ahat - a) / np.linalg.norm(a)))
        used = len(x.landmarks[0])
    return Observations(values, float(real(accuracy, "accuracy", 0)), rank=used)


@claim(
    "lowrank_baselines.every_token",
    title="All tokens as landmarks",
    statement="""n_q = n_k landmarks, the tokens themselves: F = M = B = A, so that Ahat = A Z A,
        which is A for Z = A^+ and A - E_j A after j steps of the iteration.""",
    source=DERIVED,
    status="derived",
    kind="inequality",
    observes="max |Ahat - A Z A| for six steps and max |Ahat - A| for the pseudo-inverse",
    assumptions=ON,
    recorded={"nystrom-gaussian": "holds", "worked": "holds"},
)
def _every_token(context: Context) -> Observations:
    problem, a = problem_of(context.instance), context.instance.a
    context.require(problem.n_q == problem.n_k, "needs as many queries as keys")
    context.require(problem.n_q <= 256, f"{problem.n_q} landmarks are too many for a check")
    rng = np.random.default_rng(context.entropy)
    both = (problem.q, problem.k)
    iterated, exact = (_nystrom(context, problem, both, x, rng) for x in (6, None))
    want = a - _residual(a, iterate_inverse(a, 6)) @ a
    # Entries of A Z A, |Z| <= (13/4)^3/sqrt(c), and what a step makes of errors of M = A.
    off, allowed = [largest(iterated - want)], [GROWTH**6 * weight_rounding(problem)]
    condition = float(np.linalg.cond(a))
    note = f"condition number {condition:.3g}"
    if condition < CONDITION:
        off.append(largest(exact - a))
        allowed.append(_spoiled(problem, condition))
    else:
        note += ", too large for the digits of A^+"
    return Observations(off, allowed, rank=len(a), notes=note)


# --- row sums ------------------------------------------------------------------------------------


def _row_sums(
    context: Context, rank: int | None, iterations: int | None, most: int
) -> Observations:
    problem = problem_of(context.instance)
    r = _count(context, rank, most)
    landmarks = _means(context, r)
    condition = _invertible(context, problem, landmarks)
    rng = np.random.default_rng(context.entropy)
    ahat = _nystrom(context, problem, landmarks, iterations, rng)
    note = f"condition number {condition:.3g}, least entry {float(ahat.min()):.3g}"
    rounding = _spoiled(problem, condition) if iterations is None else 1e-6
    return Observations([largest(ahat.sum(axis=1) - 1)], 0.0, rank=r, rounding=rounding, notes=note)


@claim(
    "lowrank_baselines.row_sums",
    title="Rows sum to one with the exact inverse",
    statement="If M is invertible, then F M^-1 B 1 = F M^-1 1 = 1, since M 1 = 1 and B 1 = 1.",
    source=DERIVED,
    status="derived",
    kind="inequality",
    observes="max_i |sum_j Ahat_ij - 1|, landmarks are segment means; must be zero",
    assumptions=ON,
    recorded=EVERYWHERE,
)
def _row_sums_exact(context: Context, *, rank: int | None = None) -> Observations:
    return _row_sums(context, rank, None, 16)


@claim(
    "lowrank_baselines.row_sums_iterated",
    title="Rows do not sum to one after six steps",
    statement="After six steps the rows of F Z_6 B sum to one, up to 1e-6.",
    source=(
        "the row sums of the exact inverse, taken for those of the published iteration; refuted"
    ),
    status="refuted",
    kind="inequality",
    observes="max_i |sum_j Ahat_ij - 1|, landmarks are segment means",
    assumptions=ON,
    recorded={
        "nystrom-gaussian": "violated",
        **on_heads("violated", holds="1.9"),
    },
)
def _row_sums_iterated(context: Context, *, rank: int | None = None) -> Observations:
    return _row_sums(context, rank, 6, 64)


# --- what is not so ------------------------------------------------------------------------------


@claim(
    "lowrank_baselines.more_accurate",
    title="A more accurate inverse is not a better approximation",
    statement="""With the pseudo-inverse |Ahat - A|_F is at most what it is after six steps of the
        iteration, which only approximates the pseudo-inverse.""",
    source=(
        "the reason given for iterating until the inverse is accurate; refuted: M is "
        "ill-conditioned, and few steps regularise"
    ),
    status="refuted",
    kind="inequality",
    observes="|Ahat - A|_F/|A|_F with the pseudo-inverse, against that after six steps",
    assumptions=ON,
    recorded={
        "nystrom-gaussian": "violated",
        **on_heads("violated", holds="1.9 2.1 3.9"),
    },
)
def _more_accurate(context: Context, *, rank: int | None = None) -> Observations:
    problem, a = problem_of(context.instance), context.instance.a
    n = min(problem.n_q, problem.n_k)
    r = min(32, max(1, n // 4)) if rank is None else rank
    context.require(r <= n, f"r = {r} landmarks of {n} tokens")
    landmarks = _means(context, r)
    rng = np.random.default_rng(context.entropy)
    found = [
        float(np.linalg.norm(_nystrom(context, problem, landmarks, x, rng) - a))
        / float(np.linalg.norm(a))
        for x in (None, 6)
    ]
    condition = float(np.linalg.cond(small_softmax(*landmarks, problem.scale)))
    uniform = float(np.linalg.norm(a - 1 / problem.n_k)) / float(np.linalg.norm(a))
    note = f"condition number {condition:.3g}, uniform weights {uniform:.4g}"
    # Errors that agree in nine digits are the same.
    return Observations(found[:1], found[1], rank=r, rounding=1e-9, notes=note)
