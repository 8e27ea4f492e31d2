"""Informer (ProbSparse): some rows of A exactly, the mean of V for all others.

``Ahat_i = A_i`` for the r rows i in I, and ``Ahat_i`` = the uniform row over the keys that i sees
for the others: row selection.  Whatever I is, ``|A V - Ahat V|_F^2 = sum_(i not in I) e_i`` with
``e_i = |A_i V - fill_i|^2``: a choice of rows is as good as the ``e_i`` that it leaves, which
`selection_regret` measures.  No theorem bounds the error of the rows that the published statistic
picks.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..draws import Draw, Rng, check_draw
from ..operators import (
    PART_KEYS,
    AttentionOperator,
    Index,
    SampledAttention,
    pick,
    solve_rows_of_heads,
)
from ..problem import AttentionProblem, as_array, check_logits, check_rank, closest, stacked
from ._base import Method, Traits, register

Array = NDArray[Any]

# Statistics of sampled logits, in the order of the docstring; and those of whole rows.
SAMPLED = ("max_mean", "zero_filled", "m", "kl")
WHOLE = ("row_norm", "oracle")
STATISTICS = (*SAMPLED, *WHOLE, "random")
DIVISORS = ("n_samples", "n_keys")
SAMPLINGS = ("per_query", "per_head", "shared", "full")
FILLS = ("mean", "masked_mean", "cummean", "cumsum")
SCOPES = ("visible", "all")

# Fills that end where the sight of a causal row ends.
CAUSAL_FILLS = FILLS[1:]
RUNNING_FILLS = FILLS[2:]

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        # What the paper's text says.
        "paper": {"statistic": "zero_filled", "fill": "mean", "factor": 5},
        # What its public code computes.
        "released": {
            "statistic": "max_mean",
            "mean_divisor": "n_keys",
            "fill": "mean",
            "factor": 5,
        },
        "released_causal": {
            "statistic": "max_mean",
            "mean_divisor": "n_keys",
            "scope": "all",
            "fill": "cumsum",
            "factor": 5,
        },
        # What both mean.
        "corrected": {
            "statistic": "max_mean",
            "mean_divisor": "n_samples",
            "fill": "mean",
            "factor": 5,
        },
        "corrected_causal": {
            "statistic": "kl",
            "mean_divisor": "n_samples",
            "scope": "visible",
            "fill": "cummean",
            "factor": 5,
        },
    }
)

# What is claimed of its measures and its choice of rows, refuted statements among it.
CLAIMS = (
    "informer.lemma1",
    "informer.sandwich",
    "informer.proposition1",
    "informer.key_shift",
    "informer.row_selection",
    "informer.regret",
    "informer.oracle",
    "informer.random_rows",
    "informer.variation",
    "informer.total_bound",
    "informer.total_bound_surrogate",
    "informer.measure_orders_rows",
    "informer.divisor",
    "informer.miss_rate",
    "informer.sampled_maximum",
)


def published_count(n: int, factor: int = 5) -> int:
    """Return ``min(factor ceil(ln n), n)``, at least 1: the rows or samples of the public code.

    Parameters
    ----------
    n : int
        Number of queries (for rows) or of keys (for samples), at least 0.
    factor : int, default 5
        At least 1.

    Notes
    -----
    A budget of 256 expressed through ``factor = ceil(256 / ln n)`` is 259, 272 and 279 at
    n = 1024, 2048 and 4096.

    Examples
    --------
    >>> [published_count(n) for n in (0, 1, 96, 1024, 2048, 4096)]
    [0, 1, 25, 35, 40, 45]
    """
    return min(max(1, int(factor) * math.ceil(math.log(max(n, 1)))), n)


# --- the fill, and what it leaves -------------------------------------------------------------


def _fill_weights(problem: AttentionProblem, fill: str) -> Array:
    """Return the weight of each key that a lazy row sees, in float64 (n_q,)."""
    if fill == "cumsum":
        return np.ones(problem.n_q)
    counts = problem.visible_counts()
    return np.where(counts > 0, 1.0 / np.maximum(counts, 1), 0.0)


def _lazy(problem: AttentionProblem, fill: str, dtype: Any) -> SampledAttention:
    """Return the matrix whose rows are all lazy."""
    return SampledAttention(
        np.empty(0, np.int64),
        np.empty((problem.n_q, 0), dtype),
        problem.n_k,
        0,
        fill=_fill_weights(problem, fill).astype(dtype),
        keys=None if problem.key_mask is None else problem.key_mask.copy(),
        offset=problem.offset if problem.causal else None,
    )


def _lazy_row(fill: Array, keys: Array | None, x: Array) -> Array:
    """Return the lazy row of a product with ``x (n_k, m)`` where no problem is causal, (m,).

    Then lazy rows differ by nothing but zero for rows without a key: one mean serves them all.
    """
    kept = x if keys is None else x[keys]
    total = kept.sum(axis=0, dtype=np.float64)
    return np.asarray(float(fill.max(initial=0.0)) * total)


def _check_fill(problem: AttentionProblem, fill: str) -> None:
    """Refuse a fill that a problem has no use for."""
    if fill in RUNNING_FILLS and not problem.causal:
        raise ValueError(
            f"fill must be 'mean' or 'masked_mean' for a problem that is not causal, got {fill!r}; "
            f"running sums follow a causal mask"
        )
    if fill == "mean" and problem.causal:
        raise ValueError(
            f"fill must end where a row's sight ends for a causal problem, got {fill!r}; "
            f"use 'cummean'"
        )
    if fill == "cumsum" and (problem.key_mask is not None or problem.n_q != problem.n_k):
        raise ValueError(
            "fill must be 'cummean' with a key_mask or n_q != n_k, got 'cumsum'; the released code "
            "has neither"
        )


def lazy_errors(problem: AttentionProblem, *, fill: str = "masked_mean") -> Array:
    """Return ``e_i = |A_i V - fill_i|^2``, float64 (n_q,): what an exact row i would save.

    Parameters
    ----------
    problem : AttentionProblem
        With values; computed in float64, ``O(n_q n_k d)``.
    fill : {"masked_mean", "mean", "cummean", "cumsum"}
        What a lazy row gets; see `Informer`.  "masked_mean" fits every problem.

    Returns
    -------
    ndarray (n_q,)
        ``sum_(i not in I) e_i = |A V - Ahat V|_F^2`` for every set I of exact rows.

    Examples
    --------
    >>> import numpy as np, sketchattn as sa
    >>> logits = np.log([[1.0, 2, 4], [1, 1, 1], [3, 1, 1]])
    >>> problem = sa.AttentionProblem(logits, np.eye(3), np.arange(1.0, 4)[:, None], scale=1)
    >>> lazy_errors(problem).round(7).tolist()
    [0.1836735, 0.0, 0.16]
    """
    _check_problem(problem)
    _name(fill, "fill", FILLS)
    _check_fill(problem, fill)
    _ = problem.values
    wide = problem.astype(np.float64)
    difference = wide.output - _lazy(wide, fill, np.float64) @ wide.values
    return np.asarray(np.einsum("ic,ic->i", difference, difference))


@dataclass(frozen=True)
class SelectionRegret:
    """Say how much error a choice of exact rows leaves, and how much no choice avoids.

    Attributes
    ----------
    residual : float
        ``sum_(i not in I) e_i``, the squared Frobenius error of the output.
    least : float
        The same for the r rows with the largest e_i.
    total : float
        ``sum_i e_i``, that of no exact row at all.
    regret : float
        ``residual - least``, never negative.
    relative : float
        ``regret / total``; 0 where the total is 0.
    rows : int
        r, the number of rows in I.
    """

    residual: float
    least: float
    total: float
    regret: float
    relative: float
    rows: int


def selection_regret(
    problem: AttentionProblem, rows: ArrayLike, *, fill: str = "masked_mean"
) -> SelectionRegret:
    """Return ``R(I) = sum_(i not in I) e_i - min_J sum_(i not in J) e_i`` over as many rows.

    Parameters
    ----------
    problem : AttentionProblem
        With values.
    rows : int array (r,)
        I: distinct queries that are computed exactly; may be empty.
    fill : {"masked_mean", "mean", "cummean", "cumsum"}
        As for `lazy_errors`.

    Returns
    -------
    SelectionRegret

    Raises
    ------
    TypeError, ValueError
        For rows that are repeated, out of range or not integers, and a problem without values.

    Notes
    -----
    An ``O(n_q n_k d)`` reference in float64.  The minimum is that of the Frobenius norm; other
    rows may be better in the spectral norm.  Uniformly random rows have the expected residual
    ``(1 - r / n_q) total``.

    Examples
    --------
    >>> import numpy as np, sketchattn as sa
    >>> logits = np.log([[1.0, 2, 4], [1, 1, 1], [3, 1, 1]])
    >>> problem = sa.AttentionProblem(logits, np.eye(3), np.arange(1.0, 4)[:, None], scale=1)
    >>> round(selection_regret(problem, [2]).regret, 7)
    0.0236735
    """
    _check_problem(problem)
    chosen = _check_pilots(as_array(rows, "rows"), problem.n_q, "rows")
    errors = lazy_errors(problem, fill=fill)
    left = np.delete(errors, chosen)
    # Both sums add numbers in ascending order, so that equal sets give equal sums.
    residual = math.fsum(np.sort(left))
    least = math.fsum(np.sort(errors)[: len(left)])
    total = math.fsum(errors)
    regret = residual - least
    return SelectionRegret(
        residual, least, total, regret, regret / total if total else 0.0, len(chosen)
    )


# --- statistics of rows -----------------------------------------------------------------------


def row_statistic(
    problem: AttentionProblem,
    statistic: str = "max_mean",
    *,
    key_samples: ArrayLike | None = None,
    mean_divisor: str = "n_samples",
    scope: str = "visible",
    fill: str = "masked_mean",
) -> Array:
    """Return what rows are ranked by, float64 (n_q,); -inf for a row that sees no key.

    With the logits ``l_j = L_ij`` of the keys S that are looked at, ``mean = sum_S l / D``:

    * "max_mean": ``max_S l - mean``;
    * "zero_filled": ``max(0, max_S l) - sum_S l / nv``, the paper's text, which puts zero for the
      keys outside of a sample;
    * "kl": ``logsumexp_S l - ln |S| - mean``: ``KL(uniform | A_i)`` where S is all keys;
    * "m": that plus ``ln nv``, where S is all keys ``logsumexp l - mean``;
    * "row_norm": ``|A_i|_2``;  "oracle": ``e_i`` of `lazy_errors`.

    Parameters
    ----------
    problem : AttentionProblem
    statistic : str
        One of these names.
    key_samples : int array (n_q, U) or (U,), optional
        Keys that each row, or every row, looks at, repeats counted; None: all keys, in float64
        and ``O(n_q n_k d)`` by tiles, a reference.
    mean_divisor : {"n_samples", "n_keys"}
        D = |S|, or D = nv, the number of keys that S could be drawn from, as in the public code.
    scope : {"visible", "all"}
        Whether a row looks at the keys that it sees, nv of them, or at all that are not masked,
        the future of a causal row included.
    fill : str
        Of "oracle"; see `lazy_errors`.

    Returns
    -------
    ndarray (n_q,)

    Raises
    ------
    TypeError, ValueError
        For unknown names, samples that do not fit, samples with "row_norm" and "oracle", and
        logits that overflow.

    Notes
    -----
    Zhou et al., "Informer" (2021), Lemma 1: ``ln nv <= M_i <= Mbar_i + ln nv`` with M of "m" and
    Mbar of "max_mean" over all keys; sharper, ``max(ln nv, Mbar) <= M``, so that
    ``0 <= KL_i <= Mbar_i``.  Rows that see different numbers of keys compare by KL, not by M.  A
    key added to all keys moves no statistic but those with D other than |S|.

    Examples
    --------
    >>> import numpy as np, sketchattn as sa
    >>> logits = np.log([[1.0, 2, 4], [1, 1, 1], [3, 1, 1]])
    >>> problem = sa.AttentionProblem(logits, np.eye(3), scale=1)
    >>> row_statistic(problem, "m").round(7).tolist()
    [1.252763, 1.0986123, 1.2432338]
    """
    _check_problem(problem)
    _name(statistic, "statistic", (*SAMPLED, *WHOLE))
    _name(mean_divisor, "mean_divisor", DIVISORS)
    _name(scope, "scope", SCOPES)
    samples = None
    if key_samples is not None:
        if statistic in WHOLE:
            raise ValueError(
                f"key_samples must be None for statistic {statistic!r}, which is about whole rows, "
                f"got an array; drop it"
            )
        samples = as_array(key_samples, "key_samples")
        shared = samples.ndim == 1
        samples = _check_samples(problem, samples, shared, scope, None)
    return _statistic(problem, statistic, samples, mean_divisor, scope, fill)


def _statistic(
    problem: AttentionProblem,
    statistic: str,
    samples: Array | None,
    divisor: str,
    scope: str,
    fill: str,
    reduced: Array | None = None,
) -> Array:
    """Return the statistic from checked arguments; ``reduced`` is what `_reduced` returns."""
    seen = problem.visible_counts() > 0
    if statistic == "row_norm":
        return np.where(seen, problem.exact.row_norms(), -np.inf)
    if statistic == "oracle":
        return np.where(seen, lazy_errors(problem, fill=fill), -np.inf)
    if reduced is None:
        reduced = _reduced([problem], None if samples is None else [samples], statistic, scope)[0]
    highest, total, lse, count = reduced.T
    nv = _reach_counts(problem, scope).astype(np.float64)
    some = (count > 0) & seen
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if statistic == "zero_filled":
            found = (highest if samples is None else np.maximum(highest, 0.0)) - total / nv
        else:
            mean = total / (nv if divisor == "n_keys" else count)
            found = (highest if statistic == "max_mean" else lse - np.log(count)) - mean
            if statistic == "m":
                found = found + np.log(nv)
    wrong = some & ~np.isfinite(found)
    if wrong.any():
        raise ValueError(
            f"scale * q @ k.T must be finite in float64, got an overflow in row "
            f"{int(wrong.argmax())}; make scale, q or k smaller"
        )
    return np.where(some, found, -np.inf)


def _reach_counts(problem: AttentionProblem, scope: str) -> Array:
    """Return how many keys a row may look at, int64 (n_q,)."""
    if scope == "all":
        return np.full(problem.n_q, len(problem.kept_keys))
    return problem.visible_counts()


def _last(problem: AttentionProblem, scope: str) -> Array:
    """Return the last key that a row may look at, int64 (n_q,); -1 for none."""
    if scope == "all" or not problem.causal:
        return np.full(problem.n_q, problem.n_k - 1)
    return np.clip(np.arange(problem.n_q) + problem.offset, -1, problem.n_k - 1)


def _reduced(
    problems: Sequence[AttentionProblem],
    samples: Sequence[Array] | None,
    statistic: str,
    scope: str,
) -> Array:
    """Return maximum, sum, logsumexp and number of the logits that rows look at, (H, n_q, 4).

    The heads are alike; more than one only with samples of their own for each row.
    """
    from ..kernels.probsparse import sampled_statistics, shared_statistics

    first = problems[0]
    q, last = stacked([x.arrays.q for x in problems]), _last(first, scope)
    options: dict[str, Any] = {
        "scale": first.scale,
        "exponentials": statistic in ("m", "kl"),
    }
    if samples is not None and samples[0].ndim == 2:
        chosen = stacked([np.require(x, np.int64, ["C", "W"]) for x in samples])
        return sampled_statistics(
            q, stacked([x.arrays.k for x in problems]), chosen, last, **options
        )
    keys = first.kept_keys if samples is None else np.sort(samples[0])
    return shared_statistics(
        q,
        first.arrays.k[keys].astype(np.float64)[None],
        np.searchsorted(keys, last, side="right"),
        **options,
    )


# --- arguments --------------------------------------------------------------------------------


def _check_problem(problem: object) -> None:
    if not isinstance(problem, AttentionProblem):
        raise TypeError(
            f"problem must be an AttentionProblem, got {type(problem).__name__}; "
            f"make one with sketchattn.AttentionProblem(q, k, v)"
        )


def _name(value: object, label: str, known: tuple[str, ...]) -> None:
    if not isinstance(value, str):
        raise TypeError(
            f"{label} must be a string, got {type(value).__name__}; choose one of "
            f"{', '.join(known)}"
        )
    if value not in known:
        raise ValueError(f"{label} must be a known name, got {value!r}{closest(value, known)}")


def _count(value: object, label: str, remedy: str) -> int:
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{label} must be an integer, got {type(value).__name__}; {remedy}")
    if int(value) < 1:
        raise ValueError(f"{label} must be at least 1, got {int(value)}; {remedy}")
    return int(value)


def _check_pilots(rows: Array, n_q: int, label: str) -> Array:
    """Return distinct rows in ascending order, int64."""
    if rows.size == 0 and rows.ndim == 1:
        return np.empty(0, np.int64)
    if rows.ndim != 1 or not np.issubdtype(rows.dtype, np.integer):
        raise TypeError(
            f"{label} must be a one-dimensional integer array, got {rows.dtype} of shape "
            f"{rows.shape}; give indices of queries"
        )
    ordered = np.unique(rows)
    if len(ordered) != len(rows):
        raise ValueError(
            f"{label} must be distinct, got {len(rows) - len(ordered)} repeated; give each once"
        )
    if ordered[0] < 0 or ordered[-1] >= n_q:
        wrong = ordered[0] if ordered[0] < 0 else ordered[-1]
        raise ValueError(
            f"{label} must be in 0..n_q - 1 = {n_q - 1}, got {int(wrong)}; give indices of queries"
        )
    return ordered.astype(np.int64)


def _check_samples(
    problem: AttentionProblem, samples: Array, shared: bool, scope: str, drawn: int | None
) -> Array:
    """Return sampled keys as int64: of the right shape, not masked, and seen by their rows."""
    if not np.issubdtype(samples.dtype, np.integer):
        raise TypeError(
            f"key_samples must hold integers, got {samples.dtype}; give indices of keys"
        )
    lead = () if shared else (problem.n_q,)
    wanted = ", ".join([*map(str, lead), "U" if drawn is None else str(drawn)])
    wanted = f"({wanted})" if lead else f"({wanted},)"
    if samples.ndim != len(lead) + 1 or samples.shape[:-1] != lead:
        raise ValueError(
            f"key_samples must have shape {wanted}, got {samples.shape}; give U keys "
            f"{'for all rows' if shared else 'for each row'}"
        )
    if drawn is not None and samples.shape[-1] != drawn:
        raise ValueError(
            f"key_samples must have shape {wanted}, got {samples.shape}; change samples or the draw"
        )
    if samples.size == 0:
        return samples.astype(np.int64)
    low, high = int(samples.min()), int(samples.max())
    if low < 0 or high >= problem.n_k:
        raise ValueError(
            f"key_samples must be in 0..n_k - 1 = {problem.n_k - 1}, got "
            f"{low if low < 0 else high}; give indices of keys"
        )
    chosen = samples.astype(np.int64)
    if problem.key_mask is not None and not problem.key_mask[chosen].all():
        wrong = int(chosen[~problem.key_mask[chosen]][0])
        raise ValueError(
            f"key_samples must not be masked, got key {wrong}; draw from the "
            f"{len(problem.kept_keys)} keys that are not masked"
        )
    if not shared:
        hidden = (chosen > _last(problem, scope)[:, None]).any(axis=1)
        hidden &= problem.visible_counts() > 0
        if hidden.any():
            i = int(hidden.argmax())
            raise ValueError(
                f"key_samples must be keys that their row sees, got key {int(chosen[i].max())} in "
                f"row {i}, which sees keys up to {int(_last(problem, scope)[i])}; draw for a "
                f"causal problem, or use scope='all'"
            )
    return chosen


# --- the matrix -------------------------------------------------------------------------------


class InformerAttention(SampledAttention):
    """Represent ``Ahat`` with exact rows that are streamed, and uniform weights elsewhere.

    A `SampledAttention` without columns whose replaced rows are never held: a product is one pass
    of exact attention for these queries.  For problems that are not causal.

    Parameters
    ----------
    problem : AttentionProblem
    rows : int64 array (r,)
        I, ascending.

    Attributes
    ----------
    replaced : int64 array (r,)
        I.
    """

    def __init__(self, problem: AttentionProblem, rows: Array) -> None:
        lazy = _lazy(problem, "mean", problem.dtype)
        super().__init__(
            lazy.chosen, lazy.weights, problem.n_k, len(rows), fill=lazy.fill, keys=lazy.keys
        )
        self.replaced = rows
        q, k, _ = problem.arrays
        if problem.key_mask is None:
            self.active = AttentionProblem.adopt(q[rows], k, scale=problem.scale)
        else:
            self.active = AttentionProblem(
                q[rows], k, scale=problem.scale, key_mask=problem.key_mask
            )

    @property
    def rank_bound(self) -> int:
        """Exact rows and the uniform one, at most."""
        return int(min(*self.shape, self.active.n_q + 1))

    @property
    def nbytes(self) -> int:
        """Bytes of the fill, of the exact rows' queries, and of the keys."""
        return super().nbytes + self.active.exact.nbytes

    def wide(self) -> AttentionOperator:
        """Return the same estimator of the same problem and draw in float64."""
        twin = super().wide()
        if twin is not self and isinstance(twin, InformerAttention):
            twin.active = self.active.astype(np.float64)
        return twin

    def _matmat(self, x: Array) -> Array:
        x = self._cast(x)
        product = np.empty((self.shape[0], x.shape[1]), self.dtype)
        product[:] = _lazy_row(np.asarray(self.fill), self.keys, x)
        if self.active.n_q:
            product[self.replaced] = self.active.exact @ x
        return product

    def _rmatmat(self, y: Array) -> Array:
        y = self._cast(y)
        out = super()._rmatmat(y)
        if self.active.n_q:
            out += np.asarray(self.active.exact.T @ y[self.replaced])
        return out

    def rows(self, index: Index) -> Array:
        """Return chosen rows as a dense array (len(index), n_k)."""
        chosen = pick(self.shape[0], index)
        place = np.full(self.shape[0], -1)
        place[self.replaced] = np.arange(self.active.n_q)
        exact = place[chosen]
        keys = np.ones(self.shape[1], bool) if self.keys is None else self.keys
        out = np.where(keys, np.asarray(self.fill)[chosen][:, None], self.dtype.type(0))
        if (exact >= 0).any():
            out[exact >= 0] = self.active.exact.rows(exact[exact >= 0])
        return out


class _Choices(NamedTuple):
    """What the parameters and the preset come to; None where a choice has no meaning."""

    statistic: str
    mean_divisor: str | None
    key_sampling: str | None
    scope: str | None
    fill: str
    factor: int | None


@register("informer")
class Informer(Method):
    """Compute r rows of A exactly and give all others the mean of V (ProbSparse).

    Rows are ranked by how far their logits are from flat, which a sample of U keys a row
    estimates; ties go to the smaller index.  ``Ahat V`` costs ``n_q U d + r n_k (d + d_v)``
    multiplications.

    Parameters
    ----------
    rank : int, optional
        Number of exact rows r, in 1..max(n_q, n_k); at most n_q are used, see ``effective_rank``.
        None takes ``factor``.
    samples : int, optional
        Keys U that a row looks at, drawn with replacement; more than there are keys is the number
        of keys.  None is the published U = r, or the formula of ``factor`` where that is given.
    mean_divisor : {"n_samples", "n_keys"}, optional
        What the sum of the sampled logits is divided by, by default their number.  "n_keys" is
        the public code: a vector added to all keys, which leaves A alone, then changes the rows.
    key_sampling : {"per_query", "per_head", "shared", "full"}, optional
        "per_query", the default, draws U keys for each row; "per_head" is another name for it,
        since each head has a stream of its own (the public code shares one over heads and
        batch: hand one draw to `attention`).  "shared": the same U keys for all rows, one
        product.  "full": all keys, nothing is drawn; ``O(n_q n_k d)``, a reference.
    fill : {"mean", "masked_mean", "cummean", "cumsum"}, optional
        What a lazy row gets: "mean", the default, the mean of V over the keys that are not
        masked; "masked_mean" over those that the row sees; "cummean", the same by its name for
        causal problems; "cumsum", their sum, which the public code uses there: rows of ``Ahat``
        then sum to i + 1, a wrong matrix by that factor.
    statistic : str, optional
        "max_mean", the default, "zero_filled", "m", "kl", "row_norm" or "oracle": see
        `row_statistic`; the last two look at all of A (``O(n_q n_k d)``, references), and the
        "oracle" at V.  "random" draws rows uniformly.
    scope : {"visible", "all"}, optional
        Whether the rows of a causal problem look at the keys that they see, the default, or at
        future ones too, as in the public code.
    factor : int, optional
        ``rank`` and ``samples`` that are None become ``min(factor ceil(ln n), n)`` with n = n_q
        and the number of keys; 5 in the public code.
    preset : {"paper", "released", "released_causal", "corrected", "corrected_causal"}, optional
        The choices of the paper's text, of the public code, and of this library, where
        parameters are None.  Its factor of 5 counts only where ``rank`` and ``factor`` are None.

    Raises
    ------
    TypeError, ValueError
        By `draw` and `approximate`: for parameters out of range, or that another one leaves
        without a meaning.

    Notes
    -----
    Zhou, Zhang, Peng, Zhang, Li, Xiong and Zhang, "Informer" (2021).  Its Lemma 1 is about the
    statistic alone; nothing bounds the error.  What can be said: the squared error is the sum of
    the e_i left (see `selection_regret`), and at most ``diam(V)^2 sum min(KL_i/2, 1 - e^-KL_i)``
    over the lazy rows.  A sampled maximum misses the largest key of a row with probability
    ``(1 - 1/n_k)^U``.  One very negative logit makes "m" large in a row that is nearly uniform;
    "row_norm" does not have this fault.

    Causal problems are honoured by "cummean", "cumsum" and "masked_mean": ``Ahat`` has no weight
    above the diagonal.  But whether a row is among the r on top still depends on later rows:
    this approximates the causal matrix and is no autoregressive decoder.  Compare rows by "kl"
    there, which allows for the number of keys that a row sees.

    Masked keys enter no maximum, mean or logsumexp, and not the mean of V; a row that sees no key
    is never selected and is zero.  Padded queries: cut them off, or hand in ``pilot_rows``.

    The draw holds ``key_samples``, int64 (n_q, U), or (U,) if shared, or ``pilot_rows`` for
    "random".  A draw that is handed in may hold ``pilot_rows``, the exact rows I, in place of the
    samples or beside them: then they are used, at most r of any number, without a ranking.

    Statistics are computed in float64: two rows whose order float32 cannot tell apart would
    make the result another one.  Without ``causal`` exact rows are streamed, never held.

    Examples
    --------
    >>> import sketchattn as sa
    >>> problem = sa.make_heads("gaussian", n=64, d=8, rng=0)[0]
    >>> method = sa.Informer(rank=16, samples=8)
    >>> draw = method.draw(problem, rng=0)
    >>> draw["key_samples"].shape
    (64, 8)
    >>> ahat = method.approximate(problem, draw=draw)
    >>> ahat.effective_rank, ahat.rank_bound
    (16, 17)
    >>> sa.Informer(preset="released").budget(problem)
    (25, 25)
    """

    draw_names = ("key_samples",)

    def __init__(
        self,
        rank: int | None = None,
        samples: int | None = None,
        mean_divisor: str | None = None,
        key_sampling: str | None = None,
        fill: str | None = None,
        statistic: str | None = None,
        scope: str | None = None,
        factor: int | None = None,
        preset: str | None = None,
    ) -> None:
        self.rank = rank
        self.samples = samples
        self.mean_divisor = mean_divisor
        self.key_sampling = key_sampling
        self.fill = fill
        self.statistic = statistic
        self.scope = scope
        self.factor = factor
        self.preset = preset

    @property
    def choices(self) -> _Choices:
        """The choices that the parameters and the preset come to; not checked."""
        known = isinstance(self.preset, str) and self.preset in PRESETS
        preset = PRESETS[str(self.preset)] if known else {}

        def of(name: str, default: Any) -> Any:
            given = getattr(self, name)
            return preset.get(name, default) if given is None else given

        statistic = of("statistic", "max_mean")
        sampled = statistic in SAMPLED
        averaged = sampled and statistic != "zero_filled"
        sampling = "per_query" if sampled else ("full" if statistic in WHOLE else None)
        return _Choices(
            statistic,
            of("mean_divisor", "n_samples") if averaged else None,
            sampling if self.key_sampling is None else self.key_sampling,
            of("scope", "visible") if sampled else None,
            of("fill", "mean" if statistic != "oracle" else "masked_mean"),
            of("factor", None) if self.factor is not None or self.rank is None else None,
        )

    @property
    def traits(self) -> Traits:
        """Causal problems by the fills that end with a row's sight; "cumsum" only plain ones."""
        c = self.choices
        oracle = c.statistic == "oracle"
        plain = c.fill != "cumsum"
        return Traits(
            causal=c.fill in CAUSAL_FILLS and not oracle,
            key_mask=plain,
            autoregressive=c.statistic == "random",
            rectangular=plain,
            randomized=c.key_sampling != "full",
            row_stochastic=plain,
            nonnegative=True,
            oracle=oracle,
            claims=CLAIMS,
        )

    # --- arguments --------------------------------------------------------------------------

    def check(self, problem: AttentionProblem) -> None:
        """Refuse a problem that this method cannot honour, or hyper-parameters out of range."""
        _check_problem(problem)
        c = self.choices
        if problem.causal and c.fill not in CAUSAL_FILLS:
            raise ValueError(
                f"causal must be False for method {self.name!r} with fill {c.fill!r}, got "
                f"{problem.causal!r}; use preset='corrected_causal'"
            )
        # A problem has n_q rows to choose from; more than n_k of them where there are more.
        tall = isinstance(self.rank, numbers.Integral) and problem.n_k < self.rank <= problem.n_q
        if not tall and not (self.rank is None and c.factor is not None):
            check_rank(self.rank, problem.n_k)
        self._check_parameters()
        _check_fill(problem, c.fill)
        if c.statistic == "oracle":
            _ = problem.values

    def _check_parameters(self) -> None:
        if self.preset is not None:
            _name(self.preset, "preset", tuple(PRESETS))
        c = self.choices
        _name(c.statistic, "statistic", STATISTICS)
        for label, value, names in (
            ("mean_divisor", self.mean_divisor, DIVISORS),
            ("key_sampling", self.key_sampling, SAMPLINGS),
            ("fill", self.fill, FILLS),
            ("scope", self.scope, SCOPES),
        ):
            if value is not None:
                _name(value, label, names)
        if c.statistic not in SAMPLED and self.key_sampling not in (
            (None, "full") if c.statistic in WHOLE else (None,)
        ):
            raise ValueError(
                f"key_sampling must be None for statistic {c.statistic!r}, which samples no keys, "
                f"got {self.key_sampling!r}; drop it"
            )
        for label, useful in (
            ("mean_divisor", c.mean_divisor is not None),
            ("scope", c.scope is not None),
            ("samples", c.key_sampling not in ("full", None)),
        ):
            given = getattr(self, label)
            if given is not None and not useful:
                raise ValueError(
                    f"{label} must be None for statistic {c.statistic!r} with key_sampling "
                    f"{c.key_sampling!r}, which has no use for it, got {given!r}; drop it"
                )
        if self.samples is not None:
            _count(self.samples, "samples", "give the number of keys that a row looks at")
        if self.factor is not None:
            _count(self.factor, "factor", "5 is the factor of the public code")
            drawn = self.samples is None and c.key_sampling not in ("full", None)
            if self.rank is not None and not drawn:
                raise ValueError(
                    f"factor must be None where rank and samples are given or not needed, got "
                    f"{self.factor!r}; drop it, or rank"
                )

    def budget(self, problem: AttentionProblem) -> tuple[int, int]:
        """Return how many rows are exact, if as many see a key, and how many keys each samples.

        Parameters
        ----------
        problem : AttentionProblem

        Returns
        -------
        (int, int)
            r and U; U is 0 for statistics that sample no keys.
        """
        self.check(problem)
        return self._budget(problem)

    def _budget(self, problem: AttentionProblem) -> tuple[int, int]:
        c = self.choices
        keys = len(problem.kept_keys)
        if self.rank is None:
            rows = published_count(problem.n_q, int(c.factor or 0))
        else:
            rows = min(int(self.rank), problem.n_q)
        if c.key_sampling in ("full", None):
            return rows, 0
        if self.samples is not None:
            return rows, min(int(self.samples), keys)
        if c.factor is not None:
            return rows, published_count(keys, int(c.factor))
        return rows, min(int(self.rank or 0), keys)

    # --- draw -------------------------------------------------------------------------------

    def _draw(self, problem: AttentionProblem, rng: np.random.Generator) -> Draw:
        c = self.choices
        rows, drawn = self._budget(problem)
        if c.statistic == "random":
            seen = np.flatnonzero(problem.visible_counts() > 0)
            return Draw(pilot_rows=rng.permutation(seen)[:rows])
        if c.key_sampling == "full":
            return Draw()
        kept = problem.kept_keys
        if c.key_sampling == "shared":
            positions = rng.integers(0, max(len(kept), 1), drawn)
        else:
            counts = _reach_counts(problem, str(c.scope))
            # One bound for all rows is drawn several times faster than one for each.
            same = not problem.causal or c.scope == "all"
            bound: Any = max(len(kept), 1) if same else np.maximum(counts, 1)[:, None]
            positions = rng.integers(0, bound, (problem.n_q, drawn))
        # Positions among the keys that are not masked: masked keys might as well not exist.
        chosen = positions if problem.key_mask is None else kept[positions]
        return Draw(key_samples=chosen)

    def _check_draw(self, problem: AttentionProblem, draw: Mapping[str, Any]) -> Draw:
        c = self.choices
        sampled = c.key_sampling not in ("full", None)
        names: tuple[str, ...] = ("key_samples",) if sampled else ()
        if c.statistic == "random":
            names = ("pilot_rows",)
        elif isinstance(draw, Mapping) and "pilot_rows" in draw:
            names = tuple(x for x in names if x in draw) + ("pilot_rows",)
        checked = check_draw(draw, names)
        rows, drawn = self._budget(problem)
        if "key_samples" in checked:
            checked["key_samples"] = _check_samples(
                problem, checked["key_samples"], c.key_sampling == "shared", str(c.scope), drawn
            )
        if "pilot_rows" in checked:
            pilots = _check_pilots(checked["pilot_rows"], problem.n_q, "pilot_rows")
            if len(pilots) > rows:
                raise ValueError(
                    f"pilot_rows must hold at most {rows} rows for rank = {self.rank}, got "
                    f"{len(pilots)}; change rank or the draw"
                )
            blind = np.setdiff1d(pilots, np.flatnonzero(problem.visible_counts() > 0))
            if len(blind):
                raise ValueError(
                    f"pilot_rows must be rows that see a key, got {int(blind[0])}; its output is "
                    f"zero"
                )
            checked["pilot_rows"] = pilots
        return checked

    # --- what it makes ----------------------------------------------------------------------

    def select(
        self,
        problem: AttentionProblem,
        rng: Rng = None,
        *,
        draw: Mapping[str, Any] | None = None,
    ) -> Array:
        """Return the rows I that are computed exactly, int64, the highest statistic first.

        Parameters
        ----------
        problem, rng, draw
            As for `approximate`.

        Returns
        -------
        ndarray (r,)
            Fewer where fewer rows see a key.

        Examples
        --------
        >>> import sketchattn as sa
        >>> problem = sa.make_heads("gaussian", n=64, d=8, rng=0)[0]
        >>> rows = sa.Informer(rank=16, statistic="oracle").select(problem)
        >>> sa.selection_regret(problem, rows).regret
        0.0
        """
        return self._select(problem, self._checked(problem, rng, draw))

    def _select(self, problem: AttentionProblem, draw: Draw) -> Array:
        if "pilot_rows" in draw:
            return draw["pilot_rows"]
        return self._ranked(problem, draw, None)

    def _ranked(self, problem: AttentionProblem, draw: Draw, reduced: Array | None) -> Array:
        """Return the rows on top by their statistic, the highest first."""
        c = self.choices
        found = _statistic(
            problem,
            c.statistic,
            draw.get("key_samples"),
            c.mean_divisor or "n_samples",
            c.scope or "visible",
            c.fill,
            reduced,
        )
        seen = np.flatnonzero(problem.visible_counts() > 0)
        order = np.argsort(-found[seen], kind="stable")
        return seen[order[: self._budget(problem)[0]]]

    def _approximate(self, problem: AttentionProblem, draw: Draw) -> AttentionOperator:
        rows = np.sort(self._select(problem, draw))
        if not problem.causal:
            return InformerAttention(problem, rows)
        lazy = _lazy(problem, self.choices.fill, problem.dtype)
        return SampledAttention(
            lazy.chosen,
            lazy.weights,
            problem.n_k,
            len(rows),
            fill=lazy.fill,
            keys=lazy.keys,
            offset=lazy.offset,
            rows=rows,
            row_weights=problem.exact.rows(rows),
        )

    def _attend_heads(
        self,
        problems: Sequence[AttentionProblem],
        rngs: Sequence[Rng],
        draw: Mapping[str, Any] | None,
    ) -> Array:
        """Return ``Ohat`` (H, n_q, d_v) with few passes over all heads.

        Rows that look at keys of their own are ranked for all heads in one pass, and the exact
        rows of all heads are another; causal problems are computed one by one.
        """
        c, first = self.choices, problems[0]
        one_pass = c.key_sampling == "per_query" and not first.causal
        # Heads with few keys may look at fewer; a head with many fills the threads by itself.
        looks = {self.budget(problem)[1] for problem in problems}
        if not one_pass or len(looks) > 1 or first.n_k >= 2 * PART_KEYS:
            return super()._attend_heads(problems, rngs, draw)
        draws = [self._checked(x, rng, draw) for x, rng in zip(problems, rngs, strict=True)]
        values = stacked([np.asarray(x.values) for x in problems])
        if any("pilot_rows" in x for x in draws):
            chosen = [self._select(x, y) for x, y in zip(problems, draws, strict=True)]
        else:
            samples = [x["key_samples"] for x in draws]
            reduced = _reduced(problems, samples, c.statistic, c.scope or "visible")
            ranked = zip(problems, draws, reduced, strict=True)
            chosen = [self._ranked(x, y, z) for x, y, z in ranked]
        out = np.empty((len(problems), first.n_q, values.shape[2]), first.dtype)
        for head, problem, x in zip(out, problems, values, strict=True):
            fill = _fill_weights(problem, c.fill).astype(first.dtype)
            head[:] = _lazy_row(fill, problem.key_mask, x)
        sizes = np.array([len(rows) for rows in chosen])
        for size in np.unique(sizes[sizes > 0]):
            group = np.flatnonzero(sizes == size).tolist()
            rows = np.sort(np.stack([chosen[h] for h in group]), axis=1)
            exact, lse = solve_rows_of_heads([problems[h] for h in group], rows, values[group])
            for head in lse:
                check_logits(head)
            out[np.array(group)[:, None], rows] = exact
        return out
