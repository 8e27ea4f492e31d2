"""What columns are drawn by: pilot rows, and laws made of them, of the values, or of all rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...base.arguments import check_logits, stacked
from ...operators.solve import solve_rows_of_heads
from ...problem import AttentionProblem
from ...sampling.laws import (
    log_column_norms,
    log_column_norms_of_heads,
    log_norms,
    probabilities,
)
from .components import SHARED_STREAM

Array = NDArray[Any]


class Pilots(NamedTuple):
    """Hold the pilot rows of heads, ascending, as often as drawn: logsumexp, and ``A_I V``."""

    rows: Array
    lse: Array
    output: Array


def seeing_rows(problem: AttentionProblem) -> Array:
    """Return the rows that see a key."""
    if not problem.causal and problem.key_mask is None:
        return np.arange(problem.n_q if problem.n_k else 0)
    return np.flatnonzero(problem.visible_counts())


def shared_stream(rng: np.random.Generator) -> np.random.Generator | None:
    """Return the stream that all heads of a batch entry share; None for a stream of its own."""
    seed = getattr(rng.bit_generator, "seed_seq", None)
    if not isinstance(seed, np.random.SeedSequence) or len(seed.spawn_key) != 2:
        return None
    key = (*seed.spawn_key[:-1], SHARED_STREAM)
    return np.random.default_rng(np.random.SeedSequence(seed.entropy, spawn_key=key))


def stacked_values(problems: Sequence[AttentionProblem]) -> Array:
    """Return the values of problems that have them, (H, n_k, d_v)."""
    return stacked([x.arrays.v for x in problems if x.arrays.v is not None])


def solve_pilots(
    problems: Sequence[AttentionProblem], drawn: Sequence[Array], with_values: bool
) -> Pilots:
    """Return the pilot rows of heads that are alike, solved; ``A_I V`` only if it is asked for."""
    rows = np.sort(np.stack(drawn), axis=1)
    values = stacked_values(problems) if with_values else None
    output, lse = solve_rows_of_heads(problems, rows, values)
    for head in lse:
        check_logits(head)
    return Pilots(rows, lse, output)


def log_laws(
    problems: Sequence[AttentionProblem],
    law: str | ArrayLike,
    pilots: Pilots | None,
    mix: float,
    center: bool,
) -> Array:
    """Return ``ln p`` of the law of heads that are alike, float64 (H, n_k), -inf for no chance."""
    first = problems[0]
    keep = np.ones((len(problems), first.n_k), bool)
    for row, problem in zip(keep, problems, strict=True):
        if problem.key_mask is not None:
            row[:] = problem.key_mask
    if not isinstance(law, str):
        with np.errstate(divide="ignore"):
            log_p = np.stack([np.log(probabilities(law, x)) for x in problems])
    elif law == "uniform":
        log_p = np.zeros(keep.shape)
    else:
        log_p = log_norms(stacked([_law_values(x, center) for x in problems]))
        if law == "pilot" and pilots is not None:
            log_p += log_column_norms_of_heads(problems, pilots.rows, pilots.lse)
        elif law == "optimal":
            rows = np.arange(first.n_q)
            log_p += np.stack([log_column_norms(x, rows, x.logsumexp) for x in problems])
    log_p[~keep] = -np.inf
    log_p = _normalized(log_p, keep)
    if mix > 0:
        with np.errstate(divide="ignore"):
            rest = np.log1p(-mix)
            even = np.log(mix / keep.sum(axis=1, keepdims=True))
        log_p = np.where(keep, np.logaddexp(rest + log_p, even), log_p)
    return log_p


def _law_values(problem: AttentionProblem, center: bool) -> Array:
    """Return what the law takes for V: zero where masked, without the mean if that is asked."""
    _ = problem.values  # refuses a problem without them
    values = problem.arrays.v
    assert values is not None
    if center and len(problem.kept_keys):
        mean = values[problem.kept_keys].mean(axis=0, dtype=np.float64)
        values = (values - mean).astype(values.dtype)
    if problem.key_mask is not None:
        values = np.where(problem.key_mask[:, None], values, values.dtype.type(0))
    return values


def _normalized(log_p: Array, keep: Array) -> Array:
    """Return ``ln p`` (H, n_k) with sums one; uniform on ``keep`` where no key has a chance."""
    top = log_p.max(axis=1, initial=-np.inf, keepdims=True)
    void = np.isneginf(top)
    with np.errstate(divide="ignore"):
        total = np.log(np.exp(log_p - np.where(void, 0, top)).sum(axis=1, keepdims=True))
        even = -np.log(np.maximum(keep.sum(axis=1, keepdims=True), 1))
    return np.where(void, np.where(keep, even, -np.inf), log_p - np.where(void, 0, top + total))
