"""Claims: norms, distances and inner products of vectors; subspaces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..engine.arguments import Array
from ..engine.assumptions import PRODUCT
from ..engine.audited import (
    Parameters,
    distortion,
    law_of,
    listed,
    sampled,
    sketched,
    subspace_dimension,
)
from ..engine.instances import Instance
from ..engine.observers import on_heads, square
from ..engine.records import Observations
from ..engine.registry import Context, claim
from .embeddings import (
    inner_product_min_dim,
    jl_min_dim,
    jl_min_dim_achlioptas,
    jl_min_dim_chebyshev,
    jl_min_dim_dg,
    jl_min_dim_exact_gaussian,
    jl_sparse_chebyshev,
    jl_tail_gaussian,
    ose_countsketch,
    ose_gaussian,
    ose_gaussian_sv,
    ose_leverage,
    ose_sjlt,
    ose_srht,
    ose_uniform,
)
from .shared import EPS_LADDER, NLALIB

# --- vectors --------------------------------------------------------------------------------


def _spikiest_row(instance: Instance) -> Array:
    """Return the row of A whose square is most concentrated, as a column of norm one (n, 1)."""

    def compute() -> Array:
        squares = instance.a**2
        total = squares.sum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            spikes = np.where(total > 0, (squares**2).sum(axis=1) / total**2, 0.0)
        row = instance.a[int(np.argmax(spikes))]
        out: Array = (row / np.linalg.norm(row))[:, None]
        return out

    return instance.cached("spikiest row", compute)


def _norm_errors(
    context: Context, kind: str, r: int, eps: float, delta: float, **parameters: Any
) -> Observations:
    """Observe ``| |Sx|^2/|x|^2 - 1 |`` for the spikiest row x of A."""
    context.below(r, context.instance.n, eps, delta)
    x = _spikiest_row(context.instance)
    values = [
        abs(square(image) - 1.0)
        for image in sketched(context, kind, r, x, "spikiest row", **parameters)
    ]
    return Observations(values, eps, delta=delta, rank=r, predictor="zero", trivial=1.0)


NORM_ERROR = "| |Sx|^2 - |x|^2 | / |x|^2 for the row x of A with the largest |x|_4^4/|x|_2^4"
VECTOR = "for a fixed x: P(| |Sx|^2 - |x|^2 | > eps |x|^2) <= delta once"
LIGHT_SOURCE = "derived: moment generating functions; for s = 1, 3 Achlioptas, JCSS 66 (2003)"

# kind -> parameters, right side of "r >=", rows, status, source
NORM_CLAIMS: dict[str, tuple[Parameters, str, Callable[[float, float], int], str, str]] = {
    "gaussian": (
        {},
        "exp(-(r/2)(eps - ln(1+eps))) + exp(-(r/2)(-eps - ln(1-eps))) <= delta",
        lambda eps, delta: int(jl_min_dim(2, eps, delta, form="both")),
        "published",
        f"Chernoff's bound for chi^2; {NLALIB}, JL.lean, for a weaker form",
    ),
    **{
        kind: (
            parameters,
            "r >= ln(2/delta)/(eps^2/4 - eps^3/6)",
            lambda eps, delta: int(jl_min_dim(2, eps, delta)),
            "derived",
            LIGHT_SOURCE,
        )
        for kind, parameters in (("rademacher", {}), ("uniform", {}), ("sparse", {"s": 3.0}))
    },
    **{
        kind: (
            parameters,
            "r >= 2/(eps^2 delta)",
            lambda eps, delta: int(jl_min_dim_chebyshev(eps, delta)),
            "derived",
            "derived: Chebyshev with Var |Sx|^2 <= 2 |x|^4/r; SciPy documents it for countsketch",
        )
        for kind, parameters in (
            ("countsketch", {}),
            ("sjlt", {"s": 4}),
            ("srht", {}),
            ("haar", {}),
        )
    },
}


def _register_norm(kind: str) -> None:
    parameters, condition, rows, status, source = NORM_CLAIMS[kind]

    @claim(
        f"sketching.jl_norm_{kind}",
        title=f"Johnson-Lindenstrauss: norm of one vector, {kind}",
        statement=f"S {kind}{listed(parameters)}; {VECTOR} {condition}.",
        source=source,
        status=status,
        kind="tail",
        observes=NORM_ERROR,
        assumptions=PRODUCT,
        recorded={"clusters": "holds", "heads": "holds"},
        constants=parameters,
        ladder=EPS_LADDER,
    )
    def observe(context: Context, *, eps: float = 0.5, delta: float = 0.05) -> Observations:
        return _norm_errors(context, kind, rows(eps, delta), eps, delta, **parameters)


for _kind in NORM_CLAIMS:
    _register_norm(_kind)


@claim(
    "sketching.jl_norm_very_sparse",
    title="Johnson-Lindenstrauss: norm of one vector, very sparse, by Chebyshev",
    statement=f"""S sparse with density 1/s; {VECTOR}
        r >= (2 + (s-3) |x|_4^4/|x|_2^4)/(eps^2 delta).""",
    source="derived: Var |Sx|^2 = (2 + (s-3) |x|_4^4/|x|_2^4) |x|^4/r",
    status="derived",
    kind="tail",
    observes=NORM_ERROR,
    assumptions=PRODUCT,
    recorded={"clusters": "holds", "spike": "vacuous", "heads": "vacuous"},
    ladder=EPS_LADDER,
)
def _norm_very_sparse(
    context: Context, *, s: float = 64.0, eps: float = 0.5, delta: float = 0.05
) -> Observations:
    x = _spikiest_row(context.instance)
    r = int(jl_sparse_chebyshev(x[:, 0], s, eps, delta))
    return _norm_errors(context, "sparse", r, eps, delta, s=s)


@claim(
    "sketching.jl_sparse_without_dimension",
    title="A tail without dimension for any sparsity",
    statement="""S sparse with density 1/s, any s: P(| |Sx|^2 - |x|^2 | > eps |x|^2) <=
        2 exp(-r (eps^2/4 - eps^3/6)) for every fixed x.""",
    source=(
        "the bound for s <= 3 taken for all s; refuted: for x = e_1 and s = r = 64 a row hits the "
        "entry with probability 1/64, and P = .629"
    ),
    status="refuted",
    kind="tail",
    observes=NORM_ERROR,
    assumptions=PRODUCT,
    recorded={"spike": "violated"},
    ladder=tuple({"rank": r} for r in (16, 64, 256)),
)
def _sparse_without_dimension(
    context: Context, *, s: float = 64.0, eps: float = 0.5, rank: int = 64
) -> Observations:
    delta = float(jl_tail_gaussian(rank, eps, form="closed"))
    return _norm_errors(context, "sparse", rank, eps, delta, s=s)


def _points(instance: Instance, count: int) -> tuple[Array, Array]:
    """Return distinct rows of A as columns (n, N), N <= count, and their distances (pairs,)."""

    def compute() -> tuple[Array, Array]:
        rows = np.unique(np.linspace(0, instance.m - 1, min(count, instance.m)).astype(int))
        points = np.unique(instance.a[rows], axis=0).T
        first, second = np.triu_indices(points.shape[1], 1)
        difference = points[:, first] - points[:, second]
        return np.ascontiguousarray(points), np.linalg.norm(difference, axis=0)

    return instance.cached(("points", count), compute)


def _pair_errors(
    context: Context,
    kind: str,
    points: int,
    rows: Callable[[int], int],
    eps: float,
    delta: Callable[[int], float],
    **parameters: Any,
) -> Observations:
    """Observe the largest ``| |S(x-y)|^2/|x-y|^2 - 1 |`` over the pairs of rows of A."""
    x, distances = _points(context.instance, points)
    count = x.shape[1]
    context.require(count >= 2, "needs two distinct rows of A")
    # Differences of this size are rounding.
    context.require(
        bool(distances.min() > 1e-7 * np.linalg.norm(x, axis=0).max()),
        "needs rows of A that differ by more than rounding",
    )
    r, failure = rows(count), delta(count)
    context.below(r, context.instance.n, eps, failure)
    first, second = np.triu_indices(count, 1)
    values = []
    for image in sketched(context, kind, r, x, ("points", points), **parameters):
        difference = image[:, first] - image[:, second]
        ratios = np.einsum("ij,ij->j", difference, difference) / distances**2
        values.append(float(np.abs(ratios - 1).max()))
    return Observations(values, eps, delta=failure, rank=r, predictor="zero", trivial=1.0)


PAIR_ERROR = "max over pairs of 32 rows x, y of A of | |S(x-y)|^2 - |x-y|^2 | / |x-y|^2"
PAIRS = "for N fixed points: P(some | |S(x-y)|^2 - |x-y|^2 | > eps |x-y|^2) <="


def _register_pairs(kind: str, parameters: Parameters, status: str, source: str) -> None:
    @claim(
        f"sketching.jl_pairs_{kind}",
        title=f"Johnson-Lindenstrauss: all distances of N points, {kind}",
        statement=f"""S {kind}{listed(parameters)}; {PAIRS} delta once
            r >= ln(N(N-1)/delta)/(eps^2/4 - eps^3/6).""",
        source=source,
        status=status,
        kind="tail",
        observes=PAIR_ERROR,
        assumptions=PRODUCT,
        recorded={"clusters": "holds", "heads": "holds"},
        constants=parameters,
        ladder=EPS_LADDER,
    )
    def observe(
        context: Context, *, eps: float = 0.5, delta: float = 0.05, points: int = 32
    ) -> Observations:
        return _pair_errors(
            context,
            kind,
            points,
            lambda count: int(jl_min_dim(count, eps, delta)),
            eps,
            lambda count: delta,
            **parameters,
        )


_register_pairs("gaussian", {}, "published", f"{NLALIB}, JL.lean, with 2N^2 for N(N-1)")
_register_pairs("rademacher", {}, "derived", LIGHT_SOURCE)
_register_pairs("sparse", {"s": 3.0}, "derived", LIGHT_SOURCE)


@claim(
    "sketching.jl_pairs_exact_gaussian",
    title="Johnson-Lindenstrauss: all distances of N points, Gaussian, from the exact law",
    statement=f"""S gaussian; {PAIRS} delta once
        M (P(chi2_r > r(1+eps)) + P(chi2_r < r(1-eps))) <= delta, M = N(N-1)/2.""",
    source="derived: r |Sx|^2/|x|^2 is chi^2 with r degrees of freedom",
    status="derived",
    kind="tail",
    observes=PAIR_ERROR,
    assumptions=PRODUCT,
    recorded={
        "clusters": "inconclusive",
        **on_heads("holds", inconclusive="0.6 1.9 2.6 4.1 4.8"),
    },
    ladder=EPS_LADDER,
)
def _pairs_exact(
    context: Context, *, eps: float = 0.5, delta: float = 0.05, points: int = 32
) -> Observations:
    return _pair_errors(
        context,
        "gaussian",
        points,
        lambda count: int(jl_min_dim_exact_gaussian(count * (count - 1) // 2, eps, delta)),
        eps,
        lambda count: delta,
    )


@claim(
    "sketching.jl_pairs_dasgupta_gupta",
    title="Johnson-Lindenstrauss: all distances of N points, the existence lemma",
    statement=f"""S gaussian; {PAIRS} 1 - 1/N once r >= 4 ln N/(eps^2/2 - eps^3/3): with
        probability 1/N all distances are kept, so that such a map exists.""",
    source="Dasgupta and Gupta, Random Structures and Algorithms 22 (2003), Theorem 2.1",
    status="published",
    kind="tail",
    observes=PAIR_ERROR,
    assumptions=PRODUCT,
    recorded={"clusters": "holds", "heads": "holds"},
    ladder=EPS_LADDER,
)
def _pairs_dg(context: Context, *, eps: float = 0.5, points: int = 32) -> Observations:
    return _pair_errors(
        context,
        "gaussian",
        points,
        lambda count: int(jl_min_dim_dg(count, eps)),
        eps,
        lambda count: 1 - 1 / count,
    )


@claim(
    "sketching.jl_pairs_achlioptas",
    title="Johnson-Lindenstrauss: all distances of N points, Achlioptas",
    statement=f"""S with independent entries sqrt(3/r) times +1, 0, -1 with probabilities 1/6,
        2/3, 1/6; {PAIRS} N^-beta once r >= (4 + 2 beta) ln N/(eps^2/2 - eps^3/3).""",
    source="Achlioptas, JCSS 66 (2003), Theorem 1.1",
    status="published",
    kind="tail",
    observes=PAIR_ERROR,
    assumptions=PRODUCT,
    recorded={"clusters": "holds", "heads": "holds"},
    ladder=EPS_LADDER,
)
def _pairs_achlioptas(
    context: Context, *, eps: float = 0.5, beta: float = 1.0, points: int = 32
) -> Observations:
    return _pair_errors(
        context,
        "sparse",
        points,
        lambda count: int(jl_min_dim_achlioptas(count, eps, beta)),
        eps,
        lambda count: count**-beta,
        s=3.0,
    )


def _nearest_pair(instance: Instance) -> Array:
    """Return the row of A and the column of V with the largest cosine, each of norm one (n, 2)."""

    def compute() -> Array:
        norms = np.outer(np.linalg.norm(instance.a, axis=1), np.linalg.norm(instance.v, axis=0))
        cosines = np.divide(
            np.abs(instance.product), norms, out=np.full(norms.shape, -1.0), where=norms > 0
        )
        i, j = np.unravel_index(int(np.argmax(cosines)), cosines.shape)
        pair = np.stack([instance.a[i], instance.v[:, j]], axis=1)
        out: Array = pair / np.linalg.norm(pair, axis=0)
        return out

    return instance.cached("nearest pair", compute)


def _register_inner(kind: str) -> None:
    gaussian = kind == "gaussian"
    condition = (
        "r >= 2 ln(2/delta)/(eps - ln(1+eps)), any eps > 0"
        if gaussian
        else "r >= ln(4/delta)/(eps^2/4 - eps^3/6), eps <= 1"
    )

    @claim(
        f"sketching.jl_inner_{kind}",
        title=f"Inner product of two vectors, {kind}",
        statement=f"""S {kind}; for fixed x, y: P(|<Sx, Sy> - <x, y>| > eps |x| |y|) <= delta once
            {condition}.  Additive: no version relative to |<x, y>| exists.""",
        source=(
            "derived: the moment generating function is largest for parallel vectors"
            if gaussian
            else "derived: polarization of the tail of norms"
        ),
        status="derived",
        kind="tail",
        observes="|<Sx, Sy> - <x, y>| / (|x| |y|), x a row of A and y a column of V",
        assumptions=PRODUCT,
        recorded={"clusters": "holds", **on_heads("vacuous", holds="0.0 0.6 2.6 3.4")},
        ladder=EPS_LADDER,
    )
    def observe(context: Context, *, eps: float = 0.5, delta: float = 0.05) -> Observations:
        # Two tails of norms, of x + y and x - y, for one of an inner product.
        r = int(inner_product_min_dim(1, eps, delta) if gaussian else jl_min_dim(2, eps, delta / 2))
        context.below(r, context.instance.n, eps, delta)
        pair = _nearest_pair(context.instance)
        exact = float(pair[:, 0] @ pair[:, 1])
        values = [
            abs(float(image[:, 0] @ image[:, 1]) - exact)
            for image in sketched(context, kind, r, pair, "nearest pair")
        ]
        # Zero is off by |<x, y>|.
        return Observations(values, eps, delta=delta, rank=r, predictor="zero", trivial=abs(exact))


for _kind in ("gaussian", "rademacher"):
    _register_inner(_kind)


# --- subspaces ------------------------------------------------------------------------------


def _embedding(
    context: Context,
    kind: str,
    rows: int,
    eps: float,
    delta: float,
    *,
    law: str | None = None,
    observe: Callable[[Array], float] = distortion,
    **parameters: Any,
) -> Observations:
    """Observe the distortion of range(V)."""
    instance = context.instance
    context.below(rows, instance.n, eps, delta)
    basis = instance.value_basis
    if kind.startswith("sample_"):
        images = sampled(context, kind, rows, basis, law_of(instance, law or "uniform"))
    else:
        images = sketched(context, kind, rows, basis, "basis", **parameters)
    values = [observe(image) for image in images]
    return Observations(values, eps, delta=delta, rank=rows, predictor="zero", trivial=1.0)


DISTORTION = "|U^T S^T S U - I|_2 for an orthonormal basis U of range(V), by eigenvalues"
EMBEDS = "with probability at least 1 - delta |U^T S^T S U - I|_2 <= eps for U (n, q) orthonormal"
SUBSPACE_RECORD = {"subspace-512": "holds", "heads": "vacuous"}
OSE_LADDER = tuple({"eps": e} for e in (0.9, 0.7, 0.5))


def _register_ose_gaussian(sharp: bool) -> None:
    @claim(
        "sketching.ose_gaussian" + ("" if sharp else "_loose"),
        title="Subspace embedding, Gaussian",
        statement=f"""S gaussian: {EMBEDS} once r >= """
        + (
            "(sqrt(q) + sqrt(2 ln(2/delta)))^2/(sqrt(1+eps) - 1)^2."
            if sharp
            else "18 (q + 2 ln(2/delta))/eps^2."
        ),
        source=(
            "derived: extreme singular values of Gaussian matrices"
            if sharp
            else f"{NLALIB}, GaussianEmbedding"
        ),
        status="derived" if sharp else "published",
        kind="tail",
        observes=DISTORTION,
        assumptions=PRODUCT,
        recorded=SUBSPACE_RECORD if sharp else {"subspace-1024": "holds", "heads": "vacuous"},
        constants={} if sharp else {"factor": 18.0},
        ladder=OSE_LADDER,
    )
    def observe(context: Context, *, eps: float = 0.5, delta: float = 0.05) -> Observations:
        rows = int(ose_gaussian(subspace_dimension(context.instance), eps, delta, sharp=sharp))
        return _embedding(context, "gaussian", rows, eps, delta)


_register_ose_gaussian(True)
_register_ose_gaussian(False)


def _norm_distortion(image: Array) -> float:
    sigma = np.linalg.svd(image, compute_uv=False)
    return float(np.abs(sigma - 1).max())


@claim(
    "sketching.ose_gaussian_sv",
    title="Singular values of a sketched basis, Gaussian",
    statement="""S gaussian: with probability at least 1 - delta all singular values of S U are in
        [1-eps, 1+eps] for U (n, q) orthonormal once
        r >= (sqrt(q) + sqrt(2 ln(2/delta)))^2/eps^2.""",
    source="derived: extreme singular values of Gaussian matrices",
    status="derived",
    kind="tail",
    observes="max |sigma_i(S U) - 1| for an orthonormal basis U of range(V)",
    assumptions=PRODUCT,
    recorded={"subspace-512": "holds", "heads": "holds"},
    ladder=OSE_LADDER,
)
def _ose_gaussian_sv(context: Context, *, eps: float = 0.5, delta: float = 0.05) -> Observations:
    rows = int(ose_gaussian_sv(subspace_dimension(context.instance), eps, delta))
    return _embedding(context, "gaussian", rows, eps, delta, observe=_norm_distortion)


MARKOV_EMBEDDINGS: dict[str, Parameters] = {
    "countsketch": {},
    "sjlt": {"s": 4},
    "osnap": {"s": 4},
    "rademacher": {},
    "srht": {},
}


def _register_ose_markov(kind: str) -> None:
    parameters = MARKOV_EMBEDDINGS[kind]
    published = kind == "countsketch"

    @claim(
        f"sketching.ose_markov_{kind}",
        title=f"Subspace embedding, {kind}, by Markov",
        statement=f"""S {kind}{listed(parameters)}: {EMBEDS} once
            r >= (q^2 + q - 2 sum_j l_j^2)/(delta eps^2), l_j the leverage scores; in particular
            once r >= (q^2 + q)/(delta eps^2), which is used here.""",
        source=f"{NLALIB}, CountSketchTail" if published else "derived: the exact second moment",
        status="published" if published else "derived",
        kind="tail",
        observes=DISTORTION,
        assumptions=PRODUCT,
        recorded={"subspace-4096": "holds", "heads": "vacuous"},
        constants=parameters,
        ladder=OSE_LADDER,
    )
    def observe(context: Context, *, eps: float = 0.5, delta: float = 0.05) -> Observations:
        rows = int(ose_countsketch(subspace_dimension(context.instance), eps, delta))
        rows += -rows % 4  # osnap needs a multiple of s
        return _embedding(context, kind, rows, eps, delta, **parameters)


for _kind in MARKOV_EMBEDDINGS:
    _register_ose_markov(_kind)


@claim(
    "sketching.ose_srht",
    title="Subspace embedding, subsampled randomized Hadamard transform",
    statement=f"""S srht with distinct rows, n a power of two: {EMBEDS} once
        r >= (3 Lam/eps^2) ln(4q/delta), Lam = (sqrt(q) + sqrt(8 ln(2n/delta)))^2; r = n is
        exact.""",
    source=f"{NLALIB}, SRHT",
    status="published",
    kind="tail",
    observes=DISTORTION,
    assumptions=PRODUCT,
    recorded={"subspace-4096": "holds", "heads": "vacuous"},
    constants={"factor": 3.0, "inner": 8.0},
    ladder=({"eps": 0.99}, {"eps": 0.95}, {"eps": 0.9}),
)
def _ose_srht(context: Context, *, eps: float = 0.9, delta: float = 0.05) -> Observations:
    instance = context.instance
    padded = 1 << (instance.n - 1).bit_length()
    rows = int(ose_srht(padded, subspace_dimension(instance), eps, delta))
    return _embedding(context, "srht", rows, eps, delta)


def _register_ose_sampling(uniform: bool) -> None:
    @claim(
        "sketching.ose_" + ("uniform" if uniform else "leverage"),
        title=f"Subspace embedding, columns drawn {'uniformly' if uniform else 'by leverage'}",
        statement="""Rows of U drawn with replacement by """
        + ("p_j = 1/n" if uniform else "p_j >= beta l_j/q (here beta = 1)")
        + f""", weighted by 1/(r p_j): {EMBEDS} once r >= """
        + (
            "3 n max_j l_j ln(2q/delta)/eps^2."
            if uniform
            else "(3q/(beta eps^2)) ln(2q/delta); the failure is 2q exp(-beta r eps^2/(3q))."
        ),
        source=(
            "derived: the same with beta = q/(n max_j l_j)"
            if uniform
            else f"{NLALIB}; matrix Chernoff with summands <= q/(beta r)"
        ),
        status="derived" if uniform else "published",
        kind="tail",
        observes=DISTORTION,
        assumptions=PRODUCT,
        recorded={"subspace-4096": "holds", "heads": "vacuous"},
        constants={"factor": 3.0, **({} if uniform else {"beta": 1.0})},
        ladder=OSE_LADDER,
    )
    def observe(context: Context, *, eps: float = 0.5, delta: float = 0.05) -> Observations:
        instance = context.instance
        basis = instance.value_basis
        q = basis.shape[1]
        if uniform:
            top = float(np.einsum("ij,ij->i", basis, basis).max())
            rows = int(ose_uniform(instance.n, min(top, 1.0), q, eps, delta))
        else:
            rows = int(ose_leverage(q, 1.0, eps, delta))
        law = "uniform" if uniform else "leverage"
        return _embedding(context, "sample_wr", rows, eps, delta, law=law)


_register_ose_sampling(False)
_register_ose_sampling(True)


@claim(
    "sketching.ose_sjlt",
    title="Subspace embedding, sparse, machine-checked constants",
    statement=f"""S sjlt: {EMBEDS} with s = ceil(1356 Q/eps) nonzeros a column and
        r = ceil(306456 (q + Q)/eps^2) rows, Q = max(1, ceil(log2(q/delta))).""",
    source=f"{NLALIB}, SparseEmbedding",
    status="published",
    kind="tail",
    observes=DISTORTION,
    assumptions=PRODUCT,
    recorded={"subspace-4096": "vacuous", "heads": "vacuous"},
    constants={"s_factor": 1356.0, "r_factor": 306456.0},
)
def _ose_sjlt(context: Context, *, eps: float = 0.5, delta: float = 0.05) -> Observations:
    size = ose_sjlt(subspace_dimension(context.instance), eps, delta)
    return _embedding(context, "sjlt", int(size.r), eps, delta, s=int(size.s))
