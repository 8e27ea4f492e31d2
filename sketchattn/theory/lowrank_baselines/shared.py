"""What the claims of this topic share: source, assumptions, rows whose products are logits."""

from __future__ import annotations

import math

from ...problem import AttentionProblem
from ..engine.arguments import Array
from ..engine.assumptions import DENSE, KEYS, NOT_CAUSAL, ROWS

DERIVED = "derived: see the chapter on low-rank baselines"

ON = (DENSE, ROWS, NOT_CAUSAL)
PAIRS = (*ON, KEYS)


def scaled(problem: AttentionProblem) -> tuple[Array, Array]:
    """Return ``sqrt(scale)`` times queries and keys, with the sign of the scale on the keys."""
    root = math.sqrt(abs(problem.scale))
    return root * problem.q, math.copysign(root, problem.scale) * problem.k
