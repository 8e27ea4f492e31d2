"""What the claims of this topic share: sources, the logits in factors, a hidden width."""

from __future__ import annotations

import numpy as np

from ..engine.arguments import Array, whole
from ..engine.assumptions import DENSE, KEYS
from ..engine.instances import Instance
from ..engine.observers import EPS, problem_of
from ..engine.registry import Assumption, Context

PAPER = "Qin et al., Dynamic Bilinear Low-Rank Attention, TNNLS (2025)"
DERIVED = "derived: see the chapter on DBA"


class Factors:
    """Hold Q, K, scale, L and its singular values, in float64 and without masked keys."""

    def __init__(self, seen: Instance) -> None:
        problem = problem_of(seen)
        self.q, self.k, self.scale = problem.q, problem.k, float(problem.scale)
        self.sigma = abs(self.scale) * product_sigma(self.q, self.k)
        size = max(self.q.shape + self.k.shape)
        self.rank = int((self.sigma > 4 * size * EPS * self.sigma.max(initial=0.0)).sum())
        norms = float(np.linalg.norm(self.q)) * float(np.linalg.norm(self.k))
        # |Q|_F |K|_F over |Q K^T|_F, which may keep little of their size; products Q X K^T over
        # |L|_F are rounded by this much.
        self.spread = abs(self.scale) * norms / max(self.fro, 1e-300)
        self.rounding = 16 * size * EPS * self.spread

    @property
    def fro(self) -> float:
        """``|L|_F``."""
        return float(np.linalg.norm(self.sigma))


def factors_of(seen: Instance) -> Factors:
    """Return the factors of an instance, computed once."""
    return seen.cached("dba factors", lambda: Factors(seen))


def product_sigma(x: Array, y: Array) -> Array:
    """Return the singular values of ``X Y^T`` from the triangles of X and Y."""
    left, right = (np.asarray(np.linalg.qr(z, mode="r")) for z in (x, y))
    return np.asarray(np.linalg.svd(left @ right.T, compute_uv=False))


def _test_rank(seen: Instance) -> str | None:
    return None if seen.m and seen.n and factors_of(seen).rank else "has logits that are all zero"


LOGITS = Assumption("the logits are not all zero", _test_rank)
ON = (DENSE, KEYS, LOGITS)


def width_of(context: Context, rank: int | None) -> int:
    """Return d_in, half of d by default."""
    d = problem_of(context.instance).d
    width = max(1, d // 2) if rank is None else int(whole(rank, "rank"))
    context.require(width <= d, f"d_in = {width} of d = {d}")
    return width
