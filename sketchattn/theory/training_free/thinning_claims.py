"""Claims: causal forms of methods, halvings of keys, and what their constants are worth."""

from __future__ import annotations

import numpy as np

from ...problem import AttentionProblem
from ...zoo.causal_tree import CausalTree
from ...zoo.stream_halving import StreamHalving
from ...zoo.thinformer import Thinformer
from ..engine.arguments import Array
from ..engine.assumptions import DENSE, NOT_CAUSAL, ROWS, VALUES
from ..engine.instances import Instance, instance
from ..engine.observers import (
    RANKS,
    default_rank,
    few,
    implemented,
    is_default,
    problem_of,
    weight_rounding,
)
from ..engine.records import Observations
from ..engine.registry import Assumption, Context, claim
from .thinning import PAPER, denominator_bound, signed_sum

# --- instances -----------------------------------------------------------------------------------


@instance("causal-keys", "causal, 45 tokens, d = 4, d_v = 3: a length that no halving divides")
def _causal_keys() -> AttentionProblem:
    rng = np.random.default_rng(31)
    q, k, v = rng.standard_normal((45, 4)), rng.standard_normal((45, 4)), rng.random((45, 3))
    return AttentionProblem(2 * q, k, v, causal=True)


@instance("thinned-keys", "64 Gaussian queries and keys, d = 4, d_v = 3: logits of size 1")
def _thinned_keys() -> AttentionProblem:
    g = np.random.default_rng(0)
    q, k, v = (g.standard_normal((64, width)) for width in (4, 4, 3))
    return AttentionProblem(q, k, v, scale=0.5)


@instance("small-logits", "256 Gaussian keys with logits of size 1/100: attention is nearly a mean")
def _small_logits() -> AttentionProblem:
    rng = np.random.default_rng(32)
    q, k, v = rng.standard_normal((24, 4)), rng.standard_normal((256, 4)), rng.random((256, 3))
    return AttentionProblem(0.1 * q, 0.1 * k, v, scale=1.0)


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


# --- halvings ------------------------------------------------------------------------------------

KEYS_AND_VALUES = (DENSE, VALUES, ROWS)
ONE_SET = (*KEYS_AND_VALUES, NOT_CAUSAL)


def _thinned(
    context: Context, problem: AttentionProblem, rank: int, rng: np.random.Generator
) -> tuple[Array, Array]:
    """Return the keys that are kept, and their weights."""
    if is_default(context):
        draw = Thinformer(rank, bucket=2 * problem.n_k).draw(problem, rng)
        return draw["kept"], np.exp(draw["log_weights"])
    found = implemented(context, "thinning", rank, rng, problem=problem)
    return found[0].astype(np.int64), found[1]


@claim(
    "training_free.thinning_mass",
    title="Weights of thinned keys sum to the keys",
    statement="""Halvings of any n keys in which the one of a pair that stays takes the weight of
        both, and an odd key waits with its own: after ceil(log2(n/r)) rounds at most r keys are
        left, and their weights sum to n.""",
    source="derived: a round leaves ceil(n/2) keys and moves weights only",
    status="derived",
    kind="inequality",
    observes="the larger of |sum of weights/n - 1| and (keys - r)_+, which must be zero",
    assumptions=ONE_SET,
    recorded={"reference": "holds", "worked": "holds", "small-logits": "holds", "heads": "holds"},
    ladder=RANKS,
)
def _thinning_mass(context: Context, *, rank: int | None = None) -> Observations:
    problem, r = problem_of(context.instance), default_rank(context, rank)
    n = problem.n_k
    context.require(1 <= r <= n, f"r = {r} keys of {n}")
    values = []
    for rng in few(context):
        kept, weights = _thinned(context, problem, r, rng)
        values.append(max(abs(float(weights.sum()) / n - 1), float(max(len(kept) - r, 0))))
    return Observations(values, 0.0, rank=r, rounding=n * 1e-15)


@claim(
    "training_free.thinning_unbiased",
    title="Denominators of thinned keys are unbiased",
    statement="""Each bucket is flipped by a fair bit of its own, and of a pair with different
        weights each key stays with probability proportional to its own: the mean weight of every
        key is 1, so that E Dhat_i = D_i for Dhat_i = sum_j w_j exp(L_ij), and the numerators
        likewise.  The quotient is not unbiased.""",
    source="derived: E(w_j after a round | before) = w_j, by induction over rounds",
    status="derived",
    kind="equality",
    observes="mean over rows of Dhat_i/D_i",
    assumptions=ONE_SET,
    recorded={"reference": "holds", "worked": "holds", "clusters": "holds", "heads": "holds"},
    ladder=RANKS,
)
def _thinning_unbiased(context: Context, *, rank: int | None = None) -> Observations:
    problem, r = problem_of(context.instance), default_rank(context, rank)
    context.require(1 <= r <= problem.n_k, f"r = {r} keys of {problem.n_k}")
    shares = problem.exact.to_dense().mean(axis=0)
    values = []
    for rng in context.generators():
        kept, weights = _thinned(context, problem, r, rng)
        values.append(float(shares[kept] @ weights))
    return Observations(values, 1.0, rank=r, rounding=1e-12)


@claim(
    "training_free.halving_bound",
    title="One halving, by the size of its signed sum",
    statement="""One bucket of S keys, threshold a_i = b_i max_t b_t C, C = 1/2 + ln(2 S/delta): for
        every row |Dhat_i/D_i - 1| >= exp(|scale| |q_i|^2/2)/(b D_i) sigma sqrt(2 ln(2/delta'))
        with probability delta' + delta/2 at most, sigma^2 = b_max^2 C^2/(2 C - 1).""",
    source=f"{PAPER}, the threshold; the constants derived: it is the fixed point of their sum",
    status="derived",
    kind="tail",
    observes="|Dhat_i/D_i - 1| of the row with the median bound, after one halving",
    assumptions=ONE_SET,
    constants={"delta'": 0.05},
    recorded={"small-logits": "holds", "thinned-keys": "vacuous", "heads": "vacuous"},
)
def _halving_bound(context: Context, *, delta: float = 0.5) -> Observations:
    problem = problem_of(context.instance)
    n = problem.n_k
    context.require(n >= 2 and n % 2 == 0, f"{n} keys are no pairs")
    failure = 0.05
    bounds = denominator_bound(problem, failure, delta)
    row = int(np.argsort(bounds, kind="stable")[len(bounds) // 2])
    shares = problem.exact.rows(row)[0]
    values = []
    for rng in context.generators():
        kept, weights = _thinned(context, problem, n // 2, rng)
        values.append(abs(float(shares[kept] @ weights) - 1))
    constants = signed_sum(problem, delta)
    return Observations(
        values,
        float(bounds[row]),
        delta=failure + delta / 2,
        rank=n // 2,
        predictor="zero",
        trivial=1.0,
        rounding=1e-12,
        notes=f"C = {constants.c:.3f}, sigma^2 = {constants.ratio:.3f} b_max^2",
    )


@claim(
    "training_free.stream_mass",
    title="Weights of the cache sum to the tokens seen",
    statement="""Before each block of B tokens the cache of the stream of halvings holds at most r
        keys, whose weights sum to the tokens before the block.""",
    source="derived: a halving moves weights only, and a block joins with all of its own",
    status="derived",
    kind="inequality",
    observes="the largest of |sum of weights/tokens - 1| and (keys - r)_+ of all blocks, zero",
    assumptions=(*KEYS_AND_VALUES, SQUARE),
    recorded={"causal-keys": "holds", "heads": "holds"},
    ladder=RANKS,
)
def _stream_mass(context: Context, *, rank: int | None = None) -> Observations:
    problem, r = _causal(context), default_rank(context, rank)
    n, block = problem.n_k, max(1, problem.n_k // 7)
    context.require(1 <= r <= n and problem.key_mask is None, f"r = {r} keys of {n}, or a mask")
    tokens = np.arange(block, n, block)
    values = []
    for rng in few(context):
        if is_default(context):
            draw = StreamHalving(r, block=block).draw(problem, rng)
            ends = draw["starts"]
            total = np.concatenate([[0.0], np.cumsum(np.exp(draw["log_weights"]))])
            found = np.stack([np.diff(total[ends]), np.diff(ends)])[:, 1:]
        else:
            found = implemented(context, "stream", r, rng, problem=problem, block=block)
        weight = float(np.abs(found[0] / tokens - 1).max(initial=0.0))
        values.append(max(weight, float(np.maximum(found[1] - r, 0).max(initial=0.0))))
    return Observations(values, 0.0, rank=r, rounding=n * 1e-13)
