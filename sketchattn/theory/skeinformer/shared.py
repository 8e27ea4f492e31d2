"""What the claims of this topic share: sources, pilot rows, and the law that they give."""

from __future__ import annotations

import numpy as np

from ...problem import AttentionProblem
from ..engine.arguments import Array
from ..engine.instances import Instance, instance
from ..engine.observers import implemented, is_default
from ..engine.registry import Context

PAPER = "Chen et al., arXiv 2112.05359"
DERIVED = "derived: see the chapter on column sampling"


@instance("worked", "L = ln [[1,2,4],[1,1,1],[3,1,1]], V = (1, 2, 3): small enough for paper")
def _worked() -> AttentionProblem:
    logits = np.log([[1.0, 2.0, 4.0], [1.0, 1.0, 1.0], [3.0, 1.0, 1.0]])
    return AttentionProblem(logits, np.eye(3), np.arange(1.0, 4.0)[:, None], scale=1.0)


def default_pilots(instance: Instance) -> int:
    """Return a quarter of the rows, at most 64."""
    return max(1, min(64, instance.m // 4))


def pilots_of(context: Context, s: int, rng: np.random.Generator) -> Array:
    """Return pilot rows, uniform with replacement, by the implementation handed in if any."""
    if is_default(context):
        return rng.integers(0, context.instance.m, s)
    return np.asarray(context.operator("pilot_rows", s, context.instance.m, rng), np.int64)


def pilot_law_of(context: Context, rows: Array, rng: np.random.Generator) -> Array:
    """Return the pilot law of the sampling package, or of the implementation handed in."""
    from ...sampling.laws import probabilities

    pair = (context.instance.a, context.instance.v)
    if is_default(context):
        return probabilities("pilot", pair, pilots=rows)
    return implemented(context, "pilot_law", len(rows), rng, source=pair, rows=rows)
