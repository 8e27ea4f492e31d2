"""Exact products of rows of A, never held, and the logsumexp of their logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..base.arguments import check_logits, prepare, stacked
from ..base.head import Head
from ..kernels._threads import product
from .steep import softmax_tiles, steep_rows, tiles_of

Array = NDArray[Any]


def row_softmax(logits: Array) -> Array:
    """Turn logits into ``rowsoftmax(logits)`` in place; a row of -inf becomes zeros."""
    top = logits.max(axis=1, keepdims=True, initial=-np.inf)
    logits -= np.where(np.isfinite(top), top, 0)
    weights: Array = np.exp(logits, out=logits)
    total = weights.sum(axis=1, keepdims=True)
    np.divide(weights, total, out=weights, where=total > 0)
    return weights


def softmax_over(problem: Head, columns: Array, weights: Array | None = None) -> Array:
    """Return ``rowsoftmax(L_ij + ln w_j)`` over chosen keys, (n_q, t); empty rows are zero.

    ``columns`` int (t,) are keys that are not masked, ``weights (t,)`` are positive; None is 1.
    """
    q, k, _ = problem.arrays
    logits: Array = product(problem.dtype.type(problem.scale) * q, k[columns].T)
    if weights is not None:
        logits += np.log(weights).astype(problem.dtype)
    if problem.causal:
        logits[columns[None, :] > (np.arange(problem.n_q) + problem.offset)[:, None]] = -np.inf
    weights_made = row_softmax(logits)
    steep = steep_rows(problem)
    for positions, wide in tiles_of(problem, steep):
        chosen = wide[:, columns]
        if weights is not None:
            chosen += np.log(weights)
        weights_made[steep[positions]] = row_softmax(chosen)
    return weights_made


def solve_over(
    problem: Head, columns: Array, x: Array, log_weights: Array | None = None
) -> tuple[Array, Array]:
    """Return ``(W X_J, lse)`` with ``W = softmax_over(problem, J, exp(log_weights))``, W not held.

    ``lse_i = logsumexp_t (L_ij + log_weights_t)``, ``j = columns_t`` int (t,), keys that are not
    masked; ``x (t, m)`` are the rows of the chosen keys, ``log_weights (t,)`` None is 0.
    """
    from ..kernels.softmax import softmax_product

    if log_weights is not None and len(log_weights) and (log_weights == log_weights[0]).all():
        # Equal weights shift all logits of a row alike: nothing has to be added to each.
        out, lse = solve_over(problem, columns, x)
        return out, lse + problem.dtype.type(log_weights[0])
    q, k, _ = problem.arrays
    bias = None if log_weights is None else log_weights.astype(problem.dtype)
    options: dict[str, Any] = {}
    if problem.causal:
        visible = columns[None, :] <= (np.arange(problem.n_q) + problem.offset)[:, None]
        hidden = problem.dtype.type(-np.inf)
        options["mask"] = (visible if bias is None else np.where(visible, bias, hidden))[None]
    elif bias is not None:
        options["mask"] = bias[None, None]
    x = prepare(x, problem.dtype)
    made, lses = softmax_product(q[None], k[columns][None], x[None], scale=problem.scale, **options)
    out, lse = made[0], lses[0]
    steep = steep_rows(problem)
    for positions, wide in tiles_of(problem, steep):
        chosen = wide[:, columns]
        if log_weights is not None:
            chosen += log_weights
        top = chosen.max(axis=1, initial=-np.inf)
        top = np.where(np.isfinite(top), top, 0)
        with np.errstate(divide="ignore", under="ignore"):
            lse[steep[positions]] = top + np.log(np.exp(chosen - top[:, None]).sum(axis=1))
        out[steep[positions]] = product(row_softmax(chosen), x.astype(np.float64, copy=False))
    return out, lse


def _problem_masks(problem: Head) -> dict[str, Any]:
    mask = problem.key_mask
    return {
        "first": np.array([problem.offset]),
        "right": 0 if problem.causal else None,
        "key_mask": None if mask is None else mask[None].copy(),
    }


def solve(problem: Head, x: Array | None, factor: float = 1.0) -> tuple[Array, Array]:
    """Return ``(A X, logsumexp)`` of a problem, with its logits times ``factor``."""
    from ..kernels.softmax import softmax_product

    q, k, _ = problem.arrays
    x = np.empty((problem.n_k, 0), problem.dtype) if x is None else x
    out, lse = softmax_product(
        q[None], k[None], x[None], scale=factor * problem.scale, **_problem_masks(problem)
    )
    if factor == 1:
        _solve_steep(problem, np.arange(problem.n_q), x, out[0], lse[0])
    return out[0], lse[0]


def _solve_steep(problem: Head, rows: Array, x: Array, out: Array, lse: Array) -> None:
    """Put the steep ones of chosen rows into ``A_I X`` (s, m) and their logsumexp (s,)."""
    steep = np.flatnonzero(np.isin(rows, steep_rows(problem)))
    values = x.astype(np.float64, copy=False) if len(steep) else x
    for positions, weights, normalizer in softmax_tiles(problem, rows[steep]):
        out[steep[positions]] = product(weights, values)
        lse[steep[positions]] = normalizer


def normalizer(problem: Head) -> Array:
    """Return the logsumexp of a problem in float64, from logits in float64; computed once."""
    if problem.dtype == np.float64:
        return solution(problem)[1]
    wide = problem.astype(np.float64)
    return problem.cached("normalizer", lambda: solve(wide, None)[1])


def solution(problem: Head) -> tuple[Array, Array]:
    """Return the exact output ``A V`` and the logsumexp of a problem, computed once, read-only."""

    def compute() -> tuple[Array, Array]:
        out, lse = solve(problem, problem.arrays.v)
        check_logits(lse)
        return _read_only(out, lse)

    return problem.cached("solution", compute)


def keep_solution(problem: Head, out: Array, lse: Array) -> None:
    """Keep an exact output and logsumexp that were found elsewhere as those of a new problem."""
    problem.cached("solution", lambda: _read_only(out, lse))


def _read_only(out: Array, lse: Array) -> tuple[Array, Array]:
    out.flags.writeable = False
    lse.flags.writeable = False
    return out, lse


# Keys in a part of a product with few rows, and how many parts there are at most.
PART_KEYS, MOST_PARTS = 2048, 16


def solve_rows(problem: Head, rows: Array, x: Array | None) -> tuple[Array, Array]:
    """Return ``(A_I X, logsumexp_I)`` of the rows I (s,) of a problem; A_I is never held."""
    out, lse = solve_rows_of_heads([problem], rows[None], None if x is None else x[None])
    return out[0], lse[0]


def solve_rows_of_heads(
    problems: Sequence[Head], rows: Array, x: Array | None
) -> tuple[Array, Array]:
    """Return ``(A_I X, logsumexp_I)`` of heads that are alike, (H, s, m) and (H, s).

    ``problems`` differ in their arrays and masks only; ``rows`` int (H, s), ``x (H, n_k, m)``.
    Neither the number of heads nor what the others hold changes a bit of a head.
    """
    first = problems[0]
    x = np.empty((len(rows), first.n_k, 0), first.dtype) if x is None else x
    out, lse = _solve_rows_of_heads(problems, rows, x)
    for h, problem in enumerate(problems):
        _solve_steep(problem, rows[h], x[h], out[h], lse[h])
    return out, lse


def _solve_rows_of_heads(problems: Sequence[Head], rows: Array, x: Array) -> tuple[Array, Array]:
    """Return the same by one pass of the kernel."""
    from ..kernels.softmax import row_tile, softmax_product

    first = problems[0]
    heads, count = rows.shape
    q = np.stack([problem.arrays.q[i] for problem, i in zip(problems, rows, strict=True)])
    if first.n_k >= 2 * PART_KEYS and not first.causal and count < PART_KEYS:
        made = [_solve_in_parts(*args) for args in zip(problems, q, x, strict=True)]
        return stacked([out for out, _ in made]), stacked([lse for _, lse in made])
    options: dict[str, Any] = {"scale": first.scale, "tile": row_tile(count)}
    masked = any(problem.key_mask is not None for problem in problems)
    if masked:
        everything = np.ones(first.n_k, bool)
        masks = (everything if y.key_mask is None else y.key_mask for y in problems)
        options["key_mask"] = np.stack(list(masks))
    k = stacked([problem.arrays.k for problem in problems])
    slab = np.arange(heads)
    if first.causal:
        # Each row has a position of its own: to the kernel it is a head, and all share the keys.
        options |= {"first": rows.ravel() + first.offset, "right": 0, "group": max(count, 1)}
        q, slab = q.reshape(heads * count, 1, first.d), np.repeat(slab, count)
    if masked:
        options["key_slab"] = slab
    out, lse = softmax_product(q, k, x, **options)
    return out.reshape(heads, count, x.shape[2]), lse.reshape(heads, count)


def _solve_in_parts(problem: Head, q: Array, x: Array) -> tuple[Array, Array]:
    """Return the same for the queries ``q (s, d)`` of one head with many keys."""
    from ..kernels.softmax import softmax_product

    n_k, (k, mask) = problem.n_k, (problem.arrays.k, problem.key_mask)
    # Few rows make few tiles, so keys are split as well: parts of them are heads to the kernel.
    # With lse_c of part c, lse = logsumexp_c lse_c and A_I X = sum_c exp(lse_c - lse) (A_I X)_c.
    parts = min(MOST_PARTS, n_k // PART_KEYS)
    width = n_k // parts
    made = []
    for start, heads in ((0, parts), (width * parts, 1)):
        stop = start + heads * width if start == 0 else n_k
        if start == stop:
            continue
        keys, values = (
            y[start:stop].reshape(heads, (stop - start) // heads, y.shape[1]) for y in (k, x)
        )
        made.append(
            softmax_product(
                np.repeat(q[None], heads, axis=0),
                keys,
                values,
                scale=problem.scale,
                key_mask=None if mask is None else mask[start:stop].reshape(heads, -1).copy(),
                key_slab=np.arange(heads),
            )
        )
    outs, lses = (np.concatenate([part[i] for part in made]) for i in (0, 1))
    top = lses.max(axis=0)
    shares = np.exp(lses - np.where(np.isneginf(top), 0, top))
    total = shares.sum(axis=0)
    seen = total > 0
    shares /= np.where(seen, total, 1)
    with np.errstate(divide="ignore"):
        lse = np.where(seen, top + np.log(total), -np.inf).astype(problem.dtype)
    return np.einsum("cs,csm->sm", shares, outs), lse
