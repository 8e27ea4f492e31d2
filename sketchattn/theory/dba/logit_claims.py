"""Claims: which packs and widths keep the logits, and what a softmax then does."""

from __future__ import annotations

import math

import numpy as np

from ...problem import AttentionProblem
from ...sampling.landmarks import pivoted_rows, segment_means
from ...sketches.compression import compress
from ..engine.arguments import Array, whole
from ..engine.assumptions import DENSE, KEYS
from ..engine.instances import Instance, instance
from ..engine.observers import (
    EPS,
    few,
    implemented,
    is_default,
    largest,
    problem_of,
    quotient,
    softmax_of,
    weight_rounding,
)
from ..engine.records import Observations, Series
from ..engine.registry import Assumption, Context, claim
from ..sketching.lowrank import eckart_young_floor
from .formulas import (
    Oblique,
    exact_projector,
    exponential_determinant,
    jl_logit_width,
    logit_decoder,
    minors,
    numerical_rank,
    oblique_maps,
)
from .shared import DERIVED, ON, PAPER, factors_of, product_sigma, width_of

# --- instances -----------------------------------------------------------------------------------


def _line(m: int) -> AttentionProblem:
    q, k = np.linspace(-2.0, 2.0, m)[:, None], np.linspace(-1.5, 2.5, m)[:, None]
    return AttentionProblem(q, k, np.eye(m), scale=1.0)


@instance("line-4", "q = linspace(-2, 2, 4), k = linspace(-1.5, 2.5, 4), d = 1: logits of rank 1")
def _line_4() -> AttentionProblem:
    return _line(4)


@instance("line-6", "the same with six queries and keys")
def _line_6() -> AttentionProblem:
    return _line(6)


@instance("circle", "32 points on the unit circle, scale 1000: logits of rank 2, A nearly I")
def _circle() -> AttentionProblem:
    angles = 2 * np.pi * np.arange(32) / 32
    x = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return AttentionProblem(x, x, x, scale=1000.0)


@instance("oblique", "queries in span(e_1, e_2, e_3), keys without e_3, d = 6: rank(Q K^T) = 2")
def _oblique() -> AttentionProblem:
    rng = np.random.default_rng(23)
    q, k = rng.standard_normal((50, 6)), rng.standard_normal((50, 6))
    q[:, 3:] = 0.0
    k[:, 2] = 0.0
    return AttentionProblem(q, k, rng.standard_normal((50, 4)))


@instance("three-keys", "K = (1.001, 0), (-.8, .6), (.8, .6): pivots whose decoder exceeds 1")
def _three_keys() -> AttentionProblem:
    k = np.array([[1.001, 0.0], [-0.8, 0.6], [0.8, 0.6]])
    return AttentionProblem(np.eye(2), k, np.eye(3))


@instance("wide-rows", "4 queries, 8 keys, d = 512: so wide that projections keep their promise")
def _wide_rows() -> AttentionProblem:
    rng = np.random.default_rng(24)
    q, k = rng.standard_normal((4, 512)), rng.standard_normal((8, 512))
    return AttentionProblem(q, k, rng.standard_normal((8, 3)))


# --- what observers share ------------------------------------------------------------------------


def _first(context: Context) -> np.random.Generator:
    return np.random.default_rng(context.entropy)


def _packs(context: Context, r: int, rng: np.random.Generator) -> list[tuple[str, Array]]:
    """Return P K of several packs with r rows each, or of the pack that was handed in."""
    k = factors_of(context.instance).k
    if not is_default(context):
        p = implemented(context, "pack", r, rng, keys=k)
        return [("handed in", p @ k)]
    return [
        ("pivots", k[pivoted_rows(k, r, rng)]),
        ("Gaussian", rng.standard_normal((r, len(k))) @ k),
        ("means", segment_means(k, r)),
    ]


def _condition(x: Array) -> float:
    """Return the condition number of a matrix without the singular values that count as none."""
    sigma = np.linalg.svd(x, compute_uv=False)
    return float(sigma[0] / sigma[numerical_rank(x) - 1])


def _decoder(context: Context, packed: Array, rng: np.random.Generator) -> Array:
    k = factors_of(context.instance).k
    if is_default(context):
        return logit_decoder(k, packed)
    return implemented(context, "decoder", len(packed), rng, keys=k, packed=packed)


# --- T1: what packs keep of the logits -----------------------------------------------------------


@claim(
    "dba.lossless_logits",
    title="Any pack of full rank keeps the logits",
    statement="""For every P (r, n_k) with rank(P K) = rank(K): L = (scale Q (P K)^T) [K (P K)^+]^T.
        With rows I of Q and J of K that span all others, L = W_q (scale Q[I] K[J]^T) W_k^T,
        W_q = Q Q[I]^+ and W_k = K K[J]^+.""",
    source=f"derived: what is true of the lossless compression of {PAPER}",
    status="derived",
    kind="inequality",
    observes="|L - Lhat|_F/|L|_F for pivots, both sides too, Gaussian P and means: must be zero",
    assumptions=ON,
    recorded={"circle": "holds", "oblique": "holds", "clusters": "holds", "heads": "holds"},
)
def _lossless_logits(context: Context, *, rank: int | None = None) -> Observations:
    f = factors_of(context.instance)
    full = numerical_rank(f.k)
    r = full if rank is None else int(whole(rank, "rank"))
    context.require(full <= r <= len(f.k), f"r = {r} rows for keys of rank {full}")
    values, worst, used = [], 1.0, set()
    for rng in few(context):
        for name, packed in _packs(context, r, rng):
            sigma = np.linalg.svd(packed, compute_uv=False)
            if is_default(context) and numerical_rank(packed) < full:
                continue  # means of segments may lose a direction
            used.add(name)
            worst = max(worst, float(sigma[0] / sigma[full - 1]))
            off = f.q @ (f.k - _decoder(context, packed, rng) @ packed).T
            values.append(abs(f.scale) * float(np.linalg.norm(off)) / f.fro)
        if is_default(context):
            rows, columns = (pivoted_rows(x, numerical_rank(x), rng) for x in (f.q, f.k))
            w_q, w_k = logit_decoder(f.q, f.q[rows]), logit_decoder(f.k, f.k[columns])
            middle = f.scale * f.q[rows] @ f.k[columns].T
            off = w_q @ middle @ w_k.T - f.scale * f.q @ f.k.T
            values.append(float(np.linalg.norm(off)) / f.fro)
            worst = max(worst, sum(float(np.linalg.cond(x)) for x in (f.q[rows], f.k[columns])))
    # Rounding of a least-squares solution grows with the condition number of P K.
    rounding = f.rounding * worst
    return Observations(
        values, 0.0, rank=r, rounding=rounding, notes=f"packs: {', '.join(sorted(used))}"
    )


@claim(
    "dba.logit_rank",
    title="Fewer rows than the rank of the logits lose some of them",
    statement="""For every Lhat of rank r, so for every pack of r rows and every decoder,
        |L - Lhat|_2 >= sigma_{r+1}(L): r = rank(L), at most d, is needed.""",
    source="derived: Eckart, Young and Mirsky",
    status="derived",
    kind="inequality",
    observes="sigma_{r+1}(L)/|L - Lhat|_2 for pivots, Gaussian P and means, r = rank(L) - 1",
    assumptions=ON,
    recorded={"circle": "holds", "oblique": "holds", "heads": "holds"},
)
def _logit_rank(context: Context, *, rank: int | None = None) -> Observations:
    f = factors_of(context.instance)
    r = f.rank - 1 if rank is None else int(whole(rank, "rank"))
    context.require(1 <= r < f.rank, f"r = {r} of rank {f.rank}")
    floor, values = float(f.sigma[r]), []
    for rng in few(context, 3):
        for _, packed in _packs(context, r, rng):
            decoder = _decoder(context, packed, rng)
            found = abs(f.scale) * float(product_sigma(f.q, f.k - decoder @ packed)[0])
            large = np.linalg.norm(decoder) * np.linalg.norm(packed) / np.linalg.norm(f.k)
            values.append(quotient(floor, found, f.rounding * f.fro * float(1 + large)))
    return Observations(values, 1.0, rank=r)


@claim(
    "dba.pivoted_decoder",
    title="Pivots do not bound the decoder by one",
    statement="""The first rank(K) pivots J of a column-pivoted QR of K^T give a decoder
        W_k = K K[J]^+ with no entry above 1.""",
    source=(
        "the property of a submatrix of largest volume taken for that of pivots; refuted: "
        "(1.001, 0), (-.8, .6), (.8, .6) gives 1.6, and rank r up to 2^(r-1)"
    ),
    status="refuted",
    kind="inequality",
    observes="max |W_k|",
    assumptions=ON,
    recorded={"three-keys": "violated", "heads": "violated"},
)
def _pivoted_decoder(context: Context) -> Observations:
    k = factors_of(context.instance).k
    r = numerical_rank(k)
    chosen = k[pivoted_rows(k, r, _first(context))]
    return Observations([largest(logit_decoder(k, chosen))], 1.0, rank=r, rounding=1e-9)


# --- T2: the softmax does not commute ------------------------------------------------------------


def _weights(context: Context, logits: Array) -> Array:
    """Return the softmax of the rows, by the implementation that was handed in if any."""
    if not is_default(context):
        return softmax_of(context, logits, _first(context))
    one = np.eye(logits.shape[1])
    # The library's own: logits as queries, unit vectors as keys.
    return AttentionProblem(logits, one, scale=1.0).exact.to_dense()


def _evenly_spaced(seen: Instance) -> str | None:
    problem = problem_of(seen)
    q, k = problem.q[:, 0], problem.k[:, 0]
    if problem.d != 1 or len(q) != len(k) or not 2 <= len(q) <= 8:
        return "has not d = 1 and 2 to 8 queries, as many as keys"
    steps = np.diff(k)
    if (np.diff(q) <= 0).any() or (steps <= 0).any() or problem.scale <= 0:
        return "has queries or keys that do not increase"
    return None if np.ptp(steps) <= 1e-9 * steps.max() else "has keys that are not evenly spaced"


LINE = Assumption("d = 1, queries increase, keys are evenly spaced and increase", _evenly_spaced)


@claim(
    "dba.vandermonde",
    title="Logits of rank 1, attention of full rank",
    statement="""d = 1, increasing queries and k_j = k_1 + (j - 1) h, h > 0, scale 1:
        det exp(L) = exp(k_1 sum_i q_i) prod_{i<l} (e^{q_l h} - e^{q_i h}) > 0.  Hence rank(A) = n,
        while rank(L) = 1.""",
    source=DERIVED,
    status="derived",
    kind="inequality",
    observes="|det(A) prod_i (row sums of exp(L))/formula - 1|, must be zero; 1 if singular",
    assumptions=(DENSE, KEYS, LINE),
    recorded={"line-4": "holds", "line-6": "holds"},
)
def _vandermonde(context: Context) -> Observations:
    f = factors_of(context.instance)
    logits = f.scale * f.q @ f.k.T
    a = _weights(context, logits)
    top = logits.max(axis=1)
    sums = float(np.sum(top + np.log(np.exp(logits - top[:, None]).sum(axis=1))))
    formula = exponential_determinant(f.scale * f.q, f.k)
    found = float(np.linalg.det(a)) * math.exp(sums)
    # A determinant is known up to its condition: the rounding of entries over the smallest value.
    sigma = np.linalg.svd(a, compute_uv=False)
    entries = weight_rounding(context.instance) + 16 * EPS
    rounding = len(a) * entries * float(sigma[0] / max(sigma[-1], 1e-300))
    note = f"det = {found:.10g}, formula {formula:.10g}"
    return Observations([abs(found / formula - 1)], 0.0, rounding=rounding, notes=note)


@claim(
    "dba.total_positivity",
    title="In one dimension every minor is positive",
    statement="""d = 1, increasing queries and keys, scale > 0: all minors of exp(L), hence of A,
        are positive.""",
    source=(
        "Karlin, Total Positivity (1968): exp(x y) is strictly totally positive; all minors are "
        "computed here"
    ),
    status="published",
    kind="inequality",
    observes="the largest of -minor/largest minor of its order, which must not be positive",
    assumptions=(DENSE, KEYS, LINE),
    recorded={"line-4": "holds", "line-6": "holds"},
)
def _total_positivity(context: Context) -> Observations:
    f = factors_of(context.instance)
    a = _weights(context, f.scale * f.q @ f.k.T)
    values, allowed, before = [], [], 1.0
    for k, x in enumerate(minors(a), 1):
        top = largest(x)
        values.append(max(-float(x.min()) / top, 0.0) if top > 0 else 0.0)
        # k^2 entries, each rounded and times a minor of one row and column less.
        entries = weight_rounding(context.instance) + k * EPS
        allowed.append(k**2 * entries * before / max(top, 1e-300))
        before = top
    return Observations(values, allowed)


def _test_circle(seen: Instance) -> str | None:
    problem = problem_of(seen)
    q, k = problem.q, problem.k
    if problem.d != 2 or q.shape != k.shape or len(q) < 3 or not np.array_equal(q, k):
        return "has not the same three or more queries and keys of width 2"
    z = q[:, 0] + 1j * q[:, 1]
    turn = np.exp(2j * np.pi / len(z))
    even = np.allclose(z[1:], turn * z[:-1], rtol=0, atol=1e-12) and np.isclose(abs(z[0]), 1)
    return None if even and problem.scale > 0 else "has points that are not evenly on the circle"


CIRCLE = Assumption("queries are keys, evenly spaced on the unit circle", _test_circle)


@claim(
    "dba.circle",
    title="Logits of rank 2, attention the identity",
    statement="""n points evenly on the unit circle, L = t X X^T: A_ii = 1/(1 + S),
        S = sum_{j=1}^{n-1} exp(-t (1 - cos(2 pi j/n))), so that |A - I|_F <= sqrt(2 n) S, and every
        matrix of rank r has an error of at least sqrt(n - r) - sqrt(2 n) S.""",
    source=DERIVED,
    status="derived",
    kind="inequality",
    observes="|A - I|_F/(sqrt(2 n) S), and (sqrt(n - r) - sqrt(2 n) S) over the floor of A, r = 2",
    assumptions=(DENSE, KEYS, CIRCLE),
    recorded={"circle": "holds"},
)
def _on_circle(context: Context, *, rank: int = 2) -> Observations:
    f = factors_of(context.instance)
    n, r = len(f.q), int(whole(rank, "rank"))
    a = _weights(context, f.scale * f.q @ f.k.T)
    rest = float(np.exp(-f.scale * (1 - np.cos(2 * np.pi * np.arange(1, n) / n))).sum())
    away = math.sqrt(2 * n) * rest
    context.require(r < n and away < math.sqrt(n - r), "A is too far from the identity")
    floor = float(np.asarray(eckart_young_floor(np.linalg.svd(a, compute_uv=False), r)))
    off = float(np.linalg.norm(a - np.eye(n)))
    room = math.sqrt(n) * weight_rounding(context.instance)
    values = [off / (away + room), (math.sqrt(n - r) - away) / floor]
    relative, most = floor / float(np.linalg.norm(a)), largest(a - np.eye(n))
    note = f"max |A - I| = {most:.4g}, floor of rank {r} over |A|_F {relative:.7g}"
    return Observations(values, 1.0, rank=r, rounding=1e-9, notes=note)


@claim(
    "dba.softmax_commutes",
    title="The softmax of the core is not the core of the softmax",
    statement="""rowsoftmax(W_q M W_k^T) = W_q rowsoftmax(M) W_k^T for L = W_q M W_k^T, with the
        pivots of dba.lossless_logits.""",
    source=f"what lossless logits would have to mean for attention, after {PAPER}; refuted",
    status="refuted",
    kind="inequality",
    observes="|A - W_q rowsoftmax(M) W_k^T|_F/|A|_F, which must be zero",
    assumptions=ON,
    recorded={"line-4": "violated", "circle": "violated", "heads": "violated"},
)
def _softmax_commutes(context: Context) -> Observations:
    f, a = factors_of(context.instance), context.instance.a
    rng = _first(context)
    rows, columns = (pivoted_rows(x, numerical_rank(x), rng) for x in (f.q, f.k))
    core = _weights(context, f.scale * f.q[rows] @ f.k[columns].T)
    made = logit_decoder(f.q, f.q[rows]) @ core @ logit_decoder(f.k, f.k[columns]).T
    off = float(np.linalg.norm(a - made)) / float(np.linalg.norm(a))
    return Observations([off], 0.0, rank=len(columns), rounding=1e-9)


@claim(
    "dba.lossless_attention",
    title="Lossless attention at r = d",
    statement="""Since the logits have rank at most d, some U S P of rank d equals A: attention is
        compressed to r = d without loss.""",
    source=(
        f"how the non-destructive compression of {PAPER} is quoted; refuted: a softmax makes new "
        "rank, and no matrix of rank d is nearer to A than its truncated SVD"
    ),
    status="refuted",
    kind="inequality",
    observes="error of the best matrix of rank d over |A|_F, which must be zero",
    assumptions=ON,
    recorded={"line-4": "violated", "circle": "violated", "heads": "violated"},
)
def _lossless_attention(context: Context) -> Observations:
    f, sigma = factors_of(context.instance), context.instance.svd[1]
    d = f.k.shape[1]
    floor = float(np.asarray(eckart_young_floor(sigma, d))) / float(np.linalg.norm(sigma))
    note = f"rank of the logits {f.rank}, of A {int((sigma > 1e-12 * sigma[0]).sum())}"
    return Observations([floor], 0.0, rank=d, rounding=1e-9, notes=note)


# --- T7: fewer hidden dimensions ------------------------------------------------------------------


def _size(x: Array) -> float:
    """Return ``|X|_F``, infinite where it is not a number."""
    size = float(np.linalg.norm(x))
    return size if math.isfinite(size) else math.inf


@claim(
    "dba.oblique",
    title="Two maps need the rank of the logits",
    statement="""There are R (d, d_in) and T (d_in, d) with Q R T K^T = Q K^T if and only if
        d_in >= rank(Q K^T): with Q K^T = M s N^T take R = Q^+ M s and T = N^T (K^T)^+.""",
    source=DERIVED,
    status="derived",
    kind="inequality",
    observes="|Q R T K^T - Q K^T|_F/|Q K^T|_F at d_in = rank(Q K^T), which must be zero",
    assumptions=ON,
    recorded={"oblique": "holds", "circle": "holds", "clusters": "holds", "heads": "holds"},
)
def _oblique_maps(context: Context) -> Observations:
    f = factors_of(context.instance)
    if is_default(context):
        maps = oblique_maps(f.q, f.k)
    else:
        found = context.operator("oblique", f.rank, len(f.k), _first(context), q=f.q, k=f.k)
        maps = Oblique(*found)
    off = f.q @ (maps.right @ (maps.left @ f.k.T)) - f.q @ f.k.T
    width = maps.right.shape[1]
    context.require(width <= f.rank, f"maps of width {width} for logits of rank {f.rank}")
    # Pseudo-inverses of Q and K, of which the small singular values are cut.
    rounding = f.rounding * sum(_condition(x) for x in (f.q, f.k))
    return Observations([abs(f.scale) * _size(off) / f.fro], 0.0, rank=width, rounding=rounding)


@claim(
    "dba.projector",
    title="An orthogonal projector needs no more",
    statement="""The projector onto the projection of the row space of K onto that of Q has rank
        d_in = rank(Q K^T), and Q W W^T K^T = Q K^T for orthonormal columns W of its range.""",
    source=DERIVED,
    status="derived",
    kind="inequality",
    observes="|Q W W^T K^T - Q K^T|_F/|Q K^T|_F at d_in = rank(Q K^T), which must be zero",
    assumptions=ON,
    recorded={"oblique": "holds", "circle": "holds", "clusters": "holds", "heads": "holds"},
)
def _projector(context: Context) -> Observations:
    f = factors_of(context.instance)
    w = _projection(context)
    context.require(w.shape[1] <= f.rank, f"a projector of rank {w.shape[1]} for rank {f.rank}")
    off = f.q @ (w @ (w.T @ f.k.T)) - f.q @ f.k.T
    # Bases are orthonormal; cosines up to 1e-12 count as none.
    rounding = f.rounding + 1e-12 * f.spread
    return Observations(
        [abs(f.scale) * _size(off) / f.fro], 0.0, rank=w.shape[1], rounding=rounding
    )


def _projection(context: Context) -> Array:
    f = factors_of(context.instance)
    if is_default(context):
        return exact_projector(f.q, f.k)
    return implemented(context, "projector", f.rank, _first(context), q=f.q, k=f.k)


@claim(
    "dba.projector_needs_more",
    title="A projector as wide as Q or K",
    statement="""No orthogonal projector P of rank below min(rank(Q), rank(K)) has Q P K^T = Q K^T:
        the row space of Q or that of K must lie in its range.""",
    source=(
        "a sufficient condition taken for a necessary one; refuted: dba.projector has rank(Q K^T), "
        "2 in place of 3 on the instance oblique"
    ),
    status="refuted",
    kind="inequality",
    observes="min(rank(Q), rank(K)) - rank(P) of an exact P, which must not be positive",
    assumptions=ON,
    recorded={"oblique": "violated", "heads": "not applicable"},
)
def _projector_needs_more(context: Context) -> Observations:
    f = factors_of(context.instance)
    needed = min(numerical_rank(x) for x in (f.q, f.k))
    context.require(f.rank < needed, "the logits have the rank of Q or K")
    w = _projection(context)
    off = float(np.linalg.norm(f.q @ (w @ (w.T @ f.k.T)) - f.q @ f.k.T)) * abs(f.scale) / f.fro
    saved = needed - w.shape[1] if off <= f.rounding + 1e-12 * f.spread else 0
    return Observations([float(saved)], 0.0, rank=w.shape[1])


def _compressed(context: Context, d_in: int, kind: str, rng: np.random.Generator) -> list[Array]:
    """Return Qh and Kh, by the implementation that was handed in if any."""
    f = factors_of(context.instance)
    if is_default(context):
        return list(compress(f.q, f.k, d_in, kind, rng))
    found = context.operator("compress", d_in, len(f.k), rng, q=f.q, k=f.k, how=kind)
    return [np.asarray(x, np.float64) for x in found]


@claim(
    "dba.svd_width",
    title="The best logits of a hidden width",
    statement="""With centred keys K_c, Qh Kh^T the truncated SVD of Q K_c^T:
        |L_c - Lhat|_2 = scale sigma_{d_in+1}(Q K_c^T), and no other Qh Kh^T of that width has less,
        neither on principal axes of the keys nor by a random projection.""",
    source="derived: Eckart, Young and Mirsky",
    status="derived",
    kind="inequality",
    observes="||L_c - Lhat|_2/sigma_{d_in+1} - 1|; sigma_{d_in+1} over other errors, less 1",
    assumptions=ON,
    recorded={"circle": "holds", "clusters": "holds", "heads": "holds"},
)
def _svd_width(context: Context, *, rank: int | None = None) -> Observations:
    f, width = factors_of(context.instance), width_of(context, rank)
    centred = f.k - f.k.mean(axis=0)
    sigma = product_sigma(f.q, centred)
    floor = float(sigma[width]) if width < len(sigma) else 0.0
    context.require(floor > 1e-9 * sigma[0], f"nothing is lost at d_in = {width}")
    values = []
    for i, rng in enumerate(few(context, 3)):
        for how in ("svd", "pca_k", "gaussian") if is_default(context) and not i else ("svd",):
            qh, kh = _compressed(context, width, how, rng)
            kh = kh - kh.mean(axis=0)  # a row of logits may be shifted
            left, right = np.concatenate([f.q, -qh], axis=1), np.concatenate([centred, kh], axis=1)
            error = float(product_sigma(left, right)[0])
            values.append(abs(error / floor - 1) if how == "svd" else floor / error - 1)
    # Errors and singular values are rounded in the size of the logits.
    rounding = f.rounding * f.fro / (abs(f.scale) * floor)
    return Observations(values, 0.0, rank=width, rounding=rounding)


@claim(
    "dba.jl_variance",
    title="The variance of a projected logit",
    statement="""R (d, d_in) with independent N(0, 1/d_in): E[q^T R R^T k] = q.k, and the variance
        is (|q|^2 |k|^2 + (q.k)^2)/d_in, exactly.""",
    source=DERIVED,
    status="derived",
    kind="equality",
    observes="squared error over the formula, mean over eight pairs and one R a trial",
    assumptions=ON,
    recorded={"oblique": "holds", "clusters": "holds", "heads": "holds"},
)
def _jl_variance(context: Context, *, rank: int | None = None) -> Observations:
    f, width = factors_of(context.instance), width_of(context, rank)
    m, d = min(8, len(f.q), len(f.k)), f.k.shape[1]
    rows = np.linspace(0, len(f.q) - 1, m).astype(int)
    columns = np.linspace(0, len(f.k) - 1, m).astype(int)
    q, k = f.q[rows], f.k[columns]
    dots = np.einsum("ij,ij->i", q, k)
    variances = (np.sum(q * q, axis=1) * np.sum(k * k, axis=1) + dots**2) / width
    context.require(bool((variances > 0).all()), "needs rows that are not zero")
    squares, bias = [], []
    for rng in context.generators():
        made = context.operator("gaussian", width, d, rng)
        x, y = ((made.apply(z.T) if hasattr(made, "apply") else made @ z.T) for z in (q, k))
        moved = (np.einsum("ji,ji->i", x, y) - dots) / np.sqrt(variances)
        squares.append(float(np.mean(moved**2)))
        bias.append(float(np.mean(moved)))
    return Observations(
        squares, 1.0, rank=width, series=(Series("bias", bias, 0.0, 1.0 / math.sqrt(m)),)
    )


@claim(
    "dba.jl_logits",
    title="All logits of a random projection",
    statement="""d_in >= 4 ln(4 n_q n_k/delta)/(eps^2 - eps^3): with probability 1 - delta
        |q_i^T R R^T k_j - q_i.k_j| <= eps |q_i| |k_j| for all pairs.  At the sizes of heads this
        d_in exceeds d, where the identity costs less.""",
    source=f"derived: the lemma of Johnson and Lindenstrauss, as used in {PAPER}",
    status="derived",
    kind="tail",
    observes="max |q^T R R^T k - q.k|/(|q| |k|), one R a trial; rank is d_in",
    assumptions=ON,
    recorded={"wide-rows": "holds", "clusters": "vacuous", "heads": "vacuous"},
)
def _jl_logits(context: Context, *, eps: float = 0.5, delta: float = 0.1) -> Observations:
    f = factors_of(context.instance)
    d = f.k.shape[1]
    width = int(np.asarray(jl_logit_width(len(f.q), len(f.k), eps, delta)))
    context.below(width, d, eps, delta)
    norms = np.outer(np.linalg.norm(f.q, axis=1), np.linalg.norm(f.k, axis=1))
    exact = f.q @ f.k.T
    values = []
    for rng in context.generators():
        made = context.operator("gaussian", width, d, rng)
        x, y = ((made.apply(z.T) if hasattr(made, "apply") else made @ z.T) for z in (f.q, f.k))
        values.append(float(np.max(np.abs(x.T @ y - exact) / np.where(norms > 0, norms, 1))))
    return Observations(values, eps, delta=delta, rank=width)
