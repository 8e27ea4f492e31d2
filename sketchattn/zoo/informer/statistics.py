"""Statistics of rows: how far the weights of a query are from uniform, exact or from samples."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...base.arguments import as_array, check_name, stacked
from ...base.floating import without_floating_errors
from ...kernels._threads import map_pieces
from ...problem import AttentionProblem
from ..base import check_problem
from .arguments import DIVISORS, SCOPES, check_samples, last_key
from .lazy import lazy_errors

Array = NDArray[Any]

# Statistics of sampled logits, in the order of the docstring; and those of whole rows.
SAMPLED = ("max_mean", "zero_filled", "m", "kl")
WHOLE = ("row_norm", "oracle")
# Those that need a logsumexp.
EXPONENTIALS = ("m", "kl")
STATISTICS = (*SAMPLED, *WHOLE, "random")

# Keys drawn at a time by one thread: half a megabyte, which a second-level cache holds.
DRAWN_ENTRIES = 1 << 16


@without_floating_errors
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
        ``D = |S|``, or ``D = nv``, the number of keys that S could be drawn from, as in the
        public code.
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
    key added to all keys moves no statistic but those with ``D != |S|``.

    Examples
    --------
    >>> import numpy as np, sketchattn as sa
    >>> logits = np.log([[1.0, 2, 4], [1, 1, 1], [3, 1, 1]])
    >>> problem = sa.AttentionProblem(logits, np.eye(3), scale=1)
    >>> row_statistic(problem, "m").round(7).tolist()
    [1.252763, 1.0986123, 1.2432338]
    """
    check_problem(problem)
    check_name(statistic, "statistic", (*SAMPLED, *WHOLE))
    check_name(mean_divisor, "mean_divisor", DIVISORS)
    check_name(scope, "scope", SCOPES)
    samples = None
    if key_samples is not None:
        if statistic in WHOLE:
            raise ValueError(
                f"key_samples must be None for statistic {statistic!r}, which is about whole rows, "
                f"got an array; drop it"
            )
        samples = as_array(key_samples, "key_samples")
        shared = samples.ndim == 1
        samples = check_samples(problem, samples, shared, scope, None)
    return compute_statistic(problem, statistic, samples, mean_divisor, scope, fill)


def compute_statistic(
    problem: AttentionProblem,
    statistic: str,
    samples: Array | None,
    divisor: str,
    scope: str,
    fill: str,
    reduced: Array | None = None,
) -> Array:
    """Return the statistic from checked arguments.

    ``reduced`` is what `reduce_samples` returns for samples, which are not needed then.
    """
    whole = samples is None and reduced is None
    seen = problem.visible_counts() > 0
    if statistic == "row_norm":
        return np.where(seen, problem.exact.row_norms(), -np.inf)
    if statistic == "oracle":
        return np.where(seen, lazy_errors(problem, fill=fill), -np.inf)
    if reduced is None:
        reduced = reduce_samples(
            [problem], None if samples is None else [samples], statistic, scope
        )[0]
    highest, total, lse, count = reduced.T
    nv = reach_counts(problem, scope).astype(np.float64)
    some = (count > 0) & seen
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if statistic == "zero_filled":
            found = (highest if whole else np.maximum(highest, 0.0)) - total / nv
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


def reach_counts(problem: AttentionProblem, scope: str) -> Array:
    """Return how many keys a row may look at, int64 (n_q,)."""
    if scope == "all":
        return np.full(problem.n_q, len(problem.kept_keys))
    return problem.visible_counts()


def draw_and_reduce(
    problems: Sequence[AttentionProblem],
    rngs: Sequence[np.random.Generator],
    drawn: int,
    statistic: str,
) -> Array:
    """Draw ``drawn`` of all keys for each row, and return what `reduce_samples` makes of them.

    The numbers are those of one ``rng.integers`` a head.  A stream is drawn from in its order, by
    one thread at a time, while others reduce the rows that were drawn before; no more than these
    is held.
    """
    from ...kernels.probsparse import SAMPLED_TILE, sampled_statistics

    first = problems[0]
    step = max(SAMPLED_TILE, DRAWN_ENTRIES // max(drawn, 1))
    pieces = [
        (h, slice(i, min(i + step, first.n_q)))
        for h in range(len(problems))
        for i in range(0, first.n_q, step)
    ]
    last, kept = last_key(first, "all"), [x.kept_keys for x in problems]
    out = np.empty((len(problems), first.n_q, 4))
    turn, lock = iter(pieces), threading.Lock()

    def next_piece(_: object) -> None:
        with lock:
            h, rows = next(turn)
            size = rows.stop - rows.start, drawn
            positions = rngs[h].integers(0, max(len(kept[h]), 1), size)
        if problems[h].key_mask is not None:
            positions = kept[h][positions]
        q, k, _ = problems[h].arrays
        out[h, rows] = sampled_statistics(
            q[None, rows],
            k[None],
            positions[None],
            last[rows],
            scale=first.scale,
            exponentials=statistic in EXPONENTIALS,
        )[0]

    for _ in map_pieces(next_piece, pieces):
        pass
    return out


def reduce_samples(
    problems: Sequence[AttentionProblem],
    samples: Sequence[Array] | None,
    statistic: str,
    scope: str,
) -> Array:
    """Return maximum, sum, logsumexp and number of the logits that rows look at, (H, n_q, 4).

    The heads are alike; more than one only with samples of their own for each row.
    """
    from ...kernels.probsparse import sampled_statistics, shared_statistics

    first = problems[0]
    q, last = stacked([x.arrays.q for x in problems]), last_key(first, scope)
    options: dict[str, Any] = {
        "scale": first.scale,
        "exponentials": statistic in EXPONENTIALS,
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
