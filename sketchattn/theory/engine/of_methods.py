"""What claims about methods share: the problem of an instance, and the method that is observed.

To check another implementation, hand it in as ``sketch``: each topic says how it is called.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np

from ...problem import AttentionProblem
from .arguments import Array
from .checking import default_factory
from .instances import Instance
from .registry import Assumption, Context

# Identities are observed up to this, relative to the size of the values: rounding of sums and
# exponentials of up to 2048 numbers, with room.
ROUNDING = 1e-10


def _test_rows(seen: Instance) -> str | None:
    if seen.problem is not None:
        return None if (seen.problem.visible_counts() > 0).all() else "has rows without a key"
    if (seen.a <= 0).any():
        return "has weights that are not positive, and no queries and keys"
    return None if seen.stochastic else "has rows that do not sum to one"


def _test_causal(seen: Instance) -> str | None:
    causal = seen.problem is not None and seen.problem.causal
    return "is causal: its rows see different keys" if causal else None


ROWS = Assumption("queries and keys are known, or all weights are positive", _test_rows)
NOT_CAUSAL = Assumption("all rows see the same keys", _test_causal)


def problem_of(instance: Instance) -> AttentionProblem:
    """Return the problem of an instance in float64; of a pair (A, V) one with logits ``ln A``."""

    def make() -> AttentionProblem:
        problem = instance.problem
        if problem is None:
            return AttentionProblem(np.log(instance.a), np.eye(instance.n), instance.v, scale=1.0)
        if problem.causal or problem.key_mask is None:
            return problem.astype(np.float64)
        # Masked keys might as well not exist; positions are those of the instance's columns.
        kept = problem.kept_keys
        q, k, v = (np.asarray(x, np.float64) for x in (problem.q, problem.k, problem.values))
        return AttentionProblem(q, k[kept], v[kept], scale=problem.scale)

    return instance.cached("float64 problem", make)


def is_default(context: Context) -> bool:
    """Return whether no other implementation was handed in."""
    return context.factory is default_factory


def few(context: Context, most: int = 20) -> Iterator[np.random.Generator]:
    """Yield the generators of some trials: a deterministic statement needs few, if they are dear.

    At most ``most``, and three where A has more than 10^4 entries.
    """
    small = context.instance.m * context.instance.n <= 10**4
    return islice(context.generators(), most if small else min(most, 3))


def implemented(
    context: Context, kind: str, r: int, rng: np.random.Generator, **parameters: Any
) -> Array:
    """Return what the implementation that was handed in makes, as float64."""
    found = context.operator(kind, r, context.instance.n, rng, **parameters)
    return np.asarray(found, np.float64)


def largest(x: Array) -> float:
    """Return the largest absolute value, 0 for none."""
    return float(np.abs(x).max(initial=0.0))
