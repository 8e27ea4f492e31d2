"""Claims: pivots, by skeletons of largest volume, volume sampling and strong rank-revealing QR."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np

from ..engine.arguments import Array, real, whole
from ..engine.assumptions import DENSE, STOCHASTIC
from ..engine.observers import (
    EPS,
    implemented,
    is_default,
    largest,
)
from ..engine.records import Observations
from ..engine.registry import Context, claim
from .formulas import (
    largest_volume,
    rrqr_factor,
    skeleton_residual,
    strong_rrqr,
    volume_sampling,
)
from .shared import DERIVED

GOREINOV = "Goreinov and Tyrtyshnikov, Contemporary Mathematics 280 (2001), with its proof"
DESHPANDE = "Deshpande, Rademacher, Vempala and Wang, Theory of Computing 2 (2006)"
GU = "Gu and Eisenstat, SIAM J. Sci. Comput. 17 (1996), Theorem 3.2"

ON = (DENSE, STOCHASTIC)
EVERYWHERE = {"reference": "holds", "gauss": "holds", "ten-clusters": "holds", "heads": "holds"}
# Sizes of the pieces whose subsets are all tried.
SIDE = 7
# Singular values below this, relative to the largest, count as none.
NOTHING = 1e-10


def _pieces(context: Context, rows: int, columns: int, most: int) -> Iterator[tuple[Array, Array]]:
    """Yield random pieces of exp(L), every row over its largest entry, with their spectrum."""
    a = context.instance.a
    for rng in islice(context.generators(), most):
        i, j = (
            rng.permutation(size)[:count]
            for size, count in zip(a.shape, (rows, columns), strict=True)
        )
        piece = a[np.ix_(i, j)]
        top = piece.max(axis=1, keepdims=True)
        piece = piece / np.where(top > 0, top, 1.0)
        piece[piece < 1e-100] = 0.0  # products of such entries underflow
        yield piece, np.linalg.svd(piece, compute_uv=False)


@claim(
    "dba.skeleton",
    title="A skeleton of largest volume",
    statement="""E any matrix, rows I and columns J with |det E[I, J]| largest among all r x r
        submatrices: max |E - E[:, J] E[I, J]^-1 E[I, :]| <= (r + 1) sigma_{r+1}(E).""",
    source=GOREINOV,
    status="published",
    kind="inequality",
    observes="the residual over its bound for r = 1, 2, 3, pieces of exp(L) of 7 x 7 entries",
    assumptions=ON,
    recorded=EVERYWHERE,
)
def _skeleton(context: Context) -> Observations:
    values = []
    for piece, sigma in _pieces(context, SIDE, SIDE, 20):
        for r in range(1, min(4, *piece.shape)):
            if sigma[r] <= NOTHING * sigma[0]:
                continue  # what is left is rounding
            if is_default(context):
                rows, columns = largest_volume(piece, r)
            else:
                rng = np.random.default_rng(context.entropy)
                found = implemented(context, "skeleton", r, rng, matrix=piece)
                rows, columns = found.astype(int)
            left = largest(skeleton_residual(piece, rows, columns))
            # Entries of E[:, J] E[I, J]^-1 are at most 1, as the volume is largest.
            room = 16 * SIDE * EPS * float(sigma[0])
            values.append(left / ((r + 1) * float(sigma[r]) + room))
    context.require(bool(values), "pieces have rank 1")
    return Observations(values, 1.0, rounding=1e-9)


def _enumerated(context: Context) -> Iterator[tuple[float, float, float, float]]:
    """Yield the mean error of volume sampling by enumeration, its formula, bound and rounding."""
    for piece, sigma in _pieces(context, SIDE, SIDE, 10):
        for k in range(1, min(4, *piece.shape)):
            if sigma[k] <= 1e-6 * sigma[0]:
                continue  # squares of errors would be rounding
            found = volume_sampling(piece, k)
            law = found.law
            if not is_default(context):
                rng = np.random.default_rng(context.entropy)
                given = {"matrix": piece, "subsets": found.subsets}
                law = implemented(context, "volume_law", k, rng, **given)
            # Determinants of Gram matrices of the columns, and squares of what they leave: both
            # are rounded in the size of the largest singular value.
            rounding = 16 * SIDE * EPS * float(sigma[0] / sigma[k]) ** 2
            yield float(law @ found.errors), found.mean, found.bound, rounding


@claim(
    "dba.volume_sampling",
    title="Columns drawn by volume",
    statement="""k columns S of M with probability proportional to det(M_S^T M_S), C = M_S:
        E|M - C C^+ M|_F^2 <= (k + 1) |M - M_k|_F^2.""",
    source=DESHPANDE,
    status="published",
    kind="inequality",
    observes="the mean over all subsets over its bound, k = 1, 2, 3, pieces of exp(L), 7 x 7",
    assumptions=ON,
    recorded=EVERYWHERE,
)
def _volume_sampling(context: Context) -> Observations:
    found = [(mean / bound, 1 + rounding) for mean, _, bound, rounding in _enumerated(context)]
    context.require(bool(found), "pieces have rank 1")
    values, bounds = zip(*found, strict=True)
    return Observations(values, bounds)


@claim(
    "dba.volume_sampling_exact",
    title="The mean of volume sampling, exactly",
    statement="""As dba.volume_sampling: E|M - C C^+ M|_F^2 = (k + 1) e_{k+1}/e_k, the elementary
        symmetric polynomials of the squared singular values.""",
    source=DERIVED,
    status="derived",
    kind="inequality",
    observes="|mean over all subsets/formula - 1|, which must be zero; pieces of exp(L), 7 x 7",
    assumptions=ON,
    recorded=EVERYWHERE,
)
def _volume_sampling_exact(context: Context) -> Observations:
    found = [(abs(mean / x - 1), rounding) for mean, x, _, rounding in _enumerated(context)]
    context.require(bool(found), "pieces have rank 1")
    values, bounds = zip(*found, strict=True)
    return Observations(values, bounds)


@claim(
    "dba.strong_rrqr",
    title="Columns that no exchange makes much larger",
    statement="""k columns C of M (m, n) whose volume no exchange raises by more than a factor f:
        |M - C C^+ M|_2 <= sqrt(1 + f^2 k (n - k)) sigma_{k+1}(M) and max |C^+ M| <= f.""",
    source=GU,
    status="published",
    kind="inequality",
    observes="the larger of both over its bound, pieces of exp(L) of 24 x 32 entries, k = 1, 4, 8",
    assumptions=ON,
    recorded=EVERYWHERE,
)
def _strong_rrqr(context: Context, *, f: float = 1.1, rank: int | None = None) -> Observations:
    most, values = float(real(f, "f", 1, low_open=False)), []
    ranks = (1, 4, 8) if rank is None else (int(whole(rank, "rank")),)
    for piece, sigma in _pieces(context, 24, 32, 5):
        for k in ranks:
            if k >= len(sigma) or sigma[k] <= NOTHING * sigma[0]:
                continue
            if sigma[k - 1] <= 1e-5 * sigma[0]:
                continue  # exchanges are told apart by squares of C^+
            if is_default(context):
                columns = strong_rrqr(piece, k, most)
            else:
                rng = np.random.default_rng(context.entropy)
                columns = implemented(context, "columns", k, rng, matrix=piece, f=most).astype(int)
            within = np.linalg.pinv(piece[:, columns]) @ piece
            left = float(np.linalg.norm(piece - piece[:, columns] @ within, 2))
            bound = rrqr_factor(k, piece.shape[1], most) * float(sigma[k])
            others = np.delete(within, columns, axis=1)
            # sigma_k(C) is at least sigma_k(M) over the factor.
            condition = bound / float(sigma[k]) * float(sigma[0] / sigma[k - 1])
            room = 16 * EPS * condition * piece.shape[1] * float(sigma[0])
            others_room = 16 * EPS * condition**2
            values.append(max(left / (bound + room), largest(others) / (most + others_room)))
    context.require(bool(values), "pieces have rank 1")
    return Observations(values, 1.0)
