"""MagicPIG: keys whose hash codes agree with the query's, weighed by how likely that was.

Sources: Chen et al., "MagicPIG: LSH Sampling for Efficient LLM Generation", arXiv 2410.16179; the
public codes Infini-AI-Lab/MagicPIG @ac9aa36 and xAlg-ai/sparse-attention-hub @1a048c9.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..base.arguments import (
    as_array,
    check_count,
    check_finite,
    check_flag,
    check_integer,
    check_not_negative,
    float_dtype,
)
from ..base.draws import Draw
from ..kernels._threads import product
from ..operators.base import AttentionOperator
from ..operators.filled import SparseOrMean
from ..operators.steep import norms_of
from ..operators.visible_mean import VisibleMean
from ..problem import AttentionProblem
from .base import Method, Traits, check_preset, in_force, register

if TYPE_CHECKING:
    from ..kernels.collisions import Buckets, Hashing

Array = NDArray[Any]

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        # What the paper states: two tables must agree, and the probabilities are exact.
        "paper": {"least": 2, "floor": 0.0, "center": True},
        # Infini-AI-Lab: a constant in the weights; the ends of the sequence are always read.
        "released": {"least": 2, "floor": 1e-4, "center": True, "sinks": 4, "window": 64},
        # sparse-attention-hub: one table is enough, and keys are lifted to one norm.
        "hub": {
            "least": 1,
            "floor": 1e-6,
            "center": True,
            "center_queries": True,
            "lift": True,
        },
    }
)

CLAIMS = (
    "training_free.magicpig_unbiased",
    "training_free.magicpig_variance",
    "training_free.magicpig_joint",
    "training_free.magicpig_floor_bias",
    "training_free.magicpig_floor_unbiased",
    "training_free.magicpig_ratio_unbiased",
    "training_free.magicpig_two_tables",
    "training_free.composition",
)

# Codes are indices of buckets, and more tables than that are no longer a sketch.
MOST_BITS, MOST_TABLES = 16, 1024
# Queries and keys, evenly spaced, that the number of tables is chosen by.
PILOT_QUERIES, PILOT_KEYS = 64, 1024
# Entries of projections that are held at a time, and kept pairs.
PROJECTIONS, PAIRS = 1 << 21, 1 << 22


class Choices(NamedTuple):
    """What the parameters and the preset come to."""

    least: int = 2
    center: bool = True
    floor: float = 0.0
    sinks: int = 0
    window: int = 0
    center_queries: bool = False
    lift: bool = False


class Hashed(NamedTuple):
    """Hold what is hashed: unit vectors of queries and keys, float64, zero where there is none."""

    q: Array
    k: Array


def collision_probability(p: Array, tables: int, least: int) -> Array:
    """Return ``P(Bin(tables, p) >= least)``: that two codes agree in so many tables.

    ``u = 1 - (1 - p)^L`` for ``least = 1``, ``1 - (1 - p)^L - L p (1 - p)^(L-1)`` for 2.

    Examples
    --------
    >>> collision_probability(np.array([0.0, 0.5, 1.0]), 2, 1).tolist()
    [0.0, 0.75, 1.0]
    """
    from scipy.special import bdtrc

    return np.asarray(bdtrc(least - 1, tables, p))


def _mean_probability(p: Array, tables: int, least: int) -> float:
    """Return the mean of `collision_probability`, to choose a number of tables by.

    The closed forms take a tenth of the time, and lose only the digits of small probabilities.
    """
    if least > 2:
        return float(collision_probability(p, tables, least).mean())
    apart = (1.0 - p) ** (tables - least + 1)  # in all tables, or in all but one
    if least == 1:
        return float(1.0 - apart.mean())
    return float(1.0 - (apart * (1.0 + (tables - 1) * p)).mean())


def code_probability(q: Array, k: Array, bits: int) -> Array:
    """Return ``p_ij = (1 - theta_ij/pi)^bits`` (n_q, n_k) of unit vectors, or zero ones."""
    angles = np.arccos(np.clip(q @ k.T, -1.0, 1.0))
    return np.asarray((1.0 - angles / math.pi) ** bits)


def _units(x: Array) -> Array:
    """Return rows of length one; zero rows stay."""
    norms = norms_of(x)
    return np.asarray(x / np.where(norms > 0, norms, 1)[:, None])


def hashed(problem: AttentionProblem, choices: Choices) -> Hashed:
    """Return the unit vectors whose angles decide which keys are kept, without masked keys.

    Keys are centred by the mean of those that are not masked; causal problems are not centred, for
    a mean would tell early rows of later keys.
    """
    kept = problem.kept_keys
    q, k = np.array(problem.q, np.float64), np.array(problem.k[kept], np.float64)
    if choices.center and not problem.causal and len(kept):
        mean = k.mean(axis=0)
        k -= mean
        if choices.center_queries:
            q -= mean
    if not choices.lift:
        return Hashed(_units(q), _units(k))
    norms = norms_of(k)
    top = float(norms.max(initial=0.0)) or 1.0
    height = np.sqrt(np.maximum(0.0, 1.0 - (norms / top) ** 2))
    return Hashed(
        _units(np.concatenate([q, np.zeros((len(q), 1))], axis=1)),
        _units(np.concatenate([k / top, height[:, None]], axis=1)),
    )


def _spaced(n: int, most: int) -> Array:
    """Return up to ``most`` indices of 0..n - 1, evenly spaced."""
    return np.arange(min(n, most)) * n // max(min(n, most), 1)


def _nearest_tables(mean_keys: Callable[[int], float], rank: int, least: int) -> int:
    """Return the number of tables whose mean number of keys, which rises with it, is nearest."""
    low, high = least, max(least, MOST_TABLES)
    while low < high:
        middle = (low + high) // 2
        if mean_keys(middle) < rank:
            low = middle + 1
        else:
            high = middle
    if low > least and rank - mean_keys(low - 1) < mean_keys(low) - rank:
        return low - 1
    return low


@register("magicpig")
class MagicPIG(Method):
    """Attend to keys that collide with the query under random hashing, weighed by the chance.

    L tables hash ``x_i = q_i`` and ``y_j = k_j - kbar`` to ``bits`` signs of random projections
    each; key j is kept for row i where the codes of at least ``least`` tables agree, which happens
    with probability ``u_ij = P(Bin(L, p_ij) >= least)``, ``p_ij = (1 - angle(x_i, y_j)/pi)^bits``.
    ``Ahat_i`` is the softmax of ``L_ij - ln u_ij`` over the kept keys: numerator and denominator
    are unbiased, their ratio is not.

    Parameters
    ----------
    rank : int
        Keys that a row keeps on average, in 1..n_k: the number of tables is chosen so that their
        expected number is near it, with at most 1024 tables.
    bits : int, default 8
        Signs in a code, in 1..16.
    tables : int, optional
        L; overrides the choice by ``rank``.
    least : int, default 2
        Tables whose codes must agree.
    center : bool, default True
        Hash keys without their mean, which changes no entry of A.  Causal problems are not centred.
    floor : float, default 0
        Added to u in the weights; above 0 the estimate is too small.
    sinks, window : int, default 0
        First and last keys that a row sees, which are always kept, with weight one.
    center_queries : bool, default False
        Subtract the mean of the keys from queries too: other angles, and probabilities that no
        longer follow the logits.
    lift : bool, default False
        Give all keys the largest norm by one more coordinate, which the queries have as zero.  It
        looks at all keys, and causal problems are refused.
    preset : {"paper", "released", "hub"}, optional
        "paper": two tables, exact probabilities.  "released": Infini-AI-Lab's, ``floor=1e-4``, 4
        sinks and a window of 64.  "hub": sparse-attention-hub's, one table, lifted keys, centred
        queries, ``floor=1e-6``.

    Notes
    -----
    A row that keeps no key is the mean of the values that it sees; ``empty_rows`` of the operator
    counts them, and their log-sum-exp is that of equal logits, ``ln n_i + mean_j L_ij``.

    On a causal problem the tables are chosen by keys at right angles to the queries, since any
    others would tell early rows of later keys: more keys than ``rank`` may be kept.

    A draw holds ``planes``, float64 (d, ``bits`` L), one row more with lifted keys: the normals of
    the planes, one column for each bit, table after table.

    Chen et al., arXiv 2410.16179; Infini-AI-Lab/MagicPIG @ac9aa36, which reads some layers exactly
    and takes arc cosines of numbers above one; xAlg-ai/sparse-attention-hub @1a048c9, which lifts
    to the largest norm of all heads, here of one.

    Examples
    --------
    >>> import sketchattn as sa
    >>> problem = sa.make_heads("gaussian", n=32, d=4, rng=0)[0]
    >>> method = sa.MagicPIG(rank=8, bits=4)
    >>> method.approximate(problem, rng=0).shape
    (32, 32)
    >>> sorted(method.draw(problem, rng=0))
    ['planes']
    """

    draw_names = ("planes",)

    def __init__(
        self,
        rank: int,
        bits: int = 8,
        tables: int | None = None,
        least: int = 2,
        center: bool = True,
        floor: float = 0.0,
        sinks: int = 0,
        window: int = 0,
        center_queries: bool = False,
        lift: bool = False,
        preset: str | None = None,
    ) -> None:
        self.rank = rank
        self.bits = bits
        self.tables = tables
        self.least = least
        self.center = center
        self.floor = floor
        self.sinks = sinks
        self.window = window
        self.center_queries = center_queries
        self.lift = lift
        self.preset = preset

    @property
    def choices(self) -> Choices:
        """What the parameters and the preset come to."""
        return in_force(self, Choices(), PRESETS)

    @property
    def traits(self) -> Traits:
        """Everything is honoured, but that lifted keys know the largest norm of all."""
        return Traits(
            causal=not self.choices.lift,
            key_mask=True,
            row_stochastic=True,
            nonnegative=True,
            claims=CLAIMS,
            logsumexp=True,
            quadratic=True,
        )

    def _check_parameters(self) -> None:
        check_preset(self, Choices(), PRESETS)
        check_integer(self.bits, "bits", 1, "give one of 1..16", high=MOST_BITS, limit="most")
        for name in ("center", "center_queries", "lift"):
            check_flag(getattr(self, name), name)
        check_count(self.least, "least", "give how many tables must agree")
        check_not_negative(self.floor, "floor", "give what is added to probabilities")
        for name in ("sinks", "window"):
            check_count(getattr(self, name), name, "give a number of keys", low=0)
        if self.tables is not None:
            check_integer(
                self.tables, "tables", self.choices.least, "give as many as must agree, or more"
            )

    # --- the draw ---

    def _draw(self, problem: AttentionProblem, rng: np.random.Generator) -> Draw:
        choices = ("magicpig", int(self.rank), int(self.bits), self.choices)
        tables = (
            problem.cached(choices, lambda: self._tables(problem))
            if self.tables is None
            else int(self.tables)
        )
        return Draw(planes=rng.standard_normal((self._width(problem), tables * int(self.bits))))

    def _width(self, problem: AttentionProblem) -> int:
        return problem.d + self.choices.lift

    def _tables(self, problem: AttentionProblem) -> int:
        """Return the number of tables for which rows keep ``rank`` keys on average."""
        choices, rank = self.choices, int(self.rank)
        kept = problem.kept_keys
        if problem.causal:
            counts = problem.visible_counts().astype(np.float64)
            always = np.minimum(counts, choices.sinks + choices.window)
            p = np.array(2.0 ** -int(self.bits))

            def keys(tables: int) -> float:
                u = collision_probability(p, tables, choices.least)
                return float((always + (counts - always) * u).mean()) if len(counts) else 0.0

            return _nearest_tables(keys, rank, choices.least)
        q, k = hashed(problem, choices)
        q = q[_spaced(problem.n_q, PILOT_QUERIES)]
        columns = _spaced(len(kept), PILOT_KEYS)
        if not len(q) or not len(columns):
            return choices.least
        fixed = (columns < choices.sinks) | (columns >= len(kept) - choices.window)
        p = code_probability(q, k[columns], int(self.bits))
        p[:, fixed] = 1.0

        def mean_keys(tables: int) -> float:
            return _mean_probability(p, tables, choices.least) * len(kept)

        return _nearest_tables(mean_keys, rank, choices.least)

    def _check_draw(self, problem: AttentionProblem, draw: Mapping[str, Any]) -> Draw:
        planes = as_array(super()._check_draw(problem, draw)["planes"], "planes")
        float_dtype(planes, "planes")
        bits, width, least = int(self.bits), self._width(problem), self.choices.least
        columns = planes.shape[-1] if planes.ndim == 2 else 0
        tables, rest = divmod(columns, bits)
        wanted = tables >= least if self.tables is None else tables == int(self.tables)
        if planes.ndim != 2 or len(planes) != width or rest or not wanted:
            count = f"L >= {least}" if self.tables is None else f"L = {self.tables}"
            raise ValueError(
                f"planes must have shape ({width}, {bits} L), {count}, got {planes.shape}; give "
                f"one column for each bit of each table"
            )
        check_finite(planes, "planes")
        return Draw(planes=planes.astype(np.float64))

    # --- codes and keys ---

    def _hashing(self, planes: Array) -> Hashing:
        from ..kernels.collisions import Hashing

        choices, bits = self.choices, int(self.bits)
        return Hashing(
            bits,
            planes.shape[1] // bits,
            int(choices.least),
            float(choices.floor),
            int(choices.sinks),
            int(choices.window),
        )

    def _pieces(
        self, problem: AttentionProblem, draw: Draw, v: Array, most: int | None = PAIRS
    ) -> Iterator[tuple[slice, Array, Array, Array, Array, Array]]:
        """Yield rows, where their keys start, the keys, their weights, output and log-sum-exp.

        ``most`` kept pairs or one row at a time; None is all rows.
        """
        from ..kernels.collisions import count_keys, find_keys, list_keys, weigh_keys

        planes = draw["planes"]
        how, units = self._hashing(planes), hashed(problem, self.choices)
        codes, buckets = self._codes(problem, units, planes, how.bits)
        # Without the masked keys a row sees a prefix of them.
        kept, ends = problem.kept_keys, problem.visible_counts()
        q, k, v = (x.astype(np.float64) for x in (problem.q, problem.k[kept], v[kept]))

        def weighed(rows: slice, begins: Array, columns: Array) -> tuple[Array, Array, Array]:
            return weigh_keys(
                (q, k, v), (units.q, units.k), ends, how, problem.scale, rows, begins, columns
            )

        if most is None:
            rows = slice(0, problem.n_q)
            columns, begins = find_keys(codes, buckets, ends, how)
            yield rows, begins, kept[columns], *weighed(rows, begins, columns)
            return
        counts = count_keys(codes, buckets, ends, how)
        reach = np.concatenate([[0], np.cumsum(counts)])
        start = 0
        while start < problem.n_q:
            stop = max(start + 1, int(np.searchsorted(reach, reach[start] + most, "right")) - 1)
            rows = slice(start, min(stop, problem.n_q))
            begins = reach[rows.start : rows.stop + 1] - reach[rows.start]
            columns = list_keys(codes, buckets, ends, how, rows, begins)
            yield rows, begins, kept[columns], *weighed(rows, begins, columns)
            start = rows.stop

    def _codes(
        self, problem: AttentionProblem, units: Hashed, planes: Array, bits: int
    ) -> tuple[Array, Buckets]:
        """Return codes of the queries, and the buckets of the keys."""
        from ..kernels.collisions import fill_buckets, pack

        across = planes.astype(problem.dtype)
        rows = max(1, PROJECTIONS // planes.shape[1])

        def codes(x: Array) -> Array:
            out = np.empty((len(x), planes.shape[1] // bits), np.uint16)
            for start in range(0, len(x), rows):
                part = x[start : start + rows].astype(problem.dtype)
                out[start : start + rows] = pack(product(part, across) > 0, bits)
            return out

        return codes(units.q), fill_buckets(codes(units.k), bits)

    # --- what is made of them ---

    def _approximate(self, problem: AttentionProblem, draw: Draw) -> AttentionOperator:
        nothing = np.empty((problem.n_k, 0))
        _, begins, columns, weights, _, _ = next(self._pieces(problem, draw, nothing, None))
        mean_keys = round(len(columns) / max(problem.n_q, 1))
        made = SparseOrMean(problem, begins, columns, weights.astype(problem.dtype), mean_keys)
        choices = self.choices
        if 0 < len(problem.kept_keys) <= choices.sinks + choices.window:
            made.path = "exact"  # every key is one that is always read
        return made

    def _attend_with_lse(self, problem: AttentionProblem, draw: Draw) -> tuple[Array, Array]:
        values = problem.values.astype(np.float64)
        out, lse = np.empty((problem.n_q, values.shape[1])), np.empty(problem.n_q)
        for rows, _, _, _, part, normalizer in self._pieces(problem, draw, values):
            out[rows], lse[rows] = part, normalizer
        counts = problem.visible_counts()
        empty = (lse == -np.inf) & (counts > 0)
        if empty.any():
            wide = problem.astype(np.float64)
            mean = VisibleMean(wide)
            out[empty] = (mean @ values)[empty]
            logits = np.einsum("ic,ic->i", wide.q, mean @ wide.k)
            lse[empty] = np.log(counts[empty]) + problem.scale * logits[empty]
        return out.astype(problem.dtype), lse.astype(problem.dtype)
