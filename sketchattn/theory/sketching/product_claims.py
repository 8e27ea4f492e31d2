"""Claims: errors of approximate matrix products."""

from __future__ import annotations

import math

import numpy as np

from ..engine.assumptions import PRODUCT
from ..engine.audited import distortion, errors, factors, fro_errors, relative_trivial, sketched
from ..engine.instances import Instance
from ..engine.observers import BETTER, TAIL_RANKS, default_rank, on_heads, spectral, square
from ..engine.records import Curve, Observations, root
from ..engine.registry import Context, claim
from .moments import amm_expected_sqerr, square_norms
from .products import (
    amm_entrywise_min_dim,
    amm_fro_sampling_tail,
    amm_gaussian_tail,
    amm_spectral_expected,
    amm_spectral_min_dim,
)
from .shared import AMM_RECORD, DERIVED, EPS_LADDER, NLALIB

FRO_ERROR = "|A S^T S V - A V|_F / (|A|_F |V|_F)"


@claim(
    "sketching.amm_jl_moment",
    title="From the moment of norms to matrix products",
    statement="""If E(|Sx|^2 - |x|^2)^2 <= eps^2 |x|^4 for all x, then
        E |A S^T S V - A V|_F^2 <= eps^2 |A|_F^2 |V|_F^2.  For gaussian S eps^2 = 2/r.""",
    source=f"{NLALIB}, ApproxMultiplication; Woodruff (2014), Theorem 2.8, has 3 eps",
    status="published",
    kind="expectation",
    observes="|A S^T S V - A V|_F^2 / (|A|_F^2 |V|_F^2), mean over draws",
    assumptions=PRODUCT,
    recorded={**AMM_RECORD, **on_heads("vacuous", holds="0.6")},
    ladder=TAIL_RANKS,
    curve=Curve("jl", {"sketch": "gaussian"}, convert=root),
)
def _amm_jl_moment(context: Context, *, rank: int | None = None) -> Observations:
    r = default_rank(context, rank, most=256)
    values = [x**2 for x in fro_errors(context, "gaussian", r)]
    trivial = relative_trivial(context.instance) ** 2
    return Observations(
        values, 2 / r, rank=r, predictor=context.instance.predictor, trivial=trivial
    )


@claim(
    "sketching.amm_markov",
    title="Matrix product, by Markov on the second moment",
    statement="""P(|A S^T S V - A V|_F > eps |A|_F |V|_F) <= M/(eps^2 a) for every operator whose
        mean square error M is known; here countsketch, M = (a + b - 2c)/r, with
        eps^2 = M/(delta a).""",
    source=DERIVED,
    status="derived",
    kind="tail",
    observes=FRO_ERROR,
    assumptions=PRODUCT,
    recorded=AMM_RECORD,
    ladder=TAIL_RANKS,
    curve=Curve("jl", {"sketch": "countsketch"}),
)
def _amm_markov(context: Context, *, rank: int | None = None, delta: float = 0.05) -> Observations:
    instance = context.instance
    r = default_rank(context, rank, most=256)
    moment = float(amm_expected_sqerr("countsketch", instance.a, instance.v, r))
    eps = math.sqrt(moment / delta) / instance.fro
    values = fro_errors(context, "countsketch", r)
    return Observations(
        values,
        eps,
        delta=delta,
        rank=r,
        predictor=instance.predictor,
        trivial=relative_trivial(instance),
    )


def _register_sampling_tail(sharp: bool) -> None:
    factor, scale = ("2", "T") if sharp else ("8", "|A|_F |V|_F")

    @claim(
        "sketching.amm_sampling_tail" + ("_sharp" if sharp else ""),
        title="Columns drawn with replacement, Frobenius norm",
        statement=f"""Columns drawn with replacement by p_j >= beta |A_:j| |V_j|/T,
            T = sum_j |A_:j| |V_j|, weighted by 1/(r p_j): with probability at least 1 - delta
            |A S^T S V - A V|_F <= (eta/sqrt(beta r)) {scale} with
            eta = 1 + sqrt(({factor}/beta) ln(1/delta)); here beta = 1.""",
        source=(
            "derived: McDiarmid with differences bounded by 2T/(beta r)"
            if sharp
            else "Drineas, Kannan and Mahoney, SIAM J. Comput. 36 (2006), as quoted in arXiv "
            "2112.05359, Proposition 1"
        ),
        status="derived" if sharp else "published",
        kind="tail",
        observes=FRO_ERROR,
        assumptions=PRODUCT,
        recorded=AMM_RECORD,
        constants={"beta": 1.0, "factor": float(factor)},
        ladder=TAIL_RANKS,
        curve=Curve("column_sampling", {"law": "optimal"}),
    )
    def observe(context: Context, *, rank: int | None = None, delta: float = 0.05) -> Observations:
        instance = context.instance
        r = default_rank(context, rank, most=256)
        bound = float(amm_fro_sampling_tail(1.0, r, delta, sharp=sharp))
        if sharp:
            columns, rows = square_norms(instance.a, instance.v)
            bound *= float(np.sqrt(columns) @ np.sqrt(rows)) / instance.fro
        values = fro_errors(context, "sample_wr", r, law="optimal")
        trivial = relative_trivial(instance)
        return Observations(
            values, bound, delta=delta, rank=r, predictor=instance.predictor, trivial=trivial
        )


_register_sampling_tail(False)
_register_sampling_tail(True)


@claim(
    "sketching.amm_entrywise",
    title="Every entry of the product, Gaussian",
    statement="""S gaussian: with probability at least 1 - delta all
        |(A S^T S V - A V)_ij| <= eps |A_i| |V_:j|, hence |err|_F <= eps |A|_F |V|_F, once
        r >= 2 ln(2 m d_v/delta)/(eps - ln(1+eps)).""",
    source="derived: the tail of inner products for m d_v pairs",
    status="derived",
    kind="tail",
    observes="max_ij |err_ij| / (|A_i| |V_:j|)",
    assumptions=PRODUCT,
    recorded=AMM_RECORD,
    ladder=EPS_LADDER,
)
def _amm_entrywise(context: Context, *, eps: float = 0.5, delta: float = 0.05) -> Observations:
    instance = context.instance
    r = int(amm_entrywise_min_dim(instance.m, instance.v.shape[1], eps, delta))
    context.below(r, instance.n, eps, delta)
    norms = np.outer(np.linalg.norm(instance.a, axis=1), np.linalg.norm(instance.v, axis=0))
    scale = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
    values = [float(np.abs(err * scale).max()) for err in errors(context, "gaussian", r)]
    trivial = float(np.abs(instance.product * scale).max())
    if instance.stochastic:
        centred = instance.product - instance.v.mean(axis=0)
        trivial = min(trivial, float(np.abs(centred * scale).max()))
    return Observations(values, eps, delta=delta, rank=r, predictor=BETTER, trivial=trivial)


@claim(
    "sketching.amm_gaussian_columns",
    title="Columns of the product without any dimension, Gaussian",
    statement="""S gaussian: with probability at least 1 - delta, for all d_v columns w of V,
        |err| <= t |A w| + sqrt((1+t)/r) |w| (|A|_F + |A|_2 sqrt(2 ln(2/delta'))) with
        delta' = delta/d_v and 2 exp(-(r/2)(t - ln(1+t))) = delta'/2.""",
    source="derived: the exact law of the error of one column",
    status="derived",
    kind="tail",
    observes="max over columns of |err_:j| over its bound",
    assumptions=PRODUCT,
    recorded=AMM_RECORD,
    ladder=TAIL_RANKS,
)
def _amm_gaussian_columns(
    context: Context, *, rank: int | None = None, delta: float = 0.05
) -> Observations:
    instance = context.instance
    r = default_rank(context, rank, most=256)
    bounds = amm_gaussian_tail(instance.a, instance.v, r, delta)
    scale = np.divide(1.0, bounds, out=np.zeros_like(bounds), where=bounds > 0)
    values = [
        float((np.linalg.norm(err, axis=0) * scale).max()) for err in errors(context, "gaussian", r)
    ]
    # Where the trivial predictor is within the bound for every column, it says nothing.
    exact = np.linalg.norm(instance.product, axis=0)
    if instance.stochastic:
        centred = np.linalg.norm(instance.product - instance.v.mean(axis=0), axis=0)
        exact = np.minimum(exact, centred)
    trivial = float((exact * scale).max())
    return Observations(values, 1.0, delta=delta, rank=r, predictor=BETTER, trivial=trivial)


@claim(
    "sketching.amm_embedding",
    title="Spectral norm from an embedding of both factors",
    statement="""If S is a gam-embedding of range([A^T V]), |U^T S^T S U - I|_2 = gam, then
        |A S^T S V - A V|_2 <= gam |A|_2 |V|_2.""",
    source=DERIVED,
    status="derived",
    kind="inequality",
    observes="|A S^T S V - A V|_2 / (|A|_2 |V|_2) against gam of the same draw",
    assumptions=PRODUCT,
    recorded={"reference": "holds", "clusters": "holds"},
    ladder=tuple({"rank": r} for r in (16, 32, 48)),
)
def _amm_embedding(context: Context, *, rank: int | None = None) -> Observations:
    instance = context.instance
    r = default_rank(context, rank, most=256)
    pair = factors(instance)
    m, width = instance.m, pair.shape[1]
    # Of one size: a singular value that counts as none must be small beside both.
    sizes = np.repeat([spectral(instance.a), spectral(instance.v)], [m, width - m])
    u, sigma, _ = instance.cached(
        "factors svd", lambda: np.linalg.svd(pair / sizes, full_matrices=False)
    )
    basis = u[:, sigma > 1e-10 * sigma[0]]
    # The embedding costs the cube of the dimension of the range, for every draw.
    context.require(basis.shape[1] <= 256, f"range([A^T V]) has dimension {basis.shape[1]} > 256")
    size = spectral(instance.a) * spectral(instance.v)
    wide = np.concatenate([pair, basis], axis=1)
    values, bounds = [], []
    for image in sketched(context, "gaussian", r, wide, "factors and basis"):
        err = image[:, :m].T @ image[:, m:width] - instance.product
        values.append(spectral(err) / size)
        bounds.append(distortion(image[:, width:]))
    return Observations(values, bounds, rank=r, rounding=1e-10)


def _bernstein(instance: Instance) -> tuple[float, float]:
    """Return the mean stable rank and ``|A|_2 |V|_2``."""

    def compute() -> tuple[float, float]:
        sizes = [spectral(x) for x in (instance.a, instance.v)]
        stable = [square(x) / s**2 for x, s in zip((instance.a, instance.v), sizes, strict=True)]
        return sum(stable) / 2, sizes[0] * sizes[1]

    return instance.cached("stable ranks", compute)


BERNSTEIN_LAW = """A and V scaled to spectral norm 1, asr = (sr(A) + sr(V))/2; columns drawn with
    replacement by p_j = (|A_:j|^2 + |V_j|^2)/(2 asr), weighted by 1/(r p_j):"""
SPECTRAL_ERROR = "|A S^T S V - A V|_2 / (|A|_2 |V|_2)"


@claim(
    "sketching.amm_bernstein",
    title="Spectral norm, columns drawn by joint norms",
    statement=f"""{BERNSTEIN_LAW} P(|err|_2 >= t) <= (m+d_v) exp(-r t^2/(4 asr (1+t/3))); at most
        delta once r >= 4 asr (1+t/3) ln((m+d_v)/delta)/t^2.""",
    source="derived: matrix Bernstein, summands <= asr, second moments <= 2 asr",
    status="derived",
    kind="tail",
    observes=SPECTRAL_ERROR,
    assumptions=PRODUCT,
    recorded={"clusters": "holds", "heads": "vacuous"},
    ladder=tuple({"t": t} for t in (0.9, 0.7, 0.5, 0.35)),
)
def _amm_bernstein(context: Context, *, t: float = 0.5, delta: float = 0.05) -> Observations:
    instance = context.instance
    asr, size = _bernstein(instance)
    r = int(amm_spectral_min_dim(asr, instance.m, instance.v.shape[1], t, delta))
    context.below(r, instance.n, t, delta)
    values = [spectral(e) / size for e in errors(context, "sample_wr", r, law="spectral")]
    trivial = spectral(instance.product) / size
    return Observations(values, t, delta=delta, rank=r, predictor="zero", trivial=trivial)


@claim(
    "sketching.amm_bernstein_mean",
    title="Mean of the spectral norm, columns drawn by joint norms",
    statement=f"""{BERNSTEIN_LAW} E|err|_2 <= sqrt(4 asr ln(m+d_v)/r) + 2 asr ln(m+d_v)/(3r).""",
    source="derived: matrix Bernstein",
    status="derived",
    kind="expectation",
    observes=SPECTRAL_ERROR + ", mean over draws",
    assumptions=PRODUCT,
    recorded={"clusters": "holds", "heads": "vacuous"},
    ladder=TAIL_RANKS,
    curve=Curve("column_sampling", {"law": "spectral"}, "output_spec_amm"),
)
def _amm_bernstein_mean(context: Context, *, rank: int | None = None) -> Observations:
    instance = context.instance
    asr, size = _bernstein(instance)
    r = default_rank(context, rank, most=256)
    bound = float(amm_spectral_expected(asr, instance.m, instance.v.shape[1], r))
    values = [spectral(e) / size for e in errors(context, "sample_wr", r, law="spectral")]
    return Observations(
        values, bound, rank=r, predictor="zero", trivial=spectral(instance.product) / size
    )
