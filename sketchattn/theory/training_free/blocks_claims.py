"""Claims: sorted blocks beside a sample (HyperAttention, KDEformer), and what they assume."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ...base.draws import Draw
from ...problem import AttentionProblem
from ...zoo.sorted_blocks.hyperattention import HyperAttention
from ...zoo.sorted_blocks.laws import key_probabilities
from ...zoo.sorted_blocks.layout import Blocks, sort_blocks, weighted_sample
from ...zoo.sorted_blocks.published import approximate_normalizers, value_shares
from ..engine.arguments import Array
from ..engine.assumptions import DENSE, NOT_CAUSAL, PRODUCT, ROWS, VALUES
from ..engine.instances import Instance, instance
from ..engine.observers import (
    BETTER,
    ROUNDING,
    default_rank,
    few,
    implemented,
    is_default,
    problem_of,
    spectral,
    square,
)
from ..engine.records import Observations, Series
from ..engine.registry import Assumption, Context, claim
from .blocks import (
    alpha_kappa,
    mixed_bernstein,
    mixed_law,
    normalizer_variance,
    product_error,
    published_samples,
)

HYPER = "Han et al., arXiv 2310.05869 (ICLR 2024)"
KDE = "Zandieh et al., arXiv 2302.02451"
DERIVED = "derived: see the chapter on training-free competitors"
PLANES = 7
LAWS = ("uniform", "value", "kde_released", "oracle")

# --- instances -----------------------------------------------------------------------------------


@instance("block-sample", "64 Gaussian queries, keys and values, d = 4, d_v = 3: numbers are known")
def _block_sample() -> AttentionProblem:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((64, d)) for d in (4, 4, 3))
    return AttentionProblem(q, k, v)


@instance("nearly-flat", "1024 queries and keys with logits below 0.01: rows are nearly uniform")
def _nearly_flat() -> AttentionProblem:
    rng = np.random.default_rng(23)
    q, k, v = (rng.standard_normal((1024, d)) for d in (8, 8, 3))
    return AttentionProblem(0.03 * q, 0.03 * k, v)


@instance(
    "half-read", "16 queries that read 512 of 1024 keys alike, values 1 there and -1 elsewhere"
)
def _half_read() -> AttentionProblem:
    side = np.where(np.arange(1024) % 2 == 0, 1.0, -1.0)[:, None]
    return AttentionProblem(np.ones((16, 1)), 10 * side, side, scale=1.0)


# --- what observers share ------------------------------------------------------------------------

ON = (DENSE, VALUES, ROWS, NOT_CAUSAL)


class _Blocks(NamedTuple):
    """Hold the blocks that all trials of a check share, and the exact matrix."""

    problem: AttentionProblem
    planes: Array
    blocks: Blocks
    outside: Array
    samples: int

    def law(self, name: str) -> Array:
        """Return p (n_k,)."""
        n = self.problem.n_k
        p = key_probabilities(self.problem, name)
        return np.full(n, 1 / n) if p is None else p


def _blocks_of(context: Context, align: str = "code") -> _Blocks:
    """Return blocks of an eighth of the keys, at most 32, by hashes that the seed decides."""
    problem, n = problem_of(context.instance), context.instance.n
    size = max(1, min(32, n // 8))
    context.require(size < n, "one block holds all keys")

    def make() -> _Blocks:
        planes = np.random.default_rng(context.entropy).standard_normal((problem.d, PLANES))
        q, k, _ = problem.arrays
        blocks = sort_blocks(q, k, planes, size, order="inverse", align=align)
        outside = blocks.queries[:, None] != blocks.keys
        return _Blocks(problem, planes, blocks, outside, size)

    return context.instance.cached(("sorted blocks", context.entropy, align), make)


def _estimates(context: Context, seen: _Blocks, law: str) -> Iterator[tuple[Array, Array]]:
    """Yield the output and ``Dhat_i/D_i`` of one draw of a sample a trial."""
    problem, s = seen.problem, seen.samples
    exact = problem.logsumexp
    method = HyperAttention(1, block=seen.blocks.size, sample=s, planes=PLANES, probabilities=law)
    p = seen.law(law)
    for rng in context.generators():
        if is_default(context):
            draw = Draw(planes=seen.planes, uniforms=rng.random(s))
            out, lse = method.attend_with_lse(problem, draw=draw)
        else:
            found = implemented(
                context,
                "block_sample",
                s,
                rng,
                problem=problem,
                query_blocks=seen.blocks.queries,
                key_blocks=seen.blocks.keys,
                p=p,
            )
            out, lse = found[:, :-1], found[:, -1]
        yield out, np.exp(lse - exact)


def _deviation(terms: Array, p: Array, samples: int) -> float:
    """Return the standard deviation of a mean of s draws of ``terms_j/p_j``."""
    squares = np.divide(terms**2, p, out=np.zeros_like(p), where=terms != 0)
    return math.sqrt(max(float(squares.sum()) - float(terms.sum()) ** 2, 0.0) / samples)


# --- blocks beside a sample ----------------------------------------------------------------------


@claim(
    "training_free.block_sample_unbiased",
    title="Numerator and denominator of blocks beside a sample are unbiased",
    statement="""Given the blocks, keys l_t drawn with replacement from p > 0: with
        D_i = sum_j M_ij e^{L_ij} + sum_t (1 - M_{i l_t}) e^{L_{i l_t}}/(s p_{l_t}) and N_i the same
        with the values, E Dhat = D and E Nhat = D o A V, for every p; their quotient is biased.""",
    source=f"{DERIVED}; released codes count keys of the own block twice",
    status="derived",
    kind="equality",
    observes="mean over rows of Dhat_i/D_i, and <Nhat/D, A V>/|A V|_F^2, for four laws",
    assumptions=ON,
    recorded={"block-sample": "holds", "worked": "holds", "reference": "holds", "heads": "holds"},
)
def _unbiased(context: Context) -> Observations:
    seen, (a, v) = _blocks_of(context), (context.instance.a, context.instance.v)
    exact = context.instance.product
    size = square(exact)
    context.require(size > 0, "the output is zero")
    rest = np.where(seen.outside, a, 0.0)
    along = np.einsum("ij,ij->j", rest, exact @ v.T) / size
    series, first = [], Series("", [], 1.0)
    for law in LAWS:
        sums, products, p = [], [], seen.law(law)
        for out, ratio in _estimates(context, seen, law):
            sums.append(float(ratio.mean()))
            products.append(float(np.sum(ratio[:, None] * out * exact)) / size)
        spreads = [_deviation(x, p, seen.samples) for x in (rest.mean(axis=0), along)]
        found = Series(f"sum of weights, {law}", sums, 1.0, spreads[0])
        series += [found, Series(f"numerator, {law}", products, 1.0, spreads[1])]
        first = found if law == "uniform" else first
    return Observations(
        first.values,
        1.0,
        rank=seen.samples,
        spread=first.spread,
        rounding=ROUNDING,
        series=tuple(series[1:]),
    )


@claim(
    "training_free.block_sample_variance",
    title="The variance of the denominator is known",
    statement="""Given the blocks: Var Dhat_i = (sum_j (1 - M_ij) e^{2 L_ij}/p_j - R_i^2)/s with
        R_i = sum_j (1 - M_ij) e^{L_ij}; uniform p: (n sum_j (1 - M_ij) e^{2 L_ij} - R_i^2)/s.""",
    source=DERIVED,
    status="derived",
    kind="equality",
    observes="mean over rows of (Dhat_i/D_i - 1)^2, uniform; by value norms beside it",
    assumptions=ON,
    recorded={"block-sample": "holds", "reference": "holds", "nearly-flat": "holds"},
)
def _variance(context: Context) -> Observations:
    seen, a = _blocks_of(context), context.instance.a
    series = []
    for law in LAWS[:2]:
        values = [float(np.mean((ratio - 1) ** 2)) for _, ratio in _estimates(context, seen, law)]
        theory = normalizer_variance(a, seen.outside, seen.law(law), seen.samples)
        series.append(Series(f"variance, {law}", values, float(theory.mean())))
    first = series[0]
    return Observations(
        first.values, first.target, rank=seen.samples, rounding=ROUNDING, series=(series[1],)
    )


# --- what the theorems assume --------------------------------------------------------------------


def _both(seen: Instance) -> tuple[float, float]:
    found = seen.cached("alpha and kappa", lambda: alpha_kappa(problem_of(seen)))
    return found.alpha, found.kappa


def _test_alpha_kappa(seen: Instance) -> str | None:
    alpha, kappa = _both(seen)
    limit = math.sqrt(seen.n)
    if max(alpha, kappa) <= limit:
        return None
    return (
        f"assumption violated: alpha = {alpha:.4g}, kappa = {kappa:.4g}, one of them beyond "
        f"n^(1/2) = {limit:.4g}"
    )


ALPHA_KAPPA = Assumption(
    "alpha = n max_j |A e_j|^2 and kappa, the spread of row sums of e^L, are at most n^(1/2)",
    _test_alpha_kappa,
)


@claim(
    "training_free.alpha_kappa",
    title="Columns of A are not small, nor are its row sums alike",
    statement="""alpha = n max_j |A e_j|_2^2 and kappa = max_i sum_j e^{L_ij}/min_i sum_j e^{L_ij}
        are n^{o(1)}: for the purpose of a check, at most n^{1/2}.""",
    source=(
        f"{HYPER}, the assumptions of its theorem [recalled], one half added; refuted: both fail "
        "on Gaussian inputs and on every bundled head"
    ),
    status="refuted",
    kind="inequality",
    observes="alpha and kappa; notes: log10 of the samples that the theorem asks for, eps = 1/2",
    assumptions=(DENSE, ROWS, NOT_CAUSAL),
    recorded={"nearly-flat": "holds", "block-sample": "violated", "heads": "violated"},
)
def _alpha_kappa(context: Context) -> Observations:
    n, (alpha, kappa) = context.instance.n, _both(context.instance)
    found = alpha_kappa(problem_of(context.instance))
    note = (
        f"alpha {alpha:.4g} of at most {context.instance.m * n}, kappa {kappa:.4g}; "
        f"log10 m = {published_samples(found, n, 0.5):.1f}"
    )
    return Observations([alpha, kappa], math.sqrt(n), rounding=ROUNDING * n, notes=note)


@claim(
    "training_free.approximate_normalizer",
    title="The published estimate of the normalisers",
    statement="""With m = kappa^7 alpha^2 ln n/eps^6 rows and draws, ApproxD gives
        |(Dtilde^{-1} - D^{-1}) e^L|_2 <= (eps/2) |A|_2.""",
    source=f"{HYPER}, Lemma on ApproxD [recalled], with the factor 1 in place of its Omega",
    status="published",
    kind="inequality",
    observes="the left side over |A|_2, some draws",
    assumptions=(DENSE, ROWS, NOT_CAUSAL, ALPHA_KAPPA),
    recorded={
        "nearly-flat": "holds",
        "block-sample": "not applicable",
        "heads": "not applicable",
    },
)
def _approximate_normalizer(context: Context, *, eps: float = 0.5) -> Observations:
    problem, n = problem_of(context.instance), context.instance.n
    asked = published_samples(alpha_kappa(problem), n, eps)
    count = math.ceil(10**asked) if asked < 15 else 10**15
    context.below(count, n, eps / 2)
    seen = _blocks_of(context, "rank")
    values, a = [], context.instance.a
    size = spectral(a)
    for rng in few(context):
        rows = rng.permutation(problem.n_q)[:count]
        uniforms = rng.random(count)
        drawn = weighted_sample(uniforms, None, n)
        if is_default(context):
            found = approximate_normalizers(problem, seen.blocks, rows, drawn, count, eps=eps)
        else:
            found = implemented(
                context,
                "approximate_normalizers",
                count,
                rng,
                problem=problem,
                query_blocks=seen.blocks.queries,
                key_blocks=seen.blocks.keys,
                rows=rows,
                columns=np.minimum((uniforms * n).astype(np.int64), n - 1),
                eps=eps,
            )
        off = np.expm1(problem.logsumexp - found)
        values.append(spectral(off[:, None] * a) / size)
    return Observations(values, eps / 2, rank=count, rounding=ROUNDING)


# --- products of sampled keys --------------------------------------------------------------------


def _products(context: Context, law: Array, samples: int) -> Iterator[Array]:
    """Yield ``A S^T S V - A V`` for keys drawn from a law."""
    a, v = context.instance.a, context.instance.v
    for rng in context.generators():
        if is_default(context):
            drawn = weighted_sample(rng.random(samples), law, len(v))
            found = (a[:, drawn.columns] * drawn.weights) @ v[drawn.columns]
        else:
            found = implemented(context, "mixed_sample", samples, rng, a=a, v=v)
        yield found - context.instance.product


def _implemented_law(context: Context) -> Array:
    """Return the law of the method, or of the definition where another one is checked."""
    if is_default(context):
        found = key_probabilities(problem_of(context.instance), "oracle")
        assert found is not None  # only the uniform law is None
        return found
    return mixed_law(context.instance.a, context.instance.v)


PRODUCTS = (*PRODUCT, ROWS, NOT_CAUSAL)


@claim(
    "training_free.mixed_expected_error",
    title="The error of a product of keys drawn by columns and values",
    statement="""s keys drawn with replacement by p_j = |A e_j|^2/(2 |A|_F^2) + |v_j|^2/(2 |V|_F^2),
        weighted by 1/(s p_j): E |A S^T S V - A V|_F^2 =
        (sum_j |A e_j|^2 |v_j|^2/p_j - |A V|_F^2)/s.""",
    source=DERIVED,
    status="derived",
    kind="equality",
    observes="|A S^T S V - A V|_F^2, mean over draws",
    assumptions=PRODUCTS,
    recorded={"half-read": "holds", "block-sample": "vacuous", "reference": "vacuous"},
)
def _mixed_expected_error(context: Context, *, rank: int | None = None) -> Observations:
    s, law = default_rank(context, rank), _implemented_law(context)
    exact = mixed_law(context.instance.a, context.instance.v)
    theory = product_error(context.instance.a, context.instance.v, exact, s)
    values = [square(err) for err in _products(context, law, s)]
    trivial = context.instance.trivial**2
    return Observations(
        values,
        theory,
        rank=s,
        predictor=context.instance.predictor,
        trivial=trivial,
        rounding=ROUNDING * context.instance.fro**2,
    )


@claim(
    "training_free.mixed_bernstein",
    title="The spectral norm of the error of such a product",
    statement="""s keys drawn with replacement by p_j = |A e_j|^2/(2 |A|_F^2) + |v_j|^2/(2 |V|_F^2):
        P(|A S^T S V - A V|_2 >= t |A|_2 |V|_2) <= (m + d_v) exp(-s t^2/(4 max(sA, sV) +
        (2/3) t (sqrt(sA sV) + 1))), sA and sV the stable ranks of A and V.""",
    source=(
        "derived: matrix Bernstein, second moments at most 2 max(sA, sV), summands at most "
        f"sqrt(sA sV) + 1; the order is that of {KDE} [recalled]"
    ),
    status="derived",
    kind="tail",
    observes="|A S^T S V - A V|_2/(|A|_2 |V|_2)",
    assumptions=PRODUCTS,
    recorded={
        "block-sample": "vacuous",
        "reference": "vacuous",
        "half-read": "holds",
        "heads": "vacuous",
    },
)
def _mixed_bernstein(
    context: Context, *, rank: int | None = None, delta: float = 0.05
) -> Observations:
    s, seen = default_rank(context, rank, most=256), context.instance
    bound = mixed_bernstein(seen.a, seen.v, s, delta)
    size = spectral(seen.a) * spectral(seen.v)
    values = [spectral(err) / size for err in _products(context, _implemented_law(context), s)]
    trivial = spectral(seen.product) / size
    if seen.stochastic:
        trivial = min(trivial, spectral(seen.product - seen.v.mean(axis=0)) / size)
    return Observations(values, bound, delta=delta, rank=s, predictor=BETTER, trivial=trivial)


@claim(
    "training_free.value_norms_best",
    title="Norms of values alone are not better than no norms",
    statement="""Keys drawn by p_j = |v_j|^2/|V|_F^2 have at most the mean square error
        E |A S^T S V - A V|_F^2 of keys drawn uniformly, at equal s.""",
    source=(
        f"read into {HYPER}, which draws by value norms, and into an open issue of its public "
        "code, which draws uniformly; refuted: norms of columns of A count as much"
    ),
    status="refuted",
    kind="inequality",
    observes="the quotient of the two, at most 1",
    assumptions=PRODUCTS,
    recorded={"block-sample": "violated"},
)
def _value_norms_best(context: Context) -> Observations:
    a, v = context.instance.a, context.instance.v
    laws = value_shares(v), np.full(len(v), 1 / len(v))
    errors = [product_error(a, v, law, 1) for law in laws]
    context.require(errors[1] > 0, "uniform keys make no error")
    return Observations([errors[0] / errors[1]], 1.0, rounding=ROUNDING)
