"""Claims: causal forms of methods, halvings of keys, and what their constants are worth."""

from __future__ import annotations

import numpy as np

from ...problem import AttentionProblem
from ...zoo.causal_tree import CausalTree
from ..engine.arguments import Array
from ..engine.assumptions import DENSE, ROWS, VALUES
from ..engine.instances import Instance, instance
from ..engine.observers import few, implemented, is_default, problem_of, weight_rounding
from ..engine.records import Observations
from ..engine.registry import Assumption, Context, claim

# --- instances -----------------------------------------------------------------------------------


@instance("causal-keys", "causal, 45 tokens, d = 4, d_v = 3: a length that no halving divides")
def _causal_keys() -> AttentionProblem:
    rng = np.random.default_rng(31)
    q, k, v = rng.standard_normal((45, 4)), rng.standard_normal((45, 4)), rng.random((45, 3))
    return AttentionProblem(2 * q, k, v, causal=True)


# --- the halving tree ----------------------------------------------------------------------------


def _test_square(seen: Instance) -> str | None:
    return None if seen.m == seen.n else "has queries and keys of different number"


SQUARE = Assumption("as many queries as keys, for a causal mask", _test_square)


def _causal(context: Context) -> AttentionProblem:
    """Return the problem with a causal mask."""
    problem = problem_of(context.instance)
    context.require(problem.n_q == problem.n_k, "some keys are masked for all queries")
    if problem.causal:
        return problem
    return AttentionProblem(*problem.arrays, scale=problem.scale, causal=True)


@claim(
    "training_free.tree_exact",
    title="A tree whose blocks are exact is causal attention",
    statement="""rec(a, z) = exact causal attention for z - a <= leaf; else with the middle h its
        rows a..h are rec(a, h), and its rows h..z merge rec(h, z) with the attention of the queries
        h..z to the keys a..h by their normalisers.  With exact blocks rec(0, n) V = A V for every
        leaf, A with its causal mask; for leaf >= n nothing is approximated.""",
    source=(
        "Han et al., arXiv 2310.05869, causal masking by recursion, which adds up errors of log n "
        "levels; the identity derived: below the diagonal each key is in one block of each row"
    ),
    status="derived",
    kind="inequality",
    observes="max over rows of |A V - rec(0, n) V|_1 over max |V|, which must be zero",
    assumptions=(DENSE, VALUES, ROWS, SQUARE),
    recorded={"causal-keys": "holds", "heads": "holds"},
)
def _tree_exact(context: Context) -> Observations:
    problem = _causal(context)
    size = float(np.abs(problem.values).max(initial=0.0))
    context.require(size > 0, "the values are zero")
    values = []
    for leaf, rng in zip((1, 8, problem.n_k), few(context), strict=False):
        found = _tree(context, problem, leaf, rng)
        values.append(float(np.abs(found - problem.output).max(initial=0.0)) / size)
    rounding = weight_rounding(problem) * (2 + np.log2(problem.n_k + 1))
    return Observations(values, 0.0, rounding=float(rounding))


def _tree(
    context: Context, problem: AttentionProblem, leaf: int, rng: np.random.Generator
) -> Array:
    """Return the output of the tree with exact blocks, or of the implementation handed in."""
    if is_default(context):
        return CausalTree(1, inner="exact", leaf=leaf).attend(problem)
    return implemented(context, "tree", leaf, rng, problem=problem)
