"""What observers of all topics share: the problem, what is handed in, sizes, steps and records.

To check another implementation, hand it in as ``sketch``: each topic says how it is called.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np

from ...operators.solve import row_softmax
from ...problem import AttentionProblem
from .arguments import Array
from .checking import default_factory
from .instances import Instance
from .registry import Context

# Twice the unit roundoff u: k EPS is at least k u/(1 - k u), which bounds the relative rounding of
# k operations in turn, and that of a sum of k terms in units of the sum of their absolute values.
EPS = float(np.finfo(np.float64).eps)
# Sums and products of up to 2048 numbers over their size, where no exponential is taken of them:
# 2048 EPS is 5e-13, and all that is observed is made of fewer than a hundred of these.
ROUNDING = 1e-10

# The predictor of an error of which it is not recorded which of the two is the better one.
BETTER = "the better of zero and the mean of V"

# Rows of the pictures of claims that are about an error.
RANKS = tuple({"rank": r} for r in (8, 16, 32, 64))
TAIL_RANKS = tuple({"rank": r} for r in (32, 64, 128, 256))

# --- the problem, and the implementation that is observed ---------------------------------------


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


def implemented(
    context: Context, kind: str, r: int, rng: np.random.Generator, **parameters: Any
) -> Array:
    """Return what the implementation that was handed in makes, as float64."""
    found = context.operator(kind, r, context.instance.n, rng, **parameters)
    return np.asarray(found, np.float64)


def softmax_of(context: Context, logits: Array, rng: np.random.Generator) -> Array:
    """Return ``rowsoftmax(logits)``, by the softmax that was handed in where one was."""
    if not is_default(context):
        rows, columns = logits.shape
        found = context.operator("softmax", rows, columns, rng, logits=logits)
        return np.asarray(found, np.float64)
    return row_softmax(logits.copy())


def few(context: Context, most: int = 20) -> Iterator[np.random.Generator]:
    """Yield the generators of some trials: a deterministic statement needs few, if they are dear.

    At most ``most``, and three where A has more than 10^4 entries.
    """
    small = context.instance.m * context.instance.n <= 10**4
    return islice(context.generators(), most if small else min(most, 3))


def default_rank(context: Context, rank: int | None, most: int = 64, multiple: int = 1) -> int:
    """Return ``rank``, by default a quarter of the columns, at most ``most``."""
    if rank is not None:
        return rank
    r = max(1, min(most, context.instance.n // 4))
    return max(multiple, r - r % multiple)


# --- sizes --------------------------------------------------------------------------------------


def largest(x: Array) -> float:
    """Return the largest absolute value, 0 for none."""
    return float(np.abs(x).max(initial=0.0))


def square(x: Array) -> float:
    """Return ``|X|_F^2``."""
    return float(np.sum(x * x))


def spectral(x: Array) -> float:
    """Return ``|X|_2``."""
    return float(np.linalg.norm(x, 2)) if min(x.shape) > 1 else float(np.linalg.norm(x))


def quotient(found: float, bound: float, nothing: float = 0.0) -> float:
    """Return ``found / bound``, 1 where both are zero; ``nothing`` is the rounding of both."""
    if bound + nothing > 0:
        return found / (bound + nothing)
    return 1.0 if found <= 0 else math.inf


def logit_reach(problem: AttentionProblem) -> float:
    """Return a bound of the logits, in whose size whatever is made of them is rounded."""
    norms = [float(np.linalg.norm(x, axis=1).max(initial=0.0)) for x in (problem.q, problem.k)]
    return abs(problem.scale) * norms[0] * norms[1]


def logit_rounding(problem: AttentionProblem) -> float:
    """Return how far two ways to one logit, a mean of logits or their log-sum-exp may differ.

    d products in a logit, up to n_q queries or n_k logits in a mean, five more operations; both
    ways are rounded.
    """
    terms = problem.d + problem.n_q + problem.n_k + 5
    return 2 * terms * EPS * (1 + logit_reach(problem))


def weight_rounding(seen: Instance | AttentionProblem) -> float:
    """Return how far two ways to one row of weights may differ, in the 1-norm.

    Logits that differ by e change weights by the factor exp(2 e) at most; to this is added the
    rounding of sums of a row.  Of a pair (A, V) the logits are ln A, and exact.
    """
    if isinstance(seen, AttentionProblem):
        logits, count = logit_rounding(seen), seen.n_k
    else:
        logits, count = 0.0 if seen.problem is None else logit_rounding(problem_of(seen)), seen.n
    # Where logits have no digits nothing is known of a row; two rows differ by 2 at most.
    return min(2.0, 2 * math.expm1(min(2 * logits, 1.0)) + 2 * (count + 16) * EPS)


def output_rounding(seen: Instance) -> float:
    """Return how far two ways to one row of A V may differ, in the 2-norm."""
    return weight_rounding(seen) * float(np.linalg.norm(seen.v, axis=1).max(initial=0.0))


# --- records ------------------------------------------------------------------------------------


def on_heads(default: str, **others: str) -> dict[str, str]:
    """Return the record of the bundled heads: a verdict, and others on heads "layer.head"."""
    record = {"heads": default}
    for verdict, heads in others.items():
        for head in heads.split():
            layer, number = head.split(".")
            record[f"minilm/layer{layer}.head{number}"] = verdict
    return record
