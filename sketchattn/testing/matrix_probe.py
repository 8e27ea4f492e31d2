"""The matrix that a function computes, seen through values that are columns of the identity.

An output hides what its average hides: one key of many, or a scale that is off by one per cent,
are below the rounding of half precision.  ``f(Q, K, I) = A`` shows both: the support of ``A`` must
be the visible set exactly, its rows must sum to 1, and the regression of ``log Ahat - log A`` on
the logits gives the error of the scale to four digits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .candidate import Candidate
from .dense import weights
from .inputs import Case, Setting, lattice, random_mask
from .mutants import Mutant
from .report import ProbeRecord
from .tolerance import growth, logits_of, units

Array = NDArray[Any]

# Largest error of the scale; correct programs stay below 2e-4 in bfloat16.
SCALE_LIMIT = 1e-3
# Weights below this have too few digits left for a logarithm.
_LARGE = 2.0**-12
# 67 keys are a tile of 64 and three more; values of width 16 show them in five calls.
_SIZES = (1, 2, 2, 67, 67, 16, 16)
_GROUPED = (1, 4, 2, 67, 67, 16, 16)


@dataclass(frozen=True)
class Resolution:
    """Hold what a matrix says about the program that computed it.

    Attributes
    ----------
    scale : float
        The logits are ``1 + scale`` times the true ones; NaN with a softcap.
    row_sum : float
        Largest distance of a row sum from 1; NaN with a sink.
    row_limit : float
        What rounding allows.
    mismatches : int
        Pairs that have weight and are hidden, or the reverse.
    first : tuple of int
        The first of them, (batch, head, row, key).
    """

    scale: float
    row_sum: float
    row_limit: float
    mismatches: int
    first: tuple[int, ...]

    @property
    def right(self) -> bool:
        """Whether all of it is that of a correct program."""
        return (
            self.mismatches == 0
            and not abs(self.scale) > SCALE_LIMIT
            and not self.row_sum > self.row_limit
        )

    def __str__(self) -> str:
        """Return what is wrong, in words."""
        words = []
        if self.mismatches:
            b, h, i, j = self.first
            words.append(
                f"{self.mismatches} pairs have weight and are hidden or the reverse, first batch "
                f"{b}, head {h}, row {i}, key {j}"
            )
        if abs(self.scale) > SCALE_LIMIT:
            words.append(f"the scale is wrong by {100 * self.scale:+.2f} %")
        if self.row_sum > self.row_limit:
            words.append(
                f"rows sum to 1 only within {self.row_sum:.3g}, rounding allows "
                f"{self.row_limit:.3g}"
            )
        return "; ".join(words) or "right"


def matrix_cases(
    dtype: str, setting: Setting, supports: frozenset[str], seed: int
) -> Iterator[Case]:
    """Yield small exact cases with logits of deviation about 1, plain and for every option."""
    options: dict[str, Callable[[np.random.Generator, Case], Case]] = {
        "plain": lambda rng, c: c,
        "scale": lambda rng, c: replace(c, scale=0.375),
        "causal": lambda rng, c: replace(c, causal=True),
        "bool_mask": lambda rng, c: replace(c, mask=random_mask(rng, c.seen().shape)),
        "additive_mask": _added,
        "key_mask": lambda rng, c: _padded(rng, c, setting),
        "window": lambda rng, c: replace(c, window=(5, 2)),
        "softcap": lambda rng, c: replace(c, softcap=4.0),
        "gqa": lambda rng, c: c,
        "sink": lambda rng, c: replace(c, sink=np.arange(1.0, 1 + c.q.shape[1])),
    }
    for number, (feature, change) in enumerate(options.items()):
        if feature != "plain" and feature not in supports:
            continue
        rng = np.random.default_rng((seed, 100 + number))
        q, k, v = lattice(rng, _GROUPED if feature == "gqa" else _SIZES, reach=1)
        case = Case(
            id=f"{dtype}/{feature}/matrix",
            dtype=dtype,
            feature=feature,
            q=q,
            k=k,
            v=v,
            alignment=setting.alignment,
            empty_row=setting.empty_row,
        )
        yield change(rng, case)


def _added(rng: np.random.Generator, case: Case) -> Case:
    shape = case.seen().shape
    bias = rng.integers(-1, 2, shape) / 2
    return replace(case, mask=np.where(random_mask(rng, shape), bias, -np.inf))


def _padded(rng: np.random.Generator, case: Case, setting: Setting) -> Case:
    b, n_k = len(case.k), case.k.shape[2]
    if setting.prefix_keys:
        return replace(case, key_mask=np.arange(n_k) < np.full((b, 1), n_k - 5))
    return replace(case, key_mask=random_mask(rng, (b, n_k)))


def measured_matrix(candidate: Candidate, case: Case) -> Array:
    """Return the matrix (B, H, n_q, n_k) that a function computes, d_v keys a call."""
    n_k, d_v = case.v.shape[2:]
    found = np.empty((*case.q.shape[:3], n_k))
    identity = np.eye(n_k)
    for start in range(0, n_k, d_v):
        columns = identity[:, start : start + d_v]
        width = columns.shape[1]
        values = np.zeros_like(case.v)
        values[..., :width] = columns
        found[..., start : start + width] = candidate.run(replace(case, v=values))[..., :width]
    return found


def mutant_matrix(mutant: Mutant, case: Case) -> Array:
    """Return the matrix of a wrong program."""
    n_k = case.k.shape[2]
    values = np.broadcast_to(np.eye(n_k), (*case.k.shape[:2], n_k, n_k))
    return mutant.answer(replace(case, v=values))


def resolve(found: Array, case: Case) -> Resolution:
    """Compare a matrix with the right one."""
    p = case.parts()
    right, seen = weights(p), p.seen
    wrong = (found != 0) != (right != 0)
    where = np.argwhere(wrong)
    w, u = units(case.dtype)
    sums = np.abs(found.sum(axis=-1) - 1)[seen.any(axis=-1)]
    scale = float("nan")
    if not case.softcap:
        used = seen & (right > _LARGE) & (found > 0)
        scale = _slope(np.where(used, found, 1), np.where(used, right, 1), logits_of(case), used)
    return Resolution(
        scale=scale,
        row_sum=float(sums.max(initial=0.0)) if case.sink is None else float("nan"),
        row_limit=4 * u + growth(2 * case.k.shape[2] + 12, w),
        mismatches=int(wrong.sum()),
        first=tuple(int(i) for i in where[0]) if len(where) else (),
    )


def _slope(found: Array, right: Array, x: Array, used: Array) -> float:
    """Return t of ``Ahat = softmax((1 + t) L)``, by regression within rows."""
    count = np.maximum(used.sum(axis=-1, keepdims=True), 1)

    def centred(y: Array) -> Array:
        mean = np.where(used, y, 0).sum(axis=-1, keepdims=True) / count
        return np.where(used, y - mean, 0)

    y, x = centred(np.log(found) - np.log(right)), centred(x)
    size = float((x * x).sum())
    return float((x * y).sum()) / size if size else 0.0


def record(case: Case, found: Resolution) -> ProbeRecord:
    """Return what a report says about one matrix."""
    return ProbeRecord(
        id="matrix",
        name=case.feature,
        dtype=case.dtype,
        status="pass" if found.right else "fail",
        message="" if found.right else str(found),
    )
