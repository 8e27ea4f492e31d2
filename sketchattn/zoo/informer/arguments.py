"""What Informer's functions may be given."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...problem import AttentionProblem

Array = NDArray[Any]
DIVISORS = ("n_samples", "n_keys")
SAMPLINGS = ("per_query", "per_head", "shared", "full")
SCOPES = ("visible", "all")


def check_pilots(rows: Array, n_q: int, label: str) -> Array:
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


def check_samples(
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
        hidden = (chosen > last_key(problem, scope)[:, None]).any(axis=1)
        hidden &= problem.visible_counts() > 0
        if hidden.any():
            i = int(hidden.argmax())
            raise ValueError(
                f"key_samples must be keys that their row sees, got key {int(chosen[i].max())} in "
                f"row {i}, which sees keys up to {int(last_key(problem, scope)[i])}; draw for a "
                f"causal problem, or use scope='all'"
            )
    return chosen


def last_key(problem: AttentionProblem, scope: str) -> Array:
    """Return the last key that a row may look at, int64 (n_q,); -1 for none."""
    if scope == "all" or not problem.causal:
        return np.full(problem.n_q, problem.n_k - 1)
    return np.clip(np.arange(problem.n_q) + problem.offset, -1, problem.n_k - 1)
